"""Tokens drawn in C++ are those that the definition draws, but where a random number falls between two of them."""

from typing import Any

import numpy as np
import pytest
import torch

from moesaic.kernels import sampling, select
from moesaic.kernels.sampling import Floats, RowDraw, draw_rows, log_totals

# Less than a vector, than a block, blocks and a part of one, and a vocabulary of usual size.
SIZES = [1, 5, 16, 63, 64, 65, 1000, 4 * 1024 + 3, 32_003]
SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.4},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 20, "top_p": 0.8, "temperature": 0.6},
    {"top_k": 20, "min_p": 0.2},
    {"top_k": 12, "top_p": 0.6, "min_p": 0.1, "temperature": 1.4},
    {"top_p": 0.1},
    {"top_p": 0.9, "temperature": 0.7},
    {"top_p": 0.95, "min_p": 0.03},
    {"min_p": 0.1},
    {"min_p": 1.0},
]


def settings_of(**given: Any) -> dict[str, Any]:
    return {"temperature": 1.0, "top_k": None, "top_p": 1.0, "min_p": 0.0} | given


def draw(scores: Floats, best: int, **settings: Any) -> int:
    (token,) = draw_rows(scores[None], [RowDraw(row=0, best=best, **settings)])
    return token


def shares_of(scores: Floats, **given: Any) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that are left, in the order in which their shares are added up, and these, in double."""
    settings = settings_of(**given)
    order = np.argsort(-scores, kind="stable")
    has_top_k = settings["top_k"] is not None and settings["top_k"] < len(scores)
    if has_top_k:
        order = order[: settings["top_k"]]
    weights = np.exp((scores[order].astype(np.float64) - scores.max()) / settings["temperature"])
    if settings["top_p"] < 1:
        through = weights.cumsum() / weights.sum()
        order = order[: 1 + int(np.searchsorted(through, settings["top_p"]))]
        weights = weights[: len(order)]
    order = order[weights >= np.float32(settings["min_p"])]
    if not has_top_k:
        order = np.sort(order)
    weights = np.exp((scores[order].astype(np.float64) - scores.max()) / settings["temperature"])
    return order, weights / weights.sum()


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("ties", [False, True])
def test_draws_are_those_of_the_definition(kernels: str, settings: dict[str, Any], ties: bool) -> None:
    source = np.random.default_rng(3)
    for size in SIZES:
        scores = source.normal(scale=4.0, size=size).astype(np.float32)
        if ties:
            scores = np.round(scores)
        order, shares = shares_of(scores, **settings)
        above = shares.cumsum()
        for uniform in [0.0, 1 - 2**-53, *source.random(40)]:
            token = draw(scores, int(scores.argmax()), uniform=uniform, **settings_of(**settings))
            (place,) = np.flatnonzero(order == token)  # one of those that are left
            # fp32 weights: where one token's share ends is known to about 1e-6 of all.
            assert above[place] - shares[place] - 2e-6 <= uniform <= above[place] + 2e-6, (size, uniform, token)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_usual_draws_are_the_kernels_own(
    compiled_kernels: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The definition is there for the few that the kernels leave to it."""
    monkeypatch.setattr(sampling, "_draw", None)
    scores = np.random.default_rng(1).normal(scale=6.0, size=32_000).astype(np.float32)
    assert 0 <= draw(scores, int(scores.argmax()), uniform=0.5, **settings_of(**settings)) < 32_000


@pytest.mark.parametrize("size", [65, 5000])
def test_rows_are_drawn_side_by_side_as_alone(kernels: str, size: int) -> None:
    source = np.random.default_rng(6)
    scores = source.normal(scale=3.0, size=(7, size)).astype(np.float32)
    draws = [
        RowDraw(row=row, best=int(scores[row].argmax()), uniform=uniform, **settings_of(**settings))
        for settings in (*SETTINGS, {"temperature": 1e-35}, {"top_k": size - 1})
        for row, uniform in zip(source.permutation(7)[:5], source.random(5), strict=True)
    ]
    together = draw_rows(scores, draws)
    assert together == [draw_rows(scores, [each])[0] for each in draws]
    assert draw_rows(scores, []) == []
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert draw_rows(scores, draws) == together
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 17_000},  # more than there are blocks
        {"top_k": 1 << 70},
        {"top_p": 0.999999, "temperature": 50.0},  # more than are sorted
        {"top_p": 0.9999},  # more than those that are looked at have
        {"min_p": 1e-12, "temperature": 1.0},
        {"temperature": 1e-35},
        {"temperature": 1e35, "top_p": 0.5},
    ],
    ids=str,
)
def test_what_the_kernels_leave_is_drawn_by_the_definition(kernels: str, settings: dict[str, Any]) -> None:
    scores = np.random.default_rng(2).normal(size=20_000).astype(np.float32)
    given = settings_of(**settings)
    tokens = [draw(scores, int(scores.argmax()), uniform=place / 16, **given) for place in range(16)]
    with select.forced("reference"):
        assert tokens == [draw(scores, int(scores.argmax()), uniform=place / 16, **given) for place in range(16)]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_forbidden_tokens_never_come(kernels: str, settings: dict[str, Any]) -> None:
    source = np.random.default_rng(4)
    for size in (70, 5000):
        scores = source.normal(size=size).astype(np.float32)
        allowed = source.choice(size, 9, replace=False)
        masked = np.full(size, -np.inf, dtype=np.float32)
        masked[allowed] = scores[allowed]
        for uniform in [0.0, 1 - 2**-53, *source.random(20)]:
            assert draw(masked, int(masked.argmax()), uniform=uniform, **settings_of(**settings)) in allowed
        alone = np.full(size, -np.inf, dtype=np.float32)
        alone[size - 1] = -3e38
        assert draw(alone, size - 1, uniform=0.7, **settings_of(**settings)) == size - 1


def test_equals_are_told_apart_by_their_place(compiled_kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_draw", None)
    scores = np.zeros(4000, dtype=np.float32)
    scores[::2] = -0.0
    seen = {draw(scores, 0, uniform=place / 64, **settings_of(top_k=10)) for place in range(64)}
    assert seen == set(range(10))


def test_a_row_is_read_wherever_it_lies(kernels: str) -> None:
    scores = np.random.default_rng(5).normal(size=3001).astype(np.float32)
    wide = np.zeros((3001, 2), dtype=np.float32)
    wide[:, 1] = scores
    shifted = np.zeros(3010, dtype=np.float32)
    shifted[3:3004] = scores
    for settings in SETTINGS:
        tokens = {
            draw(row, int(scores.argmax()), uniform=0.37, **settings_of(**settings))
            for row in (scores, wide[:, 1], shifted[3:3004])
        }
        assert len(tokens) == 1


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("ties", [False, True])
def test_log_totals_and_the_likeliest_are_as_defined(kernels: str, size: int, ties: bool) -> None:
    scores = np.random.default_rng(7).normal(scale=5.0, size=(9, size)).astype(np.float32)
    if ties:
        scores = np.round(scores)
    scores[3] += np.float32(1000.0)  # beyond what e to it could be
    scores[4] = -3e38
    exact = torch.logsumexp(torch.from_numpy(scores).double(), -1).numpy()
    for top in (0, 1, 5, 40, size):
        if top > size:
            continue
        totals, likeliest = log_totals(scores, top)
        np.testing.assert_allclose(totals, exact, rtol=1e-6, atol=1e-6)
        np.testing.assert_array_equal(likeliest, np.argsort(-scores, axis=-1, kind="stable")[:, :top])
        assert log_totals(scores[:0], top)[0] == []
    wide = np.repeat(scores, 2, 1)[:, ::2]
    assert log_totals(wide, 1)[0] == log_totals(scores, 1)[0]
    with select.forced("reference"):
        np.testing.assert_allclose(log_totals(scores)[0], exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("place", [0, 15, 16, 63, 64, 66])
def test_rows_that_are_not_finite_are_told_and_spoil_no_other(kernels: str, place: int) -> None:
    scores = np.random.default_rng(8).normal(size=(6, 67)).astype(np.float32)
    clean = log_totals(scores, 2)
    broken = scores.copy()
    broken[1, place], broken[2, place], broken[3, place] = np.nan, np.inf, -np.inf
    broken[4] = -np.inf
    totals, likeliest = log_totals(broken, 2)
    assert np.isnan([totals[row] for row in (1, 2, 4)]).all() and not likeliest[[1, 2, 4]].any()
    exact = torch.logsumexp(torch.from_numpy(broken[3]).double(), 0)
    assert totals[3] == pytest.approx(float(exact), abs=1e-6)
    assert (totals[0], totals[5]) == (clean[0][0], clean[0][5])
    np.testing.assert_array_equal(likeliest[[0, 5]], clean[1][[0, 5]])
