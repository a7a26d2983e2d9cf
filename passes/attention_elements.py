"""Elements of Relax expressions as TIR: what attention does to a score, evaluated where the score is computed.

Values of 16-bit floats are widened to fp32, and what is computed of them stays fp32. Only a cast to 16 bits of what is
no score is kept, as a rounding: a mask's lowest fp32 number is minus infinity in fp16.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import tvm.ir
from tvm import relax, sym, te, tirx

from passes.base import Dataflow, require
from passes.tensor_types import shape_of
from passes.views import Element, Index, behind_view, broadcast, position
from schedules.stage_parsing import parse
from schedules.stages import Stage, bind, replace_loads, substitute, variables_of

# Values of the symbols and axes that an element is written in, and the tensors that it reads.
Substitution = Mapping[tvm.ir.Var, tvm.ir.Expr]
Value = Callable[[Sequence[te.Tensor], Substitution], tvm.ir.Expr]

FLOAT = "float32"
NARROW = ("float16", "bfloat16")

# Deeper expressions are stored rather than evaluated for every score.
MOST_OPERATIONS = 24

_BINARY: dict[str, Callable[[tvm.ir.Expr, tvm.ir.Expr], tvm.ir.Expr]] = {
    "relax.add": lambda a, b: a + b,
    "relax.subtract": lambda a, b: a - b,
    "relax.multiply": lambda a, b: a * b,
    "relax.divide": lambda a, b: a / b,
    "relax.maximum": tirx.max,
    "relax.minimum": tirx.min,
    "relax.less": lambda a, b: a < b,
    "relax.less_equal": lambda a, b: a <= b,
    "relax.greater": lambda a, b: a > b,
    "relax.greater_equal": lambda a, b: a >= b,
    "relax.equal": lambda a, b: a.equal(b),
    "relax.not_equal": tirx.NE,
    "relax.logical_and": tirx.And,
    "relax.logical_or": tirx.Or,
}
_UNARY: dict[str, Callable[[tvm.ir.Expr], tvm.ir.Expr]] = {
    "relax.logical_not": tirx.Not,
    "relax.tanh": tirx.tanh,
    "relax.negative": lambda a: tirx.const(0, str(a.ty.dtype)) - a,
}
_CREATION = {"relax.zeros": 0, "relax.ones": 1}
ELEMENTWISE = (*_BINARY, *_UNARY, "relax.astype", "relax.where")


@dataclass
class Elements:
    """Turns expressions into values of their elements, and collects the tensors that these read in `tensors`.

    `special` maps expressions, by their producing call, to values that stand for them. `turned` are the axes that are
    to be contiguous where a tensor has them before `key`: such a tensor is handed over with its last two axes swapped.
    """

    dataflow: Dataflow
    special: Callable[[relax.Expr, tuple[Index, ...]], Value | None] = lambda expr, indices: None
    key: tvm.ir.Var | None = None
    turned: Sequence[tvm.ir.Var] = ()
    tensors: list[relax.Expr] = field(default_factory=list)
    operations: int = 0
    scores: int = 0
    mentioned: list[tvm.ir.Expr] = field(default_factory=list)

    def symbols(self, axes: Sequence[tvm.ir.Var], extents: Sequence[tvm.ir.Expr]) -> list[tvm.ir.Var]:
        """Return the symbolic sizes in the tensors' shapes, in what was evaluated and in `extents`: all but `axes`."""
        shapes = [extent for tensor in self.tensors for extent in shape_of(tensor) or ()]
        found = [variable for e in (*shapes, *extents, *self.mentioned) for variable in variables_of(e)]
        return [variable for variable in dict.fromkeys(found) if variable not in axes]

    def value(self, expr: relax.Expr, indices: tuple[Index, ...]) -> Value:
        """Return the value of the element of `expr` at `indices`: evaluated where that is cheap, read elsewhere.

        Raises Refusal where what would be read is made of a score.
        """
        given = self.special(expr, indices)
        if given is not None:
            self.scores += 1
            return given
        mark = len(self.tensors), self.operations, self.scores
        evaluated = self._evaluated(expr, indices)
        if evaluated is not None and self.operations <= MOST_OPERATIONS:
            return evaluated
        require(self.scores == mark[2], "so much is done to a score that it would have to be stored")
        del self.tensors[mark[0] :]
        self.operations = mark[1]
        return self.read(expr, indices)

    def read(self, expr: relax.Expr, indices: tuple[Index, ...]) -> Value:
        """Return a read of `expr`, which is computed and stored before."""
        positions = Element(expr, indices).positions()
        if self._is_to_be_turned(positions):
            rank = len(positions)
            expr = relax.op.permute_dims(expr, [*range(rank - 2), rank - 1, rank - 2])
            positions = [*positions[:-2], positions[-1], positions[-2]]
        self.mentioned += positions
        number = self._number_of(expr)

        def load(tensors: Sequence[te.Tensor], values: Substitution) -> tvm.ir.Expr:
            return _widened(tensors[number](*(substitute(place, values) for place in positions)))

        return load

    def read_through(self, call: tvm.ir.Call, function: tirx.PrimFunc, indices: tuple[Index, ...]) -> Value:
        """Return the element that a call of `function`, which computes each element on its own, would store."""
        staged = parse(function)
        assert staged is not None
        (stage,) = staged.stages
        assert isinstance(stage, Stage)
        numbers: list[tuple[tvm.ir.Var, int]] = []
        values = bind(stage.indices, Element(call, indices).positions())
        for parameter, argument in zip(function.params, call.args[1].fields, strict=False):
            if isinstance(argument.ty, relax.TensorType):
                numbers.append((parameter, self._number_of(argument)))
                values.update(_sizes(parameter.shape, shape_of(argument) or ()))
            else:
                values[parameter] = argument
        value = substitute(stage.value, values)
        self.mentioned += values.values()

        def read(tensors: Sequence[te.Tensor], at: Substitution) -> tvm.ir.Expr:
            def load(own: tvm.ir.TensorLoad) -> tvm.ir.Expr:
                number = next(number for parameter, number in numbers if parameter.same_as(own.source))
                # A row's place in a cache may be read, too: a load among the indices of another one.
                return tensors[number](*(replace_loads(place, load) for place in own.indices))

            return replace_loads(substitute(value, at), load)

        return read

    def _number_of(self, tensor: relax.Expr) -> int:
        """Return the place of a tensor among those that are read."""
        number = next((n for n, other in enumerate(self.tensors) if other.same_as(tensor)), len(self.tensors))
        if number == len(self.tensors):
            self.tensors.append(tensor)
        return number

    def _is_to_be_turned(self, positions: Sequence[tvm.ir.Expr]) -> bool:
        if len(positions) < 2 or self.key is None or not positions[-1].same_as(self.key):
            return False
        return any(positions[-2].same_as(axis) for axis in self.turned)

    def _evaluated(self, expr: relax.Expr, indices: tuple[Index, ...]) -> Value | None:
        viewed = behind_view(Element(expr, indices), self.dataflow)
        if viewed is not None:
            return self.value(viewed.tensor, viewed.indices)
        producer = self.dataflow.producer(expr)
        if isinstance(producer, tvm.ir.GenericConst):
            return _constant(producer)
        if not isinstance(producer, tvm.ir.Call) or not isinstance(producer.op, tvm.ir.Op):
            return None
        name = producer.op.name
        if name == "relax.arange":
            return self._arange(producer, indices)
        if name in _CREATION:
            dtype = _computed_in(str(expr.ty.dtype.dtype))
            return lambda tensors, values: tirx.const(_CREATION[name], dtype)
        if name not in ELEMENTWISE:
            return None
        self.operations += 1
        scores = self.scores
        operands = [self._operand(argument, indices) for argument in producer.args]
        if any(operand is None for operand in operands):
            return None
        parts = [operand for operand in operands if operand is not None]
        combine = _combination(producer, of_scores=self.scores > scores)
        return lambda tensors, values: combine(*(part(tensors, values) for part in parts))

    def _arange(self, call: tvm.ir.Call, indices: tuple[Index, ...]) -> Value | None:
        start, _, step = call.args
        dtype = str(call.attrs.dtype)
        if not dtype.startswith("int"):
            return None
        place = sym.Analyzer().simplify(start + position(indices[0]) * step)
        self.mentioned.append(place)
        return lambda tensors, values: substitute(place, values).astype(dtype)

    def _operand(self, expr: relax.Expr, indices: tuple[Index, ...]) -> Value | None:
        shape = shape_of(expr)
        return None if shape is None else self.value(expr, tuple(broadcast(indices, shape)))


def _sizes(own: Sequence[tvm.ir.Expr], actual: Sequence[tvm.ir.Expr]) -> dict[tvm.ir.Var, tvm.ir.Expr]:
    """Return the sizes that a function names by variables of its own."""
    return {name: size for name, size in zip(own, actual, strict=True) if isinstance(name, tvm.ir.Var)}


def _combination(call: tvm.ir.Call, *, of_scores: bool) -> Callable[..., tvm.ir.Expr]:
    name = call.op.name
    if name == "relax.astype":
        dtype = str(call.attrs.dtype)
        if dtype in NARROW and of_scores:
            return lambda value: value.astype(FLOAT)
        return lambda value: _widened(value.astype(dtype))
    if name == "relax.where":
        return tirx.Select
    if name in _UNARY:
        return _UNARY[name]
    return _BINARY[name]


def _computed_in(dtype: str) -> str:
    return FLOAT if dtype in NARROW else dtype


def _widened(value: tvm.ir.Expr) -> tvm.ir.Expr:
    return value.astype(FLOAT) if str(value.ty.dtype) in NARROW else value


def _constant(constant: tvm.ir.GenericConst) -> Value | None:
    """Return the value of a constant of which all elements are one number; None for others, which are read."""
    array = constant.value.numpy()
    if array.size != 1 and not (array.size and np.ptp(array.astype(np.float64)) == 0 and array.size <= 1 << 16):
        return None
    number, dtype = array.reshape(-1)[0].item(), _computed_in(str(array.dtype))
    return lambda tensors, values: tirx.const(number, dtype)
