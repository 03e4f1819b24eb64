"""Encoding in processes keeps the order, whatever the sizes and the number of processes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from moesaic.data.encode import EncoderPool, encode_text, token_dtype
from moesaic.data.prepare import prepare
from moesaic.data.shards import ShardSet
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


def sentencepiece_like(*, marks_beginning: bool = True) -> Tokenizer:
    """As Llama 2 and Mixtral have it: spaces are ▁, and one stands before each text."""
    vocabulary = {"<unk>": 0, "</s>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}}
    merges = [("▁", "▁"), ("a", "b"), ("▁", "ab")]
    for token in ("▁", "a", "b", *("".join(pair) for pair in merges)):
        vocabulary[token] = len(vocabulary)
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    prepended = [normalizers.Prepend("▁")] if marks_beginning else []
    inner.normalizer = normalizers.Sequence([*prepended, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if marks_beginning else []
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "</s>")])
    return Tokenizer(inner.to_str())


def prefixing() -> Tokenizer:
    """Byte-level BPE that puts a space before each text, and so before a piece that begins with a line."""
    inner = tokenizers.Tokenizer.from_str(Tokenizer.train(["some text"], vocab_size=270).json_text)
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return Tokenizer(inner.to_str())


@pytest.mark.parametrize("make", [sentencepiece_like, partial(sentencepiece_like, marks_beginning=False), prefixing])
def test_a_text_that_pieces_would_change_is_encoded_whole(make: Callable[[], Tokenizer]) -> None:
    given = make()
    assert not given.may_be_cut
    for text in ("ab " * 20_000, "ab  ab\n" * 5000, "ab" * 20_000, "b\n" * 20_000):
        assert encode_text(given, text, dtype="uint16").tolist() == given.encode(text)


def test_prepared_text_is_that_of_whole_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.data.prepare._PIECE_CHARS", 100)
    given, text = sentencepiece_like(), "ab " * 10_000 + "b"
    (tmp_path / "text.txt").write_text(text)
    prepare([tmp_path / "text.txt"], tmp_path / "out", tokenizer=given, validation_fraction=0, num_workers=1)
    train = ShardSet.open(tmp_path / "out").train
    ids = train.read(0, train.num_tokens).tolist()
    assert ids == [*given.encode(text), given.end_of_text_id] and given.decode(ids[:-1]) == text


def test_byte_level_tokenizers_may_be_cut(tokenizer: Tokenizer) -> None:
    assert tokenizer.may_be_cut


def test_no_batches_are_no_results(tokenizer: Tokenizer) -> None:
    with EncoderPool(tokenizer, num_workers=1) as pool:
        assert list(pool.encode([])) == []
