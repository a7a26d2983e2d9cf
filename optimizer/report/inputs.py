"""Random inputs for a package, from its manifest alone."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from optimizer.errors import OptionError
from optimizer.package import dimensions
from optimizer.package.dtypes import numpy_dtype
from optimizer.package.entry_points import EntryPoint, TensorSpec
from optimizer.package.manifest import Manifest

_DEFAULT_SIZE = 8


def default_size(symbol: str) -> int:
    """Return the size of a symbolic dimension that nobody set: one sequence or image, as long as a short prompt."""
    return 1 if "batch" in symbol else _DEFAULT_SIZE


def complete_inputs(
    manifest: Manifest, given: Mapping[str, np.ndarray], symbols: Mapping[str, int], seed: int, entry: str = "main"
) -> dict[str, np.ndarray]:
    """Return all inputs of an entry point: those given, and random ones of fitting shapes for the rest.

    Floats are standard normal; integers are 0 or 1, which is valid as an index, a position and a mask alike, or 0 where
    they choose of a single element. Symbolic
    dimensions are taken from `symbols`, from the given arrays, from the certificate's first run, else 1 for a
    dimension that is called batch and 8 for others.
    Raises OptionError for a name that is no input or no symbol.
    """
    signature = manifest.entry_point(entry)
    if signature is None:
        raise OptionError(f"there is no entry point '{entry}'")
    _check_names(signature, given, symbols)
    values = _symbol_values(manifest, signature, given, symbols)
    generator = np.random.default_rng(seed)
    most = {each.input: each.maximum for each in signature.index_ranges}
    return {
        spec.name: given[spec.name] if spec.name in given else _random(spec, values, generator, most.get(spec.name, 1))
        for spec in signature.inputs
    }


def _check_names(signature: EntryPoint, given: Mapping[str, np.ndarray], symbols: Mapping[str, int]) -> None:
    inputs = [spec.name for spec in signature.inputs]
    known = [symbol.name for symbol in signature.symbols]
    for name in given:
        if name not in inputs:
            raise OptionError(f"'{name}' is no input; the inputs are {', '.join(inputs)}")
    for name in symbols:
        if name not in known:
            raise OptionError(f"'{name}' is no symbolic dimension; those are {', '.join(known) or 'none'}")


def _symbol_values(
    manifest: Manifest, signature: EntryPoint, given: Mapping[str, np.ndarray], symbols: Mapping[str, int]
) -> dict[str, int]:
    values = {symbol.name: default_size(symbol.name) for symbol in signature.symbols}
    if manifest.certificate is not None and manifest.certificate.settings:
        values.update({name: size for name, size in manifest.certificate.settings[0].items() if name in values})
    for spec in signature.inputs:
        if spec.name in given and len(spec.shape) == given[spec.name].ndim:
            sizes = zip(spec.shape, given[spec.name].shape, strict=True)
            values.update({dimension: size for dimension, size in sizes if dimension in values})
    return values | dict(symbols)


def _random(spec: TensorSpec, values: Mapping[str, int], generator: np.random.Generator, most: int) -> np.ndarray:
    shape = tuple(size if isinstance(size, int) else dimensions.evaluate(size, values) for size in spec.shape)
    dtype = numpy_dtype(spec.dtype)
    if spec.dtype == "bool" or spec.dtype.startswith(("int", "uint")):
        return np.minimum(generator.integers(0, 2, shape), max(most, 0)).astype(dtype)
    return generator.standard_normal(shape).astype(dtype)
