"""Driving any server that speaks OpenAI's protocol, and timing what it answers.

How one request is sent and read is endpoint.py; what is asked, workload.py; what is made of the times,
report/serving.py.
"""

import asyncio
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from moesaic.bench.endpoint import (
    DIALECTS,
    Answer,
    Client,
    Endpoint,
    Failure,
    first_model,
    max_length,
    open_client,
    unreachable,
)
from moesaic.bench.workload import (
    PlannedRequest,
    TextMeasure,
    Workload,
    describe,
    make_prompt,
    make_text,
    plan_requests,
)
from moesaic.errors import ConfigError
from moesaic.logs import logger
from moesaic.report.serving import RequestResult, ServingResult

if TYPE_CHECKING:
    import httpx

# The first request, which finds out whether the server understands us.
_TRIAL = PlannedRequest(prompt_tokens=4, output_tokens=2, due_seconds=None)
# Words of the text that finds out, beside the trial, how many tokens a server makes of one.
_MOST_WORDS = 256
# What a server answers that does not know a part of a request.
_NOT_UNDERSTOOD = (400, 422)

# Told how many requests have ended, and of how many.
Progress = Callable[[int, int], None]
# Told what came of the requests that had ended when a run was interrupted, if any had.
OnInterrupt = Callable[[ServingResult], None]


def bench_serving(
    endpoint: Endpoint,
    workload: Workload,
    *,
    name: str | None = None,
    num_warmup: int = 2,
    ttft_limit_seconds: float = 2.0,
    tpot_limit_seconds: float = 0.1,
    show: Progress = lambda ended, count: None,
    on_interrupt: OnInterrupt = lambda result: None,
) -> ServingResult:
    """Send a workload to a server and return what came of it; num_warmup requests go before, uncounted.

    Requests that fail are part of the result. on_interrupt: called before KeyboardInterrupt goes on.

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
            on_interrupt=on_interrupt,
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
    on_interrupt: OnInterrupt = lambda result: None,
    transport: "httpx.AsyncBaseTransport | None" = None,
) -> ServingResult:
    """Do what bench_serving does, in a loop that runs already; transport: what carries requests, if not a network."""
    requests = plan_requests(workload)
    for what, value in {
        "timeout": endpoint.timeout_seconds, "ttft-limit": ttft_limit_seconds, "tpot-limit": tpot_limit_seconds
    }.items():  # fmt: skip
        if not 0 < value < math.inf:
            raise ConfigError(f"--{what} is {value}; a finite number of seconds above 0 is required; change it.")
    async with open_client(endpoint, transport) as http:
        model = endpoint.model or await first_model(http, endpoint)
        _check_lengths(requests, await max_length(http, endpoint, model), endpoint)
        client = Client(http, model, timeout_seconds=endpoint.timeout_seconds, form=workload.prompts)
        sender = await _prepare(client, workload, requests, endpoint)
        await _warm_up(sender, list(itertools.islice(itertools.cycle(requests), num_warmup)))
        created = datetime.now(UTC).isoformat(timespec="seconds")
        how = {
            "warmup": num_warmup,
            "timeout_seconds": endpoint.timeout_seconds,
            "asked_with": str(sender.client.dialect),
        }
        ended: dict[int, RequestResult] = {}
        result = ServingResult(
            name=name or model.rstrip("/").rsplit("/", 1)[-1],  # without the folder or the owner
            url=endpoint.shown,
            model=model,
            created=created,
            workload={**describe(workload, requests), **how},
            ttft_limit_seconds=ttft_limit_seconds,
            tpot_limit_seconds=tpot_limit_seconds,
            requests=(),
        )
        try:
            await _send_all(sender, requests, ended, show)
        except asyncio.CancelledError:
            if ended:
                on_interrupt(replace(result, requests=_in_order(ended), num_unended=len(requests) - len(ended)))
            raise
    return replace(result, requests=_in_order(ended))


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


@dataclass(frozen=True)
class _Sender:
    """Sends a workload's requests. measure: how many tokens the server makes of a text; None: prompts are ids."""

    client: Client
    workload: Workload
    measure: TextMeasure | None = None

    def prompt(self, request: PlannedRequest, *, index: int, is_warmup: bool = False) -> list[int] | str:
        if self.measure is None:
            return make_prompt(self.workload, request, index=index, is_warmup=is_warmup)
        return make_text(self.workload, request, self.measure, index=index, is_warmup=is_warmup)


async def _prepare(
    client: Client, workload: Workload, requests: Sequence[PlannedRequest], endpoint: Endpoint
) -> _Sender:
    """Send short requests that find out whether and how the server can be asked, so that one which cannot be says so
    now and not a hundred times.

    Raises: ConfigError for a server that cannot be measured.
    """
    if workload.prompts == "ids":
        sender = _Sender(client, workload)
        # Only a server that is busy with others may say no.
        await _try(client, sender.prompt(_TRIAL, index=0, is_warmup=True), endpoint, may_be_busy=True)
        return sender
    texts = _Sender(client, workload, TextMeasure())
    for dialect in DIALECTS:
        client = replace(client, dialect=dialect)
        try:
            count = await _try(client, texts.prompt(_TRIAL, index=0, is_warmup=True), endpoint)
            break
        except _NotUnderstoodError:
            if dialect is DIALECTS[-1]:
                raise
    if not client.dialect.is_exact:
        logger.warning(
            "%s does not know ignore_eos; answers end where the model ends them, and may be shorter than asked for.",
            endpoint.shown,
        )
    # Not longer than the prompts themselves, whose words may have several tokens.
    few = _TRIAL.prompt_tokens
    many = min(_MOST_WORDS, max(16, max(each.prompt_tokens for each in requests) // 8))
    longer = await _try(client, texts.prompt(replace(_TRIAL, prompt_tokens=many), index=1, is_warmup=True), endpoint)
    if longer <= count:
        raise ConfigError(
            f"{endpoint.shown} counts {count} tokens in {few} words and {longer} in {many}; counts that grow with a "
            f"prompt are required to make one of a given length; measure it with --prompts ids, if it takes them."
        )
    per_word = (longer - count) / (many - few)
    return _Sender(client, workload, TextMeasure(per_word=per_word, around=max(0.0, count - few * per_word)))


class _NotUnderstoodError(ConfigError):
    """A request that a server takes no part of; another form of it may do."""


async def _try(client: Client, prompt: list[int] | str, endpoint: Endpoint, *, may_be_busy: bool = False) -> int:
    """Send the trial with a prompt, and return how many tokens of it the server counts (0 where it is busy).

    Raises: ConfigError for a server that does not answer it.
    """
    answer = Answer()
    try:
        await client.ask(_TRIAL, prompt, answer)
    except Failure as failure:
        if failure.error == "connection":
            raise unreachable(endpoint, failure.message or "no connection") from None
        if failure.error == "refused" and may_be_busy:
            return 0
        kind = _NotUnderstoodError if failure.status in _NOT_UNDERSTOOD else ConfigError
        what, hint = {
            "ids": (f"a prompt of {len(prompt)} token ids", "--model, --vocab-size, --prompts and --api-key-file"),
            "text": ("a prompt of some words", "--model, --prompts and --api-key-file"),
            "chat": ("a message of some words", "--model, --prompts and --api-key-file"),
        }[client.form]
        raise kind(
            f"{endpoint.shown} cannot be measured: {what} with {client.dialect.limit} {_TRIAL.output_tokens}, "
            f"{'ignore_eos and ' if client.dialect.is_exact else ''}a streamed answer ended with {failure.error} "
            f"({failure.message}); a server that answers such requests is required, as vLLM, llama-server and "
            f"`moesaic serve` do; see what it says, and {hint}."
        ) from None
    return answer.count("prompt_tokens") or 0


async def _warm_up(sender: _Sender, requests: Sequence[PlannedRequest]) -> None:
    begin = asyncio.get_running_loop().time()
    async with asyncio.TaskGroup() as group:
        for index, request in enumerate(requests, start=2):  # 0 and 1 were trials
            prompt = sender.prompt(request, index=index, is_warmup=True)
            group.create_task(sender.client.complete(request, prompt, due_seconds=0.0, begin=begin))


def _in_order(results: Mapping[int, RequestResult]) -> tuple[RequestResult, ...]:
    return tuple(results[index] for index in sorted(results))


async def _send_all(
    sender: _Sender, requests: Sequence[PlannedRequest], results: dict[int, RequestResult], show: Progress
) -> None:
    """Send every request when it is due, or as others end, and put what came of each among the results."""
    loop = asyncio.get_running_loop()
    begin = loop.time()

    async def send(index: int, prompt: list[int] | str, due_seconds: float) -> None:
        results[index] = await sender.client.complete(requests[index], prompt, due_seconds=due_seconds, begin=begin)
        show(len(results), len(requests))

    async def send_at_their_times() -> None:
        async with asyncio.TaskGroup() as group:
            for index, request in enumerate(requests):
                prompt = sender.prompt(request, index=index)  # while there is time
                assert request.due_seconds is not None
                # Returns to the loop even when it is late: those under way have to be read.
                await asyncio.sleep(max(0.0, begin + request.due_seconds - loop.time()))
                group.create_task(send(index, prompt, request.due_seconds))

    async def send_as_others_end(waiting: Iterator[int]) -> None:
        due_seconds = 0.0
        for index in waiting:
            await send(index, sender.prompt(requests[index], index=index), due_seconds)
            due_seconds = results[index].end_seconds

    concurrency = sender.workload.concurrency
    if concurrency is None:
        await send_at_their_times()
    else:
        waiting = iter(range(len(requests)))
        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(requests))):
                group.create_task(send_as_others_end(waiting))
