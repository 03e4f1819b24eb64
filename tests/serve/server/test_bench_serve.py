"""`moesaic bench serve` measures our own server: every request is answered as asked, and none counted twice."""

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

from moesaic.bench.serving import Endpoint, bench_serving
from moesaic.bench.workload import PromptForm, Workload
from moesaic.errors import ConfigError

from ..conftest import VOCAB_SIZE
from .conftest import Live, live

WORKLOAD = Workload(
    prompt_tokens=(1, 40), output_tokens=(1, 24), num_requests=12, concurrency=4, vocab_size=VOCAB_SIZE, seed=3
)


def test_our_server_gives_what_is_asked(real: Live) -> None:
    result = bench_serving(Endpoint(url=real.url), WORKLOAD)
    assert result.model == "tiny" and [each.error for each in result.requests] == [None] * 12
    for each in result.requests:
        assert (each.prompt_tokens, each.output_tokens) == (each.asked_prompt_tokens, each.asked_output_tokens)
        assert 1 <= len(each.chunk_seconds) <= each.asked_output_tokens
        assert each.sent_seconds <= each.chunk_seconds[0] <= each.chunk_seconds[-1] <= each.end_seconds
    again = bench_serving(Endpoint(url=f"{real.url}/v1"), WORKLOAD)
    assert again.summary().output_tokens == result.summary().output_tokens
    # The same seed again: what fills a block is known to the server now.
    assert again.summary().cached_tokens > result.summary().cached_tokens


@pytest.mark.parametrize("prompts", ["text", "chat"])
def test_our_server_is_asked_in_words(real: Live, prompts: PromptForm) -> None:
    workload = Workload(
        prompt_tokens=(60, 90), output_tokens=(2, 6), num_requests=8, concurrency=4, prompts=prompts, seed=5
    )
    result = bench_serving(Endpoint(url=real.url), workload)
    assert [each.error for each in result.requests] == [None] * 8 and result.summary().num_shorter == 0
    for each in result.requests:
        assert each.output_tokens == each.asked_output_tokens
        assert each.prompt_tokens is not None and 0.6 < each.prompt_tokens / each.asked_prompt_tokens < 1.5
        assert each.ttft_seconds is not None and each.ttft_seconds <= each.end_to_end_seconds


def test_a_key_that_is_needed_is_asked_for(real_app: Callable[..., FastAPI]) -> None:
    with live(real_app(keys=("secret",))) as running:
        with pytest.raises(ConfigError, match="--api-key-file"):
            bench_serving(Endpoint(url=running.url), WORKLOAD)
        with pytest.raises(ConfigError, match="does not take the key of --api-key-file"):
            bench_serving(Endpoint(url=running.url, api_key="other"), WORKLOAD)
        with pytest.raises(ConfigError, match="status 401"):
            bench_serving(Endpoint(url=running.url, model="tiny"), WORKLOAD)
        assert bench_serving(Endpoint(url=running.url, api_key="secret"), WORKLOAD).summary().errors == {}


@pytest.mark.parametrize(
    ("workload", "message"),
    [
        ({"vocab_size": 100_000}, "--vocab-size"),
        ({}, "'nothing'"),
    ],
)
def test_what_our_server_refuses_is_told(real: Live, workload: dict[str, Any], message: str) -> None:
    asked = Workload(prompt_tokens=(4, 4), output_tokens=(2, 2), concurrency=1, num_requests=1, **workload)
    model = None if workload else "nothing"
    with pytest.raises(ConfigError, match=message):
        bench_serving(Endpoint(url=real.url, model=model), asked)
