from __future__ import annotations

from pathlib import Path

import pytest

from optimizer.compile import CompileOptions, compile_model, find_target
from optimizer.runtime import load
from optimizer.runtime.model import CompiledModel

_MODEL = Path(__file__).parents[3] / "examples" / "decoder" / "model.onnx"


@pytest.fixture(scope="session")
def decoder_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled decoder, compiled for this machine."""
    package = tmp_path_factory.mktemp("decoder") / "decoder.opt"
    compile_model(_MODEL, package, CompileOptions(find_target("host")), certify=False)
    return package


@pytest.fixture(scope="session")
def decoder(decoder_package: Path) -> CompiledModel:
    return load(decoder_package)


@pytest.fixture(scope="session")
def returning_decoder(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    """The bundled decoder whose code returns its cache with every step, as the model in ONNX does."""
    package = tmp_path_factory.mktemp("decoder") / "returning.opt"
    compile_model(_MODEL, package, CompileOptions(find_target("host"), kv_cache="returned"), certify=False)
    return load(package)
