"""The attention layer equals its definition, with and without QK-norm, biases, groups, rotary positions and a cache."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.config.model import ModelConfig
from moesaic.model.attention import Attention
from moesaic.model.kv_cache import BatchCache
from moesaic.model.rotary import rotary_table, rotate

CPU = torch.device("cpu")


def make_attention(**values: Any) -> Attention:
    sizes = {"vocab_size": 11, "hidden_size": 24, "num_layers": 1, "num_heads": 4, "head_dim": 8}
    layer = Attention(ModelConfig(**{**sizes, **values}))
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.3, generator=generator)
    return layer


def plain(layer: Attention, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
    batch, length, _ = x.shape

    def heads(name: str) -> Tensor:
        projection = getattr(layer, name)
        return F.linear(x, projection.weight, projection.bias).view(batch, length, -1, layer.head_dim)

    query, key, value = heads("q_proj"), heads("k_proj"), heads("v_proj")
    if rotary is not None and layer.norms_rotated:
        query, key = rotate(query, *rotary), rotate(key, *rotary)
    if layer.q_norm is not None and layer.k_norm is not None:
        size = layer.q_norm.weight.shape[0]
        if size != layer.head_dim:
            query, key = query.flatten(2), key.flatten(2)
        query = F.rms_norm(query, (size,), layer.q_norm.weight, layer.q_norm.epsilon)
        key = F.rms_norm(key, key.shape[-1:], layer.k_norm.weight, layer.k_norm.epsilon)
        query, key = query.view(batch, length, -1, layer.head_dim), key.view(batch, length, -1, layer.head_dim)
    if rotary is not None and not layer.norms_rotated:
        query, key = rotate(query, *rotary), rotate(key, *rotary)
    group = layer.num_heads // layer.num_kv_heads
    key, value = key.repeat_interleave(group, 2), value.repeat_interleave(group, 2)
    scores = torch.einsum("bqad,bkad->baqk", query, key) * (layer.scale or layer.head_dim**-0.5)
    scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), float("-inf"))
    out = torch.einsum("baqk,bkad->bqad", scores.softmax(-1), value).reshape(batch, length, -1)
    return F.linear(out, layer.o_proj.weight, layer.o_proj.bias)


@pytest.mark.parametrize("length", [1, 2, 37])
@pytest.mark.parametrize(
    ("num_kv_heads", "bias", "positions", "qk_norm", "scale"),
    [
        *(
            (*sizes, *norm)
            for sizes in ((4, "all", "learned"), (2, "qkv", "rotary"), (1, "none", "rotary"))
            for norm in (("none", None), ("head", 0.9), ("full", None))
        ),
        (2, "qkv", "rotary", "rotated_head", None),
        (1, "none", "rotary", "rotated_head", 0.9),
    ],
)
def test_equals_its_definition(
    num_kv_heads: int, bias: str, positions: str, qk_norm: str, scale: float | None, length: int
) -> None:
    layer = make_attention(
        num_kv_heads=num_kv_heads, attention_bias=bias, positions=positions, qk_norm=qk_norm, attention_scale=scale
    )
    x = torch.randn(2, length, 24, generator=torch.Generator().manual_seed(1)).requires_grad_()
    rotary = rotary_table(length, 8, 10_000.0, CPU) if positions == "rotary" else None
    out, wanted = layer(x, rotary=rotary), plain(layer, x, rotary)
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad(out.square().sum(), leaves)
    for mine, theirs in zip(got, torch.autograd.grad(wanted.square().sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_a_layer_whose_heads_are_not_turned_takes_no_tables() -> None:
    layer = make_attention(num_layers=2, rope_layers=[1])
    x, rotary = torch.randn(2, 37, 24, generator=torch.Generator().manual_seed(1)), rotary_table(37, 8, 10_000.0, CPU)
    torch.testing.assert_close(layer(x, rotary=rotary), plain(layer, x, None), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("bias", "with_bias"), [("none", ""), ("qkv", "qkv"), ("all", "qkvo")])
def test_which_projections_have_a_bias(bias: str, with_bias: str) -> None:
    layer = make_attention(attention_bias=bias)
    assert "".join(name for name in "qkvo" if getattr(layer, f"{name}_proj").bias is not None) == with_bias


@pytest.mark.parametrize(("qk_norm", "scale"), [("head", None), ("full", 0.9), ("rotated_head", None)])
@pytest.mark.parametrize("pieces", [[37], [36, 1], [1] * 37, [5, 20, 1, 11]])
def test_cached_equals_uncached(pieces: list[int], qk_norm: str, scale: float | None) -> None:
    layer = make_attention(num_kv_heads=2, qk_norm=qk_norm, attention_scale=scale)
    x = torch.randn(2, 37, 24, generator=torch.Generator().manual_seed(1))
    cosines, sines = rotary_table(37, 8, 10_000.0, CPU)
    config = ModelConfig(vocab_size=11, hidden_size=24, num_layers=1, num_heads=4, head_dim=8, num_kv_heads=2)
    cache = BatchCache(config, 2, 37, dtype=torch.float32, device=CPU)
    outputs, start = [], 0
    with torch.no_grad():
        for piece in x.split(pieces, 1):
            end = start + piece.shape[1]
            places = torch.arange(start, end).repeat(2)  # of both sequences, end to end
            flat, step = piece.reshape(1, -1, 24), cache.extend(2, piece.shape[1])
            outputs.append(layer(flat, rotary=(cosines[places], sines[places]), cache=step).view_as(piece))
            start = end
        torch.testing.assert_close(torch.cat(outputs, 1), layer(x, rotary=(cosines, sines)), rtol=1e-4, atol=1e-5)
