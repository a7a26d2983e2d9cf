"""How a freshly built package is run for its certificate: natively, or under the emulator."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.frontend.importer import ImportedModel
from optimizer.frontend.model_file import ModelFile
from optimizer.package.manifest import Certificate

if TYPE_CHECKING:
    from optimizer.compile import CompileOptions


def certifier(
    source: ModelFile, imported: ImportedModel, options: CompileOptions
) -> Callable[[Path], Certificate] | None:
    """Return a function that certifies the package in a folder, or None where this machine cannot execute it."""
    return None
