"""The tokenizer loses nothing, never ends a text by what is written in it, and names what is wrong with a file."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from moesaic.data.corpus import embedded_corpus
from moesaic.data.shards import ShardSet
from moesaic.data.tokenizer import END_OF_TEXT, Tokenizer
from moesaic.errors import DataError

ODD_TEXTS = [
    "",
    " ",
    "\n\n\t  \r\n",
    "\x00\x01\x7f control",
    "e\u0301 is not é",
    "日本語 العربية עברית हिन्दी ไทย",
    "👩‍👩‍👧‍👦🏳️‍🌈\U0010ffff\ufeff\u200b\u2028",
    "don't  won't   12,345.67\u00a0€",
    "<|endoftext|> written out <|endoftext|>",
    "a" * 5000,
]

# The library panics over a merge that is shorter than the prefix which is to be taken off it.
PANICS = json.dumps(
    {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"], "continuing_subword_prefix": "##"}}
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = [file.read_text(encoding="utf-8") for file in sorted(embedded_corpus().glob("*.txt"))[:4]]
    return Tokenizer.train(texts, vocab_size=500)


def given_tokenizer(*special: str, plain: tuple[str, ...] = ()) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(vocab={c: i for i, c in enumerate("abcdefgh ")}, merges=[]))
    inner.add_special_tokens([AddedToken(name, special=True) for name in special])
    inner.add_tokens([AddedToken(name) for name in plain])
    return inner


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_batches_equal_single_texts(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(ODD_TEXTS) == [tokenizer.encode(text) for text in ODD_TEXTS]


def test_a_written_out_end_of_text_never_ends_a_text(tokenizer: Tokenizer) -> None:
    assert tokenizer.end_of_text == END_OF_TEXT
    assert tokenizer.end_of_text_id not in tokenizer.encode(f"before{END_OF_TEXT}after")
    assert tokenizer.decode([tokenizer.end_of_text_id]) == END_OF_TEXT


def test_the_vocabulary_has_the_asked_size_and_all_ids_are_below(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 500
    assert max(tokenizer.encode("The Congress of the United States. ünïcode 日本")) < 500
    assert tokenizer.token(tokenizer.end_of_text_id) == END_OF_TEXT
    with pytest.raises(DataError, match="token id 500 is not in the vocabulary"):
        tokenizer.token(500)


def test_training_is_deterministic_and_bounded_by_the_sample() -> None:
    texts = [file.read_text(encoding="utf-8") for file in sorted(embedded_corpus().glob("*.txt"))[:6]]
    first = Tokenizer.train(texts, vocab_size=400, sample_bytes=50_000)
    assert Tokenizer.train(texts, vocab_size=400, sample_bytes=50_000).fingerprint == first.fingerprint
    beginning = "".join(texts).encode()[:50_000].decode("utf-8", "ignore")
    assert (
        Tokenizer.train([beginning, texts[5]], vocab_size=400, sample_bytes=len(beginning.encode())).vocab_size == 400
    )

    def endless():
        while True:
            yield "real text again and again "

    assert Tokenizer.train(endless(), vocab_size=300, sample_bytes=10_000).vocab_size <= 300


def test_saving_and_loading_keeps_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "folder")
    tokenizer.save(tmp_path / "file" / "tokenizer.json")
    for path in (tmp_path / "folder", tmp_path / "folder" / "tokenizer.json", tmp_path / "file"):
        loaded = Tokenizer.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.vocab_size == tokenizer.vocab_size
        assert loaded.end_of_text_id == tokenizer.end_of_text_id
        assert loaded.encode(ODD_TEXTS[5]) == tokenizer.encode(ODD_TEXTS[5])


def test_files_are_on_the_disk_before_they_take_their_names(
    tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut could leave an empty file in the place of a whole one."""
    synced = []

    def fsync(handle: int) -> None:
        stat = os.fstat(handle)
        if stat.st_ino != tmp_path.stat().st_ino:
            synced.append((stat.st_ino, stat.st_size))
            assert not (tmp_path / "tokenizer.json").exists()

    monkeypatch.setattr(os, "fsync", fsync)
    tokenizer.save(tmp_path)
    found = [path.stat() for path in tmp_path.iterdir()]
    assert sorted(synced) == sorted((stat.st_ino, stat.st_size) for stat in found) and len(found) == 2


def test_of_several_templates_the_default_one_is_meant(tokenizer: Tokenizer) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ x }}"}]
    for given, meant in ((named, "{{ x }}"), (named[:1], None), ([], None), ("a", "a")):
        companions = {"tokenizer_config.json": json.dumps({"chat_template": given})}
        assert Tokenizer(tokenizer.json_text, companions=companions).chat_template == meant


def test_files_are_written_as_they_were_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Byte for byte: their order and spacing, line ends, escapes, and a truncation that is not applied here."""
    values = json.loads(tokenizer.json_text) | {"truncation": {"max_length": 3, "strategy": "LongestFirst",
                                                               "stride": 0, "direction": "Right"}}  # fmt: skip
    files = {
        "tokenizer.json": json.dumps(dict(reversed(values.items())), indent=3).replace("\n", "\r\n"),
        "tokenizer_config.json": '{"eos_token":  "<|endoftext|>",\r\n "chat_template": "\\u00e9 {{ x }}"}',
        "special_tokens_map.json": '{ "eos_token": {"content": "<|endoftext|>"} }\n\n',
        "added_tokens.json": '{"<|endoftext|>": 0}',
        "chat_template.jinja": "{%- for m in messages -%}\r\n{{ m.content }}\n\r{%- endfor -%}é\u2028",
        "generation_config.json": '{"eos_token_id": [0, 7]}',
    }
    (tmp_path / "given").mkdir()
    for name, text in files.items():
        (tmp_path / "given" / name).write_bytes(text.encode())
    loaded = Tokenizer.load(tmp_path / "given")
    assert loaded.encode(ODD_TEXTS[5]) == tokenizer.encode(ODD_TEXTS[5])
    loaded.save(tmp_path / "saved")
    assert {path.name: path.read_bytes().decode() for path in (tmp_path / "saved").iterdir()} == files
    assert loaded.stop_ids == {0, 7}


def test_ids_with_gaps_count_up_to_the_highest() -> None:
    inner = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "</s>": 700}, merges=[]))
    assert Tokenizer(inner.to_str()).vocab_size == 701


def test_the_fingerprint_does_not_depend_on_formatting_but_on_content(tokenizer: Tokenizer, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    values = json.loads(tokenizer.json_text)
    file.write_text(json.dumps(dict(reversed(values.items())), indent=4), encoding="utf-8")
    assert Tokenizer.load(file).fingerprint == tokenizer.fingerprint
    values["model"]["merges"].pop()
    file.write_text(json.dumps(values), encoding="utf-8")
    assert Tokenizer.load(file).fingerprint != tokenizer.fingerprint


def test_the_fingerprint_is_the_same_after_transformers_saved_it(tokenizer: Tokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="it saves the tokenizer that is compared")
    tokenizer.save(tmp_path / "ours")
    transformers.AutoTokenizer.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    theirs = Tokenizer.load(tmp_path / "theirs")
    assert theirs.json_text != tokenizer.json_text
    assert theirs.fingerprint == tokenizer.fingerprint


def test_the_fingerprint_depends_on_what_a_post_processor_adds() -> None:
    inner = given_tokenizer("<s>", "</s>")
    none = Tokenizer(inner.to_str()).fingerprint
    template = tokenizers.processors.TemplateProcessing
    inner.post_processor = template(single="$A:0", pair="$A:0 $B:1", special_tokens=[])
    assert Tokenizer(inner.to_str()).fingerprint == none
    inner.post_processor = template(
        single="<s> $A", pair="<s> $A $B:1", special_tokens=[("<s>", inner.token_to_id("<s>"))]
    )
    assert Tokenizer(inner.to_str()).fingerprint != none


def test_stored_truncation_and_padding_are_not_applied(tokenizer: Tokenizer, tmp_path: Path) -> None:
    inner = tokenizers.Tokenizer.from_str(tokenizer.json_text)
    inner.enable_truncation(3)
    inner.enable_padding(length=64)
    inner.save(str(tmp_path / "tokenizer.json"))
    text = "a text of rather more than three tokens"
    assert Tokenizer.load(tmp_path).decode(Tokenizer.load(tmp_path).encode(text)) == text


def test_nothing_is_added_by_a_post_processor() -> None:
    inner = given_tokenizer("<s>", "</s>")
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", inner.token_to_id("<s>")), ("</s>", inner.token_to_id("</s>"))]
    )
    tokenizer = Tokenizer(inner.to_str())
    assert tokenizer.end_of_text == "</s>"
    assert tokenizer.encode("abc") == [0, 1, 2]


def test_the_end_is_endoftext_then_the_configured_then_a_common_name(tmp_path: Path) -> None:
    given_tokenizer("<pad>", "<done>", "</s>").save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).end_of_text == "</s>"
    for configured in ("<done>", {"content": "<done>", "lstrip": False}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": configured}))
        assert Tokenizer.load(tmp_path).end_of_text == "<done>"
    Tokenizer.load(tmp_path).save(tmp_path / "copy")
    assert Tokenizer.load(tmp_path / "copy").end_of_text == "<done>"
    given_tokenizer("<done>", "<|endoftext|>").save(str(tmp_path / "tokenizer.json"))
    assert Tokenizer.load(tmp_path).end_of_text == "<|endoftext|>"


def test_an_end_that_is_not_marked_special_still_never_ends_a_text() -> None:
    tokenizer = Tokenizer(given_tokenizer(plain=("</s>",)).to_str())
    assert tokenizer.end_of_text_id not in tokenizer.encode("abc</s>def")


@pytest.mark.parametrize("letters", ["abcdefgh▁<>/s", "abcdefgh▁"])
def test_an_end_that_the_vocabulary_has_as_a_word_never_ends_a_text(letters: str) -> None:
    """As T5's and other Unigram models have it; letters that they lack are unknown."""
    vocabulary = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -9.0) for letter in letters)]
    inner = tokenizers.Tokenizer(models.Unigram(vocabulary, 0, False))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "</s>")])
    tokenizer = Tokenizer(inner.to_str())
    text = "abc</s> abc</s></s>"
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_text == "</s>" and tokenizer.end_of_text_id not in ids
    if "<" in letters:
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("abc x") == [*tokenizer.encode("abc"), inner.token_to_id("▁"), 0], "unknown as before"


def test_an_end_that_stands_for_unknown_words_is_refused() -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="</s>"))
    inner.add_special_tokens([AddedToken("</s>", special=True)])
    with pytest.raises(DataError, match=r"encodes plain text as its end-of-text token '</s>'.*; .*; use a tokenizer"):
        Tokenizer(inner.to_str()).encode("b")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no tokenizer"),
        ("not json", "is not JSON"),
        ('{"hello": 0}', "has no `model`"),
        ('{"model": "BPE"}', "has no `model`"),
        ("[" * 100_000, "is not JSON"),
        ('{"model": {"type": "Nonsense"}}', "does not describe a tokenizer"),
        (PANICS, "does not describe a tokenizer"),
        (given_tokenizer("<pad>").to_str(), "no end-of-text token"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


# What the library takes, and then raises a bare exception for, or panics.
UNFIT: dict[str, dict[str, Any]] = {
    "no word for what is unknown": {"model": {"type": "WordLevel", "vocab": {END_OF_TEXT: 0}, "unk_token": "[UNK]"}},
    "words of no length": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "nothing replaced": {"normalizer": {"type": "Replace", "pattern": {"String": ""}, "content": "x"}},
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_the_library_finds_out_while_it_encodes_is_an_error_of_ours(tokenizer: Tokenizer, name: str) -> None:
    values = json.loads(tokenizer.json_text)
    given = Tokenizer(json.dumps(values | UNFIT[name]))
    for encode in (given.encode, lambda text: given.encode_prompt(text, add_special_tokens=True)):
        for text in ("some words", "some words " * 500):
            with pytest.raises(DataError, match=r"cannot encode a (text|prompt) .*; .* is required; export it again"):
                encode(text)


def test_a_post_processor_with_a_token_that_it_does_not_name_is_an_error_of_ours(tokenizer: Tokenizer) -> None:
    values = json.loads(tokenizer.json_text)
    sequences = [{"Sequence": {"id": each, "type_id": 0}} for each in "AB"]
    single = [{"SpecialToken": {"id": "!", "type_id": 0}}, sequences[0]]
    template = {"type": "TemplateProcessing", "single": single, "pair": sequences, "special_tokens": {}}
    given = Tokenizer(json.dumps(values | {"post_processor": template}))
    with pytest.raises(DataError, match=r"cannot encode a prompt .*; .* is required; export it again"):
        given.encode_prompt("some words", add_special_tokens=True)


def test_a_binary_file_and_a_damaged_config_are_named(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xfe")
    with pytest.raises(DataError, match="is not UTF-8"):
        Tokenizer.load(tmp_path / "tokenizer.model")
    tokenizer.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"tokenizer\.json: chat_template\.jinja is not UTF-8"):
        Tokenizer.load(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not a JSON object"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("ends", ['"2"', "true", "[[]]", "[1, null]", "1.0", "{}"])
def test_ends_that_are_no_ids_are_refused(tokenizer: Tokenizer, ends: str) -> None:
    companions = {"generation_config.json": f'{{"eos_token_id": {ends}}}'}
    with pytest.raises(DataError, match=r"eos_token_id .*; the id of a token, or a list of ids, is required.*; mend"):
        Tokenizer(tokenizer.json_text, companions=companions)


def test_ends_are_one_id_or_several_or_none(tokenizer: Tokenizer) -> None:
    for ends, found in (("2", {2}), ("[1, 2]", {1, 2}), ("null", set()), ("[]", set()), ("[3, 9999, -1]", {3})):
        companions = {"generation_config.json": f'{{"eos_token_id": {ends}}}'}
        given = Tokenizer(tokenizer.json_text, companions=companions)
        assert given.stop_ids == {tokenizer.end_of_text_id, *found}


def test_training_refuses_what_cannot_work() -> None:
    with pytest.raises(DataError, match=r"vocab_size \(256\) is too small"):
        Tokenizer.train(["text"], vocab_size=256)
    with pytest.raises(DataError, match="is empty"):
        Tokenizer.train([], vocab_size=300)
    with pytest.raises(DataError, match="sample_bytes"):
        Tokenizer.train(["text"], vocab_size=300, sample_bytes=0)


def test_a_prompt_keeps_special_tokens_that_a_text_may_not_have(tiny_data: Path) -> None:
    tokenizer = ShardSet.open(tiny_data).load_tokenizer()
    text = "Work<|endoftext|>License"
    end = tokenizer.end_of_text_id
    ids = tokenizer.encode_prompt(text, add_special_tokens=True)
    assert ids == [*tokenizer.encode("Work"), end, *tokenizer.encode("License")]
    assert end not in tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and tokenizer.decode(ids, skip_special_tokens=True) == "WorkLicense"


def test_the_files_that_came_along_name_the_begin_token(tiny_data: Path) -> None:
    tokenizer = ShardSet.open(tiny_data).load_tokenizer()
    assert tokenizer.begin_of_text_id is None
    config = json.dumps({"bos_token": {"content": "a"}, "eos_token": "<|endoftext|>"})
    named = Tokenizer(tokenizer.json_text, companions={"tokenizer_config.json": config})
    assert named.begin_of_text_id == tokenizer.encode("a")[0]
    assert named.special_names == {"bos_token": "a", "eos_token": "<|endoftext|>"}


def test_a_text_stands_behind_what_the_post_processor_puts_there_else_the_end_of_another(
    tiny_data: Path, beginning_tokenizer: Tokenizer
) -> None:
    plain = Tokenizer.load(tiny_data)
    assert plain.first_id == plain.end_of_text_id
    assert beginning_tokenizer.first_id == beginning_tokenizer.begin_of_text_id != plain.end_of_text_id
    assert beginning_tokenizer.encode_prompt("Work", add_special_tokens=True) == [
        beginning_tokenizer.first_id,
        *plain.encode("Work"),
    ]
    # A name in tokenizer_config.json alone puts nothing there; nor does an end behind the text.
    companions = beginning_tokenizer.companions
    assert Tokenizer(plain.json_text, companions=companions).first_id == plain.end_of_text_id
    values = json.loads(beginning_tokenizer.json_text)
    values["post_processor"]["single"].reverse()
    assert Tokenizer(json.dumps(values), companions=companions).first_id == plain.end_of_text_id


def test_token_bytes_make_the_text_and_special_tokens_have_none(tokenizer: Tokenizer) -> None:
    for text in ODD_TEXTS:
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode() == text
    assert tokenizer.is_byte_level and not tokenizer.has_byte_tokens
    assert tokenizer.special_ids == {tokenizer.end_of_text_id}
    assert tokenizer.token_bytes(tokenizer.end_of_text_id) == tokenizer.token_bytes(10_000) == b""
    # Added as plain text: spelled as it is, also with letters that byte-level BPE writes otherwise.
    inner = tokenizers.Tokenizer.from_str(tokenizer.json_text)
    inner.add_tokens([AddedToken("a b\u0120"), AddedToken("<user>")])
    added = Tokenizer(inner.to_str())
    ids = [inner.token_to_id("a b\u0120"), inner.token_to_id("<user>")]
    assert added.decode(ids) == b"".join(map(added.token_bytes, ids)).decode() == "a b\u0120<user>"
