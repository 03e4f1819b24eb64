"""What a router's load on the experts means: pure functions of numbers, which know no model.

A load is each expert's fraction of a layer's routed tokens; the even share is 1 / num_experts. Two kinds of expert are
unusual, and only when they stay so over several records, since a single batch says little:

- dead: under a tenth of the even share. It gets hardly any gradient, so it stays as it was initialised;
- hot: over four times the even share, or, where a layer has fewer than ten experts and four times the even share is
  (nearly) everything, a third of the way from the even share to all tokens. It is where tokens are dropped and what
  the other experts' devices wait for.
"""

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from moesaic.report.quantities import percent
from moesaic.report.records import ExpertRecord

WINDOW = 10  # records
DEAD_SHARE = 0.1
HOT_SHARE = 4.0

_NAMED_EXPERTS = 8


def relative_load(load: Sequence[float]) -> np.ndarray:
    """Return load / even share: 1 where the layer is in balance, at most num_experts."""
    values = np.asarray(load, dtype=np.float64)  # (E,)
    return values * len(values)


def imbalance(load: Sequence[float]) -> float:
    """Return max / mean of the load: 1 when even, num_experts when one expert gets all; NaN without tokens."""
    values = np.asarray(load, dtype=np.float64)  # (E,)
    mean = values.mean()
    return float(values.max() / mean) if mean > 0 else math.nan


def load_entropy(load: Sequence[float]) -> float:
    """Return the entropy of the load divided by log(num_experts): 1 when even, 0 when one expert gets all.

    A layer of one expert is even. This is not the routing entropy, which is a token's own uncertainty: a router may
    decide sharply for each token and yet use all experts evenly.
    """
    values = np.asarray(load, dtype=np.float64)  # (E,)
    if len(values) == 1:
        return 1.0
    total = values.sum()
    if not total > 0:
        return math.nan
    chosen = values[values > 0] / total
    return abs(float((chosen * np.log(chosen)).sum() / math.log(len(values))))


def hot_share(num_experts: int) -> float:
    """Return the multiple of the even share above which an expert of such a layer is hot."""
    return min(HOT_SHARE, 1 + (num_experts - 1) / 3)


@dataclass(frozen=True, kw_only=True)
class ExpertWarning:
    """The dead, or the hot, experts of one layer; `loads` are their mean fractions of the routed tokens."""

    layer: int
    kind: Literal["dead", "hot"]
    experts: tuple[int, ...]
    loads: tuple[float, ...]
    num_experts: int

    @property
    def message(self) -> str:
        """What is seen, what would be usual, what to do."""
        named = ", ".join(str(expert) for expert in self.experts[:_NAMED_EXPERTS])
        if len(self.experts) > _NAMED_EXPERTS:
            named += f" and {len(self.experts) - _NAMED_EXPERTS} more"
        who = f"expert {named} is" if len(self.experts) == 1 else f"experts {named} are"
        each = "" if len(self.experts) == 1 else " each in the mean"
        mean = sum(self.loads) / len(self.loads)
        seen = f"{percent(mean)} of tokens{each}, even share {percent(1 / self.num_experts)}"
        if self.kind == "dead":
            remedy = "raise moe.router.balance_loss, or set moe.router.noise; fewer experts may do as well"
            return f"layer {self.layer}: {who} dead ({seen}) and learning next to nothing; {remedy}."
        remedy = "raise moe.router.balance_loss; until then a larger moe.capacity.factor drops fewer tokens"
        return f"layer {self.layer}: {who} hot ({seen}); {remedy}."


def name_unusual(history: Sequence[ExpertRecord], *, window: int = WINDOW) -> list[ExpertWarning]:
    """Return the experts that were dead, or hot, in every one of the last `window` records (oldest record first).

    Fewer records than `window` name none, and neither does a load that is not a number.
    """
    assert window > 0, f"window must be positive: {window}"
    recent = list(history)[-window:]
    if len(recent) < window:
        return []
    warnings: list[ExpertWarning] = []
    for place, layer in enumerate(recent[-1].layers):
        loads = np.asarray([record.load[place] for record in recent], dtype=np.float64)  # (window, E)
        num_experts = loads.shape[1]
        relative = loads * num_experts
        masks: tuple[tuple[Literal["dead", "hot"], np.ndarray], ...] = (
            ("dead", (relative < DEAD_SHARE).all(axis=0)),
            ("hot", (relative > hot_share(num_experts)).all(axis=0)),
        )
        for kind, mask in masks:
            experts = np.flatnonzero(mask)
            if len(experts):
                means = loads[:, experts].mean(axis=0)
                warnings.append(
                    ExpertWarning(
                        layer=layer,
                        kind=kind,
                        experts=tuple(int(expert) for expert in experts),
                        loads=tuple(float(mean) for mean in means),
                        num_experts=num_experts,
                    )
                )
    return warnings


class ExpertWatch:
    """Watches a run's records and names each unusual expert once, again only after it had recovered."""

    def __init__(self, *, window: int = WINDOW) -> None:
        self._window = window
        self._history: deque[ExpertRecord] = deque(maxlen=window)
        self._named: set[tuple[int, str, int]] = set()

    def update(self, record: ExpertRecord | None) -> list[ExpertWarning]:
        """Take the `moe` part of a record (None: a dense model); return what has newly become unusual."""
        if record is None:
            return []
        self._history.append(record)
        current: set[tuple[int, str, int]] = set()
        news: list[ExpertWarning] = []
        for warning in name_unusual(self._history, window=self._window):
            keys = [(warning.layer, warning.kind, expert) for expert in warning.experts]
            current.update(keys)
            fresh = [place for place, key in enumerate(keys) if key not in self._named]
            if fresh:
                news.append(
                    ExpertWarning(
                        layer=warning.layer,
                        kind=warning.kind,
                        experts=tuple(warning.experts[place] for place in fresh),
                        loads=tuple(warning.loads[place] for place in fresh),
                        num_experts=warning.num_experts,
                    )
                )
        self._named = current
        return news
