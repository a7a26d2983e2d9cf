"""The functions that write and read pages of quantized caches, against the runtime's numpy of the same pages."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax, te, tirx

from optimizer.package import entry_points
from optimizer.runtime import cache_pages
from passes.cache_append import parameters
from passes.cache_pages import append_to_pages, read_pages
from schedules.cache_pages import PAGE, RECENT, CachePages

BATCH, HEADS, CHANNELS = 2, 3, 5
# Tokens that are in the buffers and codes among them, new tokens, and codes once these are appended.
PAST, BEFORE, NEW, QUANTIZED = 3 * PAGE + 4, PAGE, 7, 3 * PAGE
TOTAL, ROOM = PAST + NEW, 4 * PAGE

FORMS = [CachePages(bits, by_channel) for bits in (4, 8) for by_channel in (True, False)]


def _tokens() -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((BATCH, HEADS, TOTAL, CHANNELS)).astype(np.float32) * np.arange(1, CHANNELS + 1)


def _quantized(tokens: np.ndarray, pages: CachePages) -> tuple[np.ndarray, np.ndarray]:
    return cache_pages.quantized(
        tokens.astype(np.float32), entry_points.CachePages(pages.bits, pages.by_channel, PAGE, RECENT)
    )


def _buffers(pages: CachePages) -> list[np.ndarray]:
    """Return codes of the first tokens, their scales, and the others, in buffers whose room holds something else."""
    tokens = _tokens()[:, :, :PAST]
    codes, scales = _quantized(tokens[:, :, :BEFORE], pages)
    pads = [(codes, ROOM // pages.tokens_in_byte), (scales, ROOM // PAGE if pages.by_channel else ROOM)]
    pads.append((tokens[:, :, BEFORE:], ROOM))
    buffers = []
    for array, room in pads:
        buffer = np.full((*array.shape[:2], room, *array.shape[3:]), 77, array.dtype)
        buffer[:, :, : array.shape[2]] = array
        buffers.append(buffer.astype(np.float32) if array.dtype == np.float64 else buffer)
    return buffers


def _appended(pages: CachePages, counts: np.ndarray | None, *, can_fail: bool = True) -> list[np.ndarray]:
    arrays = [*_buffers(pages), _tokens()[:, :, PAST:].astype(np.float32)]
    kinds = [relax.TensorType(array.shape, str(array.dtype)) for array in arrays]
    dtype = None if counts is None else str(counts.dtype)
    function = append_to_pages(pages, kinds[:3], kinds[3], dtype, can_fail)
    compiled = tvm.compile(tvm.IRModule({"append": function.with_attr("global_symbol", "append")}), "llvm")
    tensors = [tvm.runtime.tensor(array) for array in [*arrays, *([] if counts is None else [counts])]]
    compiled["append"](*tensors, PAST, BEFORE, QUANTIZED, TOTAL)
    return [tensor.numpy() for tensor in tensors[:3]]


@pytest.mark.parametrize("pages", FORMS, ids=str)
def test_full_pages_become_codes_and_the_others_move_to_the_front(pages: CachePages) -> None:
    codes, scales, recent = _appended(pages, None)
    tokens = _tokens()
    for found, expected in zip((codes, scales), _quantized(tokens[:, :, :QUANTIZED], pages), strict=True):
        np.testing.assert_array_equal(found[:, :, : expected.shape[2]], expected)
        assert (found[:, :, expected.shape[2] :] == 77).all()
    np.testing.assert_array_equal(recent[:, :, : TOTAL - QUANTIZED], tokens[:, :, QUANTIZED:].astype(np.float32))


def test_rows_are_extended_where_they_end_and_filled_up_with_zeros() -> None:
    counts = np.array([PAST, PAST - 2], np.int32)
    *_, recent = _appended(FORMS[0], counts)
    tokens = _tokens().astype(np.float32)
    for row, count in enumerate(counts):
        expected = np.zeros((HEADS, TOTAL - QUANTIZED, CHANNELS), np.float32)
        first = count - QUANTIZED
        expected[:, :first] = tokens[row, :, QUANTIZED:count]
        expected[:, first : first + NEW] = tokens[row, :, PAST:]
        np.testing.assert_array_equal(recent[row, :, : TOTAL - QUANTIZED], expected)


def test_a_row_that_ends_among_the_codes_fails_or_gets_new_tokens_that_are_no_numbers() -> None:
    counts = np.array([PAST, QUANTIZED - 1], np.int32)
    with pytest.raises(ValueError, match="more than 32 tokens shorter"):
        _appended(FORMS[0], counts)
    *_, recent = _appended(FORMS[0], counts, can_fail=False)
    assert np.isfinite(recent[0, :, : TOTAL - QUANTIZED]).all()
    assert np.isnan(recent[1, :, :NEW]).all()


@pytest.mark.parametrize("pages", FORMS, ids=str)
def test_what_is_read_are_the_numbers_of_the_codes_and_then_recent_tokens(pages: CachePages) -> None:
    buffers = _buffers(pages)
    codes, scales, recent = (te.placeholder(buffer.shape, str(buffer.dtype)) for buffer in buffers)
    quantized, total = (tirx.Var(name, "int64") for name in ("quantized", "total"))
    result = read_pages(pages)(codes, scales, recent, quantized, total)
    function = te.create_prim_func([codes, scales, recent, result, quantized, total]).with_attr("global_symbol", "read")
    output = tvm.runtime.empty((BATCH, HEADS, PAST, CHANNELS), "float32")
    compiled = tvm.compile(tvm.IRModule({"read": function}), "llvm")
    compiled["read"](*map(tvm.runtime.tensor, buffers), output, BEFORE, PAST)
    form = entry_points.CachePages(pages.bits, pages.by_channel, PAGE, RECENT)
    tokens = _tokens()[:, :, :PAST].astype(np.float32)
    held = cache_pages.dequantized(*_quantized(tokens[:, :, :BEFORE], pages), form)
    np.testing.assert_allclose(output.numpy(), np.concatenate([held, tokens[:, :, BEFORE:]], 2), rtol=1e-6)


def test_equal_symbols_of_types_are_equal_symbols_of_the_function() -> None:
    rows, other = tirx.Var("rows", "int64"), tirx.Var("other", "int64")
    types = [relax.TensorType(shape, "float32") for shape in ((rows, 3), (rows, other), (rows + other,))]
    (a, three), (b, c), (sums,) = (buffer.shape for buffer in parameters(types, "xyz"))
    assert a.same_as(b)
    assert int(three) == 3
    assert [a.name, c.name, sums.name] == ["rows", "other", "extent"]
    assert not any(one.same_as(rows) or one.same_as(other) for one in (a, c, sums))
