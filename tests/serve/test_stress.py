"""An engine under requests of every kind that come, wait, are preempted and leave at any moment."""

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from moesaic.config.serve import EngineConfig, Sampling, SpeculationConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.kernels import select
from moesaic.model.transformer import Transformer
from moesaic.serve.depth import DepthChooser
from moesaic.serve.engine import Engine
from moesaic.serve.outputs import GeneratedToken, PromptLogprobs
from moesaic.serve.runner import block_bytes

from .conftest import VOCAB_SIZE

Make = Callable[..., Transformer]
pytestmark = pytest.mark.skipif(
    not select.supported_instruction_sets(), reason="only the C++ kernels promise results that depend on no neighbour"
)
_BLOCK_SIZE = 32
_NUM_REQUESTS = 24


@dataclass
class Got:
    """What one text of a request has given so far."""

    tokens: list[GeneratedToken] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: PromptLogprobs | None = None


def step(engine: Engine, got: dict[tuple[str, int], Got]) -> None:
    outputs = engine.step()
    assert outputs or engine.stats().step_tokens, "a step that did nothing"
    for output in outputs:
        each = got[output.request_id, output.index]
        assert each.finish_reason is None, "an output after the last"
        each.tokens += output.tokens
        each.text += output.text
        each.finish_reason, each.stop_reason = output.finish_reason, output.stop_reason
        assert each.prompt_logprobs is None or output.prompt_logprobs is None
        each.prompt_logprobs = each.prompt_logprobs or output.prompt_logprobs
        assert output.completion_tokens == len(each.tokens)


def draw_request(rng: random.Random, common: list[int], *, longest: int) -> tuple[list[int], Sampling]:
    """Many prompts begin alike, some fill the engine; every kind of end is among them."""
    own = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice((1, 5, 40, longest)))]
    prompt = ([] if rng.random() < 0.3 else common[: rng.randrange(longest)]) + own
    max_tokens = rng.choice((0, 1, 7, 30))
    sampling = Sampling(
        max_tokens=max_tokens,
        temperature=rng.choice((0.0, 1.0)),
        seed=rng.randrange(100),
        n=rng.choice((1, 1, 2, 3)),
        repetition_penalty=rng.choice((1.0, 1.2)),
        logprobs=rng.choice((None, 1)),
        prompt_logprobs=rng.choice((None, None, 0, 1)),
        stop=rng.choice(((), ("e", " t"))),
        ignore_end_of_text=rng.random() < 0.5,
        return_experts=rng.random() < 0.2,
    )
    return prompt[: longest - (max_tokens > 0)], sampling


def alone(
    model: Transformer, tokenizer: Tokenizer, config: EngineConfig, prompt: list[int], sampling: Sampling
) -> list[Got]:
    """Each text of a request, with nothing beside it."""
    texts = []
    for index in range(sampling.n):
        engine = Engine(
            model,
            tokenizer,
            config.replace(max_sequences=1, max_batch_tokens=1024, prefix_caching=False, speculation=None),
        )
        assert sampling.seed is not None
        prompt_logprobs = None if index else sampling.prompt_logprobs
        engine.add_request(
            prompt,
            sampling.replace(n=1, seed=sampling.seed + index, prompt_logprobs=prompt_logprobs),
            request_id="one",
        )
        got = {("one", 0): Got()}
        while engine.has_work:
            step(engine, got)
        texts.append(got["one", 0])
    return texts


@pytest.mark.parametrize("draft", [None, "ngram", "model"])
@pytest.mark.parametrize("seed", range(3))
def test_every_request_ends_once_with_its_own_tokens_and_leaves_nothing_behind(
    seed: int, draft: str | None, make_model: Make, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(f"{seed} {draft}")
    monkeypatch.setattr(DepthChooser, "choose", lambda self, count: rng.randrange(self.max_depth + 1))
    family = rng.choice(("dense", "mixtral", "pr-moe", "latent"))
    model = make_model(family, "packed-int8")
    num_blocks = rng.randrange(2, 7)
    draft_model = rng.choice((model, make_model("dense", "packed-int8", seed=1))) if draft == "model" else None
    each = sum(
        block_bytes(one, block_size=_BLOCK_SIZE, dtype=one.compute_dtype)
        for one in (model, draft_model)
        if one is not None
    )
    config = EngineConfig(
        kv_cache_bytes=num_blocks * each,
        max_sequences=rng.choice((2, 5, 9)),
        max_batch_tokens=rng.choice((1, 5, 33, 200)),
        prefix_caching=rng.random() < 0.7,
        block_size=_BLOCK_SIZE,
        kv_precision="bf16" if family == "latent" else rng.choice(("bf16", "int8")),
    )
    speculation = {
        None: None,
        "ngram": SpeculationConfig(method="ngram"),
        "model": SpeculationConfig(method="model", model="by hand"),
    }[draft]
    engine = Engine(model, tokenizer, config.replace(speculation=speculation), draft_model=draft_model)
    common = [rng.randrange(4) for _ in range(engine.max_length)]
    asked: dict[str, tuple[list[int], Sampling]] = {}
    leaving: dict[str, int] = {}  # at which step
    got: dict[tuple[str, int], Got] = {}
    for number in range(20_000):
        if len(asked) < _NUM_REQUESTS and rng.random() < 0.15:
            prompt, sampling = draw_request(rng, common, longest=engine.max_length)
            request_id = engine.add_request(prompt, sampling, priority=rng.randrange(3))
            asked[request_id] = prompt, sampling
            got.update({(request_id, index): Got() for index in range(sampling.n)})
            if rng.random() < 0.25:
                leaving[request_id] = number + rng.choice((0, 1, 2, 10, 40, 200))
        for request_id in [each for each, when in leaving.items() if when == number]:
            is_going_on = any(got[request_id, index].finish_reason is None for index in range(asked[request_id][1].n))
            assert engine.abort(request_id) is is_going_on
        if engine.has_work:
            step(engine, got)
        elif len(asked) == _NUM_REQUESTS:
            break
    assert not engine.has_work and len(asked) == _NUM_REQUESTS

    assert all(each.finish_reason is not None for each in got.values())
    stats = engine.stats()
    assert stats.kv_blocks_used == stats.num_running == stats.num_waiting == engine.num_texts == 0
    assert stats.num_finished == len(got)
    assert stats.num_generated_tokens == sum(len(each.tokens) for each in got.values())
    for holder in (engine, engine._draft):
        kept = {name: value for name, value in vars(holder).items() if isinstance(value, dict)} if holder else {}
        kept.pop("_counts", None)
        assert len(kept.pop("_valid", ())) <= stats.kv_blocks_total
        assert not any(kept.values()), kept

    num_prompt_tokens = 0
    for request_id, (prompt, sampling) in asked.items():
        for index, expected in enumerate(alone(model, tokenizer, config, prompt, sampling)):
            mine = got[request_id, index]
            if mine.finish_reason == "abort":
                assert request_id in leaving
                assert mine.tokens == expected.tokens[: len(mine.tokens)] and expected.text.startswith(mine.text)
            else:
                assert mine == expected
            num_prompt_tokens += len(prompt) * bool(mine.tokens or mine.finish_reason != "abort")
    assert stats.num_prompt_tokens == num_prompt_tokens and stats.num_cached_tokens <= num_prompt_tokens
