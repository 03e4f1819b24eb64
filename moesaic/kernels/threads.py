"""How many threads torch has, and how these wait for one another: spin briefly, then sleep. Imports no torch.

GNU OpenMP's threads spin for milliseconds at every barrier before they sleep. Where two programs share the cores, each
spins while the other one's thread, for which its own waits, cannot run. Measured on two cores with three training
processes at once, seconds a step: 2.1 to 4.5 by default (34 in a worse minute), 1.0 to 1.2 with 1,000 spins, 0.9 to 1.4
with none; alone on the machine the backward pass takes the same time (225 to 230 ms) either way.

torch starts a thread for every core of the machine though a container may have a share of their time only: what two
threads use up in 50 ms they wait for in the next 50. On one processor's time two took 5.6 and 5.8 ms a token in the
mean and 53 and 54 for the slowest of a hundred; one took 5.3 and 5.8, 7.5 and 7.8 (benchmarks/container_share.py).
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from moesaic.control_groups import allowed_processors, read_text, usable_processors

_SPINS = "1000"
_USER_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")
_USER_NUM_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
_is_resting = False


def limit_threads() -> bool:
    """Have torch start as many threads as a container's share of the processors keeps busy; return whether it was set.

    Where torchrun has started several processes on this machine each gets its part of the cores, instead of the one
    thread that torchrun gives it.

    It is said in the environment, which torch reads when it is loaded: this comes before. A user's own setting is left
    alone, and so is everything where one process may use all processors.
    """
    num_processes = _processes_of_torchrun()
    names = _USER_NUM_THREADS if num_processes == 1 else ("MKL_NUM_THREADS",)
    if "torch" in sys.modules or any(name in os.environ for name in names):
        return False
    usable = usable_processors()
    if usable >= allowed_processors() and num_processes == 1:
        return False
    from moesaic.kernels.limits import physical_cores

    cores = min(usable, physical_cores(read_text(Path("/proc/cpuinfo"))) or usable)
    os.environ["OMP_NUM_THREADS"] = str(max(1, cores // num_processes))
    return True


def _processes_of_torchrun() -> int:
    """Return how many processes torchrun has started on this machine without a number of threads from its user.

    torchrun then sets OMP_NUM_THREADS to 1, which cannot be told from a user's 1.
    """
    count = os.environ.get("LOCAL_WORLD_SIZE", "")
    is_default = "TORCHELASTIC_RUN_ID" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    return int(count) if is_default and count.isdecimal() and int(count) > 1 else 1


def spin_briefly() -> bool:
    """Set this process's OpenMP to sleep soon; return whether it was done.

    OpenMP reads its settings when torch is loaded, so this comes before; a user's own setting is left alone.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _USER_VARIABLES):
        return False
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    return True


def rest_soon(start_thread: Callable[[], int], *, num_threads: int) -> bool:
    """Have OpenMP's threads sleep soon in a process whose torch was loaded without this; return whether it was done.

    GNU OpenMP spins only 1,000 times, too, where it has started more threads than there are processors. Where torch
    uses all of these, one more thread, of which nothing is ever asked, has that effect. A user's own setting is left
    alone. The kernels ask for it when they are loaded.

    start_thread: has OpenMP start that thread; returns 0 where it did. num_threads: torch's.
    """
    global _is_resting
    has_setting = any(name in os.environ for name in _USER_VARIABLES)
    if _is_resting or has_setting or num_threads < allowed_processors():
        return False
    _is_resting = start_thread() == 0
    return _is_resting
