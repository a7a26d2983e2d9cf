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


@dataclass(frozen=True)
class Exported:
    """What torch's exporters are asked for: which, the types of weights and mask, and whether positions come."""

    exporter: Literal["dynamo", "torchscript"]
    dtype: str = "float32"
    mask: Literal["int64", "bool", "float32"] = "int64"
    with_positions: bool = False
    attention: Literal["sdpa", "eager"] = "sdpa"


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
    "dynamo-fp16": Exported("dynamo", "float16"),
    "dynamo-bf16": Exported("dynamo", "bfloat16"),
    "torchscript-fp16": Exported("torchscript", "float16"),
}
