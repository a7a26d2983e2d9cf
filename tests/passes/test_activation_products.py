from __future__ import annotations

import numpy as np
import pytest
import tvm.ir
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.compile import CompileOptions, compile_in_memory
from optimizer.frontend.importer import import_model
from passes.recognize_integer_products import RecognizeIntegerProducts
from tests.passes.relax_modules import operators
from tests.passes.test_recognize_integer_products import HOST, after, model_of, run_both


@settings(max_examples=6, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(st.sampled_from([8, 13]), st.sampled_from([1, 6, 32, 67]), st.sampled_from([1, 19, 40, 64])),
    batch=st.sampled_from(["", "3, "]),
    types=st.tuples(st.sampled_from(["uint8", "int8"]), st.sampled_from(["uint8", "int8"])),
    zeros=st.sampled_from([(0, 0), (5, 0), (0, 9), (17, 100)]),
    dynamic=st.booleans(),
)
def test_products_of_two_activations_are_exact(
    sizes: tuple[int, int, int], batch: str, types: tuple[str, str], zeros: tuple[int, int], dynamic: bool
) -> None:
    rows, depth, columns = sizes
    declared = "".join(f", {kind} {name}" for kind, name in zip(types, ("za", "zb"), strict=True) if dynamic)
    own = {name: np.array(zero, kind) for name, zero, kind in zip(("za", "zb"), zeros, types, strict=True)}
    model = model_of(
        f"""g ({types[0]}[{batch}{rows}, {depth}] a, {types[1]}[{batch}{depth}, {columns}] b{declared})
            => (int32[{batch}{rows}, {columns}] y) {{ y = MatMulInteger (a, b, za, zb) }}""",
        {} if dynamic else own,
    )
    names, refusals, _ = after(model)
    assert (refusals, "relax.matmul" in names) == ([None], False)
    rng, image = np.random.default_rng(depth), (3,) if batch else ()
    a, b = (
        rng.integers(np.iinfo(kind).min, np.iinfo(kind).max + 1, (*image, *shape)).astype(kind)
        for kind, shape in zip(types, ((rows, depth), (depth, columns)), strict=True)
    )
    inputs = {"a": a, "b": b, **(own if dynamic else {})}
    (ours,) = compile_in_memory(model, CompileOptions(HOST))(inputs).values()
    np.testing.assert_array_equal(ours, (a.astype(np.int64) - zeros[0]) @ (b.astype(np.int64) - zeros[1]))


def test_attention_in_codes_is_that_of_onnxruntime() -> None:
    constants = {"s": np.float32(0.03), "z": np.uint8(120), "t": np.float32(0.25), "u": np.uint8(128)}
    model = model_of(
        """g (uint8[2, 4, 9, 8] q, uint8[2, 9, 4, 8] k) => (uint8[2, 4, 9, 9] y) {
             a = DequantizeLinear (q, s, z)
             b = DequantizeLinear (k, s, u)
             turned = Transpose <perm = [0, 2, 3, 1]> (b)
             p = MatMul (a, turned)
             y = QuantizeLinear (p, t, u)
           }""",
        constants,
    )
    names, refusals, _ = after(model)
    assert refusals == [None]
    assert not {"relax.matmul", "relax.dequantize"} & set(names)
    rng = np.random.default_rng(0)
    inputs = {
        name: rng.integers(0, 256, shape).astype(np.uint8) for name, shape in (("q", (2, 4, 9, 8)), ("k", (2, 9, 4, 8)))
    }
    (ours,), (reference,) = run_both(model, inputs)
    assert np.abs(ours.astype(int) - reference).max() <= 1


@pytest.mark.parametrize(
    ("left", "right", "zeros", "reason"),
    [
        ("7, 8", "8, 5", "", "fewer than 8 rows do not pay for packing"),
        ("2, 9, 8", "8, 5", "", "its operands are not as many matrices"),
        ("9, 8", "8, N", "", "the depth or the columns are not static"),
        ("9, 8", "8, 5", "9", "a zero point is not one number"),
    ],
)
def test_what_stays_as_it_is_has_a_reason(left: str, right: str, zeros: str, reason: str) -> None:
    operands = "a, b, z" if zeros else "a, b"
    declared = f", uint8[{zeros}] z" if zeros else ""
    model = model_of(f"g (uint8[{left}] a, uint8[{right}] b{declared}) => (y) {{ y = MatMulInteger ({operands}) }}", {})
    module = import_model(model).module
    outcome = RecognizeIntegerProducts(target="x86-avx512").run(module)
    assert [site.refusal for site in outcome.sites] == [reason]
    assert "relax.matmul" in operators(outcome.module)
    tvm.ir.assert_structural_equal(outcome.module, module)
