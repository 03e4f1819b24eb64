"""How many tokens a second does a packed model generate, and which share of the memory's bandwidth is that?

A Qwen3-MoE-like model of 1.72 B parameters, 176 M of them active, with random weights: 16 layers, hidden 1024, 16 heads
and 4 key/value heads of 64, 32 experts of 1024, top-2 renormalised, vocabulary 32,000. Prompts of 512 tokens, then
single steps with random next tokens (fresh experts each time). The bytes are what a step has to read: projections,
routers, head, the distinct experts that were chosen, keys and values. --peer adds transformers with the same shape.
Run: python benchmarks/decode.py [--formats bf16 int8 int4] [--batches 1 8] [--layers 16] [--peer]
"""

import argparse
import os
import statistics
import sys
import time
from typing import Any

from measure import TUNED_ALLOCATOR, machine

PROMPT, GROUP_SIZE = 512, 64


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "int4"], choices=["bf16", "int8", "int4"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--peer", action="store_true")
    arguments = parser.parse_args()
    if os.environ.get("MALLOC_TRIM_THRESHOLD_") is None:  # every contender gets the good allocator
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **TUNED_ALLOCATOR})

    import torch

    from moesaic.kernels.limits import measure_limits

    bandwidth = measure_limits(device="cpu").bandwidth_bytes_per_second
    print(machine())
    print(f"reads {bandwidth / 1e9:.1f} GB/s")
    with torch.no_grad():
        for name in arguments.formats:
            model = build(arguments.layers, name)
            measure(model, batch_size=1, steps=2)  # makes the plan and touches everything once
            for batch_size in arguments.batches:
                report(name, batch_size, bandwidth, *measure(model, batch_size=batch_size, steps=arguments.steps))
            del model
        if arguments.peer:
            for batch_size in arguments.batches:
                prefill, steps = measure_peer(arguments.layers, batch_size=batch_size, steps=arguments.steps)
                report("transformers bf16", batch_size, bandwidth, prefill, steps, None)


def report(
    name: str, batch_size: int, bandwidth: float, prefill: float, steps: list[float], read_bytes: float | None
) -> None:
    seconds = statistics.median(steps)
    share = (
        "" if read_bytes is None else f", {read_bytes / 1e6:.0f} MB, {read_bytes / seconds / bandwidth:.0%} of limit"
    )
    print(
        f"{name:18} batch {batch_size}: prefill {batch_size * PROMPT / prefill:6.0f} tokens/s, decode "
        f"{batch_size / seconds:6.1f} tokens/s ({1e3 * seconds:.2f} ms, least {1e3 * min(steps):.2f}{share})",
        flush=True,
    )


def build(num_layers: int, name: str) -> Any:
    """Return the model packed; made in bf16, since its fp32 form would take 7 GB."""
    import torch

    from moesaic.config.model import ModelConfig
    from moesaic.kernels.quantized import QuantizedWeight, quantize_weight
    from moesaic.model.pack import pack_transformer
    from moesaic.model.transformer import Transformer

    config = ModelConfig.from_dict(
        {
            "vocab_size": 32_000, "hidden_size": 1024, "num_layers": num_layers, "num_heads": 16, "num_kv_heads": 4,
            "intermediate_size": 1024, "max_positions": 4096, "tie_embeddings": False,
            "moe": {"num_experts": 32, "top_k": 2, "router": {"renormalize": True}},
        }
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = Transformer(config, compute_dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    model.initialize(0)

    def quantize(weight: torch.Tensor) -> QuantizedWeight:
        bits, group_size = (8, None) if name == "int8" else (4, GROUP_SIZE)
        if weight.dim() == 2:
            return quantize_weight(weight.detach(), bits=bits, group_size=group_size)
        parts = [quantize(each) for each in weight]
        values, scales = torch.stack([part.values for part in parts]), torch.stack([part.scales for part in parts])
        return QuantizedWeight(values, scales, bits, group_size)

    quantized = {
        key: quantize(parameter)
        for key, parameter in model.named_parameters()
        if name != "bf16" and parameter.dim() > 1 and key != "embedding" and not key.endswith("router.weight")
    }
    return pack_transformer(model, quantized)


def measure(model: Any, *, batch_size: int, steps: int) -> tuple[float, list[float], float]:
    """Return the seconds of the prompts, of each step, and the bytes a step reads."""
    import torch

    from moesaic.kernels import select
    from moesaic.kernels.decode import DecodePlan
    from moesaic.model.kv_cache import BatchCache

    cache = BatchCache(model.config, batch_size, PROMPT + 2 * steps, dtype=torch.bfloat16, device=torch.device("cpu"))
    started = time.perf_counter()
    model(torch.randint(model.config.vocab_size, (batch_size, PROMPT)), cache=cache)
    prefill = time.perf_counter() - started
    times = []
    for _ in range(steps):
        tokens = torch.randint(model.config.vocab_size, (batch_size, 1))
        started = time.perf_counter()
        model.logits(model(tokens, cache=cache).hidden[:, -1]).argmax(-1).tolist()
        times.append(time.perf_counter() - started)
    # Which experts such steps choose, asked of the same plan outside of the clock.
    library = select.cpu_library()
    assert library is not None and model.decode_part is not None, "this is a measurement of the C++ kernels"
    plan, experts = DecodePlan(model.decode_part, library), 0
    for _ in range(steps):
        step = cache.extend(batch_size, 1)
        decoded = plan.run(torch.randint(model.config.vocab_size, (batch_size,)), step.storage, step.batch)
        experts += sum(len(ids.unique()) for ids in decoded.expert_ids)
    layers = model.decode_part.layers
    read = model.packed_head.num_bytes + sum(
        layer.qkv.num_bytes + layer.o_proj.num_bytes + layer.router.weight.nbytes for layer in layers
    )
    read += experts / steps * layers[0].experts.num_bytes / layers[0].router.weight.shape[0]
    positions = batch_size * (PROMPT + steps // 2)
    return prefill, times, read + positions * len(layers) * 2 * model.config.num_kv_heads * model.config.head_dim * 2


def measure_peer(num_layers: int, *, batch_size: int, steps: int) -> tuple[float, list[float]]:
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(  # type: ignore[call-arg]
        vocab_size=32_000, hidden_size=1024, num_hidden_layers=num_layers, num_attention_heads=16,
        num_key_value_heads=4, head_dim=64, num_experts=32, num_experts_per_tok=2, moe_intermediate_size=1024,
        intermediate_size=1024, norm_topk_prob=True, tie_word_embeddings=False, max_position_embeddings=4096,
    )  # fmt: skip
    config._experts_implementation = "grouped_mm"
    torch.set_default_dtype(torch.bfloat16)
    peer = Qwen3MoeForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)
    started = time.perf_counter()
    out = peer(torch.randint(32_000, (batch_size, PROMPT)), use_cache=True, logits_to_keep=1)
    prefill = time.perf_counter() - started
    times = []
    for _ in range(steps):
        tokens = torch.randint(32_000, (batch_size, 1))
        started = time.perf_counter()
        out = peer(tokens, past_key_values=out.past_key_values, use_cache=True)
        out.logits[:, -1].argmax(-1).tolist()
        times.append(time.perf_counter() - started)
    return prefill, times


if __name__ == "__main__":
    main()
