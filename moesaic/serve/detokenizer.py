"""From tokens to text as they come: the characters that are certain, and the end where a stop text is complete."""

import codecs
import functools
from collections.abc import Sequence

from moesaic.data.tokenizer import Tokenizer

# Tokens that are decoded again before new ones, for decoders that treat a text's first token in their own way.
_CONTEXT = 4


class Detokenizer:
    """The text of one sequence of tokens, given out piece by piece.

    All pieces together are what the tokenizer makes of all tokens at once without its special ones, or, where a stop
    text is in it, what stands before. Of stop texts the one that is complete first counts, of those that end together
    the longest: where the tokens part the text makes no difference. stopped_by is that stop text, None until then.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, prompt: Sequence[int] = (), stop: Sequence[str] = (), min_tokens: int = 0
    ) -> None:
        """Start a text. prompt: what it goes on from, for the space that a decoder drops at the start of a text.

        min_tokens: a stop text that is complete before so many tokens is passed over.
        """
        self.stopped_by: str | None = None
        self._pieces: _Pieces = _Bytes(tokenizer) if tokenizer.is_byte_level else _Window(tokenizer, prompt)
        self._stops = [_StopText(text) for text in dict.fromkeys(stop)]
        self._min_tokens, self._num_tokens = min_tokens, 0
        self._held = ""

    def append(self, token_id: int) -> str:
        """Return the characters that this token makes certain; none after a stop text."""
        self._num_tokens += 1
        return self._advance(self._pieces.append(token_id)) if self.stopped_by is None else ""

    def flush(self) -> str:
        """Return what was held back, at the end of the tokens: U+FFFD for half a character."""
        if self.stopped_by is not None:
            return ""
        certain = self._advance(self._pieces.flush())
        held, self._held = self._held, ""
        return certain + held if self.stopped_by is None else certain

    def _advance(self, piece: str) -> str:
        if not self._stops:
            return piece
        may_stop = self._num_tokens >= self._min_tokens
        text, start = self._held + piece, len(self._held)
        for end, letter in enumerate(piece, start + 1):
            complete = [stop for stop in self._stops if stop.advance(letter)]
            if complete and may_stop:
                longest = max((stop.text for stop in complete), key=len)
                self.stopped_by, self._held = longest, ""
                return text[: end - len(longest)]
        begun = max(stop.length for stop in self._stops)
        certain = len(text) - begun
        self._held = text[certain:]
        return text[:certain]


class _StopText:
    """How much of a stop text the end of a text is.

    A letter costs the same however long both are (Knuth, Morris and Pratt's table).
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.length = 0  # letters of it that the text ends with, less than all of them
        self._shorter = _shorter_beginnings(text)

    def advance(self, letter: str) -> bool:
        """Go on by a letter; return whether the text is complete with it."""
        matched = _extend(self.text, self._shorter, self.length, letter)
        is_complete = matched == len(self.text)
        self.length = self._shorter[-1] if is_complete else matched
        return is_complete


# A request's texts, and often a client's requests, share their stop texts.
@functools.lru_cache(maxsize=256)
def _shorter_beginnings(text: str) -> Sequence[int]:
    """Return of each beginning of a text how long the longest shorter beginning is that it ends with."""
    shorter = [0] * len(text)
    matched = 0
    for end in range(1, len(text)):
        matched = _extend(text, shorter, matched, text[end])
        shorter[end] = matched
    return shorter


def _extend(text: str, shorter: Sequence[int], matched: int, letter: str) -> int:
    while matched and text[matched] != letter:
        matched = shorter[matched - 1]
    return matched + (text[matched] == letter)


class _Bytes:
    """Byte-level tokenizers: the text is the tokens' bytes."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def append(self, token_id: int) -> str:
        return self._decoder.decode(self._tokenizer.token_bytes(token_id))

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class _Window:
    """Other tokenizers: a few tokens are decoded behind those before them, and what they add is new.

    A run of byte tokens is one text, whole or broken, so it is held back until another token ends it.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        kept = [token for token in prompt[-4 * _CONTEXT :] if self._is_text(token)]
        while kept and tokenizer.is_byte_token(kept[-1]):
            kept.pop()
        self._before = kept[-_CONTEXT:]
        self._pending: list[int] = []

    def append(self, token_id: int) -> str:
        if not self._is_text(token_id):
            return ""
        self._pending.append(token_id)
        return "" if self._tokenizer.is_byte_token(token_id) else self.flush()

    def flush(self) -> str:
        window = [*self._before, *self._pending]
        before = self._tokenizer.decode(self._before) if self._before else ""
        text = self._tokenizer.decode(window) if self._pending else before
        self._before, self._pending = window[-_CONTEXT:], []
        # The same at the start, but for decoders that go back on what they gave.
        same = len(before) if text.startswith(before) else 0
        while same < len(before) and before[same : same + 1] == text[same : same + 1]:
            same += 1
        return text[same:]

    def _is_text(self, token_id: int) -> bool:
        return 0 <= token_id < self._tokenizer.vocab_size and token_id not in self._tokenizer.special_ids


_Pieces = _Bytes | _Window
