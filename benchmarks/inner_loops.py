"""The innermost loops of compiled code that multiply and add, as its assembly has them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import onnx

from optimizer.compile import CompileOptions, plan_model
from optimizer.lowering import build
from targets.base import Target

MULTIPLY_ADD = re.compile(
    r"\s(vfn?m(add|sub)\d+ps|fml[as]|bfdot|bfmmla|[us]+dot|[us]+mmla|[us]m(ul|la)l2?|vpdpbusd|vpmaddwd|vpmaddubsw)\s"
)
_SCALAR_MULTIPLY_ADD = re.compile(r"\s(vfn?m(add|sub)\d+ss|fn?m(add|sub))\s")
# A vector register stored to the stack or loaded from it.
_SPILL = re.compile(r"mm\d+.*\(%rsp|\(%rsp.*mm\d|\bq\d+\b.*\[sp")
# Of Arm's loads into one element of a register; those of whole vectors name a q register.
_SCALAR_LOAD = re.compile(r"\s(ldu?r[bh]?\s+[bhsw]\d|ldp\s+[sw]\d)")


@dataclass(frozen=True)
class InnerLoop:
    """The lines from a label to the jump back to it, with no other label between."""

    lines: tuple[str, ...]

    @cached_property
    def instructions(self) -> list[str]:
        """The lines that are instructions."""
        return [line for line in self.lines if re.match(r"\s+[a-z]", line)]

    def count(self, pattern: re.Pattern[str]) -> int:
        """Return how many instructions match."""
        return sum(bool(pattern.search(line)) for line in self.instructions)

    @property
    def multiply_adds(self) -> int:
        """The vector instructions that multiply and add."""
        return self.count(MULTIPLY_ADD)

    @property
    def scalar_multiply_adds(self) -> int:
        """The instructions that multiply and add one element."""
        return self.count(_SCALAR_MULTIPLY_ADD)

    @property
    def spills(self) -> int:
        """The moves of vector registers to the stack and back."""
        return self.count(_SPILL)

    @property
    def scalar_loads(self) -> int:
        """The loads of one element (on Arm)."""
        return self.count(_SCALAR_LOAD)


def assembly_of(model: Path, target: Target) -> str:
    """Return the assembly of a model compiled for a target with default schedules."""
    _, plan = plan_model(model, CompileOptions(target=target))
    module = build(plan.lifted.module, target).mod
    return "".join(each.inspect_source("asm") for each in module.imports if each.kind == "llvm")


def save_and_compile(model: onnx.ModelProto, target: Target, folder: Path) -> str:
    """Return the assembly of a model in memory, which is written to `folder` on the way."""
    path = folder / "model.onnx"
    onnx.save(model, path)
    return assembly_of(path, target)


def multiplying_loops(assembly: str) -> list[InnerLoop]:
    """Return the innermost loops that multiply and add, the one with the most such instructions first."""
    loops = [loop for loop in map(InnerLoop, _innermost(assembly)) if loop.multiply_adds]
    return sorted(loops, key=lambda loop: loop.multiply_adds, reverse=True)


def _innermost(assembly: str) -> Iterator[tuple[str, ...]]:
    label, lines = "", list[str]()
    for line in assembly.splitlines():
        if match := re.match(r"(\.L\w+):", line):
            if not match[1].startswith(".Ltmp"):  # positions for debuggers, which nothing jumps to
                label, lines = match[1], []
            continue
        lines.append(line)
        if label and re.search(rf"\s(j\w+|b\S*|cbn?z|tbn?z)\s.*{re.escape(label)}$", line):
            yield tuple(lines)
