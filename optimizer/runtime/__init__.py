"""Run packages: the only part of the project that a deployment needs, besides `optimizer.package`."""

from optimizer.runtime.loader import load

__all__ = ["load"]
