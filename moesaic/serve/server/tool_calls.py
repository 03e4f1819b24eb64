"""The calls that a model writes into its answer, taken out of the text while it comes.

The form is Hermes's, which Qwen's and many other chat templates teach: a JSON object with `name` and `arguments`
between <tool_call> and </tool_call>.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pydantic_core

from moesaic.config.serve import Grammar
from moesaic.data.tokenizer import Tokenizer

_BEGIN, _END = "<tool_call>", "</tool_call>"
_IN_STRING, _OUTSIDE = re.compile(r'["\\]'), re.compile(r'["<\\]')


@dataclass(frozen=True)
class ToolCall:
    """What the model wants called; arguments: a JSON object's text."""

    name: str
    arguments: str


def calls_grammar(
    functions: Mapping[str, Mapping[str, Any]], *, is_single: bool, otherwise: Mapping[str, Any] | None = None
) -> Grammar:
    """Return the grammar of a text that is one call, or at least one, and nothing else.

    functions: by name, the JSON schema of the arguments. otherwise: the schema that a text without calls matches; None:
    there has to be a call.
    """
    described = {"functions": functions, "is_single": is_single, "otherwise": otherwise}
    return Grammar(kind="tool_calls", text=json.dumps(described))


class ToolCallReader:
    """Parts a text, as it comes, into what is said and the calls in it. What is no call stays in the text as it is.

    But white space before a call is left out, and at the end of a text with calls; however the text is cut into pieces.
    """

    def __init__(self) -> None:
        self.has_found = False
        self._space = ""  # what stands before what is held, until it is clear what comes behind it
        self._held = ""  # what may be a call, or the beginning of one
        self._begin_scan()

    @staticmethod
    def understands(tokenizer: Tokenizer) -> bool:
        """Whether a tokenizer's chat template has its model write calls in this form."""
        return tokenizer.chat_template is not None and _BEGIN in tokenizer.chat_template

    def take(self, text: str, *, is_last: bool) -> list[str | ToolCall]:
        """Return what is said for sure by now and the calls that are complete, as they stand in the text.

        text: its next piece.
        """
        self._held += text
        found: list[str | ToolCall] = []
        while self._held:
            start = self._held.find(_BEGIN)
            if start < 0:
                kept = 0 if is_last else _length_of_beginning(self._held)
                start = len(self._held) - kept
            found.append(self._say(self._held[:start]))
            self._held = self._held[start:]
            if not self._held.startswith(_BEGIN):
                break
            stop = self._scan()
            tag = self._held[stop:][: len(_END)] if stop is not None else ""
            if not is_last and tag != _END and _END.startswith(tag):
                break
            # A model may end behind a call without closing it.
            call = _read_call(self._held[len(_BEGIN) : stop]) if tag in ("", _END) else None
            if call is None:
                found.append(self._say(_BEGIN))
                self._held = self._held[len(_BEGIN) :]
            else:
                found.append(call)
                self.has_found, self._space = True, ""
                self._held = "" if stop is None else self._held[stop + len(_END) :]
            self._begin_scan()
        if is_last and not self.has_found:
            found.append(self._space)
        return [each for each in found if each]

    def _say(self, text: str) -> str:
        """Return the text behind the white space before it, without that at its end, which is kept."""
        end = text.rstrip()
        said = self._space + end if end else ""
        self._space = text[len(end) :] if end else self._space + text
        return said

    def _begin_scan(self) -> None:
        self._position, self._is_in_string = len(_BEGIN), False

    def _scan(self) -> int | None:
        """Return where the JSON of a held call ends; None: not within what is held.

        JSON has "<" and backslashes in its strings only. So a scan stops soon in what is no call, and one from a later
        beginning, for which strings are where they were not, sooner: a text takes no longer than its length.
        """
        while True:
            found = (_IN_STRING if self._is_in_string else _OUTSIDE).search(self._held, self._position)
            if found is None:
                self._position = len(self._held)
                return None
            if found[0] == '"':
                self._position, self._is_in_string = found.end(), not self._is_in_string
            elif not self._is_in_string:
                return found.start()
            elif found.end() == len(self._held):
                return None  # half an escape
            else:
                self._position = found.end() + 1


def _length_of_beginning(text: str) -> int:
    """How many of the last characters may begin a call."""
    return next((n for n in range(min(len(text), len(_BEGIN) - 1), 0, -1) if _BEGIN.startswith(text[-n:])), 0)


def read_object(text: str) -> dict[str, Any] | None:
    """Return a JSON object as the standard has it, without NaN, 1e999 and lone surrogates; None for anything else."""
    try:
        value = pydantic_core.from_json(text, allow_inf_nan=False)
        json.dumps(value, allow_nan=False)  # numbers too large for a float are read as infinity
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _read_call(text: str) -> ToolCall | None:
    value = read_object(text)
    if value is None or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", {})
    if not isinstance(arguments, dict):
        return None
    return ToolCall(value["name"], json.dumps(arguments, ensure_ascii=False))
