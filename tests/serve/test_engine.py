"""The laws of the engine: equal to naive generation, and to itself whatever else runs."""

import copy
import itertools
import json
import random
import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.config.model import ModelConfig
from moesaic.config.serve import EngineConfig, Grammar, Sampling, SpeculationConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, GenerationError, NotFiniteError
from moesaic.kernels import limits, select
from moesaic.kernels.decode import Decoded
from moesaic.model.generate import generate
from moesaic.model.kv_cache import BatchCache
from moesaic.model.pack import pack_transformer
from moesaic.model.transformer import Transformer
from moesaic.plan.cost import memory
from moesaic.serve import expert_load
from moesaic.serve.depth import DepthChooser
from moesaic.serve.engine import Engine
from moesaic.serve.outputs import GeneratedToken, PromptLogprobs, RequestOutput
from moesaic.serve.runner import Part, Runner, block_bytes

from .conftest import FAMILIES, SIZES, VOCAB_SIZE, build_model

Make = Callable[..., Transformer]
GREEDY = Sampling(temperature=0.0, max_tokens=12, ignore_end_of_text=True)
needs_kernels = pytest.mark.skipif(
    not select.supported_instruction_sets(), reason="only the C++ kernels promise results that depend on no neighbour"
)


@dataclass
class Got:
    """All that one text of a request gave."""

    tokens: list[GeneratedToken] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    message: str | None = None
    is_refused: bool = False
    prompt_logprobs: PromptLogprobs | None = None
    cached_tokens: int = 0

    @property
    def ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


def collect(outputs: Sequence[RequestOutput], got: dict[tuple[str, int], Got]) -> None:
    for output in outputs:
        each = got.setdefault((output.request_id, output.index), Got())
        assert each.finish_reason is None, "an output after the last"
        each.tokens += output.tokens
        each.text += output.text
        each.finish_reason, each.stop_reason = output.finish_reason, output.stop_reason
        each.message, each.cached_tokens = output.message, output.cached_tokens
        each.is_refused = output.is_refused
        each.prompt_logprobs = each.prompt_logprobs or output.prompt_logprobs
        assert output.completion_tokens == len(each.tokens)


def finish(engine: Engine) -> dict[tuple[str, int], Got]:
    got: dict[tuple[str, int], Got] = {}
    for _ in range(3000):
        if not engine.has_work:
            break
        collect(engine.step(), got)
    assert not engine.has_work
    stats = engine.stats()
    assert stats.kv_blocks_used == 0 and stats.num_running == stats.num_waiting == 0
    return got


def run_one(engine: Engine, prompt: Sequence[int], sampling: Sampling, **options: Any) -> Got:
    request_id = engine.add_request(prompt, sampling, **options)
    return finish(engine)[request_id, 0]


def prompts(count: int, *, longest: int = 70, seed: int = 0) -> list[list[int]]:
    """Some share a beginning, and lengths are whatever."""
    rng = random.Random(seed)
    common = [rng.randrange(VOCAB_SIZE) for _ in range(longest)]
    made = []
    for _ in range(count):
        own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, longest))]
        made.append(own if rng.random() < 0.5 else common[: rng.randrange(longest)] + own[:3])
    return made


@pytest.mark.parametrize(
    ("family", "form"),
    [*((family, "fp32") for family in FAMILIES)]
    + [(family, form) for family in FAMILIES for form in ("packed-bf16", "packed-int8")],
)
def test_greedy_tokens_are_those_of_naive_generation(
    family: str, form: str, make_model: Make, tokenizer: Tokenizer
) -> None:
    model = make_model(family, form)
    engine = Engine(model, tokenizer, EngineConfig(max_batch_tokens=24))
    asked = {engine.add_request(prompt, GREEDY): prompt for prompt in prompts(6)}
    got = finish(engine)
    for request_id, prompt in asked.items():
        assert got[request_id, 0].ids == generate(model, prompt, max_new_tokens=12)
        assert got[request_id, 0].finish_reason == "length"


SAMPLINGS = [
    Sampling(temperature=0.0, max_tokens=20, ignore_end_of_text=True),
    Sampling(temperature=1.5, max_tokens=17, seed=3),
    Sampling(temperature=0.9, top_p=0.9, max_tokens=25, seed=4, logprobs=2),
    Sampling(temperature=1.1, top_k=7, min_p=0.01, max_tokens=9, seed=5),
    Sampling(temperature=1.0, max_tokens=15, seed=6, repetition_penalty=1.3, presence_penalty=0.5),
    Sampling(temperature=0.0, max_tokens=12, frequency_penalty=1.0, logit_bias={5: 3.0}, return_experts=True),
]


@needs_kernels
@pytest.mark.parametrize("form", ["packed-bf16", "packed-int8", "packed-int4", "packed-mxfp4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_request_gives_the_same_alone_and_whatever_else_runs(
    family: str, form: str, make_model: Make, tokenizer: Tokenizer
) -> None:
    model = make_model(family, form)
    requests = [(prompt, SAMPLINGS[index % len(SAMPLINGS)]) for index, prompt in enumerate(prompts(18, seed=1))]
    alone = []
    for prompt, sampling in requests:
        engine = Engine(model, tokenizer, EngineConfig(max_sequences=1, prefix_caching=False))
        assert engine.is_batch_invariant
        alone.append(run_one(engine, prompt, sampling))
    crowds = {
        "all at once": EngineConfig(),
        "in small chunks": EngineConfig(max_batch_tokens=7),
        "preempted": EngineConfig(kv_cache_bytes=_bytes_of_blocks(model, 6), max_sequences=16),
        "few at a time": EngineConfig(max_sequences=3, max_batch_tokens=50, prefix_caching=False),
    }
    if family == "mixtral":
        crowds["64 at once"] = EngineConfig(max_sequences=64, max_batch_tokens=8192)
    neighbour = Sampling(temperature=1.2, max_tokens=20, seed=9, ignore_end_of_text=True)
    for name, config in crowds.items():
        engine = Engine(model, tokenizer, config)
        got: dict[tuple[str, int], Got] = {}
        names = []
        for index, (prompt, sampling) in enumerate(requests):
            names.append(engine.add_request(prompt, sampling, priority=index % 2))
            if index % 3 == 0 and name != "64 at once":
                collect(engine.step(), got)
        if name == "64 at once":
            for prompt in prompts(64, seed=2):
                engine.add_request(prompt, neighbour, priority=2)
        most_running = 0
        while engine.has_work:
            collect(engine.step(), got)
            most_running = max(most_running, engine.stats().num_running)
        for request_id, expected in zip(names, alone, strict=True):
            mine = got[request_id, 0]
            assert mine.tokens == expected.tokens, name
            assert (mine.text, mine.finish_reason) == (expected.text, expected.finish_reason), name
        if name == "preempted":
            assert engine.stats().num_preemptions > 0
        if name == "all at once":
            assert engine.stats().num_cached_tokens > 0
        if name == "64 at once":
            assert most_running == 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the same code on a GPU needs one")
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_it_gives_the_processors_tokens(family: str, make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model(family)
    on_gpu = Engine(deepcopy(model).to("cuda"), tokenizer, EngineConfig(max_batch_tokens=24))
    asked = {on_gpu.add_request(prompt, GREEDY): prompt for prompt in prompts(6)}
    got = finish(on_gpu)
    for request_id, prompt in asked.items():
        assert got[request_id, 0].ids == generate(model, prompt, max_new_tokens=12)


def _bytes_of_blocks(model: Transformer, count: int) -> int:
    return count * block_bytes(model, block_size=32, dtype=model.compute_dtype)


def test_a_text_of_a_conversation_is_found_again(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model(), tokenizer)
    prompt = prompts(1, longest=70)[0] + list(range(70))
    first = run_one(engine, prompt, GREEDY)
    again = run_one(engine, prompt + first.ids + [7], GREEDY)
    assert first.cached_tokens == 0
    assert again.cached_tokens == (len(prompt) + len(first.ids) - 1) // 32 * 32
    off = Engine(make_model(), tokenizer, EngineConfig(prefix_caching=False))
    run_one(off, prompt, GREEDY)
    assert run_one(off, prompt, GREEDY).cached_tokens == 0


@pytest.mark.parametrize("method", [None, "ngram", "model"])
def test_new_weights_need_new_keys_and_values(method: Any, make_model: Make, tokenizer: Tokenizer) -> None:
    model, sampling = copy.deepcopy(make_model("mixtral")), GREEDY.replace(max_tokens=6)
    prompt = list(range(70))
    speculation = method and SpeculationConfig(method=method, model="by hand" if method == "model" else None)
    draft_model = make_model("dense") if method == "model" else None
    engine = Engine(model, tokenizer, EngineConfig(speculation=speculation), draft_model=draft_model)
    run_one(engine, prompt, sampling)
    model.train()
    engine.add_request(prompt, sampling)
    with pytest.raises(GenerationError, match=r"in training mode; .* call model.eval\(\)"):
        engine.step()
    model.eval()
    with pytest.raises(GenerationError, match="1 texts are at work"):
        engine.reset_prefix_cache()
    finish(engine)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    engine.reset_prefix_cache()
    stats = engine.stats()
    assert (stats.kv_blocks_cached, stats.kv_blocks_used) == (0, 0)
    before = stats.num_cached_tokens
    assert run_one(engine, prompt, sampling).ids == run_one(Engine(model, tokenizer), prompt, sampling).ids
    assert engine.stats().num_cached_tokens == before
    run_one(engine, prompt, sampling)
    assert engine.stats().num_cached_tokens > before


def test_several_texts_of_one_prompt_are_those_of_seeds_in_a_row(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model(), tokenizer)
    prompt = list(range(40))
    sampling = Sampling(temperature=1.0, max_tokens=10, seed=11, n=3, ignore_end_of_text=True)
    request_id = engine.add_request(prompt, sampling)
    got = finish(engine)
    for index in range(3):
        single = run_one(engine, prompt, sampling.replace(n=1, seed=11 + index))
        assert got[request_id, index].ids == single.ids
    assert len({tuple(got[request_id, index].ids) for index in range(3)}) == 3
    assert got[request_id, 1].cached_tokens == 32  # the prompt was computed once


def test_without_a_seed_texts_differ(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model(), tokenizer)
    sampling = Sampling(temperature=1.5, max_tokens=12, ignore_end_of_text=True)
    assert run_one(engine, [1, 2], sampling).ids != run_one(engine, [1, 2], sampling).ids


@torch.no_grad()
def test_prompt_logprobs_are_the_models_own(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model("pr-moe", "fp32")
    prompt = prompts(1, seed=5)[0] + [9] * 80
    logits = model.logits(model(torch.tensor([prompt])).hidden[0])
    expected = torch.log_softmax(logits, -1)
    sampling = Sampling(max_tokens=1, temperature=0, prompt_logprobs=3, logprobs=0)
    for config in (EngineConfig(), EngineConfig(max_batch_tokens=11)):
        engine = Engine(model, tokenizer, config)
        run_one(engine, prompt, GREEDY)  # its blocks must not stand in for logits
        got = run_one(engine, prompt, sampling)
        assert got.prompt_logprobs is not None
        tokens = got.prompt_logprobs.tokens
        assert [token.token_id for token in tokens] == prompt
        assert tokens[0].logprob is None and tokens[0].top_logprobs == ()
        for position, token in enumerate(tokens[1:]):
            assert token.logprob == pytest.approx(float(expected[position, prompt[position + 1]]), abs=1e-4)
            best = expected[position].topk(3)
            assert [each.logprob for each in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert got.tokens[0].logprob == pytest.approx(float(expected[-1].max()), abs=1e-4)


def test_a_prompt_is_scored_without_generating(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model(), tokenizer)
    got = run_one(engine, [1, 2, 3], Sampling(max_tokens=0, prompt_logprobs=0))
    assert got.tokens == [] and got.text == "" and got.finish_reason == "length"
    assert got.prompt_logprobs is not None and len(got.prompt_logprobs.tokens) == 3


@pytest.mark.parametrize("form", ["fp32", "packed-bf16"])
@torch.no_grad()
def test_experts_are_those_that_made_the_token(form: str, make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model("pr-moe", form)
    engine = Engine(model, tokenizer)
    prompt = [5, 6, 7]
    engine.add_request([9] * 50, GREEDY)  # another one in the same steps
    got = run_one(engine, prompt, GREEDY.replace(return_experts=True))
    cache = BatchCache(model.config, 1, 60, dtype=model.compute_dtype, device=model.device)
    fed = prompt
    for token in got.tokens:
        decoded = model.infer(torch.tensor(fed), cache.extend(1, len(fed)))
        assert token.experts is not None
        for ids, mine, weights, own in zip(
            decoded.expert_ids, token.experts.expert_ids, decoded.routing_weights, token.experts.routing_weights,
            strict=True,
        ):  # fmt: skip
            assert tuple(ids[-1].tolist()) == mine
            assert own == pytest.approx(weights[-1].tolist(), abs=1e-5)
        fed = [token.token_id]


def test_expert_load_counts_every_route(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model("pr-moe"), tokenizer)
    prompt = list(range(45))
    run_one(engine, prompt, GREEDY)
    stats = engine.stats()
    computed = len(prompt) + GREEDY.max_tokens - 1
    assert [(layer.layer, layer.num_experts) for layer in stats.layers] == [(0, 2), (1, 7), (2, 3)]
    for layer in stats.layers:
        assert sum(layer.tokens_per_expert) == computed * layer.top_k
        assert 0 < sum(layer.recent_tokens_per_expert) <= computed * layer.top_k
    assert stats.distinct_experts_per_step == 1.0  # one token, top_k 1
    assert stats.num_prompt_tokens == len(prompt) and stats.num_generated_tokens == GREEDY.max_tokens
    assert Engine(make_model("dense"), tokenizer).stats().layers == ()


def test_a_prompt_counts_once_however_often_it_is_computed(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model(), tokenizer, EngineConfig(kv_cache_bytes=_bytes_of_blocks(make_model(), 4)))
    for number in range(2):
        engine.add_request([number] * 60, GREEDY)
    finish(engine)
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_prompt_tokens == 120


def test_stop_tokens_and_texts_end_a_text_and_are_not_in_it(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model(), tokenizer)
    whole = run_one(engine, [1, 2, 3], GREEDY)
    stop = whole.ids[5]
    first = whole.ids.index(stop)
    got = run_one(engine, [1, 2, 3], GREEDY.replace(stop_token_ids=(stop,)))
    assert got.ids == whole.ids[: first + 1] and got.finish_reason == "stop" and got.stop_reason == stop
    assert whole.text.startswith(got.text) and got.text == tokenizer.decode(whole.ids[:first])
    late = run_one(engine, [1, 2, 3], GREEDY.replace(stop_token_ids=(stop,), min_tokens=first + 2))
    assert len(late.ids) > first + 1 and stop not in late.ids[: first + 1]
    middle = whole.text[3:6]
    cut = run_one(engine, [1, 2, 3], GREEDY.replace(stop=(middle, "never there")))
    assert cut.text == whole.text[: whole.text.index(middle)]
    assert cut.finish_reason == "stop" and cut.stop_reason == middle


def test_the_models_own_end_ends_unless_ignored(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model(), tokenizer)
    end = tokenizer.end_of_text_id
    push = Sampling(temperature=0.0, max_tokens=4, logit_bias={end: 100.0})
    got = run_one(engine, [1, 2], push)
    assert got.ids == [end] and got.text == "" and (got.finish_reason, got.stop_reason) == ("stop", None)
    assert run_one(engine, [1, 2], push.replace(ignore_end_of_text=True)).ids == [end] * 4


def test_a_text_ends_where_the_positions_do(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model(), tokenizer, EngineConfig(max_length=50))
    got = run_one(engine, [3] * 45, GREEDY.replace(max_tokens=30))
    assert len(got.ids) == 5 and got.finish_reason == "length"
    small = Engine(make_model(), tokenizer, EngineConfig(kv_cache_bytes=_bytes_of_blocks(make_model(), 2)))
    assert small.max_length == 64
    assert len(run_one(small, [3] * 60, GREEDY.replace(max_tokens=30)).ids) == 4


def test_more_positions_than_the_model_has_are_refused(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model()
    positions = model.config.max_positions
    assert Engine(model, tokenizer, EngineConfig(max_length=positions)).max_length == positions
    with pytest.raises(
        ConfigError, match=rf"^max_length \({positions + 1}\) is more than .* \({positions}\); .*; lower"
    ):
        Engine(model, tokenizer, EngineConfig(max_length=positions + 1))


def test_aborting_frees_at_once_and_tells_so(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model(), tokenizer, EngineConfig(max_sequences=2))
    ids = [engine.add_request([index] * 40, GREEDY.replace(n=2)) for index in range(3)]
    got: dict[tuple[str, int], Got] = {}
    collect(engine.step(), got)
    collect(engine.step(), got)
    assert engine.abort(ids[0]) and engine.abort(ids[2])
    assert not engine.abort(ids[0]) and not engine.abort("nobody")
    while engine.has_work:
        collect(engine.step(), got)
    assert {key: each.finish_reason for key, each in got.items()} == {
        (ids[0], 0): "abort", (ids[0], 1): "abort", (ids[1], 0): "length",
        (ids[1], 1): "length", (ids[2], 0): "abort", (ids[2], 1): "abort",
    }  # fmt: skip
    assert engine.stats().kv_blocks_used == 0 and engine.stats().num_finished == 6


def test_an_end_is_told_even_after_a_step_that_failed(
    make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine(make_model(), tokenizer)
    gone, other = (engine.add_request([index], GREEDY) for index in range(2))
    got: dict[tuple[str, int], Got] = {}
    collect(engine.step(), got)
    engine.abort(gone)

    def fail(*_: object) -> Decoded:
        raise RuntimeError("it was told to fail")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="told to fail"):
        patch.setattr(Runner, "run", fail)
        engine.step()
    assert engine.has_request(gone)
    while engine.has_work:
        collect(engine.step(), got)
    assert got[gone, 0].finish_reason == "abort" and not engine.has_request(gone)
    assert got[other, 0].ids == run_one(Engine(make_model(), tokenizer), [1], GREEDY).ids


def test_an_id_is_free_again_when_its_end_is_told(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model(), tokenizer)
    engine.add_request([1], GREEDY, request_id="mine")
    engine.abort("mine")
    with pytest.raises(ConfigError, match="'mine'"):
        engine.add_request([2], GREEDY, request_id="mine")
    assert [output.finish_reason for output in engine.step()] == ["abort"]
    assert run_one(engine, [2], GREEDY, request_id="mine").finish_reason == "length"


def test_a_broken_number_ends_its_own_request_only(tokenizer: Tokenizer, make_model: Make) -> None:
    model = build_model("mixtral", "fp32")
    expected = run_one(Engine(make_model(), tokenizer), [1, 2, 3], GREEDY)
    with torch.no_grad():
        model.embedding[77] = float("nan")
    engine = Engine(model, tokenizer, EngineConfig(kv_cache_bytes=_bytes_of_blocks(model, 4)))
    bad = engine.add_request([77, 1], GREEDY)
    good = engine.add_request([1, 2, 3], GREEDY)
    got = finish(engine)
    assert got[bad, 0].finish_reason == "error" and "nan" in str(got[bad, 0].message).lower()
    assert got[good, 0].ids == expected.ids
    for _ in range(3):  # in the blocks that it left
        assert run_one(engine, [1, 2, 3], GREEDY).ids == expected.ids


@pytest.mark.parametrize("form", ["fp32", "packed-bf16"])
@pytest.mark.parametrize("max_tokens", [0, 4])
@pytest.mark.parametrize("max_batch_tokens", [20, 1024])
def test_a_broken_number_is_not_found_by_others_before_it(
    tokenizer: Tokenizer, form: str, max_tokens: int, max_batch_tokens: int
) -> None:
    """It reaches the positions of its own pass that do not see it, as 0 times NaN."""
    model = build_model("mixtral", form)
    with torch.no_grad():
        model.embedding[77] = float("nan")
    engine = Engine(model, tokenizer, EngineConfig(max_batch_tokens=max_batch_tokens))
    common = [1 + number % 7 for number in range(40)]
    expected = run_one(Engine(model, tokenizer), [*common, 9], GREEDY)
    for bad_prompt in ([*common, 77], [*common[:30], 77, *common]):
        bad = run_one(engine, bad_prompt, GREEDY.replace(max_tokens=max_tokens))
        assert bad.finish_reason == ("error" if max_tokens else "length")
        assert run_one(engine, [*common, 9], GREEDY).ids == expected.ids
    assert engine.stats().num_cached_tokens >= 32  # what is whole is found as ever


def test_a_broken_number_in_a_scored_prompt_ends_its_own_request_only(tokenizer: Tokenizer) -> None:
    model = build_model("mixtral", "fp32")
    expected = run_one(Engine(model, tokenizer), [1, 2, 3], GREEDY)
    with torch.no_grad():
        model.embedding[77] = float("nan")
    for max_tokens, bad_prompt in ((5, [1, 77, 2]), (0, [77] + [1] * 40), (5, [1] * 20 + [77] + [1] * 20)):
        engine = Engine(model, tokenizer, EngineConfig(max_batch_tokens=16))
        sampling = Sampling(temperature=0.0, max_tokens=max_tokens, prompt_logprobs=0, n=2)
        bad = engine.add_request(bad_prompt, sampling)
        good = engine.add_request([1, 2, 3], GREEDY)
        got = finish(engine)
        assert got[good, 0].ids == expected.ids
        assert got[bad, 0].finish_reason == "error" and "nan" in str(got[bad, 0].message).lower()
        assert got[bad, 0].prompt_logprobs is None and got[bad, 0].ids == []
        # The other text asks for no scores, and is told of its own logits.
        assert got[bad, 1].finish_reason == ("error" if max_tokens else "length")
        assert engine.stats().num_finished == 3


def test_what_can_never_be_served_is_refused_and_changes_nothing(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model(), tokenizer, EngineConfig(max_length=32))
    taken = engine.add_request([1], GREEDY, request_id="mine")
    for prompt, sampling, error, words in (
        ([], GREEDY, GenerationError, "empty"),
        ("a text", GREEDY, GenerationError, r"the prompt is 'a text' \(str\); .* tokenizer.encode\(text\)"),
        (["a", "b"], GREEDY, GenerationError, r"the prompt holds 'a' \(str\)"),
        ([1, 2.0], GREEDY, GenerationError, r"holds 2.0 \(float\)"),
        ([1, None], GREEDY, GenerationError, r"holds None \(NoneType\)"),
        (None, GREEDY, GenerationError, r"the prompt is None"),
        (torch.tensor([1, 2]), GREEDY, GenerationError, r"is tensor\(\[1, 2\]\) \(Tensor\); .*; .* as .tolist\(\)"),
        ([1, VOCAB_SIZE], GREEDY, GenerationError, f"token id {VOCAB_SIZE}"),
        ([1] * 32, GREEDY, GenerationError, "at most 31"),
        ([1], GREEDY.replace(logit_bias={VOCAB_SIZE: 1.0}), ConfigError, "logit_bias"),
        ([1], GREEDY.replace(stop_token_ids=(-1,)), ConfigError, "stop_token_ids"),
        ([1], {"max_tokens": 3}, ConfigError, r"sampling is {'max_tokens': 3} \(dict\)"),
    ):
        with pytest.raises(error, match=words):
            engine.add_request(prompt, sampling)
    with pytest.raises(ConfigError, match="'mine'"):
        engine.add_request([1], GREEDY, request_id="mine")
    assert set(finish(engine)) == {(taken, 0)}
    run_one(engine, [1] * 32, Sampling(max_tokens=0))
    with pytest.raises(ConfigError, match=r"kv_cache_bytes \(100\) is less than what one block of 32 "):
        Engine(make_model(), tokenizer, EngineConfig(kv_cache_bytes=100))


def test_a_draft_models_keys_and_values_count(make_model: Make, tokenizer: Tokenizer) -> None:
    model, draft_model = make_model(), make_model("dense")
    both = _bytes_of_blocks(model, 4) + _bytes_of_blocks(draft_model, 4)
    speculation = SpeculationConfig(method="model", model="a run")
    for kv_cache_bytes, blocks in ((both, 4), (both - 1, 3)):
        config = EngineConfig(kv_cache_bytes=kv_cache_bytes, speculation=speculation)
        assert Engine(model, tokenizer, config, draft_model=draft_model).stats().kv_blocks_total == blocks


@pytest.mark.parametrize("form", ["fp32", "packed-bf16"])
def test_blocks_are_sized_by_the_memory_of_the_models_device(
    form: str, make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("mixtral", form)
    one = block_bytes(model, block_size=32, dtype=model.compute_dtype)
    monkeypatch.setattr(limits, "read_text", lambda path: f"MemAvailable: {9 * 4 * one // 1024 + 1} kB")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * 4 * one, 1 << 40))
    assert Engine(model, tokenizer).stats().kv_blocks_total == 9
    assert limits.available_memory_bytes(torch.device("cuda", 0)) == 5 * 4 * one


@pytest.mark.parametrize("form", ["bf16", "packed-bf16"])
def test_more_digits_for_keys_than_the_model_makes_are_refused(
    form: str, make_model: Make, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ConfigError, match="kv_precision"):
        Engine(make_model("mixtral", form), tokenizer, EngineConfig(kv_precision="fp32"))
    for precision in ("auto", "bf16", "int8"):
        engine = Engine(make_model("mixtral", form), tokenizer, EngineConfig(kv_precision=precision))
        assert len(run_one(engine, [1, 2, 3], GREEDY).ids) == GREEDY.max_tokens


def test_a_vector_that_is_no_number_is_an_error(tokenizer: Tokenizer) -> None:
    model = build_model("mixtral", "fp32")
    with torch.no_grad():
        model.embedding[77] = float("nan")
    engine = Engine(model, tokenizer)
    with pytest.raises(NotFiniteError, match="text 1 of 3"):
        engine.embed([[1, 2], [3, 77], [4]])
    assert engine.embed([[1, 2], [4]]).isfinite().all()


@torch.no_grad()
def test_embeddings_are_means_of_hidden_states(make_model: Make, tokenizer: Tokenizer) -> None:
    model = make_model("pr-moe", "fp32")
    engine = Engine(model, tokenizer, EngineConfig(max_batch_tokens=16))
    texts = [[1], list(range(50))]
    vectors = engine.embed(texts)
    assert engine.embed([]).shape == (0, vectors.shape[1])
    for text, vector in zip(texts, vectors, strict=True):
        mean = model(torch.tensor([text])).hidden[0].mean(0)
        torch.testing.assert_close(vector, mean / mean.norm(), atol=1e-5, rtol=1e-4)
    with pytest.raises(GenerationError, match="empty"):
        engine.embed([[]])
    with pytest.raises(GenerationError, match=r"the prompt is 'a text' \(str\)"):
        engine.embed(["a text"])


def test_embeddings_stop_for_the_steps_of_others(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model("pr-moe", "fp32"), tokenizer, EngineConfig(max_batch_tokens=16))
    texts = [[1], list(range(50)), *([n] for n in range(40)), list(range(9)), list(range(9))]
    alone = engine.embed(texts)
    expected = run_one(engine, [5, 6, 7], GREEDY).ids

    engine.add_request([5, 6, 7], GREEDY)
    pieces = engine.embed_in_pieces(texts)
    are_done: list[bool] = []
    tokens: list[int] = []
    while True:
        try:
            are_done.append(next(pieces))
        except StopIteration as end:
            vectors = end.value
            break
        tokens += [token.token_id for output in engine.step() for token in output.tokens]
    assert are_done[:3] == [True] * 3  # checked: 51, 17 and 17 tokens, and what is left
    assert are_done[3:] == [True, False, False, False, True, True, True, True, True]  # 1, 50, 16 + 16 + 8, 9 and 9
    assert torch.equal(vectors, alone)
    assert tokens == expected[: len(tokens)] and len(tokens) == len(are_done)
    given_up = engine.embed_in_pieces([list(range(50))])
    assert not next(given_up)
    given_up.close()
    before = engine.stats().num_prompt_tokens
    with pytest.raises(GenerationError, match="empty"):
        list(engine.embed_in_pieces([*texts, []]))
    assert engine.stats().num_prompt_tokens == before, "computed before all were checked"


REPEATING = [1, 2, 3, 4, 5, 6] * 8


@needs_kernels
@pytest.mark.parametrize("draft", ["ngram", "itself", "another"])
@pytest.mark.parametrize("config", [EngineConfig(), EngineConfig(max_batch_tokens=9, max_sequences=4)])
def test_drafting_changes_no_token(
    draft: str, config: EngineConfig, make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whatever is measured, and never the same number twice.
    monkeypatch.setattr(DepthChooser, "choose", lambda self, count: 1 + (self._num_choices + count) % self.max_depth)
    model = make_model("mixtral", "packed-bf16")
    speculation = SpeculationConfig(method="ngram")
    draft_model = None
    if draft != "ngram":
        speculation = SpeculationConfig(method="model", model="by hand", max_tokens=3)
        draft_model = model if draft == "itself" else make_model("dense", "packed-bf16", seed=1)
    requests = [
        *((prompt, SAMPLINGS[index % len(SAMPLINGS)]) for index, prompt in enumerate(prompts(9, seed=2))),
        (REPEATING, GREEDY.replace(max_tokens=40)),
    ]
    plain = Engine(model, tokenizer)
    expected = [run_one(plain, prompt, sampling) for prompt, sampling in requests]
    engine = Engine(model, tokenizer, config.replace(speculation=speculation), draft_model=draft_model)
    names = [engine.add_request(prompt, sampling) for prompt, sampling in requests]
    got = finish(engine)
    for name, each in zip(names, expected, strict=True):
        assert got[name, 0].tokens == each.tokens
        assert (got[name, 0].text, got[name, 0].finish_reason) == (each.text, each.finish_reason)
    stats = engine.stats()
    assert stats.num_drafted_tokens > 0
    if draft == "itself":  # it chooses with the same random numbers, so it is always right
        assert stats.num_accepted_tokens > 0.9 * stats.num_drafted_tokens


@pytest.mark.parametrize("broken", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    ("form", "kv_precision"),
    [
        ("fp32", "auto"),
        pytest.param("packed-bf16", "auto", marks=needs_kernels),
        pytest.param("packed-bf16", "int8", marks=needs_kernels),
    ],
)
def test_a_drafted_token_whose_numbers_are_none_changes_nothing(
    form: str, kv_precision: str, broken: float, make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft likes it, the model never takes it: its keys and values lie behind the text's own."""
    monkeypatch.setattr(DepthChooser, "choose", lambda self, count: self.max_depth)

    def with_token(embedding: float | None, output: float) -> Transformer:
        config = ModelConfig.from_dict({**SIZES, **FAMILIES["mixtral"]})
        model = Transformer(config, compute_dtype=torch.float32 if form == "fp32" else torch.bfloat16).initialize(0)
        assert model.lm_head is not None
        with torch.no_grad():
            model.lm_head[7] *= output
            if embedding is not None:
                model.embedding[7] = embedding
        return model.eval() if form == "fp32" else pack_transformer(model)

    model, draft_model = with_token(broken, 0.0), with_token(None, 3.0)
    texts, engines = [], []
    # The second: the last token of a prompt comes alone, with drafts behind it.
    for config in (EngineConfig(), EngineConfig(max_batch_tokens=3, max_sequences=1)):
        for speculation in (None, SpeculationConfig(method="model", model="by hand", max_tokens=4)):
            settings = config.replace(speculation=speculation, kv_precision=kv_precision)
            engine = Engine(model, tokenizer, settings, draft_model=draft_model if speculation else None)
            names = [engine.add_request([1, 2, 3, 10 + number], GREEDY.replace(max_tokens=15)) for number in range(4)]
            found = finish(engine)
            texts.append([found[name, 0].ids for name in names])
            assert all(len(ids) == 15 and 7 not in ids for ids in texts[-1])
            engines.append(engine.stats())
    # Where several tokens of a pass are rounded otherwise than one, likeliest tokens may differ.
    assert texts[0] == texts[1] == texts[2] == texts[3] or form == "fp32"
    assert 0 < engines[1].num_preemptions <= len(names)
    assert all(stats.num_prompt_tokens == 4 * len(names) for stats in engines)


@pytest.mark.parametrize("draft", ["ngram", "itself", "another"])
def test_drafting_changes_no_greedy_token_whose_lead_is_more_than_rounding(
    draft: str, make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the C++ kernels too, where several tokens of a pass are rounded otherwise than one."""
    monkeypatch.setattr(DepthChooser, "choose", lambda self, num_sequences: self.max_depth)
    model, speculation, draft_model = make_model("mixtral"), SpeculationConfig(method="ngram"), None
    if draft != "ngram":
        speculation = SpeculationConfig(method="model", model="by hand", max_tokens=3)
        draft_model = model if draft == "itself" else make_model("dense", seed=1)
    sampling = GREEDY.replace(max_tokens=20, logprobs=2)
    with select.forced(select.REFERENCE):
        plain = Engine(model, tokenizer)
        engine = Engine(model, tokenizer, EngineConfig(speculation=speculation), draft_model=draft_model)
        assert not engine.is_batch_invariant
        asked = {engine.add_request(prompt, sampling): prompt for prompt in [*prompts(3, seed=2), REPEATING]}
        got = finish(engine)
        for request_id, prompt in asked.items():
            expected = run_one(plain, prompt, sampling)
            for token in expected.tokens:
                most, next_most = (each.logprob for each in token.top_logprobs)
                assert most - next_most > 1e-3  # in fp32 some hundred times what rounding moves
            assert got[request_id, 0].ids == expected.ids
    stats = engine.stats()
    assert stats.num_drafted_tokens > 0 and (draft != "itself" or stats.num_accepted_tokens > 0)


@needs_kernels
def test_a_draft_that_is_right_saves_passes(
    make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DepthChooser, "choose", lambda self, num_sequences: self.max_depth)
    model = make_model("dense", "packed-bf16")
    speculation = SpeculationConfig(method="model", model="by hand", max_tokens=3)
    engine = Engine(model, tokenizer, EngineConfig(speculation=speculation), draft_model=model)
    got = run_one(engine, [1, 2, 3], GREEDY.replace(max_tokens=41))
    assert len(got.ids) == 41
    assert engine.stats().num_steps == 1 + 10  # the prompt, then four tokens a pass
    assert engine.stats().num_accepted_tokens == 30


@needs_kernels
@pytest.mark.parametrize(("ends_at", "right"), [(2, 1), (3, 2), (4, 3), (5, 3), (6, 4)])
def test_a_right_draft_that_ends_its_text_is_counted(
    ends_at: int, right: int, make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DepthChooser, "choose", lambda self, num_sequences: self.max_depth)
    model = make_model("dense", "packed-bf16")
    speculation = SpeculationConfig(method="model", model="by hand", max_tokens=3)
    engine = Engine(model, tokenizer, EngineConfig(speculation=speculation), draft_model=model)
    drawn = Sampling(max_tokens=20, temperature=1.0, seed=1, ignore_end_of_text=True)
    text = run_one(engine, [1, 2, 3], drawn)
    assert text.ids.index(text.ids[ends_at - 1]) == ends_at - 1
    before = engine.stats().num_accepted_tokens
    run_one(engine, [1, 2, 3], drawn.replace(stop_token_ids=(text.ids[ends_at - 1],)))
    assert engine.stats().num_accepted_tokens - before == right  # one from the prompt, then four a pass


@needs_kernels
def test_what_a_draft_failed_to_compute_it_computes_later(
    make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DepthChooser, "choose", lambda self, num_sequences: self.max_depth)
    model, draft_model = make_model("dense", "packed-bf16"), build_model("dense", "packed-bf16")
    speculation = SpeculationConfig(method="model", model="by hand", max_tokens=3)
    config = EngineConfig(speculation=speculation, max_batch_tokens=60)
    engine = Engine(model, tokenizer, config, draft_model=draft_model)
    num_passes, run = 0, Runner.run

    def break_once(self: Runner, parts: Sequence[Part], rows: Sequence[int] = ()) -> Decoded:
        nonlocal num_passes
        num_passes += self.model is draft_model
        if self.model is draft_model and num_passes == 2:  # of two that catching up takes
            raise RuntimeError("it was told to fail")
        return run(self, parts, rows)

    monkeypatch.setattr(Runner, "run", break_once)
    prompt = list(range(100))
    request_id = engine.add_request(prompt, GREEDY)
    with pytest.raises(RuntimeError, match="told to fail"):
        finish(engine)
    engine.abort(request_id)
    assert [output.finish_reason for output in engine.step()] == ["abort"]
    run_one(engine, prompt, GREEDY.replace(max_tokens=41))
    assert engine.stats().num_accepted_tokens == 30  # all are right, as the same model's


def test_what_a_draft_had_missed_is_not_the_price_of_drafting(
    make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft_model, clock = make_model("dense"), 0.0
    recorded: list[tuple[float, ...]] = []
    missed: list[float] = []
    depths = iter([3, 2, *[0] * 30, 1, 2, *[0] * 30, 3, 1])
    run = Runner.run

    def timed(self: Runner, parts: Sequence[Part], rows: Sequence[int] = ()) -> Decoded:
        nonlocal clock
        clock += sum(len(part.tokens) for part in parts) if self.model is draft_model else 0
        return run(self, parts, rows)

    monkeypatch.setattr(Runner, "run", timed)
    monkeypatch.setattr(time, "perf_counter", lambda: clock)
    monkeypatch.setattr(DepthChooser, "choose", lambda self, count: next(depths, 1) if count else 0)

    def record(self: DepthChooser, *measured: float, missed_seconds: float) -> None:
        recorded.append(measured)
        missed.append(missed_seconds)

    monkeypatch.setattr(DepthChooser, "record_draft", record)
    speculation = SpeculationConfig(method="model", model="by hand")
    engine = Engine(make_model(), tokenizer, EngineConfig(speculation=speculation), draft_model=draft_model)
    clock = 0.0  # its first pass is over
    for number in range(3):
        engine.add_request([number] * 60, GREEDY.replace(max_tokens=100))
    finish(engine)
    assert len(recorded) > 6 and clock == sum(missed) + sum(each[2] for each in recorded) > 3 * 60
    assert sum(missed) >= 3 * 60
    for num_sequences, depth, seconds in recorded:  # a token, and one that was right and is not computed yet
        assert seconds <= num_sequences * (depth + 1)


def test_a_priority_that_is_no_number_changes_nothing(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model("dense"), tokenizer, EngineConfig(max_sequences=1))
    name = engine.add_request([1], GREEDY)
    for priority in (None, "high", 0.5):
        with pytest.raises(ConfigError, match=r"the priority is .* an int is required"):
            engine.add_request([1], GREEDY, priority=priority)  # type: ignore[arg-type]
    assert engine.num_texts == 1
    assert finish(engine)[name, 0].finish_reason == "length"


def test_what_numpy_counts_with_comes_back_as_python_has_it(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model("dense"), tokenizer)
    name = engine.add_request(list(np.array([1, 2, 3])), Sampling(max_tokens=1, prompt_logprobs=1))  # type: ignore[arg-type]
    scores = finish(engine)[name, 0].prompt_logprobs
    assert scores is not None and all(type(token.token_id) is int for token in scores.tokens)


def test_a_model_that_cannot_draft_is_refused(make_model: Make, tokenizer: Tokenizer) -> None:
    speculation = SpeculationConfig(method="model", model="by hand")
    small = ModelConfig.from_dict({**SIZES, "max_positions": 16})
    other = ModelConfig.from_dict({**SIZES, "vocab_size": 64})
    for config, words in ((small, "16 positions"), (other, "vocabulary of 64")):
        model = Transformer(config).initialize(0)
        with pytest.raises(ConfigError, match=words):
            Engine(make_model(), tokenizer, EngineConfig(speculation=speculation), draft_model=model)
    with pytest.raises(ConfigError, match="draft_model is None"):
        Engine(make_model(), tokenizer, EngineConfig(speculation=speculation))
    for without, method in ((None, "None"), (SpeculationConfig(method="ngram"), "'ngram'")):
        with pytest.raises(ConfigError, match=f"draft_model is given and speculation.method is {method}"):
            Engine(make_model(), tokenizer, EngineConfig(speculation=without), draft_model=make_model())


def test_a_text_as_long_as_asked_has_to_fit(
    make_model: Make, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    small = EngineConfig(kv_cache_bytes=2 * block_bytes(model, block_size=32, dtype=model.compute_dtype))
    with pytest.raises(ConfigError, match=r"^max_length \(65\) is more than the 64 positions .* raise engine.kv_cache"):
        Engine(model, tokenizer, small.replace(max_length=65))
    with caplog.at_level("WARNING", "moesaic"):
        assert Engine(model, tokenizer, small.replace(max_length=64)).max_length == 64
        assert not caplog.records
        assert Engine(model, tokenizer, small).max_length == 64 < model.config.max_positions
    assert "A text may have 64 tokens, of the model's" in caplog.text


def test_keys_and_values_beyond_the_free_memory_are_told_of(
    make_model: Make, tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    config = EngineConfig(kv_cache_bytes=_bytes_of_blocks(model, 4))
    with caplog.at_level("WARNING", "moesaic"):
        monkeypatch.setattr("moesaic.serve.engine.available_memory_bytes", lambda _: config.kv_cache_bytes)
        Engine(model, tokenizer, config)
        assert "are free" not in caplog.text
        monkeypatch.setattr("moesaic.serve.engine.available_memory_bytes", lambda _: config.kv_cache_bytes - 1)
        Engine(model, tokenizer, config)
    assert "GB are free: once they do, the system may end the process; lower engine.kv_cache_bytes" in caplog.text


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 5}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}


@needs_kernels
def test_a_grammar_is_kept_beside_others_and_with_drafts(
    make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar_module = pytest.importorskip("moesaic.serve.grammar")
    pytest.importorskip("xgrammar", reason="structured output stands on xgrammar")
    monkeypatch.setattr(DepthChooser, "choose", lambda self, count: 2)
    model = make_model("mixtral", "packed-bf16")
    compiler = grammar_module.GrammarCompiler(tokenizer, vocab_size=VOCAB_SIZE)
    speculation = SpeculationConfig(method="ngram")
    sampling = Sampling(
        temperature=1.0, max_tokens=100, seed=1, grammar=Grammar(kind="json_schema", text=json.dumps(SCHEMA)), n=2,
        ignore_end_of_text=True, logit_bias={tokenizer.encode('"')[0]: 4.0},
    )  # fmt: skip
    results = []
    for config in (EngineConfig(), EngineConfig(speculation=speculation, max_batch_tokens=8)):
        engine = Engine(model, tokenizer, config, grammars=compiler)
        engine.add_request(REPEATING, GREEDY)
        request_id = engine.add_request([1, 2], sampling)
        got = finish(engine)
        for index in range(2):
            each = got[request_id, index]
            if each.finish_reason == "stop":
                values = json.loads(each.text)
                assert set(values) == {"name", "n"} and isinstance(values["n"], int) and len(values["name"]) <= 5
        results.append([(got[request_id, index].ids, got[request_id, index].finish_reason) for index in range(2)])
    assert results[0] == results[1]
    assert "stop" in {reason for _, reason in results[0]}
    with pytest.raises(ConfigError, match="compiles none"):
        Engine(model, tokenizer).add_request([1], sampling)
    compiler.close()


@needs_kernels
def test_a_request_whose_grammar_is_slow_or_leaves_nothing_ends_and_others_go_on(
    make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    grammar_module = pytest.importorskip("moesaic.serve.grammar")
    pytest.importorskip("xgrammar", reason="structured output stands on xgrammar")
    compiler = grammar_module.GrammarCompiler(tokenizer, vocab_size=VOCAB_SIZE, timeout_seconds=20.0)
    (a,) = tokenizer.encode("a")
    one = Sampling(max_tokens=20, seed=1, grammar=Grammar(kind="regex", text="a"))
    few, many = (one.replace(grammar=Grammar(kind="regex", text=f"a{{{count}}}")) for count in (5, 100))
    engine = Engine(make_model("mixtral", "packed-bf16"), tokenizer, grammars=compiler)
    engine.add_request([1, 2], GREEDY, request_id="alone")
    alone = finish(engine)["alone", 0].ids
    fine = engine.add_request([1, 2], GREEDY)
    forbidden = engine.add_request([3], one.replace(logit_bias={a: -100}, n=2))
    stopping = engine.add_request([3], one.replace(stop_token_ids=tuple(range(VOCAB_SIZE))))
    short = engine.add_request([3], few)
    slow = engine.add_request([3], many.replace(n=3, max_tokens=100))
    # A call takes 0.01 s, so a token, with its mask, 0.02.
    times = itertools.count(0.0, 0.01)
    monkeypatch.setattr("moesaic.serve.grammar.time.thread_time", lambda: next(times))
    got = finish(engine)
    assert got[fine, 0].ids == alone and got[fine, 0].finish_reason == "length"
    assert got[short, 0].text == "aaaaa" and got[short, 0].finish_reason == "stop"
    for request_id, message in (
        (forbidden, f"the grammar allows only token {a} and logit_bias forbids token {a}, which leaves no token here"),
        (stopping, "the grammar allows no token here; one is required; take what the text needs out of stop_token_ids"),
        (slow, "less ambiguous"),
    ):
        texts = [each for (owner, _), each in got.items() if owner == request_id]
        assert len(texts) == {forbidden: 2, stopping: 1, slow: 3}[request_id]
        for each in texts:
            assert each.finish_reason == "error" and each.is_refused and message in str(each.message), each
    # A second, and 4 ms a token: of all three texts together.
    assert 50 < sum(len(got[slow, index].ids) for index in range(3)) < 70
    # Where the states of its texts alone take too long, it does not begin.
    with pytest.raises(GenerationError, match=r"took 1\.\d\d s for 0 tokens"):
        engine.add_request([3], many.replace(n=128))
    assert not engine.has_work
    compiler.close()


def test_bytes_of_experts_and_what_the_disk_gave_of_them(
    make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = [1000]
    monkeypatch.setattr(expert_load, "disk_bytes_read", lambda: read[0])
    model = make_model("mixtral", "fp32")
    expert = 3 * 64 * 96 * 4  # gate, up and down, in fp32
    engine = Engine(model, tokenizer)
    engine.add_request([1], GREEDY.replace(max_tokens=65))
    for _ in range(16):
        engine.step()
    stats = engine.stats()
    assert stats.expert_bytes_used == 16 * 3 * 2 * expert and stats.expert_hit_rate == 1.0
    read[0] += 16 * 3 * expert  # every second expert
    for _ in range(16):
        engine.step()
    hit_rate = engine.stats().expert_hit_rate
    assert hit_rate is not None and 0.7 < hit_rate < 0.75  # the older look weighs a little less
    # An expert of a mapped file comes as whole huge pages, here all of its layer's experts at once.
    mapped = deepcopy(model)
    mapped.reads_ahead = True
    monkeypatch.setattr(expert_load, "reads_by_huge_pages", lambda: True)
    engine = Engine(mapped, tokenizer)
    read[0] += 16 * 3 * 2 * expert
    run_one(engine, [1], GREEDY.replace(max_tokens=16))
    num_experts = engine.stats().layers[0].num_experts
    assert num_experts > 2 and engine.stats().expert_hit_rate == pytest.approx(1 - 2 / num_experts, abs=1e-6)
    monkeypatch.setattr(expert_load, "disk_bytes_read", lambda: None)
    unknown = Engine(model, tokenizer)
    run_one(unknown, [1], GREEDY.replace(max_tokens=20))
    assert unknown.stats().expert_hit_rate is None


def test_what_a_draft_model_reads_from_the_disk_is_no_miss_of_the_models_experts(
    make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expert_load, "disk_bytes_read", lambda: 1000)
    model, config = make_model("mixtral", "fp32"), EngineConfig(speculation=SpeculationConfig(method="ngram"))
    engine = Engine(model, tokenizer, config)
    run_one(engine, [1], GREEDY.replace(max_tokens=150))
    assert engine.stats().expert_hit_rate == 1.0
    config = EngineConfig(speculation=SpeculationConfig(method="model", model="by hand"))
    engine = Engine(model, tokenizer, config, draft_model=make_model("dense"))
    run_one(engine, [1], GREEDY.replace(max_tokens=150))
    assert engine.stats().expert_hit_rate is None and engine.stats().expert_bytes_used > 0


def test_several_requests_are_taken_in_all_or_none(make_model: Make, tokenizer: Tokenizer) -> None:
    engine = Engine(make_model("mixtral", "fp32"), tokenizer)
    with pytest.raises(GenerationError, match="at most 191 fit here"):
        engine.add_requests([[1], [2], [3] * 200], GREEDY, request_ids=["a", "b", "c"])
    assert engine.num_texts == 0
    assert not engine.has_request("a") and engine.step() == [] and engine.stats().num_finished == 0
    for ids in (["a", "a"], ["a"]):
        with pytest.raises(ConfigError, match=r"^2 prompts were given with the request ids \['a'"):
            engine.add_requests([[1], [2]], GREEDY, request_ids=ids)
    engine.add_requests([[1], [2]], GREEDY.replace(max_tokens=1), request_ids=["a", "b"])
    assert {each.request_id for each in engine.step()} == {"a", "b"}


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 80},
        {"head_dim": 64},
        {"latent_attention": {"kv_rank": 70, "nope_head_dim": 8, "rope_head_dim": 4, "value_head_dim": 8}},
    ],
)
def test_the_planned_memory_of_keys_and_values_is_what_a_block_takes(changes: dict[str, Any]) -> None:
    config = ModelConfig.from_dict(
        {"vocab_size": 320, "hidden_size": 64, "num_layers": 3, "num_heads": 4, "max_positions": 64, **changes}
    )
    model = Transformer(config).bfloat16()
    planned = memory(config, micro_batch_size=1, sequence_length=64)
    assert block_bytes(model, block_size=32, dtype=torch.bfloat16) == 32 * planned.kv_cache_bytes_per_token
