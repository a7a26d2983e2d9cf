"""Sessions of a decoder with quantized weights whose attention of many queries multiplies bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import targets
from optimizer.compile import CompileOptions, compile_model
from optimizer.runtime import load
from optimizer.runtime.generation import DecoderSession
from targets.host import missing_features

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from optimizer.runtime.model import CompiledModel

_MODEL = Path(__file__).parents[3] / "examples" / "decoder" / "model.onnx"
# Of the largest logit. Activations are rounded to a grid of 2^-8 in products of few rows, to bfloat16 in those of many;
# attention rounds queries, keys, exponentials and values to bfloat16. That goes through three layers.
_TOLERANCE = 8 * 2.0**-8
_TILES = targets.get("x86-avx512-amx")


@pytest.fixture(scope="module", params=["fp16", "bf16", "fp32"])
def rounding(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    """Return the bundled decoder with weights of 8 bits, and caches of a type, for a machine with tile registers."""
    if missing_features(_TILES):
        pytest.skip("the machine has no tile registers")
    return _compiled(tmp_path_factory.mktemp("decoder") / "decoder.opt", "x86-avx512-amx", request.param)


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> CompiledModel:
    """Return the same decoder with attention in fp32."""
    return _compiled(tmp_path_factory.mktemp("decoder") / "decoder.opt", "x86-avx512", "fp32")


def _compiled(package: Path, target: str, cache: str) -> CompiledModel:
    options = CompileOptions(targets.get(target), weights="int8", kv_cache_dtype=cache)
    compile_model(_MODEL, package, options, certify=False)
    return load(package)


def _logits(model: CompiledModel, tokens: Sequence[int], most: int) -> NDArray[np.floating]:
    return DecoderSession(model, most_at_once=most).append(tokens)


def test_the_manifest_says_that_attention_is_rounded(rounding: CompiledModel) -> None:
    assert rounding.manifest.weight_scheme.endswith("; 3 attentions in bf16 from 8 queries on")


@pytest.mark.parametrize("length", [8, 31, 150, 389])
def test_a_prompt_gives_the_same_logits_however_it_is_read(
    rounding: CompiledModel, exact: CompiledModel, length: int
) -> None:
    tokens = np.random.default_rng(length).integers(0, 2048, length).tolist()
    expected = _logits(exact, tokens, length)
    for most in (length, 97, 33, 8, 1):
        actual = _logits(rounding, tokens, most)
        np.testing.assert_allclose(
            actual, expected, atol=_TOLERANCE * np.abs(expected).max(), err_msg=f"{most} at once"
        )
