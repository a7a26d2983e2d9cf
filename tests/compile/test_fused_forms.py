"""What exporters write around products, into attention, and between moves of elements, becomes few kernels."""

from __future__ import annotations

import numpy as np
import pytest

from tests.compile.fused_models import kernels_of, model, rewritten


def _drawn(*shape: int, level: float = 0) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype("float32") + np.float32(level)


_NUMBERS = {
    "epsilon": 1e-5, "one": 1, "half": 0.5, "two": 2, "three": 3, "six": 6, "zero": 0, "root": 2**0.5, "cube": 0.044715,
    "pi": (2 / np.pi) ** 0.5, "scale": 8**-0.5, "low": -1e9,
}  # fmt: skip
_CONSTANTS = {
    **{name: np.float32(value) for name, value in _NUMBERS.items()},
    "up": _drawn(32, 64), "gate": _drawn(32, 64, level=1), "down": _drawn(64, 32), "bias": _drawn(64),
    "bias2": _drawn(64, level=1), "gamma": _drawn(32), "beta": _drawn(32, level=1), "last": np.array([-1]),
    "wq": _drawn(32, 32), "wk": _drawn(32, 32, level=1), "wv": _drawn(32, 32, level=2), "bq": _drawn(32, level=3),
    "wk2": _drawn(32, 16), "wv2": _drawn(32, 16, level=1), "heads": np.array([0, 0, 4, 8]),
    "flat": np.array([0, 0, 32]), "heads2": np.array([0, 0, 2, 8]), "behind": np.array([2]),
    "repeated": np.array([1, 2, 2, 7, 8]),
    "copies": np.array([1, 1, 2, 1, 1]), "merged": np.array([0, 4, -1, 8]),
    "slopes": (2.0 ** -np.arange(1, 5)).astype("float32").reshape(1, 4, 1, 1),
    "distance": np.arange(7, dtype="float32")[None] - np.arange(7, dtype="float32")[:, None],
    "triangle": np.tril(np.ones((1, 1, 7, 7), bool)), "from": np.array([1]), "to": np.array([5]),
    "chosen": np.array([0, 2, 1]), "widths": np.array([0, 1, 0, 1]), "table": _drawn(50, 32),
}  # fmt: skip


def _kernels(text: str) -> list[str]:
    return kernels_of(rewritten(model(f"g {text}", _CONSTANTS, opset=20)))


_PRODUCTS = {
    "MatMul": "m = MatMul(x, up)  p = Add(m, bias)",
    "Gemm": "p = Gemm(x, up, bias)",
    "Gemm, transposed": "p = Gemm<transB=1>(x, down, bias)",
    "Gemm, scaled": "p = Gemm<alpha=0.5, beta=2.0>(x, up, bias)",
}
_ACTIVATIONS = {
    "Relu": "y = Relu(r)", "Clip": "y = Clip(r, zero, six)", "LeakyRelu": "y = LeakyRelu<alpha=0.1>(r)",
    "PRelu": "y = PRelu(r, bias2)", "Sigmoid": "y = Sigmoid(r)", "Tanh": "y = Tanh(r)", "HardSwish": "y = HardSwish(r)",
    "HardSwish, written out": "a = Add(r, three)  c = Clip(a, zero, six)  e = Mul(r, c)  y = Div(e, six)",
    "SiLU": "s = Sigmoid(r)  y = Mul(r, s)", "Gelu": "y = Gelu(r)",
    "GELU, written out": "q = Div(r, root)  e = Erf(q)  o = Add(e, one)  h = Mul(r, o)  y = Mul(h, half)",
    "GELU by tanh": "c = Pow(r, three)  d = Mul(c, cube)  e = Add(r, d)  h = Mul(e, pi)  t = Tanh(h)  o = Add(t, one)"
    " v = Mul(r, o)  y = Mul(v, half)",
}  # fmt: skip
_EPILOGUES = [("MatMul", activation) for activation in _ACTIVATIONS] + [(form, "Relu") for form in _PRODUCTS]


@pytest.mark.parametrize(("product", "activation"), _EPILOGUES)
def test_bias_residual_and_activation_are_computed_with_the_product(product: str, activation: str) -> None:
    body = f"{_PRODUCTS[product]}  r = Add(p, z)  {_ACTIVATIONS[activation]}"
    assert len(_kernels(f"(float[n,32] x, float[n,64] z) => (float[n,64] y) {{ {body} }}")) == 1


_GATES = {
    "SwiGLU": "a = MatMul(x, gate)  s = Sigmoid(a)  t = Mul(a, s)  u = MatMul(x, up)  y = Mul(t, u)",
    "GeGLU": "a = MatMul(x, gate)  t = Gelu(a)  u = MatMul(x, up)  y = Mul(t, u)",
    "with biases": "m = MatMul(x, gate)  a = Add(m, bias)  t = Gelu(a)  v = MatMul(x, up)  u = Add(v, bias2)"
    "  y = Mul(t, u)",
}


@pytest.mark.parametrize("gate", _GATES.values(), ids=_GATES)
def test_both_products_of_a_gate_are_one_kernel(gate: str) -> None:
    assert len(_kernels(f"(float[n,32] x) => (float[n,64] y) {{ {gate} }}")) == 1


_NORMS = {
    "RMSNorm": "q = Mul(s, s)  v = ReduceMean(q, last)  e = Add(v, epsilon)  r = Sqrt(e)  i = Reciprocal(r)"
    "  d = Mul(s, i)  n = Mul(d, gamma)",
    "LayerNorm": "n = LayerNormalization(s, gamma, beta)",
}  # fmt: skip


@pytest.mark.parametrize("norm", _NORMS.values(), ids=_NORMS)
def test_a_norm_is_computed_with_the_product_before_or_behind_it(norm: str) -> None:
    behind = f"p = MatMul(x, down)  s = Add(p, z)  {norm}"
    assert len(_kernels(f"(float[7,64] x, float[7,32] z) => (float[7,32] s, float[7,32] n) {{ {behind} }}")) == 1
    before = f"{norm}  y = MatMul(n, up)"
    assert len(_kernels(f"(float[7,32] s) => (float[7,64] y) {{ {before} }}")) == 1


def _attention(
    keys: str = "x", narrow: str = "", repeat: str = "", bias: str = "t = Identity(s)", softmax: str = ""
) -> str:
    kind = "2" if narrow else ""
    heads = f"  k3 = Reshape(k0, heads{kind})  k1 = Transpose<perm=[0,2,1,3]>(k3)  v3 = Reshape(v0, heads{kind})"
    return f"""
        q0 = MatMul(x, wq)  q1 = Add(q0, bq)  q2 = Reshape(q1, heads)  q = Transpose<perm=[0,2,1,3]>(q2)
        k0 = MatMul({keys}, wk{kind})  v0 = MatMul({keys}, wv{kind})
        {heads}  v1 = Transpose<perm=[0,2,1,3]>(v3)
        {repeat or "k = Identity(k1)  v = Identity(v1)"}
        turned = Transpose<perm=[0,1,3,2]>(k)  products = MatMul(q, turned)  s = Mul(products, scale)
        {bias}
        {softmax or "p = Softmax(t)"}
        o = MatMul(p, v)  back = Transpose<perm=[0,2,1,3]>(o)  joined = Reshape(back, flat)  y = MatMul(joined, wv)
    """


def _repeated(form: str) -> str:
    return "  ".join(form.format(name) + f"  {name} = Reshape({name}5, merged)" for name in ("k", "v"))


_ATTENTIONS = {
    "plain": _attention(),
    "causal": _attention(bias="t = Where(triangle, s, low)"),
    "masked": _attention(bias="t = Add(s, mask)"),
    "ALiBi": _attention(bias="a = Mul(slopes, distance)  t = Add(s, a)"),
    "softmax written out": _attention(
        softmax="m = ReduceMax(t, last)  d = Sub(t, m)  e = Exp(d)  w = ReduceSum(e, last)  p = Div(e, w)"
    ),
    "cross": _attention("encoded"),
    "heads repeated by Expand": _attention(
        narrow="2", repeat=_repeated("{0}4 = Unsqueeze({0}1, behind)  {0}5 = Expand({0}4, repeated)")
    ),
    "heads repeated by Tile": _attention(
        narrow="2", repeat=_repeated("{0}4 = Unsqueeze({0}1, behind)  {0}5 = Tile({0}4, copies)")
    ),
    "heads repeated by Concat": _attention(
        narrow="2", repeat=_repeated("{0}4 = Unsqueeze({0}1, behind)  {0}5 = Concat<axis=2>({0}4, {0}4)")
    ),
}  # fmt: skip


@pytest.mark.parametrize("body", _ATTENTIONS.values(), ids=_ATTENTIONS)
def test_attention_is_one_kernel_between_four_products(body: str) -> None:
    inputs = "float[1,7,32] x, float[1,7,32] encoded, float[1,1,7,7] mask"
    kernels = _kernels(f"({inputs}) => (float[1,7,32] y) {{ {body} }}")
    assert kernels.count("attention") == 1
    others = [name for name in kernels if "matmul" not in name]
    assert others == (
        ["transpose", "attention"] if "mask" in body else ["attention"]
    )  # a mask is turned for all layers
    assert len(kernels) - len(others) <= 4


def test_products_of_queries_keys_and_values_over_one_input_are_one() -> None:
    body = "a = MatMul(x, wq)  q = Exp(a)  c = MatMul(x, wk)  k = Exp(c)"
    assert len(_kernels(f"(float[n,32] x) => (float[n,32] q, float[n,32] k) {{ {body} }}")) == 2
    both = "a = MatMul(x, wq)  c = MatMul(x, wk)  y = Concat<axis=-1>(a, c)"
    assert len(_kernels(f"(float[n,32] x) => (float[n,64] y) {{ {both} }}")) <= 2


_MOVES = {
    "Concat": "a = Exp(x)  b = Tanh(z)  c = Concat<axis=-1>(a, b)  y = Relu(c)",
    "Split": "a, b = Split<axis=-1, num_outputs=2>(x)  c = Sigmoid(b)  y = Mul(a, c)",
    "Slice": "a = Exp(x)  b = Slice(a, from, to, last)  y = Relu(b)",
    "Gather": "a = Exp(x)  b = Gather<axis=-1>(a, chosen)  c = Add(b, one)  y = Tanh(c)",
    "Pad": "a = Exp(x)  b = Pad(a, widths)  y = Relu(b)",
    "Transpose": "a = Exp(x)  b = Transpose<perm=[1,0]>(a)  y = Relu(b)",
    "Where": "a = Greater(x, z)  y = Where(a, x, z)",
    "ReduceSum": "a = Exp(x)  y = ReduceSum(a, last)",
    "ReduceMean": "a = ReduceMean(x, last)  y = Sqrt(a)",
    "Softmax": "a = Softmax(x)  y = Mul(a, z)",
    "Softmax, behind a sum": "a = Add(x, z)  y = Softmax(a)",
    "Softmax, behind a factor for each column": "a = Mul(x, gamma)  y = Softmax(a)",
    "LayerNorm": "a = Erf(x)  y = LayerNormalization(a, gamma, beta)",
    "exponential averaged": "a = Exp(x)  y = ReduceMean(a, last)",
    "maximum subtracted": "a = ReduceMax(x, last)  y = Sub(x, a)",
    "unit rows": "a = Mul(x, x)  b = ReduceSum(a, last)  c = Sqrt(b)  y = Div(x, c)",
    "LogSoftmax, written out": "a = ReduceMax(x, last)  b = Sub(x, a)  c = Exp(b)  d = ReduceSum(c, last)"
    "  e = Log(d)  y = Sub(b, e)",
}  # fmt: skip


@pytest.mark.parametrize("rows", ["7", "n"])
@pytest.mark.parametrize("body", _MOVES.values(), ids=_MOVES)
def test_moves_and_reductions_are_computed_with_what_is_around_them(body: str, rows: str) -> None:
    assert len(_kernels(f"(float[{rows},32] x, float[{rows},32] z) => (float[r,c] y) {{ {body} }}")) == 1
