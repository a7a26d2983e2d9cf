"""Caches of codes, in the layout of onnxruntime's GroupQueryAttention.

A key or value x is stored as clip(round(x / scale)), to even on a tie: int8, or in 4 bits -8 to 7, of which a byte
holds two channels as codes + 8, the even one low. A scale is one for all of a cache, or one for each head and channel.
So a model says itself what its cache holds, and how coarse that is; it is kept bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm import relax, te, tirx

from optimizer.frontend.dimensions import Dimension, simplified
from optimizer.frontend.node import Node
from optimizer.frontend.scaled_dot_product import converted
from optimizer.frontend.value import TensorValue, Value
from schedules.cache_pages import READS_IN_PLACE

_TYPES = {8: "int8", 4: "uint8"}
_MODES = {12: "k_quant_type", 13: "v_quant_type"}
_SUPPORTED = ("PER_TENSOR", "PER_CHANNEL")
_FLOATS = ("float32", "float16", "bfloat16", "float64")


@dataclass(frozen=True)
class CacheCodes:
    """Codes of so many `bits` for keys, whose scales are input 12, and for values, whose scales are input 13."""

    bits: int

    def width(self, node: Node, heads: Value) -> Dimension:
        """Return how many codes, or bytes of two, the channels of a head take."""
        size = heads.shape[3]
        if self.bits == 4 and (not isinstance(size, int) or size % 2):
            raise node.unsupported(f"heads of {size} channels cannot be stored two in a byte")
        return size if self.bits == 8 else simplified(size // 2)

    def encoded(self, node: Node, heads: Value, scales: int) -> TensorValue:
        """Return the codes of keys or values [B, G, S, D]."""
        scale = _scale(node, (1, heads.shape[1], 1, heads.shape[3]), scales)
        divided = node.emit(relax.op.divide(converted(node, heads, "float32").expr, scale.expr))
        least, most = -(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1
        rounded = relax.op.clip(node.emit(relax.op.round(divided.expr)).expr, least, most)
        codes = converted(node, node.emit(rounded), "int8")
        if self.bits == 8:
            return node.emit(codes.expr)

        def pack(whole: te.Tensor) -> te.Tensor:
            def element(row: tirx.Var, head: tirx.Var, place: tirx.Var, byte: tirx.Var) -> tirx.PrimExpr:
                low, high = (whole[row, head, place, byte * 2 + part].astype("uint8") for part in (0, 1))
                eight, four = tirx.const(8, "uint8"), tirx.const(4, "uint8")
                return ((low + eight) & tirx.const(15, "uint8")) | ((high + eight) << four)

            return te.compute((*whole.shape[:3], whole.shape[3] // 2), element, name="pack_codes")

        return node.compute(pack, codes.expr, primfunc_name_hint="pack_codes")

    def decoded(self, node: Node, codes: Value, scales: int, dtype: str) -> Value:
        """Return keys or values [B, G, T, D] of a float type from their codes, which attention reads where they lie."""
        per_byte = 8 // self.bits
        heads = (1, codes.shape[1], 1, simplified(codes.shape[3] * per_byte))
        scale = _scale(node, heads, scales)

        def decode(stored: te.Tensor, steps: te.Tensor) -> te.Tensor:
            def element(row: tirx.Var, head: tirx.Var, place: tirx.Var, channel: tirx.Var) -> tirx.PrimExpr:
                code = stored[row, head, place, channel // per_byte if per_byte > 1 else channel]
                if per_byte > 1:
                    nibble = (code >> (channel % 2 * 4).astype("uint8")) & tirx.const(15, "uint8")
                    code = nibble.astype("int8") - tirx.const(8, "int8")
                step = steps[0, head, 0, channel] if len(steps.shape) else steps()
                return (code.astype("float32") * step).astype(dtype)

            return te.compute((*stored.shape[:3], stored.shape[3] * per_byte), element, name="decode_cache")

        attributes = {READS_IN_PLACE: True}
        return node.compute(
            decode, codes.expr, scale.expr, primfunc_name_hint="decode_cache", primfunc_attrs=attributes
        )


def cache_codes(node: Node) -> CacheCodes | None:
    """Return the codes that a GroupQueryAttention's cache holds, or None for one of floats; refuses other codes."""
    types = {node.input(index).dtype for index in (3, 4) if node.has_input(index)}
    if not node.has_input(12) and not node.has_input(13) and types <= set(_FLOATS):
        return None
    modes = {node.string(name, "NONE") for name in _MODES.values()}
    bits = node.integer("kv_cache_bit_width", 8)
    if not (node.has_input(12) and node.has_input(13)) or not modes <= set(_SUPPORTED):
        raise node.unsupported(
            "a cache of codes needs k_scale and v_scale, for a tensor or for channels (k_quant_type, v_quant_type "
            f"{' or '.join(_SUPPORTED)}); this one, of {', '.join(sorted(types))}, has {', '.join(sorted(modes))}; "
            "build the model so, or with an unquantized cache (--kv-cache-dtype can quantize that)"
        )
    if bits not in _TYPES or not types <= {_TYPES[bits]}:
        raise node.unsupported(
            f"a cache of {', '.join(sorted(types))} with codes of {bits} bits is not supported; "
            "build the model with int8, int4 or unquantized caches (--kv-cache-dtype can quantize those)"
        )
    return CacheCodes(bits)


def _scale(node: Node, channels: Sequence[Dimension], index: int) -> Value:
    """Return the scale of keys or values as a float, or by `channels`, [1, G, 1, D]."""
    scale = converted(node, node.input(index), "float32")
    return node.reshape(scale, channels if node.string(_MODES[index]) == "PER_CHANNEL" else ())


__all__ = ["CacheCodes", "cache_codes"]
