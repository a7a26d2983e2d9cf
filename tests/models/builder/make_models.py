"""Make the decoders in this folder by onnxruntime-genai's builder: `python -m tests.models.builder.make_models`.

Each is a family of transformers, small and with random weights, written with weights of 4 bits in blocks of 32. Needs
torch, transformers and onnxruntime-genai.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import torch
import transformers

FOLDER = Path(__file__).parent
TOKENIZER = FOLDER.parents[2] / "examples" / "decoder" / "tokenizer.json"
# Shorter than the texts of the tests.
WINDOW = 8
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    # Weights this large spread attention and logits as a trained model's do.
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA = {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
FAMILIES: dict[str, tuple[str, str, dict[str, object]]] = {
    "smollm2": ("LlamaConfig", "LlamaForCausalLM", {}),
    "llama3": ("LlamaConfig", "LlamaForCausalLM", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"head_dim": 16, "sliding_window": WINDOW}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {"original_max_position_embeddings": 64, "sliding_window": WINDOW}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", GEMMA),
}


def make(name: str) -> None:
    """Write a family's model, with its weights inside, and the builder's settings beside it."""
    config_class, model_class, settings = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(getattr(transformers, config_class)(**{**SMALL, **settings}))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, built = Path(folder) / "checkpoint", Path(folder) / "built"
        model.save_pretrained(checkpoint)
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER)).save_pretrained(checkpoint)
        command = ["-i", str(checkpoint), "-o", str(built), "-p", "int4", "-e", "cpu", "-c", folder, "--extra_options"]
        options = ["block_size=32", "accuracy_level=4", "windowed_kv_cache=false"]
        subprocess.run([sys.executable, "-m", "onnxruntime_genai.models.builder", *command, *options], check=True)
        onnx.save(onnx.load(built / "model.onnx"), FOLDER / f"{name}.onnx")
        settings_read = json.loads((built / "genai_config.json").read_text(encoding="utf-8"))
        (FOLDER / f"{name}.json").write_text(json.dumps(settings_read, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make the small decoders of onnxruntime-genai's builder.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(FAMILIES)}")
    for name in parser.parse_args().names or FAMILIES:
        make(name)


if __name__ == "__main__":
    main()
