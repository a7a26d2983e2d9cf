"""Vectors of fp32 rounded to bytes and stored, several at once: they narrow together, by instructions that saturate.

Four vectors of sums become one of codes by a conversion each, which rounds to nearest and even, and by packs of pairs
of vectors: to 16 bits, where the zero point is added, and to 8. Both saturate, so that limits which the type has anyway
cost nothing. A pack of x86 takes 128 bits in turns from both vectors, so that one permutation follows.
TVM's types cannot express these instructions, so they come in as `byte_dot`'s do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import tvm_ffi
from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.access import Access, Step, as_int
from schedules.intrin.byte_dot import WORD
from schedules.intrin.byte_rounding import Rounding, rounding_of
from schedules.intrin.llvm_functions import attributes, imported
from schedules.loops import index, load, local, store, vector, with_local
from schedules.stages import Axis, contains, sequence, substitute
from targets.base import Target

# Vectors of numbers whose bytes fill one vector.
TOGETHER = 4
_CALL = "optimizer_store"
# Bytes are stored as words by targets whose vectors of numbers have so many.
_WORD_LANES = 8
_LIMITS = {"int8": (-128, 127), "uint8": (0, 255), WORD: (-(2**15), 2**15 - 1)}
_SOURCE = """
define weak_odr i32 @{call}(ptr %to, {parameters}, i16 %zero, i8 %low, i8 %high) #0 {{
{whole}
{pairs}
  %z.first = insertelement <{pair} x i16> poison, i16 %zero, i32 0
  %z = shufflevector <{pair} x i16> %z.first, <{pair} x i16> poison, <{pair} x i32> zeroinitializer
  %left = call <{pair} x i16> @llvm.sadd.sat.v{pair}i16(<{pair} x i16> %pair.0, <{pair} x i16> %z)
  %right = call <{pair} x i16> @llvm.sadd.sat.v{pair}i16(<{pair} x i16> %pair.1, <{pair} x i16> %z)
{narrowed}
  %words = bitcast <{all} x i8> %packed to <{lanes} x i32>
  %turned = shufflevector <{lanes} x i32> %words, <{lanes} x i32> poison, <{places} x i32> <{order}>
  %bytes = bitcast <{places} x i32> %turned to <{count} x i8>
  %l.first = insertelement <{count} x i8> poison, i8 %low, i32 0
  %l = shufflevector <{count} x i8> %l.first, <{count} x i8> poison, <{count} x i32> zeroinitializer
  %h.first = insertelement <{count} x i8> poison, i8 %high, i32 0
  %h = shufflevector <{count} x i8> %h.first, <{count} x i8> poison, <{count} x i32> zeroinitializer
  %above = call <{count} x i8> @llvm.{sign}max.v{count}i8(<{count} x i8> %bytes, <{count} x i8> %l)
  %limited = call <{count} x i8> @llvm.{sign}min.v{count}i8(<{count} x i8> %above, <{count} x i8> %h)
  store <{count} x i8> %limited, ptr %to, align 1
  ret i32 0
}}
"""
_SOURCE_OF_WORDS = """
define weak_odr i32 @{call}(ptr %to, {parameters}, i16 %zero, i16 %low, i16 %high) #0 {{
{splats}
{whole}
{stores}
  ret i32 0
}}
"""
_SPLAT = """
  %{name}.first = insertelement <{pair} x i16> poison, i16 %{name}, i32 0
  %{name}.all = shufflevector <{pair} x i16> %{name}.first, <{pair} x i16> poison, <{pair} x i32> zeroinitializer"""
# A pack takes 64 bits in turns from both vectors.
_STORE_WORDS_X86 = """
  %sum.{i} = call <{pair} x i16> @llvm.sadd.sat.v{pair}i16(<{pair} x i16> %pair.{i}, <{pair} x i16> %zero.all)
  %above.{i} = call <{pair} x i16> @llvm.smax.v{pair}i16(<{pair} x i16> %sum.{i}, <{pair} x i16> %low.all)
  %limited.{i} = call <{pair} x i16> @llvm.smin.v{pair}i16(<{pair} x i16> %above.{i}, <{pair} x i16> %high.all)
  %parts.{i} = bitcast <{pair} x i16> %limited.{i} to <4 x i64>
  %words.{i} = shufflevector <4 x i64> %parts.{i}, <4 x i64> poison, <{count} x i32> <{order}>
  %to.{i} = getelementptr i64, ptr %to, i64 {place}
  store <{count} x i64> %words.{i}, ptr %to.{i}, align 2"""
# A number too large for int32 would become the least one, as is right for negative numbers alone: 2**30 does as well.
_WHOLE_X86 = """
  %less.{i} = fcmp olt <{lanes} x float> %x.{i}, splat (float 0x41D0000000000000)
  %some.{i} = select <{lanes} x i1> %less.{i},
    <{lanes} x float> %x.{i}, <{lanes} x float> splat (float 0x41D0000000000000)
  %whole.{i} = call <{lanes} x i32> @llvm.x86.{convert}(<{lanes} x float> %some.{i}{options})"""
_PAIR_X86 = """
  %pair.{i} = call <{pair} x i16>
    @llvm.x86.{isa}.packssdw{width}(<{lanes} x i32> %whole.{a}, <{lanes} x i32> %whole.{b})"""
_NARROW_X86 = """
  %packed = call <{all} x i8> @llvm.x86.{isa}.pack{sign}swb{width}(<{pair} x i16> %left, <{pair} x i16> %right)"""
_WHOLE_ARM = """
  %whole.{i} = call <4 x i32> @llvm.aarch64.neon.fcvtns.v4i32.v4f32(<4 x float> %x.{i})
  %half.{i} = call <4 x i16> @llvm.aarch64.neon.sqxtn.v4i16(<4 x i32> %whole.{i})"""
_PAIR_ARM = """
  %pair.{i} = shufflevector <4 x i16> %half.{a}, <4 x i16> %half.{b}, <8 x i32> <{joined}>"""
_NARROW_ARM = """
  %first = call <8 x i8> @llvm.aarch64.neon.sqxt{sign}n.v8i8(<8 x i16> %left)
  %second = call <8 x i8> @llvm.aarch64.neon.sqxt{sign}n.v8i8(<8 x i16> %right)
  %packed = shufflevector <8 x i8> %first, <8 x i8> %second, <16 x i32> <{joined}>"""


@dataclass(frozen=True)
class _Isa:
    """How vectors of `lanes` numbers become bytes: LLVM text of each step, and the 32-bit lanes in order afterwards."""

    lanes: int
    whole: str
    pair: str
    narrow: str
    names: Mapping[str, str]
    signs: Mapping[str, str]
    order: tuple[int, ...]

    def function(self, dtype: str, vectors: int) -> str:
        """Return the function that stores the bytes of 1, 2 or 4 vectors."""
        if dtype == WORD:
            return self._function_of_words(vectors)
        lanes, sources = self.lanes, [number % vectors for number in range(TOGETHER)]
        joined = {half: _numbers(range(2 * half)) for half in (lanes, 2 * lanes)}
        names = {**self.names, "lanes": lanes, "pair": 2 * lanes, "all": TOGETHER * lanes}
        pairs = [
            self.pair.format(**names, i=i, a=sources[2 * i], b=sources[2 * i + 1], joined=joined[lanes])
            for i in range(2)
        ]
        places = lanes // TOGETHER * vectors
        return _SOURCE.format(
            **names,
            call=_name(dtype, vectors),
            parameters=", ".join(f"<{lanes} x float> %x.{i}" for i in range(vectors)),
            whole="".join(self.whole.format(**names, i=i) for i in range(vectors)),
            pairs="".join(pairs),
            narrowed=self.narrow.format(**names, sign=self.signs[dtype], joined=joined[2 * lanes]),
            places=places,
            order=_numbers(self.order[:places]),
            count=lanes * vectors,
            sign="s" if dtype == "int8" else "u",
        )

    def _function_of_words(self, vectors: int) -> str:
        """Return the same for bytes that are stored as words: two vectors become one."""
        names = {**self.names, "lanes": self.lanes, "pair": 2 * self.lanes}
        stores = [
            self.pair.format(**names, i=i, a=2 * i, b=min(2 * i + 1, vectors - 1))
            + _STORE_WORDS_X86.format(
                **names, i=i, place=4 * i, count=min(4, 2 * vectors), order=_numbers((0, 2, 1, 3)[: 2 * vectors])
            )
            for i in range(-(-vectors // 2))
        ]
        return _SOURCE_OF_WORDS.format(
            call=_name(WORD, vectors),
            parameters=", ".join(f"<{self.lanes} x float> %x.{i}" for i in range(vectors)),
            splats="".join(_SPLAT.format(name=name, **names) for name in ("zero", "low", "high")),
            whole="".join(self.whole.format(**names, i=i) for i in range(vectors)),
            stores="".join(stores),
        )


def store_bytes_in_vectors(statement: Stmt, target: Target, parameters: Sequence[Var]) -> Stmt:
    """Return a statement whose loops over lanes that round whole vectors to bytes of `parameters` store them at once.

    Any other statement stays as it is.
    """
    isa = _isa(target)
    if isa is None:
        return statement
    used: set[tuple[str, int]] = set()

    def stored(vectors: tirx.For, mutator: tvm_ffi.StructuralMutator) -> Stmt:
        rounding = _rounding(vectors, isa.lanes, parameters)
        if rounding is None or (rounding.dtype == WORD and isa.lanes != _WORD_LANES):
            return mutator.default_mutate(vectors)
        count = int(vectors.extent) // isa.lanes
        sizes = [TOGETHER] * (count // TOGETHER) + [part for part in (2, 1) if count % TOGETHER & part]
        used.update((rounding.dtype, size) for size in sizes)
        starts = [isa.lanes * sum(sizes[:number]) for number in range(len(sizes))]
        return sequence(
            [_stored(vectors, rounding, start, size, isa.lanes) for start, size in zip(starts, sizes, strict=True)]
        )

    result = tvm_ffi.structural_mutate(statement, (tirx.For, stored))
    if not used:
        return statement
    functions = "".join(isa.function(dtype, vectors) for dtype, vectors in sorted(used))
    return imported(result, f"{functions}attributes #0 = {{ {attributes(target)} }}\n")


def _rounding(vectors: tirx.For, lanes: int, parameters: Sequence[Var]) -> Rounding | None:
    """Return what a loop computes in each lane, where it stores whole vectors of bytes side by side."""
    written, extent = vectors.body, as_int(vectors.extent)
    if vectors.kind != tirx.ForKind.VECTORIZED or not extent or extent % lanes:
        return None
    if not isinstance(written, tirx.BufferStore) or not contains(parameters, written.buffer):
        return None
    found = rounding_of(written.value)
    axis = Axis(vectors.loop_var, extent)
    if found is None or Access(written.buffer, tuple(written.indices)).step(axis) != Step.UNIT:
        return None
    low, high = _LIMITS[found.dtype]
    return found if low <= found.low <= found.high <= high else None


def _stored(vectors: tirx.For, rounding: Rounding, start: int, count: int, lanes: int) -> Stmt:
    """Return the store of `count` vectors from lane `start` on."""
    lane, written = vectors.loop_var, vectors.body
    assert isinstance(written, tirx.BufferStore)
    values = local([count * lanes], "float32", "numbers")

    def computed(number: int) -> Stmt:
        first = number * lanes
        return vector(lanes, lambda v: store(values, lane_value(start + first + v), [first + v]))

    def lane_value(position: Expr) -> Expr:
        return substitute(rounding.value, {lane: position})

    to = load(written.buffer, [substitute(position, {lane: index(start)}) for position in written.indices])
    numbers = [load(values, [tirx.Ramp(index(number * lanes), index(1), lanes)]) for number in range(count)]
    limits = [tirx.const(limit, rounding.dtype) for limit in (rounding.low, rounding.high)]
    name = _name(rounding.dtype, count)
    call = tirx.call_extern("int32", name, tirx.address_of(to), *numbers, rounding.zero.astype("int16"), *limits)
    return with_local([values], [*map(computed, range(count)), tirx.Evaluate(call)])


def _name(dtype: str, vectors: int) -> str:
    return f"{_CALL}_{dtype}_{vectors}"


def _numbers(values: Iterable[int]) -> str:
    return ", ".join(f"i32 {value}" for value in values)


def _isa(target: Target) -> _Isa | None:
    """Return the instructions of a target, None where there are none."""
    if target.device != "cpu":
        return None
    if target.architecture == "aarch64":
        return _Isa(4, _WHOLE_ARM, _PAIR_ARM, _NARROW_ARM, {}, {"int8": "", "uint8": "u"}, (0, 1, 2, 3))
    signs = {"int8": "s", "uint8": "u"}
    if "avx512bw" in target.features:
        names = {
            "isa": "avx512", "width": ".512", "convert": "avx512.mask.cvtps2dq.512",
            "options": ", <16 x i32> zeroinitializer, i16 -1, i32 4",
        }  # fmt: skip
        return _Isa(16, _WHOLE_X86, _PAIR_X86, _NARROW_X86, names, signs, _in_turns(16))
    if "avx2" in target.features:
        names = {"isa": "avx2", "width": "", "convert": "avx.cvt.ps2dq.256", "options": ""}
        return _Isa(8, _WHOLE_X86, _PAIR_X86, _NARROW_X86, names, signs, _in_turns(8))
    return None


def _in_turns(lanes: int) -> tuple[int, ...]:
    """Return where a pack of packs of four vectors puts their groups of four bytes, in the order of the vectors."""
    parts = lanes // TOGETHER
    return tuple(part * TOGETHER + number for number in range(TOGETHER) for part in range(parts))
