"""Latent attention equals its definition, and itself over its compressed cache, in any cut and any company."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.config.model import ModelConfig
from moesaic.kernels import select
from moesaic.kernels.latent_attention import LatentStorage
from moesaic.kernels.paged_attention import PagedBatch
from moesaic.model.kv_cache import BatchCache, CacheStep, allocate_storage
from moesaic.model.latent_attention import LatentAttention
from moesaic.model.rotary import model_rotary, rotate
from moesaic.model.transformer import Transformer

CPU = torch.device("cpu")
# Values narrower than keys and wider; latents that are smaller than what they make, and so small that with a cache even
# a prompt is cheaper among them.
SHAPES: dict[str, dict[str, Any]] = {
    "narrow values": {"kv_rank": 20, "nope_head_dim": 6, "rope_head_dim": 4, "value_head_dim": 7},
    "wide values, query rank": {
        "query_rank": 11, "kv_rank": 20, "nope_head_dim": 5, "rope_head_dim": 6, "value_head_dim": 13,
    },
    "small latents": {"query_rank": 3, "kv_rank": 5, "nope_head_dim": 8, "rope_head_dim": 2, "value_head_dim": 10},
    "no padding": {"kv_rank": 40, "nope_head_dim": 12, "rope_head_dim": 4, "value_head_dim": 16},
}  # fmt: skip


def make_config(shape: str, **values: Any) -> ModelConfig:
    sizes = {"vocab_size": 11, "hidden_size": 24, "num_layers": 1, "num_heads": 3, "max_positions": 64}
    return ModelConfig.from_dict({**sizes, "latent_attention": SHAPES[shape], **values})


def make_layer(config: ModelConfig) -> LatentAttention:
    layer = LatentAttention(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3, generator=generator)
    return layer


def inputs(length: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, length, 24, generator=torch.Generator().manual_seed(1))


def plain(layer: LatentAttention, config: ModelConfig, x: Tensor, documents: Tensor | None = None) -> Tensor:
    """Head by head, from the paper's equations."""
    latent = config.latent_attention
    assert latent is not None
    nope, rope, value = latent.nope_head_dim, latent.rope_head_dim, latent.value_head_dim
    length, epsilon = x.shape[1], latent.norm_epsilon
    rotary = model_rotary(config, torch.arange(length))
    if latent.query_rank is None:
        query = x @ layer.q_proj.weight.t()
    else:
        small = F.rms_norm(x @ layer.q_down_proj.weight.t(), (latent.query_rank,), layer.q_down_norm.weight, epsilon)
        query = small @ layer.q_up_proj.weight.t()
    down = x @ layer.kv_down_proj.weight.t()
    c = F.rms_norm(down[..., : latent.kv_rank], (latent.kv_rank,), layer.kv_down_norm.weight, epsilon)
    turned_key = rotate(down[..., None, latent.kv_rank :], *rotary)[:, :, 0]
    visible = torch.ones(length, length, dtype=torch.bool).tril()[None]
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    scale = config.attention_scale or (nope + rope) ** -0.5
    heads = []
    for head in range(config.num_heads):
        own = query[..., head * (nope + rope) : (head + 1) * (nope + rope)]
        up = layer.kv_up_proj.weight[head * (nope + value) : (head + 1) * (nope + value)]
        turned = rotate(own[..., None, nope:], *rotary)[:, :, 0]
        keys, values = c @ up[:nope].t(), c @ up[nope:].t()
        scores = own[..., :nope] @ keys.transpose(1, 2) + turned @ turned_key.transpose(1, 2)
        weights = (scores * scale).masked_fill(~visible, float("-inf")).softmax(-1)
        heads.append(weights @ values)
    return torch.cat(heads, -1) @ layer.o_proj.weight.t()


@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize("scale", [None, 0.7])
@pytest.mark.parametrize("with_documents", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_its_definition_and_so_do_its_gradients(
    shape: str, with_documents: bool, scale: float | None, length: int
) -> None:
    config = make_config(shape, attention_scale=scale)
    layer, x = make_layer(config), inputs(length).requires_grad_()
    documents = torch.arange(length).div(10, rounding_mode="floor").expand(2, -1) if with_documents else None
    rotary = model_rotary(config, torch.arange(length))
    out, wanted = layer(x, rotary=rotary, documents=documents), plain(layer, config, x, documents)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad(out.square().sum(), leaves)
    for mine, theirs in zip(got, torch.autograd.grad(wanted.square().sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kernels", ["reference", *select.supported_instruction_sets()])
@pytest.mark.parametrize("shape", SHAPES)
def test_bf16_is_near_fp32_and_so_are_its_gradients(shape: str, kernels: str) -> None:
    config = make_config(shape)
    layer, x = make_layer(config), inputs(37).requires_grad_()
    rotary = model_rotary(config, torch.arange(37))
    leaves = [x, *layer.parameters()]
    with select.forced(kernels):
        out = layer(x.bfloat16(), rotary=rotary)
        got = [out, *torch.autograd.grad(out.float().square().sum(), leaves)]
    wanted = plain(layer, config, x)
    expected = [wanted, *torch.autograd.grad(wanted.square().sum(), leaves)]
    for mine, theirs in zip(got, expected, strict=True):
        assert (mine - theirs).norm() < 0.03 * theirs.norm()


class Ragged:
    """Sequences of any length in one pool of shuffled blocks, each taking `counts` tokens a step."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype) -> None:
        self.tables = torch.randperm(12, generator=torch.Generator().manual_seed(3)).int().view(4, 3)
        self.storage = allocate_storage(config, 12, block_size=32, dtype=dtype, device=CPU)
        self.lengths = [0] * 4
        self.counts = [0] * 4

    def extend(self, batch_size: int, length: int) -> CacheStep:
        assert (batch_size, length) == (1, sum(self.counts))
        self.lengths = [before + new for before, new in zip(self.lengths, self.counts, strict=True)]
        starts = torch.tensor([0, *torch.tensor(self.counts).cumsum(0).tolist()], dtype=torch.int32)
        return CacheStep(self.storage, PagedBatch(starts, torch.tensor(self.lengths, dtype=torch.int32), self.tables))

    def retract(self, length: int) -> None:
        raise AssertionError("no pass is refused here")


# Prompts beside a rest and chunks, single tokens, and everybody at once.
STEPS = [[20, 3, 0, 1], [1, 0, 17, 1], [5, 1, 1, 0], [1, 1, 1, 1]]


def build(shape: str, dtype: torch.dtype) -> Transformer:
    config = make_config(shape, num_layers=2, init_std=0.2, moe={"num_experts": 4, "top_k": 4, "layers": [1]})
    return Transformer(config, compute_dtype=dtype).initialize(0).eval()


def close(got: Tensor, wanted: Tensor) -> None:
    if got.dtype is torch.float32:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=2e-5)
    else:
        assert (got - wanted).float().norm() < 0.02 * wanted.float().norm()


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[37], [36, 1], [1] * 37, [5, 20, 1, 11]])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_equals_uncached(shape: str, pieces: list[int], dtype: torch.dtype) -> None:
    model = build(shape, dtype)
    tokens = torch.randint(11, (2, 37), generator=torch.Generator().manual_seed(0))
    cache = BatchCache(model.config, 2, 37, dtype=dtype, device=CPU)
    got = torch.cat([model(part, cache=cache).hidden for part in tokens.split(pieces, 1)], 1)
    close(got, model(tokens).hidden)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ragged_sequences_equal_themselves_alone(shape: str, dtype: torch.dtype) -> None:
    model = build(shape, dtype)
    generator = torch.Generator().manual_seed(2)
    totals = [sum(counts) for counts in zip(*STEPS, strict=True)]
    whole = [torch.randint(11, (total,), generator=generator) for total in totals]
    sequences, done, found = Ragged(model.config, dtype=dtype), [0] * 4, [[] for _ in range(4)]
    for counts in STEPS:
        sequences.counts = counts
        parts = [each[at : at + count] for each, at, count in zip(whole, done, counts, strict=True)]
        hidden = model(torch.cat(parts)[None], cache=sequences).hidden[0]
        for number, part in enumerate(hidden.split(counts)):
            found[number].append(part)
        done = [at + count for at, count in zip(done, counts, strict=True)]
    for tokens, parts in zip(whole, found, strict=True):
        close(torch.cat(parts), model(tokens[None]).hidden[0])


def test_the_cache_holds_the_latent_and_one_key_per_token_and_nothing_else() -> None:
    config = make_config("narrow values", num_layers=3)
    storage = allocate_storage(config, 5, block_size=32, dtype=torch.bfloat16, device=CPU)
    assert isinstance(storage, LatentStorage) and len(storage.layers) == 3
    # Rounded up to 32 channels, the kernels' unit.
    assert all(blocks.latents.numel() == 5 * 32 * 32 and blocks.dim == 20 + 4 for blocks in storage.layers)


def test_the_scale_of_the_first_weights_knows_which_matrices_write_into_the_residual_stream() -> None:
    config = make_config("wide values, query rank", num_layers=8, hidden_size=128)
    layer = Transformer(config).initialize(0).blocks[0].attention
    for name, parameter in layer.named_parameters():
        if parameter.dim() == 2:
            wanted = 0.02 / 4 if name.startswith("o_proj") else 0.02
            assert abs(parameter.std().item() / wanted - 1) < 5 / (2 * parameter.numel()) ** 0.5, name


@pytest.mark.parametrize("shape", ["narrow values", "wide values, query rank"])
def test_trains_under_autocast(shape: str) -> None:
    config = make_config(shape)
    layer, x = make_layer(config), inputs(37)
    rotary = model_rotary(config, torch.arange(37))

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(layer(x, rotary=rotary).float().square().sum(), list(layer.parameters())))

    wanted = gradients()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = gradients()
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == torch.float32 and (mine - theirs).norm() < 0.03 * theirs.norm()
