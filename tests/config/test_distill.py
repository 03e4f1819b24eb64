"""The distill section: the paper's defaults, alpha over the tokens, and what has no effect is refused."""

from typing import Any

import pytest

from moesaic.config.distill import DistillConfig
from moesaic.config.train import TrainConfig
from moesaic.errors import ConfigError

TRAIN: dict[str, Any] = {
    "model": {"vocab_size": 32, "hidden_size": 8, "num_layers": 2, "num_heads": 1},
    "data": {"path": "x", "sequence_length": 16},
    "tokens": 1000,
}


def test_the_defaults_are_the_papers() -> None:
    config = DistillConfig(teacher="runs/a")
    assert (config.alpha, config.temperature, config.divergence) == (1.0, 1.0, "forward_kl")
    assert (config.schedule, config.stop_fraction, config.init) == ("staged", 0.70, "scratch")


@pytest.mark.parametrize(
    ("values", "alphas"),
    [
        ({"schedule": "none"}, [0, 0, 0, 0]),
        ({"schedule": "throughout", "alpha": 0.5}, [0.5, 0.5, 0.5, 0.5]),
        ({}, [1, 1, 0, 0]),
        ({"schedule": "linear", "alpha": 2.0, "stop_fraction": 1.0}, [2.0, 2 * 0.301, 2 * 0.3, 0]),
        ({"schedule": "linear"}, [1, 0.0014286, 0, 0]),
        ({"schedule": "automatic"}, [1, 1, 1, 1]),
    ],
)
def test_alpha_of_a_step_counts_the_tokens_before_it(values: dict[str, Any], alphas: list[float]) -> None:
    config = DistillConfig(teacher="a", **values)
    got = [config.alpha_at(tokens, total_tokens=1000) for tokens in (0, 699, 700, 1000)]
    assert got == pytest.approx(alphas, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"schedule": "none", "alpha": 2.0}, "distill.alpha"),
        ({"schedule": "none", "temperature": 2.0}, "distill.temperature"),
        ({"schedule": "none", "divergence": "jsd"}, "distill.divergence"),
        ({"schedule": "none", "cache": "c"}, "distill.cache"),
        ({"schedule": "none", "teacher_precision": "int8"}, "distill.teacher_precision"),
        ({"schedule": "throughout", "stop_fraction": 0.5}, "distill.stop_fraction"),
        ({"trial_steps": 5}, "distill.trial_steps"),
        ({"layer_map": [0, 1]}, "distill.layer_map"),
    ],
)
def test_what_would_do_nothing_is_refused(values: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} \(.*\) has no effect here; it needs distill\."):
        DistillConfig(teacher="a", **values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"distill": {"teacher": "a", "cache": "c", "divergence": "reverse_kl"}}, "only forward_kl can be computed"),
        ({"distill": {"teacher": "a", "cache": "c"}}, "data.fixed_windows is false"),
        ({"distill": {"teacher": "a"}, "init_from": "b"}, "are both given"),
        ({"distill": {"teacher": "a", "init": "teacher", "layer_map": [0]}}, "names 1 layers for a student of 2"),
        ({"distill": {"teacher": ""}}, "distill.teacher"),
        ({"distill": {"teacher": "a", "stop_fraction": 0}}, "distill.stop_fraction"),
        ({"distill": {"teacher": "a", "alpa": 1}}, "did you mean alpha"),
    ],
)
def test_a_section_that_cannot_work_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig.from_dict({**TRAIN, **changes})


def test_it_survives_a_config_file() -> None:
    config = TrainConfig.from_dict(
        {**TRAIN, "distill": {"teacher": "a@5", "init": "teacher", "layer_map": [0, 3], "schedule": "linear"}}
    )
    assert TrainConfig.from_dict(config.to_dict()) == config
