"""Sequences packed into one row, as collators of transformers and TRL send them, are computed as each by itself."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from moesaic.errors import ConfigError, GenerationError
from moesaic.hf import MoesaicForCausalLM

Make = Callable[..., MoesaicForCausalLM]


def pack(prompts: list[list[int]]) -> dict[str, Any]:
    """Everything that the collator can send, labels included."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    return dict(collate([{"input_ids": prompt} for prompt in prompts], return_tensors="pt"))


def gradients_of(model: MoesaicForCausalLM) -> dict[str, Tensor]:
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return gradients


def test_packed_sequences_give_the_logits_of_each_alone(make: Make, kind: str, prompts: list[list[int]]) -> None:
    model, batch = make(kind), pack(prompts * 2)
    assert batch["input_ids"].shape[1] > model.config.max_position_embeddings  # each counts its own
    with torch.no_grad():
        logits = model(**batch).logits[0]
        hidden = model.base_model(**{name: each for name, each in batch.items() if name != "labels"})
        alone = [model(torch.tensor([prompt]), use_cache=False).logits[0] for prompt in prompts]
    torch.testing.assert_close(logits, torch.cat(alone * 2), atol=2e-5, rtol=2e-5)
    assert torch.equal(model.model.logits(hidden.last_hidden_state)[0], logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_training_equals_the_sequences_side_by_side(
    make: Make, kind: str, checkpointing: bool, prompts: list[list[int]], pad: Callable[..., dict[str, Tensor]]
) -> None:
    model, batch = make(kind).train(), pack(prompts)
    model.gradient_checkpointing = checkpointing
    side_by_side = pad(prompts, "right")
    labels = side_by_side["input_ids"].masked_fill(side_by_side["attention_mask"] == 0, -100)
    wanted = model(**side_by_side, labels=labels)
    wanted.loss.backward()
    gradients = gradients_of(model)
    for given in (batch["labels"], batch["input_ids"]):  # the first of a sequence is predicted from none
        output = model(**{**batch, "labels": given})
        torch.testing.assert_close(output.loss, wanted.loss)
        output.loss.backward()
        for name, gradient in gradients_of(model).items():
            torch.testing.assert_close(gradient, gradients[name], atol=1e-6, rtol=1e-4)  # summed in another order


def test_several_rows_and_padding_between_are_packed_too(make: Make, kind: str, prompts: list[list[int]]) -> None:
    model, (one, few, some, many) = make(kind), prompts
    rows = [one + few + [7] * 4 + some, [7] * 22 + many]
    ids, mask = torch.tensor(rows), torch.ones(2, 62, dtype=torch.int64)
    mask[0, 26:30], mask[1, :22] = 0, 0
    counted = [*range(1), *range(25), *[9] * 4, *range(32)], [*[0] * 22, *range(40)]
    with torch.no_grad():
        logits = model(ids, mask, position_ids=torch.tensor(counted)).logits[mask.bool()]
        alone = torch.cat([model(torch.tensor([prompt]), use_cache=False).logits[0] for prompt in prompts])
    torch.testing.assert_close(logits, alone, atol=2e-5, rtol=2e-5)


def test_position_ids_of_one_sequence_a_row_change_nothing(make: Make) -> None:
    model, ids = make(), torch.randint(97, (2, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.tensor([[0, 0] + [1] * 7, [1] * 9])
    positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)
    with torch.no_grad():
        assert torch.equal(model(ids, mask, position_ids=positions).logits, model(ids, mask).logits)
        assert torch.equal(model(ids, position_ids=torch.arange(9)[None]).logits, model(ids).logits)
    assert model(ids[:, :0], position_ids=positions[:, :0]).logits.shape == (2, 0, 97)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"position_ids": torch.tensor([[0, 1, 2, 2, 3]])},
            "position_ids were given that do not count from 0, one by",
        ),
        ({"position_ids": torch.tensor([[1, 2, 0, 1, 2]])}, "^position_ids were given that do not count from 0"),
        (
            {"position_ids": torch.tensor([[0, 1]])},
            r"position_ids of shape \(1, 2\) were given for input_ids \(1, 5\)",
        ),
        ({"cu_seq_lens_q": torch.tensor([0, 2, 5])}, "^cu_seq_lens_q was given and says something else .* 2 sequences"),
        ({"cu_seq_lens_k": torch.tensor([0, 5])}, "^cu_seq_lens_k was given .* leave cu_seq_lens_k out"),
        ({"max_length_q": 5}, "^max_length_q was given and says something else"),
        ({"seq_idx": torch.tensor([[0, 0, 1, 1, 1]])}, "^seq_idx was given and says something else"),
        ({"position_ids": None}, "^cu_seq_lens_k, .*, seq_idx was given to MoesaicForCausalLM"),
        ({"use_cache": True, "labels": None}, "^a cache was asked for with position_ids of several sequences"),
    ],
)
def test_refuses_what_does_not_say_where_sequences_begin(make: Make, changes: dict[str, Any], message: str) -> None:
    batch = pack([[1, 2, 3], [4, 5]])
    with pytest.raises(ConfigError, match=message):
        make()(**{**batch, **changes})


def test_refuses_a_packed_sequence_that_is_too_long(make: Make) -> None:
    with pytest.raises(GenerationError, match="a sequence of 129 tokens was packed; the model has 128 positions"):
        make()(**pack([[1] * 129, [2] * 3]))
