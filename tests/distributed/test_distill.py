"""Several processes distil as one does: the teacher live and cached, the student drawn and copied."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from moesaic.checkpoint.store import list_checkpoints
from moesaic.checkpoint.stream import TensorWriter
from moesaic.config.train import TrainConfig
from moesaic.data.loader import Batch, TrainLoader
from moesaic.data.shards import ShardSet
from moesaic.distill import cache
from moesaic.distill.cache import CacheKey, write_cache
from moesaic.distill.loss import TeacherLogits
from moesaic.distill.run import distill, make_trainer, student_config, write_needed_cache
from moesaic.distill.teacher import LiveTeacher, TeacherRun
from moesaic.errors import DataError, ElsewhereError, MoesaicError
from moesaic.folders import FolderLock
from moesaic.logs import no_progress
from moesaic.moe.experts import own_rows
from moesaic.parallel.world import World
from moesaic.report.records import EvaluationRecord, TrainRecord, read_metrics
from moesaic.train.loop import train

OnProcesses = Callable[..., list[Any]]
AssertSame = Callable[..., None]
Student = Callable[..., TrainConfig]

MODEL: dict[str, Any] = {
    "dropout": 0.0,
    "num_layers": 4,
    "moe": {"num_experts": [4, 8], "every": 2, "top_k": 2, "residual": "sum", "router": {"balance_loss": 0.0}},
}
# Of several processes each has micro-batches of one sequence, so that one process with the same does as they do.
SETTINGS = ["micro_batch_size=1", "tokens=768", "distill.teacher_precision=fp32", "evaluation.sequences=5"]


@pytest.fixture(scope="module")
def teacher(make_config: Callable[..., TrainConfig], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "run"
    train(make_config("pr-moe", steps=20, precision="fp32", model=MODEL), folder, device="cpu")
    return folder


@pytest.fixture
def student(teacher: Path) -> Student:
    """A function (*settings, **options) that returns the config of a student of 12 steps."""
    return lambda *settings, **options: student_config(teacher, [*SETTINGS, *settings], **options)


def distill_all(rank: int, configs: list[TrainConfig], folder: Path) -> list[dict[str, Any]]:
    return [
        asdict(distill(config, folder / str(number), device="cpu")) | {"run_folder": None}
        for number, config in enumerate(configs)
    ]


def test_several_processes_distil_as_one_does(
    student: Student, tmp_path: Path, on_processes: OnProcesses, assert_same_training: AssertSame
) -> None:
    """Drawn; copied with half the experts; a teacher that a trial lets go; all experts in pairs, or on each process.

    Teacher and student have some experts of a layer on each process.
    """
    copied = student("distill.schedule=throughout", "distill.init=teacher", num_layers=4, num_experts=[2, 4])
    automatic = ("distill.schedule=automatic", "distill.trial_steps=2", "distill.divergence=reverse_kl")
    configs = [student("distill.stop_fraction=0.5"), copied, student(*automatic), student(*automatic, is_dense=True)]
    configs += [configs[0].replace(parallel={"expert_degree": degree}) for degree in (1, 2)]
    ends = on_processes(4, distill_all, configs, tmp_path / "four")
    assert ends[0] == ends[1] == ends[2] == ends[3]
    for number, config in enumerate(configs):
        four, one = tmp_path / "four" / str(number), tmp_path / "one" / str(number)
        distill(config.replace(parallel={"expert_degree": None}), one, device="cpu")
        assert_same_training(four, one, tolerance=2e-4)
        ours, theirs = read_metrics(four), read_metrics(one)
        for record, due in zip(ours.train, theirs.train, strict=True):
            assert record.objective.keys() == due.objective.keys()
            for name, value in due.objective.items():
                assert record.objective[name] == pytest.approx(value, abs=2e-4), name
        states = [list_checkpoints(each)[-1].metadata["objective"] for each in (four, one)]
        assert states[0] == states[1]
        of_runs = [json.loads((each / "run.json").read_text())["starts"] for each in (four, one)]
        assert of_runs[0][0]["objective"] == of_runs[1][0]["objective"]
        assert not (four / "teacher").exists()


class Stopper:
    """Sends this process a signal at a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def update(self, record: TrainRecord) -> None:
        if record.step == self._step:
            signal.raise_signal(signal.SIGTERM)

    def evaluation(self, record: EvaluationRecord, *, best_loss: float) -> None: ...

    def message(self, text: str) -> None: ...


def stop_at(rank: int, config: TrainConfig, run_folder: Path, step: int) -> tuple[int, bool]:
    """Return the step that it ended at, and whether the teacher was there in the end."""
    display = Stopper(step) if rank == 0 else None
    trainer = make_trainer(config, run_folder, device="cpu", resume=True, display=display)
    end = trainer.run().step
    teacher = trainer.objective._model  # type: ignore[attr-defined]
    assert teacher is None or [total for _, total in own_rows(teacher).values()] == [4, 4, 8, 8]
    return end, teacher is not None


@pytest.mark.parametrize("step", [3, 9])
def test_a_student_goes_on_with_any_number_of_processes(
    student: Student, tmp_path: Path, on_processes: OnProcesses, assert_same_training: AssertSame, step: int
) -> None:
    """Its teacher falls silent after step 6: it goes on in two processes with it, or without."""
    config = student("distill.stop_fraction=0.5", "log_every_steps=1")
    distill(config, tmp_path / "unbroken", device="cpu")
    run_folder = tmp_path / "run"
    make_trainer(config, run_folder, device="cpu", resume=False, display=Stopper(step)).run()
    assert on_processes(2, stop_at, config, run_folder, step + 2) == [(step + 2, step < 6)] * 2
    distill(config, run_folder, device="cpu", resume=True)
    assert_same_training(run_folder, tmp_path / "unbroken", tolerance=2e-4)


def write(rank: int, config: TrainConfig, folder: Path, dies_at: int | None) -> int | None:
    """Write a cache in files of two windows; return how many windows this process predicted.

    dies_at: the prediction before which the second process ends; None is then what the first returns.
    """
    seen: list[int] = []
    targets = LiveTeacher.targets

    def count(self: LiveTeacher, batch: Batch) -> TeacherLogits:
        if rank == 1 and len(seen) == dies_at:
            os._exit(0)
        seen.append(len(batch.inputs))
        return targets(self, batch)

    assert config.distill is not None
    key = CacheKey.of(config, TeacherRun.open(config.distill.teacher), ShardSet.open(config.data.path))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveTeacher, "targets", count)
        patch.setattr(cache, "_SHARD_BYTES", 2 * cache._window_bytes(key, 8))
        patch.setattr(cache, "_SAMPLE_WINDOWS", 2)
        world = World.join()
        try:
            report = write_needed_cache(
                config, None, top_k=8, device=torch.device("cpu"), on_progress=no_progress, world=world
            )
        except MoesaicError as error:
            assert dies_at is not None and str(error).endswith(
                "give the same command again, which goes on where it stopped."
            )
            return None
    assert report is not None and report.top_k == 8
    return sum(seen)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a cache, in the order of its windows."""
    parts: dict[str, list[torch.Tensor]] = {"ids": [], "log_probs": []}
    for number, shard in enumerate(json.loads((folder / "manifest.json").read_text())["shards"]):
        assert shard["file"] == f"teacher-{number:05d}.safetensors"
        for name, tensor in load_file(folder / shard["file"]).items():
            assert len(tensor) == shard["windows"] <= 2
            parts[name].append(tensor)
    return {name: torch.cat(each) for name, each in parts.items()}


def test_processes_share_the_writing_of_a_cache(
    student: Student, tmp_path: Path, on_processes: OnProcesses, assert_same_training: AssertSame
) -> None:
    """One is killed: all it lost is written again, by three; two students read it, in one process and in two."""
    folders = {name: tmp_path / name for name in ("one", "killed")}
    configs = {name: student(f"distill.cache={folder}", "data.sequence_length=32") for name, folder in folders.items()}
    (num_windows,) = [write(0, configs["one"], folders["one"], None)]
    assert num_windows is not None and num_windows > 20
    assert on_processes(2, write, configs["killed"], folders["killed"], 3) == [None, None]
    (folders["killed"] / "teacher-00099.safetensors").write_bytes(b"of a process that was killed")
    begun = json.loads((folders["killed"] / "progress.json").read_text())["shards"]
    assert len(begun) == 6 and not (folders["killed"] / "manifest.json").exists()
    shares = on_processes(3, write, configs["killed"], folders["killed"], None)
    assert sum(shares) == num_windows - 6 * 2 and max(shares) - min(shares) <= 2 + 2  # the first measures two windows
    names = [shard["file"] for shard in json.loads((folders["killed"] / "manifest.json").read_text())["shards"]]
    assert sorted(each.name for each in folders["killed"].iterdir()) == ["manifest.json", *names]
    ours, theirs = tensors_of(folders["killed"]), tensors_of(folders["one"])
    assert all(torch.equal(ours[name], each) for name, each in theirs.items())
    reports = [json.loads((each / "manifest.json").read_text())["report"] for each in folders.values()]
    assert reports[0] == reports[1] | {"num_bytes": reports[0]["num_bytes"]}
    on_processes(2, distill_all, [configs["killed"]], tmp_path / "two")
    distill(configs["one"], tmp_path / "alone", device="cpu")
    assert_same_training(tmp_path / "two" / "0", tmp_path / "alone", tolerance=2e-4)


def write_on_a_full_disk(rank: int, config: TrainConfig, folder: Path) -> str:
    """The second process cannot write its third tensor; return what each is told."""
    append, count = TensorWriter.append, iter(range(100))

    def append_or_fail(writer: TensorWriter, name: str, piece: torch.Tensor) -> None:
        if rank == 1 and next(count) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(writer, name, piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorWriter, "append", append_or_fail)
        patch.setattr(cache, "_BATCH_TOKENS", 32)
        with pytest.raises(MoesaicError) as caught:
            write_cache(folder, config, top_k=8, world=World.join())
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_full_disk_of_one_process_ends_the_writing_and_it_goes_on(
    student: Student, tmp_path: Path, on_processes: OnProcesses
) -> None:
    """The others, which need its experts, are not left waiting."""
    folder = tmp_path / "cache"
    config = student(f"distill.cache={folder}")
    main, other, third = on_processes(3, write_on_a_full_disk, config, folder)
    assert main == third and main.startswith("ElsewhereError: process 1 of this run has failed")
    assert other.startswith(
        f"DataError: the cache in {folder} could not be written (No space left on device); it takes"
    )
    assert not json.loads((folder / "progress.json").read_text())["shards"]
    assert write_cache(folder, config).top_k == 8


def read_a_broken_text(rank: int, config: TrainConfig, folder: Path) -> str:
    """The third process's part alone has what is no token; return what each is told."""
    windows = TrainLoader.windows

    def read(self: TrainLoader, numbers: Any) -> Batch:
        if rank == 2 and numbers[0] > 0:
            raise DataError("it holds token id 60000")
        return windows(self, numbers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainLoader, "windows", read)
        with pytest.raises(MoesaicError) as caught:
            write_cache(folder, config, top_k=8, world=World.join())
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_text_that_one_process_cannot_read_ends_the_writing(
    student: Student, tmp_path: Path, on_processes: OnProcesses
) -> None:
    folder = tmp_path / "cache"
    main, other, third = on_processes(3, read_a_broken_text, student(f"distill.cache={folder}"), folder)
    assert third == "DataError: it holds token id 60000"
    assert main == other and main.startswith("ElsewhereError: process 2 of this run has failed")


def load_teachers(rank: int, teachers: dict[str, Path]) -> dict[str, Any]:
    """Return of each whether it is packed, and the dtypes of its matrices."""
    world, found = World.join(), {}
    for name, degree in (("moe", None), ("moe", 1), ("dense", None)):
        model = TeacherRun.open(teachers[name]).load("bf16", device=torch.device("cpu"), world=world, degree=degree)
        dtypes = {str(each.dtype) for each in model.parameters() if each.dim() > 1}
        found[f"{name}, {degree}"] = [model.is_packed, sorted(dtypes)]
    return found


def test_teachers_are_spread_where_that_saves_something(
    teacher: Path, make_config: Callable[..., TrainConfig], tmp_path: Path, on_processes: OnProcesses
) -> None:
    dense = tmp_path / "dense"
    train(make_config("dense", steps=3, precision="fp32"), dense, device="cpu")
    found, _ = on_processes(2, load_teachers, {"moe": teacher, "dense": dense})
    assert found.pop("moe, None") == [False, ["torch.bfloat16", "torch.float32"]]  # the latter of routers
    assert [is_packed for is_packed, _ in found.values()] == [True, True]


def go_wrong(rank: int, config: TrainConfig, broken: Path, cached: TrainConfig, held: TrainConfig) -> list[str]:
    """Return the kind of each error, and its message on the process that says it."""
    said = []

    def note(action: Callable[[], object]) -> None:
        with pytest.raises(MoesaicError) as caught:
            action()
        said.append(type(caught.value).__name__ + ("" if caught.type is ElsewhereError else f": {caught.value}"))

    def run(changed: TrainConfig) -> None:
        distill(changed, broken.parent / "run", device="cpu")

    def cache_it(changed: TrainConfig) -> None:
        write_needed_cache(
            changed, None, top_k=8, device=torch.device("cpu"), on_progress=no_progress, world=World.join()
        )

    def of(teacher: Path) -> TrainConfig:
        assert config.distill is not None
        return config.replace(distill=config.distill.replace(teacher=str(teacher)))

    note(lambda: run(of(broken)))
    note(lambda: run(of(broken.parent / f"none-{rank}")))
    note(lambda: run(cached))
    note(lambda: cache_it(held))
    note(lambda: cache_it(cached if rank else held))
    return said


def test_mistakes_are_said_once_and_end_all(
    student: Student, teacher: Path, tmp_path: Path, on_processes: OnProcesses
) -> None:
    broken = Path(shutil.copytree(teacher, tmp_path / "broken"))
    for weights in broken.glob("checkpoints/*/model.safetensors"):
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    cached = student(f"distill.cache={tmp_path / 'missing'}")
    held = student(f"distill.cache={tmp_path / 'held'}", "distill.temperature=2")
    with FolderLock(tmp_path / "held"):
        main, other = on_processes(2, go_wrong, student(), broken, cached, held)
    starts = [
        "CheckpointError: ",
        "ConfigError: the processes of this run differ in config; ",
        "DataError: ",
        "FolderInUseError: ",
        "ConfigError: the processes of this run differ in the cache's teacher and text; ",
    ]
    for said, start in zip(main, starts, strict=True):
        assert said.startswith(start), said
    assert "SHA-256" in main[0] and "holds no cache of a teacher" in main[2]
    assert other == ["ElsewhereError"] * len(main)
    assert not (tmp_path / "run").exists() and not (tmp_path / "missing").exists()


def test_torchrun_distils(teacher: Path, tmp_path: Path) -> None:
    """Two processes from the command line, the second of which says nothing, with a cache that they write."""
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moesaic",
        "distill", str(teacher), str(tmp_path / "run"), "--cache", str(tmp_path / "cache"), "--device", "cpu",
        "--set", "tokens=256", "--layers", "2",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    for text in ("Cached teacher", "Trained 256 tokens", "The student's perplexity is", "Run: "):
        assert done.stdout.count(text) == 1, done.stdout
    assert (tmp_path / "run" / "distill.json").exists() and read_metrics(tmp_path / "run").train[-1].step == 4
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert start["processes"] == 2
    again = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert again.returncode != 0 and again.stderr.count("already holds a run") == 1
