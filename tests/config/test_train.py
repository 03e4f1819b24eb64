"""The training config: lengths in tokens become whole steps; combinations that cannot work are refused."""

import re
from typing import Any

import pytest

from moesaic.config.train import TrainConfig
from moesaic.errors import ConfigError

MODEL = {"vocab_size": 64, "hidden_size": 16, "num_layers": 2, "num_heads": 2, "max_positions": 128}
BASE: dict[str, Any] = {"model": MODEL, "data": {"path": "x", "sequence_length": 128}, "tokens": 100_000}


def test_the_micro_batch_is_the_batch_unless_given() -> None:
    assert TrainConfig(**BASE).micro_batch_size == TrainConfig(**BASE).batch_size == 32
    assert TrainConfig(**BASE, batch_size=8).micro_batch_size == 8
    assert TrainConfig(**BASE, batch_size=8, micro_batch_size=2).micro_batch_size == 2


def test_tokens_round_up_to_whole_steps() -> None:
    config = TrainConfig(**{**BASE, "tokens": 128 * 4 * 3 + 1}, batch_size=4)
    assert config.tokens_per_step == 512
    assert config.total_steps == 4 and config.total_tokens == 2048
    assert TrainConfig(**{**BASE, "tokens": 1}).total_steps == 1


def test_intervals_are_at_least_one_step() -> None:
    config = TrainConfig(**BASE, batch_size=4, evaluation={"sequences": 16})
    assert config.total_steps == 196
    assert config.evaluation_every_steps == config.checkpoint_every_steps == 20
    # 64 sequences of 128 are 16 steps' tokens: not before 64 steps, and no later than the end.
    rare = TrainConfig(**BASE, batch_size=4)
    assert rare.evaluation_every_steps == rare.checkpoint_every_steps == 66
    once = TrainConfig(**{**BASE, "tokens": 30_000}, batch_size=4)
    assert once.evaluation_every_steps == once.checkpoint_every_steps == once.total_steps == 59
    short = TrainConfig(**{**BASE, "tokens": 512}, batch_size=4, evaluation={"every_tokens": 1})
    assert short.evaluation_every_steps == short.checkpoint_every_steps == 1
    assert TrainConfig(**BASE, batch_size=4, checkpoint={"every_tokens": 5_120}).checkpoint_every_steps == 10


@pytest.mark.parametrize("sequences", [1, 16, 64])
def test_by_default_no_two_validations_are_close_together(sequences: int) -> None:
    for tokens in range(512, 200 * 512, 512):
        config = TrainConfig(**{**BASE, "tokens": tokens}, batch_size=4, evaluation={"sequences": sequences})
        every, total = config.evaluation_every_steps, config.total_steps
        times = -(-total // every)
        assert 1 <= times <= 10
        # All but the last are as far apart, and it is nearer by what rounding takes, at most half.
        last = total - every * (times - 1)
        assert last > every - 10 and 2 * last >= every
        assert every == total or every * 512 >= 4 * sequences * 128


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "uneven micro-batches": ({"batch_size": 6, "micro_batch_size": 4}, "batch_size (6)"),
    "a micro-batch larger than the batch": ({"batch_size": 4, "micro_batch_size": 8}, "batch_size (4)"),
    "sequences beyond the positions": ({"data": {"path": "x", "sequence_length": 129}}, "data.sequence_length (129)"),
    "nothing but warm-up": ({"schedule": {"warmup_tokens": 100_000}}, "schedule.warmup_tokens (100000)"),
    "a minimum above the peak": (
        {"schedule": {"learning_rate": 1e-3, "min_learning_rate": 1e-2}},
        "schedule.min_learning_rate (0.01)",
    ),
    "momentum without Muon": ({"optimizer": {"momentum": 0.5}}, "optimizer.momentum (0.5)"),
    "a cosine that ends in the warm-up": (
        {"schedule": {"warmup_tokens": 500, "decay_tokens": 500}},
        "schedule.decay_tokens (500)",
    ),
    "a decay that starts in the warm-up": (
        {"schedule": {"kind": "wsd", "warmup_tokens": 60_000, "decay_tokens": 50_000}},
        "schedule.decay_tokens (50000)",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_value_the_requirement_and_the_remedy(case: str) -> None:
    values, given = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        TrainConfig(**{**BASE, **values})
    message = str(caught.value)
    assert given in message
    assert message.count(";") >= 2 and message.endswith("."), message


def test_a_short_run_of_a_preset_is_told_all_that_it_needs_at_once() -> None:
    """What the message says to set is enough, of both kinds of schedule."""
    values = {"warmup_tokens": 80_000, "decay_tokens": 600_000}
    for kind, tokens in (("wsd", 50_000), ("wsd", 1), ("wsd", 500_000), ("cosine", 50_000)):
        with_decay = {**values, "kind": kind} | ({"decay_tokens": 40} if kind == "cosine" else {})
        with pytest.raises(ConfigError) as caught:
            TrainConfig.from_dict({**BASE, "tokens": tokens, "schedule": with_decay})
        told = re.findall(r"--set schedule\.(\w+)=(\w+)", str(caught.value))
        assert [name for name, _ in told] == ["warmup_tokens", "decay_tokens"][tokens > 80_000 :]
        mended = {name: None if value == "null" else int(value) for name, value in told}
        TrainConfig.from_dict({**BASE, "tokens": tokens, "schedule": {**with_decay, **mended}})


def test_a_cosine_may_end_after_the_training() -> None:
    """The paper's dense models stop on the way down or stay at the minimum; both are schedules."""
    for decay_tokens in (10**9, 1_000):
        assert TrainConfig(**BASE, schedule={"decay_tokens": decay_tokens}).schedule.decay_tokens == decay_tokens


def test_only_what_is_named_may_change_when_resuming() -> None:
    plain = TrainConfig(**BASE)
    student = TrainConfig(**BASE, distill={"teacher": "runs/first"})
    automatic = TrainConfig(**BASE, distill={"teacher": "runs/first", "schedule": "automatic"})
    for key in ("tokens", "data.path", "checkpoint.keep_last", "evaluation.sequences"):
        assert plain.may_change_on_resume(key) and student.may_change_on_resume(key), key
    for key in ("seed", "data.sequence_length", "schedule.warmup_tokens", "distill.teacher_precision"):
        assert not plain.may_change_on_resume(key) and not student.may_change_on_resume(key), key
    assert student.may_change_on_resume("distill.teacher") and student.may_change_on_resume("distill.cache")
    assert student.may_change_on_resume("checkpoint.every_tokens") and automatic.may_change_on_resume(
        "checkpoint.keep_last"
    )
    for key in ("evaluation.sequences", "checkpoint.every_tokens"):
        assert not automatic.may_change_on_resume(key), key


def test_momentum_at_its_default_is_no_mistake() -> None:
    """A config written to YAML names every value, those of the other optimizer too."""
    config = TrainConfig(**BASE)
    assert TrainConfig.from_dict(config.to_dict()) == config
