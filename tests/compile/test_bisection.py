from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import onnx
import pytest
import tvm.ir
from onnx import parser
from tvm import relax

from optimizer.bisection import bisect
from optimizer.compile import CompileOptions, find_target
from optimizer.frontend.model_file import ModelFile, read_model
from passes import pipeline
from passes.base import Dataflow, Pass, PatternPass

_RIGHT = "eliminate-common-subexpressions"


@dataclass(frozen=True)
class WrongExponential(PatternPass[tvm.ir.Call]):
    """Takes exp(x) for 1 + x, which is only right for exp(0)."""

    name: ClassVar[str] = "wrong-exponential"

    def pattern(self, expr: relax.Expr, dataflow: Dataflow) -> tvm.ir.Call | None:
        return dataflow.call(expr, "relax.exp")

    def check(self, match: tvm.ir.Call, dataflow: Dataflow) -> None:
        pass

    def rewrite(self, match: tvm.ir.Call) -> relax.Expr:
        return relax.op.add(match.args[0], relax.const(1.0))


@pytest.fixture
def model(tmp_path: Path) -> ModelFile:
    """exp(0 * x), where the wrong pass does no harm, then exp(x), where it does."""
    path = tmp_path / "model.onnx"
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        exponentials (float[2,3] x) => (float[2,3] y)
        {
            [difference] zero = Sub (x, x)
            [harmless] one = Exp (zero)
            [harmed] e = Exp (x)
            [sum] y = Add (one, e)
        }
    """
    onnx.save(parser.parse_model(text), path)
    return read_model(path)


@pytest.mark.parametrize("wrong", [0, 1, 2])
def test_the_wrong_pass_and_the_first_wrong_site_are_found(model: ModelFile, wrong: int) -> None:
    passes: list[Pass] = list(pipeline.parse(f"{_RIGHT},{_RIGHT}"))
    passes.insert(wrong, WrongExponential())
    finding = bisect(model, CompileOptions(find_target("host")), passes)
    assert isinstance(finding.guilty, WrongExponential)
    assert finding.site is not None
    assert finding.site.nodes == ("harmed",)
    assert finding.error is not None
    assert "'y' differs" in finding.error


def test_right_passes_are_not_accused(model: ModelFile) -> None:
    finding = bisect(model, CompileOptions(find_target("host")), pipeline.parse(pipeline.DEFAULT))
    assert finding.error is None
    assert finding.guilty is None
