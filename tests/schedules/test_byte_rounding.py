from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from optimizer.lowering import build, lower
from targets.base import Target
from tests.schedules.execution import assembly_of, module_of
from tests.schedules.test_integer_convolution import HERE


@pytest.mark.parametrize("target", HERE, ids=lambda target: target.name)
@pytest.mark.parametrize(
    ("dtype", "zero", "low", "high"),
    [
        ("uint8", 0, 0, 255),
        ("uint8", 77, 0, 255),
        ("uint8", 77, 80, 250),
        ("int8", 0, -128, 127),
        ("int8", -128, -128, 127),
        ("int8", 5, -90, 100),
    ],
)
def test_bytes_are_rounded_to_nearest_and_even_and_limited(
    dtype: str, zero: int, low: int, high: int, target: Target
) -> None:
    halves = np.arange(-600, 600, 0.25, dtype="float32")
    x = np.concatenate(
        [halves, np.nextafter(halves, -np.inf), np.nextafter(halves, np.inf), np.array([1e30, -1e30], np.float32)]
    )

    def quantized(x: relax.Var) -> relax.Expr:
        shifted = op.add(op.round(x), relax.const(np.float32(zero))) if zero else op.round(x)
        return op.astype(op.clip(shifted, float(low), float(high)), dtype)

    executable = build(lower(module_of(quantized, [[len(x)]], ["float32"]), target).module, target)
    got = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
    want = np.clip(np.rint(x) + np.float32(zero), low, high).astype(dtype)
    np.testing.assert_array_equal(got, want)
    assembly = assembly_of(executable)
    assert "rndscale" not in assembly
    assert target.architecture != "x86_64" or "vpackssdw" in assembly
