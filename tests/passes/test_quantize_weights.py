from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

import targets
from optimizer.lowering import build, lower
from optimizer.weights import lift_weights
from passes import pipeline
from passes.base import Dataflow, Site
from passes.pack_quantized_weights import PackQuantizedWeights
from passes.provenance import annotate
from passes.quantization.fitted import Exceptions, FittedMatrix
from passes.quantization.methods import quantize
from passes.quantization.scheme import Scheme, SchemeError
from passes.quantize_weights import QuantizeWeights
from passes.quantized_weights import WeightUse
from passes.weight_sites import digest, expose, weight_sites
from tests.passes.graph import graph
from tests.passes.relax_modules import operators, run

HIDDEN, VOCABULARY = 64, 96
TARGET = WeightUse.of("host", "auto", 4).target


def _language_model(*, tied: bool = True, dtype: str = "float32") -> tvm.IRModule:
    """Embedding, one product with a residual, a head that is the embedding's transpose, and a table of angles."""
    rng = np.random.default_rng(0)
    table = rng.standard_normal((VOCABULARY, HIDDEN)).astype(dtype)
    head = table.T if tied else rng.standard_normal((HIDDEN, VOCABULARY)).astype(dtype)
    inner = rng.standard_normal((HIDDEN, HIDDEN)).astype(dtype)
    angles = rng.standard_normal((256, 20)).astype(dtype)
    builder = relax.BlockBuilder()
    tokens = relax.Var("tokens", relax.TensorType((1, 3), "int64"))
    with builder.function("main", [tokens]):
        with builder.dataflow():
            x = builder.emit(relax.op.take(relax.const(table), tokens, axis=0))
            y = builder.emit(relax.op.add(x, builder.emit(relax.op.matmul(x, relax.const(inner)))))
            logits = builder.emit(relax.op.matmul(y, relax.const(np.ascontiguousarray(head))))
            turned = builder.emit(relax.op.take(relax.const(angles), tokens, axis=0))
            output = builder.emit_output(relax.Tuple([logits, turned]))
        builder.emit_func_output(output)
    return builder.get()


def _run(module: tvm.IRModule) -> tuple[np.ndarray, int]:
    lifted = lift_weights(lower(module, TARGET).module)
    machine = relax.VirtualMachine(build(lifted.module, TARGET), tvm.cpu())
    tokens = tvm.runtime.tensor(np.array([[5, 0, 95]]))
    return machine["main"](tokens, tuple(lifted.weights))[0].numpy(), lifted.weight_bytes


def test_embedding_products_and_head_are_quantized_and_a_tied_table_stored_once() -> None:
    module = _language_model()
    outcome = QuantizeWeights(target=TARGET.name).run(module)
    assert outcome.rewritten == 3
    exact, before = _run(module)
    actual, after = _run(outcome.module)
    reference, _ = _run(QuantizeWeights(target=TARGET.name, activations="reference").run(module).module)
    angles = 256 * 20 * 4
    # Scales this few stay in the code.
    assert after - angles == (VOCABULARY + HIDDEN) * HIDDEN // 2
    assert before > after
    # int8 activations are exact to half a step of 127; two products in a row.
    scale = np.abs(reference).max()
    assert np.abs(actual - reference).max() < 2 / 127 * scale
    assert np.abs(reference - exact).max() < 0.3 * np.abs(exact).max()


def test_a_table_whose_rows_no_product_reads_stays_exact() -> None:
    outcome = QuantizeWeights(target=TARGET.name).run(_language_model())
    assert [site.refusal for site in outcome.sites if site.refusal] == [
        "rows of 20 elements are the input of no product: not an embedding"
    ]


def test_sites_name_the_result_and_carry_its_nodes() -> None:
    def body(x: relax.Expr) -> tuple[relax.Expr, relax.Expr]:
        large, small = (relax.const(np.ones((HIDDEN, columns), np.float32)) for columns in (80, 1))
        return relax.op.matmul(x, large), relax.op.matmul(x, small)

    module = graph(body, (2, HIDDEN))
    first, second = (binding.var for binding in module["main"].body.blocks[0].bindings[:2])
    module = annotate(module, {first: ("large",), second: ("small",)})
    assert QuantizeWeights(activations="reference").run(module).sites == (
        Site(first.name, None, ("large",)),
        Site(second.name, "a matrix of 64 elements is smaller than 1024", ("small",)),
    )


def test_the_reference_holds_the_rounded_weights_as_floats() -> None:
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((HIDDEN, 80)).astype(np.float32)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, HIDDEN), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(relax.op.matmul(x, relax.const(weights)))
        builder.emit_func_output(output)
    module = QuantizeWeights(group=16, activations="reference").run(builder.get()).module
    assert operators(module) == ["relax.matmul"]
    found: list[np.ndarray] = []

    def visit(expr: relax.Expr) -> None:
        if isinstance(expr, tvm.ir.GenericConst):
            found.append(expr.value.numpy())

    relax.analysis.post_order_visit(module["main"], visit)
    np.testing.assert_array_equal(found[0], quantize(weights.T, Scheme(group=16)).dequantized().T)


def test_small_and_variable_matrices_are_left() -> None:
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 8), "float32"))
    y = relax.Var("y", relax.TensorType((8, 512), "float32"))
    with builder.function("main", [x, y]):
        with builder.dataflow():
            small = builder.emit(relax.op.matmul(x, relax.const(np.ones((8, 8), np.float32))))
            output = builder.emit_output(relax.op.matmul(small, y))
        builder.emit_func_output(output)
    outcome = QuantizeWeights().run(builder.get())
    assert [site.refusal for site in outcome.sites] == ["a matrix of 64 elements is smaller than 1024"]
    assert operators(outcome.module) == ["relax.matmul", "relax.matmul"]


def test_options_that_make_no_scheme_are_refused() -> None:
    with pytest.raises(SchemeError, match=r"^groups of 5; choose one of 16, 32, 64, 128, or 0 for whole rows$"):
        QuantizeWeights(group=5)
    with pytest.raises(
        SchemeError, match=r"^cuda has no int8 products with quantized weights; choose activations=float$"
    ):
        QuantizeWeights(target="cuda", activations="int8")
    assert pipeline.instance("quantize-weights", {"bits": 8, "symmetric": False}) == QuantizeWeights(8, symmetric=False)
    with pytest.raises(
        SchemeError, match=r"^unknown method 'guess'; choose one of rtn, minimum-error, hqq, awq, gptq$"
    ):
        QuantizeWeights(method="guess")
    with pytest.raises(SchemeError, match=r"^activations 'int3'; choose one of auto, int8, float, reference$"):
        QuantizeWeights(activations="int3")


def test_passes_and_uses_say_what_they_do() -> None:
    assert str(QuantizeWeights(8, 0, symmetric=False, method="hqq", activations="float")) == (
        "int8, whole rows, with zero points, float16 scales, by hqq, float activations"
    )
    plain, tiles = (targets.get(name) for name in ("x86-avx512", "x86-avx512-amx"))
    assert str(WeightUse(plain, "int8")) == "int8 activations in groups of 32"
    assert str(WeightUse(tiles, "int8")) == "int8 activations in groups of 32, in bf16 from 16 rows on"
    assert str(PackQuantizedWeights(activations="float")) == "the integers that the model came with, float activations"
    assert WeightUse.of("cuda", "auto", 4).activations == "float"
    assert WeightUse.of("arm64-i8mm", "auto", 4).activations == "int8"
    assert WeightUse.of("arm64-i8mm", "reference", 4).activations == "reference"


def test_exceptions_are_for_all_that_read_a_matrix() -> None:
    module = _language_model()
    sites = weight_sites(module["main"], Dataflow(module["main"]))
    table = next(site.digest for site in sites if site.gathered)
    item = QuantizeWeights(target=TARGET.name, exceptions=f"{table}=int8")
    assert [item.bits_by_digest(sites)[site.digest] for site in sites] == [8, 4, 8, 4]
    _, weight_bytes = _run(item.run(module).module)
    scales = VOCABULARY * HIDDEN // 32 * 2
    assert weight_bytes - 256 * 20 * 4 in (base := VOCABULARY * HIDDEN + HIDDEN * HIDDEN // 2, base + scales)
    left = QuantizeWeights(target=TARGET.name, exceptions="*=model").run(module)
    assert {site.refusal for site in left.sites} >= {"left in the model's precision, as asked for"}
    assert left.rewritten == 0
    for text in ("head", "=int8"):
        with pytest.raises(SchemeError, match=rf"^'{text}' is not of the form PATTERN=PRECISION"):
            QuantizeWeights(exceptions=text)
    with pytest.raises(SchemeError, match=r"^'head=int3' is not of the form PATTERN=PRECISION with int4, int8 or"):
        QuantizeWeights(exceptions="head=int3")


def test_exceptions_survive_the_notation_of_passes() -> None:
    text = str(Exceptions.of(["a,b}=c{;*=int8", "/model/lm_head/*=model"]))
    item = QuantizeWeights(exceptions=text)
    assert pipeline.parse(pipeline.notation(item)) == (item,)
    assert item.precisions.bits_of(["a,b}=c{;x"], 4) == 8
    assert item.precisions.bits_of(["/model/lm_head/MatMul"], 4) == 0
    assert item.precisions.bits_of(["other"], 4) == 4


def test_fitted_matrices_are_taken_and_their_inputs_scaled_in_the_normalization() -> None:
    rng = np.random.default_rng(2)
    weights, factors = rng.standard_normal((HIDDEN, 80)).astype(np.float32), rng.uniform(0.5, 2, HIDDEN)
    factors = factors.astype(np.float32)

    def body(x: relax.Expr) -> relax.Expr:
        normalized = relax.op.nn.rms_norm(x, relax.const(np.ones(HIDDEN, np.float32)), axes=[-1], epsilon=1e-5)
        return relax.op.matmul(normalized, relax.const(weights))

    module = graph(body, (2, HIDDEN))
    matrix = quantize(weights.T / factors, Scheme())
    fitted = {digest(weights.T): FittedMatrix(matrix, factors)}
    item = QuantizeWeights(method="gptq", activations="reference", fitted=fitted)
    rewritten = item.run(module).module
    assert operators(rewritten) == ["relax.nn.rms_norm", "relax.matmul"]
    x = rng.standard_normal((2, HIDDEN)).astype(np.float32)
    normalized = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(run(rewritten, x), normalized * factors @ matrix.dequantized().T, rtol=1e-4, atol=1e-4)
    with pytest.raises(SchemeError, match=r"^gptq fits weights to inputs, which only a compile observes"):
        QuantizeWeights(method="gptq").run(module)


def test_inputs_that_no_normalization_makes_are_scaled_by_a_product() -> None:
    rng = np.random.default_rng(3)
    weights, factors = rng.standard_normal((HIDDEN, 80)).astype(np.float32), np.full(HIDDEN, 0.5, np.float32)
    matrix = quantize(2 * weights.T, Scheme())
    fitted = {digest(weights.T): FittedMatrix(matrix, factors)}
    module = graph(lambda x: relax.op.matmul(relax.op.tanh(x), relax.const(weights)), (2, HIDDEN))
    rewritten = QuantizeWeights(method="gptq", activations="reference", fitted=fitted).run(module).module
    expected = graph(
        lambda x: relax.op.matmul(
            relax.op.multiply(relax.op.tanh(x), relax.const(factors)),
            relax.const(np.ascontiguousarray(matrix.dequantized().T)),
        ),
        (2, HIDDEN),
    )
    tvm.ir.assert_structural_equal(rewritten, expected)


@pytest.mark.parametrize("activations", ["int8", "float", "reference"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_results_keep_their_type(activations: str, dtype: str) -> None:
    module = _language_model(dtype=dtype)
    rewritten = QuantizeWeights(target=TARGET.name, activations=activations).run(module).module
    tvm.ir.assert_structural_equal(rewritten["main"].ret_ty, module["main"].ret_ty, map_free_vars=True)
    if activations == "reference" and dtype == "float32":
        assert operators(rewritten) == operators(module)
    if activations == "int8":
        assert "quantize_rows" in {variable.name_hint for variable in rewritten.get_global_vars()}


def test_an_exposed_module_returns_the_operands_of_products() -> None:
    module = _language_model()
    exposed = expose(module)
    assert [site.gathered for site in exposed.sites] == [True, False, False, True]
    assert len(exposed.operands) == 2
    executable = relax.build(exposed.module, tvm.target.Target({"kind": "llvm"}))
    machine = relax.VirtualMachine(executable, tvm.cpu())
    tokens = tvm.runtime.tensor(np.array([[5, 0, 95]]))
    results = machine["main"](tokens, *(site.stored.value for site in exposed.parameters))
    table = next(site.matrix for site in exposed.sites if site.gathered)
    np.testing.assert_array_equal(results[2].numpy()[0], table[[5, 0, 95]])


def _matrix(*shape: int, dtype: str = "float32") -> relax.Expr:
    return relax.const(np.arange(np.prod(shape)).reshape(shape).astype(dtype), dtype)


@pytest.mark.parametrize(
    ("body", "shape", "dtype", "expected"),
    [
        (lambda x: relax.op.matmul(x, _matrix(4, 3)), (2, 4), "float32", (3, 4)),
        (lambda x: relax.op.matmul(x, _matrix(4, 3)), (5, 2, 4), "float32", (3, 4)),
        (lambda x: relax.op.matmul(x, relax.op.permute_dims(_matrix(3, 4))), (2, 4), "float32", (3, 4)),
        (lambda x: relax.op.matmul(x, _matrix(4, 3, dtype="float16")), (2, 4), "float16", (3, 4)),
        (lambda x: relax.op.matmul(x, _matrix(4, 3)), (4,), "float32", None),
        (lambda x: relax.op.matmul(x, _matrix(4)), (2, 4), "float32", None),
        (lambda x: relax.op.matmul(x, _matrix(5, 4, 3)), (5, 2, 4), "float32", None),
        (lambda x: relax.op.matmul(x, relax.op.permute_dims(_matrix(5, 3, 4), [0, 2, 1])), (5, 2, 4), "float32", None),
        (lambda x: relax.op.matmul(x, _matrix(4, 3, dtype="float64")), (2, 4), "float64", None),
        (lambda x: relax.op.matmul(x, _matrix(4, 3, dtype="int32")), (2, 4), "int32", None),
        (lambda x: relax.op.matmul(x, relax.op.permute_dims(x)), (2, 4), "float32", None),
        (lambda x: relax.op.matmul(x, relax.op.exp(_matrix(4, 3))), (2, 4), "float32", None),
        (relax.op.exp, (2, 4), "float32", None),
    ],
)
def test_matrices_of_products(body, shape, dtype: str, expected: tuple[int, int] | None) -> None:
    function = graph(body, shape, dtype=dtype)["main"]
    dataflow = Dataflow(function)
    sites = weight_sites(function, dataflow)
    assert [site.matrix.shape for site in sites] == ([] if expected is None else [expected])
    for site in sites:
        found = site.matrix
        turned = "relax.permute_dims" in operators(graph(body, shape, dtype=dtype))
        plain = np.arange(12).reshape(3, 4) if turned else np.arange(12).reshape(4, 3).T
        np.testing.assert_array_equal(found, plain)


@pytest.mark.parametrize(
    ("body", "dtype", "taken"),
    [
        (lambda i: relax.op.take(_matrix(4, 3), i, axis=0), "int64", True),
        (lambda i: relax.op.take(_matrix(4, 3), i, axis=0, mode="clip"), "int64", True),
        (lambda i: relax.op.take(_matrix(4, 3), i, axis=0, mode="wrap"), "int64", False),
        (lambda i: relax.op.take(_matrix(4, 3), i, axis=1), "int64", False),
        (lambda i: relax.op.take(_matrix(12), i), "int64", False),
        (lambda i: relax.op.take(_matrix(4, 3, 2), i, axis=0), "int64", False),
        (lambda i: relax.op.take(_matrix(4, 3, dtype="int32"), i, axis=0), "int64", False),
        (lambda i: relax.op.take(relax.op.exp(_matrix(4, 3)), i, axis=0), "int64", False),
        (relax.op.abs, "int64", False),
    ],
)
def test_tables_of_gathers(body, dtype: str, taken: bool) -> None:
    function = graph(body, (2,), dtype=dtype)["main"]
    dataflow = Dataflow(function)
    sites = weight_sites(function, dataflow)
    assert [site.gathered for site in sites] == [True] * taken
    for site in sites:
        np.testing.assert_array_equal(site.matrix, np.arange(12).reshape(4, 3))
