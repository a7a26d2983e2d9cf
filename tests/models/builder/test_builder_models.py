"""Decoders of onnxruntime-genai's builder give onnxruntime's logits, for prompts beyond the window, and its texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.families.texts import PENALTY, PROMPT
from optimizer.compile import CompileOptions, compile_in_memory, compile_model, find_target
from optimizer.execution import Runner
from optimizer.runtime import load
from optimizer.runtime.generation import DecoderSession, Sampling
from optimizer.runtime.generation.sampling import Sampler
from optimizer.runtime.model import CompiledModel
from tests.models.comparison import require_equal_texts

FAMILIES = tuple(path.stem for path in sorted(Path(__file__).parent.glob("*.onnx")))

FOLDER = Path(__file__).parent
CHUNKS = (20, 1, 1, 5)
# Float sums of two layers in another order, and the polynomial of the softmax's exponential.
TOLERANCE = 1000 * 2.0**-24
# Two layers with a rounding after every operator, of which what is compiled has few.
NARROW_TOLERANCES = {"float16": 16 * 2.0**-11, "bfloat16": 16 * 2.0**-8}
# int8 activations of two layers that are 64 wide: less than a hundredth of what rounding weights to 4 bits costs.
MOST_DIVERGENCE = 3e-3


def reference(name: str) -> Runner:
    """onnxruntime with products in floats (accuracy level 0)."""
    return in_floats(onnx.load(FOLDER / f"{name}.onnx"))


def in_floats(model: onnx.ModelProto) -> Runner:
    for node in model.graph.node:
        for attribute in [each for each in node.attribute if each.name == "accuracy_level"]:
            node.attribute.remove(attribute)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda inputs: dict(zip(names, map(np.asarray, session.run(None, dict(inputs))), strict=True))


def outputs_of(name: str, run: Runner) -> Iterator[dict[str, np.ndarray]]:
    """Yield the outputs of every chunk of a text."""
    settings = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))["model"]["decoder"]
    empty = np.zeros((1, settings["num_key_value_heads"], 0, settings["head_size"]), np.float32)
    layers = range(settings["num_hidden_layers"])
    cache = {f"past_key_values.{layer}.{part}": empty for layer in layers for part in ("key", "value")}
    rng, total = np.random.default_rng(0), 0
    for count in CHUNKS:
        total += count
        tokens = rng.integers(3, 128, (1, count))
        outputs = run({"input_ids": tokens, "attention_mask": np.ones((1, total), np.int64), **cache})
        yield outputs
        cache = {past: outputs[past.replace("past_key_values", "present")] for past in cache}


def logits(name: str, run: Runner) -> Iterator[np.ndarray]:
    """Yield the logits of every chunk of a text."""
    return (outputs["logits"] for outputs in outputs_of(name, run))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, CompiledModel]:
    """Return the name of a family and its model, compiled, which its certificate allows."""
    package = tmp_path_factory.mktemp(request.param) / "model.opt"
    options = CompileOptions(find_target("host"), activations="float")
    compile_model(FOLDER / f"{request.param}.onnx", package, options)
    return request.param, load(package)


def test_logits_and_caches_equal_onnxruntimes(family: tuple[str, CompiledModel]) -> None:
    name, run = family
    for ours, theirs in zip(outputs_of(name, run), outputs_of(name, reference(name)), strict=True):
        for output, expected in theirs.items():
            limit = TOLERANCE * np.abs(expected).max()
            np.testing.assert_allclose(ours[output], expected, rtol=0, atol=limit, err_msg=output)


def test_generated_tokens_equal_onnxruntimes(family: tuple[str, CompiledModel]) -> None:
    name, model = family
    require_equal_texts(model, reference(name), tolerance=TOLERANCE)


def test_generated_tokens_equal_those_of_onnxruntime_genai(family: tuple[str, CompiledModel]) -> None:
    name, model = family
    settings = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    session, sampler = DecoderSession(model), Sampler(Sampling(repetition_penalty=PENALTY))
    ends, text = settings["model"]["eos_token_id"], list(PROMPT)
    logits = session.append(text)
    for expected in settings["tokens"]:
        logits[ends] = -np.inf
        assert sampler.choose(logits, text) == expected
        text.append(expected)
        logits = session.append([expected])


def in_16_bits(name: str, dtype: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return a family as the builder writes it for GPUs, in 16 bits, and one in fp32 with weights rounded alike."""
    narrow, exact = (onnx.load(FOLDER / f"{name}.onnx") for _ in range(2))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    for model, stored in ((narrow, np.dtype(dtype)), (exact, np.dtype(np.float32))):
        constants = [each.t for node in model.graph.node for each in node.attribute if each.HasField("t")]
        for tensor in (*model.graph.initializer, *constants):
            if tensor.data_type == TensorProto.FLOAT:
                rounded = numpy_helper.to_array(tensor).astype(dtype).astype(stored)
                tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    for value in (*narrow.graph.input, *narrow.graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    del narrow.graph.value_info[:]
    for attribute in [each for node in narrow.graph.node if node.op_type == "Cast" for each in node.attribute]:
        attribute.i = kind if attribute.i == TensorProto.FLOAT else attribute.i
    return narrow, exact


@pytest.mark.parametrize(("name", "dtype"), [("qwen3", "float16"), ("gemma3", "bfloat16"), ("mistral", "bfloat16")])
def test_families_in_16_bits_give_the_tokens_of_exact_arithmetic(name: str, dtype: str, tmp_path: Path) -> None:
    narrow, exact = in_16_bits(name, dtype)
    onnx.save(narrow, tmp_path / "model.onnx")
    options = CompileOptions(find_target("host"), activations="float")
    compile_model(tmp_path / "model.onnx", tmp_path / "model.opt", options, certify=False)
    model = load(tmp_path / "model.opt")
    assert f"as {dtype}" in model.manifest.kv_cache_scheme
    run = in_floats(exact)

    def widened(inputs: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        return run(
            {key: value if value.dtype.kind == "i" else value.astype(np.float32) for key, value in inputs.items()}
        )

    require_equal_texts(model, widened, tolerance=NARROW_TOLERANCES[dtype])


def test_int8_activations_change_the_distribution_little() -> None:
    run = compile_in_memory(onnx.load(FOLDER / "qwen2.onnx"), CompileOptions(find_target("host"), activations="int8"))
    for ours, theirs in zip(logits("qwen2", run), logits("qwen2", reference("qwen2")), strict=True):
        actual, expected = log_softmax(ours), log_softmax(theirs)
        assert (np.exp(expected) * (expected - actual)).sum(-1).mean() < MOST_DIVERGENCE


def log_softmax(values: np.ndarray) -> np.ndarray:
    shifted = values.astype(np.float64) - values.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_the_size_of_a_head_that_a_model_leaves_open_is_known_to_its_certificate(tmp_path: Path) -> None:
    options = CompileOptions(find_target("host"), kv_cache_dtype="int4")
    certificate = compile_model(FOLDER / "llama3.onnx", tmp_path / "llama3.opt", options).manifest.certificate
    assert certificate is not None
    assert all(output.ok for output in certificate.outputs)
