"""What exporters unroll is one operator, or one kernel, again: the whole road from ONNX to fused kernels."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compile.fused_models import kernels_of, model, operators_of, rewritten

_STATISTICS = """
    mean = ReduceMean(s, axes)
    d = Sub(s, mean)
"""
_VARIANCE = {
    "squares": _STATISTICS + "q = Mul(d, d)\n v = ReduceMean(q, axes)\n",
    "power": _STATISTICS + "q = Pow(d, two)\n v = ReduceMean(q, axes)\n",
    "moments": _STATISTICS + "q = Mul(s, s)\n p = ReduceMean(q, axes)\n m = Mul(mean, mean)\n v = Sub(p, m)\n",
}
_DEVIATION = "e = Add(v, epsilon)\n r = Sqrt(e)\n"
_QUOTIENT = {"divided": "i = Div(d, r)\n", "reciprocal": "t = Reciprocal(r)\n i = Mul(d, t)\n"}
_SHAPES = {"static": "[2,6,4,5]", "symbolic": "[b,6,h,w]", "large": "[1,6,256,256]"}
_CONSTANTS = {
    "grouping": np.array([0, 3, -1]),
    "axes": np.array([2]),
    "spatial": np.array([2, 3]),
    "two": np.float32(2),
    "epsilon": np.float32(1e-5),
    "ones": np.ones(3, "float32"),
    "zeros": np.zeros(3, "float32"),
    "gamma": np.linspace(1, 2, 6, dtype="float32").reshape(6, 1, 1),
    "beta": np.linspace(3, 4, 6, dtype="float32").reshape(6, 1, 1),
}


def _normalization(shape: str, before: str, formula: str, after: str) -> list[str]:
    text = f"""g (float{shape} x) => (float{shape} y) {{
        {before}
        {formula}
        {after}
        g = Mul(n, gamma)
        y = Add(g, beta)
    }}"""
    return operators_of(rewritten(model(text, _CONSTANTS)))


@pytest.mark.parametrize("shape", _SHAPES.values(), ids=_SHAPES)
@pytest.mark.parametrize("variance", _VARIANCE.values(), ids=_VARIANCE)
@pytest.mark.parametrize("quotient", _QUOTIENT.values(), ids=_QUOTIENT)
def test_group_norm_written_out(shape: str, variance: str, quotient: str) -> None:
    formula = variance + _DEVIATION + quotient
    after = "shape = Shape(x)\n n = Reshape(i, shape)"
    assert _normalization(shape, "s = Reshape(x, grouping)", formula, after) == ["relax.nn.group_norm"]


@pytest.mark.parametrize("shape", _SHAPES.values(), ids=_SHAPES)
def test_instance_norm_of_reshaped_groups_is_group_norm(shape: str) -> None:
    formula = "i = InstanceNormalization(s, ones, zeros)"
    after = "shape = Shape(x)\n n = Reshape(i, shape)"
    assert _normalization(shape, "s = Reshape(x, grouping)", formula, after) == ["relax.nn.group_norm"]


@pytest.mark.parametrize("shape", _SHAPES.values(), ids=_SHAPES)
@pytest.mark.parametrize("variance", _VARIANCE.values(), ids=_VARIANCE)
def test_instance_norm_written_out(shape: str, variance: str) -> None:
    formula = (variance + _DEVIATION + _QUOTIENT["divided"]).replace("axes", "spatial")
    assert _normalization(shape, "s = Identity(x)", formula, "n = Identity(i)") == ["relax.nn.instance_norm"]


_ROTATION = {
    "from": np.array([0]), "half": np.array([4]), "quarter": np.array([2]), "end": np.array([2**62]),
    "one": np.array([1]), "last": np.array([3]), "step": np.array([2]), "behind": np.array([-1]),
    "heads": np.array([1]), "joined": np.array([0, 0, 0, 8]), "paired": np.array([0, 0, 0, 4, 2]),
    "first": np.int64(0), "second": np.int64(1), "halves": np.array([4, 4]),
    "frequencies": np.array([1, 0.1, 0.01, 0.001], "float32").reshape(1, 4, 1),
    "wide_cosines": np.ones((64, 8), "float32"), "wide_sines": np.ones((64, 8), "float32"),
    "cosines": np.ones((64, 4), "float32"), "sines": np.zeros((64, 4), "float32"),
}  # fmt: skip
_WHOLE = "float[b,s,8] cos, float[b,s,8] sin"
_HALF = "float[b,s,4] cos, float[b,s,4] sin"
_ANGLES = "c = Unsqueeze(cos, heads)\n n = Unsqueeze(sin, heads)\n"
_TURNED = "xc = Mul(x, c)\n rs = Mul(r, n)\n y = Add(xc, rs)"
_SLICED = _ANGLES + "x1 = Slice(x, from, half, last)\n x2 = Slice(x, half, end, last)\n"
_ROTATED = _SLICED + "neg = Neg(x2)\n r = Concat<axis=-1>(neg, x1)\n" + _TURNED
_SUMS = "a = Mul(x1, c)\n d = Mul(x2, n)\n e = Sub(a, d)\n f = Mul(x2, c)\n h = Mul(x1, n)\n i = Add(f, h)\n"
_STACKED = (
    "eu = Unsqueeze(e, behind)\n iu = Unsqueeze(i, behind)\n j = Concat<axis=-1>(eu, iu)\n y = Reshape(j, joined)"
)
_MICROSOFT = "y = com.microsoft.RotaryEmbedding<interleaved={}>(x, p, cosines, sines)"
_FORMS = {
    "half by slices": (_WHOLE, _ROTATED),
    "half by a split": (
        _WHOLE,
        _ANGLES + "x1, x2 = Split<axis=-1>(x, halves)\n neg = Neg(x2)\n r = Concat<axis=-1>(neg, x1)\n" + _TURNED,
    ),
    "interleaved by strides": (
        _WHOLE,
        _ANGLES
        + "x1 = Slice(x, from, end, last, step)\n x2 = Slice(x, one, end, last, step)\n neg = Neg(x2)\n"
        + "nu = Unsqueeze(neg, behind)\n xu = Unsqueeze(x1, behind)\n"
        + "z = Concat<axis=-1>(nu, xu)\n r = Reshape(z, joined)\n"
        + _TURNED,
    ),
    "interleaved by pairs": (
        _HALF,
        _ANGLES + "p = Reshape(x, paired)\n x1 = Gather<axis=-1>(p, first)\n x2 = Gather<axis=-1>(p, second)\n"
        + _SUMS + _STACKED,
    ),
    "sums of halves": (_HALF, _SLICED + _SUMS + "y = Concat<axis=-1>(e, i)"),
    "partial": (
        _HALF,
        _ANGLES
        + "t = Slice(x, from, half, last)\n k = Slice(x, half, end, last)\n xc = Mul(t, c)\n"
        + "x1 = Slice(t, from, quarter, last)\n x2 = Slice(t, quarter, end, last)\n neg = Neg(x2)\n"
        + "r = Concat<axis=-1>(neg, x1)\n rs = Mul(r, n)\n yt = Add(xc, rs)\n y = Concat<axis=-1>(yt, k)",
    ),
    "from tables": (
        "int64[b,s] p",
        "cos = Gather(wide_cosines, p)\n sin = Gather(wide_sines, p)\n" + _ROTATED,
    ),
    "contributed": ("int64[b,s] p", _MICROSOFT.format(0)),
    "contributed, interleaved": ("int64[b,s] p", _MICROSOFT.format(1)),
}  # fmt: skip


@pytest.mark.parametrize(("angles", "body"), _FORMS.values(), ids=_FORMS)
def test_a_rotary_embedding_is_one_operator_and_one_kernel(angles: str, body: str) -> None:
    text = f"g (float[b,2,s,8] x, {angles}) => (float[b,2,s,8] y) {{ {body} }}"
    module = rewritten(model(text, _ROTATION))
    assert operators_of(module).count("relax.nn.rotary_embedding") == 1
    assert not {"relax.negative", "relax.add", "relax.subtract"} & set(operators_of(module))
    (kernel,) = kernels_of(module)
    assert "rotary_embedding" in kernel


def test_computed_angles_are_shared_by_all_rotary_embeddings() -> None:
    angles = """
        pf = Cast<to=1>(p)
        pu = Unsqueeze(pf, heads)
        fr = Mul(frequencies, pu)
        ft = Transpose<perm=[0,2,1]>(fr)
        emb = Concat<axis=-1>(ft, ft)
        cos = Cos(emb)
        sin = Sin(emb)
    """
    turned = """
        {0}1 = Slice({0}, from, half, last)
        {0}2 = Slice({0}, half, end, last)
        {0}neg = Neg({0}2)
        {0}r = Concat<axis=-1>({0}neg, {0}1)
        {0}c = Mul({0}, c)
        {0}s = Mul({0}r, n)
        {0}y = Add({0}c, {0}s)
    """
    text = f"""g (float[b,2,s,8] q, float[b,2,s,8] k, int64[b,s] p) => (float[b,2,s,8] qy, float[b,2,s,8] ky) {{
        {angles}
        {_ANGLES}
        {turned.format("q")}
        {turned.format("k")}
    }}"""
    kernels = kernels_of(rewritten(model(text, _ROTATION)))
    assert kernels[:-2] == ["cast_multiply_concatenate", "cos", "sin"]
    assert kernels[-2:] == ["rotary_embedding"] * 2


_WEIGHT = np.linspace(-1, 1, 64 * 32, dtype="float32").reshape(64, 32)
_FOLDED_CONSTANTS = {
    "w": _WEIGHT, "scale": np.float32(0.01), "zero": np.int8(3), "turned": np.array([32, 64]),
    "from": np.array([0]), "one": np.array([1]), "end": np.array([2**62]), "int32_max": np.array([2**31 - 1]),
    "width": np.array([32]), "split": np.array([0, 8, 4]), "merged": np.array([0, -1]), "whole": np.array([4, 32]),
    "number": np.float32(1.5),
}  # fmt: skip
_X32, _X64 = "float[n,32] x", "float[n,64] x"
_FOLDED = {
    "quantized and dequantized weights": (  # a product of quantized rows with the integers
        _X64, "q = QuantizeLinear(w, scale, zero)  d = DequantizeLinear(q, scale, zero)  y = MatMul(x, d)",
        ["reshape", "call_tir", "call_tir"],
    ),
    "a transposed weight": (_X32, "t = Transpose<perm=[1,0]>(w)  y = MatMul(x, t)", ["matmul"]),
    "a reshaped weight": (_X32, "t = Reshape(w, turned)  y = MatMul(x, t)", ["matmul"]),
    "slices of everything": (
        _X32, "t = Slice(x, from, end, one)  u = Slice(t, from, int32_max, from)  v = Slice(u, from, width, one)"
        " y = Exp(v)", ["exp"],
    ),
    "a chain of reshapes": (_X32, "t = Reshape(x, split)  u = Reshape(t, merged)  y = Exp(u)", ["exp"]),
    "an expanded number": ("float[4,32] x", "c = Expand(number, whole)  y = Add(x, c)", ["add"]),
    "a cast up and down": (_X32, "c = Cast<to=11>(x)  d = Cast<to=1>(c)  y = Exp(d)", ["exp"]),
    "transposes around a function": (
        "float[n,3,4,5] x",
        "t = Transpose<perm=[0,2,3,1]>(x)  r = Relu(t)  u = Transpose<perm=[0,3,1,2]>(r)  y = Exp(u)",
        ["nn.relu", "exp"],
    ),
    "an identity and dead code": (_X32, "i = Identity(x)  z = Exp(i)  y = Exp(i)", ["exp"]),
    "a slice of a part": (_X32, "t = Slice(x, one, end, one)  y = Exp(t)", ["strided_slice", "exp"]),
    "a rounding cast": (_X32, "c = Cast<to=10>(x)  d = Cast<to=1>(c)  y = Exp(d)", ["astype", "astype", "exp"]),
}  # fmt: skip


@pytest.mark.parametrize(("operand", "body", "left"), _FOLDED.values(), ids=_FOLDED)
def test_what_is_left_of_constants_and_of_operators_that_change_nothing(
    operand: str, body: str, left: list[str]
) -> None:
    shape = ",".join(f"d{axis}" for axis in range(operand.count(",") + 1))
    text = f"g ({operand}) => (float[{shape}] y) {{ {body} }}"
    given = model(text, _FOLDED_CONSTANTS)
    assert [name.removeprefix("relax.") for name in operators_of(rewritten(given))] == left
