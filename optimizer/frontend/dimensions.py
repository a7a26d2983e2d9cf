"""Dimensions of tensors: integers, or expressions over named symbols; every dynamic dimension gets its own name."""

from __future__ import annotations

import ast
import keyword
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import numpy as np
import onnx
import tvm.ir
import tvm.sym
from tvm import tirx

from optimizer.errors import InputMismatchError

Dimension: TypeAlias = int | tvm.ir.Expr
Shape: TypeAlias = tuple[Dimension, ...]

_ANALYZER = tvm.sym.Analyzer()
_OPERATIONS = {ast.Add: "__add__", ast.Sub: "__sub__", ast.Mult: "__mul__", ast.FloorDiv: "__floordiv__"}


def as_expression(value: Dimension) -> tvm.ir.Expr:
    """Return an int64 expression for a dimension."""
    return tirx.IntImm("int64", int(value)) if isinstance(value, (int, np.integer)) else value


def simplified(value: Dimension) -> Dimension:
    """Return `value` in simplest form: an int when it is constant."""
    if isinstance(value, (bool, int, np.integer)):
        return int(value)
    result = _ANALYZER.simplify(value)
    return int(result.value) if isinstance(result, tirx.IntImm) else result


def simplified_shape(shape: Sequence[Dimension]) -> Shape:
    """Return every dimension in simplest form."""
    return tuple(simplified(dimension) for dimension in shape)


def static_shape(shape: Shape) -> tuple[int, ...] | None:
    """Return the shape as integers, or None if a dimension is symbolic."""
    integers = tuple(dimension for dimension in shape if isinstance(dimension, int))
    return integers if len(integers) == len(shape) else None


def provably_equal(left: Dimension, right: Dimension) -> bool:
    """Return whether two dimensions are equal for all values of their symbols."""
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    if _ANALYZER.can_prove_equal(as_expression(left), as_expression(right)):
        return True
    if not isinstance(left, tirx.Mul) and not isinstance(right, tirx.Mul):
        return False
    number, factors = _factored((left,))  # TVM does not see that a * b * a and a * a * b are equal
    other_number, others = _factored((right,))
    return number == other_number and len(factors) == len(others) and not _without(others, factors)


def too_large(sizes: Sequence[tvm.ir.Expr]) -> list[tvm.ir.Expr]:
    """Return values that are all zero if each size is from 0 to 2^31 - 1, and no first few of them multiply to 2^32.

    With less the number of bytes of no tensor passes what 64 bits hold, and none can be too small for what it is for.
    """
    values = [_shifted(size, 31) for size in sizes]
    total = sizes[0]
    for size in sizes[1:]:
        total = total * size
        values.append(_shifted(total, 32))
    return values


def below_zero(value: tvm.ir.Expr) -> tvm.ir.Expr:
    """Return what is -1 where a value is negative, else 0."""
    return _shifted(value, 63)


def _shifted(value: tvm.ir.Expr, bits: int) -> tvm.ir.Expr:
    # A shift and no comparison: TVM takes every symbol to be non-negative, and removes what asks whether it is.
    return tirx.shift_right(value, tirx.const(bits, "int64"))


def product(shape: Iterable[Dimension]) -> Dimension:
    """Return the number of elements of a shape."""
    result: Dimension = 1
    for dimension in shape:
        result = result * dimension
    return simplified(result)


def quotient(shape: Iterable[Dimension], divisors: Iterable[Dimension]) -> Dimension:
    """Return the number of elements of `shape` divided by the product of `divisors`, which must divide it.

    Factors on both sides are cancelled, so that the result is as simple as the dimensions are.
    """
    number, factors = _factored(shape)
    divisor, remaining = _factored(divisors)
    kept, factors = _without(remaining, factors), _without(factors, remaining)
    common = math.gcd(number, divisor) or 1
    top, bottom = product([number // common, *factors]), product([divisor // common, *kept])
    if isinstance(bottom, int) and bottom in (0, 1):
        return top if bottom else 0
    return simplified(tirx.floordiv(as_expression(top), as_expression(bottom)))


def _factored(shape: Iterable[Dimension]) -> tuple[int, list[tvm.ir.Expr]]:
    """Return the product of dimensions as an integer and factors without an integer factor of their own."""
    number, factors, waiting = 1, [], list(shape)
    while waiting:
        dimension = simplified(waiting.pop(0))
        if isinstance(dimension, int):
            number *= dimension
        elif isinstance(dimension, tirx.Mul):
            waiting = [dimension.a, dimension.b, *waiting]
        else:
            common = _integer_factor(dimension)
            number *= common
            factors.append(as_expression(simplified(tirx.floordiv(dimension, tirx.IntImm("int64", common)))))
    return number, factors


def _without(factors: Sequence[tvm.ir.Expr], removed: Sequence[tvm.ir.Expr]) -> list[tvm.ir.Expr]:
    """Return `factors` less those that equal one of `removed`, each taken once."""
    kept = list(factors)
    for factor in removed:
        match = next((index for index, other in enumerate(kept) if provably_equal(factor, other)), None)
        if match is not None:
            del kept[match]
    return kept


def _integer_factor(expression: tvm.ir.Expr) -> int:
    """Return an integer that divides a sum of products."""
    if isinstance(expression, tirx.IntImm):
        return abs(int(expression.value))
    if isinstance(expression, tirx.Mul):
        return _integer_factor(expression.a) * _integer_factor(expression.b)
    if isinstance(expression, (tirx.Add, tirx.Sub)):
        return math.gcd(_integer_factor(expression.a), _integer_factor(expression.b)) or 1
    return 1


class FixedDimension(Exception):
    """A symbolic dimension of the inputs turned out to have only one possible value."""

    def __init__(self, name: str, value: int) -> None:
        super().__init__(f"{name} = {value}")
        self.name = name
        self.value = value


class Symbols:
    """The named symbols of one model, all known to be non-negative; `fixed` names those whose value is known."""

    def __init__(self, fixed: Mapping[str, int] | None = None) -> None:
        self._fixed = dict(fixed or {})
        self._variables: dict[str, tirx.Var] = {}
        self._analyzer = tvm.sym.Analyzer()
        self._nonempty_analyzer = tvm.sym.Analyzer()

    def named(self, name: str) -> tirx.Var:
        """Return the symbol for an ONNX dimension name; the same one at every call."""
        if name not in self._variables:
            identifier = re.sub(r"\W", "_", name)
            # Sizes are written as expressions of Python.
            if not identifier or identifier[0].isdigit() or keyword.iskeyword(identifier):
                identifier = f"dim_{identifier}"
            self._variables[name] = self.fresh(identifier)
        return self._variables[name]

    def dimension(self, name: str) -> Dimension:
        """Return the value of an ONNX dimension name where it is fixed, else its symbol."""
        return self._fixed[name] if name in self._fixed else self.named(name)

    def fix(self, dimension: Dimension, value: Dimension) -> None:
        """Raise FixedDimension where `dimension` is a named symbol that has to equal an integer."""
        for name, variable in self._variables.items():
            if isinstance(value, int) and variable.same_as(dimension):
                raise FixedDimension(name, value)

    def fresh(self, hint: str) -> tirx.Var:
        """Return a new symbol of a non-negative value; `hint` is a valid identifier."""
        variable = tirx.Var(hint, "int64")
        self._analyzer.update(variable, tvm.sym.ConstIntBound(0, tvm.sym.ConstIntBound.POS_INF))
        self._nonempty_analyzer.update(variable, tvm.sym.ConstIntBound(1, tvm.sym.ConstIntBound.POS_INF))
        return variable

    def simplified_if_nonempty(self, dimension: Dimension) -> Dimension:
        """Return `dimension` in the simplest form that is right unless a symbol is 0."""
        return simplified(self._nonempty_analyzer.simplify(as_expression(dimension)))

    def proves(self, condition: tvm.ir.Expr) -> bool:
        """Return whether `condition` holds for all non-negative values of the symbols."""
        return bool(self._analyzer.can_prove(condition))


def input_shapes(
    inputs: Sequence[onnx.ValueInfoProto], symbols: Symbols, overrides: Mapping[str, Sequence[int | str]]
) -> dict[str, Shape]:
    """Return the shape of every graph input.

    A dynamic dimension is the symbol of its name. A name such as `past + sequence` is an expression if both of its
    parts name dimensions themselves. An anonymous dimension gets a name of its own, from the input and the axis.
    `overrides` gives shapes by input name (integers, or names for dimensions that stay dynamic). The size that one
    gives a dimension's name holds for the other inputs, too, as all of one name are equal.

    Raises InputMismatchError if an override names no input or has another rank, and if several make different things of
    a name that another input has.
    """
    declared = {value.name: _declared_dimensions(value) for value in inputs}
    sizes = _sizes_given(declared, overrides)
    for name, dims in declared.items():
        declared[name] = list(overrides.get(name, [sizes.get(d, d) if isinstance(d, str) else d for d in dims]))
    plain = {d for dims in declared.values() for d in dims if isinstance(d, str) and not re.search(r"[-+*/() ]", d)}
    return {
        name: tuple(d if isinstance(d, int) else _symbolic_dimension(d, plain, sizes, symbols) for d in dims)
        for name, dims in declared.items()
    }


def _sizes_given(
    declared: Mapping[str, Sequence[int | str]], overrides: Mapping[str, Sequence[int | str]]
) -> dict[str, int]:
    """Return the sizes that overrides give the names of dimensions, where they agree; raises as `input_shapes` does."""
    given: dict[str, list[int | str]] = {}
    for name, shape in overrides.items():
        if name not in declared:
            raise InputMismatchError(f"--shape names '{name}', which is no input; the inputs are {', '.join(declared)}")
        if len(shape) != len(declared[name]):
            raise InputMismatchError(f"--shape {name}: {len(shape)} dimensions given, the model has {declared[name]}")
        for known, new in zip(declared[name], shape, strict=True):
            if isinstance(known, str) and new not in given.setdefault(known, []):
                given[known].append(new)
    several = {name: " and ".join(map(str, new)) for name, new in given.items() if len(new) > 1}
    for name, dims in declared.items():
        if name not in overrides and (unclear := next((d for d in dims if d in several), None)) is not None:
            raise InputMismatchError(
                f"--shape gives '{unclear}' the sizes {several[str(unclear)]}, and '{name}' has it, too; "
                f"give the shape of '{name}'"
            )
    return {name: new[0] for name, new in given.items() if len(new) == 1 and isinstance(new[0], int)}


def _declared_dimensions(value: onnx.ValueInfoProto) -> list[int | str]:
    dimensions: list[int | str] = []
    for axis, dimension in enumerate(value.type.tensor_type.shape.dim):
        if dimension.HasField("dim_value"):
            dimensions.append(dimension.dim_value)
        else:
            dimensions.append(dimension.dim_param or f"{value.name}.dim{axis}")
    return dimensions


def _symbolic_dimension(text: str, plain: set[str], sizes: Mapping[str, int], symbols: Symbols) -> Dimension:
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        return symbols.dimension(text)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if isinstance(tree, ast.BinOp) and names <= plain | sizes.keys():
        expression = _evaluate(tree, sizes, symbols)
        if expression is not None:
            return simplified(expression)
    return symbols.dimension(text)


def _evaluate(node: ast.expr, sizes: Mapping[str, int], symbols: Symbols) -> tvm.ir.Expr | None:
    if isinstance(node, ast.Name):
        return as_expression(sizes[node.id] if node.id in sizes else symbols.dimension(node.id))
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return tirx.IntImm("int64", node.value)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = _evaluate(node.left, sizes, symbols), _evaluate(node.right, sizes, symbols)
        if left is not None and right is not None:
            return getattr(left, _OPERATIONS[type(node.op)])(right)
    return None
