"""The facts of one compile: nodes, fusions, kernels, weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import onnx
import tvm.ir
from tvm import relax

from optimizer.packaging import weight_scheme
from optimizer.weights import ENTRY

if TYPE_CHECKING:
    from optimizer.compile import Plan


@dataclass(frozen=True)
class Summary:
    """Counts of one compile.

    `fused` maps kernels that compute several operators to how often `main` calls them; `families` counts kernels by
    the schedule they got; `rewritten` and `refused` count the sites of each pass.
    """

    onnx_nodes: int
    operators: int
    kernels: int
    kernel_calls: int
    fused: dict[str, int]
    families: dict[str, int]
    rewritten: dict[str, int]
    refused: dict[str, int]
    weights: int
    weight_bytes: int
    weight_scheme: str


def summarize(model: onnx.ModelProto, plan: Plan) -> Summary:
    """Return the counts of a model that has been lowered."""
    calls = Counter(call.args[0].name_hint for call in _calls(plan.lifted.module[ENTRY]) if _is_call_tir(call))
    return Summary(
        onnx_nodes=_node_count(model.graph),
        operators=sum(1 for _ in _calls(plan.rewritten[ENTRY])),
        kernels=len(plan.lowered.kernels),
        kernel_calls=sum(calls.values()),
        fused={name: count for name, count in sorted(calls.items()) if name.startswith("fused_")},
        families=dict(sorted(Counter(kernel.family for kernel in plan.lowered.kernels).items())),
        rewritten={record.item.name: record.outcome.rewritten for record in plan.passes},
        refused={record.item.name: len(record.outcome.sites) - record.outcome.rewritten for record in plan.passes},
        weights=len(plan.lifted.weights),
        weight_bytes=plan.lifted.weight_bytes,
        weight_scheme=weight_scheme(plan),
    )


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


def _is_call_tir(call: tvm.ir.Call) -> bool:
    return isinstance(call.op, tvm.ir.Op) and call.op.name in ("relax.call_tir", "relax.call_tir_inplace")
