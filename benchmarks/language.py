"""Networks over texts and speech, each small for the tests and in full size for the benchmarks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from benchmarks.architecture import Architecture, Settings, Variant
from benchmarks.inputs import (
    CACHE_CASES,
    DECODER_CASES,
    FULL_CACHE_CASES,
    FULL_DECODER_CASES,
    HEADS,
    IMAGE_CASES,
    LAYERS,
    MASK,
    NARROW,
    SEGMENTS,
    STATIC_CASES,
    VOCABULARY,
    decoder_over,
    ended_token_ids,
    features,
    full_text,
    pixels,
    text,
    token_ids,
    with_past,
)

BATCH = {0: "batch"}
BATCH_SEQUENCE = {0: "batch", 1: "sequence"}
LOGITS = {"logits": BATCH_SEQUENCE}
GROUPED_QUERY: Settings = {**NARROW, "num_key_value_heads": 2, "max_position_embeddings": 64}
WHISPER: Settings = {
    "d_model": 32,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "num_mel_bins": 16,
    "max_source_positions": 20,
    "max_target_positions": 32,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
T5: Settings = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": LAYERS,
    "num_heads": HEADS,
    "vocab_size": VOCABULARY,
    "feed_forward_proj": "gated-gelu",
    # Few enough that the short test sequences reach the logarithmic buckets.
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
}
GPT2: Settings = {
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CLIP_TEXTS = (4, 77)
DEBERTA_V3_BASE: Settings = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "relative_attention": True,
    "position_buckets": 256,
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
SMOLLM2_135M: Settings = {
    "hidden_size": 576,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 1536,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
}
QWEN2_5_0_5B: Settings = {
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
}
GEMMA3_270M: Settings = {
    "hidden_size": 640,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "intermediate_size": 2048,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "tie_word_embeddings": True,
}
# The first layer sees a window that the test sequences exceed, the second everything; each turns by a base of its own.
GEMMA3: Settings = {
    **GROUPED_QUERY,
    "head_dim": 8,
    "query_pre_attn_scalar": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"],
    "tie_word_embeddings": True,
}

LANGUAGE: Mapping[str, Architecture] = {
    "clip": Architecture(
        "CLIPModel",
        "CLIPConfig",
        {
            "logits_per_image": {0: "image_batch", 1: "text_batch"},
            "logits_per_text": {0: "text_batch", 1: "image_batch"},
            "text_embeds": {0: "text_batch"},
            "image_embeds": {0: "image_batch"},
        },
        Variant(
            {
                "text_config": {
                    **NARROW,
                    "vocab_size": VOCABULARY,
                    "max_position_embeddings": 32,
                    "bos_token_id": 1,
                    "eos_token_id": 2,
                },
                "vision_config": {**NARROW, "image_size": 32, "patch_size": 8},
                "projection_dim": 24,
            },
            (
                token_ids("input_ids", VOCABULARY, ("text_batch", "sequence")),
                pixels(("image_batch", 3, 32, 32)),
                replace(MASK, dims=("text_batch", "sequence")),
            ),
            {
                "images_2": {"image_batch": 2, "text_batch": 3, "sequence": 9},
                "images_1": {"image_batch": 1, "text_batch": 2, "sequence": 14},
            },
        ),
        Variant(
            {},
            (
                ended_token_ids("input_ids", 49408, CLIP_TEXTS),
                pixels((1, 3, 224, 224)),
                replace(MASK, dims=CLIP_TEXTS),
            ),
            STATIC_CASES,
        ),
        "clip_vit_base_32",
    ),
    "bert": Architecture(
        "BertModel",
        "BertConfig",
        {"last_hidden_state": BATCH_SEQUENCE, "pooler_output": BATCH},
        text(MASK, SEGMENTS, max_position_embeddings=32, **NARROW),
        full_text(30522, MASK, SEGMENTS),
        "bert_base",
    ),
    "distilbert": Architecture(
        "DistilBertModel",
        "DistilBertConfig",
        {"last_hidden_state": BATCH_SEQUENCE},
        text(MASK, max_position_embeddings=32, dim=32, n_layers=LAYERS, n_heads=HEADS, hidden_dim=64),
        full_text(30522, MASK),
        "distilbert_base",
    ),
    "deberta": Architecture(
        "DebertaV2Model",
        "DebertaV2Config",
        {"last_hidden_state": BATCH_SEQUENCE},
        text(
            MASK,
            max_position_embeddings=32,
            relative_attention=True,
            position_buckets=8,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            **NARROW,
        ),
        full_text(128100, MASK, **DEBERTA_V3_BASE),
        "deberta_v3_base",
    ),
    "t5_encoder": Architecture(
        "T5EncoderModel",
        "T5Config",
        {"last_hidden_state": BATCH_SEQUENCE},
        text(MASK, **T5),
        full_text(32128, MASK),
        "t5_small_encoder",
    ),
    "t5_decoder": Architecture(
        "T5ForConditionalGeneration",
        "T5Config",
        LOGITS,
        decoder_over(("encoder_sequence", 32), VOCABULARY, DECODER_CASES, T5),
        decoder_over(("encoder_sequence", 512), 32128, FULL_DECODER_CASES, {}),
        "t5_small_decoder",
        call="decoder",
    ),
    "whisper_encoder": Architecture(
        "WhisperModel",
        "WhisperConfig",
        {"last_hidden_state": BATCH},
        Variant(WHISPER, (features(("batch", 16, 40)),), IMAGE_CASES),
        Variant({}, (features((1, 80, 3000)),), STATIC_CASES),
        "whisper_tiny_encoder",
        part="encoder",
    ),
    "whisper_decoder": Architecture(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        LOGITS,
        decoder_over((20, 32), VOCABULARY, DECODER_CASES, WHISPER),
        decoder_over((1500, 384), 51865, FULL_DECODER_CASES, {}),
        "whisper_tiny_decoder",
        call="decoder",
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        "GPT2Config",
        LOGITS,
        with_past(LAYERS, HEADS, 8, VOCABULARY, CACHE_CASES, GPT2),
        with_past(12, 12, 64, 50257, FULL_CACHE_CASES, {}),
        "gpt2",
        call="decoder_with_past",
    ),
    "llama": Architecture(
        "LlamaForCausalLM",
        "LlamaConfig",
        LOGITS,
        with_past(LAYERS, 2, 8, VOCABULARY, CACHE_CASES, GROUPED_QUERY),
        with_past(30, 3, 64, 49152, FULL_CACHE_CASES, SMOLLM2_135M),
        "smollm2_135m",
        call="decoder_with_past",
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        "Qwen2Config",
        LOGITS,
        with_past(LAYERS, 2, 8, VOCABULARY, CACHE_CASES, {"tie_word_embeddings": True, **GROUPED_QUERY}),
        with_past(24, 2, 64, 151936, FULL_CACHE_CASES, QWEN2_5_0_5B),
        "qwen2.5_0.5b",
        call="decoder_with_past",
    ),
    "gemma3": Architecture(
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        LOGITS,
        with_past(LAYERS, 2, 8, VOCABULARY, CACHE_CASES, GEMMA3),
        with_past(18, 1, 256, 262144, FULL_CACHE_CASES, GEMMA3_270M),
        "gemma3_270m",
        call="decoder_with_past",
    ),
}
