"""Kernels that order or select elements by integer keys of the same order: a sort by digits, a search for the k-th."""

from __future__ import annotations

from collections.abc import Callable

import tvm.ir
from tvm import te, tirx
from tvm.script.ir_builder import tirx as ir

from optimizer.frontend.converters.kernel_loops import kernel, loops
from optimizer.frontend.dimensions import Dimension

_INT64, _KEY = "int64", "int32"
_DIGIT_BITS, _KEY_BITS = 8, 32
_DIGITS = 1 << _DIGIT_BITS
_INFINITY = 0x7F800000  # the bits of the fp32 number
_LARGEST = (1 << (_KEY_BITS - 1)) - 1
_PASSES = _KEY_BITS // _DIGIT_BITS
# Candidates that are collected before the first of them are searched for: as many as the first-level cache holds, or
# some times what is wanted.
_LEAST_CANDIDATES, _CANDIDATES = 2048, 4
# So many elements are held against the limit at once: most often none of them enters.
_BLOCK = 16


def pays_to_select(count: int, extent: Dimension) -> bool:
    """Return whether to find the `count` first of `extent` elements takes less than to sort them all."""
    return count > 0 and (not isinstance(extent, int) or extent >= 2 * count)


def sorted_by_digits(data: te.Tensor, descending: bool) -> list[te.Tensor]:
    """Return the positions along axis 1 of a tensor of rank 3 in the order of their elements, and spare memory.

    Elements of up to 32 bits become unsigned keys of the same order, each with its position below it in 64 bits, which
    are distributed by one digit of the key after the other, the lowest first (Knuth, The Art of Computer Programming
    3, 5.2.5: radix sort). The sort is stable. NaN counts as greater than any number.
    """

    def body(source: tirx.Buffer, order: tirx.Buffer, spare: tirx.Buffer) -> None:
        before, length, after = source.shape
        with loops([before, after], parallel=True) as (i, k):
            sort = _DigitSort(order, spare, i, k)
            sort.of(length, lambda j: (sort_key(source[i, j, k], descending), j))

    shape = data.shape
    return _kernel(data, [(shape, _INT64), (shape, _INT64)], body, "sorted_positions")


def selected_by_keys(data: te.Tensor, count: int, descending: bool) -> list[te.Tensor]:
    """Return the positions along axis 1 of the `count` elements that come first in a stable sort, and spare memory.

    Elements whose key is below the limit become candidates. When there is no more room for them the `count`-th of their
    keys becomes the limit, and those beyond it go. It is found bit by bit (Knuth, The Art of Computer Programming 3,
    5.2.2: radix exchange), by counting the candidates below a key in vectors. NaN counts as greater than any number.
    """
    before, length, after = data.shape
    room: tvm.ir.Expr | int = max(_LEAST_CANDIDATES, _CANDIDATES * count)
    if isinstance(length, tirx.IntImm):
        room = min(room, int(length))

    def body(
        source: tirx.Buffer, order: tirx.Buffer, spare: tirx.Buffer, keys: tirx.Buffer, places: tirx.Buffer
    ) -> None:
        with loops([source.shape[0], source.shape[2]], parallel=True) as (i, k):
            candidates = _Candidates(keys, places, i, k, count)
            candidates.collect(source.shape[1], room, lambda j: sort_key(source[i, j, k], descending))
            sort = _DigitSort(order, spare, i, k)
            sort.of(tirx.const(count, _INT64), lambda j: (keys[i, j, k], places[i, j, k]))

    first, all_candidates = (before, count, after), (before, room + _BLOCK, after)  # a vector begins before the end
    shapes = [(first, _INT64), (first, _INT64), (all_candidates, _KEY), (all_candidates, _INT64)]
    return _kernel(data, shapes, body, "selected_positions")


def _kernel(
    data: te.Tensor, results: list[tuple[tuple[tvm.ir.Expr, ...], str]], body: Callable[..., None], name: str
) -> list[te.Tensor]:
    tensors = kernel([data], [shape for shape, _ in results], [dtype for _, dtype in results], body, name)
    assert isinstance(tensors, list)
    return tensors


def sort_key(value: tvm.ir.Expr, descending: bool) -> tvm.ir.Expr:
    """Return an int32 that is in the order of the values, those that are equal having equal ones."""
    if str(value.ty.dtype).startswith(("float", "bfloat")):
        # Zeros of both signs are equal, and so are all NaN. TVM vectorizes integers, but no test for NaN.
        bits = tirx.reinterpret(_KEY, value.astype("float32"))
        magnitude = bits & tirx.const(_LARGEST, _KEY)
        signed = tirx.Select(bits < 0, tirx.const(0, _KEY) - magnitude, magnitude)
        key = tirx.Select(magnitude > _INFINITY, tirx.const(_LARGEST, _KEY), signed)
    else:
        key = value.astype(_KEY)
    return tirx.const(-1, _KEY) - key if descending else key


class _DigitSort:
    """The sort of keys and positions along axis 1 of a buffer at [i, :, k], with a spare one."""

    def __init__(self, order: tirx.Buffer, spare: tirx.Buffer, i: tirx.Var, k: tirx.Var) -> None:
        self._order, self._spare, self._i, self._k = order, spare, i, k
        self._counts = ir.alloc_buffer((_PASSES * _DIGITS,), _INT64, scope="local")
        self._total = ir.alloc_buffer((1,), _INT64, scope="local")

    def of(self, length: tvm.ir.Expr, element: Callable[[tvm.ir.Expr], tuple[tvm.ir.Expr, tvm.ir.Expr]]) -> None:
        """Emit the sort of `length` elements, given as key and position: the positions in order take their place."""
        order, counts, i, k = self._order, self._counts, self._i, self._k
        with ir.serial(0, _PASSES * _DIGITS) as digit:
            ir.buffer_store(counts, tirx.const(0, _INT64), [digit])
        with ir.serial(0, length) as j:
            key, position = element(j)
            unsigned = key.astype(_INT64) + tirx.const(1 << (_KEY_BITS - 1), _INT64)
            ir.buffer_store(order, unsigned << _KEY_BITS | position, [i, j, k])
            for number in range(_PASSES):
                own = self._digit(number, order[i, j, k])
                ir.buffer_store(counts, counts[own] + 1, [own])
        self._add_up()
        for number in range(_PASSES):
            given, taken = (order, self._spare) if number % 2 == 0 else (self._spare, order)
            with ir.serial(0, length) as j:
                own = self._digit(number, given[i, j, k])
                ir.buffer_store(taken, given[i, j, k], [i, counts[own], k])
                ir.buffer_store(counts, counts[own] + 1, [own])
        with ir.serial(0, length) as j:
            ir.buffer_store(order, order[i, j, k] & tirx.const((1 << _KEY_BITS) - 1, _INT64), [i, j, k])

    def _add_up(self) -> None:
        """Emit how counts of digits become the places where the first elements with these digits go."""
        counts, total = self._counts, self._total
        for number in range(_PASSES):
            ir.buffer_store(total, tirx.const(0, _INT64), [0])
            with ir.serial(0, _DIGITS) as digit:
                ir.buffer_store(total, total[0] + counts[number * _DIGITS + digit], [0])
                ir.buffer_store(counts, total[0] - counts[number * _DIGITS + digit], [number * _DIGITS + digit])

    @staticmethod
    def _digit(number: int, entry: tvm.ir.Expr) -> tvm.ir.Expr:
        shifted = entry >> tirx.const(_KEY_BITS + number * _DIGIT_BITS, _INT64)
        return (shifted & tirx.const(_DIGITS - 1, _INT64)) + number * _DIGITS


class _Candidates:
    """Keys and positions of candidates at [i, :, k], by ascending positions, of which the first `count` are wanted."""

    def __init__(self, keys: tirx.Buffer, places: tirx.Buffer, i: tirx.Var, k: tirx.Var, count: int) -> None:
        self._keys, self._places, self._i, self._k, self._wanted = keys, places, i, k, count
        self._number = ir.alloc_buffer((1,), _INT64, scope="local")
        self._limit, self._tried = (ir.alloc_buffer((1,), _KEY, scope="local") for _ in range(2))
        self._counts = ir.alloc_buffer((_BLOCK,), _KEY, scope="local")
        self._below = ir.alloc_buffer((2,), _INT64, scope="local")  # a count, and how many at the limit stay

    def collect(self, length: tvm.ir.Expr, room: int, key: Callable[[tvm.ir.Expr], tvm.ir.Expr]) -> None:
        """Emit the search among `length` elements, which leaves those that are wanted."""
        number, limit = self._number, self._limit
        # What is left after these are whole blocks.
        most = tirx.const(room, _INT64) - tirx.floormod(tirx.const(room, _INT64) - length, _BLOCK)
        first = tirx.min(length, most)
        vectors = tirx.floordiv(first, _BLOCK)
        with ir.serial(0, vectors) as block, ir.vectorized(0, _BLOCK) as lane:
            self._store(block * _BLOCK + lane, key(block * _BLOCK + lane), block * _BLOCK + lane)
        with ir.serial(0, first - vectors * _BLOCK) as j:
            self._store(vectors * _BLOCK + j, key(vectors * _BLOCK + j), vectors * _BLOCK + j)
        ir.buffer_store(number, first, [0])
        entering, own = (ir.alloc_buffer((size,), _KEY, scope="local") for size in (1, _BLOCK))
        with ir.serial(0, tirx.floordiv(length - first, _BLOCK)) as block:
            start = first + block * _BLOCK
            with ir.If(number[0] > room - _BLOCK), ir.Then():
                self._select()
            with ir.vectorized(0, _BLOCK) as lane:
                ir.buffer_store(own, key(start + lane), [lane])
            ir.buffer_store(entering, tirx.const(0, _KEY), [0])
            with ir.serial(0, _BLOCK) as j:
                ir.buffer_store(entering, entering[0] | tirx.Select(own[j] < limit[0], 1, 0), [0])
            with (
                ir.If(entering[0] != 0),
                ir.Then(),
                ir.serial(0, _BLOCK) as j,
                ir.If(own[j] < limit[0]),
                ir.Then(),
            ):
                self._store(number[0], own[j], start + j)
                ir.buffer_store(number, number[0] + 1, [0])
        self._select()

    def _store(self, place: tvm.ir.Expr, key: tvm.ir.Expr, position: tvm.ir.Expr) -> None:
        ir.buffer_store(self._keys, key, [self._i, place, self._k])
        ir.buffer_store(self._places, position, [self._i, place, self._k])

    def _select(self) -> None:
        """Emit how the wanted candidates are found, if there are more, and all others dropped."""
        number, limit, tried, below = self._number, self._limit, self._tried, self._below
        with ir.If(number[0] > self._wanted), ir.Then():
            with ir.serial(0, _BLOCK) as j:  # none of which is below any key
                ir.buffer_store(self._keys, tirx.const(_LARGEST, _KEY), [self._i, number[0] + j, self._k])
            ir.buffer_store(limit, tirx.const(-(1 << (_KEY_BITS - 1)), _KEY), [0])
            with ir.serial(0, _KEY_BITS) as step:
                # TVM makes 64 bits of arithmetic with a loop's variable.
                power = tirx.const(1, _INT64) << (_KEY_BITS - 1 - step).astype(_INT64)
                ir.buffer_store(tried, (limit[0].astype(_INT64) + power).astype(_KEY), [0])
                self._count_below(tried[0])
                with ir.If(below[0] < self._wanted), ir.Then():
                    ir.buffer_store(limit, tried[0], [0])
            self._count_below(limit[0])
            ir.buffer_store(below, self._wanted - below[0], [1])
            self._drop()

    def _count_below(self, key: tvm.ir.Expr) -> None:
        below, counts = self._below, self._counts
        with ir.vectorized(0, _BLOCK) as lane:
            ir.buffer_store(counts, tirx.const(0, _KEY), [lane])
        with (
            ir.serial(0, tirx.floordiv(self._number[0] + (_BLOCK - 1), _BLOCK)) as block,
            ir.vectorized(0, _BLOCK) as lane,
        ):
            is_below = self._keys[self._i, block * _BLOCK + lane, self._k] < key
            ir.buffer_store(counts, counts[lane] + tirx.Select(is_below, 1, 0), [lane])
        ir.buffer_store(below, tirx.const(0, _INT64), [0])
        with ir.serial(0, _BLOCK) as j:
            ir.buffer_store(below, below[0] + counts[j].astype(_INT64), [0])

    def _drop(self) -> None:
        """Emit how candidates below the limit move together, and as many of those at it as are wanted."""
        limit, below, kept = self._limit, self._below, ir.alloc_buffer((1,), _INT64, scope="local")
        ir.buffer_store(kept, tirx.const(0, _INT64), [0])
        with ir.serial(0, self._number[0]) as j:
            key, position = (buffer[self._i, j, self._k] for buffer in (self._keys, self._places))
            at_limit = tirx.all(key.equal(limit[0]), below[1] > 0)
            stays = tirx.any(key < limit[0], at_limit)
            self._store(kept[0], key, position)
            ir.buffer_store(kept, kept[0] + tirx.Select(stays, 1, 0).astype(_INT64), [0])
            ir.buffer_store(below, below[1] - tirx.Select(at_limit, 1, 0).astype(_INT64), [1])
        ir.buffer_store(self._number, kept[0], [0])


__all__ = ["pays_to_select", "selected_by_keys", "sort_key", "sorted_by_digits"]
