"""What `optimizer inspect` prints about an ONNX model."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import onnx

from optimizer.cli import explanation
from optimizer.cli.console import print_facts, print_table
from optimizer.cli.plain_text import print_json
from optimizer.compile import CompileOptions, Plan, find_target, plan_model
from optimizer.errors import UnsupportedModelError
from optimizer.frontend.importer import import_model
from optimizer.frontend.model_file import ModelFile, read_model
from optimizer.package.entry_points import EntryPoint
from optimizer.report.explanation import explain
from optimizer.signature import entry_point


def show(path: Path, *, as_json: bool, passes: bool = False) -> None:
    """Print a model's signature, its operators, and what stands in the way of compiling it.

    With `passes`, also the account of what a compile for this machine does: each site, rewritten or refused and why.
    """
    source = read_model(path)
    operators = Counter(_operator_name(node) for node in source.model.graph.node)
    plan: Plan | None = None
    try:
        if passes:
            _, plan = plan_model(path, CompileOptions(find_target("host")))
        imported = plan.imported if plan else import_model(source.model, base_directory=source.directory)
        signature, blockers = entry_point(imported), ()
    except UnsupportedModelError as error:
        signature, blockers = None, error.blockers or (str(error),)
    if as_json:
        sites = explain(plan.passes, plan.lowered.fusion) if plan else ()
        account = {"sites": [dataclasses.asdict(site) for site in sites]} if passes else {}
        print_json({**_document(source, operators, signature, [str(blocker) for blocker in blockers]), **account})
        return
    listed = ", ".join(f"{name} x{count}" for name, count in operators.most_common())
    facts = [
        ("made by", f"{source.model.producer_name or 'unknown'} {source.model.producer_version}".strip()),
        ("opset", str(source.opset)),
        ("sha256", source.digest),
        ("operators", f"{sum(operators.values())} nodes: {listed}"),
        ("compiles", "yes" if signature else f"no, {len(blockers)} blocker(s)"),
    ]
    print_facts(str(path), facts)
    for blocker in blockers:
        print_facts("", [("", str(blocker))])
    if signature is not None:
        rows = [("in", spec.name, spec.dtype, str(list(spec.shape))) for spec in signature.inputs]
        rows += [("out", spec.name, spec.dtype, str(list(spec.shape))) for spec in signature.outputs]
        print_table("\nsignature", ("", "name", "dtype", "shape"), rows)
    if plan is not None:
        explanation.show(plan.passes, plan.lowered.fusion)


def _operator_name(node: onnx.NodeProto) -> str:
    return f"{node.domain}::{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def _document(
    source: ModelFile, operators: Counter[str], signature: EntryPoint | None, blockers: list[str]
) -> dict[str, object]:
    return {
        "file": str(source.path),
        "sha256": source.digest,
        "opset": source.opset,
        "operators": dict(operators.most_common()),
        "compiles": signature is not None,
        "blockers": blockers,
        "inputs": [str(spec) for spec in signature.inputs] if signature else None,
        "outputs": [str(spec) for spec in signature.outputs] if signature else None,
    }
