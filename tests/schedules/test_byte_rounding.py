from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from optimizer.lowering import build, lower
from tests.schedules.execution import TARGET, module_of


@pytest.mark.parametrize(("dtype", "zero"), [("uint8", 0), ("uint8", 77), ("int8", 0), ("int8", -128)])
def test_bytes_are_rounded_to_nearest_and_even_and_limited(dtype: str, zero: int) -> None:
    limits = np.iinfo(dtype)
    halves = np.arange(-600, 600, 0.25, dtype="float32")
    x = np.concatenate(
        [halves, np.nextafter(halves, -np.inf), np.nextafter(halves, np.inf), np.array([1e30, -1e30], np.float32)]
    )

    def quantized(x: relax.Var) -> relax.Expr:
        shifted = op.add(op.round(x), relax.const(np.float32(zero))) if zero else op.round(x)
        return op.astype(op.clip(shifted, float(limits.min), float(limits.max)), dtype)

    executable = build(lower(module_of(quantized, [[len(x)]], ["float32"]), TARGET).module, TARGET)
    got = relax.VirtualMachine(executable, tvm.cpu())["main"](tvm.runtime.tensor(x)).numpy()
    want = np.clip(np.rint(x) + np.float32(zero), limits.min, limits.max).astype(dtype)
    np.testing.assert_array_equal(got, want)
    assembly = "".join(each.inspect_source("asm") for each in executable.mod.imports if each.kind == "llvm")
    assert "rndscale" not in assembly
