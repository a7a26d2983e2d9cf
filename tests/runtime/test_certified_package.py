"""A package certifies itself before it appears: the writer stages it, the runtime loads it, the reference judges it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.parser import parse_model

from optimizer.certificate import certify
from optimizer.errors import CertificateError
from optimizer.package.manifest import Certificate
from optimizer.package.reader import open_package
from optimizer.package.writer import Weight, write_package
from optimizer.runtime import load

WritePackage = Callable[..., Path]


def linear_model(weights: list[Weight]) -> onnx.ModelProto:
    """Return the ONNX model that the hand-built Relax module implements."""
    model = parse_model(
        '<ir_version: 10, opset_import: ["" : 21]>'
        ' g (float[rows, 4] "x.0/data", float scale) => (float[rows, 8] y, float[flat_rows] flat, float[4, 8] weight)'
        '{ scaled = Mul("x.0/data", scale) product = MatMul(scaled, matrix) y = Add(product, bias)'
        ' minus_one = Constant<value = int64[1] {-1}>() flat = Reshape("x.0/data", minus_one)'
        " weight = Identity(matrix) }"
    )
    matrix, bias = (weight.array.astype(np.float32) for weight in weights)
    model.graph.initializer.extend([numpy_helper.from_array(matrix, "matrix"), numpy_helper.from_array(bias, "bias")])
    return model


@pytest.fixture
def certified_write(
    write_linear: WritePackage, linear_weights: list[Weight], tmp_path: Path
) -> Callable[[Path], Certificate | None]:
    """Write the linear package again with another library, certified against the ONNX model."""

    def write(library: Path) -> Certificate | None:
        manifest = open_package(write_linear("plain")).manifest
        model = linear_model(linear_weights)
        write_package(
            tmp_path / "certified.opt",
            manifest,
            library,
            linear_weights,
            certify=lambda folder: certify(model, load(folder)),
        )
        return open_package(tmp_path / "certified.opt").manifest.certificate

    return write


def test_right_package_carries_its_certificate(
    certified_write: Callable[[Path], Certificate | None], linear_library: Path
) -> None:
    certificate = certified_write(linear_library)
    assert certificate is not None
    assert [output.name for output in certificate.outputs] == ["y", "flat", "weight"]
    assert all(output.ok for output in certificate.outputs)


def test_wrong_package_is_not_written(
    certified_write: Callable[[Path], Certificate | None], doubling_library: Path, tmp_path: Path
) -> None:
    with pytest.raises(CertificateError, match="'y' differs"):
        certified_write(doubling_library)
    assert not (tmp_path / "certified.opt").exists()
