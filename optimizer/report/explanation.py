"""Why each pass rewrote what it rewrote, and why it left the rest as it was."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from optimizer.lowering import Fusion
from passes.pipeline import PassRecord

REWRITTEN = "rewritten"


@dataclass(frozen=True)
class ExplainedSite:
    """A site of a pass: the variable bound there, what became of it, and the ONNX nodes that it came from."""

    name: str
    location: str
    outcome: str
    nodes: tuple[str, ...]

    @property
    def rewritten(self) -> bool:
        """Return whether the pass rewrote the site."""
        return self.outcome == REWRITTEN


def explain(records: Iterable[PassRecord], fusion: Fusion) -> tuple[ExplainedSite, ...]:
    """Return all sites in order: those of the passes, then those of the steps that fuse operators into kernels."""
    accounts = [(record.item.name, record.outcome.sites) for record in records]
    return tuple(
        ExplainedSite(
            name,
            site.location,
            REWRITTEN if site.refusal is None else f"refused: {site.refusal}",
            site.nodes,
        )
        for name, sites in (*accounts, *fusion.items())
        for site in sites
    )
