"""Kernels for Arm's vectors compute under the emulator what numpy does, at sizes that leave rests of every kind."""

from __future__ import annotations

from dataclasses import dataclass
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
    """A node of one input, its constants, and what it computes of some input, in float64 or exactly in int32."""

    node: onnx.NodeProto
    x: NDArray[np.generic]
    constants: dict[str, NDArray[np.generic]]
    wanted: NDArray[np.float64] | NDArray[np.int32]


def normal(*shape: int) -> Array:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def product(rows: int, depth: int, columns: int) -> Case:
    x, w = normal(rows, depth), normal(depth, columns)
    return Case(helper.make_node("MatMul", ["x", "w"], ["y"]), x, {"w": w}, x.astype(np.float64) @ w)


def convolution(channels: int, outputs: int, size: int, kernel: int, group: int = 1) -> Case:
    x, w = normal(1, channels, size, size), normal(outputs, channels // group, kernel, kernel)
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[kernel // 2] * 4, group=group)
    return Case(node, x, {"w": w}, convolved(x.astype(np.float64), w, group))


def bytes_convolution(channels: int, outputs: int, size: int, kernel: int, group: int = 1, zero: int = 0) -> Case:
    rng = np.random.default_rng(channels + size)
    x = rng.integers(0, 256, (1, channels, size, size)).astype(np.uint8)
    w = rng.integers(-128, 128, (outputs, channels // group, kernel, kernel)).astype(np.int8)
    node = helper.make_node("ConvInteger", ["x", "w", "z"], ["y"], pads=[kernel // 2] * 4, group=group)
    return Case(node, x, {"w": w, "z": np.array(zero, np.uint8)}, convolved(x.astype(np.int32) - zero, w, group))


def bytes_product(rows: int, depth: int, columns: int, zero: int) -> Case:
    rng = np.random.default_rng(rows + depth)
    x = rng.integers(0, 256, (rows, depth)).astype(np.uint8)
    w = rng.integers(-128, 128, (depth, columns)).astype(np.int8)
    node = helper.make_node("MatMulInteger", ["x", "w", "z"], ["y"])
    return Case(node, x, {"w": w, "z": np.array(zero, np.uint8)}, (x.astype(np.int32) - zero) @ w.astype(np.int32))


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
    """A product with weights in groups of 32; the activations' groups have 127 as largest, so that they are exact."""
    rng = np.random.default_rng(rows + outputs + depth + bits)
    groups = depth // 32
    x = rng.integers(-127, 128, (rows, groups, 32)).astype(np.float32)
    x[..., 5] = 127
    x = (x * 2.0 ** rng.integers(-3, 4, (rows, groups, 1))).astype(np.float32).reshape(rows, depth)
    codes = rng.integers(0, 1 << bits, (outputs, groups, 32)).astype(np.uint8)
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
    return Case(node, x, constants, x.astype(np.float64) @ weights.reshape(outputs, depth).T)


def run(cases: list[Case], target: str, folder: Path) -> list[Array]:
    """Compile the cases as one model and execute it on the target's emulated machine."""
    nodes, inputs, outputs, constants = [], [], [], []
    for number, case in enumerate(cases):
        node = onnx.NodeProto()
        node.CopyFrom(case.node)
        names = [f"{name}{number}" for name in node.input]
        node.ClearField("input")
        node.input.extend(names)
        node.output[0] = f"y{number}"
        nodes.append(node)
        element = onnx.TensorProto.INT32 if case.wanted.dtype == np.int32 else onnx.TensorProto.FLOAT
        kind = helper.np_dtype_to_tensor_dtype(case.x.dtype)
        inputs.append(helper.make_tensor_value_info(names[0], kind, case.x.shape))
        outputs.append(helper.make_tensor_value_info(node.output[0], element, case.wanted.shape))
        constants += [numpy_helper.from_array(value, f"{name}{number}") for name, value in case.constants.items()]
    graph = helper.make_graph(nodes, "kernels", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    compile_model(folder / "model.onnx", folder / "package.opt", CompileOptions(targets.get(target)), certify=False)
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
PRODUCTS = [bytes_product(*sizes) for sizes in ((1, 3, 5, 0), (11, 67, 19, 131), (9, 32, 8, 128), (16, 50, 33, 7))]
QUANTIZED.append(quantized(11, 18, 64, 8, zero_points=True))


# Starting the emulated machine takes longer than what is computed there.
@pytest.mark.parametrize(
    ("target", "cases"), [("arm64", FLOATS + QUANTIZED + BYTES + PRODUCTS), ("arm64-i8mm", QUANTIZED + PRODUCTS)]
)
def test_kernels_compute_what_numpy_does(target: str, cases: list[Case], tmp_path: Path) -> None:
    for case, actual in zip(cases, run(cases, target, tmp_path), strict=True):
        # Sums of fp32, some of scaled groups that are exact; Winograd's filtering makes errors ten times as large.
        np.testing.assert_allclose(actual, case.wanted, rtol=0, atol=2.0**-18 * np.abs(case.wanted).max())
