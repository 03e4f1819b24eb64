"""From a request to its answer: prompts, a place, the engine, and the parts of each text as they come."""

import asyncio
import json
import re
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from moesaic.config.serve import Grammar, Sampling, ServerConfig
from moesaic.data.chat import is_own_name, render_chat, template_settings
from moesaic.data.tokenizer import SHORT_CHARS, Tokenizer
from moesaic.errors import ConfigError, DataError
from moesaic.serve.async_engine import AsyncEngine, Generation, PlacedOutput
from moesaic.serve.grammar import GrammarCompiler
from moesaic.serve.outputs import RequestOutput
from moesaic.serve.server.admission import Admission
from moesaic.serve.server.answers import Choice, Kind, TokenTexts, Usage
from moesaic.serve.server.errors import ApiError, error_body, json_response, refusal
from moesaic.serve.server.log_fields import log_fields
from moesaic.serve.server.metrics import Metrics
from moesaic.serve.server.requests import CompletionBody, ConversationBody, Prompt
from moesaic.serve.server.responses import Event, ResponsesBody, ResponseWriter
from moesaic.serve.server.tool_calls import ToolCallReader

_Result = TypeVar("_Result")

_NAMES: dict[Kind, str] = {"completion": "cmpl-", "chat": "chatcmpl-", "response": "resp_"}  # how ids begin

# A client that reads its stream slowly has so long for the last event, at the end of the time for a request.
_FAREWELL_SECONDS = 5


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model that is served, and what every request of it needs."""

    name: str
    tokenizer: Tokenizer
    texts: TokenTexts
    engine: AsyncEngine
    max_length: int  # positions of a sequence
    max_embedded_tokens: int  # of one call
    moe_layers: tuple[int, ...]  # the places of the MoE layers
    student: "Student | None"  # who helps out under overload
    created: int  # seconds since 1970
    config: ServerConfig
    admission: Admission
    metrics: Metrics
    grammars: GrammarCompiler | None  # None: they are refused
    grammar_thread: ThreadPoolExecutor  # of one, so that slow grammars make only one another wait


@dataclass(frozen=True)
class Student:
    """Who answers under overload: its name, and the places of its MoE layers."""

    name: str
    moe_layers: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Job:
    """A request that is understood: what goes to the engine, and what its answer looks like."""

    kind: Kind
    prompts: tuple[tuple[int, ...], ...]
    echoes: tuple[str, ...]  # each prompt's text, for a completion that echoes; else empty
    sampling: Sampling
    priority: int
    streams_usage: bool
    has_tool_calls: bool = False  # to be looked for in the answer


async def _understand(served: Served, body: CompletionBody | ConversationBody) -> Job:
    """Raises: ApiError for what cannot be met."""
    if isinstance(body, CompletionBody):
        return await _understand_completion(served, body)
    return await _understand_conversation(served, body)


async def _understand_completion(served: Served, body: CompletionBody) -> Job:
    sampling = body.sampling()
    limit = served.config.max_texts_per_request
    prompts = await read_prompts(served, body.prompt, param="prompt", limit=limit, has_answer=sampling.max_tokens > 0)
    _check_room(served, body.max_tokens, max(map(len, prompts)), param="max_tokens")
    echoes: tuple[str, ...] = ()
    if body.echo:
        given = [body.prompt] if isinstance(body.prompt, str) else body.prompt
        echoes = tuple(
            text if isinstance(text, str) else served.tokenizer.decode(ids)
            for text, ids in zip(given if len(given) == len(prompts) else prompts, prompts, strict=True)
        )
    return _check_job(served, Job(
        kind="completion", prompts=prompts, echoes=echoes, sampling=sampling, priority=body.priority or 0,
        streams_usage=body.streams_usage,
    ))  # fmt: skip


async def _understand_conversation(served: Served, body: ConversationBody) -> Job:
    messages, tools = body.template_messages(), body.template_tools()
    if served.tokenizer.chat_template is None:
        raise refusal(
            "the model has no chat template; a tokenizer with one is required for a chat; use /v1/completions, or put "
            "chat_template.jinja beside the run's tokenizer.json.",
            code="no_chat_template",
        )
    if tools and not re.search(r"\btools\b", served.tokenizer.chat_template):
        raise refusal(
            "tools were given and the model's chat template shows none to the model, which would not know of them; a "
            "template that has `tools` is required; leave them out, or say in a message what may be called.",
            param="tools",
            code="no_tools_in_template",
        )

    if body.must_call and not ToolCallReader.understands(served.tokenizer):
        raise refusal(
            "tool_choice asks for a call, and the model's chat template does not say that calls are written in "
            "<tool_call> tags; the form is required, so that it can be kept; send auto, and find the call in the text.",
            param="tool_choice",
            code="no_tool_calls_in_template",
        )

    settings = body.template_settings()
    for name in settings:
        given = name in (body.chat_template_kwargs or {})
        _check_setting(served, name, param="chat_template_kwargs" if given else body.effort_key)

    def encode() -> tuple[int, ...]:
        try:
            text = render_chat(
                served.tokenizer, messages, tools=tools, settings=settings,
                add_generation_prompt=not body.continues_last,
            )  # fmt: skip
            text.encode()
        except DataError as error:
            raise refusal(str(error), param=body.messages_key, code="refused_by_template") from None
        except UnicodeEncodeError as error:
            raise refusal(
                f"the chat template makes a text with the lone surrogate {text[error.start]!r} of these messages; "
                f"Unicode is required; leave it out.",
                param=body.messages_key,
                code="invalid_value",
            ) from None
        # The template has put the begin token where it wants it.
        return tuple(served.tokenizer.encode_prompt(text, add_special_tokens=False))

    prompt = await asyncio.to_thread(encode)
    _check_length(served, prompt, param=body.messages_key, has_answer=True)
    _check_room(served, body.limit, len(prompt), param=body.limit_key)
    sampling = body.sampling(room=served.max_length - len(prompt))
    return _check_job(served, Job(
        kind=body.kind, prompts=(prompt,), echoes=(), sampling=sampling, priority=body.priority or 0,
        streams_usage=body.streams_usage,
        has_tool_calls=tools is not None and ToolCallReader.understands(served.tokenizer),
    ))  # fmt: skip


def _check_setting(served: Served, name: str, *, param: str) -> None:
    """Raise ApiError unless the chat template reads a name, and the server does not pass it itself."""
    shown = json.dumps(name)[:60]
    if is_own_name(name):
        raise refusal(
            f"chat_template_kwargs has {shown}, which the server itself passes to the chat template; names of the "
            f"template's own are required; leave it out.",
            param=param,
            code="invalid_value",
        )
    known = template_settings(served.tokenizer)
    if name not in known:
        raise refusal(
            f"{shown} would be set for the model's chat template, which does not read it; it reads "
            f"{', '.join(sorted(known))[:400] or 'no setting at all'}, and none is silently ignored; leave it out.",
            param=param,
            code="no_such_setting_in_template",
        )


def _check_job(served: Served, job: Job) -> Job:
    limit, count = served.config.max_texts_per_request, len(job.prompts) * job.sampling.n
    if count > limit:
        raise refusal(
            f"the request asks for {count} texts ({len(job.prompts)} prompts, n {job.sampling.n}); at most {limit} are "
            f"made at once; ask several times.",
            param="n" if job.sampling.n > 1 else "prompt",
            code="too_many_texts",
        )
    return job


async def read_prompts(
    served: Served, prompt: Prompt, *, param: str, limit: int, has_answer: bool = False
) -> tuple[tuple[int, ...], ...]:
    """Return the token ids of one or several prompts, each a text or ids.

    limit: at most so many prompts. has_answer: tokens are to follow.

    Raises: ApiError.
    """
    is_one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    several = cast("Sequence[str | Sequence[int]]", [prompt] if is_one else prompt)
    if not several or any(not isinstance(each, str) and not each for each in several):
        raise refusal(
            f"{param} holds an empty list; at least one text or token id is required; send some.", param=param
        )
    if len(several) > limit:
        raise refusal(
            f"{param} holds {len(several)} texts; at most {limit} are taken at once; ask several times.",
            param=param,
            code="too_many_texts",
        )
    ids = []
    for each in several:
        found = await encode(served.tokenizer, each) if isinstance(each, str) else tuple(each)
        _check_length(served, found, param=param, has_answer=has_answer)
        if not isinstance(each, str):
            check_ids(served.tokenizer, found, param=param)
        ids.append(found)
        await asyncio.sleep(0)  # what others wait for comes between many short texts
    return tuple(ids)


def check_ids(tokenizer: Tokenizer, ids: Sequence[int], *, param: str) -> None:
    """Raise ApiError for ids that are no tokens."""
    wrong = next((each for each in ids if not 0 <= each < tokenizer.vocab_size), None)
    if wrong is not None:
        raise refusal(
            f"{param} has the token id {wrong}; ids from 0 to {tokenizer.vocab_size - 1} are required; see /tokenize.",
            param=param,
            code="invalid_value",
        )


async def encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
    """Return a text's ids; of an empty text the end-of-text token, behind which anything may come."""

    def call() -> list[int]:
        return tokenizer.encode_prompt(text, add_special_tokens=add_special_tokens)

    ids = call() if len(text) < SHORT_CHARS else await asyncio.to_thread(call)
    return tuple(ids) or (tokenizer.end_of_text_id,)


def _check_length(served: Served, prompt: Sequence[int], *, param: str, has_answer: bool) -> None:
    room = served.max_length - has_answer
    limit = min(served.config.max_prompt_tokens or room, room)
    if len(prompt) > limit:
        raise refusal(
            f"{param} has {len(prompt)} tokens; at most {limit} are taken; shorten it.",
            param=param,
            code="context_length_exceeded",
        )


def _check_room(served: Served, asked: int | None, prompt_tokens: int, *, param: str) -> None:
    """Raises: ApiError where more tokens were asked for than fit; where nothing was said, a default is what fits."""
    room = served.max_length - prompt_tokens
    if asked is not None and asked > room:
        raise refusal(
            f"{param} is {asked}; behind a prompt of {prompt_tokens} tokens at most {room} fit into the "
            f"{served.max_length} positions of a text here; lower it, leave it out, or shorten the prompt.",
            param=param,
            code="context_length_exceeded",
        )


async def answer(served: Served, request: Request, body: CompletionBody | ConversationBody) -> Response:
    """Make the answer of a request: a whole one, or a stream that is under way.

    What costs time, encoding its text too, waits for its turn.

    Raises: ApiError; MoesaicError for what the engine refuses.
    """
    body.check()
    arrival = log_fields(request.scope).arrival
    deadline = deadline_of(served, request)
    async with AsyncExitStack() as stack:

        async def begin() -> "_Answer":
            before = time.perf_counter()
            await stack.enter_async_context(served.admission.enter(body.priority or 0))
            queue_seconds = time.perf_counter() - before
            served.metrics.waited(queue_seconds)
            log_fields(request.scope).values["queue_seconds"] = round(queue_seconds, 4)
            job = await _understand(served, body)
            name = f"{_NAMES[job.kind]}{secrets.token_hex(12)}"
            if job.sampling.grammar is not None:
                await _compile(served, job.sampling.grammar, param=body.grammar_key)
            generation = await served.engine.submit(job.prompts, job.sampling, request_id=name, priority=job.priority)
            await stack.enter_async_context(generation)
            if isinstance(body, ResponsesBody):
                return _ItemsAnswer(served, job, name, generation, arrival, request, body=body)
            return _ChoicesAnswer(served, job, name, generation, arrival, request)

        async def finish() -> Response:
            made = await begin()
            return json_response(await made.whole())

        if not body.streams:
            return await while_connected(request, finish(), deadline=deadline)
        made = await while_connected(request, begin(), deadline=deadline)
        return EventStream(made.events(), stack.pop_all(), deadline=deadline, failure_event=made.failure_event)
    raise AssertionError("unreachable: the stack swallows nothing")


async def _compile(served: Served, grammar: Grammar, *, param: str) -> None:
    """Have a grammar compiled beside the engine, which then finds it. Raises: ApiError, InstallationError,
    GrammarProcessError."""
    if served.grammars is None:
        raise refusal(
            "a grammar or a JSON format was asked for and this server compiles none; xgrammar is required; leave it "
            "out, or have `pip install 'moesaic[structured]'` run where the server is.",
            param=param,
            code="not_installed",
        )
    if served.grammars.find(grammar) is None:
        try:
            await asyncio.get_running_loop().run_in_executor(served.grammar_thread, served.grammars.compile, grammar)
        except ConfigError as error:
            raise refusal(str(error), param=param, code="invalid_value") from None


def deadline_of(served: Served, request: Request) -> float:
    """Return when a request's time is over, by the event loop's clock."""
    gone = time.perf_counter() - log_fields(request.scope).arrival
    return asyncio.get_running_loop().time() + served.config.request_timeout_seconds - gone


@dataclass
class _Clock:
    """When a text's first and last tokens came."""

    first: float = 0.0
    last: float = 0.0
    num_tokens: int = 0


def _failure_event(error: ApiError) -> bytes:
    return _event(_body_of(error))


def _body_of(error: ApiError) -> dict[str, Any]:
    return error_body(error.status_code, str(error.detail), param=error.param, code=error.code)


class _Answer(ABC):
    """The choices of one answer, fed by the engine."""

    def __init__(
        self, served: Served, job: Job, name: str, generation: Generation, arrival: float, request: Request
    ) -> None:
        self._served, self._job, self._name, self._generation = served, job, name, generation
        self._arrival, self._request = arrival, request
        self._created = int(time.time())
        sampling = job.sampling
        self._choices = [
            Choice(
                index=prompt * sampling.n + index,
                kind=job.kind,
                texts=served.texts,
                moe_layers=served.moe_layers,
                has_logprobs=sampling.logprobs is not None,
                has_experts=sampling.return_experts,
                echoed=job.echoes[prompt] if job.echoes else "",
                tool_calls=ToolCallReader() if job.has_tool_calls else None,
            )
            for prompt in range(len(job.prompts))
            for index in range(sampling.n)
        ]
        self._unechoed = set(range(len(job.prompts))) if job.echoes else set()
        self._clocks = [_Clock() for _ in self._choices]
        self._usage = [Usage() for _ in job.prompts]
        self._completion_tokens = [0] * len(self._choices)
        self._has_first_token = False
        self._model = served.name

    @abstractmethod
    async def whole(self) -> dict[str, Any]:
        """Return the answer when all its texts have ended."""

    @abstractmethod
    def events(self) -> AsyncGenerator[bytes, None]:
        """Yield the events of a stream, those that came together in one piece."""

    def failure_event(self, error: ApiError) -> bytes:
        """Return a stream's last event, where its answer cannot be finished."""
        return _failure_event(error)

    def _take(self, placed: PlacedOutput) -> list[tuple[Choice, dict[str, Any]]]:
        """Return the parts that an output adds to choices. Raises: ApiError where the engine could not go on."""
        output, prompt = placed.output, placed.prompt_index
        if output.finish_reason == "abort":
            raise ApiError(503, f"the request was ended ({output.message}); ask again.", code="aborted")
        if output.is_refused:
            raise refusal(str(output.message), code="cannot_be_met")
        if output.finish_reason == "error":
            raise ApiError(500, output.message or "the engine failed; see the server's log.", code="engine_error")
        n = self._job.sampling.n
        choice = self._choices[prompt * n + output.index]
        if output.is_by_student and (student := self._served.student) is not None:
            self._model, choice.moe_layers = student.name, student.moe_layers
            log_fields(self._request.scope).values["model"] = student.name
        self._measure(choice.index, output)
        usage = self._usage[prompt]
        usage.prompt_tokens = output.prompt_tokens
        usage.cached_tokens = max(usage.cached_tokens, output.cached_tokens if output.index == 0 else 0)
        self._completion_tokens[choice.index] = output.completion_tokens
        parts = []
        if prompt in self._unechoed:  # the first output of a prompt, which has its log-probabilities
            self._unechoed.discard(prompt)
            scores = output.prompt_logprobs
            for each in self._choices[prompt * n : (prompt + 1) * n]:
                parts.append((each, each.echo(() if scores is None else scores.tokens)))
        part = choice.take(
            output.text, output.tokens, finish_reason=output.finish_reason, stop_reason=output.stop_reason
        )
        return [*parts, (choice, part)]

    def _measure(self, index: int, output: RequestOutput) -> None:
        clock, now = self._clocks[index], time.perf_counter()
        if output.tokens:
            if not clock.num_tokens:
                clock.first = now
            clock.last = now
            clock.num_tokens += len(output.tokens)
            if not self._has_first_token:
                self._has_first_token = True
                self._served.metrics.first_token(now - self._arrival)
                log_fields(self._request.scope).values["first_token_seconds"] = round(now - self._arrival, 4)
        if output.finish_reason is not None and clock.num_tokens > 1:
            self._served.metrics.text_ended((clock.last - clock.first) / (clock.num_tokens - 1))

    def _total_usage(self) -> Usage:
        total = Usage(
            prompt_tokens=sum(each.prompt_tokens for each in self._usage),
            cached_tokens=sum(each.cached_tokens for each in self._usage),
            completion_tokens=sum(self._completion_tokens),
        )
        log_fields(self._request.scope).values |= {
            "prompt_tokens": total.prompt_tokens,
            "completion_tokens": total.completion_tokens,
            "finish_reasons": sorted({str(choice.finish_reason) for choice in self._choices}),
        }
        return total


class _ChoicesAnswer(_Answer):
    """The answer of a completion or a chat."""

    async def whole(self) -> dict[str, Any]:
        parts: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        async for news in self._generation:
            for placed in news:
                for choice, part in self._take(placed):
                    parts[choice.index].append(part)
        choices = [choice.whole(each) for choice, each in zip(self._choices, parts, strict=True)]
        usage = self._total_usage().as_dict()
        kind = "text_completion" if self._job.kind == "completion" else "chat.completion"
        return {**self._head(kind), "choices": choices, "usage": usage}

    async def events(self) -> AsyncGenerator[bytes, None]:
        kind = "text_completion" if self._job.kind == "completion" else "chat.completion.chunk"
        begun = [self._job.kind == "completion"] * len(self._choices)
        async for news in self._generation:
            events = []
            for placed in news:
                taken = self._take(placed)
                head = self._head(kind) | ({"usage": None} if self._job.streams_usage else {})
                for choice, part in taken:
                    has_more = any(part.get(key) for key in ("text", "tool_calls", "experts")) or _has_logprobs(part)
                    if has_more or part.get("finish_reason") is not None:
                        chunk = choice.chunk(part, is_first=not begun[choice.index])
                        begun[choice.index] = True
                        events.append(_event({**head, "choices": [chunk]}))
            if events:
                yield b"".join(events)
        if self._job.streams_usage:
            yield _event({**self._head(kind), "choices": [], "usage": self._total_usage().as_dict()})
        yield b"data: [DONE]\n\n"

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
        }


class _ItemsAnswer(_Answer):
    """The answer of /v1/responses: one choice, told in events; the whole answer is what the last of them says."""

    def __init__(self, *args: Any, body: ResponsesBody) -> None:
        super().__init__(*args)
        self._writer = ResponseWriter({
            "id": self._name, "object": "response", "created_at": self._created, "model": self._model,
            **body.described(self._job.sampling),
        })  # fmt: skip

    async def whole(self) -> dict[str, Any]:
        async for _ in self.events():
            pass
        return self._writer.response

    async def events(self) -> AsyncGenerator[bytes, None]:
        yield _named_events(self._writer.begin())
        async for news in self._generation:
            parts = [part for placed in news for _, part in self._take(placed)]
            if events := [event for part in parts for event in self._writer.take(part)]:
                yield _named_events(events)
        yield _named_events(self._writer.end(self._choices[0], model=self._model, usage=self._total_usage()))

    def failure_event(self, error: ApiError) -> bytes:
        body = _body_of(error)["error"]
        return _named_events(self._writer.fail(body, is_requests_mistake=error.status_code < 500))


class EventStream(Response):
    """Server-sent events while the client listens and the time lasts; then what it holds is let go."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        held: AsyncExitStack,
        *,
        deadline: float,
        failure_event: Callable[[ApiError], bytes] = _failure_event,
    ) -> None:
        super().__init__(None, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._held, self._deadline = events, held, deadline
        self._failure_event = failure_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            sending = asyncio.ensure_future(self._send(scope, send))
            leaving = asyncio.ensure_future(_disconnected(receive))
            try:
                await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
                if not sending.done():
                    fields = log_fields(scope).values
                    if "error" not in fields:  # else the server ended it, and stops before the end is sent
                        fields["client_left"] = True
                    sending.cancel()
                await asyncio.gather(sending, leaving, return_exceptions=True)
            if not sending.cancelled() and (error := sending.exception()) is not None:
                raise error

    async def _send(self, scope: Scope, send: Send) -> None:
        failure: ApiError | None = None
        try:
            async with asyncio.timeout_at(self._deadline), aclosing(self._events):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for piece in self._events:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except TimeoutError:
            failure = _too_long()
        except ApiError as error:
            failure = error
        # Sending may wait for as long as the client does not read, and meanwhile others need the place.
        await self._held.aclose()
        try:
            async with asyncio.timeout_at(max(self._deadline, asyncio.get_running_loop().time() + _FAREWELL_SECONDS)):
                if failure is not None:
                    await self._send_error(scope, send, failure)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log_fields(scope).values["client_left"] = True  # an unfinished answer has its connection closed

    async def _send_error(self, scope: Scope, send: Send, error: ApiError) -> None:
        """The status is sent already: an error is the stream's last event."""
        log_fields(scope).values |= {"error": error.code, "error_status": error.status_code}
        await send({"type": "http.response.body", "body": self._failure_event(error), "more_body": True})


async def while_connected(request: Request, work: Awaitable[_Result], *, deadline: float) -> _Result:
    """Wait for work as long as the client is there and the time lasts; else cancel it.

    Raises: ApiError 504, or 499 where nobody is there to read it.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request.receive))
    try:
        async with asyncio.timeout_at(deadline):
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
    except TimeoutError:
        raise _too_long() from None
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    log_fields(request.scope).values["client_left"] = True
    raise ApiError(499, "the client has gone; its request was ended; stay connected for an answer.", code="client_left")


def _too_long() -> ApiError:
    return ApiError(
        504,
        "the answer took longer than the server allows a request; it was ended; ask for fewer tokens.",
        code="timeout",
    )


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


def _named_events(events: Sequence[Event]) -> bytes:
    return b"".join(f"event: {each['type']}\n".encode() + _event(each) for each in events)


def _has_logprobs(part: dict[str, Any]) -> bool:
    logprobs = part.get("logprobs") or {}
    return bool(logprobs.get("tokens") or logprobs.get("content"))
