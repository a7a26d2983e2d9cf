"""How the kernels of a step divide their work between cores, so that each core finds what it reads in its own cache.

Where two kernels one behind the other divide an image alike, each core reads what it wrote itself; where they do not,
half of the image goes from core to core. By channels a convolution reads all of its input on each core, half of it from
the other one; by parts of the image it reads all weights, and rows at its border from the other core. Which kernels
divide by parts of the image is then a minimum cut of a graph: kernels by channels are on the side of its source, the
others on that of its sink, and an edge carries the bytes that move if it is cut. Of two cuts that move as much the one
with fewer kernels by parts of the image is taken, which makes it the only one.
(Greig, Porteous and Seheult, Exact Maximum A Posteriori Estimation for Binary Images, 1989.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import networkx
import tvm
import tvm.ir
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.base import PassOutcome, Site
from passes.provenance import Bindings, nodes_of
from schedules.division import Division, with_division
from schedules.report import is_scheduled
from schedules.sharing import Sharing, sharing
from targets.base import Target

_BY_CHANNELS, _BY_IMAGE = -1, -2  # source and sink, beside the kernels' numbers
_VIEWS = frozenset({"relax.reshape"})


@dataclass(frozen=True)
class _Call:
    """A call of a kernel, `var = function(arguments)`."""

    var: relax.Var
    function: tvm.ir.GlobalVar
    arguments: tuple[relax.Expr, ...]
    sharing: Sharing


def divide_work(module: tvm.IRModule, target: Target) -> PassOutcome:
    """Return `module`, fused but not scheduled, with the functions of `main` told how to divide their images.

    The account has each kernel that is divided by parts of the image.
    """
    if target.device != "cpu":
        return PassOutcome(module)
    bindings = Bindings(module["main"])
    calls = _calls(module, bindings, target)
    by_image = _by_image(calls, bindings)
    result = _told(module, [call for call in calls if call.var in by_image], calls) if by_image else module
    sites = [Site(var.name, None, nodes_of(bindings.values[var]), "by parts of the image") for var in by_image]
    return PassOutcome(result, tuple(sites))


def _calls(module: tvm.IRModule, bindings: Bindings, target: Target) -> list[_Call]:
    """Return the calls whose kernels are of images, in order."""
    known: dict[str, Sharing | None] = {}
    calls: list[_Call] = []
    for var, value in bindings.values.items():
        if (
            not isinstance(value, tvm.ir.Call)
            or not isinstance(value.op, tvm.ir.Op)
            or value.op.name != "relax.call_tir"
        ):
            continue
        function, arguments = value.args[0], tuple(value.args[1].fields)
        if len(value.args) != 2 or not isinstance(value.ty, relax.TensorType):
            continue
        if function.name_hint not in known:
            definition = module[function]
            takes = isinstance(definition, tirx.PrimFunc) and not is_scheduled(definition)
            known[function.name_hint] = sharing(definition, target) if takes else None
        found = known[function.name_hint]
        if found is not None:
            calls.append(_Call(var, function, arguments, found))
    return calls


def _by_image(calls: Sequence[_Call], bindings: Bindings) -> list[relax.Var]:
    """Return the results of kernels whose functions are to be told to divide by parts of the image, in order."""
    graph: networkx.DiGraph[int] = networkx.DiGraph()
    graph.add_nodes_from((_BY_CHANNELS, _BY_IMAGE))
    number = {call.var: position for position, call in enumerate(calls)}

    def edge(source: int, sink: int, moved: int) -> None:
        before = graph.edges[source, sink]["capacity"] if graph.has_edge(source, sink) else 0
        graph.add_edge(source, sink, capacity=before + moved)

    for position, call in enumerate(calls):
        weights = sum(_bytes_of(each) for each in call.arguments if isinstance(each, tvm.ir.GenericConst))
        images = _bytes_of(call.var) + sum(_bytes_of(each) for each in call.arguments if isinstance(each, relax.Var))
        fixed = call.sharing.fixed
        if call.sharing.product and weights >= images:
            continue  # its columns are divided, too
        if fixed is not None:
            ends = (_BY_CHANNELS, position) if fixed is Division.CHANNELS else (position, _BY_IMAGE)
            graph.add_edge(*ends)  # without a capacity it is never cut
        else:
            edge(_BY_CHANNELS, position, weights + 2 * call.sharing.border)
        for parameter, argument in enumerate(call.arguments):
            source = _behind_views(argument, bindings)
            whole = parameter == call.sharing.whole
            if whole and fixed is None:
                edge(position, _BY_IMAGE, 2 * _bytes_of(argument))
            if source in number and calls[number[source]] is not call:
                edge(number[source], position, _bytes_of(argument))
                if not whole:
                    edge(position, number[source], _bytes_of(argument))
    _, image_side = networkx.minimum_cut(graph, _BY_CHANNELS, _BY_IMAGE)[1]
    return [call.var for call in calls if call.sharing.fixed is None and number[call.var] in image_side]


def _behind_views(expr: relax.Expr, bindings: Bindings) -> relax.Expr:
    """Return the variable whose memory an expression is."""
    if not isinstance(expr, relax.Var) or expr not in bindings.values:
        return expr
    value = bindings.values[expr]
    if isinstance(value, tvm.ir.Call) and isinstance(value.op, tvm.ir.Op) and value.op.name in _VIEWS:
        return _behind_views(value.args[0], bindings)
    return expr


def _bytes_of(tensor: relax.Expr) -> int:
    """Return the size of a tensor, in which extents that are not static count as one; 0 for what is none."""
    if not isinstance(tensor.ty, relax.TensorType) or tensor.ty.shape is None:
        return 0
    extents = [int(each) if isinstance(each, tirx.IntImm) else 1 for each in tensor.ty.shape.values]
    return math.prod(extents) * tensor.ty.dtype.dtype.bits // 8


def _told(module: tvm.IRModule, by_image: Sequence[_Call], calls: Sequence[_Call]) -> tvm.IRModule:
    """Return the module in which the functions of some of the calls are told to divide by parts of the image.

    A function that is called elsewhere, too, stays, and gets one beside it that is told.
    """
    vars_by_image = {call.var for call in by_image}
    others = {call.function.name_hint for call in calls if call.var not in vars_by_image}
    functions = dict(module.functions_items())
    places: dict[relax.Var, tvm.ir.GlobalVar] = {}
    for function in dict.fromkeys(call.function for call in by_image):
        told, variable = with_division(functions[function], Division.IMAGE), function
        if function.name_hint in others:
            variable = tvm.ir.GlobalVar(f"{function.name_hint}_by_image")
            relax.expr._update_type(variable, told.ty)
            places |= {call.var: variable for call in by_image if call.function.same_as(function)}
        functions[variable] = told
    result = tvm.IRModule(functions, attrs=module.attrs, global_infos=module.global_infos)
    if places:
        main = result.get_global_var("main")
        result.update_func(main, _Divider(result, places).visit_expr(result[main]))
    return result


@mutator
class _Divider(PyExprMutator):
    """Calls other functions at some places."""

    def __init__(self, module: tvm.IRModule, places: Mapping[relax.Var, tvm.ir.GlobalVar]) -> None:
        super().__init__(module)
        self._places = places

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        call = binding.value
        if binding.var in self._places and isinstance(call, tvm.ir.Call):
            arguments = [self._places[binding.var], *call.args[1:]]
            binding = relax.VarBinding(
                binding.var, tvm.ir.Call(call.op, arguments, call.attrs, call.ty_args, call.span)
            )
        super().visit_var_binding_(binding)
