from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.tuning.cost_model import CostModel
from optimizer.tuning.records import choice_of
from optimizer.tuning.search import nearest_decisions, propose, size_of
from schedules.family import Choice, Parameters, Space, defaults
from tests.tuning.examples import RECORD

_SPACE = (Choice("rows", 8, (4, 6, 8)), Choice("vectors", 3, (1, 2)))


@st.composite
def _spaces(draw: st.DrawFn) -> Space:
    values = st.lists(st.integers(0, 64), min_size=1, max_size=4, unique=True).map(tuple)
    return tuple(Choice(name, draw(st.integers(0, 64)), draw(values)) for name in "abc"[: draw(st.integers(1, 3))])


def _propose(space: Space, tried: list[Parameters], count: int, **options: object) -> list[Parameters]:
    return propose(space, {}, tried, CostModel(), count, generator=random.Random(0), **options)


@given(space=_spaces(), count=st.integers(1, 10))
def test_every_candidate_comes_once_and_the_default_never(space: Space, count: int) -> None:
    tried: list[Parameters] = []
    while batch := _propose(space, tried, count):
        assert len(batch) <= count
        tried += batch
    keys = {choice_of(parameters) for parameters in tried}
    assert len(keys) == len(tried) == size_of(space) - 1
    assert choice_of(defaults(space)) not in keys


def test_the_size_counts_a_default_that_is_no_candidate() -> None:
    assert size_of(_SPACE) == 9


def test_seeds_come_first_where_they_fit() -> None:
    good, bad = {"rows": 4, "vectors": 1}, {"rows": 5, "vectors": 1}
    assert _propose(_SPACE, [], 2, seeds=[bad, good])[0] == good


def test_without_a_model_neighbours_of_the_default_come_first() -> None:
    (first, *_) = _propose(_SPACE, [], 4)
    assert sum(value != defaults(_SPACE)[name] for name, value in first.items()) == 1


def test_a_trained_model_ranks() -> None:
    records = [
        replace(RECORD, kind="trial", parameters={"rows": rows, "vectors": vectors}, ratio=10.0 / (rows * vectors))
        for rows in (4, 6, 8)
        for vectors in (1, 2, 3)
        for _ in range(3)
    ]
    model = CostModel()
    model.train(records)
    chosen = propose(
        (Choice("rows", 4, (4, 6, 8)), Choice("vectors", 1, (1, 2, 3))),
        RECORD.features,
        [],
        model,
        1,
        generator=random.Random(0),
    )
    assert chosen == [{"rows": 8, "vectors": 3}]


def test_the_nearest_workload_gives_the_first_seed() -> None:
    near = replace(RECORD, features={"bytes": 11.0}, parameters={"rows": 4})
    far = replace(RECORD, features={"bytes": 20.0}, parameters={"rows": 6})
    assert nearest_decisions([far, near], "matmul", RECORD.version, {"bytes": 10.0}, 2) == [{"rows": 4}, {"rows": 6}]


@pytest.mark.parametrize(("family", "version"), [("rowwise", RECORD.version), ("matmul", RECORD.version + 1)])
def test_other_families_and_versions_give_no_seeds(family: str, version: int) -> None:
    assert nearest_decisions([RECORD], family, version, {}, 2) == []
