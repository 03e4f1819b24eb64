import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.config.model import ModelConfig
from moesaic.data.loader import Batch
from moesaic.errors import ConfigError
from moesaic.model.transformer import Transformer
from moesaic.moe.balance import balance_loss
from moesaic.train.loss import Losses, language_model_loss

VOCAB_SIZE = 50


def make_model(**router: object) -> Transformer:
    values = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 16,
        "num_layers": 2,
        "num_heads": 2,
        "intermediate_size": 32,
        "max_positions": 16,
        "moe": {"num_experts": [4, 8], "top_k": 2, "router": router},
    }
    return Transformer(ModelConfig.from_dict(values)).initialize(0)


def make_batch(rows: int = 3, seed: int = 0) -> Batch:
    tokens = torch.randint(VOCAB_SIZE, (rows, 13), generator=torch.Generator().manual_seed(seed))
    return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


def test_the_total_is_the_cross_entropy_and_each_layers_losses_times_their_coefficients() -> None:
    model, batch = make_model(balance_loss=0.02, z_loss=0.003), make_batch()
    losses = language_model_loss(model, batch, seed=0)
    output = model(batch.inputs, seed=0)
    expected = F.cross_entropy(model.logits(output.hidden).flatten(0, 1), batch.targets.flatten())
    torch.testing.assert_close(losses.cross_entropy, expected)
    balances = [balance_loss(each.mean_probabilities, each.tokens_per_expert) for each in output.moe]
    assert len(balances) == 2
    torch.testing.assert_close(losses.balance, sum(balances))
    torch.testing.assert_close(losses.z, sum(each.z for each in output.moe))
    torch.testing.assert_close(losses.total, expected + 0.02 * losses.balance + 0.003 * losses.z)
    assert not losses.balance.requires_grad and losses.total.requires_grad
    assert not any(each.z.requires_grad or each.mean_probabilities.requires_grad for each in losses.moe)


def test_targets_of_another_kind_are_refused() -> None:
    model, batch = make_model(), make_batch()
    for targets in (batch.targets.int(), batch.targets[:, :-1], batch.targets[:2]):
        with pytest.raises(ConfigError, match="one int64 id for each input is required"):
            language_model_loss(model, Batch(batch.inputs, targets, None), seed=0)


def test_a_loss_without_coefficient_is_reported_and_leaves_no_gradient() -> None:
    model, batch = make_model(balance_loss=0.0), make_batch()
    losses = language_model_loss(model, batch, seed=0)
    assert float(losses.balance) > 0 and float(losses.z) > 0
    assert torch.equal(losses.total.detach(), losses.cross_entropy)


def test_global_batch_balance_counts_the_micro_batches_so_far() -> None:
    def second_of_two(scope: str) -> tuple[Losses, Losses]:
        model = make_model(balance_scope=scope)
        first = language_model_loss(model, make_batch(seed=1), seed=0)

        def batch_counts(own: list[Tensor]) -> list[Tensor]:
            return [each.tokens_per_expert + counts for each, counts in zip(first.moe, own, strict=True)]

        return first, language_model_loss(model, make_batch(seed=2), seed=1, batch_counts=batch_counts)

    for scope in ("batch", "global_batch"):
        first, second = second_of_two(scope)
        expected = torch.zeros(())
        for before, now in zip(first.moe, second.moe, strict=True):
            counts = now.tokens_per_expert + (before.tokens_per_expert if scope == "global_batch" else 0)
            expected += balance_loss(now.mean_probabilities, counts).detach()
        torch.testing.assert_close(second.balance, expected)


@pytest.mark.parametrize("has_documents", [True, False])
def test_documents_keep_attention_apart(has_documents: bool) -> None:
    """The loss of a second document depends on the first one exactly when there is no mask."""
    model = make_model(balance_loss=0.0)
    documents = torch.tensor([[0] * 5 + [1] * 7], dtype=torch.int32) if has_documents else None

    def loss(seed: int) -> torch.Tensor:
        tokens = make_batch(1, seed=3).inputs.clone()
        tokens[:, :5] = make_batch(1, seed=seed).inputs[:, :5]
        targets = make_batch(1, seed=3).targets.clone()
        targets[:, :5] = -100
        return language_model_loss(model, Batch(tokens, targets, documents), seed=0).cross_entropy

    a, b = loss(4), loss(5)
    assert bool(torch.isclose(a, b, rtol=1e-6)) == has_documents
