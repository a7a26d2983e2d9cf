"""Run the backend suite, or a part of it, and print the counts.

python -m tests.backend.report                 all cases
python -m tests.backend.report --only conv     cases with "conv" in their name or among their operators
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import onnx

from tests.backend.cases import LIGHT, MODEL, NODE, BackendCase, all_cases
from tests.backend.execution import REFUSED, RIGHT, WRONG, Outcome, Run, judge, optimized, unoptimized

Prepare = Callable[[onnx.ModelProto], Run]
ONNXRUNTIME_PASSES = Path(__file__).with_name("onnxruntime_passes.txt")
_CASE_SECONDS = 60.0  # a case that takes longer counts as wrong
_LIGHT_SECONDS = 300.0


def onnxruntime_passes() -> frozenset[str]:
    """Return the names of the plain node cases that onnxruntime gets right (see make_onnxruntime_passes.py)."""
    lines = ONNXRUNTIME_PASSES.read_text().splitlines()
    return frozenset(line for line in lines if line and not line.startswith("#"))


def run_cases(
    cases: Sequence[BackendCase], processes: int = 2, prepare: Prepare = optimized
) -> Iterator[tuple[str, Outcome]]:
    """Judge cases in worker processes; one that crashes or takes too long is replaced by a new one."""
    waiting = list(reversed(cases))
    workers = [_Worker(prepare) for _ in range(min(processes, max(len(waiting), 1)))]
    try:
        while waiting or any(worker.case for worker in workers):
            for worker in workers:
                if worker.case is None and waiting:
                    worker.start(waiting.pop())
            wait([worker.connection for worker in workers if worker.case], timeout=1.0)
            for worker in workers:
                name = worker.case.name if worker.case else ""
                outcome = worker.outcome()
                if outcome is not None:
                    yield name, outcome
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that judges one case at a time."""

    def __init__(self, prepare: Prepare) -> None:
        self.case: BackendCase | None = None
        self._prepare = prepare
        self._began = 0.0
        self._launch()

    def start(self, case: BackendCase) -> None:
        self.case, self._began = case, time.monotonic()
        self.connection.send(case)

    def outcome(self) -> Outcome | None:
        """Return the outcome of the case in work when it is there."""
        if self.case is None:
            return None
        limit = _LIGHT_SECONDS if self.case.kind == LIGHT else _CASE_SECONDS
        result: Outcome | None = None
        if self.connection.poll():
            try:
                result = self.connection.recv()
            except EOFError:
                result = self._replaced("crashed")
        elif time.monotonic() - self._began > limit:
            result = self._replaced(f"took more than {limit:.0f} s")
        if result is not None:
            self.case = None
        return result

    def stop(self) -> None:
        self._process.kill()
        self._process.join()

    def _replaced(self, reason: str) -> Outcome:
        self.stop()
        self._launch()
        return Outcome(WRONG, reason)

    def _launch(self) -> None:
        context = multiprocessing.get_context("fork")
        self.connection, other = context.Pipe()
        self._process: BaseProcess = context.Process(target=_serve, args=(other, self._prepare), daemon=True)
        self._process.start()
        other.close()


def _serve(connection: Connection, prepare: Prepare) -> None:
    while True:
        connection.send(judge(connection.recv(), prepare))


def counts(cases: Iterable[BackendCase], outcomes: Mapping[str, Outcome]) -> list[str]:
    """Return lines with the number of cases right, wrong and refused, by kind of case."""
    cases = [case for case in cases if case.name in outcomes]
    passes = onnxruntime_passes()
    groups = {
        "node cases of plain tensors": [case for case in cases if case.kind == NODE and case.is_plain],
        "  of these, right in onnxruntime": [case for case in cases if case.name in passes],
        "other node cases": [case for case in cases if case.kind == NODE and not case.is_plain],
        "small models": [case for case in cases if case.kind == MODEL],
        "light_* models": [case for case in cases if case.kind == LIGHT],
    }
    lines = [f"{'':34}{'cases':>7}{RIGHT:>9}{WRONG:>9}{REFUSED:>9}"]
    for title, members in groups.items():
        verdicts = Counter(outcomes[case.name].verdict for case in members)
        figures = "".join(f"{verdicts[verdict]:9}" for verdict in (RIGHT, WRONG, REFUSED))
        share = f"{verdicts[RIGHT] / len(members):9.1%}" if members else ""
        lines.append(f"{title:34}{len(members):7}{figures}{share}")
    return lines


def by_operator(cases: Iterable[BackendCase], outcomes: Mapping[str, Outcome]) -> list[str]:
    """Return a line for each operator with cases that are not right, and below it those cases with the reasons."""
    grouped: dict[str, list[BackendCase]] = defaultdict(list)
    for case in cases:
        if case.name in outcomes:
            grouped[case.operators[0] if case.kind == NODE and "_expanded" not in case.name else case.kind].append(case)
    lines: list[str] = []
    for operator, members in sorted(grouped.items()):
        verdicts = Counter(outcomes[case.name].verdict for case in members)
        if verdicts[RIGHT] == len(members):
            continue
        lines.append(f"{operator}: {', '.join(f'{verdicts[verdict]} {verdict}' for verdict in verdicts)}")
        failed = [case.name for case in members if outcomes[case.name].verdict != RIGHT]
        lines += [f"    {outcomes[name].verdict} {name}: {outcomes[name].reason[:300]}" for name in failed]
    return lines


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases with this text in their name or operators")
    parser.add_argument("--kind", choices=(NODE, MODEL, LIGHT), help="only this kind of case")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument(
        "--unoptimized", action="store_true", help="run the imported module without passes and schedules"
    )
    parser.add_argument("--output", type=Path, help="write the list of cases that are not right to this file")
    options = parser.parse_args()
    wanted = options.only.lower()
    cases = [
        case
        for case in all_cases()
        if options.kind in (None, case.kind)
        and (wanted in case.name.lower() or wanted in (operator.lower() for operator in case.operators))
    ]
    began = time.monotonic()
    outcomes: dict[str, Outcome] = {}
    with suppress(KeyboardInterrupt):  # what is done by then is reported
        outcomes.update(run_cases(cases, options.jobs, unoptimized if options.unoptimized else optimized))
    listed = by_operator(cases, outcomes)
    summary = [*counts(cases, outcomes), f"{time.monotonic() - began:.0f} s"]
    if options.output:
        options.output.write_text("\n".join([*summary, "", *listed, ""]))
    else:
        print("\n".join(listed))
    print("\n".join(summary))


if __name__ == "__main__":
    main()
