"""The process of one engine: `python -m benchmarks.llm.worker ENGINE DECODER THREADS CONTEXT`.

It reads a short prompt first and says so: from the start of the process until then is the time to the first token.
Then commands as JSON lines, each answered by one: {"prompt": P, "steps": N} reads a prompt of P tokens and makes N
more.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from pathlib import Path

from benchmarks.llm.engines import ENGINES
from benchmarks.llm.models import DECODERS

_SHORT_PROMPT = 8


def main() -> None:
    """Load the decoder and serve commands until told to stop."""
    name, decoder_name, threads, context = sys.argv[1:5]
    # What libraries print must not mix with the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    decoder = DECODERS[decoder_name]
    try:
        engine = ENGINES[name](decoder, int(threads), int(context))
        engine.start(prompt_of(_SHORT_PROMPT, decoder.vocabulary))
        version = engine.version()
    except Exception as error:  # whatever an engine fails with is a row of the table
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:200]}), file=answers)
        return
    print(json.dumps({"version": version}), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        prompt = prompt_of(command["prompt"], decoder.vocabulary)
        start = time.perf_counter()
        engine.start(prompt)
        middle = time.perf_counter()
        for _ in range(command["steps"]):
            engine.step()
        end = time.perf_counter()
        answer = {"prefill": middle - start, "decode": end - middle, "resident_bytes": _resident_bytes()}
        print(json.dumps(answer), file=answers)


def prompt_of(length: int, vocabulary: int) -> list[int]:
    """Return tokens from all over the vocabulary, the same ones at every call."""
    return [3 + (7919 * number) % (vocabulary - 3) for number in range(length)]


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


if __name__ == "__main__":
    main()
