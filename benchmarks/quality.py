"""`python -m benchmarks.quality`: what quantized weights cost the bundled decoder on text that it was not trained on.

For each way to choose the weights, or with `--caches` for each type of the cache: the mean KL divergence, in nats, of
the next token's distribution from the one in fp32, how often the likeliest token is another one, and the perplexity.
Texts are read token by token where caches are compared, because what is read at once is not read from codes.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnx
from numpy.typing import NDArray

from optimizer.compile import CompileOptions, compile_in_memory, compile_model, find_target
from optimizer.execution import Runner
from optimizer.runtime import load
from optimizer.runtime.generation import DecoderSession
from optimizer.runtime.model import CompiledModel

_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# The positions that the bundled decoder was trained on.
CONTEXT = 256
LAYERS, KEY_VALUE_HEADS, HEAD_SIZE = 3, 2, 32


@dataclass(frozen=True)
class Choice:
    """A way to choose weights, as the command line has it."""

    weights: str
    group: int = 32
    method: str = "rtn"
    activations: str = "auto"

    def __str__(self) -> str:
        return f"{self.weights}, group {self.group}, {self.method}, {self.activations} activations"

    def options(self) -> CompileOptions:
        return CompileOptions(
            find_target("host"),
            weights=self.weights,
            weight_group=self.group,
            weight_method=self.method,
            activations=self.activations,
        )


CHOICES = (
    Choice("int8"),
    Choice("int4"),
    Choice("int4", activations="float"),
    Choice("int4", method="minimum-error"),
    Choice("int4", method="hqq"),
    Choice("int4", group=16, method="minimum-error"),
    Choice("int4", group=128),
)


CACHES = ("fp32", "fp16", "bf16", "int8", "int4")
LONG_CONTEXT = 4096


@click.command()
@click.option("--windows", default=8, show_default=True, help=f"How many windows of {CONTEXT} tokens of the text.")
@click.option("--caches", is_flag=True, help="Compare types of the cache, not of the weights.")
def main(windows: int, caches: bool) -> None:
    """Measure each choice of weights, or of the cache's type, against fp32 on the held-out text."""
    text = list(_windows(windows))
    click.echo(f"{datetime.date.today()}, {windows} windows of {CONTEXT} tokens of held_out.txt\n")
    if caches:
        _compare_caches(text)
    else:
        _compare_weights(text)


def _compare_weights(text: list[NDArray[np.int64]]) -> None:
    model = onnx.load(_EXAMPLES / "decoder" / "model.onnx")
    exact = compile_in_memory(model, CompileOptions(find_target("host")))
    expected = _log_probabilities(exact, text)
    click.echo("| weights | KL, nats | top token differs | perplexity |")
    click.echo("|---|---|---|---|")
    click.echo(f"| fp32 | 0 | 0 | {_perplexity(expected, text):.3f} |")
    for choice in CHOICES:
        actual = _log_probabilities(compile_in_memory(model, choice.options()), text)
        click.echo(f"| {choice} | {_differences(expected, actual, text)} |")


def _compare_caches(text: list[NDArray[np.int64]]) -> None:
    click.echo(f"| cache | KL, nats | top token differs | perplexity | bytes a token, context of {LONG_CONTEXT} |")
    click.echo("|---|---|---|---|---|")
    expected: NDArray[np.float64] | None = None
    for dtype in CACHES:
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "decoder.opt"
            options = CompileOptions(find_target("host"), kv_cache_dtype=dtype)
            compile_model(_EXAMPLES / "decoder" / "model.onnx", package, options, certify=False)
            model = load(package)
        actual = _log_probabilities_by_token(model, text)
        expected = actual if expected is None else expected
        size = DecoderSession(model, capacity=LONG_CONTEXT).cache_bytes / LONG_CONTEXT
        click.echo(f"| {dtype} | {_differences(expected, actual, text)} | {size:.0f} |")


def _differences(expected: NDArray[np.float64], actual: NDArray[np.float64], text: list[NDArray[np.int64]]) -> str:
    """Return the cells of a table: divergence, flips, perplexity."""
    divergence = np.mean((np.exp(expected) * (expected - actual)).sum(-1))
    flips = np.mean(expected.argmax(-1) != actual.argmax(-1))
    return f"{divergence:.6f} | {flips:.2%} | {_perplexity(actual, text):.3f}"


def _windows(count: int) -> Iterator[NDArray[np.int64]]:
    """Yield windows [1, CONTEXT] of tokens from all over the held-out text."""
    from tokenizers import Tokenizer  # noqa: PLC0415 - this table alone needs it

    tokenizer = Tokenizer.from_file(str(_EXAMPLES / "decoder" / "tokenizer.json"))
    tokens = np.array(tokenizer.encode((_EXAMPLES / "held_out.txt").read_text(encoding="utf-8")).ids)
    for start in np.linspace(0, len(tokens) - CONTEXT, count, dtype=int):
        yield tokens[None, start : start + CONTEXT]


def _log_probabilities(run: Runner, text: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Return the log-probabilities of the next token at every position [windows, CONTEXT, vocabulary]."""
    empty = np.zeros((1, KEY_VALUE_HEADS, 0, HEAD_SIZE), np.float32)
    past = {f"past_key_values.{layer}.{part}": empty for layer in range(LAYERS) for part in ("key", "value")}
    results = []
    for tokens in text:
        positions = np.arange(tokens.shape[1])[None]
        inputs = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": positions, **past}
        results.append(_log_softmax(run(inputs)["logits"][0]))
    return np.stack(results)


def _log_probabilities_by_token(model: CompiledModel, text: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Return what `_log_probabilities` does, of a session for each window."""
    results = []
    for tokens in text:
        session = DecoderSession(model, capacity=CONTEXT)
        results.append(_log_softmax(np.stack([session.append([token]) for token in tokens[0].tolist()])))
    return np.stack(results)


def _log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def _perplexity(log_probabilities: NDArray[np.float64], text: list[NDArray[np.int64]]) -> float:
    targets = np.concatenate(text)[:, 1:, None]
    return float(np.exp(-np.take_along_axis(log_probabilities[:, :-1], targets, -1).mean()))


if __name__ == "__main__":
    main()
