"""Every score and text of the fast scorer against the plain one, and both against logits written out here."""

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from moesaic.config.model import ModelConfig
from moesaic.errors import GenerationError
from moesaic.evaluate.batched import BatchedScorer, group_by_prefix
from moesaic.evaluate.scorer import Pair, PlainScorer, Prompt, Score, rolling_pairs, score_texts
from moesaic.model.generate import generate
from moesaic.model.pack import pack_transformer
from moesaic.model.transformer import Transformer

VOCAB = 60
MODEL = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 4,
    "num_kv_heads": 2,
    "intermediate_size": 48,
    "max_positions": 80,
}
MODELS: dict[str, dict[str, Any]] = {
    "dense": {},
    "learned-positions": {"positions": "learned", "norm": "layernorm", "activation": "gelu"},
    "moe": {
        "moe": {
            "num_experts": [4, 8],
            "top_k": 2,
            "residual": "softmax",
            "router": {"noise": "jitter", "jitter_epsilon": 0.5},
            "capacity": {"factor": 0.1, "min_capacity": 1, "drop_policy": "random"},
        },
        "dropout": 0.5,
    },
    "latent": {
        "num_kv_heads": 4,
        "latent_attention": {"kv_rank": 16, "nope_head_dim": 8, "rope_head_dim": 8, "value_head_dim": 8},
    },
}


def make_model(name: str) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_dict({**MODEL, **MODELS[name]})).initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():  # far from uniform, so that a wrong context shows
            parameter.mul_(8.0 if parameter.dim() > 1 else 1.0)
    return model


def make_pairs(seed: int = 0) -> list[Pair]:
    """Questions with choices, of one token or many, some the beginning of others; the same twice; single ones."""
    rng = random.Random(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCAB) for _ in range(count))

    pairs = []
    for length in (1, 7, 8, 9, 31, 32, 33, 50, 64):
        context = draw(length)
        pairs += [Pair(context, draw(count)) for count in (1, 1, 2, 5)]
        longer = draw(6)
        pairs += [Pair(context, longer[:3]), Pair(context, longer), Pair(context, longer)]
        pairs.append(Pair(context + draw(3), draw(4)))
    pairs += [Pair(draw(90), draw(3)), Pair(draw(78), draw(3)), Pair(draw(2), draw(80)), Pair(draw(3), draw(1))]
    rng.shuffle(pairs)
    return pairs


def assert_same(scores: Sequence[Score], expected: Sequence[Score], *, tolerance: float) -> None:
    assert len(scores) == len(expected)
    for score, other in zip(scores, expected, strict=True):
        assert score.log_likelihood == pytest.approx(other.log_likelihood, rel=tolerance, abs=tolerance)
        assert score.is_greedy == other.is_greedy


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_plain_score_is_the_sum_of_log_probabilities(name: str) -> None:
    model = make_model(name).train()
    for pair, score in zip(make_pairs()[:12], PlainScorer(model).score(make_pairs()[:12]), strict=True):
        tokens = (pair.context + pair.continuation)[-81:]
        assert model.training
        model.eval()
        with torch.no_grad():
            logits = model.logits(model(torch.tensor([tokens[:-1]])).hidden[0])
        model.train()
        total, is_greedy = 0.0, True
        for place in range(len(tokens) - len(pair.continuation), len(tokens)):
            row = logits[place - 1].double()
            total += float(row[tokens[place]] - row.exp().sum().log())
            is_greedy &= int(row.argmax()) == tokens[place]
        assert score.log_likelihood == pytest.approx(total, rel=1e-5) and score.is_greedy == is_greedy


@pytest.mark.parametrize("batch_tokens", [1, 100, 100_000])
@pytest.mark.parametrize("name", list(MODELS))
def test_batches_and_shared_prefixes_change_no_score(name: str, batch_tokens: int) -> None:
    model, pairs = make_model(name).train(), make_pairs()
    expected = PlainScorer(model).score(pairs)
    shares: list[float] = []
    scores = BatchedScorer(model, batch_tokens=batch_tokens).score(pairs, progress=shares.append)
    assert_same(scores, expected, tolerance=1e-4)
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert model.training


def test_likeliest_continuations_are_found_greedy() -> None:
    model = make_model("moe")
    context = (5, 6, 7, 8, 9, 10, 11, 12, 13)
    likeliest = tuple(generate(model, context, max_new_tokens=6))
    pairs = [Pair(context, likeliest[:count]) for count in (1, 3, 6)]
    pairs += [Pair(context, (*likeliest[:3], (likeliest[3] + 1) % VOCAB)), Pair(context, ((likeliest[0] + 1) % VOCAB,))]
    for scorer in (PlainScorer(model), BatchedScorer(model)):
        assert [score.is_greedy for score in scorer.score(pairs)] == [True, True, True, False, False]


@pytest.mark.parametrize("name", ["dense", "moe"])
def test_a_packed_model_is_scored_the_same_way(name: str) -> None:
    model = pack_transformer(make_model(name))
    pairs = make_pairs()
    expected = PlainScorer(model).score(pairs)
    scores = BatchedScorer(model, batch_tokens=300).score(pairs)
    # bf16, and two kernels for attention; the model is far from uniform on purpose.
    for score, other in zip(scores, expected, strict=True):
        assert score.log_likelihood == pytest.approx(other.log_likelihood, rel=0.1, abs=0.5)
    assert BatchedScorer(model, batch_tokens=300).score(pairs) == scores


def test_groups_hold_every_sequence_once_and_save_tokens() -> None:
    sequences = list({pair.context + pair.continuation[:-1] for pair in make_pairs()})
    for most_tokens in (1, 60, 10_000):
        groups = group_by_prefix(sequences, most_tokens=most_tokens)
        members = [group.prefix + rest for group in groups for rest in group.rests]
        assert sorted(members) == sorted(sequences)
        assert all(group.num_tokens <= most_tokens or len(group.rests) == 1 for group in groups)
        assert sum(group.rests.count(()) for group in groups) <= len(groups)
    assert sum(group.num_tokens for group in groups) < 0.6 * sum(map(len, sequences))
    question = tuple(range(30))
    (group,) = group_by_prefix([(*question, choice, 50) for choice in (40, 41, 42)], most_tokens=100)
    assert group.prefix == question and group.rests == ((40, 50), (41, 50), (42, 50))
    assert len(group_by_prefix([(1, 2, 3), (1, 2, 4)], most_tokens=100)) == 2  # too little to share


@pytest.mark.parametrize("length", [1, 9, 10, 11, 25, 30])
def test_rolling_predicts_every_token_once_from_as_much_as_fits(length: int) -> None:
    tokens = list(range(1, length + 1))
    pairs = list(rolling_pairs(tokens, first=0, max_length=10))
    assert [token for pair in pairs for token in pair.continuation] == tokens
    for number, pair in enumerate(pairs):
        both = pair.context + pair.continuation
        assert list(both) == list(range(both[0], both[-1] + 1)) and len(pair.context) >= 1
        assert both[0] == 0 if number == 0 else len(both) == 11
    scorer = PlainScorer(make_model("dense"))
    (total,) = score_texts(scorer, [tokens], first=0)
    whole = scorer.score([Pair((0,), tuple(tokens))])[0].log_likelihood
    assert total == pytest.approx(whole, rel=1e-5)
    assert score_texts(scorer, [tokens, [], tokens], first=0) == pytest.approx([total, 0.0, total])


@pytest.mark.parametrize("name", list(MODELS))
def test_texts_generated_together_are_those_generated_alone(name: str) -> None:
    model, rng = make_model(name).train(), random.Random(1)
    prompts = [
        Prompt(
            tuple(rng.randrange(VOCAB) for _ in range(length)),
            max_new_tokens=count,
            is_done=lambda new, stop=stop: new[-1] == stop,
            temperature=temperature,
            seed=length,
        )
        for length, count, stop, temperature in [
            (1, 20, 3, 0.0), (31, 40, 4, 0.0), (33, 1, 5, 0.0), (60, 20, 6, 0.0), (5, 9, 7, 1.0), (8, 30, 8, 0.0),
        ]
    ]  # fmt: skip
    first = generate(model, prompts[1].ids, max_new_tokens=40)
    prompts.append(Prompt(prompts[1].ids, 40, lambda new: list(new[-2:]) == first[3:5]))
    expected = PlainScorer(model).generate(prompts)
    assert expected[1] == first[: len(expected[1])]
    for batch_tokens in (1, 60, 10_000):
        shares: list[float] = []
        found = BatchedScorer(model, batch_tokens=batch_tokens).generate(prompts, progress=shares.append)
        assert found == expected, batch_tokens
        assert shares[-1] == 1.0 and model.training
    assert max(map(len, expected)) > 2 and expected[-1][-2:] == first[3:5]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair((), (1,)), r"pair of 0 and 1 tokens .*; put the begin"),
        (Pair((1,), ()), r"pair of 1 and 0 tokens"),
        (Pair((1,), (2,) * 81), r"81 tokens; the model has 80 positions .*; shorten"),
        (Pair((1, VOCAB), (2,)), r"token id 60; ids from 0 to 59 .*; use the run's"),
        (Pair((1,), (-1,)), r"token id -1"),
    ],
)
def test_pairs_that_have_no_score_are_refused(pair: Pair, message: str) -> None:
    model = make_model("dense")
    for scorer in (PlainScorer(model), BatchedScorer(model)):
        with pytest.raises(GenerationError, match=message):
            scorer.score([pair])


@pytest.mark.parametrize(("ids", "count"), [((), 1), ((1,), 0), ((1,) * 80, 1), ((VOCAB,), 1)])
def test_prompts_that_cannot_be_continued_are_refused(ids: tuple[int, ...], count: int) -> None:
    for scorer in (PlainScorer(make_model("dense")), BatchedScorer(make_model("dense"))):
        with pytest.raises(GenerationError):
            scorer.generate([Prompt(ids, count, lambda new: False)])


def test_scores_do_not_pass_through_logits_of_whole_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("dense")
    rows: list[int] = []
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: rows.append(hidden.shape[0]) or logits(hidden))
    monkeypatch.setattr("moesaic.evaluate.batched._CHUNK_ELEMENTS", 4 * VOCAB)
    pairs = make_pairs()
    scores = BatchedScorer(model).score(pairs)
    assert max(rows) <= 4 and sum(rows) <= sum(len(pair.continuation) for pair in pairs)
    assert all(math.isfinite(score.log_likelihood) for score in scores)
