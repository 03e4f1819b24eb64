"""How torch's threads wait for one another: spin briefly, then sleep. Imports no torch.

GNU OpenMP's threads spin for milliseconds at every barrier before they sleep. Where two programs share the cores, each
spins while the other one's thread, for which its own waits, cannot run. Measured on two cores with three training
processes at once, seconds a step: 2.1 to 4.5 by default (34 in a worse minute), 1.0 to 1.2 with 1,000 spins, 0.9 to 1.4
with none; alone on the machine the backward pass takes the same time (225 to 230 ms) either way.
"""

import os
import sys

_SPINS = "1000"
_USER_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")


def spin_briefly() -> bool:
    """Set this process's OpenMP to sleep soon; return whether it was done.

    OpenMP reads its settings when torch is loaded, so this comes before; a user's own setting is left alone.
    """
    if "torch" in sys.modules or any(name in os.environ for name in _USER_VARIABLES):
        return False
    os.environ["GOMP_SPINCOUNT"] = _SPINS
    return True
