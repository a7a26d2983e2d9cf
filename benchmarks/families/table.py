"""Each family in each form beside onnxruntime and onnxruntime-genai: `python -m benchmarks.families.table FOLDER`.

What `benchmarks.families.make` made is compiled with activations in floats, reads a prompt that is longer than the
windows in chunks, and goes on token by token. Logits are compared with those of onnxruntime for the same model (where
floats are of 16 bits: for it widened to fp32), tokens with its choices and with those of onnxruntime-genai.
"""

from __future__ import annotations

import datetime
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from benchmarks.families.checkpoints import EOS, WINDOW
from benchmarks.families.forms import BUILT, EXPORTED
from benchmarks.families.selection import Selection, parsed
from benchmarks.families.texts import CHUNKS, PENALTY, PROMPT, ROOM, STEPS
from optimizer.compile import CompileOptions, compile_model, find_target
from optimizer.errors import OptimizerError
from optimizer.runtime import load
from optimizer.runtime.generation import DecoderSession, Sampling
from optimizer.runtime.generation.roles import CacheTensor, roles_of
from optimizer.runtime.generation.sampling import Sampler
from optimizer.runtime.model import CompiledModel

_COLUMNS = ("family", "form", "cache", "largest difference of logits", f"of {STEPS} tokens as onnxruntime", "as genai")
_NARROW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
Array = np.ndarray


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a model whose floats of 16 bits are fp32 with the same values."""
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        constants = [each.t for node in graph.node for each in node.attribute if each.HasField("t")]
        for tensor in (*graph.initializer, *constants):
            if tensor.data_type in _NARROW:
                values = numpy_helper.to_array(tensor).astype(np.float32)
                tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        for value in (*graph.input, *graph.output):
            if value.type.tensor_type.elem_type in _NARROW:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
        del graph.value_info[:]
        for node in graph.node:
            for attribute in node.attribute:
                if node.op_type == "Cast" and attribute.name == "to" and attribute.i in _NARROW:
                    attribute.i = TensorProto.FLOAT
                graphs += [attribute.g] if attribute.HasField("g") else []
    return model


class Reference:
    """A text in onnxruntime, which takes and returns its cache with every step."""

    def __init__(self, model: onnx.ModelProto, cache: Sequence[CacheTensor]) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 4
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        self._session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        self._names = [output.name for output in self._session.get_outputs()]
        self._given = {value.name: value.type.tensor_type for value in model.graph.input}
        self._cache = cache
        self._past = {part.past: np.zeros(self._empty(part), np.float32) for part in cache}
        self._length = 0

    def _empty(self, part: CacheTensor) -> tuple[int, ...]:
        """Return the shape of the cache before the text.

        That of the newest tokens alone has room for a window, that of TensorScatter for the whole text.
        """
        dimension = self._given[part.past].shape.dim[part.axis].dim_param
        room = WINDOW if "sliding" in dimension else ROOM if dimension == "room" else 0
        return (*part.shape[: part.axis], room, *part.shape[part.axis + 1 :])

    def _mask(self, begin: int, end: int) -> Array:
        """Return the mask of the tokens from `begin` to `end`, of the type and the shape that the model takes."""
        given = self._given["attention_mask"]
        dtype = helper.tensor_dtype_to_np_dtype(given.elem_type)
        if len(given.shape.dim) == 2:
            return np.ones((1, end), dtype)
        places = np.arange(ROOM if given.shape.dim[-1].dim_param == "room" else end)
        seen = (places <= np.arange(begin, end)[:, None])[None, None]
        return seen if dtype == np.bool_ else np.where(seen, 0, np.finfo(np.float32).min).astype(dtype)

    def append(self, tokens: Sequence[int]) -> Array:
        """Read more tokens and return the logits that follow the last of them."""
        begin, end = self._length, self._length + len(tokens)
        inputs: dict[str, Array] = {
            "input_ids": np.array([tokens], np.int64),
            "position_ids": np.arange(begin, end)[None],
            "write_indices": np.array([begin]),
            **self._past,
        }
        if "attention_mask" in self._given:
            inputs["attention_mask"] = self._mask(begin, end)
        fed = {name: array for name, array in inputs.items() if name in self._given}
        outputs = dict(zip(self._names, self._session.run(self._names, fed), strict=True))
        self._past = {part.past: np.asarray(outputs[part.present]) for part in self._cache}
        self._length = end
        return np.asarray(outputs["logits"])[0, -1].astype(np.float32)


@dataclass
class Row:
    """One family in one form: what came of it."""

    family: str
    form: str
    cache: str = ""
    difference: float | None = None
    equal: int = 0
    genai: str = ""
    error: str = ""

    @property
    def group(self) -> str:
        """Return the column of the condensed table that the row counts in."""
        return (BUILT.get(self.form) or EXPORTED[self.form]).group

    def line(self) -> str:
        """Return it as a row of the table."""
        if self.difference is None:
            return f"| {self.family} | {self.form} | {self.error} |"
        texts = f"{self.equal} | {self.genai}"
        return f"| {self.family} | {self.form} | {self.cache} | {self.difference:.1e} | {texts} |"


def compare(family: str, form: str, folder: Path) -> Row:
    """Compile what lies in `folder` and compare its text with the references'."""
    row = Row(family, form)
    if (folder / "failed.txt").exists():
        row.error = "not made: " + (folder / "failed.txt").read_text(encoding="utf-8").splitlines()[0]
        return row
    genai = _document(folder / "tokens.json")
    try:
        options = CompileOptions(find_target("host"), activations="float")
        compile_model(folder / "model.onnx", folder / "model.opt", options, certify=False)
        model = load(folder / "model.opt")
        row.cache = model.manifest.kv_cache_scheme
        _compare_texts(row, model, folder, genai)
    except OptimizerError as error:
        row.error = f"refused: {error}".replace("\n", " ")
    except Exception as error:  # the exceptions of onnxruntime have no base of their own
        row.error = f"{type(error).__name__}: {error}".replace("\n", " ")
    if row.error:
        row.difference = None
        row.error += f" (genai: {genai})" if isinstance(genai, str) else ""
    return row


def _compare_texts(row: Row, model: CompiledModel, folder: Path, genai: list[int] | str | None) -> None:
    session = DecoderSession(model, capacity=ROOM)
    reference = Reference(widened(onnx.load(folder / "model.onnx")), roles_of(model.entry("main").signature).cache)
    row.difference = 0.0
    text, ours, theirs = [], np.zeros(0), np.zeros(0)
    for count in CHUNKS:
        chunk = PROMPT[len(text) :][:count]
        ours, theirs = (each.append(chunk) for each in (session, reference))
        row.difference = max(row.difference, _difference(ours, theirs))
        text += chunk
    sampler, stops = Sampler(Sampling(repetition_penalty=PENALTY)), _stops(folder)
    chosen: tuple[list[int], list[int]] = ([], [])
    for _ in range(STEPS):
        for logits, tokens in zip((ours, theirs), chosen, strict=True):
            tokens.append(sampler.choose(np.where(np.isin(np.arange(logits.size), stops), -np.inf, logits), text))
        text.append(chosen[0][-1])
        ours, theirs = (each.append(text[-1:]) for each in (session, reference))
        row.difference = max(row.difference, _difference(ours, theirs))
    row.equal = sum(one == other for one, other in zip(*chosen, strict=True))
    if isinstance(genai, list):
        same = next((n for n, pair in enumerate(zip(chosen[0], genai, strict=True)) if pair[0] != pair[1]), STEPS)
        row.genai = f"{same}"
    else:
        row.genai = "-" if genai is None else f"genai: {genai}"


def _document(path: Path) -> Any:  # noqa: ANN401 - whatever the JSON holds
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _stops(folder: Path) -> list[int]:
    """Return the tokens that end a text, which no text here may have."""
    settings = _document(folder / "genai_config.json")
    ends = EOS if settings is None else settings["model"]["eos_token_id"]
    return ends if isinstance(ends, list) else [ends]


def _difference(actual: Array, expected: Array) -> float:
    """Return the largest difference, of the largest value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def rows(selection: Selection) -> Iterator[Row]:
    """Yield the rows of all that was made; each is kept beside its model."""
    for family in selection.families:
        for form in selection.forms:
            folder = selection.folder / family / form
            if not folder.exists():
                continue
            kept = folder / "row.json"
            if selection.keeps and kept.exists():
                yield Row(**_document(kept))
                continue
            row = compare(family, form, folder)
            kept.write_text(json.dumps(asdict(row)) + "\n", encoding="utf-8")
            yield row


def condensed(found: Sequence[Row]) -> Iterator[str]:
    """Yield the lines of a table of families and groups of forms: how many were compared, the largest difference."""
    groups = list(dict.fromkeys(form.group for form in (*BUILT.values(), *EXPORTED.values())))
    yield f"| family | {' | '.join(groups)} |"
    yield f"|{'---|' * (len(groups) + 1)}"
    for family in dict.fromkeys(row.family for row in found):
        cells = []
        for group in groups:
            of_group = (row for row in found if (row.family, row.group) == (family, group))
            values = [row.difference for row in of_group if row.difference is not None]
            cells.append(f"{len(values)}: {max(values):.0e}" if values else "-")
        yield f"| {family} | {' | '.join(cells)} |"


def main() -> None:
    """Run the command line."""
    selection = parsed("Compare decoders of each family in each form with onnxruntime.")
    print(f"{datetime.date.today()}, `python -m benchmarks.families.table {' '.join(sys.argv[1:])}`\n")
    print(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}")
    found: list[Row] = []
    for row in rows(selection):
        print(row.line(), flush=True)
        found.append(row)
    print("", *condensed(found), sep="\n")


if __name__ == "__main__":
    main()
