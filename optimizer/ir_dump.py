"""The module after each step of a compile, written out as text."""

from __future__ import annotations

from pathlib import Path

import tvm

from optimizer.errors import OptionError


class IrDump:
    """Writes modules as numbered TVMScript files into a folder; large constants are named, not spelled out."""

    def __init__(self, folder: Path) -> None:
        if folder.exists() and not folder.is_dir():
            raise OptionError(f"--dump-ir needs a folder, and {folder} is a file; name another")
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._count = 0

    def __call__(self, step: str, module: tvm.IRModule) -> None:
        """Write the module as it is after `step`."""
        path = self._folder / f"{self._count:02d}-{step}.py"
        path.write_text(module.script(show_meta=False, verbose_expr=False), encoding="utf-8")
        self._count += 1


def ignore(step: str, module: tvm.IRModule) -> None:
    """Take the place of a dump that nobody asked for."""
