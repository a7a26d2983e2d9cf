"""TVM's thread pool: one per calling thread, sized and placed here instead of by TVM's defaults.

TVM gives each calling thread a pool of its own when that thread first runs a parallel kernel. By default the pool has
half of the hardware threads on x86, whether or not they are hyper-threads, and binds the calling thread to the CPUs of
its workers, which everything started from that thread inherits. The pool can never grow afterwards.
"""

from __future__ import annotations

import os
import threading
import warnings

from optimizer.runtime import machine
from optimizer.runtime.library import runtime_function

_SHARE_ALL_LISTED_CPUS = -3
"""TVM's affinity mode in which every worker may run on every CPU of the list (kSpecifyThreadShareAllCore)."""

_configured = threading.local()


def use_threads(count: int) -> None:
    """Make kernels called from this thread run on `count` threads, one per physical core while there are enough.

    Workers may move between the cores of the list but not onto hyper-thread siblings; the calling thread's own affinity
    is left as it was. Cheap when nothing changes. Warns when this thread's pool already exists with fewer workers.
    """
    if getattr(_configured, "count", None) == count:
        return
    cores = machine.cpus_by_core()
    cpus = [core[0] for core in cores]
    if count > len(cpus):
        cpus += [cpu for core in cores for cpu in core[1:]]
    affinity = os.sched_getaffinity(0)
    try:
        runtime_function("runtime.config_threadpool")(_SHARE_ALL_LISTED_CPUS, count, [str(cpu) for cpu in cpus])
    finally:
        os.sched_setaffinity(0, affinity)
    _configured.count = count
    actual = runtime_function("runtime.NumThreads")()
    if actual != count:
        warnings.warn(
            f"kernels run on {actual} threads, not {count}: TVM ran in this thread before and its pool cannot grow; "
            f"set TVM_NUM_THREADS={count} in the environment, or call from another thread",
            RuntimeWarning,
            stacklevel=2,
        )
