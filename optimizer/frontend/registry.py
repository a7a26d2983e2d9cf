"""Converters from ONNX operators to Relax, registered by domain, operator name and opset."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, TypeAlias

from optimizer.frontend import converters

if TYPE_CHECKING:
    from optimizer.frontend.node import Node, Result

Converter: TypeAlias = "Callable[[Node], Result]"

MICROSOFT = "com.microsoft"

_CONVERTERS: dict[tuple[str, str], dict[int, Converter]] = {}


def converter(*operators: str, domain: str = "", since: int = 1) -> Callable[[Converter], Converter]:
    """Register a function as the converter of `operators` of `domain`, from opset version `since` on."""

    def register(function: Converter) -> Converter:
        for operator in operators:
            versions = _CONVERTERS.setdefault((domain, operator), {})
            if since in versions:
                raise ValueError(f"two converters for {domain}::{operator} since {since}")
            versions[since] = function
        return function

    return register


def find_converter(domain: str, operator: str, version: int) -> Converter | None:
    """Return the newest converter that is not newer than `version`, or None."""
    load_converters()
    versions = _CONVERTERS.get((domain, operator), {})
    usable = [since for since in versions if since <= version]
    return versions[max(usable)] if usable else None


def registered_operators() -> tuple[tuple[str, str], ...]:
    """Return all (domain, operator) pairs that have a converter, sorted."""
    load_converters()
    return tuple(sorted(_CONVERTERS))


@cache
def load_converters() -> None:
    """Import all modules of converters. A fault in one of them is raised here, not as a blocker of some node."""
    for module in pkgutil.walk_packages(converters.__path__, f"{converters.__name__}."):
        importlib.import_module(module.name)
