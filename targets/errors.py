"""What can go wrong with a target; callers turn these into their own one-line errors."""

from __future__ import annotations


class UnknownTargetError(ValueError):
    """No target, or no GPU architecture, of that name exists, or none fits this machine."""


class ToolchainError(RuntimeError):
    """A tool that building, linking or executing for a target needs is missing or failed; the message names the fix."""
