"""An engine among coroutines: one thread owns it and steps it; requests come in and outputs go out by the event loop.

What is served, to whom, and over which protocol is not known here.
"""

import asyncio
import itertools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol, TypeVar

from torch import Tensor

from moesaic.config.serve import Sampling
from moesaic.errors import ConfigError, MoesaicError
from moesaic.logs import logger
from moesaic.serve.outputs import EngineStats, FinishReason, RequestOutput

# So many failed steps in a row, and the engine is said to be broken.
_FAILURES_TO_BREAK = 3
# Steps whose outputs the event loop has not taken yet. An engine further ahead would only bury it: it takes all that
# has come before it gets to anybody's answer, and meanwhile more comes. It waits for a loop that stands still so long.
_MOST_UNDELIVERED = 16
_DELIVERY_SECONDS = 1.0

_Result = TypeVar("_Result")
_Item = TypeVar("_Item")


class StepEngine(Protocol):
    """What is driven: moesaic.serve.engine.Engine."""

    @property
    def has_work(self) -> bool: ...

    def add_requests(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, request_ids: Sequence[str], priority: int = 0
    ) -> None: ...

    def step(self) -> list[RequestOutput]: ...

    def abort(self, request_id: str) -> bool: ...

    def stats(self) -> EngineStats: ...

    def embed_in_pieces(self, prompts: Sequence[Sequence[int]]) -> Generator[bool, None, Tensor]: ...


class EngineStoppedError(MoesaicError):
    """The engine is stopping, or has stopped, and takes no more requests."""


@dataclass(frozen=True)
class PlacedOutput:
    """An output, which of a request's prompts it belongs to, and when it came, by time.perf_counter."""

    prompt_index: int
    output: RequestOutput
    came: float


@dataclass(eq=False)
class _Running:
    """A request on the event loop's side: its outputs that nobody has taken yet, and its texts that go on."""

    places: dict[str, int]  # engine's request id -> prompt index
    open: set[tuple[str, int]]
    outputs: deque[PlacedOutput] = field(default_factory=deque)
    has_news: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class _Embedding:
    """Texts whose vectors somebody waits for, and what computes them once it has begun."""

    prompts: Sequence[Sequence[int]]
    future: "asyncio.Future[Tensor]"
    pieces: Generator[bool, None, Tensor] | None = None

    def close(self) -> None:
        """Free the keys and values of the text that it is in."""
        if self.pieces is not None:
            self.pieces.close()


class Generation:
    """The outputs of one request's texts, as they come. Iterating gives lists: all that has come since the last one.

    Leaving `async with` ends what still goes on.
    """

    def __init__(self, engine: "AsyncEngine", running: _Running) -> None:
        self._engine, self._running = engine, running

    async def __aenter__(self) -> "Generation":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free what still goes on; nothing more comes."""
        self._engine._abandon(self._running)

    def __aiter__(self) -> AsyncIterator[list[PlacedOutput]]:
        return self

    async def __anext__(self) -> list[PlacedOutput]:
        running = self._running
        while not running.outputs:
            if not running.open:
                raise StopAsyncIteration
            running.has_news.clear()
            await running.has_news.wait()
        news = list(running.outputs)
        running.outputs.clear()
        return news


class AsyncEngine:
    """Drives an engine from a thread of its own, between `start` and `stop`, for the event loop that started it.

    A step that fails ends the requests that run, each with an "error" output, and the engine goes on. Where steps keep
    failing, `failure` says so until one succeeds.
    """

    def __init__(self, engine: StepEngine) -> None:
        self._engine = engine
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        # The event loop's side.
        self._numbers = itertools.count()  # of requests
        self._by_id: dict[str, _Running] = {}
        self._num_embeddings = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._is_closed = False
        # Between both.
        self._wakeup = threading.Condition()
        self._commands: deque[Callable[[], None]] = deque()
        self._embeddings: deque[_Embedding] = deque()  # which take long: a piece of one between two steps
        self._is_stopping = False
        self._failure: str | None = None
        self._delivery = threading.Condition()
        self._num_undelivered = 0
        # The thread's side: the texts that go on of every request that the engine has.
        self._open: dict[str, set[int]] = {}
        self._num_failures = 0

    @property
    def failure(self) -> str | None:
        """Why the engine cannot serve: it has not started, has stopped, or its steps keep failing. None: it can."""
        if self._thread is None or not self._thread.is_alive():
            return "the engine's thread is not running"
        return self._failure

    @property
    def num_running(self) -> int:
        """Prompts that are being worked on or wait in the engine."""
        return len(self._by_id)

    def start(self) -> None:
        """Start the thread; call it in the event loop that will ask."""
        assert self._thread is None, "started twice"
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="moesaic-engine", daemon=True)
        self._thread.start()

    async def stop(self, *, drain_seconds: float = 0.0) -> None:
        """Take no more requests, let what runs finish for so long, end the rest ("abort"), and end the thread."""
        self._is_closed = True
        if drain_seconds > 0:
            try:
                await asyncio.wait_for(self._idle.wait(), drain_seconds)
            except TimeoutError:
                logger.warning(
                    "%d requests were still running after drain_seconds (%g); they are ended; raise drain_seconds to "
                    "let them finish.",
                    self.num_running + self._num_embeddings,
                    drain_seconds,
                )
        with self._wakeup:
            self._is_stopping = True
            self._wakeup.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    async def submit(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, priority: int = 0) -> Generation:
        """Have prompts continued, all or none; return what gives their outputs.

        Raises: ConfigError, GenerationError for what the engine can never serve; EngineStoppedError.
        """
        if not prompts:
            raise ConfigError("no prompts were given; at least one is required; send one, or do not ask.")
        # Never one that was there before: outputs of a request that was closed may still be on their way.
        number = next(self._numbers)
        ids = [f"{number}-{index}" for index in range(len(prompts))]
        running = _Running(
            places={each: index for index, each in enumerate(ids)},
            open={(each, index) for each in ids for index in range(sampling.n)},
        )

        def add() -> None:
            self._engine.add_requests(prompts, sampling, request_ids=ids, priority=priority)
            self._open.update((each, set(range(sampling.n))) for each in ids)

        self._refuse_if_closed()
        for each in ids:
            self._by_id[each] = running
        self._idle.clear()
        try:
            await self._call(add)
        except BaseException:  # cancelled too, while it may be added already
            self._abandon(running)
            raise
        return Generation(self, running)

    async def generate(
        self, prompt: Sequence[int], sampling: Sampling, *, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """Yield the outputs of one prompt's texts; ending the iteration early ends the request.

        Raises: as submit, with the first output.
        """
        async with await self.submit([prompt], sampling, priority=priority) as generation:
            async for news in generation:
                for placed in news:
                    yield placed.output

    async def embed(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """Return (n, H) fp32 vectors of unit length; between two steps a piece of one such call is computed.

        Raises: GenerationError, NotFiniteError as the engine; EngineStoppedError.
        """
        self._refuse_if_closed()
        embedding = _Embedding(prompts, self._new_future())
        self._num_embeddings += 1
        self._idle.clear()
        try:
            self._enqueue(embedding, self._embeddings)
            return await embedding.future
        finally:
            self._num_embeddings -= 1
            self._note_idle()

    async def stats(self) -> EngineStats:
        """Return the engine's figures between two steps. Raises: EngineStoppedError."""
        return await self._call(self._engine.stats)

    def _refuse_if_closed(self) -> None:
        if self._is_closed:
            raise EngineStoppedError("the engine is stopping; it takes no more requests; ask another one, or later.")

    async def _call(self, function: Callable[[], _Result]) -> _Result:
        """Have the thread call a function between two steps, in the order asked; not if nobody waits any more."""
        future: asyncio.Future[_Result] = self._new_future()

        def run() -> None:
            if future.done():  # cancelled
                return
            try:
                result = function()
            except Exception as error:  # it is the caller's
                self._tell(future, error)
            else:
                self._tell(future, result)

        self._enqueue(run, self._commands)
        return await future

    def _new_future(self) -> "asyncio.Future[Any]":
        loop = asyncio.get_running_loop()
        assert self._loop is not None, "asked before start()"
        assert loop is self._loop, "asked from another event loop than the one that started the engine"
        return loop.create_future()

    def _tell(self, future: "asyncio.Future[_Result]", result: _Result | Exception) -> None:
        """On the thread: give a result, or an error, to who waits for it."""
        self._call_in_loop(_set_result, future, result)

    def _call_in_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        """On the thread: have the event loop call a function."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:  # the loop is closed, without a stop: nobody waits for anything any more
            with self._wakeup:
                self._is_stopping = True

    def _enqueue(self, item: _Item, queue: deque[_Item]) -> None:
        with self._wakeup:
            if self._is_stopping:
                raise _stopped()
            queue.append(item)
            self._wakeup.notify()

    def _abandon(self, running: _Running) -> None:
        """Forget a request, and free in the engine what still goes on of it."""
        ids = {request_id for request_id, _ in running.open}
        running.open.clear()
        running.outputs.clear()
        running.has_news.set()
        self._forget(running)
        if not ids:
            return

        def abort() -> None:
            for request_id in ids:
                if self._open.pop(request_id, None) is not None:
                    self._engine.abort(request_id)

        try:
            self._enqueue(abort, self._commands)
        except EngineStoppedError:
            return  # stopping ends everything

    def _forget(self, running: _Running) -> None:
        for request_id in running.places:
            self._by_id.pop(request_id, None)
        self._note_idle()

    def _note_idle(self) -> None:
        if not (self._by_id or self._num_embeddings):
            self._idle.set()

    def _deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """On the event loop: give outputs to those who wait for them."""
        with self._delivery:
            self._num_undelivered -= 1
            self._delivery.notify()
        now = time.perf_counter()
        for output in outputs:
            running = self._by_id.get(output.request_id)
            if running is None:
                continue
            running.outputs.append(PlacedOutput(running.places[output.request_id], output, now))
            running.has_news.set()
            if output.finish_reason is not None:
                running.open.discard((output.request_id, output.index))
                if not running.open:
                    self._forget(running)

    def _run(self) -> None:
        """The thread: what was asked, a piece of an embedding, then a step, as long as there is any of it."""
        assert self._loop is not None
        while True:
            with self._wakeup:
                while not (self._commands or self._embeddings or self._is_stopping or self._should_step):
                    self._wakeup.wait()
                commands, is_stopping = list(self._commands), self._is_stopping
                self._commands.clear()
            for command in commands:
                try:
                    command()
                except Exception:  # an abort of a broken engine: the thread has to live for what is asked next
                    logger.exception("the engine failed while a request was taken out of it.")
            if is_stopping:
                self._end_all("abort", "the engine was stopped")
                self._end_embeddings()
                return
            if self._embeddings:
                self._embed_piece()
            if self._should_step:
                self._step()

    def _embed_piece(self) -> None:
        with self._wakeup:
            embedding = self._embeddings.popleft()
        if embedding.future.done():  # cancelled
            embedding.close()
            return
        try:
            if embedding.pieces is None:
                embedding.pieces = self._engine.embed_in_pieces(embedding.prompts)
            is_between_texts = next(embedding.pieces)
        except StopIteration as end:
            self._tell(embedding.future, end.value)
        except Exception as error:  # it is the caller's
            self._tell(embedding.future, error)
        else:
            with self._wakeup:
                # Others come between two texts, but not into one, or each of them would hold keys and values.
                (self._embeddings.append if is_between_texts else self._embeddings.appendleft)(embedding)

    def _end_embeddings(self) -> None:
        """Once it is stopping, and none comes any more."""
        for embedding in self._embeddings:
            embedding.close()
            self._tell(embedding.future, _stopped())
        self._embeddings.clear()

    @property
    def _should_step(self) -> bool:
        # After a failure only what somebody waits for is tried, or a broken engine would be stepped for ever.
        return self._engine.has_work and bool(self._open or not self._num_failures)

    def _step(self) -> None:
        with self._delivery:
            self._delivery.wait_for(lambda: self._num_undelivered < _MOST_UNDELIVERED, _DELIVERY_SECONDS)
        try:
            outputs = self._engine.step()
        except Exception as error:  # whatever it is, the others' next requests are to be served
            self._num_failures += 1
            logger.exception("a step of the engine failed; the %d requests in it are ended.", len(self._open))
            message = f"a step of the engine failed ({type(error).__name__}); it is in the server's log; try again"
            if self._num_failures >= _FAILURES_TO_BREAK:
                self._failure = f"the last {self._num_failures} steps of the engine failed ({type(error).__name__})"
            self._end_all("error", message)
            return
        self._num_failures, self._failure = 0, None
        for output in outputs:
            if output.finish_reason is not None and output.request_id in self._open:
                self._open[output.request_id].discard(output.index)
                if not self._open[output.request_id]:
                    del self._open[output.request_id]
        if outputs:
            self._post(outputs)

    def _end_all(self, reason: FinishReason, message: str) -> None:
        """End every request that the engine has; each unfinished text gets a last output."""
        outputs = []
        for request_id, indices in self._open.items():
            try:
                self._engine.abort(request_id)
            except Exception:  # it has failed before; those who wait are told all the same
                logger.exception("the engine failed while a request was taken out of it.")
            outputs += [_last_output(request_id, index, reason, message) for index in sorted(indices)]
        self._open.clear()
        self._post(outputs)

    def _post(self, outputs: Sequence[RequestOutput]) -> None:
        with self._delivery:
            self._num_undelivered += 1
        self._call_in_loop(self._deliver, outputs)


def _last_output(request_id: str, index: int, reason: FinishReason, message: str) -> RequestOutput:
    return RequestOutput(
        request_id=request_id,
        index=index,
        text="",
        tokens=(),
        finish_reason=reason,
        stop_reason=None,
        message=message,
        prompt_logprobs=None,
        prompt_tokens=0,
        cached_tokens=0,
        completion_tokens=0,
    )


def _stopped() -> EngineStoppedError:
    return EngineStoppedError("the engine has stopped; nothing can be asked of it; start another one.")


def _set_result(future: "asyncio.Future[_Result]", result: _Result | Exception) -> None:
    if future.done():
        return
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)
