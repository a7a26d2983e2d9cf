"""Dot products of each lane's own bytes: a depthwise convolution's taps of a row, four of which one instruction takes.

Images lie as [columns, lanes] in bytes, so that the four that a lane needs are a vector's length apart. A shuffle of
four columns puts them side by side, zeros in place of columns outside of the image; the same shuffle of a row of
weights puts its taps so, from any of the four columns on. TVM's types cannot express it, so it comes in as LLVM's text.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.ir import Expr
from tvm.tirx.stmt import Stmt

from schedules.intrin.byte_dot import FOUR, single_instruction
from schedules.intrin.llvm_functions import attributes, imported
from targets.base import Target

_DOT, _GATHER, _CHOICE = "optimizer_dot_windows", "optimizer_gather", "optimizer_row"
_SOURCE = """{declared}
define weak_odr <{lanes} x i32> @{call}(<{lanes} x i32> %sum, <{lanes} x i32> %data, <{lanes} x i32> %weights) #0 {{
  %x = bitcast <{lanes} x i32> %data to <{bytes} x i8>
  %w = bitcast <{lanes} x i32> %weights to <{bytes} x i8>
{body}
  ret <{lanes} x i32> %result
}}
define weak_odr ptr @{choice}(i32 %inside, ptr %row, ptr %zeros) #0 {{
  %is.inside = icmp ne i32 %inside, 0
  %chosen = select i1 %is.inside, ptr %row, ptr %zeros
  ret ptr %chosen
}}
{gathers}
attributes #0 = {{ {attributes} }}
"""
_GATHERED = """
define weak_odr <{lanes} x i32> @{call}(ptr %row, i32 %at) #0 {{
  %from = getelementptr i8, ptr %row, i32 %at
  %columns = load <{read} x i8>, ptr %from, align 1
  %turned = shufflevector <{read} x i8> %columns, <{read} x i8> zeroinitializer, <{bytes} x i32> <{order}>
  %fours = bitcast <{bytes} x i8> %turned to <{lanes} x i32>
  ret <{lanes} x i32> %fours
}}
"""


@dataclass(frozen=True)
class WindowDot:
    """The instruction of one target for activations of a type; each function that it names is in `imported`."""

    lanes: int
    activations: str
    target: Target

    def accumulate(self, sums: Expr, data: Expr, weights: Expr) -> Expr:
        """Return sums[l] + the sum of data[l][i] * weights[l][i] over fours as `gathered` returns them."""
        return tirx.call_extern(f"int32x{self.lanes}", f"{_DOT}_{self.activations}", sums, data, weights)

    def gathered(self, row: Expr, position: Expr, columns: int, first: int) -> Expr:
        """Return the fours of each lane from column `first` of the `columns` at a position on.

        `position` counts bytes from the address `row`. Columns before the first and after the last are zeros.
        """
        return tirx.call_extern(f"int32x{self.lanes}", _gather(columns, first), row, position.astype("int32"))

    def row(self, inside: Expr, row: Expr, zeros: Expr) -> Expr:
        """Return the first of two addresses where a condition holds, else the second, without a branch."""
        return tirx.call_extern("handle", _CHOICE, inside.astype("int32"), row, zeros)

    def imported(self, statement: Stmt, gathers: set[tuple[int, int]]) -> Stmt:
        """Return a statement that gathers so many columns from such a first one on, with the functions it calls."""
        declared, body = single_instruction(self.target, self.activations)
        source = _SOURCE.format(
            lanes=self.lanes,
            bytes=FOUR * self.lanes,
            call=f"{_DOT}_{self.activations}",
            choice=_CHOICE,
            declared=declared,
            body=body,
            gathers="".join(self._gather(*each) for each in sorted(gathers)),
            attributes=attributes(self.target),
        )
        return imported(statement, source)

    def _gather(self, columns: int, first: int) -> str:
        places = [(lane, first + term) for lane in range(self.lanes) for term in range(FOUR)]
        zero = columns * self.lanes
        order = [column * self.lanes + lane if 0 <= column < columns else zero for lane, column in places]
        return _GATHERED.format(
            lanes=self.lanes,
            bytes=FOUR * self.lanes,
            call=_gather(columns, first),
            read=columns * self.lanes,
            order=", ".join(f"i32 {place}" for place in order),
        )


def _gather(columns: int, first: int) -> str:
    return f"{_GATHER}_{columns}_{'before' if first < 0 else 'from'}_{abs(first)}"
