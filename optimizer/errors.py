"""Every mistake that a user can make, one exception type and one exit code per kind.

Each message is one line that says what is wrong, where, and how to mend it.
"""

from __future__ import annotations

from dataclasses import dataclass


class OptimizerError(Exception):
    """Base of all errors that are reported in one line, without a traceback."""

    exit_code = 1


class ModelFileError(OptimizerError):
    """The model file is missing, is not ONNX, or its external data are corrupt or incomplete."""

    exit_code = 3


class UnsupportedModelError(OptimizerError):
    """The model uses what cannot be imported; `blockers` lists all of it."""

    exit_code = 4

    def __init__(self, message: str, blockers: tuple[Blocker, ...] = ()) -> None:
        super().__init__(message)
        self.blockers = blockers


class InputMismatchError(OptimizerError):
    """An input's name, shape or dtype does not fit the model or the package."""

    exit_code = 5


class TargetError(OptimizerError):
    """The target is unknown, or this machine lacks the tools to build or link for it."""

    exit_code = 6


class PackageError(OptimizerError):
    """The package is missing, malformed, altered, or of another format version."""

    exit_code = 7


class IncompatibleMachineError(OptimizerError):
    """The package needs an architecture, CPU feature, device or library that this machine lacks."""

    exit_code = 8


class CertificateError(OptimizerError):
    """The compiled model's outputs differ from the reference by more than the dtype allows."""

    exit_code = 9


class OptionError(OptimizerError):
    """An option's value, a pass name or a pass option is not valid."""

    exit_code = 10


class TuningError(OptimizerError):
    """Tuning found nothing that runs, or its device does not answer."""

    exit_code = 11


class TuningLogError(OptimizerError):
    """A tuning log is malformed, or cannot be read or written."""

    exit_code = 12


class QualityError(OptimizerError):
    """Quantized weights change the model's outputs by more than was allowed."""

    exit_code = 13


class InsufficientMemoryError(OptimizerError):
    """The machine, or the device, has less memory than a step of the model asks for."""

    exit_code = 14


@dataclass(frozen=True)
class Blocker:
    """One reason why a model cannot be imported, and the node that it stands at."""

    node: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator} at '{self.node}': {self.reason}"
