"""Check a call's inputs against an entry point: names, dtypes, dimensions, and one value per symbol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from optimizer.errors import InputMismatchError
from optimizer.package import dimensions
from optimizer.package.entry_points import EntryPoint, IndexRange, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def check_names(entry: EntryPoint, given: Mapping[str, object]) -> None:
    """Raise InputMismatchError naming all inputs that are missing and all that the entry point does not have."""
    if given.keys() == entry.input_names:
        return
    problems: list[str] = []
    if missing := sorted(entry.input_names - given.keys()):
        problems.append("missing " + ", ".join(missing))
    if unknown := sorted(given.keys() - entry.input_names):
        problems.append("unknown " + ", ".join(unknown))
    raise mismatch(entry, f"inputs: {'; '.join(problems)}")


def wrong_dtype(entry: EntryPoint, spec: TensorSpec, dtype: str) -> InputMismatchError:
    """Return the error for an array of another dtype than the declared one: nothing is converted in silence."""
    return mismatch(entry, f"input '{spec.name}' has dtype {dtype}, not {spec.dtype}; convert it first")


def check_range(entry: EntryPoint, bounds: IndexRange, values: NDArray[np.generic]) -> None:
    """Raise InputMismatchError where an integer of an input lies outside of what it chooses from."""
    if not values.size:
        return
    least, most = int(values.min()), int(values.max())
    if least < bounds.minimum or most > bounds.maximum:
        wrong = most if most > bounds.maximum else least
        raise mismatch(
            entry,
            f"input '{bounds.input}' holds {wrong}, and chooses one of {bounds.maximum + 1} elements "
            f"(node '{bounds.node}'); give it {bounds.minimum} to {bounds.maximum}",
        )


def bind_symbols(
    entry: EntryPoint, shapes: Mapping[str, tuple[int, ...]], given: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Return the value of each symbol that some input dimension names by itself, and those that are `given`.

    Raises InputMismatchError where ranks or dimensions differ from the declaration, where two inputs give one symbol
    different values, and where a value is out of the symbol's range. An expression is checked when all of its symbols
    are bound by other dimensions.
    """
    values = dict(given or {})
    origin = dict.fromkeys(values, "the cache")
    ranges = {symbol.name: symbol for symbol in entry.symbols}
    expressions: list[tuple[TensorSpec, int, str]] = []
    for spec in entry.inputs:
        shape = shapes[spec.name]
        if len(shape) != len(spec.shape):
            raise mismatch(entry, f"input '{spec.name}' has {len(shape)} dimensions {shape}, not {len(spec.shape)}")
        for axis, (declared, actual) in enumerate(zip(spec.shape, shape, strict=True)):
            if isinstance(declared, int):
                if declared != actual:
                    raise mismatch(entry, f"input '{spec.name}' has {actual} in dimension {axis}, not {declared}")
            elif declared not in ranges:
                expressions.append((spec, axis, declared))
            elif values.setdefault(declared, actual) != actual:
                known = f"{declared} is {values[declared]} in '{origin[declared]}'"
                raise mismatch(entry, f"input '{spec.name}' has {actual} in dimension {axis}, but {known}")
            else:
                origin.setdefault(declared, spec.name)
    _check_ranges(entry, values, origin)
    for spec, axis, expression in expressions:
        if dimensions.symbols(expression) <= values.keys():
            _check_expression(entry, spec, axis, shapes[spec.name][axis], values)
    return values


def _check_ranges(entry: EntryPoint, values: Mapping[str, int], origin: Mapping[str, str]) -> None:
    for symbol in entry.symbols:
        value = values.get(symbol.name)
        if value is None:
            continue
        if value < symbol.minimum or (symbol.maximum is not None and value > symbol.maximum):
            limits = f"at least {symbol.minimum}" + ("" if symbol.maximum is None else f" and at most {symbol.maximum}")
            raise mismatch(
                entry, f"input '{origin[symbol.name]}' gives {symbol.name} = {value}, but it must be {limits}"
            )


def _check_expression(entry: EntryPoint, spec: TensorSpec, axis: int, actual: int, values: Mapping[str, int]) -> None:
    expression = str(spec.shape[axis])
    try:
        expected = dimensions.evaluate(expression, values)
    except ZeroDivisionError as error:
        raise mismatch(entry, f"input '{spec.name}': dimension {axis}, {expression}, divides by zero here") from error
    if expected != actual:
        raise mismatch(entry, f"input '{spec.name}' has {actual} in dimension {axis}, but {expression} is {expected}")


def mismatch(entry: EntryPoint, problem: str) -> InputMismatchError:
    """Return the error for a call that does not fit, with the signature that was expected."""
    return InputMismatchError(f"{problem}. Expected: {entry}")
