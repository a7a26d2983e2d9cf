"""Sequences and optionals inside of a model of tensors."""

from __future__ import annotations

import numpy as np
from onnx import parser

from optimizer.frontend.importer import import_model
from optimizer.reference import unoptimized

MODEL = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[6, n] x, int64 i) => (float[2, n] at, float[6, n] back, int64 count, float[3, 2, n] stacked, bool has) {
  two = Constant <value = int64 {2}> ()
  zero = Constant <value = int64 {0}> ()
  parts = SplitToSequence <axis = 0> (x, two)
  at = SequenceAt (parts, i)
  back = ConcatFromSequence <axis = 0> (parts)
  stacked = ConcatFromSequence <axis = 0, new_axis = 1> (parts)
  added = SequenceInsert (parts, at, zero)
  removed = SequenceErase (added)
  longer = SequenceInsert (removed, at)
  longest = SequenceInsert (longer, at)
  count = SequenceLength (longest)
  some = Optional (x)
  has = OptionalHasElement (some)
}"""


def test_sequences_of_known_length_become_tensors():
    run = unoptimized(import_model(parser.parse_model(MODEL)))
    x = np.arange(18, dtype=np.float32).reshape(6, 3)
    for index, part in ((0, x[:2]), (-1, x[4:])):
        outputs = run({"x": x, "i": np.array(index)})
        np.testing.assert_array_equal(outputs["at"], part)
        np.testing.assert_array_equal(outputs["back"], x)
        np.testing.assert_array_equal(outputs["stacked"], x.reshape(3, 2, 3))
        assert outputs["count"] == 5
        assert outputs["has"]
