"""What was decided for single matrices of a model: how many bits each has, and codes that were fitted to its inputs."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from urllib.parse import quote, unquote

import numpy as np
from numpy.typing import NDArray

from passes.quantization.scheme import QuantizedMatrix, SchemeError
from passes.weight_sites import is_digest

FITTED_METHODS = ("awq", "gptq")
# Precisions of a matrix; 0 leaves it as the model has it.
PRECISIONS = {"int4": 4, "int8": 8, "model": 0}
# What the notation of passes gives a meaning stays escaped in patterns.
_SAFE = "/*?[]!:"


@dataclass(frozen=True, eq=False)
class FittedMatrix:
    """A quantized matrix [N, K], to be multiplied with inputs times `input_scales` [K] if those are given."""

    matrix: QuantizedMatrix
    input_scales: NDArray[np.float32] | None = None


Fitted = Mapping[str, FittedMatrix]


@dataclass(frozen=True)
class Exceptions:
    """Patterns of ONNX node names, and how many bits the matrices of those nodes have; the last that fits decides."""

    rules: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def parse(text: str) -> Exceptions:
        """Return the exceptions that `str` writes; raises SchemeError."""
        return Exceptions.of([unquote(part) for part in text.split(";") if part])

    @staticmethod
    def of(texts: Iterable[str]) -> Exceptions:
        """Return exceptions given as PATTERN=PRECISION; raises SchemeError."""
        rules: list[tuple[str, int]] = []
        for text in texts:
            pattern, separator, precision = text.rpartition("=")
            if not separator or not pattern or precision not in PRECISIONS:
                raise SchemeError(f"'{text}' is not of the form PATTERN=PRECISION with int4, int8 or model")
            rules.append((pattern, PRECISIONS[precision]))
        return Exceptions(tuple(rules))

    def __str__(self) -> str:
        names = {bits: name for name, bits in PRECISIONS.items()}
        return ";".join(f"{quote(pattern, safe=_SAFE)}={names[bits]}" for pattern, bits in self.rules)

    @property
    def of_names(self) -> Exceptions:
        """The exceptions whose patterns are of names, not digests of single matrices."""
        return Exceptions(tuple(rule for rule in self.rules if not is_digest(rule[0])))

    def bits_of(self, names: Iterable[str], default: int) -> int:
        """Return the bits of a matrix that nodes of these names read."""
        known = tuple(names)
        found = [bits for pattern, bits in self.rules if any(fnmatch.fnmatchcase(name, pattern) for name in known)]
        return found[-1] if found else default
