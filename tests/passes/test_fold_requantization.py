from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from passes.fold_requantization import FoldRequantization
from tests.passes.relax_modules import operators, run

SHAPE = (1, 5, 3, 4)
Body = Callable[[relax.Var, relax.Var], relax.Expr]
_GENERATOR = np.random.default_rng(0)
SUMS = _GENERATOR.integers(-20000, 20000, SHAPE, dtype=np.int32)
CODES = _GENERATOR.integers(0, 256, SHAPE, dtype=np.uint8)
CORRECTION, BIAS = _GENERATOR.integers(-2000, 2000, (5, 1, 1), dtype=np.int32), _GENERATOR.random((5, 1, 1)) - 0.5
SCALES = (np.arange(1, 6) * 1e-4).reshape(5, 1, 1)


def single(value: float) -> relax.Expr:
    return relax.const(np.float32(value))


def several(values: np.ndarray) -> relax.Expr:
    return relax.const(values.astype("float32"))


def module_of(body: Body) -> tvm.IRModule:
    """Return a module of int32 sums and uint8 codes."""
    builder = relax.BlockBuilder()
    inputs = [relax.Var(name, relax.TensorType(SHAPE, dtype)) for name, dtype in (("x", "int32"), ("y", "uint8"))]
    with builder.function("main", inputs):
        with builder.dataflow():
            output = builder.emit_output(body(*inputs))
        builder.emit_func_output(output)
    return builder.get()


def scaled(x: relax.Expr) -> relax.Expr:
    return op.multiply(op.astype(op.subtract(x, relax.const(CORRECTION)), "float32"), several(SCALES))


def codes(x: relax.Expr, factor: float = 40.0, zero: float = 0.0, low: float = 0.0) -> relax.Expr:
    rounded = op.round(op.multiply(x, single(factor)))
    rounded = op.add(rounded, single(zero)) if zero else rounded
    return op.astype(op.clip(rounded, low, low + 255), "uint8" if low == 0 else "int8")


def folded(body: Body) -> list[str]:
    """Return the operators that are left, where the values are the same but for codes on a border."""
    before = module_of(body)
    after = FoldRequantization().run(before).module
    relax.analysis.well_formed(after)
    difference = run(after, SUMS, CODES).astype(int) - run(before, SUMS, CODES)
    assert np.abs(difference).max() <= 1
    assert np.mean(difference != 0) < 0.05
    return [name.removeprefix("relax.") for name in operators(after)]


LEAST = ["astype", "multiply", "add", "round", "clip", "astype"]


def test_one_multiplication_and_addition_are_left_of_correction_scales_and_bias() -> None:
    assert folded(lambda x, _: codes(op.add(scaled(x), several(BIAS)))) == LEAST
    assert folded(lambda x, _: codes(scaled(x))) == LEAST


@pytest.mark.parametrize("limited", [op.nn.relu, lambda x: op.clip(x, 0, 6.4)])
def test_limits_that_codes_have_anyway_are_left_out(limited: Callable[[relax.Expr], relax.Expr]) -> None:
    assert folded(lambda x, _: codes(limited(op.add(scaled(x), several(BIAS))))) == LEAST


@pytest.mark.parametrize(("zero", "low"), [(3.0, 0.0), (0.0, -128.0)])
def test_limits_within_those_of_codes_stay(zero: float, low: float) -> None:
    assert "nn.relu" in folded(lambda x, _: codes(op.nn.relu(scaled(x)), zero=zero, low=low))
    assert folded(lambda x, _: codes(op.clip(scaled(x), 0, 3), zero=zero, low=low)).count("clip") == 2


def test_a_residual_of_codes_takes_the_scale_too() -> None:
    def body(x: relax.Var, y: relax.Var) -> relax.Expr:
        residual = op.dequantize(y, single(0.01), relax.const(np.uint8(7)), axis=1, out_dtype="float32")
        return codes(op.nn.relu(op.add(op.add(scaled(x), several(BIAS)), residual)))

    expected = ["astype", "multiply", "add", "dequantize", "add", "round", "clip", "astype"]
    assert sorted(folded(body)) == sorted(expected)


@pytest.mark.parametrize(
    "body",
    [
        lambda x, _: codes(op.nn.silu(scaled(x))),
        lambda x, _: codes(scaled(x), factor=-40.0),
        lambda _, y: codes(op.multiply(op.astype(y, "float32"), single(0.1))),
        lambda x, _: op.add(codes(shared := scaled(x)), codes(shared, factor=20.0)),
    ],
    ids=["another function between", "negative", "no integer sums", "read twice"],
)
def test_other_roundings_stay(body: Body) -> None:
    before = module_of(body)
    tvm.ir.assert_structural_equal(FoldRequantization().run(before).module, before)


@pytest.mark.parametrize(
    ("shape", "left"), [((5, 1, 1), ["subtract"]), ((), ["subtract"]), ((1, 4), ["subtract", "add"])]
)
def test_an_integer_bias_goes_into_the_correction(shape: tuple[int, ...], left: list[str]) -> None:
    bias = np.full(shape, np.iinfo(np.int32).max, np.int32)  # which wraps around

    def body(x: relax.Var, _: relax.Var) -> relax.Expr:
        return op.add(op.subtract(x, relax.const(CORRECTION)), relax.const(bias))

    before = module_of(body)
    after = FoldRequantization().run(before).module
    np.testing.assert_array_equal(run(after, SUMS, CODES), run(before, SUMS, CODES))
    assert [name.removeprefix("relax.") for name in operators(after)] == left
