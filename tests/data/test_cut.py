"""Cutting keeps every character, keeps pieces bounded, and keeps the tokens of byte-level tokenizers."""

import pytest

from moesaic.data.corpus import embedded_corpus
from moesaic.data.cut import cut_text, paragraph_border
from moesaic.data.tokenizer import Tokenizer

ODD = "word  two spaces\n\n\nblank\tlines \n  indented\r\nünïcode 日本語のテキスト 👩‍👩‍👧 don't 12345   \n end"


@pytest.mark.parametrize("limit", [1, 2, 7, 64, 10_000])
def test_pieces_join_to_the_text_and_are_bounded(limit: int) -> None:
    text = ODD * 5
    pieces = list(cut_text(text, limit))
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= limit
    assert all(pieces)


def test_the_empty_text_is_one_empty_piece() -> None:
    assert list(cut_text("", 4)) == [""]


@pytest.mark.parametrize("limit", [40, 100, 1000])
def test_pieces_have_the_tokens_of_the_whole(limit: int) -> None:
    speech = sorted(embedded_corpus().glob("*.txt"))[0].read_text(encoding="utf-8")
    text = speech[:20_000] + "\n\n   several   spaces \n\n\n  and   lines\n" * 20
    tokenizer = Tokenizer.train([speech], vocab_size=600)
    pieces = tokenizer.encode_batch(list(cut_text(text, limit)))
    assert [token for piece in pieces for token in piece] == tokenizer.encode(text)


def test_paragraph_border_prefers_the_last_blank_line_then_the_last_line() -> None:
    text = "a\n\nb\nc d"
    assert paragraph_border(text, 0, len(text)) == 3
    assert paragraph_border("a\nb\nc", 0, 5) == 4
    assert paragraph_border("abc", 0, 3) is None
