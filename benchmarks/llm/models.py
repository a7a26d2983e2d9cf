"""Decoders of real shapes with random weights of 4 bits: `python -m benchmarks.llm.models [NAME ...]` makes them.

Each is made twice: by onnxruntime-genai's model builder from a checkpoint of transformers (for onnxruntime-genai and
this compiler), and as GGUF with every tensor Q4_0 (for llama.cpp). They are kept beside the other full-size models.
Making them needs torch, transformers, onnxruntime-genai and gguf; finding them does not.
"""

# torch, transformers and gguf are installed only where models are made.
# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.model_cache import cache_folder

if TYPE_CHECKING:
    import numpy as np

WEIGHT_BLOCK = 32
_Q4_0_BYTES = 18  # of a block of 32 weights: a half-precision scale and 32 codes
_TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "decoder" / "tokenizer.json"


@dataclass(frozen=True)
class Decoder:
    """The shapes of a decoder whose table of embeddings is its output matrix, too."""

    name: str
    kind: str
    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    head_size: int
    inner: int
    vocabulary: int
    rope_base: float

    @property
    def onnx_path(self) -> Path:
        """Where the model of onnxruntime-genai's builder is kept."""
        return cache_folder() / "llm" / f"{self.name}-int4" / "model.onnx"

    @property
    def gguf_path(self) -> Path:
        """Where the model for llama.cpp is kept."""
        return cache_folder() / "llm" / f"{self.name}-q4_0.gguf"

    @property
    def product_weights(self) -> int:
        """The weights that a token is multiplied with, those of the output matrix included."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.key_value_heads)
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.hidden * self.vocabulary

    @property
    def weight_bytes(self) -> int:
        """Bytes of the products' weights: half a byte each, and a half-precision scale for 32."""
        return self.product_weights // 2 + self.product_weights // WEIGHT_BLOCK * 2

    def cache_bytes(self, tokens: int, element_bytes: int) -> int:
        """Bytes of the keys and values of a text."""
        return 2 * self.layers * self.key_value_heads * self.head_size * tokens * element_bytes


DECODERS = {
    decoder.name: decoder
    for decoder in (
        Decoder("smollm2_135m", "llama", 576, 30, 9, 3, 64, 1536, 49152, 100000.0),
        Decoder("qwen2.5_0.5b", "qwen2", 896, 24, 14, 2, 64, 4864, 151936, 1000000.0),
        Decoder("llama3.2_1b", "llama", 2048, 16, 32, 8, 64, 8192, 128256, 500000.0),
    )
}


def make_onnx(decoder: Decoder) -> None:
    """Build the model with weights of 4 bits from a checkpoint with random ones."""
    with tempfile.TemporaryDirectory(dir=_folder(decoder.onnx_path.parent)) as folder:
        checkpoint, built = Path(folder) / "checkpoint", Path(folder) / "model"
        _checkpoint(decoder, checkpoint)
        command = ["-i", str(checkpoint), "-o", str(built), "-p", "int4", "-e", "cpu", "-c", folder]
        options = [f"block_size={WEIGHT_BLOCK}", "accuracy_level=4"]
        module = "onnxruntime_genai.models.builder"
        subprocess.run([sys.executable, "-m", module, *command, "--extra_options", *options], check=True)
        shutil.rmtree(decoder.onnx_path.parent, ignore_errors=True)
        built.rename(decoder.onnx_path.parent)


def make_gguf(decoder: Decoder) -> None:
    """Write random weights as Q4_0, norms in fp32."""
    import gguf  # noqa: PLC0415 - finding models does without

    with tempfile.TemporaryDirectory(dir=_folder(decoder.gguf_path)) as folder:
        writer = gguf.GGUFWriter(Path(folder) / "model.gguf", decoder.kind)
        writer.add_context_length(8192)
        writer.add_embedding_length(decoder.hidden)
        writer.add_block_count(decoder.layers)
        writer.add_feed_forward_length(decoder.inner)
        writer.add_head_count(decoder.heads)
        writer.add_head_count_kv(decoder.key_value_heads)
        writer.add_rope_dimension_count(decoder.head_size)
        writer.add_rope_freq_base(decoder.rope_base)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_vocab_size(decoder.vocabulary)
        writer.add_tokenizer_model("none")
        for name, values in _tensors(decoder):
            raw = gguf.GGMLQuantizationType.Q4_0 if values.dtype == "uint8" else None
            writer.add_tensor(name, values, raw_dtype=raw)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        (Path(folder) / "model.gguf").replace(decoder.gguf_path)


def _tensors(decoder: Decoder) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the tensors of a GGUF file: matrices as bytes of Q4_0, vectors as they are."""
    import numpy as np  # noqa: PLC0415 - an engine's process imports it when the engine does

    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> tuple[str, np.ndarray]:
        blocks = rng.integers(0, 256, (rows, columns // WEIGHT_BLOCK, _Q4_0_BYTES), np.uint8)
        scales = rng.random((rows, columns // WEIGHT_BLOCK, 1)) / columns**0.5
        blocks[..., :2] = scales.astype(np.float16).view(np.uint8)
        return f"{name}.weight", blocks.reshape(rows, -1)

    hidden, inner, size = decoder.hidden, decoder.inner, decoder.head_size
    yield matrix("token_embd", decoder.vocabulary, hidden)
    yield "output_norm.weight", np.ones(hidden, np.float32)
    for layer in range(decoder.layers):
        block = f"blk.{layer}"
        for norm in ("attn_norm", "ffn_norm"):
            yield f"{block}.{norm}.weight", np.ones(hidden, np.float32)
        rows = {"attn_q": decoder.heads, "attn_k": decoder.key_value_heads, "attn_v": decoder.key_value_heads}
        for name, heads in rows.items():
            yield matrix(f"{block}.{name}", heads * size, hidden)
            if decoder.kind == "qwen2":
                yield f"{block}.{name}.bias", np.zeros(heads * size, np.float32)
        yield matrix(f"{block}.attn_output", hidden, decoder.heads * size)
        yield matrix(f"{block}.ffn_gate", inner, hidden)
        yield matrix(f"{block}.ffn_up", inner, hidden)
        yield matrix(f"{block}.ffn_down", hidden, inner)


def _checkpoint(decoder: Decoder, folder: Path) -> None:
    import torch  # noqa: PLC0415 - making a checkpoint alone needs these
    import transformers  # noqa: PLC0415

    kind = {"llama": "Llama", "qwen2": "Qwen2"}[decoder.kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=decoder.vocabulary,
        hidden_size=decoder.hidden,
        num_hidden_layers=decoder.layers,
        num_attention_heads=decoder.heads,
        num_key_value_heads=decoder.key_value_heads,
        head_dim=decoder.head_size,
        intermediate_size=decoder.inner,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": decoder.rope_base},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        dtype="bfloat16",
    )
    with torch.device("cpu"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    # The builder copies a tokenizer; which one does not matter here.
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(_TOKENIZER)).save_pretrained(folder)


def _folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.parent


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make the decoders of `python -m benchmarks llm`.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(DECODERS)}")
    parser.add_argument("--format", choices=("onnx", "gguf"), help="only this one")
    arguments = parser.parse_args()
    for name in arguments.names or DECODERS:
        decoder = DECODERS[name]
        if arguments.format != "gguf" and not decoder.onnx_path.exists():
            make_onnx(decoder)
        if arguments.format != "onnx" and not decoder.gguf_path.exists():
            make_gguf(decoder)


if __name__ == "__main__":
    main()
