"""The pieces of a text are the text, for every kind of tokenizer and wherever its tokens part it; stop texts end it."""

import base64
import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models

from moesaic.data.tokenizer import Tokenizer
from moesaic.serve.detokenizer import Detokenizer

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "tokenizer"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def wrap(model: models.Model, decoder: decoders.Decoder | None, special: str = "</s>") -> Tokenizer:
    inner = tokenizers.Tokenizer(model)
    if decoder is not None:
        inner.decoder = decoder
    inner.add_special_tokens([AddedToken(special, special=True)])
    return Tokenizer(inner.to_str())


def like_llama(pieces: list[str]) -> Tokenizer:
    chain = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    vocabulary = {piece: token_id for token_id, piece in enumerate(dict.fromkeys(pieces))}
    model = models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    return wrap(model, decoders.Sequence(chain))


PIECES = ["<unk>", "</s>", *BYTES, "▁", "▁▁", "▁the", "the", "a", "▁é", "日本", ".", "▁.", "'", "�", "\n"]
WORDS = ["[UNK]", "the", "##ing", ".", ",", "don", "'", "t", "n't", "do", "not", "##s", "é", "日"]


def small() -> dict[str, Tokenizer]:
    """A tokenizer of each kind of decoder, some tokens of each odd in their way."""
    letters = ["<unk>", "▁", "▁the", "the", "a▁b", "▁▁", "é", ".", "日"]
    words = ["<unk>", "the</w>", "th", "e</w>", "a", "é</w>", ".</w>"]
    gemma = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]

    def bpe(names: list[str]) -> models.BPE:
        return models.BPE(vocab={name: place for place, name in enumerate(names)}, merges=[], unk_token=names[0])

    return {
        "trained": Tokenizer.train(["the quick brown fox jumps over é 日本 the lazy dog 👩‍👩‍👧"] * 3, vocab_size=300),
        "llama": like_llama(PIECES),
        "gemma": wrap(bpe(PIECES), decoders.Sequence(gemma)),
        "metaspace": wrap(bpe(letters), decoders.Metaspace()),
        "metaspace, never first": wrap(bpe(letters), decoders.Metaspace(prepend_scheme="never")),
        "wordpiece": wrap(models.WordPiece({word: place for place, word in enumerate(WORDS)}), decoders.WordPiece()),
        "suffix": wrap(bpe(words), decoders.BPEDecoder()),
        "none": wrap(bpe(words), None),
    }


def from_shared(name: str) -> Tokenizer:
    if not SHARED.is_dir():
        pytest.skip(f"the real tokenizers are not in {SHARED}")
    if name == "gpt-neox-20b":
        return Tokenizer.load(SHARED / name)
    if name == "gpt2":
        vocabulary = json.loads((SHARED / name / "encoder.json").read_text(encoding="utf-8"))
        lines = (SHARED / name / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:]
        merges = [tuple(line.split(" ")) for line in lines if line]
        return wrap(models.BPE(vocab=vocabulary, merges=merges), decoders.ByteLevel(), "<|endoftext|>")
    if name == "qwen":
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        letter = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
        tokens = [
            base64.b64decode(line.split()[0]) for line in (SHARED / name / "qwen.tiktoken").read_bytes().splitlines()
        ]
        vocabulary = {"".join(letter[byte] for byte in token): place for place, token in enumerate(tokens)}
        return wrap(models.BPE(vocab=vocabulary, merges=[]), decoders.ByteLevel(), "<|endoftext|>")
    return like_llama(sentencepiece((SHARED / name / "tokenizer.model.v1").read_bytes()))


def sentencepiece(data: bytes) -> list[str]:
    """The pieces of a SentencePiece model: field 1 of its protobuf, in which field 1 is the text."""

    def fields(data: bytes) -> list[tuple[int, bytes]]:
        found, place = [], 0

        def varint() -> int:
            nonlocal place
            value = shift = 0
            while True:
                byte = data[place]
                place += 1
                value |= (byte & 127) << shift
                shift += 7
                if byte < 128:
                    return value

        while place < len(data):
            key = varint()
            length = {0: 0, 1: 8, 5: 4}.get(key & 7)
            if key & 7 == 0:
                varint()
                continue
            length = varint() if length is None else length
            found.append((key >> 3, data[place : place + length]))
            place += length
        return found

    return [dict(fields(value))[1].decode("utf-8") for number, value in fields(data) if number == 1]


SMALL = small()


def pieces(tokenizer: Tokenizer, ids: list[int], **settings: object) -> list[str]:
    text = Detokenizer(tokenizer, **settings)
    return [*(text.append(token_id) for token_id in ids), text.flush()]


def draw(tokenizer: Tokenizer, random: random.Random, count: int) -> list[int]:
    """Ids in runs, so that characters of several bytes, broken ones and special tokens meet."""
    special = sorted(tokenizer.special_ids)
    single = [token for token in range(tokenizer.vocab_size) if tokenizer.is_byte_token(token)] or list(range(256))
    ids: list[int] = []
    while len(ids) < count:
        kind = random.randrange(4)
        if kind == 0:
            ids += [random.randrange(tokenizer.vocab_size) for _ in range(random.randrange(1, 8))]
        elif kind == 1:
            ids += tokenizer.encode(random.choice(["日本語 é", "👩‍👩‍👧‍👦", "the  fox .", " don't"]))
        elif kind == 2:
            ids += [random.choice(single) for _ in range(random.randrange(1, 6))]
        else:
            ids.append(random.choice(special))
    return ids[:count]


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_are_the_text(name: str, seed: int) -> None:
    ids = draw(SMALL[name], random.Random(seed), random.Random(seed).choice([0, 1, 2, 7, 60]))
    assert "".join(pieces(SMALL[name], ids)) == SMALL[name].decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", ["gpt-neox-20b", "gpt2", "qwen", "mixtral-8x7b-v1"])
def test_the_pieces_are_the_text_with_real_tokenizers(name: str) -> None:
    tokenizer = from_shared(name)
    for seed in range(40):
        ids = draw(tokenizer, random.Random(seed), 1 + 4 * seed)
        assert "".join(pieces(tokenizer, ids)) == tokenizer.decode(ids, skip_special_tokens=True), ids


@pytest.mark.parametrize("name", SMALL)
def test_a_text_goes_on_from_its_prompt(name: str) -> None:
    tokenizer = SMALL[name]
    plain = [
        token for token in range(tokenizer.vocab_size)
        if token not in tokenizer.special_ids and not tokenizer.is_byte_token(token)
        and "�" not in tokenizer.decode([token])
    ]  # fmt: skip
    for seed in range(20):
        ids = random.Random(seed).choices(plain, k=24)
        whole, before = tokenizer.decode(ids), tokenizer.decode(ids[:12])
        assert before + "".join(pieces(tokenizer, ids[12:], prompt=ids[:12])) == whole


def test_a_first_word_keeps_its_space_behind_a_prompt_only() -> None:
    tokenizer = SMALL["llama"]
    word = PIECES.index("▁the")
    assert pieces(tokenizer, [word, word]) == ["the", " the", ""]
    assert pieces(tokenizer, [word, word], prompt=[tokenizer.end_of_text_id, word]) == [" the", " the", ""]
    # A prompt that ends within a character, or holds ids of nothing, changes no space.
    ends = [word, PIECES.index(BYTES[0xE6]), tokenizer.end_of_text_id, 10_000]
    assert pieces(tokenizer, [word], prompt=ends) == [" the", ""]


def test_characters_come_when_they_are_whole() -> None:
    tokenizer = Tokenizer.train(["abc"], vocab_size=257)
    ids = tokenizer.encode("a日é")
    assert pieces(tokenizer, ids) == ["a", "", "", "日", "", "é", ""]
    assert pieces(tokenizer, ids[:-1]) == ["a", "", "", "日", "", "�"]
    assert pieces(tokenizer, [*ids[:2], *ids[:1]]) == ["a", "", "�a", ""]
    byte = {value: PIECES.index(BYTES[value]) for value in "日".encode()}
    assert pieces(SMALL["llama"], [*byte.values(), PIECES.index("a")]) == ["", "", "", "日a", ""]
    assert pieces(SMALL["llama"], list(byte.values())[:2]) == ["", "", "��"]


def test_special_and_unknown_tokens_are_no_text() -> None:
    for tokenizer in SMALL.values():
        assert pieces(tokenizer, [tokenizer.end_of_text_id, tokenizer.vocab_size, 10**6]) == ["", "", "", ""]


def test_a_token_costs_the_same_however_long_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = SMALL["llama"]
    decoded: list[int] = []
    inner = Tokenizer.decode

    def decode(self: Tokenizer, ids: list[int], **options: bool) -> str:
        decoded.append(len(ids))
        return inner(self, ids, **options)

    monkeypatch.setattr(Tokenizer, "decode", decode)
    # Thousands of bytes in a row too, of which no character ever comes.
    pieces(tokenizer, [PIECES.index("a")] * 500 + [PIECES.index(BYTES[0xFF])] * 500 + [PIECES.index("a")] * 500)
    assert sum(decoded) < 12 * 1500


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """By definition: letter by letter, the longest stop text that the text so far ends with."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            longest = max(complete, key=len)
            return text[: end - len(longest)], longest
    return text, None


@pytest.mark.parametrize("seed", range(200))
def test_stop_texts_end_the_text_wherever_tokens_part_it(seed: int) -> None:
    source = random.Random(seed)
    tokenizer = Tokenizer.train(["ab aab abab ba aé"] * 4, vocab_size=270)
    text = "".join(source.choices("aab é", k=source.randrange(40)))
    stops = ["".join(source.choices("aab é", k=source.randrange(1, 6))) for _ in range(source.randrange(1, 4))]
    ids = tokenizer.encode(text) if seed % 2 else [one for letter in text for one in tokenizer.encode(letter)]
    running = Detokenizer(tokenizer, stop=stops)
    given = ""
    for token_id in ids:
        given += running.append(token_id)
        # Nothing that a stop text might still take back.
        assert expected(text, stops)[0].startswith(given)
        if running.stopped_by is not None:
            break
    given += running.flush()
    assert (given, running.stopped_by) == expected(text, stops)
    if running.stopped_by is not None:
        assert running.append(ids[0]) == running.flush() == ""


def test_what_cannot_begin_a_stop_text_is_not_held_back() -> None:
    tokenizer = Tokenizer.train(["x"], vocab_size=257)
    running = Detokenizer(tokenizer, stop=["END.", "\n\n"])
    got = [running.append(token_id) for token_id in tokenizer.encode("xE\nEN-END.x")]
    assert got == ["x", "", "E", "\n", "", "EN-", "", "", "", "", ""]
    assert running.stopped_by == "END."


def test_half_a_character_at_the_end_may_complete_a_stop_text() -> None:
    tokenizer = Tokenizer.train(["x"], vocab_size=257)
    running = Detokenizer(tokenizer, stop=["b�"])
    assert [running.append(token_id) for token_id in tokenizer.encode("abé")[:-1]] == ["a", "", ""]
    assert (running.flush(), running.stopped_by) == ("", "b�")


def test_before_min_tokens_a_stop_text_is_passed_over() -> None:
    tokenizer = Tokenizer.train(["x"], vocab_size=257)
    running = Detokenizer(tokenizer, stop=["ab"], min_tokens=4)
    got = "".join(running.append(token_id) for token_id in tokenizer.encode("abcab"))
    assert (got, running.stopped_by) == ("abc", "ab")
    running = Detokenizer(tokenizer, stop=["aa"], min_tokens=3)
    assert "".join(running.append(token_id) for token_id in tokenizer.encode("aaab")) + running.flush() == "a"


def test_a_long_stop_text_costs_no_more_than_a_short_one() -> None:
    tokenizer = Tokenizer.train(["x"], vocab_size=257)
    stop = "a" * 20_000 + "b"
    running = Detokenizer(tokenizer, stop=[stop])
    (token,) = tokenizer.encode("a")
    assert all(running.append(token) == "" for _ in range(20_000))
    assert running.append(token) == "a"
    assert running.append(tokenizer.encode("b")[0]) == ""
    assert running.stopped_by == stop


@pytest.mark.parametrize("name", SMALL)
def test_token_bytes_are_what_a_token_adds(name: str) -> None:
    tokenizer = SMALL[name]
    add: Callable[[int], bytes] = tokenizer.token_bytes
    assert all(add(token) == b"" for token in tokenizer.special_ids)
    if name in ("llama", "gemma"):
        assert [add(PIECES.index(piece)) for piece in ("▁the", "<0xE6>", "▁▁", "a")] == [b" the", b"\xe6", b"  ", b"a"]
    if name == "wordpiece":
        assert [add(WORDS.index(word)) for word in ("the", "##ing")] == [b" the", b"ing"]
    if name == "trained":
        ids = tokenizer.encode("é 日本")
        assert b"".join(map(add, ids)).decode() == "é 日本"
