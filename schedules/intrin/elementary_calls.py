"""Calls of elementary functions, expanded to the arithmetic of `vector_math` or the tables of `register_tables`."""

from __future__ import annotations

from collections.abc import Collection

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Expr, TensorLoad
from tvm.tirx.stmt import Stmt

from schedules.intrin import circular_functions, register_tables, vector_math
from schedules.intrin.bf16_conversion import Bf16Buffers, computes_before
from schedules.intrin.vector_math import EXP_SHORT, EXP_TO_ROUND, NONPOSITIVE, OF_UNIT, TO_ROUND, Function
from targets.base import Target

FUNCTIONS: dict[str, Function] = {
    "tirx.exp": vector_math.exp,
    "tirx.log": vector_math.log,
    "tirx.log1p": vector_math.log1p,
    OF_UNIT: vector_math.log1p_of_unit,
    "tirx.tanh": vector_math.tanh,
    "tirx.erf": vector_math.erf,
    "tirx.sigmoid": vector_math.sigmoid,
}
SCALED: dict[Function, Function] = {vector_math.exp: vector_math.exp_with_scaling}
# Shorter chains of more arithmetic, where few registers leave few chains beside each other.
PAIRED: dict[Function, Function] = {vector_math.log1p_of_unit: vector_math.log1p_of_unit_in_pairs}
COEFFICIENTS = {NONPOSITIVE: EXP_SHORT, TO_ROUND: EXP_TO_ROUND}
# Those of whole vectors, for a target that has tables.
LOOKED_UP: dict[str, Function] = {
    "tirx.exp": register_tables.exp,
    "tirx.erf": register_tables.erf,
    NONPOSITIVE: register_tables.exp_of_nonpositive,
}
LARGEST_EXPANDED_POWER = 4
_EXTERN = "tirx.call_pure_extern"


def calls_functions(expression: Expr, names: Collection[str] = (*FUNCTIONS, *COEFFICIENTS)) -> bool:
    """Return whether an expression calls an elementary function that becomes arithmetic, one of `names`."""
    found: list[str] = []
    tvm_ffi.structural_walk(expression, (ir.Call, lambda call: found.append(_name_of(call))))
    return any(name in names for name in found)


def expand(expression: ir.Node, buffers: Bf16Buffers, target: Target) -> ir.Node:
    """Return an expression or statement with its calls of elementary functions on floats up to 32 bits expanded.

    What is read from and stored to `buffers` of bfloat16 is converted here, too. Stores that do more in bfloat16 are
    left to TVM, but for those to integers, which it does not know for bfloat16: its conversions repeat their operand,
    and cannot repeat the bindings of the expansion.
    """

    def expand_store(store: tirx.BufferStore, mutator: tvm_ffi.StructuralMutator) -> Stmt:
        if computes_before(store) and store.buffer not in buffers.integers:
            return store
        return buffers.stored(mutator.default_mutate(store))

    def expand_cast(cast: tirx.Cast, mutator: tvm_ffi.StructuralMutator) -> Expr:
        return buffers.widened(cast) if isinstance(cast.value, TensorLoad) else mutator.default_mutate(cast)

    def expand_load(load: TensorLoad, mutator: tvm_ffi.StructuralMutator) -> Expr:
        return buffers.read(mutator.default_mutate(load))

    def expand_call(call: ir.Call, mutator: tvm_ffi.StructuralMutator) -> Expr:
        return _expand_call(mutator.default_mutate(call), target)

    def expand_loop(loop: tirx.For, mutator: tvm_ffi.StructuralMutator) -> Stmt:
        looked_up = register_tables.looked_up(loop, _function_of) if register_tables.has_tables(target) else None
        in_vectors = circular_functions.guarded(loop) if looked_up is None else looked_up
        return mutator.default_mutate(loop) if in_vectors is None else mutator.mutate(in_vectors)

    rules = [
        (tirx.For, expand_loop),
        (tirx.BufferStore, expand_store),
        (ir.Call, expand_call),
        (tirx.Mul, _expand_product),
        (tirx.Cast, expand_cast),
        (TensorLoad, expand_load),
    ]
    # In a walk of its own, before tables take a loop's exponentials: after that nothing shows what softplus was.
    return tvm_ffi.structural_mutate(tvm_ffi.structural_mutate(expression, (ir.Call, _of_unit)), rules)


def _of_unit(call: ir.Call, mutator: tvm_ffi.StructuralMutator) -> Expr:
    """Return log(1 + exp(-|x|)), as softplus has it, as the logarithm that is for numbers up to 1."""
    rewritten = mutator.default_mutate(call)
    if _name_of(rewritten) != "tirx.log1p" or str(rewritten.ty.dtype) != "float32":
        return rewritten
    (argument,) = rewritten.args
    if _name_of(argument) != "tirx.exp" or not _is_negated_magnitude(argument.args[0]):
        return rewritten
    return tirx.call_pure_extern("float32", OF_UNIT, argument)


def _is_negated_magnitude(exponent: Expr) -> bool:
    """Return whether an expression is -|x|."""
    negated = isinstance(exponent, tirx.Mul) and isinstance(exponent.b, tirx.FloatImm) and exponent.b.value == -1
    return negated and _name_of(exponent.a) == "tirx.fabs"


def _name_of(call: Expr) -> str:
    """Return the name of the operator that is called, or of the function that is none; empty for anything else."""
    if not isinstance(call, ir.Call) or not isinstance(call.op, ir.Op):
        return ""
    return str(call.args[0].value) if call.op.name == _EXTERN else call.op.name


def _function_of(call: ir.Call) -> Function | None:
    """Return the function that computes a call's vectors by tables, if there is one."""
    return LOOKED_UP.get(_name_of(call)) if str(call.ty.dtype) == "float32" else None


def _expand_call(rewritten: Expr, target: Target) -> Expr:
    name = _name_of(rewritten)
    if not isinstance(rewritten, ir.Call) or not name:
        return rewritten
    if name == "tirx.pow":
        return _expand_power(rewritten)
    if name not in COEFFICIENTS and name not in FUNCTIONS:
        return rewritten
    argument = rewritten.args[-1]
    if name in COEFFICIENTS:
        return vector_math.nonpositive_by_polynomial(argument, COEFFICIENTS[name], scaled=vector_math.scales(target))
    function, dtype = FUNCTIONS[name], str(argument.ty.dtype)
    if dtype not in ("float32", "float16"):
        return rewritten
    if vector_math.scales(target):
        function = SCALED.get(function, function)
    if target.has_few_registers:
        function = PAIRED.get(function, function)
    if dtype == "float32":
        return function(argument)
    return function(argument.astype("float32")).astype(dtype)


def _expand_product(product: tirx.Mul, mutator: tvm_ffi.StructuralMutator) -> Expr:
    """Return x * sigmoid(y), as in SiLU and gates, as x / (1 + exp(-y)), and every other product as it is."""
    for factor, gate in ((product.a, product.b), (product.b, product.a)):
        is_gate = isinstance(gate, ir.Call) and isinstance(gate.op, ir.Op) and gate.op.name == "tirx.sigmoid"
        if is_gate and str(gate.ty.dtype) == "float32":
            return mutator.mutate(factor) / vector_math.sigmoid_divisor(mutator.mutate(gate.args[0]))
    return mutator.default_mutate(product)


def _expand_power(call: ir.Call) -> Expr:
    """Return a float raised to a small whole number as products."""
    base, exponent = call.args
    if not isinstance(exponent, tirx.FloatImm) or exponent.value not in range(1, LARGEST_EXPANDED_POWER + 1):
        return call
    return vector_math.power(base, int(exponent.value))
