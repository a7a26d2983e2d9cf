"""What is compiled beside the model in ONNX that somebody else runs: outputs of a call, texts of a session."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from optimizer.package.dtypes import numpy_dtype
from optimizer.runtime.generation import DecoderSession, Sampling
from optimizer.runtime.generation.roles import roles_of
from optimizer.runtime.generation.sampling import Sampler
from optimizer.runtime.model import CompiledModel
from tests.frontend.comparison import Runner
from tests.models.catalog import ExportedModel

# Random weights say the same few tokens again and again unless that is made hard.
_SAMPLING = Sampling(repetition_penalty=1e3)
_PROMPT = 12
# Two layers in fp32 differ by the order of summation and by polynomials for exp and erf: two hundred roundings of
# 2**-23, of the largest value.
TOLERANCE = 200 * 2.0**-23


def require_reference_outputs(run: Runner, model: ExportedModel) -> None:
    """Require the reference outputs of every case of a committed model, within `TOLERANCE` of the largest value."""
    for name in model.cases:
        case = model.case(name)
        outputs = run(case.inputs)
        assert list(outputs) == list(case.outputs)
        for output, expected in case.outputs.items():
            assert outputs[output].shape == expected.shape, f"{name}, {output}"
            limit = TOLERANCE * float(np.abs(expected).max())
            np.testing.assert_allclose(outputs[output], expected, rtol=0, atol=limit, err_msg=f"{name}, {output}")


def require_equal_texts(
    model: CompiledModel, reference: Runner, *, tolerance: float, steps: int = 20, room: int = 0
) -> None:
    """Require that a session of `model` and `reference` choose the same tokens, the likeliest ones, one by one.

    At each step their logits may differ by `tolerance` of the largest one. `room` is that of caches that do not grow.
    """
    session, sampler = DecoderSession(model, capacity=room or None), Sampler(_SAMPLING)
    past = _empty_cache(model, room)
    tokens = np.random.default_rng(0).integers(3, 100, _PROMPT).tolist()
    added = list(tokens)
    for _ in range(steps):
        outputs = reference({**_inputs(model, tokens, len(added), room), **past})
        expected, actual = outputs["logits"][0, -1].astype(np.float32), session.append(added)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())
        past = {part.past: outputs[part.present] for part in roles_of(model.entry("main").signature).cache}
        added = [sampler.choose(actual, tokens)]
        assert added == [sampler.choose(expected, tokens)]
        tokens += added


def _empty_cache(model: CompiledModel, room: int) -> dict[str, np.ndarray]:
    parts = roles_of(model.entry("main").signature).cache
    shapes = {part.past: (*part.shape[: part.axis], room, *part.shape[part.axis + 1 :]) for part in parts}
    return {part.past: np.zeros(shapes[part.past], numpy_dtype(part.dtype)) for part in parts}


def _inputs(model: CompiledModel, tokens: list[int], count: int, room: int) -> Mapping[str, np.ndarray]:
    """Return what the model takes beside its cache to read the last `count` of all tokens."""
    total = len(tokens)
    begin = total - count
    given = {
        "input_ids": np.array([tokens[begin:]]),
        "attention_mask": np.array([[1] * total + [0] * max(0, room - total)]),
        "position_ids": np.arange(begin, total)[None],
        "cache_position": np.arange(begin, total),
        "write_indices": np.array([begin]),
        "nonpad_kv_seqlen": np.array([total]),
    }
    declared = {spec.name: spec for spec in model.entry("main").signature.inputs}
    if "attention_mask" in declared:
        spec = declared["attention_mask"]
        given["attention_mask"] = given["attention_mask"].astype(spec.dtype)
        if len(spec.shape) == 4:
            hidden = np.triu(np.ones((1, 1, count, total), np.bool_), begin + 1)
            given["attention_mask"] = ~hidden if spec.dtype == "bool" else np.where(hidden, np.float32(-1e9), 0)
    return {name: array for name, array in given.items() if name in declared}
