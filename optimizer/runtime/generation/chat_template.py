"""The template that makes one text of a conversation, as a model was trained to read it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from optimizer.errors import OptionError, PackageError

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_SETTINGS_FILE = "tokenizer_config.json"
CHAT_FILES = (TEMPLATE_FILE, TOKENIZER_SETTINGS_FILE)
"""Where transformers keeps a template: in a file of its own, or among the tokenizer's settings."""
_RENDERER = Path(__file__).with_name("chat_renderer.py")
_MOST_SECONDS = 30
_MOST_TEMPLATE_BYTES = 1 << 18
_MOST_TEXT = 1 << 20
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

Message = Mapping[str, object]
"""What transformers' templates call one: {"role": "user", "content": "..."}; roles are as the template knows them."""


class ChatTemplate:
    """A template in Jinja, and the tokenizer's special tokens, which it may name.

    Raises OptionError where the library jinja2 is missing, PackageError for a template that is too large.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        if importlib.util.find_spec("jinja2") is None:
            raise OptionError("a chat template needs the library jinja2; run: pip install 'optimizer[generate]'")
        if len(source.encode()) > _MOST_TEMPLATE_BYTES:
            raise PackageError(f"the chat template is larger than {_MOST_TEMPLATE_BYTES >> 10} KiB, which none needs")
        self._source = source
        self._special_tokens = dict(special_tokens or {})

    def render(self, messages: Sequence[Message]) -> str:
        """Return the text of a conversation, to its end what begins the answer.

        The template is run apart from this process, with little time and memory. Raises PackageError where it fails or
        refuses the messages, and where it takes too long or makes too much.
        """
        variables = {"messages": list(messages), "add_generation_prompt": True, "tools": None, "documents": None}
        request = {"template": self._source, "variables": {**self._special_tokens, **variables}}
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        command = [sys.executable, "-P", str(_RENDERER)]
        try:
            finished = subprocess.run(
                command,
                input=json.dumps(request),
                capture_output=True,
                text=True,
                encoding="utf-8",
                env=environment,
                timeout=_MOST_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise PackageError("the chat template does not come to an end; give another one") from error
        if finished.returncode < 0:
            raise PackageError("the chat template does not come to an end, or takes too much memory; give another one")
        return _text(finished.stdout, finished.stderr)


def read_chat_template(files: Mapping[str, bytes]) -> ChatTemplate | None:
    """Return the template that `CHAT_FILES` hold, if any does; raises PackageError for a malformed file."""
    settings = _settings(files)
    if TEMPLATE_FILE in files:
        source: object = files[TEMPLATE_FILE].decode(errors="replace")
    else:
        source = settings.get("chat_template")
    if isinstance(source, list):
        source = _default(source)
    if source is None:
        return None
    if not isinstance(source, str):
        raise PackageError(f"the chat template in {TOKENIZER_SETTINGS_FILE} is no text")
    return ChatTemplate(source, special_tokens(files))


def special_tokens(files: Mapping[str, bytes]) -> dict[str, str]:
    """Return the tokenizer's special tokens by name ("eos_token"), where its settings say; raises PackageError."""
    settings = _settings(files)
    given = {name: _token(settings.get(name)) for name in _SPECIAL}
    return {name: token for name, token in given.items() if token is not None}


def _settings(files: Mapping[str, bytes]) -> Mapping[str, object]:
    try:
        document = json.loads(files.get(TOKENIZER_SETTINGS_FILE, b"{}"))
    except ValueError as error:
        raise PackageError(f"{TOKENIZER_SETTINGS_FILE} is no JSON: {error}") from error
    if not isinstance(document, dict):
        raise PackageError(f"{TOKENIZER_SETTINGS_FILE} holds no settings by name")
    return cast("Mapping[str, object]", document)


def _default(templates: Sequence[object]) -> object:
    """Return the template called "default" of several: others are for tools and retrieval."""
    for each in templates:
        if isinstance(each, dict) and each.get("name") == "default":
            return cast("Mapping[str, object]", each).get("template")
    raise PackageError(f"none of the chat templates in {TOKENIZER_SETTINGS_FILE} is called default")


def _token(value: object) -> str | None:
    content = value.get("content") if isinstance(value, dict) else value
    return content if isinstance(content, str) else None


def _text(answer: str, failure: str) -> str:
    try:
        document = json.loads(answer)
    except ValueError as error:
        lines = failure.strip().splitlines() or ["no answer"]
        raise PackageError(f"the chat template cannot be run: {lines[-1]}") from error
    if "error" in document:
        raise PackageError(f"the chat template fails on this conversation: {document['error']}")
    text: str = document["text"]
    if len(text) > _MOST_TEXT:
        raise PackageError(f"the chat template makes {len(text)} characters of this conversation; give another one")
    return text
