"""Dot products of fours of bytes that add to int32 lanes, exactly: vpdpbusd, two of vpmaddwd, sdot and usdot.

They come in as functions in LLVM's language, as `bf16_dot` does: a row's four bytes are one number of 32 bits in all
lanes, and where a reduction ends there may be fewer. Which sign the activations may have is up to the instruction.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr, TensorLoad

from schedules.intrin.bf16_dot import PAIR, PAIR_READER
from schedules.intrin.grouped_call import GroupedDot
from schedules.intrin.llvm_functions import attributes
from targets.base import Target

# Neighbours of K that one lane consumes.
FOUR = 4
# The type that bytes are widened to where that is multiplied, in pairs.
WORD = "int16"
# How many fours are read at once where an instruction takes one of them out of a vector.
FOURS = 4
_DOT, _READ = "optimizer_dot_bytes", "optimizer_read_bytes"
_SOURCE = """
define weak_odr <{lanes} x i32> @{call}(<{lanes} x i32> %sum, ptr %weights, i32 %four) #0 {{
  %w = load <{bytes} x i8>, ptr %weights, align {bytes}
  %first = insertelement <{lanes} x i32> poison, i32 %four, i32 0
  %every = shufflevector <{lanes} x i32> %first, <{lanes} x i32> poison, <{lanes} x i32> zeroinitializer
  %x = bitcast <{lanes} x i32> %every to <{bytes} x i8>
{body}
  ret <{lanes} x i32> %result
}}
{readers}
attributes #0 = {{ {attributes} }}
"""
_VECTOR_READER = """
define weak_odr <{count} x i32> @{call}_vector_{count}(ptr %from) #0 {{
  %fours = load <{count} x i32>, ptr %from, align 1
  ret <{count} x i32> %fours
}}
"""
_READER = """
define weak_odr i32 @{call}_{count}(ptr %from) #0 {{
  %bytes = load i{bits}, ptr %from, align 1
  {widened}
  ret i32 %four
}}
"""
_ONE = """
  %result = call <{lanes} x i32>
    @{intrinsic}(<{lanes} x i32> %sum, <{bytes} x i8> {first}, <{bytes} x i8> {second})"""
_DECLARED = "declare <{lanes} x i32> @{intrinsic}(<{lanes} x i32>, <{bytes} x i8>, <{bytes} x i8>)"
# vpmaddubsw would saturate sums of two products. vpmaddwd multiplies numbers of 16 bits and adds pairs, exactly: every
# other byte of both operands is widened in place, which one vector of weights or four of activations take just once.
# The fence, no instruction, keeps LLVM from adding the products of many steps to each other, in registers they lack.
_AVX2 = """
  %pairs = bitcast <32 x i8> %w to <16 x i16>
  %raised = shl <16 x i16> %pairs, splat (i16 8)
  %even = ashr <16 x i16> %raised, splat (i16 8)
  %odd = ashr <16 x i16> %pairs, splat (i16 8)
  %fours = bitcast <32 x i8> %x to <16 x i16>
  %first.third = and <16 x i16> %fours, splat (i16 255)
  %second.fourth = lshr <16 x i16> %fours, splat (i16 8)
  %s = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %first.third, <16 x i16> %even)
  %t = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %second.fourth, <16 x i16> %odd)
  %some = add <8 x i32> %sum, %s
  %total = add <8 x i32> %some, %t
  %float = bitcast <8 x i32> %total to <8 x float>
  %known = call <8 x float> @llvm.arithmetic.fence.v8f32(<8 x float> %float)
  %result = bitcast <8 x float> %known to <8 x i32>"""
# Bytes that lie as words take one vpmaddwd for a pair; weights of bytes are widened by their load. The assembly, no
# instruction, keeps the sums of a step in order, so that they and what it multiplies fit the registers: LLVM does not
# know how many a step of a tile leaves, and would compute a sum over some steps after the other with all that they
# read kept.
_WORDS = """
define weak_odr <8 x i32> @{call}(<8 x i32> %sum, ptr %weights, i32 %pair) #0 {{
  {weights}
  %first = insertelement <8 x i32> poison, i32 %pair, i32 0
  %every = shufflevector <8 x i32> %first, <8 x i32> poison, <8 x i32> zeroinitializer
  %x = bitcast <8 x i32> %every to <16 x i16>
  %s = call <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16> %x, <16 x i16> %words)
  %total = add <8 x i32> %sum, %s
  %result = call <8 x i32> asm sideeffect "", "=x,0"(<8 x i32> %total) nounwind memory(none)
  ret <8 x i32> %result
}}
{readers}attributes #0 = {{ {attributes} }}
"""
_WEIGHTS = {
    "int8": """%w = load <16 x i8>, ptr %weights, align 16
  %words = sext <16 x i8> %w to <16 x i16>""",
    WORD: "%words = load <16 x i16>, ptr %weights, align 32",
}
_AVX2_DECLARED = """declare <8 x i32> @llvm.x86.avx2.pmadd.wd(<16 x i16>, <16 x i16>)
declare <8 x float> @llvm.arithmetic.fence.v8f32(<8 x float>)"""


def activation_types(target: Target) -> tuple[str, ...]:
    """Return the types of activations that the target multiplies with int8 weights, the best first; none without."""
    if target.device != "cpu":
        return ()
    if target.architecture == "x86_64":
        return ("uint8",) if "avx2" in target.features else ()
    if "asimddp" not in target.features:
        return ()
    return ("int8", "uint8") if "i8mm" in target.features else ("int8",)


def byte_dot(target: Target, activations: str, weights: str) -> GroupedDot | None:
    """Return the dot product of a CPU target for two types of bytes, None where it has none."""
    if weights != "int8" or activations not in activation_types(target):
        return None
    if splits_operands(target):
        return _dot(8, activations, _AVX2_DECLARED, _AVX2, target)
    return _dot(target.vector_lanes(32), activations, *single_instruction(target, activations), target)


def single_instruction(target: Target, activations: str) -> tuple[str, str]:
    """Return the declaration and the body of %result, the sums %sum and the products of the bytes %x and %w.

    The target has dot products of the type and does not split their operands (`splits_operands`).
    """
    lanes = target.vector_lanes(32)
    if target.architecture == "x86_64":
        intrinsic, operands = f"llvm.x86.avx512.vpdpbusd.{target.vector_bits}", ("%x", "%w")
    elif activations == "uint8":
        intrinsic, operands = "llvm.aarch64.neon.usdot.v4i32.v16i8", ("%x", "%w")
    else:
        intrinsic, operands = "llvm.aarch64.neon.sdot.v4i32.v16i8", ("%w", "%x")
    names = {"lanes": lanes, "bytes": FOUR * lanes, "intrinsic": intrinsic}
    return _DECLARED.format(**names), _ONE.format(**names, first=operands[0], second=operands[1])


def word_dot(target: Target, weights: str = "int8") -> GroupedDot | None:
    """Return the dot product of weights of int8 or int16 in pairs with numbers of int16, None where there is none."""
    if not splits_operands(target):
        return None
    call, read = f"{_DOT}_{WORD}" + ("" if weights == "int8" else f"_{weights}"), f"{_READ}_{WORD}"
    readers = PAIR_READER.format(call=read)
    source = _WORDS.format(call=call, weights=_WEIGHTS[weights], readers=readers, attributes=attributes(target))
    return GroupedDot(8, PAIR, "int32", call, read, f"{_AVX2_DECLARED}{source}", 1)


def splits_operands(target: Target) -> bool:
    """Return whether a target multiplies bytes as numbers of 16 bits, two vectors for each of both operands."""
    return bool(activation_types(target)) and target.architecture == "x86_64" and not target.has_vnni


def is_product_of_bytes(term: Expr) -> bool:
    """Return whether an expression is a product in int32 of two reads of 8 bits."""
    return isinstance(term, tirx.Mul) and _widens_byte(term.a) and _widens_byte(term.b)


def is_product_of_words(term: Expr) -> bool:
    """Return whether an expression is a product in int32 of a read of bytes that lie as int16 and one of int8."""
    if not isinstance(term, tirx.Mul):
        return False
    return any(_widens(a, WORD) and _widens(b, "int8") for a, b in ((term.a, term.b), (term.b, term.a)))


def _widens_byte(expression: Expr) -> bool:
    return _widens(expression, "int8", "uint8")


def _widens(expression: Expr, *types: str) -> bool:
    is_read = isinstance(expression, tirx.Cast) and isinstance(expression.value, TensorLoad)
    return is_read and str(expression.ty.dtype) == "int32" and str(expression.value.source.dtype) in types


def _dot(lanes: int, activations: str, declared: str, body: str, target: Target) -> GroupedDot:
    call = f"{_DOT}_{activations}"
    at_once = FOURS if target.architecture == "aarch64" else 1
    vectors = [_VECTOR_READER.format(call=_READ, count=count) for count in range(2, at_once + 1)]
    definition = _SOURCE.format(
        lanes=lanes,
        call=call,
        bytes=FOUR * lanes,
        body=body,
        readers="".join([*(_reader(count) for count in range(1, FOUR + 1)), *vectors]),
        attributes=attributes(target),
    )
    return GroupedDot(lanes, FOUR, "int32", call, _READ, f"{declared}\n{definition}", at_once)


def _reader(count: int) -> str:
    """Return the function that reads so many bytes of a four, the others being zero."""
    bits = 8 * count
    widened = "%four = add i32 %bytes, 0" if count == FOUR else f"%four = zext i{bits} %bytes to i32"
    return _READER.format(call=_READ, count=count, bits=bits, widened=widened)
