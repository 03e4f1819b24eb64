"""A token is drawn from exactly the distribution that the settings describe, and from nothing else."""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from moesaic.config.serve import Sampling
from moesaic.errors import ConfigError, GenerationError
from moesaic.kernels import select
from moesaic.kernels.sampling import _nucleus, _weights
from moesaic.serve.sampler import RequestError, SamplingState, sample, score_prompt


@pytest.fixture(params=["kernels", "reference"], autouse=True)
def draws_with(request: pytest.FixtureRequest) -> Iterator[None]:
    """Draws in C++, where there is a processor for it, and by the definition."""
    with nullcontext() if request.param == "kernels" else select.forced("reference"):
        yield


# One token, less than a block of the sampler, one block and more, more than are sorted whole.
SIZES = [1, 2, 7, 128, 129, 5000]
PROMPT = [3, 1, 3]


def random_logits(size: int, seed: int = 0, *, scale: float = 3.0, ties: bool = False) -> np.ndarray:
    logits = np.random.default_rng(seed).normal(scale=scale, size=size).astype(np.float32)
    return np.round(logits) if ties else logits


def new_state(size: int, *, seed: int = 0, prompt: list[int] | None = None, stop_ids: tuple[int, ...] = (),
              **settings: Any) -> SamplingState:  # fmt: skip
    return SamplingState(Sampling(**settings), prompt or [], vocab_size=size, seed=seed, stop_ids=stop_ids)


def probabilities(logits: np.ndarray, *, temperature: float = 1.0, top_k: int | None = None, top_p: float = 1.0,
                  min_p: float = 0.0) -> np.ndarray:  # fmt: skip
    """By definition, over the sorted vocabulary, in double."""
    order = np.argsort(-logits, kind="stable")[:top_k]
    falling = logits[order].astype(np.float64)
    weights = np.exp((falling - falling[0]) / temperature)
    weights /= weights.sum()
    weights[weights.cumsum() - weights >= top_p] = 0
    weights[weights < min_p * weights[0]] = 0
    result = np.zeros(len(logits))
    result[order] = weights / weights.sum()
    return result


def drawn(logits: np.ndarray, count: int, **settings: Any) -> np.ndarray:
    """How often each token comes in count draws."""
    state, counts = new_state(len(logits), **settings), np.zeros(len(logits))
    for _ in range(count):
        token = sample(logits, state).token_id
        counts[token] += 1
        state.append(token)
    return counts


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 3.0},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": 90, "temperature": 2.0},
    {"top_p": 0.3},
    {"top_p": 0.9, "temperature": 1.7},
    {"top_p": 0.999999},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"top_k": 20, "top_p": 0.7, "min_p": 0.05, "temperature": 1.3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ties", [False, True])
def test_draws_follow_the_definition(size: int, settings: dict[str, Any], ties: bool) -> None:
    logits = random_logits(size, 1, ties=ties)
    expected = probabilities(logits, **settings)
    count = 1500 if (expected > 0).sum() > 1 else 50
    counts = drawn(logits, count, seed=5, **settings)
    assert counts[expected == 0].sum() == 0
    # The rare ones together: the test holds for expected counts of five or more.
    common = expected * count >= 5
    bins = np.append(counts[common], counts[~common].sum()), np.append(expected[common], expected[~common].sum())
    if bins[1][-1] * count < 5:
        bins = (bins[0][:-1], bins[1][:-1] / bins[1][:-1].sum() * bins[0][:-1].sum() / count)
    if len(bins[0]) > 1:
        assert chisquare(bins[0], bins[1] * count).pvalue > 1e-5


@pytest.mark.parametrize("scale", [0.01, 1.0, 12.0])
@pytest.mark.parametrize("top_p", [1e-9, 0.02, 0.5, 0.95, 0.9999, 1 - 1e-12])
@pytest.mark.parametrize("ties", [False, True])
def test_top_p_leaves_exactly_the_fewest(scale: float, top_p: float, ties: bool) -> None:
    """On vocabularies too large to be sorted, every token that may be drawn can be, and no other."""
    for temperature in (0.3, 1.0, 40.0):
        logits = random_logits(20_000, 7, scale=scale, ties=ties)
        weights = _weights(logits, logits.max(), temperature)
        kept = _nucleus(logits, weights, top_p, logits.max(), temperature)
        expected = np.flatnonzero(probabilities(logits, temperature=temperature, top_p=top_p))
        # fp32 weights and another order of sums: where a share is met is known to 1e-6 of the whole.
        assert np.all(np.diff(kept) > 0)
        order = np.argsort(-logits, kind="stable")
        np.testing.assert_array_equal(np.sort(order[: len(kept)]), kept)
        exact = np.exp((logits[order].astype(np.float64) - logits.max()) / temperature)
        reached = (exact / exact.sum()).cumsum()
        assert reached[len(kept) - 1] >= top_p - 1e-6
        assert len(kept) == 1 or reached[len(kept) - 2] < top_p + 1e-6
        # Next to 1 the two definitions differ by what rounding adds up to.
        assert ties or top_p > 0.9999 or abs(len(kept) - len(expected)) <= max(1, 2e-3 * len(expected))


def test_equal_logits_are_all_drawn() -> None:
    for settings in ({}, {"top_p": 0.5}, {"top_k": 3000}):
        logits = np.zeros(6000, dtype=np.float32)
        counts = drawn(logits, 500, **settings)
        # Of equals the first are kept.
        last = np.flatnonzero(counts)[-1]
        assert (counts > 0).sum() > 400 and last < (3000 if settings else 6000)


@pytest.mark.parametrize("size", SIZES)
def test_the_likeliest_is_the_first_of_equals(size: int) -> None:
    for seed in range(5):
        logits = random_logits(size, seed, ties=True)
        oracle = int(np.argsort(-logits, kind="stable")[0])
        for settings in ({"temperature": 0}, {"top_k": 1}, {"temperature": 1e-300}, {"top_p": 1e-9}):
            if settings == {"temperature": 1e-300} and (logits == logits.max()).sum() > 1:
                continue  # equals stay equally likely
            assert sample(logits, new_state(size, **settings)).token_id == oracle


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-31, 1e31, 1e300])
def test_temperatures_beyond_fp32_are_as_defined(temperature: float) -> None:
    logits = np.array([5.0, 5.0, -np.inf, 4.0], dtype=np.float32)
    for settings in ({}, {"top_p": 0.9999}, {"top_k": 4}, {"min_p": 0.5}):
        counts = drawn(logits, 60, temperature=temperature, **settings)
        assert set(np.flatnonzero(counts)) == ({0, 1, 3} if temperature > 1 else {0, 1})


def test_penalties_and_bias_are_as_described() -> None:
    logits = np.array([2.0, -1.0, 0.5, 3.0, 0.0, -np.inf], dtype=np.float32)
    state = new_state(
        6, prompt=[1, 3, 3], repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25,
        logit_bias={0: 1.5, 2: -100}
    )  # fmt: skip
    for token in (4, 3, 4, 0):
        state.append(token)
    expected = [2 / 2 - 0.5 - 0.25 + 1.5, -1 * 2, -np.inf, 3 / 2 - 0.5 - 0.25, 0 - 0.5 - 2 * 0.25, -np.inf]
    np.testing.assert_allclose(state.scores(logits), expected)
    assert logits[0] == 2.0  # what it was given stays as it is


def test_every_new_token_counts_however_many_there_are() -> None:
    state = new_state(500, frequency_penalty=1.0, presence_penalty=0.5)
    source = np.random.default_rng(0)
    tokens = source.integers(0, 400, size=1000).tolist()
    for token in tokens:
        state.append(token)
    counts = np.bincount(tokens, minlength=500)
    np.testing.assert_array_equal(-state.scores(np.zeros(500, dtype=np.float32)), counts + 0.5 * (counts > 0))


def test_a_fork_goes_on_by_itself() -> None:
    settings: dict[str, Any] = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": 0.25}
    logits = np.linspace(-1, 1, 64, dtype=np.float32)
    made = [SamplingState(Sampling(**settings), [1, 2, 3], vocab_size=64, seed=5) for _ in range(2)]
    for state in made:
        state.append(7)
    state, same = made
    fork = state.fork()
    for token in [*range(60), 7]:
        fork.append(token)
    np.testing.assert_array_equal(state.scores(logits), same.scores(logits))
    assert state.uniform() == same.uniform() != fork.uniform()
    for token in [*range(60), 7]:
        same.append(token)
    np.testing.assert_array_equal(fork.scores(logits), same.scores(logits))
    assert fork.uniform() == same.uniform()


def test_a_forbidden_token_never_comes_at_any_temperature() -> None:
    logits = np.array([50.0, 0.0], dtype=np.float32)
    assert drawn(logits, 200, temperature=100.0, logit_bias={0: -100})[0] == 0
    assert drawn(logits, 200, temperature=100.0)[0] > 0


def test_before_min_tokens_nothing_ends_the_text() -> None:
    logits = np.array([9.0, 5.0, 1.0, 0.0], dtype=np.float32)
    state = new_state(4, temperature=0, min_tokens=2, stop_ids=(0, 1), logprobs=0)
    for expected in (2, 2, 0, 0):
        sampled = sample(logits, state)
        assert sampled.token_id == expected
        # What the model said, not what was allowed of it.
        assert sampled.logprob == pytest.approx(float(torch.log_softmax(torch.from_numpy(logits), 0)[expected]))
        state.append(expected)
    state = new_state(4, temperature=0, min_tokens=2, stop_ids=(0, 1))
    assert sample(logits, state, np.array([True, False, False, True])).token_id == 3
    # A grammar that is complete leaves nothing but the end.
    assert sample(logits, state, np.array([False, True, False, False])).token_id == 1


@pytest.mark.parametrize("settings", [*SETTINGS, {"temperature": 0}], ids=str)
def test_only_what_the_mask_allows_comes(settings: dict[str, Any]) -> None:
    logits, source = random_logits(3000, 3), np.random.default_rng(0)
    state = new_state(3000, **settings)
    for _ in range(20):
        mask = source.random(3000) < 0.01
        token = sample(logits, state, mask).token_id
        assert mask[token]
        state.append(token)
    assert sample(logits, state, np.arange(3000) == 17).token_id == 17


@pytest.mark.parametrize("size", [33, 5000])
def test_a_row_is_the_same_whatever_else_is_in_the_batch(size: int) -> None:
    settings = [*SETTINGS, {"temperature": 0}, {"logprobs": 3, "repetition_penalty": 1.3, "frequency_penalty": 0.3}]
    states = [new_state(size, seed=seed, prompt=[1, 5], logprobs=each.get("logprobs", 2),
                        **{k: v for k, v in each.items() if k != "logprobs"})
              for seed, each in enumerate(settings)]  # fmt: skip
    for state in states:
        state.append(5)
    logits = np.stack([random_logits(size, seed) for seed in range(len(states))])
    masks = [None if place % 3 else np.arange(size) % 2 == 0 for place in range(len(states))]

    def sampled(rows: Any) -> list[Any]:
        return [sample(*each) for each in zip(rows, states, masks, strict=True)]

    alone = [sample(row.copy(), *each) for row, *each in zip(logits, states, masks, strict=True)]
    assert sampled(logits) == alone
    # At every alignment of memory, and of every second column.
    padded = np.zeros((len(states), size + 7), dtype=np.float32)
    for shift in range(8):
        padded[:, shift : shift + size] = logits
        assert sampled(padded[:, shift : shift + size]) == alone
    assert sampled(np.repeat(logits, 2, 1)[:, ::2]) == alone


def test_a_draw_is_a_function_of_seed_and_place() -> None:
    logits = random_logits(200, 4, scale=1.0)

    def tokens(seed: int) -> list[int]:
        state, chosen = new_state(200, seed=seed), []
        for _ in range(12):
            # Asking twice, as drafting ahead does, changes nothing.
            assert sample(logits, state) == sample(logits, state)
            chosen.append(sample(logits, state).token_id)
            state.append(chosen[-1])
        return chosen

    whole = tokens(7)
    assert whole == tokens(7) and whole != tokens(8) and len(set(whole)) > 6
    resumed = new_state(200, seed=7)
    for token in whole[:5]:
        resumed.append(token)
    assert sample(logits, resumed).token_id == whole[5]
    assert 0 <= new_state(4, seed=-(2**70)).uniform() < 1


def test_random_numbers_are_uniform_over_seeds_and_over_places() -> None:
    state, first = new_state(4, seed=0), []
    for _ in range(2000):
        first.append(state.uniform())
        state.append(0)
    second = [new_state(4, seed=seed).uniform() for seed in range(2000)]
    for numbers in (first, second):
        counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
        assert chisquare(counts).pvalue > 1e-4
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("top", [0, 1, 4, 10_000])
def test_log_probabilities_are_those_of_the_penalised_logits(size: int, top: int) -> None:
    logits = random_logits(size, 6, ties=True)
    state = new_state(size, prompt=[0], repetition_penalty=1.5, temperature=0.7, logprobs=top, logit_bias={0: 2.0})
    sampled = sample(logits, state)
    exact = torch.log_softmax(torch.from_numpy(state.scores(logits)).double(), 0).numpy()
    assert sampled.logprob == pytest.approx(exact[sampled.token_id], abs=2e-5)
    order = np.argsort(-state.scores(logits), kind="stable")[:top]
    assert [each.token_id for each in sampled.top_logprobs] == order.tolist()
    np.testing.assert_allclose([each.logprob for each in sampled.top_logprobs], exact[order], atol=2e-5)


def test_log_probabilities_cost_nothing_where_not_asked_and_leave_out_the_impossible() -> None:
    logits = np.array([1.0, -np.inf, 0.0], dtype=np.float32)
    plain = sample(logits, new_state(3))
    assert (plain.logprob, plain.top_logprobs) == (None, ())
    sampled = sample(logits, new_state(3, logprobs=3))
    assert [each.token_id for each in sampled.top_logprobs] == [0, 2]


@pytest.mark.parametrize("top", [0, 2])
def test_a_prompts_tokens_have_the_log_probabilities_of_their_rows(top: int) -> None:
    logits = torch.from_numpy(np.stack([random_logits(300, seed) for seed in range(5)]))
    targets = [0, 299, 17, 17, 4]
    exact = torch.log_softmax(logits.double(), 1)
    for place, token in enumerate(score_prompt(logits, targets, top=top)):
        assert token.token_id == targets[place]
        assert token.logprob == pytest.approx(float(exact[place, targets[place]]), abs=2e-5)
        assert [each.token_id for each in token.top_logprobs] == exact[place].topk(top).indices.tolist()
    assert score_prompt(logits[:0], [], top=top) == []


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("settings", [{"temperature": 0}, {}, {"top_p": 0.5}, {"top_k": 3}, {"logit_bias": {1: 5}}])
def test_broken_logits_are_said_to_be_the_models_fault(value: float, settings: dict[str, Any]) -> None:
    logits = random_logits(300)
    logits[111] = value
    with pytest.raises(GenerationError, match=r"the largest logit is (nan|inf); .*; the model's weights"):
        sample(logits, new_state(300, **settings))
    # A mask does not hide it.
    with pytest.raises(GenerationError, match="the largest logit is"):
        sample(logits, new_state(300, **settings), np.arange(300) < 5)
    with pytest.raises(GenerationError, match="the largest logit is"):
        score_prompt(torch.from_numpy(logits)[None], [0], top=1)
    state = new_state(300)
    with pytest.raises(GenerationError):
        sample(logits, state)
    assert sample(random_logits(300), state) == sample(random_logits(300), new_state(300))


def test_nothing_to_choose_from_is_an_error() -> None:
    logits = np.array([1.0, 2.0, -np.inf], dtype=np.float32)
    for settings in ({"temperature": 0}, {}):
        with pytest.raises(GenerationError, match=r"none of the tokens .*; one is required; the model's") as caught:
            sample(logits, new_state(3, **settings), np.array([False, False, True]))
        assert not isinstance(caught.value, RequestError)
        with pytest.raises(GenerationError):
            sample(np.full(3, -np.inf, dtype=np.float32), new_state(3, **settings))
        with pytest.raises(GenerationError):
            sample(logits, new_state(3, logit_bias={0: -100, 1: -100}, **settings))
    with pytest.raises(RequestError, match="out of all proportion"):
        sample(logits * np.float32(1e38), new_state(3, prompt=[1], repetition_penalty=0.01))


@pytest.mark.parametrize(
    ("mask", "settings", "message"),
    [
        ([], {}, "the grammar allows no token here; one is required; mend the grammar"),
        ([], {"stop_token_ids": tuple(range(8))}, r"take .* out of stop_token_ids \(tokens 0, 1, 2, 3, 4 and 3 more\)"),
        ([2], {"logit_bias": {2: -100}}, "grammar allows only token 2 and logit_bias forbids token 2, which leaves"),
        ([2, 3], {"logit_bias": {2: -100, 3: -100, 5: 7}}, "only tokens 2, 3 and logit_bias forbids tokens 2, 3,"),
        ([2, 3], {"logit_bias": {2: -100}, "min_tokens": 4, "stop_ids": (3,)},
         r"only tokens 2, 3 and min_tokens \(4\) forbids what ends the text and logit_bias forbids token 2,"),
        (None, {"logit_bias": dict.fromkeys(range(8), -100)}, "^logit_bias forbids tokens 0, 1, 2, 3, 4 and 3 more, "),
        (None, {"min_tokens": 1, "stop_ids": tuple(range(8))}, r"^min_tokens \(1\) forbids what ends the text, which"),
        (None, {"min_tokens": 1, "stop_ids": (1,), "logit_bias": dict.fromkeys((0, *range(2, 8)), -100)},
         r"^min_tokens \(1\) .* and logit_bias forbids tokens 0, 2, 3, 4, 5 and 2 more, .*; one is required; take one"),
    ],
)  # fmt: skip
def test_wishes_that_leave_no_token_are_named(mask: list[int] | None, settings: dict[str, Any], message: str) -> None:
    allowed = None if mask is None else np.isin(np.arange(8), mask)
    for temperature in (0.0, 1.0):
        with pytest.raises(RequestError, match=message):
            sample(random_logits(8), new_state(8, temperature=temperature, **settings), allowed)


@pytest.mark.parametrize("settings", [{"logit_bias": {7: 1.0}}, {"logit_bias": {-1: 1.0}}, {"stop_token_ids": (9,)}])
def test_ids_outside_the_vocabulary_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"names token id -?\d; ids from 0 to 6 are required; use the ids"):
        new_state(7, **settings)
