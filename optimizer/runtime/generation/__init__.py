"""Text from packages of decoder language models: sessions with a cache, sampling, streaming."""

from optimizer.runtime.generation.conversation import Conversation
from optimizer.runtime.generation.sampling import Sampling
from optimizer.runtime.generation.session import DecoderSession
from optimizer.runtime.generation.text import Generation, TextGenerator

__all__ = ["Conversation", "DecoderSession", "Generation", "Sampling", "TextGenerator"]
