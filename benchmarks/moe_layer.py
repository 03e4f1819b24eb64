"""How fast is one MoE layer, forward and backward, against the other MoE layers that run on this machine?

Hidden 512, SwiGLU experts of 2048, 4096 tokens, top-1, bf16 weights and activations. Peers: DeepSpeed's MoE (capacity
factor 1.0: it drops tokens, so it never does more than the ideal work), transformers' Mixtral block with its grouped_mm
experts (dropless, as ours), and a dense SwiGLU MLP of the same active FLOPs as the yardstick. All in one process, in
turn. Run: python benchmarks/moe_layer.py [--experts 8 32 128] [--repeats 9]
"""

import argparse
import logging
import os
import sys

from measure import TUNED_ALLOCATOR, machine, median, paired_ratio, print_table, time_in_turn

HIDDEN, INTERMEDIATE, TOKENS = 512, 2048, 4096


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") is None:  # every contender gets the good allocator
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **TUNED_ALLOCATOR})

    import torch
    import torch.nn.functional as F
    from torch import nn

    from moesaic.config.model import FeedForwardConfig
    from moesaic.kernels.limits import measure_limits
    from moesaic.moe.layer import MoELayer

    torch.manual_seed(0)
    limits = measure_limits(device="cpu")
    print(machine())
    print(f"peak bf16 product {limits.bf16_flops_per_second / 1e12:.2f} TFLOP/s")

    class SwiGlu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
            self.up = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
            self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    def ours(num_experts: int) -> tuple[nn.Module, object]:
        config = FeedForwardConfig(
            intermediate_size=0, num_experts=num_experts, top_k=1, expert_intermediate_size=INTERMEDIATE
        )
        layer = MoELayer(HIDDEN, config, activation="swiglu", has_bias=False)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)
        layer.experts.to(torch.bfloat16)
        return layer, lambda x: layer(x)[0]

    def transformers_block(num_experts: int) -> tuple[nn.Module, object]:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=HIDDEN, intermediate_size=INTERMEDIATE, num_local_experts=num_experts, num_experts_per_tok=1
        )
        config._experts_implementation = "grouped_mm"
        block = MixtralSparseMoeBlock(config)
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.02)
        block.to(torch.bfloat16).train()

        def call(x: torch.Tensor) -> torch.Tensor:
            out = block(x[None])
            return (out[0] if isinstance(out, tuple) else out)[0]

        return block, call

    def deepspeed_layer(num_experts: int) -> tuple[nn.Module, object]:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
            os.environ.setdefault(key, value)
        os.environ.setdefault("MASTER_PORT", "29577")
        import deepspeed
        from deepspeed.moe.layer import MoE

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend="gloo")
        layer = MoE(HIDDEN, SwiGlu(), num_experts=num_experts, ep_size=1, k=1, capacity_factor=1.0)
        layer.set_deepspeed_parallelism()
        layer.to(torch.bfloat16).train()
        return layer, lambda x: layer(x)[0]

    dense = SwiGlu().to(torch.bfloat16)
    flops = 3 * 2 * 3 * HIDDEN * INTERMEDIATE * TOKENS  # forward and twice as much backward
    rows = []
    for num_experts in arguments.experts:
        built = {"moesaic": ours(num_experts), "dense MLP": (dense, dense)}
        for name, build in (("transformers grouped_mm", transformers_block), ("DeepSpeed MoE", deepspeed_layer)):
            try:
                built[name] = build(num_experts)
            except ImportError as error:
                print(f"{name}: not installed ({error}); pip install 'moesaic[benchmarks]'")
        x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        grad = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)

        def step(module: nn.Module, call) -> None:
            module.zero_grad(set_to_none=True)
            x.grad = None  # noqa: B023
            call(x).backward(grad)  # noqa: B023

        candidates = {
            name: (lambda module=module, call=call: step(module, call)) for name, (module, call) in built.items()
        }
        times = time_in_turn(candidates, repeats=arguments.repeats)
        for name in built:
            seconds = median(times[name])
            rows.append(
                {
                    "experts": num_experts,
                    "layer": name,
                    "ms": seconds * 1e3,
                    "x dense": paired_ratio(times, name, "dense MLP"),
                    "x moesaic": paired_ratio(times, name, "moesaic"),
                    "TFLOP/s": flops / seconds / 1e12,
                    "share of GEMM peak": flops / seconds / limits.bf16_flops_per_second,
                    "spread ms": f"{min(times[name]) * 1e3:.0f}-{max(times[name]) * 1e3:.0f}",
                }
            )
        del built
    print_table(rows)


if __name__ == "__main__":
    main()
