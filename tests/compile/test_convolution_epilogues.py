"""A convolution with normalization, residual and activation is one kernel, whatever its kind and the activation."""

from __future__ import annotations

import numpy as np
import pytest
import tvm

from optimizer.lowering import lower
from targets import get
from tests.compile.fused_models import kernels_of, model, rewritten

_CHANNELS = 16
# Spatial extents, operator and its attributes, shape of the weights.
_CONVOLUTIONS = {
    "1-D": ((9,), "Conv<pads=[1,1]>", (16, 16, 3)),
    "2-D": ((6, 6), "Conv<pads=[1,1,1,1]>", (16, 16, 3, 3)),
    "3-D": ((4, 5, 6), "Conv<pads=[1,1,1,1,1,1]>", (16, 16, 3, 3, 3)),
    "grouped": ((6, 6), "Conv<pads=[1,1,1,1], group=4>", (16, 4, 3, 3)),
    "depthwise": ((6, 6), "Conv<pads=[1,1,1,1], group=16>", (16, 1, 3, 3)),
    "depthwise 1-D": ((9,), "Conv<pads=[1,1], group=16>", (16, 1, 3)),
    "pointwise": ((6, 6), "Conv", (16, 16, 1, 1)),
    "transposed": ((6, 6), "ConvTranspose<pads=[1,1,1,1]>", (16, 16, 3, 3)),
    "transposed 1-D": ((9,), "ConvTranspose<pads=[1,1]>", (16, 16, 3)),
}
_RARER = {
    "grouped 1-D": ((9,), "Conv<pads=[1,1], group=4>", (16, 4, 3)),
    "grouped 3-D": ((4, 5, 6), "Conv<pads=[1,1,1,1,1,1], group=4>", (16, 4, 3, 3, 3)),
    "depthwise 3-D": ((4, 5, 6), "Conv<pads=[1,1,1,1,1,1], group=16>", (16, 1, 3, 3, 3)),
    "transposed 3-D": ((4, 5, 6), "ConvTranspose<pads=[1,1,1,1,1,1]>", (16, 16, 3, 3, 3)),
    "transposed, grouped": ((6, 6), "ConvTranspose<pads=[1,1,1,1], group=4>", (16, 4, 3, 3)),
    "transposed, depthwise": ((6, 6), "ConvTranspose<pads=[1,1,1,1], group=16>", (16, 1, 3, 3)),
}
_ACTIVATIONS = {
    "Relu": "y = Relu(r)",
    "Clip": "y = Clip(r, low, high)",
    "LeakyRelu": "y = LeakyRelu<alpha=0.1>(r)",
    "PRelu": "y = PRelu(r, slope)",
    "Sigmoid": "y = Sigmoid(r)",
    "HardSwish": "y = HardSwish(r)",
    "SiLU": "s = Sigmoid(r)\n y = Mul(r, s)",
    "GELU": "q = Div(r, root)\n e = Erf(q)\n o = Add(e, one)\n m = Mul(r, o)\n y = Mul(m, half)",
}


def _module(convolution: str, activation: str, *, bias: bool = True) -> tvm.IRModule:
    extents, operator, weights = {**_CONVOLUTIONS, **_RARER}[convolution]
    rng = np.random.default_rng(0)
    per_channel = {name: rng.uniform(1, 2, _CHANNELS).astype("float32") for name in ("gamma", "beta", "mean", "var")}
    scalars = {name: np.float32(value) for name, value in (("low", 0), ("high", 6), ("one", 1), ("half", 0.5))}
    initializers = {
        **per_channel,
        **scalars,
        "root": np.float32(np.sqrt(2)),
        "w": rng.standard_normal(weights).astype("float32"),
        "bias": rng.standard_normal(_CHANNELS).astype("float32"),
        "slope": rng.standard_normal((_CHANNELS, *(1,) * len(extents))).astype("float32"),
    }
    shape = ",".join(map(str, (1, _CHANNELS, *extents)))
    text = f"""g (float[{shape}] x, float[{shape}] residual) => (float[{shape}] y) {{
        c = {operator}(x, w{", bias" if bias else ""})
        n = BatchNormalization(c, gamma, beta, mean, var)
        r = Add(n, residual)
        {_ACTIVATIONS[activation]}
    }}"""
    return rewritten(model(text, initializers))


def _computing(kernels: list[str]) -> list[str]:
    """Return the kernels but for those that bring images into blocks of channels and back."""
    return [kernel for kernel in kernels if not kernel.startswith(("to_blocks", "from_blocks"))]


@pytest.mark.parametrize("activation", _ACTIVATIONS)
@pytest.mark.parametrize("convolution", _CONVOLUTIONS)
def test_residual_and_activation_are_computed_in_the_kernel(convolution: str, activation: str) -> None:
    assert len(_computing(kernels_of(_module(convolution, activation)))) == 1


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("convolution", _RARER)
def test_so_are_those_of_rarer_convolutions(convolution: str, bias: bool) -> None:
    assert len(_computing(kernels_of(_module(convolution, "PRelu", bias=bias)))) == 1


@pytest.mark.parametrize("convolution", _CONVOLUTIONS)
def test_a_convolution_without_bias_gets_that_of_its_normalization(convolution: str) -> None:
    assert len(_computing(kernels_of(_module(convolution, "Relu", bias=False)))) == 1


@pytest.mark.parametrize("convolution", _CONVOLUTIONS)
def test_the_kernel_is_one_loop_nest(convolution: str) -> None:
    kernels = lower(_module(convolution, "PRelu"), get("x86-avx512")).kernels
    assert {kernel.regions for kernel in kernels} == {1}
    assert len(_computing([kernel.function for kernel in kernels])) == 1
