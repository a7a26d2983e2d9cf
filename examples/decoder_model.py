"""The bundled decoder as a torch module: Llama's architecture at a small size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class DecoderConfiguration:
    """Sizes of the model. INT4 groups of 32, 64 and 128 weights divide the hidden and the intermediate size."""

    vocabulary_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 512
    layers: int = 3
    query_heads: int = 8
    key_value_heads: int = 2
    head_size: int = 32
    max_context: int = 256
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-5


class KeyValue(NamedTuple):
    """Keys and values of one layer, each [batch, key_value_heads, length, head_size]."""

    key: Tensor
    value: Tensor


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last axis (Zhang and Sennrich 2019, eq. 4)."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., size] -> [..., size]."""
        return self.weight * (hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.epsilon))


class RotaryEmbedding(nn.Module):
    """Cosines and sines of rotary positions (Su et al. 2021, section 3.2); pairs lie half a head apart, as in Llama."""

    inverse_frequency: Tensor

    def __init__(self, configuration: DecoderConfiguration) -> None:
        super().__init__()
        exponent = torch.arange(0, configuration.head_size, 2, dtype=torch.float32) / configuration.head_size
        self.register_buffer("inverse_frequency", configuration.rotary_base**-exponent, persistent=False)

    def forward(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """[batch, sequence] -> cosines and sines, each [batch, 1, sequence, head_size]."""
        angles = position_ids[:, None, :, None].float() * self.inverse_frequency
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos(), angles.sin()


def rotate(hidden: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate every pair (i, i + head_size / 2) of [batch, heads, sequence, head_size] by its angle."""
    first, second = hidden.chunk(2, dim=-1)
    return hidden * cosines + torch.cat((-second, first), dim=-1) * sines


def repeat_heads(hidden: Tensor, repeats: int) -> Tensor:
    """[batch, heads, length, size] -> [batch, heads * repeats, length, size], each head repeated in place."""
    batch, heads, length, size = hidden.shape
    return hidden[:, :, None].expand(batch, heads, repeats, length, size).reshape(batch, heads * repeats, length, size)


class Attention(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023) with rotary positions."""

    def __init__(self, configuration: DecoderConfiguration) -> None:
        super().__init__()
        self.configuration = configuration
        query_size = configuration.query_heads * configuration.head_size
        key_value_size = configuration.key_value_heads * configuration.head_size
        self.query = nn.Linear(configuration.hidden_size, query_size, bias=False)
        self.key = nn.Linear(configuration.hidden_size, key_value_size, bias=False)
        self.value = nn.Linear(configuration.hidden_size, key_value_size, bias=False)
        self.output = nn.Linear(query_size, configuration.hidden_size, bias=False)

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], past: KeyValue | None, mask: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """Attend over past and present; ``mask`` is added to the scores [batch, heads, sequence, past + sequence]."""
        batch, sequence, _ = hidden.shape
        head_shape = (batch, sequence, -1, self.configuration.head_size)
        query = rotate(self.query(hidden).view(head_shape).transpose(1, 2), *rotary)
        key = rotate(self.key(hidden).view(head_shape).transpose(1, 2), *rotary)
        value = self.value(hidden).view(head_shape).transpose(1, 2)
        if past is not None:
            key = torch.cat((past.key, key), dim=2)
            value = torch.cat((past.value, value), dim=2)
        present = KeyValue(key, value)
        repeats = self.configuration.query_heads // self.configuration.key_value_heads
        key, value = repeat_heads(key, repeats), repeat_heads(value, repeats)
        scores = query @ key.transpose(2, 3) * self.configuration.head_size**-0.5 + mask
        attended = torch.softmax(scores, dim=-1) @ value
        return self.output(attended.transpose(1, 2).reshape(batch, sequence, -1)), present


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020): down(silu(gate(x)) * up(x))."""

    def __init__(self, configuration: DecoderConfiguration) -> None:
        super().__init__()
        self.gate = nn.Linear(configuration.hidden_size, configuration.intermediate_size, bias=False)
        self.up = nn.Linear(configuration.hidden_size, configuration.intermediate_size, bias=False)
        self.down = nn.Linear(configuration.intermediate_size, configuration.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, hidden_size] -> the same shape."""
        return self.down(functional.silu(self.gate(hidden)) * self.up(hidden))


class DecoderLayer(nn.Module):
    """Attention, then feed-forward, each on a normalized residual stream."""

    def __init__(self, configuration: DecoderConfiguration) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(configuration.hidden_size, configuration.norm_epsilon)
        self.attention = Attention(configuration)
        self.feed_forward_norm = RMSNorm(configuration.hidden_size, configuration.norm_epsilon)
        self.feed_forward = FeedForward(configuration)

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], past: KeyValue | None, mask: Tensor
    ) -> tuple[Tensor, KeyValue]:
        """[batch, sequence, hidden_size] -> the same shape, and the layer's keys and values; see :class:`Attention`."""
        attended, present = self.attention(self.attention_norm(hidden), rotary, past, mask)
        hidden = hidden + attended
        return hidden + self.feed_forward(self.feed_forward_norm(hidden)), present


class Decoder(nn.Module):
    """The language model; the embedding table is the output matrix too."""

    def __init__(self, configuration: DecoderConfiguration) -> None:
        super().__init__()
        self.configuration = configuration
        self.embedding = nn.Embedding(configuration.vocabulary_size, configuration.hidden_size)
        self.rotary = RotaryEmbedding(configuration)
        self.layers = nn.ModuleList(DecoderLayer(configuration) for _ in range(configuration.layers))
        self.norm = RMSNorm(configuration.hidden_size, configuration.norm_epsilon)
        self.apply(_initialize)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: Sequence[KeyValue | None],
    ) -> tuple[Tensor, list[KeyValue]]:
        """One step of generation, or of training where the past of every layer is ``None``.

        ``input_ids`` and ``position_ids``: int64 [batch, sequence]; ``attention_mask``: int64
        [batch, past_sequence + sequence], 0 for padding; ``past_key_values``: of every layer, possibly empty.
        Returns logits [batch, sequence, vocabulary] and the keys and values of past and present.
        """
        mask = causal_mask(attention_mask, input_ids.shape[1])
        rotary = self.rotary(position_ids)
        hidden = self.embedding(input_ids)
        present: list[KeyValue] = []
        for layer, past in zip(self.layers, past_key_values, strict=True):
            hidden, key_value = layer(hidden, rotary, past, mask)
            present.append(key_value)
        return functional.linear(self.norm(hidden), self.embedding.weight), present


def causal_mask(attention_mask: Tensor, sequence: int) -> Tensor:
    """[batch, total] -> [batch, 1, sequence, total]: 0 where a new token sees a token, else the lowest float."""
    total = attention_mask.shape[1]
    index = torch.arange(total, device=attention_mask.device)
    visible = (index[None, :] <= index[total - sequence :, None])[None, None] & attention_mask[:, None, None, :].bool()
    return torch.where(visible, 0.0, torch.finfo(torch.float32).min)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
