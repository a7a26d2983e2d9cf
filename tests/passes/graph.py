"""Small Relax modules written as Python functions over their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tvm
from tvm import relax, tirx

from passes.base import Pass, PassOutcome

Shape = Sequence[int | str] | int
Body = Callable[..., relax.Expr | Sequence[relax.Expr]]


def graph(body: Body, *shapes: Shape, dtype: str | Sequence[str] = "float32") -> tvm.IRModule:
    """Return a module whose `main` computes `body` of inputs of these shapes; dimensions that are strings are symbolic.

    Of an input whose shape is a number only the rank is known: that number. `dtype` is that of all inputs or one for
    each. Nested calls become one binding each.
    """
    dtypes = [dtype] * len(shapes) if isinstance(dtype, str) else dtype
    symbols: dict[str, tirx.Var] = {}

    def dimension(given: int | str) -> int | tirx.Var:
        return given if isinstance(given, int) else symbols.setdefault(given, tirx.Var(given, "int64"))

    def tensor(shape: Shape, kind: str) -> relax.TensorType:
        if isinstance(shape, int):
            return relax.TensorType(dtype=kind, ndim=shape)
        return relax.TensorType([dimension(given) for given in shape], kind)

    parameters = [
        relax.Var(f"x{index}", tensor(shape, kind))
        for index, (shape, kind) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    builder = relax.BlockBuilder()
    with builder.function("main", parameters):
        with builder.dataflow():
            results = body(*parameters)
            single = isinstance(results, relax.Expr)
            outputs = [builder.emit_output(result) for result in ([results] if single else results)]
        builder.emit_func_output(outputs[0] if single else relax.Tuple(outputs))
    return relax.transform.CanonicalizeBindings()(builder.get())


def assert_rewritten(item: Pass, before: Body, after: Body, *shapes: Shape, **options: object) -> None:
    """Assert that a pass makes `after` of `before`, leaves that alone, and reports that it did something."""
    outcome = item.run(graph(before, *shapes, **options))
    tvm.ir.assert_structural_equal(outcome.module, graph(after, *shapes, **options))
    assert outcome.rewritten >= 1
    assert item.run(outcome.module).rewritten == 0


def assert_kept(item: Pass, body: Body, *shapes: Shape, **options: object) -> PassOutcome:
    """Assert that a pass changes nothing, and return its outcome."""
    module = graph(body, *shapes, **options)
    outcome = item.run(module)
    tvm.ir.assert_structural_equal(outcome.module, module)
    assert outcome.rewritten == 0
    return outcome
