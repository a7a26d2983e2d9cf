from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, tirx
from tvm.relax import op

from optimizer.lowering import build, fuse, lower
from tests.schedules.execution import TARGET, integers

SHAPE = (3, 40)
CODES = integers(*SHAPE, dtype="uint8")
_Layer = Callable[[relax.Var], relax.Expr]


@dataclass(frozen=True)
class Numbers:
    """What bytes are made numbers by, and those bytes again."""

    scale: float = 0.1
    zero: int = 3
    factor: float = 20.0
    new_zero: int = 7
    low: float = 0.0

    def layer(self, x: relax.Expr) -> relax.Expr:
        whole = op.subtract(op.astype(x, "int32"), relax.const(np.int32(self.zero)))
        number = op.nn.silu(op.multiply(op.astype(whole, "float32"), single(self.scale)))
        rounded = op.add(op.round(op.multiply(number, single(self.factor))), single(self.new_zero))
        return op.astype(op.clip(rounded, self.low, 255.0), "uint8")


def single(value: float) -> relax.Expr:
    return relax.const(np.float32(value))


def of_layers(layers: Sequence[_Layer], dtype: str = "uint8") -> tvm.IRModule:
    """Return a module whose `main` gives the results of layers of an input each."""
    builder = relax.BlockBuilder()
    inputs = [relax.Var(f"x{number}", relax.TensorType(SHAPE, dtype)) for number in range(len(layers))]
    with builder.function("main", inputs):
        with builder.dataflow():
            results = [builder.emit(layer(x)) for layer, x in zip(layers, inputs, strict=True)]
            output = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(output)
    return builder.get()


def kernels(module: tvm.IRModule) -> list[tirx.PrimFunc]:
    functions = [function for _, function in fuse(module, TARGET).module.functions_items()]
    return [function for function in functions if isinstance(function, tirx.PrimFunc)]


def results(module: tvm.IRModule) -> list[np.ndarray]:
    executable = build(lower(module, TARGET).module, TARGET)
    arguments = [tvm.runtime.tensor(CODES) for _ in module["main"].params]
    return [each.numpy() for each in relax.VirtualMachine(executable, tvm.cpu())["main"](*arguments)]


scales = st.floats(2**-6, 2, width=32)
zeros = st.integers(0, 255)


@settings(max_examples=8)  # each compiles up to four modules
@given(st.lists(st.builds(Numbers, scales, zeros, scales, zeros), min_size=2, max_size=3))
def test_a_shared_kernel_computes_what_each_layer_computes_alone(layers: list[Numbers]) -> None:
    together = results(of_layers([each.layer for each in layers]))
    for layer, result in zip(layers, together, strict=True):
        np.testing.assert_array_equal(result, results(of_layers([layer.layer]))[0])


def test_layers_that_differ_in_scales_and_zero_points_are_one_kernel() -> None:
    layers = [Numbers(), Numbers(scale=0.2), Numbers(zero=9, new_zero=200), Numbers(0.3, 4, 5.0, 6)]
    (function,) = kernels(of_layers([each.layer for each in layers]))
    dtypes = [str(each.dtype) for each in function.params]
    assert dtypes == ["uint8", "uint8", "float32", "float32", "uint8", "uint8"]


def test_numbers_that_agree_everywhere_stay_in_the_kernel() -> None:
    (function,) = kernels(of_layers([Numbers().layer, Numbers(scale=0.2).layer]))
    assert [str(each.dtype) for each in function.params] == ["uint8", "float32", "uint8"]


def test_one_zero_point_before_and_after_is_one_tensor() -> None:
    (function,) = kernels(of_layers([Numbers(zero=5, new_zero=5).layer, Numbers(zero=8, new_zero=8).layer]))
    assert [str(each.dtype) for each in function.params] == ["uint8", "uint8", "uint8"]


def test_other_limits_are_another_kernel() -> None:
    assert len(kernels(of_layers([Numbers().layer, Numbers(low=7.0).layer]))) == 2


def test_layers_without_bytes_keep_their_numbers() -> None:
    def scaled(by: float) -> _Layer:
        return lambda x: op.multiply(x, single(by))

    assert len(kernels(of_layers([scaled(0.5), scaled(0.25)], "float32"))) == 2
