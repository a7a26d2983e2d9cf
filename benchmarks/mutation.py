"""Mutation score of the graph passes: how many small faults in their code the tests beside them notice.

`python -m benchmarks.mutation` needs the extra `mutation`. mutmut makes the mutants of every function and method; its
own runner cannot take the place of methods that TVM calls, so here each mutant is the source of its module in a forked
process, which has TVM in memory already. It runs the tests that execute the mutated lines, the quickest first and
`MOST_SECONDS` of them at most, until one fails. A mutant that none of them notices has survived; one that takes
several times as long as its tests do has not. Whether `zip` is strict is not mutated: it only states what holds.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import difflib
import gc
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any, NoReturn

PACKAGE, TESTS = Path("passes"), "tests/passes"
# Imported once, before forking: nothing that imports a pass.
_WARM = ("tvm.relax", "onnx.reference", "hypothesis.strategies", "networkx", "pytest", "schedules.registry", "targets")
MOST_SECONDS = 10.0
# A mutant may need so many times the time of its tests, and these seconds more to import them. That is time of the CPU;
# one that only waits is ended after ten times as long. A stopped machine must not look like a killed mutant.
_PATIENCE, _START_SECONDS, _WAITING = 4, 40, 10
_STEP_SECONDS = 0.05


@dataclass(frozen=True)
class Mutant:
    """A changed source of a module; `tests` run the changed lines."""

    path: Path
    line: int
    source: str
    mutated: str
    tests: tuple[str, ...]

    @property
    def key(self) -> str:
        return hashlib.sha256(f"{self.path}\n{self.mutated}".encode()).hexdigest()

    def diff(self) -> str:
        lines = difflib.unified_diff(
            self.source.splitlines(), self.mutated.splitlines(), str(self.path), n=0, lineterm=""
        )
        return "\n".join([f"{self.path}:{self.line}", *list(lines)[3:]])


@dataclass(frozen=True)
class Coverage:
    """Which tests execute which lines of which file, "" for imports, and how many seconds each takes."""

    tests: Mapping[str, Mapping[int, frozenset[str]]]
    seconds: Mapping[str, float]

    def quickest(self, path: Path, lines: Sequence[range]) -> tuple[str, ...]:
        """Return the tests that execute any line of the first of `lines` that is executed at all."""
        by_line = self.tests.get(str(path), {})
        for span in lines:
            found = {test for line in span for test in by_line.get(line, ())}
            if found == {""}:  # what importing executes matters to all tests of the file
                found = {test for tests in by_line.values() for test in tests}
            if found:
                return self._within_time(sorted(found - {""}, key=lambda test: (self.seconds[test], test)))
        return ()

    def _within_time(self, tests: Sequence[str]) -> tuple[str, ...]:
        taken, total = [], 0.0
        for test in tests:
            total += self.seconds[test]
            if taken and total > MOST_SECONDS:
                break
            taken.append(test)
        return tuple(taken)


def trace(tests: Sequence[str]) -> Coverage:
    """Run tests once, each line of the passes recorded with those that execute it."""
    read, write = os.pipe()
    if not os.fork():
        os.close(read)
        try:
            with os.fdopen(write, "w") as file:
                json.dump(_traced(tests), file)
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        failed, executing, seconds = json.load(file)
    os.wait()
    if failed:
        sys.exit("the tests fail without any mutant")
    by_line = {
        path: {int(line): frozenset(names) for line, names in lines.items()} for path, lines in executing.items()
    }
    return Coverage(by_line, seconds)


def _traced(tests: Sequence[str]) -> tuple[int, dict[str, dict[int, list[str]]], dict[str, float]]:
    pytest = importlib.import_module("pytest")
    coverage = importlib.import_module("coverage").Coverage(data_file=None, include=[f"{PACKAGE}/*"])
    seconds: dict[str, float] = {}

    class Contexts:
        def pytest_runtest_logstart(self, nodeid: str) -> None:
            coverage.switch_context(nodeid)
            seconds[nodeid] = -time.process_time()

        def pytest_runtest_logfinish(self, nodeid: str) -> None:
            seconds[nodeid] += time.process_time()

    coverage.start()
    failed = pytest.main([*_OPTIONS, *tests], plugins=[Contexts()])
    coverage.stop()
    data = coverage.get_data()
    executing = {os.path.relpath(path): data.contexts_by_lineno(path) for path in data.measured_files()}
    return int(failed), executing, seconds


_OPTIONS = ("-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning")


def mutants(path: Path, every: int, offset: int, coverage: Coverage) -> tuple[list[Mutant], int]:
    """Return every `every`-th mutant of a module, counted from `offset`, and how many there are in all."""
    cst = importlib.import_module("libcst")
    metadata = importlib.import_module("libcst.metadata")
    source = path.read_text()
    module, found, *_ = importlib.import_module("mutmut.mutation.file_mutation").create_mutations(str(path), source)
    positions = metadata.MetadataWrapper(module, unsafe_skip_copy=True).resolve(metadata.PositionProvider)
    is_strictness = _strictness(module)
    inside = [m for m in found if isinstance(m.contained_by_top_level_function, cst.FunctionDef)]
    inside = [m for m in inside if not is_strictness(m)]
    chosen: list[Mutant] = []
    for number, mutation in enumerate(inside, offset):
        if number % every == 0:
            spans = [positions[mutation.original_node], positions[mutation.contained_by_top_level_function.body]]
            lines = [range(span.start.line, span.end.line + 1) for span in spans]
            mutated = module.deep_replace(mutation.original_node, mutation.mutated_node).code
            chosen.append(Mutant(path, lines[0].start, source, mutated, coverage.quickest(path, lines)))
    return chosen, len(inside)


def _strictness(module: Any) -> Callable[[Any], bool]:  # noqa: ANN401 -- libcst is loaded at run time
    """Return what tells the mutations that change nothing but the argument `strict` of a call."""
    matchers = importlib.import_module("libcst.matchers")
    pattern = matchers.Arg(keyword=matchers.Name("strict"))

    def others(call: Any) -> list[Any]:  # noqa: ANN401
        return [argument.value for argument in call.args if not matchers.matches(argument, pattern)]

    strict = {id(argument.value) for argument in matchers.findall(module, pattern)}

    def is_strictness(mutation: Any) -> bool:  # noqa: ANN401
        before, after = mutation.original_node, mutation.mutated_node
        calls = matchers.matches(before, matchers.Call()) and matchers.matches(after, matchers.Call())
        if not calls or not matchers.findall(before, pattern):
            return id(before) in strict
        return list(map(id, others(before))) == list(map(id, others(after))) and before.func is after.func

    return is_strictness


class _MutatedLoader(importlib.machinery.SourceFileLoader, importlib.abc.MetaPathFinder):
    """Finds one module and gives it another source."""

    def __init__(self, mutant: Mutant) -> None:
        super().__init__(".".join(mutant.path.with_suffix("").parts), str(mutant.path.resolve()))
        self._source = mutant.mutated

    def find_spec(self, fullname: str, *_: object) -> importlib.machinery.ModuleSpec | None:
        return (
            importlib.util.spec_from_file_location(fullname, self.path, loader=self) if fullname == self.name else None
        )

    def get_code(self, fullname: str) -> CodeType:
        return compile(self._source, self.path, "exec")


@dataclass
class _Trial:
    """A mutant under test, and for how long this process has looked on: not while both were stopped."""

    mutant: Mutant
    limit: int
    waited: float = 0

    def start(self) -> int:
        """Return the process, which exits with 0 if no test notices the mutant."""
        return os.fork() or _test(self.mutant, self.limit)

    def is_stuck(self) -> bool:
        self.waited += _STEP_SECONDS
        return self.waited > _WAITING * self.limit


def _test(mutant: Mutant, limit: int) -> NoReturn:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 1))
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    sys.meta_path.insert(0, _MutatedLoader(mutant))
    code = 1
    with contextlib.suppress(BaseException):
        code = int(importlib.import_module("pytest").main([*_OPTIONS, *mutant.tests]))
    os._exit(code)


def survivors(chosen: Sequence[Mutant], seconds: Mapping[str, float], workers: int) -> Iterator[tuple[Mutant, bool]]:
    """Yield each mutant and whether it survived, as they are tested."""
    running: dict[int, _Trial] = {}
    pending = list(chosen)[::-1]
    while pending or running:
        while pending and len(running) < workers:
            mutant = pending.pop()
            if mutant.tests:
                trial = _Trial(mutant, int(_START_SECONDS + _PATIENCE * sum(seconds[test] for test in mutant.tests)))
                running[trial.start()] = trial
            else:
                yield mutant, True
        if running:
            process, status = _next_exit(running)
            yield running.pop(process).mutant, status == 0


def _next_exit(running: Mapping[int, _Trial]) -> tuple[int, int]:
    """Return the first process to end, and its status."""
    while not (exited := os.waitpid(-1, os.WNOHANG))[0]:
        time.sleep(_STEP_SECONDS)
        for process, trial in running.items():
            if trial.is_stuck():
                os.kill(process, signal.SIGKILL)
    return exited


def main() -> None:
    """Print the table, and write the mutants that survived to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", type=Path, help="the files to mutate; all passes by default")
    parser.add_argument("--every", type=int, default=1, help="test only every so many mutants, always the same ones")
    parser.add_argument("--tests", nargs="+", default=[TESTS], help="the tests to run; all of the passes by default")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--known", type=Path, help="a file that keeps the mutants that were killed: not tested again")
    parser.add_argument("--survivors", type=Path, default=Path("build/survivors.diff"))
    arguments = parser.parse_args()
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    for name in _WARM:
        importlib.import_module(name)
    gc.freeze()
    known = set(arguments.known.read_text().split()) if arguments.known and arguments.known.exists() else set()
    coverage = trace(arguments.tests)
    arguments.survivors.parent.mkdir(parents=True, exist_ok=True)
    counts: dict[Path, list[int]] = {}
    chosen: list[Mutant] = []
    offset = 0
    for path in arguments.modules or sorted(PACKAGE.rglob("*.py")):
        sample, total = mutants(path, arguments.every, offset, coverage)
        offset += total
        if total:
            counts[path] = [total, len(sample), sum(mutant.key in known for mutant in sample)]
        chosen += [mutant for mutant in sample if mutant.key not in known]
    with arguments.survivors.open("w") as file:
        for mutant, survived in survivors(chosen, coverage.seconds, arguments.workers):
            if survived:
                print(mutant.diff(), f"# {len(mutant.tests)} tests", sep="\n", end="\n\n", file=file, flush=True)
            else:
                counts[mutant.path][2] += 1
                _remember(arguments.known, mutant)
    _print(counts)


def _remember(known: Path | None, mutant: Mutant) -> None:
    if known is not None:
        with known.open("a") as file:
            file.write(mutant.key + "\n")


def _print(counts: Mapping[Path, Sequence[int]]) -> None:
    print(f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, `python -m benchmarks.mutation {' '.join(sys.argv[1:])}`\n")
    print("| module | mutants | tested | killed | score |\n|---|---|---|---|---|")
    total = [sum(column) for column in zip(*counts.values(), strict=True)]
    for name, (mutated, tested, killed) in [*((str(path), count) for path, count in counts.items()), ("all", total)]:
        print(f"| {name} | {mutated} | {tested} | {killed} | {killed / tested if tested else 1:.0%} |")


if __name__ == "__main__":
    main()
