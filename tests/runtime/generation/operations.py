"""Everything that can be done to sessions, drawn at random, and what has to hold afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from hypothesis import strategies as st

from optimizer.errors import OptionError
from optimizer.runtime.generation import DecoderSession
from optimizer.runtime.model import CompiledModel

Operation = tuple[Literal["read", "step", "rewind", "fork"], int, int]
"""What is done, how many tokens it is about, and which of the sessions it is done to, counted around."""
_MOST = {"read": 70, "step": 40, "rewind": 60, "fork": 0}
MOST_SESSIONS = 4
LONGEST = 250

OPERATIONS = st.lists(
    st.sampled_from(list(_MOST)).flatmap(
        lambda kind: st.tuples(st.just(kind), st.integers(0, _MOST[kind]), st.integers(0, MOST_SESSIONS - 1))
    ),
    min_size=2,
    max_size=12,
)


def sessions_after(first: DecoderSession, operations: Sequence[Operation], vocabulary: int) -> list[DecoderSession]:
    """Return the sessions that there are after `operations` on the first one and its forks.

    None of them has more than `LONGEST` tokens. A ring that cannot be cut back so far may refuse; the session then is
    what it was.
    """
    rng, sessions = np.random.default_rng(len(operations)), [first]
    for kind, count, place in operations:
        session = sessions[place % len(sessions)]
        before = list(session.tokens)
        tokens = rng.integers(0, vocabulary, min(count, LONGEST - len(before))).tolist()
        if kind == "read" and tokens:
            session.append(tokens)
        elif kind == "step":
            for token in tokens:
                session.append([token])
        elif kind == "rewind":
            try:
                session.rewind(max(0, len(before) - count))
            except OptionError as error:
                if "sliding window has moved on" not in str(error) or session.tokens != before:
                    raise
        elif kind == "fork" and len(sessions) < MOST_SESSIONS:
            sessions.append(session.fork())
    return sessions


def require_logits_of_texts_at_once(sessions: Sequence[DecoderSession], model: CompiledModel, tolerance: float) -> None:
    """Require of each session that it goes on as one of `model` that reads its tokens at once.

    The tolerance is relative to the largest logit.
    """
    for token, session in enumerate(sessions):
        expected = DecoderSession(model).append([*session.tokens, token])
        assert np.isfinite(expected).all()
        np.testing.assert_allclose(
            session.append([token]), expected, rtol=0, atol=tolerance * np.abs(expected).max(), err_msg=str(token)
        )
