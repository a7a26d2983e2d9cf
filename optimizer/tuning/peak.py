"""What a machine does at best: kernels that multiply and add in registers, copy, or read, and do nothing of use.

The time of as much of their work as a kernel has is the least that it can take.
"""

# TVMScript writes shapes where types stand.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import ml_dtypes
import numpy as np
import tvm
from numpy.typing import NDArray
from tvm.script import tirx as T  # noqa: N812 - as TVM writes it

from optimizer.tuning.tile_peak import tile_products
from schedules.intrin.bf16_dot import PAIR, bf16_dot
from schedules.intrin.integer_dot import integer_dot
from schedules.intrin.llvm_call import splat
from schedules.intrin.matrix_tiles import matrix_tiles
from schedules.loops import prefetch
from targets.base import Target

# Independent chains of multiply-adds: more than latency (4 cycles) times two units, and fewer than there are registers.
_CHAINS, _CHAINS_OF_FEW_REGISTERS = 24, 12
# Steps of dot products after which elements are read again.
_ELEMENTS = 64
# How far ahead of its use each of several parts is asked for.
_AHEAD_BYTES = 1024

Array = NDArray[np.generic]
# What is multiplied: fp32 (and whatever is widened to it), pairs of bfloat16, or integers of 8 bits.
Operands = Literal["float32", "bfloat16", "integer"]
Work = tuple[tvm.tirx.PrimFunc, list[Array]]


def multiply_add(target: Target, work: int, threads: int) -> Work:
    """Return a function of `work` floating-point operations, two to a multiply-add, in fp32, and its arguments."""
    lanes, chains = target.vector_lanes(32), _chains(target)
    steps = max(1, work // (2 * lanes * chains * threads))

    @T.prim_func(s_tir=True)
    def spin(factors: T.Buffer((lanes * 2,), "float32"), sums: T.Buffer((threads, chains, lanes), "float32")) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        with T.sblock("root"):
            for thread in T.parallel(threads):
                with T.sblock("thread"):
                    owner = T.axis.spatial(threads, thread)
                    total = T.sblock_alloc_buffer((chains, lanes), "float32", scope="local")
                    for chain in T.unroll(chains):
                        total[chain, T.ramp(0, 1, lanes)] = T.broadcast(T.float32(0), lanes)
                    for _ in range(steps):
                        for chain in T.unroll(chains):
                            total[chain, T.ramp(0, 1, lanes)] = (
                                total[chain, T.ramp(0, 1, lanes)] * factors[T.ramp(0, 1, lanes)]
                                + factors[T.ramp(lanes, 1, lanes)]
                            )
                    for chain in T.unroll(chains):
                        sums[owner, chain, T.ramp(0, 1, lanes)] = total[chain, T.ramp(0, 1, lanes)]

    return spin, [_filled(lanes * 2), _filled(threads, chains, lanes)]


def integer_multiply_add(target: Target, work: int, threads: int) -> Work:
    """Return a function of `work` operations of 8 bits, two to a multiply-add, and its arguments.

    They are of the target's tile registers, of its integer dot product where it has none.
    """
    tiles = matrix_tiles(target, "uint8", "int8")
    if tiles is not None:
        return tile_products(tiles, work, threads)
    dot = integer_dot(target, bits=4)
    if dot is None:
        raise LookupError(f"{target.name} has no integer dot product")
    start = dot.start(tvm.tirx.const(0, "int32"))[0]
    kind, lanes, chains = str(start.ty.dtype).split("x", maxsplit=1)[0], int(start.ty.dtype.lanes), _chains(target)
    steps = max(1, work // (2 * dot.lanes * dot.reduction * chains * threads))
    # Where products are instructions apart from sums, each is of an element of its own: LLVM makes equal ones once.
    each, elements = (1, _ELEMENTS) if kind == "int16" else (0, 1)

    def added(total: tvm.ir.Expr, codes: tvm.ir.Expr, activations: tvm.ir.Expr) -> tvm.ir.Expr:
        return dot.accumulate([total], codes, splat(activations, dot.lanes))[0]

    @T.prim_func(s_tir=True)
    def spin(
        codes: T.Buffer((dot.lanes,), "int32"),
        activations: T.Buffer((elements * chains,), "int32"),
        sums: T.Buffer((threads, chains, lanes), kind),
    ) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        with T.sblock("root"):
            for thread in T.parallel(threads):
                with T.sblock("thread"):
                    owner = T.axis.spatial(threads, thread)
                    total = T.sblock_alloc_buffer((chains, lanes), kind, scope="local")
                    for chain in T.unroll(chains):
                        total[chain, T.ramp(0, 1, lanes)] = start
                    for step in range(steps):
                        for chain in T.unroll(chains):
                            total[chain, T.ramp(0, 1, lanes)] = added(
                                total[chain, T.ramp(0, 1, lanes)],
                                codes[T.ramp(0, 1, dot.lanes)],
                                activations[each * (step % elements * chains + chain)],
                            )
                    for chain in T.unroll(chains):
                        sums[owner, chain, T.ramp(0, 1, lanes)] = total[chain, T.ramp(0, 1, lanes)]

    ones = [np.full(size, 0x01010101, np.int32) for size in (dot.lanes, elements * chains)]
    return spin, [*ones, np.zeros((threads, chains, lanes), kind)]


def bf16_multiply_add(target: Target, work: int, threads: int) -> Work:
    """Return a function of `work` operations on bfloat16, two to a multiply-add, and its arguments.

    They are of the target's tile registers, of its dot products of pairs where it has none.
    """
    tiles = matrix_tiles(target, "bfloat16", "bfloat16")
    if tiles is not None:
        return tile_products(tiles, work, threads)
    dot = bf16_dot(target)
    if dot is None:
        raise LookupError(f"{target.name} has no dot product of bfloat16")
    lanes, chains = dot.lanes, _chains(target)
    steps = max(1, work // (2 * lanes * dot.terms * chains * threads))

    @T.prim_func(s_tir=True)
    def spin(
        weights: T.Buffer((lanes,), "int32"),
        pair: T.Buffer((1,), "int32"),
        sums: T.Buffer((threads, chains, lanes), "float32"),
    ) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        with T.sblock("root"), T.attr(T.int32(0), "pragma_import_llvm", dot.source):
            for thread in T.parallel(threads):
                with T.sblock("thread"):
                    owner = T.axis.spatial(threads, thread)
                    total = T.sblock_alloc_buffer((chains, lanes), "float32", scope="local")
                    for chain in T.unroll(chains):
                        total[chain, T.ramp(0, 1, lanes)] = T.broadcast(T.float32(0), lanes)
                    for _ in range(steps):
                        for chain in T.unroll(chains):
                            total[chain, T.ramp(0, 1, lanes)] = dot.accumulate_group(
                                total[chain, T.ramp(0, 1, lanes)], weights[0], pair[0]
                            )
                    for chain in T.unroll(chains):
                        sums[owner, chain, T.ramp(0, 1, lanes)] = total[chain, T.ramp(0, 1, lanes)]

    pairs = [np.full(PAIR * size, 0.5, ml_dtypes.bfloat16).view(np.int32) for size in (lanes, 1)]
    return spin, [*pairs, _filled(threads, chains, lanes)]


def copy(target: Target, work: int, threads: int) -> Work:
    """Return a function that reads half of `work` bytes and writes the other half, and its arguments."""
    return move(target, work // 2, work // 2, threads)


def read(target: Target, work: int, threads: int) -> Work:
    """Return a function that reads `work` bytes, and its arguments."""
    return move(target, work, 0, threads)


def move(target: Target, read: int, written: int, threads: int) -> Work:
    """Return a function that reads and writes as many bytes, and its arguments.

    As much as is both read and written is copied; what more is read is added up, and what more is written is filled.
    What is added up comes from as many parts by turns as the target reads fastest from, asked for where it is several.
    """
    lanes, chains, streams = target.vector_lanes(32), _chains(target), target.read_streams
    step = 4 * lanes * threads
    copied, filled = min(read, written) // step, max(0, written - read) // step
    summed = max(0, read - written) // (step * chains)
    source_vectors, result_vectors = max(1, copied + summed * chains), max(1, copied + filled)
    part, ahead = summed * chains // streams, _AHEAD_BYTES // (4 * lanes)

    def at(row: tvm.ir.Expr, chain: tvm.ir.Expr) -> tvm.ir.Expr:
        return copied + chain % streams * part + row * (chains // streams) + chain // streams

    def asked(read: tvm.ir.Expr) -> tvm.ir.Expr:
        return prefetch(read, target.streamed_to).value

    @T.prim_func(s_tir=True)
    def move_all(
        source: T.Buffer((threads, source_vectors, lanes), "float32"),
        result: T.Buffer((threads, result_vectors, lanes), "float32"),
        sums: T.Buffer((threads, chains, lanes), "float32"),
    ) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        with T.sblock("root"):
            for thread in T.parallel(threads):
                with T.sblock("thread"):
                    owner = T.axis.spatial(threads, thread)
                    total = T.sblock_alloc_buffer((chains, lanes), "float32", scope="local")
                    for place in range(copied):
                        result[owner, place, T.ramp(0, 1, lanes)] = source[owner, place, T.ramp(0, 1, lanes)]
                    for place in range(filled):
                        result[owner, copied + place, T.ramp(0, 1, lanes)] = T.broadcast(T.float32(0.5), lanes)
                    for chain in T.unroll(chains):
                        total[chain, T.ramp(0, 1, lanes)] = T.broadcast(T.float32(0), lanes)
                    for row in range(summed):
                        for chain in T.unroll(chains):
                            if streams > 1:
                                T.evaluate(asked(source[owner, at(row, chain) + ahead, 0]))
                            total[chain, T.ramp(0, 1, lanes)] = (
                                total[chain, T.ramp(0, 1, lanes)] + source[owner, at(row, chain), T.ramp(0, 1, lanes)]
                            )
                    for chain in T.unroll(chains):
                        sums[owner, chain, T.ramp(0, 1, lanes)] = total[chain, T.ramp(0, 1, lanes)]

    arrays = [(source_vectors, lanes), (result_vectors, lanes), (chains, lanes)]
    return move_all, [_filled(threads, *shape) for shape in arrays]


def _chains(target: Target) -> int:
    return _CHAINS_OF_FEW_REGISTERS if target.has_few_registers else _CHAINS


def _filled(*shape: int) -> Array:
    return np.full(shape, 0.5, np.float32)


@dataclass(frozen=True)
class Peaks:
    """What a machine reached: operations a second in fp32, on bfloat16 and 8-bit integers (0: none), bytes a second.

    `memory` is of reads from beyond the caches, `cache` of copies within the second-level ones, whose capacity over all
    threads is `cache_bytes`.
    """

    operations: float
    bf16_operations: float
    integer_operations: float
    memory: float
    cache: float
    cache_bytes: int

    def least_seconds(self, operations: int, moved: int, operands: Operands) -> float:
        """Return what a kernel of so many operations on `moved` bytes takes at least (0: not known)."""
        of_operands = {"bfloat16": self.bf16_operations, "integer": self.integer_operations}
        peak = of_operands.get(operands) or self.operations
        bandwidth = self.cache if moved <= self.cache_bytes else self.memory
        return max(operations / peak if peak else 0.0, moved / bandwidth)
