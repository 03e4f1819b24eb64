"""Does a dense model train faster here than the same model in Hugging Face transformers?

Both: 8.4 M parameters (6 layers, hidden 256, 4 heads, SwiGLU 1024, vocabulary 4096, untied), 16 sequences of 512, fp32
weights, bf16 matrix work, fused AdamW, gradient clipping. Each contender is a process of its own, run in turn, by
default and with the tuned allocator in the environment; moesaic sets its own allocator in both. Peak memory is the
process's largest resident size. Run: python benchmarks/train_dense.py [--rounds 3]
"""

import argparse
import json
import resource
import statistics
import time

from measure import TUNED_ALLOCATOR, machine, print_table, run_child

SHAPE = {"hidden": 256, "layers": 6, "heads": 4, "intermediate": 1024, "vocab": 4096, "sequence": 512, "batch": 16}


def moesaic_step():
    import torch

    from moesaic.config.model import ModelConfig
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
        intermediate_size=SHAPE["intermediate"],
        max_positions=SHAPE["sequence"],
        tie_embeddings=False,
    )
    model = Transformer(config, compute_dtype=torch.bfloat16).initialize(0)
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


def transformers_step():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SHAPE["vocab"],
            hidden_size=SHAPE["hidden"],
            num_hidden_layers=SHAPE["layers"],
            num_attention_heads=SHAPE["heads"],
            num_key_value_heads=SHAPE["heads"],
            intermediate_size=SHAPE["intermediate"],
            max_position_embeddings=SHAPE["sequence"],
            tie_word_embeddings=False,
            use_cache=False,
        )
    )
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, SHAPE["vocab"], (SHAPE["batch"], SHAPE["sequence"]))

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step, sum(parameter.numel() for parameter in model.parameters())


def child(name: str, steps: int) -> None:
    import torch

    torch.manual_seed(0)
    step, parameters = {"moesaic": moesaic_step, "transformers": transformers_step}[name]()
    step()
    step()
    seconds = []
    for _ in range(steps):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": statistics.median(seconds), "peak_bytes": peak, "parameters": parameters}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", nargs=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], int(arguments.child[1]))
        return
    print(machine())
    from moesaic.kernels.limits import measure_limits

    peak = measure_limits(device="cpu").bf16_flops_per_second
    tokens = SHAPE["batch"] * SHAPE["sequence"]
    results: dict[tuple[str, str], list[dict]] = {}
    for _ in range(arguments.rounds):
        for allocator, environment in (("default", {}), ("tuned", TUNED_ALLOCATOR)):
            for name in ("moesaic", "transformers"):
                result = run_child(["--child", name, str(arguments.steps)], environment=environment)
                results.setdefault((allocator, name), []).append(result)
    rows = []
    for (allocator, name), runs in results.items():
        other = results[(allocator, "transformers")]
        ratios = [b["seconds"] / a["seconds"] for a, b in zip(runs, other, strict=True)]
        seconds = statistics.median(run["seconds"] for run in runs)
        flops = 6 * (runs[0]["parameters"] - SHAPE["vocab"] * SHAPE["hidden"]) * tokens
        flops += 6 * 2 * SHAPE["hidden"] * (SHAPE["sequence"] + 1) / 2 * SHAPE["layers"] * tokens
        rows.append(
            {
                "environment": allocator,
                "trainer": name,
                "tokens/s": round(tokens / seconds),
                "ms/step": round(seconds * 1e3),
                "x transformers": statistics.median(ratios),
                "spread": f"{min(ratios):.2f}-{max(ratios):.2f}",
                "share of GEMM peak": flops / seconds / peak,
                "peak MB": round(max(run["peak_bytes"] for run in runs) / 1e6),
            }
        )
    print_table(rows)


if __name__ == "__main__":
    main()
