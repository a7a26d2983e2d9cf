"""The README's Python example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from optimizer.compile import CompileOptions, compile_model, find_target

_ROOT = Path(__file__).parents[2]


def test_python_example_prints_what_its_comment_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (_ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    package = re.search(r'load\("([^"]+)"\)', code)
    assert package is not None
    options = CompileOptions(find_target("host"))
    compile_model(_ROOT / "examples/decoder/model.onnx", tmp_path / package.group(1), options, certify=False)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out == f"{re.findall(r'# (.*)', code)[-1]}\n"
