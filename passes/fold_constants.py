"""Operators whose inputs are all constant, computed at compile time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import tvm
from tvm import relax

from passes.base import Pass, PassOutcome


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Compute what depends on constants alone. Creation operators (full, arange) of large tensors stay operators."""

    name: ClassVar[str] = "fold-constants"

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Fold by TVM's evaluator, which runs each operator on this machine's CPU."""
        return PassOutcome(relax.transform.FoldConstant()(module))
