from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from tvm import relax, tirx
from tvm.relax import op

from passes import tensor_types
from tests.passes.graph import graph

_N = tirx.Var("n", "int64")


def _var(shape, dtype: str = "float32") -> relax.Var:
    return relax.Var("x", relax.TensorType(shape, dtype))


_UNKNOWN = relax.Var("x", relax.TensorType(dtype="float32", ndim=2))
_TUPLE = relax.Tuple([relax.const(1.0)])


def test_type_of_a_tensor() -> None:
    assert tensor_types.dtype_of(_var((2, _N), "int8")) == "int8"
    assert tensor_types.dtype_of(_TUPLE) is None
    assert tensor_types.dtype_of(relax.Var("x", relax.TensorType((2,), None))) is None
    shape = tensor_types.shape_of(_var((2, _N)))
    assert shape is not None
    assert int(shape[0]) == 2
    assert shape[1].same_as(_N)
    assert tensor_types.shape_of(_UNKNOWN) is None
    assert tensor_types.shape_of(_TUPLE) is None


def test_a_shape_that_has_to_be_known() -> None:
    assert [int(extent) for extent in tensor_types.known_shape(_var((2, 3)))] == [2, 3]
    with pytest.raises(ValueError, match=r"^the shape of x is not known$"):
        tensor_types.known_shape(_UNKNOWN)


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [
        *((name, "float") for name in ("float16", "bfloat16", "float8_e4m3fn")),
        *((name, "integer") for name in ("int8", "uint64")),
        ("bool", ""),
        (None, ""),
    ],
)
def test_kinds_of_dtypes(dtype: str | None, kind: str) -> None:
    assert tensor_types.is_float(dtype) is (kind == "float")
    assert tensor_types.is_integer(dtype) is (kind == "integer")


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float32", "int8", "bool"])
def test_numpy_has_every_dtype(name: str) -> None:
    assert tensor_types.numpy_dtype(name) == np.dtype(getattr(ml_dtypes, name, name))


def test_dimensions_are_equal_where_they_are_for_all_values() -> None:
    assert tensor_types.equal(2, tirx.IntImm("int64", 2))
    assert not tensor_types.equal(2, 3)
    assert tensor_types.equal(_N * 2, _N + _N)
    assert not tensor_types.equal(_N, 2)
    assert tensor_types.is_one(1)
    assert tensor_types.is_one(tirx.IntImm("int64", 1))
    assert not tensor_types.is_one(2)
    assert not tensor_types.is_one(_N)


def test_shapes_are_equal_where_they_are_known_and_so_are_all_dimensions() -> None:
    assert tensor_types.equal_shapes([2, _N], [2, _N])
    assert tensor_types.equal_shapes([], [])
    assert not tensor_types.equal_shapes([2, _N], [2, 3])
    assert not tensor_types.equal_shapes([2, _N], [3, _N])
    assert not tensor_types.equal_shapes([2], [2, 2])
    assert not tensor_types.equal_shapes(None, [2])
    assert not tensor_types.equal_shapes([2], None)


def test_the_same_type_is_the_same_dtype_and_shape() -> None:
    assert tensor_types.same_type(_var((2, _N)), _var((2, _N)))
    assert not tensor_types.same_type(_var((2, _N)), _var((2, _N), "float64"))
    assert not tensor_types.same_type(_var((2, _N)), _var((_N, 2)))
    assert not tensor_types.same_type(_UNKNOWN, _UNKNOWN)
    assert not tensor_types.same_type(_TUPLE, _TUPLE)


def test_constants_hold_arrays_of_any_layout() -> None:
    array = np.arange(6, dtype="float32").reshape(2, 3).T
    np.testing.assert_array_equal(tensor_types.constant_of(tensor_types.constant(array)), array)
    narrow = tensor_types.constant(array.astype(ml_dtypes.bfloat16), "bfloat16")
    assert tensor_types.dtype_of(narrow) == "bfloat16"
    assert tensor_types.constant_of(_UNKNOWN) is None


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (lambda x: op.sum(x, [-1, 0], keepdims=True), (0, 2)),
        (lambda x: op.sum(x, keepdims=True), (0, 1, 2)),
        (lambda x: op.sum(x, [1]), None),
        (lambda x: x, None),
    ],
)
def test_axes_that_a_reduction_keeps(body, expected: tuple[int, ...] | None) -> None:
    function = graph(body, (2, 3, 4))["main"]
    bindings = function.body.blocks[0].bindings if function.body.blocks else []
    value = bindings[0].value if len(bindings) else function.body.body
    assert tensor_types.kept_axes(value) == expected
