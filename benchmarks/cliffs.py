"""Sizes at which a kernel is much slower than at the sizes beside them: `python -m benchmarks cliffs`.

One dimension of a kernel takes consecutive values, around multiples of what vectors and tiles hold. A size is a cliff
where its time per element is more than twice that of a size beside it. One call's fixed cost is the same for all sizes,
which the smallest ones would show as a cliff: they are measured for the others' sake.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import click
import numpy as np

from benchmarks.integer_convolutions import byte_convolutions
from benchmarks.integer_products import byte_product
from benchmarks.kernels import KernelCase, any_rows, attention, convolution, matmul, quantized, rows, transpose
from benchmarks.row_kernels import grouped_decode
from benchmarks.tables import random_inputs
from optimizer.compile import CompileOptions, compile_model, find_target
from optimizer.package.alignment import aligned_copy
from optimizer.runtime import load

# How much more time per element makes a cliff, and from which size on.
RATIO = 2.0
SMALLEST_JUDGED = 4
_SIZES = (*range(1, 35), *range(46, 51), *range(62, 67), *range(78, 83), *range(94, 99), *range(126, 131))
_ELEMENTS = 2**17
_IMAGE = (28, 28)
# A measurement is the shortest of calls for so long; what looks like a cliff is measured again.
_SECONDS = 0.02
_REPEATS = 3

Scan = Callable[[int], KernelCase]


def _bytes_by_bytes(m: int, n: int, k: int) -> KernelCase:
    return KernelCase(f"gemm_int8_{m}x{n}x{k}", byte_product(m, n, k), "integer", 2 * m * n * k)


def _byte_layers(inputs: int, outputs: int, size: int, kernel: int, *, depthwise: bool = False) -> KernelCase:
    """Return two layers between codes, there and back: codes between them may lie in any layout."""
    model = byte_convolutions(2, [inputs, outputs], size, kernel, depthwise=depthwise)
    multiplied = inputs * (1 if depthwise else outputs) * kernel**2 * size**2
    return KernelCase(f"conv_int8_{inputs}_{outputs}_{size}", model, "integer", 2 * 2 * multiplied)


def _by_multiplications(case: KernelCase, work: int) -> KernelCase:
    """Return a kernel whose work is its multiply-adds for few rows, too, whose time their reads bound."""
    return replace(case, bound="integer", work=work)


def _decode(keys: int, size: int) -> KernelCase:
    cached = 2 * 4 * 8 * keys * size
    return KernelCase(f"decode_{keys}x{size}", grouped_decode(32, 8, keys, size), "read", cached)


SCANS: Mapping[str, Scan] = {
    "gemm_m": lambda size: matmul(size, 256, 256),
    "gemm_n": lambda size: matmul(256, size, 256),
    "gemm_k": lambda size: matmul(256, 256, size),
    "gemm_mnk": lambda size: matmul(size, size, size),
    "attention_length": lambda size: attention(str(size), 4, size, size, 64),
    "softmax_width": lambda size: rows("softmax", "Softmax", _ELEMENTS // size, size),
    "layer_norm_width": lambda size: rows("layer_norm", "LayerNormalization", _ELEMENTS // size, size),
    "transpose_rows": lambda size: transpose((size, _ELEMENTS // 128), (1, 0)),
    "transpose_columns": lambda size: transpose((_ELEMENTS // 128, size), (1, 0)),
    "conv3x3_image": lambda size: convolution("conv", 32, 32, (size, size), 3),
    # By the size of the result: of neighbouring images, two have the same.
    "conv3x3_s2_image": lambda size: convolution("conv", 32, 32, (2 * size - 1, 2 * size - 1), 3, 2),
    "conv1x1_inputs": lambda size: convolution("conv", size, 64, _IMAGE, 1),
    "conv1x1_outputs": lambda size: convolution("conv", 64, size, _IMAGE, 1),
    "conv3x3_inputs": lambda size: convolution("conv", size, 64, _IMAGE, 3),
    "conv3x3_outputs": lambda size: convolution("conv", 64, size, _IMAGE, 3),
    "depthwise3x3_channels": lambda size: convolution("conv", size, size, _IMAGE, 3, groups=size),
    "depthwise3x3_image": lambda size: convolution("conv", 32, 32, (size, size), 3, groups=32),
    "depthwise3x3_s2_image": lambda size: convolution("conv", 32, 32, (2 * size - 1, 2 * size - 1), 3, 2, groups=32),
    "depthwise5x5_channels": lambda size: convolution("conv", size, size, _IMAGE, 5, groups=size),
    "depthwise7x7_image": lambda size: convolution("conv", 32, 32, (size, size), 7, groups=32),
    # Channels of each of eight groups, and groups of eight channels.
    "grouped3x3_width": lambda size: convolution("conv", 8 * size, 8 * size, (14, 14), 3, groups=8),
    "grouped3x3_groups": lambda size: convolution("conv", 8 * size, 8 * size, (14, 14), 3, groups=size),
    "conv1d3_length": lambda size: convolution("conv", 64, 64, (size,), 3),
    "conv1d3_inputs": lambda size: convolution("conv", size, 64, (500,), 3),
    "conv1d3_outputs": lambda size: convolution("conv", 64, size, (500,), 3),
    "conv3d3x3x3_image": lambda size: convolution("conv", 16, 16, (4, size, size), 3),
    "conv3d3x3x3_outputs": lambda size: convolution("conv", 16, size, (4, 14, 14), 3),
    "transposed2x2_image": lambda size: convolution("conv", 32, 32, (size, size), 2, 2, 0, transposed=True),
    "transposed2x2_inputs": lambda size: convolution("conv", size, 64, _IMAGE, 2, 2, 0, transposed=True),
    "transposed2x2_outputs": lambda size: convolution("conv", 64, size, _IMAGE, 2, 2, 0, transposed=True),
    "transposed4x4_outputs": lambda size: convolution("conv", 64, size, (14, 14), 4, 2, 1, transposed=True),
    "conv3x3_int8_image": lambda size: _byte_layers(32, 32, size, 3),
    "conv3x3_int8_channels": lambda size: _byte_layers(64, size, 28, 3),
    "conv1x1_int8_channels": lambda size: _byte_layers(64, size, 28, 1),
    "depthwise3x3_int8_channels": lambda size: _byte_layers(size, size, 28, 3, depthwise=True),
    "depthwise3x3_int8_image": lambda size: _byte_layers(32, 32, size, 3, depthwise=True),
    "gemm_int8_m": lambda size: _bytes_by_bytes(size, 256, 256),
    "gemm_int8_n": lambda size: _bytes_by_bytes(256, size, 256),
    "gemm_int8_k": lambda size: _bytes_by_bytes(256, 256, size),
    "gemm_any_m": lambda size: any_rows(matmul(size, 256, 256)),
    # Products with weights of 4 bits: of one row by its results and by its groups of 32, and of more rows.
    "int4_n": lambda size: quantized(1, 512 + size, 512),
    "int4_k": lambda size: quantized(1, 1024, 32 * size),
    "int4_m": lambda size: _by_multiplications(quantized(size, 512, 512), 2 * size * 512 * 512),
    "int4_any_m": lambda size: any_rows(_by_multiplications(quantized(size, 512, 512), 2 * size * 512 * 512)),
    "attention_decode_keys": lambda size: _decode(256 + size, 64),
    "attention_decode_size": lambda size: _decode(512, size),
    "log_softmax_width": lambda size: rows("log_softmax", "LogSoftmax", _ELEMENTS // size, size),
}
"""The scans by name: the kernel of each size."""


def main(only: Sequence[str], threads: int) -> None:
    """Print the scans whose names match `only` (none: all) and their cliffs; ends with code 1 if there are any."""
    click.echo("| scan | sizes | cliffs: size, us, time per element over a neighbour's |\n|---|---|---|")
    found = False
    for name, scan in SCANS.items():
        if only and not any(fnmatch(name, pattern) for pattern in only):
            continue
        cases = {size: scan(size) for size in _SIZES}
        with tempfile.TemporaryDirectory(prefix="optimizer-bench-") as folder:
            calls = {size: _call(case, Path(folder), threads) for size, case in cases.items()}
            each = {size: _shortest(call) / cases[size].work for size, call in calls.items()}
            for _ in range(_REPEATS):
                for size in sorted({near for steep, _ in cliffs(each) for near in (steep - 1, steep, steep + 1)}):
                    if size in calls:
                        each[size] = min(each[size], _shortest(calls[size]) / cases[size].work)
        listed = [f"{size}: {each[size] * cases[size].work * 1e6:.0f} us, {ratio:.1f}" for size, ratio in cliffs(each)]
        found |= bool(listed)
        click.echo(f"| {name} | {len(each)} of {min(each)} to {max(each)} | {'; '.join(listed) or 'none'} |")
    if found:
        sys.exit(1)


def cliffs(each: Mapping[int, float]) -> Iterator[tuple[int, float]]:
    """Yield the sizes that are cliffs, and their time per element, which `each` gives, over the better neighbour's."""
    for size, own in each.items():
        beside = [each[other] for other in (size - 1, size + 1) if other in each]
        if beside and size >= SMALLEST_JUDGED and own > RATIO * min(beside):
            yield size, own / min(beside)


def _call(case: KernelCase, folder: Path, threads: int) -> Callable[[], object]:
    path, package = case.save(folder), folder / f"{case.name}.package"
    compile_model(path, package, CompileOptions(find_target("host"), tuning_log=None), certify=False)
    model = load(package, threads=threads)
    inputs = {name: aligned_copy(array) for name, array in random_inputs(path).items()}
    return lambda: model(inputs, outputs="dlpack")


def _shortest(call: Callable[[], object]) -> float:
    call()
    best, end = np.inf, time.perf_counter() + _SECONDS
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return float(best)
