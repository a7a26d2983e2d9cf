"""Kernels for Arm's vectors compute under the emulator what numpy does, at sizes that leave rests of every kind."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

import targets
from optimizer.compile import CompileOptions, compile_model
from targets.emulator import Emulator

_ROOT = Path(__file__).parents[2]
_REASON = Emulator().available()
_PROGRAM = """
import sys
import numpy as np
from optimizer.runtime import load
folder, count = sys.argv[1], int(sys.argv[2])
inputs = {f"x{number}": np.load(f"{folder}/x{number}.npy") for number in range(count)}
for name, output in load(f"{folder}/package.opt")(inputs).items():
    np.save(f"{folder}/{name}.npy", output)
"""

pytestmark = [pytest.mark.emulator, pytest.mark.skipif(_REASON is not None, reason=_REASON or "")]

Array = NDArray[np.float32]
T = TypeVar("T", np.float64, np.int32)


@dataclass(frozen=True)
class Case:
    """Nodes of an input x, their constants, and what y is for some input, in float64 or exactly in integers.

    The error may be some fraction of the largest output. Of sums of fp32, some of scaled groups that are exact, it is
    small; Winograd's filtering makes errors ten times as large.
    """

    nodes: tuple[onnx.NodeProto, ...]
    x: NDArray[np.generic]
    constants: dict[str, NDArray[np.generic]]
    wanted: NDArray[np.float64] | NDArray[np.integer]
    error: float = 2.0**-18


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def product(rows: int, depth: int, columns: int) -> Case:
    x, w = normal(rows, depth), normal(depth, columns)
    return Case((helper.make_node("MatMul", ["x", "w"], ["y"]),), x, {"w": w}, x.astype(np.float64) @ w)


def narrow_product(rows: int, depth: int, columns: int, kind: int, error: float) -> Case:
    """A product of whole numbers of few bits as narrow floats, to which its sums are rounded."""
    x, w = (np.rint(4 * normal(*shape)).clip(-16, 16) for shape in ((rows, depth), (depth, columns)))
    nodes = [helper.make_node("Cast", [name], [f"narrow_{name}"], to=kind) for name in ("x", "w")]
    nodes.append(helper.make_node("MatMul", ["narrow_x", "narrow_w"], ["sums"]))
    nodes.append(helper.make_node("Cast", ["sums"], ["y"], to=onnx.TensorProto.FLOAT))
    return Case(tuple(nodes), x, {"w": w}, x.astype(np.float64) @ w, error)


def bytes_product(rows: int, depth: int, columns: int, zero: int) -> Case:
    rng = np.random.default_rng(rows + depth)
    x = rng.integers(0, 256, (rows, depth)).astype(np.uint8)
    w = rng.integers(-128, 128, (depth, columns)).astype(np.int8)
    node = helper.make_node("MatMulInteger", ["x", "w", "z"], ["y"])
    return Case((node,), x, {"w": w, "z": np.array(zero, np.uint8)}, (x.astype(np.int32) - zero) @ w.astype(np.int32))


def squared_bytes(size: int) -> Case:
    """The square of a matrix of bytes: a product of two activations."""
    x = np.random.default_rng(size).integers(0, 256, (size, size)).astype(np.uint8)
    wide = x.astype(np.int32)
    return Case(
        (helper.make_node("MatMulInteger", ["x", "x", "z"], ["y"]),), x, {"z": np.array(3, np.uint8)}, (wide - 3) @ wide
    )


def attention(heads: int, queries: int, keys: int, depth: int) -> Case:
    """The attention of the input to constant keys and values."""
    x, k = normal(1, heads, queries, depth), normal(1, heads, keys, depth)
    v = 1 - k**2
    nodes = (
        helper.make_node("Transpose", ["k"], ["turned"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["x", "turned"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["shares"], axis=-1),
        helper.make_node("MatMul", ["shares", "v"], ["y"]),
    )
    exponentials = np.exp(x.astype(np.float64) @ k.transpose(0, 1, 3, 2))
    return Case(nodes, x, {"k": k, "v": v}, exponentials @ v / exponentials.sum(-1, keepdims=True))


def convolution(channels: int, outputs: int, size: int, kernel: int, group: int = 1) -> Case:
    x, w = normal(1, channels, size, size), normal(outputs, channels // group, kernel, kernel)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[kernel // 2] * 4, group=group)
    return Case((node,), x, {"w": w}, convolved(x.astype(np.float64), w, group))


def bytes_convolution(channels: int, outputs: int, size: int, kernel: int, group: int = 1, zero: int = 0) -> Case:
    rng = np.random.default_rng(channels + size)
    x = rng.integers(0, 256, (1, channels, size, size)).astype(np.uint8)
    w = rng.integers(-128, 128, (outputs, channels // group, kernel, kernel)).astype(np.int8)
    node = helper.make_node("ConvInteger", ["x", "w", "z"], ["y"], pads=[kernel // 2] * 4, group=group)
    return Case((node,), x, {"w": w, "z": np.array(zero, np.uint8)}, convolved(x.astype(np.int32) - zero, w, group))


def separable_bytes(channels: int, size: int, kernel: int, stride: int) -> Case:
    """A pointwise convolution, its sums rounded to bytes, and a depthwise one of these."""
    rng = np.random.default_rng(channels + size)
    x = rng.integers(0, 256, (1, 8, size, size)).astype(np.uint8)
    first = rng.integers(-128, 128, (channels, 8, 1, 1)).astype(np.int8)
    w = rng.integers(-128, 128, (channels, 1, kernel, kernel)).astype(np.int8)
    constants = {"w": w, "first": first, "s": np.array(512, np.float32), "z": np.array(0, np.uint8)}
    nodes = (
        helper.make_node("ConvInteger", ["x", "first"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=onnx.TensorProto.FLOAT),
        helper.make_node("QuantizeLinear", ["floats", "s", "z"], ["bytes"]),
        helper.make_node(
            "ConvInteger", ["bytes", "w"], ["y"], pads=[kernel // 2] * 4, group=channels, strides=[stride] * 2
        ),
    )
    sums = np.clip(np.rint(convolved(x.astype(np.int32), first, 1) / 512), 0, 255).astype(np.int32)
    return Case(nodes, x, constants, convolved(sums, w, channels)[..., ::stride, ::stride])


def codes(size: int, dtype: type[np.integer], zero: int) -> Case:
    """Numbers rounded to bytes: halves, others, and some far beyond their range."""
    halves = np.arange(size) / 2 - size / 4
    x = np.concatenate([halves, [1e30, -1e30]]).astype(np.float32)
    limits = np.iinfo(dtype)
    constants = {"s": np.array(1, np.float32), "z": np.array(zero, dtype)}
    wanted = np.clip(np.rint(x).astype(np.float64) + zero, limits.min, limits.max).astype(dtype)
    return Case((helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"]),), x, constants, wanted)


def convolved(x: NDArray[T], w: NDArray[np.number], group: int) -> NDArray[T]:
    """Return the convolution of a square image, padded by half of the kernel, in the type of the image."""
    (_, channels, size, _), (outputs, _, kernel, _) = x.shape, w.shape
    around = kernel // 2
    padded = np.pad(x[0], [(0, 0), (around, around), (around, around)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (1, 2))
    windows = windows.reshape(group, channels // group, size, size, kernel, kernel)
    taps = w.astype(x.dtype).reshape(group, outputs // group, channels // group, kernel, kernel)
    return np.einsum("gcyxij,gocij->goyx", windows, taps).reshape(1, outputs, size, size).astype(x.dtype)


def quantized(rows: int, outputs: int, depth: int, bits: int, *, zero_points: bool = False) -> Case:
    """A product with weights in groups of 32; the activations' groups have 127 as largest, so that they are exact.

    Some sums are as large as they can be, of either sign.
    """
    rng = np.random.default_rng(rows + outputs + depth + bits)
    groups = depth // 32
    x = rng.integers(-127, 128, (rows, groups, 32)).astype(np.float32)
    x[..., 5] = 127
    x[1:2] = 127
    x = (x * 2.0 ** rng.integers(-3, 4, (rows, groups, 1))).astype(np.float32).reshape(rows, depth)
    codes = rng.integers(0, 1 << bits, (outputs, groups, 32)).astype(np.uint8)
    codes[0], codes[1] = 0, (1 << bits) - 1
    packed = codes if bits == 8 else codes[..., ::2] | codes[..., 1::2] << 4
    constants = {"w": packed, "s": rng.standard_normal((outputs, groups)).astype(np.float32)}
    zeros = np.full((outputs, groups), 1 << (bits - 1), np.int64)
    if zero_points:
        assert bits == 8
        zeros = rng.integers(0, 1 << bits, (outputs, groups))
        constants["z"] = zeros.astype(np.uint8)
    sizes = {"K": depth, "N": outputs, "bits": bits, "block_size": 32, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft")
    node.attribute.extend(helper.make_attribute(name, value) for name, value in sizes.items())
    weights = (codes.astype(np.float64) - zeros[..., None]) * constants["s"][..., None]
    return Case((node,), x, constants, x.astype(np.float64) @ weights.reshape(outputs, depth).T)


def run(cases: list[Case], target: str, precision: str, folder: Path) -> list[Array]:
    """Compile the cases as one model and execute it on the target's emulated machine."""
    nodes, inputs, outputs, constants = [], [], [], []
    for number, case in enumerate(cases):
        for each in case.nodes:
            node = onnx.NodeProto()
            node.CopyFrom(each)
            node.input[:] = [f"{name}{number}" for name in each.input]
            node.output[:] = [f"{name}{number}" for name in each.output]
            nodes.append(node)
        kind, element = (helper.np_dtype_to_tensor_dtype(array.dtype) for array in (case.x, case.wanted))
        element = onnx.TensorProto.FLOAT if element == onnx.TensorProto.DOUBLE else element
        inputs.append(helper.make_tensor_value_info(f"x{number}", kind, case.x.shape))
        outputs.append(helper.make_tensor_value_info(f"y{number}", element, case.wanted.shape))
        constants += [numpy_helper.from_array(value, f"{name}{number}") for name, value in case.constants.items()]
    graph = helper.make_graph(nodes, "kernels", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    options = CompileOptions(targets.get(target), precision=precision)
    compile_model(folder / "model.onnx", folder / "package.opt", options, certify=False)
    for number, case in enumerate(cases):
        np.save(folder / f"x{number}.npy", case.x)
    arguments = ["-c", _PROGRAM, str(folder), str(len(cases))]
    done = Emulator().run(arguments, targets.get(target), python_path=[_ROOT])
    assert done.returncode == 0, done.stderr
    return [np.load(folder / f"y{number}.npy") for number in range(len(cases))]


FLOATS = [product(*sizes) for sizes in ((9, 67, 19), (9, 3, 17), (1, 131, 40), (32, 514, 16))]
FLOATS += [
    convolution(*sizes) for sizes in ((12, 8, 7, 1), (16, 20, 13, 3), (8, 8, 9, 5), (24, 24, 11, 3, 24), (3, 8, 9, 7))
]
QUANTIZED = [quantized(*shape, bits) for shape in [(1, 19, 64), (17, 37, 96)] for bits in (4, 8)]
BYTES = [
    bytes_convolution(*sizes)
    for sizes in ((12, 8, 7, 1), (18, 20, 13, 3), (3, 8, 9, 7, 1, 5), (8, 8, 9, 3, 8), (24, 16, 6, 3, 1, 128))
]
BYTES += [separable_bytes(*sizes) for sizes in ((6, 18, 3, 1), (9, 7, 5, 2), (4, 3, 3, 1))]
BYTES += [codes(1201, np.uint8, 77), codes(607, np.int8, -5)]
QUANTIZED.append(quantized(11, 18, 64, 8, zero_points=True))
FLOATS += [attention(2, 21, 37, 24), attention(3, 1, 37, 16)]
PRODUCTS = [bytes_product(*sizes) for sizes in ((1, 3, 5, 0), (11, 67, 19, 131), (9, 32, 8, 128), (16, 50, 33, 7))]
PRODUCTS += [squared_bytes(size) for size in (11, 36)]
HALVES = [narrow_product(*sizes, onnx.TensorProto.FLOAT16, 2.0**-11) for sizes in ((37, 67, 19), (3, 6, 17))]
PAIRS = [narrow_product(*sizes, onnx.TensorProto.BFLOAT16, 2.0**-8) for sizes in ((9, 66, 19), (9, 67, 19), (9, 6, 17))]
# Operands are rounded to 8 bits, for Winograd's filtering twice.
ROUNDED = [replace(case, error=2.0**-6) for case in FLOATS]


# Starting the emulated machine takes longer than what is computed there.
@pytest.mark.parametrize(
    ("target", "precision", "cases"),
    [
        pytest.param("arm64", "model", FLOATS + QUANTIZED + BYTES + PRODUCTS + HALVES, id="arm64"),
        pytest.param("arm64-i8mm", "bf16", ROUNDED + QUANTIZED + BYTES + PRODUCTS + PAIRS, id="arm64-i8mm"),
    ],
)
def test_kernels_compute_what_numpy_does(target: str, precision: str, cases: list[Case], tmp_path: Path) -> None:
    for case, actual in zip(cases, run(cases, target, precision, tmp_path), strict=True):
        np.testing.assert_allclose(actual, case.wanted, rtol=0, atol=case.error * np.abs(case.wanted).max())
