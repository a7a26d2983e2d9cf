"""What decisions gain in a step of the model, among the kernels around them.

A kernel that is called in a loop finds in the caches what its last call left there; in a step, what the kernels before
it left. So the model runs with its defaults and with the decisions, in turns, and each kernel is timed in both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import tvm
from tvm import relax

from optimizer import execution
from optimizer.certificate.graph_inputs import completed, graph_inputs
from optimizer.certificate.inputs import Array, make_inputs
from optimizer.certification import fixed_shapes
from optimizer.compile import CompileOptions, Plan
from optimizer.frontend.model_file import ModelFile
from optimizer.lowering import build
from optimizer.report.inputs import default_size
from optimizer.report.kernel_times import Stopwatch
from optimizer.runtime.threads import use_threads
from optimizer.signature import entry_point
from optimizer.symbolic_arguments import passed_in_order_of_use
from optimizer.tuning.bench import last_line
from optimizer.tuning.pool import Measurement, measurement_of
from optimizer.tuning.process import Times
from optimizer.tuning.records import WorkloadKey
from optimizer.tuning.tasks import Sizes
from optimizer.weights import LiftedModule, lift_weights
from schedules import KernelReport, schedule_module
from schedules.family import Parameters

# Steps before each that is timed, which bring in what the other module's steps have put out of the caches.
WARM_STEPS = 2
LEAST_ROUNDS = 5
MOST_ROUNDS = 31
SECONDS = 8.0


class StepError(Exception):
    """The model cannot be run as it was planned; the message says why."""


@dataclass(frozen=True)
class PlannedModel:
    """A model and its plan with default schedules; `sizes` are those of symbolic dimensions."""

    source: ModelFile
    plan: Plan
    options: CompileOptions
    sizes: Sizes


def compare_in_step(
    model: PlannedModel, decided: Mapping[WorkloadKey, Parameters], threads: int
) -> dict[WorkloadKey, Measurement]:
    """Return what each decision measures in a step of the model, relative to the default in the same rounds.

    Raises StepError where the model does not run.
    """
    # Each thread has a pool of threads of its own, which takes their number only once.
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(_compare, model, decided, threads).result()


def _compare(
    model: PlannedModel, decided: Mapping[WorkloadKey, Parameters], threads: int
) -> dict[WorkloadKey, Measurement]:
    use_threads(threads)
    plan, target = model.plan, model.options.target

    def decide(report: KernelReport) -> Parameters | None:
        return decided.get(report.key)

    scheduled, kernels = schedule_module(plan.lowered.unscheduled, target, decide)
    with passed_in_order_of_use():
        lifted = lift_weights(scheduled)
    try:
        steps = [_Step(model, plan.lifted, plan.lowered.kernels), _Step(model, lifted, kernels)]
        inputs = _accepted_inputs(model, steps[0])
        rounds = list(_rounds(steps, inputs))
    except Exception as error:  # whatever the runtime or a kernel throws
        raise StepError(f"a step of the model fails: {last_line(error)}") from error
    return {key: _measurement(key, rounds) for key in decided if key in rounds[0][0].seconds}


@dataclass(frozen=True)
class _Taken:
    """Seconds of all calls of each workload in one step, and how many there were."""

    seconds: Mapping[WorkloadKey, float]
    calls: Mapping[WorkloadKey, int]


class _Step:
    """A module of the model, each of whose kernels is timed."""

    def __init__(self, model: PlannedModel, lifted: LiftedModule, kernels: Sequence[KernelReport]) -> None:
        self._imported = model.plan.imported
        self._entry = entry_point(model.plan.imported, model.plan.rewritten)
        self._weights = [tvm.runtime.convert(list(lifted.weights))]
        self._keys = {kernel.function: kernel.key for kernel in kernels if kernel.workload}
        self._machine = relax.VirtualMachine(build(lifted.module, model.options.target, once_a_layer=False), tvm.cpu())
        self._machine.set_instrument(self._observe)
        self._stopwatch = Stopwatch()

    def _observe(self, _function: object, name: object, before: object, *_rest: object) -> int:
        self._stopwatch(str(name), bool(before))
        return 0  # go on as if nobody had looked

    def run(self, inputs: Mapping[str, Array]) -> _Taken:
        self._stopwatch = Stopwatch()
        execution.call(self._machine["main"], self._imported, inputs, tvm.cpu(), self._entry, self._weights)
        seconds: dict[WorkloadKey, float] = {}
        calls: dict[WorkloadKey, int] = {}
        for name, key in self._keys.items():
            if name in self._stopwatch.seconds:
                seconds[key] = seconds.get(key, 0.0) + self._stopwatch.seconds[name]
                calls[key] = calls.get(key, 0) + self._stopwatch.calls[name]
        return _Taken(seconds, calls)


def _rounds(steps: Sequence[_Step], inputs: Mapping[str, Array]) -> Iterator[tuple[_Taken, _Taken]]:
    """Yield what the default's step and the other took, after steps to warm up, first one first and then the other."""
    begin = time.perf_counter()
    for number in range(MOST_ROUNDS):
        if number >= LEAST_ROUNDS and time.perf_counter() - begin > SECONDS:
            return
        taken: dict[int, _Taken] = {}
        for place in (0, 1) if number % 2 else (1, 0):
            for _ in range(WARM_STEPS):
                steps[place].run(inputs)
            taken[place] = steps[place].run(inputs)
        yield taken[0], taken[1]


def _measurement(key: WorkloadKey, rounds: Sequence[tuple[_Taken, _Taken]]) -> Measurement:
    default, own = ([each[place].seconds[key] / each[place].calls[key] for each in rounds] for place in (0, 1))
    return measurement_of(Times(own, default))


def _accepted_inputs(model: PlannedModel, step: _Step) -> dict[str, Array]:
    """Return inputs that a step takes, of the sizes that were searched."""
    shapes = {**fixed_shapes(model.source.model, model.plan.imported), **model.options.shapes}
    refusal: Exception | None = None
    for values in completed(graph_inputs(model.source.model, shapes), model.sizes, default_size):
        inputs = make_inputs(model.source.model, 0, values, shapes=shapes)
        try:
            step.run(inputs)
        except Exception as error:  # whatever the runtime throws at sizes that do not fit
            refusal = error
        else:
            return inputs
    raise StepError(str(refusal))
