"""Committed decoders, compiled to packages for this machine, give what the models in ONNX give, and generate it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from optimizer.compile import CompileOptions, compile_model, find_target
from optimizer.runtime import load
from optimizer.runtime.model import CompiledModel
from tests.frontend.comparison import Runner, theirs
from tests.models.catalog import MODELS, ExportedModel
from tests.models.comparison import TOLERANCE, require_equal_texts, require_reference_outputs

PLAIN = [model for model in MODELS if model.keeps_a_cache]
NARROW = {path.stem: path for path in sorted((Path(__file__).parent / "narrow").glob("*.onnx"))}
# Two layers with a rounding after every operator, of which what is compiled has few.
NARROW_TOLERANCES = {"float16": 16 * 2.0**-11, "bfloat16": 16 * 2.0**-8}


def compiled(path: Path, folder: Path) -> CompiledModel:
    compile_model(path, folder / "model.opt", CompileOptions(find_target("host")), certify=False)
    return load(folder / "model.opt")


@pytest.fixture(scope="module", params=PLAIN, ids=lambda model: model.path.stem)
def plain(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ExportedModel, CompiledModel]:
    """Return a plain export, and what is compiled of it."""
    return request.param, compiled(request.param.path, tmp_path_factory.mktemp(request.param.path.stem))


def test_plain_exports_give_the_reference_outputs(plain: tuple[ExportedModel, CompiledModel]) -> None:
    exported, model = plain
    require_reference_outputs(model, exported)


def test_plain_exports_generate_onnxruntimes_tokens(plain: tuple[ExportedModel, CompiledModel]) -> None:
    exported, model = plain
    assert model.manifest.kv_cache_scheme == "4 tensors in place as float32"
    require_equal_texts(model, theirs(onnx.load(exported.path)), tolerance=TOLERANCE)


@pytest.mark.parametrize("name", NARROW)
def test_exports_of_16_bits_generate_the_references_tokens_from_caches_of_16_bits(name: str, tmp_path: Path) -> None:
    dtype = name.rsplit("_", 1)[1]
    model = compiled(NARROW[name], tmp_path)
    assert model.manifest.kv_cache_scheme == f"4 tensors in place as {dtype}"
    require_equal_texts(model, narrow_reference(NARROW[name]), tolerance=NARROW_TOLERANCES[dtype])


def narrow_reference(path: Path) -> Runner:
    """Return onnxruntime for float16, and ONNX's own evaluator for bfloat16, which onnxruntime has not on CPUs."""
    model = onnx.load(path)
    if "bfloat16" not in path.stem:
        return theirs(model)
    evaluator, names = ReferenceEvaluator(model), [output.name for output in model.graph.output]
    return lambda inputs: dict(zip(names, map(np.asarray, evaluator.run(names, dict(inputs))), strict=True))
