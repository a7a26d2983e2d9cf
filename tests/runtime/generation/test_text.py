from __future__ import annotations

import json
from pathlib import Path

import pytest

from optimizer.errors import OptionError, PackageError
from optimizer.runtime.generation import DecoderSession, Sampling, TextGenerator
from optimizer.runtime.generation.settings import Settings, read_settings
from optimizer.runtime.generation.tokenizer import Tokenizer
from optimizer.runtime.model import CompiledModel

_PROMPT = "The king said to his servants"


def test_the_pieces_are_the_text_of_the_tokens(decoder: CompiledModel) -> None:
    generation = TextGenerator(decoder).generate(_PROMPT, max_new_tokens=20)
    pieces = list(generation)
    assert len(generation.tokens) == 20
    assert generation.finished == "length"
    assert "".join(pieces).startswith(', "')


def test_equal_seeds_give_equal_texts(decoder: CompiledModel) -> None:
    generator = TextGenerator(decoder)
    sampling = Sampling(temperature=0.9, top_k=50, seed=3)
    texts = ["".join(generator.generate(_PROMPT, sampling, max_new_tokens=12)) for _ in range(2)]
    assert texts[0] == texts[1]


def test_a_full_context_ends_the_text(decoder: CompiledModel) -> None:
    session = DecoderSession(decoder, capacity=10)
    generation = TextGenerator(decoder).generate(_PROMPT, max_new_tokens=50, session=session)
    list(generation)
    assert generation.finished == "context is full"
    assert len(session.tokens) == 10


def test_a_text_goes_on_where_the_last_answer_ended(decoder: CompiledModel) -> None:
    generator = TextGenerator(decoder)
    whole = generator.generate(_PROMPT, max_new_tokens=9)
    text = "".join(whole)
    session = DecoderSession(decoder)
    first = generator.generate(_PROMPT, max_new_tokens=4, session=session)
    begun = "".join(first)
    assert session.unread == first.tokens[-1:]
    fork = session.fork()
    rest = generator.generate("", max_new_tokens=5, session=session)
    assert begun + "".join(rest) == text
    assert first.tokens + rest.tokens == whole.tokens
    assert fork.unread == first.tokens[-1:]
    fork.reset()
    assert not fork.unread


def test_only_a_text_that_begins_gets_the_token_to_begin_with(decoder: CompiledModel) -> None:
    document = json.loads(decoder.read_file("tokenizer.json") or b"")
    special = {"id": "x", "ids": [7], "tokens": ["x"]}
    single = [{"SpecialToken": {"id": "x", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    processor = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": {"x": special}}
    tokenizer = Tokenizer(json.dumps({**document, "post_processor": processor}).encode())
    assert tokenizer.encode("the king")[0] == 7
    assert tokenizer.encode("the king", begins=False) == tokenizer.encode("the king")[1:]


def test_no_text_goes_beyond_the_positions_that_the_builder_says(decoder: CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(decoder.read_file("tokenizer.json") or b"")
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": {"context_length": 10}}))
    generator = TextGenerator(decoder, tmp_path)
    generation = generator.generate(_PROMPT, max_new_tokens=50, session=DecoderSession(decoder, capacity=40))
    list(generation)
    assert generation.finished == "context is full"
    assert len(generation.prompt_tokens) + len(generation.tokens) == 11
    with pytest.raises(OptionError, match="do not fit a context of 10"):
        list(generator.generate(_PROMPT * 3, session=DecoderSession(decoder)))


def test_an_answer_of_no_tokens_is_refused(decoder: CompiledModel) -> None:
    with pytest.raises(OptionError, match="ask for 1 or more"):
        TextGenerator(decoder).generate(_PROMPT, max_new_tokens=0)


def test_the_token_that_ends_texts_is_a_stop_token_beside_those_that_settings_name(
    decoder: CompiledModel, tmp_path: Path
) -> None:
    content = decoder.read_file("tokenizer.json") or b""
    (tmp_path / "tokenizer.json").write_bytes(content)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "the"}}))
    number = Tokenizer(content).number("the")
    assert number is not None
    assert TextGenerator(decoder, tmp_path).settings.stop == (number,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert TextGenerator(decoder, tmp_path).settings.stop == (5, number)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "no token of the vocabulary"}))
    assert TextGenerator(decoder, tmp_path).settings.stop == ()


def test_a_stop_token_ends_the_text_and_is_not_part_of_it(decoder: CompiledModel, tmp_path: Path) -> None:
    first = TextGenerator(decoder).generate(_PROMPT, max_new_tokens=6)
    list(first)
    (tmp_path / "tokenizer.json").write_bytes(decoder.read_file("tokenizer.json") or b"")
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [first.tokens[4]]}))
    stopped = TextGenerator(decoder, tmp_path).generate(_PROMPT, max_new_tokens=6)
    list(stopped)
    assert stopped.finished == "stop token"
    assert stopped.tokens == first.tokens[: first.tokens.index(first.tokens[4])]


def test_without_a_tokenizer_the_error_says_where_to_put_it(decoder: CompiledModel, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"tokenizer\.json"):
        TextGenerator(decoder, tmp_path)


def test_characters_of_several_tokens_come_whole(decoder: CompiledModel) -> None:
    tokenizer = Tokenizer(decoder.read_file("tokenizer.json") or b"")
    text = "é中 word"
    text_of = tokenizer.stream([])
    pieces = [text_of(token) for token in tokenizer.encode(text)]
    assert None in pieces
    assert "".join(filter(None, pieces)) == text


def test_text_that_is_not_utf_8_is_refused(decoder: CompiledModel) -> None:
    with pytest.raises(OptionError, match="UTF-8"):
        TextGenerator(decoder).generate(b"a \xff".decode(errors="surrogateescape"))


def test_malformed_files_are_package_errors() -> None:
    with pytest.raises(PackageError, match="tokenizer"):
        Tokenizer(b"{}")
    with pytest.raises(PackageError, match="no JSON"):
        read_settings({"generation_config.json": b"{"})
    with pytest.raises(PackageError, match="no settings"):
        read_settings({"genai_config.json": b"[]"})


@pytest.mark.parametrize(
    ("name", "document", "settings"),
    [
        ("generation_config.json", {"eos_token_id": 2, "bos_token_id": 1}, Settings(1, (2,), None)),
        ("generation_config.json", {"eos_token_id": [2, 3], "max_length": 64}, Settings(None, (2, 3), 64)),
        (
            "genai_config.json",
            {"model": {"eos_token_id": 9, "context_length": 128}},
            Settings(None, (9,), 128, limit=128),
        ),
        ("generation_config.json", {"eos_token_id": "x", "max_length": -1}, Settings()),
    ],
)
def test_settings_of_both_kinds_are_read(name: str, document: object, settings: Settings) -> None:
    assert read_settings({name: json.dumps(document).encode()}) == settings


_SAMPLED = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1}


@pytest.mark.parametrize(
    ("name", "document", "sampling"),
    [
        ("genai_config.json", {"model": {}, "search": _SAMPLED}, Sampling(0.6, 20, 0.9, 1.1)),
        ("generation_config.json", _SAMPLED, Sampling(0.6, 20, 0.9, 1.1)),
        ("generation_config.json", {**_SAMPLED, "do_sample": False}, Sampling(repetition_penalty=1.1)),
        ("generation_config.json", {"do_sample": True}, Sampling(1.0)),
        ("generation_config.json", {"temperature": 0.6}, Sampling()),
    ],
)
def test_tokens_are_chosen_as_the_settings_say(name: str, document: object, sampling: Sampling) -> None:
    assert read_settings({name: json.dumps(document).encode()}).sampling == sampling


def test_impossible_sampling_in_a_file_is_a_package_error() -> None:
    with pytest.raises(PackageError, match=r"generation_config\.json: temperature -1"):
        read_settings({"generation_config.json": b'{"do_sample": true, "temperature": -1}'})


def test_each_setting_comes_from_the_first_file_that_has_it_and_the_context_from_the_builders() -> None:
    transformers = {"eos_token_id": [2, 3], "max_length": 20}
    builder = {"model": {"eos_token_id": 9, "bos_token_id": 1, "context_length": 128}, "search": _SAMPLED}
    files = {"generation_config.json": transformers, "genai_config.json": builder}
    settings = read_settings({name: json.dumps(document).encode() for name, document in files.items()})
    assert settings == Settings(1, (2, 3), 128, Sampling(0.6, 20, 0.9, 1.1), limit=128)


def test_a_generator_draws_as_its_settings_say(decoder: CompiledModel, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(decoder.read_file("tokenizer.json") or b"")
    (tmp_path / "generation_config.json").write_text(json.dumps(_SAMPLED))
    default = "".join(TextGenerator(decoder, tmp_path).generate(_PROMPT, max_new_tokens=12))
    asked = TextGenerator(decoder).generate(_PROMPT, Sampling(0.6, 20, 0.9, 1.1), max_new_tokens=12)
    assert default == "".join(asked)


def test_bytes_that_stand_for_a_character_are_shown_once_they_are_complete_or_never_will_be() -> None:
    """As tokenizers made by SentencePiece have it, of Llama 2, Phi-3 and Gemma: a token for each byte."""
    from tokenizers import Tokenizer as Library
    from tokenizers import decoders, models

    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581king", "\u2581said", "s"]
    numbers = {name: number for number, name in enumerate(names)}
    library = Library(models.BPE(vocab=numbers, merges=[], unk_token="<unk>", byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    library.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    king, said, plural = (numbers[name] for name in names[-3:])
    smile = [byte + 1 for byte in "\N{GRINNING FACE}".encode()]
    text_of = Tokenizer(library.to_str().encode()).stream([king])
    tokens = [said, *smile, *smile, plural, smile[0], king]
    pieces = [text_of(token) for token in tokens]
    face = "\N{GRINNING FACE}"
    assert pieces == [
        " said",
        None,
        None,
        None,
        face,
        None,
        None,
        None,
        face,
        "s",
        None,
        "\N{REPLACEMENT CHARACTER} king",
    ]
