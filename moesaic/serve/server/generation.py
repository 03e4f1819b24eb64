"""From a request to its answer: a place, the engine, and the parts of each text as they come.

What of a request is understood, and what is refused, is jobs.py's business; how long its client is waited for,
connection.py's.
"""

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import Request, Response

from moesaic.config.serve import Grammar
from moesaic.errors import ConfigError
from moesaic.serve.async_engine import Generation, PlacedOutput
from moesaic.serve.grammar import CompiledGrammar
from moesaic.serve.outputs import RequestOutput
from moesaic.serve.server.answers import Choice, Kind, Usage
from moesaic.serve.server.connection import EventStream, encode_event, encode_failure, while_connected
from moesaic.serve.server.errors import ApiError, error_body, json_response, refusal
from moesaic.serve.server.jobs import Job, Served, understand
from moesaic.serve.server.log_fields import log_fields
from moesaic.serve.server.requests import CompletionBody, ConversationBody
from moesaic.serve.server.responses import Event, ResponsesBody, ResponseWriter
from moesaic.serve.server.tool_calls import ToolCallReader

_NAMES: dict[Kind, str] = {"completion": "cmpl-", "chat": "chatcmpl-", "response": "resp_"}  # how ids begin


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
            await stack.enter_async_context(turn_of(served, request, body.priority or 0))
            job = await understand(served, body)
            name = f"{_NAMES[job.kind]}{secrets.token_hex(12)}"
            compiled = None
            if job.sampling.grammar is not None:
                compiled = await _compile(served, job.sampling.grammar, param=body.grammar_key)
            generation = await served.engine.submit(job.prompts, job.sampling, priority=job.priority)
            del compiled  # until here the engine found it, however many others were compiled meanwhile
            await stack.enter_async_context(generation)
            made: _Answer
            if isinstance(body, ResponsesBody):
                made = _ItemsAnswer(served, job, name, generation, arrival, request, body=body)
            else:
                made = _ChoicesAnswer(served, job, name, generation, arrival, request)
            stack.callback(made.log_counts)  # however it ends
            return made

        async def finish() -> Response:
            made = await begin()
            return json_response(await made.whole())

        if not body.streams:
            return await while_connected(request, finish(), deadline=deadline)
        made = await while_connected(request, begin(), deadline=deadline)
        return EventStream(made.events(), stack.pop_all(), deadline=deadline, failure_event=made.failure_event)
    raise AssertionError("unreachable: the stack swallows nothing")


@asynccontextmanager
async def turn_of(served: Served, request: Request, priority: int = 0) -> AsyncIterator[None]:
    """Wait for a request's turn, and count how long. Raises: ApiError where the queue is full."""
    before, waited = time.perf_counter(), True
    async with AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(served.admission.enter(priority))
            log_fields(request.scope).had_turn = True
        except ApiError:
            waited = False
            raise
        finally:  # who leaves has waited too
            if waited:
                queue_seconds = time.perf_counter() - before
                served.metrics.waited(queue_seconds)
                log_fields(request.scope).values["queue_seconds"] = round(queue_seconds, 4)
        yield


async def _compile(served: Served, grammar: Grammar, *, param: str) -> CompiledGrammar:
    """Have a grammar compiled beside the engine, which finds it while somebody has it.

    Raises: ApiError, InstallationError, GrammarProcessError.
    """
    if served.grammars is None:
        raise refusal(
            "a grammar or a JSON format was asked for and this server compiles none; xgrammar is required; leave it "
            "out, or have `pip install 'moesaic[structured]'` run where the server is.",
            param=param,
            code="not_installed",
        )
    if (kept := served.grammars.find(grammar)) is not None:
        return kept
    try:
        return await asyncio.get_running_loop().run_in_executor(served.grammar_thread, served.grammars.compile, grammar)
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
        return encode_failure(error)

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
        self._measure(choice.index, output, placed.came)
        usage = self._usage[prompt]
        usage.prompt_tokens = output.prompt_tokens
        usage.cached_tokens = max(usage.cached_tokens, output.cached_tokens if output.index == 0 else 0)
        self._completion_tokens[choice.index] = output.completion_tokens
        parts = []
        if prompt in self._unechoed:  # the first output of a prompt, which has its log-probabilities
            self._unechoed.discard(prompt)
            scores = output.prompt_logprobs
            first, *others = self._choices[prompt * n : (prompt + 1) * n]
            echo = first.echo(() if scores is None else scores.tokens)
            parts.append((first, echo))
            for each in others:
                each.go_on_behind(first)
                parts.append((each, echo))
        part = choice.take(
            output.text, output.tokens, finish_reason=output.finish_reason, stop_reason=output.stop_reason
        )
        return [*parts, (choice, part)]

    def _measure(self, index: int, output: RequestOutput, now: float) -> None:
        """now: when the output came, whenever its client takes it."""
        clock = self._clocks[index]
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
        return Usage(
            prompt_tokens=sum(each.prompt_tokens for each in self._usage),
            cached_tokens=sum(each.cached_tokens for each in self._usage),
            completion_tokens=sum(self._completion_tokens),
        )

    def log_counts(self) -> None:
        """Tell the log how far the texts came, and why they ended."""
        reasons = {choice.finish_reason for choice in self._choices}
        log_fields(self._request.scope).values |= {
            "prompt_tokens": sum(len(prompt) for prompt in self._job.prompts),
            "completion_tokens": sum(self._completion_tokens),
            "finish_reasons": sorted(reason for reason in reasons if reason is not None),
        }


class _ChoicesAnswer(_Answer):
    """The answer of a completion or a chat."""

    async def whole(self) -> dict[str, Any]:
        parts: list[list[dict[str, Any]]] = [[] for _ in self._choices]
        async for news in self._generation:
            for placed in news:
                for choice, part in self._take(placed):
                    parts[choice.index].append(part)
        choices = []
        for choice, each in zip(self._choices, parts, strict=True):
            choices.append(choice.whole(each))
            await asyncio.sleep(0)  # what others wait for comes between many long texts
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
                head = self._head(kind) | self._usage_so_far()
                for choice, part in taken:
                    has_more = any(part.get(key) for key in ("text", "tool_calls", "experts")) or _has_logprobs(part)
                    if has_more or part.get("finish_reason") is not None:
                        chunks = [choice.chunk(part)]
                        if not begun[choice.index]:
                            begun[choice.index] = True
                            chunks.insert(0, choice.opening())
                        events += [encode_event({**head, "choices": [chunk]}) for chunk in chunks]
            if events:
                yield b"".join(events)
        if self._job.streamed_usage != "none":
            yield encode_event({**self._head(kind), "choices": [], "usage": self._total_usage().as_dict()})
        yield b"data: [DONE]\n\n"

    def _usage_so_far(self) -> dict[str, Any]:
        """What an event says of it that is not the last."""
        if self._job.streamed_usage == "none":
            return {}
        return {"usage": self._total_usage().as_dict() if self._job.streamed_usage == "each" else None}

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
        body = error_body(error)["error"]
        return _named_events(self._writer.fail(body, is_requests_mistake=error.status_code < 500))


def _named_events(events: Sequence[Event]) -> bytes:
    return b"".join(f"event: {each['type']}\n".encode() + encode_event(each) for each in events)


def _has_logprobs(part: dict[str, Any]) -> bool:
    logprobs = part.get("logprobs") or {}
    return bool(logprobs.get("tokens") or logprobs.get("content"))
