from __future__ import annotations

from benchmarks.cliffs import cliffs


def test_a_size_is_a_cliff_beside_one_of_half_its_time_per_element() -> None:
    each = {1: 9.0, 2: 1.0, 15: 1.0, 16: 1.9, 17: 2.1, 32: 1.0, 33: 2.5, 34: 1.2, 64: 5.0}
    assert dict(cliffs(each)) == {33: 2.5}
