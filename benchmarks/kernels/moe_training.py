"""How fast does one MoE layer train, and what does it keep, against the other MoE layers that run on this machine?

Forward and backward, hidden 512, SwiGLU experts of 2048, bf16 weights and activations. Peers: DeepSpeed's MoE (capacity
factor 1.0: it drops tokens, so it never does more than the ideal work), transformers' Mixtral block with its grouped_mm
experts (dropless, as ours), Tutel's layer with its SwiGLU experts (capacity factor 1.0, as DeepSpeed; not on PyPI: in a
clone of microsoft/tutel, NO_CUDA=1 pip install --no-build-isolation --no-deps .), and a dense SwiGLU MLP of the same
active FLOPs as the yardstick: 2048 wide per expert of a token, and per residual MLP. All in one process, in turn.
Where torch has no bf16 products worth the name (no bf16 instructions) the others' weights and activations are fp32,
which is faster there.
"kept MB": what autograd holds between forward and backward, weights left out. The limit is max(FLOPs / peak, bytes of
weights read twice and of their gradients / bandwidth).
Run: python benchmarks/kernels/moe_training.py [--cases 4096,8,1 4096,32,1,residual] [--repeats 9]
"""

import argparse
import logging
import os
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import machine, median, paired_ratio, print_table, restart_with_tuned_allocator, time_in_turn

HIDDEN, INTERMEDIATE = 512, 2048
CASES = ("4096,8,1", "4096,32,1", "4096,128,1", "16384,128,2", "4096,32,1,residual")


@dataclass(frozen=True)
class Case:
    tokens: int
    experts: int
    top_k: int
    is_residual: bool

    @staticmethod
    def parse(text: str) -> "Case":
        tokens, experts, top_k, *rest = text.split(",")
        return Case(int(tokens), int(experts), int(top_k), rest == ["residual"])

    @property
    def active(self) -> int:
        """MLPs of 2048 that a token goes through."""
        return self.top_k + self.is_residual


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="tokens,experts,top_k[,residual]")
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    restart_with_tuned_allocator()
    from moesaic.kernels.threads import spin_briefly

    spin_briefly()
    import torch
    import torch.nn.functional as F
    from torch import nn

    from moesaic.config.model import ModelConfig, MoEConfig
    from moesaic.kernels import products
    from moesaic.kernels.limits import measure_limits
    from moesaic.kernels.select import cpu_kernels
    from moesaic.model.feed_forward import FeedForward

    torch.manual_seed(0)
    limits = measure_limits(device="cpu")
    is_widened = products.is_widened(torch.device("cpu"), torch.bfloat16)
    peers_dtype = torch.float32 if is_widened else torch.bfloat16
    print(f"{machine()}; the others in {peers_dtype}")
    peak, bandwidth = limits.bf16_flops_per_second / 1e12, limits.bandwidth_bytes_per_second / 1e9
    print(f"kernels: {cpu_kernels().name}; peak bf16 product {peak:.2f} TFLOP/s, reading {bandwidth:.0f} GB/s")

    class SwiGlu(nn.Module):
        def __init__(self, intermediate: int = INTERMEDIATE) -> None:
            super().__init__()
            self.gate = nn.Linear(HIDDEN, intermediate, bias=False)
            self.up = nn.Linear(HIDDEN, intermediate, bias=False)
            self.down = nn.Linear(intermediate, HIDDEN, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    def ours(case: Case) -> tuple[nn.Module, object]:
        config = ModelConfig(
            vocab_size=1,
            hidden_size=HIDDEN,
            num_layers=1,
            num_heads=1,
            intermediate_size=INTERMEDIATE,
            moe=MoEConfig(num_experts=case.experts, top_k=case.top_k, residual="sum" if case.is_residual else None),
        )
        layer = FeedForward(config, config.layers[0])
        for parameter in layer.parameters():
            nn.init.normal_(parameter, std=0.02)
        layer.moe.experts.to(torch.bfloat16)
        if layer.mlp is not None:
            layer.mlp.to(torch.bfloat16)
        return layer, lambda x: layer(x)[0]

    def transformers_block(case: Case) -> tuple[nn.Module, object]:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        config = MixtralConfig(
            hidden_size=HIDDEN,
            intermediate_size=INTERMEDIATE,
            num_local_experts=case.experts,
            num_experts_per_tok=case.top_k,
        )
        config._experts_implementation = "grouped_mm"
        block = MixtralSparseMoeBlock(config)
        module = nn.ModuleList([block, *([SwiGlu()] if case.is_residual else [])])
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.02)
        module.to(peers_dtype).train()

        def call(x: torch.Tensor) -> torch.Tensor:
            out = block(x[None])
            routed = (out[0] if isinstance(out, tuple) else out)[0]
            return routed + module[1](x) if case.is_residual else routed

        return module, call

    def deepspeed_layer(case: Case) -> tuple[nn.Module, object]:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
            os.environ.setdefault(key, value)
        os.environ.setdefault("MASTER_PORT", "29577")
        import deepspeed
        from deepspeed.moe.layer import MoE

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist_backend="gloo")
        layer = MoE(
            HIDDEN,
            SwiGlu(),
            num_experts=case.experts,
            ep_size=1,
            k=case.top_k,
            capacity_factor=1.0,
            use_residual=case.is_residual,
        )
        layer.set_deepspeed_parallelism()
        layer.to(peers_dtype).train()
        return layer, lambda x: layer(x)[0]

    def tutel_layer(case: Case) -> tuple[nn.Module, object]:
        from tutel import moe, system

        if not torch.distributed.is_initialized():
            system.init_data_model_parallel(backend="gloo")
        layer = moe.moe_layer(
            gate_type={"type": "top", "k": case.top_k, "capacity_factor": 1.0, "fp32_gate": True},
            model_dim=HIDDEN,
            experts={
                "type": "llama_ffn",
                "num_experts_per_device": case.experts,
                "hidden_size_per_expert": INTERMEDIATE,
            },
        )
        module = nn.ModuleList([layer, *([SwiGlu()] if case.is_residual else [])]).to(peers_dtype).train()

        def call(x: torch.Tensor) -> torch.Tensor:
            routed = layer(x[None])[0]
            return routed + module[1](x) if case.is_residual else routed

        return module, call

    def kept_bytes(module: nn.Module, call, x: torch.Tensor) -> int:
        weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = call(x)
        del out
        return sum(kept.values())

    rows = []
    for text in arguments.cases:
        case = Case.parse(text)
        built = {"moesaic": ours(case)}
        dense = SwiGlu(INTERMEDIATE * case.active).to(peers_dtype)
        built["dense MLP"] = (dense, dense)
        for name, build in (
            ("transformers grouped_mm", transformers_block),
            ("DeepSpeed MoE", deepspeed_layer),
            ("Tutel", tutel_layer),
        ):
            try:
                built[name] = build(case)
            except ImportError as error:
                print(
                    f"{name}: not installed ({error}); see this script's first lines, pip install 'moesaic[benchmarks]'"
                )
        tokens, grad = torch.randn(2, case.tokens, HIDDEN).unbind()
        inputs = {
            name: tokens.to(torch.bfloat16 if name == "moesaic" else peers_dtype).requires_grad_() for name in built
        }
        grads = {name: grad.to(x.dtype) for name, x in inputs.items()}

        def step(name: str) -> None:
            (module, call), x = built[name], inputs[name]  # noqa: B023, F821
            module.zero_grad(set_to_none=True)
            x.grad = None
            call(x).backward(grads[name])  # noqa: B023

        candidates = {name: partial(step, name) for name in built}
        kept = {name: kept_bytes(module, call, inputs[name]) for name, (module, call) in built.items()}
        times = time_in_turn(candidates, repeats=arguments.repeats)
        matrices = 3 * HIDDEN * INTERMEDIATE
        flops = 3 * 2 * matrices * case.active * case.tokens  # forward and twice as much backward
        touched = min(case.experts, case.tokens * case.top_k) + case.is_residual
        moved = 3 * 2 * matrices * touched
        floor = max(flops / limits.bf16_flops_per_second, moved / limits.bandwidth_bytes_per_second)
        for name in built:
            seconds = median(times[name])
            rows.append(
                {
                    "tokens,experts,top_k": text,
                    "layer": name,
                    "ms": seconds * 1e3,
                    "x dense": paired_ratio(times, name, "dense MLP"),
                    "x moesaic": paired_ratio(times, name, "moesaic"),
                    "TFLOP/s": flops / seconds / 1e12,
                    "share of limit": floor / seconds,
                    "kept MB": kept[name] / 1e6,
                    "spread ms": f"{min(times[name]) * 1e3:.0f}-{max(times[name]) * 1e3:.0f}",
                }
            )
        del built
    print_table(rows)


if __name__ == "__main__":
    main()
