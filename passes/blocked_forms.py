"""The blocked forms of tensors while a function is rewritten: which there are, and conversions to and from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import tvm
import tvm.ir
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator

from passes import blocked_operators
from passes.convolution_sites import static
from passes.tensor_types import equal_shapes
from schedules.intrin.bf16_conversion import BFLOAT16
from schedules.intrin.byte_dot import WORD
from schedules.intrin.matrix_tiles import BYTES

# Elements of bfloat16 that a row of a tile of matrices holds: blocks of as many channels are for these.
ROW = BYTES // 2


@dataclass(frozen=True)
class Blocked:
    """A blocked tensor with the number of its channels and the shape that it has unblocked.

    `rounded` is what a convolution reads of it where that is of another type. `spread` says that it has one channel,
    which all lanes hold.
    """

    var: relax.Var
    shape: tuple[tvm.ir.Expr, ...]
    rounded: relax.Var | None = None
    spread: bool = False

    @property
    def channels(self) -> int:
        return int(self.shape[1])


def _is_of_channels(expr: relax.Expr, result: Sequence[tvm.ir.Expr]) -> bool:
    """Return whether a tensor has one element for each of several channels of a result [N, C, spatial...]."""
    sizes = [static(size) for size in expr.ty.shape.values]
    axis, channels = len(sizes) - len(result) + 1, static(result[1])
    if not 0 <= axis <= 1 or channels in (None, 1) or sizes[axis] != channels:
        return False
    return all(size == 1 for size in (*sizes[:axis], *sizes[axis + 1 :]))


class BlockedForms(PyExprMutator):
    """Keeps blocked forms: `_blocked` of values that have one, `_converted` of others, `_plain` converted back.

    `_products` holds products of one number, or one at each position, and a constant one of each channel. `dtype` is
    what convolutions of fp32 read; bytes that are `widened` they read as int16.
    """

    def __init__(self, module: tvm.IRModule, block: int, dtype: str, widened: str = "") -> None:
        super().__init__(module)
        self._block = block
        self._dtype = dtype
        self._read_as = {"float32": dtype, **({widened: WORD} if widened else {})}
        self._name = ""
        self._blocked: dict[relax.Var, Blocked] = {}
        self._plain: dict[relax.Var, relax.Expr] = {}
        self._converted: dict[relax.Var, Blocked] = {}
        self._products: dict[relax.Var, tuple[relax.Expr, relax.Expr]] = {}
        self._narrow: dict[tuple[relax.Var, int], relax.Var] = {}

    def visit_dataflow_block_(self, block: relax.DataflowBlock) -> relax.BindingBlock:
        """Forget blocked forms at the end of a block: others do not see its variables."""
        result = super().visit_dataflow_block_(block)
        for known in (self._blocked, self._plain, self._converted, self._products, self._narrow):
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

    def _emit(self, expr: relax.Expr) -> relax.Var:
        """Bind what is made of the present binding, under its name."""
        return self.builder_.emit(expr, self._name)

    def _is_blocked(self, expr: relax.Expr) -> bool:
        return isinstance(expr, relax.Var) and expr in self._blocked

    def _rounded(self, expr: relax.Expr) -> relax.Var:
        """Return a blocked tensor as convolutions read it; from now on others read it so, too."""
        blocked, own = self._as_blocked(expr), str(expr.ty.dtype.dtype)
        read_as = self._read_as.get(own, own)
        if read_as == own:
            return blocked.var
        if blocked.rounded is None:
            blocked = replace(blocked, rounded=self._emit(relax.op.astype(blocked.var, read_as)))
            if isinstance(expr, relax.Var):
                (self._blocked if expr in self._blocked else self._converted)[expr] = blocked
        assert blocked.rounded is not None
        return blocked.rounded

    def _read(self, blocked: Blocked) -> relax.Var:
        """Return a blocked tensor of the type that it has unblocked."""
        if blocked.rounded is None:
            return blocked.var
        return self._emit(relax.op.astype(blocked.rounded, blocked.var.ty.dtype.dtype))

    def _as_blocked(self, expr: relax.Expr) -> Blocked:
        """Return the blocked form of a tensor [N, C, spatial...], converting it where it has none."""
        if isinstance(expr, relax.Var):
            known = self._blocked.get(expr) or self._converted.get(expr)
            if known is not None:
                return known
        blocked = Blocked(self._in_blocks(expr, self._block), tuple(expr.ty.shape.values))
        if isinstance(expr, relax.Var):
            self._converted[expr] = blocked
        return blocked

    def _in_blocks(self, expr: relax.Expr, block: int) -> relax.Var:
        """Return a plain tensor converted to blocks, once for each size of these."""
        if isinstance(expr, relax.Var) and (expr, block) in self._narrow:
            return self._narrow[expr, block]
        plain, to_blocks = self.visit_expr(expr), blocked_operators.to_blocks
        result = self._emit(self.builder_.call_te(to_blocks, plain, block, primfunc_name_hint="to_blocks"))
        if isinstance(expr, relax.Var):
            self._narrow[expr, block] = result
        return result

    def _unblocked(self, blocked: Blocked) -> relax.Expr:
        """Return the call that gives a blocked tensor its plain layout again."""
        image = blocked.shape[2:]
        if all(static(size) == 1 for size in image) and blocked.channels % self._block == 0:
            return relax.op.reshape(self._read(blocked), list(blocked.shape))
        from_blocks, data = blocked_operators.from_blocks, self._read(blocked)
        return self.builder_.call_te(from_blocks, data, blocked.channels, primfunc_name_hint="from_blocks")

    def _operand(self, expr: relax.Expr, result: Sequence[tvm.ir.Expr]) -> relax.Expr | None:
        """Return an operand that broadcasts to blocked `result`, None where it cannot."""
        if not isinstance(expr.ty, relax.TensorType):
            return expr  # a bound of clip
        if expr.ty.ndim == 0:
            return self.visit_expr(expr)
        if self._is_blocked(expr):
            known = self._blocked[expr]
            own = (known.spread or known.channels == static(result[1])) and len(known.shape) == len(result)
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

    def _note_product(self, variable: relax.Var, call: tvm.ir.Call) -> None:
        factor, factors = call.args
        known = self._blocked.get(factor) if isinstance(factor, relax.Var) else None
        if isinstance(factors, tvm.ir.GenericConst) and (known.spread if known is not None else factor.ty.ndim == 0):
            self._products[variable] = factor, factors

    def _less_products(self, call: tvm.ir.Call) -> Blocked | None:
        """Return sums less products that would take as much memory, or be in another layout, by one operator."""
        if call.op.name != "relax.subtract" or call.args[1] not in self._products:
            return None
        shape, (factor, factors) = tuple(call.ty.shape.values), self._products[call.args[1]]
        known = self._blocked.get(factor) if isinstance(factor, relax.Var) else None
        same = known is None or equal_shapes((shape[0], *shape[2:]), (known.shape[0], *known.shape[2:]))
        if not same or not self._is_blocked(call.args[0]) or not _is_of_channels(factors, shape):
            return None
        sums, packed = self._operand(call.args[0], shape), self._operand(factors, shape)
        if sums is None or packed is None:
            return None
        number = self.visit_expr(factor) if known is None else known.var
        compute = blocked_operators.less_products
        result = self.builder_.call_te(compute, sums, number, packed, primfunc_name_hint="less_products")
        return Blocked(self._emit(result), shape)

    def _rounds_stored(self, expr: relax.Expr) -> bool:
        """Return whether a blocked tensor is rounded where a kernel stores it, though no convolution reads it.

        Kernels with tiles of matrices wait for memory before all others.
        """
        if not self._is_blocked(expr) or (self._block, self._dtype) != (ROW, BFLOAT16):
            return False
        known = self._blocked[expr]
        return not known.spread and str(known.var.ty.dtype.dtype) == "float32"

    def _stores_later(self, call: tvm.ir.Call) -> bool:
        """Return whether two tensors are added that nothing rounds yet: one is stored for the other's kernel."""
        if call.op.name != "relax.add" or not all(map(self._rounds_stored, call.args)):
            return False
        first, second = (self._blocked[argument] for argument in call.args)
        alike = equal_shapes(first.shape, second.shape)
        return alike and first is not second and first.rounded is None and second.rounded is None

    def _sum_with_rounded(self, call: tvm.ir.Call) -> Blocked:
        """Return the sum of a tensor and the later one of two, rounded: FuseOps leaves that one a kernel of its own.

        It is one operator, since FuseOps would widen what was rounded before it is stored.
        """
        first, later = sorted(call.args, key=list(self._blocked).index)
        sums, rounded = self._blocked[first].var, self._rounded(later)
        compute = blocked_operators.sum_with_rounded
        result = self.builder_.call_te(compute, sums, rounded, primfunc_name_hint="add")
        return Blocked(self._emit(result), tuple(call.ty.shape.values))
