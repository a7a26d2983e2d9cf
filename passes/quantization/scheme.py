"""Weights as small integers: w = (code - zero point) * scale, with one scale and zero point to a group of K.

A matrix [N, K] (N outputs, K inputs) is cut along K into groups of equal size; the last one may be filled up. Codes are
unsigned integers of 4 or 8 bits. A symmetric scheme has the middle of the range as its only zero point.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Codes = NDArray[np.uint8]

BITS = (4, 8)
GROUPS = (16, 32, 64, 128)
PER_CHANNEL = 0
SCALE_DTYPES: dict[str, type] = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32}


class SchemeError(ValueError):
    """A scheme has an option out of its range, or cannot represent a matrix."""


@dataclass(frozen=True)
class Scheme:
    """How weights are quantized: bits of a code, elements of a group (0: whole rows), zero points, type of scales."""

    bits: int = 4
    group: int = 32
    symmetric: bool = True
    scale_dtype: str = "float16"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise SchemeError(f"weights of {self.bits} bits; choose {' or '.join(map(str, BITS))}")
        if self.group not in (PER_CHANNEL, *GROUPS):
            choices = ", ".join(map(str, GROUPS))
            raise SchemeError(f"groups of {self.group}; choose one of {choices}, or {PER_CHANNEL} for whole rows")
        if self.scale_dtype not in SCALE_DTYPES:
            raise SchemeError(f"scales of type {self.scale_dtype}; choose one of {', '.join(SCALE_DTYPES)}")

    @property
    def levels(self) -> int:
        """The number of codes."""
        return 1 << self.bits

    @property
    def middle(self) -> int:
        """The zero point of a symmetric scheme."""
        return 1 << (self.bits - 1)

    def group_of(self, inputs: int) -> int:
        """Return the elements of a group for rows of `inputs` elements: whole rows are rounded up to 32."""
        return self.group or -(-inputs // GROUPS[1]) * GROUPS[1]

    def __str__(self) -> str:
        group = f"groups of {self.group}" if self.group else "whole rows"
        kind = "symmetric" if self.symmetric else "with zero points"
        return f"int{self.bits}, {group}, {kind}, {self.scale_dtype} scales"


@dataclass(frozen=True, eq=False)
class QuantizedMatrix:
    """A quantized matrix of N rows and `inputs` columns.

    `codes` uint8 [N, G * group] (columns past `inputs` mean nothing), `scales` float16, bfloat16 or float32 [N, G],
    `zero_points` uint8 or of the scales' type [N, G], or None: the middle of the range everywhere.
    """

    bits: int
    group: int
    inputs: int
    codes: Codes
    scales: NDArray[np.generic]
    zero_points: NDArray[np.generic] | None

    def __post_init__(self) -> None:
        rows, groups = self.scales.shape
        if self.codes.shape != (rows, groups * self.group) or not 0 < self.inputs <= groups * self.group:
            raise SchemeError(f"codes {self.codes.shape} do not fit scales {self.scales.shape} of groups {self.group}")
        if self.zero_points is not None and self.zero_points.shape != self.scales.shape:
            raise SchemeError(f"zero points {self.zero_points.shape} do not fit scales {self.scales.shape}")

    @property
    def rows(self) -> int:
        """N, the number of outputs."""
        return self.codes.shape[0]

    def dequantized(self) -> NDArray[np.float32]:
        """Return (code - zero point) * scale as float32 [N, inputs]."""
        grouped = self.codes.reshape(self.rows, -1, self.group).astype(np.float32)
        if self.zero_points is None:
            grouped -= np.float32(1 << (self.bits - 1))
        else:
            grouped -= self.zero_points.astype(np.float32)[..., None]
        grouped *= self.scales.astype(np.float32)[..., None]
        return grouped.reshape(self.rows, -1)[:, : self.inputs]
