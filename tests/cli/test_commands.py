from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from optimizer.errors import OptionError

_DECODER_FOLDER = Path(__file__).parents[2] / "examples" / "decoder"


@pytest.fixture
def package(optimizer: Callable, perceptron: Path, tmp_path: Path) -> Path:
    path = tmp_path / "perceptron.opt"
    assert optimizer("compile", perceptron, "-o", path).code == 0
    return path


def test_compile_reports_what_it_did(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    finished = optimizer("compile", perceptron, "-o", tmp_path / "package", "--json")
    report = json.loads(finished.out)
    assert report["onnx_nodes"] == 3
    assert report["kernels"] == 2
    assert report["weight_bytes"] >= (64 * 32 + 32 * 10) * 4  # columns are padded to whole vectors
    assert report["certificate"]["reference"] == "onnxruntime"
    assert report["step_seconds"]["median"] > 0


def test_compile_prints_a_table(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    out = optimizer("compile", perceptron, "-o", tmp_path / "package").out
    for row in ("nodes", "fused", "kernels", "weights", "time per step", "certificate"):
        assert f"\n{row}" in out


def test_dry_run_writes_nothing(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    finished = optimizer("compile", perceptron, "-o", tmp_path / "package", "--dry-run", "--json")
    assert json.loads(finished.out)["kernels"] == 2
    assert sorted(tmp_path.iterdir()) == before


def test_precision_halves_the_weights(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    arguments = ("compile", perceptron, "-o", tmp_path / "package", "--json", "--dry-run", "--precision")
    full, half = (json.loads(optimizer(*arguments, name).out)["weight_bytes"] for name in ("fp32", "bf16"))
    assert half == full / 2


def test_weights_shrink_and_the_report_says_how(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    arguments = ("compile", perceptron, "-o", tmp_path / "package", "--json", "--dry-run")
    exact = json.loads(optimizer(*arguments).out)["weight_bytes"]
    rounded = json.loads(optimizer(*arguments, "--weights", "int4", "--weight-group", "16").out)
    assert rounded["weight_bytes"] < exact / 2  # the smaller matrix stays as it is
    assert "int4, groups of 16, symmetric, float16 scales, by rtn" in rounded["weight_scheme"]


def test_run_gives_the_models_numbers(optimizer: Callable, package: Path, perceptron: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    x = np.random.default_rng(5).standard_normal((3, 64), dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    finished = optimizer("run", package, "-i", f"x={tmp_path / 'x.npy'}", "-o", tmp_path / "y.npz", "--json")
    assert json.loads(finished.out)[0]["shape"] == "3x10"
    wanted = onnxruntime.InferenceSession(perceptron).run(None, {"x": x})[0]
    np.testing.assert_allclose(np.load(tmp_path / "y.npz")["y"], wanted, rtol=1e-5, atol=1e-4)


def test_run_fills_in_random_inputs(optimizer: Callable, package: Path) -> None:
    assert json.loads(optimizer("run", package, "--dim", "batch=4", "--json").out)[0]["shape"] == "4x10"


def test_inspect_shows_the_manifest(optimizer: Callable, package: Path) -> None:
    assert json.loads(optimizer("inspect", package, "--json").out)["entry_points"][0]["inputs"][0]["name"] == "x"
    assert "[batch, 64]" in optimizer("inspect", package).out


def test_inspect_shows_a_model(optimizer: Callable, perceptron: Path) -> None:
    report = json.loads(optimizer("inspect", perceptron, "--json").out)
    assert report["compiles"]
    assert report["operators"] == {"MatMul": 2, "Relu": 1}


def test_inspect_names_the_nodes_of_each_kernel(optimizer: Callable, package: Path) -> None:
    kernels = json.loads(optimizer("inspect", package, "--json").out)["kernels"]
    assert [kernel["nodes"] for kernel in kernels] == [[["hidden", "active"]], [["y"]]]
    assert "hidden, active" in optimizer("inspect", package, "--kernels").out


def test_explanations_give_each_site_with_its_nodes_and_outcome(
    optimizer: Callable, perceptron: Path, tmp_path: Path
) -> None:
    passes = "convert-precision{dtype=bfloat16},convert-precision{dtype=bfloat16}"
    arguments = ("compile", perceptron, "-o", tmp_path / "package", "--dry-run", "--explain", "--passes", passes)
    sites = [site for site in json.loads(optimizer(*arguments, "--json").out)["sites"] if site["name"] in passes]
    refusal = "refused: both operands are bfloat16 already"
    assert [site["outcome"] for site in sites] == ["rewritten", "rewritten", refusal, refusal]
    assert [site["nodes"] for site in sites] == [["hidden"], ["y"], ["hidden"], ["y"]]
    assert refusal in optimizer(*arguments).out


def test_inspect_explains_the_passes_of_a_model(optimizer: Callable, perceptron: Path) -> None:
    sites = json.loads(optimizer("inspect", perceptron, "--passes", "--json").out)["sites"]
    assert [(site["name"], site["nodes"]) for site in sites] == [
        ("fuse-operators", ["hidden", "active"]),
        ("merge-kernels", ["hidden", "active", "y"]),
    ]
    assert sites[0]["outcome"] == "rewritten as matmul_relu"
    assert "fold-batch-norm" in optimizer("inspect", perceptron, "--passes").out


def test_dumped_modules_are_numbered_and_elide_weights(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ir"
    optimizer("compile", perceptron, "-o", tmp_path / "package", "--dry-run", "--dump-ir", folder)
    files = sorted(folder.iterdir())
    assert [file.name[:3] for file in files] == [f"{index:02d}-" for index in range(len(files))]
    assert files[0].name == "00-import.py"
    assert {"fold-constants", "legalize", "fuse-operators", "schedule"} <= {file.stem[3:] for file in files}
    # Code for a kernel may be longer than its weights.
    (scheduled,) = [file for file in files if file.stem[3:] == "schedule"]
    assert max(file.stat().st_size for file in files if file != scheduled) < 64 * 32 * 4
    assert "Metadata omitted" in scheduled.read_text(encoding="utf-8")
    assert "R.matmul" in files[0].read_text(encoding="utf-8")


def test_passes_lists_every_option_with_its_default(optimizer: Callable) -> None:
    listed = json.loads(optimizer("passes", "--json").out)["passes"]
    options = {each["name"]: each["options"] for each in listed}
    assert options["convert-precision"] == [{"name": "dtype", "type": "str", "default": "bfloat16"}]
    assert all(each["documentation"] for each in listed)
    assert "dtype=bfloat16" in optimizer("passes").out


def test_bisect_finds_no_fault_in_right_passes(optimizer: Callable, perceptron: Path) -> None:
    finished = optimizer("bisect", perceptron, "--json")
    assert finished.code == 0
    assert json.loads(finished.out) == {"error": None, "pass": None, "site": None}


def test_bisect_names_the_pass_that_computes_too_coarsely(optimizer: Callable, perceptron: Path) -> None:
    passes = "fold-constants,convert-precision{dtype=bfloat16}"
    finished = optimizer("bisect", perceptron, "--json", "--passes", passes)
    assert finished.code == 9
    report = json.loads(finished.out)
    assert report["pass"] == "convert-precision{dtype=bfloat16}"
    assert report["site"]["nodes"] == ["hidden"]


def test_verify_finds_a_changed_byte(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    optimizer("compile", perceptron, "-o", package)
    assert optimizer("verify", package).code == 0
    weights = package / "weights.bin"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    finished = optimizer("verify", package)
    assert finished.code == 7
    assert "weights.bin" in finished.err


def test_verify_compares_with_the_model(optimizer: Callable, package: Path, perceptron: Path) -> None:
    report = json.loads(optimizer("verify", package, "--model", perceptron, "--json").out)
    assert report["certificate"]["outputs"][0]["ok"]


def test_verify_fits_weights_again_to_the_files_that_they_were_fitted_to(
    optimizer: Callable, perceptron: Path, tmp_path: Path
) -> None:
    files = [tmp_path / "one.npz", tmp_path / "other.npz"]
    for seed, file in enumerate(files):
        np.savez(file, x=np.random.default_rng(seed).standard_normal((40, 64), dtype=np.float32))
    package = tmp_path / "package"
    fitting = ("--weights", "int4", "--weight-method", "gptq", "--calibration", files[0])
    assert optimizer("compile", perceptron, "-o", package, *fitting).code == 0
    alone = optimizer("verify", package, "--model", perceptron)
    assert alone.code == 0
    assert "the weights were fitted to files; give them as --calibration" in " ".join(alone.out.split())
    verify = ("verify", package, "--model", perceptron, "--json", "--calibration")
    assert json.loads(optimizer(*verify, files[0]).out)["certificate"]["outputs"][0]["ok"]
    mistaken = optimizer(*verify, files[1])
    assert mistaken.code == OptionError.exit_code
    assert "the weights were fitted to one.npz" in mistaken.err


def test_bench_measures(optimizer: Callable, package: Path) -> None:
    report = json.loads(optimizer("bench", package, "--seconds", "0.05", "--json").out)
    assert report["median_seconds"] > 0
    assert report["runs"] >= 3
    assert "kernels" not in report


def test_bench_tells_the_time_of_each_kernel_with_its_nodes(optimizer: Callable, package: Path) -> None:
    arguments = ("bench", package, "--seconds", "0.05", "--kernels")
    kernels = json.loads(optimizer(*arguments, "--json").out)["kernels"]
    assert {tuple(kernel["nodes"]): kernel["calls"] for kernel in kernels} == {("hidden", "active"): 1, ("y",): 1}
    assert all(kernel["seconds"] > 0 for kernel in kernels)
    assert "hidden, active" in optimizer(*arguments).out


def test_targets_names_the_host(optimizer: Callable) -> None:
    rows = json.loads(optimizer("targets", "--json").out)
    assert {"x86-avx512", "x86-avx2", "arm64", "cuda"} <= {row["name"] for row in rows}
    assert sum(row["host"] for row in rows) == 1


def test_doctor_gives_a_fix_for_each_failure(optimizer: Callable) -> None:
    checks = json.loads(optimizer("doctor", "--json").out)
    assert all(check["fix"] for check in checks if check["status"] == "fail")


def test_compile_twice_gives_the_same_bytes(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    packages = [tmp_path / "first.opt", tmp_path / "second.opt"]
    for path in packages:
        optimizer("compile", perceptron, "-o", path)
    assert filecmp.cmp(*packages, shallow=False)


def test_generate_refuses_what_is_no_language_model(optimizer: Callable, perceptron: Path, tmp_path: Path) -> None:
    package = tmp_path / "perceptron.opt"
    optimizer("compile", perceptron, "-o", package, "--no-certificate")
    finished = optimizer("generate", package, "--prompt", "a", "--tokenizer", _DECODER_FOLDER)
    assert finished.code == 10
    assert "no language model" in finished.err


def test_generate_streams_text_and_ends_with_figures(optimizer: Callable, tmp_path: Path) -> None:
    package = tmp_path / "decoder.opt"
    optimizer("compile", _DECODER_FOLDER / "model.onnx", "-o", package, "--no-certificate")
    finished = optimizer("generate", package, "--prompt", "The king said", "-n", "6")
    assert finished.code == 0
    assert finished.out.strip()
    assert "tokens/s" in finished.err
    document = json.loads(optimizer("generate", package, "--prompt", "The king said", "-n", "6", "--json").out)
    assert document["text"] == finished.out.removesuffix("\n")
    assert len(document["tokens"]) == 6
    both = optimizer("generate", package, "--prompt", "In the", "--prompt", "The king said", "-n", "6", "--json")
    assert [each["prompt"] for each in json.loads(both.out)] == ["In the", "The king said"]
    assert json.loads(both.out)[1]["tokens"] == document["tokens"]
    copied = optimizer("generate", package, "--prompt", "The king said", "-n", "6", "--no-mmap", "--json")
    assert json.loads(copied.out)["tokens"] == document["tokens"]
    (tmp_path / "prompt.txt").write_text("The king said\r\n", encoding="utf-8", newline="")
    read = optimizer("generate", package, "--prompt-file", tmp_path / "prompt.txt", "-n", "6", "--json")
    assert json.loads(read.out)["prompt"] == "The king said"
    assert json.loads(read.out)["tokens"] == document["tokens"]
    assert optimizer("generate", package, "--prompt", "a", "--system", "b").code == 10
    without = optimizer("generate", package, "--prompt", "a", "--chat")
    assert without.code == 10
    assert "chat_template.jinja" in without.err
