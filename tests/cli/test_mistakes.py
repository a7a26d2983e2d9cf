from __future__ import annotations

import errno
import io
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper, parser


def _fails(finished: object, code: int, *words: str) -> None:
    assert finished.code == code
    assert finished.err.startswith("error: ")
    assert "Traceback" not in finished.err
    for word in words:
        assert word in finished.err


def test_missing_file(optimizer: Callable, tmp_path: Path) -> None:
    _fails(optimizer("compile", tmp_path / "none.onnx"), 3, "none.onnx", "no such file")


def test_file_that_is_not_onnx(optimizer: Callable, tmp_path: Path) -> None:
    path = tmp_path / "text.onnx"
    path.write_text("this is no model", encoding="utf-8")
    _fails(optimizer("compile", path), 3, "text.onnx", "not an ONNX")


@pytest.mark.parametrize("content", ["{", "[]", '{"model": 3}', '{"search": {"do_sample": true, "top_p": 7}}'])
def test_malformed_settings_beside_a_language_model(optimizer: Callable, tmp_path: Path, content: str) -> None:
    model = parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> tokens (int64[1, n] input_ids) => (int64[1, n] logits)'
        "{ logits = Add(input_ids, input_ids) }"
    )
    onnx.save(model, tmp_path / "model.onnx")
    (tmp_path / "genai_config.json").write_text(content, encoding="utf-8")
    finished = optimizer("compile", tmp_path / "model.onnx", "-o", tmp_path / "package")
    said = finished.err.splitlines()[-1]  # what takes long is reported before
    assert finished.code == 3
    assert said.startswith("error: beside ")
    assert all(word in said for word in ("genai_config.json", "model.onnx", "mend the file or move it away"))
    assert not (tmp_path / "package").exists()


def test_truncated_file(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes(perceptron.read_bytes()[:-100])
    _fails(optimizer("compile", path), 3, "cut.onnx", "truncated")


def test_missing_dependency(optimizer: Callable, perceptron: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optimizer.cli.compile", None)  # as if importing it had failed
    assert optimizer("compile", perceptron).code == 70
    monkeypatch.setattr("importlib.import_module", lambda _: __import__("surely_absent"))
    _fails(optimizer("compile", perceptron), 1, "surely_absent", "pip install")


def test_output_that_finds_no_room(optimizer: Callable, perceptron: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("importlib.import_module", fail)
    _fails(optimizer("inspect", perceptron), 1, "No space left on device", "write elsewhere")


def test_characters_that_the_output_lacks_are_replaced(optimizer: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert optimizer("targets").code == 0
    stream.write("é")
    stream.flush()
    assert stream.buffer.getvalue().endswith(b"?")


def test_generate_without_a_prompt(optimizer: Callable, tmp_path: Path) -> None:
    finished = optimizer("generate", tmp_path)
    assert (finished.code, "--prompt-file" in finished.err) == (2, True)
    _fails(optimizer("generate", tmp_path, "--prompt-file", tmp_path / "none"), 10, "none", "No such file")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    _fails(optimizer("generate", tmp_path, "--prompt-file", tmp_path / "latin"), 10, "latin", "not UTF-8")


def test_a_prompt_from_standard_input(optimizer: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    _fails(optimizer("generate", tmp_path, "--prompt-file", "-"), 10, "not UTF-8")


def test_inputs_larger_than_memory(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    assert optimizer("compile", perceptron, "-o", tmp_path / "package").code == 0
    _fails(optimizer("run", tmp_path / "package", "--dim", f"batch={1 << 44}"), 14, "too little memory")


def test_limits_on_rounding_that_nobody_asked_for(optimizer: Callable, perceptron: Path) -> None:
    for limit in ("--max-kl", "--max-flips"):
        finished = optimizer("compile", perceptron, limit, "0.01")
        assert finished.code == 10
        assert finished.err.splitlines()[-1].endswith("give --weights int4")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--weights-of", "head=int8"), "--weights-of is for weights that the compiler rounds"),
        (("--weight-method", "gptq"), "--weight-method is for weights that the compiler rounds"),
        (("--no-weight-zero-points",), "--weight-zero-points is for weights that the compiler rounds"),
        (("--kv-cache", "returned", "--kv-cache-dtype", "int4"), "--kv-cache returned makes none"),
        (("--weights", "int4", "--max-kl", "nan"), "limits of 0 or more"),
        (("--weights", "int4", "--max-flips", "-1"), "limits of 0 or more"),
    ],
)
def test_options_that_would_change_nothing(
    optimizer: Callable, perceptron: Path, arguments: tuple[str, ...], words: str
) -> None:
    _fails(optimizer("compile", perceptron, *arguments), 10, words)


def _with_external_data(perceptron: Path, folder: Path) -> Path:
    path = folder / "external.onnx"
    onnx.save(onnx.load(perceptron), path, save_as_external_data=True, location="external.bin", size_threshold=0)
    return path


def test_missing_external_data(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    path = _with_external_data(perceptron, tmp_path)
    (tmp_path / "external.bin").unlink()
    _fails(optimizer("compile", path), 3, "external.bin", "missing", "w1")


def test_truncated_external_data(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    path = _with_external_data(perceptron, tmp_path)
    data = tmp_path / "external.bin"
    data.write_bytes(data.read_bytes()[:-4])
    _fails(optimizer("compile", path), 3, "external.bin", "truncated", "w2")


def test_external_data_outside_the_model_folder(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    path = _with_external_data(perceptron, tmp_path)
    model = onnx.load(path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = "../secret.bin"
    path.write_bytes(model.SerializeToString())
    _fails(optimizer("compile", path), 3, "outside")


def test_unknown_target(optimizer: Callable, perceptron: Path) -> None:
    _fails(optimizer("compile", perceptron, "--target", "z80"), 6, "z80", "arm64")


def test_shape_of_wrong_rank(optimizer: Callable, perceptron: Path) -> None:
    _fails(optimizer("compile", perceptron, "--shape", "x=1,2,3"), 5, "x", "3")


def test_shape_of_unknown_input(optimizer: Callable, perceptron: Path) -> None:
    _fails(optimizer("compile", perceptron, "--shape", "z=1,2"), 5, "z", "x")


def test_shape_that_contradicts_the_weights(optimizer: Callable, perceptron: Path) -> None:
    _fails(optimizer("compile", perceptron, "--shape", "x=1,63"), 4, "63", "64")


def test_malformed_shape(optimizer: Callable, perceptron: Path) -> None:
    _fails(optimizer("compile", perceptron, "--shape", "1,3"), 10, "NAME=DIM")


def test_unknown_pass(optimizer: Callable, perceptron: Path) -> None:
    _fails(optimizer("compile", perceptron, "--passes", "fold-constant"), 10, "did you mean 'fold-constants'")


def test_unknown_pass_is_reported_before_the_model_is_read(optimizer: Callable, tmp_path: Path) -> None:
    path = tmp_path / "not_a_model.onnx"
    path.write_text("no model")
    _fails(optimizer("compile", path, "--passes", "fold-constant"), 10, "did you mean 'fold-constants'")


def test_all_blockers_are_reported_at_once(optimizer: Callable, tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NoSuchOperator", ["x"], ["a"], name="first"),
        helper.make_node("AnotherOne", ["x"], ["b"], name="second", domain="example.com"),
        helper.make_node("Add", ["a", "b"], ["y"], name="third"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("example.com", 1)]
    path = tmp_path / "unsupported.onnx"
    # NoSuchOperator is put into a domain that the checker does not know, as real custom operators are.
    nodes[0].domain = "example.com"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y]), opset_imports=opsets), path)
    finished = optimizer("compile", path)
    _fails(finished, 4, "2 node(s)", "'first'", "'second'")
    assert "third" not in finished.err


def test_opset_that_is_too_old(optimizer: Callable, tmp_path: Path) -> None:
    model = parser.parse_model('<ir_version: 3, opset_import: ["" : 5]> g (float[2] x) => (float[2] y) { y = Relu(x) }')
    path = tmp_path / "old.onnx"
    onnx.save(model, path)
    _fails(optimizer("compile", path), 3, "opset 5", "7")


@pytest.mark.parametrize("command", ["run", "inspect", "verify", "bench"])
def test_package_that_does_not_exist(optimizer: Callable, tmp_path: Path, command: str) -> None:
    _fails(optimizer(command, tmp_path / "nothing"), 7, "nothing")


def test_failed_compile_leaves_nothing_behind(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    optimizer("compile", perceptron, "--shape", "x=1,63", "-o", tmp_path / "package")
    assert sorted(tmp_path.iterdir()) == before


def test_output_that_is_no_package_is_kept(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "work.txt").write_text("mine", encoding="utf-8")
    _fails(optimizer("compile", perceptron, "-o", precious), 7, "precious", "not a package")
    assert (precious / "work.txt").read_text(encoding="utf-8") == "mine"
