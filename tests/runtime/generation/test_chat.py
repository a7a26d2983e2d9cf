"""Chat templates: what transformers' functions and settings make of them, and what hostile ones may not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from optimizer.cli.generate import command
from optimizer.errors import OptionError, PackageError
from optimizer.runtime.generation import Conversation, TextGenerator
from optimizer.runtime.generation.chat_template import ChatTemplate, read_chat_template
from optimizer.runtime.model import CompiledModel

pytest.importorskip("jinja2", reason="jinja2, which renders chat templates, is not installed")

_CHAT = """{{ bos_token }}
{% for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}
        {{- raise_exception('no role ' + message.role) }}
    {%- endif %}
    {{- '<' + message.role + '> ' + message.content + '\\n' }}
{%- endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""
_MESSAGES = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "<hello>"}]


def test_a_template_has_messages_special_tokens_and_the_beginning_of_an_answer() -> None:
    text = ChatTemplate(_CHAT, {"bos_token": "<s>"}).render(_MESSAGES)
    assert text == "<s>\n<system> be kind\n<user> <hello>\n<assistant>"


def test_templates_have_the_functions_that_transformers_gives_them() -> None:
    source = """{% for m in messages %}{% if loop.index0 == 1 %}{% break %}{% endif %}{{ m|tojson }}{% endfor %}
{% generation %}{{ strftime_now('%Y')|int > 2000 }}{% endgeneration %}{{ tools is none }}"""
    assert ChatTemplate(source).render([{"role": "ü<"}, {}]) == '{"role": "ü<"}TrueTrue'


def test_what_a_template_refuses_is_an_error_that_says_why() -> None:
    with pytest.raises(PackageError, match="no role judge"):
        ChatTemplate(_CHAT).render([{"role": "judge", "content": ""}])


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ raise_exception.__globals__.sys }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "come to an end"),
        ("{{ 'a' * 9000000000 }}", "memory"),
        ("{{ 'a' * 2000000 }}", "2000000 characters"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{% include '/etc/passwd' %}", "TypeError"),
        ("#" * (1 << 19), "larger than 256 KiB"),
    ],
)
def test_hostile_and_wrong_templates_are_errors(source: str, message: str) -> None:
    with pytest.raises(PackageError, match=message):
        ChatTemplate(source).render(_MESSAGES)


@pytest.mark.parametrize(
    ("files", "text"),
    [
        ({"chat_template.jinja": "A", "tokenizer_config.json": {"chat_template": "B"}}, "A"),
        ({"tokenizer_config.json": {"chat_template": "B{{ eos_token }}", "eos_token": {"content": "</s>"}}}, "B</s>"),
        ({"tokenizer_config.json": {"chat_template": [{"name": "default", "template": "C"}]}}, "C"),
    ],
)
def test_a_template_is_found_where_transformers_keeps_it(files: dict[str, object], text: str) -> None:
    content = {name: each if isinstance(each, str) else json.dumps(each) for name, each in files.items()}
    template = read_chat_template({name: each.encode() for name, each in content.items()})
    assert template is not None
    assert template.render([]) == text


def test_malformed_settings_of_a_tokenizer_are_errors() -> None:
    assert read_chat_template({"tokenizer_config.json": b"{}"}) is None
    for content, message in ((b"{", "no JSON"), (b"[]", "no settings"), (b'{"chat_template": 1}', "no text")):
        with pytest.raises(PackageError, match=message):
            read_chat_template({"tokenizer_config.json": content})
    with pytest.raises(PackageError, match="called default"):
        read_chat_template({"tokenizer_config.json": b'{"chat_template": [{"name": "tools", "template": "x"}]}'})


@pytest.fixture
def folder(decoder: CompiledModel, tmp_path: Path) -> Path:
    """The bundled decoder's tokenizer with a chat template."""
    (tmp_path / "tokenizer.json").write_bytes(decoder.read_file("tokenizer.json") or b"")
    (tmp_path / "chat_template.jinja").write_text(_CHAT)
    return tmp_path


@pytest.fixture
def chatting(decoder: CompiledModel, folder: Path) -> TextGenerator:
    return TextGenerator(decoder, folder)


def test_a_conversation_is_what_the_template_makes_of_its_turns(chatting: TextGenerator) -> None:
    session = chatting.new_session()
    conversation = Conversation(chatting, system="Speak.", session=session)
    first = "".join(conversation.ask("The king said", max_new_tokens=6))
    answer = conversation.ask("And the queen", max_new_tokens=6)
    second = "".join(answer)
    turns = [("system", "Speak."), ("user", "The king said"), ("assistant", first), ("user", "And the queen")]
    messages = [{"role": role, "content": content} for role, content in turns]
    assert conversation.messages == messages
    whole = chatting.tokenizer.encode(ChatTemplate(_CHAT).render(messages), begins=False)
    assert session.tokens[: len(whole)] == whole
    assert len(answer.prompt_tokens) < len(whole)
    fresh = chatting.generate_from(whole, None, max_new_tokens=6, session=chatting.new_session())
    assert "".join(fresh) == second


def test_generate_takes_prompts_as_the_turns_of_a_conversation(
    chatting: TextGenerator, decoder_package: Path, folder: Path
) -> None:
    arguments = ["-p", "The king", "-p", "And then?", "-n", "5", "--system", "Speak."]
    finished = CliRunner().invoke(command, [str(decoder_package), "--chat", "--tokenizer", str(folder), *arguments])
    conversation = Conversation(chatting, system="Speak.")
    answers = ["".join(conversation.ask(text, max_new_tokens=5)) for text in ("The king", "And then?")]
    assert finished.stdout == "".join(answer + "\n" for answer in answers)


def test_a_turn_that_the_template_refuses_leaves_the_conversation_as_it_was(chatting: TextGenerator) -> None:
    conversation = Conversation(chatting)
    conversation.messages.append({"role": "judge", "content": ""})
    with pytest.raises(PackageError, match="no role judge"):
        conversation.ask("Well?")
    assert len(conversation.messages) == 1


def test_without_a_template_the_error_says_where_to_put_it(decoder: CompiledModel) -> None:
    with pytest.raises(OptionError, match=r"chat_template\.jinja"):
        Conversation(TextGenerator(decoder))
