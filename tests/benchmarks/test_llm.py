"""Decoders of the table have the shapes of the models that they are named after."""

from __future__ import annotations

import subprocess
import sys

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


def test_an_engines_process_loads_nothing_that_makes_models() -> None:
    modules = ["benchmarks.architecture", "numpy.random"]
    shown = f"import benchmarks.llm.worker, sys; print(*(each in sys.modules for each in {modules}))"
    done = subprocess.run([sys.executable, "-c", shown], check=True, capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"]
