"""Dense, MoE and residual layers equal the sum of their parts."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from torch import Tensor

from moesaic.config.model import ModelConfig
from moesaic.kernels.reference.moe import activate
from moesaic.model.feed_forward import FeedForward, Mlp


def config_of(moe: dict[str, Any] | None, **values: Any) -> ModelConfig:
    sizes = {"vocab_size": 11, "hidden_size": 24, "num_layers": 1, "num_heads": 2, "intermediate_size": 40}
    return ModelConfig(**{**sizes, **values, "moe": moe})


def randomized(module: torch.nn.Module) -> Any:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    return module


def tokens(num_tokens: int = 37, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(num_tokens, 24, generator=torch.Generator().manual_seed(1)).to(dtype)


def plain_mlp(module: Mlp, x: Tensor) -> Tensor:
    def linear(name: str, rows: Tensor) -> Tensor:
        layer = getattr(module, name)
        return F.linear(rows, layer.weight, layer.bias)

    pre = linear("up_proj", x)
    if module.gate_proj is not None:
        pre = torch.cat([linear("gate_proj", x), pre], -1)
    return linear("down_proj", activate(pre, module.activation))


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu", "swiglu_oai"])
def test_mlp_equals_the_plain_one_with_every_gradient(activation: str, has_bias: bool) -> None:
    module = randomized(Mlp(24, 40, activation=activation, has_bias=has_bias))
    x = tokens().requires_grad_()
    leaves = [x, *module.parameters()]
    out, wanted = module(x), plain_mlp(module, x)
    torch.testing.assert_close(out, wanted)
    got = torch.autograd.grad(out.square().sum(), leaves)
    for mine, theirs in zip(got, torch.autograd.grad(wanted.square().sum(), leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_put_around_a_layer_of_it_has_its_effect() -> None:
    def scaled(rows: Tensor) -> Tensor:
        return 3 * F.linear(rows, module.down_proj.weight)

    x = tokens()
    for name in ("gate_proj", "up_proj", "down_proj"):
        module = randomized(Mlp(24, 40, activation="swiglu", has_bias=False))
        wanted, seen = module(x), []
        hook = getattr(module, name).register_forward_hook(lambda layer, inputs, out, seen=seen: seen.append(out))
        torch.testing.assert_close(module(x), wanted)
        assert len(seen) == 1
        hook.remove()
    module.down_proj.forward = scaled
    torch.testing.assert_close(module(x), 3 * wanted)
    del module.down_proj.forward
    prune.l1_unstructured(module.down_proj, "weight", amount=0.5)
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-5)
    for _ in range(3):
        module(x).square().sum().backward()
        optimizer.step()
    out = module(x)  # which sets down_proj.weight
    torch.testing.assert_close(out, plain_mlp(module, x))
    assert (module.down_proj.weight == 0).sum() == 24 * 40 // 2


def test_a_dense_layer_has_no_statistics() -> None:
    config = config_of(None)
    layer = randomized(FeedForward(config, config.layers[0]))
    out, statistics = layer(tokens())
    assert statistics is None and layer.moe is None
    torch.testing.assert_close(out, plain_mlp(layer.mlp, tokens()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("residual", [None, "sum", "softmax", "sigmoid"])
def test_each_residual_mix(residual: str | None, dtype: torch.dtype) -> None:
    config = config_of({"num_experts": 5, "top_k": 2, "residual": residual}, mlp_bias=True)
    layer = randomized(FeedForward(config, config.layers[0]))
    x = tokens(dtype=dtype)
    out, statistics = layer(x)
    assert statistics is not None
    assert out.dtype == dtype
    routed = layer.moe(x)[0].float()
    wide = x.float()
    if residual is None:
        assert layer.mlp is None and layer.mix is None
        wanted = routed
    elif residual == "sum":
        wanted = plain_mlp(layer.mlp, wide) + routed
    elif residual == "softmax":
        mix = torch.softmax(F.linear(wide, layer.mix.weight, layer.mix.bias), -1)
        wanted = routed * mix[:, :1] + plain_mlp(layer.mlp, wide) * mix[:, 1:]
    else:
        assert layer.mix.bias is None
        wanted = torch.sigmoid(F.linear(wide, layer.mix.weight)) * plain_mlp(layer.mlp, wide) + routed
    # bf16: the MLP's weights and two mixing products are rounded to 2^-9.
    assert (out - wanted).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * wanted.norm()


def test_the_residual_mlp_and_the_experts_have_their_own_widths() -> None:
    moe = {"num_experts": 3, "intermediate_size": 7, "residual": "sum", "residual_intermediate_size": 9}
    config = config_of(moe)
    layer = FeedForward(config, config.layers[0])
    assert layer.mlp is not None and layer.moe is not None
    assert layer.mlp.down_proj.weight.shape == (24, 9)
    assert layer.moe.experts.down_proj.shape == (3, 24, 7)


@pytest.mark.parametrize("capacity", [{}, {"factor": 0.7}])
def test_the_gradient_of_the_output_scale_does_not_depend_on_its_value(capacity: dict[str, Any]) -> None:
    """At sizes that the kernels take; the output is linear in it. At 0 the layer is its residual MLP, bit for bit."""
    moe = {"num_experts": 5, "top_k": 2, "residual": "sum", "output_scale": True, "capacity": capacity}
    config = config_of(moe, hidden_size=64, intermediate_size=96, mlp_bias=True)
    layer = randomized(FeedForward(config, config.layers[0]))
    x = torch.randn(37, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    grads = []
    for value in (0.0, 1.0, -3.0):
        torch.nn.init.constant_(layer.moe.output_scale, value)
        out, _ = layer(x)
        grads.append(torch.autograd.grad(layer.moe(x)[0].float().sum(), layer.moe.output_scale)[0])
        assert torch.equal(out, layer.mlp(x)) == (value == 0.0)
    assert grads[0] != 0 and grads[0] == grads[1] == grads[2]


def test_padding_gets_the_fixed_mlp_alone() -> None:
    config = config_of({"num_experts": 5, "residual": "sum"})
    layer = randomized(FeedForward(config, config.layers[0]))
    x, valid = tokens(), torch.arange(37) < 20
    out, _ = layer(x, valid=valid)
    torch.testing.assert_close(out[20:], plain_mlp(layer.mlp, x[20:]))


class Adapted(torch.nn.Module):
    """A layer, and something beside it."""

    def __init__(self, layer: torch.nn.Module, beside: Tensor) -> None:
        super().__init__()
        self.layer, self.beside = layer, beside

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + x @ self.beside.t()


@pytest.mark.parametrize("activation", ["swiglu", "gelu", "gelu_tanh", "swiglu_oai"])
@pytest.mark.parametrize("name", ["gate_proj", "up_proj", "down_proj"])
def test_an_mlp_calls_what_stands_in_the_place_of_a_layer(name: str, activation: str) -> None:
    plain, x = randomized(Mlp(24, 40, activation=activation, has_bias=True)), tokens()
    layer = getattr(plain, name)
    if layer is None:
        pytest.skip(f"an MLP of {activation} has no {name}")
    before = plain(x)
    beside = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(2)) * 0.1
    setattr(plain, name, Adapted(layer, torch.zeros_like(beside)))
    torch.testing.assert_close(plain(x), before, atol=1e-5, rtol=1e-5)
    setattr(plain, name, Adapted(layer, beside))
    adapted = plain(x)
    assert not torch.allclose(adapted, before, atol=1e-2)
    setattr(plain, name, layer)
    with torch.no_grad():
        layer.weight += beside
    torch.testing.assert_close(plain(x), adapted, atol=1e-5, rtol=1e-5)
