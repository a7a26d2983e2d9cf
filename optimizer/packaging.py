"""What a package says about a compiled model: the manifest of its requirements, signature, passes and kernels."""

from __future__ import annotations

from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.errors import ModelFileError, PackageError
from optimizer.frontend.model_file import ModelFile
from optimizer.package.entry_points import CacheRecord, EntryPoint
from optimizer.package.manifest import (
    KernelRecord,
    Library,
    Manifest,
    ModelSource,
    PassRecord,
    Producer,
    Requirements,
    TuningRecord,
)
from optimizer.runtime.generation.settings import read_settings
from optimizer.runtime.generation.step_inputs import TOKENS
from optimizer.runtime.generation.text import COMPANION_FILES
from optimizer.signature import entry_point
from passes.base import Pass, options_of
from passes.pack_quantized_weights import PackQuantizedWeights
from passes.quantize_weights import QuantizeWeights
from passes.round_attention import RoundAttention
from schedules.attention import LEAST_QUERIES
from targets.base import GLIBC_FLOOR, Target

if TYPE_CHECKING:
    from optimizer.compile import Plan
    from optimizer.frontend.importer import ImportedModel


def describe(source: ModelFile, plan: Plan, target: Target) -> Manifest:
    """Return the manifest of a compiled model, without what the package writer adds (files, weights, certificate)."""
    entry = entry_point(plan.imported, plan.rewritten)
    kernels = plan.lowered.kernels
    return Manifest(
        producer=Producer(
            metadata.version("optimizer"), metadata.version("apache-tvm"), metadata.version("apache-tvm-ffi")
        ),
        requirements=requirements(target),
        model=ModelSource(source.path.name, source.digest, source.opset),
        entry_points=(entry,),
        weight_scheme=weight_scheme(plan),
        kv_cache_scheme=kv_cache_scheme(entry),
        passes=tuple(PassRecord(record.item.name, _options(record.item)) for record in plan.passes),
        tuning=TuningRecord(
            tuple(kernel.function for kernel in kernels if kernel.tuned),
            tuple(kernel.function for kernel in kernels if not kernel.tuned),
        ),
        kernels=tuple(KernelRecord(kernel.function, kernel.family, kernel.nodes) for kernel in kernels),
    )


def companions(source: ModelFile, model: ImportedModel) -> dict[str, bytes]:
    """Return the files beside a language model that its package carries along, so that it can generate text.

    Raises ModelFileError for settings that generation could not read.
    """
    if TOKENS not in model.input_names:
        return {}
    beside = [Path(source.directory) / name for name in COMPANION_FILES]
    found = {path.name: path.read_bytes() for path in beside if path.is_file()}
    try:
        read_settings(found)
    except PackageError as error:
        raise ModelFileError(f"beside {source.path}: {error}; mend the file or move it away") from error
    return found


def weight_scheme(plan: Plan) -> str:
    """Return how weights are quantized and what products with them compute in, "none" where none are."""
    rewriting = [
        r for r in plan.passes if isinstance(r.item, QuantizeWeights | PackQuantizedWeights) and r.outcome.rewritten
    ]
    parts = [f"{record.outcome.rewritten} matrices in {record.item}" for record in rewriting]
    unasked = [r for r in plan.passes if isinstance(r.item, RoundAttention) and r.item.with_quantized]
    rounded = sum(record.outcome.rewritten for record in unasked)
    if rounded:
        parts.append(f"{rounded} attentions in bf16 from {LEAST_QUERIES} queries on")
    return "; ".join(parts) or "none"


def kv_cache_scheme(entry: EntryPoint) -> str:
    """Return how keys and values are kept between steps, "none" where the caller keeps them."""
    dtypes = Counter(_stored_as(cache) for cache in entry.caches)
    return "; ".join(f"{count} tensors in place as {dtype}" for dtype, count in dtypes.items()) or "none"


def _stored_as(cache: CacheRecord) -> str:
    pages = cache.pages
    if pages is None:
        return f"{cache.dtype} in a ring for a window of {cache.window}" if cache.window else cache.dtype
    scales = "channel" if pages.by_channel else "token"
    return f"int{pages.bits} by {scales} (pages of {pages.tokens}, the newest {pages.recent} or more {cache.dtype})"


def requirements(target: Target) -> Requirements:
    """Return what a machine must offer to run packages of `target`."""
    version = metadata.version("apache-tvm")
    names = ["tvm_runtime", "tvm_ffi"] + (["tvm_runtime_cuda"] if target.device == "cuda" else [])
    versions = {"tvm_ffi": metadata.version("apache-tvm-ffi")}
    return Requirements(
        target=target.name,
        architecture=target.architecture,
        cpu_features=tuple(sorted(target.features)),
        device=target.device,
        gpu_architectures=target.device_code_architectures,
        glibc=GLIBC_FLOOR,
        libraries=tuple(Library(name, versions.get(name, version)) for name in names),
    )


def _options(item: Pass) -> dict[str, bool | int | float | str | None]:
    return {field.name: getattr(item, field.name) for field in options_of(type(item))}
