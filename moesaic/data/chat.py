"""From a conversation to one text, by the Jinja template that comes with a tokenizer."""

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError, InstallationError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

# What render_chat passes, and what templates call.
_OWN_NAMES = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "raise_exception", "strftime_now"}
    | {"bos_token", "eos_token", "unk_token", "pad_token"}
)
# Stands at the end of a last message that is to be continued; no text holds it.
_END_OF_LAST = "\ufdd0"


class _Refused(Exception):
    """What a template says by raise_exception."""


def check_chat_template(tokenizer: Tokenizer) -> None:
    """Compile the chat template of a tokenizer that has one.

    Raises: DataError where that is impossible, or the template is empty; InstallationError.
    """
    if tokenizer.chat_template is not None:
        _compile(tokenizer)


def template_settings(tokenizer: Tokenizer) -> frozenset[str]:
    """Return the names that a chat template reads beside what render_chat passes: what may be set of it.

    Raises: as render_chat does for the template.
    """
    _compile(tokenizer)
    assert tokenizer.chat_template is not None
    return _settings_of(_environment(), tokenizer.chat_template)


def is_own_name(name: str) -> bool:
    """Whether a name in a template is for render_chat alone to pass."""
    return name in _OWN_NAMES


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    settings: Mapping[str, Any] = MappingProxyType({}),
    tools: Sequence[Mapping[str, Any]] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """Return the text of a conversation; each message has a `role` and its `content`, and what else its template reads.

    settings: values of what else the template reads (template_settings). tools: JSON descriptions of functions, for
    templates that show them to the model. add_generation_prompt: the text ends where the assistant begins to speak;
    otherwise it ends within the last message, which is to be continued.

    Raises: DataError where the tokenizer has no template, or a broken one, or it refuses the conversation, or leaves
    out what is to be continued; InstallationError.
    """
    template = _compile(tokenizer)
    given = [dict(message) for message in messages]
    last = ""
    if not add_generation_prompt:
        last = given[-1]["content"].strip()
        given[-1]["content"] += _END_OF_LAST
    values: dict[str, Any] = {
        **settings,
        **tokenizer.special_names,
        "messages": given,
        "tools": None if tools is None else [dict(tool) for tool in tools],
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    roles = ", ".join(str(message.get("role", "?"))[:40] for message in given[:20])
    try:
        text = template.render(values)
    except _Refused as refused:
        raise DataError(
            f"the chat template refuses {len(given)} messages with the roles {roles} ({refused}); it takes the "
            f"conversations that its model was trained on; leave out a system message, or let the roles take turns."
        ) from None
    except Exception as error:  # a template is a program: besides its own errors it may raise any of Python's
        raise DataError(
            f"the chat template fails on {len(given)} messages with the roles {roles} ({type(error).__name__}: "
            f"{error}); messages as it reads them are required; look for what it does with them in "
            f"{tokenizer.chat_template_file}, and mend them, or it."
        ) from None
    if add_generation_prompt:
        return text
    before, found, _ = text.rpartition(_END_OF_LAST)
    before = before.replace(_END_OF_LAST, "")  # of a template that shows it twice
    if not found or not before.rstrip().endswith(last):
        raise DataError(
            "the chat template leaves out what the last message says, or a part of it; only a message that is in the "
            "text as it is can be continued; end with another one, or have it answered."
        )
    return before


def _compile(tokenizer: Tokenizer) -> "Template":
    source = tokenizer.chat_template
    if source is None:
        raise DataError(
            "the tokenizer has no chat template; one in tokenizer_config.json or chat_template.jinja is required; put "
            "it beside tokenizer.json in the run folder, or leave the chat out."
        )
    try:
        environment = _environment()
    except ImportError as error:
        raise InstallationError(
            f"a chat template was asked for and jinja2 cannot be imported ({error}); templates are Jinja; install it "
            f"with `pip install 'moesaic[serve]'`, or 'moesaic[evaluate]'."
        ) from None
    from jinja2 import TemplateSyntaxError

    try:
        template = _template(environment, source)
        reason = None if source.strip() else "it is empty"
    except TemplateSyntaxError as error:
        reason = f"line {error.lineno}: {error.message}"
    except Exception as error:  # what Python's compiler raises, for what is nested too deeply say
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        raise DataError(
            f"the chat template in {tokenizer.chat_template_file} cannot be used ({reason}); a Jinja template is "
            f"required; mend it, or remove it to do without chats."
        )
    return template


@functools.lru_cache(maxsize=8)  # compiling one takes some milliseconds, and a server renders one for every chat
def _template(environment: "Environment", source: str) -> "Template":
    return environment.from_string(source)


@functools.lru_cache(maxsize=8)
def _settings_of(environment: "Environment", source: str) -> frozenset[str]:
    from jinja2.meta import find_undeclared_variables

    return frozenset(name for name in find_undeclared_variables(environment.parse(source)) if not is_own_name(name))


@functools.cache
def _environment() -> "Environment":
    """Return what templates are written for: transformers' environment, by its contract. Raises: ImportError."""
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks an assistant's words for training; here they are words like others."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    # The file is a user's: nothing in it reaches Python's objects or changes them.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _strftime_now}
    environment.filters["tojson"] = _to_json
    return environment


def _refuse(message: str) -> NoReturn:
    raise _Refused(message)


def _strftime_now(pattern: str) -> str:
    return datetime.datetime.now().strftime(pattern)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own is for pages: it sorts keys and escapes quotes and angle brackets, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
