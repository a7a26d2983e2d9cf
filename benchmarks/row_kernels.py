"""Single kernels that memory bounds: activations, reductions, pooling, gathers, sorting, boxes; and more attention."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Attribute = int | float | str | list[int]
_FLOAT_BYTES = 4
_OPSET = 23


@dataclass(frozen=True)
class Positions:
    """An input of integers below a number, in no order: all different where there are enough of them."""

    shape: tuple[int, ...]
    below: int


@dataclass(frozen=True)
class Conditions:
    """An input of truth values."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class RowKernel:
    """One operator on inputs of the given shapes, which `constants` follow, with `outputs` results of one shape.

    `picked` is how many elements are read of inputs that are not read whole.
    """

    name: str
    operator: str
    shapes: tuple[tuple[int, ...] | Positions | Conditions, ...]
    output: tuple[int | str, ...]
    constants: tuple[np.ndarray, ...] = ()
    attributes: dict[str, Attribute] = field(default_factory=dict)
    outputs: int = 1
    picked: int | None = None
    dtype: int = TensorProto.FLOAT

    @property
    def moved(self) -> int:
        """The least bytes to move: every input once, or what is picked, and every output once."""
        if self.picked is not None:
            return _FLOAT_BYTES * self.picked + self.written
        return sum(math.prod(shape) * _bytes(dtype) for dtype, shape in map(_declared, self.shapes)) + self.written

    @property
    def written(self) -> int:
        """The bytes of the outputs, as far as they are known; the second one has positions."""
        each = math.prod(size for size in self.output if isinstance(size, int))
        return each * (_bytes(self.dtype) + (0 if self.outputs == 1 else _bytes(TensorProto.INT64)))

    def model(self) -> onnx.ModelProto:
        """Return the operator as a model, with the bounds of its positions in its metadata."""
        names = [f"x{number}" for number in range(len(self.shapes))]
        constants = {f"c{number}": value for number, value in enumerate(self.constants)}
        results = [f"y{number}" for number in range(self.outputs)]
        operands = [*names, *constants]
        if self.operator == "Resize":
            operands.insert(1, "")  # the region of interest
        node = helper.make_node(self.operator, operands, results)
        node.attribute.extend(helper.make_attribute(key, value) for key, value in self.attributes.items())
        types = [self.dtype, TensorProto.INT64]  # second outputs are positions
        graph = helper.make_graph(
            [node],
            "kernel",
            [helper.make_tensor_value_info(n, *_declared(s)) for n, s in zip(names, self.shapes, strict=True)],
            [helper.make_tensor_value_info(n, types[i], self.output) for i, n in enumerate(results)],
            [numpy_helper.from_array(value, name) for name, value in constants.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=11)
        bounds = {
            f"below {name}": str(shape.below)
            for name, shape in zip(names, self.shapes, strict=True)
            if isinstance(shape, Positions)
        }
        helper.set_model_props(model, bounds)
        return model


def _declared(shape: tuple[int, ...] | Positions | Conditions) -> tuple[int, tuple[int, ...]]:
    """Return an input's element type and shape."""
    if isinstance(shape, tuple):
        return TensorProto.FLOAT, shape
    return TensorProto.INT64 if isinstance(shape, Positions) else TensorProto.BOOL, shape.shape


def _bytes(dtype: int) -> int:
    return helper.tensor_dtype_to_np_dtype(dtype).itemsize


def row_kernels() -> Iterator[RowKernel]:
    """Yield the kernels."""
    rows, image = (1024, 1024), (1, 64, 112, 112)
    scale = np.ones(768, np.float32)
    yield RowKernel("rms_norm_2048x768", "RMSNormalization", ((2048, 768),), (2048, 768), (scale,), {"axis": -1})
    for width in (7, 197, 1023, 1025):
        shape = (2**20 // width, width)
        yield RowKernel(f"softmax_{shape[0]}x{width}", "Softmax", (shape,), shape, attributes={"axis": -1})
    for operator in ("Exp", "Tanh", "Erf", "Gelu", "Sigmoid", "Softplus", "Mish", "Sin", "Cos", "Sign"):
        yield RowKernel(f"{operator.lower()}_1024x1024", operator, (rows,), rows)
    for axis, left in ((0, (256, 128)), (1, (64, 128)), (2, (64, 256))):
        axes = (np.array([axis]),)
        name = f"sum_64x256x128_axis{axis}"
        yield RowKernel(name, "ReduceSum", ((64, 256, 128),), left, axes, {"keepdims": 0})
    window: dict[str, Attribute] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    yield RowKernel("max_pool_64_112", "MaxPool", (image,), (1, 64, 56, 56), attributes=window)
    yield RowKernel("average_pool_64_112", "AveragePool", (image,), (1, 64, 56, 56), attributes=window)
    scales = (np.array([1, 1, 2, 2], np.float32),)
    yield RowKernel("resize_linear_64_56", "Resize", ((1, 64, 56, 56),), image, scales, {"mode": "linear"})
    yield RowKernel("concat_32_32_112", "Concat", ((1, 32, 112, 112),) * 2, image, attributes={"axis": 1})
    positions = np.random.default_rng(0).integers(0, 1024, 1024)
    yield RowKernel("gather_1024_of_1024x1024", "Gather", (rows,), rows, (positions,), {"axis": 0})
    yield RowKernel("cumsum_1024x1024", "CumSum", (rows,), rows, (np.array(1),))
    yield RowKernel("top_10_of_64x32000", "TopK", ((64, 32000),), (64, 10), (np.array([10]),), outputs=2)
    yield RowKernel("sort_64x4096", "TopK", ((64, 4096),), (64, 4096), (np.array([4096]),), outputs=2)
    yield RowKernel("transpose_1023x1025_10", "Transpose", ((1023, 1025),), (1025, 1023), (), {"perm": [1, 0]})
    yield RowKernel(
        "max_pool_480_14_s1", "MaxPool", ((1, 480, 14, 14),), (1, 480, 14, 14), (), {**window, "strides": [1, 1]}
    )
    yield RowKernel(
        "average_pool_2048_8_s1", "AveragePool", ((1, 2048, 8, 8),), (1, 2048, 8, 8), (), {**window, "strides": [1, 1]}
    )
    yield RowKernel(
        "max_pool_512_13_13x13",
        "MaxPool",
        ((1, 512, 13, 13),),
        (1, 512, 13, 13),
        (),
        {"kernel_shape": [13, 13], "strides": [1, 1], "pads": [6] * 4},
    )
    yield from _picks()
    yield from _moves()
    yield from _beyond_caches()


def _picks() -> Iterator[RowKernel]:
    """Yield kernels that pick, place or order elements by what other inputs hold."""
    rows, floats = (1024, 1024), np.float32
    for count, table in ((128, (30522, 768)), (512, (50257, 768)), (1, (32000, 2048))):
        output = (count, table[1])
        name, picked = f"embedding_{count}_of_{table[0]}x{table[1]}", count * table[1]
        yield RowKernel(name, "Gather", (table, Positions((count,), table[0])), output, picked=picked)
    yield RowKernel("gather_elements_1024x1024", "GatherElements", (rows, Positions(rows, 1024)), rows, (), {"axis": 1})
    yield RowKernel("where_1024x1024", "Where", (Conditions(rows), rows, rows), rows)
    updates = (rows, Positions((256, 1), 1024), (256, 1024))
    yield RowKernel("scatter_256_of_1024x1024", "ScatterND", updates, rows)
    placed = (rows, Positions((64, 1024), 1024), (64, 1024))
    yield RowKernel("scatter_elements_64_of_1024x1024", "ScatterElements", placed, rows, (), {"axis": 0})
    depth = (np.array(1000), np.array([0, 1], floats))
    yield RowKernel("one_hot_1024_of_1000", "OneHot", (Positions((1024,), 1000),), (1024, 1000), depth)
    scales = (np.array([1, 1, 2, 2], floats),)
    nearest: dict[str, Attribute] = {"mode": "nearest"}
    yield RowKernel("resize_nearest_64_56", "Resize", ((1, 64, 56, 56),), (1, 64, 112, 112), scales, nearest)
    cubic: dict[str, Attribute] = {"mode": "cubic"}
    yield RowKernel("resize_cubic_3_112", "Resize", ((1, 3, 112, 112),), (1, 3, 224, 224), scales, cubic)
    yield RowKernel("cumsum_1024x1024_axis0", "CumSum", (rows,), rows, (np.array(0),))
    yield RowKernel("top_5_of_1000", "TopK", ((1, 1000),), (1, 5), (np.array([5]),), outputs=2)
    yield RowKernel("top_300_of_8400", "TopK", ((1, 8400),), (1, 300), (np.array([300]),), outputs=2)
    best: dict[str, Attribute] = {"axis": -1, "keepdims": 0}
    yield RowKernel("argmax_64x32000", "ArgMax", ((64, 32000),), (64,), (), best, dtype=TensorProto.INT64)
    limits = (np.array([100]), np.array([0.5], floats), np.array([0.5], floats))
    boxes = ((1, 1000, 4), (1, 1, 1000))
    yield RowKernel("nms_100_of_1000", "NonMaxSuppression", boxes, ("kept", 3), limits, dtype=TensorProto.INT64)


def _moves() -> Iterator[RowKernel]:
    """Yield kernels that move, convert or compare elements where other operators of a model leave them no choice."""
    rows, image, framed = (1024, 1024), (1, 64, 112, 112), (1, 64, 118, 118)
    pads = (np.array([0, 0, 3, 3, 0, 0, 3, 3]),)
    for mode in ("constant", "edge", "reflect"):
        yield RowKernel(f"pad_{mode}_64_112", "Pad", (image,), framed, pads, {"mode": mode})
    every_second = tuple(np.array([number]) for number in (0, 2048, 1, 2))
    yield RowKernel("slice_1024x2048_step2", "Slice", ((1024, 2048),), rows, every_second, picked=2**20)
    yield RowKernel("expand_1x1024", "Expand", ((1, 1024),), rows, (np.array(rows),))
    yield RowKernel("tile_64x64x64_122", "Tile", ((64, 64, 64),), (64, 128, 128), (np.array([1, 2, 2]),))
    blocks: dict[str, Attribute] = {"blocksize": 2}
    yield RowKernel("depth_to_space_64_128", "DepthToSpace", ((1, 64, 128, 128),), (1, 16, 256, 256), (), blocks)
    half: dict[str, Attribute] = {"to": TensorProto.FLOAT16}
    yield RowKernel("cast_1024x1024_fp16", "Cast", (rows,), rows, (), half, dtype=TensorProto.FLOAT16)
    yield RowKernel("less_1024x1024", "Less", (rows, rows), rows, dtype=TensorProto.BOOL)
    chosen = (rows, Positions((256, 1), 1024))
    yield RowKernel("gather_nd_256_of_1024x1024", "GatherND", chosen, (256, 1024), picked=256 * 1024)
    scales = (np.ones(64, np.float32),) * 2
    channels = (1, 64, 128, 128)
    yield RowKernel("instance_norm_64_128", "InstanceNormalization", (channels,), channels, scales)
    yield RowKernel("top_300_of_672000", "TopK", ((1, 672000),), (1, 300), (np.array([300]),), outputs=2)


def _beyond_caches() -> Iterator[RowKernel]:
    """Yield kernels on arrays of 64 MiB, which no cache holds."""
    rows, wide = (4096, 4096), (16384, 1024)
    scale = np.ones(1024, np.float32)
    yield RowKernel("exp_4096x4096", "Exp", (rows,), rows)
    yield RowKernel("add_4096x4096", "Add", (rows, rows), rows)
    yield RowKernel("softmax_16384x1024", "Softmax", (wide,), wide, attributes={"axis": -1})
    yield RowKernel("layer_norm_16384x1024", "LayerNormalization", (wide,), wide, (scale, scale), {"axis": -1})
    yield RowKernel("rms_norm_16384x1024", "RMSNormalization", (wide,), wide, (scale,), {"axis": -1})
    yield RowKernel("transpose_4096x4096_10", "Transpose", (rows,), rows, (), {"perm": [1, 0]})
    yield RowKernel(
        "transpose_16x1024x16x64_0213",
        "Transpose",
        ((16, 1024, 16, 64),),
        (16, 16, 1024, 64),
        (),
        {"perm": [0, 2, 1, 3]},
    )
    image, half = (16, 64, 128, 128), (16, 64, 64, 64)
    window: dict[str, Attribute] = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
    yield RowKernel("max_pool_16x64_128", "MaxPool", (image,), half, attributes=window)
    yield RowKernel(
        "resize_linear_16x64_64", "Resize", (half,), image, (np.array([1, 1, 2, 2], np.float32),), {"mode": "linear"}
    )
    yield RowKernel("concat_4096x2048_axis1", "Concat", ((4096, 2048),) * 2, rows, attributes={"axis": 1})
    yield RowKernel("sum_4096x4096_axis0", "ReduceSum", (rows,), (4096,), (np.array([0]),), {"keepdims": 0})


def causal_attention() -> onnx.ModelProto:
    """Return causal attention of 12 heads of 64 over 512 tokens."""
    shape = (1, 12, 512, 64)
    return RowKernel("", "Attention", (shape,) * 3, shape, attributes={"is_causal": 1}).model()


def grouped_decode(heads: int, groups: int, keys: int, size: int) -> onnx.ModelProto:
    """Return attention of one token with `heads` heads over `keys` tokens of `groups` heads of the given size."""
    query, cached = (1, heads, 1, size), (1, groups, keys, size)
    return RowKernel("", "Attention", (query, cached, cached), query).model()
