"""Renders a chat template in a process of its own: JSON on standard input, JSON on standard output.

A template comes with the model, from whoever made that. Jinja's sandbox keeps it from Python's objects, but not from
taking all time and memory: this process may have little of both, opens no file for writing, and ends with its answer.
"""

# jinja2 is installed only where text is generated.
# pyright: reportMissingImports=false

from __future__ import annotations

import datetime
import json
import resource
import sys
import time
from collections.abc import Callable

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

_MOST_SECONDS = 2
_MOST_BYTES = 1 << 30


class _Generation(Extension):
    """The tag that marks what the assistant says, which trainers need to know and nobody else."""

    tags = {"generation"}  # noqa: RUF012 - as the library declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise(message: object) -> None:
    raise TemplateError(str(message))


def _as_json(value: object, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Return a value as JSON, without the escapes for HTML that Jinja's own filter adds."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _limit() -> None:
    limits = {
        resource.RLIMIT_CPU: int(time.process_time()) + _MOST_SECONDS,
        resource.RLIMIT_AS: _MOST_BYTES,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_CORE: 0,
    }
    for kind, most in limits.items():
        resource.setrlimit(kind, (most, most))


def main() -> None:
    """Render {"template": ..., "variables": ...} to {"text": ...}, or {"error": ...}."""
    request = json.load(sys.stdin)
    # The globals and settings that transformers gives a template.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    functions: dict[str, Callable[..., object]] = {"raise_exception": _raise, "strftime_now": _now}
    environment.globals.update(functions)
    _limit()
    try:
        answer = {"text": environment.from_string(request["template"]).render(request["variables"])}
    except MemoryError:
        answer = {"error": f"it takes more than {_MOST_BYTES >> 20} MiB of memory"}
    except Exception as error:  # whatever an expression of the template raises is its mistake
        answer = {"error": f"{type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
