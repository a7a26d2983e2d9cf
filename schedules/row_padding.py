"""Rows that tile registers read, an odd number of cache lines apart.

A tile takes the same 64 bytes of 16 rows. Where rows begin an even number of lines apart these share few of the sets of
the first-level cache, and push each other and the weights out of it: with rows of 1536 or 6144 bytes a step of four
products takes 34 ns, with one line more between them 28 (Emerald Rapids). A tensor that lives between kernels therefore
gets rows that are a line longer. Nobody reads or writes what lies there.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm
import tvm_ffi
from tvm import ir, relax, s_tir, tirx
from tvm.ir import Expr, GlobalVar, TensorLoad, Var
from tvm.relax.expr_functor import PyExprMutator, mutator
from tvm.tirx.stmt import Stmt

from schedules.intrin.matrix_tiles import BYTES, matrix_tiles
from schedules.matmul import matrix_operands, other_operand
from schedules.prepack import products_of
from schedules.report import is_scheduled
from schedules.stage_parsing import parse
from schedules.stages import Stage, StagedFunction, contains
from targets.base import Target

# The arguments of a call that gives a function tensors alone: the function, and these.
_PLAIN = 2
_MATRIX = 2
# Of shorter rows many lie in the cache, and one line more is much of them.
FEWEST_LINES = 8


def pad_rows(module: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Return `module`, with packed weights but not scheduled, with longer rows of tensors that tile registers read.

    Tensors that anything but a TIR function reads, such as a view, stay as they are.
    """
    if target.device != "cpu" or matrix_tiles(target, "bfloat16", "bfloat16") is None:
        return module
    module = _padded_inside(module, target)
    functions = _Functions(module, target)
    found = {
        variable: padded
        for variable, function in module.functions_items()
        if isinstance(function, relax.Function) and (padded := functions.padded_in(function))
    }
    if not found:
        return module
    rewriter = _Padder(module, functions)
    for variable, padded in found.items():
        rewriter.padded = padded
        rewriter.builder_.update_func(variable, rewriter.visit_expr(module[variable]))
    return rewriter.builder_.get()


class _Functions:
    """What the TIR functions of a module read by tile registers."""

    def __init__(self, module: tvm.IRModule, target: Target) -> None:
        self.module = module
        self._target = target
        self._read: dict[GlobalVar, tuple[int, ...] | None] = {}

    def padded_in(self, function: relax.Function) -> frozenset[Var]:
        """Return the variables of a Relax function whose tensors are to have longer rows."""
        made: set[Var] = set()
        wanted: set[Var] = set()
        results: set[Var] = set()
        others: set[Var] = set(relax.analysis.free_vars(function.body.body))
        for binding in (binding for block in function.body.blocks for binding in block.bindings):
            value = binding.value
            if self.is_plain(value):
                (made if isinstance(value.ty, relax.TensorType) else results).add(binding.var)
                operands = value.args[1].fields
                places = self.read_in_tiles(value.args[0]) or ()
                wanted |= {operands[place] for place in places if place < len(operands)}
            elif isinstance(value, relax.TupleGetItem) and value.tuple_value in results:
                made.add(binding.var)
            else:
                others |= set(relax.analysis.free_vars(value))
        kept = results & others
        fields = [
            (binding.var, (binding.value.tuple_value, binding.value.index))
            for block in function.body.blocks
            for binding in block.bindings
            if isinstance(binding.value, relax.TupleGetItem) and binding.value.tuple_value in results
        ]
        # All that names a field of a result gets it longer, or nothing.
        refused = {field for var, field in fields if field[0] in kept or var in others}
        others |= {var for var, field in fields if field in refused}
        return frozenset(each for each in made & wanted - others if _conflicts(each))

    def is_plain(self, value: Expr) -> bool:
        """Return whether a value is what a function gives that is made of stages alone."""
        if not isinstance(value, ir.Call) or not isinstance(value.op, ir.Op) or value.op.name != "relax.call_tir":
            return False
        return len(value.args) == _PLAIN and self.read_in_tiles(value.args[0]) is not None

    def read_in_tiles(self, variable: GlobalVar) -> tuple[int, ...] | None:
        """Return the places of the parameters that a function's products read by rows; None where it is not plain."""
        if variable not in self._read:
            function = self.module[variable]
            if _in_stages(function) is None:
                self._read[variable] = None
            else:
                rows = rows_in_tiles(function, self._target)
                places = range(len(function.params))
                self._read[variable] = tuple(n for n in places if any(function.params[n].same_as(row) for row in rows))
        return self._read[variable]


def _in_stages(function: object) -> StagedFunction | None:
    """Return the stages of a TIR function that is made of them alone and not scheduled; None for anything else."""
    if not isinstance(function, tirx.PrimFunc) or is_scheduled(function):
        return None
    staged = parse(function)
    return staged if staged is not None and all(isinstance(stage, Stage) for stage in staged.stages) else None


def _conflicts(tensor: Var) -> bool:
    """Return whether the rows of a tensor are to be longer."""
    return tensor.ty.shape is not None and _conflict(tensor.ty.shape.values, tensor.ty.dtype.dtype.bits)


def _conflict(shape: Sequence[Expr], bits: int) -> bool:
    """Return whether there are rows that begin an even number of lines apart, and enough of them to add one."""
    row = shape[-1]
    if len(shape) < _MATRIX or not isinstance(row, tirx.IntImm):
        return False
    lines, rest = divmod(int(row) * bits, BYTES * 8)
    return rest == 0 and lines % 2 == 0 and lines >= FEWEST_LINES


def _longer_type(tensor: relax.TensorType) -> relax.TensorType:
    return relax.TensorType(longer(tensor.shape.values, tensor.dtype.dtype.bits), tensor.dtype, tensor.vdevice)


def longer(shape: Sequence[Expr], bits: int) -> list[Expr]:
    """Return a shape whose rows are a line longer."""
    *outer, row = shape
    return [*outer, row + BYTES * 8 // bits]


def _padded_inside(module: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Return `module` with longer rows of what functions compute for themselves and read by tile registers."""
    longer_inside: dict[GlobalVar, tirx.PrimFunc] = {}
    for variable, function in module.functions_items():
        staged = _in_stages(function)
        if staged is None:
            continue
        rows = [row for row in rows_in_tiles(function, target) if contains(staged.intermediate, row)]
        conflicting = [row for row in rows if _conflict(row.shape, row.dtype.bits)]
        if conflicting:
            longer_inside[variable] = with_longer_rows(function, conflicting)
    if not longer_inside:
        return module
    functions = {**dict(module.functions_items()), **longer_inside}
    return tvm.IRModule(functions, attrs=module.attrs, global_infos=module.global_infos)


def rows_in_tiles(function: tirx.PrimFunc, target: Target) -> list[Var]:
    """Return the buffers whose rows a function's products read by tile registers."""
    return [
        other_operand(product.stage, product.operand).source
        for product in products_of(function)
        if product.block and matrix_operands(product, target) is not None
    ]


def with_longer_rows(function: tirx.PrimFunc, buffers: Sequence[Var]) -> tirx.PrimFunc:
    """Return a function some of whose buffers have rows that are a line longer than what it uses of them."""
    replaced = {
        old: tirx.decl_buffer(longer(old.shape, old.dtype.bits), str(old.dtype), old.name, layout=None)
        for old in buffers
    }

    def allocating(block: s_tir.SBlock, mutate: tvm_ffi.StructuralMutator) -> Stmt:
        block = mutate.default_mutate(block)
        if not any(buffer in replaced for buffer in block.alloc_buffers):
            return block
        buffers = [replaced.get(buffer, buffer) for buffer in block.alloc_buffers]
        parts = block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init
        return s_tir.SBlock(*parts, buffers, block.match_buffers, block.annotations, block.span)

    def read(load: TensorLoad, mutate: tvm_ffi.StructuralMutator) -> Expr:
        load = mutate.default_mutate(load)
        new = replaced.get(load.source)
        return load if new is None else tirx.BufferLoad(new, list(load.indices))

    def written(store: tirx.BufferStore, mutate: tvm_ffi.StructuralMutator) -> Stmt:
        store = mutate.default_mutate(store)
        new = replaced.get(store.buffer)
        return store if new is None else tirx.BufferStore(new, store.value, list(store.indices))

    def region(declared: ir.TensorRegion, mutate: tvm_ffi.StructuralMutator) -> Expr:
        declared = mutate.default_mutate(declared)
        new = replaced.get(declared.source)
        return declared if new is None else tirx.BufferRegion(new, list(declared.region))

    visits = [(s_tir.SBlock, allocating), (TensorLoad, read), (tirx.BufferStore, written), (ir.TensorRegion, region)]
    body = tvm_ffi.structural_mutate(function.body, visits)
    parameters = [replaced.get(parameter, parameter) for parameter in function.params]
    return tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)


@mutator
class _Padder(PyExprMutator):
    """Makes the tensors of some variables longer by a line a row, in all that writes and reads them."""

    def __init__(self, module: tvm.IRModule, functions: _Functions) -> None:
        super().__init__(module)
        self.padded: frozenset[Var] = frozenset()
        self._fields: set[tuple[Var, int]] = set()
        self._functions = functions
        self._variants: dict[tuple[GlobalVar, tuple[int, ...]], GlobalVar] = {}

    def visit_function_(self, op: relax.Function) -> relax.Function:
        self._fields = {
            (binding.value.tuple_value, binding.value.index)
            for block in op.body.blocks
            for binding in block.bindings
            if isinstance(binding.value, relax.TupleGetItem) and binding.var in self.padded
        }
        return super().visit_function_(op)

    def visit_var_binding_(self, binding: relax.VarBinding) -> None:
        value = binding.value
        if isinstance(value, relax.TupleGetItem) and binding.var in self.padded:
            # Its type is another one.
            item = relax.TupleGetItem(self.visit_expr(value.tuple_value), value.index)
            self.set_var_remap(binding.var, self.builder_.emit(item, binding.var.name))
        elif self._functions.is_plain(value) and (places := self._places(binding.var, value)):
            operands = relax.Tuple([self.visit_expr(each) for each in value.args[1].fields])
            arguments = [self._variant(value.args[0], places), operands]
            result = self._result(binding.var, value.ty_args[0])
            call = ir.Call(value.op, arguments, value.attrs, [result], value.span)
            self.set_var_remap(binding.var, self.builder_.emit(call, binding.var.name))
        else:
            super().visit_var_binding_(binding)

    def _places(self, result: Var, call: ir.Call) -> tuple[int, ...]:
        """Return the places of the parameters, results behind operands, whose tensors get longer rows."""
        operands = list(call.args[1].fields)
        read = [place for place, each in enumerate(operands) if isinstance(each, Var) and each in self.padded]
        if isinstance(call.ty, relax.TensorType):
            written = [len(operands)] if result in self.padded else []
        else:
            fields = range(len(call.ty.fields))
            written = [len(operands) + field for field in fields if (result, field) in self._fields]
        return (*read, *written)

    def _result(self, result: Var, declared: ir.Type) -> ir.Type:
        """Return the type of the result of a call."""
        if isinstance(declared, relax.TensorType):
            return _longer_type(declared) if result in self.padded else declared
        fields = [
            _longer_type(each) if (result, number) in self._fields else each
            for number, each in enumerate(declared.fields)
        ]
        return relax.TupleType(fields)

    def _variant(self, function: GlobalVar, places: tuple[int, ...]) -> GlobalVar:
        key = function, places
        if key not in self._variants:
            plain = self._functions.module[function]
            padded = with_longer_rows(plain, [plain.params[place] for place in places])
            self._variants[key] = self.builder_.add_func(padded, f"{function.name_hint}_padded")
        return self._variants[key]
