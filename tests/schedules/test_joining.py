from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import te, tirx, topi

import targets
from schedules import schedule_function
from schedules.joining import is_one_kernel, joined
from schedules.stage_parsing import parse
from targets.base import Target

_TARGET = targets.get("x86-avx512")


def _tensor(shape: tuple[int | tirx.Var, ...], name: str) -> te.Tensor:
    """Return a tensor whose dimensions are of 64 bits, as those of Relax are."""
    return te.placeholder(
        [tirx.IntImm("int64", extent) if isinstance(extent, int) else extent for extent in shape], name=name
    )


def _function(*arguments: te.Tensor) -> tirx.PrimFunc:
    return te.create_prim_func(arguments)


def _product(rows: int, depth: int, columns: int) -> tirx.PrimFunc:
    x, w = _tensor((rows, depth), name="x"), _tensor((depth, columns), name="w")
    return _function(x, w, topi.matmul(x, w))


def _blocks(rows: int, columns: int, block: int) -> tirx.PrimFunc:
    """Return the sum of a residual and a matrix, in blocks of columns."""
    x = _tensor((rows, columns), name="y")
    residual = _tensor((columns // block, rows, block), name="residual")
    moved = te.compute(residual.shape, lambda c, r, i: x[r, c * block + i] + residual[c, r, i])
    return _function(x, residual, moved)


def _run(function: tirx.PrimFunc, arguments: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Run the scheduled function on this machine."""
    host = targets.get("host")
    scheduled, _ = schedule_function(function, host)
    built = tvm.compile(scheduled.with_attr("global_symbol", "main"), host.tvm_target())
    tensors = [tvm.runtime.tensor(array) for array in (*arguments, np.zeros(shape, "float32"))]
    built["main"](*tensors)
    return tensors[-1].numpy()


@pytest.mark.parametrize(("rows", "columns", "block"), [(3, 32, 16), (17, 96, 16), (9, 48, 8), (1, 64, 32)])
def test_a_product_stored_in_blocks_is_right(rows: int, columns: int, block: int) -> None:
    function = joined(_product(rows, 5, columns), _blocks(rows, columns, block), [0])
    assert function is not None
    rng = np.random.default_rng(1)
    x, w, residual = (
        rng.standard_normal(shape).astype("float32")
        for shape in ((rows, 5), (5, columns), (columns // block, rows, block))
    )
    expected = (x @ w).reshape(rows, -1, block).transpose(1, 0, 2) + residual
    result = _run(function, [x, w, residual], expected.shape)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=5e-6)


def _is_one(first: tirx.PrimFunc, second: tirx.PrimFunc, target: Target = _TARGET) -> bool:
    function = joined(first, second, [0])
    return function is not None and is_one_kernel(function, target)


def test_blocks_of_whole_vectors_are_stored_by_the_product() -> None:
    assert _is_one(_product(16, 8, 64), _blocks(16, 64, 16))
    assert _is_one(_product(16, 8, 64), _blocks(16, 64, 8), targets.get("x86-avx2"))


def test_what_would_be_stored_lane_by_lane_stays_apart() -> None:
    assert not _is_one(_product(16, 8, 64), _blocks(16, 64, 4))
    x = _tensor((16, 64), name="x")
    assert not _is_one(_product(16, 8, 64), _function(x, topi.transpose(x)))


def test_what_reads_an_element_twice_stays_apart() -> None:
    x = _tensor((16, 64), name="x")
    mirrored = te.compute(x.shape, lambda i, j: x[i, j] + x[15 - i, j])
    assert not _is_one(_product(16, 8, 64), _function(x, mirrored))


def test_nothing_is_moved_into_a_reduction() -> None:
    x = _tensor((64, 16), name="x")
    turned = _function(x, topi.transpose(x))
    assert joined(turned, _product(16, 64, 8), [0]) is None


def test_functions_of_symbolic_shapes_stay_apart() -> None:
    rows = tirx.Var("rows", "int64")
    x, w = _tensor((rows, 8), name="x"), _tensor((8, 64), name="w")
    y = _tensor((rows, 64), name="y")
    first = _function(x, w, topi.matmul(x, w))
    second = _function(y, te.compute((4, rows, 16), lambda c, r, i: y[r, c * 16 + i]))
    assert not _is_one(first, second)


def test_a_mean_over_blocks_gives_up_its_blocks() -> None:
    x = _tensor((4, 7, 7, 16), name="x")
    mean = topi.sum(x, axis=[1, 2])
    y = _tensor((4, 16), name="y")
    whole = te.compute((tirx.IntImm("int64", 64),), lambda c: y[c // 16, c % 16] * 0.5)
    function = joined(_function(x, mean), _function(y, whole), [0])
    assert function is not None
    assert is_one_kernel(function, _TARGET)
    values = np.random.default_rng(2).standard_normal((4, 7, 7, 16)).astype("float32")
    result = _run(function, [values], (64,))
    np.testing.assert_allclose(result, values.sum((1, 2)).reshape(-1) / 2, rtol=1e-5, atol=1e-5)


def test_the_same_function_twice_keeps_its_variables_apart() -> None:
    square = _product(8, 32, 32)
    function = joined(square, square, [0])
    assert function is not None
    staged = parse(function)
    assert staged is not None
    assert len(staged.stages) == 2
    rng = np.random.default_rng(3)
    x, first, second = (rng.standard_normal(shape).astype("float32") for shape in ((8, 32), (32, 32), (32, 32)))
    result = _run(function, [x, first, second], (8, 32))
    np.testing.assert_allclose(result, x @ first @ second, rtol=1e-4, atol=1e-4)
