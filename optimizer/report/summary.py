"""The facts of one compile: nodes, fusions, kernels, weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
import tvm.ir
from tvm import relax

from optimizer.kernel_nodes import kernel_name
from optimizer.packaging import weight_scheme
from optimizer.tuning.log import Decisions
from optimizer.weights import ENTRY
from schedules import KernelReport

if TYPE_CHECKING:
    from optimizer.compile import Plan


@dataclass(frozen=True)
class Summary:
    """Counts of one compile.

    `fused` maps what kernels of several operators compute to how often `main` calls them, the largest first;
    `families` counts kernels by the schedule they got; `loop_nests` is how many of them all calls of one step run;
    `rewritten` and `refused` count the sites of each pass; `tuned` counts kernels that a tuning log decided, by
    the target that they were measured for; `unusable_records` lists the lines of the log that hold nothing usable.
    """

    onnx_nodes: int
    operators: int
    kernels: int
    kernel_calls: int
    loop_nests: int
    fused: dict[str, int]
    families: dict[str, int]
    rewritten: dict[str, int]
    refused: dict[str, int]
    weights: int
    weight_bytes: int
    weight_scheme: str
    tuned: dict[str, int]
    unusable_records: tuple[str, ...]


def summarize(model: onnx.ModelProto, plan: Plan) -> Summary:
    """Return the counts of a model that has been lowered."""
    kernels = plan.lowered.kernels
    return Summary(
        onnx_nodes=_node_count(model.graph),
        operators=sum(1 for _ in _calls(plan.rewritten[ENTRY])),
        kernels=len(kernels),
        kernel_calls=sum(len(kernel.nodes) for kernel in kernels),
        loop_nests=sum(len(kernel.nodes) * kernel.regions for kernel in kernels),
        fused=_fused(kernels),
        families=dict(sorted(Counter(kernel.family for kernel in kernels).items())),
        rewritten={record.item.name: record.outcome.rewritten for record in plan.passes},
        refused={record.item.name: len(record.outcome.sites) - record.outcome.rewritten for record in plan.passes},
        weights=len(plan.lifted.weights),
        weight_bytes=plan.lifted.weight_bytes,
        weight_scheme=weight_scheme(plan),
        tuned=_tuned(kernels, plan.decisions),
        unusable_records=tuple(map(str, plan.decisions.unusable)),
    )


def _tuned(kernels: Sequence[KernelReport], decisions: Decisions) -> dict[str, int]:
    records = [decisions.record_for(kernel) for kernel in kernels if kernel.tuned]
    return dict(Counter(record.origin.target for record in records if record is not None))


def _fused(kernels: Sequence[KernelReport]) -> dict[str, int]:
    fused: dict[str, int] = {}
    for kernel in sorted(kernels, key=lambda kernel: -len(kernel.operators)):
        if len(kernel.operators) > 1:
            name = kernel_name(kernel.operators)
            fused[name] = fused.get(name, 0) + len(kernel.nodes)
    return fused


def _node_count(graph: onnx.GraphProto) -> int:
    inner = sum(_node_count(a.g) for node in graph.node for a in node.attribute if a.HasField("g"))
    return len(graph.node) + inner


def _calls(function: relax.Function) -> Iterator[tvm.ir.Call]:
    """Yield the calls that a function binds, in order."""
    for block in function.body.blocks:
        for binding in block.bindings:
            value = binding.value
            if isinstance(value, tvm.ir.Call):
                yield value
