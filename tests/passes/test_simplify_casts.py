from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from passes.simplify_casts import SimplifyCasts, holds_every_value
from passes.tensor_types import numpy_dtype
from tests.passes.graph import assert_kept, assert_rewritten

_DTYPES = ("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float16", "bfloat16", "float32")


@pytest.mark.parametrize(
    ("dtype", "casts", "left"),
    [
        ("float32", ["float32"], []),
        ("float32", ["float64", "float32"], []),
        ("bfloat16", ["float32", "bfloat16"], []),
        ("bool", ["int64", "bool"], []),
        ("uint8", ["int64", "float32"], ["float32"]),
        ("float16", ["float32", "float64"], ["float64"]),
        ("int8", ["int16", "int32", "int64"], ["int64"]),
    ],
)
def test_casts_without_loss_merge(dtype: str, casts: list[str], left: list[str]) -> None:
    def chain(names):
        def body(x):
            for name in names:
                x = op.astype(x, name)
            return x

        return body

    assert_rewritten(SimplifyCasts(), chain(casts), chain(left), ("n", 3), dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "middle", "final"),
    [
        ("float32", "float16", "float32"),
        ("float32", "int32", "float32"),
        ("int64", "float32", "int64"),
        ("int32", "uint32", "int64"),
        ("float32", "float64", "float16"),
        ("float32", "bool", "float32"),
        ("float16", "bfloat16", "float32"),
    ],
)
def test_casts_that_round_or_wrap_are_kept(dtype: str, middle: str, final: str) -> None:
    assert_kept(SimplifyCasts(), lambda x: op.astype(op.astype(x, middle), final), (2, 3), dtype=dtype)


@pytest.mark.parametrize("narrow", _DTYPES)
@pytest.mark.parametrize("wide", _DTYPES)
def test_holding_every_value_means_that_the_extremes_survive(narrow: str, wide: str) -> None:
    kind, large = numpy_dtype(narrow), numpy_dtype(wide)
    if narrow == "bool":
        values = [0, 1]
    elif narrow.startswith(("int", "uint")):
        values = [int(np.iinfo(kind).min), int(np.iinfo(kind).max), int(np.iinfo(kind).max) - 1]
    else:
        limits = ml_dtypes.finfo(kind)
        values = [float(limits.max), float(limits.smallest_subnormal), 1 + float(limits.eps)]
    if wide == "bool":
        survive = narrow == "bool"
    elif wide.startswith(("int", "uint")):
        limits = np.iinfo(large)
        survive = all(value == int(value) and limits.min <= value <= limits.max for value in values)
    else:
        with np.errstate(all="ignore"):
            survive = all(float(large.type(value)) == value for value in values)
    assert holds_every_value(wide, narrow) == survive


def test_boolean_cast_and_compared_with_zero_is_the_boolean() -> None:
    def body(x, _):
        return op.not_equal(op.astype(x, "int32"), relax.const(0, "int32"))

    assert_rewritten(SimplifyCasts(), body, lambda x, _: x, ("n", 3), ("n", 3), dtype=["bool", "int8"])
    assert_kept(
        SimplifyCasts(), lambda x: op.not_equal(op.astype(x, "int32"), relax.const(0, "int32")), (3,), dtype="int8"
    )
