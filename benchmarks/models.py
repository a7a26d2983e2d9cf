"""Full-size models with random weights for the benchmarks: `python -m benchmarks.models [NAME ...]` makes them.

They are kept outside the repository, in `$OPTIMIZER_CACHE/models` or `~/.cache/optimizer/models`. Making them needs
torch and transformers; finding them with `model_path` does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.architecture import EXPORTERS, Array, Exporter, Variant
from benchmarks.architectures import ARCHITECTURES
from benchmarks.model_cache import cache_folder

FULL_SIZE = {row.full_name: row for row in ARCHITECTURES.values() if row.full is not None}
REQUIREMENTS = "torch==2.13.0 transformers==5.23.0 onnx onnxscript"


@dataclass(frozen=True)
class Sizes:
    """What differs from a full size of the architectures' table.

    The models take `batch` images or texts at once, and with `lengths` texts of any length: those are what they run on.
    With `int8` their weights and the activations that these are multiplied with are quantized to 8 bits.
    """

    batch: int = 1
    lengths: tuple[int, ...] = ()
    int8: bool = False


USUAL = Sizes()
# The length that a model of texts of any length is traced with.
_TRACED = 128


def model_path(name: str, exporter: Exporter = "dynamo", sizes: Sizes = USUAL) -> Path:
    """Return where the full-size model called `name` (a key of `FULL_SIZE`) is kept, whether or not it exists yet."""
    several = f"_batch{sizes.batch}" if sizes.batch > 1 else ""
    any_length = "_any_length" if sizes.lengths else ""
    quantized = "_int8" if sizes.int8 else ""
    return cache_folder() / f"{name}_{exporter}{several}{any_length}{quantized}.onnx"


def cases_of(name: str, sizes: Sizes = USUAL) -> dict[str, dict[str, Array]]:
    """Return the inputs that the full-size model called `name` is run on, by case."""
    full = _variant(name, sizes)
    return {case: full.draw(case) for case in full.cases}


def takes_a_text(name: str) -> bool:
    """Return whether the full-size model called `name` reads one text, which may have any length in `Sizes`."""
    return _variant(name, USUAL).takes_a_text


def _variant(name: str, sizes: Sizes) -> Variant:
    full = FULL_SIZE[name].full
    assert full is not None
    full = full.with_lengths(sizes.lengths) if sizes.lengths else full
    return full if sizes.batch == 1 else full.with_batch(sizes.batch)


def make(name: str, exporter: Exporter, sizes: Sizes = USUAL) -> Path:
    """Export the full-size model called `name` into the cache; the files appear only when complete."""
    path = model_path(name, exporter, sizes)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.stem}.") as folder:
        if sizes.int8:
            _quantize(name, exporter, sizes, Path(folder) / path.name)
        else:
            _export(name, exporter, sizes, Path(folder) / path.name)
        for file in sorted(Path(folder).iterdir(), reverse=True):  # the weights, if apart, before the model
            file.replace(path.with_name(file.name))
    return path


def _export(name: str, exporter: Exporter, sizes: Sizes, path: Path) -> None:
    from benchmarks.export import build, export  # noqa: PLC0415 (needs torch)

    architecture, full = FULL_SIZE[name], _variant(name, sizes)
    export(build(architecture, full), architecture, full, exporter, path)


def _quantize(name: str, exporter: Exporter, sizes: Sizes, path: Path) -> None:
    from benchmarks.quantization import quantize  # noqa: PLC0415 (needs onnxruntime)

    floats = model_path(name, exporter, replace(sizes, int8=False))
    if not floats.exists():
        make(name, exporter, replace(sizes, int8=False))
    quantize(floats, path, cases_of(name, sizes), images=not takes_a_text(name))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make the full-size models that the benchmarks run.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(FULL_SIZE)}")
    parser.add_argument("--exporter", choices=EXPORTERS, default="dynamo")
    parser.add_argument("--batch", type=int, default=1, help="how many images or texts at once; default: 1")
    parser.add_argument("--any-length", action="store_true", help="texts of any length, for the models that take one")
    parser.add_argument("--int8", action="store_true", help="quantized to 8 bits by onnxruntime, in QDQ form")
    parser.add_argument("--force", action="store_true", help="make again what is there already")
    arguments = parser.parse_args()
    names = arguments.names or list(FULL_SIZE)
    if unknown := sorted(set(names) - set(FULL_SIZE)):
        parser.error(f"no model is called {', '.join(unknown)}; there are {', '.join(FULL_SIZE)}")
    exporter = arguments.exporter
    sizes = Sizes(arguments.batch, (_TRACED,) if arguments.any_length else (), arguments.int8)
    missing = [name for name in names if arguments.force or not model_path(name, exporter, sizes).exists()]
    floats = replace(sizes, int8=False)
    exported = [name for name in missing if not (sizes.int8 and model_path(name, exporter, floats).exists())]
    if exported and not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
        sys.exit(f"benchmarks.models: exporting models needs torch and transformers: pip install {REQUIREMENTS}")
    for name in names:
        if sizes.lengths and not takes_a_text(name):
            parser.error(f"{name} takes no text whose length could vary")
        path = make(name, exporter, sizes) if name in missing else model_path(name, exporter, sizes)
        size = sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))
        print(f"{path}: {size / 1e6:.1f} MB", flush=True)


if __name__ == "__main__":
    main()
