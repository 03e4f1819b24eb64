"""Several processes train as one does: weights, records, checkpoints, and what goes wrong on some of them."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.checkpoint.store import list_checkpoints
from moesaic.checkpoint.stream import TensorWriter
from moesaic.config.load import write_config
from moesaic.config.train import TrainConfig
from moesaic.control_groups import read_text, usable_processors
from moesaic.errors import ConfigError, ElsewhereError, MoesaicError, TrainingError
from moesaic.kernels import limits, products
from moesaic.parallel.world import World
from moesaic.plan.cost import least_training_bytes
from moesaic.report.records import METRICS_FILE, EvaluationRecord, TrainRecord, read_metrics
from moesaic.train.loop import StepResult, Trainer, train

MakeConfig = Callable[..., TrainConfig]

# What makes one process with smaller micro-batches do as several do, to rounding: nothing is drawn by a micro-batch's
# place on a process, and no balance loss is taken over the counts of others.
PLAIN_MOE: dict[str, Any] = {
    "dropout": 0.0,
    "moe": {
        "num_experts": [4, 6],
        "top_k": 2,
        "residual": "sum",
        "router": {"balance_loss": 0.01, "z_loss": 1e-3, "score_correction_bias": True},
    },
}


TORCHRUN = [
    sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "moesaic",
]  # fmt: skip


class Stopper:
    """Sends this process a signal at a step."""

    def __init__(self, step: int) -> None:
        self._step = step
        self.messages: list[str] = []

    def update(self, record: TrainRecord) -> None:
        if record.step == self._step:
            signal.raise_signal(signal.SIGTERM)

    def evaluation(self, record: EvaluationRecord, *, best_loss: float) -> None: ...

    def message(self, text: str) -> None:
        self.messages.append(text)


def run_training(rank: int, configs: list[TrainConfig], folder: Path, resume: bool = False) -> list[dict[str, Any]]:
    """Train each config in a folder of its own, one after the other; return how each ended."""
    return [
        asdict(train(config, folder / str(number), device="cpu", resume=resume)) | {"run_folder": None}
        for number, config in enumerate(configs)
    ]


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"micro_batch_size": 1}),
    "dense, muon": ("dense", {"micro_batch_size": 1, "optimizer": {"name": "muon"}}),
    "moe": ("pr-moe", {"micro_batch_size": 1, "model": PLAIN_MOE}),
    "moe, muon": ("pr-moe", {"micro_batch_size": 1, "model": PLAIN_MOE, "optimizer": {"name": "muon"}}),
    "moe, accumulated": ("pr-moe", {"micro_batch_size": 1, "batch_size": 8, "model": PLAIN_MOE}),
    "moe, pairs, recomputed, no clipping": (
        "pr-moe",
        {"micro_batch_size": 1, "model": PLAIN_MOE, "activation_checkpointing": True,
         "optimizer": {"max_gradient_norm": None}, "parallel": {"expert_degree": 2}},
    ),
    "moe, documents": ("pr-moe", {"micro_batch_size": 1, "model": PLAIN_MOE, "data": {"document_mask": True}}),
}  # fmt: skip


def test_several_processes_train_as_one_does(
    make_config: MakeConfig,
    tmp_path: Path,
    on_processes: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    assert_same_training: Callable[..., None],
) -> None:
    """In 4 processes, the 5 validation sequences among them; then one process goes on from there, and 2 after it."""
    monkeypatch.setattr(
        products, "is_widened", lambda _, dtype: dtype is torch.bfloat16
    )  # Muon's in fp32, as on the processes
    evaluation = {"sequences": 5}
    configs = [
        make_config(base, precision="fp32", evaluation=evaluation, **changes) for base, changes in KINDS.values()
    ]
    ends = on_processes(4, run_training, configs, tmp_path / "four")
    assert ends[0] == ends[1] == ends[2] == ends[3]
    for number, (kind, config) in enumerate(zip(KINDS, configs, strict=True)):
        alone = config.replace(parallel={"expert_degree": None})
        train(alone, tmp_path / "one" / str(number), device="cpu")
        # Muon makes small differences larger.
        tolerance = 2e-3 if config.optimizer.name == "muon" else 2e-4
        assert_same_training(tmp_path / "four" / str(number), tmp_path / "one" / str(number), tolerance=tolerance)
        assert ends[0][number]["step"] == config.total_steps, kind


def test_any_number_of_processes_goes_on(
    make_config: MakeConfig,
    tmp_path: Path,
    on_processes: Callable[..., list[Any]],
    assert_same_training: Callable[..., None],
) -> None:
    """4 steps in one process, 4 in two, and the last 4 in one again, of a run that starts from another's weights."""
    base, changes = KINDS["moe"]
    first = make_config(base, steps=4, precision="fp32", **changes)
    train(first, tmp_path / "first", device="cpu")
    whole = make_config(base, precision="fp32", init_from=str(tmp_path / "first"), **changes)
    train(whole, tmp_path / "unbroken", device="cpu")
    run_folder = tmp_path / "runs" / "0"
    stopped = Trainer(whole, run_folder, device="cpu", resume=False, display=Stopper(4)).run()
    assert (stopped.step, stopped.stopped_by) == (4, "SIGTERM")
    ends = on_processes(2, stop_at, whole, run_folder, 8)
    assert [(end["step"], end["stopped_by"]) for end in ends] == [(8, "SIGTERM")] * 2
    assert train(whole, run_folder, device="cpu", resume=True).step == 12
    assert_same_training(run_folder, tmp_path / "unbroken", tolerance=2e-4)


def stop_at(rank: int, config: TrainConfig, run_folder: Path, step: int) -> dict[str, Any]:
    """Only the main process gets the signal."""
    display = Stopper(step) if rank == 0 else None
    trainer = Trainer(config, run_folder, device="cpu", resume=True, display=display)
    experts = sum(each.num_experts for each in trainer.model.modules() if hasattr(each, "total_experts"))
    assert experts == 2 + 3 and (trainer._lock is None) == (rank > 0)
    num_held = sum(each.numel() for each in trainer.model.parameters())  # with a gradient and two moments, in fp32
    estimate = least_training_bytes(config.model, optimizer="adamw", expert_degree=2)
    assert 0.9 * 16 * num_held < estimate <= 16 * num_held
    end = asdict(trainer.run()) | {"run_folder": None}
    if rank == 0:
        assert "resumed from step 4" in display.messages  # type: ignore[union-attr]
    return end


def test_new_runs_of_several_processes_start_from_weights(
    make_config: MakeConfig,
    tmp_path: Path,
    on_processes: Callable[..., list[Any]],
    assert_same_training: Callable[..., None],
) -> None:
    base, changes = KINDS["moe"]
    train(make_config(base, steps=4, precision="fp32", **changes), tmp_path / "first", device="cpu")
    config = make_config(base, steps=4, precision="fp32", init_from=str(tmp_path / "first"), **changes)
    train(config, tmp_path / "one", device="cpu")
    on_processes(2, run_training, [config], tmp_path / "two")
    assert_same_training(tmp_path / "two" / "0", tmp_path / "one", tolerance=2e-4)


def test_counts_of_all_processes_balance_the_experts(
    make_config: MakeConfig,
    tmp_path: Path,
    on_processes: Callable[..., list[Any]],
    assert_same_training: Callable[..., None],
) -> None:
    """With the counts of the whole batch two processes' balance losses are of all tokens from their first step on."""
    moe = {**PLAIN_MOE["moe"], "router": {"balance_loss": 0.01, "balance_scope": "global_batch"}}
    model = {**PLAIN_MOE, "moe": moe}
    config = make_config("pr-moe", steps=3, precision="fp32", micro_batch_size=2, model=model)
    on_processes(2, run_training, [config], tmp_path / "two")
    # The mean over both halves of E sum_i f_i p_i is that of the whole batch: f is the whole one's in either.
    train(config.replace(micro_batch_size=4), tmp_path / "one", device="cpu")
    assert_same_training(tmp_path / "two" / "0", tmp_path / "one", tolerance=2e-4)


def test_noise_and_dropout_are_the_micro_batches_own(
    make_config: MakeConfig,
    tmp_path: Path,
    on_processes: Callable[..., list[Any]],
    assert_same_training: Callable[..., None],
) -> None:
    changes = {"router": {"noise": "jitter"}, "capacity": {"factor": 1.0, "drop_policy": "random"}}
    model = {"moe": {**PLAIN_MOE["moe"], **changes}, "dropout": 0.1}
    config = make_config("pr-moe", steps=4, precision="fp32", micro_batch_size=2, model=model)
    on_processes(2, run_training, [config], tmp_path / "two")
    train(config, tmp_path / "one", device="cpu")
    assert_same_training(tmp_path / "two" / "0", tmp_path / "one", tolerance=2e-4)


def go_wrong(rank: int, config: TrainConfig, folder: Path) -> list[str]:
    """Return the kind of each error, and its message on the process that says it."""
    said = []

    def note(action: Callable[[], object]) -> None:
        with pytest.raises(MoesaicError) as caught:
            action()
        said.append(type(caught.value).__name__ + ("" if caught.type is ElsewhereError else f": {caught.value}"))

    def run(changed: TrainConfig) -> None:
        train(changed, folder / "run", device="cpu")

    note(lambda: run(config.replace(batch_size=6, micro_batch_size=2)))
    note(lambda: run(config.replace(parallel={"expert_degree": 4})))
    note(lambda: run(config.replace(seed=rank)))
    missing = config.replace(data=config.data.replace(path=str(folder / "missing")))
    note(lambda: run(missing if rank == 1 else config))  # on one process alone
    note(lambda: train(config, folder / "run", device="cpu", resume=True))

    def fail() -> None:
        with World.join().together():
            if rank > 0:
                raise TrainingError(f"of rank {rank}")

    note(fail)
    # A loss that is no number, of one process alone: no step counts on any.
    trainer = Trainer(config, folder / "broken", device="cpu", resume=False, display=None)
    if rank == 1:
        with torch.no_grad():
            trainer.model.final_norm.weight.fill_(torch.nan)
    note(trainer.run)
    return said


def test_mistakes_are_said_once_and_end_all(
    make_config: MakeConfig, tmp_path: Path, on_processes: Callable[..., list[Any]]
) -> None:
    config = make_config("pr-moe", steps=20, precision="fp32", model=PLAIN_MOE)
    main, other = on_processes(2, go_wrong, config, tmp_path / "wrong")
    starts = [
        "ConfigError: batch_size (6) for 2 processes and micro_batch_size (2)",
        "ConfigError: parallel.expert_degree is 4 and the run has 2 processes",
        "ConfigError: the processes of this run differ in config; the same is required of all; start each",
        None,
        "CheckpointError: ",
        None,
        "TrainingError: the last 10 steps had no finite gradient",
    ]
    for said, start in zip(main, starts, strict=True):
        assert said.startswith(start or "ElsewhereError"), said
    of_other = [said.partition(":")[0] for said in other if said != "ElsewhereError"]
    assert of_other == ["DataError", "TrainingError"] and "TrainingError: of rank 1" in other
    assert not (tmp_path / "wrong" / "run").exists()


def lose_a_process(rank: int, config: TrainConfig, run_folder: Path) -> str:
    """The second one ends in its eighth step, as if killed; return what the others' error says."""
    trainer = Trainer(config, run_folder, device="cpu", resume=False, display=None)
    train_step = trainer.train_step

    def step() -> StepResult:
        if rank == 1 and trainer.step == 7:
            os._exit(0)
        return train_step()

    trainer.train_step = step  # type: ignore[method-assign]
    with pytest.raises(MoesaicError) as caught:
        trainer.run()
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_lost_process_stops_the_others_and_its_run_goes_on(
    make_config: MakeConfig, tmp_path: Path, on_processes: Callable[..., list[Any]]
) -> None:
    config = make_config("pr-moe", steps=15, precision="fp32", model=PLAIN_MOE, batch_size=6, micro_batch_size=1)
    main, lost, other = on_processes(3, lose_a_process, config, tmp_path / "run")
    assert main.startswith("TrainingError: another process of this run has ended or cannot be reached (")
    assert main.endswith("see what it says, and go on with the same command and --resume.")
    assert lost is None and other.startswith("ElsewhereError: another process of this run is gone")
    steps = [each.step for each in list_checkpoints(tmp_path / "run")]
    assert steps and max(steps) < 7
    assert train(config, tmp_path / "run", device="cpu", resume=True).step == config.total_steps


def run_on_a_full_disk(rank: int, config: TrainConfig, folder: Path) -> list[str]:
    """Return how a run ends whose first checkpoint alone cannot be written, and one that has none."""
    ends = []
    fails = iter([False] * 5 + [True] + [False] * 10_000)  # the disk takes five tensors, and then all from the next on
    append = TensorWriter.append

    def append_or_fail(writer: TensorWriter, name: str, piece: Tensor) -> None:
        assert rank == 0
        if next(fails):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(writer, name, piece)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TensorWriter, "append", append_or_fail)
        ends.append(str(train(config, folder / "first", device="cpu").step))
        fails = iter([False] * 5 + [True] * 10_000)
        with pytest.raises(MoesaicError) as caught:
            train(config, folder / "none", device="cpu")
    return [*ends, type(caught.value).__name__]


def test_a_disk_that_is_full_costs_checkpoints(
    make_config: MakeConfig, tmp_path: Path, on_processes: Callable[..., list[Any]]
) -> None:
    config = make_config("pr-moe", steps=8, precision="fp32", model=PLAIN_MOE)
    main, other = on_processes(2, run_on_a_full_disk, config, tmp_path)
    assert main == ["8", "CheckpointError"] and other == ["8", "ElsewhereError"]
    assert [each.step for each in list_checkpoints(tmp_path / "first")] == [8]
    events = [each.message for each in read_metrics(tmp_path / "first").events]
    assert [each for each in events if "no checkpoint: " in each and "No space left" in each]
    assert not list_checkpoints(tmp_path / "none")


def test_a_degree_that_one_process_cannot_have_is_refused(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("pr-moe", parallel={"expert_degree": 2})
    with pytest.raises(ConfigError, match=r"expert_degree is 2 and the run has 1 process; a divisor .*; set another"):
        train(config, tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()


def test_a_place_without_an_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE and RANK are set, and .*; MASTER_ADDR and MASTER_PORT are .*; "):
        World.join()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert World.join() == World()


def test_torchrun_trains(make_config: MakeConfig, tmp_path: Path) -> None:
    """Two processes from the command line, the second of which says nothing; then a mistake, said once."""
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    write_config(make_config("pr-moe", steps=4, model=PLAIN_MOE), tmp_path / "config.yaml")
    run_folder = tmp_path / "run"
    command = [*TORCHRUN, "train", str(tmp_path / "config.yaml"), "--output", str(run_folder), "--device", "cpu"]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Trained 256 tokens") == done.stdout.count("Run: ") == 1
    assert [each.step for each in read_metrics(tmp_path / "run").train] == [1, 2, 3, 4]
    for _ in range(4):  # to end with the group in place aborted one of two times
        again = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
        assert again.returncode != 0 and again.stderr.count("already holds a run") == 1
        assert "terminate called" not in again.stderr and "SIGABRT" not in again.stderr
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    cores = min(usable_processors(), limits.physical_cores(read_text(Path("/proc/cpuinfo"))) or usable_processors())
    assert start["processes"] == 2 and start["threads"] == max(1, cores // 2)


def test_what_one_process_does_is_refused_to_several(tmp_path: Path) -> None:
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    for verb, said in (
        (["inspect", str(tmp_path)], "torchrun has started 2 processes and `moesaic inspect` is done by one"),
        (["serve", str(tmp_path), "--set", "engine.nonsense=1"], "engine.nonsense is not a key"),
    ):
        done = subprocess.run([*TORCHRUN, *verb], capture_output=True, text=True, timeout=240)
        assert done.returncode != 0 and done.stderr.count(said) == 1, done.stderr


def test_torchrun_can_be_stopped(make_config: MakeConfig, tmp_path: Path) -> None:
    if not dist.is_gloo_available():
        pytest.skip("this PyTorch has no gloo")
    write_config(make_config("pr-moe", steps=100_000, model=PLAIN_MOE), tmp_path / "config.yaml")
    run_folder = tmp_path / "run"
    command = [*TORCHRUN, "train", str(tmp_path / "config.yaml"), "--output", str(run_folder), "--device", "cpu"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            metrics = run_folder / METRICS_FILE
            while process.poll() is None and not (metrics.exists() and read_metrics(run_folder).train):
                time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=120)
        finally:
            process.kill()
    step, metrics_kept = list_checkpoints(run_folder)[-1].step, read_metrics(run_folder)
    assert 0 < step < 100_000 and metrics_kept.train[-1].step == step
    assert metrics_kept.events[-1].message.startswith(f"SIGTERM: stopping at step {step}, with a checkpoint")
