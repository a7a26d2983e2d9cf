from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, tirx

from optimizer.shape_heap import lower_shapes
from optimizer.weight_checks import trust_weights

_CHECKS = {"vm.builtin.check_tuple_info", "vm.builtin.check_tensor_info", "vm.builtin.match_shape"}


def _lowered(weight_rows: int | tirx.Var) -> tvm.IRModule:
    """Return a lowered `main` that takes x of (n, 3) and two weights, and returns the second one of them."""
    x = relax.Var("x", relax.TensorType([tirx.Var("n", "int64"), 3], "float32"))
    fields = [relax.TensorType([2], "float32"), relax.TensorType([weight_rows, 3], "float32")]
    weights = relax.Var("weights", relax.TupleType(fields))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, weights]):
        builder.emit_func_output(builder.emit(relax.TupleGetItem(weights, 1)))
    return lower_shapes(relax.transform.ToNonDataflow()(builder.get()))


def _checked(module: tvm.IRModule) -> set[str]:
    """Return the parameters that errors of the checks before the first use would name."""
    calls = [binding.value for block in module["main"].body.blocks for binding in block.bindings]
    contexts = [
        call.args[-1].value
        for call in calls
        if isinstance(call, tvm.ir.Call) and isinstance(call.op, relax.ExternFunc) and call.op.global_symbol in _CHECKS
    ]
    return {name for name in ("x", "weights") if any(f"param={name}," in context for context in contexts)}


def test_inputs_are_checked_at_every_call_and_weights_are_not() -> None:
    module = _lowered(4)
    assert _checked(module) == {"x", "weights"}
    assert _checked(trust_weights(module)) == {"x"}


def test_weights_of_symbolic_shape_keep_the_checks_that_find_their_sizes() -> None:
    module = _lowered(tirx.Var("m", "int64"))
    assert _checked(trust_weights(module)) == {"x", "weights"}


def test_what_is_read_of_the_weights_stays() -> None:
    executable = relax.build(trust_weights(_lowered(4)), tvm.target.Target("llvm"), relax_pipeline=None)
    machine = relax.VirtualMachine(executable, tvm.cpu())
    weights = [tvm.runtime.tensor(np.arange(size, dtype=np.float32).reshape(shape)) for size, shape in _WEIGHTS]
    inputs = tvm.runtime.tensor(np.zeros((5, 3), np.float32))
    np.testing.assert_array_equal(machine["main"](inputs, weights).numpy(), weights[1].numpy())
    with pytest.raises(Exception, match="param=x"):
        machine["main"](tvm.runtime.tensor(np.zeros((5, 2), np.float32)), weights)


_WEIGHTS = ((2, (2,)), (12, (4, 3)))
