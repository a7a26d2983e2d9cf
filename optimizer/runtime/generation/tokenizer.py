"""Text to tokens and back, by the `tokenizers` library."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Protocol, cast

from optimizer.errors import OptionError, PackageError

TOKENIZER_FILE = "tokenizer.json"
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""What is decoded from the first bytes of a character."""


class _Encoding(Protocol):
    ids: list[int]


class _Library(Protocol):
    """The part of `tokenizers.Tokenizer` that is used here."""

    def encode(self, sequence: str, *, add_special_tokens: bool) -> _Encoding: ...
    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...


class Tokenizer:
    """The tokenizer that the content of a tokenizer.json describes.

    Raises OptionError where the library is missing, PackageError for a malformed file.
    """

    def __init__(self, content: bytes) -> None:
        try:
            self._module = importlib.import_module("tokenizers")
        except ImportError as error:
            raise OptionError("text needs the library tokenizers; run: pip install 'optimizer[generate]'") from error
        try:
            self._tokenizer = cast("_Library", self._module.Tokenizer.from_buffer(content))
        except Exception as error:  # the library raises plain exceptions for malformed files
            raise PackageError(f"{TOKENIZER_FILE} is no tokenizer of the tokenizers library: {error}") from error

    def encode(self, text: str, *, begins: bool = True) -> list[int]:
        """Return the tokens of a text, if it `begins` one with those that the tokenizer puts around it.

        Raises OptionError for surrogates alone, which Python makes of a command line's bytes that are not UTF-8.
        """
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise OptionError("the text is not UTF-8; convert it")
        return list(self._tokenizer.encode(text, add_special_tokens=begins).ids)

    def number(self, token: str) -> int | None:
        """Return the number of a token of the vocabulary, None where there is no such token."""
        return self._tokenizer.token_to_id(token)

    def stream(self, before: Sequence[int]) -> Callable[[int], str | None]:
        """Return a function from the tokens after `before`, one by one, to their text.

        It returns None as long as the bytes of a character are not complete. Special tokens have no text.
        """
        # What was shown last tells whether a token begins with a space; all else before it is decoded only once.
        shown, pending = list(before), list[int]()

        def text_of(token: int) -> str | None:
            pending.append(token)
            known, text = self._decoded(shown), self._decoded([*shown, *pending])
            if text.endswith(_INCOMPLETE):
                return None
            new = text[len(known if text.startswith(known) else known.rstrip(_INCOMPLETE)) :]
            shown[:] = pending if new else [*shown, *pending]
            pending.clear()
            return new or None

        return text_of

    def _decoded(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=True)
