"""Questions and answers by turns, as a model's chat template puts them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from optimizer.errors import OptionError
from optimizer.runtime.generation.text import DEFAULT_TOKENS

if TYPE_CHECKING:
    from optimizer.runtime.generation.chat_template import Message
    from optimizer.runtime.generation.sampling import Sampling
    from optimizer.runtime.generation.session import DecoderSession
    from optimizer.runtime.generation.text import Generation, TextGenerator


class Conversation:
    """A conversation with a model that has a chat template, in a session of its own unless one is given.

    `messages` are those so far, each with its role, and may be changed between turns. Of the conversation's text only
    what the session has not read before is read with a turn. Raises OptionError where there is no template.
    """

    def __init__(
        self, generator: TextGenerator, *, system: str | None = None, session: DecoderSession | None = None
    ) -> None:
        if generator.chat_template is None:
            raise OptionError(
                "the model has no chat template, and may not be made to chat; lay its chat_template.jinja or "
                "tokenizer_config.json beside it and compile again, or give their folder (generate's --tokenizer)"
            )
        self._generator = generator
        self._template = generator.chat_template
        self._session = session or generator.new_session()
        self._answer: Generation | None = None
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def ask(
        self,
        text: str,
        sampling: Sampling | None = None,
        *,
        max_new_tokens: int = DEFAULT_TOKENS,
        stop: str | Sequence[str] | None = None,
    ) -> Generation:
        """Return the answer to `text`, which is generated as it is iterated over; `stop` as for `generate`.

        It is a part of the conversation when the next question is asked, as far as it was iterated over. Raises
        PackageError where the template refuses the conversation; the conversation is then as it was.
        """
        if self._answer is not None:
            self.messages.append({"role": "assistant", "content": self._answer.text})
            self._answer = None
        messages = [*self.messages, {"role": "user", "content": text}]
        tokens = self._generator.tokenizer.encode(self._template.render(messages), begins=False)
        self.messages = messages
        self._keep_common(tokens)
        rest = tokens[len(self._session.tokens) :]
        self._answer = self._generator.generate_from(
            rest, sampling, max_new_tokens=max_new_tokens, stop=stop, session=self._session
        )
        return self._answer

    def _keep_common(self, tokens: list[int]) -> None:
        """Cut the session back to the tokens that it shares with the text, of which the last is always read."""
        pairs = zip(self._session.tokens, tokens[:-1], strict=False)
        common = next((place for place, (read, wanted) in enumerate(pairs) if read != wanted), None)
        length = min(len(self._session.tokens), max(0, len(tokens) - 1)) if common is None else common
        try:
            self._session.rewind(length)
        except OptionError:
            # A ring holds no tokens so far back.
            self._session.reset()
