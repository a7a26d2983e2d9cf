"""A small decoder of ONNX's own operators: RMSNormalization, RotaryEmbedding, Attention, and TensorScatter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

HEADS, GROUPS, SIZE, LAYERS, VOCABULARY = 4, 2, 8, 2, 100
WIDTH = HEADS * SIZE
LONGEST = 64
MASKS: Mapping[str, tuple[int, list[int | str]]] = {
    "bool_tokens": (TensorProto.BOOL, ["batch", "total"]),
    "float_tokens": (TensorProto.FLOAT, ["batch", "total"]),
    "bool_queries": (TensorProto.BOOL, ["batch", 1, "new", "total"]),
    "float_queries": (TensorProto.FLOAT, ["batch", 1, "new", "total"]),
}
FORMS = ("appended", "scattered", "masked", *MASKS)
"""How keys and values are kept: appended by Attention itself (opset 23), or written by TensorScatter (opset 24) to a
cache whose room the caller chooses, where two inputs say (`scattered`); or to one of `LONGEST` places, of which a mask
and the positions of the new tokens say which are seen (`masked`). `MASKS` are appended, with a mask of a type and
shape: of the tokens that there are, or of what each query sees."""


class _Writer:
    """Collects nodes and weights, and names values."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._names: Iterator[int] = count()
        self._rng = np.random.default_rng(0)

    def emit(self, operator: str, *inputs: str, outputs: Sequence[str] = (), **attributes: float | list[int]) -> str:
        names = list(outputs) or [f"value_{next(self._names)}"]
        node = helper.make_node(operator, inputs, names)
        node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
        self.nodes.append(node)
        return names[0]

    def array(self, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values, f"array_{next(self._names)}"))
        return self.weights[-1].name

    def weight(self, *shape: int) -> str:
        values = self._rng.standard_normal(shape) / shape[0] ** 0.5 if len(shape) > 1 else self._rng.random(shape) + 0.5
        return self.array(values.astype(np.float32))

    def product(self, value: str, rows: int, columns: int) -> str:
        return self.emit("MatMul", value, self.weight(rows, columns))

    def norm(self, value: str) -> str:
        return self.emit("RMSNormalization", value, self.weight(WIDTH), axis=-1, epsilon=1e-5)

    def heads(self, value: str, heads: int) -> str:
        """Return the heads [B, H, S, D] of what a product with weights makes of a value."""
        projected = self.product(value, WIDTH, heads * SIZE)
        apart = self.emit("Reshape", projected, self.array(np.array([0, 0, heads, SIZE])))
        return self.emit("Transpose", apart, perm=[0, 2, 1, 3])


def standard_decoder(form: str) -> onnx.ModelProto:
    """Return a decoder that keeps keys and values in one of the `FORMS`."""
    writer = _Writer()
    room = {"scattered": "room", "masked": LONGEST}.get(form, "past")
    positions = "position_ids"
    if form == "masked":
        positions = writer.emit("Unsqueeze", "cache_position", writer.array(np.array([0])))
    angles = np.outer(np.arange(LONGEST), 100.0 ** (-np.arange(SIZE // 2) / (SIZE // 2))).astype(np.float32)
    tables = writer.array(np.cos(angles)), writer.array(np.sin(angles))
    where = _Places(writer, form)
    table = writer.weight(VOCABULARY, WIDTH)
    stream = writer.emit("Gather", table, "input_ids")
    for layer in range(LAYERS):
        normed = writer.norm(stream)
        query, key, value = (writer.heads(normed, heads) for heads in (HEADS, GROUPS, GROUPS))
        query, key = (writer.emit("RotaryEmbedding", part, *tables, positions) for part in (query, key))
        mixed = writer.emit("Transpose", where.attention(layer, query, key, value), perm=[0, 2, 1, 3])
        joined = writer.emit("Reshape", mixed, writer.array(np.array([0, 0, WIDTH])))
        stream = writer.emit("Add", stream, writer.product(joined, WIDTH, WIDTH))
        normed = writer.norm(stream)
        gate, up = (writer.product(normed, WIDTH, 2 * WIDTH) for _ in range(2))
        silu = writer.emit("Mul", gate, writer.emit("Sigmoid", gate))
        stream = writer.emit("Add", stream, writer.product(writer.emit("Mul", silu, up), 2 * WIDTH, WIDTH))
    writer.emit("MatMul", writer.norm(stream), writer.weight(WIDTH, VOCABULARY), outputs=["logits"])
    grows = room == "past"
    return _model(writer, where.inputs, room, "total" if grows else room, 23 if grows else 24, MASKS.get(form))


class _Places:
    """Where a form keeps keys and values, and which of them a query sees."""

    def __init__(self, writer: _Writer, form: str) -> None:
        self._writer, self._form = writer, form
        self.inputs: dict[str, Sequence[int | str]] = {"input_ids": ["batch", "new"]}
        if form == "masked":
            self.inputs |= {"cache_position": ["new"], "attention_mask": ["batch", LONGEST]}
            self._starts = writer.emit("Slice", "cache_position", *(writer.array(np.array([n])) for n in (0, 1)))
            columns = writer.array(np.arange(LONGEST))
            rows = writer.emit("Unsqueeze", "cache_position", writer.array(np.array([1])))
            given = writer.emit("Cast", "attention_mask", to=TensorProto.BOOL)
            given = writer.emit("Unsqueeze", given, writer.array(np.array([1, 2])))
            self._mask = writer.emit("And", given, writer.emit("LessOrEqual", columns, rows))
        else:
            self._mask = self._given_mask() if form in MASKS else ""
            self.inputs["position_ids"] = ["batch", "new"]
        if form == "scattered":
            self.inputs |= {"write_indices": ["batch"], "nonpad_kv_seqlen": ["batch"]}
            self._starts = "write_indices"

    def _given_mask(self) -> str:
        if "queries" in self._form:
            return "attention_mask"
        emit, array = self._writer.emit, self._writer.array
        size = emit("Gather", emit("Shape", "attention_mask"), array(np.array(1)))
        columns = emit("Range", array(np.array(0)), size, array(np.array(1)))
        rows = emit("Unsqueeze", "position_ids", array(np.array([1, 3])))
        given = emit("Unsqueeze", emit("Cast", "attention_mask", to=TensorProto.BOOL), array(np.array([1, 2])))
        return emit("And", given, emit("LessOrEqual", columns, rows))

    def attention(self, layer: int, query: str, key: str, value: str) -> str:
        """Return the heads of a layer's attention, which keeps its keys and values."""
        past = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        present = [f"present.{layer}.{part}" for part in ("key", "value")]
        emit = self._writer.emit
        if self._form == "appended" or self._form in MASKS:
            outputs = [f"heads_{layer}", *present]
            causal = int(not self._mask)
            return emit("Attention", query, key, value, self._mask, *past, outputs=outputs, is_causal=causal)
        for old, new, name in zip(past, (key, value), present, strict=True):
            emit("TensorScatter", old, new, self._starts, outputs=[name])
        if self._form == "masked":
            return emit("Attention", query, *present, self._mask)
        return emit("Attention", query, *present, "", "", "", "nonpad_kv_seqlen", is_causal=1)


def _model(
    writer: _Writer,
    integers: Mapping[str, Sequence[int | str]],
    past: int | str,
    present: int | str,
    opset: int,
    mask: tuple[int, list[int | str]] | None,
) -> onnx.ModelProto:
    declare = helper.make_tensor_value_info
    caches = [(layer, part) for layer in range(LAYERS) for part in ("key", "value")]

    def cache(name: str, length: int | str) -> list[onnx.ValueInfoProto]:
        shape = ["batch", GROUPS, length, SIZE]
        return [declare(f"{name}.{layer}.{part}", TensorProto.FLOAT, shape) for layer, part in caches]

    inputs = [declare(name, TensorProto.INT64, shape) for name, shape in integers.items()]
    inputs += [] if mask is None else [declare("attention_mask", *mask)]
    logits = declare("logits", TensorProto.FLOAT, ["batch", "new", VOCABULARY])
    outputs = [logits, *cache("present", present)]
    graph = helper.make_graph(writer.nodes, "decoder", inputs + cache("past_key_values", past), outputs, writer.weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    return model
