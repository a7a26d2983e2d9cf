"""The trained decoder as ONNX, with the inputs and outputs of Optimum's decoder exports."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from decoder_model import Decoder, KeyValue
from decoder_text import END_OF_TEXT
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.export import Dim

OPSET = 18
TOTAL_SEQUENCE = "past_sequence + sequence"
TOLERANCE = 1e-4
"""Of the logits, whose size is about 10, between two fp32 evaluations that sum in different orders."""


class FlatDecoder(nn.Module):
    """The decoder with plain tensors as outputs."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: list[tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, ...]:
        """The inputs of :meth:`Decoder.forward`; the logits, then key and value of every layer."""
        logits, present = self.decoder(
            input_ids, attention_mask, position_ids, [KeyValue(*past) for past in past_key_values]
        )
        return logits, *(tensor for key_value in present for tensor in key_value)


def export_decoder(decoder: Decoder, tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``model.onnx``, ``tokenizer.json`` and ``generation_config.json``.

    The matrices of ``decoder`` are rounded to fp16, in place: that is how the file holds them. It computes in fp32.
    Raises ``AssertionError`` where ONNX and torch disagree.
    """
    with torch.no_grad():
        for parameter in decoder.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.half().float())
    model = trace_decoder(decoder)
    name_weights(model, decoder)
    store_matrices_as_float16(model)
    remove_metadata(model)
    onnx.checker.check_model(model, full_check=True)
    check_against_torch(model, decoder)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "model.onnx.partial"
    onnx.save(model, partial)
    partial.replace(folder / "model.onnx")
    tokenizer.save(str(folder / "tokenizer.json"))
    end = tokenizer.token_to_id(END_OF_TEXT)
    generation = {"bos_token_id": end, "eos_token_id": end, "max_length": decoder.configuration.max_context}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def trace_decoder(decoder: Decoder) -> ModelProto:
    """Export with batch, sequence and past_sequence symbolic."""
    configuration = decoder.configuration
    batch, sequence, past = 2, 3, 5
    inputs = random_inputs(decoder, batch, sequence, past)
    dim_batch, dim_sequence, dim_past = Dim("batch", min=1), Dim("sequence", min=1), Dim("past_sequence", min=0)
    tokens = {0: dim_batch, 1: dim_sequence}
    cache = {0: dim_batch, 2: dim_past}
    numbered = [f"{number}.{part}" for number in range(configuration.layers) for part in KeyValue._fields]
    program = torch.onnx.export(
        FlatDecoder(decoder).eval(),
        inputs,
        dynamo=True,
        verbose=False,
        opset_version=OPSET,
        # Torch has no way to say "past_sequence + sequence" of an input: it finds that out itself, and invents a name.
        dynamic_shapes=(tokens, {0: dim_batch, 1: Dim.AUTO}, tokens, [(cache, cache)] * configuration.layers),
        input_names=["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in numbered)],
        output_names=["logits", *(f"present.{name}" for name in numbered)],
    )
    assert program is not None
    model = program.model_proto
    mask = next(value for value in model.graph.input if value.name == "attention_mask")
    invented = mask.type.tensor_type.shape.dim[1].dim_param
    for value in [*model.graph.input, *model.graph.value_info]:
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == invented:
                dimension.dim_param = TOTAL_SEQUENCE
    return model


def random_inputs(
    decoder: Decoder, batch: int, sequence: int, past: int
) -> tuple[Tensor, Tensor, Tensor, list[tuple[Tensor, Tensor]]]:
    """Inputs of :class:`FlatDecoder` with a random past and no padding."""
    configuration = decoder.configuration
    generator = torch.Generator().manual_seed(0)
    cache_shape = (2, batch, configuration.key_value_heads, past, configuration.head_size)
    caches = [torch.randn(cache_shape, generator=generator) for _ in range(configuration.layers)]
    return (
        torch.randint(configuration.vocabulary_size, (batch, sequence), generator=generator),
        torch.ones(batch, past + sequence, dtype=torch.int64),
        torch.arange(past, past + sequence).repeat(batch, 1),
        [(key, value) for key, value in caches],
    )


def name_weights(model: ModelProto, decoder: Decoder) -> None:
    """Give back their parameters' names to the matrices, which the exporter transposed into numbered constants."""
    names = {
        parameter.detach().T.contiguous().numpy().tobytes(): name
        for name, parameter in FlatDecoder(decoder).named_parameters()
        if parameter.ndim == 2
    }
    renamed: dict[str, str] = {}
    for tensor in model.graph.initializer:
        name = names.get(tensor.raw_data) if len(tensor.dims) == 2 else None
        if name:
            renamed[tensor.name] = name
            tensor.name = name
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
    for value in model.graph.value_info:
        value.name = renamed.get(value.name, value.name)


def store_matrices_as_float16(model: ModelProto) -> None:
    """Replace each fp32 matrix by an fp16 one and a Cast, which halves the file."""
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 2:
            name, stored = tensor.name, f"{tensor.name}.float16"
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), stored))
            casts.append(helper.make_node("Cast", [stored], [name], name=f"{name}.cast", to=TensorProto.FLOAT))
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*casts, *nodes])


def remove_metadata(model: ModelProto) -> None:
    """Drop the exporter's notes: source lines and paths of this machine."""
    del model.metadata_props[:]
    del model.graph.metadata_props[:]
    model.graph.doc_string = ""
    graph = model.graph
    for item in [*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer]:
        item.doc_string = ""
        del item.metadata_props[:]


@torch.no_grad()
def check_against_torch(model: ModelProto, decoder: Decoder) -> None:
    """Compare logits and cache with torch: prefills without past, and steps of one and several tokens upon a past."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    input_names = [value.name for value in session.get_inputs()]
    for batch, sequence, past in [(1, 17, 0), (2, 5, 0), (1, 1, 17), (2, 3, 40)]:
        inputs = random_inputs(decoder, batch, sequence, past)
        *tokens, past_key_values = inputs
        flat = [*tokens, *(tensor for key_value in past_key_values for tensor in key_value)]
        actual = session.run(None, dict(zip(input_names, (tensor.numpy() for tensor in flat), strict=True)))
        expected = FlatDecoder(decoder)(*inputs)
        for value, result, tensor in zip(session.get_outputs(), actual, expected, strict=True):
            np.testing.assert_allclose(
                np.asarray(result), tensor.numpy(), rtol=TOLERANCE, atol=TOLERANCE, err_msg=value.name
            )
