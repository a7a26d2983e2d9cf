"""How quantized keys and values lie in memory, and what an element of them is.

Tokens are quantized in pages of `PAGE`; at least the `RECENT` newest ones, and those that do not fill a page, are kept
as floats. A code c stands for c * scale + minimum. Keys, whose channels differ in size by far more than their tokens,
have a scale and a minimum for each channel of a page; values have them for each token (Liu et al., KIVI: A Tuning-Free
Asymmetric 2bit Quantization for KV Cache, 2024, section 3). Buffers, for B rows and G heads of D channels:
    codes   uint8 [B, G, tokens, D]; of 4 bits [B, G, tokens / 2, D], the earlier token in the low half
    scales  fp16, scale and minimum: of keys [B, G, pages, 2, D], of values [B, G, tokens, 2]
    recent  float [B, G, room, D]
So a vector of channels of a token is read from consecutive bytes, whatever its width, and no lane changes its place.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import te, tirx
from tvm.ir import Expr

PAGE = 32
RECENT = 32
SCALE_DTYPE = "float16"
LARGEST_SCALE = 65504.0
"""The largest finite fp16 number."""
READS_IN_PLACE = "reads_in_place"
"""The attribute of a function each element of which is read from a cache: attention reads the cache in its place."""


@dataclass(frozen=True)
class CachePages:
    """The layout of a cache: codes of `bits`, with scales `by_channel` of a page (keys) or by token (values)."""

    bits: int
    by_channel: bool

    @property
    def levels(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def tokens_in_byte(self) -> int:
        """How many tokens' codes of one channel share a byte."""
        return 8 // self.bits

    def place_of_scale(self, row: Expr, head: Expr, token: Expr, part: int, channel: Expr) -> list[Expr]:
        """Return where a scale (`part` 0) or a minimum (1) lies."""
        number = tirx.IntImm("int64", part)
        if self.by_channel:
            return [row, head, tirx.floordiv(token, _int64(PAGE)), number, channel]
        return [row, head, token, number]

    def value(self, codes: te.Tensor, scales: te.Tensor, row: Expr, head: Expr, token: Expr, channel: Expr) -> Expr:
        """Return what a code stands for, in fp32."""
        together = _int64(self.tokens_in_byte)
        code = codes(row, head, tirx.floordiv(token, together), channel).astype("int32")
        if self.bits == 4:
            shift = (tirx.floormod(token, together) * 4).astype("int32")
            code = tirx.bitwise_and(tirx.shift_right(code, shift), tirx.const(self.levels, "int32"))
        scale, minimum = (
            scales(*self.place_of_scale(row, head, token, part, channel)).astype("float32") for part in (0, 1)
        )
        return code.astype("float32") * scale + minimum

    def element(
        self,
        buffers: tuple[te.Tensor, te.Tensor, te.Tensor],
        quantized: Expr,
        place: tuple[Expr, Expr, Expr, Expr],
    ) -> Expr:
        """Return the element at `place` (row, head, token, channel): the first `quantized` tokens are codes."""
        codes, scales, recent = buffers
        row, head, token, channel = place
        newest = recent(row, head, token - quantized, channel).astype("float32")
        return tirx.if_then_else(token < quantized, self.value(codes, scales, row, head, token, channel), newest)


def _int64(value: int) -> Expr:
    return tirx.IntImm("int64", value)


__all__ = ["LARGEST_SCALE", "PAGE", "READS_IN_PLACE", "RECENT", "SCALE_DTYPE", "CachePages"]
