"""How far a decoder's logits are from exact ones: `python -m benchmarks.llm.logits [NAME ...]`.

The model of onnxruntime-genai's builder is run by onnxruntime at accuracy level 0 (weights of 4 bits, activations in
fp32), and as this compiler's package (activations in int8 as well). Random weights make nearly even distributions, in
which tokens differ by little: the number of other top tokens is an upper bound for trained ones.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from benchmarks.llm.engines import compile_package, package_path
from benchmarks.llm.models import DECODERS, Decoder
from benchmarks.llm.worker import prompt_of

_COLUMNS = ("decoder", "tokens", "mean KL, nats", "largest KL", "other top tokens")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Compare logits with onnxruntime's at accuracy level 0.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(DECODERS)}")
    parser.add_argument(
        "--tokens", type=int, default=128, help="tokens of the prompt, all of whose logits are compared"
    )
    arguments = parser.parse_args()
    print(f"{datetime.date.today()}, onnxruntime {onnxruntime.__version__}, accuracy level 0\n")
    print(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}")
    for name in arguments.names or DECODERS:
        print(_row(DECODERS[name], arguments.tokens), flush=True)


def _row(decoder: Decoder, tokens: int) -> str:
    from optimizer.runtime import load  # noqa: PLC0415

    if not package_path(decoder).exists():
        compile_package(decoder)
    inputs = _inputs(decoder, tokens)
    exact = _log_probabilities(_onnxruntime_logits(decoder, inputs))
    ours = _log_probabilities(load(package_path(decoder))(inputs)["logits"])
    divergence = (np.exp(exact) * (exact - ours)).sum(-1)
    others = int((exact.argmax(-1) != ours.argmax(-1)).sum())
    return f"| {decoder.name} | {tokens} | {divergence.mean():.1e} | {divergence.max():.1e} | {others} |"


def _inputs(decoder: Decoder, tokens: int) -> dict[str, np.ndarray]:
    """Return a prompt without anything before it."""
    inputs = {
        "input_ids": np.array([prompt_of(tokens, decoder.vocabulary)], np.int64),
        "attention_mask": np.ones((1, tokens), np.int64),
    }
    past = np.zeros((1, decoder.key_value_heads, 0, decoder.head_size), np.float32)
    names = [f"past_key_values.{layer}.{part}" for layer in range(decoder.layers) for part in ("key", "value")]
    return {**inputs, **dict.fromkeys(names, past)}


def _onnxruntime_logits(decoder: Decoder, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    model = onnx.load(decoder.onnx_path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    # Beside the model, whose external data it shares.
    with tempfile.NamedTemporaryFile(dir=decoder.onnx_path.parent, suffix=".onnx") as file:
        Path(file.name).write_bytes(model.SerializeToString())
        session = onnxruntime.InferenceSession(file.name, providers=["CPUExecutionProvider"])
        given = {each.name: inputs[each.name] for each in session.get_inputs()}
        (logits,) = session.run(["logits"], given)
    return np.asarray(logits)


def _log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return log-softmax of the last axis in float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


if __name__ == "__main__":
    main()
