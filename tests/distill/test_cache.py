"""The cached teacher: what is stored is what the live one says, within the reported error; and only for its student."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from moesaic.checkpoint.store import list_checkpoints
from moesaic.checkpoint.stream import TensorReader
from moesaic.config.train import TrainConfig
from moesaic.data.prepare import prepare
from moesaic.data.shards import ShardSet
from moesaic.distill import cache as module
from moesaic.distill.cache import CachedTeacher, CacheKey, compress, normalized, write_cache
from moesaic.distill.loss import divergence_of, reference_bucket_divergence
from moesaic.distill.run import make_trainer
from moesaic.distill.teacher import TeacherRun
from moesaic.errors import ConfigError, DataError, FolderInUseError
from moesaic.folders import FolderLock

Student = Callable[..., TrainConfig]
CPU = torch.device("cpu")


@pytest.fixture
def cached(student: Student, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A function (top_k, *settings) that writes a cache of the teacher and returns the config of a student of it."""

    def make(top_k: int, *settings: str, **options: Any) -> TrainConfig:
        folder = tmp_path / f"cache-{top_k}"
        config = student(f"distill.cache={folder}", *settings, **options)
        write_cache(folder, config, top_k=top_k)
        return config

    return make


def open_cache(config: TrainConfig) -> CachedTeacher:
    assert config.distill is not None and config.distill.cache is not None
    run, shards = TeacherRun.open(config.distill.teacher), ShardSet.open(config.data.path)
    return CachedTeacher.open(config.distill.cache, CacheKey.of(config, run, shards), verify=True)


@pytest.mark.parametrize("top_k", [1, 8, 320])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_cached_teacher_equals_the_live_one_within_the_reported_error(
    cached: Callable[..., TrainConfig], student: Student, tmp_path: Path, top_k: int, temperature: float
) -> None:
    config = cached(top_k, f"distill.temperature={temperature}")
    live = student(f"distill.temperature={temperature}", "data.fixed_windows=true")
    trainers = [
        make_trainer(each, tmp_path / name, device="cpu", resume=False, display=None)
        for name, each in (("cached", config), ("live", live))
    ]
    report = open_cache(config).report
    cached_loss, live_loss = (trainer.train_step().losses[0] for trainer in trainers)
    assert torch.equal(cached_loss.cross_entropy, live_loss.cross_entropy)
    difference = live_loss.terms["forward_kl"].item() - cached_loss.terms["forward_kl"].item()
    # Of a student that was just drawn, which finds all tokens nearly equally likely. Other windows were measured.
    assert -5e-4 < difference < 1.3 * report.approximation_kl + 5e-4
    if top_k == 320:
        assert report.rest == 0.0 and report.approximation_kl < 2e-4 and abs(difference) < 5e-4
    else:
        assert 0 < report.rest < 1 and report.approximation_kl > 1e-3


def test_what_is_stored_is_what_the_teacher_says(cached: Callable[..., TrainConfig], teacher: Path) -> None:
    config = cached(8)
    stored, shards = open_cache(config), ShardSet.open(config.data.path)
    model = TeacherRun.open(teacher).load("fp32", device=CPU)
    loader = module._loader(config, shards)
    batch = loader.windows(np.asarray([5, 0, loader.sequences_per_epoch - 1]))
    tokens = shards.train.read(5 * 16, 16)
    assert batch.inputs[0].tolist() == tokens.tolist()
    found = stored.targets(batch)
    with torch.no_grad():
        log_p = torch.log_softmax(model.logits(model(batch.inputs).hidden), -1).view(-1, 320)
    top, ids = log_p.topk(8, -1)
    assert torch.equal(found.ids, ids)
    # Half of fp16's last place, of numbers below 16, and what makes them add up to 1 again.
    torch.testing.assert_close(found.log_probs[:, :-1], top, rtol=0, atol=6e-3)
    torch.testing.assert_close(found.log_probs.exp().sum(-1), torch.ones(48))


def test_ids_are_as_narrow_as_the_vocabulary_allows(cached: Callable[..., TrainConfig]) -> None:
    config = cached(4)
    assert config.distill is not None
    (file,) = Path(str(config.distill.cache)).glob("*.safetensors")
    with TensorReader(file) as reader:
        ids, log_probs = reader.layout["ids"], reader.layout["log_probs"]
        assert (ids.dtype, log_probs.dtype) == (torch.uint16, torch.float16)
        num_windows = ids.shape[0]
        assert ids.shape == (num_windows, 16, 4) and log_probs.shape == (num_windows, 16, 5)
    report = open_cache(config).report
    assert report.num_windows == num_windows and report.num_bytes == file.stat().st_size
    assert report.bytes_per_token == pytest.approx(4 * 2 + 5 * 2, abs=0.5)  # and the header


@pytest.mark.parametrize(("top_k", "vocab_size"), [(1, 2), (5, 33), (33, 33)])
def test_the_reported_loss_is_the_divergence_that_an_even_student_misses(top_k: int, vocab_size: int) -> None:
    log_p = torch.log_softmax(2 * torch.randn(20, vocab_size, generator=torch.Generator().manual_seed(1)), -1)
    ids, stored, lost = compress(log_p, top_k)
    exact = log_p.topk(top_k, -1).values
    rest = 1 - exact.exp().sum(-1, keepdim=True)
    even = torch.full((20, vocab_size), -math.log(vocab_size))
    whole = divergence_of(log_p, even, "forward_kl")
    from moesaic.distill.loss import TeacherTopK

    bucket = reference_bucket_divergence(TeacherTopK(ids, normalized(stored)), even)
    torch.testing.assert_close(whole - bucket, lost, rtol=0, atol=3e-3)
    assert (rest >= -1e-5).all() and (lost > -1e-6).all()


@pytest.mark.parametrize("top_k", [3, 33])
def test_what_is_beyond_fp16_is_stored_as_its_least_number(top_k: int) -> None:
    logits = torch.randn(20, 33, generator=torch.Generator().manual_seed(1)) * 1e6
    ids, stored, lost = compress(torch.log_softmax(logits, -1), top_k)
    assert torch.isfinite(lost).all() and lost.abs().max() < 1e-3
    assert torch.isfinite(stored[:, :-1]).all()
    assert (normalized(stored)[:, 0] == 0).all() and torch.equal(ids[:, 0], logits.argmax(-1))


def test_students_of_any_seed_batch_and_epoch_read_one_cache(
    cached: Callable[..., TrainConfig], student: Student, tmp_path: Path
) -> None:
    config = cached(16)
    assert config.distill is not None
    trainer = make_trainer(
        student(f"distill.cache={config.distill.cache}", "seed=7", "batch_size=6", "micro_batch_size=3"),
        tmp_path / "other", device="cpu", resume=False, display=None,
    )  # fmt: skip
    per_epoch = trainer.loader.sequences_per_epoch
    seen: list[int] = []
    for step in range(2 * per_epoch // 6 + 1):
        batch = trainer.loader.batch(step)
        assert batch.starts is not None and not (batch.starts % 16).any()
        seen += (batch.starts // 16).tolist()
        open_cache_targets = trainer.objective._source.targets(batch.rows(1, 3))  # type: ignore[attr-defined]
        assert open_cache_targets.ids.shape == (32, 16)
    assert sorted(seen[:per_epoch]) == sorted(seen[per_epoch : 2 * per_epoch]) == list(range(per_epoch))
    assert seen[:per_epoch] != seen[per_epoch : 2 * per_epoch]


def test_a_killed_writer_goes_on_where_it_was(
    cached: Callable[..., TrainConfig], student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = cached(8)
    assert whole.distill is not None and whole.distill.cache is not None
    monkeypatch.setattr(module, "_SHARD_BYTES", 20_000)
    folder = tmp_path / "killed"
    config = student(f"distill.cache={folder}")
    write, calls = module._Writer._write_predictions, []

    def die(self: Any, path: Path, *arguments: Any) -> None:
        calls.append(path.name)
        if len(calls) == 3:
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        write(self, path, *arguments)

    monkeypatch.setattr(module._Writer, "_write_predictions", die)
    with pytest.raises(KeyboardInterrupt):
        write_cache(folder, config, top_k=8)
    with pytest.raises(DataError, match="is unfinished"):
        open_cache(config)
    # The second shard is damaged meanwhile: it is written again too.
    (folder / "teacher-00001.safetensors").write_bytes(b"")
    report = write_cache(folder, config)
    assert calls[3:5] == [".writing-teacher-00001.safetensors", ".writing-teacher-00002.safetensors"]
    assert sorted(path.name for path in folder.iterdir())[0] == "manifest.json"
    assert report.top_k == 8 and len(json.loads((folder / "manifest.json").read_text())["shards"]) > 3
    batch = module._loader(config, ShardSet.open(config.data.path)).windows(np.arange(report.num_windows))
    one, other = open_cache(config).targets(batch), open_cache(whole).targets(batch)
    assert torch.equal(one.ids, other.ids) and torch.equal(one.log_probs, other.log_probs)
    assert write_cache(folder, config) == report  # finished: nothing is written


def test_one_process_writes_a_cache_and_any_number_read_it(
    cached: Callable[..., TrainConfig], student: Student, tmp_path: Path
) -> None:
    config = cached(4)
    assert config.distill is not None
    folder = Path(str(config.distill.cache))
    with FolderLock(folder):
        assert write_cache(folder, config).top_k == 4
    new = tmp_path / "new"
    with FolderLock(new):
        with pytest.raises(FolderInUseError, match="is being written by"):
            write_cache(new, student(f"distill.cache={new}"), top_k=4)
        assert list(new.iterdir()) == []


class TestMistakes:
    @pytest.mark.parametrize(
        ("settings", "key"),
        [
            (["distill.temperature=2"], "temperature 1.0, here 2.0"),
            (["data.sequence_length=8"], "sequence_length 16, here 8"),
            (["data.document_mask=true"], "document_mask False, here True"),
            (["distill.teacher_precision=bf16"], "teacher_precision fp32, here bf16"),
        ],
    )
    def test_another_student(
        self, cached: Callable[..., TrainConfig], student: Student, tmp_path: Path, settings: list[str], key: str
    ) -> None:
        config = cached(4)
        assert config.distill is not None
        other = student(f"distill.cache={config.distill.cache}", *settings)
        with pytest.raises(ConfigError, match=key):
            make_trainer(other, tmp_path / "run", device="cpu", resume=False, display=None)
        with pytest.raises(ConfigError, match=key):
            write_cache(str(config.distill.cache), other)
        assert not (tmp_path / "run").exists()

    def test_another_teacher_and_other_data(
        self, cached: Callable[..., TrainConfig], student: Student, teacher: Path, tmp_path: Path
    ) -> None:
        config = cached(4)
        assert config.distill is not None
        own = f"distill.cache={config.distill.cache}"
        first = list_checkpoints(teacher)[0].step
        with pytest.raises(ConfigError, match="teacher_sha256"):
            open_cache(student(own, f"distill.teacher={teacher}@{first}"))
        (tmp_path / "a.txt").write_text("Other words of the same tokens. " * 300)
        prepare([tmp_path / "a.txt"], tmp_path / "other", tokenizer=teacher, validation_fraction=0.2, num_workers=1)
        with pytest.raises(ConfigError, match="data_fingerprint"):
            open_cache(student(own, f"data.path={tmp_path / 'other'}"))

    def test_another_top_k(self, cached: Callable[..., TrainConfig]) -> None:
        config = cached(4)
        assert config.distill is not None
        with pytest.raises(ConfigError, match="holds the 4 likeliest tokens of each position and 5 are asked for"):
            write_cache(str(config.distill.cache), config, top_k=5)
        with pytest.raises(ConfigError, match=r"top_k \(321\) of the cache is not from 1 to the vocabulary's 320"):
            write_cache(str(config.distill.cache) + "-new", config, top_k=321)
        assert not Path(str(config.distill.cache) + "-new").exists()

    def test_a_folder_of_something_else(self, student: Student, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ConfigError, match="is not empty and holds no cache"):
            write_cache(tmp_path, student(f"distill.cache={tmp_path}"))

    @pytest.mark.parametrize("name", ["manifest.json", "progress.json"])
    def test_a_prepared_corpus(self, student: Student, tiny_data: Path, tmp_path: Path, name: str) -> None:
        shutil.copytree(tiny_data, tmp_path / "corpus")
        (tmp_path / "corpus" / "manifest.json").rename(tmp_path / "corpus" / name)
        with pytest.raises(DataError, match=r"holds no cache of a teacher .*; a cache needs a folder of its own; name"):
            write_cache(tmp_path / "corpus", student(f"distill.cache={tmp_path / 'corpus'}"))

    def test_none_there(self, student: Student, tmp_path: Path) -> None:
        config = student(f"distill.cache={tmp_path / 'none'}")
        with pytest.raises(DataError, match=r"holds no cache of a teacher; .*--cache"):
            make_trainer(config, tmp_path / "run", device="cpu", resume=False, display=None)

    def test_one_whose_numbers_have_changed_teaches_nobody(
        self, cached: Callable[..., TrainConfig], tmp_path: Path
    ) -> None:
        config = cached(4)
        assert config.distill is not None
        file = Path(str(config.distill.cache)) / "teacher-00000.safetensors"
        data = bytearray(file.read_bytes())
        data[-5] ^= 1
        file.write_bytes(bytes(data))
        trainer = make_trainer(config, tmp_path / "run", device="cpu", resume=False, display=None)
        with pytest.raises(
            DataError, match=r"teacher-00000.safetensors is missing, truncated or corrupt \(its SHA-256"
        ):
            trainer.run()

    @pytest.mark.parametrize("harm", ["truncated", "flipped", "gone", "manifest"])
    def test_a_damaged_one(self, cached: Callable[..., TrainConfig], harm: str) -> None:
        config = cached(4)
        assert config.distill is not None
        folder = Path(str(config.distill.cache))
        file = folder / "teacher-00000.safetensors"
        if harm == "truncated":
            file.write_bytes(file.read_bytes()[:-10])
        elif harm == "flipped":
            data = bytearray(file.read_bytes())
            data[-5] ^= 1
            file.write_bytes(bytes(data))
        elif harm == "gone":
            file.unlink()
        else:
            (folder / "manifest.json").write_text('{"format": 1, "key": {}}')
        with pytest.raises(DataError, match=r"missing, truncated or corrupt|is damaged or of another version"):
            open_cache(config)
