"""Which candidates of a task to measure next."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence

from optimizer.tuning.cost_model import CostModel
from optimizer.tuning.log import fits
from optimizer.tuning.records import Record, choice_of
from schedules.family import Parameters, Space, defaults

# Of a larger space that many random candidates are ranked.
_MOST_RANKED = 4096
# The share of a batch that is chosen at random, so that the model also learns where it is wrong.
_EXPLORATION = 0.25


def size_of(space: Space) -> int:
    """Return the number of candidates of a space."""
    return math.prod(len({choice.default, *choice.candidates}) for choice in space)


def propose(
    space: Space,
    features: Mapping[str, float],
    tried: Sequence[Parameters],
    model: CostModel,
    count: int,
    *,
    seeds: Sequence[Parameters] = (),
    generator: random.Random,
) -> list[Parameters]:
    """Return at most `count` candidates that are neither the default nor tried: `seeds` first, then the model's best.

    Without a trained model they are the default's neighbours, one parameter changed, and then random ones.
    """
    taken = {choice_of(parameters) for parameters in (defaults(space), *tried)}
    chosen: list[Parameters] = []

    def take(candidates: Sequence[Parameters], limit: int) -> None:
        for parameters in candidates:
            if len(chosen) >= limit:
                return
            if choice_of(parameters) not in taken:
                taken.add(choice_of(parameters))
                chosen.append(parameters)

    take([seed for seed in seeds if fits(seed, space)], count)
    candidates = _candidates(space, generator)
    predictions = model.predict(features, candidates)
    if predictions is None:
        neighbours = _neighbours(space)
        generator.shuffle(neighbours)
        take(neighbours, count - round(_EXPLORATION * count))
    else:
        ranked = sorted(range(len(candidates)), key=predictions.__getitem__)
        take([candidates[position] for position in ranked], count - round(_EXPLORATION * count))
    generator.shuffle(candidates)
    take(candidates, count)
    return chosen


def _candidates(space: Space, generator: random.Random) -> list[Parameters]:
    names = [choice.name for choice in space]
    values = [sorted({choice.default, *choice.candidates}) for choice in space]
    if size_of(space) <= _MOST_RANKED:
        return [dict(zip(names, point, strict=True)) for point in itertools.product(*values)]
    return [
        {name: generator.choice(options) for name, options in zip(names, values, strict=True)}
        for _ in range(_MOST_RANKED)
    ]


def _neighbours(space: Space) -> list[Parameters]:
    base = defaults(space)
    return [
        {**base, choice.name: value} for choice in space for value in sorted(set(choice.candidates) - {choice.default})
    ]


def nearest_decisions(
    records: Sequence[Record], family: str, version: int, features: Mapping[str, float], count: int
) -> list[Parameters]:
    """Return what was decided for the workloads of the same family whose sizes are nearest, nearest first."""
    decided = [
        record
        for record in records
        if record.kind == "decision" and not record.failure and (record.family, record.version) == (family, version)
    ]
    decided.sort(key=lambda record: (_distance(record.features, features), choice_of(record.parameters)))
    return [record.parameters for record in decided[:count]]


def _distance(left: Mapping[str, float], right: Mapping[str, float]) -> float:
    names = left.keys() | right.keys()
    return sum((left.get(name, 0.0) - right.get(name, 0.0)) ** 2 for name in names)
