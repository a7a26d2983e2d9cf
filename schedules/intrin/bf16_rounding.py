"""Whole vectors of fp32 stored as bfloat16 by the instruction that rounds them: vcvtneps2bf16 of AVX512-BF16.

It rounds as `bf16_conversion` does, in one operation instead of ten, but takes what is below the normal numbers for
zero and keeps more bits of NaN. So it rounds what was computed; elements that are only converted keep their exact bits.
TVM's types cannot express it, so it comes in as `bf16_dot` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.access import Access, Step, as_int
from schedules.intrin.bf16_activation import to_round
from schedules.intrin.bf16_conversion import BFLOAT16
from schedules.intrin.llvm_functions import attributes, imported
from schedules.loops import index, load, local, store, vector, with_local
from schedules.stages import Axis, contains, sequence, substitute
from targets.base import Target

LANES = 16
_CALL = "optimizer_store_bf16"
_CALL_UP_TO = f"{_CALL}_up_to"
_PAIR_CALL = f"{_CALL}_pair"
_PAIR_CALL_UP_TO = f"{_PAIR_CALL}_up_to"
# Elements of a line of memory. Where a core stores it at once it takes one of the places for stores that are on their
# way, of which there are too few for a tile's and two for each line: 1x1 convolutions of 64 channels took 20 % longer.
_PAIR = 2 * LANES
_SOURCE = """
declare <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float>)
define weak_odr i32 @{call}(ptr %to, <16 x float> %value) #0 {{
  %rounded = call <16 x bfloat> @llvm.x86.avx512bf16.cvtneps2bf16.512(<16 x float> %value)
  store <16 x bfloat> %rounded, ptr %to, align 2
  ret i32 0
}}
attributes #0 = {{ {attributes} }}
"""
_UP_TO_SOURCE = _SOURCE.replace("(ptr %to,", "(ptr %to, ptr %last,")
_PAIR_SOURCE = """
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define weak_odr i32 @{pair}(ptr %to, <16 x float> %first, <16 x float> %second) #0 {{
  %rounded = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %second, <16 x float> %first)
  store <32 x bfloat> %rounded, ptr %to, align 2
  ret i32 0
}}
"""
_PAIR_UP_TO_SOURCE = _PAIR_SOURCE.replace("(ptr %to,", "(ptr %to, ptr %last,")


def rounds_in_vectors(target: Target) -> bool:
    """Return whether the target has the instruction."""
    return "avx512_bf16" in target.features


def store_rounded(first: TensorLoad, last: TensorLoad, values: Expr) -> Stmt:
    """Return the store of LANES of fp32 as bfloat16 to the places from `first` to `last` of a function's own buffer.

    TVM, which knows what a buffer holds by the places that are named, makes it no smaller so. The statement has to be
    `with_rounding`.
    """
    places = tirx.address_of(first), tirx.address_of(last)
    return tirx.Evaluate(tirx.call_extern("int32", _CALL_UP_TO, *places, values))


def with_rounding(statement: Stmt, target: Target) -> Stmt:
    """Return a statement with the function that `store_rounded` calls."""
    return imported(statement, _UP_TO_SOURCE.format(call=_CALL_UP_TO, attributes=attributes(target)))


def round_in_vectors(statement: Stmt, target: Target, parameters: Sequence[Var], inner: Iterable[Var] = ()) -> Stmt:
    """Return a statement whose computed vectors are rounded to bfloat16 `parameters` by the target's instruction.

    With tile registers those of `inner` buffers, which instructions read by their address, are as well. Any other
    statement, and all for a target that has no such instruction, stay as they are.
    """
    if not rounds_in_vectors(target):
        return statement
    in_pairs = "amx_bf16" in target.features
    own = [buffer for buffer in inner if in_pairs]
    found: list[tirx.For] = []

    def rounded(vectors: tirx.For, mutator: tvm_ffi.StructuralMutator) -> Stmt:
        store = vectors.body
        if not isinstance(store, tirx.BufferStore) or not _rounds_vectors(vectors, store, parameters, own):
            return mutator.default_mutate(vectors)
        found.append(vectors)
        extent = int(vectors.extent)
        size = _PAIR if in_pairs and extent % _PAIR == 0 else LANES
        named = contains(own, store.buffer)
        return sequence([_rounded(vectors.loop_var, store, start, size, named) for start in range(0, extent, size)])

    result = tvm_ffi.structural_mutate(statement, (tirx.For, rounded))
    if not found:
        return statement
    result = imported(result, _source(in_pairs).format(call=_CALL, pair=_PAIR_CALL, attributes=attributes(target)))
    if not any(contains(own, vectors.body.buffer) for vectors in found):
        return result
    source = _UP_TO_SOURCE + _PAIR_UP_TO_SOURCE
    return imported(result, source.format(call=_CALL_UP_TO, pair=_PAIR_CALL_UP_TO, attributes=attributes(target)))


def _source(in_pairs: bool) -> str:
    return _SOURCE + _PAIR_SOURCE if in_pairs else _SOURCE


def _rounds_vectors(
    vectors: tirx.For, store: tirx.BufferStore, parameters: Sequence[Var], inner: Sequence[Var]
) -> bool:
    """Return whether a loop rounds whole vectors that it computes to neighbours in a parameter, or an inner buffer."""
    extent, cast = as_int(vectors.extent), store.value
    if vectors.kind != tirx.ForKind.VECTORIZED or not extent or extent % LANES:
        return False
    if not isinstance(cast, tirx.Cast) or (str(cast.ty.dtype), str(cast.value.ty.dtype)) != (BFLOAT16, "float32"):
        return False
    if isinstance(cast.value, TensorLoad) and contains(parameters, cast.value.source):
        return False
    axis = Axis(vectors.loop_var, extent)
    return (
        contains([*parameters, *inner], store.buffer)
        and Access(store.buffer, tuple(store.indices)).step(axis) == Step.UNIT
    )


def _rounded(lane: Var, vectors: tirx.BufferStore, start: int, size: int, named: bool) -> Stmt:
    """Return the store of one vector, or of a pair of them, from lane `start` on, with its last place `named` or not.

    See `store_rounded` for why it is, of buffers that are not parameters.
    """
    values = local([size], "float32", "values")
    computed, finished = to_round(vectors.value.value)
    parts = range(0, size, LANES)

    def computed_from(part: int) -> Stmt:
        return vector(LANES, lambda v: store(values, substitute(computed, {lane: start + part + v}), [part + v]))

    def place(at: int) -> Expr:
        element = load(vectors.buffer, [substitute(position, {lane: index(at)}) for position in vectors.indices])
        return tirx.address_of(element)

    places = [place(start), place(start + size - 1)] if named else [place(start)]
    names = (_CALL_UP_TO, _PAIR_CALL_UP_TO) if named else (_CALL, _PAIR_CALL)
    every = [finished(load(values, [tirx.Ramp(index(part), index(1), LANES)])) for part in parts]
    call = tirx.call_extern("int32", names[0] if size == LANES else names[1], *places, *every)
    return with_local([values], [*(computed_from(part) for part in parts), tirx.Evaluate(call)])
