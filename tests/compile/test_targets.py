"""One convolutional network and the bundled decoder, compiled for every target and run where something here can."""

from __future__ import annotations

import filecmp
from pathlib import Path

import numpy as np
import pytest

from optimizer.certification import run_emulated
from optimizer.compile import CompileOptions, compile_model, find_target
from optimizer.runtime import load
from targets import device_code
from targets.emulator import Emulator
from tests.models.catalog import MODELS

_DECODER = Path(__file__).parents[2] / "examples" / "decoder" / "model.onnx"
_RESNET = next(model for model in MODELS if model.name == "resnet" and model.exporter == "dynamo")
_PATHS = {"resnet": _RESNET.path, "decoder": _DECODER}
_EMULATOR_REASON = Emulator().available()

emulator = pytest.mark.skipif(_EMULATOR_REASON is not None, reason=str(_EMULATOR_REASON))


def _compile(name: str, target: str, folder: Path, *, certify: bool = True) -> Path:
    folder.mkdir(exist_ok=True)
    package = folder / f"{name}.opt"
    compile_model(_PATHS[name], package, CompileOptions(find_target(target)), certify=certify)
    return package


@pytest.mark.parametrize("target", ["host", "x86-avx2"])
@pytest.mark.parametrize("name", ["resnet", "decoder"])
def test_x86_packages_are_certified_and_run(name: str, target: str, tmp_path: Path) -> None:
    model = load(_compile(name, target, tmp_path))
    assert model.manifest.certificate is not None
    assert all(output.ok for output in model.manifest.certificate.outputs)


@pytest.mark.emulator
@emulator
@pytest.mark.parametrize("target", ["arm64", "arm64-i8mm"])
def test_arm64_results_match_x86(target: str, tmp_path: Path) -> None:
    case = _RESNET.case(_RESNET.cases[0])
    package = _compile("resnet", target, tmp_path, certify=False)
    native = load(_compile("resnet", "host", tmp_path / "native", certify=False))(case.inputs)
    emulated = run_emulated(package, find_target(target), case.inputs)
    for name, wanted in native.items():
        np.testing.assert_allclose(emulated[name], wanted, rtol=1e-4, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.emulator
@emulator
def test_arm64_decoder_is_certified_under_the_emulator(tmp_path: Path) -> None:
    package = tmp_path / "decoder"
    result = compile_model(_DECODER, package, CompileOptions(find_target("arm64")))
    assert result.certification.note == "emulator"
    assert result.manifest.certificate is not None


@pytest.mark.parametrize("name", ["resnet", "decoder"])
def test_cuda_packages_hold_device_code_and_no_source(name: str, tmp_path: Path) -> None:
    package = tmp_path / name
    compile_model(_PATHS[name], package, CompileOptions(find_target("cuda", ["sm_80", "sm_90"])))
    library = package / "model.so"
    found = {(code.form, code.architecture) for code in device_code.inspect(library)}
    assert {("cubin", "sm_80"), ("cubin", "sm_90")} <= found
    assert b"__global__" not in library.read_bytes()


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["resnet", "decoder"])
def test_cuda_packages_are_certified_on_a_gpu(name: str, tmp_path: Path) -> None:
    from targets.gpu import gpus

    if not gpus():
        pytest.skip("no NVIDIA GPU with a driver")
    assert load(_compile(name, "cuda", tmp_path)).manifest.certificate is not None


@pytest.mark.parametrize("name", ["resnet", "decoder"])
def test_two_compiles_give_the_same_bytes(name: str, tmp_path: Path) -> None:
    packages = [_compile(name, "host", tmp_path / folder) for folder in ("first", "second")]
    assert filecmp.cmp(*packages, shallow=False)
