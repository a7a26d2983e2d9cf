"""The imported module run as it is: no passes of ours, no fusion, no schedule. Slow, and independent of all that."""

from __future__ import annotations

from functools import cache

import tvm
from tvm import relax

from optimizer import execution
from optimizer.frontend.importer import ImportedModel
from optimizer.legalization import LEGALIZATIONS


def lazily_unoptimized(model: ImportedModel) -> execution.Runner:
    """Return what `unoptimized` returns, built at the first call: it is needed only where no other reference is."""
    built = cache(lambda: unoptimized(model))
    return lambda inputs: built()(inputs)  # noqa: PLW0108 -- built at the first call, not now


def unoptimized(model: ImportedModel) -> execution.Runner:
    """Return a function from named inputs to named outputs that runs the imported module on this machine's CPU."""
    target = tvm.target.Target({"kind": "llvm"})
    module = relax.transform.LegalizeOps(LEGALIZATIONS)(model.module)
    executable = relax.build(module, target, relax_pipeline="default_build")
    return execution.function(executable, model, tvm.cpu())
