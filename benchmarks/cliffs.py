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
from fnmatch import fnmatch
from pathlib import Path

import click
import numpy as np

from benchmarks.kernels import KernelCase, attention, convolution, matmul, rows, transpose
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
