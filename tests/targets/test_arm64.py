"""Arm code linked on x86 and executed under the emulator gives what x86 and numpy give."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from tvm.ir import IRModule

import targets
from targets.emulator import Emulator
from tests.targets.target_kernels import (
    COLUMNS,
    REDUCTION,
    ROWS,
    dot_product_layout,
    dot_product_matmul,
    integers,
    matmul,
    matrix_layout,
    matrix_multiply_accumulate,
    scalable_scaled_sum,
)

pytestmark = [pytest.mark.emulator, pytest.mark.usefixtures("emulator")]


def test_float_matmul_equals_x86(execute):
    inputs = [
        integers((ROWS, REDUCTION), "float32", 0),
        integers((REDUCTION, COLUMNS), "float32", 1),
        np.zeros((ROWS, COLUMNS), "float32"),
    ]
    module = IRModule({"main": matmul})
    on_x86 = execute(module, targets.get("x86-avx2"), inputs)
    on_arm = execute(module, targets.get("arm64"), inputs)
    np.testing.assert_array_equal(on_arm, on_x86)
    np.testing.assert_array_equal(on_arm, inputs[0] @ inputs[1])


def test_dot_product_instruction_is_exact(execute):
    a, b = integers((ROWS, REDUCTION), "int8", 2), integers((REDUCTION, COLUMNS), "int8", 3)
    inputs = [a, dot_product_layout(b), np.zeros((ROWS, COLUMNS), "int32")]
    output = execute(IRModule({"main": dot_product_matmul}), targets.get("arm64"), inputs)
    np.testing.assert_array_equal(output, a.astype("int32") @ b.astype("int32"))


def test_matrix_instruction_is_exact(execute):
    a, b = integers((ROWS, REDUCTION), "int8", 4), integers((COLUMNS, REDUCTION), "int8", 5)
    inputs = [matrix_layout(a), matrix_layout(b), np.zeros((ROWS // 2, COLUMNS // 2, 4), "int32")]
    output = execute(IRModule({"main": matrix_multiply_accumulate}), targets.get("arm64-i8mm"), inputs)
    tiles = output.reshape(ROWS // 2, COLUMNS // 2, 2, 2).transpose(0, 2, 1, 3).reshape(ROWS, COLUMNS)
    np.testing.assert_array_equal(tiles, a.astype("int32") @ b.astype("int32").T)


@pytest.mark.parametrize("registers", [1, 4], ids=["128 bits", "512 bits"])
def test_scalable_vectors_cover_a_length_that_they_do_not_divide(execute, registers: int):
    cpu = f"max,sve-max-vq={registers},sme=off,pauth-impdef=on"
    target = replace(targets.get("arm64-sve2"), emulated_cpu=cpu)
    a, b = integers((100,), "float32", 6), integers((100,), "float32", 7)
    output = execute(scalable_scaled_sum(target.tvm_target()), target, [a, b, np.zeros(100, "float32")])
    np.testing.assert_array_equal(output, 2 * a + b)


def test_relax_module_equals_x86(execute, relax_module):
    x = np.linspace(-1, 1, 32, dtype="float32").reshape(4, 8)
    on_x86 = execute(relax_module, targets.get("x86-avx2"), [x], kind="virtual-machine")
    on_arm = execute(relax_module, targets.get("arm64"), [x], kind="virtual-machine")
    # Where the last bit of exp differs, rounding to bfloat16 (8 bits) may fall to the neighbour.
    np.testing.assert_allclose(on_arm, on_x86, rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", ["arm64", "arm64-i8mm", "arm64-sve2"])
def test_emulated_cpu_has_the_features_of_its_target(emulator: Emulator, name: str):
    target = targets.get(name)
    done = emulator.run(["-c", "print(open('/proc/cpuinfo').read())"], target)
    line = next(line for line in done.stdout.splitlines() if line.startswith("Features"))
    assert set(target.features) <= set(line.split())
