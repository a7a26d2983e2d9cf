"""Conversions between fp32 and bfloat16 as integer arithmetic.

TVM's own lowering repeats the operand of a cast to bfloat16, cannot repeat one with bindings in it, turns NaN with all
bits set into zero, and below a binding widens the bits of bfloat16 as if they were an integer. What is written here it
leaves as it is. Buffers of bfloat16 that live inside a function it makes fp32, so that what they hold is not rounded
and needs no conversion; those that an instruction reads by their address, or whose bits are copied, become integers
here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.stages import CONDITIONAL, contains, variables_of

BFLOAT16 = "bfloat16"
_SHIFT = 16  # the bits of fp32 that bfloat16 has not
_HALF = (1 << (_SHIFT - 1)) - 1  # less than half a unit in the last place: an odd one is rounded up by one more
_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000
_SIGN, _QUIET_NAN = 0x8000, 0x7FC0
_OF_BITS = ("tirx.address_of", "tirx.reinterpret")  # what takes elements as they are stored
_ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div, tirx.Max, tirx.Min)


@dataclass(frozen=True, eq=False)
class Bf16Buffers:
    """The buffers of a function that hold bfloat16: `parameters`, and `integers` that take the place of inner ones."""

    parameters: tuple[Var, ...] = ()
    integers: Mapping[Var, Var] = field(default_factory=dict)

    def read(self, load: TensorLoad) -> TensorLoad:
        """Return a read of an inner buffer as one of its bits; any other as it is."""
        bits = self.integers.get(load.source)
        return load if bits is None else tirx.BufferLoad(bits, list(load.indices))

    def widened(self, cast: tirx.Cast) -> Expr:
        """Return a cast to fp32 of a read of one of the buffers, exactly; any other cast as it is."""
        read = cast.value
        if str(cast.ty.dtype) != "float32" or not isinstance(read, TensorLoad):
            return cast
        if read.source in self.integers:
            bits: Expr = self.read(read)
        elif contains(self.parameters, read.source):
            bits = tirx.reinterpret("uint16", read)
        else:
            return cast
        return tirx.reinterpret("float32", bits.astype("uint32") << _u32(_SHIFT))

    def _wide(self, value: Expr) -> Expr:
        """Return a bfloat16 expression in fp32, but for its last rounding.

        TVM's lowering crashes on a choice between elements of bfloat16 that is widened, such as padding, and on their
        sums and products: here they are those of widened elements.
        """
        if isinstance(value, tirx.FloatImm):
            return tirx.const(float(value.value), "float32")
        if isinstance(value, _ARITHMETIC):
            return type(value)(self._operand(value.a), self._operand(value.b))
        if isinstance(value, tirx.Cast) and str(value.value.ty.dtype) == "float32":
            return _rounded_in_fp32(value.value)
        if isinstance(value, ir.Call) and isinstance(value.op, ir.Op) and value.op.name == CONDITIONAL:
            condition, then, otherwise = value.args
            return tirx.if_then_else(condition, self._wide(then), self._wide(otherwise))
        return self.widened(tirx.Cast("float32", value))

    def _operand(self, value: Expr) -> Expr:
        """Return an operand of bfloat16 in fp32, rounded to it where it is computed."""
        wide = self._wide(value)
        return _rounded_in_fp32(wide) if isinstance(value, _ARITHMETIC) else wide

    def stored(self, store: tirx.BufferStore) -> tirx.BufferStore:
        """Return a store to one of the buffers that rounds as its readers expect; any other as it is."""
        exact = _cast_by(store)
        bits = self.integers.get(store.buffer)
        if bits is not None:
            value = self._wide(store.value) if exact is None else exact
            return tirx.BufferStore(bits, rounded(value), store.indices)
        if not contains(self.parameters, store.buffer):
            return store
        repeated = _is_repeated(store)
        if exact is not None:
            value = rounded(exact)
        elif repeated and isinstance(store.value, TensorLoad) and contains(self.parameters, store.value.source):
            value = tirx.reinterpret("uint16", store.value)
        else:
            return store
        if repeated:
            value = value | _sign(store.indices[-1]).astype("uint16")
        return tirx.BufferStore(store.buffer, tirx.reinterpret(BFLOAT16, value), store.indices)


def bf16_buffers(function: tirx.PrimFunc, inner: Sequence[Var], statements: Sequence[Stmt]) -> Bf16Buffers:
    """Return the buffers of bfloat16 of a function whose body becomes `statements` and allocates `inner`."""
    taken: list[Var] = []

    def note(call: ir.Call) -> None:
        if isinstance(call.op, ir.Op) and call.op.name in _OF_BITS:
            taken.extend(load.source for load in call.args if isinstance(load, TensorLoad))

    for statement in statements:
        tvm_ffi.structural_walk(statement, (ir.Call, note))
    parameters = [v for v in function.params if tirx.is_buffer_var(v) and str(v.dtype) == BFLOAT16]
    as_bits = [buffer for buffer in inner if str(buffer.dtype) == BFLOAT16 and contains(taken, buffer)]
    integers = {buffer: tirx.decl_buffer(buffer.shape, "uint16", buffer.name) for buffer in as_bits}
    return Bf16Buffers(tuple(parameters), integers)


def rounded(value: Expr) -> Expr:
    """Return the bits of an fp32 expression rounded to bfloat16, to nearest and to even.

    NaN becomes the quiet one of its sign.
    """
    bits = Var("bits", "uint32")
    high = bits >> _u32(_SHIFT)
    nearest = (bits + _u32(_HALF) + (high & _u32(1))) >> _u32(_SHIFT)
    not_a_number = (bits & _u32(_MAGNITUDE)) > _u32(_INFINITY)
    result = tirx.Select(not_a_number, (high & _u32(_SIGN)) | _u32(_QUIET_NAN), nearest)
    return tirx.Let(bits, tirx.reinterpret("uint32", value), result).astype("uint16")


def _rounded_in_fp32(value: Expr) -> Expr:
    return tirx.reinterpret("float32", rounded(value).astype("uint32") << _u32(_SHIFT))


def _is_repeated(store: tirx.BufferStore) -> bool:
    """Return whether what is stored is the same for neighbours along the last axis.

    Of a vector of such elements TVM repeats one, and then takes the integers that it repeated for bfloat16. The sign of
    the index, zero, makes them differ in its eyes.
    """
    moving = variables_of(store.indices[-1]) if store.indices else []
    return bool(moving) and not any(contains(variables_of(store.value), each) for each in moving)


def _sign(position: Expr) -> Expr:
    return position >> tirx.const(position.ty.dtype.bits - 1, position.ty)


def widens_bf16(expression: Expr) -> bool:
    """Return whether an expression is a read of bfloat16 as fp32."""
    is_read = isinstance(expression, tirx.Cast) and isinstance(expression.value, TensorLoad)
    return is_read and str(expression.ty.dtype) == "float32" and str(expression.value.source.dtype) == BFLOAT16


def is_product_of_bf16(term: Expr) -> bool:
    """Return whether an expression is a product in fp32 of two reads of bfloat16."""
    return isinstance(term, tirx.Mul) and widens_bf16(term.a) and widens_bf16(term.b)


def computes_before(store: tirx.BufferStore) -> bool:
    """Return whether a store does more with bfloat16 than to widen what it reads and to round what it writes."""
    value = _cast_by(store)
    if value is None and str(store.buffer.dtype) == BFLOAT16:
        return not isinstance(store.value, TensorLoad)
    found: list[Expr] = []

    def note(cast: tirx.Cast) -> None:
        if not isinstance(cast.value, TensorLoad) and BFLOAT16 in (str(cast.ty.dtype), str(cast.value.ty.dtype)):
            found.append(cast)

    tvm_ffi.structural_walk(store.value if value is None else value, (tirx.Cast, note))
    return bool(found)


def _cast_by(store: tirx.BufferStore) -> Expr | None:
    """Return the fp32 value that a store casts to bfloat16, None where it stores something else."""
    cast = store.value
    rounds = isinstance(cast, tirx.Cast) and str(cast.ty.dtype) == BFLOAT16
    return cast.value if rounds and str(cast.value.ty.dtype) == "float32" else None


def _u32(value: int) -> Expr:
    return tirx.const(value, "uint32")


def type_of_bits(dtype: str) -> str:
    """Return the type of a task's memory for elements that are copied as they are: TVM makes fp32 of its bfloat16."""
    return "uint16" if dtype == BFLOAT16 else dtype


def bits_of(read: TensorLoad) -> Expr:
    """Return what is read in the type that `type_of_bits` gives."""
    return tirx.reinterpret("uint16", read) if str(read.source.dtype) == BFLOAT16 else read
