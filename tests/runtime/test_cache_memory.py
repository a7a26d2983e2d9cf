"""The memory of caches: buffers beside each other, that grow with the text, and keep their content in huge pages."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optimizer.errors import InsufficientMemoryError
from optimizer.package.entry_points import CacheRecord, EntryPoint
from optimizer.runtime import tensors
from optimizer.runtime.cache_memory import CacheMemory, bytes_of
from optimizer.runtime.kv_cache import SMALLEST_CAPACITY, KeyValueCache
from optimizer.runtime.tensors import host_view

_SHAPES = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 7), st.sampled_from([1, 31, 32, 1 << 16])), max_size=4)


def _entry() -> EntryPoint:
    """Return the entry point of a decoder of one layer, two heads of 1024 channels each."""
    records = tuple(
        CacheRecord(f"past_{part}", f"present_{part}", "float16", (1, 2, "room", 1024), 2, "past", "past + new")
        for part in ("key", "value")
    )
    return EntryPoint("main", (), (), (), records)


class _Refusing(mmap.mmap):
    """Memory of a kernel without huge pages."""

    def madvise(self, *_: int) -> None:
        raise OSError("no such advice")


@settings(max_examples=30, deadline=None, derandomize=True)
@given(shapes=_SHAPES, dtype=st.sampled_from(["float16", "float32", "bfloat16", "uint8"]))
def test_buffers_begin_at_whole_lines_and_keep_what_is_written(shapes: list[tuple[int, ...]], dtype: str) -> None:
    memory = CacheMemory(bytes_of([(shape, dtype) for shape in shapes]))
    made = [memory.allocate(shape, dtype) for shape in shapes]
    for number, tensor in enumerate(made):
        view = host_view(tensor, dtype)
        assert not view.size or tensor.data_ptr() % 64 == 0
        assert not view.astype(np.float32).any()
        view[...] = number + 1
    memory.use_large_pages(written=True)
    for number, tensor in enumerate(made):
        assert (host_view(tensor, dtype).astype(np.float32) == number + 1).all()


def test_a_kernel_without_huge_pages_gives_ordinary_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optimizer.runtime.cache_memory.mmap.mmap", _Refusing)
    memory = CacheMemory(8 << 20)
    view = host_view(memory.allocate((8 << 18,), "float32"), "float32")
    view[...] = 3
    memory.use_large_pages(written=True)
    assert memory.is_large
    assert (view == 3).all()


def test_more_than_there_can_be_is_refused() -> None:
    for size in (1 << 60, 1 << 70):
        with pytest.raises(InsufficientMemoryError, match=f"for {size} bytes; reserve fewer tokens"):
            CacheMemory(size)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(steps=st.lists(st.integers(1, 700), max_size=6), capacity=st.none() | st.integers(6 * 700, 1 << 20))
def test_room_follows_the_tokens_and_not_the_capacity(steps: list[int], capacity: int | None) -> None:
    cache = KeyValueCache(_entry(), tensors.CPU, capacity=capacity)
    written = np.zeros((1, 2, 0, 1024), np.float16)
    for number, step in enumerate(steps):
        total = cache.length + step
        cache.make_room(total)
        counts = cache.reserve(total)
        for buffers in cache.buffers.values():
            assert total <= buffers.tensors[0].shape[2] <= max(total * 1.5, total + SMALLEST_CAPACITY)
            host_view(buffers.tensors[0], "float16")[:, :, cache.length : total] = number
        cache.commit(total, counts)
        written = np.concatenate([written, np.full((1, 2, step, 1024), number, np.float16)], 2)
    for buffers in cache.buffers.values():
        np.testing.assert_array_equal(host_view(buffers.tensors[0], "float16")[:, :, : cache.length], written)
