"""Routes are counted some steps together: what that gives is what one step after the other gives. Reads of the disk."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.checkpoint.mapped import open_mapped, write_mapped
from moesaic.config.model import ModelConfig, MoEConfig
from moesaic.kernels.decode import Decoded
from moesaic.model.pack import pack_transformer
from moesaic.model.transformer import Transformer
from moesaic.serve.expert_load import ExpertLoad, disk_bytes_read
from moesaic.serve.outputs import LayerLoad
from moesaic.serve.server.metrics import _describe_layer

Make = Callable[..., Transformer]


def test_steps_together_give_what_one_by_one_gives(make_model: Make) -> None:
    model = make_model("pr-moe")
    together, one_by_one = ExpertLoad(model), ExpertLoad(model)
    layers = together.layers()
    generator = torch.Generator().manual_seed(0)
    total = [np.zeros(layer.num_experts) for layer in layers]
    recent = [np.zeros(layer.num_experts) for layer in layers]
    all_distinct = 0
    for num_tokens in (70, 1, 1, 3, 900, 1, 2):
        distinct, ids = 0, []
        for layer, all_counts, recent_counts in zip(layers, total, recent, strict=True):
            chosen = torch.randint(layer.num_experts, (num_tokens * layer.top_k,), generator=generator)
            counts = np.bincount(chosen, minlength=layer.num_experts)
            all_counts += counts
            recent_counts *= 0.5 ** (num_tokens / 2048)
            recent_counts += counts
            distinct += np.count_nonzero(counts)
            ids.append(chosen)
        step = Decoded(
            torch.empty(num_tokens, 4), torch.cat(ids), torch.empty(0), tuple(layer.top_k for layer in layers),
            torch.empty(0, 7),
        )  # fmt: skip
        together.add(step)
        one_by_one.add(step)
        assert one_by_one.distinct_experts_per_step == distinct / len(layers)
        all_distinct += distinct
    assert together.distinct_experts_per_step == one_by_one.distinct_experts_per_step
    assert together.distinct_experts == one_by_one.distinct_experts == all_distinct / len(layers)
    assert together.bytes_used == one_by_one.bytes_used > 0
    for load in (together, one_by_one):
        for layer, all_counts, recent_counts in zip(load.layers(), total, recent, strict=True):
            assert list(layer.tokens_per_expert) == all_counts.tolist()
            np.testing.assert_allclose(layer.recent_tokens_per_expert, recent_counts, rtol=1e-12)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts what a process reads")
def test_what_a_mapped_file_takes_from_the_disk_is_counted(tmp_path: Path) -> None:
    import resource

    path, weights = tmp_path / "file", {"weight": torch.ones(1 << 18)}
    with path.open("wb", buffering=0) as file:
        write_mapped(file, weights, weights.items(), key="key")
        os.fdatasync(file.fileno())  # only what has been written leaves memory, and tests have no os.fsync
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    mapped = open_mapped(path, key="key")
    before, sectors = disk_bytes_read(), resource.getrusage(resource.RUSAGE_SELF).ru_inblock
    mapped.tensors["weight"].sum()
    after, sectors = disk_bytes_read(), resource.getrusage(resource.RUSAGE_SELF).ru_inblock - sectors
    if not sectors:
        pytest.skip("this folder is on no disk, or it is not counted")
    assert before is not None and after is not None
    assert after - before == pytest.approx(512 * sectors, rel=0.1)  # the two looks are not at one time


@pytest.mark.parametrize("is_packed", [False, True])
def test_the_bytes_of_an_expert_are_those_of_its_biases_too(is_packed: bool) -> None:
    config = ModelConfig(
        vocab_size=8, hidden_size=64, num_layers=1, num_heads=4, mlp_bias=True, intermediate_size=32,
        moe=MoEConfig(num_experts=4, top_k=1),
    )  # fmt: skip
    model = Transformer(config).bfloat16()
    if is_packed:
        pack_transformer(model)
    load = ExpertLoad(model)
    routes = torch.tensor([0, 0, 2])
    load.add(Decoded(torch.empty(3, 4), routes, torch.empty(0), (1,), torch.empty(0, 7)))
    weights, biases = 3 * 64 * 32, 2 * 32 + 64
    assert load.bytes_used >= 2 * (2 * weights + 2 * biases)
    assert load.bytes_used == 2 * (2 * weights + (4 if is_packed else 2) * biases)


def test_an_expert_of_two_may_be_hot() -> None:
    def hot(*recent: float) -> list[int]:
        layer = LayerLoad(
            layer=1,
            num_experts=len(recent),
            top_k=1,
            tokens_per_expert=(9,) * len(recent),
            recent_tokens_per_expert=recent,
        )
        return list(_describe_layer(layer)["hot"])

    assert hot(1000.0, 1.0) == [0] and hot(6.0, 4.0) == []
    assert hot(5.1, 3.0, 0.9) == [0] and hot(4.9, 3.0, 1.1) == []
    assert hot(9.0, 1.0, 1.0, 1.0, 1.0) == [0] and hot(1.9, 1.0, 0.5, 0.6) == []
