from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, tirx
from tvm.relax import op

from passes.base import PassOutcome
from passes.block_channels import BlockChannels
from tests.passes.relax_modules import run

BLOCK = 8
Emit = Callable[[relax.Expr], relax.Var]
Body = Callable[[Emit, relax.Var], relax.Expr]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype("float32")


def weights(*shape: int, seed: int = 0) -> relax.Expr:
    return relax.const(normal(*shape, seed=seed))


def module_of(body: Body, shape: Sequence[int | str]) -> tvm.IRModule:
    """Return a module whose main binds what `body` emits; a dimension given as a string is symbolic."""
    builder = relax.BlockBuilder()
    extents = [tirx.Var(size, "int64") if isinstance(size, str) else size for size in shape]
    x = relax.Var("x", relax.TensorType(extents, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(body(builder.emit, x))
        builder.emit_func_output(output)
    return builder.get()


def kernels(module: tvm.IRModule) -> list[str]:
    """Return the operators of main in order; of computed ones the function's name without its number."""
    found: list[str] = []
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if isinstance(call, tvm.ir.Call):
                name = call.args[0].name_hint.rstrip("0123456789") if call.op.name == "relax.call_tir" else call.op.name
                found.append(name.removeprefix("relax."))
    return found


def blocked(body: Body, shape: Sequence[int | str], image: np.ndarray, block: int = BLOCK) -> PassOutcome:
    """Return the outcome of the pass, whose module is well-formed and gives the same results."""
    before = module_of(body, shape)
    outcome = BlockChannels(block).run(before)
    relax.analysis.well_formed(outcome.module)
    expected, got = run(before, image), run(outcome.module, image)
    # Sums of at most some hundred products of order 1 in another order, twice in a row.
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())
    return outcome


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    channels=st.sampled_from([(1, 5), (3, 16), (8, 8), (11, 13), (24, 7)]),
    size=st.tuples(st.integers(3, 9), st.integers(3, 9)),
    kernel=st.sampled_from([1, 2, 3]),
    stride=st.sampled_from([1, 2]),
    padding=st.integers(0, 2),
)
def test_convolutions_in_a_row_convert_only_at_the_ends(
    channels: tuple[int, int], size: tuple[int, int], kernel: int, stride: int, padding: int
) -> None:
    inner, outer = channels

    def body(emit: Emit, x: relax.Var) -> relax.Expr:
        first = emit(op.nn.conv2d(x, weights(outer, inner, kernel, kernel), strides=stride, padding=padding))
        first = emit(op.nn.relu(emit(op.add(first, weights(1, outer, 1, 1)))))
        return op.nn.conv2d(first, weights(8, outer, 1, 1, seed=1))

    outcome = blocked(body, ("n", inner, *size), normal(2, inner, *size))
    found = [name for name in kernels(outcome.module) if name in ("to_blocks", "from_blocks")]
    reads_plain = inner < BLOCK and kernel > 1
    assert found == (["from_blocks"] if reads_plain else ["to_blocks", "from_blocks"])
    assert outcome.rewritten == 2


@pytest.mark.parametrize("rank", [1, 3])
def test_other_numbers_of_spatial_axes(rank: int) -> None:
    convolution = {1: op.nn.conv1d, 3: op.nn.conv3d}[rank]

    def body(_: Emit, x: relax.Var) -> relax.Expr:
        return convolution(x, weights(12, 9, *(3,) * rank), strides=2, padding=1)

    shape = (2, 9, *range(5, 5 + rank))
    assert blocked(body, shape, normal(*shape)).rewritten == 1


def test_groups_of_whole_blocks_and_depthwise() -> None:
    def body(emit: Emit, x: relax.Var) -> relax.Expr:
        grouped = emit(op.nn.conv2d(x, weights(32, 8, 3, 3), padding=1, groups=2))
        return op.nn.conv2d(grouped, weights(32, 1, 3, 3, seed=1), padding=1, strides=2, groups=32)

    assert blocked(body, (1, 16, 7, 5), normal(1, 16, 7, 5)).rewritten == 2


@pytest.mark.parametrize(
    ("outputs", "kernel", "padding", "block", "copies"),
    [(64, 1, 0, 8, True), (64, 1, 1, 8, False), (64, 3, 0, 8, False), (24, 1, 0, 8, False), (128, 1, 0, 16, False)],
)
@pytest.mark.parametrize("strides", [(2, 2), (1, 2), (2, 1)])
def test_a_strided_filter_of_one_tap_reads_a_copy_where_two_positions_share_a_line(
    outputs: int, kernel: int, padding: int, block: int, copies: bool, strides: tuple[int, int]
) -> None:
    def body(_: Emit, x: relax.Var) -> relax.Expr:
        return op.nn.conv2d(x, weights(outputs, 16, kernel, kernel), strides=strides, padding=padding)

    outcome = blocked(body, ("n", 16, 7, 6), normal(2, 16, 7, 6), block)
    assert ("sampled" in kernels(outcome.module)) == (copies and strides[-1] > 1)


def test_squeeze_and_excite_stays_blocked() -> None:
    def body(emit: Emit, x: relax.Var) -> relax.Expr:
        image = emit(op.nn.conv2d(x, weights(20, 3, 3, 3), padding=1))
        squeezed = emit(op.mean(image, [2, 3], keepdims=True))
        reduced = emit(op.nn.silu(emit(op.nn.conv2d(squeezed, weights(2, 20, 1, 1, seed=1)))))
        gate = emit(op.sigmoid(emit(op.nn.conv2d(reduced, weights(20, 2, 1, 1, seed=2)))))
        scaled = emit(op.multiply(image, gate))
        return op.nn.conv2d(scaled, weights(9, 20, 1, 1, seed=3))

    outcome = blocked(body, (2, 3, 6, 5), normal(2, 3, 6, 5))
    assert [name for name in kernels(outcome.module) if name.endswith("_blocks")] == ["from_blocks"]
    assert outcome.rewritten == 4


def test_pooling_residual_and_concatenation_stay_blocked() -> None:
    def body(emit: Emit, x: relax.Var) -> relax.Expr:
        image = emit(op.nn.conv2d(x, weights(16, 3, 3, 3), padding=1))
        pooled = emit(op.nn.max_pool2d(image, (3, 3), (2, 2), (1, 1, 1, 1)))
        mean = emit(op.nn.avg_pool2d(image, (2, 2), (2, 2), count_include_pad=False))
        both = emit(op.concat([emit(op.add(pooled, mean)), mean], axis=1))
        return op.nn.conv2d(both, weights(8, 32, 1, 1, seed=1))

    outcome = blocked(body, (1, 3, 8, 6), normal(1, 3, 8, 6))
    assert [name for name in kernels(outcome.module) if name.endswith("_blocks")] == ["from_blocks"]


def test_a_plain_operand_joins_and_other_readers_get_plain_layout() -> None:
    def body(emit: Emit, x: relax.Var) -> relax.Expr:
        image = emit(op.nn.conv2d(x, weights(12, 12, 3, 3), padding=1))
        total = emit(op.add(emit(op.multiply(image, weights(12, 1, 1))), x))
        rows = emit(op.nn.softmax(total, axis=-1))
        last = emit(op.permute_dims(total, [0, 2, 3, 1]))
        return op.add(emit(op.sum(rows)), emit(op.sum(last)))

    outcome = blocked(body, (2, 12, 4, 5), normal(2, 12, 4, 5))
    assert kernels(outcome.module).count("to_blocks") == 1
    assert kernels(outcome.module).count("from_blocks") == 1
    assert "permute_dims" not in kernels(outcome.module)


def test_a_mean_without_its_axes_is_plain() -> None:
    def body(emit: Emit, x: relax.Var) -> relax.Expr:
        return op.mean(emit(op.nn.conv2d(x, weights(13, 4, 2, 2))), [2, 3])

    blocked(body, (3, 4, 5, 4), normal(3, 4, 5, 4))


def test_lanes_past_the_last_channel_do_not_matter() -> None:
    def body(emit: Emit, x: relax.Var) -> relax.Expr:
        image = emit(op.nn.conv2d(x, weights(11, 3, 2, 2)))
        inverse = emit(op.divide(relax.const(1.0), emit(op.abs(image))))  # infinite where a lane is zero
        return op.nn.conv2d(inverse, weights(9, 11, 2, 2, seed=1))

    blocked(body, (1, 3, 5, 6), normal(1, 3, 5, 6))


@pytest.mark.parametrize(
    ("body", "shape", "reason"),
    [
        (
            lambda _, x: op.nn.conv2d(x, weights(8, 6, 3, 3), groups=2),
            (1, 12, 5, 5),
            "groups of 6 to 4 channels are not whole blocks of 8",
        ),
        (
            lambda _, x: op.nn.conv2d(x, weights(16, 1, 3, 3), groups=8),
            (1, 8, 5, 5),
            "a depthwise convolution with 2 outputs a channel",
        ),
        (
            lambda _, x: op.nn.conv2d(x, weights(3, 8, 3, 3)),
            (1, 8, 5, 5),
            "3 output channels would leave most of a block of 8 empty",
        ),
        (
            lambda _, x: op.nn.conv2d(x, weights(8, 8, 3, 3)),
            (1, 8, "h", 5),
            "the size of the image is not known at compile time",
        ),
        (lambda _, x: op.nn.conv2d(x, x), (2, 2, 3, 3), "the weights are not constant"),
        (
            lambda emit, x: op.nn.conv2d(
                emit(op.astype(x, "float16")), relax.const(normal(8, 8, 1, 1).astype("float16"))
            ),
            (1, 8, 5, 5),
            "it computes with float16, not with float32 alone",
        ),
        (
            lambda _, x: op.nn.conv2d(x, weights(16, 8, 3, 3), groups=2),
            (1, 16, 5, 5),
            None,
        ),
        (
            lambda _, x: op.nn.conv2d(x, weights(24, 8, 3, 3), groups=2),
            (1, 16, 5, 5),
            "groups of 8 to 12 channels are not whole blocks of 8",
        ),
        (lambda _, x: op.nn.conv2d(x, weights(4, 8, 3, 3)), (1, 8, 5, 5), None),
        (lambda _, x: op.nn.conv2d(x, weights(8, 1, 3, 3), groups=8), (1, 8, 5, 5), None),
        (
            lambda _, x: op.nn.conv2d(x, weights(8, 3, 3, 8), data_layout="NHWC", kernel_layout="OHWI"),
            (1, 5, 5, 8),
            "the layouts NHWC and OHWI are not the plain ones",
        ),
        (
            lambda _, x: op.nn.conv2d(x, weights(8, 3, 3, 8), kernel_layout="OHWI"),
            (1, 8, 5, 5),
            "the layouts NCHW and OHWI are not the plain ones",
        ),
    ],
)
def test_refusal_says_why_and_changes_nothing(body: Body, shape: Sequence[int | str], reason: str | None) -> None:
    module = module_of(body, shape)
    outcome = BlockChannels(BLOCK).run(module)
    assert [site.refusal for site in outcome.sites] == [reason]
    if reason is not None:
        tvm.ir.assert_structural_equal(outcome.module, module)


_IMAGE = (1, 8, 4, 6)


@pytest.mark.parametrize(
    ("follow", "found"),
    [
        (lambda emit, y: op.nn.relu(y), ["conv2d", "nn.relu", "from_blocks"]),
        (lambda emit, y: op.nn.softmax(y, axis=1), ["conv2d", "from_blocks", "nn.softmax"]),
        (lambda emit, y: op.add(y, relax.const(1.0)), ["conv2d", "add", "from_blocks"]),
        (lambda emit, y: op.add(y, weights(8, 1, 1)), ["conv2d", "add", "from_blocks"]),
        (lambda emit, y: op.add(y, weights(6)), ["conv2d", "reshape", "add", "from_blocks"]),
        (lambda emit, y: op.add(y, weights(2, 1, 1, 1, 1)), ["conv2d", "from_blocks", "add"]),
        (lambda emit, y: op.clip(y, 0, 1), ["conv2d", "clip", "from_blocks"]),
        (lambda emit, y: op.mean(y, [2, 3], keepdims=True), ["conv2d", "mean", "reshape"]),
        (lambda emit, y: op.max(y, [-1, -2]), ["conv2d", "max", "reshape", "reshape"]),
        (lambda emit, y: op.mean(y, [2], keepdims=True), ["conv2d", "from_blocks", "mean"]),
        (lambda emit, y: op.mean(y), ["conv2d", "from_blocks", "mean"]),
        (lambda emit, y: op.permute_dims(y, [0, 2, 3, 1]), ["conv2d", "channels_last"]),
        (lambda emit, y: op.permute_dims(y, [0, 3, 2, 1]), ["conv2d", "from_blocks", "permute_dims"]),
        (lambda emit, y: op.permute_dims(y), ["conv2d", "from_blocks", "permute_dims"]),
        (lambda emit, y: op.concat([y, y], 1), ["conv2d", "concat", "from_blocks"]),
        (lambda emit, y: op.concat([y, y], -3), ["conv2d", "concat", "from_blocks"]),
        (lambda emit, y: op.concat([y, y], 2), ["conv2d", "from_blocks", "concat"]),
        (lambda emit, y: op.concat([y, weights(*_IMAGE)], 1), ["conv2d", "from_blocks", "concat"]),
        (lambda emit, y: op.nn.avg_pool2d(y, (2, 2)), ["conv2d", "nn.avg_pool2d", "from_blocks"]),
        (lambda emit, y: op.nn.adaptive_avg_pool2d(y, (1, 1)), ["conv2d", "from_blocks", "nn.adaptive_avg_pool2d"]),
    ],
)
def test_what_keeps_channels_apart_stays_blocked(follow: Body, found: list[str]) -> None:
    def body(emit: Emit, x: relax.Var) -> relax.Expr:
        return follow(emit, emit(op.nn.conv2d(x, weights(8, 3, 3, 3), padding=1)))

    outcome = BlockChannels(BLOCK).run(module_of(body, (1, 3, 4, 6)))
    assert kernels(outcome.module) == found
    assert [site.refusal for site in outcome.sites] == [None]


def test_a_partial_block_is_concatenated_last_only() -> None:
    def joined(first: int, second: int) -> Body:
        def body(emit: Emit, x: relax.Var) -> relax.Expr:
            parts = [emit(op.nn.conv2d(x, weights(count, 3, 3, 3))) for count in (first, second)]
            return op.concat(parts, 1)

        return body

    for (first, second), blocks in (((8, 11), ["from_blocks"]), ((11, 8), ["from_blocks"] * 2)):
        module = BlockChannels(BLOCK).run(module_of(joined(first, second), (1, 3, 4, 6))).module
        assert [name for name in kernels(module) if name == "from_blocks"] == blocks


def test_a_module_without_convolutions_is_returned_as_it_is() -> None:
    module = module_of(lambda _, x: op.exp(x), (2, 3))
    assert BlockChannels(BLOCK).run(module).module.same_as(module)


def test_blocking_twice_changes_nothing_more() -> None:
    once = BlockChannels(BLOCK).run(module_of(lambda _, x: op.nn.conv2d(x, weights(8, 8, 3, 3)), (1, 8, 5, 5))).module
    twice = BlockChannels(BLOCK).run(once)
    assert twice.sites == ()
    tvm.ir.assert_structural_equal(twice.module, once)


@pytest.mark.parametrize(
    ("channels", "kernel", "refusal"),
    [
        ((16, 1), 3, None),
        ((16, 1), 1, None),
        ((15, 1), 3, "1 output channels would leave most of a block of 8 empty"),
        ((4, 3), 3, None),
        ((4, 2), 3, "2 output channels would leave most of a block of 8 empty"),
    ],
)
def test_few_outputs_of_pairs_are_blocked_but_for_small_first_layers(
    channels: tuple[int, int], kernel: int, refusal: str | None
) -> None:
    def body(_: Emit, x: relax.Var) -> relax.Expr:
        return op.nn.conv2d(x, weights(channels[1], channels[0], kernel, kernel))

    module = module_of(body, (1, channels[0], 5, 5))
    (site,) = BlockChannels(BLOCK, dtype="bfloat16").run(module).sites
    assert site.refusal == refusal


def test_a_convolution_of_many_channels_is_computed_by_minimal_filtering() -> None:
    def body(emit: Emit, x: relax.Var) -> relax.Expr:
        return emit(op.nn.conv2d(x, weights(64, 64, 3, 3), padding=1))

    (site,) = blocked(body, [1, 64, 24, 24], normal(1, 64, 24, 24)).sites
    assert site.choice == "by Winograd's F(4, 3)"


@pytest.mark.parametrize(
    ("channels", "kernel", "batch"),
    [((8, 16), (2, 2), 1), ((11, 13), (3, 1), "n"), ((5, 8), (4,), 2), ((8, 1), (2, 2), 1)],
)
def test_transposed_convolution_without_overlap_is_a_product(
    channels: tuple[int, int], kernel: tuple[int, ...], batch: int | str
) -> None:
    transpose = {1: op.nn.conv1d_transpose, 2: op.nn.conv2d_transpose}[len(kernel)]
    image = normal(2 if batch == "n" else int(batch), channels[0], *(5, 7)[: len(kernel)])

    def body(emit: Emit, x: relax.Var) -> relax.Expr:
        y = emit(transpose(x, weights(*channels, *kernel), strides=list(kernel)))
        return emit(op.nn.relu(emit(op.add(y, weights(1, channels[1], *[1] * len(kernel))))))

    outcome = blocked(body, [batch, *image.shape[1:]], image)
    assert outcome.rewritten == 1
    assert "scatter" in kernels(outcome.module)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"strides": 1}, "the taps of neighbouring positions overlap or leave gaps"),
        ({"strides": 2, "padding": 1}, "it crops or extends its result"),
        ({"strides": 2, "groups": 2}, "its channels are in groups"),
    ],
)
def test_other_transposed_convolutions_are_refused(options: dict[str, int], reason: str) -> None:
    def body(emit: Emit, x: relax.Var) -> relax.Expr:
        return emit(op.nn.conv2d_transpose(x, weights(8, 8, 2, 2), **options))

    (site,) = blocked(body, [1, 8, 4, 4], normal(1, 8, 4, 4)).sites
    assert site.refusal == reason
