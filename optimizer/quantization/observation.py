"""A model run in float with its matrices exchangeable and the operands of its products in sight."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import tvm
from numpy.typing import NDArray
from tvm import relax

import targets
from optimizer.execution import call
from optimizer.frontend.importer import ImportedModel
from optimizer.lowering import build, lower
from optimizer.package.entry_points import EntryPoint
from optimizer.reference import with_exact_caches
from optimizer.runtime.generation.roles import LOGITS
from optimizer.signature import entry_point
from optimizer.symbolic_arguments import passed_in_order_of_use
from optimizer.weights import lift_weights
from passes import pipeline
from passes.base import Pass
from passes.pack_quantized_weights import PackQuantizedWeights
from passes.weight_sites import ExposedModule, WeightSite, expose

Array = NDArray[np.generic]
Floats = NDArray[np.float32]


class ObservedModel:
    """The module of some passes, compiled for this machine: what its products read, and what it puts out."""

    def __init__(self, imported: ImportedModel, items: Sequence[Pass]) -> None:
        in_float = [
            replace(item, activations="reference") if isinstance(item, PackQuantizedWeights) else item
            for item in with_exact_caches(items)
        ]
        with passed_in_order_of_use():
            module, _ = pipeline.run(imported.module, in_float)
            self._exposed: ExposedModule = expose(module)
            target = targets.get("host")
            lifted = lift_weights(lower(self._exposed.module, target).module)
        self._main = relax.VirtualMachine(build(lifted.module, target), tvm.cpu())["main"]
        self._lifted = tvm.runtime.convert(list(lifted.weights))
        self._imported = imported
        self.entry: EntryPoint = entry_point(imported, module)
        self.sites: tuple[WeightSite, ...] = self._exposed.sites

    def readers(self, digest: str) -> list[int]:
        """Return which of the observed operands products with a matrix read."""
        seen = {site.operand: place for place, site in enumerate(self._exposed.operands)}
        return [seen[site.operand] for site in self.sites if site.digest == digest and not site.gathered]

    def operands(self, inputs: Mapping[str, Array], wanted: Iterable[int]) -> dict[int, Floats]:
        """Return operands as rows [tokens, K] of a call."""
        outputs = self._call(inputs, {})
        first = len(self.entry.outputs)
        found = {place: outputs[first + place].numpy() for place in wanted}
        return {place: rows.reshape(-1, rows.shape[-1]).astype(np.float32) for place, rows in found.items()}

    def logits(self, inputs: Mapping[str, Array], exchanged: Mapping[str, Floats] | None = None) -> Floats:
        """Return the output called logits, or the first, of a call, with some matrices [N, K] exchanged for others."""
        names = self._imported.output_names
        place = names.index(LOGITS) if LOGITS in names else 0
        return self._call(inputs, exchanged or {})[place].numpy().astype(np.float32)

    def _call(self, inputs: Mapping[str, Array], exchanged: Mapping[str, Floats]) -> Sequence[tvm.runtime.Tensor]:
        trailing = [*self._matrices(exchanged), self._lifted]
        return call(self._main, self._imported, inputs, tvm.cpu(), self.entry, trailing)

    def _matrices(self, exchanged: Mapping[str, Floats]) -> Iterator[tvm.runtime.Tensor]:
        for site in self._exposed.parameters:
            other = exchanged.get(site.digest)
            if other is None:
                yield site.stored.value
            else:
                stored = other.T if site.turned else other
                yield tvm.runtime.tensor(np.ascontiguousarray(stored.astype(site.matrix.dtype)))
