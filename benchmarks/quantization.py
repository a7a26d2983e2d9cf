"""Full-size models quantized to 8 bits as their makers do it: onnxruntime's static quantization, in QDQ form."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

Array = np.ndarray
# What has weights. Of other operators convolutional networks quantize these, too, so that whole blocks stay in codes;
# encoders keep attention, normalizations and residual sums as floats.
_PRODUCTS = ["MatMul", "Gemm"]
_IMAGES = ["Conv", "MatMul", "Gemm", "Add", "MaxPool", "GlobalAveragePool", "AveragePool", "Clip", "Relu"]


class _Samples(CalibrationDataReader):
    def __init__(self, cases: Mapping[str, Mapping[str, Array]]) -> None:
        self._samples: Iterator[dict[str, Array]] = iter([dict(inputs) for inputs in cases.values()])

    def get_next(self) -> dict[str, Array]:
        """Return the inputs of one run, none after the last."""
        return next(self._samples, {})


def quantize(model: Path, output: Path, cases: Mapping[str, Mapping[str, Array]], *, images: bool) -> None:
    """Write `model` with uint8 activations per tensor and int8 weights per channel, calibrated on inputs by case."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder) / "prepared.onnx"
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
        graph = onnx.load(prepared, load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer}
        attention = [node.name for node in graph.node if node.op_type == "MatMul" and not weights & set(node.input)]
        quantize_static(
            str(prepared),
            str(output),
            _Samples(cases),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=_IMAGES if images else _PRODUCTS,
            nodes_to_exclude=attention,
        )
