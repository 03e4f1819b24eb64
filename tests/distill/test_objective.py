"""A student's run: when it hears its teacher, that resuming changes nothing, and that it learns from it."""

import errno
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.store import list_checkpoints, resolve_checkpoint
from moesaic.config.load import load_train_config
from moesaic.config.train import TrainConfig
from moesaic.data.prepare import prepare
from moesaic.distill.cache import write_cache
from moesaic.distill.objective import Distillation
from moesaic.distill.report import try_report
from moesaic.distill.run import distill, make_trainer, student_config
from moesaic.distill.teacher import LiveTeacher, TeacherRun
from moesaic.errors import CheckpointError, ConfigError, DataError
from moesaic.folders import FolderLock
from moesaic.model.load import load_run_config
from moesaic.report.records import EvaluationRecord, TrainRecord, read_metrics
from moesaic.train.loop import Trainer, train

Student = Callable[..., TrainConfig]
CPU = torch.device("cpu")


class Stop:
    """A display that ends the run after a step, as Ctrl-C does."""

    def __init__(self, step: int | None = None) -> None:
        self._step = step

    def update(self, record: TrainRecord) -> None:
        if record.step == self._step:
            signal.raise_signal(signal.SIGINT)

    def evaluation(self, record: EvaluationRecord, *, best_loss: float) -> None: ...

    def message(self, text: str) -> None: ...


def records_of(run_folder: Path) -> list[dict[str, Any]]:
    """All train and evaluation records without what a clock says."""
    metrics = read_metrics(run_folder)
    timed = {"seconds", "tokens_per_second", "flops_per_second", "share_of_peak"}
    records = [asdict(each) for each in (*metrics.train, *metrics.evaluation)]
    return [{key: value for key, value in record.items() if key not in timed} for record in records]


def assert_same_run(run_folder: Path, unbroken: Path) -> None:
    one, other = list_checkpoints(run_folder)[-1], list_checkpoints(unbroken)[-1]
    assert (one.step, one.files) == (other.step, other.files)
    assert one.metadata["objective"] == other.metadata["objective"]
    assert records_of(run_folder) == records_of(unbroken)


def make(config: TrainConfig, run_folder: Path, *, resume: bool = False) -> Trainer:
    return make_trainer(config, run_folder, device="cpu", resume=resume, display=Stop())


@pytest.fixture(scope="module")
def unbroken() -> dict[str, Path]:
    """The run that none of the resumed ones may differ from, made by the first of them."""
    return {}


# The switch of 12 steps at 0.5 is before step 7: stopped before it, at it, after it.
@pytest.mark.parametrize("stop_at", [5, 6, 7])
def test_a_resumed_staged_run_equals_the_unbroken_one_bit_for_bit(
    student: Student, tmp_path: Path, unbroken: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, stop_at: int
) -> None:
    config = student("distill.stop_fraction=0.5", "precision=bf16", "distill.teacher_precision=bf16")
    if not unbroken:
        unbroken["run"] = tmp_path_factory.mktemp("unbroken") / "run"
        distill(config, unbroken["run"], display=Stop())
    assert distill(config, tmp_path / "run", display=Stop(stop_at)).step == stop_at
    distill(config, tmp_path / "run", resume=True, display=Stop())
    assert_same_run(tmp_path / "run", unbroken["run"])
    alphas = [record.objective["alpha"] for record in read_metrics(tmp_path / "run").train]
    assert alphas == [1.0] * 6 + [0.0] * 6
    assert ["forward_kl" in record.objective for record in read_metrics(tmp_path / "run").train] == [True] * 6 + [
        False
    ] * 6


@pytest.mark.parametrize("state", [{}, {"x": 1}, {"teacher_sha256": 3}, {"teacher_sha256": "", "has_ended": "no"}])
def test_a_state_that_no_distillation_wrote_is_refused(state: dict[str, Any], student: Student, tmp_path: Path) -> None:
    config = student()
    distill(config, tmp_path / "run", display=Stop())
    file = list_checkpoints(tmp_path / "run")[-1].path / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["metadata"]["objective"] = state
    file.write_text(json.dumps(manifest))
    with pytest.raises(
        CheckpointError, match=r"does not say how far the distillation was \(.*\); .* required; restore"
    ):
        distill(config, tmp_path / "run", resume=True, display=Stop())


def test_a_record_over_the_switch_has_the_alpha_of_its_last_step(student: Student, tmp_path: Path) -> None:
    distill(student("distill.stop_fraction=0.5", "log_every_steps=100"), tmp_path / "run", display=Stop())
    alphas = {record.step: record.objective["alpha"] for record in read_metrics(tmp_path / "run").train}
    assert alphas[5] == 1.0 and alphas[min(step for step in alphas if step > 6)] == 0.0


@pytest.mark.parametrize(
    ("settings", "alphas"),
    [
        (["distill.schedule=none"], [0, 0, 0, 0, 0]),
        (["distill.schedule=throughout", "distill.alpha=0.5"], [0.5] * 5),
        ([], [1, 1, 1, 1, 0]),  # 0.70 of 5 steps: the fourth starts at 0.6, the fifth at 0.8
        (["distill.schedule=linear", "distill.stop_fraction=0.5", "distill.alpha=2"], [2, 1.2, 0.4, 0, 0]),
    ],
)
def test_alpha_follows_the_schedule_and_the_teacher_runs_only_where_it_is_above_0(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str], alphas: list[float]
) -> None:
    calls = []
    targets = LiveTeacher.targets
    monkeypatch.setattr(LiveTeacher, "targets", lambda self, batch: calls.append(batch) or targets(self, batch))
    trainer = make(student(*settings, steps=5), tmp_path)
    seen = [trainer.train_step().losses[0].terms["alpha"].item() for _ in range(5)]
    assert seen == pytest.approx(alphas)
    assert len(calls) == 2 * sum(alpha > 0 for alpha in alphas)  # two micro-batches a step


def test_without_a_teacher_the_steps_are_plain_trainings(student: Student, tmp_path: Path) -> None:
    config = student("distill.schedule=none", steps=4)
    distill(config, tmp_path / "student", display=Stop())
    train(config.replace(distill=None), tmp_path / "plain", display=Stop())
    assert list_checkpoints(tmp_path / "student")[-1].files == list_checkpoints(tmp_path / "plain")[-1].files


def test_a_student_learns_what_its_teacher_says(student: Student, tmp_path: Path) -> None:
    """Half of the divergence is gone in 30 steps; and with the teacher more of it than without."""
    config = student("distill.schedule=throughout", "distill.alpha=4", steps=30)
    distances = {}
    for name in ("taught", "alone"):
        trainer = make(config, tmp_path / name)
        first = trainer.train_step().losses[0].terms["forward_kl"].item()
        if name == "alone":
            trainer.objective = Distillation(student("distill.schedule=none"))
        for _ in range(28):
            trainer.train_step()
        trainer.objective = make(config, tmp_path / f"{name}-measured").objective
        distances[name] = first, trainer.train_step().losses[0].terms["forward_kl"].item()
    first, last = distances["taught"]
    assert last < 0.5 * first
    assert last < distances["alone"][1]


def test_the_teacher_is_dropless_in_evaluation_mode_and_without_gradient(teacher: Path, student: Student) -> None:
    run = TeacherRun.open(teacher)
    model = run.load("fp32", device=CPU).train()
    live = LiveTeacher(model)
    assert not model.training
    trainer_batch = torch.randint(320, (2, 16))
    from moesaic.data.loader import Batch

    logits = live.targets(Batch(trainer_batch, trainer_batch, None)).chunk(3, 20)
    assert logits.shape == (17, 320) and logits.dtype == torch.float32 and not logits.requires_grad
    with torch.no_grad():
        expected = model.logits(model(trainer_batch).hidden).view(-1, 320)[3:20]
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_a_rounded_teacher_says_nearly_the_same(teacher: Path, precision: Any) -> None:
    run = TeacherRun.open(teacher)
    tokens = torch.randint(320, (4, 16), generator=torch.Generator().manual_seed(0))
    exact, rounded = run.load("fp32", device=CPU), run.load(precision, device=CPU)
    with torch.no_grad():
        p, q = (torch.log_softmax(model.logits(model(tokens).hidden), -1) for model in (exact, rounded))
    assert (p.exp() * (p - q)).sum(-1).mean() < 5e-3


class TestAutomatic:
    def test_a_trial_leaves_no_trace(self, student: Student, tmp_path: Path) -> None:
        """Weights, moments, correction bias and step: with trials at every evaluation, or without any."""
        extra = [
            "model.moe.router.score_correction_bias=true", "model.dropout=0.1", "model.moe.router.noise=jitter",
            "optimizer.name=muon",
        ]  # fmt: skip
        config = student("distill.schedule=automatic", "distill.trial_steps=2", *extra, steps=6)
        one, other = make(config, tmp_path / "one"), make(config, tmp_path / "other")
        for step in range(4):
            if step != 1:
                loss = one.trial(2, one.objective)
                assert loss == one.trial(2, one.objective)
            one.train_step(), other.train_step()
        assert one.step == other.step == 4
        for name, value in one.model.state_dict().items():
            assert torch.equal(value, other.model.state_dict()[name]), name
        moments = other.optimizers.named_state()
        assert one.optimizers.named_state().keys() == moments.keys()
        for name, value in one.optimizers.named_state().items():
            assert torch.equal(value, moments[name]), name

    def test_a_trial_is_what_the_run_would_come_to(self, student: Student, tmp_path: Path) -> None:
        config = student("distill.schedule=automatic", "distill.trial_steps=3")
        trainer = make(config, tmp_path)
        trainer.train_step()
        foretold = trainer.trial(3, trainer.objective)
        for _ in range(3):
            trainer.train_step()
        assert foretold == trainer.trial(0, trainer.objective)

    @pytest.mark.parametrize("losses", [[(2.0, 1.0), (1.0, 2.0)], [(1.0, 1.0)]])
    def test_it_ends_for_good_where_the_teacher_no_longer_helps_and_resumes_so(
        self, student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, losses: list[tuple[float, float]]
    ) -> None:
        config = student("distill.schedule=automatic", "distill.trial_steps=2", steps=8)
        script = [loss for pair in losses for loss in pair]
        monkeypatch.setattr(Trainer, "trial", lambda self, steps, objective: script.pop(0))
        distill(config, tmp_path / "unbroken", display=Stop())
        assert script == []
        metrics = read_metrics(tmp_path / "unbroken")
        alphas = [record.objective["alpha"] for record in metrics.train]
        heard = 2 * len(losses)  # an evaluation every 2 steps
        assert alphas == [1.0] * heard + [0.0] * (8 - heard)
        (ended,) = [event for event in metrics.events if "the teacher is let go" in event.message]
        assert ended.step == heard
        for stop_at in (heard - 1, heard, heard + 1):
            run = tmp_path / str(stop_at)
            script += [loss for pair in losses for loss in pair]
            distill(config, run, display=Stop(stop_at))
            distill(config, run, resume=True, display=Stop())
            assert_same_run(run, tmp_path / "unbroken")
            assert script == []

    def test_where_evaluations_decide_they_are_not_free_when_resuming(self, student: Student, tmp_path: Path) -> None:
        config = student("distill.schedule=automatic", steps=4)
        make(config, tmp_path / "run")
        with pytest.raises(ConfigError, match=r"evaluation.sequences \(3, was 4\)"):
            make(
                config.replace(evaluation=config.evaluation.replace(sequences=3)),
                tmp_path / "run",
                resume=True,
            )
        staged = student(steps=4)
        make(staged, tmp_path / "staged")
        make(staged.replace(evaluation=config.evaluation.replace(sequences=3)), tmp_path / "staged", resume=True)


def test_a_student_beyond_its_teacher_needs_it_no_more(student: Student, teacher: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "teacher")
    config = student(f"distill.teacher={tmp_path / 'teacher'}", "distill.stop_fraction=0.5")
    distill(config, tmp_path / "late", display=Stop(7))
    distill(config, tmp_path / "early", display=Stop(5))
    shutil.rmtree(tmp_path / "teacher")
    assert distill(config, tmp_path / "late", resume=True).step == 12
    with pytest.raises(CheckpointError, match="does not exist"):
        make(config, tmp_path / "early", resume=True)


@pytest.mark.parametrize("can_link", [True, False])
def test_what_a_run_that_trains_deletes_is_kept_until_the_report_is_written(
    student: Student,
    teacher: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    can_link: bool,
) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    if not can_link:
        monkeypatch.setattr(Path, "hardlink_to", refuse)
    theirs, run = Path(shutil.copytree(teacher, tmp_path / "teacher")), tmp_path / "run"
    config = student(f"distill.teacher={theirs}")
    with FolderLock(theirs), caplog.at_level("INFO", "moesaic"):
        distill(config, run, display=Stop(3))
        taught = resolve_checkpoint(theirs)
        weights = run / "teacher" / "checkpoints" / taught.path.name / "model.safetensors"
        assert weights.samefile(taught.path / weights.name) == can_link
        assert f"keeps its step {taught.step} ({'a link' if can_link else 'a copy of'}" in caplog.text
        shutil.rmtree(taught.path)
        for teachers in (str(theirs), f"{theirs}@{taught.step}"):
            make(config.replace(distill=config.distill.replace(teacher=teachers)), run, resume=True)
        with pytest.raises(CheckpointError, match="is not the one that this run began with"):
            other = f"{theirs}@{resolve_checkpoint(theirs).step}"
            make(config.replace(distill=config.distill.replace(teacher=other)), run, resume=True)
    distill(config, run, resume=True, display=Stop())
    distill(student(f"distill.teacher={teacher}"), tmp_path / "unbroken", display=Stop())
    assert_same_run(run, tmp_path / "unbroken")
    report = try_report(run, device="cpu")
    assert report is not None and (report.teacher.run, report.teacher.step) == (str(theirs), taught.step)
    assert not (run / "teacher").exists() and not (tmp_path / "unbroken" / "teacher").exists()


def test_a_teacher_that_was_deleted_is_named_and_what_still_works(
    student: Student, teacher: Path, tmp_path: Path
) -> None:
    theirs, run = Path(shutil.copytree(teacher, tmp_path / "teacher")), tmp_path / "run"
    taught = resolve_checkpoint(theirs)
    for name in (str(theirs), f"{theirs}@{taught.step}"):
        config = student(f"distill.teacher={name}")
        if not run.exists():
            distill(config, run, display=Stop(3))
            shutil.rmtree(taught.path)
        with pytest.raises(CheckpointError, match=rf"step {taught.step} .* is gone: .*keep_last.*`moesaic train {run}"):
            make(config, run, resume=True)


def test_a_student_of_a_cache_never_loads_its_teacher_and_resumes_exactly(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = student(f"distill.cache={tmp_path / 'cache'}", steps=8)
    write_cache(tmp_path / "cache", config, top_k=8)
    monkeypatch.setattr(TeacherRun, "load", lambda *_, **__: pytest.fail("the teacher was loaded"))
    distill(config, tmp_path / "unbroken", display=Stop())
    distill(config, tmp_path / "run", display=Stop(3))
    distill(config, tmp_path / "run", resume=True, display=Stop())
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def test_a_student_trained_on_is_a_plain_run(student: Student, tmp_path: Path) -> None:
    distill(student(steps=4), tmp_path / "student", display=Stop())
    config = load_train_config(tmp_path / "student", ["tokens=256"])
    assert config.distill is None and config.init_from == str(tmp_path / "student")
    assert train(config, tmp_path / "on", display=Stop()).step == 4


def test_run_json_names_the_teacher(student: Student, teacher: Path, tmp_path: Path) -> None:
    make(student(), tmp_path / "run")
    (start,) = json.loads((tmp_path / "run" / "run.json").read_text())["starts"]
    assert start["objective"]["teacher"] == str(teacher) and len(start["objective"]["model_sha256"]) == 64
    assert load_run_config(tmp_path / "run").distill == student().distill


class TestMistakes:
    def test_another_teacher_when_resuming(self, student: Student, teacher: Path, tmp_path: Path) -> None:
        distill(student(), tmp_path / "run", display=Stop(3))
        steps = [info.step for info in list_checkpoints(teacher)]
        config = student(f"distill.teacher={teacher}@{steps[0]}")
        with pytest.raises(CheckpointError, match="is not the one that this run began with"):
            make(config, tmp_path / "run", resume=True)

    def test_another_precision_of_the_teacher_when_resuming(self, student: Student, tmp_path: Path) -> None:
        distill(student(), tmp_path / "run", display=Stop(3))
        with pytest.raises(ConfigError, match=r"distill.teacher_precision \(bf16, was fp32\)"):
            make(student("distill.teacher_precision=bf16"), tmp_path / "run", resume=True)

    def test_another_cache_or_none_when_resuming(self, student: Student, tmp_path: Path) -> None:
        live = student("data.fixed_windows=true")
        cached = {}
        for top_k in (8, 16):
            cached[top_k] = student(f"distill.cache={tmp_path / f'cache-{top_k}'}")
            write_cache(tmp_path / f"cache-{top_k}", cached[top_k], top_k=top_k)
        distill(cached[8], tmp_path / "cached", display=Stop(3))
        distill(live, tmp_path / "live", display=Stop(3))
        for run, config, message in (
            ("cached", cached[16], "a cache of 16 tokens and this run began with a cache of 8 tokens"),
            ("cached", live, "no cache and this run began with a cache of 8 tokens"),
            ("live", cached[8], "a cache of 8 tokens and this run began with no cache"),
        ):
            before = (tmp_path / run / "config.yaml").read_bytes()
            with pytest.raises(ConfigError, match=message):
                make(config, tmp_path / run, resume=True)
            assert (tmp_path / run / "config.yaml").read_bytes() == before
        (tmp_path / "cache-8").rename(tmp_path / "moved")
        assert distill(student(f"distill.cache={tmp_path / 'moved'}"), tmp_path / "cached", resume=True).step == 12

    def test_another_tokenizer(self, student: Student, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_text("other words, other tokens. " * 200)
        prepare([tmp_path / "a.txt"], tmp_path / "other", vocab_size=300, validation_fraction=0.2, num_workers=1)
        with pytest.raises(DataError, match=r"prepared with another tokenizer.*--tokenizer"):
            make(student(f"data.path={tmp_path / 'other'}"), tmp_path / "run")
        assert not (tmp_path / "run").exists()

    def test_another_vocabulary(self, student: Student, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"model.vocab_size \(321\) is not the teacher's \(320\)"):
            make(student("model.vocab_size=321"), tmp_path / "run")

    def test_longer_sequences_than_the_teacher_has_positions(self, student: Student, tmp_path: Path) -> None:
        config = student("model.max_positions=64", "data.sequence_length=40")
        with pytest.raises(ConfigError, match="more than the 32 positions of the teacher"):
            make(config, tmp_path / "run")

    def test_no_such_teacher(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="does not exist"):
            student_config(tmp_path / "absent")

    def test_a_students_config_is_not_trained_without_its_teacher(self, student: Student, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is trained by `moesaic distill`"):
            train(student(), tmp_path / "run")
        with pytest.raises(ConfigError, match="has no distill section"):
            distill(student().replace(distill=None), tmp_path / "run")
