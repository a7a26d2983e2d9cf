"""Reading files: what onnxruntime's tools write beyond ONNX's own rules."""

from __future__ import annotations

from pathlib import Path

import onnx

from optimizer.frontend.model_file import read_model


def test_a_model_with_onnxruntimes_normalization_in_the_standard_domain_is_read(tmp_path: Path) -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["": 21]>
        norm (float[2, 8] x, float[8] scale) => (float[2, 8] y) {
            y = SimplifiedLayerNormalization <axis = -1, epsilon = 1e-5, stash_type = 1> (x, scale)
        }
    """)
    onnx.save(model, tmp_path / "norm.onnx")
    assert read_model(tmp_path / "norm.onnx").opset == 21
