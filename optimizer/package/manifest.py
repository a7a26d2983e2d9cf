"""What a package says about itself: `manifest.json`, typed, checked field by field before anything else is read."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from optimizer.errors import PackageError
from optimizer.json_records import JsonValue, RecordError, decode, encode, parse
from optimizer.package import dimensions
from optimizer.package.dtypes import ITEM_BYTES

FORMAT = "optimizer-package"
FORMAT_VERSION = 4
MANIFEST_NAME = "manifest.json"
DIGEST_NAME = "manifest.sha256"
MAX_MANIFEST_BYTES = 16 << 20
MAX_FILES = 256
MAX_RANK = 32
WEIGHT_ALIGNMENT = 64
"""Bytes: what TVM requires of every tensor that it takes without a copy."""

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")

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
class TensorSpec:
    """A named input or output; a dimension is a number, a symbol, or an integer expression of symbols."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class SymbolRange:
    """The values that a symbolic dimension may take, both ends included; `maximum` None means no bound."""

    name: str
    minimum: int
    maximum: int | None


@dataclass(frozen=True)
class CachePages:
    """How a cache is quantized: codes of `bits` in pages of `tokens`, each with a scale and a minimum.

    Those are of each channel of a page, or of each token. At least the newest `recent` tokens are floats.
    """

    bits: int
    by_channel: bool
    tokens: int
    recent: int


@dataclass(frozen=True)
class CacheRecord:
    """A key-value cache that the code appends to in place: the input and the output that it is for the model's user.

    The code takes a buffer in place of the input `past`, and does not return the output `present`. `dtype` and `shape`
    are the buffer's; tokens lie along `axis`, whose size is the symbol of the capacity. `length` is the symbol of the
    tokens that are in it before a call, `total` those after it, an expression of the entry point's symbols. Where both
    are the same, a symbol or a number, the cache `is_whole`: it has room for all tokens from the start, and other
    inputs say where the code writes and how far it reads. Of a sliding `window`, the buffer is a ring, where token t
    lies at t modulo the capacity: at least `window` and the tokens of a call, less one. Where input and output of such
    a cache are of one size, they hold the newest tokens alone, and `length` is the number that they have room for.
    Where there are `pages`, the code takes three tensors that make up such a buffer: codes in place of the input,
    scales and recent tokens of `dtype` after all inputs (`schedules/cache_pages.py`).
    """

    past: str
    present: str
    dtype: str
    shape: tuple[int | str, ...]
    axis: int
    length: str
    total: str
    pages: CachePages | None = None
    window: int = 0

    @property
    def is_whole(self) -> bool:
        """Return whether the cache has as many tokens after a call as before."""
        return self.length == self.total

    @property
    def capacity(self) -> str:
        """Return the symbol of the number of tokens that there is room for."""
        return str(self.shape[self.axis])


@dataclass(frozen=True)
class EntryPoint:
    """A function of the package.

    Its arguments are the `inputs` in order, with buffers in place of those that are a cache, then, if there are caches,
    a shape of their lengths, one for each symbol, and at last a tuple of all weights. `shortened` are the outputs whose
    first rows along axis 1 the code leaves out, as many as the last number of that shape says; where there are no such
    outputs the shape has no such number.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    symbols: tuple[SymbolRange, ...]
    caches: tuple[CacheRecord, ...] = ()
    shortened: tuple[str, ...] = ()

    @cached_property
    def past_symbols(self) -> tuple[str, ...]:
        """The symbols of the tokens that caches hold before a call, in the order in which the code takes them."""
        return tuple(dict.fromkeys(cache.length for cache in self.caches))

    @cached_property
    def newest_only(self) -> frozenset[str]:
        """The inputs that are caches of a sliding window with room for a number of its newest tokens alone."""
        sizes = {spec.name: spec.shape for spec in (*self.inputs, *self.outputs)}
        grow = {cache.past for cache in self.caches if sizes[cache.past] != sizes[cache.present]}
        return frozenset(cache.past for cache in self.caches if not cache.is_whole and cache.past not in grow)

    @cached_property
    def paged_symbols(self) -> tuple[str, ...]:
        """Those of the `past_symbols` whose caches have pages."""
        return tuple(dict.fromkeys(cache.length for cache in self.caches if cache.pages is not None))

    @cached_property
    def cache_totals(self) -> tuple[str, ...]:
        """The expressions of the tokens that caches hold after a call: most often one for all."""
        return tuple(dict.fromkeys(cache.total for cache in self.caches))

    def __str__(self) -> str:
        results = ", ".join(map(str, self.outputs))
        return f"{self.name}({', '.join(map(str, self.inputs))}) -> ({results})"


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
    """A file of the package, with its size in bytes and its sha256."""

    name: str
    bytes: int
    sha256: str


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
        _check_entry_points(self.entry_points)
        _check_weights(self)
        _require_sha256(self.model.sha256, "model.sha256")

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
        _check_version(document.get("format_version"))
        body = {key: value for key, value in document.items() if key not in ("format", "format_version")}
        return decode(Manifest, body, "manifest")


def _check_version(version: JsonValue) -> None:
    if version != FORMAT_VERSION or not isinstance(version, int) or isinstance(version, bool):
        found = version if isinstance(version, int | str) else type(version).__name__
        raise PackageError(
            f"{MANIFEST_NAME} has format version {found!r:.40}, this version reads {FORMAT_VERSION}; "
            "compile the model again, or read it with the version that wrote it"
        )


def _malformed(what: str) -> PackageError:
    return PackageError(f"{MANIFEST_NAME}: {what}; the package is corrupt, build it again")


def _require_unique(names: Iterable[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise _malformed(f"{what} {name!r:.80} occurs twice")
        seen.add(name)


def _require_sha256(digest: str, where: str) -> None:
    if not _SHA256.fullmatch(digest):
        raise _malformed(f"{where} is not a sha256 in lower-case hexadecimal")


def _check_files(manifest: Manifest) -> None:
    if len(manifest.files) > MAX_FILES:
        raise _malformed(f"it lists {len(manifest.files)} files, over the limit of {MAX_FILES}")
    names = [record.name for record in manifest.files]
    for name in (*names, manifest.library, manifest.weights_file):
        require_file_name(name)
    _require_unique(names, "file")
    for record in manifest.files:
        _require_sha256(record.sha256, f"the digest of {record.name}")
        if record.bytes < 0:
            raise _malformed(f"file {record.name} has the negative size {record.bytes}")
    if names:
        for name in (manifest.library, manifest.weights_file):
            if name not in names:
                raise _malformed(f"{name} is not among the files")


def require_file_name(name: str) -> None:
    """Raise PackageError unless `name` is a plain name (letters, digits, . _ -) that the format does not reserve."""
    if not _FILE_NAME.fullmatch(name):
        raise _malformed(f"{name!r:.80} is not a plain file name of letters, digits, '.', '_' and '-'")
    if name in (MANIFEST_NAME, DIGEST_NAME):
        raise _malformed(f"{name} may not be listed among the files")


def _check_entry_points(entry_points: tuple[EntryPoint, ...]) -> None:
    if not entry_points:
        raise _malformed("there is no entry point")
    _require_unique((entry.name for entry in entry_points), "entry point")
    for entry in entry_points:
        if not _IDENTIFIER.fullmatch(entry.name):
            raise _malformed(f"{entry.name!r:.80} is not a function name")
        _require_unique((spec.name for spec in entry.inputs), f"input of {entry.name}")
        _require_unique((spec.name for spec in entry.outputs), f"output of {entry.name}")
        _check_symbols(entry)
        symbols = {symbol.name for symbol in entry.symbols}
        for spec in (*entry.inputs, *entry.outputs):
            _check_spec(spec, symbols)
        _require_unique((cache.past for cache in entry.caches), f"cache of {entry.name}")
        _require_unique((cache.present for cache in entry.caches), f"cache of {entry.name}")
        for cache in entry.caches:
            _check_cache(cache, entry, symbols)
        if unknown := set(entry.shortened) - {spec.name for spec in entry.outputs}:
            raise _malformed(f"{entry.name} has no output {', '.join(sorted(unknown))} to shorten")
        if entry.shortened and not entry.caches:
            raise _malformed(f"{entry.name} has outputs to shorten, and no caches")


def _check_symbols(entry: EntryPoint) -> None:
    _require_unique((symbol.name for symbol in entry.symbols), f"symbol of {entry.name}")
    for symbol in entry.symbols:
        if not _IDENTIFIER.fullmatch(symbol.name):
            raise _malformed(f"{symbol.name!r:.80} is not a symbol name")
        if symbol.minimum < 0 or (symbol.maximum is not None and symbol.maximum < symbol.minimum):
            raise _malformed(f"the symbol {symbol.name} has the empty range {symbol.minimum} to {symbol.maximum}")


def _check_spec(spec: TensorSpec, known_symbols: set[str]) -> None:
    if not spec.name:
        raise _malformed("an input or output has no name")
    _check_tensor(spec.name, spec.dtype, len(spec.shape))
    for dimension in spec.shape:
        if isinstance(dimension, int):
            if dimension < 0:
                raise _malformed(f"'{spec.name}' has the negative dimension {dimension}")
            continue
        try:
            used = dimensions.symbols(dimension)
        except ValueError as error:
            raise _malformed(f"a dimension of {spec.name!r:.80}: {error}") from error
        if not used <= known_symbols:
            raise _malformed(f"'{dimension}' in {spec.name!r:.80} uses symbols that the entry point does not declare")


def _check_cache(cache: CacheRecord, entry: EntryPoint, symbols: set[str]) -> None:
    past = next((spec for spec in entry.inputs if spec.name == cache.past), None)
    if past is None or not any(spec.name == cache.present for spec in entry.outputs):
        raise _malformed(f"the cache of {cache.past!r:.80} and {cache.present!r:.80} is no input and output")
    if len(past.shape) != len(cache.shape) or not 0 <= cache.axis < len(cache.shape):
        raise _malformed(f"the cache of {cache.past!r:.80} has another rank than the input, or no such axis")
    is_known = cache.length in symbols or (cache.is_whole and cache.length.isdecimal())
    if cache.capacity in symbols or not _IDENTIFIER.fullmatch(cache.capacity) or not is_known:
        raise _malformed(f"the length or the capacity of the cache of {cache.past!r:.80} is no symbol of its own")
    _check_spec(TensorSpec(cache.past, cache.dtype, (*cache.shape, cache.total)), symbols | {cache.capacity})
    pages = cache.pages
    if pages is not None and (pages.bits not in (4, 8) or pages.tokens < 2 or pages.tokens % 2 or pages.recent < 0):
        raise _malformed(f"the pages of the cache of {cache.past!r:.80} are of no known form")
    if pages is not None and (len(cache.shape) != 4 or cache.axis != 2):
        raise _malformed(f"the cache of {cache.past!r:.80} has pages and is not [batch, heads, tokens, channels]")


def _check_tensor(name: str, dtype: str, rank: int) -> None:
    if dtype not in ITEM_BYTES:
        raise _malformed(f"{name!r:.80} has the unknown dtype {dtype!r:.40}")
    if rank > MAX_RANK:
        raise _malformed(f"{name!r:.80} has {rank} dimensions, over the limit of {MAX_RANK}")


def _check_weights(manifest: Manifest) -> None:
    _require_unique((weight.name for weight in manifest.weights), "weight")
    for weight in manifest.weights:
        _check_weight(weight)
    end = next((record.bytes for record in manifest.files if record.name == manifest.weights_file), None)
    ordered = sorted(manifest.weights, key=lambda weight: (weight.offset, weight.bytes))
    for weight, following in itertools.pairwise(ordered):
        if weight.offset + weight.bytes > following.offset:
            raise _malformed(f"the weights {weight.name!r:.80} and {following.name!r:.80} overlap")
    if ordered and (end is None or ordered[-1].offset + ordered[-1].bytes > end):
        raise _malformed(f"the weight {ordered[-1].name!r:.80} ends beyond {manifest.weights_file}")


def _check_weight(weight: WeightRecord) -> None:
    _check_tensor(weight.name, weight.dtype, len(weight.shape))
    if weight.dtype in ("int4", "uint4"):
        raise _malformed(f"the weight {weight.name!r:.80} has dtype {weight.dtype}: pack it as uint8")
    if any(dimension < 0 for dimension in weight.shape):
        raise _malformed(f"the weight {weight.name!r:.80} has a negative dimension")
    if weight.bytes != math.prod(weight.shape) * ITEM_BYTES[weight.dtype]:
        raise _malformed(f"the weight {weight.name!r:.80} has {weight.bytes} bytes, which its shape contradicts")
    if weight.offset < 0 or weight.offset % WEIGHT_ALIGNMENT:
        raise _malformed(f"the weight {weight.name!r:.80} lies at {weight.offset}, no multiple of {WEIGHT_ALIGNMENT}")
