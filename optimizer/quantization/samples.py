"""What a model is run on while its weights are fitted: given inputs, a text, or text that the model makes up itself."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import InputMismatchError, OptionError
from optimizer.package.dtypes import numpy_dtype
from optimizer.package.entry_points import EntryPoint, TensorSpec
from optimizer.runtime.array_files import read_arrays
from optimizer.runtime.generation.roles import LOGITS
from optimizer.runtime.generation.step_inputs import MASK, POSITIONS, TOKENS
from optimizer.runtime.generation.tokenizer import TOKENIZER_FILE, Tokenizer

Array = NDArray[np.generic]
Tokens = NDArray[np.int64]
Run = Callable[[Mapping[str, Array]], NDArray[np.floating]]

WINDOW = 128
MOST_WINDOWS = 64
OWN_WINDOWS = 64
OWN_ROUNDS = 4
OWN = "its own text"
# Windows that run at once: their logits are the largest thing that a step makes.
_BATCH = 4
_SEED = 0


@dataclass(frozen=True)
class Samples:
    """Named inputs of calls, what they are for people to read, and whether they are token windows."""

    calls: tuple[dict[str, Array], ...]
    source: str

    def divided(self) -> tuple[Samples, Samples]:
        """Return the calls to fit weights on, and every fourth, to judge them by; all for both where there are few."""
        if len(self.calls) < 4:
            return self, self
        fitting = tuple(call for place, call in enumerate(self.calls) if place % 4 != 3)
        return Samples(fitting, self.source), Samples(self.calls[3::4], self.source)


def given_samples(files: Sequence[Path], entry: EntryPoint, folder: Path) -> Samples:
    """Return the samples in files: .npz with the inputs of a call, or text, for the tokenizer in `folder`.

    Raises OptionError for files that are neither, InputMismatchError for arrays that are not the model's inputs.
    """
    calls: list[dict[str, Array]] = []
    content = hashlib.sha256()
    for file in files:
        if not file.is_file():
            raise OptionError(f"--calibration '{file}' does not exist; give a text or an .npz of the model's inputs")
        content.update(file.read_bytes())
        calls += [_arrays(file, entry)] if file.suffix == ".npz" else _text(file, entry, folder)
    return Samples(tuple(calls), f"{', '.join(file.name for file in files)} (sha256 {content.hexdigest()[:16]})")


def own_samples(run: Run, entry: EntryPoint) -> Samples:
    """Return windows of text that a language model makes up: no data are needed.

    Sampling token by token is a fixed point of sampling all positions at once with the same random numbers, given the
    text before (Song et al., Accelerating Feedforward Computation via Parallel Nonlinear Equation Solving, 2021,
    section 3, Jacobi iteration). A few rounds from random tokens suffice for texts whose statistics are the model's.
    `run` returns logits. Raises OptionError for a model that is no language model.
    """
    vocabulary = _vocabulary(entry)
    random = np.random.default_rng(_SEED)
    tokens = random.integers(0, vocabulary, (OWN_WINDOWS, _window(entry)))
    chances = random.random(tokens.shape).astype(np.float32)
    for _ in range(OWN_ROUNDS):
        parts = [
            _sampled(run(token_inputs(entry, tokens[part])), chances[part]) for part in _batches(entry, len(tokens))
        ]
        tokens[:, 1:] = np.concatenate(parts)[:, :-1]
    return Samples(tuple(token_inputs(entry, tokens[part]) for part in _batches(entry, len(tokens))), OWN)


def token_inputs(entry: EntryPoint, tokens: Tokens) -> dict[str, Array]:
    """Return the inputs of a language model that reads windows of tokens [windows, length] with nothing before them.

    Raises OptionError for an input that nothing is known of.
    """
    inputs: dict[str, Array] = {}
    for spec in entry.inputs:
        dtype = numpy_dtype(spec.dtype)
        if spec.name == TOKENS:
            inputs[spec.name] = tokens.astype(dtype)
        elif spec.name == MASK:
            inputs[spec.name] = np.ones(tokens.shape, dtype)
        elif spec.name == POSITIONS:
            inputs[spec.name] = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape).astype(dtype)
        elif _is_past(spec):
            sizes = [0 if isinstance(size, str) else size for size in spec.shape[1:]]
            inputs[spec.name] = np.zeros((len(tokens), *sizes), dtype)
        else:
            raise OptionError(f"nothing is known of the input '{spec}'; give --calibration an .npz of all inputs")
    return inputs


def _is_past(spec: TensorSpec) -> bool:
    growing = [size for size in spec.shape[1:] if isinstance(size, str)]
    return spec.name.startswith("past") and len(spec.shape) > 2 and len(growing) == 1


def _vocabulary(entry: EntryPoint) -> int:
    logits = next((spec for spec in entry.outputs if spec.name == LOGITS), None)
    if logits is None or not isinstance(logits.shape[-1], int) or all(spec.name != TOKENS for spec in entry.inputs):
        raise OptionError(
            f"without '{TOKENS}' and '{LOGITS}' the model makes no text of its own; give --calibration an .npz"
        )
    return logits.shape[-1]


def _window(entry: EntryPoint) -> int:
    size = next(spec for spec in entry.inputs if spec.name == TOKENS).shape[1]
    return size if isinstance(size, int) else WINDOW


def _batches(entry: EntryPoint, windows: int) -> list[slice]:
    size = next(spec for spec in entry.inputs if spec.name == TOKENS).shape[0]
    step = size if isinstance(size, int) else _BATCH
    return [slice(first, first + step) for first in range(0, windows - step + 1, step)]


def _sampled(logits: NDArray[np.floating], chances: NDArray[np.float32]) -> Tokens:
    """Return the tokens whose share of the cumulative probability holds each chance."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float32)
    total = np.cumsum(shifted, axis=-1)
    return np.minimum((total < chances[..., None] * total[..., -1:]).sum(-1), logits.shape[-1] - 1)


def _arrays(file: Path, entry: EntryPoint) -> dict[str, Array]:
    try:
        return read_arrays(file, entry.inputs)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        names = ", ".join(spec.name for spec in entry.inputs)
        raise InputMismatchError(f"{file} does not hold the model's inputs {names}: {error}") from error


def _text(file: Path, entry: EntryPoint, folder: Path) -> list[dict[str, Array]]:
    tokenizer = folder / TOKENIZER_FILE
    if not tokenizer.is_file() or all(spec.name != TOKENS for spec in entry.inputs):
        raise OptionError(f"--calibration '{file}' is text, which needs '{TOKENS}' and {tokenizer}; give an .npz")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"--calibration '{file}' is neither a text in UTF-8 nor an .npz: {error}") from error
    tokens = np.array(Tokenizer(tokenizer.read_bytes()).encode(text), np.int64)
    length = _window(entry)
    windows = tokens[: len(tokens) // length * length].reshape(-1, length)
    chosen = windows[np.unique(np.linspace(0, len(windows) - 1, min(MOST_WINDOWS, len(windows))).astype(int))]
    calls = [token_inputs(entry, chosen[part]) for part in _batches(entry, len(chosen))]
    if not calls:
        raise OptionError(f"{file} has {len(tokens)} tokens, fewer than a window of {length}; give a longer text")
    return calls
