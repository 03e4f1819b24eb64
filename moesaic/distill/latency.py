"""How long two models take for a prompt and for a token after it: measured in turns, compared round by round.

A busy machine hits both models of a round alike, so their ratio is the median of the rounds' ratios, and not the ratio
of two medians, which a few slow calls of one model can carry anywhere.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.model.kv_cache import BatchCache
from moesaic.model.transformer import Transformer

# Of prompts, and of tokens again; a slow model has the fewest rounds that bound a median, and takes longer.
_SECONDS = 0.4
_FEWEST_ROUNDS = 6
# Bounds further apart than this leave open what is faster, and by how much.
_CLEAR = 1.25


@dataclass(frozen=True)
class Ratio:
    """Time over time: the median of the rounds' ratios, and the bounds that it keeps in 19 of 20 such measurements."""

    median: float
    low: float
    high: float
    num_rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float], other: Sequence[float]) -> "Ratio":
        """Return seconds over other, both of the same rounds.

        Source: the sign test's interval of a median, ranks n / 2 -+ 0.98 sqrt(n); of six rounds, the first and the
        last.
        """
        ratios = sorted(a / b for a, b in zip(seconds, other, strict=True))
        count = len(ratios)
        rank = max(0, math.floor(count / 2 - 0.98 * math.sqrt(count)))
        return cls(statistics.median(ratios), ratios[rank], ratios[count - 1 - rank], count)

    @property
    def is_clear(self) -> bool:
        """Whether the rounds agree well enough to name one number."""
        return self.high <= _CLEAR * self.low


@dataclass(frozen=True)
class Latency:
    """Seconds of every round by model: of a prompt, and of a new token after one (a round's median)."""

    prefill: dict[str, list[float]]
    decode: dict[str, list[float]]


@torch.no_grad()
def measure_latency(models: dict[str, Transformer], prompt: Tensor, *, num_new: int) -> Latency:
    """Time a prompt (1, S), and num_new tokens after it one by one, for some 0.4 s each and at least six rounds."""

    def prefill(name: str) -> float:
        return _prompt(models[name], prompt, num_new)[0]

    def decode(name: str) -> float:
        model = models[name]
        _, cache = _prompt(model, prompt, num_new)
        token = prompt[:, -1:].to(model.device)
        return statistics.median(_seconds(model, token, cache) for _ in range(num_new))

    return Latency(in_turns(list(models), prefill), in_turns(list(models), decode))


def in_turns(names: Sequence[str], measure: Callable[[str], float]) -> dict[str, list[float]]:
    """Return what measure says of each name in every round: A B, B A, A B, ..., after one that is not counted."""
    for name in names:
        measure(name)
    times: dict[str, list[float]] = {name: [] for name in names}
    order = list(names)
    num_rounds, end = 0, time.perf_counter() + _SECONDS
    while num_rounds < _FEWEST_ROUNDS or time.perf_counter() < end:
        for name in order:
            times[name].append(measure(name))
        order.reverse()  # what comes second may find caches and clocks as the first has left them
        num_rounds += 1
    return times


def _prompt(model: Transformer, prompt: Tensor, num_new: int) -> tuple[float, BatchCache]:
    """Return how long a prompt takes, and the cache that holds it, with room for num_new tokens."""
    cache = BatchCache(model.config, 1, prompt.shape[1] + num_new, dtype=model.compute_dtype, device=model.device)
    return _seconds(model, prompt.to(model.device), cache), cache


def _seconds(model: Transformer, tokens: Tensor, cache: BatchCache) -> float:
    """Return how long the likeliest next token of tokens (1, S) takes; on a GPU, reading it back waits for it."""
    started = time.perf_counter()
    int(model.logits(model(tokens, cache=cache).hidden[0, -1]).argmax())
    return time.perf_counter() - started
