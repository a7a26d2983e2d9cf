"""Compare outputs with a reference's."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from optimizer.certificate.tolerance import Arithmetic
from optimizer.errors import CertificateError
from optimizer.package.manifest import OutputComparison

# Below these numbers a dtype has fewer digits, down to none: an error there is measured relative to them.
_SMALLEST_NORMAL = {"float64": 2.0**-1022, "float32": 2.0**-126, "float16": 2.0**-14, "bfloat16": 2.0**-126}

# So many tolerances at most are allowed where a reference differs from itself by as much.
MOST_LOOSENED = 4.0

Array = NDArray[np.generic]
Outputs = Mapping[str, Array]


def compare_runs(runs: Sequence[tuple[Outputs, Outputs]], arithmetic: Arithmetic) -> tuple[OutputComparison, ...]:
    """Return the worst comparison of each output over all (expected, actual) runs.

    Raises CertificateError when outputs are missing or have another dtype or shape.
    """
    found: list[OutputComparison] = []
    for expected, actual in runs:
        for name, reference in expected.items():
            if name not in actual:
                raise CertificateError(f"the package has no output '{name}', which the reference has")
            tolerance = arithmetic.tolerance(np.asarray(reference).dtype.name)
            found.append(compare(name, reference, actual[name], tolerance))
    return worst_of(found)


def worst_of(comparisons: Iterable[OutputComparison]) -> tuple[OutputComparison, ...]:
    """Return the worst comparison of each output, which is one that fails if any does."""
    worst: dict[str, OutputComparison] = {}
    for each in comparisons:
        if each.name not in worst or _badness(each) > _badness(worst[each.name]):
            worst[each.name] = each
    return tuple(worst.values())


def _badness(comparison: OutputComparison) -> tuple[bool, float]:
    return not comparison.ok, comparison.max_relative_error


def compare(name: str, expected: Array, actual: Array, tolerance: float) -> OutputComparison:
    """Compare one output; see `optimizer.certificate.tolerance` for what the numbers mean."""
    expected, actual = np.asarray(expected), np.asarray(actual)
    if expected.dtype != actual.dtype or expected.shape != actual.shape:
        raise CertificateError(
            f"output '{name}' is {actual.dtype}{list(actual.shape)}, "
            f"but the reference gives {expected.dtype}{list(expected.shape)}"
        )
    dtype = expected.dtype.name
    if expected.dtype.kind in "biu" or dtype in ("int4", "uint4"):
        return _compare_integers(name, expected, actual, tolerance)
    reference, result = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(reference)
    same_places = bool(
        np.array_equal(reference[~finite], result[~finite], equal_nan=True) and np.isfinite(result[finite]).all()
    )
    reference, result = reference[finite], result[finite]
    if not same_places:
        return OutputComparison(name, dtype, math.inf, math.inf, tolerance, None, ok=False)
    error = float(np.abs(result - reference).max(initial=0.0))
    largest = float(np.abs(reference).max(initial=0.0))
    smallest_normal = _SMALLEST_NORMAL.get(dtype, 0.0)
    scale = max(largest, smallest_normal) if largest else 1.0
    # Machines may round such numbers to zero, except in fp16, whose narrow range of exponents makes them common.
    if 0 < largest < smallest_normal and dtype != "float16":
        tolerance = 1.0
    norms = float(np.linalg.norm(reference) * np.linalg.norm(result))
    cosine = float(np.dot(reference, result)) / norms if norms else None
    return OutputComparison(name, dtype, error, error / scale, tolerance, cosine, ok=error / scale <= tolerance)


def loosened(comparisons: Iterable[OutputComparison], own: Iterable[OutputComparison]) -> tuple[OutputComparison, ...]:
    """Return comparisons with a reference, each allowed the error that the reference has to itself.

    `own` compares it with the same model computed in integers; more than MOST_LOOSENED tolerances are not allowed.
    """
    allowed = {each.name: each.max_relative_error for each in own}
    found: list[OutputComparison] = []
    for each in comparisons:
        tolerance = max(each.tolerance, min(allowed.get(each.name, 0.0), MOST_LOOSENED * each.tolerance))
        found.append(replace(each, tolerance=tolerance, ok=each.max_relative_error <= tolerance))
    return tuple(found)


def _compare_integers(name: str, expected: Array, actual: Array, tolerance: float) -> OutputComparison:
    """Compare integers and booleans: the error is counted in steps, absolute and relative alike."""
    steps = (
        np.abs(expected.astype(object) - actual.astype(object)) if expected.dtype.kind != "b" else expected != actual
    )
    error = float(np.max(steps, initial=0)) if np.size(steps) else 0.0
    return OutputComparison(name, expected.dtype.name, error, error, tolerance, None, ok=error <= tolerance)


def require_agreement(comparisons: Sequence[OutputComparison], reference: str) -> None:
    """Raise CertificateError that names every output outside its tolerance."""
    failed = [
        f"'{each.name}' differs by {each.max_absolute_error:.3g} "
        f"(relative to the largest value {each.max_relative_error:.3g}, tolerance {each.tolerance:.3g})"
        if math.isfinite(each.max_absolute_error)
        else f"'{each.name}' has NaN or infinity where the reference has not, or the reverse"
        for each in comparisons
        if not each.ok
    ]
    if failed:
        raise CertificateError(
            f"the compiled model disagrees with {reference}: output {'; '.join(failed)}; nothing was written. "
            "Compile with fewer passes to find the cause, and report it"
        )
