"""Dataflow blocks that end where the module computes a dimension.

TVM's fusion orders the bindings of a block by the values they use, and does not know that a shape uses the match_cast
which computed its dimension: it may place a kernel before the size of its own result is known. It never moves a binding
from one block to another, so blocks are cut there.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator


def cut_blocks_at_bound_shapes(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module with every dataflow block cut after each match_cast of a shape."""
    for variable, function in module.functions_items():
        if isinstance(function, relax.Function) and isinstance(function.body, relax.SeqExpr):
            module.update_func(variable, _cut(function))
    return module


def _cut(function: relax.Function) -> relax.Function:
    blocks: list[relax.BindingBlock] = []
    for block in function.body.blocks:
        blocks += _parts(block) if isinstance(block, relax.DataflowBlock) else [block]
    if len(blocks) == len(function.body.blocks):
        return function
    body = relax.SeqExpr(blocks, function.body.body)
    renamed = _Renamer(_crossing(blocks)).visit_expr(body)
    return relax.Function(function.params, renamed, function.ret_ty, function.is_pure, function.attrs)


def _parts(block: relax.DataflowBlock) -> list[relax.DataflowBlock]:
    parts: list[list[relax.Binding]] = [[]]
    for binding in block.bindings:
        parts[-1].append(binding)
        if isinstance(binding, relax.MatchCast) and isinstance(binding.ty, relax.ShapeType):
            parts.append([])
    return [relax.DataflowBlock(part) for part in parts if part]


def _crossing(blocks: Sequence[relax.BindingBlock]) -> dict[relax.Var, relax.Var]:
    """Return an ordinary variable for each dataflow variable that another block reads."""
    home: dict[relax.Var, int] = {}
    crossing: dict[relax.Var, relax.Var] = {}
    for index, block in enumerate(blocks):
        for binding in block.bindings:
            for used in relax.analysis.free_vars(binding.value):
                if isinstance(used, relax.DataflowVar) and home.get(used, index) != index and used not in crossing:
                    crossing[used] = relax.Var(used.name, used.ty)
            home[binding.var] = index
    return crossing


@mutator
class _Renamer(PyExprMutator):
    """Puts other variables in the place of some."""

    def __init__(self, renamed: dict[relax.Var, relax.Var]) -> None:
        super().__init__()
        self._renamed = renamed

    def visit_dataflow_var_(self, op: relax.DataflowVar) -> relax.Expr:
        return self._renamed.get(op, op)

    def visit_dataflow_var_def_(self, var: relax.DataflowVar) -> relax.Var:
        return self._renamed.get(var, var)
