"""A batch's cache keeps every sequence's positions apart, counts them, and refuses more than it was made for."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch

from moesaic.config.model import ModelConfig
from moesaic.errors import ConfigError, GenerationError
from moesaic.kernels.latent_attention import LatentStorage, read_latents, write_latents
from moesaic.kernels.paged_attention import read_kv, write_kv
from moesaic.model.kv_cache import BatchCache
from moesaic.model.pack import pack_transformer
from moesaic.model.transformer import Transformer


def make_cache(max_length: int = 70, dtype: torch.dtype = torch.float32) -> BatchCache:
    config = ModelConfig(vocab_size=5, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2)
    return BatchCache(config, 3, max_length, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gives_back_what_was_written(dtype: torch.dtype) -> None:
    cache = make_cache(dtype=dtype)
    pieces = [torch.randn(2, 2, 3, length, 2, 4).to(dtype) for length in (33, 1, 36)]  # (layer, k or v, B, S, KV, D)
    for number, piece in enumerate(pieces):
        assert cache.length == (0, 33, 34)[number]
        step = cache.extend(3, piece.shape[3])
        for layer, blocks in enumerate(step.storage.layers):
            write_kv(piece[layer, 0].flatten(0, 1), piece[layer, 1].flatten(0, 1), blocks, step.batch)
        everything = torch.cat(pieces[: number + 1], 3)
        for layer, blocks in enumerate(step.storage.layers):
            for sequence in range(3):
                keys, values = read_kv(blocks, step.batch.block_tables[sequence], cache.length)
                assert torch.equal(keys, everything[layer, 0, sequence])
                assert torch.equal(values, everything[layer, 1, sequence])
    assert cache.length == 70


def test_of_latent_attention_it_holds_latents() -> None:
    latent = {"kv_rank": 5, "nope_head_dim": 4, "rope_head_dim": 2, "value_head_dim": 3}
    config = ModelConfig.from_dict(
        {"vocab_size": 5, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "latent_attention": latent}
    )
    cache = BatchCache(config, 3, 40, dtype=torch.float32, device=torch.device("cpu"))
    step = cache.extend(3, 33)
    assert isinstance(step.storage, LatentStorage)
    for layer, blocks in enumerate(step.storage.layers):
        piece = torch.randn(3, 33, 7) + layer
        write_latents(piece.flatten(0, 1), blocks, step.batch)
        for sequence in range(3):
            assert torch.equal(read_latents(blocks, step.batch.block_tables[sequence], 33), piece[sequence])
    with pytest.raises(ConfigError, match="a cache of int8 is asked for"):
        BatchCache(config, 3, 40, dtype=torch.int8, device=torch.device("cpu"))


def test_new_positions_follow_the_old_ones() -> None:
    cache = make_cache()
    assert cache.extend(3, 2).batch.positions.tolist() == [0, 1] * 3
    assert cache.extend(3, 3).batch.positions.tolist() == [2, 3, 4] * 3


def test_refuses_more_than_it_was_made_for() -> None:
    cache = make_cache(5)
    cache.extend(3, 4)
    with pytest.raises(GenerationError, match="would hold 8 positions; it was made for 5; make it longer"):
        cache.extend(3, 4)
    assert cache.length == 4


@torch.no_grad()
@pytest.mark.parametrize("packs", [False, True])
def test_a_pass_that_is_refused_leaves_no_positions(packs: bool) -> None:
    config = ModelConfig(vocab_size=5, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, max_positions=16)
    model = Transformer(config).initialize(0).eval()
    if packs:
        pack_transformer(model)
    first, wrong, then = (torch.tensor([ids] * 3) for ids in ([1, 2], [3, 5, 1], [3, 4]))
    hidden = []
    for tries in (False, True):
        cache = make_cache(16, model.compute_dtype)
        model(first, cache=cache)
        if tries:
            with pytest.raises((GenerationError, IndexError)):
                model(wrong, cache=cache)
        hidden.append(model(then, cache=cache).hidden)
        assert cache.length == 4
    assert torch.equal(*hidden)


LATENT = {"latent_attention": {"kv_rank": 5, "nope_head_dim": 4, "rope_head_dim": 2, "value_head_dim": 3}}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("attention", [{}, LATENT])
def test_a_copy_of_a_used_cache_has_memory_of_its_own(
    attention: dict[str, object], copied: Callable[[BatchCache], BatchCache]
) -> None:
    config = ModelConfig.from_dict({"vocab_size": 64, "hidden_size": 64, "num_layers": 2, "num_heads": 4, **attention})
    model = Transformer(config, compute_dtype=torch.bfloat16).initialize(0).eval()
    first, second, third = torch.randint(0, 64, (3, 1, 7), generator=torch.Generator().manual_seed(0))

    def after(*pieces: torch.Tensor, cache: BatchCache | None = None) -> torch.Tensor:
        cache = BatchCache(config, 1, 40, dtype=torch.bfloat16, device=torch.device("cpu")) if cache is None else cache
        return torch.cat([model(piece, cache=cache).hidden for piece in pieces], 1)

    with torch.no_grad():
        cache = BatchCache(config, 1, 40, dtype=torch.bfloat16, device=torch.device("cpu"))
        model(first, cache=cache)
        other = copied(cache)
        model(second, cache=cache)
        found = after(third, first, cache=other), after(first, cache=cache)
        assert torch.equal(found[0], after(first, third, first)[:, 7:])
        assert torch.equal(found[1], after(first, second, first)[:, 14:])
