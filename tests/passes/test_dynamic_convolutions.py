"""Convolutions of activations that are quantized as they come: their zero points are known to the run alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tvm
from tvm import relax

import targets
from optimizer.compile import CompileOptions
from optimizer.frontend.importer import import_model
from passes import pipeline
from passes.bound_dynamic_quantization import BoundDynamicQuantization
from tests.passes.relax_modules import operators
from tests.passes.test_block_channels import Emit, blocked, kernels, normal, weights
from tests.passes.test_recognize_integer_products import Arrays, after, model_of, run_both

# A product of weights [O, I, 3, 3], whose codes less their zero points go beyond int8, with what is quantized of d.
CONVOLUTION = """
  {q}, {q}s, {q}z = DynamicQuantizeLinear ({d})
  {q}i = ConvInteger <pads = [1, 0, 1, 2], strides = [1, 2], group = {groups}> ({q}, codes, {q}z, zero)
  {q}f = Cast <to = 1> ({q}i)
  {q}t = Mul ({q}s, scale)
  {q}m = Mul ({q}f, {q}t)
  {y} = Add ({q}m, bias)
"""


def convolutions(channels: int, groups: int, before: str, after_each: str = "Relu") -> tuple[onnx.ModelProto, Arrays]:
    """Return a model of two convolutions of as many channels, and its input."""
    rng = np.random.default_rng([channels, groups])
    first, second = (CONVOLUTION.format(q=q, d=d, y=y, groups=groups) for q, d, y in (("p", "d", "v"), ("q", "e", "y")))
    constants = {
        "codes": rng.integers(0, 256, (channels, channels // groups, 3, 3)).astype(np.uint8),
        "zero": np.uint8(101),
        "scale": np.float32(0.01),
        "bias": rng.standard_normal((1, channels, 1, 1)).astype(np.float32),
    }
    model = model_of(
        f"g (float[1, {channels}, 9, 9] x) => (float[1, {channels}, h, w] y) {{ d = {before} (x) {first} "
        f"e = {after_each} (v) {second} }}",
        constants,
    )
    return model, {"x": rng.standard_normal((1, channels, 9, 9)).astype(np.float32)}


@pytest.mark.parametrize(("channels", "groups"), [(20, 1), (20, 20)])
@pytest.mark.parametrize("before", ["Relu", "Identity"])
def test_dynamically_quantized_convolutions_are_those_of_onnxruntime(channels: int, groups: int, before: str) -> None:
    model, inputs = convolutions(channels, groups, before)
    _, refusals, _ = after(model)
    assert refusals == [None, None]
    (ours,), (reference,) = run_both(model, inputs)
    # A number within a rounding error of the border of two codes may go to either: one step of 255 of the range.
    np.testing.assert_allclose(ours, reference, atol=np.abs(reference).max() / 255, rtol=1e-5)


def test_convolutions_in_groups_of_outputs_beyond_int8_stay_as_they_are() -> None:
    model, _ = convolutions(20, 2, "Relu")
    _, refusals, _ = after(model)
    assert refusals == ["weights less their zero points beyond int8, in groups of outputs"] * 2


@pytest.mark.parametrize("between", ["Relu", "Tanh"])
def test_what_lies_between_dynamically_quantized_convolutions_stays_in_blocks(between: str) -> None:
    model, _ = convolutions(32, 1, "Relu", between)
    options = CompileOptions(targets.get("x86-avx512"))
    module, _ = pipeline.run(import_model(model).module, pipeline.parse(options.notation))
    found = kernels(module)
    # Of the input, and of the output: an image is reduced to the range of its numbers where it lies.
    assert found.count("to_blocks") == 1
    assert found[-1] == "from_blocks"
    assert found.count("from_blocks") == 1


def ranges(body: str) -> tvm.IRModule:
    model = model_of(
        f"g (float[2, 3] x) => (uint8[2, 3] y, float s, uint8 z) {{ {body} }}", {"low": np.array(-1, np.float32)}
    )
    return BoundDynamicQuantization().run(import_model(model).module).module


@pytest.mark.parametrize(
    ("body", "known"),
    [
        ("d = Relu (x) y, s, z = DynamicQuantizeLinear (d)", True),
        (
            "a = Relu (x) b = Sigmoid (x) c = Add (a, b) d = Neg (c) e = Abs (d) y, s, z = DynamicQuantizeLinear (e)",
            True,
        ),
        ("a = Softmax (x) d = Mul (a, a) y, s, z = DynamicQuantizeLinear (d)", True),
        ("y, s, z = DynamicQuantizeLinear (x)", False),
        ("d = Clip (x, low) y, s, z = DynamicQuantizeLinear (d)", False),
        ("a = Relu (x) d = Sub (a, x) y, s, z = DynamicQuantizeLinear (d)", False),
        ("a = Relu (x) d = Mul (a, x) y, s, z = DynamicQuantizeLinear (d)", False),
    ],
)
def test_no_least_number_is_looked_for_where_none_is_negative(body: str, *, known: bool) -> None:
    found = operators(ranges(body))
    assert ("relax.min" not in found) == known
    assert ("relax.negative" not in found or "relax.abs" in found) == known


@pytest.mark.parametrize("factors", [(1, 20, 1, 1), (20, 1, 1), (1, 20, 9, 9), (1,), ()])
def test_products_that_are_taken_from_a_blocked_image_keep_their_values(factors: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).standard_normal(factors).astype(np.float32)
    scale = np.random.default_rng(1).standard_normal((1,)).astype(np.float32)

    def body(emit: Emit, x: relax.Expr) -> relax.Expr:
        image = emit(relax.op.nn.conv2d(x, weights(20, 20, 3, 3), padding=1))
        number = emit(relax.op.max(emit(relax.op.multiply(x, relax.const(scale))), keepdims=False))
        return relax.op.subtract(image, emit(relax.op.multiply(number, relax.const(values))))

    blocked(body, (1, 20, 9, 9), normal(1, 20, 9, 9))
