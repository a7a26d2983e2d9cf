"""What the tables of architectures are made of: inputs, sizes of a network, and how to build it.

This module needs neither torch nor transformers; `benchmarks.export` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

Array = np.ndarray
Dimensions = Mapping[str, int]
Values = Callable[[np.random.Generator, tuple[int, ...], Dimensions], Array]
Settings = Mapping[str, object]
# How `benchmarks.export` calls the network: with its inputs as keywords, as a decoder over a given encoder output,
# or as a decoder with a key-value cache.
Call = Literal["keywords", "decoder", "decoder_with_past"]
# The two ONNX exporters of torch: `torch.onnx.export(dynamo=True)` and `dynamo=False`.
Exporter = Literal["dynamo", "torchscript"]
EXPORTERS: tuple[Exporter, ...] = get_args(Exporter)

SEED = 0
PAST = "past_key_values."
SEQUENCE = "sequence"


@dataclass(frozen=True)
class Input:
    """One graph input: a string in `dims` names a dynamic dimension, a number fixes it."""

    name: str
    dims: tuple[int | str, ...]
    values: Values

    def shape(self, dimensions: Dimensions) -> tuple[int, ...]:
        """Return the concrete shape for the given values of the dynamic dimensions."""
        return tuple(dim if isinstance(dim, int) else dimensions[dim] for dim in self.dims)

    def draw(self, generator: np.random.Generator, dimensions: Dimensions) -> Array:
        """Return random contents of this input for the given values of the dynamic dimensions."""
        return self.values(generator, self.shape(dimensions), dimensions)


@dataclass(frozen=True)
class Variant:
    """One size of an architecture: configuration settings, inputs, and named sets of dynamic dimensions.

    The first case is the example that the exporters trace; its sizes are above 1 where an exporter would otherwise
    take 0 or 1 for a constant.
    """

    settings: Settings
    inputs: tuple[Input, ...]
    cases: Mapping[str, Dimensions]

    def with_batch(self, batch: int) -> Variant:
        """Return the variant with `batch` inputs at once where it has one."""
        inputs = (replace(spec, dims=(batch, *spec.dims[1:])) if spec.dims[0] == 1 else spec for spec in self.inputs)
        return replace(self, inputs=tuple(inputs))

    @property
    def takes_a_text(self) -> bool:
        """Return whether an input holds the tokens of one text of a fixed length."""
        return any(_is_text(spec) for spec in self.inputs)

    def with_lengths(self, lengths: Sequence[int]) -> Variant:
        """Return the variant whose texts may have any length, with a case for each of `lengths`.

        Texts are inputs of shape (1, tokens).
        """
        inputs = tuple(replace(spec, dims=(1, SEQUENCE)) if _is_text(spec) else spec for spec in self.inputs)
        return replace(self, inputs=inputs, cases={f"{length} tokens": {SEQUENCE: length} for length in lengths})

    def draw(self, case: str) -> dict[str, Array]:
        """Return random inputs of the case called `case`, by name; the same on every call."""
        generator = np.random.default_rng([SEED, list(self.cases).index(case)])
        return {spec.name: spec.draw(generator, self.cases[case]) for spec in self.inputs}


def _is_text(spec: Input) -> bool:
    return len(spec.dims) == 2 and spec.dims[0] == 1 and isinstance(spec.dims[1], int)


@dataclass(frozen=True)
class Architecture:
    """How to build one architecture: class names in `transformers`, how it is called, and what it returns.

    `outputs` maps each output to its dynamic axes, but for the cache that a decoder returns: see `outputs_of`.
    `full_name` is the usual name of the full size.
    """

    model: str
    config: str
    outputs: Mapping[str, Mapping[int, str]]
    small: Variant
    full: Variant | None = None
    full_name: str = ""
    part: Literal["whole", "encoder"] = "whole"
    call: Call = "keywords"

    def outputs_of(self, variant: Variant) -> dict[str, Mapping[int, str]]:
        """Return the outputs with their dynamic axes: `outputs`, and a `present.*` for each `past_key_values.*`."""
        past = (spec.name.removeprefix(PAST) for spec in variant.inputs if spec.name.startswith(PAST))
        return {**self.outputs, **{f"present.{name}": {0: "batch", 2: "total_sequence"} for name in past}}
