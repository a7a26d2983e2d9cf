"""Make each family in each form: `python -m benchmarks.families.make FOLDER [--family NAME] [--form NAME]`.

Writes FOLDER/FAMILY/FORM/model.onnx. Beside what onnxruntime-genai's builder made lie, in `tokens.json`, those that
onnxruntime-genai itself generates, or why it does not. What cannot be made is said in `failed.txt`. Needs torch,
transformers and onnxruntime-genai.
"""

# torch, transformers and onnxruntime-genai are installed only where models are made.
# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import transformers
from onnxruntime_genai.models import builder

from benchmarks.families.exporting import export_plain
from benchmarks.families.forms import BUILT, EXPORTED, Built
from benchmarks.families.networks import network
from benchmarks.families.selection import parsed
from benchmarks.families.texts import PENALTY, PROMPT, STEPS

_TOKENIZER = Path(__file__).resolve().parents[2] / "examples" / "decoder" / "tokenizer.json"


def read_old_rope_of_gemma3() -> None:
    """Have the builder take Gemma 3's configuration, of which it knows what transformers 4 wrote alone."""
    given = builder.Gemma3Model.__init__

    def init(self: object, config: transformers.PretrainedConfig, *arguments: object) -> None:
        kinds = config.rope_parameters
        if isinstance(kinds, dict) and "full_attention" in kinds:
            config.rope_parameters = kinds["full_attention"]
            config.rope_local_base_freq = kinds["sliding_attention"]["rope_theta"]
        given(self, config, *arguments)

    builder.Gemma3Model.__init__ = init


def build(family: str, form: Built, folder: Path) -> None:
    """Have the builder make a form of a family."""
    source = folder / "checkpoint"
    network(family, form.settings).save_pretrained(source)
    transformers.PreTrainedTokenizerFast(tokenizer_file=str(_TOKENIZER)).save_pretrained(source)
    arguments = (None, str(source), str(folder), form.precision, form.provider, str(folder / "cache"))
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        options = builder.parse_extra_options(*arguments, list(form.options))
        builder.create_model(*arguments, **options)
    for left in (source, folder / "cache"):
        shutil.rmtree(left, ignore_errors=True)
    onnx.save(onnx.load(folder / "model.onnx"), folder / "model.onnx")
    (folder / "model.onnx.data").unlink(missing_ok=True)
    _without_windows_of_no_layers(folder / "genai_config.json")
    (folder / "tokens.json").write_text(json.dumps(generated(folder)) + "\n", encoding="utf-8")


def _without_windows_of_no_layers(path: Path) -> None:
    """Take the ring from settings that name no layers for it.

    Of Mistral and Phi-3 the builder knows no layers with a window and gives them whole caches, for which
    onnxruntime-genai then makes buffers that are too small.
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    decoder = settings["model"]["decoder"]
    if decoder.get("sliding_window", {}).get("layers") == []:
        del decoder["sliding_window"]
        path.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def generated(folder: Path) -> list[int] | str:
    """Return the tokens that onnxruntime-genai generates on the CPU, the likeliest ones, or why it does not."""
    import onnxruntime_genai  # noqa: PLC0415 - loads a library

    length = len(PROMPT) + STEPS
    try:
        config = onnxruntime_genai.Config(str(folder))
        config.clear_providers()
        model = onnxruntime_genai.Model(config)
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=length, min_length=length, do_sample=False, repetition_penalty=PENALTY)
        generator = onnxruntime_genai.Generator(model, parameters)
        generator.append_tokens(PROMPT)
        for _ in range(STEPS):
            generator.generate_next_token()
        return [int(token) for token in generator.get_sequence(0)[len(PROMPT) :]]
    except Exception as error:  # whatever it fails with is said in the table
        return f"{type(error).__name__}: {error}"[:300]


def make(folder: Path, work: Callable[[Path], None]) -> str:
    """Make one form in `folder`, unless it is there, and return what came of it in a word."""
    if (folder / "model.onnx").exists() or (folder / "failed.txt").exists():
        return "there"
    made = folder.with_name(f".{folder.name}")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    try:
        work(made)
    except Exception as error:  # whatever the makers fail with is said in the table
        (made / "failed.txt").write_text(f"{type(error).__name__}: {error}"[:500], encoding="utf-8")
        (made / "model.onnx").unlink(missing_ok=True)
    made.rename(folder)
    return "failed" if (folder / "failed.txt").exists() else "made"


def main() -> None:
    """Run the command line."""
    selection = parsed("Make decoders of each family in each form.")
    read_old_rope_of_gemma3()
    for family in selection.families:
        for name in selection.forms:
            folder = selection.folder / family / name
            if name in EXPORTED:
                print(family, name, make(folder, partial(export_plain, family, EXPORTED[name])), flush=True)
            elif family != "gpt2":
                print(family, name, make(folder, partial(build, family, BUILT[name])), flush=True)


if __name__ == "__main__":
    main()
