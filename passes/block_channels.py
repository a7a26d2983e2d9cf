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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import tvm
import tvm.ir
from tvm import relax, te
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes import blocked_operators
from passes.base import Pass, PassOutcome, Refusal, Site, require
from passes.blocked_operators import Geometry
from passes.convolution_sites import check_operands, checked_geometry, static
from passes.provenance import nodes_of
from passes.winograd import choose_tile, pack_winograd
from schedules.intrin.bf16_conversion import BFLOAT16
from schedules.intrin.bf16_dot import PAIR
from schedules.winograd_structure import winograd
from schedules.winograd_transforms import TAPS

_CONVOLUTIONS = {"relax.nn.conv1d": 1, "relax.nn.conv2d": 2, "relax.nn.conv3d": 3}
_TRANSPOSED = {"relax.nn.conv1d_transpose": 1, "relax.nn.conv2d_transpose": 2, "relax.nn.conv3d_transpose": 3}
_ELEMENTWISE = frozenset(
    f"relax.{name}"
    for name in [
        *("nn.relu", "nn.leakyrelu", "nn.gelu", "nn.gelu_tanh", "nn.silu", "sigmoid", "tanh", "erf", "exp", "log"),
        *("negative", "abs", "sqrt", "rsqrt", "square", "clip", "floor", "ceil", "round", "astype"),
        *("add", "subtract", "multiply", "divide", "power", "maximum", "minimum", "where"),
        *("less", "less_equal", "greater", "greater_equal", "equal", "not_equal"),
        *("logical_and", "logical_or", "logical_not"),
    ]
)
_REDUCTIONS = {
    "relax.mean": relax.op.mean,
    "relax.sum": relax.op.sum,
    "relax.max": relax.op.max,
    "relax.min": relax.op.min,
}
_POOLINGS = {"relax.nn.max_pool2d": relax.op.nn.max_pool2d, "relax.nn.avg_pool2d": relax.op.nn.avg_pool2d}


@dataclass(frozen=True)
class BlockChannels(Pass):
    """Give convolutions of fp32 with constant weights, and what lies between them, blocks of `block` channels.

    Where it pays, 3x3 filters are computed by Winograd's F(m, 3) with m up to `winograd`: 2, 4, or 0 for none. `dtype`
    is what convolutions read: float32, or bfloat16 for targets that have dot products of pairs of it.
    """

    name: ClassVar[str] = "block-channels"
    block: int = 16
    winograd: int = 4
    dtype: str = "float32"

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite all Relax functions of the module."""
        sites: list[Site] = []
        rewriter = _Blocker(module, self, sites)
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                rewriter.builder_.update_func(variable, rewriter.visit_expr(function))
        rewritten = relax.transform.DeadCodeElimination()(rewriter.builder_.get()) if sites else module
        return PassOutcome(rewritten, tuple(sites))


@dataclass(frozen=True)
class _Blocked:
    """A blocked tensor with the number of its channels and the shape that it has unblocked.

    `rounded` is what a convolution reads of it where that is of another type.
    """

    var: relax.Var
    shape: tuple[tvm.ir.Expr, ...]
    rounded: relax.Var | None = None

    @property
    def channels(self) -> int:
        return int(self.shape[1])


@mutator
class _Blocker(PyExprMutator):
    """Walks the bindings in order; `_blocked` holds what has a blocked form, `_plain` what was converted back."""

    def __init__(self, module: tvm.IRModule, options: BlockChannels, sites: list[Site]) -> None:
        super().__init__(module)
        self._block = options.block
        self._largest_tile = options.winograd
        self._dtype = options.dtype
        self._name = ""
        self._sites = sites
        self._blocked: dict[relax.Var, _Blocked] = {}
        self._plain: dict[relax.Var, relax.Expr] = {}
        self._converted: dict[relax.Var, _Blocked] = {}

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        """Bind the blocked form of the value where it has one."""
        self._name = binding.var.name
        value = self._rewritten(binding)
        if value is None:
            super().visit_var_binding_(binding)
            return
        if isinstance(value, _Blocked):
            self._blocked[binding.var] = value
            if isinstance(binding.var, relax.DataflowVar):
                return
            value = self._unblocked(value)
        super().visit_var_binding_(relax.VarBinding(binding.var, value))

    def visit_dataflow_block_(self, block: relax.DataflowBlock) -> relax.BindingBlock:
        """Forget blocked forms at the end of a block: others do not see its variables."""
        result = super().visit_dataflow_block_(block)
        for known in (self._blocked, self._plain, self._converted):
            known.clear()
        return result

    def visit_dataflow_var_(self, op: relax.DataflowVar) -> relax.Expr:
        """Convert a blocked tensor back for a reader that wants it plain."""
        blocked = self._blocked.get(op)
        if blocked is None:
            return super().visit_dataflow_var_(op)
        if op not in self._plain:
            self._plain[op] = self._emit(self._unblocked(blocked))
        return self._plain[op]

    def _rewritten(self, binding: relax.VarBinding) -> _Blocked | relax.Expr | None:
        """Return the blocked form of a binding's value, another expression for it, or None to leave it."""
        call = binding.value
        if not isinstance(call, tvm.ir.Call) or not isinstance(call.op, tvm.ir.Op):
            return None
        name = call.op.name
        if name in _CONVOLUTIONS or name in _TRANSPOSED:
            try:
                result, choice = self._convolution(call) if name in _CONVOLUTIONS else self._transposed(call)
            except Refusal as refusal:
                self._sites.append(Site(binding.var.name, str(refusal), nodes_of(call)))
                return None
            self._sites.append(Site(binding.var.name, None, nodes_of(call), choice))
            return result
        if name == "relax.concat":
            return self._concatenation(call)
        if not any(self._is_blocked(argument) for argument in call.args):
            return None
        if name in _ELEMENTWISE:
            return self._elementwise(call)
        if name in _POOLINGS:
            return self._pooling(call)
        if name in _REDUCTIONS:
            return self._reduction(call)
        if name == "relax.permute_dims":
            return self._permutation(call)
        return None

    def _emit(self, expr: relax.Expr) -> relax.Var:
        """Bind what is made of the present binding, under its name."""
        return self.builder_.emit(expr, self._name)

    def _is_blocked(self, expr: relax.Expr) -> bool:
        return isinstance(expr, relax.Var) and expr in self._blocked

    def _convolution(self, call: tvm.ir.Call) -> tuple[_Blocked, str]:
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
        if groups > 1 and (per_group % block or outputs // groups % block):
            raise Refusal(f"groups of {per_group} to {outputs // groups} channels are not whole blocks of {block}")
        if 2 * outputs < block and not self._is_blocked(data):
            raise Refusal(f"{outputs} output channels would leave most of a block of {block} empty")
        if channels < block and max(values.shape[2:]) > 1 and not self._is_blocked(data):
            return self._first(call, values, geometry), ""
        try:
            require(groups == 1, "its channels are in groups")
            return self._filtered(call, values, geometry)
        except Refusal as refusal:
            packed = self._packing(per_group)(values, block)
            result = self._computed(
                call, lambda x, w: blocked_operators.dense(x, w, channels, groups, geometry), packed
            )
            return result, f"directly: {refusal}"

    def _first(self, call: tvm.ir.Call, values: np.ndarray, geometry: Geometry) -> _Blocked:
        """Return a convolution of few channels in plain layout; where pairs are rounded they become a narrow block."""
        if self._dtype != BFLOAT16 or values.shape[1] < PAIR:
            packed, plain = blocked_operators.pack_shallow(values, self._block), self.visit_expr(call.args[0])
            return self._computed(call, lambda x, w: blocked_operators.shallow(x, w, geometry), packed, plain)
        depth = values.shape[1] + values.shape[1] % PAIR
        packed = blocked_operators.pack_pairs(values, self._block, depth)
        rounded = self._emit(relax.op.astype(self._in_blocks(call.args[0], depth), BFLOAT16))
        return self._computed(call, lambda x, w: blocked_operators.dense(x, w, depth, 1, geometry), packed, rounded)

    def _packing(self, channels: int) -> Callable[[np.ndarray, int], np.ndarray]:
        """Return how weights of `channels` inputs are laid out: in pairs where both sides of a product are rounded."""
        return blocked_operators.pack_pairs if self._in_pairs(channels) else blocked_operators.pack_dense

    def _in_pairs(self, channels: int) -> bool:
        return self._dtype == BFLOAT16 and channels % PAIR == 0

    def _transposed(self, call: tvm.ir.Call) -> tuple[_Blocked, str]:
        """Return a transposed convolution whose taps do not overlap, as one of a single tap; raises Refusal."""
        check_operands(call)
        attributes, values = call.attrs, call.args[1].value.numpy()
        kernel = values.shape[2:]
        apart = tuple(map(int, attributes.strides)) == kernel and {int(step) for step in attributes.dilation} == {1}
        require(apart, "the taps of neighbouring positions overlap or leave gaps")
        cropped = any(int(pad) for pad in (*attributes.padding, *attributes.output_padding))
        require(not cropped, "it crops or extends its result")
        require(int(attributes.groups) == 1, "its channels are in groups")
        require(2 * values.shape[1] >= self._block, f"{values.shape[1]} output channels would leave blocks empty")
        ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
        products = self._computed(
            call,
            lambda x, w: blocked_operators.dense(x, w, len(values), 1, Geometry(ones, ones, zeros, zeros)),
            self._packing(len(values))(blocked_operators.scattered(values, self._block), self._block),
        )
        image = self.builder_.call_te(
            lambda x: blocked_operators.scatter(x, kernel), products.var, primfunc_name_hint="scatter"
        )
        return _Blocked(self._emit(image), products.shape), "as a product, whose results are put side by side"

    def _filtered(self, call: tvm.ir.Call, values: np.ndarray, geometry: Geometry) -> tuple[_Blocked, str]:
        """Return a convolution by Winograd's minimal filtering, and which; raises Refusal."""
        require(self._largest_tile > 0, "Winograd's filtering is switched off")
        batch, _, *image = call.ty.shape.values
        require(len(image) == 2, "it has not two spatial dimensions")
        size = int(image[0]), int(image[1])
        in_pairs = self._in_pairs(values.shape[1])
        tile = choose_tile(values.shape, size, static(batch) or 1, geometry, self._largest_tile, in_pairs)
        before = geometry.pads_begin[0], geometry.pads_begin[1]
        packed = pack_winograd(values, tile, self._block, in_pairs)
        result = self._computed(call, lambda x, w: winograd(x, w, tile, before, size), packed)
        return result, f"by Winograd's F({tile}, {TAPS})"

    def _computed(
        self, call: tvm.ir.Call, compute: Callable[..., te.Tensor], packed: np.ndarray, data: relax.Expr | None = None
    ) -> _Blocked:
        """Return what `compute` makes of a convolution's data, blocked unless given, and its packed weights."""
        data = self._rounded(call.args[0]) if data is None else data
        name = call.op.name.rpartition(".")[2]
        result = self.builder_.call_te(compute, data, relax.const(packed), primfunc_name_hint=name)
        return _Blocked(self._emit(result), tuple(call.ty.shape.values))

    def _rounded(self, expr: relax.Expr) -> relax.Var:
        """Return a blocked tensor as convolutions read it; from now on others read it so, too."""
        blocked = self._as_blocked(expr)
        if self._dtype == "float32" or str(expr.ty.dtype.dtype) != "float32":
            return blocked.var
        if blocked.rounded is None:
            blocked = replace(blocked, rounded=self._emit(relax.op.astype(blocked.var, self._dtype)))
            if isinstance(expr, relax.Var):
                (self._blocked if expr in self._blocked else self._converted)[expr] = blocked
        assert blocked.rounded is not None
        return blocked.rounded

    def _read(self, blocked: _Blocked) -> relax.Var:
        """Return a blocked tensor of the type that it has unblocked."""
        if blocked.rounded is None:
            return blocked.var
        return self._emit(relax.op.astype(blocked.rounded, blocked.var.ty.dtype.dtype))

    def _as_blocked(self, expr: relax.Expr) -> _Blocked:
        """Return the blocked form of a tensor [N, C, spatial...], converting it where it has none."""
        if isinstance(expr, relax.Var):
            known = self._blocked.get(expr) or self._converted.get(expr)
            if known is not None:
                return known
        blocked = _Blocked(self._in_blocks(expr, self._block), tuple(expr.ty.shape.values))
        if isinstance(expr, relax.Var):
            self._converted[expr] = blocked
        return blocked

    def _in_blocks(self, expr: relax.Expr, block: int) -> relax.Var:
        """Return a plain tensor converted to blocks."""
        plain, to_blocks = self.visit_expr(expr), blocked_operators.to_blocks
        return self._emit(self.builder_.call_te(to_blocks, plain, block, primfunc_name_hint="to_blocks"))

    def _unblocked(self, blocked: _Blocked) -> relax.Expr:
        """Return the call that gives a blocked tensor its plain layout again."""
        image = blocked.shape[2:]
        if all(static(size) == 1 for size in image) and blocked.channels % self._block == 0:
            return relax.op.reshape(self._read(blocked), list(blocked.shape))
        from_blocks, data = blocked_operators.from_blocks, self._read(blocked)
        return self.builder_.call_te(from_blocks, data, blocked.channels, primfunc_name_hint="from_blocks")

    def _elementwise(self, call: tvm.ir.Call) -> _Blocked | None:
        shape = tuple(call.ty.shape.values)
        operands = [self._operand(argument, shape) for argument in call.args]
        if any(operand is None for operand in operands):
            return None
        return _Blocked(self._emit(tvm.ir.Call(call.op, operands, call.attrs, call.ty_args)), shape)

    def _operand(self, expr: relax.Expr, result: Sequence[tvm.ir.Expr]) -> relax.Expr | None:
        """Return an operand that broadcasts to blocked `result`, None where it cannot."""
        if not isinstance(expr.ty, relax.TensorType):
            return expr  # a bound of clip
        if expr.ty.ndim == 0:
            return self.visit_expr(expr)
        if self._is_blocked(expr):
            known = self._blocked[expr]
            own = known.channels == static(result[1]) and len(known.shape) == len(result)
            return self._read(known) if own else None
        shape = expr.ty.shape
        if shape is None or len(shape.values) > len(result):
            return None
        ones = [tvm.tirx.IntImm("int64", 1)] * (len(result) - len(shape.values))
        aligned = [*ones, *shape.values]
        if static(aligned[1]) == 1:
            return relax.op.reshape(self.visit_expr(expr), [*aligned, 1])
        if static(aligned[1]) != static(result[1]):
            return None
        if isinstance(expr, tvm.ir.GenericConst):
            values = expr.value.numpy().reshape([int(size) for size in aligned])
            return relax.const(blocked_operators.pack_tensor(values, self._block), str(expr.ty.dtype.dtype))
        if ones:
            return None
        return self._read(self._as_blocked(expr))

    def _pooling(self, call: tvm.ir.Call) -> _Blocked | None:
        attributes = call.attrs
        if attributes.layout != "NCHW" or attributes.out_layout != "NCHW":
            return None
        layout = f"NCHW{self._block}c"
        pooled = _POOLINGS[call.op.name](
            self._read(self._blocked[call.args[0]]),
            pool_size=attributes.pool_size,
            strides=attributes.strides,
            padding=attributes.padding,
            dilation=attributes.dilation,
            ceil_mode=attributes.ceil_mode,
            count_include_pad=attributes.count_include_pad,
            layout=layout,
            out_layout=layout,
        )
        return _Blocked(self._emit(pooled), tuple(call.ty.shape.values))

    def _reduction(self, call: tvm.ir.Call) -> _Blocked | relax.Expr | None:
        """Reductions over the whole image stay blocked, without the axes if these are dropped."""
        blocked = self._blocked[call.args[0]]
        rank = len(blocked.shape)
        image = list(range(2, rank))
        axes = None if call.attrs.axis is None else sorted(int(axis) % rank for axis in call.attrs.axis)
        if axes != image:
            return None
        self._rounded(call.args[0])  # it is stored: no kernel computes it and the reduction
        data = self._read(self._blocked[call.args[0]])
        kept = self._emit(_REDUCTIONS[call.op.name](data, image, keepdims=True))
        result = _Blocked(kept, (*blocked.shape[:2], *[tvm.tirx.IntImm("int64", 1)] * len(image)))
        if call.attrs.keepdims:
            return result
        return relax.op.reshape(self._emit(self._unblocked(result)), list(blocked.shape[:2]))

    def _concatenation(self, call: tvm.ir.Call) -> _Blocked | None:
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
        return _Blocked(self._emit(relax.op.concat(parts, axis=1)), shape)

    def _permutation(self, call: tvm.ir.Call) -> relax.Expr | None:
        """Channels moved to the end: read straight from the blocks."""
        blocked = self._blocked[call.args[0]]
        rank = len(blocked.shape)
        axes = None if call.attrs.axes is None else [int(axis) % rank for axis in call.attrs.axes]
        if axes != [0, *range(2, rank), 1]:
            return None
        last, data = blocked_operators.channels_last, self._read(blocked)
        return self.builder_.call_te(last, data, blocked.channels, primfunc_name_hint="channels_last")
