"""How fast is a training step here, against the same model in Hugging Face transformers?

Two small language models, 6 layers, hidden 256, 4 heads, vocabulary 4096, untied, 16 sequences of 512 tokens, fp32
weights, bf16 matrix work, fused AdamW, gradient clipping: dense (SwiGLU of 1024, 8.4 M parameters) and MoE (12 experts
of 512, top-2: 8.4 M active of 32 M). Peers: transformers' Llama, and its Mixtral with grouped_mm experts, eager and
compiled; where torch has no bf16 products worth the name (no bf16 instructions) theirs are in fp32, which is faster
there. Each contender is a process of its own, run in turn; moesaic sets its own allocator, the others get the tuned one
(and the default one too with --default-allocator). Peak memory is the process's largest resident size.
Run: python benchmarks/train_step.py [--model dense moe] [--rounds 3] [--compiled]
"""

import argparse
import json
import resource
import statistics
import time

from measure import TUNED_ALLOCATOR, machine, print_table, run_child

SHAPE = {"hidden": 256, "layers": 6, "heads": 4, "vocab": 4096, "sequence": 512, "batch": 16}
DENSE_INTERMEDIATE, EXPERT_INTERMEDIATE, EXPERTS, TOP_K = 1024, 512, 12, 2


def moesaic_step(kind: str):
    import torch

    from moesaic.config.model import ModelConfig, MoEConfig
    from moesaic.config.train import OptimizerConfig
    from moesaic.data.loader import Batch
    from moesaic.kernels.allocator import tune_allocator
    from moesaic.model.transformer import Transformer
    from moesaic.train.loss import language_model_loss
    from moesaic.train.optim import Optimizers, clip_gradients

    tune_allocator()
    config = ModelConfig(
        vocab_size=SHAPE["vocab"],
        hidden_size=SHAPE["hidden"],
        num_layers=SHAPE["layers"],
        num_heads=SHAPE["heads"],
        intermediate_size=DENSE_INTERMEDIATE,
        max_positions=SHAPE["sequence"],
        tie_embeddings=False,
        moe=None
        if kind == "dense"
        else MoEConfig(num_experts=EXPERTS, top_k=TOP_K, intermediate_size=EXPERT_INTERMEDIATE),
    )
    model = Transformer.uninitialized(config, compute_dtype=torch.bfloat16).initialize(0)
    model.train()
    optimizers = Optimizers(model, OptimizerConfig())
    tokens = torch.randint(0, SHAPE["vocab"], (SHAPE["batch"], SHAPE["sequence"] + 1))
    batch = Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)

    def step() -> None:
        language_model_loss(model, batch, seed=0).total.backward()
        clip_gradients(model, 1.0)
        optimizers.step(1e-4)
        optimizers.zero_grad()

    return step, sum(parameter.numel() for parameter in model.parameters())


def transformers_step(kind: str, *, is_compiled: bool):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

    from moesaic.kernels import products

    common = {
        "vocab_size": SHAPE["vocab"],
        "hidden_size": SHAPE["hidden"],
        "num_hidden_layers": SHAPE["layers"],
        "num_attention_heads": SHAPE["heads"],
        "num_key_value_heads": SHAPE["heads"],
        "max_position_embeddings": SHAPE["sequence"],
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    if kind == "dense":
        model = LlamaForCausalLM(LlamaConfig(intermediate_size=DENSE_INTERMEDIATE, **common))
    else:
        config = MixtralConfig(
            intermediate_size=EXPERT_INTERMEDIATE,
            num_local_experts=EXPERTS,
            num_experts_per_tok=TOP_K,
            sliding_window=None,
            **common,
        )
        config._experts_implementation = "grouped_mm"
        model = MixtralForCausalLM(config)
    model.train()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, SHAPE["vocab"], (SHAPE["batch"], SHAPE["sequence"]))
    call = torch.compile(model) if is_compiled else model
    has_bf16 = not products.is_widened(torch.device("cpu"), torch.bfloat16)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bf16):
            loss = call(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, parameters


def child(name: str, kind: str, steps: int) -> None:
    import torch

    torch.manual_seed(0)
    if name == "moesaic":
        step, parameters = moesaic_step(kind)
    else:
        step, parameters = transformers_step(kind, is_compiled=name.endswith("compiled"))
    step()
    step()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": statistics.median(seconds), "peak_bytes": peak, "parameters": parameters}))


def flops_per_step(kind: str, parameters: int) -> float:
    """Return 6 x the weights that a token meets (embedding look-up not), and attention's products, per step."""
    inactive = SHAPE["vocab"] * SHAPE["hidden"]
    if kind == "moe":
        expert = 3 * SHAPE["hidden"] * EXPERT_INTERMEDIATE
        inactive += SHAPE["layers"] * (EXPERTS - TOP_K) * expert
    attention = 2 * SHAPE["hidden"] * (SHAPE["sequence"] + 1) / 2 * SHAPE["layers"]
    return 6 * (parameters - inactive + attention) * SHAPE["batch"] * SHAPE["sequence"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=3)
    parser.add_argument("--model", nargs="+", choices=["dense", "moe"], default=["dense", "moe"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="also transformers under torch.compile")
    parser.add_argument("--default-allocator", action="store_true", help="also without the tuned allocator")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], arguments.child[1], int(arguments.child[2]))
        return
    print(machine())
    from moesaic.kernels.limits import measure_limits

    peak = measure_limits(device="cpu").bf16_flops_per_second
    tokens = SHAPE["batch"] * SHAPE["sequence"]
    environments = {"tuned": TUNED_ALLOCATOR}
    if arguments.default_allocator:
        environments["default"] = {}
    names = ["moesaic", "transformers"] + (["transformers compiled"] if arguments.compiled else [])
    results: dict[tuple[str, str, str], list[dict]] = {}
    for _ in range(arguments.rounds):
        for kind in arguments.model:
            for allocator, environment in environments.items():
                for name in names:
                    result = run_child(["--child", name, kind, str(arguments.steps)], environment=environment)
                    results.setdefault((kind, allocator, name), []).append(result)
    rows = []
    for (kind, allocator, name), runs in results.items():
        other = results[(kind, allocator, "transformers")]
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(runs, other, strict=True)]
        seconds = statistics.median(run["seconds"] for run in runs)
        rows.append(
            {
                "model": kind,
                "allocator": allocator,
                "trainer": name,
                "tokens/s": round(tokens / seconds),
                "ms/step": round(seconds * 1e3),
                "x transformers": statistics.median(ratios),
                "spread": f"{min(ratios):.2f}-{max(ratios):.2f}",
                "share of bf16 peak": flops_per_step(kind, runs[0]["parameters"]) / seconds / peak,
                "peak MB": round(max(run["peak_bytes"] for run in runs) / 1e6),
            }
        )
    print_table(rows)


if __name__ == "__main__":
    main()
