"""`tvm_ffi`, imported without torch.

It imports torch wherever that is installed, before anything else, for conversions that nothing here uses: the first
token of a small decoder then comes after 2.3 s for 0.4, with 190 MB more in memory. Where the program has imported
torch before, `tvm_ffi` still finds it.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class _WithoutTorch(MetaPathFinder):
    """Says to one thread that there is no torch; others may be importing it."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Raise ModuleNotFoundError for torch, and leave all else to the finders that follow."""
        if fullname == "torch" and threading.get_ident() == self.thread:
            raise ModuleNotFoundError("torch is left out", name=fullname)
        return None


@contextmanager
def without_torch() -> Iterator[None]:
    """Let this thread find no torch that has not been imported yet."""
    finder = _WithoutTorch()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


with without_torch():
    import tvm_ffi

__all__ = ["tvm_ffi"]
