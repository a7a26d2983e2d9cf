from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from passes.provenance import annotate
from passes.recognize_rotary_embedding import RecognizeRotaryEmbedding
from passes.rotary_embedding import rotary_embedding
from tests.passes.graph import Shape, assert_kept, assert_rewritten, graph
from tests.passes.relax_modules import run

_X, _EACH, _PAIRED = ("b", 2, "s", 8), ("b", 1, "s", 8), ("b", 1, "s", 4)
_SHAPES = (_X, _EACH, _EACH)


def _emit(expr: relax.Expr) -> relax.Expr:
    return relax.BlockBuilder.current().emit(expr)


def _part(x: relax.Expr, begin: int, end: int, step: int = 1) -> relax.Expr:
    return op.strided_slice(x, [x.ty.ndim - 1], [begin], [end], [step])


def _halves(x: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
    size = int(x.ty.shape.values[-1])
    return _emit(_part(x, 0, size // 2)), _emit(_part(x, size // 2, size))


def _split(x: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
    parts = _emit(op.split(x, 2, -1))
    return _emit(parts[0]), _emit(parts[1])


def _strided(x: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
    return _emit(_part(x, 0, 8, 2)), _emit(_part(x, 1, 8, 2))


def _paired(x: relax.Expr) -> relax.Expr:
    *outer, size = x.ty.shape.values
    return _emit(op.reshape(x, [*outer, size // 2, 2]))


def _taken(x: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
    pairs = _paired(x)
    first, second = (op.take(pairs, relax.const(number, "int64"), axis=-1, mode="clip") for number in (0, 1))
    return _emit(first), _emit(second)


def _squeezed(x: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
    first, second = _split(_paired(x))
    return _emit(op.squeeze(first, [-1])), _emit(op.squeeze(second, [-1]))


def _beside(first: relax.Expr, second: relax.Expr) -> relax.Expr:
    return op.concat([first, second], -1)


def _by_turns(first: relax.Expr, second: relax.Expr) -> relax.Expr:
    parts = [_emit(op.expand_dims(_emit(part), -1)) for part in (first, second)]
    *outer, half = parts[0].ty.shape.values[:-1]
    return op.reshape(op.concat(parts, -1), [*outer, half * 2])


_Parts = Callable[[relax.Expr], tuple[relax.Expr, relax.Expr]]
_Join = Callable[[relax.Expr, relax.Expr], relax.Expr]
_FORMS = {
    "slices": (_halves, _beside), "split": (_split, _beside), "strides": (_strided, _by_turns),
    "taken": (_taken, _by_turns), "squeezed": (_squeezed, _by_turns),
}  # fmt: skip


def _sum(parts: _Parts, join: _Join) -> Callable[..., relax.Expr]:
    def body(x: relax.Expr, c: relax.Expr, s: relax.Expr) -> relax.Expr:
        first, second = parts(x)
        return op.add(op.multiply(x, c), op.multiply(join(op.negative(second), first), s))

    return body


def _sums(parts: _Parts, join: _Join) -> Callable[..., relax.Expr]:
    def body(x: relax.Expr, c: relax.Expr, s: relax.Expr) -> relax.Expr:
        first, second = parts(x)
        real = op.subtract(op.multiply(first, c), op.multiply(second, s))
        return join(real, op.add(op.multiply(second, c), op.multiply(first, s)))

    return body


@pytest.mark.parametrize(("parts", "join"), _FORMS.values(), ids=_FORMS)
@pytest.mark.parametrize(("form", "angles"), [(_sum, _EACH), (_sums, _PAIRED)])
def test_formula_becomes_the_operator(form: Callable, angles: Shape, parts: _Parts, join: _Join) -> None:
    assert_rewritten(
        RecognizeRotaryEmbedding(),
        form(parts, join),
        lambda x, c, s: rotary_embedding(x, c, s, interleaved=join is _by_turns),
        *(_X, angles, angles),
    )


@pytest.mark.parametrize(
    "body",
    [
        lambda x, c, s: op.add(op.multiply(s, _turned(x)), op.multiply(c, x)),
        lambda x, c, s: op.add(op.multiply(x, c), op.multiply(s, _turned(x))),
        lambda x, c, s: op.add(op.multiply(_turned(x), s), op.multiply(x, c)),
    ],
)
def test_operands_may_stand_in_any_order(body: Callable) -> None:
    assert_rewritten(RecognizeRotaryEmbedding(), body, rotary_embedding, *_SHAPES)


def _turned(x: relax.Expr) -> relax.Expr:
    first, second = _halves(x)
    return op.concat([op.negative(second), first], -1)


def test_sums_of_products_in_any_order() -> None:
    def body(x: relax.Expr, c: relax.Expr, s: relax.Expr) -> relax.Expr:
        first, second = _halves(x)
        real = op.subtract(op.multiply(c, first), op.multiply(s, second))
        return op.concat([real, op.add(op.multiply(s, first), op.multiply(c, second))], -1)

    assert_rewritten(RecognizeRotaryEmbedding(), body, rotary_embedding, *(_X, _PAIRED, _PAIRED))


def test_angles_whose_cosines_are_their_sines_share_their_products() -> None:
    def body(x: relax.Expr, c: relax.Expr) -> relax.Expr:
        first, second = (_emit(op.multiply(part, c)) for part in _halves(x))
        return op.concat([op.subtract(first, second), op.add(first, second)], -1)

    assert_rewritten(RecognizeRotaryEmbedding(), body, lambda x, c: rotary_embedding(x, c, c), _X, _PAIRED)


def test_some_channels_of_a_head_are_turned_and_the_others_kept() -> None:
    def partly(turn: Callable[..., relax.Expr]) -> Callable[..., relax.Expr]:
        def body(x: relax.Expr, c: relax.Expr, s: relax.Expr) -> relax.Expr:
            turning, kept = _halves(x)
            return op.concat([turn(turning, c, s), kept], -1)

        return body

    before, after = partly(_sum(_halves, _beside)), partly(rotary_embedding)
    assert_rewritten(RecognizeRotaryEmbedding(), before, after, *(_X, _PAIRED, _PAIRED))


def _wrong_sign(x: relax.Expr, c: relax.Expr, s: relax.Expr) -> relax.Expr:
    first, second = _halves(x)
    return op.add(op.multiply(x, c), op.multiply(op.concat([second, op.negative(first)], -1), s))


def _of_unequal_parts(x: relax.Expr, c: relax.Expr, s: relax.Expr) -> relax.Expr:
    parts = op.concat([op.negative(_part(x, 5, 8)), _part(x, 0, 5)], -1)
    return op.add(op.multiply(x, c), op.multiply(parts, s))


def _of_parts_in_place(x: relax.Expr, c: relax.Expr, s: relax.Expr) -> relax.Expr:
    first, second = _halves(x)
    return op.add(op.multiply(x, c), op.multiply(op.concat([op.negative(first), second], -1), s))


def _halves_put_by_turns(x: relax.Expr, c: relax.Expr, s: relax.Expr) -> relax.Expr:
    return _sum(_halves, _by_turns)(x, c, s)


def _of_another_tensor(x: relax.Expr, c: relax.Expr, s: relax.Expr) -> relax.Expr:
    return op.add(op.multiply(x, c), op.multiply(_turned(_emit(op.exp(x))), s))


def _other_angles(x: relax.Expr, c: relax.Expr, s: relax.Expr) -> relax.Expr:
    first, second = _halves(x)
    c, s = _emit(_part(c, 0, 4)), _emit(_part(s, 0, 4))
    real = op.subtract(op.multiply(first, c), op.multiply(second, s))
    return op.concat([real, op.add(op.multiply(second, s), op.multiply(first, c))], -1)


def _read_twice(x: relax.Expr, c: relax.Expr, s: relax.Expr) -> list[relax.Expr]:
    turned = _emit(_turned(x))
    return [op.add(op.multiply(x, c), op.multiply(turned, s)), op.exp(turned)]


def _one_number(x: relax.Expr, *angles: relax.Expr) -> relax.Expr:
    return _sum(_halves, _beside)(x, relax.const(0.5), angles[1])


def _broadcast(x: relax.Expr, c: relax.Expr, s: relax.Expr) -> relax.Expr:
    return _sum(_halves, _beside)(_emit(op.sum(x, [1], keepdims=True)), _emit(op.concat([c, c], 1)), s)


_HALVES = "what is turned are not the two halves of one tensor"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (_wrong_sign, "the second part is negated in the place of the first"),
        (_of_unequal_parts, _HALVES),
        (_of_parts_in_place, _HALVES),
        (_halves_put_by_turns, _HALVES),
        (_of_another_tensor, "the cosines multiply another tensor than that whose parts are turned"),
        (_other_angles, "the second part is not turned by the angles of the first"),
        (_read_twice, "something else reads what is computed on the way"),
        (_one_number, "the shape of the angles is not known, or has more axes than the tensor that they turn"),
        (_broadcast, "the angles have other axes than the tensor that they turn"),
    ],
)
def test_refusal_says_why_and_changes_nothing(body: Callable, reason: str) -> None:
    outcome = assert_kept(RecognizeRotaryEmbedding(), body, *_SHAPES)
    assert [site.refusal for site in outcome.sites] == [reason]


@pytest.mark.parametrize(
    "body",
    [
        lambda x, c, s: op.add(op.multiply(x, c), op.multiply(op.negative(x), s)),
        lambda x, c, s: op.add(op.multiply(x, c), op.multiply(op.concat(list(_halves(x)), -1), s)),
        lambda x, c, s: op.concat([op.negative(x), x], -1),
        lambda x, c, s: op.subtract(op.multiply(x, c), op.multiply(_turned(x), s)),
    ],
)
def test_what_turns_nothing_is_no_site(body: Callable) -> None:
    assert assert_kept(RecognizeRotaryEmbedding(), body, *_SHAPES).sites == ()


@pytest.mark.parametrize(("parts", "join"), [(_halves, _beside), (_strided, _by_turns)])
def test_the_operator_computes_what_the_formula_did(parts: _Parts, join: _Join) -> None:
    module = graph(_sum(parts, join), (2, 3, 5, 8), (1, 5, 8), (5, 8))
    outcome = RecognizeRotaryEmbedding().run(module)
    assert outcome.rewritten == 1
    random = np.random.default_rng(0)
    arrays = [random.standard_normal(shape).astype("float32") for shape in ((2, 3, 5, 8), (1, 5, 8), (5, 8))]
    np.testing.assert_allclose(run(outcome.module, *arrays), run(module, *arrays), rtol=0, atol=2e-6)


def test_the_site_carries_the_nodes_of_all_that_it_replaced() -> None:
    module = graph(_sum(_halves, _beside), *_SHAPES)
    bindings = module["main"].body.blocks[0].bindings
    named = annotate(module, {binding.var: (binding.value.op.name,) for binding in bindings})
    (site,) = RecognizeRotaryEmbedding().run(named).sites
    assert {"relax.add", "relax.concat", "relax.multiply", "relax.negative", "relax.strided_slice"} <= set(site.nodes)


def test_a_rotation_is_saved_and_loaded() -> None:
    module = graph(lambda x, c, s: rotary_embedding(x, c, s, interleaved=True), *_SHAPES)
    tvm.ir.assert_structural_equal(tvm.ir.load_json(tvm.ir.save_json(module)), module)
