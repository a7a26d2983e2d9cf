from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from optimizer.cli import main


class Finished(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def optimizer(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Finished]:
    """The command line, run in this process."""

    def run(*arguments: str | Path) -> Finished:
        monkeypatch.setattr(sys, "argv", ["optimizer", *map(str, arguments)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capfd.readouterr()
        return Finished(code, captured.out, captured.err)

    return run


@pytest.fixture
def perceptron(tmp_path: Path) -> Path:
    """A two-layer perceptron with a dynamic batch."""
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 18]>
        perceptron (float[batch, 64] x) => (float[batch, 10] y) {
            hidden = MatMul(x, w1)
            active = Relu(hidden)
            y = MatMul(active, w2)
        }
    """)
    rng = np.random.default_rng(0)
    for name, shape in (("w1", (64, 32)), ("w2", (32, 10))):
        model.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(shape, dtype=np.float32), name))
    path = tmp_path / "perceptron.onnx"
    onnx.save(model, path)
    return path
