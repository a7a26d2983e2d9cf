"""Arrays of NumPy are inputs as they are: code reads them wherever they begin at a multiple of 16 bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from onnx.parser import parse_model

from optimizer.compile import CompileOptions, compile_model, find_target
from optimizer.package.manifest import INPUT_ALIGNMENT
from optimizer.runtime import load
from targets.host import missing_features

HERE = [
    name for name in ("x86-avx2", "x86-avx512", "x86-avx512-amx", "arm64") if not missing_features(find_target(name))
]
SHAPES = {"x": (4, 64, 15, 16), "w": (64, 64, 3, 3), "m": (16, 64), "a": (4, 64, 15, 16)}


def model() -> onnx.ModelProto:
    """Return a model whose kernels read inputs in a sum, a convolution, a product and a transpose."""
    signature = ", ".join(f"float[{', '.join(map(str, SHAPES[name]))}] {name}" for name in ("x", "a"))
    parsed = parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
        g ({signature}) => (float[n, c, h, w] s, float[n, c, h, w] c, float[n, c, h, o] p, float[w, h, c, n] t) {{
            s = Add(x, a)
            c = Conv<pads = [1, 1, 1, 1]>(x, w)
            p = MatMul(x, m)
            t = Transpose<perm = [3, 2, 1, 0]>(a)
        }}""")
    generator = np.random.default_rng(0)
    for name in ("w", "m"):
        value = generator.standard_normal(SHAPES[name], np.float32)
        parsed.graph.initializer.append(numpy_helper.from_array(value, name))
    return parsed


def at(offset: int, value: np.ndarray) -> np.ndarray:
    """Return an equal array that begins `offset` bytes after a line of the cache."""
    storage = np.empty(value.nbytes + 128, np.uint8)
    start = -storage.ctypes.data % 64 + offset
    placed = storage[start : start + value.nbytes].view(value.dtype).reshape(value.shape)
    placed[...] = value
    return placed


@pytest.mark.parametrize("precision", ["model", "bf16"])
@pytest.mark.parametrize("name", HERE)
def test_outputs_do_not_depend_on_where_inputs_begin(name: str, precision: str, tmp_path: Path) -> None:
    onnx.save(model(), tmp_path / "model.onnx")
    compile_model(
        tmp_path / "model.onnx",
        tmp_path / "package",
        CompileOptions(target=find_target(name), precision=precision),
    )
    package = load(tmp_path / "package")
    values = {each: np.random.default_rng(1).standard_normal(SHAPES[each], np.float32) for each in ("x", "a")}
    expected = package({name: at(0, value) for name, value in values.items()})
    for offset in range(INPUT_ALIGNMENT, 64, INPUT_ALIGNMENT):
        got = package({name: at(offset, value) for name, value in values.items()})
        for output, value in expected.items():
            np.testing.assert_array_equal(got[output], value)
