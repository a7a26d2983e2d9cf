"""Convolutional regions in blocked layout: [N, C, spatial...] becomes [N, ceil(C/block), spatial..., block].

A vector register then holds one position of a block of channels, so that a convolution reads its weights, packed here
to match, as vectors and the image as it lies: no gathers, and no copy for padding. The layout spreads from convolutions
through what treats channels alike (arithmetic, activations, pooling, means over the image, concatenation of whole
blocks); where something else reads a blocked tensor, it is converted back. Channels past the last one of a partial
block hold anything and are never read. Values do not change but for the order of summation, and the error of Winograd's
transforms where these are chosen (`passes.winograd`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import tvm
import tvm.ir
from tvm import relax, te
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes import blocked_operators
from passes.base import Pass, PassOutcome, Refusal, Site, require
from passes.blocked_operators import Geometry
from passes.provenance import nodes_of
from passes.winograd import choose_tile, pack_winograd
from schedules.winograd_structure import winograd
from schedules.winograd_transforms import TAPS

_CONVOLUTIONS = {"relax.nn.conv1d": 1, "relax.nn.conv2d": 2, "relax.nn.conv3d": 3}
_TRANSPOSED = {"relax.nn.conv1d_transpose": 1, "relax.nn.conv2d_transpose": 2, "relax.nn.conv3d_transpose": 3}
_PLAIN_LAYOUTS = ("NCW", "NCHW", "NCDHW", "OIW", "OIHW", "OIDHW", "IOW", "IOHW", "IODHW")
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

    Where it pays, 3x3 filters are computed by Winograd's F(m, 3) with m up to `winograd`: 2, 4, or 0 for none.
    """

    name: ClassVar[str] = "block-channels"
    block: int = 16
    winograd: int = 4

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite all Relax functions of the module."""
        sites: list[Site] = []
        rewriter = _Blocker(module, self.block, self.winograd, sites)
        for variable, function in module.functions_items():
            if isinstance(function, relax.Function):
                rewriter.builder_.update_func(variable, rewriter.visit_expr(function))
        rewritten = relax.transform.DeadCodeElimination()(rewriter.builder_.get()) if sites else module
        return PassOutcome(rewritten, tuple(sites))


@dataclass(frozen=True)
class _Blocked:
    """A blocked tensor with the number of its channels and the shape that it has unblocked."""

    var: relax.Var
    shape: tuple[tvm.ir.Expr, ...]

    @property
    def channels(self) -> int:
        return int(self.shape[1])


@mutator
class _Blocker(PyExprMutator):
    """Walks the bindings in order; `_blocked` holds what has a blocked form, `_plain` what was converted back."""

    def __init__(self, module: tvm.IRModule, block: int, largest_tile: int, sites: list[Site]) -> None:
        super().__init__(module)
        self._block = block
        self._largest_tile = largest_tile
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
        geometry = _check_convolution(call)
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
            packed = blocked_operators.pack_shallow(values, block)
            return self._computed(call, lambda x, w: blocked_operators.shallow(x, w, geometry), packed, plain=True), ""
        try:
            require(groups == 1, "its channels are in groups")
            return self._filtered(call, values, geometry)
        except Refusal as refusal:
            packed = blocked_operators.pack_dense(values, block)
            result = self._computed(
                call, lambda x, w: blocked_operators.dense(x, w, channels, groups, geometry), packed
            )
            return result, f"directly: {refusal}"

    def _transposed(self, call: tvm.ir.Call) -> tuple[_Blocked, str]:
        """Return a transposed convolution whose taps do not overlap, as one of a single tap; raises Refusal."""
        _check_operands(call)
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
            blocked_operators.pack_scattered(values, self._block),
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
        tile = choose_tile(values.shape, size, _static(batch) or 1, geometry, self._largest_tile)
        before = geometry.pads_begin[0], geometry.pads_begin[1]
        result = self._computed(
            call, lambda x, w: winograd(x, w, tile, before, size), pack_winograd(values, tile, self._block)
        )
        return result, f"by Winograd's F({tile}, {TAPS})"

    def _computed(
        self, call: tvm.ir.Call, compute: Callable[..., te.Tensor], packed: np.ndarray, *, plain: bool = False
    ) -> _Blocked:
        """Return what `compute` makes of a convolution's data, blocked or `plain`, and its packed weights."""
        data = self.visit_expr(call.args[0]) if plain else self._as_blocked(call.args[0]).var
        name = call.op.name.rpartition(".")[2]
        result = self.builder_.call_te(compute, data, relax.const(packed), primfunc_name_hint=name)
        return _Blocked(self._emit(result), tuple(call.ty.shape.values))

    def _as_blocked(self, expr: relax.Expr) -> _Blocked:
        """Return the blocked form of a tensor [N, C, spatial...], converting it where it has none."""
        if isinstance(expr, relax.Var):
            known = self._blocked.get(expr) or self._converted.get(expr)
            if known is not None:
                return known
        shape = tuple(expr.ty.shape.values)
        block = self._block
        plain = self.visit_expr(expr)
        converted = self.builder_.call_te(
            lambda x: blocked_operators.to_blocks(x, block), plain, primfunc_name_hint="to_blocks"
        )
        blocked = _Blocked(self._emit(converted), shape)
        if isinstance(expr, relax.Var):
            self._converted[expr] = blocked
        return blocked

    def _unblocked(self, blocked: _Blocked) -> relax.Expr:
        """Return the call that gives a blocked tensor its plain layout again."""
        image = blocked.shape[2:]
        if all(_static(size) == 1 for size in image) and blocked.channels % self._block == 0:
            return relax.op.reshape(blocked.var, list(blocked.shape))
        channels = blocked.channels
        return self.builder_.call_te(
            lambda x: blocked_operators.from_blocks(x, channels), blocked.var, primfunc_name_hint="from_blocks"
        )

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
            own = known.channels == _static(result[1]) and len(known.shape) == len(result)
            return known.var if own else None
        shape = expr.ty.shape
        if shape is None or len(shape.values) > len(result):
            return None
        ones = [tvm.tirx.IntImm("int64", 1)] * (len(result) - len(shape.values))
        aligned = [*ones, *shape.values]
        if _static(aligned[1]) == 1:
            return relax.op.reshape(self.visit_expr(expr), [*aligned, 1])
        if _static(aligned[1]) != _static(result[1]):
            return None
        if isinstance(expr, tvm.ir.GenericConst):
            values = expr.value.numpy().reshape([int(size) for size in aligned])
            return relax.const(blocked_operators.pack_tensor(values, self._block), str(expr.ty.dtype.dtype))
        if ones:
            return None
        return self._as_blocked(expr).var

    def _pooling(self, call: tvm.ir.Call) -> _Blocked | None:
        attributes = call.attrs
        if attributes.layout != "NCHW" or attributes.out_layout != "NCHW":
            return None
        layout = f"NCHW{self._block}c"
        pooled = _POOLINGS[call.op.name](
            self._blocked[call.args[0]].var,
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
        kept = self._emit(_REDUCTIONS[call.op.name](blocked.var, image, keepdims=True))
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
        counts = [_static(field.ty.shape.values[1]) for field in fields]
        if any(count is None or count % self._block for count in counts[:-1]) or counts[-1] is None:
            return None
        parts = [self._as_blocked(field).var for field in fields]
        return _Blocked(self._emit(relax.op.concat(parts, axis=1)), shape)

    def _permutation(self, call: tvm.ir.Call) -> relax.Expr | None:
        """Channels moved to the end: read straight from the blocks."""
        blocked = self._blocked[call.args[0]]
        rank = len(blocked.shape)
        axes = None if call.attrs.axes is None else [int(axis) % rank for axis in call.attrs.axes]
        if axes != [0, *range(2, rank), 1]:
            return None
        channels = blocked.channels
        return self.builder_.call_te(
            lambda x: blocked_operators.channels_last(x, channels), blocked.var, primfunc_name_hint="channels_last"
        )


def _check_convolution(call: tvm.ir.Call) -> Geometry:
    """Return the geometry of a convolution that may be blocked; raises Refusal."""
    _check_operands(call)
    rank, attributes = _CONVOLUTIONS[call.op.name], call.attrs
    pads = [int(pad) for pad in attributes.padding]
    return Geometry(
        strides=tuple(map(int, attributes.strides)),
        dilations=tuple(map(int, attributes.dilation)),
        pads_begin=tuple(pads[:rank]),
        pads_end=tuple(pads[rank:]),
    )


def _check_operands(call: tvm.ir.Call) -> None:
    """Refuse a convolution that is not of fp32 in plain layouts, with constant weights and a known image size."""
    data, weight = call.args
    attributes = call.attrs
    if attributes.data_layout not in _PLAIN_LAYOUTS or attributes.kernel_layout not in _PLAIN_LAYOUTS:
        raise Refusal(f"the layouts {attributes.data_layout} and {attributes.kernel_layout} are not the plain ones")
    types = {str(expr.ty.dtype.dtype) for expr in (data, weight, call)}
    if types != {"float32"}:
        raise Refusal(f"it computes with {', '.join(sorted(types))}, not with float32 alone")
    if not isinstance(weight, tvm.ir.GenericConst):
        raise Refusal("the weights are not constant")
    if data.ty.shape is None or any(_static(size) is None for size in data.ty.shape.values[1:]):
        raise Refusal("the size of the image is not known at compile time")


def _static(size: tvm.ir.Expr) -> int | None:
    return int(size) if isinstance(size, tvm.tirx.IntImm) else None
