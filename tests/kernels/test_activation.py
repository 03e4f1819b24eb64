"""The MLP with recomputed activation equals the plain one, values and every gradient."""

import pytest
import torch
from torch import Tensor

from moesaic.kernels.activation import ACTIVATIONS, OAI_LIMIT, activate, activate_and_backward, is_gated, mlp
from moesaic.kernels.grouped_mlp import ExpertWeights
from moesaic.kernels.reference import moe as reference

pytestmark = pytest.mark.usefixtures("kernels")


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return draw.to(dtype).requires_grad_()


def relative_error(got: Tensor, wanted: Tensor) -> float:
    return ((got.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_backward_is_the_gradient_of_activate(activation: str) -> None:
    pre = (leaf(7, 10, seed=0).detach().double() * 5).requires_grad_()
    grad = leaf(7, 5 if is_gated(activation) else 10, seed=1).detach().double()
    out = reference.activate(pre, activation)
    (wanted,) = torch.autograd.grad(out, pre, grad)
    torch.testing.assert_close(activate(pre.detach(), activation), out.detach())
    activated, got = activate_and_backward(grad, pre.detach(), activation)
    torch.testing.assert_close(activated, out.detach())
    torch.testing.assert_close(got, wanted)


def test_shapes_and_types_that_do_not_fit_are_refused() -> None:
    pre = torch.ones(5, 8, dtype=torch.bfloat16)
    for wrong in (pre[:, :7], pre[None]):
        with pytest.raises(AssertionError):
            activate(wrong, "swiglu")
    with pytest.raises(AssertionError, match="float32"):
        activate_and_backward(torch.ones(5, 4), pre, "swiglu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activate_leaves_its_input_alone(activation: str) -> None:
    pre = leaf(3, 8, seed=0).detach()
    before = pre.clone()
    activate(pre, activation)
    activate_and_backward(torch.ones(3, 4 if is_gated(activation) else 8), pre, activation)
    assert torch.equal(pre, before)


@pytest.mark.parametrize("num_tokens", [0, 1, 37])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mlp_equals_the_plain_one(activation: str, has_bias: bool, num_tokens: int, dtype: torch.dtype) -> None:
    inner = 80 if is_gated(activation) else 40
    x, up, down = leaf(num_tokens, 24, dtype=dtype, seed=0), leaf(inner, 24, seed=1), leaf(24, 40, seed=2)
    biases = (leaf(inner, seed=3), leaf(24, seed=4)) if has_bias else (None, None)
    if activation == "swiglu_oai":
        # Whole numbers before the activation, of which bf16 changes none, and so none passes a clamp's edge either.
        for tensor in (x, up, biases[0]):
            if tensor is not None:
                tensor.data.round_()
    leaves = [tensor for tensor in (x, up, down, *biases) if tensor is not None]

    def cast(tensor: Tensor | None, to: torch.dtype) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype).to(to)

    out = mlp(x, up.to(dtype), cast(biases[0], dtype), down.to(dtype), cast(biases[1], dtype), activation)
    wide = torch.float64
    stacked = [None if tensor is None else cast(tensor, wide)[None] for tensor in (up, down, *biases)]  # type: ignore[index]
    wanted = reference.mlp(x.to(wide), ExpertWeights(*stacked, activation), 0)  # type: ignore[arg-type]
    assert out.dtype == dtype and out.shape == wanted.shape
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    got = torch.autograd.grad(out, leaves, grad)
    # bf16: a chain of about four roundings of 2^-9 each; fp32: sums of 80 products.
    tolerance = 1e-5 if dtype == torch.float32 else 1.5e-2
    assert relative_error(out, wanted) < tolerance
    for mine, theirs in zip(got, torch.autograd.grad(wanted, leaves, grad.to(wide)), strict=True):
        assert relative_error(mine, theirs) < tolerance


@pytest.mark.parametrize("trained", range(5))
def test_what_is_frozen_has_no_gradient_and_the_others_have_theirs(trained: int) -> None:
    found = []
    for is_alone in (False, True):
        leaves = [leaf(7, 24, seed=0), leaf(80, 24, seed=1), leaf(80, seed=2), leaf(24, 40, seed=3), leaf(24, seed=4)]
        for number, tensor in enumerate(leaves):
            tensor.requires_grad_(number == trained or not is_alone)
        mlp(*leaves, "swiglu").square().sum().backward()
        found.append([tensor.grad for tensor in leaves])
    assert torch.equal(found[1].pop(trained), found[0][trained])
    assert found[1] == [None] * 4


def test_a_gradients_gradient_is_refused() -> None:
    x, up, down = leaf(3, 8, seed=0), leaf(16, 8, seed=1), leaf(8, 16, seed=2)
    with pytest.raises(RuntimeError, match=r"create_graph=True was given, but _Mlp\.backward is once_differentiable"):
        torch.autograd.grad(mlp(x, up, None, down, None, "gelu").sum(), x, create_graph=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("num_rows", "size"), [(0, 8), (1, 1), (3, 40), (37, 71)])
def test_bf16_is_the_definition_rounded_once(kernels: str, activation: str, num_rows: int, size: int) -> None:
    width = 2 * size if is_gated(activation) else size
    pre = (leaf(num_rows, width, seed=0).detach() * 4).to(torch.bfloat16)
    grad = leaf(num_rows, size, seed=1).detach().to(torch.bfloat16)
    exact = pre.double().requires_grad_()
    wanted = reference.activate(exact, activation)
    (wanted_grad,) = torch.autograd.grad(wanted, exact, grad.double())
    activated, grad_pre = activate_and_backward(grad, pre, activation)
    # One rounding to bf16 is 2^-8 at most; PyTorch's operations round gate, product and gradient in turn.
    is_rounded_thrice = activation != "swiglu_oai" and (kernels == "reference" or activation == "gelu")
    tolerance = 2e-2 if is_rounded_thrice else 1.01 * 2**-8
    for got, expected in ((activate(pre, activation), wanted), (activated, wanted), (grad_pre, wanted_grad)):
        torch.testing.assert_close(got.double(), expected.detach(), rtol=tolerance, atol=1e-3 * tolerance)


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu", "swiglu_oai"])
def test_views_and_non_finite_values(compiled_kernels: str, activation: str) -> None:
    pre = leaf(40, 6, dtype=torch.bfloat16, seed=0).detach().t()
    grad = leaf(20 if is_gated(activation) else 40, 6, dtype=torch.bfloat16, seed=1).detach().t()
    for got, wanted in zip(
        activate_and_backward(grad, pre, activation),
        activate_and_backward(grad.contiguous(), pre.contiguous(), activation),
        strict=True,
    ):
        assert torch.equal(got, wanted)
    pre = pre.contiguous()
    pre[1, 2], pre[3, 4], pre[4, 5] = float("nan"), float("inf"), -1e30
    out = activate(pre, activation)
    exact = reference.activate(pre.double(), activation)
    assert torch.equal(out.isnan(), exact.isnan())
    assert torch.equal(out.isinf(), exact.isinf())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_clamp_passes_gradients_up_to_its_bounds_and_nothing_beyond(kernels: str, dtype: torch.dtype) -> None:
    numbers = [-torch.inf, -20.0, -OAI_LIMIT - 0.0625, -OAI_LIMIT, 2.0, OAI_LIMIT, OAI_LIMIT + 0.0625, 20.0, torch.inf]
    other = torch.full((len(numbers), 1), 2.0)
    column = torch.tensor(numbers)[:, None]
    grad = torch.ones(len(numbers), 1, dtype=dtype)
    activated, of_gate = activate_and_backward(grad, torch.cat([column, other], 1).to(dtype), "swiglu_oai")
    assert activated.isnan().flatten().tolist() == [number == -torch.inf for number in numbers]
    assert (of_gate[1:, 0] != 0).tolist() == [number <= OAI_LIMIT for number in numbers[1:]]
    assert (of_gate[1:, 1] != 0).all()
    activated, of_up = activate_and_backward(grad, torch.cat([other, column], 1).to(dtype), "swiglu_oai")
    assert activated.isfinite().all() and (activated[-3:] == activated[-1]).all()
    assert (of_up[:, 1] != 0).tolist() == [abs(number) <= OAI_LIMIT for number in numbers]
    assert torch.equal(activate(torch.cat([other, column], 1).to(dtype), "swiglu_oai"), activated)
    for place in (0, 1):
        pre = torch.full((1, 2), 2.0, dtype=dtype)
        pre[0, place] = torch.nan
        activated, of_nan = activate_and_backward(grad[:1], pre, "swiglu_oai")
        assert activated.isnan().all() and of_nan[0, 0].isnan()


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu", "swiglu_oai"])
def test_the_operators_are_ordinary_ones(compiled_kernels: str, activation: str) -> None:
    pre = leaf(3, 8, dtype=torch.bfloat16, seed=0).detach()
    grad = torch.ones(3, 4 if is_gated(activation) else 8, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.moesaic.activate.default, (pre, activation))
    torch.library.opcheck(torch.ops.moesaic.activate_backward.default, (grad, pre, activation))
