"""The calls that a model writes into its answer, taken out of the text while it comes.

The form is Hermes's, which Qwen's and many other chat templates teach: a JSON object with `name` and `arguments`
between <tool_call> and </tool_call>.
"""

import json
from dataclasses import dataclass
from typing import Any

import pydantic_core

from moesaic.data.tokenizer import Tokenizer

_BEGIN, _END = "<tool_call>", "</tool_call>"


@dataclass(frozen=True)
class ToolCall:
    """What the model wants called; arguments: a JSON object's text."""

    name: str
    arguments: str


class ToolCallReader:
    """Parts a text, as it comes, into what is said and the calls in it. What is no call stays in the text as it is."""

    def __init__(self) -> None:
        self.has_found = False
        self._held = ""  # what may be a call, or the beginning of one

    @staticmethod
    def understands(tokenizer: Tokenizer) -> bool:
        """Whether a tokenizer's chat template has its model write calls in this form."""
        return tokenizer.chat_template is not None and _BEGIN in tokenizer.chat_template

    def take(self, text: str, *, is_last: bool) -> tuple[str, list[ToolCall]]:
        """Return what is said for sure by now, and the calls that are complete, given the next piece of the text."""
        held, said, calls = self._held + text, "", list[ToolCall]()
        while held:
            start = held.find(_BEGIN)
            if start < 0:
                kept = 0 if is_last else _length_of_beginning(held)
                said, held = said + held[: len(held) - kept], held[len(held) - kept :]
                break
            said, held = said + held[:start], held[start:]
            end = held.find(_END)
            if end < 0 and not is_last:
                break
            # A model may end behind a call without closing it.
            length = len(held) if end < 0 else end + len(_END)
            call = _read_call(held[len(_BEGIN) : length if end < 0 else end])
            if call is None:
                said += held[:length]
            else:
                calls.append(call)
                self.has_found = True
            held = held[length:]
        self._held = held
        return said, calls


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
