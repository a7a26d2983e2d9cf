"""Convolutional regions in blocked layout: [N, C, spatial...] becomes [N, ceil(C/block), spatial..., block].

A vector register then holds one position of a block of channels, so that a convolution reads its weights, packed here
to match, as vectors and the image as it lies: no gathers, and no copy for padding. The layout spreads from convolutions
through what treats channels alike (arithmetic, activations, pooling, means over the image, concatenation of whole
blocks); where something else reads a blocked tensor, it is converted back. Channels past the last one of a partial
block hold anything and are never read. Values do not change but for the order of summation, and the error of Winograd's
transforms where these are chosen (`passes.winograd`).

With `dtype` bfloat16 what a convolution reads is rounded to it, once, where it is made; who else reads it gets it
widened again. Products of its channels with weights of bfloat16, transformed by Winograd's filtering or not, are of
pairs of neighbouring channels. Fp32 remain the weights of depthwise convolutions, sums, what follows, transforms.

Convolutions of bytes that are summed in int32 read fours of neighbouring channels (`passes.integer_convolutions`), or
pairs of bytes that are widened to words, once, where they are made, and narrowed for others that read them. The sum of
all bytes of a window is one of a single channel, which all lanes hold: it broadcasts to any number of channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import tvm
import tvm.ir
from tvm import relax, te
from tvm.relax.expr_functor import mutator

from passes import blocked_operators
from passes.base import Pass, PassOutcome, Refusal, Site, require
from passes.blocked_forms import ROW, Blocked, BlockedForms
from passes.blocked_operators import Geometry, with_whole_steps
from passes.channelwise_operators import CONVOLUTIONS, ELEMENTWISE, POOLINGS, QUANTIZATIONS, REDUCTIONS, TRANSPOSED
from passes.convolution_sites import check_operands, check_outputs, checked_geometry, convolutions_of, static
from passes.integer_convolutions import (
    Border,
    IntegerConvolution,
    border_of,
    integer_convolution,
    is_integer,
    pays_in_blocks,
)
from passes.provenance import nodes_of
from passes.tensor_types import constant_of
from passes.winograd import bound_of_results, choose_tile, pack_winograd
from schedules.intrin.bf16_conversion import BFLOAT16
from schedules.intrin.bf16_dot import PAIR
from schedules.intrin.byte_dot import FOUR, WORD
from schedules.intrin.matrix_tiles import BYTES
from schedules.loops import LINE_BITS
from schedules.winograd_structure import winograd
from schedules.winograd_transforms import TAPS

FLOAT_BITS = 32
# Blocks of output channels from which on a copy of every second position pays: all of them read it, some at once.
LEAST_READINGS = 8


@dataclass(frozen=True)
class BlockChannels(Pass):
    """Give convolutions of fp32 with constant weights, and what lies between them, blocks of `block` channels.

    Where it pays, 3x3 filters are computed by Winograd's F(m, 3) with m up to `winograd`: 2 to 4, or 0 for none.
    `dtype` is what convolutions read: float32, or bfloat16 for targets that have dot products of pairs of it;
    `integers` what dot products of fours of bytes read, uint8 or int8, nothing where there are none. Blocks are of
    `byte_block` where that is not 0 and all convolutions are of bytes and take less time so. With `words`
    dense convolutions read bytes as int16, and Winograd's filtering of these is exact.
    """

    name: ClassVar[str] = "block-channels"
    block: int = 16
    winograd: int = 4
    dtype: str = "float32"
    integers: str = ""
    byte_block: int = 0
    words: bool = False

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite all Relax functions of the module."""
        sites: list[Site] = []
        sizes = self.block, self.byte_block
        in_tiles = self.byte_block > 0 and pays_in_blocks(convolutions_of(module), self.integers, *sizes)
        rewriter = _Blocker(module, replace(self, block=self.byte_block) if in_tiles else self, sites)
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                rewriter.builder_.update_func(variable, rewriter.visit_expr(function))
        rewritten = relax.transform.DeadCodeElimination()(rewriter.builder_.get()) if sites else module
        return PassOutcome(rewritten, tuple(sites))


@mutator
class _Blocker(BlockedForms):
    """Walks the bindings in order; `_borders` holds what is padded with a constant."""

    def __init__(self, module: tvm.IRModule, options: BlockChannels, sites: list[Site]) -> None:
        super().__init__(module, options.block, options.dtype, options.integers if options.words else "")
        self._largest_tile = options.winograd
        # Bytes of neighbouring taps that one step takes of a first layer's few channels.
        self._row = BYTES if options.block == options.byte_block else 0
        self._integers, self._words = options.integers, options.words
        self._borders: dict[relax.Var, Border] = {}
        self._sites = sites

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Bind the blocked form of the value where it has one."""
        self._name = binding.var.name
        value = self._rewritten(binding)
        if value is None:
            super().visit_var_binding_(binding)
            return
        if isinstance(value, Blocked):
            self._blocked[binding.var] = value
            if isinstance(binding.var, relax.DataflowVar):
                return
            value = self._unblocked(value)
        super().visit_var_binding_(relax.VarBinding(binding.var, value))

    def visit_dataflow_block_(self, block: relax.DataflowBlock) -> relax.BindingBlock:
        """Forget borders at the end of a block: others do not see what is inside."""
        result = super().visit_dataflow_block_(block)
        self._borders.clear()
        return result

    def _rewritten(self, binding: relax.VarBinding) -> Blocked | relax.Expr | None:
        """Return the blocked form of a binding's value, another expression for it, or None to leave it."""
        call = binding.value
        if not isinstance(call, tvm.ir.Call) or not isinstance(call.op, tvm.ir.Op):
            return None
        name = call.op.name
        if name in CONVOLUTIONS or name in TRANSPOSED:
            try:
                result, choice = self._any_convolution(call)
            except Refusal as refusal:
                self._sites.append(Site(binding.var.name, str(refusal), nodes_of(call)))
                return None
            self._sites.append(Site(binding.var.name, None, nodes_of(call), choice))
            return result
        border = border_of(call)
        if border is not None:
            self._borders[binding.var] = border
        if name == "relax.concat":
            return self._concatenation(call)
        if name == "relax.multiply":
            self._note_product(binding.var, call)
        if not any(self._is_blocked(argument) for argument in call.args):
            return None
        if name in ELEMENTWISE:
            return self._less_products(call) or self._elementwise(call)
        if name == "relax.nn.pad":
            return self._padding(call)
        if name in QUANTIZATIONS:
            return self._quantization(call)
        if name in POOLINGS:
            return self._pooling(call)
        if name in REDUCTIONS:
            return self._reduction(call)
        if name == "relax.permute_dims":
            return self._permutation(call)
        return None

    def _any_convolution(self, call: tvm.ir.Call) -> tuple[Blocked, str]:
        if call.op.name in TRANSPOSED:
            return self._transposed(call)
        if not is_integer(call):
            return self._convolution(call)
        border = self._borders.get(call.args[0]) if isinstance(call.args[0], relax.Var) else None
        return self._integer(call, integer_convolution(call, border, self._integers))

    def _integer(self, call: tvm.ir.Call, site: IntegerConvolution) -> tuple[Blocked, str]:
        """Return a convolution of bytes in blocked form, and how it is computed; raises Refusal."""
        values, block, is_blocked = site.weights, self._block, self._is_blocked(site.source)
        if site.depthwise:
            several = len(values) // site.groups
            require(several == 1, f"a depthwise convolution with {several} outputs a channel")
            depth, packed = block, blocked_operators.pack_depthwise(values, block)
        else:
            if site.sums_windows:
                values = np.repeat(values, block, axis=0)
            self._require_blocks(values, site.groups)
            depth = block if is_blocked or site.channels > block else site.channels
            if self._row and not site.sums_windows and self._row % depth == 0:
                values, geometry = with_whole_steps(values, site.geometry, self._row // depth)
                site = replace(site, weights=values, geometry=geometry)
            packed = blocked_operators.pack_bytes(values, block, depth, PAIR if self._words else FOUR)
        geometry, border = site.split()
        data = self._bytes(site, depth)
        if any((*border.pads_begin, *border.pads_end)):
            data = self._bordered(data, border, site.border)
        choice = "in integers"
        try:
            tile = self._tile_of_words(site, data, geometry)
            packed = pack_winograd(values, tile, block, stride=geometry.strides[0])
            return self._filtered_by(tile, call, geometry, packed, data)
        except Refusal as refusal:
            if self._words:
                choice = f"in integers, directly: {refusal}"

        def compute(x: te.Tensor, w: te.Tensor) -> te.Tensor:
            if site.depthwise:
                return blocked_operators.depthwise(x, w, geometry)
            return blocked_operators.dense(x, w, site.channels, site.groups, geometry)

        return replace(self._computed(call, compute, packed, data), spread=site.sums_windows), choice

    def _tile_of_words(self, site: IntegerConvolution, data: relax.Var, geometry: Geometry) -> int:
        """Return m of Winograd's filtering of blocked bytes, which lie as words; raises Refusal."""
        require(self._words and self._largest_tile > 0, "Winograd's filtering is of words")
        require(not site.sums_windows, "it sums what windows read")
        require(site.groups == 1, "its channels are in groups")
        batch, _, *image, lanes = data.ty.shape.values
        require(len(image) == 2, "it has not two spatial dimensions")
        require(int(lanes) == self._block and site.weights.shape[1] % PAIR == 0, "its channels are no whole pairs")
        height, width = map(static, image)
        if height is None or width is None:
            raise Refusal("the size of its image is unknown")
        shape, bound = site.weights.shape, bound_of_results(site.weights)
        return choose_tile(shape, (height, width), static(batch) or 1, geometry, self._largest_tile, bound=bound)

    def _bytes(self, site: IntegerConvolution, depth: int) -> relax.Var:
        """Return the data of a convolution in blocks of `depth`, as it reads them."""
        if depth != self._block:
            narrow = self._in_blocks(site.source, depth)
            return self._emit(relax.op.astype(narrow, WORD)) if self._words else narrow
        if not site.depthwise:
            return self._rounded(site.source)
        known = self._as_blocked(site.source)
        return known.var if known.rounded is None else known.rounded

    def _bordered(self, data: relax.Expr, border: Geometry, value: float) -> relax.Var:
        """Return a blocked image with a border of some value."""
        return self._emit(
            self.builder_.call_te(
                lambda x: blocked_operators.with_border(x, border, value), data, primfunc_name_hint="border"
            )
        )

    def _require_blocks(self, values: np.ndarray, groups: int) -> None:
        """Refuse groups that are no whole blocks."""
        (outputs, per_group), block = values.shape[:2], self._block
        if groups > 1 and (per_group % block or outputs // groups % block):
            raise Refusal(f"groups of {per_group} to {outputs // groups} channels are not whole blocks of {block}")

    def _convolution(self, call: tvm.ir.Call) -> tuple[Blocked, str]:
        """Return a convolution in blocked form, and how it is computed; raises Refusal."""
        geometry = checked_geometry(call)
        values, block = call.args[1].value.numpy(), self._block
        outputs, per_group = values.shape[:2]
        groups = int(call.attrs.groups)
        channels = per_group * groups
        data = call.args[0]
        if per_group == 1 and groups > 1:
            if outputs != channels:
                raise Refusal(f"a depthwise convolution with {outputs // channels} outputs a channel")
            packed = blocked_operators.pack_depthwise(values, block)
            return self._computed(call, lambda x, w: blocked_operators.depthwise(x, w, geometry), packed), ""
        self._require_blocks(values, groups)
        is_first = channels < block and max(values.shape[2:]) > 1 and not self._is_blocked(data)
        if not self._is_blocked(data):
            check_outputs(values, block, pairs=self._in_pairs(per_group), first=is_first)
        if is_first:
            return self._first(call, values, geometry), ""
        try:
            require(groups == 1, "its channels are in groups")
            return self._filtered(call, values, geometry)
        except Refusal as refusal:
            sampled = self._sampled(data, values, geometry) if groups == 1 else None
            if sampled is not None:
                geometry = replace(geometry, strides=(1,) * len(geometry.strides))
            packed = self._packing(per_group)(values, block)
            result = self._computed(
                call, lambda x, w: blocked_operators.dense(x, w, channels, groups, geometry), packed, sampled
            )
            return result, f"directly: {refusal}"

    def _sampled(self, data: relax.Expr, values: np.ndarray, geometry: Geometry) -> relax.Var | None:
        """Return the positions that a strided filter of one tap reads, copied; None where it reads them in place.

        Where two positions share a cache line, the other one comes with each of them, for all of the output channels.
        """
        outputs, _, *kernel = values.shape
        halves = 2 * self._block * FLOAT_BITS == LINE_BITS
        one_tap = set(kernel) == {1} and not any((*geometry.pads_begin, *geometry.pads_end))
        many = outputs >= self._block * LEAST_READINGS
        if self._dtype == BFLOAT16 or not (halves and one_tap and many and geometry.strides[-1] > 1):
            return None
        image = self._as_blocked(data).var
        return self._emit(
            self.builder_.call_te(
                lambda x: blocked_operators.sampled(x, geometry.strides), image, primfunc_name_hint="sampled"
            )
        )

    def _first(self, call: tvm.ir.Call, values: np.ndarray, geometry: Geometry) -> Blocked:
        """Return a convolution of few channels in plain layout; where pairs are rounded they become a narrow block."""
        if self._dtype != BFLOAT16 or values.shape[1] < PAIR:
            packed, plain = blocked_operators.pack_shallow(values, self._block), self.visit_expr(call.args[0])
            return self._computed(call, lambda x, w: blocked_operators.shallow(x, w, geometry), packed, plain)
        depth = values.shape[1] + values.shape[1] % PAIR
        if self._block == ROW and ROW % depth == 0:
            values, geometry = with_whole_steps(values, geometry, ROW // depth)
        packed = blocked_operators.pack_pairs(values, self._block, depth)
        rounded = self._emit(relax.op.astype(self._in_blocks(call.args[0], depth), BFLOAT16))
        return self._computed(call, lambda x, w: blocked_operators.dense(x, w, depth, 1, geometry), packed, rounded)

    def _packing(self, channels: int) -> Callable[[np.ndarray, int], np.ndarray]:
        """Return how weights of `channels` inputs are laid out: in pairs where both sides of a product are rounded."""
        return blocked_operators.pack_pairs if self._in_pairs(channels) else blocked_operators.pack_dense

    def _in_pairs(self, channels: int) -> bool:
        return self._dtype == BFLOAT16 and channels % PAIR == 0

    def _transposed(self, call: tvm.ir.Call) -> tuple[Blocked, str]:
        """Return a transposed convolution whose taps do not overlap, as one of a single tap; raises Refusal."""
        check_operands(call)
        attributes, values = call.attrs, call.args[1].value.numpy()
        kernel = values.shape[2:]
        apart = tuple(map(int, attributes.strides)) == kernel and {int(step) for step in attributes.dilation} == {1}
        require(apart, "the taps of neighbouring positions overlap or leave gaps")
        cropped = any(int(pad) for pad in (*attributes.padding, *attributes.output_padding))
        require(not cropped, "it crops or extends its result")
        require(int(attributes.groups) == 1, "its channels are in groups")
        ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
        products = self._computed(
            call,
            lambda x, w: blocked_operators.dense(x, w, len(values), 1, Geometry(ones, ones, zeros, zeros)),
            self._packing(len(values))(blocked_operators.scattered(values, self._block), self._block),
        )
        image = self.builder_.call_te(
            lambda x: blocked_operators.scatter(x, kernel), products.var, primfunc_name_hint="scatter"
        )
        return Blocked(self._emit(image), products.shape), "as a product, whose results are put side by side"

    def _filtered(self, call: tvm.ir.Call, values: np.ndarray, geometry: Geometry) -> tuple[Blocked, str]:
        """Return a convolution by Winograd's minimal filtering, and which; raises Refusal."""
        require(self._largest_tile > 0, "Winograd's filtering is switched off")
        batch, _, *image = call.args[0].ty.shape.values
        require(len(image) == 2, "it has not two spatial dimensions")
        height, width = (int(extent) for extent in image)
        in_pairs = self._in_pairs(values.shape[1])
        tile = choose_tile(values.shape, (height, width), static(batch) or 1, geometry, self._largest_tile, in_pairs)
        packed = pack_winograd(values, tile, self._block, in_pairs, geometry.strides[0])
        return self._filtered_by(tile, call, geometry, packed)

    def _filtered_by(
        self, tile: int, call: tvm.ir.Call, geometry: Geometry, packed: np.ndarray, data: relax.Expr | None = None
    ) -> tuple[Blocked, str]:
        """Return a convolution by F(`tile`, 3), and what it is, as `_computed` does."""
        before, stride = (geometry.pads_begin[0], geometry.pads_begin[1]), geometry.strides[0]
        size = int(call.ty.shape.values[2]), int(call.ty.shape.values[3])
        result = self._computed(call, lambda x, w: winograd(x, w, tile, before, size, stride), packed, data)
        return result, f"by Winograd's F({tile}, {TAPS})"

    def _computed(
        self, call: tvm.ir.Call, compute: Callable[..., te.Tensor], packed: np.ndarray, data: relax.Expr | None = None
    ) -> Blocked:
        """Return what `compute` makes of a convolution's data, blocked unless given, and its packed weights."""
        data = self._rounded(call.args[0]) if data is None else data
        name = call.op.name.rpartition(".")[2]
        result = self.builder_.call_te(compute, data, relax.const(packed), primfunc_name_hint=name)
        return Blocked(self._emit(result), tuple(call.ty.shape.values))

    def _elementwise(self, call: tvm.ir.Call) -> Blocked | None:
        shape = tuple(call.ty.shape.values)
        if self._stores_later(call):
            return self._sum_with_rounded(call)
        operands = [self._operand(argument, shape) for argument in call.args]
        if any(operand is None for operand in operands):
            return None
        return Blocked(self._emit(tvm.ir.Call(call.op, operands, call.attrs, call.ty_args)), shape)

    def _padding(self, call: tvm.ir.Call) -> Blocked | None:
        """Return an image padded with a constant."""
        border = border_of(call)
        if border is None:
            return None
        blocked, ones = self._blocked[call.args[0]], (1,) * len(border.pads_begin)
        geometry = Geometry(ones, ones, border.pads_begin, border.pads_end)
        return Blocked(self._bordered(self._read(blocked), geometry, border.value), tuple(call.ty.shape.values))

    def _quantization(self, call: tvm.ir.Call) -> Blocked | None:
        """Quantization by one scale treats all elements alike."""
        scalars: list[relax.Expr] = []
        for parameter in call.args[1:]:
            array = constant_of(parameter)
            if array is not None and array.size == 1:
                scalars.append(relax.const(array.reshape(())))
            elif parameter.ty.ndim == 0:
                scalars.append(self.visit_expr(parameter))
        if len(scalars) < len(call.args[1:]) or not self._is_blocked(call.args[0]):
            return None
        known = self._blocked[call.args[0]]
        changed = tvm.ir.Call(call.op, [self._read(known), *scalars], call.attrs, call.ty_args)
        return Blocked(self._emit(changed), known.shape)

    def _pooling(self, call: tvm.ir.Call) -> Blocked | None:
        attributes = call.attrs
        if attributes.layout != "NCHW" or attributes.out_layout != "NCHW":
            return None
        layout = f"NCHW{self._block}c"
        # The largest of rounded numbers is one of them; what is pooled is stored.
        rounds = call.op.name == "relax.nn.max_pool2d" and self._rounds_stored(call.args[0])
        pooled = POOLINGS[call.op.name](
            self._rounded(call.args[0]) if rounds else self._read(self._blocked[call.args[0]]),
            pool_size=attributes.pool_size,
            strides=attributes.strides,
            padding=attributes.padding,
            dilation=attributes.dilation,
            ceil_mode=attributes.ceil_mode,
            count_include_pad=attributes.count_include_pad,
            layout=layout,
            out_layout=layout,
        )
        result, shape = self._emit(pooled), tuple(call.ty.shape.values)
        if not rounds:
            return Blocked(result, shape)
        return Blocked(self._emit(relax.op.astype(result, str(call.ty.dtype.dtype))), shape, rounded=result)

    def _reduction(self, call: tvm.ir.Call) -> Blocked | relax.Expr | None:
        """Reductions over the whole image stay blocked, without the axes if these are dropped.

        The least or largest of all is that of each channel's.
        """
        blocked = self._blocked[call.args[0]]
        rank = len(blocked.shape)
        image = list(range(2, rank))
        axes = list(range(rank)) if call.attrs.axis is None else sorted(int(axis) % rank for axis in call.attrs.axis)
        of_all = axes == list(range(rank)) and call.op.name in ("relax.max", "relax.min")
        if axes != image and not of_all:
            return None
        self._rounded(call.args[0])  # it is stored: no kernel computes it and the reduction
        data = self._read(self._blocked[call.args[0]])
        kept = self._emit(REDUCTIONS[call.op.name](data, image, keepdims=True))
        result = Blocked(kept, (*blocked.shape[:2], *[tvm.tirx.IntImm("int64", 1)] * len(image)))
        if of_all:
            return REDUCTIONS[call.op.name](self._emit(self._unblocked(result)), keepdims=bool(call.attrs.keepdims))
        if call.attrs.keepdims:
            return result
        return relax.op.reshape(self._emit(self._unblocked(result)), list(blocked.shape[:2]))

    def _concatenation(self, call: tvm.ir.Call) -> Blocked | None:
        fields = call.args[0].fields if isinstance(call.args[0], relax.Tuple) else []
        if not any(self._is_blocked(field) for field in fields):
            return None
        shape = tuple(call.ty.shape.values)
        if int(call.attrs.axis) % len(shape) != 1 or not all(isinstance(field, relax.Var) for field in fields):
            return None
        counts = [static(field.ty.shape.values[1]) for field in fields]
        if any(count is None or count % self._block for count in counts[:-1]) or counts[-1] is None:
            return None
        parts = [self._read(self._as_blocked(field)) for field in fields]
        return Blocked(self._emit(relax.op.concat(parts, axis=1)), shape)

    def _permutation(self, call: tvm.ir.Call) -> relax.Expr | None:
        """Channels moved to the end: read straight from the blocks."""
        blocked = self._blocked[call.args[0]]
        rank = len(blocked.shape)
        axes = None if call.attrs.axes is None else [int(axis) % rank for axis in call.attrs.axes]
        if axes != [0, *range(2, rank), 1]:
            return None
        last, data = blocked_operators.channels_last, self._read(blocked)
        return self.builder_.call_te(last, data, blocked.channels, primfunc_name_hint="channels_last")
