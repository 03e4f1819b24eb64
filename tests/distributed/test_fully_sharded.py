"""Our operators under PyTorch's data parallelism, fully sharded and not: two processes compute what one does."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moesaic.config.model import ModelConfig
from moesaic.data.loader import Batch
from moesaic.kernels.select import cpu_library
from moesaic.model.transformer import Transformer
from moesaic.train.loss import language_model_loss

# Sizes that every kernel takes.
CONFIG = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 64,
    "max_positions": 32,
    "activation": "swiglu",
    "moe": {"num_experts": [4, 6], "top_k": 2, "layers": [1, 2], "residual": "sum", "router": {"balance_loss": 0.01}},
}
WORLD = 2
OPERATORS = {
    "moesaic::causal_attention",
    "moesaic::causal_attention_backward",
    "moesaic::linear_cross_entropy",
    "moesaic::norm",
    "moesaic::norm_backward",
    "moesaic::rotate",
    "moesaic::route",
    "moesaic::route_backward",
    "moesaic::routed_mlp",
    "moesaic::routed_mlp_backward",
}


def build() -> Transformer:
    model = Transformer(ModelConfig.from_dict(CONFIG), compute_dtype=torch.bfloat16)
    model.initialize(3)
    return model.train()


def batch() -> Batch:
    tokens = torch.randint(0, 96, (2 * WORLD, 17), generator=torch.Generator().manual_seed(5))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


def train_on_a_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    try:
        model = build()
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            losses = language_model_loss(model, batch().rows(2 * rank, 2 * rank + 2), seed=0)
            losses.total.backward()
        gradients = {
            "fully sharded": {
                name: parameter.grad.full_tensor()  # type: ignore[union-attr]
                for name, parameter in model.named_parameters()
                if parameter.grad is not None
            }
        }
        for static_graph in (False, True):
            replica = build()
            whole = DistributedDataParallel(replica, static_graph=static_graph)
            language_model_loss(whole, batch().rows(2 * rank, 2 * rank + 2), seed=0).total.backward()
            gradients[f"replicated, {static_graph=}"] = {
                name: parameter.grad for name, parameter in replica.named_parameters() if parameter.grad is not None
            }
        if rank == 0:
            ran = [event.key for event in profile.key_averages()]
            torch.save({"gradients": gradients, "ran": ran}, Path(folder) / "rank0.pt")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch has no gloo")
def test_gradients_equal_those_of_one_process(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(train_on_a_rank, args=(port, str(tmp_path)), nprocs=WORLD)
    saved = torch.load(tmp_path / "rank0.pt", weights_only=True)
    if cpu_library() is not None:  # elsewhere there are only PyTorch's operations
        assert set(saved["ran"]) >= OPERATORS
    model = build()
    for rank in range(WORLD):
        # The balance loss is one of each rank's tokens, so the halves go one by one here too.
        (language_model_loss(model, batch().rows(2 * rank, 2 * rank + 2), seed=0).total / WORLD).backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert len(saved["gradients"]) == 3
    for way, found in saved["gradients"].items():
        assert found.keys() == expected.keys(), way
        for name, gradient in expected.items():
            assert gradient is not None
            scale = gradient.abs().max()
            assert scale > 0, name
            # Nothing but the order of a sum of two differs.
            assert torch.allclose(found[name], gradient, rtol=0, atol=float(scale) * 1e-5), (way, name)
