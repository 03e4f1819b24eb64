"""How many tokens to draft: from what drafting and checking cost here, and how often drafted tokens are right.

A Mixture-of-Experts model pays for every distinct expert that the checked tokens choose, so that checking four tokens
may cost three times as much as one; whether drafting pays depends on the model, the machine, the batch and the text.
All three are measured while serving, older measurements counting less.
"""

from dataclasses import dataclass

# Of a measurement's weight, what is left after the next.
_KEPT = 0.98
# Of counts, for a slope. One trial of a second token among so many steps with one has 0.02, and must be able to correct
# what a first, slow step said.
_LEAST_VARIANCE = 0.01
# An acceptance to begin with, and how many drafted tokens it counts for.
_FIRST_ACCEPTANCE, _FIRST_WEIGHT = 0.7, 4.0
# Where drafting does not pay, a step in so many drafts all the same: texts change. It may take a long time, since a
# draft model then computes all that it has missed: at most this share of the time goes into such steps.
_TRIAL_EVERY, _TRIAL_SHARE = 128, 0.02


@dataclass
class Line:
    """seconds = base + slope * count, fitted to measurements; slope: the last one that different counts showed."""

    weight: float = 0.0
    x: float = 0.0
    y: float = 0.0
    xx: float = 0.0
    xy: float = 0.0
    slope: float | None = None

    def add(self, count: int, seconds: float) -> None:
        self.weight = self.weight * _KEPT + 1.0
        self.x = self.x * _KEPT + count
        self.y = self.y * _KEPT + seconds
        self.xx = self.xx * _KEPT + count * count
        self.xy = self.xy * _KEPT + count * seconds
        x, y = self.x / self.weight, self.y / self.weight
        variance = self.xx / self.weight - x * x
        if variance > _LEAST_VARIANCE:
            self.slope = max(0.0, (self.xy / self.weight - x * y) / variance)

    @property
    def is_known(self) -> bool:
        """Whether measurements of different counts have been there."""
        return self.slope is not None

    def at(self, count: float) -> float:
        """Return the seconds to expect; the mean where one count only was measured. 0 without any measurement."""
        if not self.weight:
            return 0.0
        x, y = self.x / self.weight, self.y / self.weight
        return y if self.slope is None else max(y + self.slope * (count - x), 1e-9)


class DepthChooser:
    """Chooses the number of drafted tokens with the most tokens per second to expect."""

    def __init__(self, max_depth: int) -> None:
        assert max_depth >= 1, max_depth
        self.max_depth = max_depth
        self._checking, self._drafting = Line(), Line()
        self._right = _FIRST_ACCEPTANCE * _FIRST_WEIGHT
        self._tried = _FIRST_WEIGHT
        self._num_choices = self._without = 0
        self._seconds_without = self._last_draft_seconds = 0.0

    @property
    def acceptance(self) -> float:
        """The share of drafted tokens that are right, of those whose predecessors were."""
        return self._right / self._tried

    def record_step(self, num_tokens: int, seconds: float) -> None:
        """A step of sequences that generate, with so many tokens to compute; without the time of drafting."""
        self._checking.add(num_tokens, seconds)
        self._seconds_without += seconds

    def record_draft(self, num_sequences: int, depth: int, seconds: float, *, missed_seconds: float = 0.0) -> None:
        """So many tokens drafted one after the other, each for so many sequences; missed_seconds: what it took to
        compute what the draft had missed before, which drafting in every step would not.
        """
        self._last_draft_seconds, self._seconds_without = seconds + missed_seconds, 0.0
        if depth:
            self._drafting.add(num_sequences, seconds / depth)

    def record_check(self, num_drafted: int, num_right: int) -> None:
        """Of one sequence: how many were drafted, and how many of the first were right."""
        if num_drafted:
            self._right = self._right * _KEPT + num_right
            self._tried = self._tried * _KEPT + num_right + (num_right < num_drafted)

    def choose(self, num_sequences: int) -> int:
        """Return the number of tokens to draft for each of so many sequences; 0: drafting does not pay."""
        if not num_sequences:
            return 0
        self._num_choices += 1
        if not self._checking.is_known:  # both ends, so that there is a line between them
            return self.max_depth if self._num_choices % 2 else 0
        depth = max(range(self.max_depth + 1), key=lambda depth: self.rate(depth, num_sequences))
        self._without = 0 if depth else self._without + 1
        if depth or self._without < _TRIAL_EVERY or self._last_draft_seconds > _TRIAL_SHARE * self._seconds_without:
            return depth
        self._without = 0
        return 1

    def rate(self, depth: int, num_sequences: int) -> float:
        """Return the tokens per second to expect."""
        tokens = sum(self.acceptance**place for place in range(depth + 1))
        seconds = self._checking.at(num_sequences * (depth + 1)) + depth * self._drafting.at(num_sequences)
        return num_sequences * tokens / max(seconds, 1e-9)
