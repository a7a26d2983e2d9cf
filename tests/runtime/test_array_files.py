from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from optimizer.package.entry_points import TensorSpec
from optimizer.runtime.array_files import read_arrays, write_arrays


@pytest.mark.parametrize("dtype", ["bool", "int64", "float16", "float32", "bfloat16", "float8_e4m3fn", "int4"])
@pytest.mark.parametrize("name", ["x", "file", "past_key_values.0.key", "a/b"])
def test_arrays_come_back_with_name_type_and_bits(tmp_path: Path, dtype: str, name: str) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    array = np.arange(6).reshape(2, 3).astype(kind)
    write_arrays(tmp_path / "arrays.npz", {name: array})
    (back,) = read_arrays(tmp_path / "arrays.npz", [TensorSpec(name, dtype, (2, 3))]).values()
    assert back.dtype == kind
    assert back.tobytes() == array.tobytes()


def test_missing_array_is_named(tmp_path: Path) -> None:
    write_arrays(tmp_path / "arrays.npz", {"x": np.zeros(1)})
    with pytest.raises(KeyError, match="y"):
        read_arrays(tmp_path / "arrays.npz", [TensorSpec("y", "float64", (1,))])
