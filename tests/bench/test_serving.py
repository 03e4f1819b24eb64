"""A server is driven as planned, its answers are timed, and what fails is counted by how it failed."""

import asyncio
import codecs
import json
import math
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest

from moesaic.bench.serving import Endpoint, bench_serving, drive
from moesaic.bench.workload import Workload
from moesaic.errors import ConfigError, InstallationError
from moesaic.report.serving import RequestResult, ServingResult

# What an answer consists of: pauses in seconds, pieces of the stream, an exception that breaks it, a status.
Script = list[float | bytes | Exception | int]
Body = dict[str, Any]


def event(text: str, *, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice], **more}).encode() + b"\n\n"


def counts(body: Body, **changes: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"], **changes}
    return {"usage": {key: value for key, value in usage.items() if value is not None}}


def last_words(body: Body, **changes: Any) -> list[bytes]:
    return [b"data: " + json.dumps({"choices": [], **counts(body, **changes)}).encode() + b"\n\n", b"data: [DONE]\n\n"]


def steady(body: Body, *, first: float = 0.5, each: float = 0.1) -> Script:
    """As vLLM and ours answer: a chunk for each token, the last one with the reason, the counts behind it."""
    tokens: Script = []
    for number in range(body["max_tokens"]):
        is_last = number == body["max_tokens"] - 1
        tokens += [each if number else first, event("x", finish="length" if is_last else None, usage=None)]
    return [*tokens, *last_words(body)]


@dataclass
class FakeServer:
    """Answers by a script that is made of each request's number and body; keeps when each came, and what it asked."""

    script: Callable[[int, Body], Script]
    models: httpx.Response = field(default_factory=lambda: httpx.Response(200, json={"data": [{"id": "tiny"}]}))
    came: list[float] = field(default_factory=list)
    bodies: list[Body] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    headers: list[httpx.Headers] = field(default_factory=list)
    running: int = 0
    most_running: int = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.headers.append(request.headers)
        if request.url.path == "/v1/models":
            return self.models
        self.paths.append(request.url.path)
        self.came.append(asyncio.get_running_loop().time())
        self.bodies.append(json.loads(request.content))
        script = self.script(len(self.bodies) - 1, self.bodies[-1])
        if script and isinstance(script[0], int):
            return httpx.Response(script[0], text="no")
        if script and isinstance(script[0], httpx.ConnectError):
            raise script[0]
        return httpx.Response(200, content=self._play(script))

    async def _play(self, script: Script) -> AsyncIterator[bytes]:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            for part in script:
                if isinstance(part, Exception):
                    raise part
                if isinstance(part, bytes):
                    yield part
                else:
                    await asyncio.sleep(part)
        finally:
            self.running -= 1


WORKLOAD = Workload(prompt_tokens=(5, 9), output_tokens=(3, 6), num_requests=6, concurrency=1)
Run = Callable[..., ServingResult]


@pytest.fixture
def run(in_virtual_time: Callable[..., Any]) -> Run:
    def call(
        server: FakeServer, workload: Workload = WORKLOAD, *, num_warmup: int = 0, **options: Any
    ) -> ServingResult:
        endpoint = Endpoint(url="http://test", **options)
        driven = drive(endpoint, workload, num_warmup=num_warmup, transport=httpx.MockTransport(server))
        result = in_virtual_time(driven)
        assert isinstance(result, ServingResult)
        return result

    return call


def answered_by(make: Callable[[Body], Script]) -> FakeServer:
    """A server that answers the trial steadily, and every other request by a script."""
    return FakeServer(lambda number, body: make(body) if number else steady(body))


def only(result: ServingResult) -> RequestResult:
    (request,) = result.requests
    return request


ONE = Workload(prompt_tokens=(8, 8), output_tokens=(4, 4), num_requests=1, concurrency=1)


def test_times_are_those_of_the_chunks_and_tokens_those_of_the_counts(run: Run) -> None:
    request = only(run(answered_by(lambda body: steady(body, first=0.5, each=0.1)), ONE))
    assert request.error is None and (request.prompt_tokens, request.output_tokens) == (8, 4)
    assert request.sent_seconds == request.due_seconds == 0.0
    assert request.chunk_seconds == pytest.approx([0.5, 0.6, 0.7, 0.8])
    assert request.ttft_seconds == pytest.approx(0.5) and request.tpot_seconds == pytest.approx(0.1)
    assert request.end_to_end_seconds == pytest.approx(0.8)


def test_what_is_asked_is_what_servers_understand(run: Run) -> None:
    server = FakeServer(lambda _, body: steady(body))
    result = run(server, ONE, api_key="secret")
    assert result.model == "tiny" and result.name == "tiny"
    body = server.bodies[-1]
    assert set(server.paths) == {"/v1/completions"} and len(body.pop("prompt")) == 8
    assert body == {
        "model": "tiny", "max_tokens": 4, "temperature": 0, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret"}
    assert "secret" not in repr(Endpoint(url="http://test", api_key="secret"))


def test_a_last_chunk_without_a_token_is_no_token(run: Run) -> None:
    """llama-server: a chunk for each token, then one without text, with the reason and the counts."""

    def script(body: Body) -> Script:
        tokens: Script = []
        for _ in range(body["max_tokens"]):
            tokens += [0.25, event("x")]
        return [*tokens, 0.05, event("", finish="length", **counts(body)), b"data: [DONE]\n\n"]

    request = only(run(answered_by(script), ONE))
    assert request.error is None
    assert request.chunk_seconds == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert request.end_to_end_seconds == pytest.approx(1.05)


def test_a_chunk_without_text_is_a_token_where_there_are_no_more_chunks_than_tokens(run: Run) -> None:
    """vLLM: half a character is held back, its chunk comes all the same."""

    def script(body: Body) -> Script:
        return [0.2, event(""), 0.2, event("é"), 0.2, event(""), 0.2, event("é", finish="length"), *last_words(body)]

    assert only(run(answered_by(script), ONE)).chunk_seconds == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_of_chunks_without_text_only_as_many_as_there_are_too_many_are_no_tokens(run: Run) -> None:
    """Half characters that come, and a last word without a token."""

    def script(body: Body) -> Script:
        halves: Script = [0.2, event(""), 0.2, event("é"), 0.2, event(""), 0.2, event("é")]
        return [*halves, 0.2, event("", finish="length"), *last_words(body)]

    assert only(run(answered_by(script), ONE)).chunk_seconds == pytest.approx([0.2, 0.4, 0.6, 0.8])


def test_what_comes_behind_the_end_is_no_part_of_the_answer(run: Run) -> None:
    request = only(run(answered_by(lambda body: [*steady(body), 0.3, event("late"), b"data: nonsense\n\n"]), ONE))
    assert request.error is None and request.chunk_seconds == pytest.approx([0.5, 0.6, 0.7, 0.8])


def test_a_chunk_may_hold_several_tokens(run: Run) -> None:
    def script(body: Body) -> Script:
        return [0.4, event("xx"), 0.3, event("xx", finish="length"), *last_words(body)]

    result = run(answered_by(script), ONE)
    assert only(result).tpot_seconds == pytest.approx(0.1)
    assert result.summary().tokens_per_chunk == 2.0


def test_first_and_last_words_without_text_are_no_tokens_beside_chunks_of_several(run: Run) -> None:
    def script(body: Body) -> Script:
        begin: Script = [0.1, event(""), 0.4, event("xx")]
        return [*begin, 0.3, event("xx"), 0.2, event("", finish="length"), *last_words(body)]

    result = run(answered_by(script), replace(ONE, output_tokens=(6, 6)))
    assert only(result).chunk_seconds == pytest.approx([0.5, 0.8])
    assert only(result).ttft_seconds == pytest.approx(0.5) and result.summary().tokens_per_chunk == 3.0


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_events_may_be_cut_anywhere_and_have_other_lines_between_them(run: Run, size: int, end: bytes) -> None:
    def script(body: Body) -> Script:
        parts = [part for part in steady(body) if isinstance(part, bytes)]
        stream = (
            b": a comment\n\nevent: message" + end + b"".join(parts).replace(b"\n", end).replace(b"data: ", b"data:")
        )
        return [stream.rstrip()[place : place + size] for place in range(0, len(stream), size)]

    assert only(run(answered_by(script), ONE)).error is None
    assert len(only(run(answered_by(script), ONE)).chunk_seconds) == 4


@pytest.mark.parametrize("size", [1, 7, 100_000])
def test_a_stream_may_begin_with_a_mark_and_events_have_no_data_or_lines_of_it(run: Run, size: int) -> None:
    def script(body: Body) -> Script:
        parts = [part for part in steady(body) if isinstance(part, bytes)]
        stream = codecs.BOM_UTF8 + b"".join(parts).replace(b', "', b',\ndata: "') + b"data:\n\n"
        return [stream[place : place + size] for place in range(0, len(stream), size)]

    request = only(run(FakeServer(lambda _, body: script(body)), ONE))
    assert request.error is None and len(request.chunk_seconds) == 4


def test_an_error_that_is_null_is_none(run: Run) -> None:
    def make(body: Body) -> Script:
        first, *rest = steady(body)[1:]
        assert isinstance(first, bytes)
        return [first.replace(b'{"', b'{"error": null, "', 1), *rest]

    assert only(run(answered_by(make), ONE)).error is None


def test_a_password_in_the_url_is_not_told() -> None:
    endpoint = Endpoint(url="http://user:secret@127.0.0.1:8000/v1")
    assert endpoint.base == "http://user:secret@127.0.0.1:8000" and endpoint.shown == "http://127.0.0.1:8000"


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        ("refused", "status 429: no", lambda body: [429]),
        ("http_error", "status 503: no", lambda body: [503]),
        ("connection", "gone", lambda body: [httpx.ConnectError("gone")]),
        ("timeout", "longer than 600 s", lambda body: [0.5, event("x"), 1e4, *last_words(body)]),
        ("broken_stream", "peer", lambda body: [0.5, event("x"), httpx.RemoteProtocolError("peer")]),
        ("broken_stream", "ended before the answer did", lambda body: [0.5, event("x")]),
        ("broken_stream", "ended before the answer did", lambda body: []),
        ("broken_stream", "an event is 'nonsense'", lambda body: [b"data: nonsense\n\n"]),
        ("broken_stream", "an event is '7'", lambda body: [b"data: 7\n\n"]),
        ("broken_stream", "out of blocks", lambda body: [event("x"), b'data: {"error": "out of blocks"}\n\n']),
        ("broken_stream", "no part", lambda body: last_words(body)),
        ("wrong_token_count", "counted 3 output", lambda body: [event("x"), *last_words(body, completion_tokens=3)]),
        ("wrong_token_count", "counted 9 prompt", lambda body: [event("x"), *last_words(body, prompt_tokens=9)]),
        ("wrong_token_count", "no output", lambda body: [event("x"), *last_words(body, completion_tokens=None)]),
        ("wrong_token_count", "counted no prompt", lambda body: [event("x", finish="length"), b"data: [DONE]\n\n"]),
    ],
)  # fmt: skip
def test_a_failure_is_counted_by_its_kind(run: Run, error: str, message: str, make: Callable[[Body], Script]) -> None:
    # Of three requests the second one fails.
    server = FakeServer(lambda number, body: make(body) if number == 2 else steady(body, first=0.5, each=0.05))
    result = run(server, Workload(prompt_tokens=(8, 8), output_tokens=(4, 4), num_requests=3, concurrency=1))
    assert [each.error for each in result.requests] == [None, error, None]
    assert message in (result.requests[1].message or "")
    summary = result.summary()
    assert summary.errors == {error: 1} and (summary.num_completed, summary.num_requests) == (2, 3)
    assert summary.num_good == 2 and summary.goodput_share == pytest.approx(2 / 3)
    assert summary.output_tokens == 8 and summary.ttft is not None and summary.ttft.count == 2
    assert server.running == 0


def test_a_rate_is_kept_however_slow_the_server_is(run: Run) -> None:
    workload = Workload(prompt_tokens=(5, 9), output_tokens=(3, 6), num_requests=20, rate=4.0)
    server = FakeServer(lambda number, body: steady(body, first=50.0))
    result = run(server, workload)
    dues = [each.due_seconds for each in result.requests]
    assert [each.sent_seconds for each in result.requests] == pytest.approx(dues) and len(set(dues)) == 20
    assert [came - server.came[1] for came in server.came[1:]] == pytest.approx(dues), "20 after the trial"
    assert server.most_running == 20
    lateness = result.summary().lateness
    assert lateness is not None and lateness.max == pytest.approx(0.0)
    # The run is over when the last answer is.
    assert result.summary().duration_seconds == pytest.approx(max(each.end_seconds for each in result.requests))


def test_a_load_generator_that_cannot_keep_up_says_so(run: Run) -> None:
    workload = Workload(prompt_tokens=(5, 5), output_tokens=(3, 3), num_requests=20, rate=4.0)

    def stalling(number: int, body: Body) -> Script:
        if number == 1:  # the machine does something else for 30 s, while all others become due
            asyncio.get_running_loop().now += 30.0  # type: ignore[attr-defined]
        return steady(body)

    lateness = run(FakeServer(stalling), workload).summary().lateness
    assert lateness is not None and lateness.max > 20.0 and lateness.p50 > 20.0


@pytest.mark.parametrize("concurrency", [1, 3, 50])
def test_a_closed_loop_keeps_so_many_running(run: Run, concurrency: int) -> None:
    workload = Workload(prompt_tokens=(5, 5), output_tokens=(3, 9), num_requests=10, concurrency=concurrency)
    server = FakeServer(lambda number, body: steady(body))
    result = run(server, workload)
    assert server.most_running == min(10, concurrency) and len(server.bodies) == 11
    # A request is due when one before it has ended, or at the begin.
    ends = {0.0, *(each.end_seconds for each in result.requests)}
    assert all(each.due_seconds in ends for each in result.requests)
    assert [each.lateness_seconds for each in result.requests] == pytest.approx([0.0] * 10)


def test_results_stand_in_the_order_of_the_requests_whichever_ends_first(run: Run) -> None:
    workload = Workload(prompt_tokens=(1, 99), output_tokens=(2, 2), num_requests=8, concurrency=8)
    result = run(FakeServer(lambda number, body: steady(body, first=100.0 - number)), workload)
    ends = [each.end_seconds for each in result.requests]
    assert ends == sorted(ends, reverse=True)
    assert [each.prompt_tokens for each in result.requests] == [each.asked_prompt_tokens for each in result.requests]


def test_warm_up_is_not_measured_and_shares_no_prompt(run: Run) -> None:
    server = FakeServer(lambda number, body: steady(body, first=99.0 if number < 4 else 0.5))
    result = run(server, num_warmup=3)
    assert len(result.requests) == 6 and len(server.bodies) == 10
    assert result.workload["warmup"] == 3
    assert all(each.ttft_seconds == pytest.approx(0.5) for each in result.requests)
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 10
    assert [body["max_tokens"] for body in server.bodies[1:4]] == [body["max_tokens"] for body in server.bodies[4:7]]


def test_warm_up_may_be_longer_than_the_run(run: Run) -> None:
    server = FakeServer(lambda number, body: steady(body))
    result = run(server, ONE, num_warmup=3)
    assert result.workload["warmup"] == 3 and len(server.bodies) == 1 + 3 + 1
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 5


def test_the_same_seed_asks_the_same(run: Run) -> None:
    servers = [FakeServer(lambda number, body: steady(body)) for _ in range(2)]
    first, second = (run(server) for server in servers)
    assert servers[0].bodies == servers[1].bodies
    assert first.requests == second.requests and first.summary() == second.summary()


@pytest.mark.parametrize("times", [{"concurrency": 2}, {"rate": 1.0}])
def test_what_had_ended_when_it_was_interrupted_is_told(
    in_virtual_time: Callable[..., Any], times: dict[str, Any]
) -> None:
    workload = Workload(prompt_tokens=(5, 9), output_tokens=(3, 3), num_requests=12, **times)
    told: list[ServingResult] = []
    server = FakeServer(lambda number, body: steady(body, first=5.0))

    async def interrupted(seconds: float) -> None:
        driven = drive(
            Endpoint(url="http://test"), workload, transport=httpx.MockTransport(server), on_interrupt=told.append
        )
        async with asyncio.timeout(seconds):  # cancels it, as asyncio.run does when it is interrupted
            await driven

    with pytest.raises(TimeoutError):
        in_virtual_time(interrupted(12.0))
    assert told == []  # after the trial and the warming up none had ended
    with pytest.raises(TimeoutError):
        in_virtual_time(interrupted(24.0))
    (result,) = told
    assert 0 < len(result.requests) < 12 and result.num_unended == 12 - len(result.requests)
    assert result.completed == list(result.requests) and server.running == 0
    assert ServingResult.from_json(json.loads(json.dumps(result.to_json()))).num_unended == result.num_unended


def test_progress_is_told(in_virtual_time: Callable[..., Any]) -> None:
    told: list[tuple[int, int]] = []
    server = FakeServer(lambda number, body: steady(body))
    in_virtual_time(
        drive(
            Endpoint(url="http://test"), WORKLOAD, num_warmup=2, transport=httpx.MockTransport(server),
            show=lambda ended, count: told.append((ended, count)),
        )
    )  # fmt: skip
    assert told == [(number, 6) for number in range(1, 7)]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ([400], "cannot be measured: .* http_error .*status 400: no"),
        ([httpx.ConnectError("nobody")], "no server answers at http://test .nobody."),
        ([event("x", finish="length"), b"data: [DONE]\n\n"], "wrong_token_count .*the server counted no prompt tokens"),
    ],
)
def test_a_server_that_cannot_be_measured_is_found_out_at_once(run: Run, script: Script, message: str) -> None:
    server = FakeServer(lambda number, body: script)
    with pytest.raises(ConfigError, match=message):
        run(server)
    assert len(server.bodies) == 1


def test_a_server_that_is_only_busy_is_measured(run: Run) -> None:
    result = run(FakeServer(lambda number, body: [429]))
    assert result.summary().errors == {"refused": 6} and result.summary().ttft is None


@pytest.mark.parametrize(
    "models",
    [httpx.Response(404, text="none"), httpx.Response(200, json={"data": []}), httpx.Response(200, text="<p>")],
)
def test_without_a_list_of_models_one_has_to_be_named(run: Run, models: httpx.Response) -> None:
    server = FakeServer(lambda number, body: steady(body), models=models)
    with pytest.raises(ConfigError, match="name it with --model"):
        run(server)
    assert run(server, model="mine").model == "mine" and server.bodies[-1]["model"] == "mine"


@pytest.mark.parametrize(
    "url", ["", "localhost:8000", "ftp://x", "http://", "http://[::1", "http://x:port", "http://x/?a=b"]
)
def test_an_address_has_to_be_one(url: str) -> None:
    with pytest.raises(ConfigError, match="the URL is"):
        bench_serving(Endpoint(url=url), WORKLOAD)


def test_requests_that_no_try_would_get_through_are_told_before_the_first(run: Run) -> None:
    def server(length: Any) -> FakeServer:
        models = httpx.Response(200, json={"data": [{"id": "other"}, {"id": "tiny", "max_model_len": length}]})
        return FakeServer(lambda number, body: steady(body), models=models)

    workload = Workload(prompt_tokens=(9, 9), output_tokens=(6, 6), num_requests=3, concurrency=1)
    for fits in (15, None, "15"):
        assert len(run(server(fits), workload, model="tiny").completed) == 3
    short = server(14)
    with pytest.raises(
        ConfigError, match=r"^3 of 3 requests are too long: .* up to 15 tokens; .* takes 14; lower --prom"
    ):
        run(short, workload, model="tiny")
    assert short.bodies == []


TOKENS_PER_WORD, TOKENS_AROUND = 3, 11
KNOWN = {"model", "messages", "prompt", "stream", "stream_options", "max_tokens", "temperature", "ignore_eos"}


def in_words(body: Body, *, chat: bool, known: set[str] = KNOWN, most_tokens: int = 1000, first: float = 0.5) -> Script:
    """As servers answer that take text: 3 tokens for each word and 11 around; what they do not know is refused."""
    if not body.keys() <= known:
        return [400]
    text = body["messages"][0]["content"] if chat else body["prompt"]
    length = body.get("max_tokens") or body["max_completion_tokens"]
    length = length if "ignore_eos" in body else min(length, most_tokens)
    tokens: Script = [0.1, said(role="assistant", content="")] if chat else []
    for number in range(length):
        finish = "length" if number == length - 1 else None
        part = said(finish=finish, **{("content", "reasoning_content")[number % 2]: "x"}) if chat else event("x")
        tokens += [0.1 if number else first, part]
    prompt_tokens = TOKENS_PER_WORD * len(text.split()) + TOKENS_AROUND
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": length}
    return [*tokens, b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n", b"data: [DONE]\n\n"]


def said(*, finish: str | None = None, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


WORDS_WORKLOAD = Workload(prompt_tokens=(60, 200), output_tokens=(4, 4), num_requests=5, concurrency=1, prompts="chat")


def test_a_chat_is_asked_in_words_that_make_as_many_tokens(run: Run) -> None:
    server = FakeServer(lambda number, body: in_words(body, chat=True))
    result = run(server, WORDS_WORKLOAD)
    assert set(server.paths) == {"/v1/chat/completions"} and len(server.bodies) == 5 + 2  # one trial more, for lengths
    assert (
        result.workload["prompts"] == "chat" and result.workload["asked_with"] == "max_tokens, temperature, ignore_eos"
    )
    assert "vocab_size" not in result.workload
    for each, body in zip(result.requests, server.bodies[2:], strict=True):
        assert each.error is None and each.output_tokens == 4
        # The nearest number of words.
        assert abs((each.prompt_tokens or 0) - each.asked_prompt_tokens) <= TOKENS_PER_WORD / 2
        # The role, which comes before, is no token; what a model thinks is.
        assert each.ttft_seconds == pytest.approx(0.6) and each.tpot_seconds == pytest.approx(0.1)
        assert [message["role"] for message in body["messages"]] == ["user"]
    texts = [body["messages"][0]["content"] for body in server.bodies]
    assert len({text.split()[0] for text in texts}) > 3, "they begin alike: a prefix cache would be measured"


def test_a_text_goes_to_completions(run: Run) -> None:
    server = FakeServer(lambda number, body: in_words(body, chat=False))
    result = run(server, replace(WORDS_WORKLOAD, prompts="text"))
    assert set(server.paths) == {"/v1/completions"} and len(result.completed) == 5
    assert all(isinstance(body["prompt"], str) for body in server.bodies)


@pytest.mark.parametrize("count", [-1, pytest.param(10**400, id="huge"), 4.0, True, "4"])
def test_what_is_no_number_of_tokens_is_not_counted(run: Run, count: Any) -> None:
    def script(number: int, body: Body) -> Script:
        usage = {"prompt_tokens": 9, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": count}}
        wrong: Script = [
            said(content="x", finish="stop"),
            b"data: " + json.dumps({"choices": [], "usage": usage}).encode(),
        ]
        return wrong if number > 1 else in_words(body, chat=True)

    result = run(FakeServer(script), WORDS_WORKLOAD)
    assert result.summary().errors == {"wrong_token_count": 5}
    assert {(each.output_tokens, each.cached_tokens) for each in result.requests} == {(None, None)}


@pytest.mark.parametrize(
    ("known", "asked_with"),
    [
        (KNOWN - {"ignore_eos"}, "max_tokens, temperature"),
        (KNOWN - {"ignore_eos", "temperature", "max_tokens"} | {"max_completion_tokens"}, "max_completion_tokens"),
    ],
)
def test_a_server_is_asked_in_the_words_it_knows(
    run: Run, caplog: pytest.LogCaptureFixture, known: set[str], asked_with: str
) -> None:
    server = FakeServer(lambda number, body: in_words(body, chat=True, known=known, most_tokens=3))
    result = run(server, WORDS_WORKLOAD)
    assert result.workload["asked_with"] == asked_with and "does not know ignore_eos" in caplog.text
    assert [each.output_tokens for each in result.completed] == [3] * 5
    summary = result.summary()
    assert summary.num_shorter == 5 and summary.output_tokens == 15 and summary.prompt_tokens > 0


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (lambda body: [400], "message of some words with max_completion_tokens 2, a streamed answer ended with http_"),
        (lambda body: [429], "with max_tokens 2, ignore_eos and a streamed answer ended with refused"),
        (lambda body: [said(content="x", finish="stop"), b"data: [DONE]\n\n"], "counted no prompt tokens, in a usage"),
        (
            lambda body: [said(content="x", finish="stop", ), *last_words({"prompt": [1] * 9, "max_tokens": 2})],
            "counts 9 tokens in 4 words and 9 in 25; counts that grow with a prompt are required",
        ),
    ],
)  # fmt: skip
def test_a_server_that_cannot_be_asked_in_words_says_so(
    run: Run, script: Callable[[Body], Script], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(FakeServer(lambda number, body: script(body)), replace(WORDS_WORKLOAD, prompt_tokens=(200, 200)))


def test_an_address_may_end_with_the_version() -> None:
    for url in ("http://x:1/v1", "http://x:1/v1/", "http://x:1", "http://x:1/"):
        assert Endpoint(url=url).base == "http://x:1"


@pytest.mark.parametrize("url", ["http://\u2603.net", "http://x\x01:1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    workload = Workload(prompt_tokens=(4, 4), output_tokens=(2, 2), num_requests=1, rate=1.0)
    with pytest.raises(ConfigError, match=r"is no address .*; one such as http://127\.0\.0\.1:8000 is required"):
        bench_serving(Endpoint(url=url, model="x"), workload)


@pytest.mark.parametrize("seconds", [0, math.inf, math.nan])
def test_limits_have_to_be_times(run: Run, seconds: float) -> None:
    with pytest.raises(ConfigError, match=f"--timeout is {seconds}; a finite number of seconds"):
        run(FakeServer(lambda number, body: steady(body)), timeout_seconds=seconds)


def test_httpx_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(InstallationError, match=r"moesaic\[serve\]"):
        bench_serving(Endpoint(url="http://127.0.0.1:9"), WORKLOAD)


class _Handler(BaseHTTPRequestHandler):
    """Over a real socket: every third completion is refused, every third one breaks off, the others are answered."""

    protocol_version = "HTTP/1.1"
    number = 0  # of the server's class, made anew for each test

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(200, b'{"data": [{"id": "socket"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        cls = type(self)
        cls.number += 1
        if cls.number % 3 == 2:
            self._answer(429, b"busy")
            return
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for part in steady(body):
            if isinstance(part, bytes):
                self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
                if cls.number % 3 == 0:
                    self.close_connection = True
                    return
        self.wfile.write(b"0\r\n\r\n")

    def _answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def socket_url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    server.shutdown()
    thread.join()
    server.server_close()


def test_over_a_real_socket(socket_url: str) -> None:
    result = bench_serving(Endpoint(url=socket_url, timeout_seconds=60.0), WORKLOAD, num_warmup=0)
    assert result.model == "socket"
    # The trial was the first; then refused, broken, answered, and again.
    assert [each.error for each in result.requests] == ["refused", "broken_stream", None] * 2
    for each in result.completed:
        assert each.output_tokens == each.asked_output_tokens == len(each.chunk_seconds)
        assert each.sent_seconds <= each.chunk_seconds[0] <= each.chunk_seconds[-1] <= each.end_seconds


def test_nobody_there() -> None:
    with pytest.raises(ConfigError, match=r"no server answers at http://127\.0\.0\.1:9"):
        bench_serving(Endpoint(url="http://127.0.0.1:9"), WORKLOAD)
