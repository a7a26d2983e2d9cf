"""The road of a model: import, passes, lowering, weights, code, certificate, package."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import tvm
from tvm import relax

import targets
from optimizer import execution
from optimizer.errors import OptionError, TargetError
from optimizer.frontend.importer import ImportedModel, import_model
from optimizer.frontend.model_file import ModelFile, read_model
from optimizer.lowering import LoweredModule, build, lower
from optimizer.package import Manifest, Weight, write_package
from optimizer.package.manifest import Certificate
from optimizer.packaging import describe
from optimizer.progress import Silent, Timeline, Watcher
from optimizer.weights import LiftedModule, lift_weights
from passes import pipeline
from targets.base import Target
from targets.linking import export_library

STAGES = ("read", "import", "passes", "lower", "generate code", "link", "certify and write")


@dataclass(frozen=True)
class CompileOptions:
    """What to compile a model for. `shapes` overrides input shapes by name; a string keeps that dimension dynamic."""

    target: Target
    shapes: Mapping[str, Sequence[int | str]] = field(default_factory=dict)
    passes: str = pipeline.DEFAULT
    precision: str = "model"


@dataclass(frozen=True)
class CompiledCode:
    """A model after code generation, before it is packaged."""

    imported: ImportedModel
    passes: tuple[pipeline.PassRecord, ...]
    lowered: LoweredModule
    lifted: LiftedModule
    executable: relax.VMExecutable


@dataclass(frozen=True)
class CompileResult:
    """What a compile made and what it took: the package's manifest, and the time of each stage in seconds."""

    manifest: Manifest
    code: CompiledCode
    source: ModelFile
    seconds: Mapping[str, float]


def find_target(name: str, gpu_architectures: Sequence[str] | None = None) -> Target:
    """Return a target by name; raises TargetError for one that does not exist."""
    try:
        return targets.get(name, gpu_architectures)
    except targets.UnknownTargetError as error:
        raise TargetError(str(error)) from error


def compile_model(
    model: Path, output: Path, options: CompileOptions, watcher: Watcher | None = None, *, certify: bool = True
) -> CompileResult:
    """Compile an ONNX file to a package at `output`, which appears only when it is complete and certified.

    Raises one of the errors of `optimizer.errors`.
    """
    timeline = Timeline(watcher or Silent())
    with timeline.stage("read"):
        source = read_model(model)
    code = generate(source.model, options, timeline, base_directory=source.directory)
    with tempfile.TemporaryDirectory(prefix="optimizer-") as folder:
        library = Path(folder) / "model.so"
        with timeline.stage("link"):
            _link(code.executable, options.target, library)
        with timeline.stage("certify and write"):
            check: Callable[[Path], Certificate] | None = certifier(source, code.imported, options) if certify else None
            manifest = write_package(output, describe(source, code, options.target), library, _weights(code), certify=check)
    return CompileResult(manifest, code, source, timeline.seconds)


def generate(
    model: onnx.ModelProto, options: CompileOptions, timeline: Timeline | None = None, *, base_directory: str = ""
) -> CompiledCode:
    """Compile an ONNX model as far as executable code for the target."""
    timeline = timeline or Timeline()
    with timeline.stage("import"):
        imported = import_model(model, shapes=options.shapes, base_directory=base_directory)
    with timeline.stage("passes"):
        module, records = _run_passes(imported.module, options)
    with timeline.stage("lower"):
        lowered = lower(module, options.target)
        lifted = lift_weights(lowered.module)
    with timeline.stage("generate code"):
        executable = build(lifted.module, options.target)
    return CompiledCode(imported, records, lowered, lifted, executable)


def compile_in_memory(
    model: onnx.ModelProto, options: CompileOptions, *, base_directory: str = ""
) -> Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]:
    """Compile for this machine without writing anything, and return a function from named inputs to named outputs."""
    code = generate(model, options, base_directory=base_directory)
    return execution.function(code.executable, code.imported, tvm.cpu(), code.lifted.weights)


def _run_passes(
    module: tvm.IRModule, options: CompileOptions
) -> tuple[tvm.IRModule, tuple[pipeline.PassRecord, ...]]:
    try:
        passes = pipeline.parse(options.passes)
    except pipeline.PassOptionError as error:
        raise OptionError(str(error)) from error
    return pipeline.run(module, passes)


def _link(executable: relax.VMExecutable, target: Target, library: Path) -> None:
    try:
        export_library(executable, target, library)
    except targets.ToolchainError as error:
        raise TargetError(str(error)) from error


def _weights(code: CompiledCode) -> list[Weight]:
    return [Weight(f"weight.{index}", weight.numpy()) for index, weight in enumerate(code.lifted.weights)]
