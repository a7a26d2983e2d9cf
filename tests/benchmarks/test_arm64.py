"""The parts of the Arm table that need no llvm-mca."""

from __future__ import annotations

from benchmarks.inner_loops import multiplying_loops

ASSEMBLY = """
.LBB0_1:
.Ltmp1:
\tldr\ts3, [x8]
\tldr\tq4, [x9]
\tfmla\tv0.4s, v4.4s, v3.s[0]
\tfmla\tv1.4s, v4.4s, v3.s[1]
\tstr\tq1, [sp, #16]
\tb.ne\t.LBB0_1
.LBB0_2:
\tldr\tq4, [x9]
\tfmla\tv0.4s, v4.4s, v3.s[0]
\tcbnz\tx8, .LBB0_2
.LBB0_3:
\tadd\tx8, x8, #1
\tb.ne\t.LBB0_3
"""


def test_loops_are_found_with_what_does_not_belong_there() -> None:
    first, second = multiplying_loops(ASSEMBLY)
    assert (first.multiply_adds, first.spills, first.scalar_loads, len(first.instructions)) == (2, 1, 1, 6)
    assert (second.multiply_adds, second.spills, second.scalar_loads, len(second.instructions)) == (1, 0, 0, 3)
