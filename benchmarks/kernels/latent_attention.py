"""How fast is latent attention over its cache, beside the same in PyTorch's operations?

bf16 vectors of 512 + 64 numbers, as DeepSeek-V2, V3 and those like them have; 1,088 products for each head and pair of
positions. Share: of the machine's bf16 peak, or of the bandwidth where that takes longer (each sequence's vectors read
once; in a loop over six layers, whose vectors stay in a cache if they fit there).
Run: python benchmarks/kernels/latent_attention.py
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import machine, median, paired_ratio, print_table, time_in_turn

RANK, KEY_DIM, LAYERS = 512, 64, 6
# Sequences, new tokens of each, positions, heads.
CASES = ((1, 1, 512, 16), (1, 1, 2048, 16), (8, 1, 2048, 16), (1, 1, 2048, 128), (1, 512, 512, 16), (1, 512, 2048, 16))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()

    import torch

    from moesaic.kernels import select
    from moesaic.kernels.allocator import tune_allocator
    from moesaic.kernels.latent_attention import allocate_latent_blocks, latent_attention
    from moesaic.kernels.limits import measure_limits
    from moesaic.kernels.paged_attention import PagedBatch

    tune_allocator()
    limits = measure_limits(device="cpu")
    peak, bandwidth = limits.bf16_flops_per_second, limits.bandwidth_bytes_per_second
    name = select.cpu_kernels().name
    print(f"{machine()}, kernels {name}, bf16 peak {peak / 1e12:.2f} TFLOP/s")
    rows = []
    for sequences, new, positions, heads in CASES:
        torch.manual_seed(0)
        each = -(-positions // 32)
        storage = allocate_latent_blocks(
            LAYERS, sequences * each, RANK, KEY_DIM, block_size=32, dtype=torch.bfloat16, device=torch.device("cpu")
        )
        for blocks in storage.layers:
            blocks.latents.normal_()
        batch = PagedBatch(
            torch.arange(0, sequences * new + 1, new, dtype=torch.int32),
            torch.full((sequences,), positions, dtype=torch.int32),
            torch.arange(sequences * each, dtype=torch.int32).view(sequences, each),
        )
        query = torch.randn(sequences * new, heads, RANK + KEY_DIM).bfloat16()

        def attend(kernels: str, query: Any = query, storage: Any = storage, batch: Any = batch) -> None:
            with select.forced(kernels):
                for blocks in storage.layers:
                    latent_attention(query, blocks, batch, scale=0.05)

        times = time_in_turn(
            {"ours": lambda attend=attend: attend(name), "PyTorch": lambda attend=attend: attend("reference")},
            repeats=arguments.repeats,
        )
        seconds = median(times["ours"]) / LAYERS
        seen = positions - (new - 1) / 2  # of a token, on average
        flops = 2 * sequences * new * heads * seen * (2 * RANK + KEY_DIM)
        floor = max(flops / peak, sequences * positions * (RANK + KEY_DIM) * 2 / bandwidth)
        rows.append(
            {
                "sequences": sequences,
                "new": new,
                "positions": positions,
                "heads": heads,
                "ours us": seconds * 1e6,
                "PyTorch us": median(times["PyTorch"]) / LAYERS * 1e6,
                "PyTorch / ours": paired_ratio(times, "PyTorch", "ours"),
                "GFLOP/s": flops / seconds / 1e9,
                "share": floor / seconds,
            }
        )
    print_table(rows)


if __name__ == "__main__":
    main()
