"""Train the bundled decoder and export it to ONNX.

    python examples/train_decoder.py --steps 1500 --work /tmp/decoder

Stopped at any time, the same command resumes from the last checkpoint. With ``--steps`` of the steps already done it
only exports. Needs torch 2.13, tokenizers, onnx, onnxscript and onnxruntime, and on Debian fetches the text itself.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from decoder_export import export_decoder
from decoder_model import Decoder, DecoderConfiguration
from decoder_text import END_OF_TEXT, read_chapters, split_validation, train_tokenizer
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

EXAMPLES = Path(__file__).parent
CHECKPOINT_PERIOD = 100
WARMUP_STEPS = 50
DECAY_PART = 0.4
"""The learning rate stays constant and falls to zero over the last part of the steps."""


@dataclass
class Training:
    """Everything that a checkpoint keeps, and how one step changes it."""

    model: Decoder
    tokens_per_step: int
    learning_rate: float
    seed: int
    step: int = 0
    optimizers: list[torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        # Muon (Jordan et al. 2024) for the matrices inside the layers, Adam for the embedding and the vectors.
        matrices = [parameter for parameter in self.model.layers.parameters() if parameter.ndim == 2]
        vectors = [parameter for parameter in self.model.parameters() if parameter.ndim == 1]
        others = [self.model.embedding.weight, *vectors]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=self.learning_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=self.learning_rate, weight_decay=0.0, betas=(0.9, 0.95)),
        ]

    def run_step(self, tokens: Tensor, steps: int) -> float:
        """One optimizer step; returns the loss.

        The batch depends on seed and step alone, so that a resumed run equals an unbroken one.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        context = self.model.configuration.max_context
        batch_size = self.tokens_per_step // context
        starts = torch.randint(len(tokens) - context, (batch_size, 1), generator=generator)
        batch = tokens[starts + torch.arange(context + 1)]
        rate = self.learning_rate * min(1.0, (self.step + 1) / WARMUP_STEPS, (steps - self.step) / (steps * DECAY_PART))
        loss = batch_loss(self.model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def save(self, path: Path) -> None:
        """Write the checkpoint in one go: an interrupted write leaves the one before."""
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"step": self.step, "model": self.model.state_dict(), "optimizers": optimizers}
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint that :meth:`save` wrote."""
        state = torch.load(path, weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def batch_loss(model: Decoder, batch: Tensor) -> Tensor:
    """Mean cross-entropy in nats of predicting each next token of [batch, length]; matrix products in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        ones = torch.ones_like(batch[:, :-1])
        position_ids = torch.arange(ones.shape[1])[None]
        logits, _ = model(batch[:, :-1], ones, position_ids, [None] * len(model.layers))
    return functional.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def validation_loss(model: Decoder, tokens: Tensor) -> float:
    """Mean cross-entropy in nats per token over consecutive windows of the full context."""
    context = model.configuration.max_context
    windows = tokens.unfold(0, context + 1, context)
    losses = [batch_loss(model, part).item() * len(part) for part in windows.split(8)]
    return sum(losses) / len(windows)


def encode(tokenizer: Tokenizer, chapters: list[str]) -> Tensor:
    """All chapters as one stream of tokens, an end-of-text token after each."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    return torch.tensor([token for encoding in tokenizer.encode_batch(chapters) for token in [*encoding.ids, end]])


def train(training: Training, tokens: Tensor, validation_tokens: Tensor, steps: int, checkpoint: Path) -> None:
    """Train up to ``steps``, with a line of losses and a checkpoint every now and then."""
    began, first, recent = time.monotonic(), training.step, 0.0
    while training.step < steps:
        recent += training.run_step(tokens, steps)
        if training.step % CHECKPOINT_PERIOD == 0 or training.step == steps:
            done = training.step - first
            validation = validation_loss(training.model, validation_tokens)
            seconds = (time.monotonic() - began) / done
            period = (training.step - 1) % CHECKPOINT_PERIOD + 1
            print(
                f"step {training.step}/{steps}  train {recent / min(period, done):.3f}  validation {validation:.3f} "
                f"(perplexity {math.exp(validation):.1f})  {seconds:.2f} s/step",
                flush=True,
            )
            recent = 0.0
            training.save(checkpoint)


def main() -> None:
    """Parse the command line, train, export."""
    parser = argparse.ArgumentParser(description="Train the bundled decoder and export it to ONNX.")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps of the whole run")
    parser.add_argument("--tokens-per-step", type=int, default=2048)
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--no-compile", action="store_true", help="do without torch.compile and a C++ compiler")
    parser.add_argument("--package", type=Path, help="the Debian package with the text, instead of downloading it")
    parser.add_argument("--work", type=Path, default=Path("/tmp/decoder"), help="folder for the checkpoint")
    parser.add_argument("--output", type=Path, default=EXAMPLES / "decoder", help="folder of the exported model")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    configuration = DecoderConfiguration()
    chapters, held_out = split_validation(read_chapters(arguments.package))
    tokenizer = train_tokenizer(chapters, configuration.vocabulary_size)
    tokens, validation_tokens = encode(tokenizer, chapters), encode(tokenizer, held_out)
    model = Decoder(configuration)
    print(
        f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters; "
        f"{len(tokens):,} training and {len(validation_tokens):,} validation tokens",
        flush=True,
    )

    training = Training(model, arguments.tokens_per_step, arguments.learning_rate, arguments.seed)
    if not arguments.no_compile:
        for layer in model.layers:
            layer.compile()
    arguments.work.mkdir(parents=True, exist_ok=True)
    checkpoint = arguments.work / "checkpoint.pt"
    if checkpoint.exists():
        training.load(checkpoint)
    train(training, tokens, validation_tokens, arguments.steps, checkpoint)
    export_decoder(model, tokenizer, arguments.output)
    (EXAMPLES / "held_out.txt").write_text("\n\n".join(held_out) + "\n")


if __name__ == "__main__":
    main()
