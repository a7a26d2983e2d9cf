"""Ending a text where one of some strings begins, whichever way tokens divide it."""

from __future__ import annotations

from collections.abc import Sequence

from optimizer.errors import OptionError


class StopStrings:
    """Takes a text piece by piece and gives back what stands before the first of `strings`, one or several, in it.

    What may be the beginning of one of them is held back until more is known. `found` says that one was found, after
    which there is no more text. Raises OptionError for an empty string, which every text holds.
    """

    def __init__(self, strings: str | Sequence[str]) -> None:
        strings = (strings,) if isinstance(strings, str) else tuple(strings)
        if "" in strings:
            raise OptionError("an empty stop string would end every text before it begins; leave it out")
        self._strings = strings
        self._held = ""
        self.found: bool = False

    def after(self, piece: str) -> str:
        """Return the text that is certain once `piece` is known; may be empty."""
        text = self._held + piece
        places = [place for string in self._strings if (place := text.find(string)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        certain = len(text) - max((_begun(text, string) for string in self._strings), default=0)
        self._held = text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """Return what was held back, where the text has come to its end."""
        text, self._held = self._held, ""
        return text


def _begun(text: str, string: str) -> int:
    """Return the length of the longest beginning of `string`, short of all of it, that `text` ends with."""
    lengths = range(min(len(text), len(string) - 1), 0, -1)
    return next((length for length in lengths if text.endswith(string[:length])), 0)
