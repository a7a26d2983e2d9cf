"""A gate of two products is one kernel, and computes what its two products and its activation do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tvm import relax, te, tirx, topi
from tvm.ir import Expr as _Index
from tvm.ir import TensorLoad

import targets
from optimizer.lowering import build, fuse, lower
from passes.quantization.methods import quantize
from passes.quantization.scheme import QuantizedMatrix, Scheme
from passes.quantized_weights import WeightUse, product_with
from schedules import schedule_function
from schedules.joining import joined, why_several
from schedules.prepack import with_packed_weights

_HOST = targets.get("host")
_Array = NDArray[np.float32]
_Wide = NDArray[np.float64]
_Expr = relax.Expr
_Product = Callable[[relax.BlockBuilder, _Expr], _Expr]


def _sigmoid(x: _Wide) -> _Wide:
    return 1 / (1 + np.exp(-x))


_erf = np.vectorize(math.erf, otypes=[np.float64])

_ACTIVATIONS: dict[str, tuple[Callable[[_Expr], _Expr], Callable[[_Wide], _Wide]]] = {
    "silu": (relax.op.nn.silu, lambda x: x * _sigmoid(x)),
    "gelu": (relax.op.nn.gelu, lambda x: x * 0.5 * (1 + _erf(x / math.sqrt(2)))),
    "gelu_tanh": (
        relax.op.nn.gelu_tanh,
        lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    ),
    "relu": (relax.op.nn.relu, lambda x: np.maximum(x, 0)),
    "leaky_relu": (lambda x: relax.op.nn.leakyrelu(x, 0.1), lambda x: np.where(x > 0, x, 0.1 * x)),
    "sigmoid": (relax.op.sigmoid, _sigmoid),
    "tanh": (relax.op.tanh, np.tanh),
}
# Every example is a compile: shrinking would take minutes.
_BUDGET = settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
_ROWS = st.sampled_from((1, 2, 7, 8, 13, 131))
_COLUMNS = st.sampled_from((2, 16, 31, 97, 257))


def _gate(x: relax.Var, products: Sequence[_Product], activation: str, *, turned: bool = False) -> tvm.IRModule:
    """Return the module of activation(first product) * second product, or of the factors `turned`."""
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            gate, up = (builder.emit(product(builder, x)) for product in products)
            active = builder.emit(_ACTIVATIONS[activation][0](gate))
            output = builder.emit_output(relax.op.multiply(*((up, active) if turned else (active, up))))
        builder.emit_func_output(output)
    merged = relax.transform.EliminateCommonSubexpr()(builder.get())
    return relax.transform.DeadCodeElimination()(merged)


def _floats(weight: _Array, bias: _Array | None = None) -> _Product:
    def product(builder: relax.BlockBuilder, x: _Expr) -> _Expr:
        result = relax.op.matmul(x, relax.const(weight))
        return result if bias is None else relax.op.add(builder.emit(result), relax.const(bias))

    return product


def _integers(matrix: QuantizedMatrix) -> _Product:
    use = WeightUse.of("host", "int8", matrix.bits)
    return lambda builder, x: product_with(builder, x, matrix, use, "float32")


def _var(shape: Sequence[int | tirx.Expr]) -> relax.Var:
    return relax.Var("x", relax.TensorType(list(shape), "float32"))


def _drawn(*shape: int) -> _Array:
    return np.random.default_rng([len(shape), *shape]).standard_normal(shape).astype(np.float32)


def _machine(module: tvm.IRModule) -> tuple[Callable[[_Array], _Array], list[str]]:
    """Return the compiled module's function, and the families of its kernels."""
    lowered = lower(module, _HOST)
    machine = relax.VirtualMachine(build(lowered.module, _HOST), tvm.cpu())
    families = [kernel.family for kernel in lowered.kernels]
    return lambda x: machine["main"](tvm.runtime.tensor(x)).numpy(), families


def _expected(x: _Wide, weights: Sequence[_Wide], biases: Sequence[_Array | None], activation: str) -> _Wide:
    gate, up = (x @ weight + (0 if bias is None else bias) for weight, bias in zip(weights, biases, strict=True))
    return _ACTIVATIONS[activation][1](gate) * up


def _check(actual: _Array, expected: _Wide, depth: int) -> None:
    # Two sums of `depth` terms of about 1, of which the product is no more than the larger one times the other.
    bound = 64 * float(np.finfo(np.float32).eps) * (depth + 8) * max(1.0, float(np.abs(expected).max(initial=0)))
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=bound)


@_BUDGET
@given(_ROWS, st.sampled_from((2, 5, 31, 64)), _COLUMNS, st.sampled_from(sorted(_ACTIVATIONS)), *[st.booleans()] * 3)
def test_a_gate_of_any_size_is_one_kernel(
    rows: int, depth: int, columns: int, activation: str, biased: bool, also_up: bool, turned: bool
) -> None:
    x, weights = _drawn(rows, depth), [_drawn(depth, columns), -_drawn(depth, columns) + 1]
    biases = [_drawn(columns) if biased else None, _drawn(columns) + 1 if also_up else None]
    products = [_floats(weight, bias) for weight, bias in zip(weights, biases, strict=True)]
    function, families = _machine(_gate(_var(x.shape), products, activation, turned=turned))
    assert families == ["gated-product"]
    wide = [weight.astype(np.float64) for weight in weights]
    _check(function(x), _expected(x.astype(np.float64), wide, biases, activation), depth)


@settings(_BUDGET, max_examples=5)
@given(_ROWS, st.sampled_from((31, 64, 97)), _COLUMNS, st.sampled_from((4, 8)), st.sampled_from((4, 8)), st.booleans())
def test_a_gate_of_quantized_weights_is_what_its_products_are(
    rows: int, depth: int, columns: int, bits: int, other_bits: int, symmetric: bool
) -> None:
    x = _drawn(rows, depth)
    matrices = [
        quantize(weight, Scheme(bits=each, symmetric=symmetric))
        for weight, each in ((_drawn(columns, depth), bits), (1 - _drawn(columns, depth), other_bits))
    ]
    function, families = _machine(_gate(_var(x.shape), [_integers(matrix) for matrix in matrices], "silu"))
    assert families[-1] == "gated-product"
    assert "quantized-matmul" not in families
    # The integers are exact, so that only the activation's rounding differs from that of the products alone.
    alone = [_machine(_alone(x.shape, _integers(matrix)))[0](x).astype(np.float64) for matrix in matrices]
    _check(function(x), _ACTIVATIONS["silu"][1](alone[0]) * alone[1], 1)


def _alone(shape: Sequence[int], product: _Product) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    x = _var(shape)
    with builder.function("main", [x]):
        with builder.dataflow():
            output = builder.emit_output(product(builder, x))
        builder.emit_func_output(output)
    return builder.get()


@pytest.mark.parametrize("bits", [None, 4])
def test_one_kernel_serves_any_number_of_rows(bits: int | None) -> None:
    depth, columns = 64, 97
    weights = [_drawn(depth, columns), 1 - _drawn(depth, columns)]
    matrices = [quantize(np.ascontiguousarray(weight.T), Scheme(bits=bits or 8)) for weight in weights]
    products = [_floats(weight) for weight in weights] if bits is None else [_integers(matrix) for matrix in matrices]
    batch, sequence = tirx.Var("batch", "int64"), tirx.Var("sequence", "int64")
    function, families = _machine(_gate(_var((batch, sequence, depth)), products, "gelu"))
    assert families.count("gated-product") == 1
    used = weights if bits is None else [matrix.dequantized().T for matrix in matrices]
    wide = [weight.astype(np.float64) for weight in used]
    for shape in ((1, 1), (3, 1), (2, 70), (1, 131), (1, 0)):
        x = _drawn(*shape, depth)
        expected = _expected(x.astype(np.float64), wide, (None, None), "gelu")
        if bits is None:
            _check(function(x), expected, depth)
        else:  # rounds the rows to 8 bits
            scale = float(np.abs(expected).max(initial=1))
            np.testing.assert_allclose(function(x), expected, atol=0.03 * scale)


@pytest.mark.parametrize("name", ["x86-avx2", "x86-avx512-amx", "arm64"])
def test_what_is_handed_on_lies_at_the_row_in_its_block_and_is_not_asked_for(name: str) -> None:
    products = [_floats(_drawn(32, 64)), _floats(1 - _drawn(32, 64))]
    batch, sequence = tirx.Var("batch", "int64"), tirx.Var("sequence", "int64")
    lowered = lower(_gate(_var((batch, sequence, 32)), products, "silu"), targets.get(name))
    (function,) = [each for each in lowered.module.functions.values() if isinstance(each, tirx.PrimFunc)]
    places: list[tuple[str, Sequence[_Index]]] = []
    stores = (tirx.BufferStore, lambda each: places.append((each.buffer.name, each.indices)))
    loads = (TensorLoad, lambda each: places.append((each.source.name, each.indices)))
    tvm_ffi.structural_walk(function.body, [stores, loads])
    handed_on = [index for name, indices in places for index in indices if name == "gated"]
    assert handed_on
    quotients: list[_Index] = []
    for each in handed_on:
        tvm_ffi.structural_walk(each, [(kind, quotients.append) for kind in (tirx.FloorDiv, tirx.FloorMod, tirx.Div)])
    # Where rows lie is known without how batch and sequence divide them.
    assert not any(isinstance(quotient.b, tirx.Var) for quotient in quotients)
    asked = re.findall(r"T.prefetch\(T.address_of\((\w+)", function.script())
    assert "gated" not in asked
    assert asked or name != "x86-avx512-amx"


def test_a_gate_of_bfloat16_is_one_kernel() -> None:
    def drawn(*shape: int) -> _Array:
        # Small multiples of 1/8, which bfloat16 has.
        return (np.rint(_drawn(*shape) * 8) / 8).astype(np.float32)

    x, weights = drawn(7, 64), [drawn(64, 97), 1 - drawn(64, 97)]

    def product(weight: _Array) -> _Product:
        def emit(builder: relax.BlockBuilder, x: _Expr) -> _Expr:
            narrow = [builder.emit(relax.op.astype(each, "bfloat16")) for each in (x, relax.const(weight))]
            return relax.op.matmul(*narrow, out_dtype="float32")

        return emit

    function, families = _machine(_gate(_var(x.shape), [product(weight) for weight in weights], "relu"))
    assert families == ["elementwise", "gated-product"]
    wide = [weight.astype(np.float64) for weight in weights]
    _check(function(x), _expected(x.astype(np.float64), wide, (None, None), "relu"), 64)


def _function(*arguments: te.Tensor) -> tirx.PrimFunc:
    return te.create_prim_func(arguments)


def _tensor(shape: tuple[int, ...], name: str) -> te.Tensor:
    return te.placeholder([tirx.IntImm("int64", extent) for extent in shape], name=name)


def _two_functions(
    rows: int, depth: int, columns: int, *, mirrored: bool = False
) -> tuple[tirx.PrimFunc, tirx.PrimFunc]:
    """Return x @ w, and x @ w * sigmoid(y), whose rows of y are in reverse if `mirrored`."""
    x, w, y = _tensor((rows, depth), "x"), _tensor((depth, columns), "w"), _tensor((rows, columns), "y")
    product = topi.matmul(x, w)
    active = topi.sigmoid(y)
    gated = te.compute(
        product.shape, lambda i, j: product[i, j] * active[rows - 1 - i if mirrored else i, j], name="gated"
    )
    return _function(x, w, topi.matmul(x, w)), _function(x, w, y, gated)


def _why(*, shared: bool = True, constant: Sequence[int] = (1, 2), mirrored: bool = False) -> str | None:
    first, second = _two_functions(8, 16, 64, mirrored=mirrored)
    function = joined(first, second, [2], shared=[(0, 0)] if shared else [])
    assert function is not None
    return why_several(function, _HOST, constant)


def test_reasons_for_two_kernels() -> None:
    assert _why() is None
    assert _why(constant=(1,)) == "the matrix of one of the products is not constant"
    assert _why(shared=False, constant=(1, 3)) == "the products read different rows"
    assert _why(mirrored=True) is not None


def test_weights_that_are_no_constants_keep_two_kernels_in_one_function() -> None:
    function = joined(*_two_functions(8, 16, 64), [2], shared=[(0, 0)])
    assert function is not None
    assert schedule_function(function, _HOST)[1].regions == 2


@pytest.mark.parametrize("strips", [1, 2, 8])
def test_any_number_of_strips_computes_the_same(strips: int) -> None:
    rows, depth, columns = 9, 24, 331
    function = joined(*_two_functions(rows, depth, columns), [2], shared=[(0, 0)])
    assert function is not None
    packed, packings = with_packed_weights(function, _HOST, (1, 2))
    scheduled, report = schedule_function(packed, _HOST, {"strips": strips})
    assert report.family == "gated-product"
    x, weights = _drawn(rows, depth), [_drawn(depth, columns), 1 - _drawn(depth, columns)]
    arrays = [x, *(packing.pack(weight) for packing, weight in zip(packings, weights, strict=True))]
    built = tvm.compile(scheduled.with_attr("global_symbol", "main"), _HOST.tvm_target())
    tensors = [tvm.runtime.tensor(array) for array in (*arrays, np.zeros((rows, columns), np.float32))]
    built["main"](*tensors)
    made, other = (x.astype(np.float64) @ weight for weight in weights)
    _check(tensors[-1].numpy(), _sigmoid(made) * other, depth)


@pytest.mark.parametrize("name", ["x86-avx2", "x86-avx512-bf16", "arm64"])
def test_every_cpu_has_gates_in_one_kernel(name: str) -> None:
    products = [_floats(_drawn(32, 64)), _floats(1 - _drawn(32, 64))]
    lowered = lower(_gate(_var((4, 32)), products, "silu"), targets.get(name))
    assert [kernel.family for kernel in lowered.kernels] == ["gated-product"]


def test_a_norm_takes_in_neither_product_of_a_gate() -> None:
    products = [_floats(_drawn(32, 64)), _floats(1 - _drawn(32, 64))]
    scale = relax.const(_drawn(32))

    def normalized(product: _Product) -> _Product:
        return lambda builder, x: product(builder, builder.emit(relax.op.nn.rms_norm(x, scale, [-1], 1e-5)))

    module = _gate(_var((4, 32)), [normalized(product) for product in products], "silu")
    names = [str(variable.name_hint) for variable in fuse(module, _HOST).module.get_global_vars()]
    assert [name for name in names if "matmul" in name] == ["matmul_silu_matmul_multiply_packed"]
