import random

import pytest

from moesaic.serve.kv_blocks import BlockPool
from moesaic.serve.scheduler import Scheduled, Scheduler, Sequence


def make(
    num_blocks: int = 64, *, max_sequences: int = 8, max_batch_tokens: int = 32, prefix_caching: bool = True
) -> Scheduler:
    return Scheduler(
        BlockPool(num_blocks, 4),
        max_sequences=max_sequences,
        max_batch_tokens=max_batch_tokens,
        prefix_caching=prefix_caching,
    )


def text(tokens: list[int], arrival: int, *, priority: int = 0, may_find_prefix: bool = True) -> Sequence:
    return Sequence(list(tokens), len(tokens), priority, arrival, may_find_prefix)


def carry_out(scheduler: Scheduler, parts: list[Scheduled], *, next_token: int = 9) -> None:
    """What an engine does after a step: the next token of each that is complete; drafted tokens are wrong."""
    for part in parts:
        if part.is_last:
            part.sequence.tokens.append(next_token)
        scheduler.computed(part.sequence, part.num_tokens)


def shape(parts: list[Scheduled]) -> list[tuple[int, int, bool]]:
    return [(part.sequence.arrival, part.num_tokens, part.is_last) for part in parts]


def test_a_long_prompt_comes_in_chunks_and_what_generates_goes_first() -> None:
    scheduler = make(max_batch_tokens=10)
    scheduler.add(text([1] * 3, 0))
    scheduler.add(text([2] * 25, 1))
    steps = []
    for _ in range(4):
        parts = scheduler.schedule()
        steps.append(shape(parts))
        carry_out(scheduler, parts)
    assert steps == [
        [(0, 3, True), (1, 7, False)],
        [(0, 1, True), (1, 9, False)],
        [(0, 1, True), (1, 9, True)],
        [(0, 1, True), (1, 1, True)],
    ]


def test_no_more_run_at_once_than_allowed_and_in_the_order_of_arrival_and_priority() -> None:
    scheduler = make(max_sequences=2)
    for arrival, priority in enumerate([1, 1, 0]):
        scheduler.add(text([arrival] * 2, arrival, priority=priority))
    assert shape(scheduler.schedule()) == [(2, 2, True), (0, 2, True)]
    assert scheduler.num_waiting == 1


def test_a_more_important_one_takes_the_place_of_a_less_important_one() -> None:
    scheduler = make(max_sequences=1)
    scheduler.add(text([1, 1], 0, priority=5))
    carry_out(scheduler, scheduler.schedule())
    scheduler.add(text([2, 2], 1, priority=5))
    assert shape(scheduler.schedule()) == [(0, 1, True)]  # an equal one waits
    scheduler.add(text([3, 3], 2, priority=1))
    assert shape(scheduler.schedule()) == [(2, 2, True)]
    scheduler.remove(scheduler.running[0])
    assert shape(scheduler.schedule()) == [(0, 3, True)]  # with what it had generated


def test_a_more_important_one_takes_the_blocks_of_a_less_important_one() -> None:
    scheduler = make(4, prefix_caching=False)
    scheduler.add(text([1] * 10, 0, priority=5))
    carry_out(scheduler, scheduler.schedule())
    scheduler.add(text([2] * 7, 1, priority=5))
    assert shape(scheduler.schedule()) == [(0, 1, True)]
    scheduler.add(text([3] * 7, 2, priority=4))
    assert shape(scheduler.schedule()) == [(2, 7, True)]  # the first comes before the second, and does not fit


def test_nobody_is_stopped_where_that_makes_no_room() -> None:
    scheduler = make(6)
    for arrival, (length, priority) in enumerate([(11, 0), (6, 5), (2, 6)]):
        scheduler.add(text([arrival] * length, arrival, priority=priority))
    carry_out(scheduler, scheduler.schedule())
    assert scheduler.pool.num_free == 0
    long = text([3] * 12, 3)
    scheduler.add(long)  # its four blocks are more than what those that count less have
    assert shape(scheduler.schedule()) == [(0, 1, True), (1, 1, True), (2, 1, True)]
    scheduler.remove(long)
    scheduler.add(text([3] * 11, 4))
    assert shape(scheduler.schedule()) == [(0, 1, True), (4, 11, True)]
    assert scheduler.num_preemptions == 2


def test_what_is_shared_with_one_that_counts_more_needs_no_room_and_with_one_that_is_stopped_does() -> None:
    for sharer, other in ((0, 1), (1, 0)):  # whose beginning the newcomer has
        scheduler = make(6)
        for arrival, priority in enumerate((0, 5)):
            scheduler.add(text([arrival] * 11, arrival, priority=priority))
        carry_out(scheduler, scheduler.schedule())
        scheduler.add(text([sharer] * 8 + [9] * 7, 2))  # four blocks, two of them there
        assert shape(scheduler.schedule()) == (
            [(0, 1, True), (2, 7, True)] if sharer == 0 else [(0, 1, True), (1, 1, True)]
        )
        assert scheduler.num_preemptions == other


def test_an_equal_beginning_is_computed_once() -> None:
    scheduler = make()
    first = text(list(range(10)), 0)
    scheduler.add(first)
    carry_out(scheduler, scheduler.schedule())
    second = text([*range(8), 99, 98, 97], 1)
    scheduler.add(second)
    parts = scheduler.schedule()
    assert shape(parts) == [(0, 1, True), (1, 3, True)]
    assert second.blocks[:2] == first.blocks[:2] and second.num_cached == 8
    assert second.blocks[2] not in first.blocks


def test_the_last_token_is_computed_even_where_everything_is_there() -> None:
    scheduler = make()
    scheduler.add(text(list(range(8)), 0))
    carry_out(scheduler, scheduler.schedule())
    same = text(list(range(8)), 1)
    scheduler.add(same)
    assert shape(scheduler.schedule())[1] == (1, 4, True) and same.num_cached == 4


def test_who_needs_every_position_gets_none_from_others() -> None:
    scheduler = make()
    scheduler.add(text(list(range(8)), 0))
    carry_out(scheduler, scheduler.schedule())
    own = text(list(range(8)), 1, may_find_prefix=False)
    scheduler.add(own)
    assert shape(scheduler.schedule())[1] == (1, 8, True)
    assert not set(own.blocks) & set(scheduler.running[0].blocks)


def test_without_blocks_the_last_to_come_gives_its_own_up_and_returns() -> None:
    scheduler = make(4, prefix_caching=False)
    old, new = text([1] * 8, 0), text([2] * 5, 1)
    scheduler.add(old)
    scheduler.add(new)
    carry_out(scheduler, scheduler.schedule())
    assert [each.arrival for each in scheduler.running] == [0, 1] and scheduler.pool.num_free == 0
    parts = scheduler.schedule()  # the old one needs a third block
    assert shape(parts) == [(0, 1, True)] and not new.is_running and scheduler.num_preemptions == 1
    assert new.tokens == [2] * 5 + [9] and new.num_computed == 0
    carry_out(scheduler, parts)
    scheduler.remove(old)
    assert shape(scheduler.schedule()) == [(1, 6, True)]  # with what it had generated


def test_one_that_counts_less_stands_back_even_where_it_is_in_the_step_already() -> None:
    scheduler = make(4, max_batch_tokens=3, prefix_caching=False)
    old, new = text([1], 0), text([2] * 11, 1, priority=-1)
    scheduler.add(old)
    carry_out(scheduler, scheduler.schedule())
    scheduler.add(new)  # there is room for all of it, and the old one grows meanwhile
    steps = []
    for _ in range(6):
        parts = scheduler.schedule()
        steps.append(shape(parts))
        carry_out(scheduler, parts)
    growing = [[(0, 1, True), (1, 2, False)]]
    assert steps == growing * 4 + [[(1, 2, False)], [(1, 1, True)]]
    assert scheduler.num_preemptions == 1 and not old.is_running


def test_drafted_tokens_are_part_of_the_budget_and_are_left_out_where_blocks_are_short() -> None:
    scheduler = make(3, max_batch_tokens=7, prefix_caching=False)
    one, two = text([1] * 3, 0), text([2] * 3, 1)
    scheduler.add(one)
    scheduler.add(two)
    carry_out(scheduler, scheduler.schedule())
    parts = scheduler.schedule({one: 5, two: 1})
    # One block is free, and the first's five drafted tokens would need two.
    assert [(part.num_tokens, part.num_drafted) for part in parts] == [(1, 0), (1, 0)]
    carry_out(scheduler, parts)
    parts = scheduler.schedule({one: 3, two: 1})
    assert [(part.num_tokens, part.num_drafted) for part in parts] == [(1, 3)]
    assert two.num_computed == 0 and scheduler.num_preemptions == 1


def test_drafts_leave_every_sequence_that_generates_its_next_token() -> None:
    scheduler = make(max_batch_tokens=6)
    sequences = [text([arrival] * 2, arrival) for arrival in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    carry_out(scheduler, scheduler.schedule())
    parts = scheduler.schedule(dict.fromkeys(sequences, 2))
    assert [(part.num_tokens, part.num_drafted) for part in parts] == [(1, 2), (1, 1), (1, 0)]


def test_drafts_take_what_prompts_leave_over() -> None:
    scheduler = make(max_batch_tokens=10)
    sequences = [text([arrival] * 2, arrival) for arrival in range(3)]
    for sequence in sequences:
        scheduler.add(sequence)
    carry_out(scheduler, scheduler.schedule())
    scheduler.add(text([9] * 12, 3, priority=-1))
    drafts = dict.fromkeys(sequences, 4)
    steps = []
    for _ in range(3):
        parts = scheduler.schedule(drafts)
        steps.append([(part.sequence.arrival, part.num_tokens, part.num_drafted) for part in parts])
        carry_out(scheduler, parts)
    assert steps == [
        [(0, 1, 0), (1, 1, 0), (2, 1, 0), (3, 7, 0)],
        [(0, 1, 2), (1, 1, 0), (2, 1, 0), (3, 5, 0)],
        [(3, 1, 0), (0, 1, 4), (1, 1, 2), (2, 1, 0)],
    ]


def test_removing_frees_everything_wherever_it_is() -> None:
    scheduler = make(8)
    sequences = [text([arrival] * 9, arrival) for arrival in range(5)]
    for sequence in sequences:
        scheduler.add(sequence)
    scheduler.schedule()
    for sequence in sequences:
        scheduler.remove(sequence)
    assert not scheduler.has_work and scheduler.pool.num_used == 0


def test_those_that_leave_the_queue_are_not_kept_behind_one_that_waits() -> None:
    scheduler = make(max_sequences=1)
    first, second = text([1], 0), text([2], 1)
    scheduler.add(first)
    scheduler.schedule()
    scheduler.add(second)
    for arrival in range(2, 1000):
        gone = text([3], arrival)
        scheduler.add(gone)
        scheduler.remove(gone)
    assert scheduler.num_waiting == 1 and len(scheduler._queue) < 25
    last = text([4], 1000)
    scheduler.add(last)
    scheduler.remove(second)
    scheduler.remove(first)
    assert shape(scheduler.schedule()) == [(1000, 1, True)] and not scheduler.num_waiting


@pytest.mark.parametrize("seed", range(4))
def test_whatever_comes_all_of_it_ends_and_no_block_is_lost(seed: int) -> None:
    rng = random.Random(seed)
    scheduler = make(12, max_sequences=4, max_batch_tokens=9)
    lengths: dict[Sequence, int] = {}
    arrivals = 0
    done = 0
    for step in range(3000):
        if arrivals < 60 and rng.random() < 0.2:
            prompt = [rng.randrange(2) for _ in range(rng.randrange(1, 30))]
            sequence = text(prompt, arrivals, priority=rng.randrange(3), may_find_prefix=rng.random() < 0.8)
            lengths[sequence] = min(48, len(prompt) + rng.randrange(1, 18))
            scheduler.add(sequence)
            arrivals += 1
        drafts = {each: rng.randrange(4) for each in scheduler.running}
        parts = scheduler.schedule(drafts)
        assert sum(part.num_tokens + part.num_drafted for part in parts) <= 9
        assert parts or not scheduler.has_work, step
        assert len(scheduler.running) <= 4
        for part in parts:
            sequence = part.sequence
            end = sequence.num_computed + part.num_tokens + part.num_drafted
            assert len(sequence.blocks) * 4 >= end
            if part.is_last:
                sequence.tokens.append(rng.randrange(2))
            scheduler.computed(sequence, part.num_tokens)
            if len(sequence.tokens) >= lengths[sequence]:
                scheduler.remove(sequence)
                done += 1
        shared: dict[int, tuple[int, ...]] = {}
        for sequence in scheduler.running:
            for index, block in enumerate(sequence.blocks[: sequence.num_computed // 4]):
                beginning = tuple(sequence.tokens[: (index + 1) * 4])
                assert shared.setdefault(block, beginning) == beginning, "two meanings of one block"
    assert done == arrivals == 60 and scheduler.pool.num_used == 0
