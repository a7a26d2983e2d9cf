"""TVM's lowering of TIR to LLVM, with small buffers on the stack, and to CUDA C++, without its keywords as names.

For every buffer of 1 KiB and more TVM takes memory from a workspace, by a call, and LLVM then stores a tile of sums at
the end of each loop instead of keeping it in registers. TVM has an annotation that leaves a buffer to LLVM, but its
rewriting of storage forgets it, and its compaction of buffers may make their sizes symbolic: so it comes after both.
TVM aligns what is on the stack to 16 bytes at most, where nearly every wider vector lies in two lines of the cache; but
memory for vectors it leaves to LLVM to align. So buffers there are views of such memory.

TVM has LLVM expect every tensor where a line of the cache begins, which arrays of NumPy seldom do: they begin at
multiples of 16 bytes. Kernels take these as they are; a copy of eight images of 224x224 took 0.4 ms where MobileNetV2
takes 10.

Of TVM's passes those are left out that have nothing to do for a CPU (threads, shared memory). Some took a quarter of
the time to compile a decoder, by proofs about symbolic sizes, and made functions of such sizes no better. Compaction
shrinks what a function's blocks allocate for all rows to the rows of a task; buffers that a schedule allocates where
it uses them have their size already, and got a longer expression for it. Hoisting conditions and removing what does
nothing is done by LLVM as well.

A kernel's parameters are named as the dimensions of the model. TVM's writer of C keeps out of the way of C's keywords
alone, and a model may well call a dimension `new`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import tvm
import tvm.ir
import tvm_ffi
from tvm import s_tir, tirx
from tvm.tirx import compilation_pipeline

from optimizer.package.manifest import INPUT_ALIGNMENT
from targets.base import Target

# Several such buffers of nested tiles fit the stack of any thread.
MOST_STACK_BYTES = 16 * 1024
_PIPELINE = "small_buffers_on_stack"
_WORD, _WORD_BITS = "float32", 32
_DEVICE_PIPELINE = "names_for_cxx"
# What C++17 reserves (ISO/IEC 14882:2017, 5.11, and the alternative tokens of 5.5), and CUDA's own of such a form.
_CXX_KEYWORDS = frozenset([
    "alignas", "alignof", "and", "and_eq", "asm", "auto", "bitand", "bitor", "bool", "break", "case", "catch",
    "char", "char16_t", "char32_t", "class", "compl", "const", "const_cast", "constexpr", "continue", "decltype",
    "default", "delete", "do", "double", "dynamic_cast", "else", "enum", "explicit", "export", "extern", "false",
    "final", "float", "for", "friend", "goto", "half", "if", "inline", "int", "long", "mutable", "namespace", "new",
    "noexcept", "not", "not_eq", "nullptr", "operator", "or", "or_eq", "override", "private", "protected", "public",
    "register", "reinterpret_cast", "return", "short", "signed", "sizeof", "static", "static_assert", "static_cast",
    "struct", "switch", "template", "this", "thread_local", "throw", "true", "try", "typedef", "typeid", "typename",
    "uint", "union", "unsigned", "using", "virtual", "void", "volatile", "warpSize", "wchar_t", "while", "xor",
    "xor_eq",
])  # fmt: skip
# TVM knows of no vector of it, and would compute whatever is rounded, such as codes of 8 bits, one by one.
tvm.ir.register_op_attr("tirx.nearbyint", "TVectorizable", True)
_Finalize = Callable[[], tvm.transform.Pass]


def options(target: Target) -> tvm.transform.PassContext:
    """Return the context for TVM's compilation of TIR for `target`."""
    # TVM's elimination of common subexpressions fails on vectors of booleans; LLVM and nvcc do the same later.
    return tvm.transform.PassContext(
        config={"tirx.disable_cse_tir": True, "tirx.disable_storage_rewrite": target.device == "cpu"}
    )


def pipeline(target: Target) -> str:
    """Return the name of the pipeline that lowers TIR for `target`."""
    if target.device != "cpu":
        compilation_pipeline.register_tir_pipeline(_DEVICE_PIPELINE, _device_lowering)
        return _DEVICE_PIPELINE
    name = f"{_PIPELINE}_of_{target.vector_bits}_bits"
    compilation_pipeline.register_tir_pipeline(name, lambda: _lowering(target.vector_lanes(_WORD_BITS)))
    return name


def _lowering(lanes: int) -> tuple[tvm.transform.Pass, _Finalize, _Finalize]:
    _, finalize_host, finalize_device = compilation_pipeline.get_tir_pipeline("s_tir")
    lower = tvm.transform.Sequential([*_cpu_passes(), _on_stack(lanes), _taking_arrays()])
    return lower, finalize_host, finalize_device


def _cpu_passes() -> list[tvm.transform.Pass]:
    """Return the passes of TVM's pipeline `s_tir` that matter for a CPU, in its order."""
    return [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        _of_functions(s_tir.transform.CompactBufferAllocation(), _is_worth_compacting),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.AnnotateIrregularLoop(),
        s_tir.transform.LowerOpaqueBlock(),
        tirx.transform.FlattenBuffer(),
        tirx.transform.BF16ComputeLegalize(),
        tirx.transform.NarrowDataType(32),
        s_tir.transform.LoopPartition(),
        tirx.transform.VectorizeLoop(True),
        _of_functions(s_tir.transform.HoistIfThenElse(), _has_known_sizes),
        tirx.transform.UnrollLoop(),
        _of_functions(s_tir.transform.RenormalizeSplitPattern(), _has_known_sizes),
        tirx.transform.StmtSimplify(),
        _of_functions(tirx.transform.RemoveNoOp(), _has_known_sizes),
        s_tir.transform.RewriteUnsafeSelect(),
        tirx.transform.FP8ComputeLegalize(),
        tirx.transform.VerifyMemory(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
        tirx.transform.MakePackedAPI(),
        tirx.transform.FP8StorageLegalize(),
        tirx.transform.BF16StorageLegalize(),
    ]


def _of_functions(transform: tvm.transform.Pass, condition: Callable[[tirx.PrimFunc], bool]) -> tvm.transform.Pass:
    """Return `transform` for those functions of a module alone of which `condition` holds."""

    @tvm.transform.module_pass(opt_level=0)
    def of_some(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
        functions = module.functions.items()
        chosen = {name: each for name, each in functions if isinstance(each, tirx.PrimFunc) and condition(each)}
        result = module.clone()
        for name, function in transform(tvm.IRModule(chosen)).functions.items():
            result.update_func(name, function)
        return result

    return of_some


def _has_known_sizes(function: tirx.PrimFunc) -> bool:
    tensors = [each for each in function.params if tirx.is_buffer_var(each)]
    return all(isinstance(size, tirx.IntImm) for tensor in tensors for size in tensor.shape)


def _is_worth_compacting(function: tirx.PrimFunc) -> bool:
    """Return whether blocks of a function allocate buffers, or all sizes are known, which makes it quick."""
    if _has_known_sizes(function):
        return True
    allocating: list[s_tir.SBlock] = []

    def note(block: s_tir.SBlock) -> None:
        if block.alloc_buffers:
            allocating.append(block)

    tvm_ffi.structural_walk(function.body, (s_tir.SBlock, note))
    return bool(allocating)


def _device_lowering() -> tuple[tvm.transform.Pass, _Finalize, _Finalize]:
    lower, finalize_host, finalize_device = compilation_pipeline.get_tir_pipeline("s_tir")
    return lower, finalize_host, lambda: tvm.transform.Sequential([finalize_device(), _without_keywords()])


def _without_keywords() -> tvm.transform.Pass:
    @tirx.transform.prim_func_pass(opt_level=0)
    def rename(function: tirx.PrimFunc, _module: tvm.IRModule, _context: tvm.transform.PassContext) -> tirx.PrimFunc:
        named = {each: tirx.Var(f"{each.name}_", each.ty) for each in function.params if each.name in _CXX_KEYWORDS}
        if not named:
            return function
        parameters = [named.get(each, each) for each in function.params]
        body = tvm_ffi.structural_map(function.body, (tirx.Var, lambda variable: named.get(variable, variable)))
        return tirx.PrimFunc(parameters, body, function.ret_type, function.attrs)

    return rename


def _on_stack(lanes: int) -> tvm.transform.Pass:
    """Return the pass that leaves small buffers to LLVM, aligned as vectors of `lanes` words are."""
    line = lanes * _WORD_BITS // 8

    def keep(allocation: tirx.AllocBuffer, _: tvm_ffi.StructuralMutator) -> tirx.Stmt:
        buffer = allocation.buffer
        extents = [int(extent) for extent in buffer.shape if isinstance(extent, tirx.IntImm)]
        size = math.prod(extents) * (buffer.dtype.bits * buffer.dtype.lanes // 8)
        if size > MOST_STACK_BYTES or len(extents) < len(buffer.shape):
            return allocation
        annotations = {**allocation.annotations, "disable_lower_builtin": tirx.IntImm("int32", 1)}
        if size < line:
            return tirx.AllocBuffer(buffer, annotations)
        memory = tirx.decl_buffer([-(-size // line)], f"{_WORD}x{lanes}", f"{buffer.name}_memory", scope=buffer.scope())
        view = tirx.DeclBuffer(buffer, data=tirx.buffer_data(memory))
        return tirx.SeqStmt([tirx.AllocBuffer(memory, annotations), view])

    @tirx.transform.prim_func_pass(opt_level=0)
    def mark(function: tirx.PrimFunc, _module: tvm.IRModule, _context: tvm.transform.PassContext) -> tirx.PrimFunc:
        return function.with_body(tvm_ffi.structural_mutate(function.body, (tirx.AllocBuffer, keep)))

    return mark


def _taking_arrays() -> tvm.transform.Pass:
    """Return the pass that has kernels take tensors at any multiple of INPUT_ALIGNMENT bytes."""

    def loosen(marked: tirx.AttrStmt) -> tirx.Stmt:
        if marked.attr_key != "storage_alignment" or int(marked.value) <= INPUT_ALIGNMENT:
            return marked
        return tirx.AttrStmt(marked.node, marked.attr_key, tirx.IntImm("int32", INPUT_ALIGNMENT), marked.body)

    @tirx.transform.prim_func_pass(opt_level=0)
    def mark(function: tirx.PrimFunc, _module: tvm.IRModule, _context: tvm.transform.PassContext) -> tirx.PrimFunc:
        return function.with_body(tvm_ffi.structural_map(function.body, (tirx.AttrStmt, loosen)))

    return mark
