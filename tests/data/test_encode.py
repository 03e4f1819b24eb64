"""Encoding in processes keeps the order, whatever the sizes and the number of processes."""

import numpy as np
import pytest

from moesaic.data.encode import EncoderPool, encode_text, token_dtype
from moesaic.data.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["some text to train a tokenizer on"], vocab_size=270)


def test_the_smallest_type_that_holds_every_id() -> None:
    assert [token_dtype(size) for size in (257, 65_536, 65_537)] == ["uint16", "uint16", "uint32"]


@pytest.mark.parametrize("num_workers", [1, 2, 5])
def test_results_come_in_the_order_of_the_batches(tokenizer: Tokenizer, num_workers: int) -> None:
    batches = [(["text " * (17 * number % 400), f"number {number}"], number) for number in range(23)]
    with EncoderPool(tokenizer, num_workers=num_workers) as pool:
        results = list(pool.encode(batches))
    assert [companion for _, companion in results] == list(range(23))
    for (encoded, _), (texts, _) in zip(results, batches, strict=True):
        for tokens, text in zip(encoded, texts, strict=True):
            assert tokens.dtype == np.uint16
            assert tokens.tolist() == tokenizer.encode(text)


def test_reading_ahead_is_bounded(tokenizer: Tokenizer) -> None:
    taken = 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield ["text"], taken

    with EncoderPool(tokenizer, num_workers=2) as pool:
        for number, _ in zip(range(1, 6), pool.encode(endless()), strict=False):
            assert taken <= number + 4


def test_a_long_text_has_the_tokens_of_the_whole(tokenizer: Tokenizer) -> None:
    text = "some text\n\n to train  a tokenizer on " * 3000
    assert encode_text(tokenizer, text, dtype="uint16").tolist() == tokenizer.encode(text)


def test_no_batches_are_no_results(tokenizer: Tokenizer) -> None:
    with EncoderPool(tokenizer, num_workers=1) as pool:
        assert list(pool.encode([])) == []
