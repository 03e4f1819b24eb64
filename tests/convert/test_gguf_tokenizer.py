"""A tokenizer that goes into GGUF metadata and back gives the same tokens; what has no place there is refused."""

import json
from collections.abc import Callable
from typing import Any
from unicodedata import normalize

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers

from moesaic.convert.gguf_tokenizer import read_tokenizer, tokenizer_metadata
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConversionError, DataError, MoesaicError

TEXTS = [
    "", " ", "   ", "\n", "\r\n \n\n\t ", "a  b   c ", " lead, trail  ", "don't I'LL we'Ve 'S",
    "12345 1,000.50 \u00bd\u00b2 \u0663\u0664", "x1y22z333", "e\u0301 is not \u00e9, \u212b", "日本語 العربية हिन्दी",
    "👩\u200d👩\u200d👧 \U0010ffff\ufeff\u2028\x00", "def f(x):\n    return x ** 2  # !?\n",
    "<|endoftext|><|im_end|> <tool>  <tool>x", "a" * 300, "the quick brown foxes' 7th",
]  # fmt: skip
ENGLISH = ["the quick brown fox jumps over the lazy dogs' 12 34 567. " * 9, "don't we'll 日本語 é def f(x):\n    end"]

# As the tokenizer.json of GPT-2, SmolLM2, Llama 3 and Qwen2 have them.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


# As those of gpt-oss, DeepSeek-V3 and Seed have them, decoded.
CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK = json.loads(
    r""""[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+|"""
    r''' ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+"'''
)
SEED = json.loads(
    r""""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1}| ?[^\\s\\p{L}\\p{N}\r\n]+|\\s*[\r\n]+|"""
    r'''\\s+(?!\\S)|\\s+"'''
)


def splits(*patterns: str) -> pre_tokenizers.PreTokenizer:
    cut = [pre_tokenizers.Split(Regex(each), "isolated", invert=False) for each in patterns]
    return pre_tokenizers.Sequence([*cut, pre_tokenizers.ByteLevel(False, trim_offsets=True, use_regex=False)])


def words(digits: str) -> pre_tokenizers.PreTokenizer:
    return splits(WORDS % digits)


KINDS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False),
    "smollm": lambda: pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(False)]),
    "llama-bpe": lambda: words("{1,3}"),
    "qwen2": lambda: words(""),
    "gpt-4o": lambda: splits(CASED),
    "deepseek-v3": lambda: splits(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK),
    "olmo": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True),
    "seed-coder": lambda: splits(SEED),
}
COMPOSED = ("qwen2", "olmo")


def make(kind: str, **changes: Any) -> tokenizers.Tokenizer:
    """Train a tokenizer of a kind; changes: attributes to set on it first."""
    inner = tokenizers.Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
    inner.pre_tokenizer, inner.decoder = KINDS[kind](), decoders.ByteLevel()
    if kind in COMPOSED:
        inner.normalizer = normalizers.NFC()
    if kind == "deepseek-v3":
        inner.normalizer = normalizers.Sequence([])  # as its file has it
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<|endoftext|>", "<|im_end|>", "<|eom|>"], show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    inner.train_from_iterator(ENGLISH, trainer)
    inner.add_tokens([AddedToken("<tool>", normalized=False)])
    inner.add_special_tokens([AddedToken("<|late|>", special=True)])
    for name, value in changes.items():
        setattr(inner, name, value)
    return inner


COMPANIONS = {
    "tokenizer_config.json": json.dumps({"eos_token": {"content": "<|im_end|>"}, "bos_token": "<|endoftext|>"}),
    "generation_config.json": json.dumps({"eos_token_id": [2, 1]}),
    "chat_template.jinja": "{% for m in messages %}\r\n{{ m.content }}é{% endfor %}",
}


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_gives_the_same_tokens(kind: str) -> None:
    given = Tokenizer(make(kind).to_str(), companions=COMPANIONS)
    metadata = tokenizer_metadata(given, given.vocab_size + 9)
    assert metadata["tokenizer.ggml.pre"] == kind
    assert len(metadata["tokenizer.ggml.tokens"]) == given.vocab_size + 9
    back = read_tokenizer(metadata, "a file")
    for text in TEXTS:
        assert back.encode(text) == given.encode(text), text
        assert back.decode(given.encode(text)) == given.decode(given.encode(text))
    assert back.vocab_size == given.vocab_size
    assert [back.token(index) for index in range(back.vocab_size)] == [
        given.token(index) for index in range(given.vocab_size)
    ]
    assert back.stop_ids == given.stop_ids == {0, 1, 2}
    assert back.end_of_text_id == given.end_of_text_id
    assert back.chat_template == given.chat_template
    assert {*read_tokenizer(metadata, "").companions} >= {"tokenizer_config.json", "generation_config.json"}
    again = tokenizer_metadata(back, given.vocab_size + 9)
    assert again == metadata


def around(template: str) -> tokenizers.processors.PostProcessor:
    """Of the tokens 0 to 2 of make()."""
    names = ["<|endoftext|>", "<|im_end|>", "<|eom|>"]
    return processors.TemplateProcessing(
        single=template,
        pair="$A $B",
        special_tokens=[(each, index) for index, each in enumerate(names)],
    )


# The template, and what the file is to say of the begin and the end.
TEMPLATES = {
    "$A": (False, False),
    "<|endoftext|> $A": (True, False),
    "$A <|im_end|>": (False, True),
    "<|endoftext|> $A <|im_end|>": (True, True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_begin_and_end_go_there_and_back(kind: str, template: str) -> None:
    # As Llama 3 has it, whose other part changes no token.
    both = processors.Sequence([processors.ByteLevel(trim_offsets=False), around(template)])
    given = Tokenizer(make(kind, post_processor=both).to_str(), companions=COMPANIONS)
    metadata = tokenizer_metadata(given, 400)
    said = [metadata[f"tokenizer.ggml.{name}"] for name in ("add_bos_token", "add_eos_token")]
    assert said == list(TEMPLATES[template])
    assert [metadata[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos")] == [0, 1]
    back = read_tokenizer(metadata, "a file")
    for text in TEXTS:
        for marks in (False, True):
            prompts = [each.encode_prompt(text, add_special_tokens=marks) for each in (given, back)]
            assert prompts[0] == prompts[1], text
    assert back.first_id == given.first_id == 0
    assert tokenizer_metadata(back, 400) == metadata


def test_a_begin_token_without_a_name_in_the_companions_becomes_the_bos_token() -> None:
    given = Tokenizer(make("llama-bpe", post_processor=around("<|eom|> $A")).to_str())
    metadata = tokenizer_metadata(given, 400)
    assert metadata["tokenizer.ggml.bos_token_id"] == 2
    back = read_tokenizer(metadata, "a file")
    assert back.first_id == given.first_id == 2
    assert back.encode_prompt("the fox", add_special_tokens=True)[0] == 2


def test_where_a_file_does_not_say_the_begin_token_is_added_as_llama_cpp_does() -> None:
    for kind in KINDS:
        metadata = tokenizer_metadata(Tokenizer(make(kind).to_str(), companions=COMPANIONS), 400)
        for name in ("add_bos_token", "add_eos_token"):
            del metadata[f"tokenizer.ggml.{name}"]
        back = read_tokenizer(metadata, "a file")
        added = [0] if kind == "llama-bpe" else []
        assert back.encode_prompt("the fox", add_special_tokens=True) == added + back.encode("the fox")


def test_a_begin_token_may_be_called_anything() -> None:
    inner = make("gpt-2")
    inner.add_special_tokens(["$A", "x:1"])
    given = Tokenizer(inner.to_str(), companions={"tokenizer_config.json": '{"bos_token": "$A", "eos_token": "x:1"}'})
    added = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    back = read_tokenizer(tokenizer_metadata(given, 400) | added, "a file")
    begin, end = given.vocab_size - 2, given.vocab_size - 1
    assert back.encode_prompt("the fox", add_special_tokens=True) == [begin, *back.encode("the fox"), end]


@pytest.mark.parametrize(
    "template",
    ["<|eom|> $A", "<|endoftext|> <|endoftext|> $A", "<|im_end|> $A", "$A <|endoftext|>", "$A <|eom|>"],
)
def test_templates_that_the_format_cannot_say_are_refused(template: str) -> None:
    given = Tokenizer(make("gpt-2", post_processor=around(template)).to_str(), companions=COMPANIONS)
    with pytest.raises(ConversionError, match="GGUF has a place for one bos_token before a text and") as caught:
        tokenizer_metadata(given, 400)
    assert str(caught.value).count(";") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bos_token_id": None}, r"puts its bos token .*add_bos_token is True.*, and bos_token_id is None; the id of"),
        ({"bos_token_id": 399}, "bos_token_id is 399"),  # only fills the file up
        ({"bos_token_id": -1}, "bos_token_id is -1"),
        ({"bos_token_id": "x"}, "bos_token_id is 'x'"),
        ({"bos_token_id": [1]}, r"bos_token_id is \[1\]"),
        ({"add_bos_token": "yes"}, "add_bos_token is 'yes'"),
        ({"add_eos_token": True, "eos_token_id": 10**9}, "puts its eos token .* eos_token_id is 1000000000"),
    ],
)
def test_a_file_that_adds_a_token_it_does_not_have_is_refused(changes: dict[str, Any], message: str) -> None:
    given = Tokenizer(make("gpt-2", post_processor=around("<|endoftext|> $A")).to_str(), companions=COMPANIONS)
    changed = {f"tokenizer.ggml.{name}": value for name, value in changes.items()}
    with pytest.raises(DataError, match=message) as caught:
        read_tokenizer(tokenizer_metadata(given, 400) | changed, "a file")
    assert str(caught.value).count(";") == 2


def test_the_kinds_differ_on_these_texts() -> None:
    """Else that they are told apart would show nothing."""
    split = {
        kind: [
            [piece for piece, _ in rule().pre_tokenize_str(normalize("NFC", text) if kind in COMPOSED else text)]
            for text in TEXTS
        ]
        for kind, rule in KINDS.items()
    }
    assert all(split[one] != split[other] for one in KINDS for other in KINDS if one != other)


def test_a_tokenizer_without_merges_and_defaults_left_out_is_understood() -> None:
    values = json.loads(make("gpt-2").to_str())
    values["model"]["merges"] = []
    for name in ("use_regex", "trim_offsets"):
        values["pre_tokenizer"].pop(name, None)
    values["model"] = {name: values["model"][name] for name in ("type", "vocab", "merges")}
    values["model"]["vocab"] = {token: index for token, index in values["model"]["vocab"].items() if index < 259}
    values["added_tokens"] = [each for each in values["added_tokens"] if each["id"] < 259]
    given = Tokenizer(json.dumps(values | {"pre_tokenizer": {**values["pre_tokenizer"], "trim_offsets": True}}))
    metadata = tokenizer_metadata(given, given.vocab_size)
    metadata.pop("tokenizer.ggml.merges")  # an empty list is not written
    assert all(read_tokenizer(metadata, "").encode(text) == given.encode(text) for text in TEXTS)


UNIGRAM = tokenizers.Tokenizer(models.Unigram([("</s>", 0.0), ("▁a", -1.0)], 0, byte_fallback=False))


def sentence_piece() -> str:
    """As Llama 2 has it: BPE over characters, and bytes for those that are not in it."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "▁a": 5}
    inner = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return inner.to_str()


def without(kind: str, path: str, value: Any) -> str:
    values = json.loads(make(kind).to_str())
    *sections, name = path.split(".")
    inner = values
    for section in sections:
        inner = inner[section]
    inner[name] = value
    return json.dumps(values)


def with_token(**flags: bool) -> str:
    inner = make("gpt-2")
    inner.add_tokens([AddedToken("<odd>", normalized=False, **flags)])
    return inner.to_str()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (UNIGRAM.to_str(), "the tokenizer is Unigram; GGUF needs byte-level BPE"),
        (sentence_piece(), "the tokenizer is BPE.*; GGUF needs byte-level BPE"),
        (make("gpt-2", pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True)).to_str(), "have no name in GGUF"),
        (make("gpt-2", pre_tokenizer=pre_tokenizers.Whitespace()).to_str(), "have no name in GGUF"),
        (make("gpt-2", pre_tokenizer=None).to_str(), "have no name in GGUF"),
        (make("gpt-2", normalizer=normalizers.Lowercase()).to_str(), "have no name in GGUF"),
        (make("smollm", normalizer=normalizers.NFC()).to_str(), "have no name in GGUF"),
        (without("qwen2", "normalizer", None), "have no name in GGUF"),
        (without("llama-bpe", "model.ignore_merges", False), "have no name in GGUF"),
        (without("gpt-2", "model.ignore_merges", True), "have no name in GGUF"),
        (without("gpt-2", "model.dropout", 0.5), "have no name in GGUF"),
        (without("gpt-2", "decoder", None), "have no name in GGUF"),
        (with_token(lstrip=True), "'<odd>' takes the spaces around it"),
        (with_token(single_word=True), "'<odd>' takes the spaces around it"),
        (with_token(special=True, lstrip=True), "'<odd>' takes the spaces around it"),
        (with_token(special=True, rstrip=True), "'<odd>' takes the spaces around it"),
        (with_token(special=True, single_word=True), "'<odd>' takes the spaces around it"),
    ],
)
def test_what_has_no_place_in_the_format_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConversionError, match=message) as caught:
        tokenizer_metadata(Tokenizer(text), 400)
    assert str(caught.value).count(";") >= 2


def test_ids_without_a_token_get_names_that_no_token_has() -> None:
    inner = make("gpt-2")
    inner.add_special_tokens(["[PAD399]", "[PAD399]_"])
    inner.add_tokens(["[PAD340]", f"[PAD{inner.get_vocab_size() + 2}]"])
    given = Tokenizer(inner.to_str(), companions={"tokenizer_config.json": '{"pad_token": "[PAD350]"}'})
    metadata = tokenizer_metadata(given, 400)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == len(tokens) == 400 and tokens[399] == "[PAD399]__"
    # A name that the files give to nothing is nothing's still.
    assert "tokenizer.ggml.padding_token_id" not in metadata
    text = "the [PAD340] fox [PAD399] [PAD399]_"
    back = read_tokenizer(metadata, "a file")
    first, other = (each.encode_prompt(text, add_special_tokens=False) for each in (given, back))
    assert first == other
    assert back.vocab_size == given.vocab_size


def test_more_ends_than_the_format_has_keys_are_refused() -> None:
    text = make("gpt-2").to_str()
    for ids in ([1], [1, 2], [2, 1, 0]):
        given = Tokenizer(text, companions={"generation_config.json": json.dumps({"eos_token_id": ids})})
        assert read_tokenizer(tokenizer_metadata(given, 400), "a file").stop_ids == given.stop_ids == {0, *ids}
    given = Tokenizer(text, companions={"generation_config.json": json.dumps({"eos_token_id": [1, 2, 300]})})
    with pytest.raises(
        ConversionError, match=r"name 4 tokens .* \(<\|endoftext\|>, .*; GGUF has a place for 3 \(eos"
    ) as caught:
        tokenizer_metadata(given, 400)
    assert str(caught.value).count(";") == 2


def test_more_tokens_than_embeddings_are_refused() -> None:
    with pytest.raises(ConversionError, match="tokens and the model 300 embeddings"):
        tokenizer_metadata(Tokenizer(make("gpt-2").to_str()), 300)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "llama"}, "kind 'llama'"),
        ({"tokenizer.ggml.model": "bert"}, "kind 'bert'"),
        ({"tokenizer.ggml.model": None}, "kind None"),
        ({"tokenizer.ggml.pre": "tekken"}, "pre-tokenizer 'tekken'; byte-level BPE .* with one of gpt-2"),
        ({"tokenizer.ggml.pre": ["gpt-2"]}, "pre-tokenizer"),
        ({"tokenizer.ggml.tokens": 7}, r"does not fit together \(tokens is of type int\)"),
        ({"tokenizer.ggml.tokens": None}, r"does not fit together \(tokens is missing\)"),
        ({"tokenizer.ggml.merges": ""}, r"does not fit together \(merges is of type str\)"),
        ({"tokenizer.ggml.token_type": {}}, r"does not fit together \(token_type is of type dict\)"),
        ({"tokenizer.chat_template": 7}, "has a chat_template of type int; a text is required"),
        ({"tokenizer.chat_template": []}, "has a chat_template of type list; a text is required"),
        ({"tokenizer.ggml.tokens": ["a", "a"]}, "does not fit together"),
        ({"tokenizer.ggml.tokens": ["a"]}, "does not fit together"),
        ({"tokenizer.ggml.merges": ["a"]}, "does not fit together"),
        ({"tokenizer.ggml.merges": ["no such"]}, "does not fit together"),
        ({"tokenizer.ggml.merges": 5}, "does not fit together"),
        ({"tokenizer.ggml.token_type": [1]}, "does not fit together"),
        ({"tokenizer.ggml.token_type": ["x"] * 400}, "does not fit together"),
    ],
)
def test_metadata_that_is_no_tokenizer_is_refused(changes: dict[str, Any], message: str) -> None:
    metadata = tokenizer_metadata(Tokenizer(make("gpt-2").to_str()), 400) | changes
    with pytest.raises(DataError, match=message) as caught:
        read_tokenizer(metadata, "a file")
    assert str(caught.value).count(";") >= 2


def test_odd_roles_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    metadata = tokenizer_metadata(Tokenizer(make("gpt-2").to_str()), 400)
    for value in (-1, 10**9, "x", [1], 2.5, True):
        caplog.clear()
        changed = metadata | {f"tokenizer.ggml.{role}_token_id": value for role in ("bos", "eot", "padding")}
        assert read_tokenizer(changed, "a file").stop_ids == {0}
        assert [record.getMessage() for record in caplog.records] == [
            f"a file names {value!r} as its {role}_token_id, which is no id of its 400 tokens; the tokenizer goes "
            f"without one."
            for role in ("bos", "padding", "eot")
        ]
    caplog.clear()
    with pytest.raises(MoesaicError, match="no end-of-text"):
        read_tokenizer(
            tokenizer_metadata(Tokenizer(make("qwen2").to_str()), 400)
            | {"tokenizer.ggml.eos_token_id": 10**9, "tokenizer.ggml.tokens": [f"t{each}" for each in range(400)],
               "tokenizer.ggml.merges": []},
            "a file",
        )  # fmt: skip
    assert [record.getMessage()[:48] for record in caplog.records] == [
        "a file names 1000000000 as its eos_token_id, whi"
    ]
    with pytest.raises(MoesaicError, match="no end-of-text"):
        tokens = [f"t{index}" for index in range(400)]
        read_tokenizer(
            {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens}, "a file"
        )
