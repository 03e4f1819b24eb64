"""A model that is kept in a file is the packed model, to the bit; whatever is wrong with the file, the run loads."""

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moesaic.checkpoint.store import save_checkpoint
from moesaic.config.load import write_config
from moesaic.config.model import ModelConfig
from moesaic.config.train import TrainConfig
from moesaic.convert.quantize import quantize_run
from moesaic.data.shards import ShardSet
from moesaic.errors import CheckpointError, DeviceError
from moesaic.kernels import select
from moesaic.model import packed_file
from moesaic.model.kv_cache import BatchCache
from moesaic.model.load import LoadedModel, load_run
from moesaic.model.pack import pack_transformer, packed_tensors
from moesaic.model.transformer import Transformer

NAME = "packed-bf16.safetensors"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own; and models this small are worth a file."""
    monkeypatch.setattr(packed_file, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(packed_file, "SMALLEST_BYTES", 0)
    return tmp_path / "cache" / "packed"


@pytest.fixture
def run(make_config: Any, tiny_data: Path, tmp_path: Path) -> Path:
    config: TrainConfig = make_config("pr-moe", precision="bf16")
    folder = tmp_path / "run"
    folder.mkdir()
    write_config(config, folder / "config.yaml")
    ShardSet.open(tiny_data).load_tokenizer().save(folder)
    state = dict(Transformer(config.model).initialize(1).state_dict())
    save_checkpoint(folder, 1, model=state, optimizer={}, metadata={})
    return folder


def file_of(run: Path, name: str = NAME) -> Path:
    return run / "checkpoints" / "step-00000001" / name


def logits(loaded: LoadedModel) -> torch.Tensor:
    model, inputs = loaded.model, torch.arange(24).view(2, 12)
    cache = BatchCache(model.config, 2, 12, dtype=torch.bfloat16, device=inputs.device)
    with torch.no_grad():
        return model.logits(torch.cat([model(part, cache=cache).hidden for part in inputs.split([7, 1, 4], 1)], 1))


def is_mapped(loaded: LoadedModel) -> bool:
    sizes = {t.untyped_storage().nbytes() for t in packed_tensors(loaded.model).values()}
    return len(sizes) == 1  # all of them on one mapping


def test_the_first_start_writes_it_and_the_next_ones_map_it(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert not is_mapped(load_run(run, precision="int8")) and not file_of(run, "packed-int8.safetensors").exists()
    first = load_run(run, precision="int8", packed_file="write")
    assert "keeping them in" in caplog.text
    caplog.clear()
    for policy in ("write", "read"):
        again = load_run(run, precision="int8", packed_file=policy)  # type: ignore[arg-type]
        assert is_mapped(again) and torch.equal(logits(again), logits(first))
    off = load_run(run, precision="int8", packed_file="off")
    assert not is_mapped(off) and torch.equal(logits(off), logits(first))
    assert not caplog.text
    assert {path.name for path in file_of(run).parent.iterdir()} == {
        "manifest.json", "model.safetensors", "optimizer.safetensors", "packed-int8.safetensors",
    }  # fmt: skip


@pytest.mark.skipif(select.cpu_library() is None, reason="bf16 is packed for the C++ kernels alone")
def test_each_precision_has_its_own(run: Path) -> None:
    one, other = (load_run(run, packed_file="write", precision=each) for each in ("bf16", "int8"))  # type: ignore[arg-type]
    assert file_of(run).exists() and file_of(run, "packed-int8.safetensors").exists()
    assert not torch.equal(logits(one), logits(other))
    assert torch.equal(logits(load_run(run)), logits(one))


@pytest.mark.skipif(sys.platform == "win32", reason="file locks")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o444), (0o077, 0o400)])
def test_nobody_writes_into_what_others_have_mapped(run: Path, umask: int, mode: int) -> None:
    """To cut it short in place ends them; to make it again, by a new file of its name, does not."""
    path = file_of(run, "packed-int8.safetensors")
    before = os.umask(umask)
    try:
        first = load_run(run, precision="int8", packed_file="write")
        assert path.stat().st_mode & 0o777 == mode
        wanted = logits(first)
        path.replace(path.with_name("other"))
        path.write_bytes(b"of another run")
        assert is_mapped(load_run(run, precision="int8", packed_file="write"))
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == mode and torch.equal(logits(first), wanted)


DAMAGES: dict[str, Any] = {
    "truncated": lambda data: data[:-5000], "foreign": lambda _: b"\x80\x04\x95pickled" * 1000, "empty": lambda _: b"",
}  # fmt: skip


@pytest.mark.parametrize("how", DAMAGES)
def test_a_file_that_is_not_whole_is_made_again(run: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    path = file_of(run, "packed-int8.safetensors")
    wanted = logits(load_run(run, precision="int8", packed_file="write"))
    damaged = DAMAGES[how](path.read_bytes())
    path.unlink()
    path.write_bytes(damaged)
    loaded = load_run(run, precision="int8")
    assert not is_mapped(loaded) and torch.equal(logits(loaded), wanted)
    passed_over = [each.message for each in caplog.records if "Passing over a file of packed weights" in each.message]
    assert len(passed_over) == 1 and "delete it" in passed_over[0]
    caplog.clear()
    assert is_mapped(load_run(run, precision="int8", packed_file="write"))
    assert len([each for each in caplog.records if "Passing over" in each.message]) == 1  # though it is opened twice
    caplog.clear()
    assert is_mapped(load_run(run, precision="int8")) and not caplog.records


def test_other_weights_and_another_config_have_another_key(run: Path) -> None:
    path = file_of(run, "packed-int8.safetensors")
    first = load_run(run, precision="int8", packed_file="write")
    state = dict(Transformer(first.config.model).initialize(2).state_dict())
    kept = path.read_bytes()
    save_checkpoint(run, 1, model=state, optimizer={}, metadata={})
    path.write_bytes(kept)  # as if somebody had copied it there
    other = load_run(run, precision="int8")
    assert not is_mapped(other) and not torch.equal(logits(other), logits(first))
    info, config = first.info, first.config.model
    one = packed_file.PackedFile.of(info, config, precision="int8")
    changed = ModelConfig.from_dict({**config.to_dict(), "rope_theta": 5.0})
    assert packed_file.PackedFile.of(info, changed, precision="int8").key != one.key
    assert packed_file.PackedFile.of(info, config, precision="bf16").key != one.key


def test_a_cache_that_may_not_be_searched_is_no_error(run: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exists = Path.exists

    def refused(path: Path, **options: Any) -> bool:
        if path.is_relative_to(cache) and path != cache:
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", refused)
    assert not is_mapped(load_run(run, precision="int8"))


def test_where_the_run_cannot_be_written_it_is_in_the_cache(
    run: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = packed_file._turn_to_write

    def refuse(place: Path) -> Any:
        if place.is_relative_to(run):
            raise OSError(30, "Read-only file system")
        return inside(place)

    monkeypatch.setattr(packed_file, "_turn_to_write", refuse)
    wanted = load_run(run, precision="int8", packed_file="write")
    assert "cannot be kept in" in caplog.text and "Read-only file system" in caplog.text
    assert len(list(cache.iterdir())) == 1 and is_mapped(wanted)
    again = load_run(run, precision="int8")
    assert is_mapped(again) and torch.equal(logits(again), logits(wanted))


def test_without_room_on_the_disk_the_run_loads_all_the_same(
    run: Path, cache: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = logits(load_run(run, precision="int8"))
    monkeypatch.setattr(packed_file, "_SPARE_BYTES", 1 << 60)
    loaded = load_run(run, precision="int8", packed_file="write")
    assert not is_mapped(loaded) and torch.equal(logits(loaded), wanted)
    assert len([each for each in caplog.records if "a spare one are required" in each.message]) == 2  # both places
    monkeypatch.undo()
    monkeypatch.setattr(packed_file, "SMALLEST_BYTES", 0)
    monkeypatch.setattr(packed_file, "cache_folder", lambda: cache.parent)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_file, "write_mapped", full)
    calls = []
    monkeypatch.setattr(
        "moesaic.model.load.pack_transformer", lambda *a, **k: calls.append(0) or pack_transformer(*a, **k)
    )
    loaded = load_run(run, precision="int8", packed_file="write")
    assert torch.equal(logits(loaded), wanted) and len(calls) == 1
    assert not list(cache.iterdir()) and not [p for p in file_of(run).parent.iterdir() if "packed" in p.name]


def test_a_small_model_is_not_worth_a_file(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_file, "SMALLEST_BYTES", 64 << 20)
    load_run(run, precision="int8", packed_file="write")
    assert not file_of(run, "packed-int8.safetensors").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="file locks")
def test_of_several_that_start_at_once_one_packs(run: Path, tmp_path: Path) -> None:
    script = f"""
import logging, sys
from pathlib import Path
from moesaic.logs import log_to_stderr
from moesaic.model import load, packed_file
packed_file.SMALLEST_BYTES = 0
log_to_stderr()
model = load.load_run({str(run)!r}, precision="int8", packed_file="write").model
print([float(each.double().sum()) for each in packed_file.packed_tensors(model).values()])
"""
    started = [
        subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    ended = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], ended
    assert len({out for out, _ in ended}) == 1
    assert sum("Packing the weights" in err for _, err in ended) == 1
    assert [path.name for path in file_of(run).parent.glob("*packed*")] == ["packed-int8.safetensors"]


def test_what_a_killed_writer_left_is_taken_over(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = file_of(run, "packed-int8.safetensors")
    left = path.with_name(f".writing-{path.name}")
    left.write_bytes(b"half of it" * 100_000)
    check = packed_file._check_space

    def without_what_is_left(folder: Path, size: int) -> None:
        assert not left.stat().st_size  # it does not count as room that is taken
        check(folder, size)

    monkeypatch.setattr(packed_file, "_check_space", without_what_is_left)
    assert is_mapped(load_run(run, precision="int8", packed_file="write"))
    assert path.exists() and not left.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="file locks")
def test_what_killed_writers_of_other_files_left_is_deleted_and_what_is_being_written_is_not(run: Path) -> None:
    import fcntl

    path = file_of(run, "packed-int8.safetensors")
    left, held = (path.with_name(f".writing-packed-{each}.safetensors") for each in ("bf16", "stored"))
    left.write_bytes(b"half of it")
    with held.open("wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert is_mapped(load_run(run, precision="int8", packed_file="write"))
    assert path.exists() and not left.exists() and held.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="file locks")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_writer_that_is_terminated_takes_its_file_along(run: Path, name: str) -> None:
    script = f"""
import signal, time
from moesaic.model import load, packed_file
packed_file.SMALLEST_BYTES = 0
signal.signal(signal.{name}, signal.SIG_DFL)
def write(file, *_, **__):
    file.write(b"half of it")
    print("writes", flush=True)
    time.sleep(60)
packed_file.write_mapped = write
load.load_run({str(run)!r}, precision="int8", packed_file="write")
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "writes\n"
        assert list(file_of(run).parent.glob(".writing-*"))
        process.send_signal(signal.Signals[name])
        assert process.wait(30) == -signal.Signals[name]
    assert not [path for path in file_of(run).parent.iterdir() if "packed" in path.name]


def test_without_a_cache_folder_there_is_the_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> Path:
        raise DeviceError("this user has no home folder")

    monkeypatch.setattr(packed_file, "cache_folder", none)
    assert not is_mapped(load_run(run, precision="int8", packed_file="off"))
    assert is_mapped(load_run(run, precision="int8", packed_file="write"))


def test_a_quantised_run_has_one_too(run: Path, tmp_path: Path) -> None:
    quantize_run(run, tmp_path / "small", experts="int8", rest="bf16", limit_tokens=100, force=True)
    wanted = load_run(tmp_path / "small", packed_file="write")
    assert file_of(tmp_path / "small", "packed-stored.safetensors").exists() and is_mapped(wanted)
    packed = load_run(tmp_path / "small", packed_file="off")
    assert not is_mapped(packed) and torch.equal(logits(packed), logits(wanted))


def test_a_truncated_checkpoint_is_found_when_it_is_packed(run: Path) -> None:
    weights = file_of(run, "model.safetensors")
    wanted = logits(load_run(run, precision="int8", packed_file="write"))
    weights.write_bytes(weights.read_bytes()[:-1])
    assert torch.equal(logits(load_run(run, precision="int8")), wanted)  # made when it was whole
    with pytest.raises(CheckpointError, match="truncated"):
        load_run(run, precision="int8", packed_file="off")


def test_of_a_corrupt_checkpoint_no_file_is_left(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    weights = file_of(run, "model.safetensors")
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(data)
    for policy in ("write", "off"):
        with pytest.raises(CheckpointError, match="does not have the SHA-256"):
            load_run(run, precision="int8", packed_file=policy)  # type: ignore[arg-type]
    assert not [path for path in weights.parent.iterdir() if "packed" in path.name]
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]  # the file is not what failed


def test_a_model_larger_than_the_memory_reads_its_experts_ahead(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not load_run(run, precision="int8", packed_file="write").model.reads_ahead
    monkeypatch.setattr(packed_file, "available_memory_bytes", lambda: 1)
    assert load_run(run, precision="int8", packed_file="read").model.reads_ahead


def test_models_that_do_not_fit_together_read_their_experts_ahead(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_run(run, precision="int8", packed_file="write")
    mapped = [load_run(run, precision="int8", packed_file="read").model for _ in range(2)]
    in_memory = load_run(run, precision="int8", packed_file="off").model
    size = mapped[0].mapped_bytes
    assert size == mapped[1].mapped_bytes > 0 and in_memory.mapped_bytes == 0
    monkeypatch.setattr(packed_file, "available_memory_bytes", lambda: 2 * size)
    for models, other in ((mapped, 0), (mapped[:1], size), ([mapped[0], in_memory], size), ([in_memory], 3 * size)):
        packed_file.read_ahead_where_short(models, other)
        assert not any(model.reads_ahead for model in (*mapped, in_memory))
    packed_file.read_ahead_where_short([*mapped, in_memory], 1)
    assert [model.reads_ahead for model in (*mapped, in_memory)] == [True, True, False]


def test_a_model_larger_than_the_memory_is_never_packed_in_it(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = logits(load_run(run, precision="int8"))
    monkeypatch.setattr(packed_file, "available_memory_bytes", lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr("moesaic.model.load.pack_transformer", lambda *_, **__: pytest.fail("packed in memory"))
        loaded = load_run(run, precision="int8", packed_file="read")
        assert is_mapped(loaded) and torch.equal(logits(loaded), wanted)
    file_of(run, "packed-int8.safetensors").unlink()
    monkeypatch.setattr(packed_file, "_SPARE_BYTES", 1 << 60)
    assert torch.equal(logits(load_run(run, precision="int8")), wanted)
    assert "Packing the weights in memory" in caplog.text and "make room for their file" in caplog.text
