from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from optimizer.compile import CompileOptions, compile_in_memory, find_target
from optimizer.frontend.importer import import_model
from optimizer.lowering import lower

_TARGETS = ("x86-avx2", "host")


def _model(text: str, **initializers: np.ndarray) -> onnx.ModelProto:
    model = parser.parse_model(text)
    for name, array in initializers.items():
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def _embedding() -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    words, positions = (rng.standard_normal((count, 24), dtype=np.float32) for count in (50, 7))
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        embedding (int64[2,7] ids, int64[7] places) => (float[2,7,24] y)
        {
            w = Gather (words, ids)
            p = Gather (positions, places)
            s = Add (w, p)
            y = Tanh (s)
        }
    """
    return _model(text, words=words, positions=positions)


def test_embeddings_and_their_sum_are_one_kernel() -> None:
    lowered = lower(import_model(_embedding()).module, find_target("host"))
    assert [(len(kernel.nodes), kernel.regions) for kernel in lowered.kernels] == [(1, 1)]


@pytest.mark.parametrize("target", _TARGETS)
def test_fused_gathers_read_from_both_ends(target: str) -> None:
    model = _embedding()
    words, positions = map(numpy_helper.to_array, model.graph.initializer)
    ids = np.array([[0, 49, -1, -50, 7, 3, 3], [1, 2, 3, 4, 5, 6, 48]])
    places = np.array([0, 1, -1, 3, -7, 5, 6])
    outputs = compile_in_memory(model, CompileOptions(find_target(target)))({"ids": ids, "places": places})
    np.testing.assert_allclose(outputs["y"], np.tanh(words[ids] + positions[places]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", _TARGETS)
def test_what_is_gathered_may_be_computed_and_summed(target: str) -> None:
    """A gather of computed data, along the axis that vectors lie on, under a reduction."""
    text = """
        <ir_version: 8, opset_import: ["" : 17]>
        gathered (float[33,40] x, int64[5,21] ids) => (float[33,5] y)
        {
            a = Mul (x, x)
            g = Gather <axis = 1> (a, ids)
            y = ReduceSum <keepdims = 0> (g, axes)
        }
    """
    model = _model(text, axes=np.array([2]))
    rng = np.random.default_rng(2)
    x, ids = rng.standard_normal((33, 40), dtype=np.float32), rng.integers(-40, 40, (5, 21))
    outputs = compile_in_memory(model, CompileOptions(find_target(target)))({"x": x, "ids": ids})
    np.testing.assert_allclose(outputs["y"], (x * x)[:, ids].sum(-1), rtol=1e-5)
