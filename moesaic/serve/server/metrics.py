"""What is counted: Prometheus metrics in a registry of their own, and recent percentiles for the page."""

import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from moesaic.report.expert_load import hot_share, imbalance, load_entropy
from moesaic.serve.outputs import EngineStats, LayerLoad

_FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60)
_TOKEN_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
_WHOLE_BUCKETS = (0.1, 0.25, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)
_QUEUE_BUCKETS = (0.001, 0.01, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 120)
_RECENT = 512
# An expert is hot above this multiple of its layer's mean, where a layer has enough experts for that.
_HOT = 2.0


class Metrics:
    """Counts requests as they end, and shows an engine's figures as they were last given."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._start = time.monotonic()
        self._recent_first: deque[float] = deque(maxlen=_RECENT)
        self._recent_token: deque[float] = deque(maxlen=_RECENT)
        self._requests = Counter(
            "moesaic_requests", "Requests by path and status.", ["path", "status"], registry=self.registry
        )
        self._first = _histogram("time_to_first_token", "From a request's arrival to its first token.", self.registry,
                                 _FIRST_TOKEN_BUCKETS)  # fmt: skip
        self._token = _histogram("time_per_output_token", "Between the tokens of a text, its mean.", self.registry,
                                 _TOKEN_BUCKETS)  # fmt: skip
        self._whole = _histogram("request", "From a request's arrival to its end, of those whose turn came.",
                                 self.registry, _WHOLE_BUCKETS)  # fmt: skip
        self._queue = _histogram("queue", "A request waits for its turn before the engine.", self.registry,
                                 _QUEUE_BUCKETS)  # fmt: skip
        self._gauges = _EngineGauges()
        self.registry.register(self._gauges)

    def request_ended(self, path: str, status: int, seconds: float | None) -> None:
        """Count a request by its path and status.

        seconds: None for what ended before its turn came; such durations would drown the others.
        """
        self._requests.labels(path, str(status)).inc()
        if seconds is not None:
            self._whole.observe(seconds)

    def waited(self, seconds: float) -> None:
        self._queue.observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)
        self._recent_first.append(seconds)

    def text_ended(self, seconds_per_token: float) -> None:
        self._token.observe(seconds_per_token)
        self._recent_token.append(seconds_per_token)

    def exposition(self, stats: EngineStats, *, num_queued: int) -> bytes:
        """Return all metrics in Prometheus' text format."""
        self._gauges.stats, self._gauges.num_queued = stats, num_queued
        return generate_latest(self.registry)

    def summary(self, stats: EngineStats, *, model: str, num_queued: int) -> dict[str, Any]:
        """Return what the page shows: the engine's figures, and percentiles of the last requests in seconds."""
        figures = asdict(stats)
        del figures["layers"]
        return {
            **figures,
            "num_queued": num_queued,
            "uptime_seconds": time.monotonic() - self._start,
            "model": model,
            "ttft_seconds": _percentiles(self._recent_first),
            "time_per_output_token_seconds": _percentiles(self._recent_token),
        }


class _EngineGauges:
    """A Prometheus collector of the engine's figures."""

    def __init__(self) -> None:
        self.stats: EngineStats | None = None
        self.num_queued = 0

    def collect(self) -> Iterable[Metric]:
        stats = self.stats
        if stats is None:
            return
        for name, help_text, value in (
            ("running", "Texts that are being computed.", stats.num_running),
            ("waiting", "Texts that wait in the engine.", stats.num_waiting),
            ("queued", "Requests that wait before the engine.", self.num_queued),
            ("kv_blocks_used", "Blocks of keys and values in use.", stats.kv_blocks_used),
            ("kv_blocks_cached", "Blocks that are kept for texts that begin the same.", stats.kv_blocks_cached),
            ("kv_blocks", "Blocks of keys and values.", stats.kv_blocks_total),
            ("step_seconds", "Duration of the last step.", stats.step_seconds),
            ("step_tokens", "Tokens of the last step.", stats.step_tokens),
            ("distinct_experts_per_step", "Experts with a token in the last step, mean over layers.",
             stats.distinct_experts_per_step),
        ):  # fmt: skip
            yield GaugeMetricFamily(f"moesaic_{name}", help_text, value=float(value))
        for name, help_text, count in (
            ("steps", "Passes of the model for texts, without those for embeddings.", stats.num_steps),
            (
                "prompt_tokens",
                "Tokens of prompts, of each of n texts and of embeddings.",
                stats.num_prompt_tokens,
            ),
            ("cached_tokens", "Tokens of prompts whose keys and values were there.", stats.num_cached_tokens),
            ("generated_tokens", "New tokens.", stats.num_generated_tokens),
            ("preemptions", "Texts that had to give their blocks up.", stats.num_preemptions),
            ("texts", "Texts that have ended.", stats.num_finished),
            ("student_texts", "Of these, texts of the student that helps out under overload.", stats.num_by_student),
            ("drafted_tokens", "Tokens that a draft proposed.", stats.num_drafted_tokens),
            ("accepted_tokens", "Drafted tokens that were right.", stats.num_accepted_tokens),
            ("distinct_experts", "Experts with a token, mean over layers, summed over steps.", stats.distinct_experts),
            ("expert_bytes", "Weights of the experts that had a token, in every step.", stats.expert_bytes_used),
        ):
            if count is not None:
                yield CounterMetricFamily(f"moesaic_{name}", help_text, value=float(count))
        for name, help_text, share in (
            ("expert_hit_rate", "Of these weights, the share of late that was in memory and not read from the disk.",
             stats.expert_hit_rate),
            ("expert_guess_share", "Of the experts chosen of late, the share that had been guessed, to be read ahead.",
             stats.expert_guess_share),
        ):  # fmt: skip
            if share is not None:
                yield GaugeMetricFamily(f"moesaic_{name}", help_text, value=share)
        uneven = GaugeMetricFamily(
            "moesaic_expert_imbalance", "Recent load of a layer's busiest expert over the mean.", labels=["layer"]
        )
        for layer in stats.layers:
            value = imbalance(layer.recent_tokens_per_expert)
            if value == value:  # NaN without tokens
                uneven.add_metric([str(layer.layer)], value)
        yield uneven


def describe_experts(stats: EngineStats) -> dict[str, Any]:
    """Return the load of every layer and expert, with who is hot (of late) and who had no token at all."""
    return {"layers": [_describe_layer(layer) for layer in stats.layers], "num_steps": stats.num_own_steps}


def _describe_layer(layer: LayerLoad) -> dict[str, Any]:
    recent = layer.recent_tokens_per_expert
    mean, hot = sum(recent) / len(recent), min(_HOT, hot_share(layer.num_experts))
    return {
        "layer": layer.layer,
        "num_experts": layer.num_experts,
        "top_k": layer.top_k,
        "tokens_per_expert": list(layer.tokens_per_expert),
        "recent_tokens_per_expert": list(recent),
        "entropy": load_entropy(recent) if mean > 0 else 0.0,
        "hot": [expert for expert, count in enumerate(recent) if count > hot * mean],
        "dead": [expert for expert, count in enumerate(layer.tokens_per_expert) if count == 0],
    }


def _histogram(name: str, help_text: str, registry: CollectorRegistry, buckets: Sequence[float]) -> Histogram:
    return Histogram(f"moesaic_{name}_seconds", help_text, buckets=buckets, registry=registry)


def _percentiles(values: Iterable[float]) -> dict[str, float] | None:
    ordered = sorted(values)
    if not ordered:
        return None
    last = len(ordered) - 1
    return {name: ordered[round(last * share)] for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
