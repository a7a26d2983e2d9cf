"""Where tools that targets need are kept between runs."""

from __future__ import annotations

import os
from pathlib import Path

from targets.errors import ToolchainError


def cache_directory(subject: str) -> Path:
    """Return (and make) the folder for one subject under $OPTIMIZER_CACHE, by default ~/.cache/optimizer.

    Raises ToolchainError when it cannot be written.
    """
    root = os.environ.get("OPTIMIZER_CACHE")
    folder = (Path(root) if root else Path.home() / ".cache" / "optimizer") / subject
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ToolchainError(
            f"cannot write the tool cache {folder} ({error.strerror}); set OPTIMIZER_CACHE to a writable folder"
        ) from error
    return folder
