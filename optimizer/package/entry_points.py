"""The functions of a package, as `manifest.json` describes them: inputs, outputs, symbolic dimensions, caches."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

from optimizer.errors import PackageError
from optimizer.package import dimensions
from optimizer.package.dtypes import ITEM_BYTES

MANIFEST_NAME = "manifest.json"
MAX_RANK = 32

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


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
class IndexRange:
    """What the integers of an `input` may be, both ends included: the ONNX node `node` chooses elements by them."""

    input: str
    minimum: int
    maximum: int
    node: str


@dataclass(frozen=True)
class EntryPoint:
    """A function of the package.

    Its arguments are the `inputs` in order, with buffers in place of those that are a cache, then, if there are caches,
    a shape of their lengths, one for each symbol, and at last a tuple of all weights. `shortened` are the outputs whose
    first rows along axis 1 the code leaves out, as many as the last number of that shape says; where there are no such
    outputs the shape has no such number. `index_ranges` has those of the inputs that choose elements of a known number.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    symbols: tuple[SymbolRange, ...]
    caches: tuple[CacheRecord, ...] = ()
    shortened: tuple[str, ...] = ()
    index_ranges: tuple[IndexRange, ...] = ()

    @cached_property
    def input_names(self) -> frozenset[str]:
        """The names of the inputs."""
        return frozenset(spec.name for spec in self.inputs)

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


def malformed(what: str) -> PackageError:
    """Return the error that a manifest holds what no package of this compiler does."""
    return PackageError(f"{MANIFEST_NAME}: {what}; the package is corrupt, build it again")


def require_unique(names: Iterable[str], what: str) -> None:
    """Raise PackageError if one of the `names` of what they name occurs twice."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise malformed(f"{what} {name!r:.80} occurs twice")
        seen.add(name)


def check_entry_points(entry_points: tuple[EntryPoint, ...]) -> None:
    """Raise PackageError unless names, shapes, symbols and caches of the entry points agree with each other."""
    if not entry_points:
        raise malformed("there is no entry point")
    require_unique((entry.name for entry in entry_points), "entry point")
    for entry in entry_points:
        if not _IDENTIFIER.fullmatch(entry.name):
            raise malformed(f"{entry.name!r:.80} is not a function name")
        require_unique((spec.name for spec in entry.inputs), f"input of {entry.name}")
        require_unique((spec.name for spec in entry.outputs), f"output of {entry.name}")
        _check_symbols(entry)
        symbols = {symbol.name for symbol in entry.symbols}
        for spec in (*entry.inputs, *entry.outputs):
            _check_spec(spec, symbols)
        require_unique((cache.past for cache in entry.caches), f"cache of {entry.name}")
        require_unique((cache.present for cache in entry.caches), f"cache of {entry.name}")
        for cache in entry.caches:
            _check_cache(cache, entry, symbols)
        if unknown := set(entry.shortened) - {spec.name for spec in entry.outputs}:
            raise malformed(f"{entry.name} has no output {', '.join(sorted(unknown))} to shorten")
        if entry.shortened and not entry.caches:
            raise malformed(f"{entry.name} has outputs to shorten, and no caches")
        integers = {spec.name for spec in entry.inputs if "int" in spec.dtype}
        require_unique((each.input for each in entry.index_ranges), f"range of {entry.name}")
        if unknown := {each.input for each in entry.index_ranges} - integers:
            raise malformed(f"{entry.name} has no integers {', '.join(sorted(unknown))} to bound")


def _check_symbols(entry: EntryPoint) -> None:
    require_unique((symbol.name for symbol in entry.symbols), f"symbol of {entry.name}")
    for symbol in entry.symbols:
        if not _IDENTIFIER.fullmatch(symbol.name):
            raise malformed(f"{symbol.name!r:.80} is not a symbol name")
        if symbol.minimum < 0 or (symbol.maximum is not None and symbol.maximum < symbol.minimum):
            raise malformed(f"the symbol {symbol.name} has the empty range {symbol.minimum} to {symbol.maximum}")


def _check_spec(spec: TensorSpec, known_symbols: set[str]) -> None:
    if not spec.name:
        raise malformed("an input or output has no name")
    check_tensor(spec.name, spec.dtype, len(spec.shape))
    for dimension in spec.shape:
        if isinstance(dimension, int):
            if dimension < 0:
                raise malformed(f"'{spec.name}' has the negative dimension {dimension}")
            continue
        try:
            used = dimensions.symbols(dimension)
        except ValueError as error:
            raise malformed(f"a dimension of {spec.name!r:.80}: {error}") from error
        if not used <= known_symbols:
            raise malformed(f"'{dimension}' in {spec.name!r:.80} uses symbols that the entry point does not declare")


def _check_cache(cache: CacheRecord, entry: EntryPoint, symbols: set[str]) -> None:
    past = next((spec for spec in entry.inputs if spec.name == cache.past), None)
    if past is None or not any(spec.name == cache.present for spec in entry.outputs):
        raise malformed(f"the cache of {cache.past!r:.80} and {cache.present!r:.80} is no input and output")
    if len(past.shape) != len(cache.shape) or not 0 <= cache.axis < len(cache.shape):
        raise malformed(f"the cache of {cache.past!r:.80} has another rank than the input, or no such axis")
    is_known = cache.length in symbols or (cache.is_whole and cache.length.isdecimal())
    if cache.capacity in symbols or not _IDENTIFIER.fullmatch(cache.capacity) or not is_known:
        raise malformed(f"the length or the capacity of the cache of {cache.past!r:.80} is no symbol of its own")
    _check_spec(TensorSpec(cache.past, cache.dtype, (*cache.shape, cache.total)), symbols | {cache.capacity})
    pages = cache.pages
    if pages is not None and (pages.bits not in (4, 8) or pages.tokens < 2 or pages.tokens % 2 or pages.recent < 0):
        raise malformed(f"the pages of the cache of {cache.past!r:.80} are of no known form")
    if pages is not None and (len(cache.shape) != 4 or cache.axis != 2):
        raise malformed(f"the cache of {cache.past!r:.80} has pages and is not [batch, heads, tokens, channels]")


def check_tensor(name: str, dtype: str, rank: int) -> None:
    """Raise PackageError unless a tensor of this dtype and rank can be in a package."""
    if dtype not in ITEM_BYTES:
        raise malformed(f"{name!r:.80} has the unknown dtype {dtype!r:.40}")
    if rank > MAX_RANK:
        raise malformed(f"{name!r:.80} has {rank} dimensions, over the limit of {MAX_RANK}")
