"""Images read at positions that another tensor gives: GridSample, and the grids of AffineGrid."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

from tvm import te, tirx

from optimizer.frontend.accumulation import accumulation_dtype, cast
from optimizer.frontend.dimensions import as_expression
from optimizer.frontend.node import Node, Result
from optimizer.frontend.registry import converter


@converter("AffineGrid", since=20)
def affine_grid(node: Node) -> Result:
    """Convert AffineGrid: an affine map [N, R, R + 1] of evenly spaced positions in [-1, 1]: [N, spatial..., R]."""
    theta, size = node.input(0), node.shape_argument(1)
    spatial = size[2:]
    rank = len(spatial)
    aligned = bool(node.integer("align_corners", 0))
    if aligned and any(isinstance(length, int) and length == 1 for length in spatial):
        raise node.unsupported("align_corners on an axis of one position, which has no two corners")
    dtype = accumulation_dtype(theta.dtype)

    def grid(maps: te.Tensor) -> te.Tensor:
        def coordinate(position: tirx.Expr, length: tirx.Expr) -> tirx.Expr:
            steps = tirx.Cast(dtype, length - 1 if aligned else length)
            doubled = tirx.Cast(dtype, position * 2 if aligned else position * 2 + 1)
            return doubled / steps - tirx.const(1, dtype)

        def element(*index: tirx.Expr) -> tirx.Expr:
            batch, places, row = index[0], index[1:-1], index[-1]
            total = maps(batch, row, rank)
            # Columns are in the order x, y, z: the last spatial axis first.
            for column, (place, length) in enumerate(reversed(list(zip(places, spatial, strict=True)))):
                total = total + maps(batch, row, column) * coordinate(place, as_expression(length))
            return total

        # As many as there are maps: `size` may be an input, and say more.
        return te.compute((maps.shape[0], *map(as_expression, spatial), rank), element, name="affine_grid")

    return cast(node.compute(grid, node.cast(theta, dtype).expr).expr, dtype, theta.dtype)


@converter("GridSample", since=16)
def grid_sample(node: Node) -> Result:
    """Convert GridSample: the input at positions in [-1, 1] that a grid gives, last axis in the order x, y(, z)."""
    data, grid = node.input(0), node.input(1)
    names = {"bilinear": "linear", "bicubic": "cubic"}
    mode = node.string("mode", "bilinear" if node.version < 20 else "linear")
    mode, padding = names.get(mode, mode), node.string("padding_mode", "zeros")
    if mode not in _TAPS or padding not in ("zeros", "border", "reflection"):
        raise node.unsupported(f"mode '{mode}' with padding '{padding}'")
    dtype = accumulation_dtype(data.dtype)
    aligned = bool(node.integer("align_corners", 0))

    def taps(places: te.Tensor, lengths: Sequence[tirx.Expr]) -> list[te.Tensor]:
        borders = [_Border(length, padding, dtype, aligned=aligned) for length in lengths]
        return _taps_of_all_channels(places, borders, mode)

    def sample(image: te.Tensor, weights: te.Tensor, *pixels: te.Tensor) -> te.Tensor:
        zero, first = tirx.const(0, dtype), tirx.const(0, "int64")
        count = len(_TAPS[mode](zero, dtype)) ** len(pixels)

        def element(batch: tirx.Expr, channel: tirx.Expr, *output: tirx.Expr) -> tirx.Expr:
            total: tirx.Expr = zero
            for tap in range(count):
                at = [axis(batch, tap, *output) for axis in pixels]
                # Read unconditionally, so that vectors of outputs need no branches.
                read = image(batch, channel, tirx.max(at[0], first), *at[1:])
                total = total + tirx.Select(at[0] >= 0, read, zero) * weights(batch, tap, *output)
            return total

        return te.compute((*image.shape[:2], *weights.shape[2:]), element, name="grid_sample")

    # What all channels share is an operator of its own, so that it is stored, but for what is cheap enough to inline.
    lengths = [as_expression(length) for length in data.shape[2:]]
    call = node.graph.builder.call_te(taps, node.cast(grid, dtype).expr, lengths, primfunc_name_hint="grid_taps")
    shared = [each.expr for each in node.emit_tuple(call)]
    return cast(node.compute(sample, node.cast(data, dtype).expr, *shared).expr, dtype, data.dtype)


def _taps_of_all_channels(places: te.Tensor, borders: Sequence[_Border], mode: str) -> list[te.Tensor]:
    """Return the weights of each tap, and its index along each axis: all [N, taps, places...].

    The first index is -1, and the others are inside, where a zero stands in the place of a pixel.
    """
    axes = [_axis_taps(places, len(borders) - 1 - axis, border, mode) for axis, border in enumerate(borders)]
    count = len(_TAPS[mode](tirx.const(0, places.dtype), places.dtype))
    shape = (places.shape[0], count ** len(axes), *places.shape[1:-1])

    def of_axes(which: int, at: Sequence[tirx.Expr]) -> list[tirx.Expr]:
        batch, tap, *output = at
        numbers = [tap // count ** (len(axes) - 1 - axis) % count for axis in range(len(axes))]
        return [axis[which](batch, *output, number) for axis, number in zip(axes, numbers, strict=True)]

    def weight(*at: tirx.Expr) -> tirx.Expr:
        return functools.reduce(operator.mul, of_axes(1, at))

    def first(*at: tirx.Expr) -> tirx.Expr:
        indices = of_axes(0, at)
        return tirx.Select(tirx.all(*[index >= 0 for index in indices]), indices[0], tirx.const(-1, "int64"))

    def other(axis: int) -> Callable[..., tirx.Expr]:
        return lambda *at: tirx.max(of_axes(0, at)[axis], tirx.const(0, "int64"))

    others = [te.compute(shape, other(axis), name="index") for axis in range(1, len(axes))]
    return [te.compute(shape, weight, name="weight"), te.compute(shape, first, name="index"), *others]


def _axis_taps(places: te.Tensor, column: int, border: _Border, mode: str) -> tuple[te.Tensor, te.Tensor]:
    """Return, for each output and tap along one axis, the pixel (-1 for none) and its weight.

    Every step is a stage of its own: as one expression, the reflections of reflections take minutes to simplify.
    """
    dtype = str(places.dtype)
    shape = places.shape[:-1]
    zero = tirx.const(0, dtype)
    count = len(_TAPS[mode](zero, dtype))
    raw = te.compute(shape, lambda *at: border.position(places(*at, column)), name="position")

    def fold(*at: tirx.Expr) -> tirx.Expr:
        if mode == "cubic":
            # As in PyTorch and onnxruntime, it is the four pixels that move inside, not the position between them.
            return raw(*at)
        return border.folded(te.nearbyint(raw(*at)) if mode == "nearest" else raw(*at))

    folded = te.compute(shape, fold, name="folded")

    def pick(values: list[tirx.Expr], tap: tirx.Expr) -> tirx.Expr:
        chosen = values[-1]
        for number, value in enumerate(values[:-1]):
            chosen = tirx.Select(tap == number, value, chosen)
        return chosen

    def tap_position(*at: tirx.Expr) -> tirx.Expr:
        offsets = [tirx.const(offset, dtype) for offset, _ in _TAPS[mode](zero, dtype)]
        return te.floor(folded(*at[:-1])) + pick(offsets, at[-1])

    def tap_weight(*at: tirx.Expr) -> tirx.Expr:
        fraction = folded(*at[:-1]) - te.floor(folded(*at[:-1]))
        return pick([weight for _, weight in _TAPS[mode](fraction, dtype)], at[-1])

    wanted = te.compute((*shape, count), tap_position, name="tap_position")
    pixels = te.compute((*shape, count), lambda *at: border.pixel(wanted(*at)), name="tap_pixel")
    return pixels, te.compute((*shape, count), tap_weight, name="tap_weight")


class _Border:
    """What lies beyond the ends of one axis of `size` pixels."""

    def __init__(self, size: tirx.Expr, padding: str, dtype: str, *, aligned: bool) -> None:
        self._size = size
        self._length = tirx.Cast(dtype, size)
        self._padding = padding
        self._dtype = dtype
        self._aligned = aligned
        self._low = self._number(0.0 if aligned else -0.5)
        self._high = self._length - self._number(1.0 if aligned else 0.5)

    def _number(self, value: float) -> tirx.Expr:
        return tirx.const(value, self._dtype)

    def position(self, coordinate: tirx.Expr) -> tirx.Expr:
        """Return the pixel position of a coordinate in [-1, 1]."""
        one, half = self._number(1.0), self._number(0.5)
        if self._aligned:
            return (coordinate + one) * half * (self._length - one)
        return ((coordinate + one) * self._length - one) * half

    def folded(self, position: tirx.Expr) -> tirx.Expr:
        """Return a position outside of the borders as the padding moves it inside."""
        if self._padding == "zeros":
            return position
        outside = tirx.any(position < self._low, position > self._high)
        clamped = tirx.min(tirx.max(position, self._number(0.0)), self._length - self._number(1.0))
        moved = clamped if self._padding == "border" else self._reflected(position)
        return tirx.Select(outside, moved, position)

    def _reflected(self, position: tirx.Expr) -> tirx.Expr:
        span = tirx.max(self._high - self._low, self._number(1e-30))
        below = position < self._low
        distance = tirx.Select(below, self._low - position, position - self._high)
        times = te.floor(distance / span)
        rest = distance - times * span
        is_even = times == te.floor(times * self._number(0.5)) * self._number(2.0)
        from_low = tirx.Select(below, is_even, tirx.Not(is_even))
        reflected = tirx.Select(from_low, self._low + rest, self._high - rest)
        return tirx.Select(tirx.any(below, position > self._high), reflected, position)

    def pixel(self, position: tirx.Expr) -> tirx.Expr:
        """Return the index of a whole position, moved inside; -1 if zero stands there."""
        zero, last = self._number(0.0), self._length - self._number(1.0)
        moved = self._reflected(position) if self._padding == "reflection" else position
        index = tirx.Cast("int64", tirx.min(tirx.max(moved, zero), last))
        if self._padding != "zeros":
            return index
        return tirx.Select(tirx.all(position >= zero, position <= last), index, tirx.const(-1, "int64"))


def _nearest_taps(_: tirx.Expr, dtype: str) -> list[tuple[int, tirx.Expr]]:
    return [(0, tirx.const(1, dtype))]


def _linear_taps(fraction: tirx.Expr, dtype: str) -> list[tuple[int, tirx.Expr]]:
    return [(0, tirx.const(1, dtype) - fraction), (1, fraction)]


def _cubic_taps(fraction: tirx.Expr, dtype: str) -> list[tuple[int, tirx.Expr]]:
    """Return the weights of cubic convolution (Keys 1981, equation 15, with a = -0.75)."""
    a = -0.75

    def number(value: float) -> tirx.Expr:
        return tirx.const(value, dtype)

    def near(x: tirx.Expr) -> tirx.Expr:
        return (number(a + 2) * x - number(a + 3)) * x * x + number(1)

    def far(x: tirx.Expr) -> tirx.Expr:
        return ((number(a) * x - number(5 * a)) * x + number(8 * a)) * x - number(4 * a)

    one, two = number(1), number(2)
    return [(-1, far(fraction + one)), (0, near(fraction)), (1, near(one - fraction)), (2, far(two - fraction))]


_TAPS: dict[str, Callable[[tirx.Expr, str], list[tuple[int, tirx.Expr]]]] = {
    "nearest": _nearest_taps,
    "linear": _linear_taps,
    "cubic": _cubic_taps,
}
