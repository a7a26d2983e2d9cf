from __future__ import annotations

from tvm import relax, te, tirx

from optimizer.symbolic_arguments import passed_in_order_of_use


def test_symbols_are_passed_in_the_order_of_their_use() -> None:
    """TVM passed them in the order of a set of addresses: packages differed from one compile to the next."""
    symbols = [tirx.Var(name, "int64") for name in "hgfedcba"]
    value = relax.Var("x", relax.TensorType([sum(symbols[1:], symbols[0])], "float32"))
    builder = relax.BlockBuilder()
    with passed_in_order_of_use(), builder.function("main", [value]):
        double = builder.emit_te(lambda x: te.compute(x.shape, lambda i: x[i] * 2.0), value)
        builder.emit_func_output(double)

    (function,) = (each for _, each in builder.get().functions_items() if isinstance(each, tirx.PrimFunc))
    assert [each.name for each in function.params if not tirx.is_buffer_var(each)] == list("hgfedcba")
