"""The records of a run's metrics.jsonl, and how they are read back.

One JSON object a line: `train`, `evaluation` and `event` records. Writing them is in train/metrics.py; what is made of
them is in plots.py, summary.py and terminal.py.

JSON has no NaN and no infinities, so those are stored as the strings "NaN", "Infinity" and "-Infinity": every line
stays valid JSON for any reader, and `null` keeps its one meaning, "not known".
"""

import json
import math
from array import array
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesaic.errors import MoesaicError

METRICS_FILE = "metrics.jsonl"

# Records that a thinned reading keeps one by one at the end of the run: what is unusual there is judged on these.
_RECENT_RECORDS = 64


class MetricsError(MoesaicError):
    """A run's metrics are missing, or a line of them is not one of our records."""


@dataclass(frozen=True, kw_only=True)
class ExpertRecord:
    """How the tokens spread over the experts since the last record; every tuple has one entry per MoE layer.

    Units: `load` is each expert's fraction of the layer's routed tokens (sums to 1), `drop_rate` a fraction of the
    routed tokens, `entropy` the mean routing entropy of a token divided by log(num_experts), 0 to 1.
    """

    layers: tuple[int, ...]
    load: tuple[tuple[float, ...], ...]
    drop_rate: tuple[float, ...]
    entropy: tuple[float, ...]

    def __post_init__(self) -> None:
        counts = {len(self.layers), len(self.load), len(self.drop_rate), len(self.entropy)}
        assert len(counts) == 1, f"one entry per MoE layer in each of layers, load, drop_rate, entropy: {counts}"

    def to_json(self) -> dict[str, Any]:
        """Return JSON-able values. Loads keep five significant digits: with 12 layers of 128 experts they are nearly
        all of the file, and a training batch does not measure them more finely."""
        return {
            "layers": [int(layer) for layer in self.layers],
            "load": [[_to_json_number(float(f"{share:.5g}")) for share in loads] for loads in self.load],
            "drop_rate": [_to_json_number(rate) for rate in self.drop_rate],
            "entropy": [_to_json_number(entropy) for entropy in self.entropy],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ExpertRecord":
        _check_keys(values, cls, kind=None)
        columns = {name: values[name] for name in cls.__dataclass_fields__}
        for name, column in columns.items():
            if not isinstance(column, list) or len(column) != len(values["layers"]):
                raise _BadRecord(f"moe.{name} is not a list with one entry per MoE layer")
        return cls(
            layers=tuple(_integer("moe.layers", layer) for layer in columns["layers"]),
            load=tuple(tuple(_number("moe.load", share) for share in _list(loads)) for loads in columns["load"]),
            drop_rate=tuple(_number("moe.drop_rate", rate) for rate in columns["drop_rate"]),
            entropy=tuple(_number("moe.entropy", entropy) for entropy in columns["entropy"]),
        )


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """The state of training after a step; losses, rates and `moe` are means since the last record, `learning_rate` and
    `gradient_norm` are the last step's.

    Units: `seconds` in training steps so far, resumed parts included; `loss` in nats per token; `skipped_steps` in all.
    `objective`: what the run's objective reports beside the loss, by name: a student's
    divergence, a mean too, and `alpha`, the last step's. It is written where there is something.
    """

    step: int
    tokens: int
    seconds: float
    loss: float
    balance_loss: float
    z_loss: float
    learning_rate: float
    gradient_norm: float
    tokens_per_second: float
    flops_per_second: float
    share_of_peak: float | None
    skipped_steps: int
    moe: ExpertRecord | None
    objective: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        values = {
            "kind": "train",
            "step": int(self.step),
            "tokens": int(self.tokens),
            **{name: _to_json_number(getattr(self, name)) for name in _TRAIN_NUMBERS},
            "share_of_peak": None if self.share_of_peak is None else _to_json_number(self.share_of_peak),
            "skipped_steps": int(self.skipped_steps),
            "moe": None if self.moe is None else self.moe.to_json(),
        }
        if self.objective:
            values["objective"] = {name: _to_json_number(value) for name, value in self.objective.items()}
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainRecord":
        values = {"objective": {}, **values}
        _check_keys(values, cls, kind="train")
        terms = values["objective"]
        if not isinstance(terms, dict):
            raise _BadRecord("objective is not an object")
        share, moe = values["share_of_peak"], values["moe"]
        if moe is not None and not isinstance(moe, dict):
            raise _BadRecord("moe is neither null nor an object")
        return cls(
            step=_integer("step", values["step"]),
            tokens=_integer("tokens", values["tokens"]),
            share_of_peak=None if share is None else _number("share_of_peak", share),
            skipped_steps=_integer("skipped_steps", values["skipped_steps"]),
            moe=None if moe is None else ExpertRecord.from_json(moe),
            objective={name: _number(f"objective.{name}", value) for name, value in terms.items()},
            **{name: _number(name, values[name]) for name in _TRAIN_NUMBERS},
        )


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """The validation loss at a step, in nats per token over `sequences` sequences."""

    step: int
    tokens: int
    seconds: float
    loss: float
    sequences: int

    def to_json(self) -> dict[str, Any]:
        return {
            "kind": "evaluation",
            "step": int(self.step),
            "tokens": int(self.tokens),
            "seconds": _to_json_number(self.seconds),
            "loss": _to_json_number(self.loss),
            "sequences": int(self.sequences),
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "EvaluationRecord":
        _check_keys(values, cls, kind="evaluation")
        return cls(
            step=_integer("step", values["step"]),
            tokens=_integer("tokens", values["tokens"]),
            seconds=_number("seconds", values["seconds"]),
            loss=_number("loss", values["loss"]),
            sequences=_integer("sequences", values["sequences"]),
        )


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """Something worth a sentence: a resume, a skipped step, an expert that died."""

    step: int
    message: str

    def to_json(self) -> dict[str, Any]:
        return {"kind": "event", "step": int(self.step), "message": self.message}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "EventRecord":
        _check_keys(values, cls, kind="event")
        return cls(step=_integer("step", values["step"]), message=str(values["message"]))


Record = TrainRecord | EvaluationRecord | EventRecord


@dataclass(frozen=True)
class Metrics:
    """The records of a run, each kind in the order in which it was written.

    losses: of all train records where only some are in `train`, and `places` the places of those among them.
    """

    train: tuple[TrainRecord, ...] = ()
    evaluation: tuple[EvaluationRecord, ...] = ()
    events: tuple[EventRecord, ...] = ()
    losses: tuple[float, ...] | None = None
    places: tuple[int, ...] = ()

    def up_to(self, step: int) -> "Metrics":
        """Return the records up to a step, and the losses up to the last of its train records."""
        train = tuple(record for record in self.train if record.step <= step)
        places = self.places[: len(train)]
        return Metrics(
            train=train,
            evaluation=tuple(record for record in self.evaluation if record.step <= step),
            events=tuple(record for record in self.events if record.step <= step),
            losses=None if self.losses is None else self.losses[: places[-1] + 1 if places else 0],
            places=places,
        )

    @property
    def best_evaluation(self) -> EvaluationRecord | None:
        """The one with the lowest finite loss, the later of equals, as of checkpoints; None where there is none."""
        finite = [record for record in self.evaluation if math.isfinite(record.loss)]
        return min(finite, key=lambda record: (record.loss, -record.step), default=None)


def to_line(record: Record) -> str:
    """Return the record as one line of metrics.jsonl, newline included."""
    return json.dumps(record.to_json(), allow_nan=False, separators=(",", ":"), ensure_ascii=False) + "\n"


def read_metrics(run_folder: str | Path, *, most_records: int | None = None) -> Metrics:
    """Read a run's metrics.jsonl; a last line that was cut off in the middle is left out.

    With `most_records`, about that many train records are kept (at most twice as many), evenly over the run, and the
    last 64 all the same; memory then grows by a number per record. Losses, evaluations and events are always complete.

    Raises: MetricsError when there is no such file, or when a line is not one of our records.
    """
    path = Path(run_folder) / METRICS_FILE
    train = _Thinned(most_records)
    evaluation: list[EvaluationRecord] = []
    events: list[EventRecord] = []
    for number, _, values in read_lines(path):
        kind = values["kind"]
        try:
            if kind == "train":
                train.add(number, values)
            elif kind == "evaluation":
                evaluation.append(EvaluationRecord.from_json(values))
            elif kind == "event":
                events.append(EventRecord.from_json(values))
            else:
                raise _BadRecord(f"its kind is {kind!r}, not train, evaluation or event")
        except _BadRecord as problem:
            raise _bad_line(path, number, str(problem)) from None
    records = []
    kept = train.kept()
    for _, number, values in kept:
        try:
            records.append(TrainRecord.from_json(values))
        except _BadRecord as problem:
            raise _bad_line(path, number, str(problem)) from None
    if len(kept) == len(train.losses):
        return Metrics(tuple(records), tuple(evaluation), tuple(events))
    places = tuple(place for place, _, _ in kept)
    return Metrics(tuple(records), tuple(evaluation), tuple(events), tuple(train.losses), places)


def read_lines(path: Path) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
    """Yield (line number from 1, the line without its newline, its values); a cut-off last line is left out.

    Every yielded object has a `kind` and a whole-numbered `step`.

    Raises: MetricsError as `read_metrics` does.
    """
    if not path.is_file():
        raise MetricsError(
            f"{path} does not exist; a run folder holds its metrics there once training has begun; "
            f"give the folder of a run that has been started."
        )
    try:
        file = path.open("rb")
    except OSError as error:
        raise MetricsError(
            f"{path} cannot be read ({error.strerror or error}); a run's metrics have to be readable by its user; "
            f"check its permissions."
        ) from None
    with file:
        for number, line in enumerate(file, start=1):
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as problem:  # the latter of a line that is nested too deeply
                # Records are written whole with their newline last, so only a cut-off line has none.
                if not line.endswith(b"\n"):
                    return
                raise _bad_line(path, number, f"it is not JSON ({problem})") from None
            if not isinstance(values, dict) or "kind" not in values or type(values.get("step")) is not int:
                raise _bad_line(path, number, "it is not an object with a kind and a step")
            yield number, line.rstrip(b"\n"), values


class _Thinned:
    """Train lines, halved whenever there are twice too many, and the most recent ones in full; the losses of all."""

    def __init__(self, most_records: int | None) -> None:
        assert most_records is None or most_records > 0, f"most_records must be positive: {most_records}"
        self._most = most_records
        self._stride = 1
        self.losses = array("d")
        # (place among the train lines, line number, values)
        self._lines: list[tuple[int, int, dict[str, Any]]] = []
        self._recent: deque[tuple[int, int, dict[str, Any]]] = deque(maxlen=_RECENT_RECORDS)

    def add(self, number: int, values: dict[str, Any]) -> None:
        line = (len(self.losses), number, values)
        self.losses.append(_number("loss", values["loss"]) if "loss" in values else math.nan)
        if line[0] % self._stride == 0:
            self._lines.append(line)
        if self._most is not None:
            self._recent.append(line)
            if len(self._lines) > 2 * self._most:
                self._lines = self._lines[::2]
                self._stride *= 2

    def kept(self) -> list[tuple[int, int, dict[str, Any]]]:
        if not self._recent:
            return self._lines
        first_recent = self._recent[0][0]
        return [line for line in self._lines if line[0] < first_recent] + list(self._recent)


class _BadRecord(Exception):
    """What is wrong with a record; its line is added by the reader."""


def _bad_line(path: Path, number: int, problem: str) -> MetricsError:
    return MetricsError(
        f"{path}, line {number}: {problem}; every line must be a train, evaluation or event record as moesaic writes "
        f"them (only the last may be cut off); remove that line, or restore the file."
    )


def _check_keys(values: Mapping[str, Any], cls: type[Any], *, kind: str | None) -> None:
    required = {*cls.__dataclass_fields__, *(() if kind is None else ("kind",))}
    if missing := required - values.keys():
        raise _BadRecord(f"it lacks {', '.join(sorted(missing))}")
    if unknown := values.keys() - required:
        raise _BadRecord(f"it has the unknown keys {', '.join(sorted(unknown))}")


_TRAIN_NUMBERS = (
    "seconds",
    "loss",
    "balance_loss",
    "z_loss",
    "learning_rate",
    "gradient_norm",
    "tokens_per_second",
    "flops_per_second",
)

_NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _to_json_number(value: float) -> float | str:
    value = float(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _number(name: str, value: Any) -> float:
    if type(value) is float or type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise _BadRecord(f"{name} is a whole number of more digits than a float has") from None
    if isinstance(value, str) and value in _NON_FINITE:
        return _NON_FINITE[value]
    raise _BadRecord(f"{name} is {value!r}, not a number")


def _integer(name: str, value: Any) -> int:
    if type(value) is not int:
        raise _BadRecord(f"{name} is {value!r}, not a whole number")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _BadRecord(f"moe.load holds {value!r}, not one list of numbers per MoE layer")
    return value
