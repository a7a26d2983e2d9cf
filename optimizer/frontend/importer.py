"""The walk over an ONNX graph that builds the Relax module."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import onnx
import tvm
import tvm.ir
from onnx import numpy_helper
from tvm import relax, tirx

from optimizer.errors import Blocker, UnsupportedModelError
from optimizer.frontend import constant_evaluation, function_bodies, shape_arithmetic
from optimizer.frontend.branches import convert_to_dataflow
from optimizer.frontend.dimensions import (
    Dimension,
    FixedDimension,
    Shape,
    Symbols,
    as_expression,
    input_shapes,
    simplified,
    static_shape,
    too_large,
)
from optimizer.frontend.index_ranges import IndexRanges
from optimizer.frontend.node import Node, Result, UnsupportedNodeError, normalized_domain
from optimizer.frontend.node_builder import NodeBuilder
from optimizer.frontend.registry import find_converter, load_converters
from optimizer.frontend.value import (
    NARROW_TYPES,
    AnyValue,
    ConstantValue,
    SequenceValue,
    TensorValue,
    Value,
    integer_value,
)
from optimizer.package.entry_points import IndexRange
from passes.provenance import annotate

Environment = dict[str, "AnyValue | None"]  # None marks a value that a blocker keeps from being computed


@dataclass(frozen=True)
class ImportedModel:
    """A Relax module with one function `main`, and the ONNX names of its parameters and results in order.

    `index_ranges` are what the integers of some inputs may be.
    """

    module: tvm.IRModule
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    narrow_inputs: Mapping[str, int]
    narrow_outputs: Mapping[str, int]
    index_ranges: tuple[IndexRange, ...] = ()


def import_model(
    model: onnx.ModelProto, *, shapes: Mapping[str, Sequence[int | str]] | None = None, base_directory: str = ""
) -> ImportedModel:
    """Convert an ONNX model to a Relax module.

    `shapes` overrides input shapes by name. `base_directory` is where external data lie.

    Raises UnsupportedModelError with all that cannot be converted.
    """
    load_converters()
    fixed: dict[str, int] = {}
    while True:
        importer = GraphImporter(model, base_directory, fixed)
        try:
            return importer.run(shapes or {})
        except FixedDimension as found:
            fixed[found.name] = found.value
            importer.builder._end_block()  # TVM warns of one that stays open


class GraphImporter:
    """State of one import: the block builder, the symbols, the values by name, and the blockers found."""

    def __init__(self, model: onnx.ModelProto, base_directory: str, fixed: Mapping[str, int] | None = None) -> None:
        self.builder = NodeBuilder()
        self.symbols = Symbols(fixed)
        self.index_ranges = IndexRanges()
        self.base_directory = base_directory
        self._model = model
        self._graph = model.graph
        self._versions = {normalized_domain(entry.domain): entry.version for entry in model.opset_import}
        self._environment: Environment = {}
        self._blockers: list[Blocker] = []

    def run(self, shapes: Mapping[str, Sequence[int | str]]) -> ImportedModel:
        """Import the whole model."""
        graph = self._graph
        initializers = {tensor.name for tensor in graph.initializer}
        inputs = [value for value in graph.input if value.name not in initializers]
        parameters = self._parameters(inputs, shapes)
        outputs: list[Value] = []
        branches = _has_subgraph(self._model)
        with self.builder.function("main", [value.expr for value in parameters]):
            with nullcontext() if branches else self.builder.dataflow():
                for declared, value in zip(inputs, parameters, strict=True):
                    self._environment[declared.name] = value
                    self.index_ranges.begin_at(declared.name, value)
                self._define_initializers(graph)
                self.import_nodes(graph.node)
                if not self._blockers:
                    outputs = [self._graph_output(output.name) for output in graph.output]
                expressions = [value.expr for value in outputs]
                result = expressions[0] if len(expressions) == 1 else relax.Tuple(expressions)
                bound = self.builder.emit(result) if branches else self.builder.emit_output(result)
            self.builder.emit_func_output(bound)
        self._raise_blockers()
        module = annotate(self.builder.get(), self.builder.nodes)
        if branches:
            # Not used elsewhere: it folds away every match_cast between symbols that are already bound, and with it
            # the check that two dimensions are equal.
            module = convert_to_dataflow(module)
        names = tuple(output.name for output in graph.output)
        return ImportedModel(
            module,
            tuple(value.name for value in inputs),
            names,
            _narrow(zip((value.name for value in inputs), parameters, strict=True)),
            _narrow(zip(names, outputs, strict=True)),
            self.index_ranges.all(),
        )

    # For converters of operators with subgraphs

    def import_nodes(self, nodes: Iterable[onnx.NodeProto]) -> None:
        """Import nodes in order into the current scope."""
        for proto in nodes:
            with self.builder.importing(proto.name or next(filter(None, proto.output), proto.op_type)):
                self._import_node(proto, self._versions)

    def import_subgraph(self, graph: onnx.GraphProto, arguments: Sequence[AnyValue]) -> list[AnyValue]:
        """Import the body of a subgraph into the current scope with its inputs bound to `arguments`.

        The subgraph sees the values around it. Names that it defines are forgotten afterwards.
        """
        with self.names_restored(), self.index_ranges.uncertain():
            for declared, value in zip(graph.input, arguments, strict=False):
                self._environment[declared.name] = value
            self._define_initializers(graph)
            self.import_nodes(graph.node)
            return [self.lookup(output.name) for output in graph.output]

    def import_function(
        self,
        function: onnx.FunctionProto,
        attributes: Mapping[str, onnx.AttributeProto],
        arguments: Sequence[AnyValue | None],
    ) -> list[AnyValue | None]:
        """Import the body of an ONNX function with its own opset versions and names."""
        values = {name: value for name, value in zip(function.input, arguments, strict=False) if value is not None}
        outer = self._versions
        self._versions = {**outer, **{normalized_domain(e.domain): e.version for e in function.opset_import}}
        try:
            with self.only_names(values):
                self.import_nodes(function_bodies.bound_nodes(function, attributes))
                return [self._environment.get(name) for name in function.output]
        finally:
            self._versions = outer

    def captured(self, graph: onnx.GraphProto) -> dict[str, AnyValue]:
        """Return the values around a subgraph that it reads, by name."""
        return {name: self.lookup(name) for name in sorted(_outer_names(graph)) if name in self._environment}

    @contextmanager
    def only_names(self, values: Mapping[str, AnyValue]) -> Iterator[None]:
        """Define nothing but `values` inside."""
        outer = self._environment
        self._environment = dict[str, AnyValue | None](values)
        try:
            yield
        finally:
            self._environment = outer

    @contextmanager
    def names_restored(self) -> Iterator[None]:
        """Forget on exit all names that were defined inside."""
        outer = dict(self._environment)
        try:
            yield
        finally:
            self._environment = outer

    def nested_block(self, body: Callable[[], relax.Expr]) -> relax.SeqExpr:
        """Return what `body` emits and returns as an expression of its own, for a branch of relax.If."""
        self.builder._begin_binding_block()
        try:
            with self.index_ranges.uncertain():
                result = self.builder.emit(body())
        finally:
            block = self.builder._end_block()
        return relax.SeqExpr([block], result)

    def lookup(self, name: str) -> AnyValue:
        """Return the value of a name; raises if a blocker keeps it from being computed."""
        if name not in self._environment:
            raise UnsupportedNodeError(f"'{name}' is not defined before its use")
        value = self._environment[name]
        if value is None:
            raise _BlockedError
        return value

    # Emitting

    def emit(self, expr: relax.Expr, hint: str, narrow_type: int | None = None) -> TensorValue:
        """Bind one tensor; dimensions that Relax cannot infer become fresh symbols bound at run time."""
        # A variable needs no second name.
        bound = expr if isinstance(expr, relax.Var) else self.builder.emit(expr, hint)
        tensor_type = bound.ty
        if not isinstance(tensor_type, relax.TensorType):
            raise UnsupportedNodeError(f"expected a tensor, got {tensor_type}")
        if not isinstance(tensor_type.shape, relax.ShapeExpr):
            if tensor_type.ndim < 0:
                raise UnsupportedNodeError("the rank of the result depends on the data")
            fresh = [self.symbols.fresh(f"{hint}_dim{axis}") for axis in range(tensor_type.ndim)]
            bound = self.builder.match_cast(bound, relax.TensorType(fresh, str(tensor_type.dtype.dtype)))
        return TensorValue(bound, narrow_type)

    def bind_elements(self, value: Value, name: str) -> np.ndarray:
        """Return fresh symbols for the elements of a rank 0 or 1 integer tensor, bound and checked at run time."""
        elements = self._bound_elements(value, name)
        if elements.size:
            self.require_zero(too_large(list(elements.ravel())))
        return elements

    def _bound_elements(self, value: Value, name: str) -> np.ndarray:
        shape = static_shape(value.shape)
        if shape is None or len(shape) > 1:
            raise UnsupportedNodeError(f"'{name}' sets a shape, but its own length is not known at compile time")
        tensor = value.expr
        if value.dtype != "int64":
            tensor = self.builder.emit(relax.op.astype(tensor, "int64"))
        if not shape:
            tensor = self.builder.emit(relax.op.reshape(tensor, (1,)))
        count = shape[0] if shape else 1
        elements = np.empty(count, dtype=object)
        elements[:] = [self.symbols.fresh(f"{self.identifier(name)}_{i}") for i in range(count)]
        shape_value = self.builder.emit(relax.op.tensor_to_shape(tensor))
        self.builder.match_cast(shape_value, relax.ShapeType(list(elements)))
        return elements.reshape(shape)

    def require_zero(self, values: Iterable[tvm.ir.Expr]) -> None:
        """Emit a check, when the module runs, that `values` computed from dimensions are zero, but for what is known.

        Raises UnsupportedNodeError if one is another constant.
        """
        simple = [simplified(value) for value in values]
        if any(isinstance(value, int) and value for value in simple):
            raise UnsupportedNodeError("its sizes do not fit each other")
        unknown = [value for value in simple if not isinstance(value, int)]
        if unknown:
            shape_value = self.builder.emit(relax.ShapeExpr(unknown))
            self.builder.match_cast(shape_value, relax.ShapeType([tirx.const(0, "int64")] * len(unknown)))

    def bound_dimension(self, dimension: tvm.ir.Expr, name: str) -> tvm.ir.Expr:
        """Return a symbol of its own for a dimension: Relax does not see that two equal min or max are equal."""
        element = np.empty(1, dtype=object)
        element[0] = dimension
        return self._bound_elements(integer_value(element, "int64", self.builder), name)[0]

    def identifier(self, name: str) -> str:
        """Return a valid Relax identifier made from an ONNX name."""
        text = re.sub(r"\W", "_", name)
        return text if text and not text[0].isdigit() else f"value_{text}"

    # The walk

    def _import_node(self, proto: onnx.NodeProto, versions: Mapping[str, int]) -> None:
        results: Sequence[AnyValue | None] = ()
        try:
            inputs = [self.lookup(name) if name else None for name in proto.input]
            node = Node(proto, versions.get(normalized_domain(proto.domain), 1), inputs, self)
            results = self.convert(node)
            if not node.domain:
                self.index_ranges.follow(node.operator, inputs, results)
        except _BlockedError:
            # What depends on a blocker is not converted, but may be a blocker for a reason of its own.
            if not self._is_known(proto):
                self._block(proto, self._unknown(proto))
        except UnsupportedNodeError as error:
            self._block(proto, str(error))
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            # TVM's own shape and type checks speak through these; the first line of theirs says what is wrong.
            lines = str(error).strip().splitlines() or [type(error).__name__]
            self._block(proto, f"conversion failed: {lines[-1]}")
        for index, name in enumerate(proto.output):
            if name:
                self._environment[name] = results[index] if index < len(results) else None

    def convert(self, node: Node) -> Sequence[AnyValue | None]:
        """Return the outputs of one node: folded, converted, or expanded into its function body."""
        if node.operator == "Constant" and node.domain == "":
            return [ConstantValue(constant_evaluation.constant_node(node))]
        folded = shape_arithmetic.evaluate(node) or constant_evaluation.evaluate(node)
        if folded is not None:
            return folded
        converter = find_converter(node.domain, node.operator, node.version)
        if converter is not None:
            return self._values(node, converter(node))
        expanded = function_bodies.expand(node)
        if expanded is not None:
            return expanded
        raise UnsupportedNodeError(self._unknown(node.proto))

    def _is_known(self, proto: onnx.NodeProto) -> bool:
        """Return whether there is a way to import an operator, for some inputs at least."""
        domain = normalized_domain(proto.domain)
        if domain == "" and proto.op_type in ("Constant", *shape_arithmetic.OPERATORS):
            return True
        version = self._versions.get(domain, 1)
        known = find_converter(domain, proto.op_type, version) is not None
        return known or function_bodies.has_body(domain, proto.op_type, version)

    def _unknown(self, proto: onnx.NodeProto) -> str:
        domain = normalized_domain(proto.domain)
        where = f"domain '{domain}'" if domain else f"opset {self._versions.get(domain, 1)}"
        return f"the operator is not supported ({where})"

    def _values(self, node: Node, result: Result) -> list[AnyValue | None]:
        results = list(result) if isinstance(result, (tuple, list)) else [result]
        values: list[AnyValue | None] = []
        for item in results:
            if isinstance(item, relax.Expr):
                values.append(node.emit(item))
            elif isinstance(item, np.ndarray):
                values.append(ConstantValue(item))
            elif item is None or isinstance(item, Value | SequenceValue):
                values.append(item)
        for index in range(node.output_count):
            if node.has_output(index) and (index >= len(values) or values[index] is None):
                raise UnsupportedNodeError(f"output {index} ('{node.proto.output[index]}') is not supported")
        return values

    def _block(self, proto: onnx.NodeProto, reason: str) -> None:
        name = proto.name or (proto.output[0] if proto.output else "?")
        operator = f"{proto.domain}::{proto.op_type}" if normalized_domain(proto.domain) else proto.op_type
        self._blockers.append(Blocker(name, operator, reason))

    def _raise_blockers(self) -> None:
        if self._blockers:
            listed = "".join(f"\n  {blocker}" for blocker in self._blockers)
            raise UnsupportedModelError(
                f"the model cannot be imported; {len(self._blockers)} node(s) stand in the way:{listed}",
                tuple(self._blockers),
            )

    # Inputs, initializers, outputs

    def _parameters(
        self, inputs: Sequence[onnx.ValueInfoProto], shapes: Mapping[str, Sequence[int | str]]
    ) -> list[TensorValue]:
        for declared in inputs:
            if not declared.type.HasField("tensor_type") or not declared.type.tensor_type.HasField("shape"):
                kind = declared.type.WhichOneof("value") or "untyped value"
                self._blockers.append(Blocker(declared.name, "input", f"{kind} without a known rank is not supported"))
            elif declared.type.tensor_type.elem_type in (onnx.TensorProto.STRING, onnx.TensorProto.COMPLEX64):
                self._blockers.append(Blocker(declared.name, "input", "strings and complex numbers are not supported"))
        self._raise_blockers()
        dimensions = input_shapes(inputs, self.symbols, shapes)
        return [self._parameter(declared, dimensions[declared.name]) for declared in inputs]

    def _parameter(self, declared: onnx.ValueInfoProto, shape: Shape) -> TensorValue:
        element_type = declared.type.tensor_type.elem_type
        dtype = storage_dtype(element_type)
        annotation = relax.TensorType([as_expression(dimension) for dimension in shape], dtype)
        variable = relax.Var(self.identifier(declared.name), annotation)
        return TensorValue(variable, element_type if element_type in NARROW_TYPES else None)

    def _define_initializers(self, graph: onnx.GraphProto) -> None:
        for tensor in graph.initializer:
            self._environment[tensor.name] = ConstantValue(numpy_helper.to_array(tensor, self.base_directory))
        for sparse in graph.sparse_initializer:
            self._environment[sparse.values.name] = ConstantValue(constant_evaluation.dense_array(sparse))

    def _graph_output(self, name: str) -> Value:
        value = self.lookup(name)
        if isinstance(value, SequenceValue):
            raise UnsupportedModelError(f"output '{name}' is a sequence; only tensors can be outputs of a package")
        return value


def _outer_names(graph: onnx.GraphProto) -> set[str]:
    """Return the names that a subgraph and the subgraphs in it use but do not define."""
    used = {output.name for output in graph.output}
    defined = {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
    defined |= {sparse.values.name for sparse in graph.sparse_initializer}
    for node in graph.node:
        used.update(node.input)
        defined.update(node.output)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                used |= _outer_names(attribute.g)
    return used - defined - {""}


class _BlockedError(Exception):
    """A node's input depends on a node that is itself a blocker."""


def storage_dtype(element_type: int) -> str:
    """Return the dtype that values of an ONNX element type are stored as, in TVM's spelling."""
    if element_type in NARROW_TYPES:
        return NARROW_TYPES[element_type][1]
    return onnx.helper.tensor_dtype_to_np_dtype(element_type).name


def _has_subgraph(model: onnx.ModelProto) -> bool:
    """Return whether a node has a subgraph: a dataflow block cannot hold the If that may come of it."""
    nodes = [*model.graph.node, *(node for function in model.functions for node in function.node)]
    return any(attribute.HasField("g") for node in nodes for attribute in node.attribute)


def _narrow(values: Iterable[tuple[str, Value]]) -> dict[str, int]:
    return {name: value.narrow_type for name, value in values if value.narrow_type is not None}


__all__ = ["Dimension", "GraphImporter", "ImportedModel", "import_model", "storage_dtype"]
