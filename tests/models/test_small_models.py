"""The committed models are complete, and their reference outputs are what onnxruntime gives."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.architecture import EXPORTERS
from benchmarks.architectures import ARCHITECTURES
from tests.models.catalog import MODELS, ExportedModel

# Two builds of onnxruntime may sum in another order: a hundred roundings of 2**-23, of the largest value.
TOLERANCE = 100 * 2.0**-23


def test_every_architecture_has_the_files_of_both_exporters():
    made = {(model.name, model.exporter): model.cases for model in MODELS}
    assert made == {
        (name, exporter): tuple(architecture.small.cases)
        for name, architecture in ARCHITECTURES.items()
        for exporter in EXPORTERS
    }


def test_an_unknown_case_is_refused_with_the_known_ones():
    with pytest.raises(KeyError, match=f"it has {', '.join(MODELS[0].cases)}"):
        MODELS[0].case("absent")


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.path.stem)
def test_onnxruntime_gives_the_reference_outputs(model: ExportedModel):
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model.path), options, providers=["CPUExecutionProvider"])
    for name in model.cases:
        case = model.case(name)
        assert [value.name for value in session.get_inputs()] == list(case.inputs)
        outputs = session.run(list(case.outputs), case.inputs)
        for (output, expected), actual in zip(case.outputs.items(), outputs, strict=True):
            limit = TOLERANCE * np.abs(expected).max()
            np.testing.assert_allclose(actual, expected, rtol=0, atol=limit, err_msg=f"{name}, {output}")
