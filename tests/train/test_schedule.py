import itertools
import math

import pytest

from moesaic.config.train import ScheduleConfig
from moesaic.train.schedule import learning_rate

TOTAL = 10_000


def rates(config: ScheduleConfig, *, every: int = 100, total: int = TOTAL) -> list[float]:
    return [learning_rate(config, tokens, total_tokens=total) for tokens in range(every, total + 1, every)]


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_warm_up_rises_linearly_to_the_peak_and_starts_above_zero(kind: str) -> None:
    config = ScheduleConfig(kind=kind, learning_rate=0.5, warmup_tokens=1000)
    values = rates(config)
    assert values[:10] == pytest.approx([0.05 * step for step in range(1, 11)])
    assert max(values) == values[9] == 0.5


def test_cosine_falls_all_the_way_to_the_minimum_at_the_last_token() -> None:
    config = ScheduleConfig(kind="cosine", learning_rate=1.0, min_learning_rate=0.1, warmup_tokens=1000)
    values = rates(config)
    assert all(later < earlier for earlier, later in itertools.pairwise(values[9:]))
    assert values[-1] == pytest.approx(0.1)
    halfway = learning_rate(config, 5500, total_tokens=TOTAL)
    assert halfway == pytest.approx((1.0 + 0.1) / 2)
    quarter = learning_rate(config, 1000 + 9000 // 4, total_tokens=TOTAL)
    assert quarter == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))


def test_cosine_with_decay_tokens_counts_them_from_the_start_and_stays_at_the_minimum() -> None:
    config = ScheduleConfig(kind="cosine", learning_rate=1.0, min_learning_rate=0.1, decay_tokens=4000)
    assert learning_rate(config, 4000, total_tokens=TOTAL) == pytest.approx(0.1)
    assert set(rates(config)[40:]) == {0.1}
    assert rates(config) == [learning_rate(config, tokens, total_tokens=77) for tokens in range(100, TOTAL + 1, 100)]


@pytest.mark.parametrize(("decay_tokens", "start"), [(None, 9000), (3000, 7000)])
def test_wsd_is_flat_until_its_last_part_falls_linearly(decay_tokens: int | None, start: int) -> None:
    config = ScheduleConfig(
        kind="wsd", learning_rate=1.0, min_learning_rate=0.2, warmup_tokens=1000, decay_tokens=decay_tokens
    )
    values = rates(config)
    assert set(values[9 : start // 100]) == {1.0}
    falling = values[start // 100 - 1 :]
    steps = [earlier - later for earlier, later in itertools.pairwise(falling)]
    assert steps == pytest.approx([steps[0]] * len(steps)) and steps[0] > 0
    assert falling[-1] == pytest.approx(0.2)


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
def test_the_rate_is_a_function_of_tokens_and_not_of_steps(kind: str) -> None:
    config = ScheduleConfig(kind=kind, learning_rate=1.0, warmup_tokens=1000)
    assert rates(config, every=100)[9::10] == rates(config, every=1000)


def test_the_last_step_may_overshoot_the_last_token() -> None:
    config = ScheduleConfig(kind="cosine", learning_rate=1.0, min_learning_rate=0.1)
    assert learning_rate(config, TOTAL + 63, total_tokens=TOTAL) == pytest.approx(0.1)
