"""The imported module run as it is: no passes of ours, no fusion, no schedule. Slow, and independent of all that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import tvm
from tvm import relax

from optimizer import execution
from optimizer.frontend.importer import ImportedModel
from optimizer.legalization import LEGALIZATIONS
from optimizer.package.entry_points import EntryPoint
from optimizer.signature import entry_point
from passes import pipeline
from passes.base import Pass
from passes.pack_quantized_weights import PackQuantizedWeights
from passes.quantize_weights import QuantizeWeights
from passes.rewrite_kv_cache import RewriteKvCache


def lazily_unoptimized(model: ImportedModel) -> execution.Runner:
    """Return what `unoptimized` returns, built at the first call: it is needed only where no other reference is."""
    built = cache(lambda: unoptimized(model))
    return lambda inputs: built()(inputs)  # noqa: PLW0108 -- built at the first call, not now


def lazily_dequantized(model: ImportedModel, items: Sequence[Pass]) -> execution.Runner | None:
    """Return a function that runs the module after `items`, with the weights that they quantized as floats again.

    None where no pass quantizes weights. What it computes with are the rounded weights, and activations as they are.
    """
    if not any(isinstance(item, QuantizeWeights) for item in items):
        return None

    def build() -> execution.Runner:
        as_floats = [
            replace(item, activations="reference") if isinstance(item, QuantizeWeights | PackQuantizedWeights) else item
            for item in with_exact_caches(items)
        ]
        module, _ = pipeline.run(model.module, as_floats)
        return unoptimized(replace(model, module=module), entry_point(model, module))

    built = cache(build)
    return lambda inputs: built()(inputs)  # noqa: PLW0108 -- built at the first call, not now


def with_exact_caches(items: Sequence[Pass]) -> list[Pass]:
    """Return passes whose caches hold what the model's inputs do.

    They are not left out: what is appended to decides which products are combined, and so which matrices there are.
    """
    return [replace(item, dtype="model") if isinstance(item, RewriteKvCache) else item for item in items]


def unoptimized(model: ImportedModel, entry: EntryPoint | None = None) -> execution.Runner:
    """Return a function from named inputs to named outputs that runs the imported module on this machine's CPU.

    `entry` is the signature of a module that appends to caches in place.
    """
    # Code without a schedule runs as fast so, and is there in three quarters of the time.
    target = tvm.target.Target({"kind": "llvm", "opt-level": 1})
    module = relax.transform.LegalizeOps(LEGALIZATIONS)(model.module)
    executable = relax.build(module, target, relax_pipeline="default_build")
    return execution.function(executable, model, tvm.cpu(), entry=entry)
