from __future__ import annotations

import numpy as np
import tvm_ffi
from tvm import relax, te, tirx
from tvm.relax import op

from schedules import schedule_function, schedule_module
from schedules.quotients import truncate_quotients
from tests.schedules.execution import TARGET, build, normal, run


def _flooring(function: tirx.PrimFunc) -> list[tirx.FloorDiv | tirx.FloorMod]:
    found: list[tirx.FloorDiv | tirx.FloorMod] = []
    tvm_ffi.structural_walk(function.body, [(tirx.FloorDiv, found.append), (tirx.FloorMod, found.append)])
    return found


def _flat_log(x: relax.Var) -> relax.Expr:
    rows, columns, depth = x.ty.shape
    return op.log(op.reshape(x, (rows * columns * depth,)))


def test_a_reshape_of_symbolic_sizes_truncates_every_quotient_by_one() -> None:
    module, _ = schedule_module(build(_flat_log, [("n", "m", "k")], ["float32"]), TARGET)
    functions = [function for _, function in module.functions_items() if isinstance(function, tirx.PrimFunc)]
    assert functions
    for function in functions:
        assert all(isinstance(quotient.b, tirx.IntImm) for quotient in _flooring(function))


def test_a_quotient_by_a_computed_dimension_truncates() -> None:
    # As behind a convolution with stride: the dimension is a difference, whatever its symbol is.
    n, m, i = (tirx.Var(name, "int64") for name in ("n", "m", "i"))
    strided = tirx.floordiv(n - 3, tirx.IntImm("int64", 4)) + 1
    rows, flat = tirx.decl_buffer([m, strided], "float32", "rows"), tirx.decl_buffer([m * strided], "float32", "flat")
    read = tirx.BufferLoad(rows, [tirx.floordiv(i, strided), tirx.floormod(i, strided)])
    other = tirx.BufferLoad(rows, [tirx.floordiv(i, n - 3), tirx.floormod(i, n - 3)])
    body = tirx.SeqStmt([tirx.BufferStore(flat, read, [i]), tirx.BufferStore(flat, other, [i])])
    loop = tirx.For(i, tirx.IntImm("int64", 0), m * strided, tirx.ForKind.SERIAL, body)
    flooring = [each for each in _flooring(truncate_quotients(tirx.PrimFunc([rows, flat], loop))) if each.a.same_as(i)]
    assert [type(each) for each in flooring] == [tirx.FloorDiv, tirx.FloorMod]
    assert all(tvm_ffi.structural_equal(each.b, n - 3) for each in flooring)


def test_a_reshape_of_symbolic_sizes_keeps_its_values() -> None:
    x = np.abs(normal(3, 5, 7)) + 1
    result, _ = run(_flat_log, [x], [("n", "m", "k")])
    np.testing.assert_allclose(result, np.log(x).reshape(-1), rtol=1e-6)


def test_a_quotient_of_what_may_be_negative_keeps_rounding_down() -> None:
    n = tirx.Var("n", "int64")
    offset = tirx.Var("offset", "int64")
    data = te.placeholder((n,), name="data")
    moved = te.compute((n,), lambda i: data[tirx.floormod(tirx.floordiv(i + offset, n), n)], name="moved")
    function, _ = schedule_function(te.create_prim_func([data, offset, moved]), TARGET)
    assert any(isinstance(quotient.b, tirx.Var) for quotient in _flooring(function))


def test_a_quotient_and_its_remainder_are_the_number_that_was_divided() -> None:
    n, m = tirx.Var("n", "int64"), tirx.Var("m", "int64")
    rows = tirx.decl_buffer([n, m], "float32", "rows")
    flat = tirx.decl_buffer([n * m], "float32", "flat")
    i = tirx.Var("i", "int64")
    for quotient, rest in ((tirx.floordiv, tirx.floormod), (tirx.truncdiv, tirx.truncmod)):
        store = tirx.BufferStore(flat, tirx.BufferLoad(rows, [i, i]), [quotient(i, m) * m + rest(i, m)])
        other = tirx.BufferStore(flat, tirx.BufferLoad(rows, [i, i]), [quotient(i, m) * m + rest(i, n)])
        body = tirx.For(i, tirx.IntImm("int64", 0), n * m, tirx.ForKind.SERIAL, tirx.SeqStmt([store, other]))
        loop = truncate_quotients(tirx.PrimFunc([rows, flat], body)).body
        joined, kept = loop.body
        assert joined.indices[0].same_as(loop.loop_var)
        assert isinstance(kept.indices[0], tirx.Add)
