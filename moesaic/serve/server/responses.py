"""OpenAI's Responses API: what may be asked by it, and its answer, as items and the events that tell of them.

Both are another form of a chat's: its prompt, tools and text are made as those are.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, FailFast, Field

from moesaic.config.serve import Grammar, Sampling
from moesaic.serve.server.answers import Choice, Usage
from moesaic.serve.server.errors import refusal
from moesaic.serve.server.requests import (
    GRAMMAR_KEYS,
    NO_MODERATION,
    NO_VERBOSITY,
    Body,
    ConversationBody,
    Count,
    Effort,
    format_grammar_of,
    join_parts,
    limit_entries,
    limit_parts,
    read_arguments,
)
from moesaic.serve.server.tools import ToolForm

Event = dict[str, Any]

_ITEM_TEXTS = ("input_text", "output_text")  # the types of an item's parts
_LOGPROBS = "message.output_text.logprobs"
_NO_STATE = "no answers are kept here, and `input` holds all of a conversation, the earlier answers' `output` too"


class Item(Body):
    """One thing of a response's input: a message, a call, what a call gave, or thoughts, which are passed over."""

    path = "input"
    harmless = ("id", "status", "phase", "summary", "encrypted_content", "caller", "namespace", "async", "created_by")

    type: Literal["message", "function_call", "function_call_output", "reasoning", "item_reference"] = "message"
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: str | list[Any] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Any] | None = None

    def need(self, key: str, *, where: str) -> Any:
        """Return what stands under a key. Raises: ApiError where nothing does."""
        value = getattr(self, key)
        if value is None:
            raise refusal(
                f"{where}.{key} is missing; an item of type {self.type} needs one; send it.",
                param=f"{where}.{key}",
                code="missing_key",
            )
        return value


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class TextFormat(Body):
    """As ResponseFormat, with the schema in it."""

    path = "text.format"

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    strict: bool | None = None
    value: dict[str, Any] | None = Field(default=None, alias="schema")


class TextOptions(Body):
    """What a response's text has to be."""

    path = "text"
    unsupported: ClassVar[dict[str, str]] = {"verbosity": NO_VERBOSITY}
    idle_values: ClassVar[dict[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat | None = None


class ReasoningOptions(Body):
    """How much the model is to reason. Its thoughts are text like other text, of which no summary is made."""

    path = "reasoning"
    harmless = ("summary", "generate_summary")

    effort: Effort | None = None


# What the others name is never made here.
_Included = Literal[
    "message.output_text.logprobs",
    "message.input_image.image_url",
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class ResponsesBody(ConversationBody):
    """POST /v1/responses."""

    kind = "response"
    messages_key = "input"
    format_key = "text.format"
    effort_key = "reasoning.effort"
    tool_form = ToolForm(is_nested=False)
    harmless = (
        "user", "service_tier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options",
        "safety_identifier", "max_tool_calls",
    )  # fmt: skip
    unsupported: ClassVar[dict[str, str]] = {
        **GRAMMAR_KEYS,
        "store": "no answers are kept here",
        "previous_response_id": _NO_STATE,
        "conversation": _NO_STATE,
        "background": "an answer is made while its request waits, or streams",
        "prompt": "no prompts are kept here; `instructions` and `input` say all",
        "truncation": "nothing is dropped from `input` here, and what is too long is refused",
        "context_management": "nothing is dropped from `input` here, and what is too long is refused",
        "messages": "it is a chat's key; a response has `input`, and chats go to /v1/chat/completions",
        "max_tokens": "it is a chat's key; a response's is `max_output_tokens`",
        "max_completion_tokens": "it is a chat's key; a response's is `max_output_tokens`",
        "n": "a response is one text; ask several times",
        "logprobs": f'it is a chat\'s key; `include: ["{_LOGPROBS}"]` asks a response for them',
        "response_format": "it is a chat's key; a response's is `text.format`",
        "reasoning_effort": "it is a chat's key; a response's is `reasoning.effort`",
        "moderation": NO_MODERATION,
        "verbosity": NO_VERBOSITY,
    }
    idle_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        "store": (False,), "background": (False,), "truncation": ("disabled",), "n": (1,), "context_management": ([],),
        "verbosity": ("medium",),
    }  # fmt: skip

    input: Annotated[
        list[Item],
        FailFast(),
        BeforeValidator(limit_parts),
        BeforeValidator(_as_items, json_schema_input_type=str | list[Item]),
    ]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: Annotated[list[_Included] | None, FailFast(), BeforeValidator(limit_entries)] = None
    metadata: Annotated[dict[str, str] | None, BeforeValidator(limit_entries)] = None

    @property
    def limit_key(self) -> str:
        return "max_output_tokens"

    @property
    def effort(self) -> str | None:
        return None if self.reasoning is None else self.reasoning.effort

    def template_messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        calls = set[str]()
        for place, item in enumerate(self.input):
            where = f"input.{place}"
            if item.type == "message":
                role = item.need("role", where=where)
                content = join_parts(item.need("content", where=where), where=f"{where}.content", kinds=_ITEM_TEXTS)
                messages.append({"role": "system" if role == "developer" else role, "content": content})
            elif item.type == "function_call":
                function = {key: item.need(key, where=where) for key in ("name", "arguments")}
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": None})
                call = {"id": item.need("call_id", where=where), "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
                calls.add(call["id"])
            elif item.type == "function_call_output":
                call_id = item.need("call_id", where=where)
                if call_id not in calls:
                    raise refusal(
                        f"{where}.call_id is {call_id[:60]!r}, and no function_call before it has that; {_NO_STATE}; "
                        f"send the call too.",
                        param=f"{where}.call_id",
                        code="invalid_value",
                    )
                content = join_parts(item.need("output", where=where), where=f"{where}.output", kinds=_ITEM_TEXTS)
                messages.append({"role": "tool", "tool_call_id": call_id, "content": content})
            elif item.type == "item_reference":
                raise refusal(
                    f"{where} is an item_reference; {_NO_STATE}; send the item itself.",
                    param=where,
                    code="unsupported_content",
                )
        if not messages:
            raise refusal("input has no message; at least one is required; send what the user says.", param="input")
        return [read_arguments(message) for message in messages]

    def template_tools(self) -> list[dict[str, Any]] | None:
        tools = super().template_tools()
        return tools and [
            {"type": "function", "function": {key: tool[key] for key in tool if key != "type"}} for tool in tools
        ]

    def num_logprobs(self) -> int | None:
        if _LOGPROBS not in (self.include or ()):
            if self.top_logprobs:
                raise refusal(
                    f'top_logprobs was given without `include: ["{_LOGPROBS}"]`; it needs them; send that, or leave '
                    f"it out.",
                    param="top_logprobs",
                )
            return None
        if self.template_tools() is not None:
            raise refusal(
                f"include has {_LOGPROBS} and there are tools; a call's tokens are no message's, and have no place "
                f"there; leave one out, or set tool_choice to none.",
                param="include",
            )
        return self.top_logprobs or 0

    def format_grammar(self) -> Grammar | None:
        wanted = None if self.text is None else self.text.format
        if wanted is None:
            return None
        return format_grammar_of(wanted.type, wanted.value, key=self.format_key, schema_key="schema")

    def described(self, sampling: Sampling) -> dict[str, Any]:
        """Return what a response says of its request."""
        wanted = TextFormat(type="text") if self.text is None or self.text.format is None else self.text.format
        return {
            "background": False,
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": self.effort, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": wanted.model_dump(by_alias=True, exclude_none=True)},
            "tool_choice": self.tool_choice or "auto",
            "tools": self.tools or [],
            "top_logprobs": sampling.logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
        }


class ResponseWriter:
    """A response while it is made of the parts of a choice; its events in their order, from begin() to end() or fail().

    Text is a message's until a call comes, and text behind that another's.
    """

    def __init__(self, head: Mapping[str, Any]) -> None:
        """head: what of the response is known before it is made."""
        self._output: list[dict[str, Any]] = []  # items that have ended
        self._response = {
            **head, "status": "in_progress", "error": None, "incomplete_details": None, "completed_at": None,
            "usage": None,
        }  # fmt: skip
        self._num_events = 0
        self._message_id: str | None = None  # of the message that is under way
        self._texts: list[str] = []  # its pieces
        self._logprobs: list[dict[str, Any]] = []
        self._experts: list[dict[str, Any]] = []

    @property
    def response(self) -> dict[str, Any]:
        """The response as it stands, without the item that is under way."""
        return {**self._response, "output": list(self._output)}

    def begin(self) -> list[Event]:
        return [self._event(f"response.{name}", response=self.response) for name in ("created", "in_progress")]

    def take(self, part: Mapping[str, Any]) -> list[Event]:
        """Return the events of a part of the choice."""
        self._experts += part.get("experts", ())
        logprobs = (part.get("logprobs") or {}).get("content", [])
        events: list[Event] = []
        for piece in part.get("pieces", [part["text"]]):
            if isinstance(piece, str):
                events += self._say(piece, logprobs) if piece or logprobs else []
            else:
                events += [*self._end_message("completed"), *self._call(piece)]
        return events

    def end(self, choice: Choice, *, model: str, usage: Usage) -> list[Event]:
        """Return the last events, given the choice when all its parts were taken. model: who has answered."""
        is_cut = choice.finish_reason == "length"
        status = "incomplete" if is_cut else "completed"
        events = [] if self._output or self._message_id else self._begin_message()
        events += self._end_message(status)
        self._response |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "completed_at": None if is_cut else int(time.time()),
            "model": model,
            "usage": _describe_usage(usage),
        }
        if choice.has_experts:
            self._response["experts"] = self._experts
        return [*events, self._event(f"response.{status}", response=self.response)]

    def fail(self, error: Mapping[str, Any], *, is_requests_mistake: bool) -> list[Event]:
        """Return the last event of a response that cannot go on."""
        # Of the few codes that clients know here, unlike those of refused requests.
        code = "invalid_prompt" if is_requests_mistake else "server_error"
        self._response |= {"status": "failed", "error": {**error, "code": code}}
        return [self._event("response.failed", response=self.response)]

    def _event(self, kind: str, **values: Any) -> Event:
        self._num_events += 1
        return {"type": kind, "sequence_number": self._num_events - 1, **values}

    def _say(self, text: str, logprobs: Sequence[dict[str, Any]]) -> list[Event]:
        events = [] if self._message_id else self._begin_message()
        self._texts.append(text)
        self._logprobs += logprobs
        delta = self._event("response.output_text.delta", **self._place(), delta=text, logprobs=list(logprobs))
        return [*events, delta]

    def _begin_message(self) -> list[Event]:
        self._message_id = f"msg_{secrets.token_hex(12)}"
        self._texts, self._logprobs = [], []
        return [
            self._event(
                "response.output_item.added",
                output_index=len(self._output),
                item=self._message("in_progress", content=[]),
            ),
            self._event("response.content_part.added", **self._place(), part=_text_part("", [])),
        ]

    def _end_message(self, status: str) -> list[Event]:
        if self._message_id is None:
            return []
        text = "".join(self._texts)
        part, place = _text_part(text, self._logprobs), self._place()
        item = self._message(status, content=[part])
        self._message_id = None
        self._output.append(item)
        return [
            self._event("response.output_text.done", **place, text=text, logprobs=self._logprobs),
            self._event("response.content_part.done", **place, part=part),
            self._event("response.output_item.done", output_index=place["output_index"], item=item),
        ]

    def _call(self, call: Mapping[str, Any]) -> list[Event]:
        index, arguments = len(self._output), call["function"]["arguments"]
        item = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "status": "completed",
            "call_id": call["id"],
            "name": call["function"]["name"],
            "arguments": arguments,
        }
        self._output.append(item)
        place = {"item_id": item["id"], "output_index": index}
        begun = {**item, "status": "in_progress", "arguments": ""}
        return [
            self._event("response.output_item.added", output_index=index, item=begun),
            self._event("response.function_call_arguments.delta", **place, delta=arguments),
            self._event("response.function_call_arguments.done", **place, name=item["name"], arguments=arguments),
            self._event("response.output_item.done", output_index=index, item=item),
        ]

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": len(self._output), "content_index": 0}

    def _message(self, status: str, *, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self._message_id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": content,
        }


def _text_part(text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _describe_usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        # Clients' types require cache_write_tokens: those that are kept for a price, of which there are none here.
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
