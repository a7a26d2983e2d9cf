from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

import targets
from optimizer.lowering import build


def _chain(step: Callable[[relax.BlockBuilder, relax.Expr], relax.Expr], length: int) -> relax.VMExecutable:
    """Return a `main` of x (n, 3) that takes `step` `length` times."""
    x = relax.Var("x", relax.TensorType([tirx.Var("n", "int64"), 3], "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            value: relax.Expr = x
            for _ in range(length):
                value = builder.emit(step(builder, value))
            result = builder.emit_output(value)
        builder.emit_func_output(result)
    module = relax.transform.LegalizeOps()(builder.get())
    return build(relax.transform.RewriteDataflowReshape()(module), targets.get("host"))


def _negated(_builder: relax.BlockBuilder, value: relax.Expr) -> relax.Expr:
    return relax.op.negative(value)


def _negated_in_another_shape(builder: relax.BlockBuilder, value: relax.Expr) -> relax.Expr:
    rows, columns = value.ty.shape.values
    flat = builder.emit(relax.op.negative(builder.emit(relax.op.reshape(value, (rows * columns,)))))
    return relax.op.reshape(flat, (rows, columns))


def _calls(executable: relax.VMExecutable) -> Counter[str]:
    lines = (line.split() for line in executable.as_text().splitlines())
    return Counter(words[1] for words in lines if words[:1] == ["call"])


def _result(executable: relax.VMExecutable, value: np.ndarray) -> np.ndarray:
    return relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(value)).numpy()


def _halves_joined(builder: relax.BlockBuilder, value: relax.Expr) -> relax.Expr:
    halves = builder.emit(relax.op.split(value, [1], axis=1))
    return relax.op.concat([builder.emit(relax.TupleGetItem(halves, part)) for part in range(2)], axis=1)


_VALUE = np.arange(12, dtype=np.float32).reshape(4, 3)


@pytest.mark.parametrize("step", [_negated, _negated_in_another_shape])
def test_more_layers_make_no_more_tensors_and_shapes(
    step: Callable[[relax.BlockBuilder, relax.Expr], relax.Expr],
) -> None:
    few, many = _chain(step, 4), _chain(step, 8)
    for name in ("alloc_tensor", "make_shape", "reshape"):
        assert _calls(few)[f"vm.builtin.{name}"] == _calls(many)[f"vm.builtin.{name}"]
    np.testing.assert_array_equal(_result(many, _VALUE), _VALUE)


def test_no_tuple_is_made_that_nobody_reads() -> None:
    executable = _chain(_halves_joined, 3)
    assert "vm.builtin.make_tuple" not in _calls(executable)
    np.testing.assert_array_equal(_result(executable, _VALUE), _VALUE)


def test_a_branch_does_not_read_what_another_one_made() -> None:
    condition = relax.Var("condition", relax.TensorType([], "bool"))
    x = relax.Var("x", relax.TensorType([tirx.Var("n", "int64"), 3], "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [condition, x]):
        branches = [
            relax.SeqExpr([relax.BindingBlock([relax.VarBinding(var, value)])], var)
            for value in (relax.op.exp(x), relax.op.negative(x))
            for var in [relax.Var("y", x.ty)]
        ]
        builder.emit_func_output(builder.emit(relax.If(condition, *branches)))
    executable = build(relax.transform.LegalizeOps()(builder.get()), targets.get("host"))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    negative = machine["main"](tvm.runtime.tensor(np.array(False)), tvm.runtime.tensor(_VALUE)).numpy()
    np.testing.assert_array_equal(negative, -_VALUE)
