"""`optimizer generate`."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from optimizer.runtime.generation import Generation

_DEFAULT = "default: as the settings beside the model say, else"


@click.command(name="generate")
@click.argument("package", type=click.Path(path_type=Path))
@click.option(
    "--prompt",
    "-p",
    "prompts",
    multiple=True,
    help="The text to continue; several, one after the other.",
)
@click.option(
    "--prompt-file",
    "prompt_files",
    type=click.Path(path_type=Path, allow_dash=True),
    multiple=True,
    help="A file with such a text in UTF-8, without the line's end behind it; - is standard input.",
)
@click.option(
    "--chat",
    is_flag=True,
    help="Put prompts into the model's chat template: the turns of one conversation, each with its answer.",
)
@click.option("--system", help="With --chat: what the conversation begins with, before the first prompt.")
@click.option("--max-new-tokens", "-n", type=click.IntRange(1), default=128, show_default=True)
@click.option(
    "--stop",
    "stops",
    multiple=True,
    help="End the text before this string; several: before the first. Default: as the settings beside the model say.",
)
@click.option("--temperature", type=float, help=f"0 takes the likeliest token each time; {_DEFAULT} 0.")
@click.option("--top-k", type=int, help=f"Draw from the k likeliest tokens, 0: from all; {_DEFAULT} 0.")
@click.option("--top-p", type=float, help=f"Draw from the likeliest tokens that together reach p; {_DEFAULT} 1.")
@click.option("--repetition-penalty", type=float, help=f"Above 1 makes repetition less likely; {_DEFAULT} 1.")
@click.option("--seed", default=0, show_default=True, help="Equal seeds give equal texts.")
@click.option("--max-context", type=click.IntRange(1), help="Tokens at most, prompt included; default: the model's.")
@click.option("--chunk", type=click.IntRange(1), help="Tokens of the prompt to read at a time; fewer take less memory.")
@click.option(
    "--tokenizer", type=click.Path(path_type=Path, file_okay=False, exists=True), help="Folder of tokenizer.json."
)
@click.option("--device", help="cpu, cuda or cuda:N; by default what the package was compiled for.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads; by default one per physical core.")
@click.option("--no-mmap", is_flag=True, help="Read the weights into this process's memory, in huge pages.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print text and figures as JSON at the end, a list of several prompts."
)
def command(
    package: Path,
    prompts: tuple[str, ...],
    prompt_files: tuple[Path, ...],
    chat: bool,
    system: str | None,
    max_new_tokens: int,
    stops: tuple[str, ...],
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    repetition_penalty: float | None,
    seed: int,
    max_context: int | None,
    chunk: int | None,
    tokenizer: Path | None,
    device: str | None,
    threads: int | None,
    no_mmap: bool,
    as_json: bool,
) -> None:
    """Continue prompts with PACKAGE, a compiled decoder language model; the text appears as it is made."""
    start = time.perf_counter()
    from optimizer.cli.plain_text import print_json
    from optimizer.errors import OptionError
    from optimizer.runtime import load

    if not prompts and not prompt_files:
        raise click.UsageError("give a text to continue: --prompt or --prompt-file")
    prompts = (*prompts, *map(_text_of, prompt_files))
    if system is not None and not chat:
        raise OptionError("--system begins a conversation; give --chat, too")
    model = load(package, device=device, threads=threads, mapped=not no_mmap)
    # Not before: loading imports NumPy while the weights are digested.
    from optimizer.runtime.generation import Conversation, DecoderSession, TextGenerator
    from optimizer.runtime.generation.session import MOST_AT_ONCE

    generator = TextGenerator(model, tokenizer)
    given = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "repetition_penalty": repetition_penalty}
    chosen = {name: value for name, value in given.items() if value is not None}
    sampling = replace(generator.settings.sampling, seed=seed, **chosen)
    capacity, limit = max_context or generator.settings.capacity, generator.settings.limit
    if limit is not None and max_context is not None and max_context > limit:
        raise OptionError(f"the model has positions for a context of {limit} tokens; give --max-context up to that")
    session = DecoderSession(model, capacity=capacity, most_at_once=chunk or MOST_AT_ONCE)
    conversation = Conversation(generator, system=system, session=session) if chat else None
    loaded = time.perf_counter() - start
    documents: list[dict[str, object]] = []
    stop = stops or None
    for prompt in prompts:
        if conversation is None:
            session.reset()
            generation = generator.generate(prompt, sampling, max_new_tokens=max_new_tokens, stop=stop, session=session)
        else:
            generation = conversation.ask(prompt, sampling, max_new_tokens=max_new_tokens, stop=stop)
        for piece in generation:
            if not as_json:
                click.echo(piece, nl=False)
        if as_json:
            documents.append(_document(prompt, generation, loaded))
        else:
            click.echo()
            _print_figures(generation, loaded)
    if as_json:
        print_json(documents[0] if len(documents) == 1 else documents)


def _text_of(file: Path) -> str:
    """Return the text of a file; raises OptionError where it cannot be read."""
    from optimizer.errors import OptionError

    try:
        content = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        return content.decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise OptionError(f"the prompt in {file} is not UTF-8 (byte {error.start}); convert it") from error
    except OSError as error:
        raise OptionError(f"the prompt in {file} cannot be read: {error.strerror}") from error


def _document(prompt: str, generation: Generation, loaded: float) -> dict[str, object]:
    from optimizer.report.memory import peak_resident_bytes

    return {
        "prompt": prompt,
        "text": generation.text,
        "tokens": generation.tokens,
        "finished": generation.finished,
        "prompt_tokens": len(generation.prompt_tokens),
        "load_seconds": loaded,
        "prefill_seconds": generation.prefill_seconds,
        "decode_seconds": generation.decode_seconds,
        "peak_resident_bytes": peak_resident_bytes(),
    }


def _print_figures(generation: Generation, loaded: float) -> None:
    from optimizer.cli.plain_text import bytes_text, seconds_text
    from optimizer.report.memory import peak_resident_bytes

    prompt, decoded = len(generation.prompt_tokens), len(generation.tokens) - 1
    figures = [
        f"prefill {prompt} tokens, {prompt / generation.prefill_seconds:.1f} tokens/s",
        f"first token after {seconds_text(loaded + generation.prefill_seconds)}",
        f"peak memory {bytes_text(peak_resident_bytes())}",
        f"ended by {generation.finished}",
    ]
    if decoded > 0 and generation.decode_seconds:
        figures.insert(1, f"decode {decoded} tokens, {decoded / generation.decode_seconds:.1f} tokens/s")
    click.echo("; ".join(figures), err=True)
