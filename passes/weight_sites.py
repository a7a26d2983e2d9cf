"""Where a module reads constant matrices of floats: as the weights of products, and as tables whose rows are gathered.

A matrix is known by the digest of its content, in the order [N, K] of its outputs and inputs: a table tied to the
weights of a product has the same one, and modules that other passes made of one model can be compared by it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
import tvm
import tvm.ir
from numpy.typing import NDArray
from tvm import relax
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.base import Dataflow
from passes.provenance import Nodes
from passes.quantized_weights import constant_array

# Smaller matrices cost more in launches than they save in bytes.
SMALLEST_MATRIX = 1024
_FLOATS = ("float32", "float16", "bfloat16")
_DIGEST_BYTES = 8


@dataclass(frozen=True, eq=False)
class WeightSite:
    """A binding of `variable` that reads a constant matrix [N, K], `stored` as it is, or `turned` to [K, N].

    `operand` is what a product multiplies it with, or the indices of the rows that are `gathered`.
    """

    variable: relax.Var
    matrix: NDArray[np.generic]
    stored: tvm.ir.GenericConst
    turned: bool
    operand: relax.Expr
    gathered: bool
    digest: str
    nodes: Nodes


@dataclass(frozen=True, eq=False)
class ExposedModule:
    """A module whose `main` takes the matrices of `sites` after its inputs, and returns the products' operands.

    `parameters` are the sites whose matrix each of the parameters is, as it is stored; `operands` the sites whose
    operand each of the outputs after the module's own is.
    """

    module: tvm.IRModule
    sites: tuple[WeightSite, ...]
    parameters: tuple[WeightSite, ...]
    operands: tuple[WeightSite, ...]


def weight_site(binding: relax.VarBinding, dataflow: Dataflow) -> WeightSite | None:
    """Return the site that a binding is: a product with a constant matrix, or a gathering of rows of one."""
    stored, gathered = product_matrix(binding.value, dataflow), False
    if stored is None:
        stored, gathered = table_matrix(binding.value, dataflow), True
    if stored is None:
        return None
    array = constant_array(stored)
    assert array is not None
    call = binding.value
    turned = not gathered and dataflow.call(call.args[1], "relax.permute_dims") is None
    matrix = array.T if turned else array
    operand = call.args[1 if gathered else 0]
    nodes = dataflow.nodes(call)
    return WeightSite(binding.var, matrix, stored, turned, operand, gathered, digest(matrix), nodes)


def weight_sites(function: relax.Function, dataflow: Dataflow) -> list[WeightSite]:
    """Return the sites of a function, in order, those in inner scopes not among them."""
    found = [weight_site(binding, dataflow) for block in function.body.blocks for binding in block.bindings]
    return [site for site in found if site is not None]


def digest(matrix: NDArray[np.generic]) -> str:
    """Return what equal matrices [N, K] have in common, as hexadecimal digits."""
    header = f"{matrix.dtype.name}{matrix.shape}".encode()
    content = np.ascontiguousarray(matrix).view(np.uint8).reshape(-1)
    return hashlib.blake2b(content.data, key=header, digest_size=_DIGEST_BYTES).hexdigest()


def is_digest(name: str) -> bool:
    """Return whether `name` is the digest of a matrix, not the name of a node."""
    return len(name) == 2 * _DIGEST_BYTES and set(name) <= set("0123456789abcdef")


def product_matrix(expr: relax.Expr, dataflow: Dataflow) -> tvm.ir.GenericConst | None:
    """Return the constant that a product of floats multiplies rows [..., K] with: [K, N], or [N, K] to be turned."""
    call = dataflow.call(expr, "relax.matmul") if isinstance(expr, tvm.ir.Call) else None
    if call is None or str(call.args[0].ty.dtype.dtype) not in _FLOATS or call.args[0].ty.ndim < 2:
        return None
    constant = dataflow.producer(call.args[1])
    if constant_array(constant) is None:
        turned = dataflow.call(call.args[1], "relax.permute_dims")
        constant = dataflow.producer(turned.args[0]) if turned is not None else None
    return constant if _is_matrix(constant) else None


def table_matrix(expr: relax.Expr, dataflow: Dataflow) -> tvm.ir.GenericConst | None:
    """Return the constant table [N, K] whose rows a gathering takes."""
    call = dataflow.call(expr, "relax.take") if isinstance(expr, tvm.ir.Call) else None
    if call is None or call.attrs.axis is None or int(call.attrs.axis) != 0 or call.attrs.mode not in ("fast", "clip"):
        return None
    constant = dataflow.producer(call.args[0])
    return constant if _is_matrix(constant) else None


def _is_matrix(expr: relax.Expr | None) -> TypeGuard[tvm.ir.GenericConst]:
    if expr is None:
        return False
    return isinstance(expr, tvm.ir.GenericConst) and expr.ty.ndim == 2 and str(expr.ty.dtype.dtype) in _FLOATS


def expose(module: tvm.IRModule) -> ExposedModule:
    """Return a module whose matrices come from outside and whose products' operands can be looked at."""
    plain = relax.transform.ToNonDataflow()(module)
    function = plain["main"]
    dataflow = Dataflow(function)
    sites = tuple(site for site in weight_sites(function, dataflow) if site.matrix.size >= SMALLEST_MATRIX)
    parameters = tuple({_address(site.stored): site for site in sites}.values())
    operands = tuple({site.operand: site for site in sites if not site.gathered}.values())
    variables = {_address(site.stored): relax.Var(f"matrix_{n}", site.stored.ty) for n, site in enumerate(parameters)}
    exposer = _Exposer(plain, variables)
    exposed = exposer.exposed(function, [site.operand for site in operands])
    exposer.builder_.update_func(plain.get_global_var("main"), exposed)
    result = relax.transform.ConvertToDataflow()(exposer.builder_.get())
    return ExposedModule(relax.transform.DeadCodeElimination()(result), sites, parameters, operands)


@mutator
class _Exposer(PyExprMutator):
    """Puts parameters in the place of constants, and adds outputs."""

    def __init__(self, module: tvm.IRModule, variables: dict[int, relax.Var]) -> None:
        super().__init__(module)
        self._variables = variables

    def exposed(self, function: relax.Function, operands: list[relax.Expr]) -> relax.Function:
        """Return the function with more parameters and outputs."""
        body = self.visit_expr(function.body)
        result = body.body
        kind = result.ty
        parts = len(kind.fields) if isinstance(kind, relax.TupleType) else 0
        fields = [relax.TupleGetItem(result, place) for place in range(parts)] or [result]
        bound = [relax.VarBinding(relax.Var("output", field.ty), field) for field in map(self._typed, fields)]
        added = [self.visit_expr(operand) for operand in operands]
        everything = self._typed(relax.Tuple([*(binding.var for binding in bound), *added]))
        last = relax.VarBinding(relax.Var("outputs", everything.ty), everything)
        blocks = [*body.blocks, relax.BindingBlock([*bound, last])]
        parameters = [*function.params, *self._variables.values()]
        sequence = relax.SeqExpr(blocks, last.var)
        return relax.Function(parameters, sequence, everything.ty, function.is_pure, function.attrs)

    def _typed(self, expr: relax.Expr) -> relax.Expr:
        return self.builder_.normalize(expr)

    def visit_generic_const_(self, op: tvm.ir.GenericConst) -> relax.Expr:
        """Replace a matrix."""
        return self._variables.get(_address(op), op) if isinstance(op.ty, relax.TensorType) else op


def _address(constant: tvm.ir.GenericConst) -> int:
    return int(constant.value.data_ptr())
