"""Reading an ONNX file: every way in which it can be missing, corrupt or incomplete gives one clear error."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import checker, defs, external_data_helper, inliner

from optimizer.errors import ModelFileError
from optimizer.frontend.node import normalized_domain

OLDEST_OPSET = 7


@dataclass(frozen=True)
class ModelFile:
    """An ONNX model in memory (external data stay in their files) and where it came from.

    `digest` is the sha256 of the file and of all external data that it refers to.
    """

    model: onnx.ModelProto
    path: Path
    digest: str

    @property
    def directory(self) -> str:
        """Return the directory that external data are relative to."""
        return str(self.path.parent)

    @property
    def opset(self) -> int:
        """Return the version of the standard operators."""
        return next((e.version for e in self.model.opset_import if normalized_domain(e.domain) == ""), 1)


def read_model(path: Path) -> ModelFile:
    """Read and check an ONNX file. Local functions are inlined.

    Raises ModelFileError if the file is missing, is not ONNX, breaks ONNX's rules, or its external data do not fit.
    """
    if not path.exists():
        raise ModelFileError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise ModelFileError(f"{path}: is a directory; give the .onnx file inside it")
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error
    model = _parse(path, content)
    digest = hashlib.sha256(content)
    del content  # the checks read the file once more, and weights may lie in it
    for data_file in _external_files(path, model):
        _update_digest(digest, data_file)
    _check(path, model)
    if model.functions:
        model = inliner.inline_local_functions(model)
    return ModelFile(model, path, digest.hexdigest())


def _parse(path: Path, content: bytes) -> onnx.ModelProto:
    model = onnx.ModelProto()
    try:
        model.ParseFromString(content)
    except DecodeError as error:
        raise ModelFileError(
            f"{path}: is not an ONNX file, or is truncated ({len(content)} bytes); copy or export it again"
        ) from error
    if not model.HasField("graph") or not model.opset_import:
        raise ModelFileError(
            f"{path}: is not an ONNX model (it holds no graph or no opset); give the file that the exporter wrote"
        )
    return model


def _check(path: Path, model: onnx.ModelProto) -> None:
    newest = defs.onnx_opset_version()
    for entry in model.opset_import:
        if normalized_domain(entry.domain) == "" and not OLDEST_OPSET <= entry.version <= newest:
            raise ModelFileError(
                f"{path}: opset {entry.version} is not supported ({OLDEST_OPSET} to {newest} are); "
                "convert it with onnx.version_converter"
            )
    _allow_simplified_normalization()
    try:
        # By path, so that models over protobuf's 2 GB limit and external data are checked too.
        checker.check_model(str(path))
    except checker.ValidationError as error:
        reason = str(error).strip().splitlines()[0]
        raise ModelFileError(f"{path}: breaks ONNX's rules: {reason}; export it again") from error


def _allow_simplified_normalization() -> None:
    """Make the checker accept what onnxruntime and its model builder write into ONNX's own domain."""
    name = "SimplifiedLayerNormalization"
    if defs.has(name):
        return
    schema = defs.OpSchema(
        name,
        "",
        1,
        inputs=[defs.OpSchema.FormalParameter(each, "T") for each in ("X", "scale")],
        outputs=[
            defs.OpSchema.FormalParameter("Y", "T"),
            defs.OpSchema.FormalParameter(
                "inv_std_var", "T", param_option=defs.OpSchema.FormalParameterOption.Optional
            ),
        ],
        type_constraints=[("T", [f"tensor({kind})" for kind in ("float", "float16", "double", "bfloat16")], "")],
        attributes=[
            defs.OpSchema.Attribute("axis", defs.OpSchema.AttrType.INT, required=False),
            defs.OpSchema.Attribute("epsilon", defs.OpSchema.AttrType.FLOAT, required=False),
            defs.OpSchema.Attribute("stash_type", defs.OpSchema.AttrType.INT, required=False),
        ],
    )
    defs.register_schema(schema)


def _external_files(path: Path, model: onnx.ModelProto) -> list[Path]:
    """Return the files that hold external data, each once, after checking that they hold all that is asked of them."""
    files: dict[str, Path] = {}
    directory = path.parent.resolve()
    for tensor in _tensors(model.graph):
        if not external_data_helper.uses_external_data(tensor):
            continue
        info = external_data_helper.ExternalDataInfo(tensor)
        file = (directory / info.location).resolve()
        if not file.is_relative_to(directory):
            raise ModelFileError(
                f"{path}: tensor '{tensor.name}' lies outside the model's folder ({info.location}); "
                "save the model with its data beside it"
            )
        if not file.is_file():
            raise ModelFileError(
                f"{path}: the external data file '{info.location}' of tensor '{tensor.name}' is missing; "
                f"put it beside the model in {path.parent}"
            )
        end = (info.offset or 0) + _byte_count(tensor, info.length)
        if file.stat().st_size < end:
            raise ModelFileError(
                f"{path}: the external data file '{info.location}' is truncated: tensor '{tensor.name}' "
                f"ends at byte {end}, the file has {file.stat().st_size}; copy it again"
            )
        files[info.location] = file
    return [files[location] for location in sorted(files)]


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Yield every tensor of a graph: initializers, and attributes of nodes in it and in its subgraphs."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            for subgraph in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])):
                yield from _tensors(subgraph)


def _byte_count(tensor: onnx.TensorProto, declared: int | None) -> int:
    """Return the bytes a tensor takes in its external file; raises if the declared length is another."""
    bits = _BITS.get(tensor.data_type)
    if bits is None:
        bits = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * 8
    count = 1
    for dimension in tensor.dims:
        count *= dimension
    needed = (count * bits + 7) // 8
    if declared and declared != needed:
        raise ModelFileError(
            f"tensor '{tensor.name}' has {list(tensor.dims)} elements of {bits} bits, {needed} bytes, "
            f"but its external data entry says {declared} bytes; export the model again"
        )
    return needed


_BITS: dict[int, int] = {
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.FLOAT4E2M1: 4,
    onnx.TensorProto.INT2: 2,
    onnx.TensorProto.UINT2: 2,
}


def _update_digest(digest: hashlib._Hash, file: Path) -> None:
    with file.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
