"""What a model's own files say about generation: stop tokens, the length of the context."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from optimizer.errors import PackageError

# Written by transformers, and by the model builder of onnxruntime-genai, whose settings stand under "model".
SETTINGS_FILES = ("generation_config.json", "genai_config.json")


@dataclass(frozen=True)
class Settings:
    """The token that begins a text, those that end one, and how many tokens the model was made for; where known."""

    begin: int | None = None
    stop: tuple[int, ...] = ()
    capacity: int | None = None


def read_settings(files: Mapping[str, bytes]) -> Settings:
    """Return the settings in the first file of `SETTINGS_FILES` that there is; raises PackageError if malformed."""
    for name in SETTINGS_FILES:
        if name in files:
            try:
                document = json.loads(files[name])
            except ValueError as error:
                raise PackageError(f"{name} is no JSON: {error}") from error
            settings = document.get("model", document) if isinstance(document, dict) else None
            if not isinstance(settings, dict):
                raise PackageError(f"{name} holds no settings by name")
            return _settings(settings)
    return Settings()


def _settings(document: Mapping[str, object]) -> Settings:
    stop = document.get("eos_token_id")
    begin = _count(document.get("bos_token_id"))
    capacity = _count(document.get("context_length", document.get("max_length")))
    tokens = [_count(token) for token in (stop if isinstance(stop, list) else [stop])]
    return Settings(begin, tuple(token for token in tokens if token is not None), capacity or None)


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
