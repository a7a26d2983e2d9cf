"""Weights fitted to the inputs of their products, before the pass that puts them into the module."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from optimizer.quantization.observation import ObservedModel
from optimizer.quantization.samples import Samples
from passes.quantization.activation_scaling import scale_columns
from passes.quantization.error_feedback import DAMPING, fit_to_inputs
from passes.quantization.fitted import FittedMatrix
from passes.quantization.scheme import SchemeError
from passes.quantize_weights import QuantizeWeights

Floats = NDArray[np.float32]

# A table of embeddings is read row by row, too: each error counts as it is, whatever the product's inputs are.
TIED_DAMPING = 0.3
# Second moments that are gathered in one run over the samples.
MOST_MOMENT_BYTES = 1 << 30


def fitted(item: QuantizeWeights, model: ObservedModel, samples: Samples) -> QuantizeWeights:
    """Return the pass with matrices fitted to what the products read in the samples.

    A matrix whose scales overflow is left to the pass, which says so.
    """
    bits = item.bits_by_digest(list(model.sites))
    digests = [digest for digest in bits if bits[digest] == item.bits and model.readers(digest)]
    known: dict[str, FittedMatrix] = {}
    for group, moments in _with_moments(_sharing_inputs(model, digests), model, samples):
        try:
            known.update(_METHODS[item.method](item, model, group, moments))
        except SchemeError:
            continue
    return replace(item, fitted=known, calibration=samples.source)


def _by_error_feedback(
    item: QuantizeWeights, model: ObservedModel, digests: list[str], moments: Mapping[int, Floats]
) -> dict[str, FittedMatrix]:
    fits: dict[str, FittedMatrix] = {}
    for digest in digests:
        second = np.sum([moments[place] for place in model.readers(digest)], axis=0)
        damping = TIED_DAMPING if _is_gathered(model, digest) else DAMPING
        fits[digest] = FittedMatrix(fit_to_inputs(_matrix(model, digest), second, item.scheme, damping=damping))
    return fits


def _by_scaled_columns(
    item: QuantizeWeights, model: ObservedModel, digests: list[str], moments: Mapping[int, Floats]
) -> dict[str, FittedMatrix]:
    """Scale the columns of matrices that nothing but products over one normalization's result read."""
    free = [d for d in digests if not _is_gathered(model, d) and len(model.readers(d)) == 1]
    if not free:
        return {}
    second = moments[model.readers(free[0])[0]]
    matrices = scale_columns([_matrix(model, digest) for digest in free], second, item.scheme)
    return dict(zip(free, matrices, strict=True))


_METHODS: dict[
    str, Callable[[QuantizeWeights, ObservedModel, list[str], Mapping[int, Floats]], dict[str, FittedMatrix]]
] = {"gptq": _by_error_feedback, "awq": _by_scaled_columns}


def _matrix(model: ObservedModel, digest: str) -> NDArray[np.generic]:
    return next(site.matrix for site in model.sites if site.digest == digest)


def _is_gathered(model: ObservedModel, digest: str) -> bool:
    return any(site.gathered for site in model.sites if site.digest == digest)


def _sharing_inputs(model: ObservedModel, digests: list[str]) -> list[list[str]]:
    """Return matrices in groups that read the same operands."""
    groups: dict[tuple[int, ...], list[str]] = {}
    for digest in digests:
        groups.setdefault(tuple(sorted(set(model.readers(digest)))), []).append(digest)
    return list(groups.values())


def _with_moments(
    groups: list[list[str]], model: ObservedModel, samples: Samples
) -> Iterator[tuple[list[str], dict[int, Floats]]]:
    """Yield each group with the second moments of its operands, as many from one run as memory allows."""
    waiting: list[list[str]] = []
    room = MOST_MOMENT_BYTES
    for group in [*groups, []]:
        need = sum(4 * _matrix(model, group[0]).shape[1] ** 2 for _ in model.readers(group[0])) if group else 0
        if waiting and (not group or need > room):
            moments = _moments({place for each in waiting for place in model.readers(each[0])}, model, samples)
            yield from ((each, moments) for each in waiting)
            waiting, room = [], MOST_MOMENT_BYTES
        waiting.append(group)
        room -= need


def _moments(places: set[int], model: ObservedModel, samples: Samples) -> dict[int, Floats]:
    moments: dict[int, Floats] = {}
    for call in samples.calls:
        for place, rows in model.operands(call, sorted(places)).items():
            second = rows.T @ rows
            moments[place] = moments[place] + second if place in moments else second
    return moments
