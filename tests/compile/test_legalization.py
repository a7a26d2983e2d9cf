from __future__ import annotations

import numpy as np
import pytest
from tvm import relax, tirx

from optimizer.lowering import fuse
from targets import get
from tests.passes.graph import graph
from tests.passes.relax_modules import run

_PLAIN = {"rms_norm": (1.0,), "layer_norm": (1.0, 0.0)}


def _normalized(x: relax.Expr, name: str, values: tuple[float, ...]) -> relax.Expr:
    parameters = [relax.const(np.full(8, value, "float32")) for value in values]
    return getattr(relax.op.nn, name)(x, *parameters, axes=[-1], epsilon=1e-5)


@pytest.mark.parametrize(
    ("name", "values", "read"),
    [(*plain, 0) for plain in _PLAIN.items()]
    + [("rms_norm", (2.0,), 1), ("layer_norm", (2.0, 0.0), 1), ("layer_norm", (1.0, 3.0), 1)],
)
def test_a_normalization_reads_no_scale_of_ones_and_no_shift_of_zeros(
    name: str, values: tuple[float, ...], read: int
) -> None:
    module = fuse(graph(lambda x: _normalized(x, name, values), (3, 8)), get("x86-avx512")).module
    (kernel,) = [function for function in module.functions.values() if isinstance(function, tirx.PrimFunc)]
    assert len(kernel.params) == 2 + read
    x = np.random.default_rng(0).standard_normal((3, 8)).astype("float32")
    scaled = run(graph(lambda x: _normalized(x, name, _PLAIN[name]), (3, 8)), x) * values[0] + sum(values[1:])
    np.testing.assert_allclose(run(module, x), scaled, rtol=1e-5, atol=1e-5)
