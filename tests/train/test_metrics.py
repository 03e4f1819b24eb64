import errno
import json
import logging
import math
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesaic.errors import TrainingError
from moesaic.report.records import (
    METRICS_FILE,
    EvaluationRecord,
    EventRecord,
    ExpertRecord,
    MetricsError,
    TrainRecord,
    read_metrics,
)
from moesaic.train.metrics import MetricsWriter, train_scalars, truncate_metrics, wandb_off_reason

RECORD = TrainRecord(
    step=1,
    tokens=4096,
    seconds=0.5,
    loss=4.5,
    balance_loss=1.25,
    z_loss=0.5,
    learning_rate=0.001,
    gradient_norm=0.75,
    tokens_per_second=8192.0,
    flops_per_second=4e11,
    share_of_peak=0.25,
    skipped_steps=0,
    moe=ExpertRecord(
        layers=(1, 3), load=((0.25, 0.75), (0.25, 0.25, 0.25, 0.25)), drop_rate=(0.125, 0.0), entropy=(0.5, 0.75)
    ),
)


def at(step: int, **changes: object) -> TrainRecord:
    return replace(RECORD, step=step, tokens=step * 4096, **changes)


def evaluation_at(step: int) -> EvaluationRecord:
    return EvaluationRecord(step=step, tokens=step * 4096, seconds=0.5, loss=4.0, sequences=8)


def accumulate(run_folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(run_folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def test_records_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "run") as writer:
        writer.train(at(1))
        writer.evaluation(evaluation_at(1))
        writer.event(1, "two\nlines")
        metrics = read_metrics(tmp_path / "run")
    assert metrics.train == (at(1),)
    assert metrics.evaluation == (evaluation_at(1),)
    assert metrics.events == (EventRecord(step=1, message="two\nlines"),)


def test_tensorboard_holds_every_scalar_and_the_load_histograms(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 13):
            writer.train(at(step))
        writer.evaluation(evaluation_at(12))
        writer.event(12, "done")
    board = accumulate(tmp_path)
    assert set(board.Tags()["scalars"]) == {*train_scalars(RECORD), "loss/validation"}
    for tag, value in train_scalars(at(12)).items():
        events = board.Scalars(tag)
        assert [event.step for event in events] == list(range(1, 13))
        assert events[-1].value == pytest.approx(value)
    assert board.Scalars("max_load/layer_001")[0].value == 1.5
    assert board.Scalars("loss/validation")[0].value == 4.0
    assert set(board.Tags()["histograms"]) == {"expert_load/layer_001", "expert_load/layer_003"}
    assert [event.step for event in board.Histograms("expert_load/layer_001")] == [1, 11]


def test_records_that_are_not_finite_are_written(tmp_path: Path) -> None:
    broken = replace(RECORD.moe, load=((math.nan,) * 2, (0.25,) * 4))
    with MetricsWriter(tmp_path) as writer:
        writer.train(at(1, loss=math.nan, gradient_norm=math.inf, moe=broken))
        writer.train(at(2, share_of_peak=None, moe=None))
    first, second = read_metrics(tmp_path).train
    assert math.isnan(first.loss) and first.gradient_norm == math.inf
    assert second.share_of_peak is None and second.moe is None


def test_resume_continues_as_if_nothing_had_been_written_after_the_checkpoint(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "straight") as writer:
        for step in range(1, 8):
            writer.train(at(step))
    with MetricsWriter(tmp_path / "resumed") as writer:
        for step in range(1, 6):
            writer.train(at(step, loss=9.0 if step > 3 else RECORD.loss))
        writer.evaluation(evaluation_at(5))
    path = tmp_path / "resumed" / METRICS_FILE
    with path.open("a") as file:
        file.write('{"kind":"train","step":6,"tok')  # killed in the middle of a line
    with MetricsWriter(tmp_path / "resumed", resume_step=3) as writer:
        for step in range(4, 8):
            writer.train(at(step))
    assert path.read_bytes() == (tmp_path / "straight" / METRICS_FILE).read_bytes()
    events = accumulate(tmp_path / "resumed").Scalars("loss/train")
    assert [event.step for event in events] == list(range(1, 8))
    assert [event.value for event in events] == [RECORD.loss] * 7
    assert [each.name for each in (tmp_path / "resumed").iterdir() if each.name.startswith(".")] == []


def test_resume_from_zero_starts_over_and_a_lost_newline_is_mended(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    with MetricsWriter(tmp_path) as writer:
        writer.train(at(1))
        writer.train(at(2))
    path.write_bytes(path.read_bytes()[:-1])
    truncate_metrics(tmp_path, 2)
    assert len(read_metrics(tmp_path).train) == 2 and path.read_bytes().endswith(b"\n")
    with MetricsWriter(tmp_path, resume_step=0) as writer:
        writer.train(at(1))
    assert read_metrics(tmp_path).train == (at(1),)


def test_resume_without_metrics_begins_them(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, resume_step=10) as writer:
        writer.train(at(11))
    assert len(read_metrics(tmp_path).train) == 1


def test_a_broken_file_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / METRICS_FILE
    path.write_text("garbage\n" + json.dumps(at(1).to_json()) + "\n")
    before = path.read_bytes()
    with pytest.raises(MetricsError, match="line 1: it is not JSON"), MetricsWriter(tmp_path, resume_step=1):
        pass
    assert path.read_bytes() == before and [each.name for each in tmp_path.iterdir()] == [METRICS_FILE]


def test_a_new_run_refuses_a_folder_with_metrics(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        writer.train(at(1))
    with (
        pytest.raises(MetricsError, match=r"already holds metrics; .* without any; resume the run"),
        MetricsWriter(tmp_path),
    ):
        pass
    assert len(read_metrics(tmp_path).train) == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a disk without room")
def test_a_full_disk_is_a_training_error(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).symlink_to("/dev/full")
    message = r"No space left on device.*free some disk space and resume"
    with pytest.raises(TrainingError, match=message), MetricsWriter(tmp_path) as writer:
        writer.train(at(1))


def test_without_room_for_tensorboard_it_is_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def refuse(self: object, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = threading.excepthook
    with caplog.at_level("WARNING", "moesaic"), MetricsWriter(tmp_path) as writer:
        monkeypatch.setattr(RecordWriter, "write", refuse)
        for step in range(1, 200):
            writer.train(at(step))
            time.sleep(0.001)  # its thread has to meet the disk
        writer.event(200, "a word")
    assert "TensorBoard is off from here on" in caplog.text and "No space left on device" in caplog.text
    assert len(read_metrics(tmp_path).train) == 199
    assert "Traceback" not in capfd.readouterr().err
    assert threading.excepthook is before


def test_no_traceback_where_there_is_no_room_for_tensorboard_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.summary.writer.record_writer import RecordWriter

    def refuse(self: object, data: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    shown: list[threading.ExceptHookArgs] = []
    monkeypatch.setattr(threading, "excepthook", shown.append)
    monkeypatch.setattr(RecordWriter, "write", refuse)
    before = threading.excepthook
    with suppress(TrainingError), MetricsWriter(tmp_path):  # its thread may be too late to be asked at the start
        time.sleep(0.2)
    assert not shown and threading.excepthook is before


FAKE_WANDB = """
import json, pathlib
class Run:
    def __init__(self, options):
        self.path = pathlib.Path(options["dir"]) / "fake.json"
        self.calls = [options]
        self.save()
    def save(self): self.path.write_text(json.dumps(self.calls))
    def log(self, values, step): self.calls.append([step, values]); self.save(); FAIL
    def finish(self, exit_code): self.calls.append(exit_code); self.save()
def init(**options): return Run(options)
"""


@pytest.fixture
def install_wandb(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a stand-in for the wandb package on the path; the real one needs an account or starts a service."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path_factory.mktemp("home") / "netrc"))
    monkeypatch.delitem(sys.modules, "wandb", raising=False)

    def install(on_log: str = "") -> None:
        folder = tmp_path_factory.mktemp("site")
        (folder / "wandb.py").write_text(FAKE_WANDB.replace("FAIL", on_log or "pass"))
        monkeypatch.syspath_prepend(str(folder))

    yield install  # type: ignore[misc]
    sys.modules.pop("wandb", None)


def test_wandb_is_off_and_says_so_once_when_it_is_not_configured(
    tmp_path: Path, install_wandb: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    install_wandb()
    with caplog.at_level(logging.INFO, logger="moesaic"), MetricsWriter(tmp_path) as writer:
        writer.train(at(1))
        writer.train(at(2))
    assert [record.message for record in caplog.records if "W&B" in record.message] == [
        "W&B is installed but off: it would ask for a login; run `wandb login` or set WANDB_API_KEY, or "
        "WANDB_MODE=offline to log to the run folder."
    ]
    assert "wandb" not in sys.modules


def test_wandb_gets_the_same_numbers_and_goes_on_after_a_resume(
    tmp_path: Path, install_wandb: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    install_wandb()
    monkeypatch.setenv("WANDB_MODE", "offline")
    with MetricsWriter(tmp_path, config={"tokens": 10, "model": {"hidden_size": 16}}) as writer:
        writer.train(at(1))
    options, (step, values), exit_code = json.loads((tmp_path / "fake.json").read_text())
    assert (step, values, exit_code) == (1, train_scalars(at(1)), 0)
    assert options["project"] == "moesaic" and options["name"] == tmp_path.name
    assert options["config"] == {"tokens": 10, "model": {"hidden_size": 16}}
    with MetricsWriter(tmp_path, resume_step=1):
        pass
    assert json.loads((tmp_path / "fake.json").read_text())[0]["id"] == options["id"]


def test_a_login_in_netrc_is_one(tmp_path: Path) -> None:
    path = tmp_path / "netrc"
    environment = {"NETRC": str(path)}
    assert wandb_off_reason(environment) is not None, "there is no such file"
    path.write_text("machine example.org login user password key\n")
    assert wandb_off_reason(environment) is not None
    path.write_text("machine api.wandb.ai login user password key\n")
    assert wandb_off_reason(environment) is None
    assert wandb_off_reason({**environment, "WANDB_BASE_URL": "https://wandb.example.org:8080"}) is not None
    path.write_text("machine")
    assert wandb_off_reason(environment) is not None, "it cannot be read"


def test_a_failing_wandb_never_fails_the_run(
    tmp_path: Path,
    install_wandb: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    install_wandb("raise RuntimeError('no network')")
    monkeypatch.setenv("WANDB_API_KEY", "key")
    with MetricsWriter(tmp_path) as writer:
        writer.train(at(1))
        writer.train(at(2))
    assert len(read_metrics(tmp_path).train) == 2
    assert [record.message for record in caplog.records if "W&B" in record.message] == [
        "W&B is off from here on, since it failed to log: no network"
    ]


def test_a_folder_called_wandb_is_not_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, install_wandb: Callable[..., None]
) -> None:
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    with MetricsWriter(tmp_path / "run") as writer:
        writer.train(at(1))
    assert read_metrics(tmp_path / "run").train == (at(1),)
    assert not (tmp_path / "run" / "wandb-id.txt").exists()


@pytest.mark.parametrize(
    ("environment", "is_on"),
    [
        ({}, False),
        ({"WANDB_API_KEY": "key"}, True),
        ({"WANDB_MODE": "offline"}, True),
        ({"WANDB_MODE": "disabled", "WANDB_API_KEY": "key"}, False),
        ({"WANDB_MODE": "online"}, False),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "key"}, True),
    ],
)
def test_wandb_is_on_only_where_it_asks_nothing(environment: dict[str, str], is_on: bool, tmp_path: Path) -> None:
    assert (wandb_off_reason({**environment, "NETRC": str(tmp_path / "none")}) is None) == is_on
