"""The inputs of an ONNX graph, and values for their symbolic dimensions that a model is likely to accept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx

from optimizer.certificate.window_sized_caches import windows
from optimizer.errors import CertificateError
from optimizer.package import dimensions

_FLOATS = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.DOUBLE)
_TOKENS = 2
_COVERING = ("total", "window")
_PRIMES = (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47)


@dataclass(frozen=True)
class GraphInput:
    """An input: element type as in onnx.TensorProto, dimensions as numbers or symbols.

    A dimension without a name gets the symbol "INPUT.AXIS". A cache that holds the newest tokens of a sliding window
    has room for the `window` at least, along axis 2; else that is 0.
    """

    name: str
    element_type: int
    dims: tuple[int | str, ...]
    window: int = 0


@dataclass(frozen=True)
class Sizes:
    """Values for the dimensions of one run, by what they mean; `total` says whether a mask covers the past as well."""

    batch: int
    sequence: int
    past: int
    height: int
    width: int
    first_prime: int = 0
    total: bool = True


# Small and distinct, so that a mistaken axis shows; images divisible by 32, as networks that halve five times want.
_FIRST = (
    Sizes(batch=2, sequence=5, past=3, height=64, width=96),
    Sizes(batch=2, sequence=5, past=3, height=64, width=96, total=False),
    Sizes(batch=1, sequence=5, past=3, height=64, width=64),
    Sizes(batch=1, sequence=1, past=3, height=224, width=224),
    Sizes(batch=1, sequence=5, past=0, height=224, width=224),
    Sizes(batch=1, sequence=16, past=0, height=320, width=320),
    Sizes(batch=1, sequence=1, past=0, height=32, width=32),
)
_SECOND = (
    Sizes(batch=1, sequence=7, past=0, height=96, width=64, first_prime=1),
    Sizes(batch=1, sequence=1, past=4, height=32, width=32, first_prime=1),
    Sizes(batch=3, sequence=7, past=2, height=96, width=64, first_prime=1, total=False),
    *_FIRST,
)


def graph_inputs(
    model: onnx.ModelProto, shapes: Mapping[str, Sequence[int | str]] | None = None
) -> tuple[GraphInput, ...]:
    """Return the inputs that a caller must give, with the shapes of `shapes` in place of those that the model declares.

    Raises CertificateError for an input that is not a tensor.
    """
    initialized = {tensor.name for tensor in model.graph.initializer}
    sizes = windows(model)
    return tuple(
        _read(value, shapes or {}, sizes.get(value.name, 0))
        for value in model.graph.input
        if value.name not in initialized
    )


def _read(value: onnx.ValueInfoProto, shapes: Mapping[str, Sequence[int | str]], window: int) -> GraphInput:
    if not value.type.HasField("tensor_type"):
        raise CertificateError(f"input '{value.name}' is not a tensor, so no inputs can be made; skip the certificate")
    declared = value.type.tensor_type
    dims = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param or f"{value.name}.{axis}"
        for axis, dim in enumerate(declared.shape.dim)
    )
    return GraphInput(value.name, declared.elem_type, tuple(shapes.get(value.name, dims)), window)


def evaluate(dim: int | str, values: Mapping[str, int]) -> int:
    """Return the size of a dimension: a number, a symbol of `values`, or an expression of such symbols."""
    if isinstance(dim, int):
        return dim
    return values[dim] if dim in values else dimensions.evaluate(dim, values)


def settings(
    inputs: Sequence[GraphInput], run: int, past: int | None = None, *, single: bool = False
) -> Iterator[dict[str, int]]:
    """Yield values for all symbols, the likeliest first; the second and later runs begin with other values.

    `past` is how many tokens lie behind those of the run, if that matters; masks cover them then. A run of a `single`
    token is of one sequence.
    Meaning is taken from names, as exporters choose them: batch, sequence, past, total (past and sequence together),
    height and width. What has no such name gets a prime of its own. The room for a sliding window is enough for all
    tokens.
    """
    atoms = symbols(inputs)
    window = max((each.window for each in inputs), default=0)
    seen: list[dict[str, int]] = []
    for sizes in _SECOND if run else _FIRST:
        if past is not None and not sizes.total:
            continue
        chosen = replace(sizes, batch=1, sequence=1) if single else sizes
        values = _assign(atoms, chosen if past is None else replace(chosen, past=past), window)
        if values not in seen:
            seen.append(values)
            yield values


def completed(
    inputs: Sequence[GraphInput], given: Mapping[str, int], default: Callable[[str], int]
) -> Iterator[dict[str, int]]:
    """Yield values for all symbols: those `given`, and by `default` those that say how many there are of something.

    A total covers what lies behind the sequence, or else the sequence alone, and a cache of a sliding window's newest
    tokens has room for as many.
    """
    atoms = symbols(inputs)
    window = max((each.window for each in inputs), default=0)
    counts = {name: given.get(name, default(name)) for name, meaning in atoms.items() if meaning not in _COVERING}
    meant = {meaning: counts[name] for name, meaning in atoms.items() if name in counts}
    totals = [given[name] for name, meaning in atoms.items() if meaning == "total" and name in given]
    sequence = meant.get("sequence", 1)
    for tokens in (sequence + meant.get("past", 0), sequence):
        sizes = _covering(max([tokens, *totals]), window)
        yield {name: counts[name] if name in counts else given.get(name, sizes[atoms[name]]) for name in atoms}


def past_and_sequence(inputs: Sequence[GraphInput], values: Mapping[str, int]) -> tuple[int, int]:
    """Return how many tokens values for all symbols mean to lie behind those of the run, and how many those are."""
    meant = {meaning: values[name] for name, meaning in reversed(symbols(inputs).items())}
    sequence = meant.get("sequence", 1)
    if "past" not in meant and "window" in meant and "total" in meant:
        return meant["total"] - sequence, sequence
    return meant.get("past", 0), sequence


def symbols(inputs: Sequence[GraphInput]) -> dict[str, str]:
    """Return what each symbol means. An expression is not a symbol if all that it is made of are."""
    names = list(dict.fromkeys(dim for each in inputs for dim in each.dims if isinstance(dim, str)))
    plain = {name for name in names if _parts(name) == {name}}
    return {
        name: _meaning(name, inputs) for name in names if name in plain or not (_parts(name) and _parts(name) <= plain)
    }


def _parts(name: str) -> frozenset[str]:
    try:
        return dimensions.symbols(name)
    except ValueError:
        return frozenset()


def _meaning(name: str, inputs: Sequence[GraphInput]) -> str:
    words = set(re.split(r"[^a-z0-9]+", name.lower()))
    users = [(each, axis) for each in inputs for axis, dim in enumerate(each.dims) if dim == name]
    if any(each.window and axis == _TOKENS for each, axis in users):
        return "window"
    if words & {"total", "plus", "with", "all"} or name.count("seq") > 1:
        return "total"
    if "past" in words or "cache" in words:
        return "past"
    if "batch" in words or words & {"n", "b", "bs"}:
        return "batch"
    if words & {"height", "h"}:
        return "height"
    if words & {"width", "w"}:
        return "width"
    if words & {"encoder", "enc"}:
        return "other"
    if any(part in word for word in words for part in ("seq", "len", "token", "time")):
        return "total" if all("mask" in each.name for each, _ in users) else "sequence"
    return _meaning_of_axis(*users[0]) if f"{users[0][0].name}.{users[0][1]}" == name else "other"


def _meaning_of_axis(user: GraphInput, axis: int) -> str:
    """Return what a dimension without a name means, by its place."""
    if axis == 0:
        return "batch"
    if user.element_type in _FLOATS:
        return {2: "height", 3: "width"}.get(axis, "other") if len(user.dims) == 4 else "other"
    return "sequence" if len(user.dims) == 2 else "other"


def _covering(tokens: int, window: int) -> dict[str, int]:
    """Return the sizes of what covers all tokens, and of what holds the newest ones of a `window`, by meaning."""
    return {"total": tokens, "window": max(window, tokens)}


def _assign(atoms: Mapping[str, str], sizes: Sizes, window: int) -> dict[str, int]:
    has_past = "past" in atoms.values() or "window" in atoms.values()
    past = sizes.past if has_past and sizes.total else 0
    fixed = {
        "batch": sizes.batch,
        "sequence": sizes.sequence,
        "past": sizes.past,
        **_covering(past + sizes.sequence, window),
        "height": sizes.height,
        "width": sizes.width,
    }
    others = [name for name, meaning in atoms.items() if meaning == "other"]
    primes = {name: _PRIMES[(index + sizes.first_prime) % len(_PRIMES)] for index, name in enumerate(others)}
    return {name: primes[name] if meaning == "other" else fixed[meaning] for name, meaning in atoms.items()}
