"""How a freshly built package is run for its certificate: natively, or under the emulator."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx
from numpy.typing import NDArray

import targets
from optimizer import reference
from optimizer.certificate import certify
from optimizer.errors import CertificateError, IncompatibleMachineError, PackageError
from optimizer.frontend.importer import ImportedModel, import_model
from optimizer.frontend.model_file import ModelFile, read_model
from optimizer.package.manifest import Certificate, Manifest
from optimizer.package.reader import open_package
from optimizer.quantization.preparation import Calibration, refitted
from optimizer.runtime import load
from optimizer.runtime.array_files import read_arrays, write_arrays
from optimizer.signature import entry_point
from passes import pipeline
from passes.base import Pass
from passes.convert_precision import ConvertPrecision
from passes.pack_quantized_weights import PackQuantizedWeights
from passes.quantize_weights import QuantizeWeights
from passes.rewrite_kv_cache import BITS, FLOATS, RewriteKvCache
from targets.base import Target
from targets.emulator import Emulator
from targets.execution import how_executed

if TYPE_CHECKING:
    from optimizer.compile import CompileOptions, Plan

Arrays: TypeAlias = Mapping[str, NDArray[Any]]
_EMULATED_SECONDS = 600


@dataclass(frozen=True)
class Certification:
    """How a package is to be certified: `certify` does it, or is None where nothing here can execute the target."""

    certify: Callable[[Path], Certificate] | None
    note: str


NO_CERTIFICATE = Certification(None, "none: not asked for")


def plan_certification(source: ModelFile, plan: Plan, options: CompileOptions) -> Certification:
    """Choose how the finished package will be executed for its certificate."""
    execution = how_executed(options.target)
    if execution == "no":
        return Certification(None, f"none: this machine cannot execute {options.target.name}")
    run_with = _natively if execution == "native" else _emulated

    rewriting = [record for record in plan.passes if record.outcome.rewritten]

    def check(package: Path) -> Certificate:
        return certify(
            source.model,
            run_with(package, options.target),
            path=source.path,
            shapes={**fixed_shapes(source.model, plan.imported), **options.shapes},
            precision=_precision(record.item for record in plan.passes),
            activations=_activations(record.item for record in rewriting),
            dequantized=reference.lazily_dequantized(plan.imported, [record.item for record in plan.passes]),
            unoptimized=reference.lazily_unoptimized(plan.imported),
            cache_bits=_cache_bits(record.item for record in plan.passes),
            makes_steps=any(isinstance(record.item, RewriteKvCache) for record in rewriting),
        )

    return Certification(check, execution)


def fixed_shapes(model: onnx.ModelProto, imported: ImportedModel) -> dict[str, list[int | str]]:
    """Return the shapes of inputs of which the import found a size that the model leaves open."""
    open_sizes = {
        value.name: [not dimension.HasField("dim_value") for dimension in value.type.tensor_type.shape.dim]
        for value in model.graph.input
    }
    return {
        spec.name: list(spec.shape)
        for spec in entry_point(imported).inputs
        if any(
            is_open and isinstance(size, int) for is_open, size in zip(open_sizes[spec.name], spec.shape, strict=True)
        )
    }


def _natively(package: Path, target: Target) -> Callable[[Arrays], Arrays]:  # noqa: ARG001 -- one signature for both
    model = load(package)
    return model.__call__


def _emulated(package: Path, target: Target) -> Callable[[Arrays], Arrays]:
    return lambda inputs: run_emulated(package, target, inputs)


def run_emulated(package: Path, target: Target, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """Run a package's main entry point under the emulator, with the real runtime of the target's architecture.

    Raises CertificateError if the emulated process fails.
    """
    root = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory(prefix="optimizer-") as folder:
        given, results = Path(folder) / "inputs.npz", Path(folder) / "outputs.npz"
        write_arrays(given, inputs)
        done = Emulator().run(
            ["-m", "optimizer.runtime", str(package), str(given), str(results)],
            target,
            python_path=[root],
            timeout=_EMULATED_SECONDS,
        )
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
            raise CertificateError(f"the package fails under the emulator: {reason}")
        return read_arrays(results, open_package(package).manifest.entry_points[0].outputs)


def certify_package(
    package: Path, manifest: Manifest, model: Path, calibration: Sequence[Path] = ()
) -> Certificate | None:
    """Compare an existing package with the model that it was compiled from, on this machine.

    None if the weights were fitted to files, which `calibration` has to name. Raises PackageError if the model is
    another one, OptionError if the files are, IncompatibleMachineError if nothing here can execute the package.
    """
    source = read_model(model)
    if source.digest != manifest.model.sha256:
        raise PackageError(
            f"{package} was compiled from a model with sha256 {manifest.model.sha256[:16]}, "
            f"{model} has {source.digest[:16]}; give the model that it was compiled from"
        )
    need = manifest.requirements
    target = targets.get(need.target, need.gpu_architectures or None)
    execution = how_executed(target)
    if execution == "no":
        raise IncompatibleMachineError(f"this machine cannot execute {target.name}; verify on one that can")
    shapes = {spec.name: list(spec.shape) for spec in manifest.entry_points[0].inputs}
    imported = import_model(source.model, shapes=shapes, base_directory=source.directory)
    given = [pipeline.instance(record.name, record.options) for record in manifest.passes]
    items = refitted(given, imported, Calibration(tuple(calibration), Path(source.directory)))
    if items is None:
        return None
    return certify(
        source.model,
        (_natively if execution == "native" else _emulated)(package, target),
        path=source.path,
        shapes=shapes,
        precision=_precision(items),
        activations=_activations(items) if manifest.weight_scheme != "none" else None,
        dequantized=reference.lazily_dequantized(imported, items),
        cache_bits=_cache_bits(items),
        makes_steps=bool(manifest.entry_points[0].caches),
    )


def _precision(items: Iterable[Pass]) -> str | None:
    """Return the coarsest type that passes give to operands of products or to caches; None where none does."""
    dtypes: set[str] = set()
    for item in items:
        if isinstance(item, ConvertPrecision):
            dtypes.add(item.dtype)
        elif isinstance(item, RewriteKvCache) and item.dtype in FLOATS:
            dtypes.add(FLOATS[item.dtype])
    return next((dtype for dtype in ("bfloat16", "float16", "float32") if dtype in dtypes), None)


def _cache_bits(items: Iterable[Pass]) -> int | None:
    """Return how many bits the codes of caches have, or None where caches have none."""
    return next((BITS[item.dtype] for item in items if isinstance(item, RewriteKvCache) and item.dtype in BITS), None)


def _activations(items: Iterable[Pass]) -> str | None:
    """Return "int8" where a pass rounds activations to that."""
    uses = [item.use for item in items if isinstance(item, QuantizeWeights | PackQuantizedWeights)]
    return "int8" if any(use.activations == "int8" for use in uses) else None
