"""Inner loops for Arm judged by a static model of its cores, for where no such core is at hand.

Each kernel is compiled for a target, its hot loop is found in the assembly (the innermost loop with the most
multiply-adds, among those that do little else: Winograd's transforms, mostly additions, are none), and llvm-mca says
how many cycles an iteration takes on each core that it has a model of. The peak is what the same model says of nothing
but multiply-adds of the same kind on registers of their own. Beside it stands for how many of the cycles the busiest of
the core's units is at work: near 100 %, no order of the loop's instructions would take fewer.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

import targets
from benchmarks.inner_loops import MULTIPLY_ADD, InnerLoop, multiplying_loops, save_and_compile
from benchmarks.integer_convolutions import byte_convolutions
from benchmarks.integer_products import byte_product
from benchmarks.kernels import attention

# The closest models that LLVM has, and what else they stand for.
CORES = ("neoverse-n1", "neoverse-n2", "neoverse-v1", "neoverse-v2")
COLUMNS = ("kernel", "target", "multiply-adds", "instructions", "spills", "scalar loads", *CORES)
_SMALLEST_LLVM, _LARGEST_LLVM = 16, 30
_FEATURES = "+neon,+fullfp16,+dotprod,+i8mm,+bf16"
_ITERATIONS = 200
# More than the latency (4 cycles) times the pipelines (4) of any of these cores.
_CHAINS = 20


class McaError(Exception):
    """There is no llvm-mca that knows these cores, or it cannot read a loop."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of the table, the targets that it is compiled for, and how many of its loops are judged."""

    name: str
    model: onnx.ModelProto
    targets: tuple[str, ...] = ("arm64",)
    loops: int = 1


def kernels() -> Iterator[Kernel]:
    """Yield the kernels whose inner loops are judged."""
    both = ("arm64", "arm64-i8mm")
    yield Kernel("gemm_128x768x768", _single("MatMul", (128, 768), (768, 768), (128, 768)))
    yield Kernel("gemm_385x511x767", _single("MatMul", (385, 767), (767, 511), (385, 511)))
    yield Kernel("gemm_bf16_128x768x768", _narrow_product(128, 768, 768, TensorProto.BFLOAT16), ("arm64-i8mm",))
    yield Kernel("gemm_fp16_128x768x768", _narrow_product(128, 768, 768, TensorProto.FLOAT16))
    yield Kernel("pointwise_256_256_14", _convolution(256, 14, 1))
    yield Kernel("convolution3x3_128_28", _convolution(128, 28, 3))
    yield Kernel("pointwise_int8_256_256_14", byte_convolutions(1, (256, 256), 14, 1))
    yield Kernel("convolution3x3_int8_128_28", byte_convolutions(1, (128, 128), 28, 3))
    yield Kernel("first7x7_3_64_224", _convolution(64, 224, 7, inputs=3))
    yield Kernel("depthwise3x3_192_28", _convolution(192, 28, 3, group=192))
    for size in (3, 5):  # the layer in the middle, whose data are blocked before and after it
        yield Kernel(f"depthwise{size}x{size}_int8_192_28", byte_convolutions(3, (192, 192), 28, size, depthwise=True))
    yield Kernel("attention_12x197x64", attention("prefill", 12, 197, 197, 64).model, loops=2)
    yield Kernel("attention_decode_32x4096x64", attention("decode", 32, 1, 4096, 64).model)
    yield Kernel("gemm_int8_128x768x768", byte_product(128, 768, 768), both)
    for bits in (8, 4):
        yield Kernel(f"int{bits}_64x512x2048", quantized_product(64, 512, 2048, bits), both)


def lines() -> Iterator[str]:
    """Yield the lines of the table."""
    mca = find_mca()
    yield f"| {' | '.join(COLUMNS)} |"
    yield f"|{'---|' * len(COLUMNS)}"
    with tempfile.TemporaryDirectory() as folder:
        for kernel in kernels():
            for target in kernel.targets:
                assembly = save_and_compile(kernel.model, targets.get(target), Path(folder))
                for loop in hot_loops(multiplying_loops(assembly))[: kernel.loops]:
                    fractions = [_judged(mca, loop, core) for core in CORES]
                    counts = (loop.multiply_adds, len(loop.instructions), loop.spills, loop.scalar_loads)
                    yield f"| {kernel.name} | {target} | {' | '.join(map(str, counts))} | {' | '.join(fractions)} |"


def hot_loops(loops: list[InnerLoop]) -> list[InnerLoop]:
    """Return the loops of which at least a third are multiply-adds, else the first."""
    return [loop for loop in loops if 3 * loop.multiply_adds >= len(loop.instructions)] or loops[:1]


def find_mca() -> str:
    """Return the newest llvm-mca that is installed."""
    names = [f"llvm-mca-{version}" for version in range(_LARGEST_LLVM, _SMALLEST_LLVM - 1, -1)]
    found = next(filter(None, map(shutil.which, [*names, "llvm-mca"])), None)
    if found is None:
        raise McaError(
            f"there is no llvm-mca; install llvm-{_SMALLEST_LLVM} or newer, such as Debian's package llvm-19"
        )
    return found


def fraction_of_peak(mca: str, loop: InnerLoop, core: str) -> float:
    """Return the multiply-adds that the loop does in a cycle over those that the core can do at best."""
    kind = next(match[1] for line in loop.instructions if (match := MULTIPLY_ADD.search(line)))
    narrow = "8h" if kind.startswith("bf") else "16b"
    element = narrow if "dot" in kind or "mmla" in kind else "4s"
    if re.match(r"[us]m(ul|la)l", kind):  # which widen halves of registers
        element = "8h" if kind.endswith("2") else "4h"
    other = "4b[0]" if kind == "sudot" else element  # which takes elements alone
    best = [f"\t{kind}\tv{number}.4s, v30.{element}, v31.{other}" for number in range(_CHAINS)]
    own = loop.multiply_adds / _cycles(mca, loop.instructions, core)[0]
    return own / (len(best) / _cycles(mca, best, core)[0])


def _judged(mca: str, loop: InnerLoop, core: str) -> str:
    """Return the fraction of the peak, and of the cycles in which the core's busiest unit is at work."""
    cycles, busiest = _cycles(mca, loop.instructions, core)
    return f"{fraction_of_peak(mca, loop, core):.0%} ({busiest / cycles:.0%})"


def _cycles(mca: str, instructions: list[str], core: str) -> tuple[float, float]:
    """Return the cycles that an iteration takes when many follow one another, and those of the busiest unit."""
    command = [mca, "-mtriple=aarch64", f"-mcpu={core}", f"-mattr={_FEATURES}", f"-iterations={_ITERATIONS}"]
    done = subprocess.run(command, input="\n".join(instructions), text=True, capture_output=True, check=False)
    found = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    pressure = re.search(r"Resource pressure per iteration:\n[^\n]*\n([^\n]*)", done.stdout)
    if found is None or pressure is None:
        raise McaError(f"{mca} cannot judge a loop for {core}: {done.stderr.strip()}")
    return int(found[1]) / _ITERATIONS, max(float(unit) for unit in pressure[1].split() if unit != "-")


def _convolution(channels: int, size: int, kernel: int, group: int = 1, inputs: int = 0) -> onnx.ModelProto:
    inputs = inputs or channels
    weights, output = (channels, inputs // group, kernel, kernel), (1, channels, size, size)
    return _single("Conv", (1, inputs, size, size), weights, output, pads=[kernel // 2] * 4, group=group)


def _single(
    operator: str,
    shape: tuple[int, ...],
    weights: tuple[int, ...],
    output: tuple[int, ...],
    **attributes: int | list[int],
) -> onnx.ModelProto:
    node = helper.make_node(operator, ["x", "w"], ["y"])
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    return _model([node], shape, output, [numpy_helper.from_array(np.ones(weights, np.float32), "w")])


def _narrow_product(rows: int, depth: int, columns: int, kind: int) -> onnx.ModelProto:
    """Return a product of floats of 16 bits, which are those of the graph's inputs and outputs rounded."""
    weights = numpy_helper.from_array(np.ones((depth, columns), np.float32), "w")
    nodes = [helper.make_node("Cast", [name], [f"{name}_narrow"], to=kind) for name in ("x", "w")]
    nodes.append(helper.make_node("MatMul", ["x_narrow", "w_narrow"], ["y_narrow"]))
    nodes.append(helper.make_node("Cast", ["y_narrow"], ["y"], to=TensorProto.FLOAT))
    return _model(nodes, (rows, depth), (rows, columns), [weights])


def quantized_product(rows: int, outputs: int, inputs: int, bits: int) -> onnx.ModelProto:
    """Return a product with weights of some bits in blocks of 32 and int8 activations."""
    blocks = inputs // 32
    constants = {
        "w": np.full((outputs, blocks, 32 * bits // 8), 0x55, np.uint8),
        "s": np.ones((outputs, blocks), np.float32),
    }
    sizes = {"K": inputs, "N": outputs, "bits": bits, "block_size": 32, "accuracy_level": 4}
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft")
    node.attribute.extend(helper.make_attribute(name, value) for name, value in sizes.items())
    arrays = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    return _model([node], (rows, inputs), (rows, outputs), arrays)


def _model(
    nodes: list[onnx.NodeProto],
    shape: tuple[int, ...],
    output: tuple[int, ...],
    constants: list[TensorProto],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "kernel",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        constants,
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)
