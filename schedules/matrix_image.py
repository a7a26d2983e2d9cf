"""The copy that a task makes of its part of an image: a border of zeros around it, remainders modulo the stride apart.

Rows follow each other, so that tiles of pixels run on over them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from tvm import tirx
from tvm.ir import Expr, TensorLoad, Var
from tvm.tirx.stmt import Stmt

from schedules.intrin.bf16_conversion import bits_of, type_of_bits
from schedules.intrin.matrix_tiles import TILE
from schedules.loops import index, load, local, loop, vector
from schedules.matrix_windows import MatrixWindows
from schedules.stages import sequence

Point = Mapping[Var, Expr]


@dataclass(frozen=True)
class CopiedImage:
    """`rows` rows of the result from `first` on, of the image at `point`: what they read."""

    analysis: MatrixWindows
    point: Point
    first: Expr
    rows: int

    @cached_property
    def copy(self) -> Var:
        """The memory: [blocks][remainders of rows][remainders of columns][pixels][bytes of a step]."""
        size = self.analysis.depth_blocks * self.analysis.planes * self._pixels_of_plane
        dtype = type_of_bits(str(self.analysis.windows.data.source.dtype))
        return local([size * self.analysis.elements], dtype, "image")

    @property
    def pixels(self) -> int:
        """The pixels that tiles run over, those of the border among them."""
        return self.rows * self.analysis.pitch

    @property
    def _pixels_of_plane(self) -> int:
        """The pixels of one remainder, as far as the tiles' last ones read."""
        analysis = self.analysis
        beyond = max(analysis.horizontal.reach, -(-analysis.tiles.terms // analysis.elements))
        return -(-self.pixels // TILE) * TILE + analysis.vertical.reach * analysis.pitch + beyond

    def place(self, block: Expr, row: Expr | int, column: Expr | int, pixel: Expr) -> Expr:
        """Return the read of what a pixel has at a tap, of a block of the input."""
        analysis = self.analysis
        plane_row, down = analysis.vertical.remainder(row)
        if analysis.is_narrow:
            plane = block * analysis.vertical.phases + plane_row
            place = plane * self._pixels_of_plane + pixel + down * analysis.pitch
            return load(self.copy, [place * analysis.elements + column * analysis.block])
        plane_column, right = analysis.horizontal.remainder(column)
        plane = (block * analysis.vertical.phases + plane_row) * analysis.horizontal.phases + plane_column
        place = plane * self._pixels_of_plane + pixel + down * analysis.pitch + right
        return load(self.copy, [place * analysis.tiles.terms])

    def made(self) -> Stmt:
        """Return the copy of all that the task reads, and zeros around it."""
        analysis = self.analysis
        whole, rest = divmod(analysis.channels, analysis.block)
        statements: list[Stmt] = []
        if whole:
            statements.append(loop(whole, lambda block: self._copied_planes(block, analysis.block)))
        if rest:
            statements.append(self._copied_planes(index(whole), rest))
        # TVM gives memory no more room than what is written to it.
        size = analysis.depth_blocks * analysis.planes * self._pixels_of_plane
        last = size * analysis.elements // analysis.block - 1
        return sequence([self._zeros(index(last)), *statements])

    @property
    def _neighbours(self) -> int:
        """How many pixels are copied at once: those of narrow blocks lie together, and a step takes as many."""
        return self.analysis.taps_of_step

    def _copied_planes(self, block: Expr, channels: int) -> Stmt:
        analysis = self.analysis
        statements = []
        for row in range(analysis.vertical.phases):
            for column in range(analysis.column_phases):
                plane = (block * analysis.vertical.phases + row) * analysis.column_phases + column
                statements.append(self._copied_plane(block, channels, plane * self._pixels_of_plane, (row, column)))
        return sequence(statements)

    def _copied_plane(self, block: Expr, channels: int, base: Expr, phase: tuple[int, int]) -> Stmt:
        """Return the pixels of one remainder of rows and columns."""
        analysis, (vertical, horizontal) = self.analysis, (self.analysis.vertical, self.analysis.horizontal)
        if analysis.is_narrow:
            horizontal = replace(horizontal, stride=1)
        # Pixels of the copy are as many elements as blocks have.
        pitch = analysis.pitch * analysis.elements // analysis.block
        begin, end = horizontal.inside(phase[1], pitch)

        def of_row(row: Expr) -> Stmt:
            y = (self.first + row) * vertical.stride + (phase[0] + vertical.offset)
            start = base * (analysis.elements // analysis.block) + row * pitch

            def copied(i: Expr, pixels: int = 1) -> Stmt:
                x = (begin + i) * horizontal.stride + (phase[1] + horizontal.offset)
                return self._pixel(start + begin + i, analysis.image_at(self.point, block, y, x), channels * pixels)

            zeros = [
                loop(size, lambda i, b=first: self._zeros(start + b + i))
                for first, size in ((0, begin), (end, pitch - end))
                if size
            ]
            together = self._neighbours if channels == analysis.block else 1
            vectors, rest = divmod(end - begin, together)
            body = sequence(
                [
                    *zeros,
                    loop(vectors, lambda i: copied(i * together, together)),
                    *([loop(rest, lambda i: copied(vectors * together + i))] if rest else []),
                ]
            )
            if vertical.never_misses:
                return body
            inside = tirx.And(y >= index(0), y < index(vertical.size))
            return tirx.IfThenElse(inside, body, loop(pitch, lambda i: self._zeros(start + i)))

        return loop(self.rows + vertical.reach, of_row)

    def _pixel(self, place: Expr, read: Callable[[Expr], TensorLoad], channels: int) -> Stmt:
        """Return the copy of channels of a pixel, or of neighbours, and zeros where it has fewer than a block."""
        terms, copy = self.analysis.block, self.copy
        statements = [vector(channels, lambda v: tirx.BufferStore(copy, bits_of(read(v)), [place * terms + v]))]
        if channels < terms:
            zero = tirx.const(0, str(copy.dtype))
            rest = terms - channels
            statements.append(vector(rest, lambda v: tirx.BufferStore(copy, zero, [place * terms + channels + v])))
        return sequence(statements)

    def _zeros(self, place: Expr) -> Stmt:
        terms, copy = self.analysis.block, self.copy
        return vector(terms, lambda v: tirx.BufferStore(copy, tirx.const(0, str(copy.dtype)), [place * terms + v]))
