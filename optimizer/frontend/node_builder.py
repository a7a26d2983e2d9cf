"""A block builder that remembers which ONNX node each variable was made for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tvm import relax


class NodeBuilder(relax.BlockBuilder):
    """Emits like TVM's builder; `nodes` maps each emitted variable to the name of its node, alone in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: dict[relax.Var, tuple[str, ...]] = {}
        self._node: str | None = None

    @property
    def node(self) -> str:
        """Return the name of the node that is imported, "" for none."""
        return self._node or ""

    @contextmanager
    def importing(self, name: str) -> Iterator[None]:
        """Take what is emitted inside to be made for the node `name`; within another node, for that one."""
        outer = self._node
        self._node = outer or name
        try:
            yield
        finally:
            self._node = outer

    def emit(self, expr: relax.Expr, name_hint: str = "") -> relax.Var:
        """Bind an expression to a new variable."""
        var = super().emit(expr, name_hint)
        if self._node is not None:
            self.nodes[var] = (self._node,)
        return var
