"""Memory of this process."""

from __future__ import annotations

import resource


def peak_resident_bytes() -> int:
    """Return the largest resident set that this process has had, in bytes (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
