"""Stacked experts: names and shapes of their tensors, and each row through its own expert."""

import pytest
import torch

from moesaic.kernels.activation import is_gated
from moesaic.kernels.reference import moe as reference
from moesaic.moe.experts import Experts


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu", "swiglu_oai"])
def test_names_and_shapes(activation: str, has_bias: bool) -> None:
    experts = Experts(24, 40, 5, activation=activation, has_bias=has_bias)
    name, inner = ("gate_up", 80) if is_gated(activation) else ("up", 40)
    wanted = {f"{name}_proj": (5, inner, 24), "down_proj": (5, 24, 40)}
    if has_bias:
        wanted |= {f"{name}_bias": (5, inner), "down_bias": (5, 24)}
    assert {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()} == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "swiglu", "swiglu_oai"])
def test_each_row_goes_through_its_expert_in_its_own_dtype(activation: str, dtype: torch.dtype) -> None:
    experts = Experts(24, 40, 5, activation=activation, has_bias=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    counts = [3, 0, 7, 1, 0]
    rows = torch.randn(11, 24, generator=generator).to(dtype)
    out = experts.sorted_rows(rows, torch.tensor(counts))
    assert out.dtype == dtype
    wanted = reference.grouped_mlp(rows.float(), counts, experts.weights().to(dtype).to(torch.float32))
    assert (out - wanted).norm() < (1e-5 if dtype == torch.float32 else 1.5e-2) * wanted.norm()
    out.sum().backward()
    for parameter in experts.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
