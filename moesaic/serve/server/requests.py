"""What may be asked: the bodies of requests, and the Sampling that they mean.

A key is either one of a class, or known and without effect on the answer (accepted), or known and not supported
(refused, with the reason, unless its value asks for nothing), or unknown (refused, with the nearest names). Null asks
for nothing under any key. Ranges of values are Sampling's own (config/serve.py).
"""

import json
from abc import abstractmethod
from collections.abc import Mapping, Sized
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from moesaic.config.serve import Grammar, GrammarKind, Sampling
from moesaic.serve.server.answers import Kind
from moesaic.serve.server.errors import ApiError, explain_values, refusal, unknown_key
from moesaic.serve.server.tool_calls import read_object
from moesaic.serve.server.tools import ToolForm, Tools

# As OpenAI's: more likeliest tokens, and more biases, than anybody reads or writes.
MAX_TOP_LOGPROBS = 20
_MAX_ENTRIES = 1024
_MAX_NESTING = 64  # as of schemas
_MAX_STOPS = 16
_MAX_STOP_CHARS = 4096  # together
# Prompts of a request and messages of a chat, before the server's own limits are looked at: a list of a million takes
# seconds to understand, and meanwhile nobody else gets a token.
_MAX_PARTS = 16_384
# Texts to embed: as OpenAI's. They are computed a few at a time, so that many make nobody wait but who sent them.
MAX_EMBEDDED_TEXTS = 2048
# What OpenAI's completions take where nothing is said.
_DEFAULT_COMPLETION_TOKENS = 16
NO_VERBOSITY = "the models here know no such setting"
NO_MODERATION = "nothing is moderated here"


def _check_prompt(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
    """Check a list here: pydantic takes seconds for millions of token ids, and gives a finding for each wrong one."""
    if not isinstance(value, list):
        return handler(value)
    if len(value) > _MAX_PARTS and type(value[0]) is not int:
        raise _too_many(value, info, code="too_many_texts")
    kinds = set(map(type, value))
    is_nested = kinds == {list} and all(set(map(type, each)) <= {int} for each in value)
    if not (is_nested or kinds in ({str}, {int}, set())):
        raise refusal(
            f"{info.field_name} is a list of several or unknown kinds of thing; texts, or token ids, or lists of "
            f"token ids are required; send one kind.",
            param=info.field_name,
            code="invalid_value",
        )
    return value


def limit_entries(value: Any, info: ValidationInfo) -> Any:
    """Return a value as it is. Raises: ApiError for a list or object of too many entries."""
    if isinstance(value, list | dict) and len(value) > _MAX_ENTRIES:
        raise _too_many(value, info, limit=_MAX_ENTRIES)
    return value


def _limit_nested(value: Any, info: ValidationInfo) -> Any:
    """Limit the entries of a value and of all that it holds, and how deep they stand in one another."""
    level, count, depth = [value], 0, 0
    while level := [each for each in level if isinstance(each, list | dict)]:
        depth += 1
        if depth > _MAX_NESTING:
            raise refusal(
                f"{info.field_name} is nested more than {_MAX_NESTING} deep; at most that is taken; flatten it.",
                param=info.field_name,
                code="invalid_value",
            )
        count += sum(map(len, level))
        if count > _MAX_ENTRIES:
            raise refusal(
                f"{info.field_name} has {count} entries or more, those of its values included; at most "
                f"{_MAX_ENTRIES} are taken; leave some out.",
                param=info.field_name,
                code="invalid_value",
            )
        level = [inner for each in level for inner in (each.values() if isinstance(each, dict) else each)]
    return value


def limit_parts(value: Any, info: ValidationInfo) -> Any:
    """Return a value as it is. Raises: ApiError for a list of more parts than are looked at."""
    if isinstance(value, list) and len(value) > _MAX_PARTS:
        raise _too_many(value, info)
    return value


def _too_many(value: Sized, info: ValidationInfo, *, limit: int = _MAX_PARTS, code: str = "invalid_value") -> ApiError:
    return refusal(
        f"{info.field_name} has {len(value)} entries; at most {limit} are taken; leave some out.",
        param=info.field_name,
        code=code,
    )


# What Sampling allows ends far below; products of larger ones would be numbers that nobody can print.
Count = Annotated[int, Field(ge=-(2**31), lt=2**31)]


Prompt = Annotated[str | list[str] | list[int] | list[list[int]], WrapValidator(_check_prompt)]


class Body(BaseModel):
    """The base of bodies and of the objects in them: strict about types and keys; null is the same as no key."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())

    # Where it stands in a request, empty for the whole body.
    path: ClassVar[str] = ""
    # Keys that change nothing about the answer's tokens, and keys that would (with why not).
    harmless: ClassVar[tuple[str, ...]] = ()
    unsupported: ClassVar[dict[str, str]] = {}
    # Values of unsupported keys that ask for nothing, beside null.
    idle_values: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _sort_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        known = {field.alias or name for name, field in cls.model_fields.items()}
        kept = {}
        for key, value in values.items():
            if key in known:
                if value is not None:
                    kept[key] = value
            elif value is None or key in cls.harmless:
                continue
            elif key not in cls.unsupported:
                raise unknown_key(key, sorted({*known, *cls.harmless}), inside=cls.path)
            elif not any(type(value) is type(each) and value == each for each in cls.idle_values.get(key, ())):
                raise refusal(
                    f"{key} was given; {cls.unsupported[key]}; leave it out.", param=key, code="unsupported_key"
                )
        return kept


# Which events of a stream have the counts of tokens.
StreamedUsage = Literal["none", "last", "each"]


class StreamOptions(Body):
    """include_usage: a last event with the counts of tokens; continuous_usage_stats: every event with those so far."""

    path = "stream_options"
    harmless = ("include_obfuscation",)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class JsonSchema(Body):
    """A schema that the answer has to match."""

    path = "response_format.json_schema"
    harmless = ("name", "description", "strict")

    value: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Body):
    """text: anything; json_object: any JSON object; json_schema: one that matches a schema."""

    path = "response_format"

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def grammar(self) -> Grammar | None:
        """Return the grammar of the format."""
        schema = None if self.json_schema is None else self.json_schema.value
        return format_grammar_of(self.type, schema, key=self.path, schema_key="json_schema.schema")


def _check_grammar(value: Any) -> Any:
    if isinstance(value, str):
        shown = json.dumps({"kind": "ebnf", "text": value[:60]})
        raise refusal(
            f'grammar is a text; {{"kind": ..., "text": ...}} is required, with the kind regex, ebnf, json_schema or '
            f"json_object; send {shown}, say.",
            param="grammar",
            code="invalid_value",
        )
    return value


# Other servers' keys for what a text has to match, and the kind of grammar that each is here.
_GRAMMAR_KINDS = {
    "guided_json": "json_schema", "guided_regex": "regex", "guided_choice": "regex", "guided_grammar": "ebnf",
    "structured_outputs": "...", "json_schema": "json_schema", "regex": "regex", "ebnf": "ebnf",
}  # fmt: skip
GRAMMAR_KEYS = {
    key: f'what the text has to match, `grammar` says ({{"kind": "{kind}", "text": ...}}), for a JSON schema in a chat '
    f"or completion `response_format` too"
    for key, kind in _GRAMMAR_KINDS.items()
}


# What other servers' clients send along, by their defaults; other values are not supported.
OTHER_SERVERS_KEYS = {
    "use_beam_search": "tokens are chosen one after the other here, without a search by beams",
    "length_penalty": "it is of a search by beams, which there is none of here",
    "early_stopping": "it is of a search by beams, which there is none of here",
    "skip_special_tokens": "special tokens are no part of a text here; log-probabilities and /detokenize name them",
    "include_stop_str_in_output": "a text ends before its stop text here",
}
OTHER_SERVERS_DEFAULTS: dict[str, tuple[Any, ...]] = {
    "use_beam_search": (False,), "length_penalty": (1.0, 1), "early_stopping": (False,), "skip_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
}  # fmt: skip


def _unless_off(value: Any) -> Any:
    """What other servers take for no top_k is none here too."""
    return None if type(value) is int and value in (-1, 0) else value


def _unless_false(value: Any) -> Any:
    """A chat's word for no logprobs is a completion's too."""
    return None if value is False else value


class GrammarBody(Body):
    """An extension: what the text has to match."""

    path = "grammar"

    kind: GrammarKind
    text: str | None = None


class GenerationBody(Body):
    """What all that generates has in common; null is the same as leaving a key out.

    Extensions of OpenAI's keys: top_k, min_p, repetition_penalty, min_tokens, ignore_eos, stop_token_ids, priority
    (lower comes first), return_experts, grammar.
    """

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: Annotated[str | list[str] | None, BeforeValidator(limit_entries)] = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[str, float] | None, BeforeValidator(limit_entries)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: Annotated[Count | None, BeforeValidator(_unless_off)] = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[Count] | None, BeforeValidator(limit_entries)] = None
    priority: int | None = Field(default=None, ge=-(2**31), lt=2**31)
    return_experts: bool | None = None
    grammar: Annotated[GrammarBody | None, BeforeValidator(_check_grammar)] = None

    @property
    def streams(self) -> bool:
        return bool(self.stream)

    @property
    def streamed_usage(self) -> StreamedUsage:
        if self.stream_options is not None and not self.streams:
            raise refusal(
                "stream_options was given without stream; it needs one; set stream to true, or leave it out.",
                param="stream_options",
            )
        if self.stream_options is None or not self.stream_options.include_usage:
            return "none"
        return "each" if self.stream_options.continuous_usage_stats else "last"

    @property
    def grammar_key(self) -> str:
        """Which key says what the text has to match, where one does."""
        return "grammar"

    def common_values(self) -> dict[str, Any]:
        """Return what was given of the keys that all kinds of request have, by Sampling's names."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop
        if stop is not None and len(stop) > _MAX_STOPS:
            raise refusal(
                f"stop has {len(stop)} texts; at most {_MAX_STOPS} are looked for; leave some out.", param="stop"
            )
        if stop is not None and (num_chars := sum(map(len, stop))) > _MAX_STOP_CHARS:
            raise refusal(
                f"stop has {num_chars} characters; at most {_MAX_STOP_CHARS} are looked for; send shorter texts.",
                param="stop",
                code="invalid_value",
            )
        values = {
            "min_tokens": self.min_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": None if self.logit_bias is None else _read_biases(self.logit_bias),
            "stop": None if stop is None else tuple(stop),
            "stop_token_ids": None if self.stop_token_ids is None else tuple(self.stop_token_ids),
            "ignore_end_of_text": self.ignore_eos,
            "seed": self.seed,
            "return_experts": self.return_experts,
            "grammar": None if self.grammar is None else Grammar(kind=self.grammar.kind, text=self.grammar.text or ""),
        }
        return {key: value for key, value in values.items() if value is not None}


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    harmless = ("user", "metadata", "store", "service_tier")
    unsupported: ClassVar[dict[str, str]] = {
        **GRAMMAR_KEYS,
        **OTHER_SERVERS_KEYS,
        "add_special_tokens": "a text's tokens begin as its tokenizer has it; send token ids for others",
        "suffix": "text is only continued here, not filled in",
        "best_of": "every text that is made is returned here; n says how many",
        "messages": "it is a chat's key; a completion has a prompt, and chats go to /v1/chat/completions",
        "max_completion_tokens": "it is a chat's key; a completion's is max_tokens",
        "top_logprobs": "it is a chat's key; in a completion logprobs is the number",
        "tools": "it is a chat's key; a completion has no template that would show them to the model",
        "tool_choice": "it is a chat's key; a completion has no tools",
        "chat_template_kwargs": "it is a chat's key; a completion has no template",
        "reasoning_effort": "it is a chat's key; a completion has no template",
    }
    idle_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        **OTHER_SERVERS_DEFAULTS, "add_special_tokens": (True,), "suffix": ("",), "best_of": (1,), "tools": ([],),
        "tool_choice": ("none", "auto"),
    }  # fmt: skip

    prompt: Prompt
    max_tokens: Count | None = None
    n: Count | None = None
    echo: bool | None = None
    logprobs: Annotated[Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None, BeforeValidator(_unless_false)] = None
    response_format: ResponseFormat | None = None

    @property
    def grammar_key(self) -> str:
        return "grammar" if self._format_grammar() is None else "response_format"

    def _format_grammar(self) -> Grammar | None:
        return None if self.response_format is None else self.response_format.grammar()

    def check(self) -> None:
        """Raise ApiError for what can never be met, before anything is computed for it."""
        self.sampling()
        _ = self.streamed_usage

    def sampling(self) -> Sampling:
        values = self.common_values()
        values["max_tokens"] = _DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        if self.n is not None:
            values["n"] = self.n
        if self.logprobs is not None:
            values["logprobs"] = self.logprobs
            if self.echo:
                values["prompt_logprobs"] = self.logprobs
        values["grammar"] = _only({"response_format": self._format_grammar(), "grammar": values.get("grammar")})
        return _sampling(values)


class Message(BaseModel):
    """One message; what is beside role and content reaches the chat template as it is."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[Any] | None = None

    @property
    def has_calls(self) -> bool:
        """Whether it is an assistant's that calls tools, and then may say nothing."""
        calls = (self.model_extra or {}).get("tool_calls")
        return self.role == "assistant" and isinstance(calls, list) and bool(calls)


class ConversationBody(GenerationBody):
    """What chats and responses have in common: a conversation that the chat template makes a prompt of, and tools.

    Extension of OpenAI's keys: chat_template_kwargs, values of the chat template's own variables.
    """

    kind: ClassVar[Kind]
    # What errors call the keys that the two name otherwise.
    messages_key: ClassVar[str]
    format_key: ClassVar[str]
    effort_key: ClassVar[str]
    tool_form: ClassVar[ToolForm]

    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    tools: Annotated[list[dict[str, Any]] | None, BeforeValidator(limit_entries)] = None
    tool_choice: dict[str, Any] | str | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any] | None, BeforeValidator(_limit_nested)] = None

    @property
    @abstractmethod
    def limit_key(self) -> str:
        """Which key says how many tokens the answer may have."""

    @property
    @abstractmethod
    def effort(self) -> str | None:
        """How much the model is to reason, for its template."""

    @abstractmethod
    def template_messages(self) -> list[dict[str, Any]]:
        """Return the messages as a template takes them: each content one text, or null beside calls of tools."""

    @abstractmethod
    def num_logprobs(self) -> int | None:
        """Return how many likeliest tokens are asked for at each place; None: no log-probabilities."""

    @abstractmethod
    def format_grammar(self) -> Grammar | None:
        """Return the grammar of the format that is asked for."""

    def check(self) -> None:
        """Raise ApiError for what can never be met, before anything is computed for it."""
        _ = self.wanted_tools
        self.sampling(room=1)
        self.template_messages()
        self.template_settings()
        _ = self.streamed_usage

    @property
    def continues_last(self) -> bool:
        """Whether the answer is the rest of the last message, and no new one."""
        return False

    @property
    def limit(self) -> int | None:
        """How many tokens the answer may have, where it is said."""
        found: int | None = getattr(self, self.limit_key)
        return found

    @property
    def grammar_key(self) -> str:
        if self.wanted_tools.required is not None:
            return "tools"
        return "grammar" if self.format_grammar() is None else self.format_key

    def sampling(self, *, room: int, reads_calls: bool = False) -> Sampling:
        """room: tokens that fit behind the prompt, which are what an answer may have where nothing is said.
        reads_calls: whether the model writes calls in the form that is read from its answers.
        """
        values = self.common_values()
        values["max_tokens"] = max(room, values.get("min_tokens", 0), 1) if self.limit is None else self.limit
        values["logprobs"] = self.num_logprobs()
        values["grammar"] = _only(
            {
                self.format_key: self._format_beside_calls(reads_calls),
                "tool_choice": self.wanted_tools.forced_calls(),
                "grammar": values.get("grammar"),
            }
        )
        return _sampling(values, max_tokens=self.limit_key)

    def _format_beside_calls(self, reads_calls: bool) -> Grammar | None:
        """A format is of what is said: an answer that calls tools need not match it."""
        found = self.format_grammar()
        if found is None or self.wanted_tools.required is not None:
            return None
        if not reads_calls or not self.wanted_tools.shown:
            return found
        return self.wanted_tools.calls_or({"type": "object"} if found.kind == "json_object" else json.loads(found.text))

    def template_tools(self) -> list[dict[str, Any]] | None:
        """Return the tools as a template takes them: those that may be called."""
        return self.wanted_tools.shown or None

    def template_settings(self) -> dict[str, Any]:
        """Return what is set of the template's own variables, by their names."""
        given = self.chat_template_kwargs or {}
        if self.effort is None:
            return given
        if "reasoning_effort" in given:
            raise refusal(
                f"{self.effort_key} was given, and again in chat_template_kwargs; it is one setting; leave one out.",
                param=self.effort_key,
            )
        return {**given, "reasoning_effort": self.effort}

    @cached_property
    def wanted_tools(self) -> Tools:
        """What the request says of tools. Raises: ApiError."""
        return self.tool_form.read(self.tools or [], self.tool_choice, is_single=self.parallel_tool_calls is False)


class ChatBody(ConversationBody):
    """POST /v1/chat/completions."""

    kind = "chat"
    messages_key = "messages"
    format_key = "response_format"
    effort_key = "reasoning_effort"
    tool_form = ToolForm(is_nested=True)
    harmless = (
        "user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention",
        "prompt_cache_options", "safety_identifier", "prediction",
    )  # fmt: skip
    unsupported: ClassVar[dict[str, str]] = {
        **GRAMMAR_KEYS,
        **OTHER_SERVERS_KEYS,
        "add_special_tokens": "the chat template says what a prompt begins with",
        "best_of": "every text that is made is returned here; n says how many",
        "echo": "it is a completion's key; a chat's answer does not repeat the conversation",
        "audio": "only text is made here",
        "modalities": "only text is made here",
        "functions": "it is the old form of tools",
        "function_call": "it is the old form of tool_choice",
        "moderation": NO_MODERATION,
        "verbosity": NO_VERBOSITY,
        "web_search_options": "nothing is searched here",
    }
    idle_values: ClassVar[dict[str, tuple[Any, ...]]] = {
        **OTHER_SERVERS_DEFAULTS, "add_special_tokens": (False,), "best_of": (1,), "echo": (False,),
        "modalities": (["text"],), "functions": ([],), "function_call": ("auto", "none"), "verbosity": ("medium",),
    }  # fmt: skip

    messages: Annotated[list[Message], FailFast(), BeforeValidator(limit_parts)]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    n: Count | None = None
    logprobs: bool | None = None
    response_format: ResponseFormat | None = None
    reasoning_effort: Effort | None = None
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    def check(self) -> None:
        super().check()
        if not self.continues_last and self.add_generation_prompt is False:
            raise refusal(
                "add_generation_prompt is false without continue_final_message; an answer is a new message, or the "
                "rest of the last one; set continue_final_message to true, or leave it out.",
                param="add_generation_prompt",
            )
        if self.continues_last and self.add_generation_prompt:
            raise refusal(
                "continue_final_message and add_generation_prompt are both true; an answer is the rest of the last "
                "message, or a new one; set one of them to false.",
                param="continue_final_message",
            )
        if self.continues_last and (self.messages[-1].has_calls or self.messages[-1].content is None):
            raise refusal(
                "continue_final_message is true and the last message calls tools; a text is required to be continued; "
                "send what came of the calls, or leave it out.",
                param="continue_final_message",
            )

    @property
    def continues_last(self) -> bool:
        return bool(self.continue_final_message)

    @property
    def limit_key(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def effort(self) -> str | None:
        return self.reasoning_effort

    def common_values(self) -> dict[str, Any]:
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise refusal(
                f"max_tokens ({self.max_tokens}) and max_completion_tokens ({self.max_completion_tokens}) differ; they "
                f"are two names of one thing; send one of them.",
                param="max_completion_tokens",
            )
        values = super().common_values()
        return values if self.n is None else {**values, "n": self.n}

    def template_messages(self) -> list[dict[str, Any]]:
        # developer is the later name of system, and the one that templates know.
        if not self.messages:
            raise refusal(
                "messages is empty; at least one message is required; send what the user says.", param="messages"
            )
        return [
            {
                **read_arguments(message.model_extra or {}),
                "role": "system" if message.role == "developer" else message.role,
                "content": _text_of(message, place),
            }
            for place, message in enumerate(self.messages)
        ]

    def num_logprobs(self) -> int | None:
        if self.logprobs:
            return self.top_logprobs or 0
        if self.top_logprobs:  # 0 is what servers take for none
            raise refusal(
                "top_logprobs was given without logprobs; it needs them; set logprobs to true, or leave it out.",
                param="top_logprobs",
            )
        return None

    def format_grammar(self) -> Grammar | None:
        return None if self.response_format is None else self.response_format.grammar()


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    harmless = ("user",)

    model: str | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = None


class TokenizeBody(Body):
    """POST /tokenize."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Annotated[list[int], FailFast()]


def _only(wanted: Mapping[str, Grammar | None]) -> Grammar | None:
    """Return the one grammar that a request has, under whichever key. Raises: ApiError for more than one."""
    given = [name for name, grammar in wanted.items() if grammar is not None]
    if len(given) > 1:
        raise refusal(
            f"{given[0]} and {given[1]} were both given; a text can match one of them; leave one out.", param=given[1]
        )
    return wanted[given[0]] if given else None


def _sampling(values: dict[str, Any], *, max_tokens: str = "max_tokens") -> Sampling:
    """max_tokens: what the request calls that."""
    try:
        return Sampling.model_validate(values)  # whose errors name a request's keys, not a file's
    except ValidationError as error:
        raise explain_values(error, names={"ignore_end_of_text": "ignore_eos", "max_tokens": max_tokens}) from None


def format_grammar_of(kind: str, schema: dict[str, Any] | None, *, key: str, schema_key: str) -> Grammar | None:
    """Return the grammar of a format, which a request has under key, and its schema below that."""
    if kind != "json_schema" and schema is not None:
        raise refusal(
            f"{key} is {kind} and has a {schema_key.partition('.')[0]}; a schema needs the type json_schema; send "
            f"that, or leave the schema out.",
            param=key,
        )
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar(kind="json_object")
    if schema is None:
        raise refusal(
            f"{key} is json_schema without a schema; {key}.{schema_key} is required; send it, or json_object.",
            param=key,
        )
    return Grammar(kind="json_schema", text=json.dumps(schema))


def _read_biases(biases: Mapping[str, float]) -> dict[int, float]:
    found = {}
    for key, bias in biases.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise refusal(
                f"logit_bias has the key {key[:20]!r}; token ids are required, as text; see /tokenize.",
                param="logit_bias",
                code="invalid_value",
            )
        if int(key) in found:
            raise refusal(
                f"logit_bias has two keys for token {int(key)}; one bias for each token is required; leave one out.",
                param="logit_bias",
                code="invalid_value",
            )
        found[int(key)] = bias
    return found


def read_arguments(extra: dict[str, Any]) -> dict[str, Any]:
    """Have earlier calls' arguments as objects, which templates write as JSON, instead of as texts of JSON.

    Keys that say nothing are left out: templates ask whether a message has calls by whether it has the key.
    """
    extra = {key: value for key, value in extra.items() if key == "content" or value not in (None, [])}
    calls = extra.get("tool_calls")
    if not isinstance(calls, list):
        return extra
    read = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            arguments = read_object(function["arguments"])
            if arguments is not None:
                call = {**call, "function": {**function, "arguments": arguments}}
        read.append(call)
    return {**extra, "tool_calls": read}


def _text_of(message: Message, place: int) -> str | None:
    content = message.content
    if content is None and not message.has_calls:
        raise refusal(
            f"messages.{place}.content is missing; every message needs one but an assistant's with tool_calls; send a "
            f"text, which may be empty.",
            param=f"messages.{place}.content",
            code="missing_key",
        )
    return None if content is None else join_parts(content, where=f"messages.{place}.content", kinds=("text",))


def join_parts(content: str | list[Any], *, where: str, kinds: tuple[str, ...]) -> str:
    """Return one text of the parts of one. kinds: the types that parts of text have."""
    if isinstance(content, str):
        return content
    form = f'send parts as {{"type": "{kinds[0]}", "text": "..."}}'
    texts = []
    for number, part in enumerate(content):
        if not isinstance(part, dict) or part.get("type") not in kinds:
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise refusal(
                f"{where} has a part of type {str(kind)[:40]!r}; the models here read text only; {form}.",
                param=where,
                code="unsupported_content",
            )
        if not isinstance(part.get("text"), str):
            found = "no text" if "text" in part else "missing"
            raise refusal(
                f"{where}.{number}.text is {found}; a part of type {part['type']} is required to hold one; {form}.",
                param=f"{where}.{number}.text",
                code="invalid_value" if "text" in part else "missing_key",
            )
        texts.append(part["text"])
    return "\n".join(texts)
