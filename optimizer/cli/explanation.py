"""The account of the passes, printed: what was rewritten, what was refused and why."""

from __future__ import annotations

from collections.abc import Sequence

from optimizer.cli.console import print_facts, print_table
from optimizer.lowering import Fusion
from optimizer.report.explanation import explain
from passes.pipeline import PassRecord


def show(records: Sequence[PassRecord], fusion: Fusion) -> None:
    """Print every site of every pass, and of the fusion behind them, with its ONNX nodes."""
    sites = explain(records, fusion)
    told = {site.name for site in sites}
    names = [*(record.item.name for record in records), *fusion]
    idle = [name for name in dict.fromkeys(names) if name not in told]
    rows = [(site.name, site.outcome, ", ".join(site.nodes) or site.location) for site in sites]
    if rows:
        print_table("\nsites", ("pass", "outcome", "ONNX nodes"), rows)
    if idle:
        print_facts("", [("without sites", ", ".join(idle))])
