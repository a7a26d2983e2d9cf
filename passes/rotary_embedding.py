"""Rotary position embedding as a Relax operator (Su et al., RoFormer, arXiv 2104.09864, section 3.4.2).

Relax has no such operator. `nn.rotary_embedding(data, cosines, sines)` turns pairs of channels (a, b) of the last axis:
    a' = a cos - b sin,  b' = b cos + a sin
A pair are channels (i, i + D/2), or (2 i, 2 i + 1) if `interleaved`. Cosines and sines are numbers of each channel [D]
or of each pair [D/2]; their other axes are those of the data, or 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm.ir
import tvm_ffi
from tvm import relax, te, tirx

from passes.tensor_types import is_one

NAME = "relax.nn.rotary_embedding"


def rotary_embedding(
    data: relax.Expr, cosines: relax.Expr, sines: relax.Expr, *, interleaved: bool = False
) -> relax.Expr:
    """Return the call of the operator; its result has the shape and dtype of `data` [..., D], D even and known."""
    attributes = tvm.ir.make_node("ir.DictAttrs", interleaved=interleaved)
    return relax.Call(tvm.ir.Op.get(NAME), [data, cosines, sines], attributes)


def _computed(data: te.Tensor, cosines: te.Tensor, sines: te.Tensor, *, interleaved: bool) -> te.Tensor:
    half = int(data.shape[-1]) // 2

    def angle(table: te.Tensor, indices: Sequence[tvm.ir.Expr], pair: tvm.ir.Expr) -> tvm.ir.Expr:
        own = [*indices[len(indices) - len(table.shape) : -1], pair if int(table.shape[-1]) == half else indices[-1]]
        return table(*(0 if is_one(extent) else place for place, extent in zip(own, table.shape, strict=True)))

    def turned(*indices: tvm.ir.Expr) -> tvm.ir.Expr:
        *outer, channel = indices
        distance = 1 if interleaved else half
        second = tirx.floormod(channel, 2).equal(1) if interleaved else channel >= half
        pairs = (tirx.floordiv(channel, 2),) * 2 if interleaved else (channel, channel - half)
        cosine, sine = ([angle(table, indices, pair) for pair in pairs] for table in (cosines, sines))
        return tirx.if_then_else(
            second,
            data(*indices) * cosine[1] + data(*outer, channel - distance) * sine[1],
            data(*indices) * cosine[0] - data(*outer, channel + distance) * sine[0],
        )

    return te.compute(data.shape, turned, name="rotary_embedding")


def _legalized(builder: relax.BlockBuilder, call: tvm.ir.Call) -> relax.Expr:
    interleaved = bool(call.attrs["interleaved"])
    return builder.call_te(_computed, *call.args, interleaved=interleaved, primfunc_name_hint="rotary_embedding")


def _type(call: tvm.ir.Call, _: relax.BlockBuilder) -> relax.Type:
    return call.args[0].ty


def _register() -> None:
    if NAME in tvm.ir.Op.list_op_names():
        return
    tvm_ffi.get_global_func("ir.RegisterOp")(NAME, "Turn pairs of channels by an angle.")
    for attribute, value in {"FInferType": _type, "FLegalize": _legalized, "FPurity": True}.items():
        tvm.ir.register_op_attr(NAME, attribute, value)


_register()
