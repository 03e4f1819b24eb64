"""What is served, and from a request to what the engine is asked: prompts, settings, and what of them cannot be met."""

import asyncio
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import cast

from moesaic.config.serve import Sampling, ServerConfig
from moesaic.data.chat import is_own_name, render_chat, template_settings
from moesaic.data.tokenizer import SHORT_CHARS, Tokenizer
from moesaic.errors import DataError
from moesaic.serve.async_engine import AsyncEngine
from moesaic.serve.grammar import GrammarCompiler
from moesaic.serve.server.admission import Admission
from moesaic.serve.server.answers import Kind, TokenTexts
from moesaic.serve.server.errors import refusal
from moesaic.serve.server.interruptible import run_interruptibly
from moesaic.serve.server.metrics import Metrics
from moesaic.serve.server.requests import CompletionBody, ConversationBody, Prompt, StreamedUsage
from moesaic.serve.server.tool_calls import ToolCallReader

# Log-probabilities of prompts in an answer of several texts: some 25 MB, for whose half a second everybody waits.
# (Those of generated tokens take longer to come.)
_MOST_LOGPROBS = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Served:
    """The model that is served, and what every request of it needs."""

    name: str
    tokenizer: Tokenizer
    texts: TokenTexts
    engine: AsyncEngine
    max_length: int  # positions of a sequence
    hidden_size: int  # of an embedding
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
    streamed_usage: StreamedUsage
    has_tool_calls: bool = False  # to be looked for in the answer


async def understand(served: Served, body: CompletionBody | ConversationBody) -> Job:
    """Return what a request asks of the engine. Raises: ApiError for what cannot be met."""
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
        streamed_usage=body.streamed_usage,
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
    if body.wanted_tools.required is not None and not ToolCallReader.understands(served.tokenizer):
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

    prompt = await run_interruptibly(encode)
    _check_length(served, prompt, param=body.messages_key, has_answer=True)
    _check_room(served, body.limit, len(prompt), param=body.limit_key)
    reads_calls = ToolCallReader.understands(served.tokenizer)
    sampling = body.sampling(room=served.max_length - len(prompt), reads_calls=reads_calls)
    return _check_job(served, Job(
        kind=body.kind, prompts=(prompt,), echoes=(), sampling=sampling, priority=body.priority or 0,
        streamed_usage=body.streamed_usage,
        has_tool_calls=tools is not None and reads_calls,
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
    if job.echoes and job.sampling.logprobs is not None and count > 1:
        number = sum(map(len, job.prompts)) * job.sampling.n * (1 + job.sampling.logprobs)
        if number > _MOST_LOGPROBS:
            raise refusal(
                f"the request asks for {number} log-probabilities of prompts ({count} texts, of each token "
                f"{1 + job.sampling.logprobs}); an answer of several texts has at most {_MOST_LOGPROBS}; ask for fewer "
                f"texts or logprobs at once, or leave out echo.",
                param="logprobs",
                code="too_many_logprobs",
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
            f"{param} has {len(prompt)} tokens; at most {limit} are taken{_context_length(served)}; shorten it.",
            param=param,
            code="context_length_exceeded",
        )


def _check_room(served: Served, asked: int | None, prompt_tokens: int, *, param: str) -> None:
    """Raises: ApiError where more tokens were asked for than fit; where nothing was said, a default is what fits."""
    room = served.max_length - prompt_tokens
    if asked is not None and asked > room:
        raise refusal(
            f"{param} is {asked}; behind a prompt of {prompt_tokens} tokens at most {room} fit into the "
            f"{served.max_length} positions of a text here; lower it, leave it out, or shorten the prompt"
            f"{_context_length(served)}.",
            param=param,
            code="context_length_exceeded",
        )


def _context_length(served: Served) -> str:
    """Return OpenAI's words for what is too long: LiteLLM, and what stands on it, knows the error by nothing else."""
    return f" (this model's maximum context length is {served.max_length} tokens)"
