"""Processes of engines, spoken to in JSON lines."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from typing import IO, Any, cast


class EngineProcess:
    """A process that answers each line of JSON with one; the end of the commands ends it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None) -> None:
        # A pipe that nobody reads would stop a process that says much.
        self._errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 - until the end
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=None if environment is None else dict(environment),
        )
        self._commands = cast("IO[str]", self._process.stdin)
        self._answers = cast("IO[str]", self._process.stdout)

    def answer(self) -> dict[str, Any]:
        """Return the next answer; of a process that ended without one, its last words as an error."""
        line = self._answers.readline()
        if line:
            return json.loads(line)
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        if code < 0 or not lines:
            return {"error": f"exit code {code}" if code >= 0 else f"killed by signal {-code}"}
        return {"error": lines[-1]}

    def ask(self, command: Mapping[str, object]) -> dict[str, Any]:
        """Return the answer to a command; raises RuntimeError where it is an error."""
        self._commands.write(json.dumps(command) + "\n")
        self._commands.flush()
        result = self.answer()
        if "error" in result:
            raise RuntimeError(str(result["error"]))
        return result

    def close(self) -> None:
        """End the process."""
        self._commands.close()
        self._process.wait(timeout=60)
        self._errors.close()
