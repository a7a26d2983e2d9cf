from __future__ import annotations

import dataclasses

import ml_dtypes
import numpy as np
import pytest

from optimizer.errors import OptionError
from optimizer.package.entry_points import EntryPoint, SymbolRange, TensorSpec
from optimizer.runtime.generation.roles import roles_of
from optimizer.runtime.generation.step_inputs import Step, mask_values

_SYMBOLS = tuple(SymbolRange(name, 0, None) for name in ("batch", "new", "past"))
_TOKENS = TensorSpec("input_ids", "int64", ("batch", "new"))
_PAST = TensorSpec("past_key_values.0.key", "float16", ("batch", 2, "past", 32))
_LOGITS = TensorSpec("logits", "float32", ("batch", "new", 100))
_PRESENT = TensorSpec("present.0.key", "float16", ("batch", 2, "past + new", 32))
_DECODER = EntryPoint("main", (_TOKENS, _PAST), (_LOGITS, _PRESENT), _SYMBOLS)


def test_the_empty_cache_of_one_sequence_has_no_tokens() -> None:
    (cache,) = roles_of(_DECODER).cache
    assert (cache.shape, cache.axis, cache.present) == ((1, 2, 0, 32), 2, "present.0.key")


@pytest.mark.parametrize(
    ("inputs", "outputs", "message"),
    [
        ((TensorSpec("x", "float32", (1,)),), (_LOGITS,), "no language model"),
        ((_TOKENS,), (_LOGITS,), "no cache"),
        ((_TOKENS, _PAST, TensorSpec("beam", "int64", (1,))), (_LOGITS, _PRESENT), "inputs beam"),
        ((_TOKENS, _PAST, TensorSpec("write_indices", "int64", (4,))), (_LOGITS, _PRESENT), "4 sequences"),
        ((_TOKENS, _PAST, TensorSpec("write_indices", "int64", ("batch", 1))), (_LOGITS, _PRESENT), r"int64 \[batch\]"),
        ((_TOKENS, _PAST, TensorSpec("cache_position", "int64", (4,))), (_LOGITS, _PRESENT), "4 tokens"),
        ((TensorSpec("input_ids", "int64", (4, "new")), _PAST), (_LOGITS, _PRESENT), "4 sequences"),
        ((TensorSpec("input_ids", "int64", ("batch", 8)), _PAST), (_LOGITS, _PRESENT), "8 tokens"),
        (
            (_TOKENS, _PAST, TensorSpec("attention_mask", "int64", ("batch", 1, "new", "all"))),
            (_LOGITS, _PRESENT),
            "integers, booleans or floats",
        ),
        ((_TOKENS, _PAST, TensorSpec("attention_mask", "bool", (4, 1, "new", "all"))), (_LOGITS, _PRESENT), "4 sequ"),
        ((_TOKENS, _PAST, TensorSpec("attention_mask", "bool", ("batch", 8))), (_LOGITS, _PRESENT), "8 tokens"),
        ((TensorSpec("input_ids", "int32", ("batch", "new")), _PAST), (_LOGITS, _PRESENT), "as int64"),
        ((_TOKENS, _PAST), (_LOGITS, dataclasses.replace(_PRESENT, shape=_PAST.shape)), "--kv-cache in-place"),
        ((_TOKENS, dataclasses.replace(_PAST, shape=("batch", 2, 64, 32))), (_LOGITS, _PRESENT), "grows"),
    ],
)
def test_what_cannot_generate_is_refused(
    inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        roles_of(EntryPoint("main", inputs, outputs, _SYMBOLS))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_a_query_does_not_see_has_the_lowest_number_of_the_masks_type(dtype: str) -> None:
    mask = mask_values(Step((5, 6), 1, 4), dtype, 4)
    assert mask.dtype == np.dtype(dtype)
    lowest = float(ml_dtypes.finfo(mask.dtype).min)
    np.testing.assert_array_equal(mask.astype(np.float64), [[[[0, 0, lowest, lowest], [0, 0, 0, lowest]]]])
