"""What onnxruntime's own tools make of exports: weights in fewer bits, operators fused."""

# pyright: reportMissingImports=false

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import onnx

if TYPE_CHECKING:
    from onnxruntime.quantization.onnx_model import ONNXModel

    from benchmarks.families.forms import Exported


def rounded(path: Path, form: Exported) -> None:
    """Round the weights of the model at `path` as `form` says: for MatMulNBits, or for products of 8 bits."""
    from onnxruntime.quantization import quantize_dynamic  # noqa: PLC0415 - takes seconds
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer  # noqa: PLC0415

    if form.quantization == "activations":
        quantize_dynamic(onnx.load(path), path)
        return
    bits = int(form.quantization.split()[0])
    tool = MatMulNBitsQuantizer(onnx.load(path), bits, form.block_size, form.is_symmetric, accuracy_level=0)
    tool.process()
    onnx.save(cast("ONNXModel", tool.model).model, path)


def fused(path: Path, heads: int, width: int) -> None:
    """Fuse operators of the model at `path` as Optimum does at its second level: for any decoder as for GPT-2."""
    from onnxruntime.transformers import optimizer  # noqa: PLC0415 - takes seconds

    optimizer.optimize_model(str(path), "gpt2", heads, width, opt_level=2).save_model_to_file(str(path))
