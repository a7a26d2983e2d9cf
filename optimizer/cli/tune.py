"""`optimizer tune`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from optimizer.cli.arguments import shape_option
from optimizer.errors import OptionError

if TYPE_CHECKING:
    from optimizer.compile import CompileOptions

_DEFAULT_TRIALS = 256


@click.command(name="tune")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", "-t", default="host", show_default=True, help="Hardware target; see `optimizer targets`.")
@click.option("--gpu-arch", "gpu_architectures", multiple=True, metavar="SM", help="CUDA architecture, as for compile.")
@click.option("--trials", type=click.IntRange(1), help=f"Measurements over all kernels; {_DEFAULT_TRIALS} by default.")
@click.option("--minutes", type=click.FloatRange(min=0.01), help="Time to search, instead of trials or beside them.")
@click.option(
    "--device",
    default="host",
    show_default=True,
    help="What measures: host, emulator (checks candidates, logs nothing), or rpc:KEY@HOST:PORT of a fleet's tracker.",
)
@click.option("--log", type=click.Path(path_type=Path), help="Folder of tuning logs; by default the project's own.")
@shape_option
@click.option("--dim", "dims", multiple=True, metavar="NAME=SIZE", help="Symbolic dimension to measure at.")
@click.option(
    "--threads", type=click.IntRange(1), help="CPU threads; by default one per physical core of what measures."
)
@click.option("--passes", help="Graph passes, as for `optimizer compile`.")
@click.option("--precision", type=click.Choice(["model", "fp32", "fp16", "bf16"]), default="model", show_default=True)
@click.option("--weights", type=click.Choice(["model", "int8", "int4"]), default="model", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def command(
    model: Path,
    target: str,
    gpu_architectures: tuple[str, ...],
    trials: int | None,
    minutes: float | None,
    device: str,
    log: Path | None,
    shapes: tuple[str, ...],
    dims: tuple[str, ...],
    threads: int | None,
    passes: str | None,
    precision: str,
    weights: str,
    as_json: bool,
) -> None:
    """Choose the parameters of MODEL's kernels by measuring them, and keep the decisions in a log.

    Interrupt it at any time: what was measured is in the log, and the same command goes on from there. `optimizer
    compile` reuses the decisions.
    """
    from optimizer.cli.arguments import parse_shapes, parse_symbols
    from optimizer.cli.tuning_report import run_and_show
    from optimizer.compile import CompileOptions, find_target
    from optimizer.tuning.log import SHIPPED
    from optimizer.tuning.session import Budget
    from optimizer.tuning.tune import TuneOptions
    from passes import pipeline

    options = CompileOptions(
        find_target(target, gpu_architectures or None),
        parse_shapes(shapes),
        pipeline.DEFAULT if passes is None else passes,
        precision,
        weights=weights,
    )
    if trials is None and minutes is None:
        trials = _DEFAULT_TRIALS
    budget = Budget(trials, None if minutes is None else 60 * minutes)
    tuning = TuneOptions(log or SHIPPED, budget, parse_symbols(dims), threads, device)
    run_and_show(model, options, tuning, as_json=as_json)


def tune_before(model: Path, options: CompileOptions, trials: int, *, quiet: bool) -> None:
    """Tune a model that is to be compiled, into the log that the compile will read; raises OptionError without one."""
    from optimizer.cli.tuning_report import run
    from optimizer.tuning.session import Budget
    from optimizer.tuning.tune import TuneOptions

    if options.tuning_log is None:
        raise OptionError("--tune writes to the log that --no-log leaves out; give one of the two")
    run(model, options, TuneOptions(options.tuning_log, Budget(trials), {}), quiet=quiet)
