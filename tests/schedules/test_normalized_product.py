from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import te, tirx, topi

import targets
from optimizer import code_generation
from schedules import schedule_function
from schedules.joining import joined, kind_of, why_several
from schedules.packing import Packing, reading_packed

_HOST = targets.get("host")
# An axis of one element is none: without it there is no product, or no norm.
_SIZES = st.one_of(st.sampled_from((2, 7, 31, 97)), st.integers(2, 80))
_EPSILON = 1e-5
_Array = np.ndarray


def _tensor(shape: tuple[int, ...], name: str) -> te.Tensor:
    return te.placeholder([tirx.IntImm("int64", extent) for extent in shape], name=name)


def _function(*arguments: te.Tensor) -> tirx.PrimFunc:
    return te.create_prim_func(arguments)


def _product(rows: int, depth: int, columns: int) -> tirx.PrimFunc:
    """Return x @ w + residual."""
    x, w, residual = _tensor((rows, depth), "x"), _tensor((depth, columns), "w"), _tensor((rows, columns), "residual")
    product = topi.matmul(x, w)
    return _function(x, w, residual, te.compute(product.shape, lambda i, j: product[i, j] + residual[i, j]))


def _norm(rows: int, columns: int) -> tirx.PrimFunc:
    y, scale, shift = _tensor((rows, columns), "y"), _tensor((columns,), "scale"), _tensor((columns,), "shift")
    return _function(y, scale, shift, topi.nn.layer_norm(y, scale, shift, [1], _EPSILON))


def _normalized(values: _Array, scale: _Array, shift: _Array) -> _Array:
    centred = values - values.mean(1, keepdims=True)
    return centred / np.sqrt(values.var(1, keepdims=True) + _EPSILON) * scale + shift


def _drawn(*shapes: tuple[int, ...]) -> list[_Array]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal(shape).astype("float32") for shape in shapes]


def _run(function: tirx.PrimFunc, arguments: list[_Array], owned_rows: int, *outputs: tuple[int, ...]) -> list[_Array]:
    """Return what the function, scheduled for this machine, writes to its last parameters, of shapes `outputs`."""
    scheduled, report = schedule_function(function, _HOST, {"owned_rows": owned_rows})
    assert (report.family, report.regions) == ("normalized-product", 1)
    with _HOST.tvm_target() as target, code_generation.options(_HOST):
        module = tvm.IRModule({"main": scheduled.with_attr("global_symbol", "main")})
        built = tvm.tirx.build(module, target, pipeline=code_generation.pipeline(_HOST))
    results = [tvm.runtime.tensor(np.zeros(shape, "float32")) for shape in outputs]
    built["main"](*map(tvm.runtime.tensor, arguments), *results)
    return [result.numpy() for result in results]


def _check(actual: _Array, expected: _Array, depth: int) -> None:
    # Sums of `depth` products and of a row, each within half a unit in the last place of partial sums; a norm divides
    # by a deviation that may be small where there are few columns.
    bound = 8 * float(np.finfo("float32").eps) * (depth + 8) * max(1.0, float(np.abs(expected).max()))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=bound)


def _packed(function: tirx.PrimFunc, position: int, weight: _Array) -> tuple[tirx.PrimFunc, _Array]:
    packing = Packing(position, (0, 1), weight.shape[1], _HOST.layouts.column_block)
    return reading_packed(function, function.params[position], packing), packing.pack(weight)


@settings(max_examples=10, deadline=None)
@given(_SIZES, _SIZES, _SIZES, st.sampled_from((0, 32)), st.booleans())
def test_a_norm_after_a_product_is_right_and_so_is_the_sum_beside_it(
    rows: int, depth: int, columns: int, owned_rows: int, packed: bool
) -> None:
    function = joined(_product(rows, depth, columns), _norm(rows, columns), [0], returned=True)
    assert function is not None
    x, w, residual, scale, shift = _drawn((rows, depth), (depth, columns), (rows, columns), (columns,), (columns,))
    sums = x.astype("float64") @ w + residual
    weight = w
    if packed:
        function, weight = _packed(function, 1, w)
    both = _run(function, [x, weight, residual, scale, shift], owned_rows, sums.shape, sums.shape)
    _check(both[0], sums, depth)
    _check(both[1], _normalized(both[0].astype("float64"), scale, shift), columns)


@settings(max_examples=10, deadline=None)
@given(_SIZES, _SIZES, _SIZES, st.sampled_from((0, 32)))
def test_a_norm_before_a_product_is_right(rows: int, depth: int, columns: int, owned_rows: int) -> None:
    function = joined(_norm(rows, depth), _product(rows, depth, columns), [0])
    assert function is not None
    y, scale, shift, w, residual = _drawn((rows, depth), (depth,), (depth,), (depth, columns), (rows, columns))
    (result,) = _run(function, [y, scale, shift, w, residual], owned_rows, (rows, columns))
    _check(result, _normalized(y.astype("float64"), scale, shift) @ w + residual, depth)


def test_rows_of_an_image_are_cut_into_blocks_whose_size_is_known() -> None:
    image, depth, columns = (2, 14, 14), 96, 128
    y, scale, shift = _tensor((*image, depth), "y"), _tensor((depth,), "scale"), _tensor((depth,), "shift")
    norm = _function(y, scale, shift, topi.nn.layer_norm(y, scale, shift, [3], _EPSILON))
    x, w = _tensor((*image, depth), "x"), _tensor((depth, columns), "w")
    k = te.reduce_axis((0, depth), "k")
    product = te.compute((*image, columns), lambda a, b, c, j: te.sum(x[a, b, c, k] * w[k, j], axis=k))
    function = joined(norm, _function(x, w, te.compute(product.shape, lambda *at: product[at] * 0.5)), [0])
    assert function is not None
    arrays = _drawn((*image, depth), (depth,), (depth,), (depth, columns))
    (result,) = _run(function, arrays, 64, (*image, columns))
    values, *affine, weights = arrays
    normalized = _normalized(values.astype("float64").reshape(-1, depth), *affine)
    _check(result.reshape(-1, columns), normalized @ weights * 0.5, depth)


@pytest.mark.parametrize(("owned_rows", "rows"), [(0, 133), (32, 133), (32, 136), (32, 5)])
def test_threads_agree_on_rows_of_large_products(owned_rows: int, rows: int) -> None:
    depth, columns = 96, 80
    before = joined(_norm(rows, depth), _product(rows, depth, columns), [0])
    assert before is not None
    function = joined(before, _norm(rows, columns), [0])
    assert function is not None
    y, scale, shift, w, residual = _drawn((rows, depth), (depth,), (depth,), (depth, columns), (rows, columns))
    last = _drawn((columns,), (columns,))
    expected = _normalized(_normalized(y.astype("float64"), scale, shift) @ w + residual, *last)
    for _ in range(2):
        (result,) = _run(function, [y, scale, shift, w, residual, *last], owned_rows, (rows, columns))
        _check(result, expected, depth)


def test_many_rows_are_computed_in_blocks_and_few_by_turns() -> None:
    chosen = {}
    for rows in (64, 8192):
        function = joined(_product(rows, 64, 64), _norm(rows, 64), [0])
        assert function is not None
        chosen[rows] = schedule_function(function, _HOST)[1].parameters["owned_rows"]
    assert chosen[64] == 0
    assert chosen[8192] >= 32


def test_one_row_keeps_its_kernels() -> None:
    function = joined(_product(1, 64, 64), _norm(1, 64), [0])
    assert function is not None
    assert why_several(function, _HOST) is not None


def test_products_are_told_from_functions_of_rows() -> None:
    assert kind_of(_product(8, 8, 8)) == "product"
    assert kind_of(_norm(8, 8)) == "rows"
