from __future__ import annotations

import subprocess
import sys

import pytest

from optimizer.cli import _COMMANDS

_HEAVY = ("tvm", "onnx", "onnxruntime", "numpy", "rich")


@pytest.mark.parametrize("command", ["", *_COMMANDS])
def test_help_imports_nothing_heavy(command: str) -> None:
    """What makes --help quick is what it does not import."""
    script = (
        "import sys; sys.argv = ['optimizer', *sys.argv[1:], '--help']\n"
        "from optimizer.cli import main\n"
        "try: main()\n"
        f"finally: print('heavy:', [name for name in {_HEAVY} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *filter(None, [command])], capture_output=True, text=True, check=True
    )
    assert "Usage: optimizer" in done.stdout
    assert done.stdout.endswith("heavy: []\n")


def test_generate_imports_numpy_while_it_loads_and_no_tables() -> None:
    """Of a package that cannot be read, nothing is imported that its first token would wait for."""
    script = (
        "import sys; sys.argv = ['optimizer', 'generate', 'none.opt', '--prompt', 'a']\n"
        "from optimizer.cli import main\n"
        "try: main()\n"
        f"finally: print('heavy:', [name for name in {_HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "there is no package at" in done.stderr
    assert done.stdout.endswith("heavy: []\n")
