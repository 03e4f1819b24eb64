import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint import stream
from moesaic.checkpoint.store import CheckpointInfo, list_checkpoints, load_tensors, resolve_checkpoint
from moesaic.config.train import TrainConfig
from moesaic.data.prepare import prepare
from moesaic.data.shards import hash_file
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import CheckpointError, ConfigError, DataError, DeviceError, FolderInUseError, TrainingError
from moesaic.folders import FolderLock
from moesaic.model.load import load_run_config
from moesaic.report.records import EvaluationRecord, MetricsError, TrainRecord, read_metrics
from moesaic.train.loop import MOST_SKIPPED_IN_A_ROW, Trainer, train, validation_loss

MakeConfig = Callable[..., TrainConfig]


class Display:
    """Calls back at a step, and keeps the messages."""

    def __init__(self, step: int | None = None, action: Callable[[], object] = lambda: None) -> None:
        self._step, self._action = step, action
        self.messages: list[str] = []

    def update(self, record: TrainRecord) -> None:
        if record.step == self._step:
            self._action()

    def evaluation(self, record: EvaluationRecord, *, best_loss: float) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def last_hashes(run_folder: Path) -> tuple[int, dict[str, Any]]:
    """The last checkpoint's step and its files' sizes and SHA-256: equal for equal tensors."""
    last = list_checkpoints(run_folder)[-1]
    return last.step, last.files


def records_of(run_folder: Path) -> list[dict[str, Any]]:
    """All train and evaluation records without what a clock says."""
    metrics = read_metrics(run_folder)
    timed = {"seconds", "tokens_per_second", "flops_per_second", "share_of_peak"}
    records = [asdict(each) for each in (*metrics.train, *metrics.evaluation)]
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


def assert_same_run(run_folder: Path, unbroken: Path) -> None:
    assert last_hashes(run_folder) == last_hashes(unbroken)
    assert records_of(run_folder) == records_of(unbroken)


CASES = [("dense", "adamw", "fp32"), ("dense", "muon", "bf16"), ("pr-moe", "adamw", "bf16"), ("pr-moe", "muon", "fp32")]


@pytest.mark.parametrize(("model", "optimizer", "precision"), CASES)
def test_a_resumed_run_equals_the_unbroken_one_bit_for_bit(
    make_config: MakeConfig, tmp_path: Path, model: str, optimizer: str, precision: str
) -> None:
    config = make_config(model, optimizer={"name": optimizer}, precision=precision)
    train(config, tmp_path / "unbroken", display=Display())
    stopped = train(config, tmp_path / "resumed", display=Display(5, interrupt))
    assert (stopped.stopped_by, stopped.step) == ("SIGINT", 5)
    result = train(config, tmp_path / "resumed", resume=True, display=Display())
    assert (result.stopped_by, result.step, result.tokens) == (None, 12, 12 * 64)
    assert_same_run(tmp_path / "resumed", tmp_path / "unbroken")


def test_the_record_after_a_checkpoint_averages_the_same_steps_when_resumed(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    """The records' windows do not straddle a checkpoint, or a resumed run's next mean would be of fewer steps."""
    config = make_config("pr-moe", log_every_steps=7)
    train(config, tmp_path / "unbroken", display=Display())

    def die() -> None:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(config, tmp_path / "resumed", display=Display(7, die))
    train(config, tmp_path / "resumed", resume=True, display=Display())
    assert [record.step for record in read_metrics(tmp_path / "resumed").train] == [1, 2, 4, 5, 7, 8, 12]
    assert_same_run(tmp_path / "resumed", tmp_path / "unbroken")


@pytest.mark.parametrize("killed_at", [10, 13])
def test_a_resumed_run_tells_of_dead_and_hot_experts_when_the_unbroken_one_does(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    """Ten records in a row make one dead, those before the checkpoint too; who has been named is not named again."""
    config = make_config("pr-moe", log_every_steps=1, steps=24)
    make_record = Trainer._record

    def record_of_one_expert(trainer: Trainer, *args: Any) -> TrainRecord:
        record = make_record(trainer, *args)
        assert record.moe is not None
        even = tuple((1 / len(load),) * len(load) for load in record.moe.load)
        one = tuple((1.0, *(0.0 for _ in load[1:])) for load in record.moe.load)
        return replace(record, moe=replace(record.moe, load=even if record.step < 3 else one))

    def die() -> None:
        raise RuntimeError("killed")

    def warnings(run_folder: Path) -> list[tuple[int, str]]:
        events = read_metrics(run_folder).events
        return [(event.step, event.message) for event in events if "resumed" not in event.message]

    monkeypatch.setattr(Trainer, "_record", record_of_one_expert)
    train(config, tmp_path / "unbroken", display=Display())
    assert {step for step, _ in warnings(tmp_path / "unbroken")} == {12}
    with pytest.raises(RuntimeError, match="killed"):
        train(config, tmp_path / "resumed", display=Display(killed_at, die))
    train(config, tmp_path / "resumed", resume=True, display=Display())
    assert warnings(tmp_path / "resumed") == warnings(tmp_path / "unbroken")


def test_resuming_before_the_first_checkpoint_starts_over(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("pr-moe")

    def die() -> None:
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        train(config, tmp_path / "resumed", display=Display(2, die))
    assert list_checkpoints(tmp_path / "resumed") == []
    train(config, tmp_path / "resumed", resume=True)
    train(config, tmp_path / "unbroken")
    assert_same_run(tmp_path / "resumed", tmp_path / "unbroken")


def test_resuming_a_finished_run_changes_nothing_and_more_tokens_go_on(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=8)
    first = train(config, tmp_path / "run")
    before = last_hashes(tmp_path / "run")
    again = train(config, tmp_path / "run", resume=True)
    assert last_hashes(tmp_path / "run") == before
    assert (again.step, again.loss, again.validation_loss) == (8, None, first.validation_loss)
    longer = train(config.replace(tokens=10 * 64), tmp_path / "run", resume=True)
    assert longer.step == 10 and load_run_config(tmp_path / "run").tokens == 10 * 64


def test_a_stop_right_after_a_checkpoint_keeps_its_validation_loss(make_config: MakeConfig, tmp_path: Path) -> None:
    result = train(make_config(), tmp_path / "run", display=Display(4, interrupt))
    (info,) = list_checkpoints(tmp_path / "run")
    assert info.step == result.step == 4
    assert info.validation_loss == result.validation_loss is not None


def test_a_stop_where_only_an_evaluation_was_due_keeps_its_loss(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(evaluation={"every_tokens": 2 * 64, "sequences": 4})
    result = train(config, tmp_path / "run", display=Display(6, interrupt))
    last = list_checkpoints(tmp_path / "run")[-1]
    record = read_metrics(tmp_path / "run").evaluation[-1]
    assert (last.step, record.step) == (6, 6)
    assert last.validation_loss == result.validation_loss == record.loss
    stopped = train(config, tmp_path / "run", resume=True, display=Display(7, interrupt))
    assert list_checkpoints(tmp_path / "run")[-1].validation_loss is stopped.validation_loss is None


def test_a_stop_during_an_evaluation_loses_no_losses(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(log_every_steps=100, evaluation={"every_tokens": 3 * 64, "sequences": 4})
    validate = validation_loss

    def interrupted(*args: Any, **settings: Any) -> float:
        interrupt()
        return validate(*args, **settings)

    train(config.replace(log_every_steps=1), tmp_path / "every")
    losses = {record.step: record.loss for record in read_metrics(tmp_path / "every").train}
    train(config, tmp_path / "run", display=Display(5, interrupt))
    monkeypatch.setattr("moesaic.train.loop.validation_loss", interrupted)
    result = train(config, tmp_path / "run", resume=True)
    last = read_metrics(tmp_path / "run").train[-1]
    assert result.step == last.step == 6 and result.loss == last.loss == pytest.approx(losses[6])


def test_a_stop_in_the_last_step_is_no_stop(make_config: MakeConfig, tmp_path: Path) -> None:
    result = train(make_config(), tmp_path / "run", display=Display(12, interrupt))
    assert result.stopped_by is None and result.validation_loss is not None


DRIVER = """
import os, random, signal, sys, time, types
from pathlib import Path
import torch, torch.utils.tensorboard
import moesaic.checkpoint.stream as stream
import moesaic.train.loop as loop
from moesaic.config.load import load_train_config

torch.set_num_threads(1)
config, run, seed = load_train_config(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
limits = types.SimpleNamespace(bf16_flops_per_second=1.0, fp32_flops_per_second=1.0)
loop.measure_limits = lambda **_: limits
loop.write_plots = lambda run_folder, **_: []
write_all = stream._write_all

def write_slowly(file, place, view):
    half = len(view) // 2
    write_all(file, place, view[:half])
    time.sleep(0.04)
    write_all(file, place + half, view[half:])

stream._write_all = write_slowly

def being_written():
    try:
        folders = [path.stat() for path in (run / "checkpoints").glob(".writing-*")]
    except FileNotFoundError:  # renamed just now
        return set()
    return {(folder.st_ino, folder.st_ctime_ns) for folder in folders}

chance = random.Random(seed)
kills = saving = 0
for attempt in range(6):
    child = os.fork()
    if child == 0:
        loop.train(config, run, resume=(run / "config.yaml").exists())
        os._exit(0)
    started, limit, left = time.monotonic(), chance.uniform(0.1, 1.0), being_written()
    at_save, is_last = attempt in (1, 3), attempt == 5
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        was_saving = bool(being_written() - left)
        if not is_last and (was_saving if at_save else time.monotonic() - started > limit):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            kills, saving = kills + 1, saving + was_saving
            break
        time.sleep(0.005)
    if done:
        assert status == 0, status
        break
print(kills, saving)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the kills need os.fork, which this system does not have")
def test_a_run_killed_at_any_moment_equals_the_unbroken_one(make_config: MakeConfig, tmp_path: Path) -> None:
    import yaml

    config = make_config("pr-moe", steps=32)
    train(config, tmp_path / "unbroken")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    arguments = [str(tmp_path / "config.yaml"), str(tmp_path / "killed"), "0"]
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    kills, saving = map(int, result.stdout.split())
    assert kills >= 3 and saving >= 2
    assert_same_run(tmp_path / "killed", tmp_path / "unbroken")
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob(".*")] == []


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("lowest", [0.0, 1e-4])
def test_a_run_of_one_step_that_changes_nothing_says_so(
    lowest: float, make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    schedule = {"warmup_tokens": 1, "min_learning_rate": lowest}
    with caplog.at_level("WARNING", "moesaic"):
        train(make_config(steps=2, schedule=schedule), tmp_path / "two")
        assert "learning rate of 0" not in caplog.text
        train(make_config(steps=1, schedule=schedule), tmp_path / "one")
    assert ("The only step of this run has a learning rate of 0" in caplog.text) == (lowest == 0)


def test_a_broken_last_checkpoint_is_passed_over_and_does_not_count_among_the_kept(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(steps=12, checkpoint={"keep_last": 2})
    train(config, tmp_path / "unbroken")
    train(config, tmp_path / "run", display=Display(9, interrupt))  # checkpoints of 8 and 9; 4 is pruned unless best
    flip_byte(tmp_path / "run" / "checkpoints" / "step-00000009" / "optimizer.safetensors")
    display = Display()
    with caplog.at_level("WARNING", "moesaic"):
        train(config, tmp_path / "run", resume=True, display=display)
    assert "step-00000009" in caplog.text and "SHA-256" in caplog.text
    assert display.messages[0] == "resumed from step 8"
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {"passed-over-step-00000009", "step-00000008", "step-00000012"} <= names


def test_a_run_that_is_moved_away_goes_on_in_a_new_folder(make_config: MakeConfig, tmp_path: Path) -> None:
    train(make_config(), tmp_path / "unbroken")
    run, moved = tmp_path / "run", tmp_path / "moved"
    display = Display(6, lambda: run.rename(moved))
    result = train(make_config(), run, display=display)
    assert result.step == 12
    (message,) = [text for text in display.messages if "was moved or deleted" in text]
    assert message in [event.message for event in read_metrics(moved).events]
    assert [info.step for info in list_checkpoints(moved)] == [4]
    assert [info.step for info in list_checkpoints(run)] == [8, 12]
    assert {path.name for path in run.iterdir()} >= {"config.yaml", "run.json", "tokenizer.json"}
    assert last_hashes(run) == last_hashes(tmp_path / "unbroken")


def full_disk_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all = stream._write_all

    def write(file: FileIO, place: int, view: memoryview) -> None:
        path = os.fsdecode(file.name)
        if f"step-{step:08d}" in path and "optimizer" in path:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(file, place, view)

    monkeypatch.setattr(stream, "_write_all", write)


def test_a_periodic_checkpoint_on_a_full_disk_costs_only_itself(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(make_config(), tmp_path / "unbroken")
    full_disk_at(8, monkeypatch)
    display = Display()
    result = train(make_config(), tmp_path / "run", display=display)
    assert result.step == 12
    assert [info.step for info in list_checkpoints(tmp_path / "run")] == [4, 12]
    (message,) = [text for text in display.messages if "no checkpoint" in text]
    for part in ("No space left on device", "free some", "step-00000004", "Training goes on"):
        assert part in message
    assert message in [event.message for event in read_metrics(tmp_path / "run").events]
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


@pytest.mark.parametrize("stop_at", [None, 6])
def test_a_last_checkpoint_on_a_full_disk_is_an_error(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int | None
) -> None:
    full_disk_at(12 if stop_at is None else stop_at, monkeypatch)
    with pytest.raises(CheckpointError, match=r"No space left on device.*free some.*last good checkpoint is .*step-"):
        train(make_config(), tmp_path / "run", display=Display(stop_at, interrupt))
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob(".*")] == []


@pytest.mark.parametrize("model", ["dense", "moe"])
def test_micro_batches_add_up_to_the_batch(make_config: MakeConfig, tmp_path: Path, model: str) -> None:
    changes: dict[str, Any] = {"precision": "fp32"}
    if model == "moe":  # dropless, and without a balance loss, which is of a micro-batch
        changes["model"] = {"moe": {"num_experts": 4, "top_k": 2, "router": {"balance_loss": 0.0, "z_loss": 1e-3}}}
    trainers = [
        Trainer(
            make_config(micro_batch_size=size, **changes),
            tmp_path / str(size),
            device="cpu",
            resume=False,
            display=None,
        )
        for size in (4, 2, 1)
    ]
    results = [trainer.train_step() for trainer in trainers]
    assert [len(result.losses) for result in results] == [1, 2, 4]
    for trainer, result in zip(trainers[1:], results[1:], strict=True):
        assert result.cross_entropy == pytest.approx(results[0].cross_entropy, rel=1e-6)
        assert result.gradient_norm == pytest.approx(results[0].gradient_norm, rel=1e-5)
        for a, b in zip(result.counts, results[0].counts, strict=True):
            assert torch.equal(a, b)
        # The moments and not the weights: Adam's first step is the sign of a gradient that may be rounding alone.
        state, expected = trainer.optimizers.named_state(), trainers[0].optimizers.named_state()
        for name, value in state.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-7, msg=name)


def test_the_correction_bias_moves_by_the_whole_steps_counts(make_config: MakeConfig, tmp_path: Path) -> None:
    trainer = Trainer(make_config("pr-moe"), tmp_path, device="cpu", resume=False, display=None)
    result = trainer.train_step()
    for router, counts in zip(trainer.routers, result.counts, strict=True):
        assert int(counts.sum()) == 4 * 16 * 2
        direction = torch.sign(counts.double().mean() - counts).float()
        bias = 1e-3 * direction
        torch.testing.assert_close(router.score_correction_bias, bias - bias.mean())


def with_bad_gradients(config: TrainConfig, run_folder: Path, bad: Callable[[int], bool], display: Display) -> Trainer:
    """A trainer whose gradient is NaN in the steps (from 0) that `bad` names."""
    trainer = Trainer(config, run_folder, device="cpu", resume=False, display=display)
    trainer.model.embedding.register_hook(lambda gradient: gradient * (math.nan if bad(trainer.step) else 1.0))
    return trainer


def test_a_step_without_a_finite_gradient_changes_nothing_and_is_counted(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    trainer = with_bad_gradients(make_config("pr-moe"), tmp_path, lambda step: step == 1, Display())
    assert trainer.train_step().is_finite
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    moments = {name: value.clone() for name, value in trainer.optimizers.named_state().items()}
    assert not trainer.train_step().is_finite
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name]), name
    for name, value in trainer.optimizers.named_state().items():
        assert torch.equal(value, moments[name]), name
    assert trainer.train_step().is_finite


def test_skipped_steps_are_recorded_and_survive_resuming(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(log_every_steps=4)
    display = Display()
    trainer = with_bad_gradients(config, tmp_path / "run", lambda step: step in (2, 5), display)
    trainer.run()
    metrics = read_metrics(tmp_path / "run")
    assert [record.skipped_steps for record in metrics.train] == [0, 0, 1, 1, 2, 2]
    assert [record.step for record in metrics.train] == [1, 2, 4, 5, 8, 12]
    assert [event.step for event in metrics.events] == [3, 6]
    assert "step 3 skipped: its gradient norm is nan" in display.messages[0]
    assert all(math.isfinite(record.loss) for record in metrics.train)  # the other steps of a window tell the loss
    last = list_checkpoints(tmp_path / "run")[-1]
    assert last.metadata["skipped_steps"] == 2
    train(config.replace(tokens=13 * 64), tmp_path / "run", resume=True)
    assert read_metrics(tmp_path / "run").train[-1].skipped_steps == 2


def test_gradients_that_stay_bad_stop_the_run_and_name_the_last_checkpoint(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=30)
    with pytest.raises(TrainingError, match=rf"the last {MOST_SKIPPED_IN_A_ROW} steps.*step 12.*learning_rate"):
        with_bad_gradients(config, tmp_path, lambda step: step >= 5, Display()).run()
    # The checkpoints of the bad steps hold the last good weights.
    hashes = {info.step: info.files["model.safetensors"]["sha256"] for info in list_checkpoints(tmp_path)}
    assert hashes[8] == hashes[12]
    before_any = make_config(steps=600, checkpoint={"every_tokens": 50 * 64})
    with pytest.raises(TrainingError, match="there is no checkpoint yet"):
        with_bad_gradients(before_any, tmp_path / "other", lambda step: True, Display()).run()


def test_a_short_run_that_ends_without_numbers_is_an_error(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=4, schedule={"learning_rate": 1e39, "warmup_tokens": 0})
    message = r"ended at step 4 with a validation loss of nan, 3 steps skipped; .*; start a new run"
    with pytest.raises(TrainingError, match=message):
        Trainer(config, tmp_path, device="cpu", resume=False, display=None).run()


def test_the_run_folder_says_what_was_trained(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("pr-moe")
    train(config, tmp_path / "run")
    assert load_run_config(tmp_path / "run") == config
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.yaml", "run.json", "metrics.jsonl", "tokenizer.json", "checkpoints", "tensorboard"} <= names
    assert not [name for name in names if "writing" in name]
    starts = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert len(starts) == 1 and starts[0]["data_path"] == config.data.path
    record = read_metrics(tmp_path / "run").train[-1]
    assert record.moe is not None and record.moe.layers == (0, 1)
    assert [sum(load) for load in record.moe.load] == pytest.approx([1.0, 1.0], abs=1e-3)
    assert all(rate > 0 for rate in record.moe.drop_rate)  # capacity factor 1 drops
    assert record.share_of_peak is not None and record.share_of_peak > 0


def test_keep_last_and_the_best(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=12, checkpoint={"every_tokens": 2 * 64, "keep_last": 1})
    train(config, tmp_path)
    infos = list_checkpoints(tmp_path)
    losses = {record.step: record.loss for record in read_metrics(tmp_path).evaluation}
    best = min(losses, key=lambda step: (losses[step], -step))
    assert {info.step for info in infos} == {12, best}
    assert resolve_checkpoint(tmp_path).step == best


def test_activation_checkpointing_may_be_switched_when_resuming(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("pr-moe")
    train(config, tmp_path / "unbroken")
    train(config, tmp_path / "resumed", display=Display(5, interrupt))
    train(config.replace(activation_checkpointing=True), tmp_path / "resumed", resume=True)
    assert_same_run(tmp_path / "resumed", tmp_path / "unbroken")


def test_a_folder_with_a_run_takes_no_other(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=4)
    train(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"already holds a run; .*; .*--resume"):
        train(config, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config, tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"no run to resume; .*config.yaml.*; .*without --resume"):
        train(config, tmp_path / "run", resume=True)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_that_another_process_writes_is_left_as_it_is(
    make_config: MakeConfig, tmp_path: Path, resume: bool
) -> None:
    config = make_config(steps=8)
    if resume:
        train(config, tmp_path / "run", display=Display(5, interrupt))
        (tmp_path / "run" / "checkpoints" / ".writing-step-00000006").mkdir()
        (tmp_path / "run" / "checkpoints" / ".writing-step-00000006" / "model.safetensors").write_bytes(b"half")
    with FolderLock(tmp_path / "run"):
        before = contents(tmp_path / "run")
        with pytest.raises(FolderInUseError, match="is being written by"):
            train(config, tmp_path / "run", resume=resume)
        assert contents(tmp_path / "run") == before


def test_a_run_holds_its_folder_from_its_start_to_its_end(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=4)
    trainer = Trainer(config, tmp_path / "run", device="cpu", resume=False, display=None)
    before = contents(tmp_path / "run")
    for resume in (False, True):
        with pytest.raises(FolderInUseError, match="is being written by"):
            train(config, tmp_path / "run", resume=resume)
    assert contents(tmp_path / "run") == before
    trainer.run()
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume=True)


def test_a_tokenizer_that_is_not_the_runs_is_not_written_over(
    make_config: MakeConfig, tiny_data: Path, tmp_path: Path
) -> None:
    config = make_config(steps=4)
    for name, text in (("tokenizer.json", '{"of": "another model"}'), ("tokenizer_config.json", "{}")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(text)
        (folder / "model.safetensors").write_bytes(b"weights")
        with pytest.raises(ConfigError, match=f"holds a {name} that is not this run's; .*; name another folder"):
            train(config, folder)
        assert contents(folder).keys() == {name, "model.safetensors"} and (folder / name).read_text() == text
    # What a process that was killed while it set the run up has left is the run's own.
    (tmp_path / "run").mkdir()
    Tokenizer.load(tiny_data).save(tmp_path / "run")
    assert train(config, tmp_path / "run").step == 4


def test_metrics_of_another_run_are_refused_before_anything_is_written(make_config: MakeConfig, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"a": 1}\n')
    with pytest.raises(MetricsError, match="already holds metrics"):
        train(make_config(steps=4), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, r"seed \(1, was 0\)"),
        ({"micro_batch_size": 4}, r"micro_batch_size \(4, was 2\)"),
        ({"schedule": {"learning_rate": 0.5}}, r"schedule.learning_rate \(0.5, was 0.01\)"),
        ({"model": {"hidden_size": 32, "head_dim": 8}}, r"model.hidden_size \(32, was 16\)"),
        ({"model": {"moe": {"num_experts": 4}}}, r"model.moe.num_experts \(4, was None\)"),
        ({"data": {"document_mask": True}}, r"data.document_mask \(True, was False\)"),
    ],
)
def test_resuming_with_other_settings_is_refused_and_changes_nothing(
    make_config: MakeConfig, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    train(make_config(steps=4), tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    with pytest.raises(ConfigError, match=named + r".*: not as in .*config.yaml; .*same steps; "):
        train(make_config(steps=4, **changes), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_resuming_with_other_data_is_refused_and_changes_nothing(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=8)
    train(config, tmp_path / "run", display=Display(4, interrupt))
    source = tmp_path / "other.txt"
    source.write_text("Other words in another order. " * 400)
    prepare([source], tmp_path / "other", tokenizer=config.data.path, num_workers=1)
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    other = config.replace(data=config.data.replace(path=str(tmp_path / "other")))
    with pytest.raises(TrainingError, match=r"not the one this run was trained on .*; .*; give the original"):
        train(other, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "changes",
    [
        {"data": None},
        {"objective": 3},
        {"skipped_steps": math.nan},
        {"skipped_steps": "x"},
        {"seconds": {}},
        {"seconds": math.inf},
    ],
)
def test_resuming_from_a_manifest_of_nonsense_is_refused_and_changes_nothing(
    changes: dict[str, Any], make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=4)
    train(config, tmp_path / "run")
    file = list_checkpoints(tmp_path / "run")[-1].path / "manifest.json"
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps({**manifest, "metadata": manifest["metadata"] | changes}))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"does not say how far the training was \(.*\); .* required; restore"):
        train(config, tmp_path / "run", resume=True)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_resuming_to_fewer_tokens_than_it_has_is_refused_and_changes_nothing(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config(steps=8)
    train(config, tmp_path / "run")
    before = contents(tmp_path / "run")
    message = r"tokens is 320, and .*run has been trained on 512 already; .*; give --set tokens=N"
    with pytest.raises(ConfigError, match=message):
        train(config.replace(tokens=5 * 64), tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before
    assert train(config, tmp_path / "run", resume=True).step == 8


def test_the_best_validation_loss_is_the_runs_and_not_the_processes(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=8, evaluation={"every_tokens": 64})
    train(config, tmp_path / "run")
    lowest = min(record.loss for record in read_metrics(tmp_path / "run").evaluation)
    trainer = Trainer(config.replace(tokens=9 * 64), tmp_path / "run", device="cpu", resume=True, display=None)
    assert trainer.best_loss == lowest
    trainer.run()
    last = read_metrics(tmp_path / "run").evaluation[-1].loss
    assert trainer.best_loss == min(lowest, last)


def test_validation_text_that_is_none_is_found_before_the_first_step(make_config: MakeConfig, tmp_path: Path) -> None:
    data = tmp_path / "data"
    config = make_config()
    shutil.copytree(config.data.path, data)
    (shard,) = data.glob("validation-*.bin")
    shard.write_bytes(b"\xff" * shard.stat().st_size)
    config = config.replace(data=config.data.replace(path=str(data)))
    with pytest.raises(DataError, match="holds token id 65535"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_data_that_changed_in_its_place_is_refused_and_changes_nothing(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=8)
    data = Path(shutil.copytree(config.data.path, tmp_path / "data"))
    config = config.replace(data=config.data.replace(path=str(data)))
    train(config, tmp_path / "run", display=Display(4, interrupt))
    before = contents(tmp_path / "run")
    shard, other = data / "train-00000.bin", data / "validation-00000.bin"
    original = shard.read_bytes()
    flip_byte(shard)
    with pytest.raises(DataError, match=r"train-00000.bin is corrupt: .*; copy the folder again"):
        train(config, tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before
    # Written again as it was: only what has another time is read.
    shard.write_bytes(original)
    hashed = []
    monkeypatch.setattr("moesaic.data.shards.hash_file", lambda file: hashed.append(file) or hash_file(file))
    train(config.replace(tokens=6 * 64), tmp_path / "run", resume=True)
    assert hashed == [shard]
    os.utime(other, ns=(1, 1))
    train(config, tmp_path / "run", resume=True)
    assert hashed == [shard, other]


def test_the_same_data_elsewhere_is_the_same_data(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=8)
    train(config, tmp_path / "unbroken")
    train(config, tmp_path / "run", display=Display(4, interrupt))
    (tmp_path / "moved").symlink_to(config.data.path)
    moved = config.replace(data=config.data.replace(path=str(tmp_path / "moved")))
    train(moved, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def test_a_run_folder_whose_name_is_no_utf8_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the run folder is '.*r\\udcff'; .* in UTF-8; choose another name"):
        train(make_config("dense"), tmp_path / os.fsdecode(b"r\xff"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("vocab_size", "is_told"), [(384, False), (1343, False), (1344, True)])
def test_a_vocabulary_far_larger_than_the_tokenizers_is_told(
    make_config: MakeConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, vocab_size: int, is_told: bool
) -> None:
    train(make_config(model={"vocab_size": vocab_size}, tokens=256), tmp_path / "run")
    assert ("1024 embeddings and outputs stand for none" in caplog.text) is is_told
    assert ("model.vocab_size=384 is enough" in caplog.text) is is_told


def test_what_cannot_be_trained_is_refused_before_a_folder_exists(make_config: MakeConfig, tmp_path: Path) -> None:
    small = make_config(model={"vocab_size": 100})
    with pytest.raises(ConfigError, match=r"model.vocab_size \(100\) is less than the 320 tokens.*; use .*>= 320"):
        train(small, tmp_path / "run")
    with pytest.raises(DataError, match="moesaic prepare"):
        train(make_config(data={"path": str(tmp_path / "absent")}), tmp_path / "run")
    with pytest.raises(DeviceError, match=r"tpu.*auto, cpu or cuda"):
        train(make_config(), tmp_path / "run", device="tpu")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match=r"cannot be written .*; .*; "):
        train(make_config(), tmp_path / "file" / "run")


@pytest.mark.parametrize("before", ["nothing", "a folder", "a note"])
def test_a_run_that_is_refused_memory_in_its_first_step_leaves_nothing(
    make_config: MakeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str
) -> None:
    def refuse(self: Trainer) -> None:
        assert (folder / "config.yaml").exists()
        raise MemoryError

    folder = tmp_path / "runs" / "run"
    if before != "nothing":
        folder.mkdir(parents=True)
    if before == "a note":
        (folder / "note.txt").write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", refuse)
        with pytest.raises(MemoryError):
            train(make_config(steps=4), folder)
    if before == "a note":  # no folder of the run's own: nothing is deleted
        assert (folder / "note.txt").exists() and (folder / "config.yaml").exists()
        return
    assert list(tmp_path.rglob("runs*")) == ([] if before == "nothing" else [folder.parent])
    assert train(make_config(steps=5), folder).step == 5  # with other settings


def test_a_run_that_fails_after_a_step_keeps_what_it_has(make_config: MakeConfig, tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        train(make_config(steps=4), tmp_path / "run", display=Display(1, broken))
    assert (tmp_path / "run" / "config.yaml").exists() and len(read_metrics(tmp_path / "run").train) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_without_a_gpu_is_an_error(make_config: MakeConfig, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"cuda.*; .*; .*--device cpu"):
        train(make_config(), tmp_path / "run", device="cuda")


def test_a_document_mask_reaches_the_model(make_config: MakeConfig, tmp_path: Path) -> None:
    finals: list[CheckpointInfo] = []
    for mask in (False, True):
        train(make_config(steps=4, data={"document_mask": mask}), tmp_path / str(mask))
        finals += list_checkpoints(tmp_path / str(mask))
    assert finals[0].files["model.safetensors"] != finals[1].files["model.safetensors"]


@pytest.mark.parametrize("model", ["dense", "pr-moe"])
def test_every_tensor_of_a_checkpoint_is_finite_and_fp32(make_config: MakeConfig, tmp_path: Path, model: str) -> None:
    train(make_config(model, steps=4), tmp_path)
    info = list_checkpoints(tmp_path)[-1]
    for name in ("model", "optimizer"):
        for key, tensor in load_tensors(info, name).items():
            assert tensor.dtype == torch.float32 and bool(torch.isfinite(tensor).all()), key
