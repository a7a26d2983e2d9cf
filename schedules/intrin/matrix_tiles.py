"""Products of matrices in tile registers: AMX's tdpbf16ps and tdpbusd, 16 rows by 16 columns by 64 bytes at once.

A register holds 16 rows of 64 bytes. The eight of a thread are used as two by two tiles of sums (0 to 3: 0 and 1 of
the upper rows, 2 and 3 of the lower ones), the rows' operands (4 upper, 5 lower) and the columns' (6 left, 7 right).
Weights lie [K / g][columns][g] with g elements in 32 bits, as for dot products of g neighbours: 16 rows of that are one
operand.
(Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18, "Programming with Intel AMX".)

A core switches its units for multiplications in 512 bits off when no instruction used them for half a microsecond, and
then takes a quarter of one to switch them on, for which a store of a tile waits, too (blocks of 32 x 768 x 32 took 40 %
longer, Granite Rapids). Each step therefore multiplies a register that nobody reads.

Linux lets a process use tile registers after it has asked once (arch_prctl, ARCH_REQ_XCOMP_PERM), which the first
kernel that needs them does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.intrin.llvm_functions import attributes, imported
from schedules.loops import index
from targets.base import Target

# Rows of an operand's tile, columns of the sums' tile, and bytes of the reduction that one instruction takes.
TILE = 16
BYTES = 64
# Rows and columns of the block of sums that is in registers at once.
BLOCK = 2 * TILE
# Steps between a request for far columns and their use.
STEPS_AHEAD = 2
_BEGIN, _ZERO, _LOAD, _STORE, _END = (f"optimizer_tiles_{name}" for name in ("begin", "zero", "load", "store", "end"))
_STEP, _OWN, _EXCHANGE = "optimizer_tiles_step", "optimizer_tiles_own", "optimizer_tiles_exchange"
# 158: arch_prctl; 4131: ARCH_REQ_XCOMP_PERM; 18: XFEATURE_XTILEDATA (Linux, Documentation/arch/x86/xstate.rst).
# The description of the registers: palette 1, the bytes of a row of each, and their numbers of rows. Of the operands of
# columns a row has a group of 4 bytes of the reduction for each column.
_SOURCE = """
@optimizer_tiles_allowed = weak_odr global i32 0
declare i64 @syscall(i64, ...)
declare void @llvm.trap()
declare void @llvm.prefetch.p0(ptr, i32, i32, i32)
declare void @llvm.x86.ldtilecfg(ptr)
declare void @llvm.x86.tilerelease()
declare void @llvm.x86.tilezero(i8)
declare void @llvm.x86.tileloadd64(i8, ptr, i64)
declare void @llvm.x86.tileloaddt164(i8, ptr, i64)
declare void @llvm.x86.tilestored64(i8, ptr, i64)
declare void @llvm.x86.{instruction}(i8, i8, i8)
define weak_odr i32 @{begin}(i32 %upper, i32 %lower, i32 %bytes) #1 {{
entry:
  %description = alloca [16 x i32], align 64
  %allowed = load i32, ptr @optimizer_tiles_allowed
  %known = icmp ne i32 %allowed, 0
  br i1 %known, label %describe, label %ask
ask:
  %refused = call i64 (i64, ...) @syscall(i64 158, i64 4131, i64 18)
  %granted = icmp eq i64 %refused, 0
  br i1 %granted, label %note, label %stop
stop:
  call void @llvm.trap()
  unreachable
note:
  store i32 1, ptr @optimizer_tiles_allowed
  br label %describe
describe:
  %upper.both = mul i32 %upper, 257
  %lower.both = mul i32 %lower, 16842752
  %sums = or i32 %upper.both, %lower.both
  %lower.one = shl i32 %lower, 8
  %rows = or i32 %upper, %lower.one
  %depth = mul i32 %bytes, 65537
  %groups.four = shl i32 %bytes, 14
  %groups = mul i32 %groups.four, 257
  %operands = or i32 %rows, %groups
  %deep = insertelement <16 x i32> <i32 1, i32 0, i32 0, i32 0, i32 4194368, i32 4194368, i32 4194368, i32 4194368,
    i32 0, i32 0, i32 0, i32 0, i32 0, i32 0, i32 0, i32 0>, i32 %depth, i32 6
  %fixed = insertelement <16 x i32> %deep, i32 %sums, i32 12
  %all = insertelement <16 x i32> %fixed, i32 %operands, i32 13
  store <16 x i32> %all, ptr %description, align 64
  call void @llvm.x86.ldtilecfg(ptr %description)
  ret i32 0
}}
define weak_odr i32 @{zero}() #0 {{
  call void @llvm.x86.tilezero(i8 0)
  call void @llvm.x86.tilezero(i8 1)
  call void @llvm.x86.tilezero(i8 2)
  call void @llvm.x86.tilezero(i8 3)
  ret i32 0
}}
define weak_odr i32 @{own}(ptr %line) #0 {{
  call void asm sideeffect "prefetchw ($0)", "r"(ptr %line)
  ret i32 0
}}
define weak_odr i32 @{end}() #0 {{
  call void @llvm.x86.tilerelease()
  ret i32 0
}}
{functions}
attributes #0 = {{ {attributes} }}
attributes #1 = {{ noinline nounwind "target-cpu"="{cpu}" "target-features"="{features}" }}
"""
_MOVES = """
define weak_odr i32 @{call}_{rows}x{columns}(ptr %upper, ptr %lower, ptr %last, i64 %stride) #0 {{
{body}
  ret i32 0
}}
"""
_STEP_SOURCE = """
define weak_odr i32 @{call}_{rows}x{columns}(ptr %upper, ptr %lower, i64 %pitch, ptr %left, i64 %stride) #0 {{
  call void asm sideeffect "vpmulld %zmm31, %zmm31, %zmm31", "~{{xmm31}}"()
{body}
  ret i32 0
}}
"""
_EXCHANGE_SOURCE = """
define weak_odr i32 @{call}_2x{columns}(ptr %upper, ptr %lower, i64 %pitch, ptr %left, i64 %stride,
    ptr %stored.0, ptr %stored.1, ptr %stored.last, i64 %stored.pitch,
    ptr %begun.0, ptr %begun.1, ptr %begun.last, i64 %begun.pitch) #0 {{
{body}
  ret i32 0
}}
"""


class Passing(StrEnum):
    """Which operand of a step leaves the first-level cache to the other one.

    FAR_COLUMNS, which come from beyond the second-level cache, are asked for some steps ahead. They lie one behind the
    other.
    """

    NEITHER = ""
    ROWS = "_passing_rows"
    COLUMNS = "_passing_columns"
    FAR_COLUMNS = "_passing_far_columns"


@dataclass(frozen=True)
class MatrixTiles:
    """The functions for one pair of types: `terms` elements of the reduction a step, sums of the type `total`."""

    terms: int
    total: str
    instruction: str
    source: str

    def begin(self, upper: Expr | int, lower: Expr | int, depth: int = BYTES) -> Stmt:
        """Return what gives the registers 1 to 16 upper and lower rows, and makes all sums zero.

        A step takes `depth` bytes of the reduction, a multiple of 4: what lies behind them is not read.
        """
        return _call(_BEGIN, _int32(upper), _int32(lower), _int32(depth))

    def zero(self) -> Stmt:
        """Return what makes all sums zero of registers that have their rows: it takes no time, `begin` 54 ns."""
        return _call(_ZERO)

    def own(self, place: Expr) -> Stmt:
        """Return what asks for the line of an element that is to be written, past the end or not."""
        return _call(_OWN, tirx.address_of(place))

    def end(self) -> Stmt:
        """Return what gives the registers back."""
        return _call(_END)

    def load(self, shape: tuple[int, int], places: Sequence[Expr], stride: int) -> Stmt:
        """Return what loads sums of (1 or 2) by (1 or 2) tiles, whose rows begin `stride` bytes apart.

        `places` are the reads of the first of the upper and of the lower rows, and of the last element of the memory:
        TVM gives a buffer no more memory than its code reads.
        """
        return _call(_named(_LOAD, shape), *map(tirx.address_of, places), index(stride))

    def store(self, shape: tuple[int, int], places: Sequence[Expr], stride: Expr | int) -> Stmt:
        """Return what stores sums as `load` loads them."""
        return _call(_named(_STORE, shape), *map(tirx.address_of, places), index(stride))

    def step(
        self,
        shape: tuple[int, int],
        rows: Sequence[Expr],
        pitch: Expr | int,
        columns: Expr,
        stride: int,
        passing: Passing = Passing.NEITHER,
    ) -> Stmt:
        """Return what adds the products of 64 bytes of the reduction to sums of (1 or 2) by (1 or 2) tiles.

        `rows` are the reads of the first elements of the upper and the lower rows, which begin `pitch` bytes apart;
        `columns` that of the weights of the left columns, whose groups of neighbours begin `stride` bytes apart and
        which those of the right columns follow.
        """
        upper, lower = (tirx.address_of(each) for each in (rows[0], rows[-1]))
        call = _named(f"{_STEP}_{self.instruction}{passing}", shape)
        return _call(call, upper, lower, index(pitch), tirx.address_of(columns), index(stride))

    def exchange(
        self,
        columns: int,
        rows: Sequence[Expr],
        pitch: Expr | int,
        weights: Expr,
        stride: int,
        stored: tuple[Sequence[Expr], Expr | int],
        begun: tuple[Sequence[Expr], Expr | int] | None,
    ) -> Stmt:
        """Return the first step of a block of 32 rows by 1 or 2 tiles of columns, which stores the sums before it.

        The tiles of sums go beside products of others. Rows and weights are given as for `step`, and leave the
        first-level cache to the weights. `stored` is where the sums belong, as places for `store` and how many bytes
        after a row the next one begins. `begun` is where sums are that products are added to; None stands for zeros.
        """
        call = f"{_EXCHANGE}_{self.instruction}_{'zeros' if begun is None else 'sums'}_2x{columns}"
        upper, lower = (tirx.address_of(each) for each in (rows[0], rows[-1]))
        sums = [
            argument
            for places, apart in (stored, begun or stored)
            for argument in (*map(tirx.address_of, places), index(apart))
        ]
        return _call(call, upper, lower, index(pitch), tirx.address_of(weights), index(stride), *sums)

    def imported(self, statement: Stmt) -> Stmt:
        """Return a statement that calls the functions, with the functions."""
        return imported(statement, self.source)


def matrix_tiles(target: Target, activations: str, weights: str) -> MatrixTiles | None:
    """Return the functions of a CPU target for rows and columns of these types, None where it has none."""
    if activations == weights == "bfloat16" and "amx_bf16" in target.features:
        return _tiles(target, "tdpbf16ps", BYTES // 2, "float32")
    names = {("uint8", "int8"): "tdpbusd", ("int8", "int8"): "tdpbssd", ("int8", "uint8"): "tdpbsud"}
    instruction = names.get((activations, weights))
    if instruction is None or "amx_int8" not in target.features:
        return None
    return _tiles(target, instruction, BYTES, "int32")


def _tiles(target: Target, instruction: str, terms: int, total: str) -> MatrixTiles:
    shapes = [(rows, columns) for rows in (1, 2) for columns in (1, 2)]
    functions = [
        *(_moves(_LOAD, "tileloadd64", shape) for shape in shapes),
        *(_moves(_STORE, "tilestored64", shape) for shape in shapes),
        *(_step(instruction, shape, passing) for passing in Passing for shape in shapes),
        *(_exchange(instruction, columns, begins) for begins in ("zeros", "sums") for columns in (1, 2)),
    ]
    source = _SOURCE.format(
        instruction=instruction,
        begin=_BEGIN,
        zero=_ZERO,
        own=_OWN,
        end=_END,
        functions="".join(functions),
        attributes=attributes(target),
        cpu=target.llvm_cpu,
        features=",".join(target.llvm_attributes),
    )
    return MatrixTiles(terms, total, instruction, source)


def _moves(call: str, instruction: str, shape: tuple[int, int]) -> str:
    rows, columns = shape
    lines = []
    for row, name in list(enumerate(("upper", "lower")))[:rows]:
        lines.append(f"  %{name}.right = getelementptr i8, ptr %{name}, i64 {BYTES}")
        lines += [
            f"  call void @llvm.x86.{instruction}(i8 {2 * row + column}, ptr %{name}{part}, i64 %stride)"
            for column, part in list(enumerate(("", ".right")))[:columns]
        ]
    return _MOVES.format(call=call, rows=rows, columns=columns, body="\n".join(lines))


def _step(instruction: str, shape: tuple[int, int], passing: Passing) -> str:
    rows, columns = shape
    load_rows = "tileloaddt164" if passing is Passing.ROWS else "tileloadd64"
    is_far = passing is Passing.FAR_COLUMNS
    load_columns = "tileloaddt164" if is_far or passing is Passing.COLUMNS else "tileloadd64"
    ahead = []
    for line in range(columns * TILE if is_far else 0):
        place = (STEPS_AHEAD * columns * TILE + line) * BYTES
        ahead.append(f"  %line.{line} = getelementptr i8, ptr %left, i64 {place}")
        ahead.append(f"  call void @llvm.prefetch.p0(ptr %line.{line}, i32 0, i32 3, i32 1)")
    products = [_product(instruction, row, column) for row in range(rows) for column in range(columns)]
    lines = [*ahead, *_operands(shape, load_rows, load_columns), *products]
    call = f"{_STEP}_{instruction}{passing}"
    return _STEP_SOURCE.format(call=call, rows=rows, columns=columns, body="\n".join(lines))


def _operands(shape: tuple[int, int], load_rows: str, load_columns: str) -> list[str]:
    """Return the loads of a step, in turns of weights and rows: one of them comes from a cache further away.

    All before the first product, 28 ns a step for 30 to 38 by the order of use (rows or weights from the second-level
    cache, the other one from the first, Emerald Rapids).
    """
    rows, columns = shape
    lines = [f"  %right = getelementptr i8, ptr %left, i64 {BYTES}"]
    for place in range(2):
        if place < columns:
            side = ("%left", "%right")[place]
            lines.append(f"  call void @llvm.x86.{load_columns}(i8 {6 + place}, ptr {side}, i64 %stride)")
        if place < rows:
            side = ("%upper", "%lower")[place]
            lines.append(f"  call void @llvm.x86.{load_rows}(i8 {4 + place}, ptr {side}, i64 %pitch)")
    return lines


def _product(instruction: str, row: int, column: int) -> str:
    return f"  call void @llvm.x86.{instruction}(i8 {2 * row + column}, i8 {4 + row}, i8 {6 + column})"


def _exchange(instruction: str, columns: int, begins: str) -> str:
    lines = _operands((2, columns), "tileloaddt164", "tileloadd64")
    for row in range(2):
        for column in range(columns):
            tile = 2 * row + column
            for kind in ("stored", "begun"):
                lines.append(f"  %{kind}.tile.{tile} = getelementptr i8, ptr %{kind}.{row}, i64 {BYTES * column}")
            lines.append(f"  call void @llvm.x86.tilestored64(i8 {tile}, ptr %stored.tile.{tile}, i64 %stored.pitch)")
            load = f"tileloadd64(i8 {tile}, ptr %begun.tile.{tile}, i64 %begun.pitch)"
            lines.append(f"  call void @llvm.x86.{load if begins == 'sums' else f'tilezero(i8 {tile})'}")
            lines.append(_product(instruction, row, column))
    call = f"{_EXCHANGE}_{instruction}_{begins}"
    return _EXCHANGE_SOURCE.format(call=call, columns=columns, body="\n".join(lines))


def _named(call: str, shape: tuple[int, int]) -> str:
    rows, columns = shape
    return f"{call}_{rows}x{columns}"


def _int32(value: Expr | int) -> Expr:
    return tirx.const(value, "int32") if isinstance(value, int) else tirx.Cast("int32", value)


def _call(name: str, *arguments: Expr) -> Stmt:
    return tirx.Evaluate(tirx.call_extern("int32", name, *arguments))
