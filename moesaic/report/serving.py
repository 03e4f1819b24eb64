"""What was measured at a server: each request, and the figures that follow from them; kept as one JSON file.

Who sends the requests is bench/serving.py; what is drawn of them, serving_plots.py.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from moesaic.errors import DataError
from moesaic.folders import load_json, write_whole

_KIND = "serving"

# refused: status 429. http_error: any other status than 200. connection: nobody answered. timeout: the time of a
# request was over. broken_stream: it ended early, held no JSON, or an error. wrong_token_count: not as many tokens as
# were asked for, or none counted.
ErrorKind = Literal["refused", "http_error", "connection", "timeout", "broken_stream", "wrong_token_count"]


@dataclass(frozen=True, kw_only=True)
class RequestResult:
    """One request.

    Units: seconds since the run began; due_seconds is when it should have been sent, chunk_seconds when each part of
    the answer came that carried tokens, end_seconds when the answer was over, or had failed.

    asked_*: as sent. prompt_tokens, cached_tokens, output_tokens: as the server counted, None where it did not.
    message: what the server or the connection said, of an error.
    """

    due_seconds: float
    sent_seconds: float
    end_seconds: float
    chunk_seconds: tuple[float, ...]
    asked_prompt_tokens: int
    asked_output_tokens: int
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    output_tokens: int | None = None
    error: ErrorKind | None = None
    message: str | None = None

    @property
    def lateness_seconds(self) -> float:
        """How late the load generator was."""
        return self.sent_seconds - self.due_seconds

    @property
    def ttft_seconds(self) -> float | None:
        """Time to the first token, from sending; None where none came."""
        return self.chunk_seconds[0] - self.sent_seconds if self.chunk_seconds else None

    @property
    def tpot_seconds(self) -> float | None:
        """Time from the first chunk to the last for each token behind the first; None where there is no second."""
        if self.output_tokens is None or self.output_tokens < 2 or len(self.chunk_seconds) < 2:
            return None
        return (self.chunk_seconds[-1] - self.chunk_seconds[0]) / (self.output_tokens - 1)

    @property
    def end_to_end_seconds(self) -> float:
        return self.end_seconds - self.sent_seconds

    def is_good(self, *, ttft_limit_seconds: float, tpot_limit_seconds: float) -> bool:
        """Whether it was answered, and within both limits; an answer in one chunk has no TPOT to be judged by."""
        if self.error is not None or self.ttft_seconds is None:
            return False
        return self.ttft_seconds <= ttft_limit_seconds and (self.tpot_seconds or 0.0) <= tpot_limit_seconds


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """Values of one kind, in seconds; percentiles are interpolated between neighbours."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Distribution | None":
        """Return what values are like; None where there are none."""
        array = np.fromiter(values, np.float64)
        if not array.size:
            return None
        p50, p90, p95, p99 = (float(each) for each in np.percentile(array, (50, 90, 95, 99)))
        return cls(
            count=array.size, mean=float(array.mean()), p50=p50, p90=p90, p95=p95, p99=p99, max=float(array.max())
        )


@dataclass(frozen=True, kw_only=True)
class ServingSummary:
    """The figures of a run. Times and tokens are those of completed requests; lateness is that of all.

    duration_seconds: from the run's begin to the end of its last request, failed ones included; what is "per second"
    is divided by it. errors: failed requests by kind. inter_token: gaps between an answer's chunks; tokens_per_chunk:
    how many tokens came in one, more than 1 where a server sends several at once or holds half characters back.
    num_shorter: completed requests whose answers ended before they were as long as asked for.
    num_good: completed requests within both limits; goodput_share is of all requests that were sent.
    """

    num_requests: int
    num_completed: int
    errors: Mapping[str, int]
    duration_seconds: float
    prompt_tokens: int
    asked_prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    num_shorter: int
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    tokens_per_chunk: float | None
    num_good: int
    goodput_share: float
    goodput_per_second: float
    ttft: Distribution | None
    tpot: Distribution | None
    inter_token: Distribution | None
    end_to_end: Distribution | None
    lateness: Distribution | None


@dataclass(frozen=True, kw_only=True)
class ServingResult:
    """A run against one server. name: what plots call it; workload: what was asked of it; created: ISO 8601, UTC.

    num_unended: requests of the workload that had not ended, or not begun, when the run was interrupted; they are no
    part of the result.
    """

    name: str
    url: str
    model: str
    created: str
    workload: Mapping[str, Any]
    ttft_limit_seconds: float
    tpot_limit_seconds: float
    requests: Sequence[RequestResult]
    num_unended: int = 0

    @property
    def completed(self) -> list[RequestResult]:
        return [each for each in self.requests if each.error is None]

    def summary(self) -> ServingSummary:
        completed = self.completed
        duration = max((each.end_seconds for each in self.requests), default=0.0)
        per_second = 1.0 / duration if duration else 0.0
        prompt_tokens = sum(each.prompt_tokens or 0 for each in completed)
        output_tokens = sum(each.output_tokens or 0 for each in completed)
        num_chunks = sum(len(each.chunk_seconds) for each in completed)
        limits = {"ttft_limit_seconds": self.ttft_limit_seconds, "tpot_limit_seconds": self.tpot_limit_seconds}
        num_good = sum(each.is_good(**limits) for each in self.requests)
        return ServingSummary(
            num_requests=len(self.requests),
            num_completed=len(completed),
            errors=dict(Counter(each.error for each in self.requests if each.error is not None).most_common()),
            duration_seconds=duration,
            prompt_tokens=prompt_tokens,
            asked_prompt_tokens=sum(each.asked_prompt_tokens for each in completed),
            cached_tokens=sum(each.cached_tokens or 0 for each in completed),
            output_tokens=output_tokens,
            num_shorter=sum((each.output_tokens or 0) < each.asked_output_tokens for each in completed),
            requests_per_second=len(completed) * per_second,
            output_tokens_per_second=output_tokens * per_second,
            total_tokens_per_second=(prompt_tokens + output_tokens) * per_second,
            tokens_per_chunk=output_tokens / num_chunks if num_chunks else None,
            num_good=num_good,
            goodput_share=num_good / len(self.requests) if self.requests else 0.0,
            goodput_per_second=num_good * per_second,
            ttft=Distribution.of(each.ttft_seconds for each in completed if each.ttft_seconds is not None),
            tpot=Distribution.of(each.tpot_seconds for each in completed if each.tpot_seconds is not None),
            inter_token=Distribution.of(
                gap for each in completed for gap in np.diff(np.asarray(each.chunk_seconds, dtype=np.float64))
            ),
            end_to_end=Distribution.of(each.end_to_end_seconds for each in completed),
            lateness=Distribution.of(each.lateness_seconds for each in self.requests),
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values: what was asked, the summary, and every request, to the microsecond."""
        values = {**asdict(self), "requests": [_rounded(asdict(each)) for each in self.requests]}
        requests = values.pop("requests")
        return {"kind": _KIND, **values, "summary": asdict(self.summary()), "requests": requests}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ServingResult":
        """Raises: KeyError, TypeError or ValueError for values that to_json did not make."""
        if values["kind"] != _KIND:
            raise ValueError(f"its kind is {values['kind']!r}")
        given = {key: value for key, value in values.items() if key not in ("kind", "summary")}
        given["requests"] = tuple(_read_request(each) for each in given["requests"])
        return cls(**given)


def write_serving(path: Path, result: ServingResult) -> Path:
    """Write a result, whole or not at all, and return its file.

    Raises: DataError where it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(result.to_json(), allow_nan=False) + "\n")
    except OSError as error:
        raise DataError(
            f"{path} cannot be written ({error.strerror}); the result is one JSON file; name a file in a folder that "
            f"can be written to."
        ) from None
    return path


def read_serving(path: Path) -> ServingResult:
    """Read what write_serving wrote.

    Raises: DataError for another file.
    """
    try:
        values = load_json(path)
        return ServingResult.from_json(values)
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}); a result of `moesaic bench serve` is required; name one."
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no result of `moesaic bench serve` ({type(error).__name__}: {error}); one is required; name a "
            f"file that --output wrote."
        ) from None


def tokens_over_time(result: ServingResult, *, bin_seconds: float) -> tuple[list[float], list[float]]:
    """Return the middle of each stretch of time, and the output tokens per second in it, of completed requests.

    An answer's tokens are taken to be spread evenly over its chunks, which is all that a client can know. What is left
    at the end for less than a stretch belongs to the last one.
    """
    duration = max((each.end_seconds for each in result.requests), default=0.0)
    num_bins = max(1, int(duration / bin_seconds))
    starts = np.arange(num_bins) * bin_seconds
    lengths = np.diff(starts, append=duration or bin_seconds)
    tokens = np.zeros(num_bins)
    for each in result.completed:
        if each.chunk_seconds and each.output_tokens:
            places = np.minimum((np.asarray(each.chunk_seconds) / bin_seconds).astype(np.int64), num_bins - 1)
            np.add.at(tokens, places, each.output_tokens / len(each.chunk_seconds))
    return (starts + lengths / 2).tolist(), (tokens / lengths).tolist()


def _rounded(request: dict[str, Any]) -> dict[str, Any]:
    values = {key: round(value, 6) if isinstance(value, float) else value for key, value in request.items()}
    return {**values, "chunk_seconds": [round(each, 6) for each in request["chunk_seconds"]]}


def _read_request(values: Mapping[str, Any]) -> RequestResult:
    request = RequestResult(**{**values, "chunk_seconds": tuple(float(each) for each in values["chunk_seconds"])})
    times = (request.due_seconds, request.sent_seconds, request.end_seconds, *request.chunk_seconds)
    if not all(isinstance(each, int | float) and np.isfinite(each) for each in times):
        raise ValueError(f"a request has the times {times[:4]}")
    if request.error is not None and request.error not in get_args(ErrorKind):
        raise ValueError(f"a request has the error {request.error!r}")
    return request
