"""The text that each decoder reads, in chunks, and goes on with."""

from __future__ import annotations

# All of it is longer than the windows, and the first chunk is, too.
PROMPT = [17, 93, 5, 64, 64, 3, 120, 41, 77, 12, 9, 101, 33]
CHUNKS = (9, 1, 3)
STEPS = 24
# Random weights say the same few tokens again and again unless that is made hard.
PENALTY = 2.0
ROOM = len(PROMPT) + STEPS
"""What caches hold that have room for all tokens from the start."""
