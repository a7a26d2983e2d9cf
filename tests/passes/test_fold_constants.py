from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from optimizer.frontend.importer import import_model
from passes.base import Site
from passes.fold_constants import FoldConstants
from passes.provenance import annotate
from tests.frontend.comparison import node_model
from tests.passes.graph import assert_kept, assert_rewritten, graph
from tests.passes.properties.relax_interpreter import Interpreter
from tests.passes.relax_modules import constants, operators, run


def _weights(*shape: int, dtype: str = "float32") -> relax.Expr:
    return relax.const(np.arange(np.prod(shape)).reshape(shape).astype(dtype), dtype)


def _constant_bytes(module: tvm.IRModule) -> int:
    sizes = []

    def note(expr):
        if isinstance(expr, tvm.ir.GenericConst):
            sizes.append(expr.value.numpy().nbytes)

    relax.analysis.post_order_visit(module["main"], note)
    return sum(sizes)


@pytest.mark.parametrize(
    "body",
    [
        lambda x: op.matmul(x, op.permute_dims(_weights(32, 64))),
        lambda x: op.matmul(x, op.reshape(_weights(32, 64), (64, 32))),
        lambda x: op.add(x, op.multiply(_weights(64), op.exp(op.negative(_weights(64))))),
        lambda x: op.matmul(
            x, op.multiply(op.astype(_weights(64, 32, dtype="int8"), "float32"), relax.const(0.5, "float32"))
        ),
    ],
)
def test_constants_are_computed_at_compile_time(body) -> None:
    module = graph(body, (2, 64))
    outcome = FoldConstants().run(module)
    assert len(operators(outcome.module)) == 1
    assert outcome.rewritten == len(operators(module)) - 1
    x = np.random.default_rng(0).standard_normal((2, 64)).astype("float32")
    np.testing.assert_array_equal(run(outcome.module, x), run(module, x))
    assert FoldConstants().run(outcome.module).rewritten == 0


def test_a_transposed_weight_becomes_another_weight() -> None:
    weights = np.arange(12, dtype="float32").reshape(3, 4)
    assert_rewritten(
        FoldConstants(),
        lambda x: op.matmul(x, op.permute_dims(op.add(relax.const(weights), relax.const(1.0)))),
        lambda x: op.matmul(x, relax.const(np.ascontiguousarray(weights.T + 1))),
        ("n", 4),
    )


def test_expand_of_a_scalar_stays_an_operator() -> None:
    def body(x):
        return op.add(x, op.broadcast_to(relax.const(1.5, "float32"), (5000, 5000)))

    outcome = assert_kept(FoldConstants(), body, (5000, 5000))
    assert [site.refusal for site in outcome.sites] == ["the constant would grow: 100000000 bytes of 4"]


def test_what_reads_a_kept_operator_is_computed_at_run_time() -> None:
    def body(x):
        return op.add(x, op.exp(op.tile(op.negative(_weights(300)), (100,))))

    module = graph(body, (30000,))
    outcome = FoldConstants().run(module)
    assert operators(outcome.module) == ["relax.tile", "relax.exp", "relax.add"]
    assert _constant_bytes(outcome.module) == _constant_bytes(module)
    x = np.zeros(30000, "float32")
    np.testing.assert_array_equal(run(outcome.module, x), run(module, x))


def test_dequantized_codes_are_folded_and_repeated_ones_are_not() -> None:
    def body(x):
        codes = _weights(256, dtype="int8")
        return [op.add(x, op.astype(codes, "float32")), op.tile(op.astype(codes, "float32"), (5,))]

    assert operators(FoldConstants().run(graph(body, (256,))).module) == ["relax.add", "relax.tile"]


@pytest.mark.parametrize(
    ("body", "left"),
    [
        (lambda x: op.add(x, op.concat([_weights(4), op.exp(_weights(4))])), ["relax.add"]),
        (lambda x: op.add(x, _part(op.concat([_weights(8), _weights(8)]), 1)), ["relax.add"]),
        (
            lambda x: op.add(x, op.concat([op.exp(_weights(4)), _head(x)])),
            ["relax.strided_slice", "relax.concat", "relax.add"],
        ),
    ],
)
def test_tuples_of_constants_are_folded(body, left: list[str]) -> None:
    module = graph(body, (8,))
    outcome = FoldConstants().run(module)
    assert operators(outcome.module) == left
    x = np.linspace(-1, 1, 8, dtype="float32")
    (before,), (after,) = (Interpreter(each).run([x]) for each in (module, outcome.module))
    np.testing.assert_allclose(after, before, rtol=1e-6)


def _head(x: relax.Expr) -> relax.Expr:
    return op.strided_slice(x, [0], [0], [4])


def _part(x: relax.Expr, index: int) -> relax.Expr:
    return relax.TupleGetItem(relax.BlockBuilder.current().emit(op.split(x, 2)), index)


@pytest.mark.parametrize(
    ("size", "copies", "folded"),
    [
        (257, 4, True),
        (257, 5, False),
        (256, 4, True),
        (64, 16, True),
        (64, 17, False),
        (1, 1024, True),
        (1, 1025, False),
    ],
)
def test_a_constant_grows_fourfold_at_most_beyond_a_kibibyte(size: int, copies: int, folded: bool) -> None:
    module = graph(lambda x: [x, op.tile(_weights(size, dtype="int8"), (copies,))], (1,))
    outcome = FoldConstants().run(module)
    assert ("relax.tile" not in operators(outcome.module)) is folded
    growth = f"the constant would grow: {size * copies} bytes of {size}"
    assert [site.refusal for site in outcome.sites] == [None if folded else growth]


def test_what_is_of_no_constants_is_no_site() -> None:
    assert assert_kept(FoldConstants(), lambda x: op.add(x, op.exp(x)), (8,)).sites == ()
    assert assert_kept(FoldConstants(), lambda x: [x, op.zeros((2,), "float32")], (8,)).sites == ()


def test_sites_tell_the_bindings_that_were_computed() -> None:
    outcome = FoldConstants().run(graph(lambda x: op.add(x, op.exp(op.negative(_weights(8)))), (8,)))
    assert [site.refusal for site in outcome.sites] == [None, None]
    assert len({site.location for site in outcome.sites}) == 2


def test_the_site_of_a_refusal_names_the_binding_and_carries_its_nodes() -> None:
    module = graph(lambda x: op.add(x, op.broadcast_to(relax.const(1.5), (900,))), (900,))
    first = module["main"].body.blocks[0].bindings[0].var
    sites = FoldConstants().run(annotate(module, {first: ("repeated",)})).sites
    assert sites == (Site(first.name, "the constant would grow: 3600 bytes of 4", ("repeated",)),)


@pytest.mark.parametrize(("sections", "axis"), [(2, 0), ([100, 250], -1)])
def test_parts_of_a_split_constant_are_constants(sections: int | list[int], axis: int) -> None:
    weights = np.arange(600, dtype="float32").reshape(2, 300)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            parts = builder.emit(relax.op.split(relax.const(weights), sections, axis=axis))
            count = len(parts.ty.fields)
            read = [builder.emit(relax.TupleGetItem(parts, number)) for number in range(count)]
            outputs = [builder.emit_output(relax.op.multiply(x, part)) for part in read]
        builder.emit_func_output(relax.Tuple(outputs))
    outcome = FoldConstants().run(builder.get())
    assert set(operators(outcome.module)) == {"relax.multiply"}
    assert outcome.rewritten == count
    for found, expected in zip(constants(outcome.module), np.split(weights, sections, axis=axis), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_what_depends_on_a_size_that_the_caller_chooses_stays() -> None:
    last = np.array(-1, np.int64)
    shapes = {"x": ["batch", "tokens", 4]}
    node = node_model(
        "Gather",
        {"x": np.zeros((1, 2, 4), "float32"), "last": last},
        ["y"],
        domain="",
        axis=1,
        constants=["last"],
        shapes=shapes,
    )
    outcome = FoldConstants().run(import_model(node).module)
    assert outcome.rewritten == 0
    assert "relax.take" in operators(outcome.module)
