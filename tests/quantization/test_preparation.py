from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest

from optimizer.compile import CompileOptions, find_target, import_with, parse_passes
from optimizer.errors import OptionError, QualityError
from optimizer.package.entry_points import EntryPoint, TensorSpec
from optimizer.quantization.preparation import Calibration, prepared, refitted
from optimizer.quantization.quality import Gate
from optimizer.quantization.samples import OWN, Samples, given_samples, token_inputs
from passes.quantization.error_feedback import fit_to_inputs
from passes.quantize_weights import QuantizeWeights

DECODER = Path(__file__).resolve().parents[2] / "examples" / "decoder"


def _prepared(options: CompileOptions, gate: Gate) -> tuple[QuantizeWeights, object]:
    imported = import_with(options, onnx.load(DECODER / "model.onnx"), "")
    items, report = prepared(parse_passes(options), imported, Calibration((), DECODER, gate))
    return next(item for item in items if isinstance(item, QuantizeWeights)), report


@pytest.fixture
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let models make up less text and fit to it by one sweep: what is decided is tested, not how good it is."""
    monkeypatch.setattr("optimizer.quantization.samples.OWN_WINDOWS", 16)
    monkeypatch.setattr("optimizer.quantization.fitting.fit_to_inputs", partial(fit_to_inputs, sweeps=1))


@pytest.mark.usefixtures("little_text")
def test_matrices_are_raised_until_the_limit_holds_the_most_sensitive_first() -> None:
    options = CompileOptions(find_target("host"), weights="int4", weight_method="gptq", weight_group=128)
    item, report = _prepared(options, Gate(0.01, None))
    assert item.calibration == OWN
    assert item.fitted
    assert report.before.kl > 0.01 >= report.after.kl
    assert [each.alone for each in report.raised] == sorted((each.alone for each in report.raised), reverse=True)
    assert all(each.after.kl > 0.01 for each in report.raised[:-1])
    assert len(item.precisions.rules) == len(report.raised)
    # The table that is the head, too, is what the model is most sensitive to.
    assert report.raised[0].nodes == ("node_embedding", "node_linear_21")


@pytest.mark.usefixtures("little_text")
def test_weights_are_fitted_again_as_they_were() -> None:
    options = CompileOptions(find_target("host"), weights="int4", weight_method="gptq", weight_group=128)
    imported = import_with(options, onnx.load(DECODER / "model.onnx"), "")
    items, _ = prepared(parse_passes(options), imported, Calibration(gate=Gate(1.0, None)))
    once = next(item for item in items if isinstance(item, QuantizeWeights))
    bare = [replace(item, fitted=None) if item is once else item for item in items]
    again = refitted(bare, imported, Calibration())
    assert again is not None
    twice = next(item for item in again if isinstance(item, QuantizeWeights))
    assert once.fitted
    assert twice.fitted
    assert once.fitted.keys() == twice.fitted.keys()
    for digest, fit in once.fitted.items():
        np.testing.assert_array_equal(twice.fitted[digest].matrix.codes, fit.matrix.codes)


@pytest.mark.usefixtures("little_text")
def test_a_limit_that_int8_does_not_keep_is_an_error_with_the_fix() -> None:
    with pytest.raises(QualityError, match=r"even with all matrices in int8: allow more with --max-kl") as error:
        _prepared(CompileOptions(find_target("host"), weights="int8"), Gate(1e-7, None))
    words = str(error.value).replace(",", "").split()
    told = Gate(*(float(words[words.index(option) + 1]) for option in ("--max-kl", "--max-flips")))
    assert _prepared(CompileOptions(find_target("host"), weights="int8"), told)


def test_limits_need_weights_to_round() -> None:
    with pytest.raises(OptionError, match=r"give --weights int4$"):
        prepared((), None, Calibration(gate=Gate(0.1, None)))  # pyright: ignore[reportArgumentType] -- not looked at


ENTRY = EntryPoint(
    "main",
    (
        TensorSpec("input_ids", "int64", ("batch", "sequence")),
        TensorSpec("attention_mask", "int64", ("batch", "total")),
        TensorSpec("past_key_values.0.key", "float16", ("batch", 2, "past", 32)),
    ),
    (TensorSpec("logits", "float32", ("batch", "sequence", 2048)),),
    (),
    (),
)


def test_tokens_are_read_with_nothing_before_them() -> None:
    inputs = token_inputs(ENTRY, np.zeros((3, 5), np.int64))
    assert {name: (array.shape, array.dtype.name) for name, array in inputs.items()} == {
        "input_ids": ((3, 5), "int64"),
        "attention_mask": ((3, 5), "int64"),
        "past_key_values.0.key": ((3, 2, 0, 32), "float16"),
    }
    other = EntryPoint("main", (*ENTRY.inputs, TensorSpec("labels", "int64", ("batch",))), ENTRY.outputs, (), ())
    with pytest.raises(OptionError, match=r"^nothing is known of the input 'labels: int64\[batch\]'; give"):
        token_inputs(other, np.zeros((3, 5), np.int64))


def test_a_text_becomes_windows_and_every_fourth_call_judges(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("In the beginning God created the heavens and the earth. " * 200, encoding="utf-8")
    samples = given_samples((text,), ENTRY, DECODER)
    assert {call["input_ids"].shape for call in samples.calls} == {(4, 128)}
    calls = tuple({"x": np.array(place)} for place in range(9))
    fitting, judging = Samples(calls, "").divided()
    assert [int(call["x"]) for call in fitting.calls] == [0, 1, 2, 4, 5, 6, 8]
    assert [int(call["x"]) for call in judging.calls] == [3, 7]
    with pytest.raises(OptionError, match=r"does not exist; give a text or an .npz"):
        given_samples((tmp_path / "none",), ENTRY, DECODER)
    text.write_bytes(b"a \xff")
    with pytest.raises(OptionError, match=r"neither a text in UTF-8 nor an \.npz"):
        given_samples((text,), ENTRY, DECODER)
