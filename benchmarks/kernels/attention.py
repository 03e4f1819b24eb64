"""How fast is causal attention in training, forward and backward, beside PyTorch's flash attention?

bf16, batch x heads x positions x head_dim; FLOPs are those of what positions see: of a causal pass half of a full one,
2 B A S^2 D forward and 5 backward, so that work above the diagonal counts as waste. PyTorch takes a window as a mask.
Share: of the machine's bf16 peak.
Run: python benchmarks/kernels/attention.py
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import machine, median, paired_ratio, print_table, time_in_turn

# Batch, heads, KV heads, positions, head_dim, window.
CASES = (
    (16, 8, 8, 512, 64, None),
    (4, 8, 8, 2048, 64, None),
    (1, 16, 16, 2048, 128, None),
    (4, 32, 4, 512, 128, None),
    (4, 8, 8, 2048, 64, 128),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()

    import torch
    import torch.nn.functional as F
    from torch import Tensor

    from moesaic.kernels.allocator import tune_allocator
    from moesaic.kernels.attention import attention_mask, causal_attention
    from moesaic.kernels.limits import measure_limits
    from moesaic.kernels.select import cpu_kernels

    tune_allocator()
    peak = measure_limits(device="cpu").bf16_flops_per_second
    print(f"{machine()}, kernels {cpu_kernels().name}, bf16 peak {peak / 1e12:.2f} TFLOP/s")

    def sdpa(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=query.shape[2] != key.shape[2],
        ).transpose(1, 2)

    rows = []
    for batch, heads, kv_heads, length, dim, window in CASES:
        torch.manual_seed(0)
        mask = None if window is None else attention_mask(length, torch.device("cpu"), window=window)
        leaves = [
            torch.randn(batch, length, count, dim, dtype=torch.bfloat16, requires_grad=True)
            for count in (heads, kv_heads, kv_heads)
        ]
        grad = torch.randn(batch, length, heads, dim, dtype=torch.bfloat16)
        ours = partial(causal_attention, *leaves, window=window)
        theirs = partial(sdpa, *leaves, mask)
        difference = (ours() - theirs()).abs().max().item()
        times = time_in_turn(
            {
                "ours": lambda: torch.autograd.grad(ours(), leaves, grad),  # noqa: B023
                "sdpa": lambda: torch.autograd.grad(theirs(), leaves, grad),  # noqa: B023
                "ours forward": ours,
                "sdpa forward": theirs,
            },
            repeats=arguments.repeats,
        )
        most = window or length
        flops = 7 * batch * heads * most * (2 * length - most) * dim
        seconds = median(times["ours"])
        rows.append(
            {
                "batch": batch,
                "heads": heads,
                "kv heads": kv_heads,
                "positions": length,
                "head_dim": dim,
                "window": window,
                "ours ms": seconds * 1e3,
                "sdpa ms": median(times["sdpa"]) * 1e3,
                "sdpa / ours": paired_ratio(times, "sdpa", "ours"),
                "forward alone": paired_ratio(times, "sdpa forward", "ours forward"),
                "TFLOP/s": flops / seconds / 1e12,
                "share of peak": flops / seconds / peak,
                "max difference": difference,
            }
        )
    print_table(rows)


if __name__ == "__main__":
    main()
