"""Attention recognised among Relax operators, whichever way an exporter wrote it."""

from __future__ import annotations

from dataclasses import dataclass

import tvm
import tvm.ir
from tvm import relax, tirx

from passes.attention_elements import ELEMENTWISE, FLOAT, NARROW, Elements, Value
from passes.base import Dataflow, Refusal
from passes.tensor_types import dtype_of, equal_shapes, is_one, shape_of
from passes.views import Digit, Element, Index, behind_view, broadcast, whole
from schedules.cache_pages import READS_IN_PLACE

# What attention of these types computes in fp32: only operands and results are rounded to them.
COMPUTED = (FLOAT, *NARROW)


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention over `axes`, those of the result, `key` and `depth`; `column` is the result's axis of values.

    `query`, `keys` and `values` are elements of the operands, which are all among `tensors`; `logit` is what the
    softmax is taken of, and finds the score behind the tensors. All three are fp32; `dtype` is that of the result.
    `sink` is one more logit of each row, for which there is no value (Xiao et al., Efficient Streaming Language Models
    with Attention Sinks, 2023); None where the softmax is over the keys alone.
    `symbols` are the symbolic sizes that occur, `parts` the products and the softmax.
    """

    axes: tuple[Digit, ...]
    column: Digit
    key: Digit
    depth: Digit
    query: Value
    keys: Value
    values: Value
    logit: Value
    tensors: tuple[relax.Expr, ...]
    symbols: tuple[tvm.ir.Var, ...]
    zero_if_empty: bool
    parts: tuple[relax.Expr, ...]
    dtype: str
    sink: Value | None = None


class Matcher:
    """Follows one attention from its second product up."""

    def __init__(self, dataflow: Dataflow, module: tvm.IRModule) -> None:
        self._dataflow = dataflow
        self._module = module
        self._zero_if_empty = False
        self._parts: list[relax.Expr] = []
        self._sink: Element | None = None

    def match(self, result: relax.Var, product: relax.Var) -> Attention | None:
        """Return the attention that ends in `product`, with axes as in `result`; None where there is no softmax.

        Raises Refusal where there is one, but the whole cannot be fused.
        """
        call = self._call(product, "relax.matmul")
        weights, values = call.args
        softmax = self._softmax_above(weights)
        if softmax is None:
            return None
        self._parts = [result, product, softmax]
        shape, value_shape, weight_shape = (_known_shape(expr) for expr in (result, values, weights))
        if is_one(weight_shape[-1]) or is_one(value_shape[-1]):
            raise Refusal("there is one key or one column of values only")
        axes = tuple(Digit(tirx.Var(f"axis{n}", "int64"), extent) for n, extent in enumerate(shape))
        key = Digit(tirx.Var("key", "int64"), weight_shape[-1])
        place = self._behind(result, tuple(whole(axis) for axis in axes), product)
        *batch, row, column = place
        if len(column) != 1 or not any(column[0] is axis for axis in axes):
            raise Refusal("the axis of the values is split or joined with another one")
        elements = Elements(self._dataflow, key=key.value, turned=[digit.value for digit in row])
        value, scale = self._operand(elements, values, (*broadcast(batch, value_shape[:-2]), (key,), column))
        normalized, place = self._normalized(weights, (*broadcast(batch, weight_shape[:-2]), row, (key,)))
        if len(place[-1]) != 1 or place[-1][0] is not key:
            raise Refusal("the softmax normalizes another axis than the one that the product adds up")
        return self._with_scores(elements, normalized, place, (axes, column[0], key), (value, scale))

    def _with_scores(
        self,
        elements: Elements,
        logits: relax.Expr,
        place: tuple[Index, ...],
        digits: tuple[tuple[Digit, ...], Digit, Digit],
        values: tuple[Value, float],
    ) -> Attention:
        axes, column, key = digits
        scores = self._scores_above(logits)
        if scores is None:
            raise Refusal("what the softmax normalizes does not come from a product by elementwise operators")
        self._parts.append(scores)
        found: list[tuple[Index, ...]] = []
        scale = [1.0]

        def special(expr: relax.Expr, indices: tuple[Index, ...]) -> Value | None:
            if not self._dataflow.producer(expr).same_as(scores):
                return None
            found.append(indices)
            return lambda tensors, at: _scaled(tensors[-1](at), scale[0])

        elements.special = special
        logit = elements.value(logits, place)
        sink = None if self._sink is None else elements.value(self._sink.tensor, self._sink.indices)
        if len(found) != 1:
            raise Refusal("the scores are read more than once on their way to the softmax, or through a gather")
        *batch, row, last = found[0]
        if len(last) != 1 or last[0] is not key:
            raise Refusal("the scores' keys are not in the order of the softmax's axis")
        left, right = scores.args
        left_shape, right_shape = _known_shape(left), _known_shape(right)
        depth = Digit(tirx.Var("depth", "int64"), left_shape[-1])
        if is_one(depth.extent):
            raise Refusal("the products are of one number only")
        query, left_scale = self._operand(elements, left, (*broadcast(batch, left_shape[:-2]), row, (depth,)))
        keys, right_scale = self._operand(elements, right, (*broadcast(batch, right_shape[:-2]), (depth,), (key,)))
        scale[0] = left_scale * right_scale
        if values[1] != 1.0:
            raise Refusal("the values are scaled")
        own = [axis.value for axis in (*axes, key, depth)]
        extents = [digit.extent for digit in (*axes, key, depth)]
        return Attention(
            axes, column, key, depth, query, keys, values[0], logit, tuple(elements.tensors),
            tuple(elements.symbols(own, extents)), self._zero_if_empty, tuple(self._parts),
            dtype_of(self._parts[0]) or FLOAT, sink,
        )  # fmt: skip

    def _call(self, expr: relax.Expr, *operators: str) -> tvm.ir.Call:
        call = self._dataflow.call(expr, *operators)
        assert call is not None
        return call

    def _behind(self, expr: relax.Expr, indices: tuple[Index, ...], goal: relax.Expr) -> tuple[Index, ...]:
        """Return the element of `goal` that an element of its view `expr` is."""
        element = Element(expr, indices)
        while not element.tensor.same_as(goal):
            rounded = self._dataflow.call(element.tensor, "relax.astype")
            if rounded is not None:
                element = Element(rounded.args[0], element.indices)
                continue
            viewed = behind_view(element, self._dataflow)
            if viewed is None:
                raise Refusal("the result is rearranged in a way that cannot be followed")
            element = viewed
        return element.indices

    def _softmax_above(self, expr: relax.Expr) -> tvm.ir.Call | None:
        """Return the softmax whose result, seen through views, casts and the replacement of NaN, is `expr`."""
        while True:
            call = self._dataflow.call(
                expr, "relax.nn.softmax", "relax.reshape", "relax.astype", "relax.where", "relax.permute_dims",
                "relax.expand_dims", "relax.squeeze", "relax.broadcast_to", "relax.strided_slice",
            )  # fmt: skip
            if call is None or call.op.name == "relax.nn.softmax":
                return call
            expr = call.args[2] if call.op.name == "relax.where" else call.args[0]

    def _normalized(self, expr: relax.Expr, indices: tuple[Index, ...]) -> tuple[relax.Expr, tuple[Index, ...]]:
        """Return what the softmax that `expr` leads to normalizes, and the place in it."""
        element = Element(expr, indices)
        guarded = False
        while True:
            if not guarded:  # the test for NaN reads what it guards, too
                self._require_one_reader(element.tensor, "the probabilities have")
            with_sink = self._beside_sink(element)
            if with_sink is not None:
                return with_sink
            viewed = behind_view(element, self._dataflow)
            if viewed is not None:
                element = viewed
                continue
            call = self._dataflow.call(element.tensor, "relax.nn.softmax", "relax.astype", "relax.where")
            if call is None:
                raise Refusal("the probabilities are rearranged in a way that cannot be followed")
            source = call.args[0]
            if call.op.name == "relax.nn.softmax":
                self._check_softmax(call)
                return source, element.indices
            guarded = call.op.name == "relax.where"
            if guarded:
                source = self._without_nan(call)
            element = Element(source, element.indices)

    def _check_softmax(self, call: tvm.ir.Call) -> None:
        if int(call.attrs.axis) % call.ty.ndim != call.ty.ndim - 1:
            raise Refusal("the softmax is not over the last axis")
        if dtype_of(call) not in COMPUTED:
            raise Refusal(f"the softmax computes in {dtype_of(call)}")
        self._require_one_reader(call.args[0], "what the softmax normalizes has")

    def _beside_sink(self, element: Element) -> tuple[relax.Expr, tuple[Index, ...]] | None:
        """Return x of softmax([x sink]) without its last column, and the place in it; note the element of the sink."""
        kept = self._dataflow.call(element.tensor, "relax.strided_slice")
        softmax = None if kept is None else self._without_cast(kept.args[0], "relax.nn.softmax")
        joined = None if softmax is None else self._without_cast(softmax.args[0], "relax.concat")
        if kept is None or softmax is None or joined is None or not isinstance(joined.args[0], relax.Tuple):
            return None
        fields, last = tuple(joined.args[0].fields), joined.ty.ndim - 1
        shapes = [shape_of(field) for field in fields]
        if len(fields) != 2 or joined.attrs.axis is None or int(joined.attrs.axis) % joined.ty.ndim != last:
            return None
        own = shapes[1]
        if own is None or not is_one(own[-1]) or not _keeps_all_but_last(kept, shapes[0]):
            return None
        self._check_softmax(softmax)
        self._require_one_reader(kept.args[0], "the probabilities have")
        self._require_one_reader(softmax.args[0], "what the softmax normalizes has")
        self._sink = Element(fields[1], (*element.indices[:-1], ()))
        return fields[0], element.indices

    def _without_cast(self, expr: relax.Expr, operator: str) -> tvm.ir.Call | None:
        """Return the call of an operator that an expression is, or that it is a cast of between floats."""
        call = self._dataflow.call(expr, operator, "relax.astype")
        if call is None or call.op.name == operator:
            return call
        source = call.args[0]
        both = dtype_of(source) in COMPUTED and dtype_of(call) in COMPUTED and self._dataflow.read_once(source)
        return self._dataflow.call(source, operator) if both else None

    def _without_nan(self, call: tvm.ir.Call) -> relax.Expr:
        """Return x of where(isnan(x), 0, x), in which 16-bit numbers may be widened to be tested."""
        condition, zero, kept = call.args
        test = self._dataflow.call(condition, "relax.isnan")
        replacement = self._dataflow.producer(zero)
        is_zero = isinstance(replacement, tvm.ir.GenericConst) and not replacement.value.numpy().any()
        if test is None or not is_zero or not self._is_or_widens(test.args[0], kept):
            raise Refusal("the probabilities are chosen by a condition")
        self._zero_if_empty = True
        return kept

    def _require_one_reader(self, expr: relax.Expr, what: str) -> None:
        if not self._dataflow.read_once(expr):
            raise Refusal(f"{what} another reader")

    def _is_or_widens(self, expr: relax.Expr, narrow: relax.Expr) -> bool:
        cast = self._dataflow.call(expr, "relax.astype")
        return self._same(expr, narrow) or (
            cast is not None and dtype_of(cast) == FLOAT and self._same(cast.args[0], narrow)
        )

    def _same(self, left: relax.Expr, right: relax.Expr) -> bool:
        return self._dataflow.producer(left).same_as(self._dataflow.producer(right))

    def _scores_above(self, expr: relax.Expr) -> tvm.ir.Call | None:
        """Return the product that elementwise operators and views make `expr` of: the first found from the left."""
        call = self._dataflow.call(expr, "relax.matmul", "relax.reshape", "relax.permute_dims", *ELEMENTWISE)
        if call is None or call.op.name == "relax.matmul":
            return call
        for operand in call.args:
            scores = self._scores_above(operand)
            if scores is not None:
                return scores
        return None

    def _operand(self, elements: Elements, expr: relax.Expr, indices: tuple[Index, ...]) -> tuple[Value, float]:
        """Return the element of a product's operand behind views and constant factors, and the factors' product.

        An operand that is widened to fp32, as a cache of 16-bit floats is, is read narrow and widened one by one.
        """
        element, scale = Element(expr, indices), 1.0
        while True:
            viewed = behind_view(element, self._dataflow)
            if viewed is not None:
                element = viewed
                continue
            reader = self._reader_in_place(element.tensor)
            if reader is not None:
                return elements.read_through(*reader, element.indices), scale
            widened = self._dataflow.call(element.tensor, "relax.astype")
            if widened is not None and dtype_of(widened) == FLOAT and dtype_of(widened.args[0]) in NARROW:
                element = Element(widened.args[0], element.indices)
                continue
            call = self._dataflow.call(element.tensor, "relax.multiply", "relax.divide")
            factor = None if call is None else self._number(call.args[1])
            if call is None or factor is None or dtype_of(call) not in COMPUTED:
                return elements.read(element.tensor, element.indices), scale
            scale = scale * factor if call.op.name == "relax.multiply" else scale / factor
            element = Element(call.args[0], element.indices)

    def _reader_in_place(self, expr: relax.Expr) -> tuple[tvm.ir.Call, tirx.PrimFunc] | None:
        """Return the call that reads elements of a cache where they lie, and the function that it calls."""
        call = self._dataflow.call(expr, "relax.call_tir")
        if call is None or READS_IN_PLACE not in (self._module[call.args[0]].attrs or {}):
            return None
        return call, self._module[call.args[0]]

    def _number(self, expr: relax.Expr) -> float | None:
        constant = self._dataflow.producer(expr)
        if not isinstance(constant, tvm.ir.GenericConst) or constant.value.numpy().size != 1:
            return None
        number = float(constant.value.numpy().reshape(()))
        return number or None


def _keeps_all_but_last(call: tvm.ir.Call, shape: tuple[tvm.ir.Expr, ...] | None) -> bool:
    """Return whether a slice is the front part of the last axis that has `shape`."""
    axes, begin = (tuple(part.fields) for part in call.args[1:3])
    if len(axes) != 1 or not all(isinstance(number, tirx.IntImm) for number in (*axes, *begin)):
        return False
    return (
        int(axes[0]) % call.ty.ndim == call.ty.ndim - 1 and int(begin[0]) == 0 and equal_shapes(shape_of(call), shape)
    )


def _scaled(score: tvm.ir.Expr, scale: float) -> tvm.ir.Expr:
    return score if scale == 1.0 else score * tirx.const(scale, FLOAT)


def _known_shape(expr: relax.Expr) -> tuple[tvm.ir.Expr, ...]:
    shape = shape_of(expr)
    if shape is None or len(shape) < 2:
        raise Refusal("a shape is not known, or of less than two dimensions")
    if dtype_of(expr) not in COMPUTED:
        raise Refusal(f"the products are of {dtype_of(expr)}")
    return shape
