"""What the inputs and outputs of a decoder are for, by the names that exporters give them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from optimizer.errors import OptionError
from optimizer.package.entry_points import CacheRecord, EntryPoint, TensorSpec
from optimizer.runtime.generation.step_inputs import MASK, MASKS, PER_SEQUENCE, RANKS, TOKENS

LOGITS = "logits"
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
    """The parts of a decoder's signature. `inputs` are those of `step_inputs.VALUES` that it takes, beside a mask.

    A mask over room has a place for all that a cache has room for, and not for the tokens so far alone.
    """

    inputs: tuple[str, ...]
    logits: TensorSpec
    cache: tuple[CacheTensor, ...]
    mask: TensorSpec | None = None
    has_mask_over_room: bool = False


def roles_of(entry: EntryPoint) -> DecoderRoles:
    """Return the roles in a decoder's signature; raises OptionError for a model that is not a decoder with a cache."""
    inputs = {spec.name: spec for spec in entry.inputs}
    outputs = {spec.name: spec for spec in entry.outputs}
    if TOKENS not in inputs or LOGITS not in outputs:
        raise OptionError(
            f"the package is no language model: it needs an input '{TOKENS}' and an output '{LOGITS}', "
            f"and has {entry}; 'optimizer run' runs any package"
        )
    given = {name: inputs.pop(name) for name in RANKS if name in inputs}
    mask = inputs.pop(MASK, None)
    rooms = {record.length for record in entry.caches if record.is_whole}
    has_mask_over_room = mask is not None and bool(mask.shape) and str(mask.shape[-1]) in rooms
    for spec in given.values():
        _require_one_sequence(spec)
    if mask is not None:
        _require_mask(mask, is_of_any_length=not has_mask_over_room)
    records = {record.past: record for record in entry.caches}
    presents = {match.groups(): spec for name, spec in outputs.items() if (match := _PRESENT.fullmatch(name))}
    cache: list[CacheTensor] = []
    for name in list(inputs):
        match = _PAST.fullmatch(name)
        if match is not None and match.groups() in presents:
            cache.append(_cache_tensor(inputs.pop(name), presents[match.groups()], records.get(name)))
    if inputs:
        raise OptionError(f"generation does not know what the inputs {', '.join(inputs)} are for; call the package")
    if not cache:
        raise OptionError(
            "the package keeps no cache (past_key_values.N.key to present.N.key); export the model with it"
        )
    return DecoderRoles(tuple(given), outputs[LOGITS], tuple(cache), mask, has_mask_over_room)


def _cache_tensor(spec: TensorSpec, present: TensorSpec, record: CacheRecord | None) -> CacheTensor:
    sizes = [1 if isinstance(size, str) else size for size in spec.shape]
    if spec.shape == present.shape and record is None:
        raise OptionError(
            f"'{spec}' has room for all tokens from the start, and the code returns a copy of it with every step; "
            "compile with --kv-cache in-place, whose --explain says what stands against it"
        )
    if record is not None:
        axis = record.axis
    else:
        growing = [axis for axis, size in enumerate(spec.shape) if axis > 0 and isinstance(size, str)]
        if len(growing) != 1:
            raise OptionError(
                f"'{spec}' does not have one dimension that grows with the text; compile without fixing its shape"
            )
        (axis,) = growing
    sizes[axis] = 0
    return CacheTensor(spec.name, present.name, spec.dtype, tuple(sizes), axis)


def _require_one_sequence(spec: TensorSpec) -> None:
    """Require a first dimension that can be 1 where it is that of sequences, and a symbol where tokens lie."""
    rank = RANKS[spec.name]
    if spec.dtype != "int64" or len(spec.shape) != rank:
        dimensions = "[batch, tokens]" if rank == 2 else "[batch]" if spec.name in PER_SEQUENCE else "[tokens]"
        raise OptionError(f"generation gives '{spec.name}' as int64 {dimensions}; the package takes {spec}")
    *sequences, tokens = (*spec.shape, None) if spec.name in PER_SEQUENCE else spec.shape
    _require_ones(spec, sequences)
    _require_symbol(spec, tokens)


def _require_mask(spec: TensorSpec, *, is_of_any_length: bool) -> None:
    """Require a mask of a type and rank that are known, of one sequence and of any number of tokens."""
    rank = len(spec.shape)
    if spec.dtype not in MASKS.get(rank, ()):
        raise OptionError(
            f"generation gives '{spec.name}' as integers, booleans or floats [batch, places], or as booleans or floats "
            f"[batch, 1, tokens, places]; the package takes {spec}"
        )
    _require_ones(spec, spec.shape[: max(1, rank - 2)])
    if is_of_any_length:
        _require_symbol(spec, spec.shape[-1])


def _require_ones(spec: TensorSpec, sizes: Sequence[int | str]) -> None:
    if several := next((size for size in sizes if not isinstance(size, str) and size != 1), None):
        raise OptionError(f"'{spec}' takes {several} sequences at once; compile with a batch of 1")


def _require_symbol(spec: TensorSpec, tokens: int | str | None) -> None:
    if isinstance(tokens, int):
        raise OptionError(f"'{spec}' takes {tokens} tokens at once; compile without fixing its shape")
