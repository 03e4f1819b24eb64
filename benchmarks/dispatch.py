"""What do index tables gain over the one-hot einsum of the usual MoE layer, for dispatch and combine?

Forward and backward of dispatch + combine, top-1, hidden 512, capacity factor 1.0, bf16; times include building the
tables or masks from expert_ids. DeepSpeed-MoE's section 5.4 states more than 6x for its kernels.
Run: python benchmarks/dispatch.py
"""

import argparse
import math

from measure import machine, median, paired_ratio, print_table, time_in_turn

HIDDEN = 512


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    arguments = parser.parse_args()

    import torch

    from moesaic.kernels.allocator import tune_allocator
    from moesaic.kernels.limits import measure_limits
    from moesaic.kernels.reference.moe import one_hot_combine, one_hot_dispatch, one_hot_masks
    from moesaic.moe.dispatch import LocalDispatcher, plan_dispatch

    tune_allocator()
    bandwidth = measure_limits(device="cpu").bandwidth_bytes_per_second
    print(f"{machine()}, read bandwidth {bandwidth / 1e9:.0f} GB/s")
    dispatcher = LocalDispatcher()
    rows = []
    for num_tokens in arguments.tokens:
        for num_experts in arguments.experts:
            torch.manual_seed(0)
            capacity = math.ceil(num_tokens / num_experts)
            x = torch.randn(num_tokens, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
            weights = torch.rand(num_tokens, 1, requires_grad=True)
            expert_ids = torch.randint(0, num_experts, (num_tokens, 1))
            grad = torch.randn(num_tokens, HIDDEN, dtype=torch.bfloat16)

            def tables() -> torch.Tensor:
                plan = plan_dispatch(expert_ids, num_experts, capacity=capacity)  # noqa: B023
                there = dispatcher.dispatch(x, plan)  # noqa: B023
                out = dispatcher.combine(there.tokens, weights, there.receipt)  # noqa: B023
                out.backward(grad)  # noqa: B023
                return out

            def einsum() -> torch.Tensor:
                mask, combine = one_hot_masks(expert_ids, weights, num_experts, capacity)  # noqa: B023
                out = one_hot_combine(one_hot_dispatch(x, mask), combine)  # noqa: B023
                out.backward(grad)  # noqa: B023
                return out

            difference = (tables() - einsum()).abs().max().item()
            # Calls of less than a millisecond are timed ten at a time.
            calls = 10 if num_tokens <= 1024 else 1

            def several(call, calls=calls):
                return lambda: [call() for _ in range(calls)]

            times = time_in_turn(
                {"tables": several(tables), "einsum": several(einsum)}, repeats=arguments.repeats, warmup=1
            )
            times = {name: [seconds / calls for seconds in values] for name, values in times.items()}
            # x, rows, output and their three gradients, each read or written at least once on either side of a move
            floor = 8 * num_tokens * HIDDEN * 2 / bandwidth
            rows.append(
                {
                    "tokens": num_tokens,
                    "experts": num_experts,
                    "tables ms": median(times["tables"]) * 1e3,
                    "einsum ms": median(times["einsum"]) * 1e3,
                    "einsum / tables": paired_ratio(times, "einsum", "tables"),
                    "tables, share of bandwidth": floor / median(times["tables"]),
                    "max difference": difference,
                }
            )
    print_table(rows)


if __name__ == "__main__":
    main()
