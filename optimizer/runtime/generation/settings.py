"""What a model's own files say about generation: what ends a text, the length of the context, how tokens are chosen."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import cast

from optimizer.errors import OptionError, PackageError
from optimizer.runtime.generation.sampling import Sampling

# Written by transformers, and by onnxruntime-genai's model builder, whose settings stand under "model" and "search".
SETTINGS_FILES = ("generation_config.json", "genai_config.json")


@dataclass(frozen=True)
class Settings:
    """What begins a text (a token), what ends one (tokens, strings), how many tokens the model was made for; if known.

    `capacity` is how long a text gets unless the caller says otherwise, `limit` the number of positions that the model
    has, beyond which there are only wrong tokens. `sampling` is how tokens are chosen unless the caller says otherwise:
    the likeliest ones where nothing is known.
    """

    begin: int | None = None
    stop: tuple[int, ...] = ()
    capacity: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    limit: int | None = None
    stop_strings: tuple[str, ...] = ()


def read_settings(files: Mapping[str, bytes]) -> Settings:
    """Return what `SETTINGS_FILES` say, each setting from the first one that has it; raises PackageError if malformed.

    The length of the context is that of genai_config.json where there is one: what transformers writes is how long a
    text gets by default.
    """
    found = [_settings(name, _document(name, files[name])) for name in SETTINGS_FILES if name in files]
    if not found:
        return Settings()
    stops = next((each.stop for each in found if each.stop), ())
    begin = next((each.begin for each in found if each.begin is not None), None)
    capacity = next((each.capacity for each in reversed(found) if each.capacity), None)
    sampling = next((each.sampling for each in found if each.sampling != Sampling()), Sampling())
    limit = next((each.limit for each in found if each.limit), None)
    strings = next((each.stop_strings for each in found if each.stop_strings), ())
    return Settings(begin, stops, capacity, sampling, limit, strings)


def _document(name: str, content: bytes) -> Mapping[str, object]:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise PackageError(f"{name} is no JSON: {error}") from error
    return _section(name, document)


def _section(name: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise PackageError(f"{name} holds no settings by name")
    return cast("Mapping[str, object]", value)


def _settings(name: str, document: Mapping[str, object]) -> Settings:
    model = _section(name, document.get("model", document))
    stop = model.get("eos_token_id")
    tokens = [_count(token) for token in (stop if isinstance(stop, list) else [stop])]
    limit = _count(model.get("context_length"))
    capacity = limit or _count(model.get("max_length"))
    sampling = _sampling(name, _section(name, document.get("search", document)))
    known = tuple(token for token in tokens if token is not None)
    return Settings(
        _count(model.get("bos_token_id")),
        known,
        capacity or None,
        sampling,
        limit or None,
        _strings(document.get("stop_strings")),
    )


def _sampling(name: str, search: Mapping[str, object]) -> Sampling:
    """Return how tokens are chosen. Without `do_sample` the likeliest one is, whatever the other settings."""
    penalty = _number(search.get("repetition_penalty"), 1.0)
    try:
        if search.get("do_sample") is not True:
            return Sampling(repetition_penalty=penalty)
        temperature, top_p = _number(search.get("temperature"), 1.0), _number(search.get("top_p"), 1.0)
        return Sampling(temperature, _count(search.get("top_k")) or 0, top_p, penalty)
    except OptionError as error:
        raise PackageError(f"{name}: {error}") from error


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _strings(value: object) -> tuple[str, ...]:
    """Return the strings of a setting that is one or a list of them, without empty ones."""
    several = cast("list[object]", value) if isinstance(value, list) else [value]
    return tuple(each for each in several if isinstance(each, str) and each)


def _number(value: object, otherwise: float) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else otherwise
