"""Sizes and positions that inputs say by their values: what does not fit is refused, or read and written nowhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.parser import parse_model

from optimizer.compile import CompileOptions, compile_model, find_target
from optimizer.errors import InputMismatchError, InsufficientMemoryError
from optimizer.frontend.importer import import_model
from optimizer.reference import unoptimized
from optimizer.runtime import load
from tests.frontend.comparison import node_model, ours

DATA = np.arange(24, dtype=np.float32)


def model(signature: str, body: str) -> onnx.ModelProto:
    """Parse a model in ONNX's text form."""
    return parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g ({signature}) => (float y) {{ {body} }}')


REFUSED = [
    ("float[2, 3, 4] x, int64[2] s", "y = Reshape(x, s)", [[5, 5], [2, 3], [-5, -5], [2**62, 4], [-1, 5]]),
    ("float[2, 3, 4] x, int64[3] s", "y = Tile(x, s)", [[1, -1, 1], [2**60, 1, 1], [2**31 - 1, 3, 1]]),
    ("float[1, 24] x, int64[2] s", "y = Expand(x, s)", [[2**31, 24], [-3, 24]]),
    ("float[4, 6] x, int64[4] s", "y = Pad(x, s)", [[-9, 0, 0, 0], [2**60, 0, 0, 0]]),
    ("float[4, 6] x, int64[1] s", "y, i = TopK(x, s)", [[7], [-1]]),
    ("float[6, 4] x, int64[2] s", "y, z = Split(x, s)", [[3, 4], [7, -1]]),
    ("float[6, 4] x, int64[2] s", "y = ConstantOfShape(s)", [[2**31 - 1, 2**31 - 1], [-2, 3]]),
    ("float[1, 1, 4, 6] x, float[4] s", "y = Resize(x, , s)", [[1, 1, -1, 1], [1, 1, 1e30, 1], [1, 1, np.nan, 1]]),
    ("float[1, 4, 6] x, int64[2] s", "y = Col2Im(x, s, s)", [[0, 0], [1, 4], [2, 2]]),
]


@pytest.mark.parametrize(("signature", "body", "refused"), REFUSED, ids=[body for _, body, _ in REFUSED])
def test_sizes_that_do_not_fit_the_data_are_refused(signature: str, body: str, refused: list[list[float]]) -> None:
    subject = model(signature, body)
    data, sizes = subject.graph.input
    run = unoptimized(import_model(subject))
    shape = [dim.dim_value for dim in data.type.tensor_type.shape.dim]
    dtype = onnx.helper.tensor_dtype_to_np_dtype(sizes.type.tensor_type.elem_type)
    for values in refused:
        with pytest.raises(RuntimeError, match="match_cast error"):
            run({"x": np.resize(DATA, shape), "s": np.array(values, dtype)})


@pytest.mark.parametrize(("shape", "count"), [("4, 4", 15), ("2, -1", 15), ("-1, 4", 3)])
def test_data_that_do_not_fill_a_constant_shape_are_refused(shape: str, count: int) -> None:
    body = f"s = Constant<value_ints = [{shape}]>() y = Reshape(x, s)"
    run = unoptimized(import_model(model("float[n] x", body)))
    assert run({"x": np.resize(DATA, 16)})["y"].size == 16
    with pytest.raises(RuntimeError, match="match_cast error"):
        run({"x": np.resize(DATA, count)})


@pytest.mark.parametrize("position", [10**12, -(10**12)])
@pytest.mark.parametrize(
    ("operator", "shape", "index", "attributes"),
    [
        ("RoiAlign", (1, 1, 4, 6), (1,), {"output_height": 2, "output_width": 2}),
        ("MaxUnpool", (1, 1, 4, 6), (1, 1, 4, 6), {"kernel_shape": [2, 2], "strides": [2, 2]}),
        ("ReverseSequence", (4, 6), (6,), {"time_axis": 0, "batch_axis": 1}),
    ],
)
def test_positions_outside_the_data_are_moved_into_them(
    position: int, operator: str, shape: tuple[int, ...], index: tuple[int, ...], attributes: dict[str, Any]
) -> None:
    inputs = {"x": np.resize(DATA, shape), "i": np.full(index, position)}
    if operator == "RoiAlign":
        inputs = {"x": inputs["x"], "regions": np.array([[0, 0, 3, 3]], np.float32), "i": inputs["i"]}
    run = ours(node_model(operator, inputs, ["y"], domain="", **attributes))
    result = run(inputs)["y"]
    assert result.min() >= DATA.min()
    assert result.max() <= DATA.max()


def test_a_package_says_which_inputs_it_expected(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(model("float[2, 3, 4] x, int64[2] s", "y = Reshape(x, s)"), path)
    result = compile_model(path, tmp_path / "package", CompileOptions(target=find_target("host")))
    assert result.manifest.certificate is not None
    package = load(tmp_path / "package")
    values = np.resize(DATA, (2, 3, 4))
    assert package({"x": values, "s": np.array([4, 6])})["y"].shape == (4, 6)
    with pytest.raises(InputMismatchError, match=r"do not fit each other\. Expected: main\(x: float32\[2, 3, 4\], s"):
        package({"x": values, "s": np.array([4, 7])})


def test_a_step_without_memory_for_its_results_is_refused_and_leaves_the_package_usable(tmp_path: Path) -> None:
    path, size = tmp_path / "model.onnx", 1 << 23
    onnx.save(model("float[n, 1] x, float[1, m] w", "y = MatMul(x, w)"), path)
    compile_model(path, tmp_path / "package", CompileOptions(target=find_target("host")))
    package = load(tmp_path / "package")
    with pytest.raises(InsufficientMemoryError, match="a step of 'main'; give it smaller inputs"):
        package({"x": np.zeros((size, 1), np.float32), "w": np.zeros((1, size), np.float32)})  # beyond addresses
    assert package({"x": np.ones((2, 1), np.float32), "w": np.ones((1, 3), np.float32)})["y"].sum() == 6
