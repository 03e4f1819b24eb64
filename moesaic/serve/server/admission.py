"""Who is worked on, who waits, and who is refused."""

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from moesaic.serve.server.errors import ApiError

_RETRY_SECONDS = (1, 60)


class Admission:
    """Lets so many requests in at once; some more wait, by priority (lower first), then in the order they came."""

    def __init__(self, *, max_concurrent: int, max_queued: int) -> None:
        self._max_concurrent, self._max_queued = max_concurrent, max_queued
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()
        self._idle = asyncio.Event()
        self._idle.set()
        self._typical_seconds = 1.0  # how long a request is in, as an exponential mean
        self.is_draining = False
        self.num_inside = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @asynccontextmanager
    async def enter(self, priority: int = 0) -> AsyncIterator[None]:
        """Wait for a place and hold it.

        Raises: ApiError 503 while draining, 429 where too many wait already.
        """
        if self.is_draining:
            raise ApiError(
                503,
                "the server is stopping; it takes no new requests; ask another one, or later.",
                code="stopping",
            )
        if self.num_inside >= self._max_concurrent:
            await self._wait(priority)
        else:
            self._count(1)
        start = asyncio.get_running_loop().time()
        try:
            yield
        finally:
            self._typical_seconds += 0.1 * (asyncio.get_running_loop().time() - start - self._typical_seconds)
            self._leave()

    async def drained(self) -> None:
        """Refuse newcomers from now on, and wait until nobody is in or waits."""
        self.is_draining = True
        await self._idle.wait()

    async def _wait(self, priority: int) -> None:
        if len(self._waiting) >= self._max_queued:
            raise ApiError(
                429,
                f"{self.num_inside} requests are worked on and {len(self._waiting)} wait; no more than that are taken; "
                f"try again after a while.",
                code="too_many_requests",
                headers={"Retry-After": str(self._retry_seconds())},
            )
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (priority, next(self._arrivals), turn)
        heapq.heappush(self._waiting, entry)
        try:
            await turn  # whoever leaves has counted this one in
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._leave()
            elif entry in self._waiting:  # else it was passed over by one who left before this ran
                self._waiting.remove(entry)
                heapq.heapify(self._waiting)
                self._count(0)
            raise

    def _leave(self) -> None:
        self.num_inside -= 1
        while self._waiting and self.num_inside < self._max_concurrent:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                self.num_inside += 1
                turn.set_result(None)
        self._count(0)

    def _count(self, change: int) -> None:
        self.num_inside += change
        if self.num_inside or self._waiting:
            self._idle.clear()
        else:
            self._idle.set()

    def _retry_seconds(self) -> int:
        """About when the queue will have moved on by one."""
        low, high = _RETRY_SECONDS
        return int(min(max(low, self._typical_seconds * (1 + len(self._waiting)) / self._max_concurrent), high))
