from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, tirx
from tvm.relax import op

from optimizer import code_generation
from passes.block_channels import BlockChannels
from schedules.division import Division, division_of, even_parts, with_division
from schedules.schedule import schedule_function, schedule_module
from schedules.workload import identity
from tests.schedules.execution import TARGET, compiled, lower, module_of, normal

BLOCK = TARGET.layouts.channel_block
Layers = Callable[[relax.Var], relax.Expr]


def _lowered(layers: Layers, shape: list[int]) -> tvm.IRModule:
    return lower(BlockChannels(BLOCK, winograd=0).run(module_of(layers, [shape], ["float32"])).module)


def _functions(module: tvm.IRModule) -> dict[str, tirx.PrimFunc]:
    return {v.name_hint: f for v, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}


def _divided(module: tvm.IRModule, division: Division) -> tvm.IRModule:
    """Return the module with all its functions told how to divide."""
    told = {v: with_division(f, division) for v, f in module.functions_items() if isinstance(f, tirx.PrimFunc)}
    return tvm.IRModule({**dict(module.functions_items()), **told})


def _squeezed(channels: int, kernel: int, stride: int) -> Layers:
    """Return a depthwise convolution, the product of its result and of its mean, a 1x1 layer and a pooling."""
    depthwise, pointwise = normal(channels, 1, kernel, kernel, seed=1), normal(16 * BLOCK, channels, 1, 1, seed=2)

    def layers(x: relax.Var) -> relax.Expr:
        y = op.nn.conv2d(x, relax.const(depthwise), strides=stride, padding=kernel // 2, groups=channels)
        y = op.multiply(op.mean(y, [2, 3], keepdims=True), y)
        return op.nn.max_pool2d(op.nn.relu(op.nn.conv2d(y, relax.const(pointwise))), (3, 3), (1, 1), (1, 1))

    return layers


@settings(max_examples=4, deadline=None, derandomize=True)
@given(
    size=st.tuples(st.integers(1, 31), st.integers(1, 31)),
    channels=st.integers(1, 3 * BLOCK),
    kernel=st.sampled_from([1, 3, 5]),
    stride=st.sampled_from([1, 2]),
    batch=st.sampled_from([1, 2]),
)
def test_values_do_not_depend_on_the_division(
    size: tuple[int, int], channels: int, kernel: int, stride: int, batch: int
) -> None:
    x = normal(batch, channels, *size)
    module = _lowered(_squeezed(channels, kernel, stride), list(x.shape))
    by_image, by_channels = (
        compiled(schedule_module(_divided(module, each), TARGET)[0])(x) for each in (Division.IMAGE, Division.CHANNELS)
    )
    np.testing.assert_array_equal(by_image, by_channels)


def _first_half_writes(function: tirx.PrimFunc, division: Division) -> np.ndarray:
    """Return where the first half of a kernel's tasks writes its result."""
    scheduled, _ = schedule_function(with_division(function, division), TARGET)

    def halved(nest: tirx.For, mutator: tvm_ffi.StructuralMutator) -> tirx.Stmt:
        if nest.kind != tirx.ForKind.PARALLEL:
            return mutator.default_mutate(nest)
        return tirx.For(nest.loop_var, nest.min, int(nest.extent) // 2, tirx.ForKind.SERIAL, nest.body)

    body = tvm_ffi.structural_mutate(scheduled.body, (tirx.For, halved))
    module = tvm.IRModule({"main": scheduled.with_body(body).with_attr("global_symbol", "main")})
    with TARGET.tvm_target() as target, code_generation.options(TARGET):
        built = tvm.tirx.build(module, target, pipeline=code_generation.pipeline(TARGET))
    arrays = [np.ones([int(each) for each in p.shape], str(p.dtype)) for p in function.params]
    arrays[-1][...] = np.nan
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    built["main"](*tensors)
    return ~np.isnan(tensors[-1].numpy())


def _assert_divided(function: tirx.PrimFunc) -> None:
    by_image, by_channels = (_first_half_writes(function, each) for each in (Division.IMAGE, Division.CHANNELS))
    # What lies in the middle is of a task of either half.
    blocks, rows = by_channels.shape[1] // 4, by_channels.shape[2] // 4
    assert by_channels[:, :blocks].all()
    assert not by_channels[:, -blocks:].any()
    assert by_image[:, :, :rows].all()
    assert not by_image[:, :, -rows:].any()


@pytest.mark.parametrize("kernel", ["to_blocks", "conv2d", "fused_conv2d1_relu", "max_pool2d"])
def test_cores_divide_the_image_or_the_channels(kernel: str) -> None:
    channels, size = 4 * BLOCK, 32
    _assert_divided(_functions(_lowered(_squeezed(channels, 3, 1), [1, channels, size, size]))[kernel])


def test_cores_divide_the_scaling_of_channels() -> None:
    shapes = [[1, 4, 32, 32, BLOCK], [1, 4, 1, 1, BLOCK]]
    (function,) = _functions(lower(module_of(op.multiply, shapes, ["float32"] * 2))).values()
    _assert_divided(function)


def test_the_division_is_no_part_of_a_workload() -> None:
    (function,) = _functions(_lowered(op.nn.relu, [1, 3, 8, 8])).values()
    told = with_division(function, Division.IMAGE)
    assert division_of(function) is Division.CHANNELS
    assert division_of(told) is Division.IMAGE
    assert identity(told) == identity(function)


@pytest.mark.parametrize(("total", "most", "parts"), [(49, 64, 49), (49, 16, 7), (3136, 64, 64), (53, 8, 1), (1, 8, 1)])
def test_even_parts(total: int, most: int, parts: int) -> None:
    assert even_parts(total, most) == parts
