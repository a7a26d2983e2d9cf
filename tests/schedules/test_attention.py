from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, sym, tirx
from tvm.ir import Expr
from tvm.relax import op

import targets
from passes.fuse_attention import FuseAttention
from passes.round_attention import RoundAttention
from schedules import attention_groups, attention_mask, attention_pairs, schedule_module
from schedules.attention_structure import AttentionAnalysis
from schedules.intrin.bf16_pairs import bf16_pairs
from schedules.loops import index
from schedules.stages import Axis, substitute
from targets.base import Target
from targets.host import missing_features
from tests.schedules.execution import TARGET, assembly_of, normal, scheduled

LENGTHS = st.sampled_from([1, 2, 7, 16, 17, 31, 32, 33, 49, 67])
Size = int | tirx.Var
# What rounds on this machine: AVX512-BF16's pairs also where there are tile registers.
ROUNDING = [
    target
    for target in {each.name: each for each in (TARGET, targets.get("x86-avx512-bf16"))}.values()
    if bf16_pairs(target) is not None and not missing_features(target)
]
rounding = pytest.mark.parametrize("target", ROUNDING, ids=lambda target: target.name)


def _module(
    heads: int,
    size: int,
    queries: int | str,
    keys: int | str,
    *,
    bias: bool = False,
    groups: int | None = None,
    sinks: bool = False,
    hidden: float | None = None,
) -> tvm.IRModule:
    """Return the attention of q [2, S, H * D] over k and v [2, T, G * D] as the pass fuses it; G is H by default.

    A bias is [H, S, T], sinks are [H]. Where `hidden` is given it is added to what the mask hides that is causal for
    the last S of T tokens.
    """
    groups = groups or heads
    symbols = {name: tirx.Var(name, "int64") for name in (queries, keys) if isinstance(name, str)}
    s, t = (symbols[n] if isinstance(n, str) else n for n in (queries, keys))
    shapes: list[tuple[Size, ...]] = [(2, n, h * size) for n, h in ((s, heads), (t, groups), (t, groups))]
    if bias:
        shapes.append((heads, s, t))
    if sinks:
        shapes.append((heads,))
    inputs = [relax.Var(f"x{n}", relax.TensorType(shape, "float32")) for n, shape in enumerate(shapes)]
    builder = relax.BlockBuilder()
    with builder.function("main", inputs):
        with builder.dataflow():
            apart = [
                builder.emit(op.permute_dims(op.reshape(x, (2, n, h, size)), [0, 2, 1, 3]))
                for x, n, h in zip(inputs[:3], (s, t, t), (heads, groups, groups), strict=True)
            ]
            if groups != heads:
                apart[1:] = [_repeated(builder, x, (2, groups, heads // groups, t, size)) for x in apart[1:]]
            q, k, v = apart
            scores = builder.emit(op.matmul(q, builder.emit(op.permute_dims(k, [0, 1, 3, 2]))))
            scores = builder.emit(op.multiply(scores, relax.const(size**-0.5, "float32")))
            if bias:
                scores = builder.emit(op.add(scores, inputs[3]))
            if hidden is not None:
                rows = op.reshape(op.arange(t - s, t, 1, "int64"), (s, 1))
                visible = builder.emit(op.less_equal(builder.emit(op.arange(0, t, 1, "int64")), builder.emit(rows)))
                zero, low = relax.const(0.0, "float32"), relax.const(hidden, "float32")
                scores = builder.emit(op.add(scores, builder.emit(op.where(visible, zero, low))))
            if sinks:
                column = builder.emit(op.broadcast_to(op.reshape(inputs[-1], (1, heads, 1, 1)), (2, heads, s, 1)))
                scores = builder.emit(op.concat([scores, column], -1))
            weights = builder.emit(op.nn.softmax(scores, axis=-1))
            if sinks:
                weights = builder.emit(op.strided_slice(weights, [3], [0], [t], [1]))
            if bias or hidden is not None:  # as exporters guard against rows of which everything is masked
                weights = builder.emit(op.where(op.isnan(weights), relax.const(0.0, "float32"), weights))
            result = builder.emit(op.matmul(weights, v))
            output = builder.emit_output(builder.emit(op.permute_dims(result, [0, 2, 1, 3])))
        builder.emit_func_output(output)
    outcome = FuseAttention().run(builder.get())
    assert outcome.rewritten == 1
    return relax.transform.LegalizeOps()(outcome.module)


def _repeated(builder: relax.BlockBuilder, x: relax.Expr, shape: tuple[Size, ...]) -> relax.Expr:
    batch, groups, count, keys, size = shape
    wide = op.broadcast_to(op.expand_dims(x, [2]), shape)
    return builder.emit(op.reshape(builder.normalize(wide), (batch, groups * count, keys, size)))


def _arrays(heads: int, size: int, queries: int, keys: int, groups: int | None = None) -> list[np.ndarray]:
    counts = ((queries, heads), (keys, groups or heads), (keys, groups or heads))
    return [normal(2, n, h * size, seed=number) for number, (n, h) in enumerate(counts)]


def _expected(
    heads: int, arrays: list[np.ndarray], bias: np.ndarray | None = None, sinks: np.ndarray | None = None
) -> np.ndarray:
    size = arrays[0].shape[-1] // heads
    q, k, v = (x.astype("float64").reshape(2, x.shape[1], -1, size).transpose(0, 2, 1, 3) for x in arrays)
    k, v = (x.repeat(heads // x.shape[1], axis=1) for x in (k, v))
    scores = q @ k.transpose(0, 1, 3, 2) * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    if sinks is not None:
        column = np.broadcast_to(sinks[:, None, None], (*scores.shape[:-1], 1))
        scores = np.concatenate([scores, column], -1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True))[..., : k.shape[2]]
    return (weights @ v).transpose(0, 2, 1, 3)


def _tolerance(size: int) -> float:
    # An error e of a score changes its weight by a factor 1 + e; scores are sums of `size` products of order 1.
    return 16 * size**0.5 * float(np.finfo("float32").eps)


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    queries=LENGTHS,
    keys=LENGTHS.filter(lambda n: n > 1),
    heads=st.integers(1, 3),
    size=st.sampled_from([8, 16, 24, 33]),
)
def test_attention_of_any_length_and_size(queries: int, keys: int, heads: int, size: int) -> None:
    call, reports = scheduled(_module(heads, size, queries, keys))
    arrays = _arrays(heads, size, queries, keys)
    np.testing.assert_allclose(call(*arrays), _expected(heads, arrays), rtol=0, atol=_tolerance(size))
    assert {report.family for report in reports} == {"attention"}


def test_symbolic_lengths_share_one_function() -> None:
    call, reports = scheduled(_module(2, 20, "s", "t"))
    assert {report.family for report in reports} == {"attention"}
    for queries, keys in [(1, 5), (1, 400), (5, 3), (33, 70), (64, 193), (40, 1)]:
        arrays = _arrays(2, 20, queries, keys)
        np.testing.assert_allclose(call(*arrays), _expected(2, arrays), rtol=0, atol=_tolerance(20))


@pytest.mark.parametrize(("heads", "groups", "size"), [(6, 2, 18), (5, 1, 80), (9, 3, 64), (7, 7, 18)])
def test_heads_that_share_keys_and_values(heads: int, groups: int, size: int) -> None:
    call, reports = scheduled(_module(heads, size, "s", "t", groups=groups))
    assert {report.family for report in reports} == {"attention"}
    for queries, keys in [(1, 1), (1, 191), (1, 385), (3, 200), (20, 30)]:
        arrays = _arrays(heads, size, queries, keys, groups)
        np.testing.assert_allclose(call(*arrays), _expected(heads, arrays), rtol=0, atol=_tolerance(size))


_BESIDE_SINKS = [(1, 400), (5, 210), (35, 40), (33, 300)]


@pytest.mark.parametrize("size", [17, 31, 47, 72])
def test_one_query_of_heads_that_leave_part_of_a_vector(size: int) -> None:
    call, _ = scheduled(_module(6, size, 1, 130, groups=2))
    arrays = _arrays(6, size, 1, 130, 2)
    np.testing.assert_allclose(call(*arrays), _expected(6, arrays), rtol=0, atol=_tolerance(size))


@pytest.mark.parametrize("sizes", [[("s", "t")], _BESIDE_SINKS], ids=["symbolic", "static"])
def test_a_sink_is_one_more_term_of_the_sum(sizes: list[tuple[int | str, int | str]]) -> None:
    for compiled in sizes:
        call, reports = scheduled(_module(4, 16, *compiled, groups=2, sinks=True))
        assert {report.family for report in reports} == {"attention"}
        for queries, keys in _BESIDE_SINKS if "s" in compiled else [compiled]:
            arrays = _arrays(4, 16, int(queries), int(keys), 2)
            for level in (-200, 0, 200):
                sinks = level + np.array([-3, 0, 1, 2.5], "float32")
                expected = _expected(4, arrays, sinks=sinks.astype("float64"))
                np.testing.assert_allclose(call(*arrays, sinks), expected, rtol=0, atol=_tolerance(16))


@pytest.mark.parametrize(("queries", "keys"), [(37, 300), (5, 517)])
def test_long_rows_are_summed_in_blocks_of_keys(queries: int, keys: int) -> None:
    arrays = _arrays(2, 16, queries, keys)
    # The largest score comes last, so that every block shrinks what was summed before.
    arrays[1][:, keys - 1] = 20 * arrays[0][:, 0]
    call, _ = scheduled(_module(2, 16, queries, keys))
    # Scores of several hundreds: their rounding errors grow with them.
    np.testing.assert_allclose(call(*arrays), _expected(2, arrays), rtol=0, atol=100 * _tolerance(16))


@pytest.mark.parametrize("queries", [1, 19])
def test_a_bias_of_queries_and_keys_is_added_and_a_masked_query_gives_zeros(queries: int) -> None:
    arrays, bias = _arrays(3, 8, queries, 23), normal(3, queries, 23, seed=7)
    bias[1, 0] = -np.inf
    call, reports = scheduled(_module(3, 8, queries, 23, bias=True))
    with np.errstate(invalid="ignore"):
        want = np.nan_to_num(_expected(3, arrays, bias))
    np.testing.assert_allclose(call(*arrays, bias), want, rtol=0, atol=_tolerance(8))
    assert "attention" in {report.family for report in reports}


@pytest.mark.parametrize("target", ["x86-avx2", "x86-avx512", "arm64"])
def test_code_is_generated_for_every_kind_of_register(target: str) -> None:
    chosen = targets.get(target)
    module, reports = schedule_module(_module(2, 32, 40, 50), chosen)
    tvm.compile(module, chosen.tvm_target())
    assert [report.family for report in reports] == ["attention"]


@pytest.mark.parametrize(("name", "most"), [("x86-avx512", 13 * 8), ("x86-avx512-amx", 2), ("x86-avx2", 2)])
def test_a_core_of_two_multiply_adds_a_cycle_asks_for_lines_between_them(name: str, most: int) -> None:
    chosen = targets.get(name)
    module, _ = schedule_module(_module(2, 64, 64, 300), chosen)
    words = assembly_of(tvm.compile(module, chosen.tvm_target())).split()
    steps = [word.startswith("prefetch") for word in words if word.startswith(("prefetch", "vfmadd"))]
    runs = [len(list(run)) for asked, run in itertools.groupby(steps) if asked]
    assert max(runs) == most


@pytest.mark.parametrize(("queries", "keys"), [(197, 300), (192, 263), (205, 512)])
def test_blocks_of_queries_that_take_keys_together_are_right(queries: int, keys: int) -> None:
    target = targets.get("x86-avx2")
    if missing_features(target):
        pytest.skip("needs AVX2")
    heads, size = 8, 64
    arrays = _arrays(heads, size, queries, keys)
    # Some queries see none of the first block of keys, and one sees no key at all.
    hidden = np.zeros((heads, queries, keys), bool)
    hidden[:, 20:90, :200] = True
    hidden[2, 77] = True
    bias = np.where(hidden, -np.inf, 0).astype("float32")
    for biases in ([], [bias]):
        call, _ = scheduled(_module(heads, size, queries, keys, bias=bool(biases)), target)
        with np.errstate(all="ignore"):
            expected = np.nan_to_num(_expected(heads, arrays, *(each.astype("float64") for each in biases)), nan=0.0)
        np.testing.assert_allclose(call(*arrays, *biases), expected, rtol=0, atol=_tolerance(size))


def test_keys_that_the_second_level_cache_does_not_hold_are_taken_by_blocks_of_queries_together() -> None:
    def size(queries: int, keys: int, name: str = "x86-avx2") -> int:
        chosen, sizes = targets.get(name), []

        def note(buffer: tirx.AllocBuffer) -> None:
            if buffer.buffer.name == "kept":
                sizes.append(int(buffer.buffer.shape[0]) // 3)

        module, _ = schedule_module(_module(8, 64, queries, keys), chosen)
        for function in module.functions.values():
            tvm_ffi.structural_walk(function, (tirx.AllocBuffer, note))
        return max(sizes, default=1)

    assert size(640, 1500) == 8
    assert size(128, 1500) == 4
    assert size(640, 200) == 1
    assert size(640, 1500, "x86-avx512") == 1


@pytest.mark.parametrize("low", [-np.inf, float(np.finfo("float32").min)], ids=["infinite", "lowest"])
@pytest.mark.parametrize(("heads", "groups"), [(6, 2), (3, 3), (5, 1)])
@pytest.mark.parametrize("name", ["x86-avx2", "x86-avx512"])
def test_causal_queries_of_heads_that_share_keys_take_them_together(
    name: str, heads: int, groups: int, low: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = targets.get(name)
    if missing_features(target):
        pytest.skip(f"needs {name}")
    # So few queries are groups of several blocks then.
    monkeypatch.setattr(attention_groups, "GROUPS_OF_CORE", 1)
    call, _ = scheduled(_module(heads, 16, "s", "t", groups=groups, hidden=low), target)
    for queries, keys in [(131, 131), (64, 500), (75, 40), (16, 1), (200, 193)]:
        arrays = _arrays(heads, 16, queries, keys, groups)
        with np.errstate(all="ignore"):
            want = np.nan_to_num(_expected(heads, arrays, _causal(queries, keys, low)), nan=0.0)
        np.testing.assert_allclose(call(*arrays), want, rtol=0, atol=_tolerance(16))


def _requests(module: tvm.IRModule) -> list[tvm.ir.TensorLoad]:
    """Return what is asked for, in order."""
    found: list[tvm.ir.TensorLoad] = []

    def note(call: tvm.ir.Call) -> None:
        if isinstance(call.op, tvm.ir.Op) and call.op.name == "tirx.prefetch":
            found.append(call.args[0].args[0])

    for function in module.functions.values():
        tvm_ffi.structural_walk(function, (tvm.ir.Call, note))
    return found


@pytest.mark.parametrize(("name", "asked"), [("x86-avx2", "x1"), ("x86-avx512", "x2"), ("arm64", "x2")])
def test_few_registers_ask_for_keys_and_others_for_values_while_values_are_summed(name: str, asked: str) -> None:
    module, _ = schedule_module(_module(6, 64, 1, 512, groups=2), targets.get(name))
    assert _requests(module)[-1].source.name == asked


@pytest.mark.parametrize("heads", [1, 3, 7])
def test_passes_over_values_ask_for_each_line_of_the_next_keys(heads: int) -> None:
    module, _ = schedule_module(_module(2 * heads, 64, 1, 512, groups=2), targets.get("x86-avx2"))
    passes = 2 if heads == 1 else 4
    requests = _requests(module)[-2:] if heads == 1 else _requests(module)[-1:]
    places = [each for request in requests for each in request.indices]
    (task, start, key) = tirx.analysis.undefined_vars(tirx.Evaluate(tirx.call_extern("int32", "", *places)), [])
    analyzer, found = sym.Analyzer(), set[tuple[int, ...]]()
    for number, row in itertools.product(range(passes), range(256)):
        values = {task: index(0), start: index(number), key: index(row)}
        for request in requests:
            found.add(tuple(int(analyzer.simplify(substitute(each, values))) for each in request.indices))
    assert found == {(0, 256 + row, column) for row in range(256) for column in range(0, 64, 16)}


@pytest.mark.parametrize("queries", [97, 100, 112, 161])
def test_vectors_of_queries_are_as_wide_as_registers_together_are(queries: int) -> None:
    chosen = targets.get("x86-avx512-amx")
    module, _ = schedule_module(_module(2, 64, queries, 64), chosen)
    widths: set[int] = set()

    def note(loop: tirx.For) -> None:
        if loop.kind == tirx.ForKind.VECTORIZED:
            widths.add(int(loop.extent))

    for function in module.functions.values():
        tvm_ffi.structural_walk(function, (tirx.For, note))
    assert widths <= {16, 32, 64}


def test_hidden_blocks_of_keys_are_right() -> None:
    call, _ = scheduled(_module(2, 16, "s", "t", bias=True))
    for queries, keys, low in [(300, 300, -np.inf), (64, 600, float(np.finfo("float32").min)), (40, 520, -np.inf)]:
        arrays = _arrays(2, 16, queries, keys)
        causal = np.arange(keys) <= np.arange(queries)[:, None] + keys - queries
        padded = causal & (np.arange(keys) >= 230)  # hides the first block from all, and everything from some
        for visible in (causal, padded):
            bias = np.broadcast_to(np.where(visible, 0, low), (2, queries, keys)).astype("float32")
            with np.errstate(all="ignore"):
                expected = np.nan_to_num(_expected(2, arrays, bias.astype("float64")), nan=0.0)
            np.testing.assert_allclose(call(*arrays, bias), expected, rtol=0, atol=_tolerance(16))


def test_hidden_blocks_of_keys_are_not_read() -> None:
    call, _ = scheduled(_module(1, 16, 64, 1024, bias=True))
    arrays = _arrays(1, 16, 64, 1024)
    visible = np.arange(1024) <= np.arange(64)[:, None]
    expected = _expected(1, arrays, np.where(visible, 0, -np.inf))
    arrays[2][:, 256:] = np.nan
    bias = np.where(visible, 0, -np.inf).astype("float32")[None]
    np.testing.assert_allclose(call(*arrays, bias), expected, rtol=0, atol=_tolerance(16))


def _causal(queries: int, keys: int, low: float) -> np.ndarray:
    return np.where(np.arange(keys) <= np.arange(queries)[:, None] + keys - queries, 0.0, low)


@pytest.mark.parametrize("low", [-np.inf, float(np.finfo("float32").min)], ids=["infinite", "lowest"])
def test_causal_attention_of_any_length(low: float) -> None:
    call, reports = scheduled(_module(1, 16, "s", "t", hidden=low))
    assert "attention" in {report.family for report in reports}
    for queries, keys in [(131, 131), (64, 300), (33, 500), (75, 40)]:  # with fewer keys the first queries see none
        _check_causal(call, queries, keys, low)


@pytest.mark.parametrize("low", [-np.inf, float(np.finfo("float32").min)], ids=["infinite", "lowest"])
def test_few_causal_queries_of_any_length(low: float) -> None:
    call, _ = scheduled(_module(1, 16, "s", "t", hidden=low))
    # Some blocks of keys all queries see, some the later queries alone, and of the last ones a part is hidden.
    for queries, keys in [(1, 1), (1, 517), (7, 517), (5, 390), (7, 200), (6, 9)]:
        _check_causal(call, queries, keys, low)


def test_causal_attention_of_constant_length() -> None:
    call, _ = scheduled(_module(1, 16, 131, 131, hidden=-np.inf))
    _check_causal(call, 131, 131, -np.inf)


def _check_causal(call: Callable[..., np.ndarray], queries: int, keys: int, low: float) -> None:
    arrays = _arrays(1, 16, queries, keys)
    with np.errstate(all="ignore"):
        want = np.nan_to_num(_expected(1, arrays, _causal(queries, keys, low)), nan=0.0)
    np.testing.assert_allclose(call(*arrays), want, rtol=0, atol=_tolerance(16))


@pytest.mark.parametrize("low", [-np.inf, float(np.finfo("float32").min)], ids=["infinite", "lowest"])
def test_scores_are_kept_where_masks_hide_only_ends(low: float) -> None:
    query, key, score = tirx.Var("query", "int64"), tirx.Var("key", "int64"), tirx.Var("score", "float32")
    bound, scaled = tirx.Var("bound", "int64"), score * tirx.const(0.5, "float32")
    causal, ends = key <= query + 3, key < bound
    depth, column = (Axis(tirx.Var(name, "int64"), 16) for name in ("depth", "column"))
    some = AttentionAnalysis(
        (), Axis(query, 16), Axis(key, 16), depth, column, score, score, score, score, scaled, False, score, ()
    )

    def scale(logit: Expr) -> float | None:
        return attention_mask.kept(replace(some, logit=logit)).scale

    zero, hidden = tirx.const(0.0, "float32"), tirx.const(low, "float32")
    assert scale(scaled) == 0.5
    assert scale(tirx.Select(tirx.And(causal, ends), scaled, hidden)) == 0.5
    assert scale(scaled + tirx.Select(tirx.And(causal, ends), zero, hidden)) == 0.5
    assert scale(scaled + tirx.Select(tirx.And(causal, key >= bound), zero, hidden)) is None
    assert scale(scaled + tirx.const(1.0, "float32") + tirx.Select(causal, zero, hidden)) is None
    assert scale(score * tirx.const(1e-9, "float32") + tirx.Select(causal, zero, hidden)) is None


def test_keys_behind_the_last_query_are_not_read() -> None:
    call, _ = scheduled(_module(1, 16, 64, 1024, hidden=-np.inf))
    arrays = _arrays(1, 16, 64, 1024)
    arrays[2][:, 992:] = np.nan  # the first of them is the last key that query 32 sees
    got = call(*arrays)
    assert np.isfinite(got[:, :32]).all()
    assert np.isnan(got[:, 32:]).all()


def test_what_a_causal_mask_leaves_may_be_hidden_by_another() -> None:
    call, _ = scheduled(_module(2, 16, "s", "t", bias=True, hidden=-np.inf))
    for queries, keys in [(64, 300), (35, 96)]:
        arrays = _arrays(2, 16, queries, keys)
        padded = np.broadcast_to(np.where(np.arange(keys) < 40, -np.inf, 0), (2, queries, keys)).astype("float32")
        with np.errstate(all="ignore"):
            want = np.nan_to_num(_expected(2, arrays, padded + _causal(queries, keys, -np.inf)), nan=0.0)
        np.testing.assert_allclose(call(*arrays, padded), want, rtol=0, atol=_tolerance(16))


def _rounded(array: np.ndarray) -> np.ndarray:
    return array.astype(ml_dtypes.bfloat16).astype("float32")


def _check_rounded(
    target: Target, module: tvm.IRModule, heads: int, lengths: list[tuple[int, int]], groups: int | None = None
) -> None:
    """Compare with an attention of rounded operands; rounding the weights is all that is left of the error."""
    outcome = RoundAttention(target.name).run(module)
    assert outcome.rewritten == 1
    call, reports = scheduled(outcome.module, target)
    assert {report.family for report in reports} == {"attention"}
    columns = next(int(x.ty.shape[2]) for x in module["main"].params[2:3])
    size = columns // (groups or heads)
    for queries, keys in lengths:
        arrays = _arrays(heads, size, queries, keys, groups)
        want = _expected(heads, [_rounded(array) for array in arrays])
        atol = 2.0**-9 * float(np.abs(arrays[2]).max()) + _tolerance(size)
        np.testing.assert_allclose(call(*arrays), want, rtol=0, atol=atol)


@rounding
@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    queries=LENGTHS.filter(lambda n: n >= 8),
    keys=st.sampled_from([2, 7, 17, 32, 67, 131, 300]),
    heads=st.integers(1, 3),
    size=st.sampled_from([2, 18, 32, 80, 256]),
)
def test_products_of_pairs_are_those_of_rounded_operands(
    target: Target, queries: int, keys: int, heads: int, size: int
) -> None:
    _check_rounded(target, _module(heads, size, queries, keys), heads, [(queries, keys)])


@rounding
def test_pairs_of_symbolic_lengths_and_shared_heads(target: Target) -> None:
    lengths = [(8, 1), (9, 67), (33, 193), (64, 400)]
    _check_rounded(target, _module(4, 32, "s", "t", groups=2), 4, lengths, 2)


@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (9, 3), (5, 1)])
def test_keys_that_heads_share_are_packed_once(heads: int, groups: int) -> None:
    target = targets.get("x86-avx512-amx")
    module = RoundAttention(target.name).run(_module(heads, 32, "s", "t", groups=groups)).module
    packed: set[int] = set()

    def note(allocation: tirx.AllocBuffer) -> None:
        if allocation.buffer.name == "packed_keys":
            packed.add(int(allocation.buffer.shape[0]))

    for function in schedule_module(module, target)[0].functions.values():
        tvm_ffi.structural_walk(function, (tirx.AllocBuffer, note))
    assert packed == {2 * groups}  # of a batch of two


@rounding
@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (4, 2)])
def test_parts_of_a_batch_are_packed_one_after_the_other(
    target: Target, monkeypatch: pytest.MonkeyPatch, heads: int, groups: int
) -> None:
    monkeypatch.setattr(attention_pairs, "PACKED_BYTES", 1)
    _check_rounded(target, _module(heads, 32, 67, 131, groups=groups), heads, [(67, 131)], groups)


@rounding
def test_heads_are_packed_where_their_queries_are_computed(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_pairs, "HEADS_TO_OWN", 1)
    _check_rounded(target, _module(4, 32, 67, 131, groups=2), 4, [(67, 131)], 2)


@rounding
def test_few_queries_are_not_rounded_where_their_number_is_symbolic(target: Target) -> None:
    call, _ = scheduled(RoundAttention(target.name).run(_module(2, 32, "s", "t")).module, target)
    arrays = _arrays(2, 32, 3, 50)
    np.testing.assert_allclose(call(*arrays), _expected(2, arrays), rtol=0, atol=_tolerance(32))


@rounding
@pytest.mark.parametrize("low", [-np.inf, float(np.finfo("float32").min)], ids=["infinite", "lowest"])
def test_rounded_attention_may_be_causal(target: Target, low: float) -> None:
    call, _ = scheduled(RoundAttention(target.name).run(_module(1, 32, "s", "t", hidden=low)).module, target)
    for queries, keys in [(131, 131), (40, 333), (40, 21)]:
        arrays = _arrays(1, 32, queries, keys)
        bias = _causal(queries, keys, low)
        with np.errstate(all="ignore"):
            want = np.nan_to_num(_expected(1, [_rounded(array) for array in arrays], bias), nan=0.0)
        np.testing.assert_allclose(call(*arrays), want, rtol=0, atol=2.0**-9 * 5)


@rounding
@settings(max_examples=8, deadline=None, derandomize=True)
@given(queries=st.sampled_from([8, 17, 49, 64]), keys=st.sampled_from([2, 49, 64, 97, 300]), heads=st.integers(1, 3))
def test_rounded_attention_may_have_a_bias_that_hides_keys(target: Target, queries: int, keys: int, heads: int) -> None:
    call, _ = scheduled(RoundAttention(target.name).run(_module(heads, 32, queries, keys, bias=True)).module, target)
    arrays, bias = _arrays(heads, 32, queries, keys), normal(heads, queries, keys, seed=7)
    bias[:, 0] = -np.inf
    bias[:, :, keys // 2] = -np.inf
    with np.errstate(invalid="ignore"):
        want = np.nan_to_num(_expected(heads, [_rounded(array) for array in arrays], bias), nan=0.0)
    np.testing.assert_allclose(call(*arrays, bias), want, rtol=0, atol=2.0**-9 * 5)


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("x86-avx512-amx", "tdpbf16ps"), ("x86-avx512-bf16", "vdpbf16ps"), ("arm64-i8mm", "bfdot")],
)
def test_code_of_pairs_has_the_instruction_and_no_call(target: str, instruction: str) -> None:
    chosen = targets.get(target)
    module, _ = schedule_module(RoundAttention(target).run(_module(2, 32, 40, 50)).module, chosen)
    assembly = assembly_of(tvm.compile(module, chosen.tvm_target()))
    assert instruction in assembly
    assert not [line for line in assembly.splitlines() if "bf16" in line and ("call" in line or "\tbl\t" in line)]
