"""Manifests without files, as the compiler hands them to the writer of packages."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import tvm
import tvm_ffi

from optimizer.package.entry_points import EntryPoint
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


def draft_manifest(entry_points: Sequence[EntryPoint], **requirements: object) -> Manifest:
    """Return a manifest for this machine and the TVM installed on it, unless `requirements` say otherwise."""
    needs: dict[str, object] = {
        "target": "host",
        "architecture": platform.machine(),
        "cpu_features": (),
        "device": "cpu",
        "gpu_architectures": (),
        "glibc": "2.17",
        "libraries": (Library("tvm_runtime", tvm.__version__), Library("tvm_ffi", tvm_ffi.__version__)),
    }
    return Manifest(
        producer=Producer("0.1.0", tvm.__version__, tvm_ffi.__version__),
        requirements=Requirements(**{**needs, **requirements}),
        model=ModelSource("decoder.onnx", "ab" * 32, 23),
        entry_points=tuple(entry_points),
        weight_scheme="none",
        kv_cache_scheme="none",
        passes=(PassRecord("fold-constants", {"limit": 1024, "exact": True, "ratio": 0.5, "skip": None}),),
        tuning=TuningRecord(hits=("matmul_1x8x8",), misses=()),
        kernels=(KernelRecord("matmul_add", "matmul", (("product", "sum"),)),),
    )
