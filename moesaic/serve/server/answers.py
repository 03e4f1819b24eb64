"""What is answered: choices, chunks, log-probabilities, experts and usage, as plain JSON-able values."""

import codecs
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from moesaic.data.tokenizer import Tokenizer
from moesaic.serve.outputs import FinishReason, GeneratedToken, TokenLogprob
from moesaic.serve.server.tool_calls import ToolCall, ToolCallReader

# A response is made as a chat is (responses.py gives it another form).
Kind = Literal["completion", "chat", "response"]

# JSON has no infinity; OpenAI writes impossible tokens so.
_LOWEST_LOGPROB = -9999.0


class TokenTexts:
    """Tokens as answers spell them, each made once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes: dict[int, bytes] = {}

    def bytes_of(self, token_id: int) -> bytes:
        found = self._bytes.get(token_id)
        if found is None:
            special = self.is_special(token_id)
            found = self._tokenizer.token(token_id).encode() if special else self._tokenizer.token_bytes(token_id)
            self._bytes[token_id] = found
        return found

    def text_of(self, token_id: int) -> str:
        """Return a token's text; where it holds a part of a character, its bytes as OpenAI's completions write them."""
        data = self.bytes_of(token_id)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._tokenizer.special_ids

    def is_byte(self, token_id: int) -> bool:
        """Whether it is one byte, and a run of such tokens is text together: whole, or a U+FFFD for each."""
        return self._tokenizer.is_byte_token(token_id)


@dataclass
class _Logprobs:
    """A completion's log-probabilities in the old form: lists of equal length, and where each token begins."""

    texts: TokenTexts
    offset: int = 0
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")("replace"))
    # The run of byte tokens that is being read, where it begins, and whether it is known to be no text.
    run: bytearray = field(default_factory=bytearray)
    run_start: int = 0
    run_is_broken: bool = False

    def of_tokens(self, tokens: Sequence[GeneratedToken], *, prompt: str | None = None) -> dict[str, Any]:
        """prompt: the text that the tokens are of; special tokens that do not stand in it take no place."""
        names, logprobs, top = [], [], []
        for token in tokens:
            names.append(self.texts.text_of(token.token_id))
            logprobs.append(None if token.logprob is None else _finite(token.logprob))
            top.append(None if token.logprob is None else self._top(token))
        token_ids = [token.token_id for token in tokens]
        offsets = self._offsets(token_ids) if prompt is None else self._prompt_offsets(token_ids, prompt)
        return {"tokens": names, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

    def _prompt_offsets(self, token_ids: Sequence[int], prompt: str) -> list[int]:
        """Return where each token begins; a space that the tokenizer puts before every text stands in none of them."""
        offsets = self._offsets(token_ids, prompt)
        self._end()
        first = next((each for each in token_ids if not self.texts.is_special(each)), None)
        if self.offset == len(prompt) or first is None or not self.texts.bytes_of(first).startswith(b" "):
            return offsets
        self.offset = -1
        without_space = self._offsets(token_ids, prompt)
        self._end()
        return [max(0, offset) for offset in without_space] if self.offset == len(prompt) else offsets

    def _offsets(self, token_ids: Sequence[int], prompt: str | None = None) -> list[int]:
        offsets = []
        for place, token_id in enumerate(token_ids):
            if self.texts.is_byte(token_id):
                if not self.run:
                    self._begin_run(token_ids, place, prompt)
                offsets.append(self.offset)
                self._add_to_run(self.texts.bytes_of(token_id))
                continue
            if self.run and not (self.texts.is_special(token_id) and prompt is None):  # which is no text in an answer
                self._end_run()
            self._end_broken_character(token_id, prompt)
            offsets.append(self.offset)
            self.offset += self._length(token_id, prompt)
        return offsets

    def _begin_run(self, token_ids: Sequence[int], place: int, prompt: str | None) -> None:
        """Begin one at a place. What an answer has not said yet may complete its last character."""
        run, is_whole = bytearray(), prompt is not None
        for token_id in (token_ids[each] for each in range(place, len(token_ids))):
            if self.texts.is_byte(token_id):
                run += self.texts.bytes_of(token_id)
            elif prompt is not None or not self.texts.is_special(token_id):
                is_whole = True
                break
        try:
            codecs.getincrementaldecoder("utf-8")().decode(bytes(run), final=is_whole)
            self.run_is_broken = False
        except UnicodeDecodeError:
            self.run_is_broken = True
        self.run_start = self.offset

    def _add_to_run(self, data: bytes) -> None:
        self.run += data
        self.offset += len(data) if self.run_is_broken else len(self.decoder.decode(data))

    def _end_run(self) -> None:
        """What came in several chunks may be known to be broken only now."""
        self.decoder.reset()
        try:
            length = len(self.run.decode("utf-8"))
        except UnicodeDecodeError:
            length = len(self.run)
        self.offset = self.run_start + length
        self.run.clear()

    def _end(self) -> None:
        if self.run:
            self._end_run()
        self.offset += len(self.decoder.decode(b"", final=True))

    def _end_broken_character(self, token_id: int, prompt: str | None) -> None:
        """Half a character that the next token does not go on with is a U+FFFD before that token."""
        if self.texts.is_special(token_id):
            goes_on = prompt is None  # in an answer it is no text at all
        else:
            data = self.texts.bytes_of(token_id)
            goes_on = bool(data) and 0x80 <= data[0] < 0xC0
        if self.decoder.getstate()[0] and not goes_on:
            self.offset += len(self.decoder.decode(b"", final=True))

    def _length(self, token_id: int, prompt: str | None) -> int:
        if self.texts.is_special(token_id):
            name = self.texts.text_of(token_id)
            return len(name) if prompt is not None and prompt.startswith(name, max(0, self.offset)) else 0
        return len(self.decoder.decode(self.texts.bytes_of(token_id)))

    def _top(self, token: GeneratedToken) -> dict[str, float]:
        """The likeliest tokens, and the chosen one; of two that read the same, the likelier."""
        found: dict[str, float] = {}
        assert token.logprob is not None
        for each in (*token.top_logprobs, TokenLogprob(token.token_id, token.logprob)):
            found.setdefault(self.texts.text_of(each.token_id), _finite(each.logprob))
        return found


@dataclass
class Choice:
    """One text of an answer while it is made: take() gives its parts, chunk() and whole() what is answered of them."""

    index: int
    kind: Kind
    texts: TokenTexts
    moe_layers: tuple[int, ...]  # the places of the model's MoE layers
    has_logprobs: bool
    has_experts: bool
    echoed: str = ""
    tool_calls: ToolCallReader | None = None  # of a chat whose model was shown tools
    finish_reason: FinishReason | Literal["tool_calls"] | None = None
    stop_reason: str | int | None = None
    _num_calls: int = 0
    _old_logprobs: _Logprobs = field(init=False)

    def __post_init__(self) -> None:
        self._old_logprobs = _Logprobs(self.texts)

    def echo(self, tokens: Sequence[GeneratedToken]) -> dict[str, Any]:
        """Return a completion's prompt as its first part; tokens: with their log-probabilities, where asked for."""
        part: dict[str, Any] = {"text": self.echoed}
        if self.has_logprobs:
            part["logprobs"] = self._old_logprobs.of_tokens(tokens, prompt=self.echoed)
        self._old_logprobs.offset = len(self.echoed)
        self._old_logprobs.decoder.reset()  # half a character at its end is a U+FFFD of it
        return part

    def go_on_behind(self, other: "Choice") -> None:
        """Have the same first part as another choice of the same prompt, which has given it."""
        self._old_logprobs.offset = other._old_logprobs.offset

    def take(
        self,
        text: str,
        tokens: Sequence[GeneratedToken],
        *,
        finish_reason: FinishReason | None = None,
        stop_reason: str | int | None = None,
    ) -> dict[str, Any]:
        """Return a part: the new text, what was asked for of the new tokens, and why it ends, where it does.

        Where tools may be called, `pieces` has text and calls in their order.
        """
        self.finish_reason, self.stop_reason = finish_reason, stop_reason
        part: dict[str, Any] = {"text": text}
        if self.tool_calls is not None:
            part = self._part_calls(self.tool_calls, text)
        part |= self._end()
        if self.has_logprobs and self.kind == "completion":
            part["logprobs"] = self._old_logprobs.of_tokens(tokens)
        elif self.has_logprobs:
            part["logprobs"] = {"content": [self._chat_logprob(token) for token in tokens], "refusal": None}
        if self.has_experts:
            part["experts"] = [self._experts(token) for token in tokens]
        return part

    def _part_calls(self, reader: ToolCallReader, text: str) -> dict[str, Any]:
        pieces = [
            each if isinstance(each, str) else self._describe(each)
            for each in reader.take(text, is_last=self.finish_reason is not None)
        ]
        if reader.has_found and self.finish_reason == "stop":
            self.finish_reason = "tool_calls"
        said = "".join(each for each in pieces if isinstance(each, str))
        part: dict[str, Any] = {"text": said, "pieces": pieces}
        if calls := [each for each in pieces if not isinstance(each, str)]:
            part["tool_calls"] = calls
        return part

    def _describe(self, call: ToolCall) -> dict[str, Any]:
        self._num_calls += 1
        return {
            "index": self._num_calls - 1,
            "id": f"call_{secrets.token_hex(12)}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }

    def opening(self) -> dict[str, Any]:
        """Return a chat's first choice of a stream: who speaks, and nothing else.

        OpenAI's own clients take the log-probabilities of a choice's first chunk twice.
        """
        return self._around({"delta": {"role": "assistant", "content": ""}}, {})

    def chunk(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """Return a part as a stream's choice."""
        if self.kind == "completion":
            return self._around({"text": part["text"]}, part)
        delta: dict[str, Any] = {"content": part["text"]} if part["text"] else {}
        if "tool_calls" in part:
            delta["tool_calls"] = part["tool_calls"]
        return self._around({"delta": delta}, part)

    def whole(self, parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the finished choice, given all its parts."""
        text = "".join(part["text"] for part in parts)
        whole: dict[str, Any] = {"text": text, **self._end()}
        if self.has_logprobs:
            merged: dict[str, Any] = {}
            for part in parts:
                for key, values in part["logprobs"].items():
                    if values is None:
                        merged[key] = None
                    else:
                        merged.setdefault(key, []).extend(values)
            whole["logprobs"] = merged
        if self.has_experts:
            whole["experts"] = [each for part in parts for each in part.get("experts", ())]
        if self.kind == "completion":
            return self._around({"text": text}, whole)
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        calls = [call for part in parts for call in part.get("tool_calls", ())]
        if calls:
            message["content"] = text or None
            message["tool_calls"] = [{key: call[key] for key in ("id", "type", "function")} for call in calls]
        return self._around({"message": message}, whole)

    def _end(self) -> dict[str, Any]:
        return {"finish_reason": self.finish_reason, "stop_reason": self.stop_reason}

    def _around(self, content: dict[str, Any], part: Mapping[str, Any]) -> dict[str, Any]:
        choice = {
            "index": self.index,
            **content,
            "logprobs": part.get("logprobs"),
            "finish_reason": part.get("finish_reason"),
            "stop_reason": part.get("stop_reason"),
        }
        if self.has_experts:
            choice["experts"] = part.get("experts", [])
        return choice

    def _chat_logprob(self, token: GeneratedToken) -> dict[str, Any]:
        assert token.logprob is not None
        top = [self._spelled(each.token_id, each.logprob) for each in token.top_logprobs]
        return {**self._spelled(token.token_id, token.logprob), "top_logprobs": top}

    def _spelled(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = self.texts.bytes_of(token_id)
        text = data.decode("utf-8", "replace")
        return {"token": text, "logprob": _finite(logprob), "bytes": list(data)}

    def _experts(self, token: GeneratedToken) -> dict[str, Any]:
        experts = token.experts
        rows = () if experts is None else zip(experts.expert_ids, experts.routing_weights, strict=True)
        layers = [
            {"layer": layer, "expert_ids": list(ids), "weights": list(weights)}
            for layer, (ids, weights) in zip(self.moe_layers, rows, strict=False)
        ]
        text = self.texts.bytes_of(token.token_id).decode("utf-8", "replace")
        return {"token_id": token.token_id, "token": text, "layers": layers}


@dataclass
class Usage:
    """Tokens of a request: each prompt's once, however many texts it has."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST_LOGPROB)
