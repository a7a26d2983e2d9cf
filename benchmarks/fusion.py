"""Kernels of one step beside the nodes of onnxruntime's fully optimized graph.

A kernel of ours is a call that the compiled module makes; loop nests are counted besides, because a call may run
several of them one after the other. onnxruntime runs one kernel per node of the graph that is left after all its
optimizations. Reshapes are given apart: neither engine touches an element for one.
"""

from __future__ import annotations

import datetime
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import onnx

from benchmarks.engines import ENGINES
from benchmarks.tables import REFERENCE, subjects

# Whose models are counted.
_TABLES = ("vision", "encoders")
# How many of a model's kernels the table names.
_MOST_FREQUENT = 6
# Nodes of onnxruntime's that compute nothing: the shape of a buffer is all that they change.
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity")


@dataclass(frozen=True)
class FusionCount:
    """Kernels of one step: ours, the loop nests in them, onnxruntime's nodes, and how many of these are views.

    `operators` are ours by what they compute, the most frequent first.
    """

    kernels: int
    loop_nests: int
    peer_nodes: int
    peer_views: int
    operators: dict[str, int]


def main(only: Sequence[str]) -> None:
    """Print the table; `only` are patterns of model names. Exits with code 1 where onnxruntime needs fewer kernels."""
    version = ENGINES[REFERENCE].version()
    click.echo(
        f"{datetime.date.today()}, {REFERENCE} {version}, `{' '.join(['python -m benchmarks', *sys.argv[1:]])}`\n"
    )
    click.echo("| model | kernels | loop nests | onnxruntime's nodes | of these not views | most frequent kernels |")
    click.echo("|---|---|---|---|---|---|")
    surpassed: list[str] = []
    for subject in (each for table in _TABLES for each in subjects(table, only, (), Path())):
        if not subject.path.exists():
            click.echo(f"| {subject.label} | not made: run `{subject.made_by}` |")
            continue
        count = count_kernels(subject.path)
        surpassed += [subject.label] if count.kernels > count.peer_nodes else []
        frequent = ", ".join(f"{name} x{times}" for name, times in list(count.operators.items())[:_MOST_FREQUENT])
        computing = count.peer_nodes - count.peer_views
        counts = (count.kernels, count.loop_nests, count.peer_nodes, computing)
        click.echo(f"| {subject.label} | {' | '.join(map(str, counts))} | {frequent} |")
    if surpassed:
        sys.exit(f"\nmore kernels than onnxruntime: {', '.join(surpassed)}")


def count_kernels(model: Path) -> FusionCount:
    """Compile `model` for this machine as far as its kernels are known, and count them beside onnxruntime's nodes."""
    from optimizer.compile import CompileOptions, find_target, plan_model  # noqa: PLC0415
    from optimizer.kernel_nodes import kernel_name  # noqa: PLC0415

    _, plan = plan_model(model, CompileOptions(find_target("host")))
    kernels = plan.lowered.kernels
    computed: Counter[str] = Counter()
    for kernel in kernels:
        computed[kernel_name(kernel.operators)] += len(kernel.nodes)
    nodes = _optimized_nodes(model)
    return FusionCount(
        kernels=sum(len(kernel.nodes) for kernel in kernels),
        loop_nests=sum(len(kernel.nodes) * kernel.regions for kernel in kernels),
        peer_nodes=sum(nodes.values()),
        peer_views=sum(nodes[name] for name in _VIEWS),
        operators={name: count for name, count in computed.most_common() if count},
    )


def _optimized_nodes(model: Path) -> Counter[str]:
    """Return the operators of the graph that onnxruntime runs, with how often each occurs."""
    import onnxruntime  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="optimizer-bench-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath = str(optimized)
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.log_severity_level = 3
        onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(optimized, load_external_data=False).graph
    return Counter(node.op_type for node in graph.node)
