"""Where all threads of a launch wait for each other by spinning: 50 ns on two cores, where TVM's barrier takes 350.

TVM's barrier gives its core away between two looks at the others, a call of the system that takes longer than they do.
Here a thread looks again after a pause, and gives its core away when it has waited for as long as no thread should be
behind: then there are more threads than cores. Threads count themselves at the first meeting, which TVM's barrier ends.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr, Var
from tvm.tirx.stmt import Stmt

from schedules.intrin.llvm_functions import imported
from schedules.loops import index, load, local, store, then_wait
from schedules.stages import sequence
from targets.base import Target

# Looks before a thread gives its core away. A pause of x86 takes some ten nanoseconds: more of them make a token no
# faster (135M, Zen 3: 2.65 ms with 1024 and with 4096, 2.74 with 128), and beside a process that keeps one of two cores
# busy they are waited for in vain (13.3, 23.4 and 7.3 ms). Arm's hint may take no time at all.
SPINS = {"x86_64": 1024, "aarch64": 4096}
# Two counters, each in a line of the cache of its own: threads, and their arrivals at all meetings.
_LINE = 16
_PAUSES = {"x86_64": "call void @llvm.x86.sse2.pause()", "aarch64": "call void @llvm.aarch64.hint(i32 1)"}
_DECLARATIONS = {
    "x86_64": "declare void @llvm.x86.sse2.pause()",
    "aarch64": "declare void @llvm.aarch64.hint(i32)",
}
_COUNT, _MEET = "optimizer_count_thread", "optimizer_meet"
_SOURCE = """
declare i32 @sched_yield()
{declaration}
define weak_odr i32 @{count}(ptr %threads) #0 {{
  %before = atomicrmw add ptr %threads, i32 1 acq_rel
  ret i32 0
}}
define weak_odr i32 @{meet}(ptr %threads, ptr %arrivals, ptr %expected) #0 {{
entry:
  %all = load i32, ptr %threads
  %last = load i32, ptr %expected
  %next = add i32 %last, %all
  store i32 %next, ptr %expected
  %before = atomicrmw add ptr %arrivals, i32 1 acq_rel
  br label %look
look:
  %spins = phi i32 [ 0, %entry ], [ %more, %again ]
  %now = load atomic i32, ptr %arrivals acquire, align 4
  %missing = sub i32 %next, %now
  %waits = icmp sgt i32 %missing, 0
  br i1 %waits, label %wait, label %done
wait:
  %more = add i32 %spins, 1
  %long = icmp ugt i32 %more, {spins}
  br i1 %long, label %give, label %pause
give:
  %ignored = call i32 @sched_yield()
  br label %again
pause:
  {pause}
  br label %again
again:
  br label %look
done:
  ret i32 0
}}
attributes #0 = {{ noinline nounwind }}
"""


class Rendezvous:
    """The meetings of one launch's threads."""

    def __init__(self) -> None:
        self._shared: Var = local([2 * _LINE], "int32", "arrivals")
        self._own: Var = local([1], "int32", "expected")

    def around(self, launch: Stmt, target: Target) -> Stmt:
        """Return a launch with what its meetings need before it."""
        zero = tirx.const(0, "int32")
        counters = [store(self._shared, zero, [index(place)]) for place in (0, _LINE)]
        source = _SOURCE.format(
            declaration=_DECLARATIONS[target.architecture],
            pause=_PAUSES[target.architecture],
            count=_COUNT,
            meet=_MEET,
            spins=SPINS[target.architecture],
        )
        return sequence([tirx.AllocBuffer(self._shared, {}), *counters, imported(launch, source)])

    def begin(self, first: Stmt) -> list[Stmt]:
        """Return what each thread does first, before any meeting: `first`, after which all have been counted."""
        count = tirx.Evaluate(tirx.call_extern("int32", _COUNT, self._address(self._shared, 0)))
        return [
            tirx.AllocBuffer(self._own, {}),
            store(self._own, tirx.const(0, "int32"), [index(0)]),
            then_wait(sequence([count, first])),
        ]

    def meet(self) -> Stmt:
        """Return the statement after which every thread has come as far."""
        addresses = (self._address(self._shared, 0), self._address(self._shared, _LINE), self._address(self._own, 0))
        return tirx.Evaluate(tirx.call_extern("int32", _MEET, *addresses))

    @staticmethod
    def _address(buffer: Var, place: int) -> Expr:
        return tirx.address_of(load(buffer, [index(place)]))
