"""What a request may ask for and how large an engine is: the defaults, and what is refused with its reason."""

from typing import Any

import pytest

from moesaic.config.serve import EngineConfig, Grammar, Sampling
from moesaic.errors import ConfigError


def test_the_defaults_draw_from_the_models_own_distribution() -> None:
    sampling = Sampling()
    assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (1.0, None, 1.0, 0.0)
    assert (sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (sampling.logit_bias, sampling.stop, sampling.grammar, sampling.seed, sampling.n) == ({}, (), None, None, 1)


@pytest.mark.parametrize(
    "values",
    [
        {"max_tokens": 0},
        {"min_tokens": 7, "max_tokens": 7},
        {"temperature": 0},
        {"top_p": 1e-9, "min_p": 1},
        {"logit_bias": {3: -100, 5: 100}},
        {"stop": ["a", "\n\n"], "stop_token_ids": [1]},
        {"logprobs": 0, "prompt_logprobs": 0},
        {"grammar": {"kind": "json_object"}},
        {"seed": -5},
    ],
)
def test_bounds_are_taken_and_survive_a_round_trip(values: dict[str, Any]) -> None:
    sampling = Sampling.from_dict(values)
    assert Sampling.from_dict(sampling.to_dict()) == sampling
    assert hash(Grammar(kind="regex", text="a")) == hash(Grammar(kind="regex", text="a"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_tokens": 5, "max_tokens": 4}, r"min_tokens \(5\) is above max_tokens \(4\); it must not be; lower it"),
        ({"stop": ["a", ""]}, "a stop text is empty; .*; leave it out"),
        ({"logit_bias": {3: 100.5}}, r"logit_bias goes from 100\.5 to 100\.5; -100 to 100 is allowed"),
        ({"logit_bias": {3: -101}}, "-100 already forbids a token"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -0.1}, "min_p"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"n": 0}, "n "),
        ({"logprobs": -1}, "logprobs"),
        ({"seed": 1.5}, "seed"),
        ({"grammar": {"kind": "xml"}}, "grammar.kind"),
        ({"temperatur": 1}, "did you mean temperature"),
    ],
)
def test_what_cannot_be_sampled_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Sampling.from_dict(values)
    assert str(caught.value).count(";") >= 1


@pytest.mark.parametrize(
    "values",
    [
        {"max_sequences": 0},
        {"max_batch_tokens": 0},
        {"max_length": 1},
        {"kv_cache_bytes": "much"},
        {"kv_precision": "fp8"},
        {"block_size": 0},
        {"max_grammar_bytes": 0},
        {"grammar_timeout_seconds": 0},
        {"blocks": 3},
    ],
)
def test_what_cannot_be_an_engine_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(values))):
        EngineConfig.from_dict(values)
    assert EngineConfig().max_length is None
