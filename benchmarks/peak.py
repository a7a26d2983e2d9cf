"""What the machine does at best: fused multiply-adds, copies and reads at full speed, timed like any other engine.

The engine does as much work as the model's metadata says (`kernels.py` writes them) and computes nothing of use: its
time is the least that a kernel of this work can take here, and its time over a kernel's is the fraction of peak.
"""

# TVMScript writes shapes where types stand.
# pyright: reportInvalidTypeForm=false

from __future__ import annotations

import resource
import time
from pathlib import Path

import numpy as np
import tvm
from tvm.script import tirx as T  # noqa: N812 - as TVM writes it

from benchmarks.engines import Cases, Engine, EngineError, peak_bytes
from optimizer.compile import find_target
from optimizer.runtime.threads import use_threads
from schedules.intrin.integer_dot import integer_dot

# Independent chains of multiply-adds: more than latency (4 cycles) times two units, fewer than the 32 registers.
_CHAINS = 24
_ALIGNMENT = 16


class Peak(Engine):
    """Multiply-adds in registers, a copy or a read of memory: whichever the model's metadata asks for."""

    name = "peak"

    def __init__(self, model: Path, cases: Cases, threads: int) -> None:
        import onnx  # noqa: PLC0415

        metadata = {entry.key: entry.value for entry in onnx.load(model, load_external_data=False).metadata_props}
        if "bound" not in metadata:
            raise EngineError("the model does not say what bounds it")
        use_threads(threads)
        start = time.perf_counter()
        make = {"compute": _multiply_add, "integer": _integer_multiply_add, "copy": _copy, "read": read}[
            metadata["bound"]
        ]
        function, self._arguments = make(int(metadata["work"]), threads)
        self._entry = tvm.compile(function, target=find_target("host").tvm_target())["main"]
        self.compile_seconds = time.perf_counter() - start
        self.compile_peak_bytes = peak_bytes(resource.RUSAGE_SELF)

    @staticmethod
    def version() -> str:
        return ""

    def call(self, case: str) -> object:
        return self._entry(*self._arguments)

    def outputs(self, case: str) -> dict[str, np.ndarray]:
        return {}


Work = tuple[tvm.tirx.PrimFunc, list[tvm.runtime.Tensor]]


def _multiply_add(work: int, threads: int) -> Work:
    """Return a function of `work` floating-point operations, two to a multiply-add, in fp32."""
    lanes, chains = find_target("host").vector_lanes(32), _CHAINS
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


def _integer_multiply_add(work: int, threads: int) -> Work:
    """Return a function of `work` operations of 8 bits, two to a multiply-add, by the target's integer dot product."""
    dot = integer_dot(find_target("host"), bits=4)
    if dot is None:
        raise EngineError("the machine has no integer dot product")
    start = dot.start(tvm.tirx.const(0, "int32"))[0]
    kind, lanes, chains = str(start.ty.dtype).split("x", maxsplit=1)[0], int(start.ty.dtype.lanes), _CHAINS
    steps = max(1, work // (2 * dot.lanes * dot.reduction * chains * threads))

    def added(total: tvm.ir.Expr, codes: tvm.ir.Expr, activations: tvm.ir.Expr) -> tvm.ir.Expr:
        return dot.accumulate([total], codes, activations)[0]

    @T.prim_func(s_tir=True)
    def spin(
        codes: T.Buffer((dot.lanes,), "int32"),
        activations: T.Buffer((1,), "int32"),
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
                    for _ in range(steps):
                        for chain in T.unroll(chains):
                            total[chain, T.ramp(0, 1, lanes)] = added(
                                total[chain, T.ramp(0, 1, lanes)], codes[T.ramp(0, 1, dot.lanes)], activations[0]
                            )
                    for chain in T.unroll(chains):
                        sums[owner, chain, T.ramp(0, 1, lanes)] = total[chain, T.ramp(0, 1, lanes)]

    ones = [tvm.runtime.tensor(np.full(size, 0x01010101, np.int32)) for size in (dot.lanes, 1)]
    return spin, [*ones, tvm.runtime.tensor(np.zeros((threads, chains, lanes), kind))]


def _copy(work: int, threads: int) -> Work:
    """Return a function that reads half of `work` bytes and writes the other half."""
    lanes = find_target("host").vector_lanes(32)
    vectors = max(1, work // (2 * 4 * lanes * threads))

    @T.prim_func(s_tir=True)
    def copy(
        source: T.Buffer((threads, vectors, lanes), "float32"), target: T.Buffer((threads, vectors, lanes), "float32")
    ) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        with T.sblock("root"):
            for thread in T.parallel(threads):
                for vector in range(vectors):
                    with T.sblock("copy"):
                        owner, place = T.axis.remap("SS", [thread, vector])
                        target[owner, place, T.ramp(0, 1, lanes)] = source[owner, place, T.ramp(0, 1, lanes)]

    return copy, [_filled(threads, vectors, lanes), _filled(threads, vectors, lanes)]


def read(work: int, threads: int) -> Work:
    """Return a function that reads `work` bytes, and its arguments."""
    lanes, chains = find_target("host").vector_lanes(32), _CHAINS
    steps = max(1, work // (4 * lanes * chains * threads))

    @T.prim_func(s_tir=True)
    def read_all(
        source: T.Buffer((threads, steps, chains, lanes), "float32"),
        sums: T.Buffer((threads, chains, lanes), "float32"),
    ) -> None:
        T.func_attr({"global_symbol": "main", "tirx.noalias": True})
        with T.sblock("root"):
            for thread in T.parallel(threads):
                with T.sblock("thread"):
                    owner = T.axis.spatial(threads, thread)
                    total = T.sblock_alloc_buffer((chains, lanes), "float32", scope="local")
                    for chain in T.unroll(chains):
                        total[chain, T.ramp(0, 1, lanes)] = T.broadcast(T.float32(0), lanes)
                    for step in range(steps):
                        for chain in T.unroll(chains):
                            total[chain, T.ramp(0, 1, lanes)] = (
                                total[chain, T.ramp(0, 1, lanes)] + source[owner, step, chain, T.ramp(0, 1, lanes)]
                            )
                    for chain in T.unroll(chains):
                        sums[owner, chain, T.ramp(0, 1, lanes)] = total[chain, T.ramp(0, 1, lanes)]

    return read_all, [_filled(threads, steps, chains, lanes), _filled(threads, chains, lanes)]


def _filled(*shape: int) -> tvm.runtime.Tensor:
    return tvm.runtime.tensor(np.full(shape, 0.5, np.float32))
