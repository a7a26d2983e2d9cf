"""A right model gets a certificate, a wrong one an error that says how wrong."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from onnx.parser import parse_model

from optimizer.certificate import certify, references
from optimizer.certificate.comparison import MOST_LOOSENED, compare, loosened
from optimizer.certificate.tolerance import Arithmetic, arithmetic
from optimizer.certificate.unsigned_weights import with_unsigned_weights
from optimizer.errors import CertificateError, InputMismatchError
from optimizer.package.manifest import OutputComparison

Array = NDArray[np.generic]
Runner = Callable[[Mapping[str, Array]], dict[str, Array]]

MATRIX = np.random.default_rng(7).standard_normal((16, 3)).astype(np.float32)


def linear() -> onnx.ModelProto:
    """A model with a dynamic batch: y = x @ matrix, best = argmax(y)."""
    subject = parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[batch, 16] x) => (float[batch, 3] y, int64[batch] best)'
        "{ y = MatMul(x, matrix) best = ArgMax<axis = 1, keepdims = 0>(y) }"
    )
    subject.graph.initializer.append(numpy_helper.from_array(MATRIX, "matrix"))
    return subject


def right(inputs: Mapping[str, Array]) -> dict[str, Array]:
    y = (inputs["x"].astype(np.float64) @ MATRIX).astype(np.float32)
    return {"y": y, "best": y.argmax(axis=1)}


def test_right_model_gets_a_certificate() -> None:
    certificate = certify(linear(), right)
    assert certificate.reference == ("onnxruntime" if importlib.util.find_spec("onnxruntime") else "onnx")
    assert certificate.seeds == (0, 1)
    assert certificate.settings == ({"batch": 2}, {"batch": 1})
    y, best = certificate.outputs
    assert (y.name, y.dtype, y.ok) == ("y", "float32", True)
    assert 0 < y.max_relative_error <= y.tolerance
    assert y.cosine_similarity == pytest.approx(1, abs=1e-6)
    assert (best.max_absolute_error, best.tolerance, best.cosine_similarity) == (0, 0, None)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("y", lambda y: y * np.float32(1.001), r"'y' differs by .* tolerance"),
        ("y", lambda y: np.where(np.arange(3) == 1, np.nan, y).astype(np.float32), "'y' has NaN or infinity where"),
        ("best", lambda best: best + 1, r"'best' differs by 1 .* tolerance 0\)"),
        ("y", lambda y: y.astype(np.float64), r"'y' is float64\[2, 3\], but the reference gives float32\[2, 3\]"),
        ("y", lambda y: y[:1], r"'y' is float32\[1, 3\], but the reference gives float32\[2, 3\]"),
    ],
    ids=["inexact", "NaN", "integer", "dtype", "shape"],
)
def test_wrong_output_is_named_with_its_error(name: str, change: Callable[[Array], Array], message: str) -> None:
    def wrong(inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = right(inputs)
        return {**outputs, name: change(outputs[name])}

    with pytest.raises(CertificateError, match=message):
        certify(linear(), wrong)


def test_error_in_the_second_run_alone_is_found() -> None:
    def wrong_for_one_row(inputs: Mapping[str, Array]) -> dict[str, Array]:
        outputs = right(inputs)
        return outputs if len(inputs["x"]) > 1 else {**outputs, "y": -outputs["y"]}

    with pytest.raises(CertificateError, match="'y' differs"):
        certify(linear(), wrong_for_one_row)


def test_missing_output_is_named() -> None:
    with pytest.raises(CertificateError, match="no output 'best'"):
        certify(linear(), lambda inputs: {"y": right(inputs)["y"]})


def test_package_that_refuses_the_inputs_fails() -> None:
    def refuse(inputs: Mapping[str, Array]) -> dict[str, Array]:
        raise InputMismatchError(f"{len(inputs)} is one too many")

    message = r"refuses inputs that the reference accepts; .*--shape.* the same name or number: 1 is one too many"
    with pytest.raises(CertificateError, match=message):
        certify(linear(), refuse)


def test_exact_interpolation_agrees_with_positions_that_the_reference_rounds() -> None:
    size, scale = 200, np.float32(1.37)
    resized = int(size * scale)
    subject = parse_model(
        f'<ir_version: 10, opset_import: ["" : 18]> g (float[1, {size}] x) => (float[1, {resized}] y)'
        f'<float[2] scales = {{1.0, 1.37}}> {{ y = Resize<mode = "linear">(x, , scales) }}'
    )
    places = np.clip((np.arange(resized) + 0.5) / float(scale) - 0.5, 0, size - 1)

    def exact(inputs: Mapping[str, Array]) -> dict[str, Array]:
        row = inputs["x"][0].astype(np.float64)
        return {"y": np.interp(places, np.arange(size), row)[None].astype(np.float32)}

    assert all(output.ok for output in certify(subject, exact).outputs)


def test_fixed_shapes_are_used() -> None:
    certificate = certify(linear(), right, shapes={"x": (4, 16)})
    assert certificate.settings == ({}, {})


def test_external_data_are_found_beside_the_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(linear(), path, save_as_external_data=True, size_threshold=0)
    subject = onnx.load(path, load_external_data=False)
    assert all(each.ok for each in certify(subject, right, path=path).outputs)


def of_4_bits(accuracy_level: int, activations: str) -> tuple[onnx.ModelProto, Runner]:
    """A product with weights of 4 bits in one block each, and a package whose activations are floats or int8."""
    codes = np.random.default_rng(3).integers(0, 256, (8, 1, 16), np.uint8)
    scales = np.full((8, 1), 0.25, np.float32)
    subject = parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]> g (float[batch, 32] x) => (float[batch, 8] y)'
        "{ y = com.microsoft.MatMulNBits<K = 32, N = 8, bits = 4, block_size = 32,"
        f" accuracy_level = {accuracy_level}>(x, codes, scales) }}"
    )
    subject.graph.initializer.extend(
        [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    )
    matrix = np.stack([codes & 15, codes >> 4], -1).reshape(8, 32).astype(np.float64) - 8

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        x = inputs["x"].astype(np.float64)
        if activations == "int8":
            step = np.abs(x).max(1, keepdims=True) / 127
            x = np.rint(x / step) * step
        return {"y": (x @ matrix.T * 0.25).astype(np.float32)}

    return subject, run


@pytest.mark.parametrize("accuracy_level", [0, 4])
@pytest.mark.parametrize("activations", ["int8", "float"])
def test_onnxruntime_rounds_activations_where_the_package_does(
    accuracy_level: int, activations: str, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    subject, run = of_4_bits(accuracy_level, activations)
    path = tmp_path / "model.onnx"
    onnx.save(subject, path, save_as_external_data=True, size_threshold=0)
    certificate = certify(onnx.load(path, load_external_data=False), run, path=path, activations=activations)
    (y,) = certificate.outputs
    assert y.max_relative_error < 16 * 2.0**-24


def without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        references.importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name)
    )


def test_onnx_evaluator_stands_in_for_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    without_onnxruntime(monkeypatch)
    certificate = certify(linear(), right)
    assert (certificate.reference, certificate.reference_version) == ("onnx", onnx.__version__)


def foreign() -> onnx.ModelProto:
    """A model with an operator that no reference knows."""
    return parse_model(
        '<ir_version: 10, opset_import: ["" : 21, "test.foreign" : 1]> g (float[3] x) => (float[3] y)'
        "{ y = test.foreign.Unknown(x) }"
    )


def test_unoptimized_module_is_the_last_resort() -> None:
    certificate = certify(foreign(), lambda inputs: {"y": inputs["x"]}, unoptimized=lambda inputs: {"y": inputs["x"]})
    assert certificate.reference == "unoptimized"


def test_without_any_reference_all_reasons_are_told() -> None:
    with pytest.raises(CertificateError, match=r"no reference can run this model \(.*Unknown.*\); give input shapes"):
        certify(foreign(), lambda inputs: {"y": inputs["x"]})


@pytest.mark.parametrize("kind", ["dequantized", "unoptimized"])
def test_a_module_that_fails_at_every_input_is_no_reference(kind: str) -> None:
    def fails(inputs: Mapping[str, np.ndarray]) -> NoReturn:
        raise RuntimeError(f"sizes do not fit: {sorted(inputs)}")

    with pytest.raises(CertificateError, match=rf"no reference can run this model \(.*{kind}: sizes do not fit"):
        certify(foreign(), lambda inputs: {"y": inputs["x"]}, **{kind: fails})


def test_first_sizes_that_the_reference_refuses_are_replaced() -> None:
    subject = parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (float[batch, 4] x) => (float[1, 4] y)'
        "{ s = Constant<value = int64[2] {1, 4}>() y = Reshape(x, s) }"
    )
    certificate = certify(subject, lambda inputs: {"y": inputs["x"]})
    assert certificate.settings == ({"batch": 1}, {"batch": 1})


EXACT = Arithmetic(depth=1, terms=1, unit_roundoff=2.0**-24, quantizes=False)


@pytest.mark.parametrize("values", [[np.inf, 1], [-np.inf, np.nan], []])
def test_non_finite_and_empty_outputs_compare_by_place(values: list[float]) -> None:
    array = np.array(values, np.float32)
    assert compare("y", array, array.copy(), 0.0).ok


def test_infinity_of_the_other_sign_differs() -> None:
    assert not compare("y", np.array([np.inf]), np.array([-np.inf]), 1.0).ok


def test_outputs_below_the_normal_numbers_may_be_zero() -> None:
    expected = np.float32([1.8e-40, -3e-41])

    assert compare("y", expected, np.zeros_like(expected), 1e-6).ok
    assert not compare("y", expected, expected + np.float32(2e-38), 1e-6).ok


def test_numbers_below_the_normal_ones_of_fp16_have_few_digits_to_agree_in() -> None:
    expected = np.float16([6e-7, -3e-7])

    assert compare("y", expected, expected + np.float16(6e-8), 1e-2).ok
    assert not compare("y", expected, expected + np.float16(2e-6), 1e-2).ok


def test_unsigned_integers_do_not_wrap() -> None:
    comparison = compare("y", np.array([0], np.uint8), np.array([255], np.uint8), 1.0)
    assert (comparison.max_absolute_error, comparison.ok) == (255, False)


def test_tolerance_grows_with_depth_and_terms_but_keeps_half_the_digits() -> None:
    shallow, deep = EXACT.tolerance("float32"), Arithmetic(100, 1, 2.0**-24, False).tolerance("float32")
    wide = Arithmetic(1, 4096, 2.0**-24, False).tolerance("float32")
    assert shallow == 32 * 2.0**-24
    assert deep == 10 * shallow
    assert wide == 16 * 65 * 2.0**-24
    assert Arithmetic(10_000, 10_000, 2.0**-24, False).tolerance("float32") == 2.0**-12
    assert Arithmetic(1, 1, 2.0**-8, False).tolerance("float32") == 2.0**-4


def test_only_quantizing_models_may_be_one_step_off() -> None:
    assert EXACT.tolerance("uint8") == 0
    assert Arithmetic(1, 1, 2.0**-24, quantizes=True).tolerance("uint8") == 1
    assert Arithmetic(1, 1, 2.0**-24, quantizes=True).tolerance("int64") == 0


def test_arithmetic_is_read_from_the_graph() -> None:
    assert arithmetic(linear()) == Arithmetic(depth=2, terms=16, unit_roundoff=2.0**-24, quantizes=False)
    assert arithmetic(linear(), "bfloat16").unit_roundoff == 2.0**-8


_CACHE = """
    <ir_version: 10, opset_import: ["" : 21]>
    g (float[batch, 2, past, 4] old, float[batch, 2, new, 4] added) => (float[batch, 2, total, 4] present)
    { present = Concat <axis = 2> (old, added) }
"""


def _stored_in_codes(error: float) -> Runner:
    """Return a package that gives back tokens before the newest 64 with an error, of the largest number."""

    def run(inputs: Mapping[str, Array]) -> dict[str, Array]:
        present = np.concatenate([inputs["old"], inputs["added"]], 2)
        present[:, :, :-64] += np.float32(error * np.abs(present).max())
        return {"present": present}

    return run


def test_one_run_has_a_past_that_reaches_into_the_codes_of_a_cache() -> None:
    subject = parse_model(_CACHE)
    certificate = certify(subject, _stored_in_codes(1 / 510), cache_bits=8)
    assert certificate.seeds == (0, 1, 2)
    assert [values["past"] for values in certificate.settings] == [3, 0, 101]
    (present,) = certificate.outputs
    assert 1 / 520 < present.max_relative_error < present.tolerance == 2.0**-4
    with pytest.raises(CertificateError, match="'present' differs"):
        certify(subject, _stored_in_codes(1 / 10), cache_bits=8)


def test_a_package_that_makes_steps_is_run_on_one_token_as_well() -> None:
    def wrong_for_one_token(inputs: Mapping[str, Array]) -> dict[str, Array]:
        present = right_cache(inputs)
        return {"present": -present if inputs["added"].shape[::2] == (1, 1) else present}

    subject = parse_model(_CACHE.replace("new", "sequence"))
    certificate = certify(subject, right_cache_alone, makes_steps=True)
    assert certificate.settings[2] == {"batch": 1, "past": 3, "sequence": 1}
    assert certify(subject, wrong_for_one_token).outputs[0].ok
    with pytest.raises(CertificateError, match="'present' differs"):
        certify(subject, wrong_for_one_token, makes_steps=True)


def test_runs_that_do_not_reach_into_codes_keep_their_tolerance() -> None:
    with pytest.raises(CertificateError, match="'present' differs"):
        certify(parse_model(_CACHE), lambda inputs: {"present": right_cache(inputs) * np.float32(1.001)}, cache_bits=8)


def right_cache(inputs: Mapping[str, Array]) -> Array:
    return np.concatenate([inputs["old"], inputs["added"]], 2)


def right_cache_alone(inputs: Mapping[str, Array]) -> dict[str, Array]:
    return {"present": right_cache(inputs)}


@pytest.mark.parametrize(
    ("error", "own", "ok"),
    [(0.5, 0.0, True), (1.5, 0.0, False), (1.5, 2.0, True), (2.5, 2.0, False), (5.0, 9.0, False)],
)
def test_an_output_may_be_as_far_off_as_the_reference_is_from_itself(error: float, own: float, *, ok: bool) -> None:
    tolerance = 2.0**-4

    def off(by: float) -> OutputComparison:
        return compare("y", np.ones(2, np.float32), np.array([1, 1 + by * tolerance], np.float32), tolerance)

    (found,) = loosened([off(error)], [off(own)])
    assert found.ok == ok
    assert tolerance <= found.tolerance <= MOST_LOOSENED * tolerance


@pytest.mark.skipif(not importlib.util.find_spec("onnxruntime"), reason="needs onnxruntime")
def test_a_perturbed_reference_has_the_next_number_for_each_of_fp32() -> None:
    model = linear()
    inputs = {"x": np.eye(16, dtype=np.float32)}
    (y, _) = references.perturbed_onnxruntime(model, None).run(inputs).values()
    np.testing.assert_array_equal(y, np.nextafter(MATRIX, np.float32(np.inf)))
    np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]), MATRIX)


def test_a_reference_that_cannot_compute_in_integers_allows_nothing_more() -> None:
    comparison = compare("y", np.ones(1, np.float32), np.array([2], np.float32), 0.5)
    assert loosened([comparison], []) == (comparison,)


EXTREMES = np.where(np.arange(32 * 4).reshape(32, 4) % 3 == 0, -128, 127).astype(np.int8)


@pytest.mark.parametrize("zero_point", [None, 3])
@pytest.mark.parametrize("saturates", [False, True])
def test_sums_of_bytes_that_saturate_elsewhere_are_certified(
    monkeypatch: pytest.MonkeyPatch, zero_point: int | None, saturates: bool
) -> None:
    """Whether this machine's onnxruntime needs unsigned weights or not: with them it computes the same."""
    if saturates:
        monkeypatch.setattr(references, "saturates", lambda: True)
    given = "" if zero_point is None else ", zero, other"
    subject = parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (uint8[batch, 32] x) => (int32[batch, 4] y)'
        f"{{ y = MatMulInteger(x, weights{given}) }}"
    )
    subject.graph.initializer.append(numpy_helper.from_array(EXTREMES, "weights"))
    subject.graph.initializer.append(numpy_helper.from_array(np.uint8(200), "zero"))
    subject.graph.initializer.append(numpy_helper.from_array(np.int8(zero_point or 0), "other"))
    offset = 0 if zero_point is None else 200

    def exact(inputs: Mapping[str, Array]) -> dict[str, Array]:
        x = inputs["x"].astype(np.int32) - offset
        return {"y": x @ (EXTREMES.astype(np.int32) - (zero_point or 0))}

    assert certify(subject, exact).outputs[0].max_absolute_error == 0


def test_weights_of_signed_activations_stay_signed(tmp_path: Path) -> None:
    subject = parse_model(
        '<ir_version: 10, opset_import: ["" : 21]> g (int8[batch, 32] x) => (int32[batch, 4] y)'
        "{ y = MatMulInteger(x, weights, zero) }"
    )
    subject.graph.initializer.append(numpy_helper.from_array(EXTREMES, "weights"))
    subject.graph.initializer.append(numpy_helper.from_array(np.int8(3), "zero"))
    subject.graph.node[0].input[:] = ["x", "weights", "zero", "zero"]
    assert with_unsigned_weights(subject, tmp_path) is None
