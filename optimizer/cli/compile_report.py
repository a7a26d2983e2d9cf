"""What `optimizer compile` prints at its end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from optimizer.cli import explanation
from optimizer.cli.console import print_facts, print_table
from optimizer.cli.plain_text import bytes_text, print_json, seconds_text
from optimizer.compile import CompileResult, Plan
from optimizer.frontend.model_file import ModelFile
from optimizer.package.manifest import Certificate
from optimizer.report.explanation import explain as explain_passes
from optimizer.report.step_time import StepTime, step_time
from optimizer.report.summary import Summary, summarize

# How many of the kernels that compute several operators are listed.
_MOST_FUSED = 8


def show_plan(source: ModelFile, plan: Plan, destination: Path, *, as_json: bool, explain: bool = False) -> None:
    """Print what a compile would do; with `explain` the account of every pass."""
    summary = summarize(source.model, plan)
    if as_json:
        print_json(
            {
                "dry_run": True,
                "output": str(destination),
                **dataclasses.asdict(summary),
                **_quality(plan),
                **_sites(plan, explain),
            }
        )
        return
    print_facts(f"{destination} (dry run: nothing was written)", _summary_facts(summary))
    _show_quality(plan)
    if explain:
        explanation.show(plan.passes, plan.lowered.fusion)


def show_result(result: CompileResult, destination: Path, *, as_json: bool, explain: bool = False) -> None:
    """Print what a compile did, with the time of one step of the package where this machine can run it."""
    summary = summarize(result.source.model, result.plan)
    step = step_time(destination, result.manifest)
    if as_json:
        print_json(
            {**_document(result, destination, summary, step), **_quality(result.plan), **_sites(result.plan, explain)}
        )
        return
    facts = [
        *_summary_facts(summary),
        ("time per step", step.text),
        ("certificate", _certificate_text(result.manifest.certificate, result.certification.note)),
        ("compile time", _stages_text(result)),
    ]
    print_facts(str(destination), facts)
    _show_quality(result.plan)
    if explain:
        explanation.show(result.plan.passes, result.plan.lowered.fusion)


def _quality(plan: Plan) -> dict[str, object]:
    return {"quality": dataclasses.asdict(plan.quality)} if plan.quality is not None else {}


def _show_quality(plan: Plan) -> None:
    """Print which matrices were given 8 bits to keep the limits, and what each brought."""
    if plan.quality is None:
        return
    before = plan.quality.before
    rows = [("none", "", f"{before.kl:.5f}", f"{before.flips:.2%}")]
    rows += [
        (", ".join(step.nodes) or "unnamed", f"{step.alone:.5f}", f"{step.after.kl:.5f}", f"{step.after.flips:.2%}")
        for step in plan.quality.raised
    ]
    print_table(f"raised to int8, on {plan.quality.source}", ("nodes", "KL alone", "KL after", "flips after"), rows)


def _sites(plan: Plan, asked: bool) -> dict[str, object]:
    if not asked:
        return {}
    return {"sites": [dataclasses.asdict(site) for site in explain_passes(plan.passes, plan.lowered.fusion)]}


def _document(result: CompileResult, destination: Path, summary: Summary, step: StepTime) -> dict[str, object]:
    certificate = result.manifest.certificate
    return {
        "output": str(destination),
        "target": result.manifest.requirements.target,
        **dataclasses.asdict(summary),
        "step_seconds": dataclasses.asdict(step.timing) if step.timing else None,
        "step_note": step.text,
        "certificate": dataclasses.asdict(certificate) if certificate else None,
        "stage_seconds": dict(result.seconds),
    }


def _summary_facts(summary: Summary) -> list[tuple[str, str]]:
    families = ", ".join(f"{count} {family}" for family, count in summary.families.items())
    fused = ", ".join(f"{name} x{count}" for name, count in list(summary.fused.items())[:_MOST_FUSED])
    passes = ", ".join(f"{name} x{count}" for name, count in summary.rewritten.items() if count)
    refused = sum(summary.refused.values())
    if refused:
        passes += f"{'; ' if passes else ''}{refused} sites refused (--explain says why)"
    several = summary.loop_nests > summary.kernel_calls
    nests = f", {summary.loop_nests} loop nests" if several else ""
    return [
        ("nodes", f"{summary.onnx_nodes} in ONNX, {summary.operators} after import and passes"),
        ("passes", passes or "no site to rewrite"),
        ("fused", fused or "nothing"),
        ("kernels", f"{summary.kernels} ({families}), called {summary.kernel_calls} times a step{nests}"),
        ("tuning", _tuning_text(summary)),
        ("weights", f"{bytes_text(summary.weight_bytes)} in {summary.weights} tensors ({summary.weight_bytes} bytes)"),
        *([("quantized", summary.weight_scheme)] if summary.weight_scheme != "none" else []),
    ]


def _tuning_text(summary: Summary) -> str:
    parts = [f"{count} kernels from the log of {target}" for target, count in summary.tuned.items()]
    parts.append(f"{summary.kernels - sum(summary.tuned.values())} by default")
    unusable = summary.unusable_records
    told = f"; {len(unusable)} lines of the log are unusable, the first {unusable[0]}" if unusable else ""
    return ", ".join(parts) + told


def _certificate_text(certificate: Certificate | None, note: str) -> str:
    if certificate is None:
        return note
    worst = max(certificate.outputs, key=lambda output: output.max_relative_error / max(output.tolerance, 1e-30))
    how = " under the emulator" if note == "emulator" else ""
    reference = f"{certificate.reference} {certificate.reference_version}"
    if certificate.reference == "dequantized":
        reference = "the model with its weights rounded"
    return (
        f"agrees{how} with {reference}: worst output '{worst.name}', "
        f"relative error {worst.max_relative_error:.1e} (tolerance {worst.tolerance:.1e})"
    )


def _stages_text(result: CompileResult) -> str:
    stages = ", ".join(f"{name} {seconds_text(seconds)}" for name, seconds in result.seconds.items())
    return f"{seconds_text(sum(result.seconds.values()))} ({stages})"
