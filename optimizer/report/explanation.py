"""Why each pass rewrote what it rewrote, and why it left the rest as it was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from optimizer.lowering import Fusion
from passes.base import Site
from passes.pipeline import PassRecord

REWRITTEN = "rewritten"


@dataclass(frozen=True)
class ExplainedSite:
    """A site of a pass: the variable bound there, what became of it, and the ONNX nodes that it came from."""

    name: str
    location: str
    outcome: str
    nodes: tuple[str, ...]
    rewritten: bool


def explain(records: Iterable[PassRecord], fusion: Fusion) -> tuple[ExplainedSite, ...]:
    """Return all sites in order: those of the passes, then those of the steps that fuse operators into kernels."""
    accounts = [(record.item.name, record.outcome.sites) for record in records]
    return tuple(
        ExplainedSite(
            name,
            site.location,
            _outcome(site),
            site.nodes,
            site.refusal is None,
        )
        for name, sites in (*accounts, *fusion.items())
        for site in sites
    )


def _outcome(site: Site) -> str:
    if site.refusal is not None:
        return f"refused: {site.refusal}"
    return f"{REWRITTEN} {site.choice}".rstrip()
