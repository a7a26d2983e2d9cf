"""Run a compiled model and a reference on the same inputs, and compare."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx

from optimizer.certificate.comparison import Outputs, compare_runs, loosened, require_agreement, worst_of
from optimizer.certificate.graph_inputs import graph_inputs, past_and_sequence, settings, symbols
from optimizer.certificate.inputs import Array, make_inputs
from optimizer.certificate.references import (
    Reference,
    ReferenceFailedError,
    ReferenceKind,
    Runner,
    optimized_onnxruntime,
    perturbed_onnxruntime,
    references,
)
from optimizer.certificate.tolerance import Arithmetic, arithmetic, with_codes
from optimizer.certificate.window_sized_caches import defined
from optimizer.errors import CertificateError, InputMismatchError
from optimizer.package.manifest import Certificate, OutputComparison

SEEDS = (0, 1)
_PAST_IN_CODES = 101
"""Tokens of a past that reaches into the codes of a quantized cache: the newest 32 to 63 are floats, and this is prime.
"""


@dataclass(frozen=True)
class ReferenceRun:
    """Inputs that a reference accepted, with the values of the symbols, and what it gave.

    `in_codes` says whether its past reaches into the codes of a quantized cache.
    """

    seed: int
    values: dict[str, int]
    inputs: dict[str, Array]
    outputs: Outputs
    in_codes: bool = False


def certify(
    model: onnx.ModelProto,
    run: Runner,
    *,
    path: Path | None = None,
    shapes: Mapping[str, Sequence[int | str]] | None = None,
    precision: str | None = None,
    activations: str | None = None,
    dequantized: Runner | None = None,
    unoptimized: Runner | None = None,
    cache_bits: int | None = None,
    makes_steps: bool = False,
    seeds: Sequence[int] = SEEDS,
) -> Certificate:
    """Return the certificate of a compiled model, after one run per seed with other symbol values each.

    `run` takes named inputs to named outputs: the packaged model, natively or under an emulator. `path` is where the
    model was read from, needed when its data lie in files beside it. `shapes` are the shapes that the compile fixed and
    `precision` the dtype that it computes in ("float16", "bfloat16"), if coarser than the model's. `activations` is
    "int8" where products round theirs to that. `dequantized` runs the model with the weights that the compile has
    rounded, and is the only reference then: the rounding itself is no error of the package. `unoptimized` runs the
    imported module and is the last resort where no other reference can run the model. A package that `makes_steps`
    of a token, for which it may have other code, has one more run of those. With caches of codes of
    `cache_bits`, one more run has a past that reaches into them, if the reference accepts one so long: the values of
    the symbols in the certificate show it.
    Raises CertificateError with output, error and tolerance when an output differs by more than its tolerance, and when
    no reference accepts the model.
    """
    sources = (dequantized, unoptimized)
    constructors = references(model, path, *sources, rounds_activations=activations == "int8")
    needed = _FurtherRuns(shapes, makes_steps, cache_bits is not None)
    kind, version, expected = _reference_runs(model, constructors, seeds, needed)
    pairs = [_defined(model, shapes, each, _run_package(run, each.inputs)) for each in expected]
    largest = max(expected, key=lambda each: sum(array.size for array in each.inputs.values()))
    exact = arithmetic(model, precision, activations, {name: each.shape for name, each in largest.inputs.items()})
    of_floats = [each for each in expected if not each.in_codes]
    comparisons = compare_runs(pairs[: len(of_floats)], exact)
    if exact.quantizes and kind == "onnxruntime" and not all(each.ok for each in comparisons):
        comparisons = loosened(comparisons, _own_differences(model, path, of_floats, exact))
    if cache_bits is not None:
        comparisons = worst_of((*comparisons, *compare_runs(pairs[len(of_floats) :], with_codes(exact, cache_bits))))
    require_agreement(comparisons, f"{kind} {version}")
    settings_used = tuple(each.values for each in expected)
    return Certificate(kind, version, tuple(each.seed for each in expected), settings_used, comparisons)


def _defined(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int | str]] | None, expected: ReferenceRun, found: Outputs
) -> tuple[Outputs, Outputs]:
    """Return what the reference and the package gave, but for what nobody defines."""
    # The last token of a row may be padding.
    tokens = sum(past_and_sequence(graph_inputs(model, shapes), expected.values)) - 1
    return defined(model, expected.outputs, tokens), defined(model, found, tokens)


def _own_differences(
    model: onnx.ModelProto, path: Path | None, runs: Sequence[ReferenceRun], exact: Arithmetic
) -> tuple[OutputComparison, ...]:
    """Return how far onnxruntime's outputs are from its own of a quantized model, the worst of two ways to find out.

    Where many layers quantize, a code that a rounding error changes may change others; so much that is no fault of the
    package then. One way is to compute in integers, which changes nothing in a model of integer operators, the other to
    move its scales by as little as can be. Ways that onnxruntime cannot go are left out.
    """
    found: list[OutputComparison] = []
    for construct in (optimized_onnxruntime, perturbed_onnxruntime):
        with contextlib.suppress(ReferenceFailedError):
            other = construct(model, path)
            found += compare_runs([(each.outputs, other.run(each.inputs)) for each in runs], exact)
    return worst_of(found)


def _run_package(run: Runner, inputs: Mapping[str, Array]) -> Outputs:
    try:
        return run(inputs)
    except InputMismatchError as error:
        raise CertificateError(
            "the package refuses inputs that the reference accepts; where inputs have sizes in common, "
            f"--shape has to give each of them the same name or number: {error}"
        ) from error


def _reference_runs(
    model: onnx.ModelProto,
    constructors: Iterable[Callable[[], Reference]],
    seeds: Sequence[int],
    needed: _FurtherRuns,
) -> tuple[ReferenceKind, str, list[ReferenceRun]]:
    """Return kind and version of the first reference that accepts inputs for every seed, and what it gave for them.

    The reference itself, which holds all weights, is gone when this returns.
    """
    reasons: list[str] = []
    for construct in constructors:
        kind = "reference"
        try:
            reference = construct()
            kind = reference.kind
            runs = [_accepted(model, reference, needed.shapes, run, seed) for run, seed in enumerate(seeds)]
            runs += needed.of(model, reference, max(seeds, default=-1) + 1)
            return reference.kind, reference.version, runs
        except ReferenceFailedError as error:
            reasons.append(f"{kind}: {(str(error).strip() or 'failed').splitlines()[0]:.300}")
    raise CertificateError(
        f"no reference can run this model ({'; '.join(reasons)}); give input shapes with --shape or install onnxruntime"
    )


@dataclass(frozen=True)
class _FurtherRuns:
    """Runs beside those of the seeds, where the reference accepts them: of one token, and with a past in codes."""

    shapes: Mapping[str, Sequence[int | str]] | None
    of_one_token: bool
    in_codes: bool

    def of(self, model: onnx.ModelProto, reference: Reference, seed: int) -> list[ReferenceRun]:
        """Return the runs of a model, those in codes last."""
        meanings = set(symbols(graph_inputs(model, self.shapes)).values())
        runs: list[ReferenceRun] = []
        with contextlib.suppress(ReferenceFailedError):
            if self.of_one_token and "sequence" in meanings:
                runs.append(_accepted(model, reference, self.shapes, 0, seed, single=True))
        with contextlib.suppress(ReferenceFailedError):
            if self.in_codes and "past" in meanings:
                runs.append(replace(_accepted(model, reference, self.shapes, 0, seed, _PAST_IN_CODES), in_codes=True))
        return runs


def _accepted(
    model: onnx.ModelProto,
    reference: Reference,
    shapes: Mapping[str, Sequence[int | str]] | None,
    run: int,
    seed: int,
    past: int | None = None,
    *,
    single: bool = False,
) -> ReferenceRun:
    """Return the first run that the reference accepts, over the likely values of the symbols.

    Raises ReferenceFailedError with the first refusal when it accepts none.
    """
    refusal: ReferenceFailedError | None = None
    for values in settings(graph_inputs(model, shapes), run, past, single=single):
        inputs = make_inputs(model, seed, values, shapes=shapes, padded=run > 0)
        try:
            return ReferenceRun(seed, values, inputs, reference.run(inputs))
        except ReferenceFailedError as error:
            refusal = refusal or error
    assert refusal is not None
    raise refusal
