"""The search over a model's tasks: batches of measurements where they pay most, each in the log before the next."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from optimizer.errors import TuningError
from optimizer.tuning import cost_model
from optimizer.tuning.cost_model import CostModel
from optimizer.tuning.log import TuningLog, best_decisions, fits, is_taken_back, ratios_in_steps
from optimizer.tuning.pool import BenchPool, Measurement
from optimizer.tuning.process import FailedError
from optimizer.tuning.records import Kind, Origin, Record, WorkloadKey, choice_of
from optimizer.tuning.search import nearest_decisions, propose, size_of
from optimizer.tuning.tasks import Task, features_of
from schedules.family import Parameters, defaults

BATCH = 8
SEARCH_ROUNDS = 3
# A decision is made among this many, measured again beside the default, more often.
FINALISTS = 3
FINAL_ROUNDS = 11
# What a challenger must gain over the default to replace it: less than that is noise.
LEAST_GAIN = 0.02


@dataclass
class Progress:
    """Where the search of one task stands; `ratio` is the best over the default's time so far.

    `in_step` is that in a whole step of the model of what was decided first, 0 where it was not compared there.
    `least_seconds` is what the machine's peak allows at best, 0 where that is not known.
    """

    task: Task
    least_seconds: float = 0.0
    default_seconds: float = 0.0
    ratio: float = 1.0
    trials: int = 0
    batches: int = 0
    undecided: int = 0  # trials since the last decision
    gain: float = 0.3  # of the last batch; before the first a guess, so that every task gets its turn
    failures: dict[str, int] = field(default_factory=dict)
    skipped: str = ""
    decided: Parameters | None = None
    in_step: float = 0.0
    trials_of: list[Record] = field(default_factory=list)

    @property
    def weight(self) -> float:
        """Return the task's seconds of a step under the best parameters so far."""
        return self.task.calls * self.best_seconds

    @property
    def best_seconds(self) -> float:
        """Return the seconds of a call under the best parameters so far."""
        return self.default_seconds * self.ratio

    @property
    def exhausted(self) -> bool:
        """Return whether there is nothing left to measure."""
        return bool(self.skipped) or self.trials >= size_of(self.task.space) - 1


@dataclass(frozen=True)
class Budget:
    """How long to search: a number of trials over all tasks, seconds, or both; whichever ends first."""

    trials: int | None = None
    seconds: float | None = None


Watch = Callable[[Sequence[Progress]], None]
# Returns what decisions measure in a step of the model, beside the defaults.
CompareInStep = Callable[[Mapping[WorkloadKey, Parameters]], Mapping[WorkloadKey, Measurement]]


class TuningSession:
    """A search over `tasks` whose measurements go to `log`; what the log already holds of this origin counts.

    Decisions in the log for workloads of other sizes, and those in `seeds` (of sibling targets), are tried first.
    """

    def __init__(
        self, tasks: Sequence[Task], pool: BenchPool, log: TuningLog, origin: Origin, seeds: Sequence[Record] = ()
    ) -> None:
        self._pool = pool
        self._log = log
        self._origin = origin
        self._known = list(log.read().records)
        self._seeds = [*self._known, *seeds]
        self._generator = random.Random(0)  # noqa: S311 - not for cryptography
        self._models: dict[str, CostModel] = {}
        self._lost = False  # there is nothing left to measure with
        self.progress: list[Progress] = [self._resume(task) for task in tasks]

    def run(self, budget: Budget, watch: Watch = lambda _: None) -> None:
        """Search until the budget is spent or nothing is left, then decide every task that was measured.

        Decisions are made even when the search is interrupted. Raises TuningError where no task could be measured.
        """
        begin = time.monotonic()
        done = sum(progress.trials for progress in self.progress)
        try:
            self._measure_defaults(watch)
            while (progress := self._next()) is not None:
                left = BATCH if budget.trials is None else min(BATCH, budget.trials - done)
                if left <= 0 or (budget.seconds is not None and time.monotonic() - begin > budget.seconds):
                    break
                done += self._batch(progress, left)
                watch(self.progress)
        finally:
            for progress in self.progress:
                self._decide(progress)
                watch(self.progress)
            for family, model in self._models.items():
                model.save(self._log.folder / f"{family}{cost_model.SUFFIX}")
        if self.progress and all(progress.skipped for progress in self.progress):
            first = self.progress[0]
            raise TuningError(f"no kernel could be measured; '{first.task.description}' says: {first.skipped}")

    def confirm(self, compare: CompareInStep) -> None:
        """Compare decisions with the defaults in a step of the model; those that gain nothing there are taken back.

        What then applies instead, of earlier decisions, is compared in its turn.
        """
        while chosen := self._unconfirmed():
            measured = compare({key: record.parameters for key, (_, record) in chosen.items()})
            confirmations = [
                self._record("confirmation", chosen[key][0].task, chosen[key][1].parameters, result, {})
                for key, result in measured.items()
            ]
            if not confirmations:
                break
            self._log.append(confirmations)
            self._known += confirmations
        self._settle()

    def _unconfirmed(self) -> dict[WorkloadKey, tuple[Progress, Record]]:
        """Return the tasks whose defaults are replaced by a decision that was not compared in a step yet."""
        best, in_steps = best_decisions(self._known, self._origin.target_digest), ratios_in_steps(self._known)
        found = ((each, best[each.task.key]) for each in self.progress if each.task.key in best)
        return {
            record.key: (each, record)
            for each, record in found
            if fits(record.parameters, each.task.space)
            and record.choice != choice_of(defaults(each.task.space))
            and (record.key, record.choice) not in in_steps
        }

    def _settle(self) -> None:
        """Note what applies to each task that was decided."""
        best, in_steps = best_decisions(self._known, self._origin.target_digest), ratios_in_steps(self._known)
        for progress in self.progress:
            if progress.decided is None:
                continue
            key = progress.task.key
            progress.in_step = in_steps.get((key, choice_of(progress.decided)), 0.0)
            record = best.get(key)
            if record is None:
                progress.decided, progress.ratio = defaults(progress.task.space), 1.0
            else:
                progress.decided = record.parameters
                progress.ratio = in_steps.get((key, record.choice), record.ratio)

    def _resume(self, task: Task) -> Progress:
        progress = Progress(task)
        for record in self._known:
            mine = record.key == task.key and record.origin == self._origin
            if not mine or not fits(record.parameters, task.space):
                continue
            if record.kind == "trial":
                self._note(progress, record)
            elif record.kind == "decision":
                progress.decided, progress.ratio, progress.undecided = record.parameters, record.ratio, 0
        return progress

    def _note(self, progress: Progress, record: Record) -> None:
        progress.trials_of.append(record)
        progress.trials += 1
        progress.undecided += 1
        if record.failure:
            reason = record.failure.partition(":")[0]
            progress.failures[reason] = progress.failures.get(reason, 0) + 1
        else:
            progress.ratio = min(progress.ratio, record.ratio)

    def _measure_defaults(self, watch: Watch) -> None:
        """Time every task's default, which is what the budget is divided by."""
        measured = self._pool.measure_defaults([progress.task for progress in self.progress])
        for progress, default in zip(self.progress, measured, strict=True):
            progress.default_seconds, progress.skipped = default.seconds, default.failure
            watch(self.progress)

    def _measure(self, progress: Progress, candidates: Sequence[Parameters], rounds: int) -> list[Measurement]:
        """Return a measurement of each candidate, none of them where the task has to be skipped."""
        try:
            default, *measured = self._pool.measure(progress.task, candidates, rounds)
        except FailedError as error:
            progress.skipped = str(error)
            return []
        except TuningError:
            self._lost = True
            raise
        progress.default_seconds = default.seconds
        return measured

    def _next(self) -> Progress | None:
        """Return the task where the next batch is likely to save most of a step's time."""
        open_tasks = [progress for progress in self.progress if not progress.exhausted]
        return max(open_tasks, key=lambda p: p.weight * p.gain, default=None)

    def _batch(self, progress: Progress, count: int) -> int:
        """Measure up to `count` new candidates of a task and return how many."""
        task, before = progress.task, progress.ratio
        features = features_of(task)
        tried = [record.parameters for record in progress.trials_of]
        seeds = nearest_decisions(self._seeds, task.family, task.version, features, 2) if not tried else []
        model = self._model(task.family)
        candidates = propose(task.space, features, tried, model, count, seeds=seeds, generator=self._generator)
        if not candidates:
            progress.skipped = progress.skipped or "nothing left to try"
            return 0
        measured = self._measure(progress, candidates, SEARCH_ROUNDS)
        records = [
            self._record("trial", task, parameters, result, features)
            for parameters, result in zip(candidates, measured, strict=not progress.skipped)
        ]
        self._log.append(records)
        self._known += records
        for record in records:
            self._note(progress, record)
        progress.batches += 1
        # A batch without gain halves the hope in the task; one with gain renews it.
        progress.gain = max(0.5 * progress.gain, 1 - progress.ratio / before)
        model.train([record for record in self._known if record.family == task.family])
        return len(records)

    def _model(self, family: str) -> CostModel:
        if family not in self._models:
            model = CostModel.load(self._log.folder / f"{family}{cost_model.SUFFIX}")
            records = [record for record in self._known if record.family == family]
            if len(records) > model.trained_on:
                model.train(records)
            self._models[family] = model
        return self._models[family]

    def _decide(self, progress: Progress) -> None:
        """Measure the best candidates again beside the default and write down what to use: at worst the default."""
        if not progress.undecided or self._lost:
            return
        task = progress.task
        in_steps = ratios_in_steps(self._known)
        usable = [r for r in progress.trials_of if not r.failure and not is_taken_back(r, in_steps)]
        good = sorted(usable, key=lambda record: record.ratio)
        finalists = [record.parameters for record in good[:FINALISTS] if record.ratio < 1]
        default = defaults(task.space)
        measured = self._measure(progress, finalists, FINAL_ROUNDS)
        if progress.skipped:
            return
        best = min(
            (
                (result.ratio, choice_of(parameters), parameters, result)
                for parameters, result in zip(finalists, measured, strict=True)
                if not result.failure and result.ratio < 1 - LEAST_GAIN
            ),
            default=(1.0, (), default, Measurement(progress.default_seconds, ratio=1.0)),
            key=lambda gain: gain[:2],
        )
        progress.ratio, _, progress.decided, result = best
        progress.undecided = 0
        decision = self._record("decision", task, progress.decided, result, features_of(task))
        self._log.append([decision])
        self._known.append(decision)

    def _record(
        self, kind: Kind, task: Task, parameters: Parameters, result: Measurement, features: Mapping[str, float]
    ) -> Record:
        return Record(
            kind=kind,
            workload=task.workload,
            family=task.family,
            version=task.version,
            description=task.description,
            parameters=dict(parameters),
            seconds=result.seconds,
            spread=result.spread,
            ratio=result.ratio,
            failure=result.failure,
            origin=self._origin,
            features=dict(features),
        )
