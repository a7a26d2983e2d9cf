"""Single kernels as ONNX models, with the work that each has to do: what `python -m benchmarks kernels` measures."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from benchmarks import row_kernels
from benchmarks.integer_convolutions import byte_convolutions
from benchmarks.integer_products import byte_product, product_of_activations

Bound = Literal["compute", "integer", "copy", "read"]
_FLOAT_BYTES = 4
# Convolutions stand in chains of this length, as in networks: a layout that only the first and the last one pay for
# is not counted against each.
_CHAIN = 8
_WEIGHT_BLOCK = 32
_FEW_ROWS = 8
_PRODUCTS = ((384, 384, 384), (512, 512, 512), (768, 1024, 1024), (1024, 1024, 1024), (128, 768, 768),
             (128, 3072, 768), (128, 768, 3072), (1500, 384, 384), (385, 511, 767))  # fmt: skip


@dataclass(frozen=True)
class KernelCase:
    """A kernel, what bounds it at best, and its work: floating-point or 8-bit operations, or bytes moved.

    Of bytes to copy, `written` are written, half of them where it is not given.
    """

    name: str
    model: onnx.ModelProto
    bound: Bound
    work: int
    written: int | None = None

    def save(self, folder: Path) -> Path:
        """Write the model with its work in its metadata, where the peak engine reads it."""
        written = self.work // 2 if self.written is None else self.written
        properties = {entry.key: entry.value for entry in self.model.metadata_props}
        properties |= {"bound": self.bound, "work": str(self.work), "written": str(written)}
        helper.set_model_props(self.model, properties)
        path = folder / f"{self.name}.onnx"
        onnx.save(self.model, path)
        return path


def cases() -> Iterator[KernelCase]:
    """Return all kernels of the table."""
    for m, n, k in _PRODUCTS:
        yield matmul(m, n, k)
    for m, n, k in _PRODUCTS:
        yield KernelCase(f"gemm_int8_{m}x{n}x{k}", byte_product(m, n, k), "integer", 2 * m * n * k)
    for images, m, n, k in ((12, 197, 197, 64), (12, 197, 64, 197), (1, 512, 512, 512)):
        model = product_of_activations(images, m, n, k)
        yield KernelCase(f"activations_int8_{images}x{m}x{n}x{k}", model, "integer", 2 * images * m * n * k)
    yield _gemv(4096, 4096)
    for n, k in ((1536, 576), (49152, 576), (4864, 896), (896, 4864), (8192, 2048), (2048, 8192), (128256, 2048)):
        yield quantized(1, n, k)
    for m in (2, 4, 8, 512):
        for n, k in ((1536, 576), (4864, 896), (8192, 2048), (2048, 8192)):
            yield quantized(m, n, k)
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        yield _convolutions(f"conv3x3_{channels}_{size}", [channels, channels], size, 3)
        yield _convolutions(f"conv1x1_{channels}_{4 * channels}_{size}", [channels, 4 * channels], size, 1)
    for channels, size in ((96, 56), (192, 28), (576, 14)):
        yield _depthwise(channels, size)
    yield from _other_convolutions()
    yield from _int8_convolutions()
    for name, heads, length, head_size in (
        ("bert", 12, 128, 64), ("vit", 12, 197, 64), ("whisper", 6, 1500, 64)
    ):  # fmt: skip
        yield attention(name, heads, length, length, head_size)
    yield attention("decode", 32, 1, 4096, 64)
    yield rows("layer_norm", "LayerNormalization", 2048, 768)
    yield rows("softmax", "Softmax", 2048, 1024)
    causal, queries = row_kernels.causal_attention(), 12 * 512
    yield KernelCase("attention_causal", causal, "compute", 4 * queries * (512 + 1) // 2 * 64)
    for heads, groups, keys, size in ((32, 8, 4096, 64), (32, 8, 2048, 128), (14, 2, 2048, 64), (9, 3, 512, 64)):
        decode = row_kernels.grouped_decode(heads, groups, keys, size)
        cached = 2 * _FLOAT_BYTES * groups * keys * size
        yield KernelCase(f"attention_decode_{heads}_{groups}_{keys}x{size}", decode, "read", cached)
    for kernel in row_kernels.row_kernels():
        yield KernelCase(kernel.name, kernel.model(), "copy", kernel.moved, kernel.written)
    yield transpose((2048, 1024), (1, 0))
    yield transpose((1, 128, 12, 64), (0, 2, 1, 3))
    yield transpose((1, 256, 56, 56), (0, 2, 3, 1))


def matmul(m: int, n: int, k: int) -> KernelCase:
    """Return a product with constant weights."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = _model(nodes, {"x": (m, k)}, {"y": (m, n)}, {"w": _weights((k, n), k)})
    return KernelCase(f"gemm_{m}x{n}x{k}", model, "compute", 2 * m * n * k)


def any_rows(case: KernelCase) -> KernelCase:
    """Return a product whose number of rows only its inputs say: as many as before, by the model's metadata."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    dimensions = [value.type.tensor_type.shape.dim[0] for value in (*model.graph.input, *model.graph.output)]
    helper.set_model_props(model, {"size rows": str(dimensions[0].dim_value)})
    for dimension in dimensions:
        dimension.dim_param = "rows"
    return replace(case, name=f"{case.name}_any_rows", model=model)


def _gemv(n: int, k: int) -> KernelCase:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    model = _model(nodes, {"x": (1, k)}, {"y": (1, n)}, {"w": _weights((k, n), k)})
    return KernelCase(f"gemv_{n}x{k}", model, "read", _FLOAT_BYTES * n * k)


def quantized(m: int, n: int, k: int) -> KernelCase:
    """Return a product with weights of 4 bits in blocks of 32, with int8 activations, of a decoder's layers or head."""
    generator = np.random.default_rng(0)
    blocks = k // _WEIGHT_BLOCK
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=k,
        N=n,
        bits=4,
        block_size=_WEIGHT_BLOCK,
        accuracy_level=4,
    )
    constants = {
        "w": generator.integers(0, 256, (n, blocks, _WEIGHT_BLOCK // 2), np.uint8),
        # Halves as most models have them: whatever computes with them may store them so.
        "s": (generator.random((n, blocks)) / math.sqrt(k)).astype(np.float16).astype(np.float32),
    }
    model = _model([node], {"x": (m, k)}, {"y": (m, n)}, constants)
    name = f"int4_{m}x{n}x{k}"
    # Few rows are bound by reading the weights: half a byte each, and two bytes of scale for a block.
    if m <= _FEW_ROWS:
        return KernelCase(name, model, "read", n * k // 2 + 2 * n * blocks)
    return KernelCase(name, model, "integer", 2 * m * n * k)


def _convolutions(name: str, channels: list[int], size: int, kernel: int) -> KernelCase:
    nodes, weights = [], {}
    for index in range(_CHAIN):
        inner, outer = channels[index % 2], channels[(index + 1) % 2]
        weights[f"w{index}"] = _weights((outer, inner, kernel, kernel), inner * kernel**2)
        weights[f"b{index}"] = np.zeros(outer, np.float32)
        pads = [kernel // 2] * 4
        nodes.append(helper.make_node("Conv", [f"x{index}", f"w{index}", f"b{index}"], [f"c{index}"], pads=pads))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"x{index + 1}"]))
    shape = (1, channels[0], size, size)
    model = _model(nodes, {"x0": shape}, {f"x{_CHAIN}": shape}, weights)
    work = _CHAIN * 2 * channels[0] * channels[1] * kernel**2 * size**2
    return KernelCase(name, model, "compute", work)


def _int8_convolutions() -> Iterator[KernelCase]:
    """Return the layers of `cases` between codes of 8 bits."""
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        for kernel, outputs in ((3, channels), (1, 4 * channels)):
            model = byte_convolutions(_CHAIN, [channels, outputs], size, kernel)
            name = f"conv{kernel}x{kernel}_int8_{channels}_{outputs}_{size}"
            yield KernelCase(name, model, "integer", _CHAIN * 2 * channels * outputs * kernel**2 * size**2)
    for channels, size in ((96, 56), (192, 28), (576, 14)):
        model = byte_convolutions(_CHAIN, [channels, channels], size, 3, depthwise=True)
        moved = _CHAIN * 2 * channels * size**2
        yield KernelCase(f"depthwise3x3_int8_{channels}_{size}", model, "copy", moved)


def _other_convolutions() -> Iterator[KernelCase]:
    """Return layers that stand alone in networks: the first, those with strides, groups, one or three dimensions."""
    for channels, kernel, size in ((576, 5, 14), (768, 7, 7), (96, 7, 56)):
        yield convolution(f"depthwise{kernel}x{kernel}", channels, channels, (size,) * 2, kernel, groups=channels)
    for channels, kernel, size in ((96, 3, 112), (240, 5, 28)):
        yield convolution(f"depthwise{kernel}x{kernel}", channels, channels, (size,) * 2, kernel, 2, groups=channels)
    for outputs, kernel, stride in ((64, 7, 2), (32, 3, 2), (768, 16, 16), (96, 4, 4)):
        padding = 0 if kernel == stride else kernel // 2
        yield convolution(f"first{kernel}x{kernel}", 3, outputs, (224, 224), kernel, stride, padding)
    for channels, size in ((128, 56), (256, 28), (512, 14)):
        yield convolution("conv3x3", channels, channels, (size,) * 2, 3, 2)
        yield convolution("conv1x1", 2 * channels, 4 * channels, (size,) * 2, 1, 2)
    for channels, size in ((128, 56), (512, 14)):
        yield convolution("conv3x3", channels, channels, (size,) * 2, 3, groups=32)
    for inputs, outputs, size in ((256, 128, 28), (64, 32, 56)):
        yield convolution("transposed2x2", inputs, outputs, (size,) * 2, 2, 2, 0, transposed=True)
    yield convolution("conv1d3", 80, 384, (3000,), 3)
    yield convolution("conv1d3", 384, 384, (3000,), 3, 2)
    yield convolution("conv3d3x3x3", 32, 32, (16, 28, 28), 3)


def convolution(
    name: str,
    inputs: int,
    outputs: int,
    image: tuple[int, ...],
    kernel: int,
    stride: int = 1,
    padding: int | None = None,
    groups: int = 1,
    *,
    transposed: bool = False,
) -> KernelCase:
    """Return a layer, activation and maxima, so that its result may stay in any layout; the input is converted."""
    rank, padding = len(image), kernel // 2 if padding is None else padding
    if transposed:
        size = tuple((extent - 1) * stride + kernel - 2 * padding for extent in image)
    else:
        size = tuple((extent + 2 * padding - kernel) // stride + 1 for extent in image)
    shape = (inputs, outputs // groups) if transposed else (outputs, inputs // groups)
    weights = {
        "w": _weights((*shape, *[kernel] * rank), inputs // groups * kernel**rank),
        "b": np.zeros(outputs, np.float32),
    }
    attributes = {"strides": [stride] * rank, "pads": [padding] * 2 * rank, "group": groups}
    operator = "ConvTranspose" if transposed else "Conv"
    nodes = [
        helper.make_node(operator, ["x", "w", "b"], ["c"], **attributes),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("GlobalMaxPool", ["r"], ["y"]),
    ]
    model = _model(nodes, {"x": (1, inputs, *image)}, {"y": (1, outputs, *[1] * rank)}, weights)
    multiplied = math.prod(image if transposed else size) * inputs * outputs // groups * kernel**rank
    label = f"{name}_{inputs}_{outputs}_{'x'.join(map(str, dict.fromkeys(image)))}_s{stride}"
    if 1 < groups < inputs:
        label += f"_g{groups}"
    return KernelCase(label, model, "compute", 2 * multiplied)


def _depthwise(channels: int, size: int) -> KernelCase:
    nodes, weights = [], {}
    for index in range(_CHAIN):
        weights[f"w{index}"] = _weights((channels, 1, 3, 3), 9)
        weights[f"b{index}"] = np.zeros(channels, np.float32)
        inputs = [f"x{index}", f"w{index}", f"b{index}"]
        nodes.append(helper.make_node("Conv", inputs, [f"c{index}"], pads=[1] * 4, group=channels))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"x{index + 1}"]))
    shape = (1, channels, size, size)
    model = _model(nodes, {"x0": shape}, {f"x{_CHAIN}": shape}, weights)
    return KernelCase(f"depthwise3x3_{channels}_{size}", model, "copy", _CHAIN * _moved(shape))


def attention(name: str, heads: int, queries: int, keys: int, head_size: int) -> KernelCase:
    """Attention from projections that lie [1, S, H * D]; a decode step reads cached keys and values [1, H, S, D]."""
    decode = queries == 1
    cached = (1, heads, keys, head_size)
    query, context = (1, queries, heads * head_size), (1, keys, heads * head_size)
    nodes = [
        helper.make_node("Reshape", ["q", "split"], ["q4"]),
        helper.make_node("Transpose", ["q4"], ["qt"], perm=[0, 2, 1, 3]),
    ]
    if decode:
        nodes.append(helper.make_node("Transpose", ["k"], ["kt"], perm=[0, 1, 3, 2]))
        nodes.append(helper.make_node("Identity", ["v"], ["vt"]))
    else:
        nodes += [helper.make_node("Reshape", [value, "split"], [f"{value}4"]) for value in ("k", "v")]
        nodes.append(helper.make_node("Transpose", ["k4"], ["kt"], perm=[0, 2, 3, 1]))
        nodes.append(helper.make_node("Transpose", ["v4"], ["vt"], perm=[0, 2, 1, 3]))
    nodes += [
        helper.make_node("MatMul", ["qt", "kt"], ["scores"]),
        helper.make_node("Mul", ["scores", "scale"], ["scaled"]),
        helper.make_node("Softmax", ["scaled"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "vt"], ["o"]),
        helper.make_node("Transpose", ["o"], ["ot"], perm=[0, 2, 1, 3]),
        helper.make_node("Reshape", ["ot", "join"], ["y"]),
    ]
    constants = {
        "split": np.array([0, 0, heads, head_size]),
        "join": np.array([0, 0, heads * head_size]),
        "scale": np.array(1 / math.sqrt(head_size), np.float32),
    }
    other = cached if decode else context
    model = _model(nodes, {"q": query, "k": other, "v": other}, {"y": query}, constants)
    if decode:
        return KernelCase(f"attention_{name}", model, "read", 2 * _FLOAT_BYTES * math.prod(cached))
    return KernelCase(f"attention_{name}", model, "compute", 4 * heads * queries * keys * head_size)


def rows(name: str, operator: str, count: int, width: int) -> KernelCase:
    """Return a function of rows that knows no other attribute than the axis."""
    scale = ["scale", "shift"] if operator == "LayerNormalization" else []
    nodes = [helper.make_node(operator, ["x", *scale], ["y"], axis=-1)]
    weights = {each: np.ones(width, np.float32) for each in scale}
    model = _model(nodes, {"x": (count, width)}, {"y": (count, width)}, weights)
    return KernelCase(f"{name}_{count}x{width}", model, "copy", _moved((count, width)))


def transpose(shape: tuple[int, ...], permutation: tuple[int, ...]) -> KernelCase:
    """Return a transposition."""
    nodes = [helper.make_node("Transpose", ["x"], ["y"], perm=permutation)]
    model = _model(nodes, {"x": shape}, {"y": tuple(shape[axis] for axis in permutation)}, {})
    name = f"transpose_{'x'.join(map(str, shape))}_{''.join(map(str, permutation))}"
    return KernelCase(name, model, "copy", _moved(shape))


def _moved(shape: tuple[int, ...]) -> int:
    return 2 * _FLOAT_BYTES * math.prod(shape)


def _weights(shape: tuple[int, ...], inputs: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    return generator.standard_normal(shape, dtype=np.float32) / np.float32(math.sqrt(inputs))


def _model(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, tuple[int, ...]],
    outputs: dict[str, tuple[int, ...]],
    constants: dict[str, np.ndarray],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "kernel",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
