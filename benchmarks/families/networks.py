"""The networks of the families in torch, with random weights."""

# torch and transformers are installed only where models are made.
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping

import torch
import transformers
from transformers.masking_utils import sdpa_mask

from benchmarks.export import randomize
from benchmarks.families.checkpoints import FAMILIES, SMALL, class_names

# transformers has no other attention for it but its own, and what is registered here.
_NEVER_SDPA = ("gemma2",)
STANDARD = "standard"


def network(family: str, settings: Mapping[str, object], attention: str = "sdpa") -> torch.nn.Module:
    """Return a family's model with random weights, the same at every call; `settings` are beside the family's."""
    config_class, model_class = class_names(family)
    config = getattr(transformers, config_class)(**{**SMALL, **FAMILIES[family][1], **settings})
    if attention != "sdpa" or family not in _NEVER_SDPA:
        config._attn_implementation = attention
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    randomize(model)
    return model.eval()


def _attention(
    _: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_others: object,
) -> tuple[torch.Tensor, None]:
    """Call ONNX's operator, of which torch's exporter keeps the call."""
    heads = torch.onnx.ops.attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, softcap=softcap or 0.0
    )[0]
    return heads.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register(STANDARD, _attention)
transformers.AttentionMaskInterface.register(STANDARD, sdpa_mask)
