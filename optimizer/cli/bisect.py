"""`optimizer bisect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from optimizer.cli.arguments import shape_option
from optimizer.errors import CertificateError, TargetError

if TYPE_CHECKING:
    from optimizer.bisection import Finding


@click.command(name="bisect")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", "-t", default="host", show_default=True, help="A CPU target that this machine can execute.")
@shape_option
@click.option("--passes", help="Graph passes in order, as for compile; by default those that compile runs.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(model: Path, target: str, shapes: tuple[str, ...], passes: str | None, as_json: bool) -> None:
    """Find the first pass that breaks the numbers of an ONNX MODEL, and the first site where it does.

    The model is compiled with fewer and fewer passes and compared with a reference each time. The exit code is that of
    a failed certificate if the numbers are wrong.
    """
    from optimizer.bisection import bisect
    from optimizer.cli.arguments import parse_shapes
    from optimizer.compile import CompileOptions, find_target, parse_passes
    from optimizer.frontend.model_file import read_model
    from passes import pipeline
    from targets.execution import how_executed

    options = CompileOptions(find_target(target), parse_shapes(shapes), pipeline.DEFAULT if passes is None else passes)
    if how_executed(options.target) != "native" or options.target.device != "cpu":
        raise TargetError(f"this machine cannot execute {options.target.name} by itself; bisect with --target host")
    finding = bisect(read_model(model), options, parse_passes(options))
    _show(finding, as_json=as_json)
    if finding.error is not None:
        raise CertificateError(finding.error)


def _show(finding: Finding, *, as_json: bool) -> None:
    from optimizer.cli.console import print_facts
    from optimizer.cli.plain_text import print_json
    from passes.pipeline import notation

    guilty = None if finding.guilty is None else notation(finding.guilty)
    site = finding.site
    if as_json:
        print_json(
            {
                "error": finding.error,
                "pass": guilty,
                "site": None if site is None else {"location": site.location, "nodes": list(site.nodes)},
            }
        )
        return
    if finding.error is None:
        print_facts("the numbers are right with all passes", [])
        return
    facts = [("first wrong after", guilty or "the import: no pass is needed to make the numbers wrong")]
    if site is not None:
        facts.append(("first site", ", ".join(site.nodes) or site.location))
    print_facts("the numbers are wrong", facts)
