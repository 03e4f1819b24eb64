"""A server that speaks OpenAI's protocol: which models it has, one request to it, and what comes of the answer.

Requests go to /v1/completions, as token ids or as text, or to /v1/chat/completions as one message; streamed, and with
the server's own counts of tokens (usage). Times are those at which parts of the answer come, by the event loop's clock,
which is monotonic.
"""

import asyncio
import codecs
import json
import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from moesaic.bench.workload import MOST_TOKENS, PlannedRequest, PromptForm
from moesaic.errors import ConfigError, InstallationError
from moesaic.report.serving import ErrorKind, RequestResult

if TYPE_CHECKING:
    import httpx

# Of what a server says when it refuses.
_MESSAGE_CHARS = 300
_LINE_END = re.compile(rb"\r\n|\n|\r")
# Where the text of a part of a chat's answer stands; the latter two are what a model thinks before it answers.
_DELTA_TEXTS = ("content", "reasoning_content", "reasoning")


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a server is told how long an answer is to be. limit: the key of the most tokens; more: what else is sent.

    is_exact: answers are as long as that, whatever the model would say.
    """

    limit: str
    more: Mapping[str, Any]
    is_exact: bool

    def __str__(self) -> str:
        return ", ".join([self.limit, *self.more])


# The first one that a server takes is used: vLLM, llama-server and ours know ignore_eos, hosted services refuse it, and
# models of theirs that think take neither a temperature nor the older name of the limit.
DIALECTS = (
    Dialect(limit="max_tokens", more={"temperature": 0, "ignore_eos": True}, is_exact=True),
    Dialect(limit="max_tokens", more={"temperature": 0}, is_exact=False),
    Dialect(limit="max_completion_tokens", more={}, is_exact=False),
)


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


def open_client(endpoint: Endpoint, transport: "httpx.AsyncBaseTransport | None") -> "httpx.AsyncClient":
    """Return a client for a server's address; transport: what carries requests, if not a network.

    Raises: ConfigError for what is no address, InstallationError without httpx.
    """
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


async def first_model(http: "httpx.AsyncClient", endpoint: Endpoint) -> str:
    """Return the model that the server lists first.

    Raises: ConfigError where it lists none, or is not there.
    """
    import httpx

    try:
        async with asyncio.timeout(endpoint.timeout_seconds):
            response = await http.get("/v1/models")
    except (httpx.HTTPError, TimeoutError, ValueError) as error:
        raise unreachable(endpoint, str(error) or type(error).__name__) from None
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


async def max_length(http: "httpx.AsyncClient", endpoint: Endpoint, model: str) -> int | None:
    """Return the positions that the server says the model has (vLLM and ours do), None where it says nothing."""
    import httpx

    try:
        async with asyncio.timeout(endpoint.timeout_seconds):
            models = (await http.get("/v1/models")).json()["data"]
        (length,) = {each.get("max_model_len") for each in models if each.get("id") == model}
    except (httpx.HTTPError, TimeoutError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return length if type(length) is int else None


def unreachable(endpoint: Endpoint, reason: str) -> ConfigError:
    """Return the error of a server that is not there."""
    return ConfigError(
        f"no server answers at {endpoint.shown} ({reason}); one is required that speaks OpenAI's protocol; start one "
        f"with `moesaic serve RUN`, or give its address."
    )


class Failure(Exception):
    """An answer that cannot be used, and why."""

    def __init__(self, error: ErrorKind, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.error, self.message, self.status = error, message, status


@dataclass
class Answer:
    """What has come of an answer: when each chunk came, whether it had text, whether it said that the answer is over,
    and the server's counts."""

    times: list[float] = field(default_factory=list)
    has_text: list[bool] = field(default_factory=list)
    has_end: list[bool] = field(default_factory=list)
    usage: dict[str, Any] | None = None
    has_begun: bool = False
    is_finished: bool = False

    def take(self, data: bytes, now: float) -> None:
        """Raises: Failure for an event that is none of a completion's."""
        try:
            event = json.loads(data)
            choices, usage = event.get("choices"), event.get("usage")
        except (ValueError, AttributeError, RecursionError):
            raise Failure("broken_stream", f"an event is {_shortened(data.decode('utf-8', 'replace'))!r}") from None
        if event.get("error") is not None or not isinstance(choices, list):
            raise Failure("broken_stream", _shortened(json.dumps(event)))
        if isinstance(usage, dict):
            self.usage = usage
        for choice in choices:
            if not isinstance(choice, dict):
                raise Failure("broken_stream", _shortened(json.dumps(event)))
            has_text, has_end = _has_text(choice), choice.get("finish_reason") is not None
            if "delta" in choice and not self.has_begun and not has_text and not has_end:
                self.has_begun = True  # only tells who speaks
                continue
            self.has_begun = True
            self.times.append(now)
            self.has_text.append(has_text)
            self.has_end.append(has_end)
            self.is_finished = self.is_finished or self.has_end[-1]

    def count(self, key: str) -> int | None:
        return _tokens((self.usage or {}).get(key))

    def cached_tokens(self) -> int | None:
        details = (self.usage or {}).get("prompt_tokens_details")
        return _tokens(details.get("cached_tokens")) if isinstance(details, dict) else None

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
class Client:
    """Sends requests over one pool of connections. form: what a prompt is, and where it goes."""

    http: "httpx.AsyncClient"
    model: str
    timeout_seconds: float
    form: PromptForm = "ids"
    dialect: Dialect = DIALECTS[0]

    async def complete(
        self, request: PlannedRequest, prompt: list[int] | str, *, due_seconds: float, begin: float
    ) -> RequestResult:
        """Send one request now and return what came of it, whatever that is."""
        loop = asyncio.get_running_loop()
        answer = Answer()
        failure: Failure | None = None
        sent = loop.time()
        try:
            await self.ask(request, prompt, answer)
        except Failure as error:
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

    async def ask(self, request: PlannedRequest, prompt: list[int] | str, answer: Answer) -> None:
        """Send one request, and let an answer take what comes.

        Raises: Failure for what is not the answer that was asked for.
        """
        is_chat = self.form == "chat"
        body = {
            "model": self.model,
            **({"messages": [{"role": "user", "content": prompt}]} if is_chat else {"prompt": prompt}),
            self.dialect.limit: request.output_tokens,
            **self.dialect.more,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        content = json.dumps(body, separators=(",", ":")).encode()
        try:
            async with asyncio.timeout(self.timeout_seconds):
                await self._read("/v1/chat/completions" if is_chat else "/v1/completions", content, answer)
        except TimeoutError:
            raise Failure("timeout", f"it took longer than {self.timeout_seconds:g} s") from None
        if self.form == "ids":
            _check_counts(answer, request)
        else:
            _check_counted(answer)
        if not answer.times:
            raise Failure("broken_stream", "the stream held no part of the answer")

    async def _read(self, path: str, content: bytes, answer: Answer) -> None:
        import httpx

        loop = asyncio.get_running_loop()
        has_begun = False
        try:
            async with self.http.stream(
                "POST", path, content=content, headers={"Content-Type": "application/json"}
            ) as response:
                if response.status_code != 200:
                    text = _shortened((await response.aread()).decode("utf-8", "replace"))
                    kind: ErrorKind = "refused" if response.status_code == 429 else "http_error"
                    raise Failure(kind, f"status {response.status_code}: {text}", status=response.status_code)
                has_begun = True
                is_done = False
                async for data in _events(response.aiter_bytes()):
                    is_done = is_done or data == b"[DONE]"
                    if not is_done:  # what comes behind is read, so that the connection can be used again
                        answer.take(data, loop.time())
                answer.is_finished = answer.is_finished or is_done
        except httpx.HTTPError as error:
            reason = str(error) or type(error).__name__
            raise Failure("broken_stream" if has_begun else "connection", reason) from None
        if not answer.is_finished:
            raise Failure("broken_stream", "the stream ended before the answer did")


def _check_counts(answer: Answer, request: PlannedRequest) -> None:
    for what, key, asked in (
        ("prompt", "prompt_tokens", request.prompt_tokens), ("output", "completion_tokens", request.output_tokens)
    ):  # fmt: skip
        counted = answer.count(key)
        if counted != asked:
            raise Failure(
                "wrong_token_count",
                f"the server counted {'no' if counted is None else counted} {what} tokens, {asked} were asked for",
            )


def _check_counted(answer: Answer) -> None:
    """Of a text only the server knows how many tokens it is, and a chat's answer may end before it has to."""
    for what, key in (("prompt", "prompt_tokens"), ("output", "completion_tokens")):
        if answer.count(key) is None:
            raise Failure("wrong_token_count", f"the server counted no {what} tokens, in a usage at the stream's end")


def _tokens(value: object) -> int | None:
    """Return what a server gives as a number of tokens, None where it is none."""
    return value if type(value) is int and 0 <= value <= MOST_TOKENS else None


def _has_text(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(delta.get(key) for key in (*_DELTA_TEXTS, "tool_calls"))
    return bool(choice.get("text"))


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
