"""Table of the network architectures that the tests and the benchmarks export from `transformers`.

Each row gives one architecture in two sizes: `small`, with dynamic dimensions, for the models committed under
`tests/models`, and `full` for the benchmarks: static, but for decoders, which are called with one length after another.
The settings of a full size are what differs from the defaults of the configuration class, which are the published
sizes of most architectures.
"""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.architecture import Architecture
from benchmarks.language import LANGUAGE
from benchmarks.vision import VISION

ARCHITECTURES: Mapping[str, Architecture] = {**VISION, **LANGUAGE}
