"""What rounded weights change of a model's outputs, and which of them to give more bits until that is little enough."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from optimizer.errors import QualityError
from optimizer.quantization.observation import ObservedModel
from optimizer.quantization.samples import Samples
from passes.provenance import union
from passes.quantization.fitted import Exceptions
from passes.quantization.scheme import SchemeError
from passes.quantize_weights import QuantizeWeights

Floats = NDArray[np.float32]
# Calls that the sensitivity of single matrices is measured on.
_FEW = 4
_RAISED = 8


@dataclass(frozen=True)
class Divergence:
    """Mean KL divergence of the outputs' distributions, in nats, and the share of positions whose likeliest differs."""

    kl: float
    flips: float

    def __str__(self) -> str:
        return f"KL {self.kl:.5f}, {self.flips:.2%} of the likeliest tokens differ"


@dataclass(frozen=True)
class Gate:
    """The most that rounding may change; None sets no limit."""

    kl: float | None
    flips: float | None

    def holds(self, divergence: Divergence) -> bool:
        """Return whether a divergence is within the limits."""
        return (self.kl is None or divergence.kl <= self.kl) and (self.flips is None or divergence.flips <= self.flips)


NO_LIMIT = Gate(None, None)


@dataclass(frozen=True)
class Raise:
    """A matrix that was given 8 bits: its nodes, its KL divergence if it alone is rounded, and the model's after it."""

    nodes: tuple[str, ...]
    alone: float
    after: Divergence


@dataclass(frozen=True)
class QualityReport:
    """The divergence before and after matrices were raised, measured on `source` with exact activations."""

    source: str
    before: Divergence
    raised: tuple[Raise, ...]

    @property
    def after(self) -> Divergence:
        """The divergence that remains."""
        return self.raised[-1].after if self.raised else self.before

    def __str__(self) -> str:
        return f"{self.after} on {self.source}, {len(self.raised)} matrices raised to int8"


def held_to(
    gate: Gate, item: QuantizeWeights, model: ObservedModel, samples: Samples
) -> tuple[QuantizeWeights, QualityReport]:
    """Return the pass with matrices in 8 bits, the most sensitive first, until the gate holds, and what each brought.

    Raises QualityError where it does not hold with all of them in 8 bits.
    """
    bits = item.bits_by_digest(list(model.sites))
    nodes = {digest: union(site.nodes for site in model.sites if site.digest == digest) for digest in bits}
    rounded = {digest: _values(item, model, digest, count) for digest, count in bits.items() if count}
    expected = [_log_probabilities(model.logits(call)) for call in samples.calls]
    before = _divergence(model, samples, expected, rounded)
    if gate.holds(before):
        return item, QualityReport(samples.source, before, ())
    few = Samples(samples.calls[:_FEW], samples.source)
    candidates = [digest for digest in rounded if bits[digest] < _RAISED]
    alone = {digest: _divergence(model, few, expected, {digest: rounded[digest]}).kl for digest in candidates}
    raised: list[Raise] = []
    rules = list(item.precisions.rules)
    for digest in sorted(candidates, key=lambda digest: (-alone[digest], digest)):
        rounded[digest] = _values(item, model, digest, _RAISED)
        rules.append((digest, _RAISED))
        raised.append(Raise(nodes[digest], alone[digest], _divergence(model, samples, expected, rounded)))
        if gate.holds(raised[-1].after):
            exceptions = str(Exceptions(tuple(rules)))
            return replace(item, exceptions=exceptions), QualityReport(samples.source, before, tuple(raised))
    last = raised[-1].after if raised else before
    raise QualityError(
        f"quantized weights give {last} on {samples.source}, even with all matrices in int8: "
        f"allow more with --max-kl {_above(last.kl)} --max-flips {_above(last.flips)}, or take smaller groups"
    )


def _above(value: float) -> str:
    """Return two digits of a number that is not smaller, so that who gives it as a limit has it hold."""
    rounded = float(f"{value:.1e}")
    return f"{rounded if rounded >= value else rounded + 10.0 ** (math.floor(math.log10(value)) - 1):.2g}"


def _values(item: QuantizeWeights, model: ObservedModel, digest: str, bits: int) -> Floats:
    """Return a matrix [N, K] as the pass will round it."""
    matrix = next(site.matrix for site in model.sites if site.digest == digest)
    fitted = (item.fitted or {}).get(digest)
    try:
        chosen = fitted if fitted is not None and fitted.matrix.bits == bits else item.rounded(matrix, bits)
    except SchemeError:  # the pass leaves it as it is, and says so
        return matrix.astype(np.float32)
    values = chosen.matrix.dequantized()
    return values if chosen.input_scales is None else values * chosen.input_scales


def _divergence(
    model: ObservedModel, samples: Samples, expected: list[Floats], exchanged: Mapping[str, Floats]
) -> Divergence:
    kl, flips, count = 0.0, 0, 0
    for call, exact in zip(samples.calls, expected, strict=False):
        actual = _log_probabilities(model.logits(call, exchanged))
        kl += float((np.exp(exact) * (exact - actual)).sum(dtype=np.float64))
        flips += int((exact.argmax(-1) != actual.argmax(-1)).sum())
        count += exact.size // exact.shape[-1]
    return Divergence(kl / count, flips / count)


def _log_probabilities(logits: Floats) -> Floats:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
