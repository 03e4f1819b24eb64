import math

import pytest
import torch
import torch.nn.functional as F

from moesaic.config.model import ModelConfig
from moesaic.data.loader import Batch
from moesaic.evaluate.validation import validation_loss
from moesaic.model.transformer import Transformer

CPU = torch.device("cpu")
MODEL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_layers": 2,
    "num_heads": 2,
    "intermediate_size": 32,
    "max_positions": 16,
}
# In training this drops nearly everything and is full of noise.
NOISY_MOE = {
    "num_experts": 4,
    "top_k": 2,
    "router": {"noise": "jitter", "jitter_epsilon": 0.5},
    "capacity": {"factor": 0.1, "min_capacity": 1, "drop_policy": "random"},
}


def make_model(**changes: object) -> Transformer:
    return Transformer(ModelConfig.from_dict({**MODEL, **changes})).initialize(0)


def make_batches(*rows: int, with_documents: bool = False) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for count in rows:
        tokens = torch.randint(50, (count, 13), generator=generator)
        documents = (torch.arange(12) // 5).int().expand(count, 12).contiguous() if with_documents else None
        batches.append(Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), documents))
    return batches


@pytest.mark.parametrize("moe", [None, NOISY_MOE], ids=["dense", "moe"])
@pytest.mark.parametrize("with_documents", [False, True])
def test_it_is_the_mean_over_tokens_whatever_the_batches(moe: object, with_documents: bool) -> None:
    model, batches = make_model(moe=moe, dropout=0.5).train(), make_batches(3, 3, 1, with_documents=with_documents)
    loss = validation_loss(model, batches, device=CPU)
    model.eval()
    with torch.no_grad():
        losses = [
            F.cross_entropy(
                model.logits(model(each.inputs, documents=each.documents).hidden).flatten(0, 1),
                each.targets.flatten(),
                reduction="none",
            )
            for each in batches
        ]
    assert loss == pytest.approx(float(torch.cat(losses).mean()), rel=1e-6)


def test_it_neither_drops_nor_draws_and_leaves_no_trace() -> None:
    model, batches = make_model(moe=NOISY_MOE, dropout=0.5).train(), make_batches(2, 2)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = validation_loss(model, batches, device=CPU)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert validation_loss(model, batches, device=CPU) == first
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    dropless = make_model(moe={"num_experts": 4, "top_k": 2})
    assert validation_loss(dropless, batches, device=CPU) == first


@pytest.mark.parametrize("is_training", [True, False])
def test_the_mode_is_put_back_even_after_an_error(is_training: bool) -> None:
    model = make_model().train(is_training)
    validation_loss(model, make_batches(1), device=CPU)
    assert model.training is is_training
    outside = torch.full((1, 4), 50)
    with pytest.raises(IndexError):
        validation_loss(model, [Batch(outside, outside, None)], device=CPU)
    assert model.training is is_training


def test_an_untrained_model_knows_nothing() -> None:
    assert validation_loss(make_model(), make_batches(8), device=CPU) == pytest.approx(math.log(50), abs=0.1)
