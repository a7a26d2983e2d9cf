"""Equal computations, done once; unused ones, not at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import tvm
from tvm import relax

from passes.base import Pass, PassOutcome


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Bind equal expressions once, then drop what nobody reads. All operators are pure, so any two equal ones agree."""

    name: ClassVar[str] = "eliminate-common-subexpressions"

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Merge equal bindings of every function."""
        merged = relax.transform.EliminateCommonSubexpr()(module)
        return PassOutcome(relax.transform.DeadCodeElimination()(merged))
