"""How many tokens a second does a packed model generate, and which share of the memory's bandwidth is that?

The model is serving_model's: 1.72 B parameters, 176 M of them active, with random weights. Prompts of 512 tokens, then
single steps with random next tokens (fresh experts each time). The bytes are what a step has to read: projections,
routers, head, the distinct experts that were chosen, keys and values. --peer adds transformers with the same shape.
Run: python benchmarks/decode.py [--formats bf16 int8 int4] [--batches 1 8] [--layers 16] [--peer]
"""

import argparse
import statistics
import time
from typing import Any

from measure import machine, restart_with_tuned_allocator
from serving_model import build, build_peer

PROMPT = 512


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8", "int4"], choices=["bf16", "int8", "int4"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--peer", action="store_true")
    arguments = parser.parse_args()
    restart_with_tuned_allocator()

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

    peer = build_peer(num_layers)
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
