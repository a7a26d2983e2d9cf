"""The forms in which decoders come: exports of torch, and what onnxruntime-genai's builder makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Built:
    """What the builder is asked for, and what the configuration has beside that of the family, where one cannot do."""

    precision: Literal["int4", "int8", "fp32", "fp16", "bf16"]
    provider: Literal["cpu", "cuda", "webgpu", "dml"] = "cpu"
    options: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)

    @property
    def group(self) -> str:
        """Return the column of the table that the form belongs to."""
        is_narrow = self.precision in ("fp16", "bf16") or self.provider != "cpu"
        return "built, 16 bits" if is_narrow else f"built, {self.precision}"


Mask = Literal["int64", "bool", "float32", "queries bool", "queries float32", "none"]
Quantization = Literal["", "4 bits", "8 bits", "activations"]


@dataclass(frozen=True)
class Exported:
    """What torch's exporters are asked for, and what other tools do to what they write.

    `attention` "standard" is ONNX's own operator, called from the model, whose keys and values have few heads; other
    exports repeat these for all heads. `opset` is the exporter's default unless it is given. A mask "queries" says of
    each query what it sees; others have a place for each token. `cache` is where the model's Concat leaves it, where
    Attention appends to it itself, or where TensorScatter writes to room for all tokens. onnxruntime's tools round
    weights as `quantization` says, "activations" to 8 bits in steps that the data decide, and fuse operators.
    """

    exporter: Literal["dynamo", "torchscript"]
    dtype: str = "float32"
    mask: Mask = "int64"
    with_positions: bool = False
    attention: Literal["sdpa", "eager", "standard"] = "sdpa"
    opset: int | None = None
    cache: Literal["concatenated", "in Attention", "scattered"] = "concatenated"
    quantization: Quantization = ""
    block_size: int = 32
    is_symmetric: bool = True
    is_fused: bool = False

    @property
    def group(self) -> str:
        """Return the column of the table that the form belongs to."""
        if self.dtype != "float32":
            return "exported, 16 bits"
        if self.quantization or self.is_fused:
            return "exported, then onnxruntime's tools"
        return "opset 23, 24" if self.opset else self.exporter


# Products in floats, as onnxruntime computes them to the letter.
_FLOATS = "accuracy_level=0"
# Zero points of 4 bits of an odd number of blocks are beyond the builder's other methods.
_EVEN_BLOCKS = {"intermediate_size": 192}
_ASYMMETRIC = (_FLOATS, "is_symmetric=false")
BUILT: Mapping[str, Built] = {
    "int4": Built("int4", options=(_FLOATS,)),
    "int4-asymmetric": Built("int4", options=(*_ASYMMETRIC, "shared_embeddings=false")),
    "int4-block16": Built("int4", options=(_FLOATS, "block_size=16")),
    "int4-block64-asymmetric": Built("int4", options=(*_ASYMMETRIC, "block_size=64", "shared_embeddings=false")),
    "int4-rtn-asymmetric": Built("int4", "cpu", (*_ASYMMETRIC, "algo_config=rtn"), _EVEN_BLOCKS),
    "int4-block128": Built("int4", options=(_FLOATS, "block_size=128")),
    "int4-k_quant_mixed": Built("int4", "cpu", (_FLOATS, "algo_config=k_quant_mixed"), _EVEN_BLOCKS),
    "int4-untied": Built("int4", options=(_FLOATS, "shared_embeddings=false")),
    "int4-asymmetric-shared": Built("int4", options=(*_ASYMMETRIC, "shared_embeddings=true")),
    "int4-qdq": Built("int4", options=("use_qdq=true", "shared_embeddings=false", "op_types_to_quantize=MatMul")),
    "int4-split-qkv": Built("int4", options=(_FLOATS, "fuse_qkv=false")),
    "int4-whole-windows": Built("int4", options=(_FLOATS, "windowed_kv_cache=false")),
    "int4-pruned-head": Built("int4", options=(_FLOATS, "prune_lm_head=true")),
    "int8": Built("int8", options=(_FLOATS,)),
    "int8-asymmetric-block64": Built("int8", options=(*_ASYMMETRIC, "block_size=64")),
    "fp32": Built("fp32"),
    "int4-fp16": Built("int4", "cuda", (_FLOATS,)),
    "int4-bf16": Built("int4", "cuda", (_FLOATS, "use_cuda_bf16=true")),
    "fp16": Built("fp16", "cuda"),
    "bf16": Built("bf16", "cuda"),
    "int4-webgpu": Built("int4", "webgpu", (_FLOATS,)),
    "int4-dml": Built("int4", "dml", (_FLOATS,)),
}
EXPORTED: Mapping[str, Exported] = {
    "dynamo": Exported("dynamo"),
    "torchscript": Exported("torchscript"),
    "dynamo-positions": Exported("dynamo", with_positions=True),
    "torchscript-positions": Exported("torchscript", with_positions=True),
    "dynamo-eager": Exported("dynamo", attention="eager"),
    "torchscript-eager": Exported("torchscript", attention="eager"),
    "dynamo-bool": Exported("dynamo", mask="bool"),
    "dynamo-float": Exported("dynamo", mask="float32"),
    "torchscript-bool": Exported("torchscript", mask="bool"),
    "torchscript-float": Exported("torchscript", mask="float32"),
    "dynamo-queries-bool": Exported("dynamo", mask="queries bool", with_positions=True),
    "dynamo-queries-float": Exported("dynamo", mask="queries float32", with_positions=True),
    "torchscript-queries-float": Exported("torchscript", mask="queries float32", with_positions=True),
    "dynamo-no-mask": Exported("dynamo", mask="none"),
    "torchscript-no-mask": Exported("torchscript", mask="none", with_positions=True),
    "dynamo-fp16": Exported("dynamo", "float16"),
    "dynamo-bf16": Exported("dynamo", "bfloat16"),
    "torchscript-fp16": Exported("torchscript", "float16"),
    "torchscript-bf16": Exported("torchscript", "bfloat16"),
    "opset23": Exported("dynamo", opset=23),
    "opset23-positions": Exported("dynamo", opset=23, with_positions=True),
    "opset23-eager": Exported("dynamo", opset=23, attention="eager"),
    "opset23-bool": Exported("dynamo", opset=23, mask="bool"),
    "opset23-grouped": Exported("dynamo", opset=23, attention="standard"),
    "opset23-in-attention": Exported("dynamo", opset=23, attention="standard", cache="in Attention"),
    "opset23-fp16": Exported("dynamo", "float16", opset=23),
    "opset23-bf16": Exported("dynamo", "bfloat16", opset=23),
    "opset24": Exported("dynamo", opset=24),
    "opset24-scattered": Exported(
        "dynamo", opset=24, attention="standard", mask="queries bool", with_positions=True, cache="scattered"
    ),
    "opset24-scattered-float": Exported(
        "dynamo", opset=24, attention="standard", mask="queries float32", with_positions=True, cache="scattered"
    ),
    "torchscript-int4": Exported("torchscript", with_positions=True, quantization="4 bits"),
    "torchscript-int4-block128": Exported("torchscript", quantization="4 bits", block_size=128),
    "dynamo-int4-block16-asymmetric": Exported("dynamo", quantization="4 bits", block_size=16, is_symmetric=False),
    "dynamo-int4-block64": Exported("dynamo", quantization="4 bits", block_size=64),
    "dynamo-int8-asymmetric": Exported("dynamo", quantization="8 bits", is_symmetric=False),
    "opset23-int4": Exported("dynamo", opset=23, quantization="4 bits"),
    "torchscript-int8-activations": Exported("torchscript", with_positions=True, quantization="activations"),
    "dynamo-int8-activations": Exported("dynamo", quantization="activations"),
    "torchscript-fused": Exported("torchscript", with_positions=True, is_fused=True),
    "dynamo-fused": Exported("dynamo", is_fused=True),
}
