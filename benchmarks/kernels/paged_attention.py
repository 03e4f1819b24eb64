"""How fast is attention over keys and values in blocks, beside PyTorch's over the same ones in one piece?

bf16 queries, caches of bf16 and int8, grouped heads; 16 layers after one another, so that a decode reads its keys and
values from memory. PyTorch (scaled_dot_product_attention, bf16) gets every sequence's keys and values as one tensor, as
a cache without blocks has them. Share: of the bandwidth for each sequence's keys and values read once, or of the
machine's bf16 peak (4 products for each head, pair of positions and channel) where that takes longer.
Run: python benchmarks/kernels/paged_attention.py
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import bandwidth_probe, machine, median, paired_ratio, print_table, time_in_turn

LAYERS = 16
# Sequences, new tokens of each, positions, heads, KV heads, head_dim.
CASES = (
    (1, 1, 512, 16, 4, 64),
    (8, 1, 512, 16, 4, 64),
    (8, 1, 4096, 16, 4, 64),
    (1, 1, 4096, 32, 8, 128),
    (8, 1, 2048, 32, 8, 128),
    (1, 512, 512, 16, 4, 64),
    (8, 512, 512, 16, 4, 64),
    (1, 512, 2048, 32, 8, 128),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()

    import torch
    import torch.nn.functional as F

    from moesaic.kernels import select
    from moesaic.kernels.allocator import tune_allocator
    from moesaic.kernels.limits import measure_limits
    from moesaic.kernels.paged_attention import PagedBatch, allocate_blocks, paged_attention, write_kv

    tune_allocator()
    peak, bandwidth = measure_limits(device="cpu").bf16_flops_per_second, bandwidth_probe()
    print(f"{machine()}, kernels {select.cpu_kernels().name}, bf16 peak {peak / 1e12:.2f} TFLOP/s")
    rows = []
    for sequences, new, positions, heads, kv_heads, dim in CASES:
        torch.manual_seed(0)
        each = -(-positions // 32)
        lengths = torch.full((sequences,), positions, dtype=torch.int32)
        tables = torch.randperm(sequences * each).int().view(sequences, each)

        def batch_of(count: int, lengths: Any = lengths, tables: Any = tables) -> PagedBatch:
            return PagedBatch(torch.arange(0, len(lengths) * count + 1, count, dtype=torch.int32), lengths, tables)

        query = torch.randn(sequences * new, heads, dim).bfloat16()
        keys, values = torch.randn(2, LAYERS, sequences, positions, kv_heads, dim).bfloat16()
        storages = {}
        for dtype in (torch.bfloat16, torch.int8):
            storages[dtype] = allocate_blocks(
                LAYERS, sequences * each, kv_heads, dim, block_size=32, dtype=dtype, device=torch.device("cpu")
            )
            for key, value, blocks in zip(keys, values, storages[dtype].layers, strict=True):
                write_kv(key.flatten(0, 1), value.flatten(0, 1), blocks, batch_of(positions))
        batch = batch_of(new)
        mask = None
        if 1 < new < positions:
            mask = torch.ones(new, positions, dtype=torch.bool).tril(positions - new)
        pieces = [(key.transpose(1, 2).contiguous(), value.transpose(1, 2).contiguous())
                  for key, value in zip(keys, values, strict=True)]  # fmt: skip
        query_piece = query.view(sequences, new, heads, dim).transpose(1, 2).contiguous()

        def ours(storage: Any, query: Any = query, batch: Any = batch) -> Any:
            return [paged_attention(query, blocks, batch) for blocks in storage.layers]

        is_whole = new == positions

        def theirs(query: Any = query_piece, pieces: Any = pieces, mask: Any = mask, is_causal: Any = is_whole) -> Any:
            return [
                F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=is_causal, enable_gqa=True)
                for key, value in pieces
            ]

        with torch.inference_mode():
            expected = theirs()[0].transpose(1, 2).reshape_as(query)
            torch.testing.assert_close(ours(storages[torch.bfloat16])[0], expected, atol=0.02, rtol=0.02)
            rate = bandwidth()
            times = time_in_turn(
                {
                    "bf16": lambda ours=ours, storage=storages[torch.bfloat16]: ours(storage),
                    "int8": lambda ours=ours, storage=storages[torch.int8]: ours(storage),
                    "PyTorch": theirs,
                },
                repeats=arguments.repeats,
            )
            rate = (rate + bandwidth()) / 2
        flops = 4 * sequences * new * heads * dim * (positions - (new - 1) / 2)
        row: dict[str, Any] = {"sequences": sequences, "new": new, "positions": positions}
        row |= {"heads": f"{heads}/{kv_heads} x {dim}", "read GB/s": rate / 1e9}
        for name, size in (("bf16", 2), ("int8", 1)):
            seconds = median(times[name]) / LAYERS
            read = 2 * sequences * positions * kv_heads * (dim * size + (4 if size == 1 else 0))
            row |= {
                f"{name} us": seconds * 1e6,
                f"{name} share": max(flops / peak, read / rate) / seconds,
                f"PyTorch / {name}": paired_ratio(times, "PyTorch", name),
            }
        rows.append(row)
    print_table(rows)


if __name__ == "__main__":
    main()
