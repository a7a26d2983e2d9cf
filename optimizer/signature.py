"""The entry point of a compiled module as the package declares it: names, dtypes, dimensions as text, symbols."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tvm
import tvm.ir
from onnx import TensorProto
from tvm import relax, tirx

from optimizer.frontend.dimensions import simplified
from optimizer.frontend.importer import ImportedModel
from optimizer.package.entry_points import CachePages, CacheRecord, EntryPoint, SymbolRange, TensorSpec
from optimizer.weights import ENTRY
from passes.defined_dimensions import defined_dimensions
from passes.leave_out_rows import shortened_outputs
from passes.rewrite_kv_cache import Cache, caches_of
from schedules.cache_pages import PAGE, RECENT

_NARROW_NAMES: dict[int, str] = {TensorProto.INT4: "int4", TensorProto.UINT4: "uint4"}
_BINARY = {tirx.Add: "+", tirx.Sub: "-", tirx.Mul: "*", tirx.FloorDiv: "//", tirx.FloorMod: "%"}
_FUNCTIONS = {tirx.Max: "max", tirx.Min: "min"}


def entry_point(model: ImportedModel, rewritten: tvm.IRModule | None = None) -> EntryPoint:
    """Return the signature of the imported module's `main`, with the caches that passes made in the `rewritten` one.

    A dimension of an output that the data decide (NonZero, Unique, ...) is a symbol of its own.
    """
    function = model.module[ENTRY]
    writer = _DimensionWriter(defined_dimensions(function))
    inputs = writer.specs(model.input_names, [parameter.ty for parameter in function.params], model.narrow_inputs)
    writer.declare_no_more()
    outputs = writer.specs(model.output_names, _result_types(function), model.narrow_outputs)
    caches = () if rewritten is None else _caches(rewritten[ENTRY], inputs, outputs)
    shortened = () if rewritten is None else _shortened(rewritten[ENTRY], outputs, caches)
    return EntryPoint(ENTRY, inputs, outputs, writer.symbols(), caches, shortened, model.index_ranges)


def _caches(
    function: relax.Function, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> tuple[CacheRecord, ...]:
    """Return the records of a rewritten function's caches; `inputs` and `outputs` are those that it had before."""
    capacities: dict[tuple[str, int], str] = {}
    records: list[CacheRecord] = []
    scales_and_recent = 0
    for cache in caches_of(function):
        past, present = inputs[cache.parameter], outputs[cache.output]
        length, total = str(past.shape[cache.axis]), str(present.shape[cache.axis])
        if cache.counted_by is not None:
            counted, axis = cache.counted_by
            total = str(inputs[counted].shape[axis])
        capacity = capacities.setdefault((length, cache.window), f"capacity_{len(capacities)}")
        shape = (*past.shape[: cache.axis], capacity, *past.shape[cache.axis + 1 :])
        floats = function.params[cache.parameter]
        if cache.pages is not None:
            scales_and_recent += 2
            floats = function.params[len(inputs) + scales_and_recent - 1]
        dtype, pages = str(floats.ty.dtype.dtype), _pages(cache)
        records.append(
            CacheRecord(past.name, present.name, dtype, shape, cache.axis, length, total, pages, cache.window)
        )
    return tuple(records)


def _shortened(
    function: relax.Function, outputs: Sequence[TensorSpec], caches: Sequence[CacheRecord]
) -> tuple[str, ...]:
    """Return the outputs whose first rows can be left out."""
    present = {cache.present for cache in caches}
    returned = [spec.name for spec in outputs if spec.name not in present]
    return tuple(returned[position] for position in shortened_outputs(function))


def _pages(cache: Cache) -> CachePages | None:
    return None if cache.pages is None else CachePages(cache.pages.bits, cache.pages.by_channel, PAGE, RECENT)


def _result_types(function: relax.Function) -> list[relax.TensorType]:
    """Return the types of what a function returns, with the symbols that are bound in its body."""
    values = {binding.var: binding.value for block in function.body.blocks for binding in block.bindings}
    result = function.body.body
    while isinstance(result, relax.Var) and result in values:
        result = values[result]
    if isinstance(result, relax.Tuple):
        return [field.ty for field in result.fields]
    results = function.ret_ty
    return list(results.fields) if isinstance(results, relax.TupleType) else [results]


class _DimensionWriter:
    """Writes dimensions as text, giving every symbol a name of its own."""

    def __init__(self, definitions: Mapping[tirx.Var, tvm.ir.Expr]) -> None:
        self._definitions = definitions
        self._names: dict[tirx.Var, str] = {}
        self._free = 0
        self._declaring = True

    def declare_no_more(self) -> None:
        """Take every symbol that was not named so far for one that the data decide."""
        self._declaring = False

    def specs(
        self, names: Sequence[str], types: Sequence[relax.TensorType], narrow: Mapping[str, int]
    ) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name, _NARROW_NAMES.get(narrow.get(name, 0), str(kind.dtype.dtype)), self._shape(kind))
            for name, kind in zip(names, types, strict=True)
        )

    def symbols(self) -> tuple[SymbolRange, ...]:
        free = [f"data_dependent_{index}" for index in range(self._free)]
        return tuple(SymbolRange(name, 0, None) for name in (*self._names.values(), *free))

    def _shape(self, kind: relax.TensorType) -> tuple[int | str, ...]:
        if not isinstance(kind.shape, relax.ShapeExpr):
            return tuple(self._data_dependent() for _ in range(kind.ndim))
        return tuple(self._dimension(dimension) for dimension in kind.shape.values)

    def _dimension(self, dimension: tvm.ir.Expr) -> int | str:
        value = simplified(dimension)
        return value if isinstance(value, int) else self._text(value) or self._data_dependent()

    def _data_dependent(self) -> str:
        self._free += 1
        return f"data_dependent_{self._free - 1}"

    def _text(self, value: tvm.ir.Expr) -> str | None:
        """Return an expression as text, or None if it is more than a manifest can say."""
        if isinstance(value, tirx.IntImm):
            return str(int(value.value))
        if isinstance(value, tvm.ir.Var):
            if value in self._definitions:
                return self._text(self._definitions[value])
            return self._symbol(value) if self._declaring or value in self._names else None
        operator = next((text for kind, text in _BINARY.items() if isinstance(value, kind)), None)
        function = next((text for kind, text in _FUNCTIONS.items() if isinstance(value, kind)), None)
        if operator is None and function is None:
            return None
        left, right = self._text(value.a), self._text(value.b)
        if left is None or right is None:
            return None
        return f"{function}({left}, {right})" if function else f"({left} {operator} {right})"

    def _symbol(self, variable: tirx.Var) -> str:
        if variable not in self._names:
            taken, name, count = set(self._names.values()), variable.name, 1
            while name in taken:
                count += 1
                name = f"{variable.name}_{count}"
            self._names[variable] = name
        return self._names[variable]
