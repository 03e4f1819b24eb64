"""transformers' generate, with our cache, gives what our naive generation and generation without a cache give."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError, GenerationError
from moesaic.hf import MoesaicForCausalLM, PagedCache
from moesaic.model.generate import generate

Make = Callable[..., MoesaicForCausalLM]
Pad = Callable[..., dict[str, Tensor]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_equals_our_own_one_by_one(make: Make, kind: str, prompts: Any, pad: Pad, dtype: torch.dtype) -> None:
    model = make(kind).to(dtype)
    model.model.compute_dtype = dtype
    wanted = [generate(model.model, prompt, max_new_tokens=12) for prompt in prompts]
    for prompt, ids in zip(prompts, wanted, strict=True):
        out = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert out[0].tolist() == [*prompt, *ids]
    if dtype is torch.float32:  # in bf16 a token's rounding depends on the shapes of the products
        batch = pad(prompts)
        out = model.generate(**batch, max_new_tokens=12, do_sample=False)
        assert out[:, batch["input_ids"].shape[1] :].tolist() == wanted


@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 4, "num_return_sequences": 3},
        {"num_beams": 3, "early_stopping": True, "eos_token_id": 5, "length_penalty": 0.5},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "top_k": 5, "temperature": 0.7, "repetition_penalty": 1.2},
    ],
    ids=["beams", "beams that end", "samples", "warped samples"],
)
def test_a_cache_changes_nothing(make: Make, kind: str, prompts: Any, pad: Pad, settings: dict[str, Any]) -> None:
    model, batch = make(kind), pad(prompts)
    settings = {"do_sample": False, "max_new_tokens": 16, "pad_token_id": 7, **settings}

    def run(use_cache: bool) -> Tensor:
        torch.manual_seed(3)
        return model.generate(**batch, use_cache=use_cache, **settings)

    assert torch.equal(run(True), run(False))


def test_assisted_generation_equals_greedy(make: Make, prompts: Any) -> None:
    model, assistant = make(), make("dense")
    ids = torch.tensor([prompts[2]])
    assert 3 not in prompts[2]
    settings = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": 3, "pad_token_id": 7}
    wanted = model.generate(ids, **settings)
    assert wanted.shape[1] > ids.shape[1] + 20
    for kind in ({"assistant_model": assistant}, {"assistant_model": model}, {"prompt_lookup_num_tokens": 3}):
        assert torch.equal(model.generate(ids, **settings, **kind), wanted)


def test_generates_in_training_mode_without_dropping_or_noise(make: Make, prompts: Any, pad: Pad) -> None:
    router, capacity = {"noise": "jitter", "jitter_epsilon": 0.3}, {"factor": 0.25, "min_capacity": 1}
    model = make("dense", moe={"num_experts": 4, "top_k": 2, "router": router, "capacity": capacity})
    settings = {"max_new_tokens": 12, "do_sample": False}
    for batch in (pad(prompts), {"input_ids": torch.tensor([prompts[2]])}):
        wanted = model.eval().generate(**batch, **settings)
        assert torch.equal(model.train().generate(**batch, **settings), wanted)
        assert all(module.training for module in model.modules())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_returned_cache_goes_on(make: Make, prompts: Any, pad: Pad) -> None:
    model, batch = make(), pad(prompts)
    first = model.generate(**batch, max_new_tokens=9, do_sample=False, return_dict_in_generate=True)
    cache = first.past_key_values
    assert isinstance(cache, PagedCache) and cache.get_seq_length() == first.sequences.shape[1] - 1
    more = torch.tensor([[11, 12]] * len(prompts))
    ids = torch.cat([first.sequences, more], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(len(prompts), 11, dtype=torch.int64)], 1)
    settings = {"attention_mask": mask, "max_new_tokens": 9, "do_sample": False}
    wanted = model.generate(ids, **settings)
    for _ in range(2):  # a copy leaves the first as it was
        assert torch.equal(model.generate(ids, past_key_values=copy.deepcopy(cache), **settings), wanted)
    assert torch.equal(model.generate(ids, prefill_chunk_size=7, **settings), wanted)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_refuses_what_the_model_cannot_do(make: Make) -> None:
    model = make()
    with pytest.raises(ConfigError, match="cache_implementation='static' was given"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, cache_implementation="static")
    with pytest.raises(ConfigError, match="a cache of type tuple was given"):
        model.generate(torch.tensor([[1, 2]]), max_new_tokens=3, past_key_values=())
    with pytest.raises(GenerationError, match="would have 129 positions; the model has 128"):
        model.generate(torch.ones(1, 120, dtype=torch.int64), max_new_tokens=20, do_sample=False)
