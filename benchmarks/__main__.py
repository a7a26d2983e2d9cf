"""`python -m benchmarks TABLE`: tables of this compiler beside other engines, as Markdown."""

from __future__ import annotations

import datetime
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import click
import onnx

from benchmarks import arm64, cliffs, fusion, transfer, tuning
from benchmarks.architecture import EXPORTERS, Exporter
from benchmarks.comparison import Judge, Row, compare
from benchmarks.engines import ENGINES, OTHER_ENGINES, PEAKS
from benchmarks.exact import in_float64, unoptimized
from benchmarks.llm import table as llm
from benchmarks.models import Sizes
from benchmarks.tables import REFERENCE, TABLES, Subject, subjects
from optimizer.certificate.tolerance import Arithmetic, arithmetic

_COLUMNS = (
    "model",
    "engine",
    "ms",
    "spread",
    "time / ours",
    "least / ours",
    "compile s",
    "compile MB",
    "resident MB",
    "max difference",
    "tolerance",
)

# The engines that others' times are held against: the first that a table has.
_OURS = ("optimizer", "optimizer-bf16", "optimizer-kernels", "optimizer-bf16-kernels")
_ENGINES = tuple(dict.fromkeys([*ENGINES, *OTHER_ENGINES, *PEAKS, *llm.ENGINES]))


@click.command()
@click.argument("table", type=click.Choice([*TABLES, "fusion", "llm", "arm64", "cliffs"]))
@click.option("--model", "models", multiple=True, help="Only this model (or models such as conv*); may be repeated.")
@click.option("--exporter", "exporters", multiple=True, type=click.Choice(EXPORTERS), help="Only of these exporters.")
@click.option("--engine", "engines", multiple=True, type=click.Choice(_ENGINES), help="Only these engines.")
@click.option("--batch", default=1, show_default=True, help="How many inputs the models take at once.")
@click.option("--length", "lengths", multiple=True, type=click.IntRange(2), help="Tokens of a text; may be repeated.")
@click.option("--int8", is_flag=True, help="Models quantized to 8 bits (`python -m benchmarks.models --int8`).")
@click.option("--threads", type=click.IntRange(1), help="Threads of every engine; default: one per physical core.")
@click.option("--rounds", default=5, show_default=True, help="How often all engines take their turn.")
@click.option("--trials", multiple=True, type=click.IntRange(1), help="Table tuning: after how many trials to look.")
@click.option("--target", default="host", show_default=True, help="Tables tuning, transfer: for what to tune.")
@click.option(
    "--log",
    type=click.Path(path_type=Path),
    help="Table tuning: a folder that keeps what searches find; what it holds is not searched again.",
)
@click.option("--stock-trials", default=0, help="Table tuning: let TVM's MetaSchedule search, too, so many trials.")
@click.option("--prompt", default=512, show_default=True, help="Table llm: tokens of the prompt.")
@click.option("--steps", default=128, show_default=True, help="Table llm: tokens made after it.")
@click.option("--peers", default=sys.executable, help="Table llm: a Python that has llama_cpp and onnxruntime_genai.")
@click.option("--keep", is_flag=True, help="Table llm: measure the packages of an earlier run, if there are any.")
def main(
    table: str,
    models: tuple[str, ...],
    exporters: tuple[Exporter, ...],
    engines: tuple[str, ...],
    batch: int,
    lengths: tuple[int, ...],
    int8: bool,
    threads: int | None,
    rounds: int,
    trials: tuple[int, ...],
    target: str,
    log: Path | None,
    stock_trials: int,
    prompt: int,
    steps: int,
    peers: str,
    keep: bool,
) -> None:
    """Compare this compiler with other engines on the models of TABLE, interleaved in one run.

    Ends with exit code 1 if a model is missing, does not compile, or differs from onnxruntime beyond its tolerance
    (or, where a single kernel does so, from an evaluation in float64, and where a quantized model does so, from
    onnxruntime without graph optimizations by more than onnxruntime itself).
    The table `fusion` times nothing: it counts the kernels of one step of the other tables' models, and fails where
    they are more than the nodes of onnxruntime's optimized graph. The table `tuning` searches before it measures;
    `transfer` searches with the shipped log's cost model and without. The table `arm64` judges the inner loops of
    kernels for Arm by llvm-mca's models of its cores. The table `llm` is of decoders with weights of 4 bits
    (`python -m benchmarks.llm.models`): tokens/s of a prompt and after it, beside llama.cpp and onnxruntime-genai.
    The table `cliffs` takes single kernels through consecutive sizes, and fails where one takes twice as long for each
    element as the sizes beside it.
    """
    if table == "fusion":
        fusion.main(models)
        return
    if table == "arm64":
        click.echo(f"{datetime.date.today()}, `python -m benchmarks arm64`, {Path(arm64.find_mca()).name}\n")
        for line in arm64.lines():
            click.echo(line)
        return
    from optimizer.runtime.machine import default_thread_count  # noqa: PLC0415

    threads = threads or default_thread_count()
    click.echo(
        f"{datetime.date.today()}, {_cpu()}, {threads} threads, `{' '.join(['python -m benchmarks', *sys.argv[1:]])}`\n"
    )
    if table == "cliffs":
        cliffs.main(models, threads)
        return
    if table == "llm":
        if unknown := sorted(set(engines) - set(llm.ENGINES)):
            raise click.UsageError(f"the table llm has no engine {', '.join(unknown)}")
        workload = llm.Workload(prompt, steps, threads, rounds)
        for line in llm.lines(models, engines or tuple(llm.ENGINES), workload, peers, keep=keep):
            click.echo(line)
        return
    if table in ("tuning", "transfer"):
        chosen = subjects(table, models, exporters, Path(), Sizes(batch))
        for line in _searches(table, chosen, threads, rounds, trials, stock_trials, tuning.Kept(target, log)):
            click.echo(line)
        return
    click.echo(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}")
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="optimizer-bench-") as folder:
        for subject in subjects(table, models, exporters, Path(folder), Sizes(batch, lengths, int8)):
            for line, fails in _lines(subject, engines or TABLES[table].engines, threads, rounds):
                click.echo(line)
                failed += [subject.label] if fails else []
    if failed:
        sys.exit(f"\nfailed: {', '.join(dict.fromkeys(failed))}")


def _searches(
    table: str,
    models: Iterable[Subject],
    threads: int,
    rounds: int,
    trials: Sequence[int],
    stock_trials: int,
    kept: tuning.Kept,
) -> Iterator[str]:
    """Yield the lines of a table whose models are tuned first."""
    columns = tuning.COLUMNS if table == "tuning" else transfer.COLUMNS
    yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    for subject in models:
        if table == "tuning":
            counts = trials or tuning.TRIALS
            yield from tuning.lines(subject, counts, threads, rounds, stock_trials=stock_trials, kept=kept)
        else:
            yield from transfer.lines(subject, max(trials, default=transfer.TRIALS), threads, kept.target)


def _lines(subject: Subject, engines: Sequence[str], threads: int, rounds: int) -> Iterator[tuple[str, bool]]:
    """Yield the lines of one model, each with whether it shows a failure of ours."""
    if not subject.path.exists():
        yield f"| {subject.label} | not made: run `{subject.made_by}` |", True
        return
    model = onnx.load(subject.path, load_external_data=False)
    rounds_activations = any(node.op_type == "MatMulNBits" for node in model.graph.node)
    exact = arithmetic(model, activations="int8" if rounds_activations else None)
    results = compare(
        subject.path,
        subject.cases,
        engines,
        threads=threads,
        rounds=rounds,
        reference=REFERENCE,
        judge=_judge(subject, model, exact),
    )
    for case, rows in results.items():
        label = f"{subject.label}, {case}" if len(results) > 1 else subject.label
        ours = next((row for row in rows if row.engine in _OURS), None)
        for row in rows:
            agrees = row.error is None and (row.difference <= row.tolerance or REFERENCE not in engines)
            yield _line(label, row, ours), row.engine == "optimizer" and not agrees


def _judge(subject: Subject, model: onnx.ModelProto, exact: Arithmetic) -> Judge:
    tolerance = exact.tolerance("float32")
    if subject.is_kernel:
        return Judge("float64", tolerance, partial(in_float64, model))
    if exact.quantizes:
        return Judge("its floats", tolerance, partial(unoptimized, model, subject.path), loosened=True)
    # Whole models would take the reference evaluator hours.
    return Judge("", tolerance, lambda _: None)


def _line(label: str, row: Row, ours: Row | None) -> str:
    if row.error is not None:
        return f"| {label} | {row.engine} | {row.error} |"
    # What others on the machine take from both is in the medians, hardly in the least times.
    ratios = (float("nan"),) * 2 if ours is None else (row.median / ours.median, row.least / ours.least)
    times = f"{row.median * 1e3:.2f} | ±{row.spread:.0%} | {ratios[0]:.2f} | {ratios[1]:.2f} |"
    if row.engine in PEAKS:
        return f"| {label} | {row.engine} | {times}"
    return (
        f"| {label} | {row.engine} {row.version} | {times} {row.compile_seconds:.1f} "
        f"| {row.compile_peak_bytes / 1e6:.0f} | {row.resident_bytes / 1e6:.0f} "
        f"| {row.difference:.1e}{f' to {row.judge}' * bool(row.judge)} | {row.tolerance:.1e} |"
    )


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


if __name__ == "__main__":
    main()
