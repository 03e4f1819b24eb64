"""Who comes in when: priorities, arrival, and nobody lost when somebody leaves at any moment."""

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest

from moesaic.serve.server.admission import Admission
from moesaic.serve.server.errors import ApiError


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await asyncio.wait_for(test(), 30)

    asyncio.run(main())


def test_those_who_wait_come_in_by_priority_then_in_their_order() -> None:
    async def test() -> None:
        admission = Admission(max_concurrent=1, max_queued=6)
        order: list[int] = []

        async def visit(number: int, priority: int) -> None:
            async with admission.enter(priority):
                order.append(number)
                await asyncio.sleep(0)

        async with admission.enter():
            tasks = [asyncio.ensure_future(visit(number, each)) for number, each in enumerate((3, 0, 3, -1, 0, 3))]
            await asyncio.sleep(0)
            assert admission.num_waiting == 6 and order == []
            with pytest.raises(ApiError) as refused:
                async with admission.enter(-100):
                    pass
            assert refused.value.status_code == 429
        await asyncio.gather(*tasks)
        assert order == [3, 1, 4, 0, 2, 5] and admission.num_inside == 0

    run(test)


def test_whoever_leaves_at_any_moment_leaves_the_counts_right() -> None:
    async def test() -> None:
        admission, rng, most = Admission(max_concurrent=3, max_queued=50), random.Random(0), 0

        async def visit() -> None:
            nonlocal most
            async with admission.enter(rng.randrange(3)):
                most = max(most, admission.num_inside)
                await asyncio.sleep(rng.random() * 0.002)

        tasks = []
        for _ in range(300):
            tasks.append(asyncio.ensure_future(visit()))
            await asyncio.sleep(rng.random() * 0.0005)
            if rng.random() < 0.4:
                rng.choice(tasks).cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert {type(each) for each in results} <= {type(None), asyncio.CancelledError, ApiError}
        assert admission.num_inside == admission.num_waiting == 0 and most == 3
        await asyncio.wait_for(admission.drained(), 1)
        with pytest.raises(ApiError) as refused:
            async with admission.enter():
                pass
        assert refused.value.status_code == 503

    run(test)


def test_one_whose_turn_comes_as_it_leaves_gives_it_to_the_next() -> None:
    async def test() -> None:
        admission = Admission(max_concurrent=1, max_queued=2)
        came: list[str] = []

        async def visit(name: str) -> None:
            async with admission.enter():
                came.append(name)

        async with admission.enter():
            first, second = (asyncio.ensure_future(visit(name)) for name in ("first", "second"))
            await asyncio.sleep(0)
        first.cancel()  # its turn has come, and it has not run since
        await asyncio.gather(first, second, return_exceptions=True)
        assert came == ["second"] and admission.num_inside == 0

    run(test)


def test_one_that_leaves_as_a_place_comes_free_is_counted_out() -> None:
    async def test() -> None:
        admission = Admission(max_concurrent=1, max_queued=2)

        async def visit() -> None:
            async with admission.enter():
                pass

        async with admission.enter():
            first, second = (asyncio.ensure_future(visit()) for _ in range(2))
            await asyncio.sleep(0)
            first.cancel()  # it has not run since when the place comes free
        results = await asyncio.gather(first, second, return_exceptions=True)
        assert isinstance(results[0], asyncio.CancelledError) and results[1] is None
        assert admission.num_inside == admission.num_waiting == 0
        await admission.drained()

    run(test)


def test_a_drain_waits_for_those_inside_and_those_who_wait() -> None:
    async def test() -> None:
        admission = Admission(max_concurrent=1, max_queued=1)
        leave = asyncio.Event()

        async def visit() -> None:
            async with admission.enter():
                await leave.wait()

        tasks = [asyncio.ensure_future(visit()) for _ in range(2)]
        await asyncio.sleep(0)
        drained = asyncio.ensure_future(admission.drained())
        for _ in range(5):
            await asyncio.sleep(0)
        assert not drained.done()
        leave.set()
        await asyncio.gather(*tasks, drained)

    run(test)
