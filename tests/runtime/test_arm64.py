"""A package for arm64 loads and runs with the real aarch64 runtime under the emulator."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optimizer.runtime import load
from targets.arm64 import ARM64
from targets.emulator import Emulator

WritePackage = Callable[..., Path]
ROOT = Path(__file__).resolve().parents[2]
_REASON = Emulator().available()

pytestmark = [pytest.mark.emulator, pytest.mark.skipif(_REASON is not None, reason=_REASON or "")]

PROGRAM = """
import json, sys
import numpy as np
from optimizer.errors import OptimizerError
from optimizer.runtime import load, machine
x = np.arange(12, dtype=np.float32).reshape(3, 4)
try:
    outputs = load(sys.argv[1])({"x.0/data": x, "scale": np.float32(0.25)})
    print(json.dumps({name: array.tolist() for name, array in outputs.items()}))
except OptimizerError as error:
    print(json.dumps([type(error).__name__, str(error)]))
"""


def run(package: Path) -> subprocess.CompletedProcess[str]:
    return Emulator().run(["-c", PROGRAM, str(package)], ARM64, python_path=[ROOT])


def test_outputs_are_those_of_this_machine(write_linear: WritePackage, arm64_library: Path) -> None:
    needs = {"architecture": "aarch64", "cpu_features": ARM64.features}
    done = run(write_linear("linear.opt", library=arm64_library, **needs))
    assert done.returncode == 0, done.stderr
    emulated = json.loads(done.stdout)
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    native = load(write_linear("native"))({"x.0/data": x, "scale": np.float32(0.25)})
    # Four products and a sum, which the two machines may or may not fuse: a few roundings of the largest value.
    limit = 8 * np.finfo(np.float32).eps * np.abs(native["y"]).max()
    np.testing.assert_allclose(emulated["y"], native["y"], rtol=0, atol=limit)
    np.testing.assert_array_equal(emulated["flat"], native["flat"])


def test_features_that_the_arm_machine_lacks_are_listed(write_linear: WritePackage, arm64_library: Path) -> None:
    done = run(write_linear(library=arm64_library, architecture="aarch64", cpu_features=("asimd", "sve2", "i8mm")))
    assert done.returncode == 0, done.stderr
    kind, message = json.loads(done.stdout)
    assert kind == "IncompatibleMachineError"
    assert "lacks the CPU features i8mm, sve2," in message
