import math

import numpy as np
import pytest

from moesaic.report.expert_load import ExpertWatch, hot_share, imbalance, load_entropy, name_unusual, relative_load
from moesaic.report.records import ExpertRecord


def record(*loads: list[float]) -> ExpertRecord:
    zeros = (0.0,) * len(loads)
    return ExpertRecord(
        layers=tuple(2 * place + 1 for place in range(len(loads))),
        load=tuple(tuple(load) for load in loads),
        drop_rate=zeros,
        entropy=zeros,
    )


def even(num_experts: int, **shares: float) -> list[float]:
    """An even load but for the experts named e0, e5, ..., whose share is given; the others take the rest evenly."""
    fixed = {int(name[1:]): share for name, share in shares.items()}
    rest = (1 - sum(fixed.values())) / max(1, num_experts - len(fixed))
    return [fixed.get(expert, rest) for expert in range(num_experts)]


@pytest.mark.parametrize("num_experts", [1, 2, 7, 128])
def test_limits_of_the_measures(num_experts: int) -> None:
    uniform = [1 / num_experts] * num_experts
    assert imbalance(uniform) == pytest.approx(1)
    assert load_entropy(uniform) == pytest.approx(1)
    assert relative_load(uniform) == pytest.approx(np.ones(num_experts))
    one_takes_all = [1.0] + [0.0] * (num_experts - 1)
    assert imbalance(one_takes_all) == num_experts
    assert load_entropy(one_takes_all) == (1 if num_experts == 1 else 0)


def test_measures_do_not_depend_on_the_order_or_on_the_scale() -> None:
    load = np.random.default_rng(0).dirichlet(np.ones(9))
    for measure in (imbalance, load_entropy):
        assert measure(load[::-1]) == pytest.approx(measure(load))
        assert measure(load * 1000) == pytest.approx(measure(load))


def test_a_layer_without_tokens_has_no_measure() -> None:
    assert math.isnan(imbalance([0.0, 0.0]))
    assert math.isnan(load_entropy([0.0, 0.0]))


@pytest.mark.parametrize("num_experts", [1, 2, 3, 4, 8, 16, 128])
def test_hot_is_reachable_and_never_even(num_experts: int) -> None:
    assert 1 <= hot_share(num_experts) <= 4
    if num_experts > 1:
        assert 1 < hot_share(num_experts) < num_experts


def test_an_even_load_names_nobody() -> None:
    assert name_unusual([record(even(8), even(16))] * 30) == []


def test_dead_and_hot_are_named_with_layer_and_numbers() -> None:
    warnings = name_unusual([record(even(8, e5=0.002), even(16, e3=0.4))] * 10)
    assert [(warning.layer, warning.kind, warning.experts) for warning in warnings] == [
        (1, "dead", (5,)),
        (3, "hot", (3,)),
    ]
    assert warnings[0].message.startswith("layer 1: expert 5 is dead (0.2 % of tokens, even share 12.5 %)")
    assert warnings[1].message.startswith("layer 3: expert 3 is hot (40.0 % of tokens, even share 6.2 %)")
    assert "moe.router.balance_loss" in warnings[0].message and "moe.capacity.factor" in warnings[1].message


def test_many_dead_experts_make_one_short_warning() -> None:
    load = [0.0] * 120 + [1 / 8] * 8
    dead, hot = name_unusual([record(load)] * 10)
    assert len(dead.experts) == 120 and len(hot.experts) == 8
    assert "experts 0, 1, 2, 3, 4, 5, 6, 7 and 112 more are dead" in dead.message
    assert len(dead.message) < 250


def test_unusual_means_sustained() -> None:
    odd, usual = record(even(8, e5=0.0)), record(even(8))
    assert name_unusual([odd] * 9) == []
    assert name_unusual([odd] * 5 + [usual] + [odd] * 9) == []
    assert name_unusual([usual] * 20 + [odd] * 10)[0].experts == (5,)
    assert name_unusual([odd] * 3, window=3)[0].experts == (5,)


def test_alternating_dead_experts_are_not_dead() -> None:
    history = [record(even(8, **{f"e{step % 2}": 0.0})) for step in range(20)]
    assert name_unusual(history) == []


def test_a_load_that_is_not_a_number_names_nobody() -> None:
    assert name_unusual([record([math.nan] * 4)] * 10) == []


def test_the_watch_names_once_and_again_after_recovery() -> None:
    odd, usual = record(even(8, e5=0.0)), record(even(8))
    watch = ExpertWatch(window=3)
    news = [watch.update(each) for each in [odd] * 6 + [usual] + [odd] * 4]
    assert [len(each) for each in news] == [0, 0, 1, 0, 0, 0, 0, 0, 0, 1, 0]
    assert watch.update(None) == []


def test_the_watch_names_only_the_new_expert() -> None:
    watch = ExpertWatch(window=2)
    for _ in range(3):
        watch.update(record(even(8, e5=0.0)))
    watch.update(record(even(8, e5=0.0, e6=0.0)))
    (warning,) = watch.update(record(even(8, e5=0.0, e6=0.0)))
    assert warning.experts == (6,)
