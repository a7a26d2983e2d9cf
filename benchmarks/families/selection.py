"""Which decoders a command of this folder is for: families and forms, all unless some are named."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from benchmarks.families.checkpoints import FAMILIES
from benchmarks.families.forms import BUILT, EXPORTED


@dataclass(frozen=True)
class Selection:
    """The folder of the decoders, and the families and forms that were asked for."""

    folder: Path
    families: tuple[str, ...]
    forms: tuple[str, ...]
    keeps: bool = False
    """Whether what was found before stands."""


def parsed(description: str) -> Selection:
    """Return what the command line asks for; ends the process where it is wrong."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", action="append", choices=FAMILIES)
    parser.add_argument("--form", action="append", choices=[*EXPORTED, *BUILT])
    parser.add_argument("--keep", action="store_true", help="Leave what was compared before as it was found.")
    arguments = parser.parse_args()
    forms = arguments.form or [*BUILT, *EXPORTED]
    return Selection(arguments.folder, tuple(arguments.family or FAMILIES), tuple(forms), arguments.keep)
