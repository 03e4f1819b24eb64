import math
from typing import Any

import pytest
import torch

from moesaic.config.model import ModelConfig
from moesaic.errors import GenerationError
from moesaic.model.generate import choose_token, generate, stream
from moesaic.model.transformer import Transformer

BASE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "intermediate_size": 48,
    "max_positions": 24,
    "init_std": 0.3,  # far from uniform: greedy choices do not hang on rounding
}
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {"positions": "learned", "norm": "layernorm", "attention_bias": "all", "activation": "gelu"},
    "llama": {"num_kv_heads": 2, "qk_norm": "head", "tie_embeddings": False},
    "mixtral": {"num_kv_heads": 2, "moe": {"num_experts": 4, "top_k": 2, "router": {"renormalize": True}}},
    "pr-moe": {
        "dropout": 0.5,
        "moe": {
            "num_experts": [4, 8],
            "residual": "softmax",
            "router": {"noise": "jitter"},
            "capacity": {"factor": 0.1, "min_capacity": 1, "drop_policy": "random"},
        },
    },
}
PROMPT = [3, 1, 4, 1, 5]


def make_model(name: str = "llama", *, dtype: torch.dtype = torch.float32) -> Transformer:
    return Transformer(ModelConfig.from_dict({**BASE, **MODELS[name]}), compute_dtype=dtype).initialize(0)


@torch.no_grad()
def without_cache(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """The likeliest tokens, each from all tokens before it anew."""
    model.eval()
    tokens = list(prompt)
    for _ in range(count):
        logits = model.logits(model(torch.tensor([tokens])).hidden[0, -1])
        tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("prompt", [PROMPT, [7]])
def test_greedy_generation_equals_recomputing_everything(name: str, prompt: list[int]) -> None:
    model = make_model(name)
    assert generate(model, prompt, max_new_tokens=12) == without_cache(model, prompt, 12)


@pytest.mark.parametrize("name", ["llama", "pr-moe"])
def test_a_model_in_training_generates_as_in_evaluation_and_stays_in_training(name: str) -> None:
    model = make_model(name)
    expected = without_cache(model, PROMPT, 8)
    model.train()
    assert generate(model, PROMPT, max_new_tokens=8) == expected
    assert all(module.training for module in model.modules())
    unfinished = stream(model, PROMPT, max_new_tokens=8)
    assert next(unfinished) == expected[0]
    unfinished.close()
    assert model.training


def test_streams_of_a_model_in_training_take_turns() -> None:
    model = make_model("pr-moe")
    expected = without_cache(model, PROMPT, 8)
    model.train()
    model.blocks[0].eval()
    first, second = stream(model, PROMPT[:2], max_new_tokens=2), stream(model, PROMPT, max_new_tokens=8)
    next(first)
    got = [next(second)]
    assert model.training and not model.blocks[0].training and model.blocks[1].training
    first.close()
    assert [*got, *second] == expected
    assert model.training and not model.blocks[0].training and model.blocks[1].training


def test_a_seed_repeats_and_seeds_differ() -> None:
    model = make_model()

    def draw(seed: int) -> list[int]:
        return generate(model, PROMPT, max_new_tokens=16, temperature=2.0, seed=seed)

    torch.manual_seed(0)
    first = draw(1)
    torch.manual_seed(9)  # the global generator has no part in it
    assert draw(1) == first
    assert len({tuple(draw(seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_alone_is_greedy(dtype: torch.dtype) -> None:
    model = make_model(dtype=dtype)
    greedy = generate(model, PROMPT, max_new_tokens=16)
    options: list[dict[str, Any]] = [{"top_k": 1}, {"top_p": 1e-9}]
    if dtype is torch.float32:  # in bf16 logits are often equal, and a temperature next to 0 draws one of the equals
        options += [{"temperature": 1e-30}, {"temperature": 5e-324}]
    for each in options:
        assert generate(model, PROMPT, max_new_tokens=16, **{"temperature": 1.5, **each}) == greedy, each


def test_stream_yields_what_generate_returns() -> None:
    model = make_model()
    options: dict[str, Any] = {"max_new_tokens": 10, "temperature": 1.0, "seed": 3}
    assert list(stream(model, PROMPT, **options)) == generate(model, PROMPT, **options)


def test_generation_ends_before_a_stop_token() -> None:
    model = make_model()
    ids = generate(model, PROMPT, max_new_tokens=16, temperature=2.0)
    stop = ids[5]
    expected = ids[: ids.index(stop)]
    assert generate(model, PROMPT, max_new_tokens=16, temperature=2.0, stop_ids=[stop]) == expected
    assert generate(model, PROMPT, max_new_tokens=16, temperature=2.0, stop_ids=set(range(64))) == []


def test_every_position_of_the_model_can_be_used() -> None:
    model = make_model("gpt")
    assert len(generate(model, [1] * 23, max_new_tokens=1)) == 1
    assert len(generate(model, [1], max_new_tokens=23)) == 23


def frequencies(logits: torch.Tensor, draws: int = 4000, **options: Any) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    chosen = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    tokens = [choose_token(logits, random=random, **chosen) for _ in range(draws)]
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[0]) / draws


def test_tokens_are_drawn_from_the_softmax_at_the_temperature() -> None:
    logits = torch.tensor([1.0, 3.0, 2.0, -1.0])
    for temperature in (0.5, 1.0, 3.0):
        expected = torch.softmax(logits / temperature, -1)
        # Four standard deviations of a frequency of 4000 draws.
        torch.testing.assert_close(frequencies(logits, temperature=temperature), expected, rtol=0, atol=0.032)


def test_top_k_and_top_p_leave_the_likeliest_and_their_proportions() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2]))
    expected = torch.tensor([0.0, 0.4, 0.0, 0.25, 0.2])
    for options in ({"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.75}):
        torch.testing.assert_close(frequencies(logits, **options), expected / expected.sum(), rtol=0, atol=0.032)
    # Among the top 2 the likeliest has 0.4 / 0.65 of the probability: top_p counts what top_k left.
    assert frequencies(logits, draws=50, top_k=2, top_p=0.6)[1] == 1.0
    everything = torch.softmax(logits, -1)
    torch.testing.assert_close(frequencies(logits, top_k=99, top_p=1.0), everything, rtol=0, atol=0.032)


def test_of_equal_logits_top_k_leaves_exactly_k_the_first_ones() -> None:
    logits = torch.tensor([0.0, 5.0, 5.0, 5.0])
    assert choose_token(logits, temperature=0.0, top_k=None, top_p=None, random=torch.Generator()) == 1
    assert frequencies(logits, draws=50, top_k=1)[1] == 1.0
    assert frequencies(logits, draws=200, top_k=2)[3] == 0.0


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, r"prompt is empty; .*; "),
        ([64], {}, r"token id 64; ids from 0 to 63 .*; use the run's"),
        ([-1], {}, r"token id -1; "),
        ("a text", {}, r"the prompt is 'a text' \(str\); a list of token ids is required; encode a text by"),
        (PROMPT, {"max_new_tokens": 0}, r"max_new_tokens \(0\) must be at least 1; "),
        (PROMPT, {"max_new_tokens": 20}, r"5 tokens and 20 new ones are 25 positions; the model has 24; shorten"),
        ([1] * 24, {}, r"24 tokens and 1 new ones"),
        (PROMPT, {"temperature": -0.1}, "temperature=-0.1"),
        (PROMPT, {"temperature": math.nan}, "temperature=nan"),
        (PROMPT, {"temperature": math.inf}, "temperature=inf"),
        (PROMPT, {"top_k": 0}, "top_k=0"),
        (PROMPT, {"top_p": 0.0}, r"top_p=0.0; .* are required; change"),
        (PROMPT, {"top_p": 1.1}, "top_p=1.1"),
        ([True, False], {}, r"the prompt holds True \(bool\); a list of token ids is required"),
        (PROMPT, {"max_new_tokens": 2.0}, r"max_new_tokens is 2.0 \(float\); a whole number is required; use one"),
        (PROMPT, {"temperature": 1.0, "top_k": 2.5}, "top_k is 2.5"),
        (PROMPT, {"seed": 1.5}, "seed is 1.5"),
        (PROMPT, {"temperature": None}, r"temperature is None \(NoneType\); a number is required"),
        (PROMPT, {"top_p": "1"}, "top_p is '1'"),
    ],
)
def test_what_cannot_be_generated_is_refused_at_the_call(
    prompt: list[int], options: dict[str, Any], message: str
) -> None:
    model = make_model()
    for call in (generate, stream):
        with pytest.raises(GenerationError, match=message):
            call(model, prompt, **{"max_new_tokens": 1, **options})


def test_logits_that_are_no_numbers_are_an_error() -> None:
    for value in (math.nan, math.inf, -math.inf):
        logits = torch.tensor([-math.inf, value, -math.inf])
        for temperature in (0.0, 1.0):
            with pytest.raises(GenerationError, match=r"the largest logit is .*; a finite one is required"):
                choose_token(logits, temperature=temperature, top_k=None, top_p=None, random=torch.Generator())
