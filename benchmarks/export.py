"""Build the architectures of the table with random weights and export them with both ONNX exporters of torch."""

# torch and transformers are installed only where models are exported.
# pyright: reportMissingImports=false

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
import transformers
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput

from benchmarks.architecture import PAST, SEED, Architecture, Array, Call, Exporter, Variant

# torch reports every torchvision operator that it cannot register.
logging.getLogger("torch.onnx").setLevel(logging.ERROR)

# Below protobuf's 2 GiB by what an exporter may add: folded constants, a second copy of a tied weight.
MOST_INLINE_BYTES = 1 << 30


class FlatModule(nn.Module):
    """A network whose `forward` takes and returns plain tensors in the order of the table."""

    def __init__(self, model: nn.Module, call: Call, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.call = call
        self.inputs = inputs
        self.outputs = outputs

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call the network with its inputs by name, and return the tensors among its results that the table lists."""
        named = dict(zip(self.inputs, tensors, strict=True))
        if self.call == "decoder_with_past":
            return self._with_past(named)
        result = self._over_encoder(named) if self.call == "decoder" else self.model(**named, return_dict=True)
        return tuple(result[name] for name in self.outputs)

    def _over_encoder(self, named: dict[str, Tensor]) -> ModelOutput:
        states = named.pop("encoder_hidden_states")
        if "encoder_attention_mask" in named:
            named["attention_mask"] = named.pop("encoder_attention_mask")
        return self.model(**named, encoder_outputs=(states,), return_dict=True)

    def _with_past(self, named: dict[str, Tensor]) -> tuple[Tensor, ...]:
        past = [named.pop(name) for name in self.inputs if name.startswith(PAST)]
        cache = transformers.DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
        result = self.model(**named, past_key_values=cache, use_cache=True, return_dict=True)
        present = [tensor for layer in result.past_key_values.layers for tensor in (layer.keys, layer.values)]
        return (result.logits, *present)


def build(architecture: Architecture, variant: Variant, dtype: str = "float32") -> FlatModule:
    """Return the network in evaluation mode with random weights that are the same on every call, but for rounding."""
    torch.manual_seed(SEED)
    config = getattr(transformers, architecture.config)(**variant.settings)
    model: nn.Module = getattr(transformers, architecture.model)(config)
    if architecture.part == "encoder":
        model = model.get_submodule("encoder")
    randomize(model)
    names = tuple(spec.name for spec in variant.inputs)
    return (
        FlatModule(model, architecture.call, names, tuple(architecture.outputs_of(variant)))
        .eval()
        .to(getattr(torch, dtype))
    )


def randomize(model: nn.Module) -> None:
    """Give every parameter and every normalization statistic a random value that matters to the outputs.

    The initial values of a network hide mistakes: a scale of 1, a bias of 0 or a running mean of 0 make a wrong fold
    look right, and weights of standard deviation 0.02 make every softmax uniform.
    """
    with torch.no_grad():
        for owner, name, tensor in _floating_tensors(model):
            if name == "running_var" or (tensor.dim() == 1 and "bias" not in name and name != "running_mean"):
                tensor.uniform_(0.5, 1.5)
            elif tensor.dim() == 1:
                tensor.normal_(0, 0.2)
            elif tensor.dim() > 1:
                tensor.normal_(0, _deviation(owner, name, tensor))


def _floating_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Yield the parameters, and the statistics of normalizations (but no other buffer: those hold constants)."""
    for module in model.modules():
        tensors = dict(module.named_parameters(recurse=False))
        buffers = dict(module.named_buffers(recurse=False))
        if "running_mean" in buffers:
            tensors |= buffers
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                yield module, name, tensor


def _deviation(owner: nn.Module, name: str, tensor: Tensor) -> float:
    """Standard deviation that keeps the variance of the activations: 1/sqrt(fan_in) for a weight, 0.5 for a table."""
    if name != "weight" or isinstance(owner, nn.Embedding):
        return 0.5
    if isinstance(owner, transformers.pytorch_utils.Conv1D):
        return tensor.shape[0] ** -0.5
    return float(np.prod(tensor.shape[1:])) ** -0.5


def run_torch(module: FlatModule, inputs: dict[str, Array]) -> dict[str, Array]:
    """Return the outputs of the network by name."""
    with torch.no_grad():
        outputs = module(*_arguments(module, inputs))
    return {name: tensor.numpy() for name, tensor in zip(module.outputs, outputs, strict=True)}


def _arguments(module: FlatModule, inputs: dict[str, Array]) -> tuple[Tensor, ...]:
    """Return the inputs in order, floats in the type of the weights."""
    dtype = next(module.parameters()).dtype
    tensors = (torch.from_numpy(inputs[name]) for name in module.inputs)
    return tuple(tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in tensors)


def export(
    module: FlatModule,
    architecture: Architecture,
    variant: Variant,
    exporter: Exporter,
    path: Path,
    *,
    opset: int | None = None,
) -> None:
    """Write `module` to `path` as an ONNX file in which the named dimensions stay symbolic.

    Weights of many bytes go to a second file, named as the first with ".data" behind it: protobuf ends at 2 GiB.
    The exporters are called with their defaults, as people call them; so is their operator set unless `opset` is given.
    """
    large = sum(parameter.nbytes for parameter in module.parameters()) > MOST_INLINE_BYTES
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        raw = Path(folder) / "model.onnx"
        _export(module, architecture, variant, exporter, raw, external_data=large, opset=opset)
        model = onnx.load(raw)
    _remove_debug_text(model)
    if large:
        onnx.save(model, path, save_as_external_data=True, location=f"{path.name}.data")
    else:
        onnx.save(model, path)
    onnx.checker.check_model(str(path), full_check=not large)  # shape inference would load all weights again


def _export(
    module: FlatModule,
    architecture: Architecture,
    variant: Variant,
    exporter: Exporter,
    path: Path,
    *,
    external_data: bool,
    opset: int | None,
) -> None:
    arguments = _arguments(module, variant.draw(next(iter(variant.cases))))
    axes = {
        spec.name: {axis: dim for axis, dim in enumerate(spec.dims) if isinstance(dim, str)} for spec in variant.inputs
    }
    dynamic = any(axes.values())
    names = list(module.inputs)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            torch.onnx.export(
                module,
                arguments,
                path,
                input_names=names,
                output_names=list(module.outputs),
                dynamo=True,
                dynamic_shapes=(tuple(axes.values()),) if dynamic else None,
                external_data=external_data,
                opset_version=opset,
                verbose=False,
            )
        else:
            torch.onnx.export(
                module,
                arguments,
                str(path),  # with any other path object this exporter refuses models over 2 GiB
                input_names=names,
                output_names=list(module.outputs),
                dynamo=False,
                opset_version=opset,
                dynamic_axes={**axes, **architecture.outputs_of(variant)} if dynamic else None,
            )


def _remove_debug_text(model: onnx.ModelProto) -> None:
    """Remove what the exporters add for debugging: stack traces, with the paths of the exporting machine in them."""
    del model.metadata_props[:]
    graphs = [model.graph, *model.functions]
    while graphs:
        graph = graphs.pop()
        graph.ClearField("doc_string")
        del graph.metadata_props[:]
        for node in graph.node:
            node.ClearField("doc_string")
            del node.metadata_props[:]
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]
        if isinstance(graph, onnx.GraphProto):
            for value in [*graph.input, *graph.output, *graph.value_info, *graph.initializer]:
                value.ClearField("doc_string")
                del value.metadata_props[:]
