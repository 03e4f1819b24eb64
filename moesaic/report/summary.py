"""A run in a few numbers: what `moesaic inspect RUN` prints and, with --json, writes."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from moesaic.report.expert_load import ExpertWarning, imbalance, load_entropy, name_unusual
from moesaic.report.json_values import json_values
from moesaic.report.records import ExpertRecord, Metrics

# Records whose mean stands for "now": single batches scatter too much.
RECENT = 20


@dataclass(frozen=True, kw_only=True)
class LayerSummary:
    """One MoE layer over the most recent records."""

    layer: int
    num_experts: int
    load: tuple[float, ...]
    imbalance: float
    load_entropy: float
    routing_entropy: float
    drop_rate: float


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run so far. Losses are in nats per token, `loss` smoothed as in the plots, rates means of the last records."""

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
    best = metrics.best_evaluation
    shares = [record.share_of_peak for record in recent if record.share_of_peak is not None]
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
        tokens_per_second=finite_mean([record.tokens_per_second for record in recent]),
        flops_per_second=finite_mean([record.flops_per_second for record in recent]),
        share_of_peak=finite_mean(shares) if shares else None,
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
                imbalance=imbalance(load),
                load_entropy=load_entropy(load),
                routing_entropy=finite_mean([record.entropy[place] for record in experts]),
                drop_rate=finite_mean([record.drop_rate[place] for record in experts]),
            )
        )
    return tuple(summaries)


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
