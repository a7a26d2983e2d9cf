"""What there is to tune in a model: each distinct workload once, with the arguments that a step calls it with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import tvm
import tvm.ir
from tvm import relax, sym, tirx
from tvm.ir import Expr, Var

from optimizer.lowering import LoweredModule
from optimizer.package.dtypes import ITEM_BYTES
from optimizer.report.inputs import default_size
from optimizer.tuning.peak import Operands
from optimizer.tuning.records import WorkloadKey
from schedules import KernelReport
from schedules.family import Space
from schedules.loops import Extent
from schedules.stage_parsing import parse
from schedules.stages import Stage, substitute, variables_of
from schedules.streaming import LAST_CACHE_BYTES

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Argument:
    """An argument of a kernel: a tensor of `shape`, or the number `scalar`."""

    dtype: str
    shape: tuple[int, ...] = ()
    scalar: int | None = None


@dataclass(frozen=True, eq=False)
class Task:
    """A workload with the space of its schedule.

    `arguments` are those of one call, the `outputs` last ones written by it; `calls` says how often a step makes it.
    `operations` are those of the sums of one call, two to a term, which multiply `operands`. What `is_cold`
    finds nothing in the caches but its first argument, as the weights of a step are too many to stay there.
    """

    workload: str
    family: str
    version: int
    space: Space
    function: tirx.PrimFunc
    arguments: tuple[Argument, ...]
    outputs: int
    calls: int
    description: str
    operations: int
    operands: Operands
    is_cold: bool = False

    @property
    def key(self) -> WorkloadKey:
        """Return what records of this task are looked up by."""
        return self.workload, self.family, self.version

    @property
    def bytes(self) -> int:
        """Return the bytes of all tensors of one call."""
        return sum(
            math.prod(argument.shape) * ITEM_BYTES[argument.dtype]
            for argument in self.arguments
            if argument.scalar is None
        )


def tasks_of(lowered: LoweredModule, sizes: Sizes) -> tuple[Task, ...]:
    """Return the workloads of a module that have something to choose, in the order of their first call.

    `sizes` gives values to symbolic dimensions by name; others are those of `optimizer.report.inputs`.
    """
    reports = {kernel.function: kernel for kernel in lowered.kernels}
    counts: dict[str, int] = {}
    first: dict[str, tuple[KernelReport, tirx.PrimFunc, tvm.ir.Call]] = {}
    kernel_calls = _kernel_calls(lowered.unscheduled)
    for call in kernel_calls:
        name = call.args[0].name_hint
        report = reports.get(name)
        if report is None or not any(len(choice.candidates) > 1 for choice in report.space):
            continue
        counts[report.workload] = counts.get(report.workload, 0) + 1
        first.setdefault(report.workload, (report, lowered.unscheduled[call.args[0]], call))
    # More than that comes from memory in each step.
    is_cold = _weight_bytes(kernel_calls) > LAST_CACHE_BYTES
    return tuple(replace(_task(*first[workload], counts[workload], sizes), is_cold=is_cold) for workload in first)


def _weight_bytes(kernel_calls: Sequence[tvm.ir.Call]) -> int:
    """Return the bytes of the constants that the kernels of one step read, each once."""
    constants = {
        argument.value.data_ptr(): math.prod(argument.value.shape) * ITEM_BYTES[str(argument.value.dtype)]
        for call in kernel_calls
        for argument in call.args[1].fields
        if isinstance(argument, tvm.ir.GenericConst)
    }
    return sum(constants.values())


def _kernel_calls(module: tvm.IRModule) -> list[tvm.ir.Call]:
    calls: list[tvm.ir.Call] = []

    def note(node: Expr) -> None:
        if isinstance(node, tvm.ir.Call) and isinstance(node.op, tvm.ir.Op) and node.op.name == "relax.call_tir":
            calls.append(node)

    for _, function in module.functions_items():
        if isinstance(function, relax.Function):
            relax.analysis.post_order_visit(function, note)
    return calls


def _task(report: KernelReport, function: tirx.PrimFunc, call: tvm.ir.Call, calls: int, sizes: Sizes) -> Task:
    (result,) = call.ty_args
    results = list(result.fields) if isinstance(result, tvm.ir.TupleType) else [result]
    operands = [_operand(argument, sizes) for argument in call.args[1].fields]
    outputs = [_tensor(kind, sizes) for kind in results]
    arguments = (*operands, *outputs)
    sums = _sums(function)
    values = _values_of(function, arguments)
    return Task(
        report.workload,
        report.family,
        report.version,
        report.space,
        function,
        arguments,
        len(outputs),
        calls,
        describe(report, function),
        sum(2 * math.prod(_number(axis.extent, values) for axis in stage.axes) for stage in sums),
        _operands(sums),
    )


def _operand(argument: Expr, sizes: Sizes) -> Argument:
    kind = argument.ty
    if isinstance(kind, relax.TensorType):
        return _tensor(kind, sizes)
    return Argument(str(kind.dtype), scalar=_evaluate(argument, sizes))


def _tensor(kind: relax.TensorType, sizes: Sizes) -> Argument:
    return Argument(kind.dtype.dtype, tuple(_evaluate(extent, sizes) for extent in kind.shape))


def _evaluate(extent: Expr, sizes: Sizes) -> int:
    values = {
        variable: tirx.const(sizes.get(variable.name, default_size(variable.name)), "int64")
        for variable in variables_of(extent)
    }
    return _number(extent, values)


def _number(extent: Extent, values: Mapping[Var, Expr]) -> int:
    if isinstance(extent, int):
        return extent
    simplified = sym.Analyzer().simplify(substitute(extent, values))
    assert isinstance(simplified, tirx.IntImm), f"{extent} does not become a number"
    return int(simplified)


def _sums(function: tirx.PrimFunc) -> list[Stage]:
    """Return the reductions of a function."""
    staged = parse(function)
    stages = staged.stages if staged is not None else ()
    return [stage for stage in stages if isinstance(stage, Stage) and stage.is_reduction]


def _values_of(function: tirx.PrimFunc, arguments: Sequence[Argument]) -> dict[Var, Expr]:
    """Return the sizes that a function's symbols have in a call with `arguments`."""
    values: dict[Var, Expr] = {}
    for parameter, argument in zip(function.params, arguments, strict=True):
        if argument.scalar is not None:
            values[parameter] = tirx.const(argument.scalar, argument.dtype)
            continue
        for extent, size in zip(parameter.shape, argument.shape, strict=True):
            if isinstance(extent, Var):
                values[extent] = tirx.const(size, str(extent.ty.dtype))
    return values


def _operands(sums: Sequence[Stage]) -> Operands:
    """Return what sums multiply: integers or bfloat16 where one reads some, and nothing of fp32."""
    read = {str(load.source.dtype) for stage in sums for load in stage.loads()}
    if "int8" in read:
        return "integer"
    return "bfloat16" if "bfloat16" in read and "float32" not in read else "float32"


def describe(report: KernelReport, function: tirx.PrimFunc) -> str:
    """Return a workload in words: its operators, the extents of its main stage, and the dtypes of its tensors."""
    staged = parse(function)
    assert staged is not None  # it has a family
    stages = [stage for stage in staged.stages if isinstance(stage, Stage)]
    main = max(stages, key=lambda stage: len(stage.reduction) * 100 + len(stage.spatial))
    spatial = "x".join(str(axis.extent) for axis in main.spatial)
    reduced = "x".join(str(axis.extent) for axis in main.reduction)
    operators = "+".join(report.operators) or report.function
    return f"{operators} {spatial}{f' over {reduced}' if reduced else ''} {main.output.dtype}"


def features_of(task: Task) -> dict[str, float]:
    """Return a workload's sizes as the cost model sees them: base-2 logarithms of extents and bytes."""
    tensors = [argument.shape for argument in task.arguments if argument.scalar is None]
    output = tensors[-1]
    largest = max(tensors[:-1], key=math.prod, default=output)
    sizes = {f"output {axis}": extent for axis, extent in enumerate(reversed(output[-4:]))}
    sizes |= {f"operand {axis}": extent for axis, extent in enumerate(reversed(largest[-4:]))}
    sizes |= {"outputs": math.prod(output), "bytes": task.bytes, "operands": len(tensors)}
    return {name: math.log2(1 + size) for name, size in sizes.items()}
