"""How deep to draft, on made-up machines: what a pass costs, and how often drafted tokens are right."""

import random
from collections.abc import Callable

import pytest

from moesaic.serve.depth import DepthChooser, Line


def serve(
    chooser: DepthChooser,
    steps: int,
    *,
    checking: Callable[[int], float],
    drafting: float,
    acceptance: float,
    sequences: int = 1,
) -> list[int]:
    """Go through so many steps on a machine; return the depths that were chosen."""
    rng = random.Random(0)
    depths = []
    for _ in range(steps):
        depth = chooser.choose(sequences)
        depths.append(depth)
        chooser.record_step(sequences * (depth + 1), checking(sequences * (depth + 1)) * rng.uniform(0.9, 1.1))
        if depth:
            chooser.record_draft(sequences, depth, depth * drafting * rng.uniform(0.9, 1.1))
        for _ in range(sequences):
            right = 0
            while right < depth and rng.random() < acceptance:
                right += 1
            chooser.record_check(depth, right)
    return depths


def best(
    max_depth: int, *, checking: Callable[[int], float], drafting: float, acceptance: float, sequences: int = 1
) -> int:
    def rate(depth: int) -> float:
        tokens = sum(acceptance**place for place in range(depth + 1))
        return tokens / (checking(sequences * (depth + 1)) + depth * drafting)

    return max(range(max_depth + 1), key=rate)


def dense(tokens: int) -> float:
    """Reads its weights once, whatever it checks."""
    return 10.0 + 0.1 * tokens


def moe(tokens: int) -> float:
    """Pays for every token's experts."""
    return 2.0 + 8.0 * tokens


@pytest.mark.parametrize("acceptance", [0.2, 0.8, 0.95])
@pytest.mark.parametrize("drafting", [0.1, 3.0])
@pytest.mark.parametrize("machine", [dense, moe])
def test_it_settles_on_the_depth_with_the_most_tokens_a_second(
    machine: Callable[[int], float], drafting: float, acceptance: float
) -> None:
    chooser = DepthChooser(5)
    depths = serve(chooser, 400, checking=machine, drafting=drafting, acceptance=acceptance)[200:]
    wanted = best(5, checking=machine, drafting=drafting, acceptance=acceptance)
    usual = max(set(depths), key=depths.count)
    assert abs(usual - wanted) <= 1, (usual, wanted)
    assert (usual == 0) is (wanted == 0)


def test_where_it_does_not_pay_it_is_off_but_for_rare_trials() -> None:
    chooser = DepthChooser(4)
    depths = serve(chooser, 1000, checking=moe, drafting=5.0, acceptance=0.3)[20:]
    assert 0 < sum(depth > 0 for depth in depths) < len(depths) * 0.02


def test_a_draft_that_has_much_to_catch_up_with_is_tried_more_rarely() -> None:
    def drafted(missed: float) -> int:
        chooser, count = DepthChooser(4), 0
        for _ in range(4000):
            depth = chooser.choose(1)
            chooser.record_step(depth + 1, moe(depth + 1))
            if depth:
                chooser.record_draft(1, depth, 5.0 * depth, missed_seconds=missed)
                chooser.record_check(depth, 0)
                count += 1
        return count

    # A step takes 10 seconds, so that 1,000 are 2 % of 5,000 steps.
    assert 25 < drafted(0.0) < 40 and drafted(1000.0) < 8


@pytest.mark.parametrize("max_depth", [1, 4])
def test_a_slow_first_step_is_forgotten(max_depth: int) -> None:
    chooser, count = DepthChooser(max_depth), 0
    for step in range(3000):
        depth = chooser.choose(1)
        count += depth > 0
        chooser.record_step(depth + 1, (1.0 + 0.05 * depth) * (10 if step == 0 else 1))
        if depth:
            chooser.record_draft(1, depth, 0.01 * depth)
        chooser.record_check(depth, depth)
    assert count > 2000, count


def test_it_comes_back_when_the_text_changes() -> None:
    chooser = DepthChooser(4)
    serve(chooser, 300, checking=dense, drafting=1.0, acceptance=0.0)
    assert chooser.choose(1) == 0
    depths = serve(chooser, 3000, checking=dense, drafting=1.0, acceptance=0.95)
    assert sum(depth >= 2 for depth in depths[-100:]) > 90


def test_a_full_batch_drafts_less_than_one_sequence() -> None:
    def machine(tokens: int) -> float:
        return max(10.0, 1.0 * tokens)  # memory, then arithmetic

    depths = {}
    for sequences in (1, 16):
        chooser = DepthChooser(4)
        found = serve(chooser, 300, checking=machine, drafting=0.2, acceptance=0.6, sequences=sequences)
        depths[sequences] = sum(found[100:]) / 200
    assert depths[1] > 2 and depths[16] < depths[1]


def test_nothing_to_draft_for_is_no_draft() -> None:
    assert DepthChooser(4).choose(0) == 0


def test_a_line_is_fitted_and_never_falls() -> None:
    line = Line()
    assert not line.is_known and line.at(3) == 0.0
    line.add(2, 5.0)
    assert not line.is_known and line.at(9) == 5.0
    for count in (1, 4, 2, 8):
        line.add(count, 3.0 + count)
    assert line.is_known and line.at(16) == pytest.approx(19.0, rel=0.02)
    for _ in range(1000):  # long after the others
        line.add(1, 4.0)
    assert line.is_known and line.at(16) == pytest.approx(19.0, rel=0.02)
    falling = Line()
    for count in (1, 2, 3):
        falling.add(count, 10.0 - count)
    assert falling.at(100) == pytest.approx(8.0, rel=0.05)
