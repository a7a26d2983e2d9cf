"""One line of a tuning log: what was measured, on what, under which decisions."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from importlib import metadata
from typing import Literal

from optimizer.json_records import RecordError, decode, encode, parse
from schedules.family import Parameters
from targets.base import Target

MAX_LINE_BYTES = 64 << 10

Kind = Literal["trial", "decision", "confirmation"]
# A workload, its family, and the version of its schedule.
WorkloadKey = tuple[str, str, int]
# Parameters in a form that can be looked up.
Choice = tuple[tuple[str, int], ...]

_WORKLOAD = re.compile(r"[0-9a-f]{16}")
# Families and targets name files and folders.
_NAME = re.compile(r"[a-z][a-z0-9-]{0,63}")


@dataclass(frozen=True)
class Origin:
    """Where figures were measured: target and a digest of all it declares, CPU model, threads, and versions."""

    target: str
    target_digest: str
    cpu: str
    threads: int
    tvm: str
    optimizer: str


@dataclass(frozen=True)
class Record:
    """A measurement of a workload under `parameters`, the decision that its measurements led to, or a confirmation.

    A confirmation compares a decision with the default in a whole step of a model, among its other kernels.
    `seconds` is the median of one call, `spread` the width of the central 80 % relative to it, `ratio` the median of
    `seconds` over the default schedule's in the same rounds: it outlives the machine's changes of speed. All three are
    0 where `failure` says why there is no measurement. `features` describe the workload to the cost model.
    """

    kind: Kind
    workload: str
    family: str
    version: int
    description: str
    parameters: dict[str, int]
    seconds: float
    spread: float
    ratio: float
    failure: str
    origin: Origin
    features: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _WORKLOAD.fullmatch(self.workload):
            raise RecordError(f"workload {self.workload!r:.80} is not 16 hexadecimal digits")
        for name in (self.family, self.origin.target):
            if not _NAME.fullmatch(name):
                raise RecordError(f"{name!r:.80} is not a name of lower-case letters, digits and '-'")
        for text in (self.description, self.failure, self.origin.cpu):
            if not text.isprintable():
                raise RecordError(f"{text!r:.80} holds what cannot be printed")
        if not self.failure and not (self.seconds > 0 and self.ratio > 0):
            raise RecordError("a measurement without a time")

    @property
    def key(self) -> WorkloadKey:
        """Return what a decision is looked up by, beside the target: workload, family and the schedule's version."""
        return self.workload, self.family, self.version

    @property
    def choice(self) -> Choice:
        """Return the parameters in a form that can be looked up."""
        return choice_of(self.parameters)

    def to_line(self) -> bytes:
        """Return the record as one line of JSON, without the line's end."""
        return json.dumps(encode(self), separators=(",", ":"), allow_nan=False).encode("ascii")

    @staticmethod
    def from_line(line: bytes) -> Record:
        """Return the record in `line`; raises RecordError for anything that to_line would not write."""
        if len(line) > MAX_LINE_BYTES:
            raise RecordError(f"the line has {len(line)} bytes, over the limit of {MAX_LINE_BYTES}")
        return decode(Record, parse(line, "the line"), "record")


def choice_of(parameters: Parameters) -> Choice:
    """Return parameters in a form that can be looked up."""
    return tuple(sorted(parameters.items()))


def origin_of(target: Target, cpu: str, threads: int) -> Origin:
    """Return what figures that are measured now on a CPU of that model are to carry."""
    return Origin(
        target.name,
        target_digest(target),
        cpu,
        threads,
        metadata.version("apache-tvm"),
        metadata.version("optimizer"),
    )


def target_digest(target: Target) -> str:
    """Return 12 hexadecimal digits over all that `target` declares and that its code depends on."""
    declared = (
        target.architecture,
        target.features,
        target.llvm_triple,
        target.llvm_cpu,
        target.llvm_attributes,
        target.vector_bits,
        str(target.caches),
        str(target.layouts),
        target.cores,
        target.gpu_architectures,
    )
    return hashlib.sha256(repr(declared).encode()).hexdigest()[:12]
