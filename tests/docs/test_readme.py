"""The README's Python examples run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from optimizer.compile import CompileOptions, compile_model, find_target

_ROOT = Path(__file__).parents[2]


def test_python_examples_print_what_the_comment_says_and_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (_ROOT / "README.md").read_text(encoding="utf-8")
    code = "".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    package = re.search(r'load\("([^"]+)"\)', code)
    assert package is not None
    options = CompileOptions(find_target("host"))
    compile_model(_ROOT / "examples/decoder/model.onnx", tmp_path / package.group(1), options, certify=False)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    shape, generated = capsys.readouterr().out.split("\n", 1)
    assert shape == re.findall(r"# (.*)", code)[-1]
    assert generated.strip()
