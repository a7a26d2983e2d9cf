"""Calls of a loaded package: values, names, dtypes, ownership, entry points, threads."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import gc
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tvm

from optimizer.errors import InputMismatchError, OptionError
from optimizer.package.dtypes import numpy_dtype
from optimizer.package.entry_points import IndexRange
from optimizer.runtime import load
from optimizer.runtime.tensors import from_numpy
from tests.runtime.conftest import ECHO

WritePackage = Callable[..., Path]


def linear_inputs(rows: int = 3, seed: int = 1) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {"x.0/data": generator.standard_normal((rows, 4), np.float32), "scale": np.float32(0.5).reshape(())}


def linear_reference(inputs: dict[str, np.ndarray], seed: int = 0, factor: float = 1.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    matrix = generator.standard_normal((4, 8)).astype(np.float32)
    bias = generator.standard_normal(8).astype(ml_dtypes.bfloat16).astype(np.float32)
    return factor * inputs["scale"] * inputs["x.0/data"] @ matrix + bias


# A float32 dot product of length 4 with values near 1: a few units in the last place of the largest term.
TOLERANCE = 16 * np.finfo(np.float32).eps * 8


@pytest.mark.parametrize("name", ["linear", "linear.opt"])
def test_outputs_match_numpy_from_folder_and_single_file(write_linear: WritePackage, name: str) -> None:
    inputs = linear_inputs()
    outputs = load(write_linear(name))(inputs)
    np.testing.assert_allclose(outputs["y"], linear_reference(inputs), rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(outputs["flat"], inputs["x.0/data"].reshape(-1))


@pytest.mark.parametrize("name", ["linear", "linear.opt"])
def test_weights_in_memory_give_the_outputs_of_those_in_the_file(write_linear: WritePackage, name: str) -> None:
    path = write_linear(name)
    model = load(path, mapped=False)
    begin, _ = model.weight_region
    mappings = [line.split() for line in Path("/proc/self/maps").read_text(encoding="ascii").splitlines()]
    ranges = [[int(part, 16) for part in places.split("-")] for places, *_ in mappings]
    own = next(mapping for mapping, (low, high) in zip(mappings, ranges, strict=True) if low <= begin < high)
    assert (own[1], own[4]) == ("rw-p", "0")  # private, and of no file: the memory that Linux gives huge pages
    inputs = linear_inputs()
    outputs, expected = model(inputs), load(path)(inputs)
    for key, value in expected.items():
        np.testing.assert_array_equal(outputs[key], value)


def test_mapping_and_keywords_may_be_mixed(write_linear: WritePackage) -> None:
    inputs = linear_inputs()
    model = load(write_linear())
    outputs = model({"x.0/data": inputs["x.0/data"]}, scale=inputs["scale"])
    np.testing.assert_array_equal(outputs["y"], model(inputs)["y"])


def test_zero_rows_give_empty_outputs(write_linear: WritePackage) -> None:
    outputs = load(write_linear())(linear_inputs(rows=0))
    assert outputs["y"].shape == (0, 8)
    assert outputs["flat"].shape == (0,)


@pytest.mark.parametrize(
    "spoil",
    [
        np.asfortranarray,
        lambda x: np.frombuffer(b"\0" * 4 + x.tobytes(), np.float32)[1:].reshape(x.shape),
        lambda x: np.repeat(x, 2, axis=0)[::2],
    ],
    ids=["fortran order", "unaligned and read-only", "strided"],
)
def test_arrays_that_tvm_cannot_take_are_copied(
    write_linear: WritePackage, spoil: Callable[[np.ndarray], np.ndarray]
) -> None:
    inputs = linear_inputs()
    model = load(write_linear())
    spoilt = {**inputs, "x.0/data": spoil(inputs["x.0/data"])}
    np.testing.assert_array_equal(model(spoilt)["y"], model(inputs)["y"])


def test_every_dtype_comes_back_unchanged(write_echo: WritePackage) -> None:
    model = load(write_echo())
    arrays = {
        spec.name: np.array([1, 0, 1, 3], ml_dtypes.int4 if spec.dtype == "int4" else spec.dtype)
        for spec in model.entry("main").signature.inputs
    }
    outputs = model(arrays)
    for name, array in arrays.items():
        output = outputs[name.replace("in_", "out_")]
        assert output.dtype == array.dtype
        np.testing.assert_array_equal(output, array)


def test_outputs_stay_valid_after_model_and_later_calls(write_linear: WritePackage) -> None:
    inputs = linear_inputs()
    model = load(write_linear())
    numpy_outputs, tensors = model(inputs), model(inputs, outputs="dlpack")
    kept = {name: array.copy() for name, array in numpy_outputs.items()}
    model(linear_inputs(seed=2))
    del model
    gc.collect()
    for name, expected in kept.items():
        np.testing.assert_array_equal(numpy_outputs[name], expected)
        np.testing.assert_array_equal(np.from_dlpack(tensors[name]), expected)


def test_outputs_never_share_memory_with_inputs_or_weights(write_linear: WritePackage) -> None:
    model = load(write_linear())
    storage = np.zeros(64 + 1024, np.uint8)
    aligned = storage[-storage.ctypes.data % 64 :][:192].view(np.float32).reshape(12, 4)
    for outputs in ("numpy", "dlpack"):
        aligned[...] = 1
        results = model({"x.0/data": aligned, "scale": np.float32(1)}, outputs=outputs)
        aligned[...] = 2
        assert np.all(np.from_dlpack(results["flat"]) == 1)
        np.from_dlpack(results["weight"]).copy()
        results["weight"] = np.array(results["weight"].numpy()) if outputs == "dlpack" else results["weight"]
        results["weight"][...] = 0
    assert np.any(model(linear_inputs())["weight"])


def test_output_tensors_are_accepted_as_inputs(write_linear: WritePackage) -> None:
    decode = load(write_linear()).entry("decode")
    new = np.ones((1, 2, 4), np.float32)
    first = decode(past=np.zeros((1, 0, 4), np.float32), new=new, mask=np.ones((1, 2), np.int64), outputs="dlpack")
    second = decode(past=first["present"], new=2 * new, mask=np.ones((1, 4), np.int64))
    np.testing.assert_array_equal(second["present"], np.concatenate([new, 2 * new], axis=1))


class Foreign:
    """An array of another library, which speaks DLPack and nothing else."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: object) -> object:
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


@pytest.mark.parametrize("offset", [0, 16, 4])
def test_arrays_of_other_libraries_are_taken_by_dlpack(write_linear: WritePackage, offset: int) -> None:
    storage = np.zeros(256, np.uint8)
    start = -storage.ctypes.data % 64 + offset
    x = storage[start : start + 48].view(np.float32).reshape(3, 4)
    x[...] = np.arange(12).reshape(3, 4)
    outputs = load(write_linear())({"x.0/data": Foreign(x), "scale": Foreign(np.ones((), np.float32))})
    np.testing.assert_array_equal(outputs["flat"], np.arange(12))


def test_numpy_scalars_are_inputs(write_linear: WritePackage) -> None:
    model = load(write_linear())
    inputs = linear_inputs()
    for scale in (np.float32(0.5), np.array(0.5, np.float32)):
        np.testing.assert_array_equal(model({**inputs, "scale": scale})["y"], model(inputs)["y"])


def test_unknown_entry_point_lists_those_there_are(write_linear: WritePackage) -> None:
    with pytest.raises(OptionError, match="main, decode"):
        load(write_linear()).entry("prefill")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.0/data": np.zeros((3, 4), np.float64)}, "'x.0/data' has dtype float64, not float32"),
        ({"x.0/data": np.zeros((3, 4), ">f4")}, "'x.0/data' has dtype >f4, not float32"),
        ({"x.0/data": np.zeros((3, 5), np.float32)}, "'x.0/data' has 5 in dimension 1, not 4"),
        ({"x.0/data": np.zeros(4, np.float32)}, "'x.0/data' has 1 dimensions"),
        ({"x.0/data": np.zeros((65, 4), np.float32)}, "rows = 65, but it must be at least 0 and at most 64"),
        ({"y": np.zeros(1)}, "unknown y"),
        ({"x.0/data": tvm.runtime.tensor(np.zeros((3, 4), np.int32))}, "'x.0/data' has dtype int32, not float32"),
    ],
)
def test_mismatch_names_the_input_and_the_signature(
    write_linear: WritePackage, change: dict[str, np.ndarray], message: str
) -> None:
    with pytest.raises(InputMismatchError) as caught:
        load(write_linear())({**linear_inputs(), **change})
    assert message in str(caught.value)
    assert "main(x.0/data: float32[rows, 4], scale: float32[])" in str(caught.value)


@pytest.mark.parametrize("make", [np.asarray, Foreign, tvm.runtime.tensor])
def test_integers_beyond_what_they_choose_from_are_refused(
    write_echo: WritePackage, make: Callable[[np.ndarray], object]
) -> None:
    entry = dataclasses.replace(ECHO, index_ranges=(IndexRange("in_int64", -3, 2, "embed"),))
    model = load(write_echo(entry=entry))
    arrays = {spec.name: np.ones(2, numpy_dtype(spec.dtype)) for spec in entry.inputs}
    for values in ([-3, 2], [0, 0]):
        outputs = model({**arrays, "in_int64": make(np.array(values))})
        np.testing.assert_array_equal(outputs["out_int64"], values)
    for values, wrong in (([0, 3], 3), ([-4, 1], -4)):
        message = f"'in_int64' holds {wrong}, and chooses one of 3 elements .node 'embed'.; give it -3 to 2"
        with pytest.raises(InputMismatchError, match=message):
            model({**arrays, "in_int64": make(np.array(values))})


def test_inputs_without_elements_are_in_every_range(write_echo: WritePackage) -> None:
    entry = dataclasses.replace(ECHO, index_ranges=(IndexRange("in_int64", 0, -1, "embed"),))
    arrays = {spec.name: np.ones(0, numpy_dtype(spec.dtype)) for spec in entry.inputs}
    assert load(write_echo(entry=entry))(arrays)["out_int64"].size == 0


def test_missing_inputs_are_all_named(write_linear: WritePackage) -> None:
    with pytest.raises(InputMismatchError, match=r"missing scale, x\.0/data"):
        load(write_linear())()


def test_symbols_must_agree_between_inputs(write_linear: WritePackage) -> None:
    decode = load(write_linear()).entry("decode")
    ones = np.ones((1, 2, 4), np.float32)
    with pytest.raises(InputMismatchError, match=r"'mask' has 3 in dimension 1, but past_length \+ length is 4"):
        decode(past=ones, new=ones, mask=np.ones((1, 3), np.int64))


def test_calls_from_many_threads_give_their_own_results(write_linear: WritePackage) -> None:
    model = load(write_linear())
    inputs = [linear_inputs(rows=1 + seed % 5, seed=seed) for seed in range(32)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for given, outputs in zip(inputs, pool.map(model, inputs), strict=True):
            np.testing.assert_allclose(outputs["y"], linear_reference(given), rtol=0, atol=TOLERANCE)


def test_package_replaced_at_the_same_path_is_loaded_anew(write_linear: WritePackage, doubling_library: Path) -> None:
    inputs = linear_inputs()
    first = load(write_linear())
    second = load(write_linear(library=doubling_library, seed=5))
    np.testing.assert_allclose(first(inputs)["y"], linear_reference(inputs), rtol=0, atol=TOLERANCE)
    expected = linear_reference(inputs, seed=5, factor=2.0)
    np.testing.assert_allclose(second(inputs)["y"], expected, rtol=0, atol=2 * TOLERANCE)


def test_model_outlives_its_files(write_linear: WritePackage) -> None:
    path = write_linear()
    model = load(path)
    shutil.rmtree(path)
    inputs = linear_inputs()
    np.testing.assert_allclose(model(inputs)["y"], linear_reference(inputs), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("offset", [0, 16, 4])
def test_arrays_are_copied_only_where_code_cannot_read_them(offset: int) -> None:
    storage = np.zeros(256, np.uint8)
    start = -storage.ctypes.data % 64 + offset
    array = storage[start : start + 48].view(np.float32)
    tensor = from_numpy(array, "float32")
    assert tensor.data_ptr() % 16 == 0
    assert (tensor.data_ptr() == array.ctypes.data) == (offset % 16 == 0)
