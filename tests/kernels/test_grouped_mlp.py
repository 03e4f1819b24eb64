"""Every expert's MLP on its run of rows equals the loop over experts, values and every gradient."""

import pytest
import torch
from torch import Tensor

from moesaic.kernels import grouped_mlp as kernel
from moesaic.kernels.activation import ACTIVATIONS, is_gated, mlp
from moesaic.kernels.grouped_mlp import ExpertWeights, grouped_mlp
from moesaic.kernels.reference import moe as reference

COUNTS = {
    "odd": [7, 0, 13, 16, 1],
    "one token": [0, 0, 1, 0, 0],
    "all to one": [0, 37, 0, 0, 0],
    "none": [0, 0, 0, 0, 0],
    "empty ends": [0, 20, 17, 0, 0],
}


def leaf(*shape: int, seed: int, is_whole: bool = False) -> Tensor:
    """is_whole: as is all that comes before swiglu_oai: bf16 changes no such number, and none passes a clamp's edge."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (drawn.round() if is_whole else drawn).requires_grad_()


def weights_of(activation: str, has_bias: bool, hidden: int = 24, inner: int = 40, experts: int = 5) -> ExpertWeights:
    outer = 2 * inner if is_gated(activation) else inner
    is_whole = activation == "swiglu_oai"
    return ExpertWeights(
        leaf(experts, outer, hidden, seed=1, is_whole=is_whole),
        leaf(experts, hidden, inner, seed=2),
        leaf(experts, outer, seed=3, is_whole=is_whole) if has_bias else None,
        leaf(experts, hidden, seed=4) if has_bias else None,
        activation,
    )


def leaves_of(weights: ExpertWeights) -> list[Tensor]:
    tensors = (weights.up, weights.down, weights.up_bias, weights.down_bias)
    return [tensor for tensor in tensors if tensor is not None]


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


def compare(function, counts: list[int], weights: ExpertWeights, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    x = leaf(sum(counts), weights.down.shape[1], seed=0, is_whole=weights.activation == "swiglu_oai")
    leaves = [x, *leaves_of(weights)]
    out = function(x.to(dtype), torch.tensor(counts), weights.to(dtype))
    wanted = reference.grouped_mlp(x.to(dtype).double(), counts, weights.to(dtype).to(torch.float64))
    assert out.dtype == dtype and out.shape == wanted.shape
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    got = torch.autograd.grad(out, leaves, grad)
    # bf16: a chain of about four roundings of 2^-9 each; fp32: sums of 80 products.
    tolerance = 1e-5 if dtype == torch.float32 else 1.5e-2
    assert relative_error(out, wanted) < tolerance
    for mine, theirs in zip(got, torch.autograd.grad(wanted, leaves, grad.double()), strict=True):
        assert relative_error(mine, theirs) < tolerance


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_loop_over_experts(activation: str, has_bias: bool, counts: str, dtype: torch.dtype) -> None:
    compare(grouped_mlp, COUNTS[counts], weights_of(activation, has_bias), dtype)


@pytest.mark.parametrize("counts", ["odd", "all to one", "empty ends"])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_grouped_product_equals_the_loop_over_experts(activation: str, has_bias: bool, counts: str) -> None:
    """What CUDA runs, on PyTorch's CPU version of the same operation."""
    compare(kernel._grouped_mlp_cuda, COUNTS[counts], weights_of(activation, has_bias), torch.bfloat16)


@pytest.mark.parametrize("panel_rows", [1, 8, 20])
@pytest.mark.parametrize("counts", ["odd", "empty ends"])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_any_number_of_rows_a_panel(
    activation: str, counts: str, panel_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "_PANEL_ROWS", panel_rows)
    compare(grouped_mlp, COUNTS[counts], weights_of(activation, has_bias=True), torch.float32)


def test_an_expert_without_rows_has_a_gradient_of_exact_zeros() -> None:
    weights = weights_of("swiglu", has_bias=True)
    x = leaf(37, 24, seed=0)
    out = grouped_mlp(x, torch.tensor(COUNTS["odd"]), weights)
    for grad in torch.autograd.grad(out.sum(), leaves_of(weights)):
        assert torch.count_nonzero(grad[1]) == 0
        assert torch.count_nonzero(grad[0]) > 0


def test_non_contiguous_rows_and_gradients() -> None:
    weights = weights_of("gelu", has_bias=True)
    counts = torch.tensor(COUNTS["odd"])
    x = leaf(24, 37, seed=0)
    grad = leaf(24, 37, seed=1).detach().t()
    (got,) = torch.autograd.grad(grouped_mlp(x.t(), counts, weights), x, grad)
    contiguous = x.t().detach().contiguous().requires_grad_()
    (wanted,) = torch.autograd.grad(grouped_mlp(contiguous, counts, weights), contiguous, grad.contiguous())
    assert torch.equal(got, wanted.t())


def test_frozen_rows_need_no_gradient() -> None:
    weights = weights_of("gelu", has_bias=False)
    x = leaf(37, 24, seed=0).detach()
    out = grouped_mlp(x, torch.tensor(COUNTS["odd"]), weights)
    out.sum().backward()
    assert weights.up.grad is not None and weights.down.grad is not None


@pytest.mark.parametrize("trained", ["x", "up", "down", "up_bias", "down_bias"])
def test_what_is_frozen_has_no_gradient_and_the_others_have_theirs(trained: str) -> None:
    found = []
    for is_alone in (False, True):
        weights = weights_of("swiglu", has_bias=True)
        leaves = {"x": leaf(37, 24, seed=0), "up": weights.up, "down": weights.down}
        leaves |= {name: getattr(weights, name) for name in ("up_bias", "down_bias")}
        for name, tensor in leaves.items():
            tensor.requires_grad_(name == trained or not is_alone)
        grouped_mlp(leaves["x"], torch.tensor(COUNTS["odd"]), weights).square().sum().backward()
        found.append({name: tensor.grad for name, tensor in leaves.items()})
    assert torch.equal(found[1].pop(trained), found[0][trained])
    assert set(found[1].values()) == {None}


def test_shapes_and_dtypes_are_checked_at_the_door() -> None:
    weights = weights_of("gelu", has_bias=False)
    with pytest.raises(AssertionError):
        grouped_mlp(torch.zeros(4, 23), torch.tensor([4, 0, 0, 0, 0]), weights)
    with pytest.raises(AssertionError):
        grouped_mlp(torch.zeros(4, 24), torch.tensor([4, 0]), weights)
    with pytest.raises(AssertionError):
        grouped_mlp(torch.zeros(4, 24), torch.tensor([3, 0, 0, 0, 0]), weights)
    with pytest.raises(AssertionError):
        grouped_mlp(torch.zeros(4, 24, dtype=torch.bfloat16), torch.tensor([4, 0, 0, 0, 0]), weights)


def test_a_gradients_gradient_is_refused() -> None:
    counts, weights = COUNTS["odd"], weights_of("swiglu", True)
    x = leaf(sum(counts), 24, seed=0)
    with pytest.raises(RuntimeError, match=r"_GroupedMlp\.backward is once_differentiable"):
        torch.autograd.grad(grouped_mlp(x, torch.tensor(counts), weights).sum(), x, create_graph=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autocast_to_fp16_computes_in_fp16(activation: str) -> None:
    """Experts and MLPs, of fp32 and of bf16 operands; sizes that the C++ kernels would take too."""
    counts, weights = [7, 0, 25], weights_of(activation, True, hidden=32, inner=32, experts=3)
    x = leaf(32, 32, seed=0, is_whole=activation == "swiglu_oai")
    wanted = reference.grouped_mlp(x, counts, weights)
    grads = torch.autograd.grad(wanted.sum(), [x, *leaves_of(weights)])
    with torch.autocast("cpu", torch.float16):
        out = grouped_mlp(x, torch.tensor(counts), weights)
        up, down, up_bias, down_bias = (each[0] for each in leaves_of(weights))
        single = mlp(x, up, up_bias, down, down_bias, activation)
        narrow = grouped_mlp(x.bfloat16(), torch.tensor(counts), weights.to(torch.bfloat16))
    assert out.dtype == single.dtype == narrow.dtype == torch.float16
    # A chain of about four roundings of 2^-12 each, which bf16's of 2^-9 would not keep.
    assert relative_error(out, wanted) < 1e-3 and relative_error(single[:7], wanted[:7]) < 1e-3
    for mine, theirs in zip(torch.autograd.grad(out.sum(), [x, *leaves_of(weights)]), grads, strict=True):
        assert mine.dtype == torch.float32 and relative_error(mine, theirs) < 2e-3
