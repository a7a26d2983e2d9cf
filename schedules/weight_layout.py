"""How quantized weights lie in memory: codes in the order in which a dot-product kernel reads them, pack and unpack.

With B columns (outputs) side by side and dot products over R neighbours of K, codes of 8 bits are
[N/B][K/R][B][R], and a byte of two codes of 4 bits holds in its low half what comes first: [N/B][K/(2R)][B][R] with
k = 2R * step + j below and k = 2R * step + R + j above. Where instructions multiply signed bytes, each code's highest
bit is turned, so that it is a number in two's complement with the middle of the codes as zero. Scales and zero points
are [N/B][G][B]. What is there for outputs past N nothing reads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from targets.base import Target


@dataclass(frozen=True)
class WeightLayout:
    """The layout of codes: `bits` of each, `columns` side by side, `reduction` neighbours of K together, `signed`."""

    bits: int
    columns: int
    reduction: int
    signed: bool = False

    @property
    def step(self) -> int:
        """How many neighbours of K the bytes of one lane hold."""
        return self.reduction * 8 // self.bits

    @property
    def turned_bits(self) -> int:
        """The bits of a byte that are turned in memory: the highest of each code where these are signed."""
        return (0x80 if self.bits == 8 else 0x88) if self.signed else 0

    def pack(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return codes [N, K] as bytes [ceil(N / columns), K / step, columns * reduction]; K is a multiple of step."""
        blocks, inputs = -(-len(codes) // self.columns), codes.shape[1]
        padded = np.pad(codes, [(0, blocks * self.columns - len(codes)), (0, 0)]).astype(np.uint8)
        parts = padded.reshape(blocks, self.columns, inputs // self.step, self.step // self.reduction, self.reduction)
        halves = parts.transpose(3, 0, 2, 1, 4)
        packed = (halves[0] if self.bits == 8 else halves[0] | (halves[1] << np.uint8(4))) ^ np.uint8(self.turned_bits)
        return np.ascontiguousarray(packed.reshape(blocks, inputs // self.step, self.columns * self.reduction))

    def unpack(self, packed: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
        """Return the codes [rows, K] of packed bytes: the inverse of `pack`."""
        blocks, steps, _ = packed.shape
        lanes = packed.reshape(blocks, steps, self.columns, self.reduction) ^ np.uint8(self.turned_bits)
        halves = [lanes] if self.bits == 8 else [lanes & np.uint8(15), lanes >> np.uint8(4)]
        codes = np.stack(halves, -2).transpose(0, 2, 1, 3, 4)
        return np.ascontiguousarray(codes.reshape(blocks * self.columns, -1)[:rows])

    def pack_groups(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """Return one value per row and group [N, G] as [ceil(N / columns), G, columns]."""
        blocks = -(-len(values) // self.columns)
        padded = np.pad(values, [(0, blocks * self.columns - len(values)), (0, 0)])
        return np.ascontiguousarray(padded.reshape(blocks, self.columns, -1).transpose(0, 2, 1))

    def unpack_groups(self, packed: NDArray[np.generic], rows: int) -> NDArray[np.generic]:
        """Return the values [rows, G] of packed ones: the inverse of `pack_groups`."""
        blocks, groups, _ = packed.shape
        return np.ascontiguousarray(packed.transpose(0, 2, 1).reshape(blocks * self.columns, groups)[:rows])


def layout_of(target: Target, bits: int) -> WeightLayout:
    """Return the layout of weights of `bits` bits on a target."""
    layouts = target.layouts
    return WeightLayout(bits, layouts.quantized_columns, layouts.reduction_group, layouts.signed_codes)
