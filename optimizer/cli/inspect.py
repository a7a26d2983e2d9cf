"""`optimizer inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from optimizer.package.entry_points import EntryPoint, TensorSpec
    from optimizer.package.manifest import Manifest


@click.command(name="inspect")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
@click.option("--kernels", is_flag=True, help="List every kernel with the schedule it got and its ONNX nodes.")
@click.option("--passes", is_flag=True, help="Of a model: as compile --explain for this machine.")
def command(path: Path, as_json: bool, kernels: bool, passes: bool) -> None:
    """Show what PATH holds, a package or an ONNX model. No code of it is loaded.

    Of an ONNX model: its inputs and outputs, its operators, and all that stands in the way of compiling it.
    """
    if path.suffix == ".onnx":
        from optimizer.cli import model_report

        model_report.show(path, as_json=as_json, passes=passes)
        return
    from optimizer.cli.plain_text import print_json
    from optimizer.package.reader import open_package

    manifest = open_package(path).manifest
    if as_json:
        import json

        print_json(json.loads(manifest.to_json()))
    else:
        _show(path, manifest, kernels=kernels)


def _show(path: Path, manifest: Manifest, *, kernels: bool) -> None:
    from collections import Counter

    from optimizer.cli.console import print_facts, print_table
    from optimizer.cli.plain_text import bytes_text

    need = manifest.requirements
    families = Counter(kernel.family for kernel in manifest.kernels)
    libraries = ", ".join(f"{library.name} {library.version}" for library in need.libraries)
    gpu = ", ".join(need.gpu_architectures)
    facts = [
        ("model", f"{manifest.model.file}, opset {manifest.model.opset}, sha256 {manifest.model.sha256[:16]}"),
        ("made by", f"optimizer {manifest.producer.optimizer}, tvm {manifest.producer.tvm}"),
        ("target", f"{need.target} ({need.architecture}, {need.device}{', ' + gpu if gpu else ''})"),
        ("needs", f"CPU features {' '.join(need.cpu_features)}; glibc {need.glibc}; {libraries}"),
        ("weights", f"{len(manifest.weights)} tensors, {bytes_text(sum(weight.bytes for weight in manifest.weights))}"),
        ("schemes", f"weights: {manifest.weight_scheme}, KV cache: {manifest.kv_cache_scheme}"),
        ("passes", ", ".join(record.name for record in manifest.passes)),
        ("kernels", ", ".join(f"{count} {family}" for family, count in sorted(families.items()))),
        ("tuning log", f"{len(manifest.tuning.hits)} hits, {len(manifest.tuning.misses)} misses"),
        ("files", ", ".join(f"{file.name} {bytes_text(file.bytes)}" for file in manifest.files)),
    ]
    print_facts(str(path), facts)
    for entry in manifest.entry_points:
        rows = [(kind, spec.name, spec.dtype, _shape(spec.shape)) for kind, spec in _specs(entry)]
        print_table(f"\nentry point {entry.name}", ("", "name", "dtype", "shape"), rows)
    if manifest.certificate is not None:
        rows = [
            (
                output.name,
                f"{output.max_absolute_error:.1e}",
                f"{output.max_relative_error:.1e}",
                f"{output.tolerance:.1e}",
            )
            for output in manifest.certificate.outputs
        ]
        title = f"\ncertificate against {manifest.certificate.reference} {manifest.certificate.reference_version}"
        print_table(title, ("output", "max absolute error", "max relative error", "tolerance"), rows)
    if kernels:
        rows = [
            (kernel.name, kernel.family, str(len(kernel.nodes)), "; ".join(map(", ".join, kernel.nodes)))
            for kernel in manifest.kernels
        ]
        print_table("\nkernels", ("name", "family", "calls", "ONNX nodes of each call"), rows)


def _specs(entry: EntryPoint) -> list[tuple[str, TensorSpec]]:
    return [*(("in", spec) for spec in entry.inputs), *(("out", spec) for spec in entry.outputs)]


def _shape(shape: tuple[int | str, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
