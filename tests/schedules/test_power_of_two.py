from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import tirx

from schedules.intrin.bf16_pairs import bf16_pairs
from schedules.intrin.power_of_two import EXP2, EXP2_TO_ROUND, powers_of_two
from schedules.intrin.vector_math import scales
from schedules.loops import index, load, loop, store
from tests.schedules.execution import TARGET


@pytest.mark.skipif(powers_of_two(TARGET) is None, reason="this machine has no such instructions")
@pytest.mark.parametrize(("coefficients", "bound"), [(EXP2, 2.0**-22), (EXP2_TO_ROUND, 2.0**-13.6)])
def test_powers_of_two(coefficients: tuple[float, ...], bound: float) -> None:
    powers = powers_of_two(TARGET)
    assert powers is not None
    if coefficients is EXP2_TO_ROUND and bf16_pairs(TARGET) is None:
        pytest.skip("nothing is rounded to bfloat16 without products of its pairs")
    special = np.array([0, 1, -1, -126, -127, -150, -3e38, -np.inf, np.nan, -1e-9, 127.9, 127], "float32")
    if scales(TARGET):  # by an instruction, which has no largest exponent
        special[-1] = np.inf
    x = np.concatenate([special, np.linspace(-160, 127, 40004, dtype="float32")])
    source, result = (tirx.decl_buffer((x.size,), "float32", name) for name in ("source", "result"))

    def some(number: tirx.Expr) -> tirx.Stmt:
        place = tirx.Ramp(number * powers.lanes, index(1), powers.lanes)
        return store(result, powers.of(load(source, [place]), coefficients), [place])

    body = powers.imported(loop(x.size // powers.lanes, some))
    function = tirx.PrimFunc([source, result], body)
    module = tvm.IRModule({"main": function.with_attr("global_symbol", "main")})
    got = tvm.runtime.tensor(np.empty_like(x))
    tvm.compile(module, TARGET.tvm_target())["main"](tvm.runtime.tensor(x), got)
    with np.errstate(all="ignore"):
        want = np.exp2(x.astype("float64"))
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got.numpy()[~finite], want[~finite])
    normal = finite & (want >= 2.0**-126)
    np.testing.assert_allclose(got.numpy()[normal], want[normal], rtol=bound)
    assert not got.numpy()[finite & ~normal].any()
