"""Where the models of the benchmarks are kept, for processes that need no more of them."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder that full-size models are kept in."""
    cache = os.environ.get("OPTIMIZER_CACHE")
    root = Path(cache) if cache else Path.home() / ".cache" / "optimizer"
    return root / "models"
