"""How fast are weights rounded to 8 and 4 bits, rotated back, and packed, before a model can serve?

A layer of 16 experts (up 1,536 x 2,048 gated, down 2,048 x 768), 75 M numbers, each way against PyTorch's operations
(MOESAIC_KERNELS=reference), which are the definition, in the same process in turn. The share of bandwidth counts what
must be read and written once; the rate of reading memory is measured beside it.
Run: python benchmarks/kernels/packing.py [--repeats 5]
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import bandwidth_probe, machine, median, paired_ratio, print_table, time_in_turn

EXPERTS, UP, DOWN = 16, (1536, 2048), (2048, 768)
FORMATS = {"int8": (8, None), "int4 by 64": (4, 64)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()

    import torch

    from moesaic.kernels import select
    from moesaic.kernels.allocator import tune_allocator
    from moesaic.kernels.packed import pack_mlp
    from moesaic.kernels.quantized import dequantize, quantize_weight
    from moesaic.kernels.threads import spin_briefly

    spin_briefly()
    tune_allocator()
    ours = os.environ.get(select.VARIABLE, "auto")
    with select.forced(ours) as selection:
        print(f"{machine()}, kernels {selection.name}")
        bandwidth = bandwidth_probe()
    generator = torch.Generator().manual_seed(0)
    up, down = (torch.randn(EXPERTS, *shape, generator=generator).bfloat16() for shape in (UP, DOWN))
    stored = {"bf16": (up, down)}
    cases: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, (bits, group_size) in FORMATS.items():
        one, other = (quantize_weight(each, bits=bits, group_size=group_size) for each in (up, down))
        stored[name] = one, other
        held, numbers = one.num_bytes + other.num_bytes, up.nbytes + down.nbytes
        cases[f"round to {name}"] = (
            lambda bits=bits, size=group_size: [
                quantize_weight(each, bits=bits, group_size=size) for each in (up, down)
            ],
            numbers + held,
        )
        cases[f"{name} back to fp32"] = (
            lambda pair=(one, other): [dequantize(each) for each in pair],
            2 * numbers + held,
        )
    for name, pair in stored.items():
        packed = pack_mlp(*pair, activation="swiglu")
        cases[f"pack {name}"] = lambda pair=pair: pack_mlp(*pair, activation="swiglu"), 2 * packed.num_bytes
    rows = []
    for name, (call, moved) in cases.items():

        def run(kernels: str, call: Callable[[], Any] = call) -> Callable[[], Any]:
            def once() -> None:
                with select.forced(kernels):
                    call()

            return once

        times = time_in_turn({"torch": run("reference"), "ours": run(ours)}, repeats=arguments.repeats, warmup=1)
        with select.forced(ours):
            rate = bandwidth()
        seconds = median(times["ours"])
        rows.append(
            {
                "operation": name,
                "torch ms": median(times["torch"]) * 1e3,
                "ours ms": seconds * 1e3,
                "torch / ours": paired_ratio(times, "torch", "ours"),
                "share of bandwidth": moved / seconds / rate,
            }
        )
    print_table(rows)


if __name__ == "__main__":
    main()
