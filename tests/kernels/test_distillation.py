"""A block's cross-entropy, forward KL and their gradient equal autograd's of their definitions."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels.distillation import teach

pytestmark = pytest.mark.usefixtures("kernels")


def normal(*shape: int, seed: int) -> Tensor:
    return 3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def definition(logits: Tensor, teacher: Tensor, targets: Tensor, alpha: float, temperature: float) -> list[Tensor]:
    """Cross-entropy (t,), KL (t,), gradient (t, V), in double."""
    logits = logits.double().requires_grad_()
    losses = F.cross_entropy(logits, targets, reduction="none")
    log_p, log_q = (torch.log_softmax(each / temperature, -1) for each in (teacher.double(), logits))
    distances = (log_p.exp() * (log_p - log_q)).sum(-1).masked_fill(targets == -100, 0.0)
    (gradient,) = torch.autograd.grad((losses + alpha * temperature**2 * distances).sum(), logits)
    return [losses.detach(), distances.detach(), gradient]


@pytest.mark.parametrize(("num_tokens", "vocab_size"), [(1, 1), (3, 2), (7, 33), (9, 101), (5, 4096)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_definition(num_tokens: int, vocab_size: int, temperature: float, dtype: torch.dtype) -> None:
    logits = normal(num_tokens, vocab_size, seed=0).to(dtype)
    teacher = normal(num_tokens, vocab_size, seed=1).float()
    targets = torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(2))
    targets[2::3] = -100
    wanted = definition(logits, teacher, targets, 0.7, temperature)
    losses, distances = teach(logits, teacher, targets, alpha=0.7, temperature=temperature)
    torch.testing.assert_close(losses.double(), wanted[0], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(distances.double(), wanted[1], rtol=1e-5, atol=2e-5)
    # The gradient is computed in fp32 and rounded once.
    tolerance = 1e-5 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(logits.double(), wanted[2], rtol=tolerance, atol=1e-6)
    assert not logits[targets == -100].any()


def test_where_the_target_is_nearly_certain_the_gradient_is_not_lost() -> None:
    logits, teacher = torch.zeros(2, 40), torch.zeros(2, 40)
    logits[:, 3] = 30.0
    teacher[1, 5] = 90.0
    wanted = definition(logits, teacher, torch.tensor([3, 3]), 1.0, 1.0)
    losses, distances = teach(logits, teacher, torch.tensor([3, 3]), alpha=1.0, temperature=1.0)
    torch.testing.assert_close(distances.double(), wanted[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), wanted[2], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(losses.double(), wanted[0], rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_comes_out_and_stays_in_its_token(side: str, bad: float) -> None:
    logits, teacher = normal(3, 50, seed=0).float(), normal(3, 50, seed=1).float()
    (logits if side == "student" else teacher)[1, 7] = bad
    _, distances = teach(logits, teacher, torch.tensor([1, 2, 3]), alpha=1.0, temperature=1.0)
    assert distances.isfinite().tolist() == [True, False, True]
    assert logits.isfinite().all(-1).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_teacher_and_targets_of_any_strides(dtype: torch.dtype) -> None:
    logits, teacher = normal(7, 33, seed=0).to(dtype), normal(7, 33, seed=1).float()
    targets = torch.arange(7)
    results = []
    for side, classes in (
        (teacher, targets),
        (teacher.t().contiguous().t(), torch.stack([targets, targets + 9], -1)[:, 0]),
        (torch.stack([teacher, -teacher], -1)[..., 0], targets.repeat_interleave(2)[::2]),
    ):
        student = logits.clone()
        results.append([*teach(student, side, classes, alpha=0.7, temperature=2.5), student])
    for others in results[1:]:
        for mine, wanted in zip(others, results[0], strict=True):
            torch.testing.assert_close(mine, wanted, rtol=1e-6, atol=1e-6)


def test_logits_whose_rows_are_not_contiguous_are_refused() -> None:
    """Their gradient takes their place, row by row."""
    with pytest.raises(AssertionError, match=r"\(1, 2\)"):
        teach(torch.zeros(5, 2).t(), torch.zeros(2, 5), torch.tensor([1, 2]), alpha=1.0, temperature=1.0)


def test_a_target_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises((IndexError, RuntimeError), match=r"outside the vocabulary|out of bounds"):
        teach(torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([1, 5]), alpha=1.0, temperature=1.0)


def test_targets_of_another_length_are_refused() -> None:
    with pytest.raises(AssertionError):
        teach(torch.zeros(2, 5), torch.zeros(2, 5), torch.tensor([1]), alpha=1.0, temperature=1.0)
