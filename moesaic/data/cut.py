"""Cutting long texts into bounded pieces. Where to cut, and nothing about files or tokens."""

import re
from collections.abc import Iterator

# Before a space that a word follows: there the pre-tokenizers of GPT-2, Llama 3 and Qwen start a new word in any case,
# so the pieces have exactly the tokens of the whole. Those of SentencePiece models may not, which mark each piece's
# beginning: Tokenizer.may_be_cut tells.
_WORD_BORDER = re.compile(r" (?=\S)")
_LINE_BORDER = re.compile(r"\n(?=\S)")
_BLANK_LINE = re.compile(r"\n[ \t\r]*\n\s*")
_LOOK_BACK_CHARS = 4096


def cut_text(text: str, limit_chars: int) -> Iterator[str]:
    """Yield pieces of at most `limit_chars` that join to the text, cut before words where there are words."""
    start = 0
    while len(text) - start > limit_chars:
        end = start + limit_chars
        low = max(start + 1, end - _LOOK_BACK_CHARS)
        border = _last(_WORD_BORDER, text, low, end) or _last(_LINE_BORDER, text, low, end) or end
        yield text[start:border]
        start = border
    yield text[start:]


def paragraph_border(text: str, low: int, high: int) -> int | None:
    """Return the end of the last blank line in text[low:high], else of the last line, else None."""
    end = None
    for match in _BLANK_LINE.finditer(text, low, high):
        end = match.end()
    if end is not None and end > low:
        return end
    newline = text.rfind("\n", low, high)
    return newline + 1 if newline >= 0 else None


def _last(border: re.Pattern[str], text: str, low: int, high: int) -> int | None:
    last = None
    for match in border.finditer(text, low, high):
        last = match.start()
    return last
