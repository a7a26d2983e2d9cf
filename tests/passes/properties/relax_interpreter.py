"""An interpreter of Relax in numpy for the operators that the generated graphs become: nothing is compiled.

With `wide` floating-point arithmetic is done in float64 whatever the dtypes say, and only casts round: two ways of
writing the same function then agree to many more digits than those of their dtype; anything else is a wrong rewrite.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tvm
import tvm.ir
from tvm import relax, sym, tirx

from passes.tensor_types import is_float, numpy_dtype
from schedules.stages import substitute
from tests.passes.properties.numpy_convolutions import batch_norm, convolution, transposed_convolution


class Interpreter:
    def __init__(self, module: tvm.IRModule, *, wide: bool = False) -> None:
        self._module = module
        self._wide = wide
        self._values: dict[relax.Var, object] = {}
        self._symbols: dict[tirx.Var, tirx.Expr] = {}

    def run(self, arguments: Sequence[np.ndarray | tuple[int, ...]]) -> list[np.ndarray]:
        """Return the outputs of `main`, each of the dtype that it is declared with; a tuple stands for a shape.

        What `main` writes to its inputs in place is written to the arrays, unless arithmetic is `wide`.
        """
        function = self._module["main"]
        for parameter, argument in zip(function.params, arguments, strict=True):
            if isinstance(argument, tuple):
                self._bind_symbols(parameter.ty.values, argument)
                self._values[parameter] = argument
            else:
                self._bind_symbols(parameter.ty.shape.values, argument.shape)
                self._values[parameter] = self._widened(argument)
        with np.errstate(all="ignore"):
            for block in function.body.blocks:
                for binding in block.bindings:
                    self._values[binding.var] = self._evaluate(binding.value)
            result = self._evaluate(function.body.body)
            results = list(result) if isinstance(result, tuple) else [result]
            kinds = function.ret_ty.fields if isinstance(function.ret_ty, relax.TupleType) else [function.ret_ty]
            return [self._checked(value, kind) for value, kind in zip(results, kinds, strict=True)]

    def _checked(self, value: np.ndarray, kind: relax.TensorType) -> np.ndarray:
        expected = tuple(self._integer(dimension) for dimension in kind.shape.values)
        assert value.shape == expected, f"the value has shape {value.shape}, its type says {expected}"
        dtype = numpy_dtype(str(kind.dtype.dtype))
        if not self._wide or not is_float(str(kind.dtype.dtype)):
            assert value.dtype == dtype, f"the value is {value.dtype}, its type says {dtype}"
        return value

    def _bind_symbols(self, dimensions: Sequence[tirx.Expr], shape: Sequence[int]) -> None:
        for dimension, extent in zip(dimensions, shape, strict=True):
            if isinstance(dimension, tirx.Var):
                self._symbols[dimension] = tirx.IntImm("int64", extent)

    def _integer(self, expr: tirx.Expr | int) -> int:
        if isinstance(expr, int):
            return expr
        return int(sym.Analyzer().simplify(substitute(expr, self._symbols)))

    def _widened(self, array: np.ndarray) -> np.ndarray:
        return array.astype(np.float64) if self._wide and array.dtype.kind in "fV" else array

    def _evaluate(self, expr: relax.Expr) -> object:
        if isinstance(expr, tvm.ir.GenericConst):
            return self._widened(expr.value.numpy())
        if isinstance(expr, relax.Tuple):
            return tuple(self._evaluate(field) for field in expr.fields)
        if isinstance(expr, relax.TupleGetItem):
            return self._evaluate(expr.tuple_value)[expr.index]
        if isinstance(expr, relax.ShapeExpr):
            return tuple(self._integer(value) for value in expr.values)
        if isinstance(expr, tvm.ir.Call):
            return self._call(expr)
        if isinstance(expr, relax.Var) and expr in self._values:
            return self._values[expr]
        return self._integer(expr)

    def _call(self, call: tvm.ir.Call) -> object:
        name = call.op.name.removeprefix("relax.")
        if name == "call_tir":
            return self._call_tir(call)
        if name == "call_tir_inplace":
            return self._call_in_place(call)
        operands = [self._evaluate(operand) for operand in call.args]
        if name == "astype":
            return self._cast(operands[0], str(call.attrs.dtype))
        result = _OPERATORS[name](call, *map(_computable, operands))
        if isinstance(call.ty, relax.TupleType):
            return tuple(self._typed(value, kind) for value, kind in zip(result, call.ty.fields, strict=True))
        return self._typed(result, call.ty)

    def _typed(self, result: np.ndarray, kind: relax.TensorType) -> np.ndarray:
        dtype = str(kind.dtype.dtype)
        if is_float(dtype):
            return np.asarray(result, np.float64 if self._wide else numpy_dtype(dtype))
        return np.asarray(result).astype(numpy_dtype(dtype))

    def _call_tir(self, call: tvm.ir.Call) -> np.ndarray:
        """Run a function that the importer wrote in TIR; its operands and its result are of their own dtypes."""
        kinds = [operand.ty for operand in call.args[1].fields]
        result = call.ty_args[0]
        shape = [self._integer(dimension) for dimension in result.shape.values]
        arguments = [self._evaluate(operand) for operand in call.args[1].fields]
        arrays = [
            np.ascontiguousarray(value, numpy_dtype(str(kind.dtype.dtype))).reshape(np.shape(value))
            if isinstance(kind, relax.TensorType)
            else value
            for value, kind in zip(arguments, kinds, strict=True)
        ]
        output = tvm.runtime.empty(shape, str(result.dtype.dtype))
        function = _compiled(self._module[call.args[0]])["compiled"]
        function(*(tvm.runtime.tensor(value) if isinstance(value, np.ndarray) else value for value in arrays), output)
        return self._widened(output.numpy())

    def _call_in_place(self, call: tvm.ir.Call) -> np.ndarray:
        """Run a function that writes to the first of its operands, and return that."""
        written, *others = (self._evaluate(operand) for operand in call.args[1].fields)
        buffer = tvm.runtime.tensor(written)
        given = (tvm.runtime.tensor(np.ascontiguousarray(v)) if isinstance(v, np.ndarray) else v for v in others)
        _compiled(self._module[call.args[0]])["compiled"](buffer, *given)
        written[...] = buffer.numpy()
        return written

    def _cast(self, array: np.ndarray, dtype: str) -> np.ndarray:
        return self._widened(array.astype(numpy_dtype(dtype)))


def _computable(operand: object) -> object:
    """Return arrays of types that numpy has no products of as float32, which holds their values."""
    if isinstance(operand, tuple):
        return tuple(map(_computable, operand))
    return operand.astype(np.float32) if isinstance(operand, np.ndarray) and operand.dtype.kind == "V" else operand


_COMPILED: dict[str, tvm.runtime.Module] = {}


def _compiled(function: tirx.PrimFunc) -> tvm.runtime.Module:
    """Return the machine code of a function, compiled once for each text."""
    text = function.script()
    if text not in _COMPILED:
        named = function.with_attr("global_symbol", "compiled")
        _COMPILED[text] = tvm.compile(tvm.IRModule({"compiled": named}), "llvm")
    return _COMPILED[text]


def _axes(call: tvm.ir.Call) -> tuple[int, ...] | None:
    return None if call.attrs.axis is None else tuple(int(axis) for axis in call.attrs.axis)


def _reduced(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda call, x: function(x, axis=_axes(call), keepdims=bool(call.attrs.keepdims))


def _sum(x: np.ndarray, **options: object) -> np.ndarray:
    return np.sum(x, dtype=x.dtype, **options)


def _softmax(call: tvm.ir.Call, x: np.ndarray) -> np.ndarray:
    exponentials = np.exp(x - x.max(call.attrs.axis, keepdims=True)) if x.size else x
    return exponentials / exponentials.sum(call.attrs.axis, keepdims=True) if x.size else x


def _normalized(x: np.ndarray, axes: Sequence[int], epsilon: float, *, centered: bool = True) -> np.ndarray:
    wide = x.astype(np.float64)
    difference = wide - wide.mean(tuple(axes), keepdims=True) if centered else wide
    return difference / np.sqrt((difference * difference).mean(tuple(axes), keepdims=True) + epsilon)


def _layer_norm(call: tvm.ir.Call, x: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    return _normalized(x, [int(axis) for axis in call.attrs.axes], call.attrs.epsilon) * scale + shift


def _rms_norm(call: tvm.ir.Call, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return _normalized(x, [int(axis) for axis in call.attrs.axes], call.attrs.epsilon, centered=False) * scale


def _instance_norm(call: tvm.ir.Call, x: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    channels = (-1, *(1,) * (x.ndim - 2))
    normalized = _normalized(x, [int(axis) for axis in call.attrs.axes], call.attrs.epsilon)
    return normalized * scale.reshape(channels) + shift.reshape(channels)


def _group_norm(call: tvm.ir.Call, x: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    groups = int(call.attrs.num_groups)
    grouped = x.reshape(x.shape[0], groups, math.prod(x.shape[1:]) // groups)
    channels = (-1, *(1,) * (x.ndim - 2))
    normalized = _normalized(grouped, [2], call.attrs.epsilon).reshape(x.shape)
    return normalized * scale.reshape(channels) + shift.reshape(channels)


def _slice(x: np.ndarray, *given: tuple) -> np.ndarray:
    axes, begin, end, *rest = given
    steps = rest[0] if rest else ()
    index = [slice(None)] * x.ndim
    for position, axis in enumerate(axes):
        step = steps[position] if steps else 1
        start, stop = begin[position], end[position]
        extent = x.shape[axis]
        start = max(start + extent, -1 if step < 0 else 0) if start < 0 else min(start, extent - (step < 0))
        stop = max(stop + extent, -1) if stop < 0 else min(stop, extent)
        index[axis] = slice(start, None if stop < 0 else stop, step)
    return x[tuple(index)]


def _pad(call: tvm.ir.Call, x: np.ndarray) -> np.ndarray:
    widths = [int(width) for width in call.attrs.pad_width]
    return np.pad(x, list(zip(widths[::2], widths[1::2], strict=True)), constant_values=call.attrs.pad_value)


def _split(call: tvm.ir.Call, x: np.ndarray) -> tuple[np.ndarray, ...]:
    sections = call.attrs.indices_or_sections
    cuts = int(sections) if isinstance(sections, int | tirx.IntImm) else [int(cut) for cut in sections]
    return tuple(np.split(x, cuts, int(call.attrs.axis)))


def _rotary_embedding(call: tvm.ir.Call, x: np.ndarray, cosines: np.ndarray, sines: np.ndarray) -> np.ndarray:
    interleaved = bool(call.attrs["interleaved"])
    half = x.shape[-1] // 2
    first, second = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])

    def turned(real: np.ndarray, imaginary: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return first * real[0] - second * imaginary[0], second * real[1] + first * imaginary[1]

    def of_parts(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if table.shape[-1] == half:
            return table, table
        return (table[..., 0::2], table[..., 1::2]) if interleaved else (table[..., :half], table[..., half:])

    parts = turned(of_parts(cosines), of_parts(sines))
    return np.stack(parts, -1).reshape(x.shape) if interleaved else np.concatenate(parts, -1)


def _trailing(call: tvm.ir.Call) -> tuple[int, ...]:
    return tuple(int(axis) for axis in call.attrs.axis)


def _plain(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda call, *operands: function(*operands)


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a / b


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def _gelu(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + _erf(x / np.sqrt(2.0)))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


_PLAIN: Mapping[str, Callable[..., np.ndarray]] = {
    "abs": np.abs, "add": np.add, "ceil": np.ceil, "divide": _divide, "equal": np.equal, "erf": _erf, "exp": np.exp,
    "floor": np.floor, "greater": np.greater, "greater_equal": np.greater_equal, "isnan": np.isnan, "less": np.less,
    "less_equal": np.less_equal, "logical_and": np.logical_and, "logical_not": np.logical_not,
    "logical_or": np.logical_or, "logical_xor": np.logical_xor, "matmul": np.matmul, "maximum": np.maximum,
    "minimum": np.minimum, "multiply": np.multiply, "negative": np.negative, "nn.gelu": _gelu,
    "nn.gelu_tanh": _gelu_tanh, "nn.relu": lambda x: np.maximum(x, 0), "nn.silu": lambda x: x * _sigmoid(x),
    "not_equal": np.not_equal, "power": np.power, "reshape": np.reshape, "broadcast_to": np.broadcast_to,
    "round": np.round, "rsqrt": lambda x: 1 / np.sqrt(x), "sigmoid": _sigmoid, "sign": np.sign, "sqrt": np.sqrt,
    "subtract": np.subtract, "tanh": np.tanh, "where": np.where,
}  # fmt: skip
_OPERATORS: Mapping[str, Callable[..., np.ndarray]] = {
    **{name: _plain(function) for name, function in _PLAIN.items()},
    "arange": lambda call, *bounds: np.arange(*bounds),
    "concat": lambda call, fields: np.concatenate(fields, int(call.attrs.axis)),
    "full": lambda call, shape, value: np.full(shape, value),
    "zeros": lambda call, shape: np.zeros(shape),
    "ones": lambda call, shape: np.ones(shape),
    "expand_dims": lambda call, x: np.expand_dims(x, _trailing(call)),
    "max": _reduced(np.max),
    "mean": _reduced(np.mean),
    "min": _reduced(np.min),
    "nn.batch_norm": batch_norm,
    **{f"nn.conv{rank}d": convolution for rank in (1, 2, 3)},
    **{f"nn.conv{rank}d_transpose": transposed_convolution for rank in (1, 2, 3)},
    "nn.group_norm": _group_norm,
    "nn.instance_norm": _instance_norm,
    "nn.layer_norm": _layer_norm,
    "nn.pad": _pad,
    "nn.rms_norm": _rms_norm,
    "nn.rotary_embedding": _rotary_embedding,
    "nn.softmax": _softmax,
    "permute_dims": lambda call, x: np.transpose(x, call.attrs.axes and [int(axis) for axis in call.attrs.axes]),
    "split": _split,
    "squeeze": lambda call, x: np.squeeze(x, call.attrs.axis and _trailing(call)),
    "strided_slice": _plain(_slice),
    "sum": _reduced(_sum),
    "tile": lambda call, x: np.tile(x, [int(count) for count in call.attrs.repeats]),
}
