"""`python -m benchmarks.quality`: what quantized weights cost the bundled decoder on text that it was not trained on.

For each way to choose the weights, or with `--caches` for each type of the cache: the mean KL divergence, in nats, of
the next token's distribution from the one in fp32, how often the likeliest token is another one, and the perplexity.
Texts are read token by token where caches are compared, because what is read at once is not read from codes. Methods
that are calibrated see the parts of the held-out text that are not measured on; those on the model's own text see none.
"""

from __future__ import annotations

import datetime
import tempfile
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
import onnx
from numpy.typing import NDArray

from optimizer.compile import CompileOptions, compile_in_memory, compile_model, find_target
from optimizer.execution import Runner
from optimizer.quantization.samples import WINDOW
from optimizer.runtime import load
from optimizer.runtime.array_files import write_arrays
from optimizer.runtime.generation import DecoderSession
from optimizer.runtime.model import CompiledModel
from passes.quantization.fitted import FITTED_METHODS as FITTED

_EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# The positions that the bundled decoder was trained on.
CONTEXT = 256
LAYERS, KEY_VALUE_HEADS, HEAD_SIZE = 3, 2, 32
WINDOWS_OF_A_CALL = 8


@dataclass(frozen=True)
class Choice:
    """A way to choose weights, as the command line has it."""

    weights: str
    group: int = 32
    method: str = "rtn"
    activations: str = "auto"
    zero_points: bool | None = None
    calibrated: bool = False
    max_kl: float | None = None
    weights_of: tuple[str, ...] = ()

    def __str__(self) -> str:
        zeros = ", zero points" if self.zero_points or self.method == "hqq" else ""
        source = ", on calibration text" if self.calibrated else ", on its own text" if self.method in FITTED else ""
        limit = f", max KL {self.max_kl}" if self.max_kl else ""
        others = f", {' '.join(self.weights_of)}" if self.weights_of else ""
        how = f"{self.method}{source}{limit}{others}, {self.activations} activations"
        return f"{self.weights}, group {self.group}{zeros}, {how}"

    def options(self, calibration: tuple[Path, ...]) -> CompileOptions:
        return CompileOptions(
            find_target("host"),
            weights=self.weights,
            weight_group=self.group,
            weight_method=self.method,
            activations=self.activations,
            weight_zero_points=self.zero_points,
            weights_of=self.weights_of,
            calibration=calibration if self.calibrated else (),
            max_kl=self.max_kl,
        )


CHOICES = (
    Choice("int8"),
    Choice("int4"),
    Choice("int4", activations="float"),
    Choice("int4", zero_points=True),
    Choice("int4", method="minimum-error"),
    Choice("int4", method="minimum-error", zero_points=True),
    Choice("int4", method="hqq"),
    Choice("int4", method="awq"),
    Choice("int4", method="gptq"),
    Choice("int4", method="gptq", zero_points=True),
    Choice("int4", method="awq", calibrated=True),
    Choice("int4", method="gptq", calibrated=True),
    Choice("int4", method="gptq", zero_points=True, calibrated=True),
    Choice("int4", method="gptq", zero_points=True, calibrated=True, max_kl=0.006),
    Choice("int4", group=16, method="gptq", zero_points=True),
    Choice("int4", group=64, method="gptq", zero_points=True),
    Choice("int4", group=128, method="gptq", zero_points=True),
    Choice("int4", group=0, method="gptq", zero_points=True),
    Choice("int4", group=128),
    Choice("int4", group=0),
)


CACHES = ("fp32", "fp16", "bf16", "int8", "int4")
LONG_CONTEXT = 4096


@click.command()
@click.option("--windows", default=8, show_default=True, help=f"How many windows of {CONTEXT} tokens of the text.")
@click.option("--caches", is_flag=True, help="Compare types of the cache, not of the weights.")
def main(windows: int, caches: bool) -> None:
    """Measure each choice of weights, or of the cache's type, against fp32 on the held-out text."""
    tokens = _tokens()
    starts = np.linspace(0, len(tokens) - CONTEXT, windows, dtype=int)
    text = [tokens[None, start : start + CONTEXT] for start in starts]
    click.echo(f"{datetime.date.today()}, {windows} windows of {CONTEXT} tokens of held_out.txt\n")
    if caches:
        _compare_caches(text)
    else:
        _compare_weights(text, tokens, starts)


def _compare_weights(text: list[NDArray[np.int64]], tokens: NDArray[np.int64], starts: NDArray[np.int64]) -> None:
    model = onnx.load(_EXAMPLES / "decoder" / "model.onnx")
    exact = compile_in_memory(model, CompileOptions(find_target("host")))
    expected = _log_probabilities(exact, text)
    click.echo("| weights | KL, nats | top token differs | perplexity |")
    click.echo("|---|---|---|---|")
    click.echo(f"| fp32 | 0 | 0 | {_perplexity(expected, text):.3f} |")
    with tempfile.TemporaryDirectory() as folder:
        calibration = _calibration(tokens, starts, Path(folder))
        for choice in CHOICES:
            actual = _log_probabilities(compile_in_memory(model, choice.options(calibration)), text)
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


def _tokens() -> NDArray[np.int64]:
    from tokenizers import Tokenizer  # noqa: PLC0415 - this table alone needs it

    tokenizer = Tokenizer.from_file(str(_EXAMPLES / "decoder" / "tokenizer.json"))
    return np.array(tokenizer.encode((_EXAMPLES / "held_out.txt").read_text(encoding="utf-8")).ids)


def _calibration(tokens: NDArray[np.int64], starts: NDArray[np.int64], folder: Path) -> tuple[Path, ...]:
    """Write windows of the tokens that are not measured on, some to a file of inputs, and return the files."""
    ends = [*starts[1:], len(tokens)]
    between = [tokens[start + CONTEXT : end] for start, end in zip(starts, ends, strict=True)]
    windows = np.concatenate([part[: len(part) // WINDOW * WINDOW].reshape(-1, WINDOW) for part in between])
    files = []
    for first in range(0, len(windows), WINDOWS_OF_A_CALL):
        file = folder / f"{first:03}.npz"
        write_arrays(file, _inputs(windows[first : first + WINDOWS_OF_A_CALL]))
        files.append(file)
    return tuple(files)


def _inputs(tokens: NDArray[np.int64]) -> dict[str, NDArray[np.generic]]:
    empty = np.zeros((len(tokens), KEY_VALUE_HEADS, 0, HEAD_SIZE), np.float32)
    past = {f"past_key_values.{layer}.{part}": empty for layer in range(LAYERS) for part in ("key", "value")}
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    return {"input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": positions, **past}


def _log_probabilities(run: Runner, text: list[NDArray[np.int64]]) -> NDArray[np.float64]:
    """Return the log-probabilities of the next token at every position [windows, CONTEXT, vocabulary]."""
    return np.stack([_log_softmax(run(_inputs(tokens))["logits"][0]) for tokens in text])


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
