"""What the kernels' tests run on: this machine's instruction sets, and emulated tiles where they say something.

Tiles exist beside AVX-512 only, so they are emulated beside a real one. With AVX2 alone they would be a machine that
nobody has; `make emulate` tests them beside AVX-512 that is emulated too, and `make sanitize` asks for them.
"""

import os

from moesaic.kernels import select
from moesaic.kernels.cpu.build import EMULATED, EMULATED_TILES

SUPPORTED = select.supported_instruction_sets()
_WITH_TILES = "MOESAIC_TEST_TILES" in os.environ or ("avx512" in SUPPORTED and not EMULATED.keys() & set(SUPPORTED))
COMPILED = [*SUPPORTED, *([EMULATED_TILES] if SUPPORTED and _WITH_TILES else [])]
ALL = [*COMPILED, select.REFERENCE]


def has_tiles(choice: str) -> bool:
    """Whether it multiplies by AMX's tiles, or emulated ones."""
    return choice.startswith("amx")
