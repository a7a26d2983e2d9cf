"""Texts end before the first stop string, whichever way they come in pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimizer.errors import OptionError
from optimizer.runtime.generation import DecoderSession, TextGenerator
from optimizer.runtime.generation.sampling import Sampler
from optimizer.runtime.generation.settings import read_settings
from optimizer.runtime.generation.stop_strings import StopStrings
from optimizer.runtime.model import CompiledModel

_PROMPT = "The king said to his servants"
_LETTERS = st.text("ab", max_size=4)


@given(pieces=st.lists(_LETTERS, max_size=8), strings=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_what_is_shown_is_the_text_before_the_first_stop_string(pieces: list[str], strings: list[str]) -> None:
    stop, shown = StopStrings(strings), ""
    for piece in pieces:
        shown += stop.after(piece)
        if stop.found:
            break
    shown += stop.rest()
    text = "".join(pieces)
    places = [text.find(string) for string in strings if string in text]
    assert stop.found == bool(places)
    # The first that is complete ends the text; a longer one may begin before it and never be seen whole.
    assert text.startswith(shown)
    assert not any(string in shown for string in strings)
    if stop.found:
        assert any(text.startswith(string, len(shown)) for string in strings)
    else:
        assert shown == text


def test_no_text_waits_that_begins_no_stop_string() -> None:
    stop = StopStrings("\n\nQ:")
    assert stop.after("an answer") == "an answer"
    assert stop.after("\n") == ""
    assert stop.after("more\n\n") == "\nmore"
    assert stop.after("A:") == "\n\nA:"


def test_a_text_ends_before_a_stop_string_that_spans_tokens(decoder: CompiledModel) -> None:
    generator = TextGenerator(decoder)
    whole = "".join(generator.generate(_PROMPT, max_new_tokens=20))
    string = whole[9:14]
    assert whole.index(string) == 9
    generation = generator.generate(_PROMPT, max_new_tokens=20, stop=["never", string])
    assert "".join(generation) == generation.text == whole[:9]
    assert generation.finished == "stop string"


def test_a_text_that_ends_within_the_beginning_of_a_stop_string_is_whole(decoder: CompiledModel) -> None:
    generator = TextGenerator(decoder)
    whole = "".join(generator.generate(_PROMPT, max_new_tokens=6))
    generation = generator.generate(_PROMPT, max_new_tokens=6, stop=[whole[-3:] + "never"])
    assert "".join(generation) == whole
    assert generation.finished == "length"


def test_an_empty_stop_string_is_refused(decoder: CompiledModel) -> None:
    with pytest.raises(OptionError, match="empty stop string"):
        TextGenerator(decoder).generate(_PROMPT, stop=[""])


def test_stop_strings_of_the_settings_hold_unless_others_are_given(decoder: CompiledModel, tmp_path: Path) -> None:
    whole = "".join(TextGenerator(decoder).generate(_PROMPT, max_new_tokens=12))
    (tmp_path / "tokenizer.json").write_bytes(decoder.read_file("tokenizer.json") or b"")
    (tmp_path / "generation_config.json").write_text(json.dumps({"stop_strings": whole[5:8]}))
    generator = TextGenerator(decoder, tmp_path)
    assert "".join(generator.generate(_PROMPT, max_new_tokens=12)) == whole[: whole.index(whole[5:8])]
    assert "".join(generator.generate(_PROMPT, max_new_tokens=12, stop=[])) == whole
    assert read_settings({"generation_config.json": b'{"stop_strings": ["a", "", 3]}'}).stop_strings == ("a",)


def test_a_character_that_was_cut_at_the_length_is_shown_when_the_text_goes_on(
    decoder: CompiledModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, session = TextGenerator(decoder), DecoderSession(decoder)
    tokens = generator.tokenizer.encode("中", begins=False)
    assert len(tokens) > 1
    coming = iter(tokens)
    monkeypatch.setattr(Sampler, "choose", lambda *_: next(coming))
    first = generator.generate(_PROMPT, max_new_tokens=len(tokens) - 1, session=session)
    assert "".join(first) == ""
    assert "".join(generator.generate("", max_new_tokens=1, session=session)) == "中"
