"""How fast does the engine serve a model with latent attention, beside transformers' own?

Layers of DeepSeek-V2-Lite's shape with random weights: hidden 2048, 16 heads, latents of 512 and a shared key of 64,
one dense layer of 10,944 and MoE layers of 64 experts of 1,408, top-6, with a shared MLP of 2,816; five layers of the
27, since 4.9 GB of bf16 are enough to stream. Prompts of random tokens that begin together, then greedy steps; shares
are of the bandwidth measured in the same run, from the bytes that the format stores.
Run: python benchmarks/latent_serving.py [--peer]
"""

import argparse
import gc
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any

from measure import bandwidth_probe, machine, print_table, restart_with_tuned_allocator
from serving_model import pack, tokenizer_json

VOCAB_SIZE, HIDDEN, HEADS, LAYERS, DENSE, EXPERTS, TOP_K, EXPERT, SHARED = (
    32_000,
    2048,
    16,
    5,
    10_944,
    64,
    6,
    1408,
    2816,
)
LATENT = {"kv_rank": 512, "nope_head_dim": 128, "rope_head_dim": 64, "value_head_dim": 128}
STEPS, ROUNDS = 32, 3


def build(form: str) -> Any:
    """Return the model packed as bf16, int8 or int4."""
    import torch

    from moesaic.config.model import ModelConfig
    from moesaic.model.transformer import Transformer

    config = ModelConfig.from_dict(
        {
            "vocab_size": VOCAB_SIZE, "hidden_size": HIDDEN, "num_layers": LAYERS, "num_heads": HEADS,
            "intermediate_size": DENSE, "max_positions": 8192, "tie_embeddings": False, "latent_attention": LATENT,
            "moe": {
                "num_experts": EXPERTS, "top_k": TOP_K, "layers": list(range(1, LAYERS)), "intermediate_size": EXPERT,
                "residual": "sum", "residual_intermediate_size": SHARED,
            },
        }
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = Transformer.uninitialized(config, compute_dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    model.initialize(0)

    return pack(model, form)


def prompts(batch: int, length: int) -> list[list[int]]:
    draw = random.Random(batch)
    return [[draw.randrange(VOCAB_SIZE) for _ in range(length)] for _ in range(batch)]


def time_engine(model: Any, batch: int, length: int) -> tuple[list[float], list[float], float]:
    """Return seconds of prompts and of steps, and the bytes of experts that a step used."""
    from moesaic.config.serve import EngineConfig, Sampling
    from moesaic.data.tokenizer import Tokenizer
    from moesaic.serve.engine import Engine

    config = EngineConfig(
        max_sequences=batch, max_batch_tokens=4096, max_length=length + STEPS + 2, prefix_caching=False
    )
    engine = Engine(model, Tokenizer(tokenizer_json()), config)
    sampling = Sampling(max_tokens=STEPS + 1, temperature=0.0, ignore_end_of_text=True)
    prefills, steps, used = [], [], 0
    for round_number in range(1 + ROUNDS):
        for prompt in prompts(batch, length):
            engine.add_request(prompt, sampling)
        begun: set[str] = set()
        started = time.perf_counter()
        while len(begun) < batch:
            begun |= {output.request_id for output in engine.step() if output.tokens}
        prefill, before = time.perf_counter() - started, engine.stats().expert_bytes_used
        while engine.has_work:
            started = time.perf_counter()
            engine.step()
            if round_number:
                steps.append(time.perf_counter() - started)
        if round_number:
            prefills.append(prefill)
            used += engine.stats().expert_bytes_used - before
    return prefills, steps, used / len(steps)


def bytes_of_a_step(model: Any, batch: int, length: int) -> int:
    """What is read beside routed experts: every other weight once, and the sequences' vectors."""
    part, total = model.decode_part, model.packed_head.num_bytes
    for layer in part.layers:
        weights = (layer.qkv, layer.latent.q_up, layer.latent.key_up, layer.latent.value_up, layer.o_proj, layer.mlp)
        total += sum(weight.num_bytes for weight in weights if weight is not None)
        total += 0 if layer.router is None else layer.router.weight.nbytes
        total += batch * (length + STEPS // 2) * 2 * (LATENT["kv_rank"] + LATENT["rope_head_dim"])
    return int(total)


def time_transformers(batches: list[int], length: int) -> Iterator[tuple[int, list[float], list[float]]]:
    import torch
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DynamicCache

    config = DeepseekV2Config(  # type: ignore[call-arg]
        vocab_size=VOCAB_SIZE, hidden_size=HIDDEN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=HEADS, q_lora_rank=None, kv_lora_rank=LATENT["kv_rank"],
        qk_nope_head_dim=LATENT["nope_head_dim"], qk_rope_head_dim=LATENT["rope_head_dim"],
        v_head_dim=LATENT["value_head_dim"], intermediate_size=DENSE, moe_intermediate_size=EXPERT,
        n_routed_experts=EXPERTS, num_experts_per_tok=TOP_K, n_shared_experts=SHARED // EXPERT, first_k_dense_replace=1,
        topk_method="greedy", n_group=1, topk_group=1, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    peer = DeepseekV2ForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    peer.config._experts_implementation = "grouped_mm"
    for batch in batches:
        prefills, steps = [], []
        for round_number in range(2):
            cache, tokens = DynamicCache(config=config), torch.tensor(prompts(batch, length))
            with torch.inference_mode():
                for step in range(1 + STEPS):
                    started = time.perf_counter()
                    logits = peer(tokens, past_key_values=cache, logits_to_keep=1).logits
                    tokens = logits[:, -1].argmax(-1, keepdim=True)
                    if round_number:
                        (steps if step else prefills).append(time.perf_counter() - started)
        yield batch, prefills, steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "int4"], choices=["bf16", "int8", "int4"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--peer", action="store_true", help="transformers too")
    arguments = parser.parse_args()
    restart_with_tuned_allocator()

    import torch

    from moesaic.kernels.select import cpu_kernels

    bandwidth, rows = bandwidth_probe(), []
    print(f"{machine()}; kernels: {cpu_kernels().name}")
    for form in arguments.formats:
        with torch.inference_mode():
            model = build(form)
        for batch in arguments.batches:
            before = bandwidth()
            prefills, steps, expert_bytes = time_engine(model, batch, arguments.prompt)
            rate, step = statistics.median([before, bandwidth()]), statistics.median(steps)
            moved = bytes_of_a_step(model, batch, arguments.prompt) + expert_bytes
            rows.append(
                {
                    "engine": f"moesaic {form}", "batch": batch, "decode tokens/s": batch / step, "step ms": 1e3 * step,
                    "prefill tokens/s": batch * arguments.prompt / statistics.median(prefills),
                    "MB read": moved / 1e6, "GB/s": rate / 1e9, "share": moved / rate / step,
                }
            )  # fmt: skip
        del model
        gc.collect()
    if arguments.peer:
        for batch, prefills, steps in time_transformers(arguments.batches, arguments.prompt):
            step = statistics.median(steps)
            rows.append(
                {
                    "engine": "transformers bf16", "batch": batch, "decode tokens/s": batch / step,
                    "step ms": 1e3 * step, "prefill tokens/s": batch * arguments.prompt / statistics.median(prefills),
                    "MB read": "-", "GB/s": "-", "share": "-",
                }
            )  # fmt: skip
    print_table(rows)


if __name__ == "__main__":
    main()
