"""transformers' Trainer trains a model of ours, in micro-batches and with padding, and its checkpoints load."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from moesaic.hf import MoesaicForCausalLM

pytest.importorskip("accelerate", reason="transformers' Trainer stands on accelerate, which is not installed")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("bf16", [False, True])
def test_the_trainer_of_transformers_trains(make: Callable[..., Any], pad: Any, bf16: bool, tmp_path: Path) -> None:
    model: MoesaicForCausalLM = make("paper", init_std=0.05, moe={"num_experts": [4, 8], "every": 2, "residual": "sum"})
    generator = torch.Generator().manual_seed(5)
    rows = [
        (torch.arange(length) + int(torch.randint(50, (), generator=generator))).tolist()
        for length in torch.randint(3, 30, (64,), generator=generator).tolist()
    ]

    def collate(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        batch = pad([example["input_ids"] for example in examples], "right")
        return {**batch, "labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}

    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, save_steps=12, eval_strategy="steps", eval_steps=6, bf16=bf16,
        report_to=[], use_cpu=True, disable_tqdm=True, gradient_checkpointing=bf16,
    )  # fmt: skip
    dataset: Any = [{"input_ids": row} for row in rows]
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=dataset, eval_dataset=dataset[:8])
    trainer.train()
    losses = [record["loss"] for record in trainer.state.log_history if "loss" in record]
    evaluated = [record["eval_loss"] for record in trainer.state.log_history if "eval_loss" in record]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.5 and evaluated[-1] < evaluated[0]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    own, other = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_label_smoothing_learns_the_next_token_and_says_what_its_loss_lacks(
    make: Callable[..., Any], tmp_path: Path
) -> None:
    moe = {"num_experts": 4, "every": 2, "router": {"balance_loss": 0.01}}
    model: MoesaicForCausalLM = make("dense", init_std=0.05, moe=moe)
    starts = torch.randint(50, (64,), generator=torch.Generator().manual_seed(5)).tolist()
    dataset: Any = [{"input_ids": ids, "labels": ids} for ids in (list(range(start, start + 20)) for start in starts)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=40, per_device_train_batch_size=4, learning_rate=1e-2,
        label_smoothing_factor=0.1, save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="add that to the loss in compute_loss_func"):
        Trainer(model, arguments, train_dataset=dataset).train()
    ids = torch.arange(10, 30)[None]
    predicted = model.eval()(ids).logits.argmax(-1)
    assert (predicted == ids + 1).float().mean() > 0.8
