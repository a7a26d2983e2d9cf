"""Make the decoders in this folder by onnxruntime-genai's builder: `python -m tests.models.builder.make_models`.

Each is a family of `benchmarks.families`, small and with random weights, in one of its forms. Beside each lie the
builder's settings, with the tokens that onnxruntime-genai generates. Needs torch, transformers and onnxruntime-genai.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from benchmarks.families.forms import BUILT
from benchmarks.families.make import build, read_old_rope_of_gemma3

FOLDER = Path(__file__).parent
FORMS = {
    "smollm2": "int4",
    "llama3": "int4-rtn-asymmetric",
    "qwen2": "int4-asymmetric",
    "qwen3": "int8",
    "mistral": "int4-block16",
    "phi3": "int4-block128",
    "gemma2": "int4-whole-windows",
    "gemma3": "int4-whole-windows",
}


def make(family: str) -> None:
    """Write a family's model, with its weights inside, and the builder's settings beside it."""
    with tempfile.TemporaryDirectory() as folder:
        build(family, BUILT[FORMS[family]], Path(folder))
        shutil.copy(Path(folder) / "model.onnx", FOLDER / f"{family}.onnx")
        settings = json.loads((Path(folder) / "genai_config.json").read_text(encoding="utf-8"))
        settings["tokens"] = json.loads((Path(folder) / "tokens.json").read_text(encoding="utf-8"))
        (FOLDER / f"{family}.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make the small decoders of onnxruntime-genai's builder.")
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"default: all of {', '.join(FORMS)}")
    read_old_rope_of_gemma3()
    for family in parser.parse_args().families or FORMS:
        make(family)


if __name__ == "__main__":
    main()
