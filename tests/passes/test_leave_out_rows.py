"""Rows of logits that nobody asks for are left out before the product that makes them, and only there."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from onnx import parser
from tvm import relax, tirx

from optimizer.compile import find_target
from optimizer.frontend.importer import import_model
from optimizer.lowering import build, lower
from passes.base import PassOutcome
from passes.leave_out_rows import LeaveOutRows, shortened_outputs
from passes.rewrite_kv_cache import RewriteKvCache

_DECODER = """
    <ir_version: 8, opset_import: ["" : 17]>
    decoder (float[batch,new,4] x, float[batch,past,4] past_key)
        => (float[batch,new,16] logits, float[batch,total,4] present_key)
        <float[4,16] head = {HEAD}, float[16] bias = {BIAS}, float cap = {30.0}>
    {
        present_key = Concat <axis = 1> (past_key, x)
        turned = Transpose <perm = [0, 2, 1]> (present_key)
        scores = MatMul (x, turned)
        weights = Softmax <axis = -1> (scores)
        rows = MatMul (weights, present_key)
        product = MatMul (rows, head)
        raised = Add (product, bias)
        scaled = Div (raised, cap)
        squashed = Tanh (scaled)
        logits = Mul (squashed, cap)
    }
""".replace("HEAD", ",".join(str(n % 7 - 3) for n in range(64))).replace("BIAS", ",".join(map(str, range(16))))


def _rewritten(text: str) -> PassOutcome:
    module = RewriteKvCache().run(import_model(parser.parse_model(text)).module).module
    return LeaveOutRows().run(module)


def test_rows_are_left_out_before_the_product_and_what_follows_it() -> None:
    outcome = _rewritten(_DECODER)
    assert [site.refusal for site in outcome.sites] == [None]
    assert shortened_outputs(outcome.module["main"]) == (0,)
    (result,) = outcome.module["main"].ret_ty.fields
    assert str(result.shape.values[1]) == "new - rows_left_out"


def test_a_second_run_changes_nothing() -> None:
    once = _rewritten(_DECODER).module
    assert LeaveOutRows().run(once).sites == ()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("logits = Mul (squashed, cap)", "logits = Softmax <axis = 1> (squashed)", "no product makes the rows"),
        (
            "scaled = Div (raised, cap)",
            "wide = Concat <axis = 2> (rows, rows, rows, rows)\n scaled = Add (raised, wide)",
            "rows are combined with something that has a row for each token, too",
        ),
        (
            "scaled = Div (raised, cap)",
            "mean = ReduceMean <axes = [1, 2]> (raised)\n scaled = Sub (raised, mean)",
            "something else reads the rows",
        ),
    ],
)
def test_other_results_are_refused(old: str, new: str, reason: str) -> None:
    outcome = _rewritten(_DECODER.replace(old, new))
    assert [site.refusal for site in outcome.sites] == [reason]
    assert shortened_outputs(outcome.module["main"]) == ()


def test_sites_name_the_result_and_carry_its_node() -> None:
    text = _DECODER.replace("logits, float[b", "logits, float[batch,new,4] apart, float[b")
    text = text.replace("logits = Mul", "[last] logits = Mul").replace("turned =", "[other] apart = Neg (x)\n turned =")
    rewritten, refused = _rewritten(text).sites
    assert (rewritten.location, rewritten.refusal, rewritten.nodes) == ("logits", None, ("last",))
    assert (refused.location, refused.refusal, refused.nodes) == ("apart", "something else reads the rows", ("other",))


def test_a_product_that_two_results_are_made_of_keeps_its_rows_for_the_second() -> None:
    text = _DECODER.replace("logits, float[b", "logits, float[batch,new,16] again, float[b")
    text = text.replace("raised = Add", "again = Neg (product)\n raised = Add")
    sites = _rewritten(text).sites
    assert [site.refusal for site in sites] == ["something else reads the rows"] * 2


def test_rows_that_have_another_name_and_another_reader_are_refused() -> None:
    batch, new, past = (tirx.Var(name, "int64") for name in ("batch", "new", "past"))
    x = relax.Var("x", relax.TensorType((batch, new, 4), "float32"))
    lengths = relax.Var("cache_lengths", relax.ShapeType([past]))
    builder = relax.BlockBuilder()
    with builder.function("main", [x, lengths], attrs={"kv_caches": [[0, 0, 1, 0, 0, 0]]}):
        with builder.dataflow():
            product = builder.emit(relax.op.matmul(x, relax.const(np.ones((4, 3), np.float32))))
            results = [builder.emit_output(product), builder.emit_output(relax.op.tanh(product))]
        builder.emit_func_output(relax.Tuple(results))
    outcome = LeaveOutRows().run(builder.get())
    assert [site.refusal for site in outcome.sites] == ["something else reads the rows"] * 2


def test_a_function_without_caches_is_left_alone() -> None:
    module = import_model(parser.parse_model(_DECODER)).module
    assert LeaveOutRows().run(module).module.same_as(module)


@pytest.mark.parametrize("skipped", [0, 1, 4])
def test_the_last_rows_are_those_of_the_whole_result(skipped: int) -> None:
    target = find_target("host")
    machine = relax.VirtualMachine(build(lower(_rewritten(_DECODER).module, target).module, target), tvm.cpu())
    rng = np.random.default_rng(0)
    x, room = rng.standard_normal((2, 5, 4)).astype(np.float32), np.zeros((2, 9, 4), np.float32)

    def run(rows: int) -> np.ndarray:
        results = machine["main"](tvm.runtime.tensor(x), tvm.runtime.tensor(room), tvm.runtime.ShapeTuple([3, rows]))
        return results[0].numpy()

    np.testing.assert_allclose(run(skipped), run(0)[:, skipped:], rtol=1e-6)
