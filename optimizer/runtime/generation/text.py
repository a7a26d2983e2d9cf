"""From a prompt to text: tokenizer, decoder and sampler together, one piece of text at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from optimizer.errors import OptionError
from optimizer.runtime.generation.chat_template import CHAT_FILES, ChatTemplate, read_chat_template, special_tokens
from optimizer.runtime.generation.sampling import Sampler, Sampling
from optimizer.runtime.generation.session import DecoderSession
from optimizer.runtime.generation.settings import SETTINGS_FILES, Settings, read_settings
from optimizer.runtime.generation.stop_strings import StopStrings
from optimizer.runtime.generation.tokenizer import TOKENIZER_FILE, Tokenizer
from optimizer.runtime.kv_cache import require_room

if TYPE_CHECKING:
    from optimizer.runtime.model import CompiledModel

COMPANION_FILES = (TOKENIZER_FILE, *SETTINGS_FILES, *CHAT_FILES)
DEFAULT_TOKENS = 128
_TOKENS_OF_A_CHARACTER = 4
"""At most: one for each byte of its UTF-8."""


class Generation:
    """One answer in the making: iterate over it for the pieces of text, then read what it took.

    `text` is what was yielded so far. `finished` says why it ended: "stop token", "stop string" (neither is part of the
    text, but `tokens` and the session hold those of the string), "length" (as many tokens as were asked for) or
    "context is full". Times are in seconds: `prefill_seconds` reads the prompt, which gives the first token;
    `decode_seconds` is for the tokens after it.
    """

    def __init__(
        self,
        generator: TextGenerator,
        session: DecoderSession,
        prompt: list[int],
        sampler: Sampler,
        limit: int,
        stop: str | Sequence[str],
    ) -> None:
        self.prompt_tokens: list[int] = prompt
        self.tokens: list[int] = []
        self.text: str = ""
        self.finished: str = ""
        self.prefill_seconds: float = 0.0
        self.decode_seconds: float = 0.0
        self._generator = generator
        self._session = session
        self._sampler = sampler
        self._limit = limit
        self._stop = StopStrings(stop)

    def __iter__(self) -> Iterator[str]:
        """Generate, and yield text whenever whole characters of it are known."""
        for text in self._pieces():
            self.text += text
            yield text

    def _pieces(self) -> Iterator[str]:
        """Yield text before the first stop string, none of it empty."""
        # An answer that was cut at its length may have ended within a character.
        before = (self._session.tokens + self._session.unread)[-_TOKENS_OF_A_CHARACTER:]
        text_of = self._generator.tokenizer.stream([*before, *self.prompt_tokens])
        for token in self._generate():
            text = self._stop.after(text_of(token) or "")
            if text:
                yield text
            if self._stop.found:
                self._session.unread = [token]
                self.finished = "stop string"
                return
        rest = self._stop.rest()
        if rest:
            yield rest

    def _generate(self) -> Iterator[int]:
        limit = self._generator.settings.limit
        require_room(limit, len(self._session.tokens), len(self._session.unread) + len(self.prompt_tokens))
        start = time.perf_counter()
        logits = self._session.append(self.prompt_tokens)
        self.prefill_seconds = time.perf_counter() - start
        while True:
            token = self._sampler.choose(logits, self._session.tokens)
            if token in self._generator.settings.stop:
                self.finished = "stop token"
                return
            self.tokens.append(token)
            yield token
            if len(self.tokens) == self._limit:
                self._session.unread = [token]
                self.finished = "length"
                return
            if len(self._session.tokens) in (self._session.capacity, limit):
                self.finished = "context is full"
                return
            start = time.perf_counter()
            logits = self._session.append([token])
            self.decode_seconds += time.perf_counter() - start


class TextGenerator:
    """A decoder with its tokenizer.

    The tokenizer (tokenizer.json) and the settings (generation_config.json or genai_config.json: stop tokens, length of
    the context, sampling; tokenizer_config.json: a stop token more, which ends texts) are those in the package, which
    the compiler takes from beside the model, or those in `folder`.
    Raises OptionError where there is no tokenizer or the `tokenizers` library is missing.
    """

    def __init__(self, model: CompiledModel, folder: Path | None = None) -> None:
        files = _files(model, folder)
        if TOKENIZER_FILE not in files:
            where = "the package" if folder is None else folder
            raise OptionError(
                f"{where} has no {TOKENIZER_FILE}; lay it beside the model and compile again, "
                "or give its folder (generate's --tokenizer)"
            )
        self._model = model
        self.tokenizer = Tokenizer(files[TOKENIZER_FILE])
        self.settings = self._settings(files)
        self._files = files

    def _settings(self, files: Mapping[str, bytes]) -> Settings:
        """Return the settings, whose stop tokens the tokenizer's token for the end of a text is one of.

        Of models that chat it may be the end of a turn, which their other settings do not always name.
        """
        settings = read_settings(files)
        end = special_tokens(files).get("eos_token")
        number = None if end is None else self.tokenizer.number(end)
        return settings if number in (None, *settings.stop) else replace(settings, stop=(*settings.stop, number))

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """Return the model's chat template, if it has one; raises as `read_chat_template` and `ChatTemplate` do."""
        return read_chat_template(self._files)

    def new_session(self) -> DecoderSession:
        """Return an empty session with the context that the settings say."""
        return DecoderSession(self._model, capacity=self.settings.capacity)

    def generate(
        self,
        prompt: str,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = DEFAULT_TOKENS,
        stop: str | Sequence[str] | None = None,
        session: DecoderSession | None = None,
    ) -> Generation:
        """Return the continuation of `prompt`, which is generated as it is iterated over.

        Tokens are chosen as `sampling` says, and the text ends where `stop`, one string or several, would begin; by
        default both are as the model's settings say. `session` continues a text that was begun before, to whose middle
        no token belongs that begins a text. Raises OptionError for less than one new token and for an empty stop
        string; iterating does so for an empty prompt of a model that has no token to begin with, and for a prompt that
        is longer than the context.
        """
        session = session or self.new_session()
        tokens = self.tokenizer.encode(prompt, begins=not session.tokens)
        if not tokens and not session.tokens and self.settings.begin is not None:
            tokens = [self.settings.begin]
        return self.generate_from(tokens, sampling, max_new_tokens=max_new_tokens, stop=stop, session=session)

    def generate_from(
        self,
        tokens: list[int],
        sampling: Sampling | None,
        *,
        max_new_tokens: int,
        session: DecoderSession,
        stop: str | Sequence[str] | None = None,
    ) -> Generation:
        """Return the continuation of what `session` has read and `tokens` after it, as `generate` does of a text."""
        if max_new_tokens < 1:
            raise OptionError(f"{max_new_tokens} new tokens are no text; ask for 1 or more")
        sampler = Sampler(sampling or self.settings.sampling)
        strings = self.settings.stop_strings if stop is None else stop
        return Generation(self, session, tokens, sampler, max_new_tokens, strings)


def _files(model: CompiledModel, folder: Path | None) -> dict[str, bytes]:
    if folder is not None:
        return {name: (folder / name).read_bytes() for name in COMPANION_FILES if (folder / name).is_file()}
    packed = {name: model.read_file(name) for name in COMPANION_FILES}
    return {name: content for name, content in packed.items() if content is not None}
