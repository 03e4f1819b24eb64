"""How often does somebody else's work on the same core hold tiles, and what do products take then?

Four products of bf16 tiles from the first-level cache, once with seven tiles in use and once with four, every other
millisecond for some seconds on each processor in turn, which is how the kernels find out which of the two to take
(source/tiles.h, TileSharing). Other programs, or other virtual machines, come and go; what they are cannot be seen from
here, only that products take several times as long. Times are in ticks of the processor's clock (lscpu has its rate).
Run: python benchmarks/kernels/tile_neighbours.py
"""

import argparse
import ctypes
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import machine, median, print_table

# Times the fastest: beyond it a neighbour is there.
ALONE, SHARED = 1.25, 1.75


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=10.0, help="on each processor")
    arguments = parser.parse_args()

    from moesaic.kernels import select

    selection = select.cpu_kernels()
    try_both = selection.library.function("moesaic_limit_tile_ways", "pp") if selection.library else None
    seven, few = ctypes.c_double(), ctypes.c_double()
    places = ctypes.addressof(seven), ctypes.addressof(few)
    if try_both is None or not try_both(*places):
        sys.exit(f"this measures products of tiles; the kernels here are {selection.name}")
    print(f"{machine()}, kernels {selection.name}")
    rows: list[dict[str, object]] = []
    allowed = os.sched_getaffinity(0)
    for processor in sorted(allowed):
        os.sched_setaffinity(0, {processor})
        samples: list[tuple[float, float]] = []
        end = time.perf_counter() + arguments.seconds
        while time.perf_counter() < end:
            try_both(*places)
            samples.append((seven.value, few.value))
            time.sleep(0.002)
        fastest = sorted(first for first, _ in samples)[len(samples) // 100]
        kinds = {
            "alone": [pair for pair in samples if pair[0] <= ALONE * fastest],
            "between": [pair for pair in samples if ALONE * fastest < pair[0] <= SHARED * fastest],
            "beside a neighbour's tiles": [pair for pair in samples if pair[0] > SHARED * fastest],
        }
        for name, pairs in kinds.items():
            if pairs:
                both = median([first for first, _ in pairs]), median([second for _, second in pairs])
                rows.append(
                    {
                        "processor": processor,
                        "core": name,
                        "share of time": len(pairs) / len(samples),
                        "seven tiles": both[0],
                        "four tiles": both[1],
                        "seven / four": both[0] / both[1],
                    }
                )
    os.sched_setaffinity(0, allowed)
    print_table(rows)


if __name__ == "__main__":
    main()
