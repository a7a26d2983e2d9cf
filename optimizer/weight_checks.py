"""The tuple of weights taken as it is: `main` without the checks that TVM makes of every field at every call.

VMShapeLower has each parameter's type and shape checked. Of weights there are hundreds, and what the package holds of
them was compared with its digests when it was loaded; that of inputs, which change from call to call, stays.
"""

from __future__ import annotations

import tvm
import tvm.ir
from tvm import relax

from optimizer.weights import ENTRY

_CHECKS = frozenset({"vm.builtin.check_tuple_info", "vm.builtin.check_tensor_info", "vm.builtin.match_shape"})
_KILL = tvm.ir.Op.get("relax.vm.kill_object")


def trust_weights(module: tvm.IRModule) -> tvm.IRModule:
    """Return the module, whose shapes are lowered, with nothing done to the weights of `main` but to read them.

    The weights are its last parameter, where that is a tuple of tensors whose shapes are constant. Neither are their
    references dropped after the last use: the tuple keeps the memory anyway.
    """
    if ENTRY not in {variable.name_hint for variable in module.get_global_vars()}:
        return module
    function = module[ENTRY]
    weights = function.params[-1] if function.params else None
    if weights is None or not _is_of_constant_shapes(weights.ty) or not isinstance(function.body, relax.SeqExpr):
        return module
    blocks = function.body.blocks
    fields = {binding.var for block in blocks for binding in block.bindings if _reads(binding, weights)}
    kept = [[each for each in block.bindings if not _is_of_weights(each, weights, fields)] for block in blocks]
    used = {var for bindings in kept for each in bindings for var in relax.analysis.free_vars(each.value)}
    used |= set(relax.analysis.free_vars(function.body.body))
    trusted = [
        relax.BindingBlock([each for each in bindings if each.var not in fields or each.var in used])
        for bindings in kept
    ]
    body = relax.SeqExpr(trusted, function.body.body)
    result = tvm.IRModule(dict(module.functions), attrs=module.attrs, global_infos=module.global_infos)
    result.update_func(
        module.get_global_var(ENTRY),
        relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs),
    )
    return result


def _is_of_constant_shapes(kind: tvm.ir.Type) -> bool:
    return isinstance(kind, relax.TupleType) and all(
        isinstance(field, relax.TensorType)
        and isinstance(field.shape, relax.ShapeExpr)
        and all(isinstance(extent, tvm.tirx.IntImm) for extent in field.shape.values)
        for field in kind.fields
    )


def _reads(binding: relax.Binding, weights: relax.Var) -> bool:
    value = binding.value
    return isinstance(value, relax.TupleGetItem) and value.tuple_value.same_as(weights)


def _is_of_weights(binding: relax.Binding, weights: relax.Var, fields: set[relax.Var]) -> bool:
    """Return whether a binding checks the weights or one of their fields, or drops a reference to one."""
    call = binding.value
    if not isinstance(call, tvm.ir.Call) or not call.args:
        return False
    subject = call.args[0]
    if not isinstance(subject, relax.Var) or not (subject.same_as(weights) or subject in fields):
        return False
    return call.op == _KILL or (isinstance(call.op, relax.ExternFunc) and call.op.global_symbol in _CHECKS)
