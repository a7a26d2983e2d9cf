"""One case of the backend suite through import, compile and run, and the judgement of what came out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import ml_dtypes
import numpy as np
import onnx

import targets
from optimizer import reference
from optimizer.compile import CompileOptions, compile_in_memory
from optimizer.errors import UnsupportedModelError
from optimizer.frontend.importer import import_model
from optimizer.frontend.value import NARROW_TYPES
from tests.backend.cases import BackendCase
from tests.backend.exclusions import tolerance_of

RIGHT, WRONG, REFUSED = "right", "wrong", "refused"
Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
_BFLOAT16_RTOL = 2**-6  # two units in the last place, as the suite's own runner allows


@dataclass(frozen=True)
class Outcome:
    """What became of a case: right, wrong (which a crash is too), or refused at import; and why."""

    verdict: str
    reason: str = ""


def optimized(model: onnx.ModelProto) -> Run:
    """Compile a model for this machine as a user would."""
    return compile_in_memory(model, CompileOptions(targets.get("host")))


def unoptimized(model: onnx.ModelProto) -> Run:
    """Compile a model without passes, fusion and schedules: what fails here too is not their fault."""
    return reference.unoptimized(import_model(model))


def judge(case: BackendCase, prepare: Callable[[onnx.ModelProto], Run] = optimized) -> Outcome:
    """Compile and run a case and compare its outputs."""
    try:
        outputs = _run(case, prepare)
    except UnsupportedModelError as error:
        reasons = [f"{blocker.operator}: {blocker.reason}" for blocker in error.blockers]
        return Outcome(REFUSED, "; ".join(dict.fromkeys(reasons)) or str(error))
    except Exception as error:
        lines = str(error).strip().splitlines()
        return Outcome(WRONG, f"{type(error).__name__}: {lines[-1] if lines else ''}")
    tolerance = tolerance_of(case.name)
    if tolerance is not None:
        case = replace(case, rtol=tolerance.rtol, atol=tolerance.atol)
    difference = first_difference(outputs, case)
    return Outcome(WRONG, difference) if difference else Outcome(RIGHT)


def first_difference(outputs: Sequence[object], case: BackendCase) -> str:
    """Return in what `outputs` differ from what the case expects, or an empty string.

    Shape and dtype are to be equal, NaN stands where NaN is expected, and values agree within the suite's tolerances.
    """
    if len(outputs) != len(case.outputs):
        return f"{len(outputs)} outputs instead of {len(case.outputs)}"
    for index, (given, expected) in enumerate(zip(outputs, case.outputs, strict=True)):
        difference = _difference(np.asarray(given), np.asarray(expected), case)
        if difference:
            return f"output {index}: {difference}"
    return ""


def _run(case: BackendCase, prepare: Callable[[onnx.ModelProto], Run]) -> list[np.ndarray]:
    model = case.model
    initializers = {tensor.name for tensor in model.graph.initializer}
    names = [value.name for value in model.graph.input if value.name not in initializers]
    given = zip(names, case.inputs, strict=False)
    outputs = prepare(model)({name: _stored(np.asarray(item)) for name, item in given if item is not None})
    return [_typed(outputs[value.name], value.type.tensor_type.elem_type) for value in model.graph.output]


def _stored(array: np.ndarray) -> np.ndarray:
    """Return 4-bit and 2-bit numbers one to a byte, as the module takes them."""
    storage = dict(NARROW_TYPES.values())
    return array.astype(storage[array.dtype]) if array.dtype in storage else array


def _typed(array: np.ndarray, element_type: int) -> np.ndarray:
    return array.astype(NARROW_TYPES[element_type][0]) if element_type in NARROW_TYPES else array


def _difference(given: np.ndarray, expected: np.ndarray, case: BackendCase) -> str:
    if given.dtype != expected.dtype:
        return f"dtype {given.dtype} instead of {expected.dtype}"
    if given.shape != expected.shape:
        return f"shape {given.shape} instead of {expected.shape}"
    rtol = case.rtol
    if (not np.issubdtype(given.dtype, np.number) and given.dtype.kind == "V") or given.dtype.name == "bfloat16":
        if given.dtype == ml_dtypes.bfloat16:
            rtol = max(rtol, _BFLOAT16_RTOL)
        given, expected = given.astype(np.float32), expected.astype(np.float32)
    close = np.isclose(given, expected, rtol=rtol, atol=case.atol, equal_nan=True)
    if close.all():
        return ""
    first = tuple(int(i) for i in np.argwhere(~close)[0])
    wrong = np.count_nonzero(~close)
    return f"{wrong} of {close.size} elements differ, first {given[first]} instead of {expected[first]} at {first}"
