"""The first rows of a decoder's logits left out where nobody asks for them.

Who continues a text needs the logits that follow its last token alone, and of a prompt the product that makes logits is
the largest of all. It takes rows, one of each token, apart:
    (x @ W)[:, first:] = x[:, first:] @ W
and so does what follows element by element. The number of rows to leave out comes behind the numbers of tokens in the
caches, in the same shape; 0 gives the model's own output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import tvm
import tvm.ir
from tvm import relax, tirx
from tvm.relax.expr_functor import PyExprMutator, mutator

from passes.base import Dataflow, Pass, PassOutcome, Refusal, Site, require
from passes.rewrite_kv_cache import caches_of
from passes.tensor_types import shape_of

ATTRIBUTE = "shortened_outputs"
"""The attribute of a rewritten function: which of the results that it returns lack the rows left out."""
_TOKENS = 1
_ELEMENTWISE = frozenset(
    f"relax.{name}" for name in ("add", "astype", "clip", "divide", "multiply", "negative", "subtract", "tanh")
)


@dataclass(frozen=True, eq=False)
class _Product:
    """The product of `rows` [batch, tokens, K] that the result at `position` is made of, element by element."""

    position: int
    call: tvm.ir.Call
    tokens: tirx.Var


@dataclass(frozen=True)
class LeaveOutRows(Pass):
    """Let the caller of a decoder leave out the first rows of results that a product makes, row by row.

    Fires for results [batch, tokens, N] of a function with caches in place, where all that lies between the product and
    the result is element by element and read by nobody else.
    """

    name: ClassVar[str] = "leave-out-rows"

    def run(self, module: tvm.IRModule) -> PassOutcome:
        """Rewrite `main`."""
        entry = module.get_global_var("main") if "main" in [v.name_hint for v in module.get_global_vars()] else None
        function = None if entry is None else module[entry]
        if not isinstance(function, relax.Function) or not caches_of(function) or shortened_outputs(function):
            return PassOutcome(module)
        products, sites = _products(function)
        if not products:
            return PassOutcome(module, sites)
        rewriter = _Rewriter(module, function, products)
        rewriter.builder_.update_func(entry, rewriter.rewritten())
        return PassOutcome(rewriter.builder_.get(), sites)


def shortened_outputs(function: relax.Function) -> tuple[int, ...]:
    """Return which of the results that a function returns have rows that can be left out."""
    attributes = function.attrs
    if attributes is None or ATTRIBUTE not in attributes:
        return ()
    return tuple(int(position) for position in attributes[ATTRIBUTE])


def _products(function: relax.Function) -> tuple[list[_Product], tuple[Site, ...]]:
    """Return the products whose rows can be left out, and the account of all results with a row for each token."""
    dataflow = Dataflow(function)
    result = dataflow.producer(function.body.body)
    fields = list(result.fields) if isinstance(result, relax.Tuple) else [result]
    found: list[_Product] = []
    sites: list[Site] = []
    for position, field in enumerate(fields):
        tokens = _tokens(field)
        if tokens is None:
            continue
        location, nodes = getattr(field, "name", "result"), dataflow.nodes(field)
        try:
            call = _product(field, tokens, dataflow)
            found.append(_Product(position, call, tokens))
        except Refusal as refusal:
            sites.append(Site(location, str(refusal), nodes))
        else:
            sites.append(Site(location, None, nodes))
    return found, tuple(sites)


def _tokens(result: relax.Expr) -> tirx.Var | None:
    """Return the symbol of the number of tokens that a result [batch, tokens, N] has rows of."""
    shape = shape_of(result)
    if shape is None or len(shape) != _TOKENS + 2 or not isinstance(shape[_TOKENS], tirx.Var):
        return None
    tokens = shape[_TOKENS]
    return None if any(_has(extent, tokens) for extent in (shape[0], shape[2])) else tokens


def _product(result: relax.Expr, tokens: tirx.Var, dataflow: Dataflow) -> tvm.ir.Call:
    """Return the product that a result is made of; raises Refusal where there is none or more depends on its rows."""
    while True:
        require(dataflow.read_once(result), "something else reads the rows")
        call = dataflow.call(result, "relax.matmul", *_ELEMENTWISE)
        require(call is not None, "no product makes the rows")
        assert call is not None
        of_rows = [argument for argument in call.args if _depends(argument, tokens)]
        require(len(of_rows) == 1, "rows are combined with something that has a row for each token, too")
        result = of_rows[0]
        if call.op.name == "relax.matmul":
            require(result.same_as(call.args[0]) and _tokens(result) is not None, "the rows are no product's rows")
            return call
        require(_tokens(result) is not None, "the rows are not three-dimensional")


def _depends(expr: relax.Expr, symbol: tirx.Var) -> bool:
    return isinstance(expr.ty, relax.TensorType) and any(_has(extent, symbol) for extent in shape_of(expr) or ())


def _has(extent: tvm.ir.Expr, symbol: tirx.Var) -> bool:
    return any(symbol.same_as(variable) for variable in tirx.analysis.undefined_vars(extent))


@mutator
class _Rewriter(PyExprMutator):
    """Gives products the last rows of their first operand."""

    def __init__(self, module: tvm.IRModule, function: relax.Function, products: Sequence[_Product]) -> None:
        super().__init__(module)
        self._function = function
        self._products = products
        self._skipped = tirx.Var("rows_left_out", "int64")

    def rewritten(self) -> relax.Function:
        """Return the function that takes the number of rows to leave out."""
        old = self._function
        lengths = old.params[-1]
        longer = relax.Var(lengths.name, relax.ShapeType([*lengths.ty.values, self._skipped]))
        self.set_var_remap(lengths, longer)
        body = self.visit_expr(old.body)
        function = relax.Function([*old.params[:-1], longer], body, body.ty, old.is_pure, old.attrs)
        return function.with_attr(ATTRIBUTE, [product.position for product in self._products])

    def visit_call_(self, call: tvm.ir.Call) -> relax.Expr:
        """Slice the rows of a product."""
        product = next((each for each in self._products if each.call.same_as(call)), None)
        call = super().visit_call_(call)
        if product is None:
            return call
        end = [product.tokens]
        last = relax.op.strided_slice(call.args[0], [_TOKENS], [self._skipped], end, [1], assume_inbound=True)
        rows = self.builder_.emit(last, "last_rows")
        return tvm.ir.Call(call.op, [rows, *call.args[1:]], call.attrs, call.ty_args, call.span)


__all__ = ["ATTRIBUTE", "LeaveOutRows", "shortened_outputs"]
