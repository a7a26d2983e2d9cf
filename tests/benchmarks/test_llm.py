"""Decoders of the table have the shapes of the models that they are named after."""

from __future__ import annotations

import pytest

from benchmarks.llm.models import DECODERS

# Parameters of the models as published, less norms (two a layer and one) and, of Qwen2.5, the biases of three products.
PUBLISHED = {
    "smollm2_135m": 134_515_008 - 61 * 576,
    "qwen2.5_0.5b": 494_032_768 - 49 * 896 - 24 * (896 + 2 * 128),
    "llama3.2_1b": 1_235_814_400 - 33 * 2048,
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoders_have_as_many_weights_as_the_published_models(name: str) -> None:
    assert DECODERS[name].product_weights == PUBLISHED[name]
