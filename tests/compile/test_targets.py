"""One convolutional network and the bundled decoder, compiled for every target and run where something here can."""

from __future__ import annotations

import filecmp
import itertools
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper, parser

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


@pytest.mark.emulator
@emulator
def test_arm64_products_of_codes_are_certified_under_the_emulator(tmp_path: Path) -> None:
    """Of 4 and 8 bits, with and without zero points, for tiles of all heights."""
    random = np.random.default_rng(0)
    nodes, constants = [], {}
    for bits, zero_points in itertools.product((4, 8), (False, True)):
        given = {
            "w": random.integers(0, 256, (37, 3, 4 * bits), dtype=np.uint8),
            "s": random.random((37, 3), dtype=np.float32),
        }
        if zero_points:
            given["z"] = random.integers(0, 256, (37, -(-3 * bits // 8)), dtype=np.uint8)
        case = f"{bits}{zero_points}"
        constants |= {f"{name}{case}": array for name, array in given.items()}
        inputs = ["x", *(f"{name}{case}" for name in given)]
        sizes = {"K": 96, "N": 37, "bits": bits, "block_size": 32}
        nodes.append(helper.make_node("MatMulNBits", inputs, [f"y{case}"], domain="com.microsoft", **sizes))
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [15, 96])],
        [helper.make_tensor_value_info(node.output[0], onnx.TensorProto.FLOAT, [15, 37]) for node in nodes],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "model.onnx")
    result = compile_model(tmp_path / "model.onnx", tmp_path / "package", CompileOptions(find_target("arm64")))
    assert result.certification.note == "emulator"
    assert [weight.dtype for weight in result.manifest.weights] == ["uint8"] * len(nodes)


@pytest.mark.parametrize("name", ["resnet", "decoder"])
def test_cuda_packages_hold_device_code_and_no_source(name: str, tmp_path: Path) -> None:
    package = tmp_path / name
    compile_model(_PATHS[name], package, CompileOptions(find_target("cuda", ["sm_80", "sm_90"])))
    library = package / "model.so"
    found = {(code.form, code.architecture) for code in device_code.inspect(library)}
    assert {("cubin", "sm_80"), ("cubin", "sm_90")} <= found
    assert b"__global__" not in library.read_bytes()


@pytest.mark.parametrize("length", [100, 1000], ids=["merged", "by_digits"])
def test_sorts_compile_for_cuda(length: int, tmp_path: Path) -> None:
    model = parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[4,{length}] x) => (float[4,70] y, int64[4,70] i) <int64[1] k = {{70}}> {{ y, i = TopK(x, k) }}
    """)
    onnx.save(model, tmp_path / "model.onnx")
    compile_model(tmp_path / "model.onnx", tmp_path / "package", CompileOptions(find_target("cuda", ["sm_80"])))
    assert device_code.inspect(tmp_path / "package" / "model.so")


def test_dimensions_may_have_names_that_languages_reserve(tmp_path: Path) -> None:
    model = parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 18]>
        g (float[new, class, namespace] x) => (float[new, class, namespace] y) { y = Softmax(x) }
    """)
    onnx.save(model, tmp_path / "model.onnx")
    package = tmp_path / "softmax"
    result = compile_model(tmp_path / "model.onnx", package, CompileOptions(find_target("cuda", ["sm_80"])))
    assert [spec.shape for spec in result.manifest.entry_points[0].inputs] == [("new", "dim_class", "namespace")]


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
