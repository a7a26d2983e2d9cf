"""The road of a model: import, passes, lowering, weights, code, certificate, package."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import onnx
import tvm
from tvm import relax

import targets
from optimizer import execution
from optimizer.certification import NO_CERTIFICATE, Certification, plan_certification
from optimizer.errors import OptionError, TargetError
from optimizer.frontend.importer import ImportedModel, import_model
from optimizer.frontend.model_file import ModelFile, read_model
from optimizer.frontend.widening import widened
from optimizer.ir_dump import IrDump, ignore
from optimizer.lowering import LoweredModule, build, lower
from optimizer.package.manifest import Manifest
from optimizer.package.writer import Weight, require_replaceable, write_package
from optimizer.packaging import companions, describe
from optimizer.progress import Silent, Timeline, Watcher
from optimizer.quantization.preparation import Calibration, prepared
from optimizer.quantization.quality import Gate, QualityReport
from optimizer.runtime.machine import count_physical_cores_by_default
from optimizer.signature import entry_point
from optimizer.symbolic_arguments import passed_in_order_of_use
from optimizer.tuning.log import SHIPPED, Decisions, decisions_for
from optimizer.weights import LiftedModule, lift_weights
from passes import pipeline
from passes.base import Pass
from passes.quantization.fitted import Exceptions
from passes.quantization.scheme import SchemeError
from passes.quantize_weights import QuantizeWeights
from schedules.intrin.bf16_conversion import BFLOAT16
from schedules.intrin.bf16_dot import bf16_dot
from schedules.intrin.byte_dot import activation_types, splits_operands
from schedules.intrin.matrix_tiles import matrix_tiles
from targets.base import Target
from targets.linking import export_library

WEIGHT_BITS = {"int8": 8, "int4": 4}
PRECISIONS = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class CompileOptions:
    """What to compile a model for. `shapes` overrides input shapes by name; a string keeps that dimension dynamic.

    `precision` "fp16" or "bf16" is for the operands of products, and of convolutions that get no blocks of channels;
    with "bf16", and a target with dot products of it, of those that do, too. Sums stay fp32. With "fp32" all 16-bit
    floats become fp32. Inputs and outputs keep the model's types.
    `dump_ir` is a folder that the module is written to after each pass and each step of lowering.
    `weights` ("int8", "int4") quantizes constant weights in groups of `weight_group` by `weight_method`, with zero
    points if `weight_zero_points` (None: if the method wants them) and scales of type `weight_scales`, except those of
    nodes that a PATTERN=PRECISION of `weights_of` matches. Methods that fit weights, and the limits `max_kl` and
    `max_flips` on what rounding may change, run the model on the files of `calibration`, or on text that it makes up;
    matrices get 8 bits, the most sensitive first, until the limits hold. Products with quantized weights compute in
    `activations` ("int8", "float", or "auto": as the target does best). `tuning_log` is the folder of the logs that
    decide schedules, None for the target's defaults alone.
    `kv_cache` says whether caches of decoders are appended to "in-place", or "returned" with every step, and
    `kv_cache_dtype` what those in place hold: "fp32", "fp16", "bf16", "int8", "int4", or the type of the model's input.
    Raises OptionError for what would change nothing because of another option, and for limits that are none.
    """

    target: Target
    shapes: Mapping[str, Sequence[int | str]] = field(default_factory=dict)
    passes: str = pipeline.DEFAULT
    precision: str = "model"
    dump_ir: Path | None = None
    weights: str = "model"
    weight_group: int = 32
    weight_method: str = "rtn"
    activations: str = "auto"
    tuning_log: Path | None = SHIPPED
    kv_cache: str = "in-place"
    kv_cache_dtype: str = "model"
    weight_zero_points: bool | None = None
    weight_scales: str = "float16"
    weights_of: tuple[str, ...] = ()
    calibration: tuple[Path, ...] = ()
    max_kl: float | None = None
    max_flips: float | None = None

    def __post_init__(self) -> None:
        names = ("weight_group", "weight_method", "weight_zero_points", "weight_scales", "weights_of")
        defaults = {each.name: each.default for each in fields(self)}
        chosen = [name for name in names if getattr(self, name) != defaults[name]]
        if chosen and self.weights not in WEIGHT_BITS:
            option = chosen[0].replace("_", "-")
            raise OptionError(f"--{option} is for weights that the compiler rounds; give --weights int4, or int8")
        if self.kv_cache != "in-place" and self.kv_cache_dtype != "model":
            raise OptionError(
                "--kv-cache-dtype is for buffers that the code appends to, of which --kv-cache returned makes none"
            )
        if any(limit is not None and not limit >= 0 for limit in (self.max_kl, self.max_flips)):
            raise OptionError("--max-kl and --max-flips are limits of 0 or more")

    @property
    def notation(self) -> str:
        """Return all passes: those of the graph, and those that the other options ask for."""
        # Before constants are folded, which would turn integers into floats.
        can_fail = str(self.target.device == "cpu").lower()
        in_place = [f"rewrite-kv-cache{{dtype={self.kv_cache_dtype},can_fail={can_fail}}}", "leave-out-rows"]
        steps = in_place if self.kv_cache == "in-place" else []
        steps.append("bound-dynamic-quantization")
        steps.append(f"recognize-integer-products{{target={self.target.name}}}")
        steps += [f"pack-quantized-weights{{target={self.target.name},activations={self.activations}}}", self.passes]
        if self.weights in WEIGHT_BITS:
            choices = {
                "bits": WEIGHT_BITS[self.weights],
                "group": self.weight_group,
                "symmetric": str(not self._with_zero_points).lower(),
                "method": self.weight_method,
                "scales": self.weight_scales,
                "exceptions": str(Exceptions.of(self.weights_of)),
                "target": self.target.name,
                "activations": self.activations,
            }
            steps.append(f"quantize-weights{{{','.join(f'{name}={value}' for name, value in choices.items())}}}")
        steps.append("fold-norm-scales")  # after weights are rounded, and before their precision is converted
        steps.append("fold-requantization")
        if self.target.device == "cpu":
            in_pairs = self.operand_dtype == BFLOAT16 and bf16_dot(self.target) is not None
            dtype = BFLOAT16 if in_pairs else "float32"
            integers = "".join(activation_types(self.target)[:1])
            layouts = self.target.layouts
            in_tiles = layouts.rounded_block if in_pairs else 0
            choices = f"block={in_tiles or layouts.channel_block},dtype={dtype},integers={integers}"
            choices += f",byte_block={layouts.byte_block}" if layouts.byte_block else ""
            choices += ",words=true" if splits_operands(self.target) else ""
            # Tiles of matrices multiply so fast that Winograd's transforms would take longer than what they save.
            steps.append(f"block-channels{{{choices}{',winograd=0' if in_tiles else ''}}}")
        if self.operand_dtype is not None:
            steps.append(f"convert-precision{{dtype={self.operand_dtype}}}")
            if self.operand_dtype == "bfloat16" and self.target.device == "cpu":
                steps.append(f"round-attention{{target={self.target.name}}}")
            steps.append("eliminate-common-subexpressions")  # several products convert the same operand
            if self.operand_dtype == "bfloat16" and self.target.device == "cpu":
                steps.append("narrow-attention")
        if self.operand_dtype != BFLOAT16 and matrix_tiles(self.target, BFLOAT16, BFLOAT16) is not None:
            steps.append(f"round-attention{{target={self.target.name},with_quantized=true}}")
        return ",".join(steps)

    @property
    def _with_zero_points(self) -> bool:
        return self.weight_method == "hqq" if self.weight_zero_points is None else self.weight_zero_points

    @property
    def operand_dtype(self) -> str | None:
        """Return the dtype that products compute with, or None for the model's own."""
        return PRECISIONS.get(self.precision)


@dataclass(frozen=True)
class Plan:
    """A model up to scheduled TIR: `imported` before the passes, `rewritten` after them, then lowered and lifted.

    `decisions` are those that the tuning log had for the target, `quality` is what rounding weights changed where that
    was limited.
    """

    imported: ImportedModel
    passes: tuple[pipeline.PassRecord, ...]
    rewritten: tvm.IRModule
    lowered: LoweredModule
    lifted: LiftedModule
    decisions: Decisions
    quality: QualityReport | None = None


@dataclass(frozen=True)
class CompileResult:
    """What a compile made and what it took: the package's manifest, and the time of each stage in seconds."""

    manifest: Manifest
    plan: Plan
    source: ModelFile
    certification: Certification
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
    require_replaceable(output)
    count_physical_cores_by_default()
    timeline = Timeline(watcher or Silent())
    source, plan = _plan_file(model, options, timeline)
    beside = companions(source, plan.imported)
    with timeline.stage("generate code"):
        executable = build(plan.lifted.module, options.target)
    with tempfile.TemporaryDirectory(prefix="optimizer-") as folder:
        library = Path(folder) / "model.so"
        with timeline.stage("link"):
            _link(executable, options.target, library)
        with timeline.stage("certify and write"):
            certification = plan_certification(source, plan, options) if certify else NO_CERTIFICATE
            draft = describe(source, plan, options.target)
            manifest = write_package(
                output,
                draft,
                library,
                _weights(plan),
                extra_files=beside,
                certify=certification.certify,
            )
    return CompileResult(manifest, plan, source, certification, timeline.seconds)


def plan_model(model: Path, options: CompileOptions, watcher: Watcher | None = None) -> tuple[ModelFile, Plan]:
    """Do all of a compile but the code: import, rewrite, schedule. Writes nothing."""
    return _plan_file(model, options, Timeline(watcher or Silent()))


def compile_in_memory(model: onnx.ModelProto, options: CompileOptions, *, base_directory: str = "") -> execution.Runner:
    """Compile for this machine without writing anything, and return a function from named inputs to named outputs."""
    plan = _plan(model, options, Timeline(), base_directory)
    executable = build(plan.lifted.module, options.target)
    entry = entry_point(plan.imported, plan.rewritten)
    return execution.function(executable, plan.imported, tvm.cpu(), plan.lifted.weights, entry)


def runner_of(module: tvm.IRModule, imported: ImportedModel, target: Target) -> execution.Runner:
    """Return a function from named inputs to named outputs that runs a module as some passes left it."""
    with passed_in_order_of_use():
        lifted = lift_weights(lower(module, target).module)
    entry = entry_point(imported, module)
    return execution.function(build(lifted.module, target), imported, tvm.cpu(), lifted.weights, entry)


def _plan_file(model: Path, options: CompileOptions, timeline: Timeline) -> tuple[ModelFile, Plan]:
    parse_passes(options)  # a mistake in them is not to be found after minutes of reading and importing
    with timeline.stage("read"):
        source = read_model(model)
    return source, _plan(source.model, options, timeline, source.directory)


def _plan(model: onnx.ModelProto, options: CompileOptions, timeline: Timeline, base_directory: str) -> Plan:
    dump = ignore if options.dump_ir is None else IrDump(options.dump_ir)
    with passed_in_order_of_use():
        with timeline.stage("import"):
            imported = import_with(options, model, base_directory)
        dump("import", imported.module)
        items, quality = parse_passes(options), None
        calibration = _calibration(options, base_directory)
        if any(isinstance(item, QuantizeWeights) for item in items) or calibration.files or calibration.gated:
            with timeline.stage("fit weights"):
                items, quality = prepared(items, imported, calibration)
        with timeline.stage("passes"):
            rewritten, records = _run_passes(imported.module, items, dump)
        with timeline.stage("lower"):
            decisions = _decisions(options)
            lowered = lower(rewritten, options.target, dump, decisions.decide)
            lifted = lift_weights(lowered.module)
    return Plan(imported, records, rewritten, lowered, lifted, decisions, quality)


def _decisions(options: CompileOptions) -> Decisions:
    if options.tuning_log is None:
        return Decisions({})
    return decisions_for(options.target, options.tuning_log)


def import_with(options: CompileOptions, model: onnx.ModelProto, base_directory: str) -> ImportedModel:
    """Import a model with the shapes and in the precision that the options ask for."""
    if options.precision == "fp32":
        model = widened(model, base_directory)
    return import_model(model, shapes=options.shapes, base_directory=base_directory)


def parse_passes(options: CompileOptions) -> tuple[Pass, ...]:
    """Return the passes of a compile, with the conversion to its precision at the end; raises OptionError."""
    try:
        return pipeline.parse(options.notation)
    except (pipeline.PassOptionError, SchemeError) as error:
        raise OptionError(str(error)) from error


def _run_passes(
    module: tvm.IRModule, items: Sequence[Pass], dump: Callable[[str, tvm.IRModule], None]
) -> tuple[tvm.IRModule, tuple[pipeline.PassRecord, ...]]:
    return pipeline.run(module, items, after=lambda record: dump(record.item.name, record.outcome.module))


def _calibration(options: CompileOptions, base_directory: str) -> Calibration:
    return Calibration(options.calibration, Path(base_directory), Gate(options.max_kl, options.max_flips))


def _link(executable: relax.VMExecutable, target: Target, library: Path) -> None:
    try:
        export_library(executable, target, library)
    except targets.ToolchainError as error:
        raise TargetError(str(error)) from error


def _weights(plan: Plan) -> Iterator[Weight]:
    """Yield one weight after the other: each is a copy."""
    for index, weight in enumerate(plan.lifted.weights):
        yield Weight(f"weight.{index}", weight.numpy())
