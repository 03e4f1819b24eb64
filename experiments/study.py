"""Runs of a study, one after another: each is resumable, and leaves one JSON file that says how its figures came about.

What is run, and what is made of the results, is the study's own script.
"""

import json
import math
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import moesaic
from moesaic.checkpoint.store import resolve_checkpoint
from moesaic.config.train import TrainConfig
from moesaic.distill.run import distill
from moesaic.evaluate.perplexity import measure_perplexity, text_windows
from moesaic.kernels.limits import measure_limits
from moesaic.model.load import load_run
from moesaic.plan.cost import count_parameters, training_flops_per_token
from moesaic.report.comparison import Curve
from moesaic.report.records import read_metrics
from moesaic.report.summary import finite_mean
from moesaic.report.terminal import TrainingDisplay
from moesaic.train.loop import train
from moesaic.train.provenance import code_fingerprint

# Sequences of the held-out text overlap by half, as moesaic evaluate does.
_HELD_OUT_TOKENS = 400_000


@dataclass(frozen=True)
class Planned:
    """A run of a study; held_out: whether its best checkpoint is measured on the held-out text."""

    name: str
    config: TrainConfig
    held_out: bool = True


@dataclass(frozen=True)
class Study:
    """Where a study's results (JSON, kept) and its run folders (checkpoints, large) lie, and its held-out text."""

    results: Path
    work: Path
    held_out: Path

    def result(self, planned: Planned) -> dict[str, Any] | None:
        """Return the result of a run that has ended, None before; a result of other settings does not count."""
        path = self.results / f"{planned.name}.json"
        if not path.is_file():
            return None
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return values if values["config"] == _portable(planned.config) else None

    def run(self, planned: Planned) -> dict[str, Any]:
        """Train and measure, or go on with an interrupted run, or return what is there.

        Raises: KeyboardInterrupt when a signal stopped it, after saving; the same call goes on from there.
        """
        found = self.result(planned)
        if found is not None:
            print(f"{planned.name}: done ({found['validation'][-1]['loss']:.4f})", flush=True)
            return found
        folder = self.work / planned.name
        resume = (folder / "config.yaml").is_file()
        run = train if planned.config.distill is None else distill
        print(f"{planned.name}: {'going on' if resume else 'starting'}", flush=True)
        with TrainingDisplay(total_tokens=planned.config.tokens) as display:
            ended = run(planned.config, folder, resume=resume, display=display)
        if ended.stopped_by is not None:
            raise KeyboardInterrupt
        values = self._measure(planned, folder)
        self.results.mkdir(parents=True, exist_ok=True)
        partial = self.results / f".{planned.name}.json.partial"
        partial.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.results / f"{planned.name}.json")
        return values

    def _measure(self, planned: Planned, folder: Path) -> dict[str, Any]:
        config, metrics = planned.config, read_metrics(folder)
        count = count_parameters(config.model)
        limits = measure_limits(device="cpu")
        starts = json.loads((folder / "run.json").read_text(encoding="utf-8"))["starts"]
        return {
            "name": planned.name,
            "date": time.strftime("%Y-%m-%d"),
            "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
            "moesaic": moesaic.__version__,
            "code_fingerprint": code_fingerprint(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "peak_flops_per_second": limits.bf16_flops_per_second,
            "num_starts": len(starts),
            "data_fingerprint": starts[-1]["data_fingerprint"],
            "config": _portable(config),
            "parameters": count.total,
            "active_parameters": count.active,
            "training_flops_per_token": training_flops_per_token(config.model, config.data.sequence_length),
            "tokens": metrics.train[-1].tokens,
            "seconds": metrics.train[-1].seconds,
            "tokens_per_second": finite_mean([record.tokens_per_second for record in metrics.train]),
            "share_of_peak": finite_mean([record.share_of_peak or math.nan for record in metrics.train]),
            "validation": [
                {"tokens": each.tokens, "seconds": each.seconds, "loss": each.loss} for each in metrics.evaluation
            ],
            "events": [event.message for event in metrics.events],
            "held_out": self._held_out(folder) if planned.held_out else None,
        }

    def _held_out(self, folder: Path) -> dict[str, Any]:
        loaded = load_run(folder, device="cpu", pack=False)
        windows = text_windows(loaded, self.held_out, limit_tokens=_HELD_OUT_TOKENS)
        found = measure_perplexity(loaded.model, windows, device=loaded.device)
        return {
            "checkpoint_step": resolve_checkpoint(folder).step,
            "loss": found.loss,
            "perplexity": found.perplexity,
            "bits_per_byte": found.bits_per_byte,
            "num_tokens": found.num_tokens,
        }


def last_loss(result: Mapping[str, Any]) -> float:
    """Return a run's validation loss at its end; infinite where it diverged, so that it is never the best."""
    loss = result["validation"][-1]["loss"]
    return float(loss) if loss is not None and math.isfinite(loss) else math.inf


def curve(result: Mapping[str, Any], name: str) -> Curve:
    """Return the validation losses of a result, to be drawn."""
    points = [point for point in result["validation"] if math.isfinite(point["loss"])]
    return Curve(
        name,
        tuple(float(point["tokens"]) for point in points),
        tuple(point["seconds"] for point in points),
        tuple(point["loss"] for point in points),
        result["training_flops_per_token"],
    )


def tokens_to_reach(result: Mapping[str, Any], loss: float) -> float | None:
    """Return the tokens after which a run's validation loss was this low, between evaluations by a straight line.

    None where it never was.
    """
    before: Mapping[str, Any] | None = None
    for point in result["validation"]:
        if point["loss"] <= loss:
            if before is None or before["loss"] <= loss:
                return float(point["tokens"])
            share = (before["loss"] - loss) / (before["loss"] - point["loss"])
            return float(before["tokens"] + share * (point["tokens"] - before["tokens"]))
        before = point
    return None


def spread(results: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the largest difference of final losses among runs that differ in their seed, None for a single one."""
    losses = [last_loss(result) for result in results]
    return max(losses) - min(losses) if len(losses) > 1 else None


def _portable(config: TrainConfig) -> dict[str, Any]:
    """The config without places on this machine: what decides the figures."""
    values = json.loads(json.dumps(config.to_dict()))
    values["data"]["path"] = Path(values["data"]["path"]).name
    if values.get("distill"):
        values["distill"]["teacher"] = Path(values["distill"]["teacher"]).name
    return values  # type: ignore[no-any-return]
