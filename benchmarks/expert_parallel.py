"""What does it cost to spread a layer's experts over two processes, and what does it save?

One MoE layer of SwiGLU experts (H=512, F=2048), forward, backward and what makes gradients those of all tokens, bf16,
two processes of one thread each on this machine, over gloo. Contenders, each in processes of its own, in turn:
`spread`, half of the experts on each process (moesaic.parallel); `replicated`, all of them on each under PyTorch's
DistributedDataParallel; DeepSpeed's MoE with ep_size=2 and a capacity factor of 2, where it is installed (its router's
gradients are not averaged here, so it does a little less). `exchange` is what the spread layer's all-to-alls take with
nothing else to do: rows there and back, and their gradients. Megabytes are those of a process's expert weights.
Run: PYTHONPATH=. PYTHON benchmarks/expert_parallel.py [--tokens 4096] [--experts 8 32 128] [--top-k 1 2] [--rounds 3]
"""

import argparse
import importlib.util
import json
import logging
import os
import socket
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from measure import machine, print_table, restart_with_tuned_allocator, write_json

HIDDEN, INTERMEDIATE, PROCESSES = 512, 2048, 2
Step = Callable[[], None]


def spread(tokens: int, experts: int, top_k: int, *, is_spread: bool = True) -> tuple[Step, int]:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from moesaic.config.model import FeedForwardConfig
    from moesaic.moe.layer import MoELayer
    from moesaic.parallel.expert import ExpertParallel

    config = FeedForwardConfig(num_experts=experts, top_k=top_k, expert_intermediate_size=INTERMEDIATE)
    layer = MoELayer(HIDDEN, config, activation="swiglu", has_bias=False)
    layer.experts.to(torch.bfloat16)
    x = torch.randn(tokens, HIDDEN).bfloat16().requires_grad_()
    parallel = ExpertParallel(layer) if is_spread else None
    module = layer if is_spread else DistributedDataParallel(layer)

    def step() -> None:
        out = module(x)[0]
        out.backward(x.detach())
        if parallel is not None:
            parallel.average_gradients()
        clear(layer, x)

    return step, sum(each.nbytes for each in layer.experts.parameters())


def replicated(tokens: int, experts: int, top_k: int) -> tuple[Step, int]:
    return spread(tokens, experts, top_k, is_spread=False)


def exchange(tokens: int, experts: int, top_k: int) -> tuple[Step, int]:
    import torch
    import torch.distributed as dist

    rows = torch.randn(tokens * top_k, HIDDEN).bfloat16()
    out = torch.empty_like(rows)

    def step() -> None:
        for _ in range(4):
            dist.all_to_all_single(out, rows)

    return step, 0


def deepspeed_moe(tokens: int, experts: int, top_k: int) -> tuple[Step, int]:
    import deepspeed
    import torch
    import torch.nn.functional as F
    from deepspeed.moe.layer import MoE
    from torch import nn

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    deepspeed.init_distributed(dist_backend="gloo")

    class SwiGlu(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
            self.up = nn.Linear(HIDDEN, INTERMEDIATE, bias=False)
            self.down = nn.Linear(INTERMEDIATE, HIDDEN, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(F.silu(self.gate(x)) * self.up(x))

    layer = MoE(HIDDEN, SwiGlu(), num_experts=experts, ep_size=PROCESSES, k=top_k, capacity_factor=2.0)
    layer.set_deepspeed_parallelism()
    layer.to(torch.bfloat16).train()
    x = torch.randn(tokens, HIDDEN).bfloat16().requires_grad_()

    def step() -> None:
        layer(x)[0].backward(x.detach())
        clear(layer, x)

    return step, sum(each.nbytes for each in layer.deepspeed_moe.experts.parameters())


CONTENDERS = {"spread": spread, "replicated": replicated, "exchange": exchange, "DeepSpeed MoE": deepspeed_moe}


def clear(module: Any, x: Any) -> None:
    x.grad = None
    for parameter in module.parameters():
        parameter.grad = None


def on_a_rank(rank: int, name: str, port: int, case: tuple[int, int, int], seconds: float, out: str) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(PROCESSES), "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    step, num_bytes = CONTENDERS[name](*case)
    times: list[float] = []
    begin = time.perf_counter()
    while True:
        dist.barrier()
        started = time.perf_counter()
        step()
        dist.barrier()
        times.append(time.perf_counter() - started)
        # One of them says when it is enough.
        is_over = torch.tensor([len(times) >= 4 and time.perf_counter() - begin > seconds])
        dist.broadcast(is_over, 0)
        if is_over:
            break
    if rank == 0:
        Path(out).write_text(json.dumps({"seconds": statistics.median(times[1:]), "bytes": num_bytes}))
    dist.destroy_process_group()


def run(name: str, case: tuple[int, int, int], seconds: float) -> dict[str, float]:
    import torch.multiprocessing as mp

    with socket.socket() as free, TemporaryDirectory() as folder:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        out = Path(folder) / "out.json"
        mp.spawn(on_a_rank, args=(name, port, case, seconds, str(out)), nprocs=PROCESSES)
        return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="of each process")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--top-k", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each contender, case and round")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    restart_with_tuned_allocator()
    names = [each for each in CONTENDERS if each != "DeepSpeed MoE" or importlib.util.find_spec("deepspeed")]
    print(machine())
    rows = []
    for experts in arguments.experts:
        for top_k in arguments.top_k:
            case = (arguments.tokens, experts, top_k)
            found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            for _ in range(arguments.rounds):
                for name in names:
                    found[name].append(run(name, case, arguments.seconds))
            middle = {name: statistics.median(each["seconds"] for each in runs) for name, runs in found.items()}
            for name in names:
                each = [run["seconds"] for run in found[name]]
                rows.append(
                    {
                        "experts": experts,
                        "top-k": top_k,
                        "": name,
                        "ms": middle[name] * 1e3,
                        "ms, all runs": " ".join(f"{seconds * 1e3:.0f}" for seconds in each),
                        "over spread": middle[name] / middle["spread"],
                        "expert MB": found[name][0]["bytes"] / 1e6,
                    }
                )
    print_table(rows)
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
