"""The distillation loss equals its plain definition: values, and the gradients of hidden states and output matrix."""

import math

import pytest
import torch
from torch import Tensor

from moesaic.config.distill import Divergence
from moesaic.distill import loss as module
from moesaic.distill.loss import (
    TeacherLogits,
    TeacherTopK,
    distillation_loss,
    divergence_of,
    reference_bucket_divergence,
    reference_loss,
)
from moesaic.kernels.cross_entropy import linear_cross_entropy

DIVERGENCES: tuple[Divergence, ...] = ("forward_kl", "reverse_kl", "jsd")
# tokens, hidden size, vocabulary: one token, sizes that no chunk divides, a vocabulary of two
SIZES = [(1, 3, 5), (7, 16, 33), (50, 8, 101), (3, 4, 2)]


def draw(
    num_tokens: int, hidden_size: int, vocab_size: int, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output matrix, targets (every fifth ignored), teacher logits."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_tokens, hidden_size, generator=random).to(dtype)
    weight = torch.randn(vocab_size, hidden_size, generator=random).to(dtype)
    targets = torch.randint(vocab_size, (num_tokens,), generator=random)
    targets[4::5] = -100
    return hidden, weight, targets, 3 * torch.randn(num_tokens, vocab_size, generator=random)


def gradients(total: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(total, of)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(module, "_MIN_CHUNK_TOKENS", 3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("sizes", SIZES)
def test_values_and_gradients_equal_the_definition(
    small_chunks: None, divergence: Divergence, temperature: float, sizes: tuple[int, int, int]
) -> None:
    hidden, weight, targets, teacher = draw(*sizes)
    options = {"alpha": 0.7, "temperature": temperature, "divergence": divergence}
    hidden.requires_grad_(), weight.requires_grad_()
    loss = distillation_loss(hidden, weight, targets, TeacherLogits(lambda a, b: teacher[a:b]), **options)
    expected = reference_loss(hidden @ weight.t(), teacher, targets, **options)
    for name in ("total", "cross_entropy", "divergence"):
        torch.testing.assert_close(getattr(loss, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    # Scaled, as a micro-batch's loss is.
    own = gradients(loss.total / 3, hidden, weight)
    for gradient, wanted in zip(own, gradients(expected.total / 3, hidden, weight), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_bf16_is_as_near_as_bf16_products_are(divergence: Divergence) -> None:
    hidden, weight, targets, teacher = draw(60, 32, 97, dtype=torch.bfloat16)
    hidden.div_(6)
    options = {"alpha": 1.0, "temperature": 1.5, "divergence": divergence}
    hidden.requires_grad_(), weight.requires_grad_()
    loss = distillation_loss(hidden, weight, targets, TeacherLogits(lambda a, b: teacher[a:b]), **options)
    exact = hidden.detach().float().requires_grad_(), weight.detach().float().requires_grad_()
    expected = reference_loss(exact[0] @ exact[1].t(), teacher, targets, **options)
    torch.testing.assert_close(loss.total, expected.total, rtol=1e-2, atol=1e-2)
    own = gradients(loss.total, hidden, weight)
    for gradient, wanted in zip(own, gradients(expected.total, *exact), strict=True):
        assert gradient.dtype == torch.bfloat16
        # Eight bits of mantissa in logits, their gradient and the result.
        torch.testing.assert_close(gradient.float(), wanted, rtol=3e-2, atol=1e-2 * float(wanted.abs().max()))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operands_of_any_strides(small_chunks: None, dtype: torch.dtype, divergence: Divergence) -> None:
    hidden, weight, targets, teacher = draw(7, 16, 33, dtype=dtype)
    turned = [tensor.t().contiguous().t() for tensor in (hidden, weight, teacher)]

    def results(own: Tensor, output: Tensor, classes: Tensor, taught: Tensor) -> list[Tensor]:
        teachers = TeacherLogits(lambda a, b: taught[a:b])
        own.requires_grad_(), output.requires_grad_()
        loss = distillation_loss(own, output, classes, teachers, alpha=0.7, temperature=2.5, divergence=divergence)
        return [loss.total, loss.divergence, *gradients(loss.total, own, output)]

    strided_targets = torch.stack([targets, 1 - targets], -1)[:, 0]
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, wanted in zip(
        results(*turned[:2], strided_targets, turned[2]), results(hidden, weight, targets, teacher), strict=True
    ):
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance)


def test_the_cross_entropy_is_the_trainers() -> None:
    hidden, weight, targets, teacher = draw(50, 8, 101)
    loss = distillation_loss(
        hidden, weight, targets, TeacherLogits(lambda a, b: teacher[a:b]), alpha=1.0, temperature=1.0,
        divergence="forward_kl",
    )  # fmt: skip
    torch.testing.assert_close(loss.cross_entropy, linear_cross_entropy(hidden, weight, targets))


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_equal_models_have_no_divergence_and_only_the_cross_entropys_gradient(divergence: Divergence) -> None:
    hidden, weight, targets, _ = draw(20, 8, 31)
    hidden.requires_grad_()
    teacher = TeacherLogits(lambda a, b: (hidden @ weight.t()).detach()[a:b])
    loss = distillation_loss(hidden, weight, targets, teacher, alpha=5.0, temperature=2.0, divergence=divergence)
    assert float(loss.divergence) == pytest.approx(0.0, abs=1e-5)
    (own,) = gradients(loss.total, hidden)
    (wanted,) = gradients(linear_cross_entropy(hidden, weight, targets), hidden)
    torch.testing.assert_close(own, wanted, rtol=1e-4, atol=1e-5)


def test_a_gradients_gradient_is_refused() -> None:
    hidden, weight, targets, teacher = draw(5, 8, 16)
    teachers = TeacherLogits(lambda a, b: teacher[a:b])
    loss = distillation_loss(
        hidden.requires_grad_(), weight, targets, teachers, alpha=1.0, temperature=1.0, divergence="forward_kl"
    )
    with pytest.raises(RuntimeError, match=r"_Distillation\.backward is once_differentiable"):
        torch.autograd.grad(loss.total, hidden, create_graph=True)


def test_torch_compile_leaves_it_alone() -> None:
    hidden, weight, targets, teacher = draw(5, 8, 16)

    def total(hidden: Tensor) -> Tensor:
        teachers = TeacherLogits(lambda a, b: teacher[a:b])
        loss = distillation_loss(
            hidden * 2, weight, targets, teachers, alpha=1.0, temperature=2.0, divergence="forward_kl"
        )
        return loss.total * 2

    hidden.requires_grad_()
    compiled = torch.compile(total, backend="aot_eager")
    assert torch.equal(*(gradients(each(hidden), hidden)[0] for each in (compiled, total)))
    torch.compiler.reset()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_autocast_sees_to_the_dtype(divergence: Divergence) -> None:
    hidden, weight, targets, teacher = draw(6, 32, 64)
    options = {"alpha": 1.0, "temperature": 1.0, "divergence": divergence}
    teachers = TeacherLogits(lambda a, b: teacher[a:b])
    expected = distillation_loss(hidden.bfloat16(), weight.bfloat16(), targets, teachers, **options)
    hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distillation_loss(hidden, weight, targets, teachers, **options)
    assert torch.equal(loss.total.detach(), expected.total)
    assert all(each.dtype is torch.float32 for each in gradients(loss.total, hidden, weight))


def test_a_mean_divides_bf16_gradients_by_the_number_of_tokens_itself() -> None:
    """1/37 rounded to bf16 is 0.1 % more: every gradient was."""
    hidden, weight, targets, teacher = draw(37, 32, 64, dtype=torch.bfloat16)
    targets = targets.clamp_min(0)

    def gradient_of(factor: float) -> Tensor:
        loss = distillation_loss(
            hidden.requires_grad_(), weight, targets, TeacherLogits(lambda a, b: teacher[a:b]), alpha=1.0,
            temperature=1.0, divergence="forward_kl",
        ).total  # fmt: skip
        return gradients(loss * factor, hidden)[0].double()

    total, mean = gradient_of(37.0), gradient_of(1.0)
    assert (mean.norm() * 37 / total.norm()).item() == pytest.approx(1.0, abs=2e-4)


def test_nothing_to_predict_is_no_loss_and_no_gradient() -> None:
    hidden, weight, targets, teacher = draw(4, 8, 11)
    targets.fill_(-100)
    hidden.requires_grad_()
    loss = distillation_loss(
        hidden, weight, targets, TeacherLogits(lambda a, b: teacher[a:b]), alpha=1.0, temperature=1.0, divergence="jsd"
    )
    assert loss.total.item() == 0.0
    assert not gradients(loss.total, hidden)[0].any()


def top_k(teacher: Tensor, k: int, temperature: float) -> TeacherTopK:
    log_p = torch.log_softmax(teacher / temperature, -1)
    values, ids = log_p.topk(k, -1)
    rest = torch.logsumexp(log_p.scatter(1, ids, -math.inf), -1, keepdim=True)
    return TeacherTopK(ids, torch.cat([values, rest], -1))


@pytest.mark.parametrize("k", [1, 4, 32])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_of_the_likeliest_tokens_values_and_gradients_equal_the_definition(
    small_chunks: None, k: int, temperature: float
) -> None:
    hidden, weight, targets, teacher = draw(11, 6, 33)
    cached = top_k(teacher, k, temperature)
    hidden.requires_grad_(), weight.requires_grad_()
    loss = distillation_loss(
        hidden, weight, targets, cached, alpha=0.7, temperature=temperature, divergence="forward_kl"
    )
    logits = hidden @ weight.t()
    kept = targets != -100
    distance = reference_bucket_divergence(cached, torch.log_softmax(logits / temperature, -1))[kept].mean()
    expected = linear_cross_entropy(hidden, weight, targets) + 0.7 * temperature**2 * distance
    torch.testing.assert_close(loss.divergence, distance.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loss.total, expected, rtol=1e-5, atol=1e-5)
    own = gradients(loss.total, hidden, weight)
    for gradient, wanted in zip(own, gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_with_all_tokens_nothing_is_lost() -> None:
    hidden, weight, targets, teacher = draw(11, 6, 33)
    hidden.requires_grad_()
    whole = distillation_loss(
        hidden, weight, targets, TeacherLogits(lambda a, b: teacher[a:b]), alpha=1.0, temperature=2.0,
        divergence="forward_kl",
    )  # fmt: skip
    cached = distillation_loss(
        hidden, weight, targets, top_k(teacher, 33, 2.0), alpha=1.0, temperature=2.0, divergence="forward_kl"
    )
    torch.testing.assert_close(cached.total, whole.total, rtol=1e-6, atol=1e-6)
    own, wanted = gradients(cached.total, hidden), gradients(whole.total, hidden)
    torch.testing.assert_close(own, wanted, rtol=1e-5, atol=1e-6)


def test_the_bucket_hides_the_divergence_inside_it_and_no_more() -> None:
    """live - cached = rest * KL(teacher's rest || student's rest), which is never negative."""
    _, _, _, teacher = draw(9, 6, 33)
    log_q = torch.log_softmax(torch.randn(9, 33, generator=torch.Generator().manual_seed(5)), -1)
    log_p = torch.log_softmax(teacher, -1)
    cached = top_k(teacher, 5, 1.0)
    hidden_part = divergence_of(log_p, log_q, "forward_kl") - reference_bucket_divergence(cached, log_q)
    inside_p = torch.log_softmax(log_p.scatter(1, cached.ids, -1e9), -1)
    inside_q = torch.log_softmax(log_q.scatter(1, cached.ids, -1e9), -1)
    expected = cached.log_probs[:, -1].exp() * divergence_of(inside_p, inside_q, "forward_kl")
    torch.testing.assert_close(hidden_part, expected, rtol=1e-4, atol=1e-5)
    assert (hidden_part > 0).all()
