"""Decoders as torch's exporters write them, and as tools make them of these."""

# torch is installed only where models are made.
# pyright: reportMissingImports=false

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch

from benchmarks.architecture import Architecture, Dimensions, Input, Values, Variant
from benchmarks.export import FlatModule, export
from benchmarks.families.checkpoints import class_names
from benchmarks.families.forms import Exported
from benchmarks.families.networks import network
from benchmarks.families.onnxruntime_tools import fused, rounded
from benchmarks.families.standard_caches import CACHES

# Sizes above 1, as exporters take 0 and 1 for constants.
_EXAMPLE = {"batch": 2, "sequence": 3, "past_sequence": 4, "total_sequence": 7}
# The places of a mask are those before the new tokens, and the new ones.
_OF_TOKENS, _OF_QUERIES = ("batch", "total_sequence"), ("batch", 1, "sequence", "total_sequence")


def export_plain(family: str, form: Exported, folder: Path) -> None:
    """Have one of torch's exporters write a form of a family, as model.onnx in `folder`."""
    model = network(family, {}, form.attention)
    variant = Variant({}, _inputs(form, model), {"chunk": _EXAMPLE})
    config_class, model_class = class_names(family)
    outputs = {"logits": {0: "batch", 1: "sequence"}}
    architecture = Architecture(model_class, config_class, outputs, variant, call="decoder_with_past")
    names = tuple(spec.name for spec in variant.inputs)
    module = FlatModule(model, "decoder_with_past", names, tuple(architecture.outputs_of(variant)))
    path = folder / "model.onnx"
    module = module.eval().to(getattr(torch, form.dtype))
    export(module, architecture, variant, form.exporter, path, opset=form.opset)
    if form.cache != "concatenated":
        written = onnx.load(path)
        CACHES[form.cache](written)
        onnx.checker.check_model(written, full_check=True)
        onnx.save(written, path)
    if form.quantization:
        rounded(path, form)
    if form.is_fused:
        fused(path, model.config.num_attention_heads, model.config.hidden_size)


def _inputs(form: Exported, model: torch.nn.Module) -> tuple[Input, ...]:
    config = model.config
    heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    given = [Input("input_ids", ("batch", "sequence"), lambda rng, shape, _: rng.integers(3, 100, shape))]
    if form.mask != "none":
        given.append(Input("attention_mask", _OF_QUERIES if "queries" in form.mask else _OF_TOKENS, _mask(form)))
    if form.with_positions:
        given.append(Input("position_ids", ("batch", "sequence"), _places))
    dims = ("batch", heads, "past_sequence", size)
    parts = [(layer, part) for layer in range(config.num_hidden_layers) for part in ("key", "value")]
    given += [Input(f"past_key_values.{layer}.{part}", dims, _normal) for layer, part in parts]
    return tuple(given)


def _mask(form: Exported) -> Values:
    """Return what makes the example of a mask, in which everything is seen: 1, or 0 where it is added to scores."""
    *of_queries, dtype = form.mask.split()
    is_added = bool(of_queries) and dtype != "bool"
    make = np.zeros if is_added else np.ones
    return lambda _, shape, __: make(shape, np.dtype(dtype))


def _normal(rng: np.random.Generator, shape: tuple[int, ...], _: Dimensions) -> np.ndarray:
    return rng.standard_normal(shape, np.float32)


def _places(_: np.random.Generator, shape: tuple[int, ...], dimensions: Dimensions) -> np.ndarray:
    return np.broadcast_to(np.arange(shape[1]), shape) + dimensions["past_sequence"]
