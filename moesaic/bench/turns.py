"""Timing what is compared: in turn, so that a drifting machine hits all alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_FEWEST_ROUNDS = 5


@dataclass(frozen=True)
class Times:
    """Seconds of every call by candidate; the calls of one index were neighbours in time."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, other: str) -> float:
        """Return the median over rounds of time(name) / time(other)."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[other], strict=True))


def time_in_turn(
    candidates: Mapping[str, Callable[[], object]],
    *,
    seconds: float,
    wait: Callable[[], None] = lambda: None,
    warmup_rounds: int = 2,
) -> Times:
    """Call the candidates one after the other, A B C A B C ..., for about `seconds` and at least five rounds.

    wait returns when what a call started is done (a GPU's synchronisation).
    """
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(warmup_rounds):
        for call in candidates.values():
            call()
    wait()
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < _FEWEST_ROUNDS or time.perf_counter() < end:
        for name, call in candidates.items():
            start = time.perf_counter()
            call()
            wait()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return Times(times)
