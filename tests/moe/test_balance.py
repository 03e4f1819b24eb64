"""The balance loss is 1 at balance, grows with imbalance, and equals its definition."""

import pytest
import torch

from moesaic.moe.balance import balance_loss


@pytest.mark.parametrize("num_experts", [1, 5, 8])
def test_balanced_counts_or_balanced_probabilities_give_one(num_experts: int) -> None:
    uniform = torch.full((num_experts,), 1 / num_experts)
    uneven = torch.softmax(torch.arange(float(num_experts)), 0)
    equal = torch.full((num_experts,), 7)
    for probabilities, counts in ((uniform, equal), (uneven, equal), (uniform, torch.arange(num_experts) + 1)):
        torch.testing.assert_close(balance_loss(probabilities, counts), torch.tensor(1.0))


def test_all_to_one_gives_the_number_of_experts() -> None:
    assert balance_loss(torch.tensor([0.0, 1.0, 0.0]), torch.tensor([0, 9, 0])) == 3.0


def test_equals_its_definition_and_its_gradient_is_the_shares() -> None:
    probabilities = torch.tensor([0.1, 0.2, 0.7], requires_grad=True)
    counts = torch.tensor([6, 3, 1])
    loss = balance_loss(probabilities, counts)
    torch.testing.assert_close(loss, torch.tensor(3 * (0.1 * 0.6 + 0.2 * 0.3 + 0.7 * 0.1)))
    (grad,) = torch.autograd.grad(loss, probabilities)
    torch.testing.assert_close(grad, 3 * torch.tensor([0.6, 0.3, 0.1]))


def test_no_tokens_no_loss() -> None:
    assert balance_loss(torch.zeros(4), torch.zeros(4, dtype=torch.int64)) == 0.0
