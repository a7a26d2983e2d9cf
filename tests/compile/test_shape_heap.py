from __future__ import annotations

from tvm import relax, tirx

from optimizer.shape_heap import lower_shapes


def test_shape_functions_write_the_heap_in_order() -> None:
    """TVM writes it in the order of a table hashed by addresses: packages differed from one compile to the next."""
    size = tirx.Var("n", "int64")
    value = relax.Var("x", relax.TensorType([size], "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [value]):
        shape = relax.ShapeExpr([size * factor for factor in range(2, 12)])
        builder.emit_func_output(builder.emit(shape))

    lowered = lower_shapes(builder.get())

    (function,) = (function for _, function in lowered.functions_items() if isinstance(function, tirx.PrimFunc))
    places = [int(store.indices[0]) for store in function.body.seq]
    assert len(places) == 10
    assert places == sorted(places)
