"""What the inputs and outputs of a decoder are for, by the names that exporters give them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from optimizer.errors import OptionError
from optimizer.package.manifest import EntryPoint, TensorSpec

TOKENS, MASK, POSITIONS, LOGITS = "input_ids", "attention_mask", "position_ids", "logits"
_PAST = re.compile(r"past_key_values\.(\d+)\.(?:(?:decoder|self)\.)?(key|value)")
_PRESENT = re.compile(r"present(?:_key_values)?\.(\d+)\.(?:(?:decoder|self)\.)?(key|value)")


@dataclass(frozen=True)
class CacheTensor:
    """One layer's keys or values: the input that takes them, the output that returns them with those of new tokens.

    `shape` is that of the empty cache of one sequence; tokens lie along `axis`.
    """

    past: str
    present: str
    dtype: str
    shape: tuple[int, ...]
    axis: int


@dataclass(frozen=True)
class DecoderRoles:
    """The parts of a decoder's signature. `mask` and `positions` are None where the model does not take them."""

    tokens: TensorSpec
    mask: TensorSpec | None
    positions: TensorSpec | None
    logits: TensorSpec
    cache: tuple[CacheTensor, ...]


def roles_of(entry: EntryPoint) -> DecoderRoles:
    """Return the roles in a decoder's signature; raises OptionError for a model that is not a decoder with a cache."""
    inputs = {spec.name: spec for spec in entry.inputs}
    outputs = {spec.name: spec for spec in entry.outputs}
    if TOKENS not in inputs or LOGITS not in outputs:
        raise OptionError(
            f"the package is no language model: it needs an input '{TOKENS}' and an output '{LOGITS}', "
            f"and has {entry}; 'optimizer run' runs any package"
        )
    tokens = inputs.pop(TOKENS)
    mask, positions = inputs.pop(MASK, None), inputs.pop(POSITIONS, None)
    _require_one_sequence((tokens, *filter(None, (mask, positions))))
    presents = {match.groups(): name for name in outputs if (match := _PRESENT.fullmatch(name))}
    cache: list[CacheTensor] = []
    for name in list(inputs):
        match = _PAST.fullmatch(name)
        if match is not None and match.groups() in presents:
            cache.append(_cache_tensor(inputs.pop(name), presents[match.groups()]))
    if inputs:
        raise OptionError(f"generation does not know what the inputs {', '.join(inputs)} are for; call the package")
    if not cache:
        raise OptionError(
            "the package keeps no cache (past_key_values.N.key to present.N.key); export the model with it"
        )
    return DecoderRoles(tokens, mask, positions, outputs[LOGITS], tuple(cache))


def _cache_tensor(spec: TensorSpec, present: str) -> CacheTensor:
    growing = [axis for axis, size in enumerate(spec.shape) if axis > 0 and isinstance(size, str)]
    if len(growing) != 1:
        raise OptionError(
            f"'{spec}' does not have one dimension that grows with the text; compile without fixing its shape"
        )
    (axis,) = growing
    sizes = [1 if isinstance(size, str) else size for size in spec.shape]
    sizes[axis] = 0
    return CacheTensor(spec.name, present, spec.dtype, tuple(sizes), axis)


def _require_one_sequence(specs: Iterable[TensorSpec]) -> None:
    for spec in specs:
        if spec.dtype != "int64" or len(spec.shape) != 2:
            raise OptionError(f"generation gives '{spec.name}' as int64 [batch, tokens]; the package takes {spec}")
        if not isinstance(spec.shape[0], str) and spec.shape[0] != 1:
            raise OptionError(f"'{spec}' takes {spec.shape[0]} sequences at once; compile with a batch of 1")
        if not isinstance(spec.shape[1], str):
            raise OptionError(f"'{spec}' takes {spec.shape[1]} tokens at once; compile without fixing its shape")
