"""Driving any server that speaks OpenAI's protocol, and timing what it answers.

Requests go to /v1/completions, streamed: token ids as the prompt, greedy, and exactly as many tokens as asked for
(ignore_eos, which vLLM, llama-server and ours understand). Tokens are those that the server counts (usage), times are
those at which parts of the answer come. What is asked is workload.py; what is made of the times, report/serving.py.

Every time is the event loop's clock, which is monotonic.
"""

import asyncio
import codecs
import json
import math
import re
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from moesaic.bench.workload import PlannedRequest, Workload, describe, make_prompt, plan_requests
from moesaic.errors import ConfigError, InstallationError
from moesaic.report.serving import ErrorKind, RequestResult, ServingResult

if TYPE_CHECKING:
    import httpx

# Of what a server says when it refuses.
_MESSAGE_CHARS = 300
_LINE_END = re.compile(rb"\r\n|\n|\r")
# The first request, which finds out whether the server understands us.
_TRIAL = PlannedRequest(prompt_tokens=4, output_tokens=2, due_seconds=None)

# Told how many requests have ended, and of how many.
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server. url: with or without /v1. model: None: the first that it lists. timeout_seconds: of one request."""

    url: str
    model: str | None = None
    api_key: str | None = field(default=None, repr=False)
    timeout_seconds: float = 600.0

    @property
    def base(self) -> str:
        """Raises: ConfigError for what is no address."""
        try:
            address = urlsplit(self.url)
            is_address = address.scheme in ("http", "https") and bool(address.hostname) and (address.port or 0) >= 0
        except ValueError:  # brackets that do not close, a port that is no number
            is_address = False
        if not is_address or address.query or address.fragment:
            raise ConfigError(
                f"the URL is {self.url!r}; a server's address is required; write http://127.0.0.1:8000, for example."
            )
        return self.url.rstrip("/").removesuffix("/v1")

    @property
    def shown(self) -> str:
        """What is said of it: `base` without a user and a password."""
        parts = urlsplit(self.base)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def bench_serving(
    endpoint: Endpoint,
    workload: Workload,
    *,
    name: str | None = None,
    num_warmup: int = 2,
    ttft_limit_seconds: float = 2.0,
    tpot_limit_seconds: float = 0.1,
    show: Progress = lambda ended, count: None,
) -> ServingResult:
    """Send a workload to a server and return what came of it; num_warmup requests go before, uncounted.

    Requests that fail are part of the result.

    Raises: ConfigError for a workload that cannot be, or a server that is not there or refuses such requests at all;
    DataError for a trace that cannot be read; InstallationError without httpx.
    """
    return asyncio.run(
        drive(
            endpoint,
            workload,
            name=name,
            num_warmup=num_warmup,
            ttft_limit_seconds=ttft_limit_seconds,
            tpot_limit_seconds=tpot_limit_seconds,
            show=show,
        )
    )


async def drive(
    endpoint: Endpoint,
    workload: Workload,
    *,
    name: str | None = None,
    num_warmup: int = 2,
    ttft_limit_seconds: float = 2.0,
    tpot_limit_seconds: float = 0.1,
    show: Progress = lambda ended, count: None,
    transport: "httpx.AsyncBaseTransport | None" = None,
) -> ServingResult:
    """Do what bench_serving does, in a loop that runs already; transport: what carries requests, if not a network."""
    requests = plan_requests(workload)
    for what, value in {
        "timeout": endpoint.timeout_seconds, "ttft-limit": ttft_limit_seconds, "tpot-limit": tpot_limit_seconds
    }.items():  # fmt: skip
        if not 0 < value < math.inf:
            raise ConfigError(f"--{what} is {value}; a finite number of seconds above 0 is required; change it.")
    async with _open_client(endpoint, transport) as http:
        model = endpoint.model or await _first_model(http, endpoint)
        _check_lengths(requests, await _max_length(http, endpoint, model), endpoint)
        client = _Client(http, model, timeout_seconds=endpoint.timeout_seconds)
        await _try(client, workload, endpoint)
        await _warm_up(client, workload, requests[:num_warmup])
        created = datetime.now(UTC).isoformat(timespec="seconds")
        results = await _send_all(client, workload, requests, show)
    return ServingResult(
        name=name or model.rstrip("/").rsplit("/", 1)[-1],  # without the folder or the owner
        url=endpoint.shown,
        model=model,
        created=created,
        workload={**describe(workload, requests), "warmup": num_warmup, "timeout_seconds": endpoint.timeout_seconds},
        ttft_limit_seconds=ttft_limit_seconds,
        tpot_limit_seconds=tpot_limit_seconds,
        requests=results,
    )


def _open_client(endpoint: Endpoint, transport: "httpx.AsyncBaseTransport | None") -> "httpx.AsyncClient":
    try:
        import httpx
    except ImportError as error:
        raise InstallationError(
            f"a server was to be measured and httpx cannot be imported ({error}); it sends the requests; install it "
            f"with `pip install 'moesaic[serve]'`."
        ) from None
    headers = {"Accept-Encoding": "identity"}
    if endpoint.api_key is not None:
        headers["Authorization"] = f"Bearer {endpoint.api_key}"
    try:
        return httpx.AsyncClient(
            base_url=endpoint.base,
            headers=headers,
            timeout=None,  # each request's own time is the only limit
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
            transport=transport,
            trust_env=False,  # a proxy would be measured too
        )
    except httpx.InvalidURL as error:
        raise ConfigError(
            f"{endpoint.url!r} is no address ({error}); one such as http://127.0.0.1:8000 is required; correct it."
        ) from None


def _check_lengths(requests: Sequence[PlannedRequest], max_length: int | None, endpoint: Endpoint) -> None:
    """Raise ConfigError for requests that no try would get through, where the server says how long texts may be."""
    lengths = [each.prompt_tokens + each.output_tokens for each in requests]
    num_long = sum(1 for length in lengths if max_length is not None and length > max_length)
    if num_long:
        raise ConfigError(
            f"{num_long} of {len(requests)} requests are too long: prompt and answer have up to {max(lengths)} tokens; "
            f"the model at {endpoint.shown} takes {max_length}; lower --prompt-tokens or --output-tokens, or cut a "
            f"trace's with --max-prompt-tokens and --max-output-tokens."
        )


async def _max_length(http: "httpx.AsyncClient", endpoint: Endpoint, model: str) -> int | None:
    """Return the positions that the server says the model has (vLLM and ours do), None where it says nothing."""
    import httpx

    try:
        async with asyncio.timeout(endpoint.timeout_seconds):
            models = (await http.get("/v1/models")).json()["data"]
        (length,) = {each.get("max_model_len") for each in models if each.get("id") == model}
    except (httpx.HTTPError, TimeoutError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return length if type(length) is int else None


async def _first_model(http: "httpx.AsyncClient", endpoint: Endpoint) -> str:
    import httpx

    try:
        async with asyncio.timeout(endpoint.timeout_seconds):
            response = await http.get("/v1/models")
    except (httpx.HTTPError, TimeoutError, ValueError) as error:
        raise _unreachable(endpoint, str(error) or type(error).__name__) from None
    try:
        model = response.raise_for_status().json()["data"][0]["id"]
    except (httpx.HTTPStatusError, ValueError, KeyError, IndexError, TypeError, RecursionError):
        model = None
    if not isinstance(model, str):
        if response.status_code == 401 and endpoint.api_key is not None:
            raise ConfigError(
                f"{endpoint.shown} does not take the key of --api-key-file; one of the server's keys is required; "
                f"check the file's first key."
            )
        raise ConfigError(
            f"{endpoint.shown}/v1/models answers with status {response.status_code}, {_shortened(response.text)!r}; a "
            f"list of models is required to know which one to ask for; name it with --model, and a key, if it needs "
            f"one, with --api-key-file."
        )
    return model


def _unreachable(endpoint: Endpoint, reason: str) -> ConfigError:
    return ConfigError(
        f"no server answers at {endpoint.shown} ({reason}); one is required that speaks OpenAI's protocol; start one "
        f"with `moesaic serve RUN`, or give its address."
    )


async def _try(client: "_Client", workload: Workload, endpoint: Endpoint) -> None:
    """Send one short request, so that a server which cannot do this says so now and not a hundred times."""
    prompt = make_prompt(workload, _TRIAL, index=0, is_warmup=True)
    # Only a server that is busy with others may say no.
    result = await client.complete(_TRIAL, prompt, due_seconds=0.0, begin=asyncio.get_running_loop().time())
    if result.error == "connection":
        raise _unreachable(endpoint, result.message or "no connection")
    if result.error not in (None, "refused"):
        raise ConfigError(
            f"{endpoint.shown} cannot be measured: a prompt of {_TRIAL.prompt_tokens} token ids with max_tokens "
            f"{_TRIAL.output_tokens}, ignore_eos and a streamed answer ended with {result.error} ({result.message}); a "
            f"server that answers such requests is required, as vLLM, llama-server and `moesaic serve` do; see what "
            f"it says, and --model, --vocab-size and --api-key-file."
        )


async def _warm_up(client: "_Client", workload: Workload, requests: Sequence[PlannedRequest]) -> None:
    begin = asyncio.get_running_loop().time()
    async with asyncio.TaskGroup() as group:
        for index, request in enumerate(requests, start=1):  # 0 was the trial
            prompt = make_prompt(workload, request, index=index, is_warmup=True)
            group.create_task(client.complete(request, prompt, due_seconds=0.0, begin=begin))


async def _send_all(
    client: "_Client", workload: Workload, requests: Sequence[PlannedRequest], show: Progress
) -> tuple[RequestResult, ...]:
    """Send every request when it is due, or as others end, and return the results in the order of the requests."""
    loop = asyncio.get_running_loop()
    results: dict[int, RequestResult] = {}
    begin = loop.time()

    async def send(index: int, prompt: list[int], due_seconds: float) -> None:
        results[index] = await client.complete(requests[index], prompt, due_seconds=due_seconds, begin=begin)
        show(len(results), len(requests))

    async def send_at_their_times() -> None:
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(requests):
                prompt = make_prompt(workload, request, index=index)  # while there is time
                assert request.due_seconds is not None
                # Returns to the loop even when it is late: those under way have to be read.
                await asyncio.sleep(max(0.0, begin + request.due_seconds - loop.time()))
                group.create_task(send(index, prompt, request.due_seconds))

    async def send_as_others_end(waiting: Iterator[int]) -> None:
        due_seconds = 0.0
        for index in waiting:
            await send(index, make_prompt(workload, requests[index], index=index), due_seconds)
            due_seconds = results[index].end_seconds

    if workload.concurrency is None:
        await send_at_their_times()
    else:
        waiting = iter(range(len(requests)))
        async with asyncio.TaskGroup() as group:
            for _ in range(min(workload.concurrency, len(requests))):
                group.create_task(send_as_others_end(waiting))
    return tuple(results[index] for index in range(len(requests)))


class _Failure(Exception):
    """An answer that cannot be used, and why."""

    def __init__(self, error: ErrorKind, message: str) -> None:
        super().__init__(message)
        self.error, self.message = error, message


@dataclass
class _Answer:
    """What has come of an answer: when each chunk came, whether it had text, whether it said that the answer is over,
    and the server's counts."""

    times: list[float] = field(default_factory=list)
    has_text: list[bool] = field(default_factory=list)
    has_end: list[bool] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    is_finished: bool = False

    def take(self, data: bytes, now: float) -> None:
        """Raises: _Failure for an event that is none of a completion's."""
        try:
            event = json.loads(data)
            choices, usage = event.get("choices"), event.get("usage")
        except (ValueError, AttributeError, RecursionError):
            raise _Failure("broken_stream", f"an event is {_shortened(data.decode('utf-8', 'replace'))!r}") from None
        if event.get("error") is not None or not isinstance(choices, list):
            raise _Failure("broken_stream", _shortened(json.dumps(event)))
        if isinstance(usage, dict):
            self.usage = usage
        for choice in choices:
            if not isinstance(choice, dict):
                raise _Failure("broken_stream", _shortened(json.dumps(event)))
            self.times.append(now)
            self.has_text.append(bool(choice.get("text")))
            self.has_end.append(choice.get("finish_reason") is not None)
            self.is_finished = self.is_finished or self.has_end[-1]

    def count(self, key: str) -> int | None:
        value = (self.usage or {}).get(key)
        return value if type(value) is int else None

    def cached_tokens(self) -> int | None:
        details = (self.usage or {}).get("prompt_tokens_details")
        value = details.get("cached_tokens") if isinstance(details, dict) else None
        return value if type(value) is int else None

    def chunk_seconds(self, begin: float) -> tuple[float, ...]:
        """Return the times of the chunks that carried tokens.

        A chunk without text may carry tokens (half a character) or none (a server's first or last word). As many of
        them as there are more chunks than tokens carried none, the last ones. Where there are fewer chunks than tokens
        that says nothing: those before all text are then taken for the first word, and one that ends the answer for
        the last.
        """
        output_tokens = self.count("completion_tokens") or 0
        without_text = [place for place, has_text in enumerate(self.has_text) if not has_text]
        if len(self.times) >= output_tokens > 0:
            dropped = set(without_text[::-1][: len(self.times) - output_tokens])
        else:
            first = self.has_text.index(True) if True in self.has_text else 0
            dropped = {place for place in without_text if place < first or self.has_end[place]}
        kept = [time for place, time in enumerate(self.times) if place not in dropped]
        return tuple(time - begin for time in kept or self.times)


@dataclass(frozen=True)
class _Client:
    """Sends completions over one pool of connections."""

    http: "httpx.AsyncClient"
    model: str
    timeout_seconds: float

    async def complete(
        self, request: PlannedRequest, prompt: list[int], *, due_seconds: float, begin: float
    ) -> RequestResult:
        """Send one request now and return what came of it, whatever that is."""
        loop = asyncio.get_running_loop()
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        content = json.dumps(body, separators=(",", ":")).encode()
        answer = _Answer()
        failure: _Failure | None = None
        sent = loop.time()
        try:
            async with asyncio.timeout(self.timeout_seconds):
                await self._read(content, answer)
            _check_counts(answer, request)
        except TimeoutError:
            failure = _Failure("timeout", f"it took longer than {self.timeout_seconds:g} s")
        except _Failure as error:
            failure = error
        return RequestResult(
            due_seconds=due_seconds,
            sent_seconds=sent - begin,
            end_seconds=loop.time() - begin,
            chunk_seconds=answer.chunk_seconds(begin),
            asked_prompt_tokens=request.prompt_tokens,
            asked_output_tokens=request.output_tokens,
            prompt_tokens=answer.count("prompt_tokens"),
            cached_tokens=answer.cached_tokens(),
            output_tokens=answer.count("completion_tokens"),
            error=None if failure is None else failure.error,
            message=None if failure is None else failure.message,
        )

    async def _read(self, content: bytes, answer: _Answer) -> None:
        import httpx

        loop = asyncio.get_running_loop()
        has_begun = False
        try:
            async with self.http.stream(
                "POST", "/v1/completions", content=content, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status_code != 200:
                    text = _shortened((await response.aread()).decode("utf-8", "replace"))
                    kind: ErrorKind = "refused" if response.status_code == 429 else "http_error"
                    raise _Failure(kind, f"status {response.status_code}: {text}")
                has_begun = True
                is_done = False
                async for data in _events(response.aiter_bytes()):
                    is_done = is_done or data == b"[DONE]"
                    if not is_done:  # what comes behind is read, so that the connection can be used again
                        answer.take(data, loop.time())
                answer.is_finished = answer.is_finished or is_done
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise _Failure("broken_stream" if has_begun else "connection", reason) from None
        if not answer.is_finished:
            raise _Failure("broken_stream", "the stream ended before the answer did")


def _check_counts(answer: _Answer, request: PlannedRequest) -> None:
    for what, key, asked in (
        ("prompt", "prompt_tokens", request.prompt_tokens), ("output", "completion_tokens", request.output_tokens)
    ):  # fmt: skip
        counted = answer.count(key)
        if counted != asked:
            raise _Failure(
                "wrong_token_count",
                f"the server counted {'no' if counted is None else counted} {what} tokens, {asked} were asked for",
            )
    if not answer.times:
        raise _Failure("broken_stream", "the stream held no part of the answer")


async def _events(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield the data of a stream's events as soon as each is whole; those without any are passed over.

    Source: https://html.spec.whatwg.org/multipage/server-sent-events.html, section 9.2.6
    """
    data: list[bytes] = []
    async for line in _lines(pieces):
        if line.startswith(b"data:"):
            data.append(line[len(b"data:") :].strip())
        elif not line:
            if any(data):
                yield b"\n".join(data)
            data = []
    if any(data):  # a stream may end with its last line
        yield b"\n".join(data)


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield a stream's lines as soon as each is whole, without their ends and the mark that UTF-8 may begin with."""
    rest, mark, is_after_return = b"", codecs.BOM_UTF8, False
    async for piece in pieces:
        if is_after_return:  # the line has ended already
            piece = piece.removeprefix(b"\n")
        is_after_return = piece.endswith(b"\r")
        *lines, rest = _LINE_END.split(rest + piece)
        for line in lines:
            yield line.removeprefix(mark)
            mark = b""
    yield rest.removeprefix(mark)


def _shortened(text: str) -> str:
    return text if len(text) <= _MESSAGE_CHARS else f"{text[:_MESSAGE_CHARS]}..."
