"""What a package says about itself: `manifest.json`, typed, checked field by field before anything else is read."""

from __future__ import annotations

import itertools
import json
import math
import re
from dataclasses import dataclass
from typing import Literal

from optimizer.errors import PackageError
from optimizer.json_records import JsonValue, RecordError, decode, encode, parse
from optimizer.package.digests import piece_count
from optimizer.package.dtypes import ITEM_BYTES
from optimizer.package.entry_points import (
    MANIFEST_NAME,
    EntryPoint,
    check_entry_points,
    check_tensor,
    malformed,
    require_unique,
)

FORMAT = "optimizer-package"
FORMAT_VERSION = 7
_WITHOUT_INDEX_RANGES = 6
DIGEST_NAME = "manifest.sha256"
MAX_MANIFEST_BYTES = 16 << 20
MAX_FILES = 256
WEIGHT_ALIGNMENT = 64
"""Bytes: where weights begin; reads of whole lines of the cache lie in one."""
INPUT_ALIGNMENT = 16
"""Bytes: what compiled code requires of its inputs. Arrays of NumPy begin so, unless they are parts of others."""

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# The names of functions that go through several kernels in one launch begin so.
SEVERAL_KERNELS = "layer_of_"
_DIGEST = re.compile(r"[0-9a-f]{64}")

Scalar = None | bool | int | float | str


@dataclass(frozen=True)
class Producer:
    """Versions of what built the package."""

    optimizer: str
    tvm: str
    tvm_ffi: str


@dataclass(frozen=True)
class Library:
    """A shared library that must be present on the machine, such as ("tvm_runtime", "0.27.0")."""

    name: str
    version: str


@dataclass(frozen=True)
class Requirements:
    """What the machine must offer: checked before any code of the package is loaded.

    `cpu_features` are named as Linux names them; `glibc` is the oldest version that will do ("" when the library
    needs none); `gpu_architectures` are CUDA architectures such as "sm_90", any one of which is enough.
    """

    target: str
    architecture: Literal["x86_64", "aarch64"]
    cpu_features: tuple[str, ...]
    device: Literal["cpu", "cuda"]
    gpu_architectures: tuple[str, ...]
    glibc: str
    libraries: tuple[Library, ...]


@dataclass(frozen=True)
class ModelSource:
    """The ONNX file that was compiled: its name without folders, its sha256, and its opset of the ai.onnx domain."""

    file: str
    sha256: str
    opset: int


@dataclass(frozen=True)
class WeightRecord:
    """Where one weight lies in the weights file: `offset` and `bytes` in bytes, C order, little-endian."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    bytes: int


@dataclass(frozen=True)
class PassRecord:
    """A pass that ran, with its options."""

    name: str
    options: dict[str, Scalar]


@dataclass(frozen=True)
class TuningRecord:
    """Kernels that the tuning log had a decision for, and those that got the target's default schedule."""

    hits: tuple[str, ...]
    misses: tuple[str, ...]


@dataclass(frozen=True)
class KernelRecord:
    """A compiled kernel, the operator family whose schedule made it, and the ONNX nodes behind each call of it."""

    name: str
    family: str
    nodes: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class OutputComparison:
    """One output against the reference, the worst of all runs.

    `max_relative_error` is `max_absolute_error` over the largest finite magnitude of the reference output, and is what
    `tolerance` bounds. `cosine_similarity` is None where it has no meaning (empty or all-zero outputs).
    """

    name: str
    dtype: str
    max_absolute_error: float
    max_relative_error: float
    tolerance: float
    cosine_similarity: float | None
    ok: bool


@dataclass(frozen=True)
class Certificate:
    """That the package's outputs agree with a reference: which one, on which inputs, how closely.

    `settings` are the values given to the symbolic dimensions, one object per run.
    """

    reference: Literal["onnxruntime", "onnx", "unoptimized", "dequantized"]
    reference_version: str
    seeds: tuple[int, ...]
    settings: tuple[dict[str, int], ...]
    outputs: tuple[OutputComparison, ...]


@dataclass(frozen=True)
class FileRecord:
    """A file of the package, with its size in bytes and the BLAKE3 of each of its pieces (`DIGESTED_BYTES`), in order.

    All pieces but the last have that size, so that a file of no more has the digest that `b3sum` tells.
    """

    name: str
    bytes: int
    blake3: tuple[str, ...]


@dataclass(frozen=True)
class Manifest:
    """All that is known of a package without loading its code.

    Who builds a package leaves out `weights`, `files` and `certificate`: the writer fills them in.
    """

    producer: Producer
    requirements: Requirements
    model: ModelSource
    entry_points: tuple[EntryPoint, ...]
    weight_scheme: str
    kv_cache_scheme: str
    passes: tuple[PassRecord, ...]
    tuning: TuningRecord
    kernels: tuple[KernelRecord, ...]
    library: str = "model.so"
    weights_file: str = "weights.bin"
    certificate: Certificate | None = None
    weights: tuple[WeightRecord, ...] = ()
    files: tuple[FileRecord, ...] = ()

    def __post_init__(self) -> None:
        _check_files(self)
        check_entry_points(self.entry_points)
        _check_weights(self)
        _require_digest(self.model.sha256, "model.sha256")

    def entry_point(self, name: str) -> EntryPoint | None:
        """Return the entry point called `name`, or None."""
        return next((entry for entry in self.entry_points if entry.name == name), None)

    def to_json(self) -> bytes:
        """Return the text of manifest.json; equal manifests give equal bytes."""
        body = encode(self)
        assert isinstance(body, dict)
        document = {"format": FORMAT, "format_version": FORMAT_VERSION, **body}
        return (json.dumps(document, indent=1, allow_nan=False) + "\n").encode("ascii")

    @staticmethod
    def from_json(text: bytes) -> Manifest:
        """Return the manifest that `text` holds; raises PackageError for anything that to_json would not write."""
        if len(text) > MAX_MANIFEST_BYTES:
            raise PackageError(f"{MANIFEST_NAME} has {len(text)} bytes, over the limit of {MAX_MANIFEST_BYTES}")
        try:
            return Manifest._from_document(text)
        except RecordError as error:
            raise PackageError(f"{error}; the package is corrupt, build it again") from error

    @staticmethod
    def _from_document(text: bytes) -> Manifest:
        document = parse(text, MANIFEST_NAME)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise PackageError(f"{MANIFEST_NAME} does not say '{FORMAT}'; this is not a package of this compiler")
        version = _checked_version(document.get("format_version"))
        body = {key: value for key, value in document.items() if key not in ("format", "format_version")}
        if version == _WITHOUT_INDEX_RANGES and isinstance(entries := body.get("entry_points"), list):
            body["entry_points"] = [
                {**entry, "index_ranges": []} if isinstance(entry, dict) else entry for entry in entries
            ]
        return decode(Manifest, body, "manifest")


def _checked_version(version: JsonValue) -> int:
    known = (_WITHOUT_INDEX_RANGES, FORMAT_VERSION)
    if version not in known or not isinstance(version, int) or isinstance(version, bool):
        found = version if isinstance(version, int | str) else type(version).__name__
        raise PackageError(
            f"{MANIFEST_NAME} has format version {found!r:.40}, this version reads {known[0]} and {known[1]}; "
            "compile the model again, or read it with the version that wrote it"
        )
    return version


def _require_digest(digest: str, where: str) -> None:
    if not _DIGEST.fullmatch(digest):
        raise malformed(f"{where} is not a digest of 64 digits in lower-case hexadecimal")


def _check_files(manifest: Manifest) -> None:
    if len(manifest.files) > MAX_FILES:
        raise malformed(f"it lists {len(manifest.files)} files, over the limit of {MAX_FILES}")
    names = [record.name for record in manifest.files]
    for name in (*names, manifest.library, manifest.weights_file):
        require_file_name(name)
    require_unique(names, "file")
    for record in manifest.files:
        if record.bytes < 0:
            raise malformed(f"file {record.name} has the negative size {record.bytes}")
        if len(record.blake3) != piece_count(record.bytes):
            raise malformed(
                f"file {record.name} of {record.bytes} bytes has {len(record.blake3)} digests, "
                f"not {piece_count(record.bytes)}"
            )
        for digest in record.blake3:
            _require_digest(digest, f"a digest of {record.name}")
    if names:
        for name in (manifest.library, manifest.weights_file):
            if name not in names:
                raise malformed(f"{name} is not among the files")


def require_file_name(name: str) -> None:
    """Raise PackageError unless `name` is a plain name (letters, digits, . _ -) that the format does not reserve."""
    if not _FILE_NAME.fullmatch(name):
        raise malformed(f"{name!r:.80} is not a plain file name of letters, digits, '.', '_' and '-'")
    if name in (MANIFEST_NAME, DIGEST_NAME):
        raise malformed(f"{name} may not be listed among the files")


def _check_weights(manifest: Manifest) -> None:
    require_unique((weight.name for weight in manifest.weights), "weight")
    for weight in manifest.weights:
        _check_weight(weight)
    end = next((record.bytes for record in manifest.files if record.name == manifest.weights_file), None)
    ordered = sorted(manifest.weights, key=lambda weight: (weight.offset, weight.bytes))
    for weight, following in itertools.pairwise(ordered):
        if weight.offset + weight.bytes > following.offset:
            raise malformed(f"the weights {weight.name!r:.80} and {following.name!r:.80} overlap")
    if ordered and (end is None or ordered[-1].offset + ordered[-1].bytes > end):
        raise malformed(f"the weight {ordered[-1].name!r:.80} ends beyond {manifest.weights_file}")


def _check_weight(weight: WeightRecord) -> None:
    check_tensor(weight.name, weight.dtype, len(weight.shape))
    if weight.dtype in ("int4", "uint4"):
        raise malformed(f"the weight {weight.name!r:.80} has dtype {weight.dtype}: pack it as uint8")
    if any(dimension < 0 for dimension in weight.shape):
        raise malformed(f"the weight {weight.name!r:.80} has a negative dimension")
    if weight.bytes != math.prod(weight.shape) * ITEM_BYTES[weight.dtype]:
        raise malformed(f"the weight {weight.name!r:.80} has {weight.bytes} bytes, which its shape contradicts")
    if weight.offset < 0 or weight.offset % WEIGHT_ALIGNMENT:
        raise malformed(f"the weight {weight.name!r:.80} lies at {weight.offset}, no multiple of {WEIGHT_ALIGNMENT}")
