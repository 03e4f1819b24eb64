"""One thread owns the engine; whatever fails or leaves, everybody who waits is told, and the others go on."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import torch

from moesaic.config.serve import Sampling
from moesaic.errors import ConfigError, GenerationError
from moesaic.serve import async_engine
from moesaic.serve.async_engine import AsyncEngine, EngineStoppedError
from moesaic.serve.outputs import RequestOutput

from .fake_engine import FakeEngine

SAMPLING = Sampling(max_tokens=5)
ENDLESS = Sampling(max_tokens=10**9)


@asynccontextmanager
async def running(fake: FakeEngine) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine(fake)
    engine.start()
    try:
        yield engine
    finally:
        fake.go.set()
        await engine.stop()


def run(test: Callable[[FakeEngine, AsyncEngine], Awaitable[None]]) -> None:
    async def main() -> None:
        fake = FakeEngine()
        async with running(fake) as engine:
            await asyncio.wait_for(test(fake, engine), 30)

    asyncio.run(main())


async def collect(engine: AsyncEngine, prompt: list[int], sampling: Sampling = SAMPLING) -> list[RequestOutput]:
    return [output async for output in engine.generate(prompt, sampling)]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def tokens(outputs: list[RequestOutput]) -> list[int]:
    return [token.token_id for output in outputs for token in output.tokens]


def test_everybody_gets_their_own_tokens_from_one_thread() -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        prompts = [[n, n + 1] for n in range(17)]
        found = await asyncio.gather(*(collect(engine, prompt) for prompt in prompts), engine.stats())
        for prompt, outputs in zip(prompts, found, strict=False):
            assert tokens(outputs) == (prompt * 3)[:5]  # type: ignore[arg-type]
        vectors = await engine.embed([[1, 2, 3]])
        assert torch.allclose(vectors.norm(dim=-1), torch.ones(1))
        assert len(fake.threads) == 1 and threading.get_ident() not in fake.threads
        assert engine.failure is None and engine.num_running == 0

    run(test)


def test_several_prompts_are_one_generation_whose_outputs_have_their_places() -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        generation = await engine.submit([[1], [2, 3]], Sampling(max_tokens=2, n=2))
        found: dict[tuple[int, int], list[int]] = {}
        async with generation:
            async for news in generation:
                for placed in news:
                    key = (placed.prompt_index, placed.output.index)
                    found.setdefault(key, []).extend(token.token_id for token in placed.output.tokens)
        assert found == {(0, 0): [1, 1], (0, 1): [1, 1], (1, 0): [2, 3], (1, 1): [2, 3]}
        assert fake.aborted == []

    run(test)


def test_an_output_came_when_it_came_whoever_takes_it_later() -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        generation = await engine.submit([[1]], Sampling(max_tokens=3))
        async with generation:
            await until(lambda: engine.num_running == 0)
            taken = time.perf_counter()
            came = [placed.came async for news in generation for placed in news]
        assert len(came) == 3 and came == sorted(came) and came[-1] < taken

    run(test)


def test_what_the_engine_refuses_is_refused_and_leaves_nothing_behind() -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        with pytest.raises(GenerationError, match="65 tokens"):
            await collect(engine, [1] * 65)
        with pytest.raises(GenerationError, match="65 tokens"):
            await engine.submit([[1], [1] * 65], ENDLESS)  # all or none
        await engine.stats()
        assert not fake.has_work and engine.num_running == 0
        assert tokens(await collect(engine, [7])) == [7] * 5

    run(test)


@pytest.mark.parametrize("how", ["break", "cancel", "close"])
def test_a_consumer_that_leaves_ends_its_request(how: str) -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        if how == "break":
            outputs = engine.generate([1], ENDLESS)
            async for _ in outputs:
                break
            await outputs.aclose()  # type: ignore[attr-defined]
        elif how == "cancel":
            task = asyncio.ensure_future(collect(engine, [1], ENDLESS))
            await until(lambda: fake.num_steps > 3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        else:
            generation = await engine.submit([[1], [2]], ENDLESS)
            await anext(generation)
            generation.close()
            assert [news async for news in generation] == []
        await until(lambda: not fake.has_work)
        assert engine.num_running == 0 and fake.aborted

    run(test)


def test_one_that_leaves_while_it_is_taken_in_leaves_nothing_behind() -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        fake.go.clear()  # the thread is busy with a step
        other = asyncio.ensure_future(collect(engine, [1]))
        await until(lambda: fake.has_work)
        task = asyncio.ensure_future(collect(engine, [2], ENDLESS))
        await asyncio.sleep(0.01)
        task.cancel()
        fake.go.set()
        assert tokens(await other) == [1] * 5
        with pytest.raises(asyncio.CancelledError):
            await task
        await engine.stats()
        assert not fake.has_work and engine.num_running == 0

    run(test)


def test_a_failed_step_ends_what_runs_with_an_error_and_the_next_is_served() -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        fake.go.clear()
        tasks = [asyncio.ensure_future(collect(engine, [n], Sampling(max_tokens=3, n=n))) for n in (1, 2)]
        await until(lambda: len(fake.running) >= 1)
        fake.num_failing_steps = 2
        fake.go.set()
        for n, outputs in zip((1, 2), await asyncio.gather(*tasks), strict=True):
            last = [output for output in outputs if output.finish_reason is not None]
            assert [output.index for output in last] == list(range(n))
            assert {output.finish_reason for output in last} == {"error"}
            assert all(output.message and "RuntimeError" in output.message for output in last)
        fake.num_failing_steps = 0
        assert tokens(await collect(engine, [7])) == [7] * 5
        assert engine.failure is None and not fake.has_work

    run(test)


@pytest.mark.parametrize("is_abort_broken", [False, True])
def test_where_steps_keep_failing_the_health_says_so_until_one_succeeds(is_abort_broken: bool) -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        fake.is_abort_broken = is_abort_broken
        fake.num_failing_steps = 3
        for count in range(3):
            assert engine.failure is None, count
            outputs = await collect(engine, [1])
            assert [output.finish_reason for output in outputs] == ["error"]
        assert engine.failure is not None and "3 steps" in engine.failure
        steps = fake.num_steps
        await asyncio.sleep(0.02)
        assert fake.num_steps == steps  # a broken engine is not stepped for nobody
        assert tokens(await collect(engine, [7])) == [7] * 5
        assert engine.failure is None

    run(test)


def test_stopping_lets_what_runs_finish_or_ends_it() -> None:
    async def main() -> None:
        for drain_seconds, reason in ((30.0, "length"), (0.02, "abort"), (0.0, "abort")):
            fake = FakeEngine()
            engine = AsyncEngine(fake)
            assert engine.failure is not None
            engine.start()
            max_tokens = 200 if reason == "length" else 10**9
            task = asyncio.ensure_future(collect(engine, [1], Sampling(max_tokens=max_tokens)))
            await until(lambda fake=fake: fake.num_steps > 0)  # type: ignore[misc]
            await engine.stop(drain_seconds=drain_seconds)
            outputs = await asyncio.wait_for(task, 10)
            assert outputs[-1].finish_reason == reason
            assert not fake.has_work and engine.failure is not None
            for call in (engine.stats(), engine.embed([[1]]), collect(engine, [1])):
                with pytest.raises(EngineStoppedError):
                    await call

    asyncio.run(main())


def test_between_two_steps_a_piece_is_embedded_and_none_for_those_who_left() -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        fake.go.clear()
        generation = await engine.submit([[1]], ENDLESS)
        tasks = [asyncio.ensure_future(engine.embed([[1] * length])) for length in (1, 30, 3, 4, 2)]
        await asyncio.sleep(0)
        tasks.pop(2).cancel()
        fake.go.set()
        vectors = await asyncio.gather(*tasks)
        assert [round((each[0, 0] / each[0, 1]).item()) for each in vectors] == [1, 30, 4, 2]
        lengths, steps = zip(*fake.embedded, strict=True)
        assert list(lengths) == [1, 30, 30, 30, 30, 4, 2]  # none comes into another one's text
        assert len(set(steps)) == len(steps)
        generation.close()
        await until(lambda: not fake.has_work)
        await asyncio.gather(*(engine.embed([[1] * 20, [1]]) for _ in range(3)))  # nothing to step

    run(test)


def test_those_with_many_texts_let_others_come_between_two_of_them() -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        fake.go.clear()
        generation = await engine.submit([[1]], ENDLESS)
        tasks = [asyncio.ensure_future(engine.embed(texts)) for texts in ([[1] * 9] * 3, [[1, 2]])]
        await asyncio.sleep(0)
        fake.go.set()
        await asyncio.gather(*tasks)
        assert [length for length, _ in fake.embedded] == [9, 9, 2, 9, 9, 9, 9]
        generation.close()

    run(test)


def test_an_embedding_that_nobody_waits_for_any_more_is_given_up_within_its_text() -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        generation = await engine.submit([[1]], ENDLESS)
        task = asyncio.ensure_future(engine.embed([range(8_000_000)]))
        await until(lambda: len(fake.embedded) > 2)
        task.cancel()
        await until(lambda: fake.num_closed == 1)
        count = len(fake.embedded)
        assert (await engine.embed([[1]])).shape == (1, 2)
        assert fake.embedded[count:] == [(1, fake.embedded[-1][1])] and count < 1_000_000
        generation.close()

    run(test)


@pytest.mark.parametrize(("drain_seconds", "is_done"), [(30.0, True), (0.05, False), (0.0, False)])
def test_stopping_waits_for_an_embedding_as_long_as_for_a_text(
    drain_seconds: float, is_done: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        with engine._wakeup:  # the thread sees both, and embeds a piece before the step that waits
            running = asyncio.ensure_future(collect(engine, [1], Sampling(max_tokens=3)))
            fake.go.clear()
            task = asyncio.ensure_future(engine.embed([[1] * 80]))
            await asyncio.sleep(0)
        await until(lambda: len(fake.embedded) > 0)
        stopping = asyncio.ensure_future(engine.stop(drain_seconds=drain_seconds))
        await asyncio.sleep(0.1 if drain_seconds == 0.05 else 0)
        fake.go.set()
        await stopping
        if is_done:
            assert (await task).shape == (1, 2)
        else:
            with pytest.raises(EngineStoppedError):
                await task
            assert fake.num_closed == 1
        await running

    run(test)
    assert [record.args for record in caplog.records] == ([(2, 0.05)] if drain_seconds == 0.05 else [])


def test_those_who_wait_for_embeddings_are_told_when_it_stops() -> None:
    async def main() -> None:
        fake = FakeEngine()
        engine = AsyncEngine(fake)
        engine.start()
        fake.go.clear()
        task = asyncio.ensure_future(collect(engine, [1], ENDLESS))
        await until(lambda: fake.has_work)
        embeddings = [asyncio.ensure_future(engine.embed([[1]])) for _ in range(3)]
        stopping = asyncio.ensure_future(engine.stop())
        await asyncio.sleep(0)
        fake.go.set()
        await asyncio.wait_for(stopping, 10)
        for each in embeddings:
            with pytest.raises(EngineStoppedError):
                await asyncio.wait_for(each, 10)
        assert (await asyncio.wait_for(task, 10))[-1].finish_reason == "abort"

    asyncio.run(main())


def test_the_engine_does_not_run_far_ahead_of_the_event_loop() -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        outputs = engine.generate([1, 2, 3], ENDLESS)
        await anext(outputs)
        before = fake.num_steps
        time.sleep(0.3)  # the loop takes nothing; the fake engine makes some 100,000 steps a second
        assert fake.num_steps - before <= async_engine._MOST_UNDELIVERED + 1
        for _ in range(100):
            await anext(outputs)
        await outputs.aclose()

    run(test)


def test_what_is_still_on_its_way_of_a_closed_request_is_no_other_ones() -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        first = await engine.submit([[1]], ENDLESS)
        assert await anext(first)
        for _ in range(3):
            first.close()
            time.sleep(0.02)  # outputs wait for the loop meanwhile
            first = await engine.submit([[2]], Sampling(max_tokens=9))
            outputs = [placed.output async for news in first for placed in news]
            assert sum(len(output.tokens) for output in outputs) == 9 and outputs[-1].finish_reason == "length"
            first = await engine.submit([[1]], ENDLESS)
        first.close()

    run(test)


def test_no_prompts_are_refused_and_a_stop_waits_for_nothing() -> None:
    async def test(fake: FakeEngine, engine: AsyncEngine) -> None:
        with pytest.raises(ConfigError, match="at least one"):
            await engine.submit([], SAMPLING)
        start = time.monotonic()
        await engine.stop(drain_seconds=60)
        assert time.monotonic() - start < 30

    run(test)


@pytest.mark.parametrize("num_embeddings", [0, 1, 4])
def test_a_loop_that_is_closed_without_a_stop_ends_the_thread(
    num_embeddings: int, caplog: pytest.LogCaptureFixture
) -> None:
    fake = FakeEngine()
    engine = AsyncEngine(fake)

    async def leave() -> None:
        engine.start()
        generation = await engine.submit([[1]], ENDLESS)
        assert await anext(generation)
        fake.go.clear()
        for _ in range(num_embeddings):
            asyncio.ensure_future(engine.embed([[1] * 20] * 3))  # noqa: RUF006
        await asyncio.sleep(0)

    asyncio.run(leave())
    fake.go.set()
    assert engine._thread is not None
    engine._thread.join(30)
    assert not engine._thread.is_alive() and not caplog.records


def test_with_a_loop_that_is_closed_an_embedding_is_given_up() -> None:
    fake = FakeEngine()
    engine = AsyncEngine(fake)

    async def leave() -> None:
        engine.start()
        asyncio.ensure_future(engine.embed([range(80_000_000)]))  # noqa: RUF006
        await until(lambda: len(fake.embedded) > 2)

    asyncio.run(leave())
    deadline = time.monotonic() + 30
    while not fake.num_closed and time.monotonic() < deadline:
        time.sleep(0.001)
    assert fake.num_closed == 1
