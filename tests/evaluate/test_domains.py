"""Routes by domain: counted as a loop would, told from chance, and what is refused."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.config.model import ModelConfig
from moesaic.data.shards import ShardSet
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, DataError
from moesaic.evaluate.domains import LabelledDocument, information_bits, measure_domains, read_labelled
from moesaic.model.pack import pack_transformer
from moesaic.model.transformer import Transformer

MODEL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_layers": 3,
    "num_heads": 2,
    "intermediate_size": 32,
    "max_positions": 40,
    "init_std": 0.3,
    "moe": {
        "num_experts": [4, 8],
        "layers": [0, 2],
        "top_k": 2,
        "router": {"noise": "jitter", "jitter_epsilon": 0.5},
        "capacity": {"factor": 0.1, "min_capacity": 1},
    },
}


def make_model() -> Transformer:
    return Transformer(ModelConfig.from_dict(MODEL)).initialize(0)


def make_documents(*, tell_apart: bool, each: int = 12) -> list[LabelledDocument]:
    """Three domains with words of their own, or with the same ones."""
    rng = np.random.default_rng(1)
    documents = []
    for number in range(3 * each):
        domain = number % 3
        low, high = (20 * domain, 20 * domain + 3) if tell_apart else (0, 60)
        ids = rng.integers(low, high, rng.integers(1, 60))
        documents.append(LabelledDocument("xyz"[domain], tuple(int(token) for token in ids)))
    return documents


def test_routes_are_those_of_each_document_alone() -> None:
    model, documents = make_model().train(), make_documents(tell_apart=True)
    shares: list[float] = []
    usage = measure_domains(model, documents, progress=lambda stage, share: shares.append(share))
    assert model.training and shares[-1] == 1.0
    assert usage.domains == ("x", "y", "z") and usage.num_documents == (12, 12, 12)
    model.eval()
    expected = [np.zeros((3, 4), dtype=np.int64), np.zeros((3, 8), dtype=np.int64)]
    for document in documents:
        with torch.no_grad():
            found = model(torch.tensor([document.ids[:40]])).moe
        for place, statistics in enumerate(found):
            expected[place]["xyz".index(document.domain)] += statistics.tokens_per_expert.numpy()
    assert [layer.layer for layer in usage.layers] == [0, 2]
    for layer, routes in zip(usage.layers, expected, strict=True):
        assert np.array_equal(layer.routes, routes)
        assert np.allclose(layer.shares.sum(1), 1.0)
        assert tuple(layer.routes.sum(1)) == tuple(2 * tokens for tokens in usage.num_tokens)  # top-2
    again = measure_domains(model, documents)
    assert [layer.chance_bits for layer in again.layers] == [layer.chance_bits for layer in usage.layers]


def test_domains_with_words_of_their_own_are_beyond_chance_and_equal_ones_are_not() -> None:
    model = make_model()
    for layer in measure_domains(model, make_documents(tell_apart=True)).layers:
        assert layer.is_beyond_chance and layer.information_bits > 3 * layer.chance_bits_high
        assert 0 < layer.chance_bits < layer.chance_bits_high
    layers = measure_domains(model, make_documents(tell_apart=False)).layers
    assert all(layer.information_bits < 2 * layer.chance_bits_high for layer in layers)


def test_a_packed_model_is_measured_too() -> None:
    documents = make_documents(tell_apart=True)
    usage = measure_domains(pack_transformer(make_model()), documents)
    plain = measure_domains(make_model(), documents)
    for packed, layer in zip(usage.layers, plain.layers, strict=True):
        assert packed.routes.sum() == layer.routes.sum()
        assert packed.information_bits == pytest.approx(layer.information_bits, rel=0.1)


def test_information_is_all_nothing_or_by_its_definition() -> None:
    assert information_bits(np.diag([5, 500, 50, 5])) == pytest.approx(2.0)
    assert information_bits(np.array([[1, 3], [100, 300]])) == pytest.approx(0.0)
    assert information_bits(np.array([[0, 0], [7, 7]])) == pytest.approx(0.0)  # a domain without routes
    routes = np.array([[8, 2, 0], [1, 1, 8]])
    given = routes / routes.sum(1, keepdims=True)
    total = sum(
        0.5 * given[d, e] * math.log2(given[d, e] / given[:, e].mean())
        for d in range(2)
        for e in range(3)
        if given[d, e]
    )
    assert information_bits(routes) == pytest.approx(total)


def test_labelled_text_is_read_and_cut(tiny_data: Path, tmp_path: Path) -> None:
    tokenizer = ShardSet.open(tiny_data).load_tokenizer()
    rows = [{"topic": "law" if n % 2 else 7, "text": f"The Work, part {n} of many."} for n in range(6)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(lines + "\n", encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    documents = read_labelled(tmp_path / "a.jsonl", tokenizer, label_field="topic")
    assert documents == read_labelled(tmp_path / "a.jsonl.gz", tokenizer, label_field="topic")
    assert [document.domain for document in documents] == ["7", "law"] * 3
    assert documents[1].ids == (tokenizer.end_of_text_id, *tokenizer.encode(str(rows[1]["text"])))
    few = read_labelled(tmp_path / "a.jsonl", tokenizer, label_field="topic", most_documents=1, most_tokens=3)
    assert few == [LabelledDocument(document.domain, document.ids[:3]) for document in documents[:2]]


def test_labelled_text_stands_behind_the_begin_token_where_the_tokenizer_puts_one(
    tmp_path: Path, beginning_tokenizer: Tokenizer
) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"topic": t, "text": "the Work"}) + "\n" for t in "ab"))
    documents = read_labelled(tmp_path / "a.jsonl", beginning_tokenizer, label_field="topic")
    expected = tuple(beginning_tokenizer.encode_prompt("the Work", add_special_tokens=True))
    assert [document.ids for document in documents] == [expected, expected]


def test_lone_surrogates_are_mended(tiny_data: Path, tmp_path: Path) -> None:
    tokenizer = ShardSet.open(tiny_data).load_tokenizer()
    rows = [{"topic": topic, "text": "x\ud83d"} for topic in ("a", "b\ud83d")]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    documents = read_labelled(tmp_path / "a.jsonl", tokenizer, label_field="topic")
    assert [tokenizer.decode(document.ids[1:]) for document in documents] == ["x\ufffd"] * 2
    assert [document.domain for document in documents] == ["a", "b\ufffd"]


def test_text_that_is_not_labelled_is_refused(tiny_data: Path, tmp_path: Path) -> None:
    tokenizer = ShardSet.open(tiny_data).load_tokenizer()
    path = tmp_path / "a.jsonl"
    with pytest.raises(DataError, match=r"does not exist; .*; check the path"):
        read_labelled(path, tokenizer, label_field="topic")
    for content, message in (
        ('{"text": "x", "subject": "law"}\n', r"line 1 has no 'topic'; its fields are text, subject; name"),
        ('{"text": "x", "topic": "law"}\n' * 2, r"has 1 domains in 'topic'; .*; name another"),
        ("[" * 100_000, r"cannot be read .*; fetch it again"),
        ('{"text": ', r"cannot be read .*; fetch it again"),
        ("", r"has 0 domains"),
        ("[1]\n", r"line 1 is no JSON object; .*; mend it"),
        ('{"text": "x", "topic": null}\n', r"line 1 has NoneType in the field 'topic'; .*--domain-field"),
        ('{"text": ["x"], "topic": "law"}\n', r"line 1 has list in the field 'text'; .*--text-field"),
    ):
        path.write_text(content, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            read_labelled(path, tokenizer, label_field="topic")
    path.write_text('{"text": null, "topic": 1}\n{"text": "x", "topic": 1}\n{"text": "y", "topic": "law"}\n')
    assert [document.domain for document in read_labelled(path, tokenizer, label_field="topic")] == ["1", "law"]
    damaged = bytearray(gzip.compress(b'{"text": "x", "topic": "law"}\n' * 1000))
    damaged[20:30] = b"\xff" * 10
    (tmp_path / "b.jsonl.gz").write_bytes(damaged)
    with pytest.raises(DataError, match=r"cannot be read \(.*Error -3.*; fetch it again"):
        read_labelled(tmp_path / "b.jsonl.gz", tokenizer, label_field="topic")


def test_a_model_without_experts_is_refused() -> None:
    dense = Transformer(ModelConfig.from_dict({**MODEL, "moe": None})).initialize(0)
    with pytest.raises(ConfigError, match=r"no MoE layers; .*; name a run"):
        measure_domains(dense, make_documents(tell_apart=True))
