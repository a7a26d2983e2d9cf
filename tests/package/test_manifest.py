"""The manifest: what is written is read back, and nothing but a valid manifest is read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optimizer.errors import PackageError
from optimizer.package.digests import DIGESTED_BYTES
from optimizer.package.dtypes import ITEM_BYTES
from optimizer.package.entry_points import CacheRecord, EntryPoint, IndexRange, SymbolRange, TensorSpec
from optimizer.package.manifest import Certificate, FileRecord, Manifest, OutputComparison, PassRecord, WeightRecord

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
NAMES = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20)
COUNTS = st.integers(0, 2**40)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | st.integers(-(2**63) + 1, 2**63 - 1) | FINITE | TEXT
DIMENSIONS = COUNTS | st.sampled_from(["n", "m", "n + m", "(n - 1) // 2", "max(n, 3) % m", "-n * 2 + min(n, m)"])


def specs() -> st.SearchStrategy[tuple[TensorSpec, ...]]:
    spec = st.builds(
        TensorSpec, NAMES, st.sampled_from(sorted(ITEM_BYTES)), st.lists(DIMENSIONS, max_size=5).map(tuple)
    )
    return st.lists(spec, max_size=4, unique_by=lambda spec: spec.name).map(tuple)


ENTRIES = st.builds(
    EntryPoint,
    st.sampled_from(["main", "prefill"]),
    specs(),
    specs(),
    st.just((SymbolRange("n", 0, None), SymbolRange("m", 1, 7))),
)
CERTIFICATES = st.builds(
    Certificate,
    st.sampled_from(["onnxruntime", "onnx", "unoptimized"]),
    TEXT,
    st.lists(COUNTS, max_size=3).map(tuple),
    st.lists(st.dictionaries(NAMES, COUNTS, max_size=3), max_size=3).map(tuple),
    st.lists(
        st.builds(OutputComparison, NAMES, TEXT, FINITE, FINITE, FINITE, st.none() | FINITE, st.booleans()), max_size=3
    ).map(tuple),
)
RELAXED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@RELAXED
@given(
    entries=st.lists(ENTRIES, min_size=1, max_size=2, unique_by=lambda entry: entry.name).map(tuple),
    passes=st.lists(st.builds(PassRecord, TEXT, st.dictionaries(TEXT, SCALARS, max_size=3)), max_size=3).map(tuple),
    certificate=st.none() | CERTIFICATES,
    scheme=TEXT,
)
def test_reading_returns_what_was_written(
    draft: Manifest,
    entries: tuple[EntryPoint, ...],
    passes: tuple[PassRecord, ...],
    certificate: Certificate | None,
    scheme: str,
) -> None:
    manifest = dataclasses.replace(
        draft, entry_points=entries, passes=passes, certificate=certificate, weight_scheme=scheme
    )
    text = manifest.to_json()
    assert Manifest.from_json(text) == manifest
    assert Manifest.from_json(text).to_json() == text


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(TEXT, children, max_size=3),
    max_leaves=8,
)


def places(value: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Return the path of every value inside a JSON document."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, child in children for place in places(child, (*path, key)))]


@RELAXED
@given(data=st.data(), intruder=JSON)
def test_a_manifest_with_any_value_replaced_is_read_or_refused(
    draft: Manifest, data: st.DataObject, intruder: object
) -> None:
    document = json.loads(draft.to_json())
    path = data.draw(st.sampled_from(places(document)[1:]))
    target = document
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = intruder
    try:
        manifest = Manifest.from_json(json.dumps(document).encode())
    except PackageError:
        return
    assert Manifest.from_json(manifest.to_json()) == manifest


@given(st.binary(max_size=200) | TEXT.map(str.encode))
def test_arbitrary_bytes_are_refused(text: bytes) -> None:
    with pytest.raises(PackageError):
        Manifest.from_json(text)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"format": "optimizer-package", "format_version": ' + b"9" * 10_000 + b"}",
        b'{"format": "optimizer-package", "format": "optimizer-package"}',
        b'{"format": "optimizer-package", "format_version": NaN}',
        b'{"format": "optimizer-package", "format_version": true}',
        b'{"format": "optimizer-package", "format_version": 7}',
        b"\xff\xfe",
        b"",
    ],
    ids=["deep array", "deep object", "huge integer", "duplicate key", "NaN", "true version", "empty", "bytes", "none"],
)
def test_hostile_documents_are_refused(text: bytes) -> None:
    with pytest.raises(PackageError):
        Manifest.from_json(text)


@pytest.mark.parametrize("version", [5, 8])
def test_another_format_version_says_what_to_do(draft: Manifest, version: int) -> None:
    document = json.loads(draft.to_json()) | {"format_version": version}
    message = f"has format version {version}, this version reads 6 and 7; compile the model again"
    with pytest.raises(PackageError, match=message):
        Manifest.from_json(json.dumps(document).encode())


def test_version_6_knew_no_ranges_of_indices(draft: Manifest) -> None:
    document = json.loads(draft.to_json()) | {"format_version": 6}
    for entry in document["entry_points"]:
        del entry["index_ranges"]
    assert Manifest.from_json(json.dumps(document).encode()) == draft


@pytest.mark.parametrize("name", ["absent", "past_key_values.0.key"])
def test_ranges_are_of_integer_inputs(draft: Manifest, name: str) -> None:
    (entry,) = draft.entry_points
    right = dataclasses.replace(entry, index_ranges=(IndexRange("input_ids", -3, 2, "embed"),))
    manifest = dataclasses.replace(draft, entry_points=(right,))
    assert Manifest.from_json(manifest.to_json()) == manifest
    wrong = dataclasses.replace(entry, index_ranges=(IndexRange(name, -3, 2, "embed"),))
    with pytest.raises(PackageError, match=f"no integers {name} to bound"):
        dataclasses.replace(draft, entry_points=(wrong,))


_CACHE = CacheRecord("past", "present", "float16", ("n", "room", 4), 1, "m", "m + n")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"past": "x"}, "no input and output"),
        ({"present": "x"}, "no input and output"),
        ({"axis": 3}, "no such axis"),
        ({"shape": ("n", "room")}, "another rank"),
        ({"shape": ("n", "m", 4)}, "no symbol of its own"),
        ({"length": "k"}, "no symbol of its own"),
        ({"total": "k"}, "does not declare"),
        ({"dtype": "float"}, "unknown dtype"),
    ],
)
def test_a_cache_that_does_not_fit_its_entry_point_is_refused(
    draft: Manifest, changes: dict[str, object], message: str
) -> None:
    past, present = (TensorSpec(name, "float32", ("n", "m", 4)) for name in ("past", "present"))
    symbols = (SymbolRange("n", 0, None), SymbolRange("m", 0, None))
    right = EntryPoint("main", (past,), (present,), symbols, (_CACHE,))
    manifest = dataclasses.replace(draft, entry_points=(right,))
    assert Manifest.from_json(manifest.to_json()) == manifest
    wrong = dataclasses.replace(right, caches=(dataclasses.replace(_CACHE, **changes),))
    with pytest.raises(PackageError, match=message):
        dataclasses.replace(draft, entry_points=(wrong,))


def test_unknown_and_missing_fields_are_named(draft: Manifest) -> None:
    document = json.loads(draft.to_json())
    with pytest.raises(PackageError, match="manifest has the unknown field 'surprise'"):
        Manifest.from_json(json.dumps(document | {"surprise": 1}).encode())
    del document["requirements"]["glibc"]
    with pytest.raises(PackageError, match=r"manifest\.requirements lacks the field 'glibc'"):
        Manifest.from_json(json.dumps(document).encode())


WEIGHT = WeightRecord("w", "float32", (4,), 0, 16)
FILES = (FileRecord("model.so", 1, ("0" * 64,)), FileRecord("weights.bin", 128, ("0" * 64,)))


def with_weights(*weights: WeightRecord) -> Callable[[Manifest], Manifest]:
    return lambda draft: dataclasses.replace(draft, weights=weights, files=FILES)


def with_files(*files: FileRecord) -> Callable[[Manifest], Manifest]:
    return lambda draft: dataclasses.replace(draft, files=files)


def with_input(spec: TensorSpec) -> Callable[[Manifest], Manifest]:
    entry = EntryPoint("main", (spec,), (), (SymbolRange("n", 0, None),))
    return lambda draft: dataclasses.replace(draft, entry_points=(entry,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_weights(WEIGHT, WEIGHT), "weight 'w' occurs twice"),
        (with_weights(WEIGHT, dataclasses.replace(WEIGHT, name="v")), "'w' and 'v' overlap"),
        (with_weights(dataclasses.replace(WEIGHT, offset=128)), "'w' ends beyond weights.bin"),
        (with_weights(dataclasses.replace(WEIGHT, offset=-64)), "no multiple of 64"),
        (with_weights(dataclasses.replace(WEIGHT, offset=16)), "no multiple of 64"),
        (with_weights(dataclasses.replace(WEIGHT, bytes=12)), "which its shape contradicts"),
        (with_weights(dataclasses.replace(WEIGHT, shape=(2**62, 2**62, 4))), "which its shape contradicts"),
        (with_weights(dataclasses.replace(WEIGHT, shape=(-1, -4))), "negative dimension"),
        (with_weights(dataclasses.replace(WEIGHT, dtype="complex64")), "unknown dtype 'complex64'"),
        (with_weights(dataclasses.replace(WEIGHT, dtype="int4", bytes=4)), "pack it as uint8"),
        (with_files(*FILES, FILES[0]), "file 'model.so' occurs twice"),
        (with_files(FILES[0]), "weights.bin is not among the files"),
        (with_files(*FILES, FileRecord("../evil", 1, ("0" * 64,))), "not a plain file name"),
        (with_files(*FILES, FileRecord("/etc/passwd", 1, ("0" * 64,))), "not a plain file name"),
        (with_files(*FILES, FileRecord("manifest.json", 1, ("0" * 64,))), "may not be listed"),
        (with_files(*FILES, FileRecord("a", -1, ("0" * 64,))), "negative size"),
        (with_files(*FILES, FileRecord("a", 1, ("0" * 63,))), "not a digest"),
        (with_files(*FILES, FileRecord("a", 1, ())), "file a of 1 bytes has 0 digests, not 1"),
        (with_files(*FILES, FileRecord("a", 0, ())), "has 0 digests, not 1"),
        (with_files(*FILES, FileRecord("a", DIGESTED_BYTES, ("0" * 64,) * 2)), "has 2 digests, not 1"),
        (with_files(*FILES, FileRecord("a", DIGESTED_BYTES + 1, ("0" * 64,))), "has 1 digests, not 2"),
        (with_files(*FILES, FileRecord("a", 2**62, ("0" * 64,))), f"has 1 digests, not {2**40}"),
        (with_files(*FILES, FileRecord("a", DIGESTED_BYTES + 1, ("0" * 64, "x"))), "not a digest"),
        (with_input(TensorSpec("x", "float32", (-1,))), "negative dimension -1"),
        (with_input(TensorSpec("x", "float32", ("n + m",))), "uses symbols that the entry point does not declare"),
        (with_input(TensorSpec("x", "float32", ("__import__('os').name",))), "holds more than integers"),
        (with_input(TensorSpec("x", "float32", ("2 ** n",))), "holds more than integers"),
        (with_input(TensorSpec("x", "float32", ("n" * 1001,))), "at most 1000"),
        (with_input(TensorSpec("x", "float32", ("-" * 900 + "n",))), "nests more than 64"),
        (with_input(TensorSpec("x", "float32", (1,) * 33)), "33 dimensions"),
        (lambda draft: dataclasses.replace(draft, entry_points=()), "no entry point"),
        (lambda draft: dataclasses.replace(draft, entry_points=draft.entry_points * 2), "'main' occurs twice"),
        (lambda draft: dataclasses.replace(draft, library="sub/model.so"), "not a plain file name"),
    ],
)
def test_contradictions_are_refused(draft: Manifest, change: Callable[[Manifest], Manifest], message: str) -> None:
    with pytest.raises(PackageError) as caught:
        change(draft)
    assert message in str(caught.value)
