"""The bundled decoder for arm64 writes under the emulator what it writes on this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from optimizer.compile import CompileOptions, compile_model, find_target
from optimizer.runtime.generation import DecoderSession
from optimizer.runtime.model import CompiledModel
from targets.arm64 import ARM64
from targets.emulator import Emulator

_ROOT = Path(__file__).parents[3]
_REASON = Emulator().available()
_PROMPT = [465, 1027, 88, 312, 7, 1500, 41, 99, 640]

pytestmark = [pytest.mark.emulator, pytest.mark.skipif(_REASON is not None, reason=_REASON or "")]

_PROGRAM = """
import json, sys
from optimizer.runtime import load
from optimizer.runtime.generation import DecoderSession
session = DecoderSession(load(sys.argv[1]), capacity=32)
logits = session.append(json.loads(sys.argv[2]))
for _ in range(int(sys.argv[3])):
    logits = session.append([int(logits.argmax())])
print(json.dumps(session.tokens))
"""


def test_tokens_are_those_of_this_machine(decoder: CompiledModel, tmp_path: Path) -> None:
    package = tmp_path / "decoder.opt"
    options = CompileOptions(find_target("arm64"))
    compile_model(_ROOT / "examples" / "decoder" / "model.onnx", package, options, certify=False)
    session, count = DecoderSession(decoder, capacity=32), 12
    logits = session.append(_PROMPT)
    for _ in range(count):
        logits = session.append([int(logits.argmax())])
    arguments = ["-c", _PROGRAM, str(package), json.dumps(_PROMPT), str(count)]
    done = Emulator().run(arguments, ARM64, python_path=[_ROOT])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == session.tokens
