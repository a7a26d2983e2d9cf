from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from passes.combine_products import CombineProducts
from passes.constant_products import ConstantProducts
from passes.rewrite_kv_cache import RewriteKvCache
from tests.passes.graph import assert_kept, assert_rewritten, graph
from tests.passes.properties.relax_interpreter import Interpreter
from tests.passes.relax_modules import operators

_RNG = np.random.default_rng(5)
_A, _B, _C = (_RNG.standard_normal((8, columns)).astype("float32") for columns in (4, 6, 4))
_BIAS_A, _BIAS_C = (_RNG.standard_normal(4).astype("float32") for _ in range(2))

Projection = Callable[[relax.Expr, np.ndarray, "np.ndarray | None"], relax.Expr]


def _projected(x: relax.Expr, weight: np.ndarray, bias: np.ndarray | None = None) -> relax.Expr:
    product = relax.op.matmul(x, relax.const(weight))
    return product if bias is None else relax.op.add(product, relax.const(bias))


def _read(value: relax.Expr) -> relax.Expr:
    """Read a value as attention does: in another order of axes."""
    return relax.op.permute_dims(value)


def _rounded(x: relax.Expr, weight: np.ndarray, bias: np.ndarray | None = None) -> relax.Expr:
    """Return a product of 16-bit floats as the importer has it: summed in fp32, rounded, then the bias."""
    product = relax.op.matmul(x, relax.const(weight.astype("float16")), out_dtype="float32")
    result = relax.op.astype(product, "float16")
    return result if bias is None else relax.op.add(result, relax.const(bias.astype("float16")))


def _columns(x: relax.Expr, start: int, end: int) -> relax.Expr:
    return relax.op.strided_slice(x, [1], [start], [end])


def _assert_refused(body: Callable[..., relax.Expr | Sequence[relax.Expr]], *reasons: str | None) -> None:
    outcome = assert_kept(CombineProducts(), body, (3, 8))
    alone = "no parallel product can be combined with it"
    assert [site.refusal for site in outcome.sites] == [reason or alone for reason in reasons]


def test_products_over_one_input_become_slices_of_one() -> None:
    def after(x: relax.Expr) -> list[relax.Expr]:
        total = relax.op.matmul(x, relax.const(np.concatenate([_A, _B], axis=1)))
        return [_read(_columns(total, 0, 4)), _read(_columns(total, 4, 10))]

    def before(x: relax.Expr) -> list[relax.Expr]:
        return [_read(_projected(x, _A)), _read(_projected(x, _B))]

    assert_rewritten(CombineProducts(), lambda x: _in_order(before(x)), lambda x: _in_order(after(x)), ("rows", 8))


def _in_order(values: list[relax.Expr]) -> relax.Expr:
    return relax.op.concat(values, axis=0)


@pytest.mark.parametrize("biases", [(None, None), (_BIAS_A, None), (_BIAS_A, _BIAS_C)], ids=["none", "one", "both"])
def test_products_of_16_bit_floats_are_rounded_as_one(biases: tuple[np.ndarray | None, np.ndarray | None]) -> None:
    module = graph(
        lambda x: _in_order([_read(_rounded(x, *pair)) for pair in zip((_A, _C), biases, strict=True)]),
        (3, 8),
        dtype="float16",
    )
    outcome = CombineProducts().run(module)
    assert outcome.rewritten == 2
    added = ["relax.add"] if biases[0] is not None else []
    assert operators(outcome.module)[: 2 + len(added)] == ["relax.matmul", "relax.astype", *added]
    x = np.random.default_rng(3).standard_normal((3, 8)).astype("float16")
    (before,), (after,) = (Interpreter(each).run([x]) for each in (module, outcome.module))
    np.testing.assert_array_equal(after, before)


def test_values_turned_on_their_way_to_a_cache_are_a_slice() -> None:
    def body(x: relax.Expr, past: relax.Expr) -> list[relax.Expr]:
        key, value = (relax.op.permute_dims(_projected(x, each), [1, 0, 2]) for each in (_A, _C))
        present = relax.op.concat([past, value], axis=1)
        return [present, relax.op.add(key, relax.op.sum(present, axis=1, keepdims=True))]

    module = RewriteKvCache().run(graph(body, (3, "rows", 8), ("rows", "past", 4))).module
    assert CombineProducts().run(module).rewritten == 2


def test_a_missing_bias_becomes_minus_zero() -> None:
    def before(x: relax.Expr) -> relax.Expr:
        return _in_order(
            [_read(_projected(x, _A, _BIAS_A)), _read(_projected(x, _B)), _read(_projected(x, _C, _BIAS_C))]
        )

    outcome = CombineProducts().run(graph(before, (3, 8)))
    assert outcome.rewritten == 3
    assert operators(outcome.module)[:2] == ["relax.matmul", "relax.add"]
    assert operators(outcome.module).count("relax.matmul") == 1
    (bias,) = [constant for constant in _constants(outcome.module) if constant.ndim == 1]
    np.testing.assert_array_equal(bias, np.concatenate([_BIAS_A, np.zeros(6, "float32"), _BIAS_C]))
    assert np.signbit(bias[4:10]).all()


def _constants(module: tvm.IRModule) -> list[np.ndarray]:
    found: list[np.ndarray] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, tvm.ir.GenericConst) and isinstance(expr.ty, relax.TensorType):
            found.append(expr.value.numpy())

    relax.analysis.post_order_visit(module["main"], visit)
    return found


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    columns=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    biases=st.lists(st.sampled_from(["none", "scalar", "row"]), min_size=4, max_size=4),
    batch=st.integers(0, 2),
)
def test_combining_keeps_the_result(columns: list[int], biases: list[str], batch: int) -> None:
    rng = np.random.default_rng(11)
    weights = [rng.standard_normal((8, count)).astype("float32") for count in columns]
    shapes = {"scalar": (1, 1), "row": (1, -1)}

    def body(x: relax.Expr) -> relax.Expr:
        results = []
        for weight, kind in zip(weights, biases, strict=False):
            count = weight.shape[1]
            bias = None if kind == "none" else rng.standard_normal(1 if kind == "scalar" else count).astype("float32")
            projected = _projected(x, weight, None if bias is None else bias.reshape(shapes[kind]))
            results.append(relax.op.expand_dims(projected, axis=0))
        return relax.op.concat(results, axis=-1)

    module = graph(body, (*(2,) * batch, 3, 8))
    outcome = CombineProducts().run(module)
    assert outcome.rewritten == len(columns)
    assert operators(outcome.module).count("relax.matmul") == 1
    x = rng.standard_normal((*(2,) * batch, 3, 8)).astype("float32")
    (before,), (after,) = (Interpreter(each).run([x]) for each in (module, outcome.module))
    # The same products of order 1, eight of them, added up in another order.
    np.testing.assert_allclose(after, before, rtol=1e-6, atol=64 * float(np.finfo("float32").eps))


def test_what_the_function_returns_is_not_a_slice() -> None:
    _assert_refused(
        lambda x: [_projected(x, _A), _projected(x, _B)], *["its result is returned: the slice would be copied"] * 2
    )


def test_what_its_kernel_computes_anyway_stays_there() -> None:
    def gated(x: relax.Expr) -> relax.Expr:
        return relax.op.multiply(relax.op.nn.silu(_projected(x, _A)), _projected(x, _C))

    undone = "is computed in its kernel, which a slice would undo"
    _assert_refused(gated, f"relax.nn.silu {undone}", f"relax.multiply {undone}")


def test_readers_that_would_copy_a_slice_are_named() -> None:
    def chained(x: relax.Expr) -> relax.Expr:
        first = relax.op.matmul(_projected(x, _A), relax.const(_B[:4]))
        return relax.op.concat([_read(first), _read(_projected(x, _B))], axis=1)

    outcome = CombineProducts().run(graph(chained, (3, 8)))
    assert outcome.sites == ()  # a product over another input lies between them

    def summed(x: relax.Expr) -> relax.Expr:
        return relax.op.add(relax.op.sum(_projected(x, _A)), relax.op.sum(_read(_projected(x, _B))))

    _assert_refused(summed, *["relax.sum does not take a slice in place"] * 2)


def test_shared_weights_are_not_stored_twice() -> None:
    def tied(x: relax.Expr) -> relax.Expr:
        table = relax.const(_A)
        row = relax.op.take(table, relax.const(2), axis=0)
        products = [relax.op.matmul(x, table), relax.op.matmul(x, relax.const(_C))]
        return relax.op.concat([relax.op.add(_read(products[0]), relax.op.sum(row)), _read(products[1])], axis=0)

    _assert_refused(tied, "others read its weights too: combined, they would be stored twice", None)


@pytest.mark.parametrize(
    "weight",
    [lambda y: y, lambda y: relax.const(np.ones((2, 8, 4), "float32"))],
    ids=["not constant", "not one matrix"],
)
def test_other_products_are_no_sites(weight: Callable[[relax.Expr], relax.Expr]) -> None:
    def body(x: relax.Expr, y: relax.Expr) -> relax.Expr:
        products = [relax.op.matmul(x, weight(y)) for _ in range(2)]
        return relax.op.add(*products)

    assert assert_kept(CombineProducts(), body, (3, 8), (8, 4)).sites == ()


def test_a_product_under_another_name_is_one_product() -> None:
    x = relax.Var("x", relax.TensorType((3, 8), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            product = builder.emit(relax.op.matmul(x, relax.const(_A)))
            output = builder.emit_output(product)
        builder.emit_func_output(output)
    assert [each.product.name for each in ConstantProducts(builder.get()["main"])] == [product.name]


def test_attention_reads_rows_that_lie_together() -> None:
    def body(x: relax.Expr) -> relax.Expr:
        query = relax.op.multiply(_projected(x, _A), relax.const(np.float32(0.5)))
        return relax.op.matmul(query, _read(_projected(x, _C)))

    _assert_refused(body, *["attention would read rows that lie apart"] * 2)


def test_combining_again_changes_nothing() -> None:
    once = CombineProducts().run(graph(lambda x: _in_order([_read(_projected(x, w)) for w in (_A, _B)]), (3, 8)))
    twice = CombineProducts().run(once.module)
    assert twice.sites == ()
    tvm.ir.assert_structural_equal(twice.module, once.module)
