"""`optimizer verify`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from optimizer.package.manifest import Certificate


@click.command(name="verify")
@click.argument("package", type=click.Path(path_type=Path))
@click.option("--model", type=click.Path(path_type=Path), help="The ONNX model: certify the package again, here.")
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A file that the weights were fitted to (--weight-method awq, gptq); several times for several.",
)
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def command(package: Path, model: Path | None, calibration: tuple[Path, ...], as_json: bool) -> None:
    """Check that PACKAGE is complete and unaltered, that this machine can run it, and, given the model, its numbers.

    Exit code 0 if all of that holds, else that of the first problem.
    """
    import dataclasses

    from optimizer.cli.console import print_facts
    from optimizer.cli.plain_text import bytes_text, print_json
    from optimizer.package.reader import verify_package
    from optimizer.runtime.loader import check_machine

    manifest = verify_package(package)
    certificate: Certificate | None = None
    if model is None:
        check_machine(manifest.requirements)
    else:
        from optimizer.certification import certify_package

        certificate = certify_package(package, manifest, model, calibration)
    if as_json:
        print_json(
            {
                "package": str(package),
                "files": len(manifest.files),
                "certificate": dataclasses.asdict(certificate) if certificate else None,
            }
        )
        return
    total = sum(file.bytes for file in manifest.files)
    facts = [
        ("integrity", f"{len(manifest.files)} files, {bytes_text(total)}: every digest agrees with the manifest"),
        ("machine", f"can execute packages for {manifest.requirements.target}"),
    ]
    if certificate is not None:
        worst = max(certificate.outputs, key=lambda output: output.max_relative_error)
        compared = f"agree with {certificate.reference} {certificate.reference_version}"
        facts.append(("numbers", f"{compared}, worst '{worst.name}' {worst.max_relative_error:.1e}"))
    elif model is not None:
        facts.append(("model", "is the one that the package was compiled from"))
        facts.append(("numbers", "not compared: the weights were fitted to files; give them as --calibration"))
    print_facts(str(package), facts)
