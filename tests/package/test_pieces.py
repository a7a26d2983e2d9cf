"""Files written in pieces: what was written is what is read, and each write but the last is a whole aligned piece."""

from __future__ import annotations

import io

from hypothesis import given
from hypothesis import strategies as st

from optimizer.package.pieces import PIECE_BYTES, write_in_pieces


class _Writes(io.BytesIO):
    """Keeps the size of each write."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def write(self, data: object, /) -> int:
        assert isinstance(data, bytearray)
        self.sizes.append(len(data))
        return super().write(data)


@given(st.lists(st.sampled_from([0, 1, 4095, PIECE_BYTES - 1, PIECE_BYTES, 2 * PIECE_BYTES + 3]), max_size=4))
def test_parts_are_written_in_order_by_whole_pieces(sizes: list[int]) -> None:
    parts = [bytes([number + 1]) * size for number, size in enumerate(sizes)]
    stream = _Writes()
    write_in_pieces(stream, parts)
    assert stream.getvalue() == b"".join(parts)
    *whole, rest = stream.sizes
    assert set(whole) <= {PIECE_BYTES}
    assert rest < PIECE_BYTES
