"""A run in a few numbers: what `moesaic inspect RUN` prints and, with --json, writes."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moesaic.report.expert_load import ExpertWarning, imbalance, load_entropy, name_unusual
from moesaic.report.json_values import json_values
from moesaic.report.records import ExpertRecord, Metrics, TrainRecord

# Records whose mean stands for "now": single batches scatter too much.
RECENT = 20


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One MoE layer over the most recent records: each value is the mean of the records' own, `load` by expert.

    `imbalance` is therefore at least that of `load`: which expert is the fullest changes from record to record.
    """

    layer: int
    num_experts: int
    load: tuple[float, ...]
    imbalance: float
    load_entropy: float
    routing_entropy: float
    drop_rate: float


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run so far. Losses are in nats per token, `loss` smoothed as in the plots, speeds those of the last records'
    steps together."""

    step: int
    tokens: int
    seconds: float
    loss: float
    validation_loss: float | None
    best_validation_loss: float | None
    best_validation_step: int | None
    learning_rate: float
    tokens_per_second: float
    flops_per_second: float
    share_of_peak: float | None
    skipped_steps: int
    layers: tuple[LayerSummary, ...]
    warnings: tuple[ExpertWarning, ...]

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values; what is not finite becomes null, and each warning also carries its sentence."""
        values = asdict(self)
        values["warnings"] = [{**asdict(warning), "message": warning.message} for warning in self.warnings]
        return dict(json_values(values))


def summarize(metrics: Metrics) -> RunSummary | None:
    """Return the summary, or None before the first train record."""
    if not metrics.train:
        return None
    last, recent = metrics.train[-1], metrics.train[-RECENT:]
    since = metrics.train[-RECENT - 1] if len(metrics.train) > RECENT else None
    best = metrics.best_evaluation
    experts = [record.moe for record in recent if record.moe is not None]
    return RunSummary(
        step=last.step,
        tokens=last.tokens,
        seconds=last.seconds,
        loss=float(smoothed_losses(metrics)[-1]),
        validation_loss=metrics.evaluation[-1].loss if metrics.evaluation else None,
        best_validation_loss=best.loss if best else None,
        best_validation_step=best.step if best else None,
        learning_rate=last.learning_rate,
        tokens_per_second=mean_rate(recent, [record.tokens_per_second for record in recent], since=since),
        flops_per_second=mean_rate(recent, [record.flops_per_second for record in recent], since=since),
        share_of_peak=mean_share_of_peak(recent, since=since),
        skipped_steps=last.skipped_steps,
        layers=summarize_layers(experts),
        warnings=tuple(name_unusual(experts)),
    )


def summarize_layers(experts: Sequence[ExpertRecord]) -> tuple[LayerSummary, ...]:
    """Return each MoE layer's means over the records; a record whose load is not a number is left out."""
    if not experts:
        return ()
    summaries = []
    for place, layer in enumerate(experts[-1].layers):
        loads = np.asarray([record.load[place] for record in experts], dtype=np.float64)  # (records, E)
        loads = loads[np.isfinite(loads).all(axis=1)]
        num_experts = len(experts[-1].load[place])
        load = tuple(float(share) for share in loads.mean(axis=0)) if len(loads) else (math.nan,) * num_experts
        summaries.append(
            LayerSummary(
                layer=layer,
                num_experts=num_experts,
                load=load,
                imbalance=finite_mean([imbalance(shares) for shares in loads]),
                load_entropy=finite_mean([load_entropy(shares) for shares in loads]),
                routing_entropy=finite_mean([record.entropy[place] for record in experts]),
                drop_rate=finite_mean([record.drop_rate[place] for record in experts]),
            )
        )
    return tuple(summaries)


def mean_rate(records: Sequence[TrainRecord], rates: Sequence[float], *, since: TrainRecord | None = None) -> float:
    """Return a rate over all steps from `since` (None: the start of the run) to the last record, not of each record.

    rates: per second, one for each record and in proportion to its tokens_per_second; `records` may leave some out, a
    rate then stands for the steps since the record before it. NaN where no rate is finite.
    """
    tokens = np.diff([since.tokens if since else 0, *(record.tokens for record in records)])
    seconds = np.diff([since.seconds if since else 0.0, *(record.seconds for record in records)])
    with np.errstate(divide="ignore", invalid="ignore"):
        amounts = tokens * np.asarray(rates, dtype=np.float64) / [record.tokens_per_second for record in records]
        known = np.isfinite(amounts) & (seconds > 0)
        return float(amounts[known].sum() / seconds[known].sum())


def mean_share_of_peak(records: Sequence[TrainRecord], *, since: TrainRecord | None = None) -> float | None:
    """Return the share of the machine's peak over all those steps, as `mean_rate`; None where no peak is known."""
    shares = [record.share_of_peak for record in records]
    if all(share is None for share in shares):
        return None
    return mean_rate(records, [math.nan if share is None else share for share in shares], since=since)


def smoothed_losses(metrics: Metrics) -> np.ndarray:
    """Return the smoothed training loss at each of metrics.train, from the losses of all records."""
    if metrics.losses is None:
        return smoothed(np.asarray([record.loss for record in metrics.train], dtype=np.float64))
    return smoothed(np.asarray(metrics.losses))[list(metrics.places)]


def smoothed(values: np.ndarray) -> np.ndarray:
    """Return a moving mean over about a twentieth of the points that skips what is not finite; twenty are left alone.

    The window is centred and narrows towards the first point, so a steep start is neither delayed nor flattened; at
    the last point it reaches back only. NaN where a window holds no finite value.
    """
    count = len(values)
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    places = np.arange(count)
    reach = np.minimum(places, math.ceil(count / 40) if count > 20 else 0)
    low, high = places - reach, np.minimum(count, places + reach + 1)
    inside = counts[high] - counts[low]
    return np.where(inside > 0, (sums[high] - sums[low]) / np.maximum(inside, 1), np.nan)


def finite_mean(values: Sequence[float]) -> float:
    """Return the mean of the finite values; NaN when there is none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
