"""Fourier transforms, their windows, and mel filters: DFT, STFT, *Window, MelWeightMatrix.

A transform of known length is one matrix product with a constant matrix; another computes its angles as it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from onnx import helper
from tvm import relax, te, tirx

from optimizer.frontend.accumulation import accumulation_dtype
from optimizer.frontend.dimensions import Dimension, as_expression, simplified
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter
from optimizer.frontend.value import TensorValue, Value

_LARGEST_MATRIX_BYTES = 64 * 1024 * 1024  # beyond, the angles are computed as the transform runs


@dataclass(frozen=True)
class _Transform:
    """A DFT over `length` points; `onesided` drops (inverse: lacks) the redundant half of a real signal's spectrum."""

    length: Dimension
    inverse: bool
    onesided: bool

    @property
    def inputs(self) -> Dimension:
        """Return how many points are read; beyond, the input is cut, and a shorter one counts as padded with zeros."""
        return self._half if self.inverse and self.onesided else self.length

    @property
    def outputs(self) -> Dimension:
        """Return how many points are made."""
        return self._half if self.onesided and not self.inverse else self.length

    @property
    def channels(self) -> int:
        """Return 2 for complex results, 1 for real ones."""
        return 1 if self.inverse and self.onesided else 2

    @property
    def _half(self) -> Dimension:
        return simplified(self.length // 2 + 1)


@converter("DFT", since=17)
def dft_of_attribute_axis(node: Node) -> Result:
    """Convert DFT with its axis as an attribute."""
    return _dft(node, node.axis(1))


@converter("DFT", since=20)
def dft(node: Node) -> Result:
    """Convert DFT: the discrete Fourier transform along an axis; the last axis holds real and imaginary parts."""
    rank = node.input(0).rank
    if not node.has_input(2):
        return _dft(node, rank - 2)
    return _dft(node, node.checked_axis(int(node.constant_input(2).item()), rank))


def _dft(node: Node, axis: int) -> TensorValue:
    data = node.input(0)
    inverse, onesided = bool(node.integer("inverse", 0)), bool(node.integer("onesided", 0))
    if node.has_input(1):
        length = node.shape_argument(1)[0]
    elif inverse and onesided:
        length = simplified(2 * (data.shape[axis] - 1))
    else:
        length = data.shape[axis]
    order = [*[a for a in range(data.rank - 1) if a != axis], axis, data.rank - 1]
    moved = node.emit(relax.op.permute_dims(data.expr, order))
    result = _transformed(node, moved, _Transform(length, inverse, onesided))
    return node.emit(relax.op.permute_dims(result.expr, [int(place) for place in np.argsort(order)]))


def _transformed(node: Node, data: Value, transform: _Transform) -> Value:
    """Return the transform of [..., points, 1 or 2] along its points."""
    channels, length = data.shape[-1], transform.length
    if channels not in (1, 2):
        raise node.unsupported(f"a last axis of {channels}; it has to hold real, or real and imaginary parts")
    dtype = accumulation_dtype(data.dtype)
    wide = node.cast(data, dtype)
    given = data.shape[-2]
    if isinstance(length, int) and isinstance(given, int):
        used = min(given, transform.inputs)
        if 2 * channels * used * transform.outputs * np.dtype(dtype).itemsize <= _LARGEST_MATRIX_BYTES:
            points = wide
            if used < given:
                points = node.emit(relax.op.strided_slice(wide.expr, [data.rank - 2], [0], [used]))
            flat = node.reshape(points, (*data.shape[:-2], used * channels))
            matrix = relax.const(_matrix(transform, used, channels).astype(dtype), dtype)
            product = node.emit(relax.op.matmul(flat.expr, matrix))
            result = node.reshape(product, (*data.shape[:-2], transform.outputs, transform.channels))
            return node.cast(result, data.dtype)
    result = node.compute(lambda tensor: _summed(tensor, transform), wide.expr, primfunc_name_hint="dft")
    return node.cast(result, data.dtype)


def _matrix(transform: _Transform, used: int, channels: int) -> np.ndarray:
    """Return the matrix from [used, channels], flattened, to [outputs, 1 or 2], flattened."""
    length = transform.length
    point, output = np.arange(used)[:, None], np.arange(transform.outputs)[None, :]
    angle = (point * output % length) * (2 * math.pi / length)
    weight = np.full((used, 1), 1.0)
    if transform.inverse:
        weight /= length
    if transform.inverse and transform.onesided:
        # Every point but the first and the one in the middle stands for its mirror image too.
        weight[(point > 0) & (2 * point != length)] *= 2
    cosine, sine = weight * np.cos(angle), weight * np.sin(angle) * (1 if transform.inverse else -1)
    full = np.stack([np.stack([cosine, sine], axis=-1), np.stack([-sine, cosine], axis=-1)], axis=1)
    return full[:, :channels, :, : transform.channels].reshape(used * channels, -1)


def _summed(data: te.Tensor, transform: _Transform) -> te.Tensor:
    """Return the same product as `_matrix` gives, for lengths that are known at run time."""
    dtype = str(data.dtype)
    length = as_expression(transform.length)
    used = tirx.min(data.shape[-2], as_expression(transform.inputs))
    point = te.reduce_axis((0, used), name="point")
    one = tirx.const(1, dtype)
    # Angles are in float64: an error of theirs would grow with the length.
    turn = tirx.const(2 * math.pi, "float64") / tirx.Cast("float64", length)

    def table(function: Callable[[tirx.Expr], tirx.Expr]) -> te.Tensor:
        return te.compute((length,), lambda i: tirx.Cast(dtype, function(tirx.Cast("float64", i) * turn)))

    cosines, sines = table(te.cos), table(te.sin)

    def element(*index: tirx.Expr) -> tirx.Expr:
        leading, output, part = index[:-2], index[-2], index[-1]
        step = tirx.floormod(point * output, length)
        weight = one / tirx.Cast(dtype, length) if transform.inverse else one
        if transform.inverse and transform.onesided:
            single = tirx.any(point == 0, point * 2 == length)
            weight = tirx.Select(single, weight, weight * tirx.const(2, dtype))
        cosine, sine = cosines(step), sines(step) * (one if transform.inverse else -one)
        real = data(*leading, point, 0)
        total = tirx.Select(part == 0, real * cosine, real * sine)
        if int(data.shape[-1]) == 2:
            imaginary = data(*leading, point, 1)
            total = total + tirx.Select(part == 0, -imaginary * sine, imaginary * cosine)
        return te.sum(weight * total, axis=point)

    shape = (*data.shape[:-2], as_expression(transform.outputs), as_expression(transform.channels))
    return te.compute(shape, element, name="dft")


@converter("STFT", since=17)
def stft(node: Node) -> Result:
    """Convert STFT: the DFT of overlapping, weighted frames of a signal [B, L, 1 or 2]: [B, frames, points, 2]."""
    signal, window = node.input(0), node.optional_input(2)
    if signal.rank == 2:
        signal = node.reshape(signal, (*signal.shape, 1))
    step = node.shape_argument(1)[0]
    if node.has_input(3):
        length = node.shape_argument(3)[0]
    else:
        length = window.shape[0] if window is not None else signal.shape[1]
    count = simplified((signal.shape[1] - length) // step + 1)
    operands = [signal.expr]
    if window is not None:
        operands.append(node.cast(window, signal.dtype).expr)

    def frame(samples: te.Tensor, *weights: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Expr) -> tirx.Expr:
            batch, number, offset, channel = index
            value = samples(batch, number * step + offset, channel)
            return value * weights[0](offset) if weights else value

        shape = (samples.shape[0], as_expression(count), as_expression(length), samples.shape[2])
        return te.compute(shape, element, name="frames")

    frames = node.compute(frame, *operands, primfunc_name_hint="frames")
    return _transformed(node, frames, _Transform(length, inverse=False, onesided=bool(node.integer("onesided", 1))))


_WINDOWS = {
    "HannWindow": (0.5, 0.5, 0.0),
    "HammingWindow": (25 / 46, 21 / 46, 0.0),
    "BlackmanWindow": (0.42, 0.5, 0.08),
}


@converter(*_WINDOWS, since=17)
def cosine_window(node: Node) -> Result:
    """Convert the windows a - b cos(2 pi i / n) + c cos(4 pi i / n), n one less unless the window is periodic."""
    size = node.shape_argument(0)[0]
    intervals = size if node.integer("periodic", 1) else simplified(size - 1)
    dtype = helper.tensor_dtype_to_np_dtype(node.integer("output_datatype", 1)).name
    factors = [tirx.const(factor, "float64") for factor in _WINDOWS[node.operator]]

    def window() -> te.Tensor:
        turn = tirx.const(2 * math.pi, "float64") / tirx.Cast("float64", as_expression(intervals))

        def element(i: tirx.Expr) -> tirx.Expr:
            once, twice = (te.cos(tirx.Cast("float64", index) * turn) for index in (i, i * 2))
            return tirx.Cast(dtype, factors[0] - factors[1] * once + factors[2] * twice)

        return te.compute((as_expression(size),), element, name="window")

    return node.compute(window)


@converter("MelWeightMatrix", since=17)
def mel_weight_matrix(node: Node) -> Result:
    """Convert MelWeightMatrix: triangular filters, equally spaced in mel, as [dft_length // 2 + 1, num_mel_bins].

    mel = 2595 log10(1 + f / 700); computed in float64, since filters begin and end at whole bins.
    """
    bins, length = node.shape_argument(0)[0], node.shape_argument(1)[0]
    dtype = helper.tensor_dtype_to_np_dtype(node.integer("output_datatype", 1)).name
    scalars = [node.reshape(node.input(index), ()) for index in (2, 3, 4)]
    operands = [node.cast(value, "float64").expr for value in scalars]
    rows, columns = simplified(length // 2 + 1), bins
    scale = 2595 / math.log(10)

    def number(value: float) -> tirx.Expr:
        return tirx.const(value, "float64")

    def filters(rate: te.Tensor, lowest: te.Tensor, highest: te.Tensor) -> te.Tensor:
        def edge(position: tirx.Expr) -> tirx.Expr:
            """Return the spectrum bin that the edge number `position` of the filters falls into."""
            low, high = (number(scale) * te.log(number(1) + hertz() / number(700)) for hertz in (lowest, highest))
            step = (high - low) / tirx.Cast("float64", as_expression(columns) + 2)
            mel = tirx.Cast("float64", position) * step + low
            hertz = number(700) * (te.exp(mel / number(scale)) - number(1))
            return tirx.Cast("int64", te.floor(tirx.Cast("float64", as_expression(length) + 1) * hertz / rate()))

        def element(row: tirx.Expr, column: tirx.Expr) -> tirx.Expr:
            left, center, right = edge(column), edge(column + 1), edge(column + 2)

            def share(part: tirx.Expr, whole: tirx.Expr) -> tirx.Expr:
                return tirx.Cast("float64", part) / tirx.Cast("float64", tirx.max(whole, tirx.const(1, "int64")))

            rising = tirx.Select(center == left, number(1), share(row - left, center - left))
            value = tirx.Select(tirx.all(row >= left, row <= center), rising, number(0))
            falls = tirx.all(row >= center, row < right)
            return tirx.Cast(dtype, tirx.Select(falls, share(right - row, right - center), value))

        return te.compute((as_expression(rows), as_expression(columns)), element, name="mel_weight_matrix")

    return node.compute(filters, *operands, primfunc_name_hint="mel_weight_matrix")
