"""A decoder whose caches are appended to in place gives the numbers of the one that returns them."""

from __future__ import annotations

import numpy as np
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax

from optimizer.frontend.importer import import_model
from passes import pipeline
from passes.rewrite_kv_cache import RewriteKvCache, caches_of
from tests.passes.properties.budget import budget
from tests.passes.properties.onnx_decoders import decoders
from tests.passes.properties.onnx_graphs import Generated
from tests.passes.properties.relax_interpreter import Interpreter

# As many tokens as are ever put behind others: any of the inputs may be a cache, the longer one too.
ROOM = 5


def _in_buffers(
    module: tvm.IRModule, arrays: list[np.ndarray]
) -> tuple[list[np.ndarray | tuple[int, ...]], list[np.ndarray]]:
    """Return the arguments of a rewritten module, caches in buffers with room, and these buffers."""
    function = module["main"]
    arguments: list[np.ndarray | tuple[int, ...]] = list(arrays)
    buffers: list[np.ndarray] = []
    lengths: dict[str, int] = {}
    for cache in caches_of(function):
        past = arrays[cache.parameter]
        room = [(0, 0)] * past.ndim
        room[cache.axis] = (0, ROOM)
        buffers.append(np.pad(past, room, constant_values=np.nan))
        arguments[cache.parameter] = buffers[-1]
        lengths.setdefault(str(function.params[cache.parameter].ty.shape.values[cache.axis]), past.shape[cache.axis])
    if buffers:
        assert isinstance(function.params[-1].ty, relax.ShapeType)
        arguments.append(tuple(lengths.values()))
    return arguments, buffers


_DEFAULT = pipeline.DEFAULT.split(",")


@budget(40)
@given(decoders(), st.one_of(st.lists(st.sampled_from(sorted({*_DEFAULT})), max_size=4), st.just(_DEFAULT)))
def test_a_decoder_that_appends_in_place_gives_the_same_numbers(generated: Generated, then: list[str]) -> None:
    module = import_model(generated.model).module
    after, records = pipeline.run(module, [RewriteKvCache(), *pipeline.parse(",".join(then))])
    arrays = [generated.inputs[value.name] for value in generated.model.graph.input]
    expected = Interpreter(module).run(arrays)
    arguments, buffers = _in_buffers(after, arrays)
    caches = caches_of(after["main"])
    results = Interpreter(after).run(arguments)
    assert len(caches) == records[0].outcome.rewritten
    kept = [value for number, value in enumerate(expected) if number not in {cache.output for cache in caches}]
    for wanted, found in zip(kept, results, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)
    for cache, buffer in zip(caches, buffers, strict=True):
        present = expected[cache.output]
        used = np.moveaxis(buffer, cache.axis, 0)[: present.shape[cache.axis]]
        np.testing.assert_array_equal(np.moveaxis(used, 0, cache.axis), present)
        assert np.isnan(np.moveaxis(buffer, cache.axis, 0)[present.shape[cache.axis] :]).all()


@budget(10)
@given(decoders())
def test_rewriting_caches_is_idempotent(generated: Generated) -> None:
    once = RewriteKvCache().run(import_model(generated.model).module).module
    again = RewriteKvCache().run(once)
    assert again.rewritten == 0
    tvm.ir.assert_structural_equal(again.module, once, map_free_vars=True)
