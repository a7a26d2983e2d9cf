from __future__ import annotations

import numpy as np
import pytest

from optimizer.errors import OptionError
from optimizer.runtime.generation.sampling import Sampler, Sampling

_LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.25, 0.05], np.float32))


def _draws(sampling: Sampling, count: int = 400) -> np.ndarray:
    sampler = Sampler(sampling)
    return np.array([sampler.choose(_LOGITS, []) for _ in range(count)])


def test_without_temperature_the_likeliest_token_is_taken() -> None:
    assert set(_draws(Sampling(), 5)) == {1}


def test_tokens_are_drawn_by_their_probability() -> None:
    counts = np.bincount(_draws(Sampling(temperature=1.0), 20000), minlength=5) / 20000
    # Six standard deviations of a binomial share.
    np.testing.assert_allclose(counts, np.exp(_LOGITS), atol=6 * 0.5 / np.sqrt(20000))


def test_a_low_temperature_sharpens() -> None:
    assert np.mean(_draws(Sampling(temperature=0.2)) == 1) > np.mean(_draws(Sampling(temperature=1.0)) == 1)


def test_the_lowest_temperature_takes_the_likeliest() -> None:
    assert set(_draws(Sampling(temperature=5e-324), 5)) == {1}


def test_top_k_keeps_the_likeliest() -> None:
    assert set(_draws(Sampling(temperature=1.0, top_k=2))) == {1, 3}


@pytest.mark.parametrize(("top_p", "kept"), [(0.3, {1}), (0.6, {1, 3}), (0.7, {1, 2, 3}), (1.0, {0, 1, 2, 3, 4})])
def test_top_p_keeps_the_likeliest_that_reach_p(top_p: float, kept: set[int]) -> None:
    assert set(_draws(Sampling(temperature=1.0, top_p=top_p))) == kept


def test_a_repetition_penalty_counts_against_tokens_of_the_text() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    assert Sampler(Sampling(repetition_penalty=1.5)).choose(logits, [0]) == 1
    assert Sampler(Sampling(repetition_penalty=1.5)).choose(logits, [0, 1]) == 0
    negative = np.array([-1.0, -1.1], np.float32)
    assert Sampler(Sampling(repetition_penalty=1.5)).choose(negative, [0]) == 1


def test_equal_seeds_draw_equal_tokens() -> None:
    sampling = Sampling(temperature=1.0, seed=7)
    np.testing.assert_array_equal(_draws(sampling), _draws(sampling))
    assert (_draws(sampling) != _draws(Sampling(temperature=1.0, seed=8))).any()


@pytest.mark.parametrize(
    "values",
    [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}, {"repetition_penalty": 0.0}, {"seed": -1}],
)
def test_senseless_values_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(OptionError):
        Sampling(**values)  # pyright: ignore[reportArgumentType] - top_k comes as a float here


def test_logits_that_are_no_numbers_are_an_error() -> None:
    with pytest.raises(OptionError, match="no numbers after 65 tokens"):
        Sampler(Sampling()).choose(np.array([0.5, np.nan], np.float32), [0] * 65)
