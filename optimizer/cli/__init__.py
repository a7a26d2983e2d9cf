"""The command line: one module per subcommand, imported only when it is asked for."""

from __future__ import annotations

import errno
import importlib
import io
import os
import sys
from typing import NoReturn

import click

from optimizer.errors import InsufficientMemoryError, OptimizerError

_COMMANDS = (
    "compile",
    "run",
    "generate",
    "inspect",
    "verify",
    "bench",
    "passes",
    "bisect",
    "tune",
    "logs",
    "fleet",
    "targets",
    "doctor",
)
_INTERNAL_ERROR = 70  # EX_SOFTWARE of sysexits.h


class _LazyGroup(click.Group):
    """A group whose subcommands are imported when they are run, so that `--help` needs none of them but its own."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        return importlib.import_module(f"optimizer.cli.{cmd_name}").command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _SUMMARIES[name]) for name in _COMMANDS])


_SUMMARIES = {
    "compile": "Compile an ONNX model to a package for one target.",
    "run": "Run a package on given or random inputs.",
    "generate": "Continue a text with a compiled language model.",
    "inspect": "Show what a package or an ONNX model holds, without running it.",
    "verify": "Check a package's integrity, whether it runs here, and its numbers.",
    "bench": "Measure a package's speed and memory on this machine.",
    "passes": "List the graph passes, what each does, and its options.",
    "bisect": "Find the first pass that breaks a model's numbers.",
    "tune": "Choose the parameters of a model's kernels by measurement, into a log.",
    "logs": "List, show, merge, prune, export, import and check tuning logs.",
    "fleet": "Lend devices to those who tune, and see which there are.",
    "targets": "List the hardware targets, and which of them this machine can execute.",
    "doctor": "Check tool chains, CPU, threads, memory bandwidth and GPU; each problem names its fix.",
}


@click.group(cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="optimizer")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
def optimizer(debug: bool) -> None:
    """Compile neural networks in ONNX to tested packages for ARM, x86 and CUDA."""


def main() -> None:
    """Run the command line and exit: 0, or the exit code of the kind of error (see optimizer.errors)."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows another
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    debug = len(arguments) < len(sys.argv[1:])
    try:
        optimizer.main(args=arguments, prog_name="optimizer", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        # Whoever reads our output has gone; nothing is left to flush to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OptimizerError as error:
        if debug:
            raise
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except MemoryError:
        if debug:
            raise
        click.echo("error: there is too little memory for this; free memory, or give smaller inputs", err=True)
        sys.exit(InsufficientMemoryError.exit_code)
    except Exception as error:
        if debug:
            raise
        _exit_with(error)


def _exit_with(error: Exception) -> NoReturn:
    """Say what an error means that none of ours stands for, and exit."""
    if isinstance(error, ModuleNotFoundError) and not _is_own(error.name or ""):
        click.echo(f"error: the Python package '{error.name}' is not installed; `pip install .` does it", err=True)
        sys.exit(OptimizerError.exit_code)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        click.echo(f"error: what is written does not fit: {error.strerror}; free space, or write elsewhere", err=True)
        sys.exit(OptimizerError.exit_code)
    reason = str(error).strip().splitlines()
    click.echo(
        f"internal error: {type(error).__name__}: {reason[0] if reason else ''}\n"
        "This is a bug of the compiler; run again with --debug for the traceback and report it.",
        err=True,
    )
    sys.exit(_INTERNAL_ERROR)


def _is_own(module: str) -> bool:
    return module.partition(".")[0] in ("optimizer", "passes", "schedules", "targets")
