"""Small decoders of each family with random weights: what `transformers` makes them of. Needs nothing itself."""

from __future__ import annotations

from collections.abc import Mapping

# Shorter than the texts that are compared.
WINDOW = 8
EOS = 2
SMALL: Mapping[str, object] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": EOS,
    "pad_token_id": 0,
    # Weights this large spread attention and logits as a trained model's do.
    "initializer_range": 0.2,
    "tie_word_embeddings": True,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_GEMMA = {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
_GEMMA3 = {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]}
# The builder takes a product with as many outputs as there are tokens for the last one: so would be that of Phi-3's
# queries, keys and values with 128, and that of Qwen3's queries.
_PHI3 = {"original_max_position_embeddings": 64, "sliding_window": WINDOW, "vocab_size": 144}
FAMILIES: Mapping[str, tuple[str, Mapping[str, object]]] = {
    "smollm2": ("Llama", {}),
    "llama3": ("Llama", {"rope_parameters": _LLAMA3_ROPE, "tie_word_embeddings": False}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 32, "vocab_size": 144}),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": WINDOW}),
    "phi3": ("Phi3", _PHI3),
    "gemma2": ("Gemma2", _GEMMA),
    "gemma3": ("Gemma3", _GEMMA3),
    "gpt2": ("GPT2", {"n_positions": 64, "n_embd": 64, "n_layer": 2, "n_head": 4, "num_key_value_heads": 4}),
}
"""Each family's name in `transformers`, and what its configuration has beside `SMALL`."""


def class_names(family: str) -> tuple[str, str]:
    """Return the names of a family's configuration and of its model in `transformers`."""
    kind = FAMILIES[family][0]
    return {
        "Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM"),
        "GPT2": ("GPT2Config", "GPT2LMHeadModel"),
    }.get(kind, (f"{kind}Config", f"{kind}ForCausalLM"))
