"""Inputs of a model whose integers choose elements of an axis, and how many elements that has.

Code clips an index that lies outside, so that it reads no other memory; ONNX calls it an error. Of an index that is an
input's own element, whoever calls the package can be told so before any code runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tvm import relax

from optimizer.frontend.dimensions import Dimension
from optimizer.frontend.value import AnyValue, TensorValue, Value
from optimizer.package.entry_points import IndexRange

# They pass all elements of their first input on, and change no number that is an index.
_PASSED_ON = frozenset({"Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


class IndexRanges:
    """The ranges found so far in one import."""

    def __init__(self) -> None:
        self._inputs: dict[relax.Expr, str] = {}
        self._found: dict[str, IndexRange] = {}
        self._uncertain = 0

    def begin_at(self, name: str, value: TensorValue) -> None:
        """Follow the input called `name`."""
        self._inputs[value.expr] = name

    def follow(self, operator: str, inputs: Sequence[AnyValue | None], results: Sequence[AnyValue | None]) -> None:
        """Take what a standard operator made of an input's elements for the input, if it passed all of them on."""
        if operator in _PASSED_ON and inputs and results:
            (value, *_), (result, *_) = inputs, results
            if isinstance(value, TensorValue) and isinstance(result, TensorValue) and value.expr in self._inputs:
                self._inputs[result.expr] = self._inputs[value.expr]

    @contextmanager
    def uncertain(self) -> Iterator[None]:
        """Record nothing inside: only some calls of the model compute what is imported there."""
        self._uncertain += 1
        try:
            yield
        finally:
            self._uncertain -= 1

    def record(self, indices: Value, size: Dimension, node: str, *, from_the_end: bool) -> None:
        """Record that every element of `indices` chooses one of `size`, the negative ones counted `from_the_end`."""
        if self._uncertain or not isinstance(size, int) or not isinstance(indices, TensorValue):
            return
        name = self._inputs.get(indices.expr)
        if name is not None:
            new = IndexRange(name, -size if from_the_end else 0, size - 1, node)
            known = self._found.get(name)
            if known is None or new.maximum < known.maximum or new.minimum > known.minimum:
                self._found[name] = new

    def all(self) -> tuple[IndexRange, ...]:
        """Return the narrowest range of each input that has one."""
        return tuple(self._found.values())
