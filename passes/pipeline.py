"""The order of passes, and its notation: `fold-constants,fold-batch-norm{option=value}`."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import tvm
from tvm import relax

from passes.base import Pass, PassOutcome, canonical, options_of
from passes.provenance import carry

# Names to the module and class that hold them, so that listing the passes imports none of them.
_PASSES = {
    "absorb-scales": ("passes.absorb_scales", "AbsorbScales"),
    "block-channels": ("passes.block_channels", "BlockChannels"),
    "bound-dynamic-quantization": ("passes.bound_dynamic_quantization", "BoundDynamicQuantization"),
    "cancel-transposes": ("passes.cancel_transposes", "CancelTransposes"),
    "combine-products": ("passes.combine_products", "CombineProducts"),
    "convert-precision": ("passes.convert_precision", "ConvertPrecision"),
    "eliminate-common-subexpressions": ("passes.eliminate_common_subexpressions", "EliminateCommonSubexpressions"),
    "fold-batch-norm": ("passes.fold_batch_norm", "FoldBatchNorm"),
    "fold-constants": ("passes.fold_constants", "FoldConstants"),
    "fold-requantization": ("passes.fold_requantization", "FoldRequantization"),
    "fold-norm-scales": ("passes.fold_norm_scales", "FoldNormScales"),
    "fuse-attention": ("passes.fuse_attention", "FuseAttention"),
    "leave-out-rows": ("passes.leave_out_rows", "LeaveOutRows"),
    "narrow-attention": ("passes.narrow_attention", "NarrowAttention"),
    "recognize-activations": ("passes.recognize_activations", "RecognizeActivations"),
    "recognize-integer-products": ("passes.recognize_integer_products", "RecognizeIntegerProducts"),
    "recognize-normalization": ("passes.recognize_normalization", "RecognizeNormalization"),
    "recognize-rotary-embedding": ("passes.recognize_rotary_embedding", "RecognizeRotaryEmbedding"),
    "recognize-softmax": ("passes.recognize_softmax", "RecognizeSoftmax"),
    "pack-quantized-weights": ("passes.pack_quantized_weights", "PackQuantizedWeights"),
    "quantize-weights": ("passes.quantize_weights", "QuantizeWeights"),
    "rewrite-kv-cache": ("passes.rewrite_kv_cache", "RewriteKvCache"),
    "round-attention": ("passes.round_attention", "RoundAttention"),
    "scale-batch-norm": ("passes.scale_batch_norm", "ScaleBatchNorm"),
    "simplify-algebra": ("passes.simplify_algebra", "SimplifyAlgebra"),
    "simplify-casts": ("passes.simplify_casts", "SimplifyCasts"),
    "simplify-shapes": ("passes.simplify_shapes", "SimplifyShapes"),
}
DEFAULT = ",".join(
    (
        "fold-constants",
        "simplify-casts",
        "simplify-algebra",
        "simplify-shapes",
        "cancel-transposes",
        "simplify-shapes",  # of the reshapes that are left between cancelled transposes
        "fold-constants",  # of what the passes so far computed of constants
        "eliminate-common-subexpressions",
        "recognize-activations",
        "recognize-softmax",
        "recognize-normalization",
        "recognize-rotary-embedding",
        "absorb-scales",
        "fold-batch-norm",
        "scale-batch-norm",
        "combine-products",
        "fuse-attention",
        "eliminate-common-subexpressions",  # of the masks that attentions share
        "fold-constants",
    )
)
_ITEM = re.compile(r"\s*([\w-]+)\s*(?:\{([^}]*)\})?\s*(?:,|$)")


class PassOptionError(ValueError):
    """A pipeline names an unknown pass or option, or gives an option a value of the wrong type."""


@dataclass(frozen=True)
class OptionDescription:
    """An option of a pass, its type, and the value that it has if it is not given."""

    name: str
    type: str
    default: str


@dataclass(frozen=True)
class PassDescription:
    """What a pass does, in the words of its documentation, and its options."""

    name: str
    documentation: str
    options: tuple[OptionDescription, ...]


@dataclass(frozen=True)
class PassRecord:
    """One pass of a run, its time in seconds, and its outcome."""

    item: Pass
    seconds: float
    outcome: PassOutcome


def pass_names() -> tuple[str, ...]:
    """Return the names of all passes."""
    return tuple(_PASSES)


def describe(name: str) -> PassDescription:
    """Return what the pass of a name does and its options, as its class declares them."""
    kind = _kind(name)
    options = tuple(
        OptionDescription(field.name, type(field.default).__name__, str(field.default)) for field in options_of(kind)
    )
    return PassDescription(name, inspect.cleandoc(kind.__doc__ or ""), options)


def parse(text: str) -> tuple[Pass, ...]:
    """Return the passes of a pipeline written as names with options; raises PassOptionError."""
    passes: list[Pass] = []
    position = 0
    while position < len(text.rstrip()):
        item = _ITEM.match(text, position)
        if item is None:
            unread = text[position:].partition(",")[0].strip()
            raise PassOptionError(f"cannot read '{unread}' among the passes; write name,name{{option=value}}")
        assignments = (part.partition("=") for part in (item.group(2) or "").split(",") if part.strip())
        passes.append(_instance(item.group(1), {option.strip(): value.rstrip() for option, _, value in assignments}))
        position = item.end()
    return tuple(passes)


def instance(name: str, options: Mapping[str, object]) -> Pass:
    """Return the pass called `name` with typed options, such as a manifest records; raises PassOptionError."""
    return _instance(name, {option: str(value) for option, value in options.items()})


def notation(item: Pass) -> str:
    """Return a pass as `parse` reads it."""
    options = ",".join(f"{field.name}={getattr(item, field.name)}" for field in options_of(type(item)))
    return f"{item.name}{{{options}}}" if options else item.name


def run(
    module: tvm.IRModule, passes: Sequence[Pass], after: Callable[[PassRecord], None] | None = None
) -> tuple[tvm.IRModule, tuple[PassRecord, ...]]:
    """Run passes in order; the module is verified to be well-formed after each that changes it.

    `after` is called with each record.
    """
    records: list[PassRecord] = []
    if passes:  # what nobody reads would count as a reader
        module = carry(module, canonical(module))
    for item in passes:
        start = time.perf_counter()
        outcome = item.run(module)
        if not outcome.module.same_as(module):
            module = carry(module, outcome.module)
            relax.analysis.well_formed(module)  # raises at the first violation: a bug of the pass
            outcome = dataclasses.replace(outcome, module=module)
        records.append(PassRecord(item, time.perf_counter() - start, outcome))
        if after is not None:
            after(records[-1])
    return module, tuple(records)


def _instance(name: str, options: Mapping[str, str]) -> Pass:
    if name not in _PASSES:
        close = difflib.get_close_matches(name, _PASSES, 1)
        hint = f"did you mean '{close[0]}'?" if close else f"the passes are {', '.join(_PASSES)}"
        raise PassOptionError(f"unknown pass '{name}'; {hint}")
    kind = _kind(name)
    fields = {field.name: field for field in options_of(kind)}
    values: dict[str, object] = {}
    for option, value in options.items():
        if option not in fields:
            known = f"its options are {', '.join(fields)}" if fields else "it has no options"
            raise PassOptionError(f"pass '{name}' has no option '{option}'; {known}")
        values[option] = _typed(name, option, value, type(fields[option].default))
    return kind(**values)


def _kind(name: str) -> type[Pass]:
    module, class_name = _PASSES[name]
    return getattr(importlib.import_module(module), class_name)


def _typed(name: str, option: str, text: str, kind: type) -> object:
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError) as error:
        raise PassOptionError(
            f"option '{option}' of pass '{name}' is to be of type {kind.__name__}, not '{text}'"
        ) from error
