import errno
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

import moesaic
from moesaic.checkpoint import stream
from moesaic.checkpoint.store import (
    CheckpointInfo,
    best_checkpoint,
    checked_file,
    has_checkpoints,
    last_good,
    list_checkpoints,
    load_tensors,
    prune_checkpoints,
    read_info,
    resolve_checkpoint,
    save_checkpoint,
    set_aside_after,
    write_manifest,
)
from moesaic.errors import CheckpointError


def tensors(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"weight": torch.randn(5, 3, generator=generator), "step": torch.tensor(float(step))}


def save(run: Path, step: int, loss: float | None = None) -> CheckpointInfo:
    return save_checkpoint(
        run, step, model=tensors(step), optimizer=tensors(step + 1000), metadata={"validation_loss": loss}
    )


def corrupt_byte(path: Path) -> None:
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-3] ^= 0x10
    (path / "model.safetensors").write_bytes(bytes(data))


def truncate(path: Path) -> None:
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-7])


def remove_optimizer(path: Path) -> None:
    (path / "optimizer.safetensors").unlink()


def break_manifest(path: Path) -> None:
    text = (path / "manifest.json").read_text()
    (path / "manifest.json").write_text(text[: len(text) // 2])


def empty_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("[]")


def other_version(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({"format_version": 99, "new": manifest}))


DAMAGE = {
    truncate: r"bytes.* were written",
    corrupt_byte: "SHA-256",
    remove_optimizer: "has 0 bytes",
    break_manifest: "no readable manifest",
    empty_manifest: "no readable manifest",
    other_version: "format version 99; this moesaic reads 1",
}


def test_what_may_not_be_read_is_not_called_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = save_checkpoint(tmp_path, 7, model={"a": torch.ones(2)}, optimizer={}, metadata={})

    def refuse(self: Path, *arguments: object, **options: object) -> NoReturn:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(CheckpointError, match=r"cannot be read \(Permission denied\); .*; check its permissions"):
        read_info(saved.path)
    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=r"checkpoints cannot be read .*; check its permissions"):
        list_checkpoints(tmp_path)


def test_what_was_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    odd = {
        "bf16": torch.randn(3, 4).bfloat16(),
        "int": torch.arange(5),
        "transposed": torch.randn(4, 6).t(),
        "empty": torch.empty(0, 3),
        "nan": torch.tensor([float("nan"), float("inf"), -0.0]),
    }
    saved = save_checkpoint(tmp_path, 7, model=odd, optimizer={}, metadata={"tokens": 1, "nested": {"a": [1, None]}})
    info = read_info(saved.path)
    assert info == saved
    assert (info.step, info.metadata["nested"]) == (7, {"a": [1, None]})
    loaded = load_tensors(info, "model")
    assert loaded.keys() == odd.keys()
    for name, value in odd.items():
        assert loaded[name].dtype == value.dtype
        torch.testing.assert_close(loaded[name], value, rtol=0, atol=0, equal_nan=True)
    assert load_tensors(info, "optimizer") == {}


def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        saved = save_checkpoint(tmp_path, 7, model={"a": torch.ones(2)}, optimizer={}, metadata={})
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in saved.path.iterdir()} == dict.fromkeys(
        ("model.safetensors", "optimizer.safetensors", "manifest.json"), 0o640
    )


def test_equal_tensors_make_equal_files(tmp_path: Path) -> None:
    assert save(tmp_path / "a", 1).files == save(tmp_path / "b", 1).files
    assert save(tmp_path / "a", 1).files != save(tmp_path / "b", 2).files


def test_a_checkpoint_may_be_written_again(tmp_path: Path) -> None:
    save(tmp_path, 1, loss=2.0)
    save(tmp_path, 1, loss=1.0)
    assert [info.validation_loss for info in list_checkpoints(tmp_path)] == [1.0]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda each: each.__name__)
def test_the_last_good_one_is_found_and_the_log_says_which_were_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object
) -> None:
    assert callable(damage)
    for step in (10, 20, 30):
        save(tmp_path, step)
    for step in (20, 30):
        damage(tmp_path / "checkpoints" / f"step-{step:08d}")
    found = last_good(tmp_path)
    assert found is not None
    info, model, optimizer = found
    assert info.step == 10
    assert torch.equal(model["weight"], tensors(10)["weight"])
    assert torch.equal(optimizer["weight"], tensors(1010)["weight"])
    for step in (20, 30):
        (message,) = [each for each in caplog.messages if f"step-{step:08d}" in each]
        assert re.search(DAMAGE[damage], message) and message.count(";") >= 2  # type: ignore[index]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda each: each.__name__)
def test_only_broken_ones_are_an_error_and_none_is_none(tmp_path: Path, damage: object) -> None:
    assert callable(damage)
    assert last_good(tmp_path) is None and not has_checkpoints(tmp_path)
    save(tmp_path, 1)
    damage(tmp_path / "checkpoints" / "step-00000001")
    assert has_checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* is whole; .*; .*new run"):
        last_good(tmp_path)


@pytest.mark.parametrize("size", [2**63, 2**64 - 1])
def test_a_shape_that_cannot_be_is_an_error_in_one_line(tmp_path: Path, size: int) -> None:
    info = save(tmp_path, 1)
    path = info.path / "model.safetensors"
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    end = len(content) - 8 - length
    header["odd"] = {"dtype": "F32", "shape": [0, size], "data_offsets": [end, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])
    sha256, num_bytes = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
    info.files["model.safetensors"].update(sha256=sha256, bytes=num_bytes)
    with pytest.raises(CheckpointError, match=r"cannot be read: .*use another step") as caught:
        load_tensors(info, "model")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_safetensors_is_an_error_even_with_its_hash(tmp_path: Path) -> None:
    info = save(tmp_path, 1)
    path = info.path / "model.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    info.files["model.safetensors"]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_tensors(info, "model")
    with pytest.raises(CheckpointError, match=r"holds no teacher.safetensors; it holds model.safetensors"):
        load_tensors(info, "teacher")


@pytest.mark.parametrize(
    "damage",
    [
        lambda manifest: manifest["files"]["model.safetensors"].pop("sha256"),
        lambda manifest: manifest["files"]["model.safetensors"].update(bytes="5"),
        lambda manifest: manifest["files"].update({"model.safetensors": None}),
        lambda manifest: manifest.update(step=float("inf")),
        lambda manifest: manifest["metadata"].update(validation_loss="low"),
        lambda manifest: manifest["metadata"].update(validation_loss=float("nan")),
        None,
    ],
)
def test_a_manifest_that_is_damaged_is_passed_over(damage: Callable[[Any], None] | None, tmp_path: Path) -> None:
    save(tmp_path, 30, 2.0)
    file = save(tmp_path, 40, 1.0).path / "manifest.json"
    text = "[" * 200_000
    if damage is not None:
        manifest = json.loads(file.read_text())
        damage(manifest)
        text = json.dumps(manifest)
    file.write_text(text)
    with pytest.raises(CheckpointError, match=r"no readable manifest.json \(.*; a complete checkpoint is required"):
        read_info(file.parent)
    found = last_good(tmp_path)
    assert found is not None and found[0].step == resolve_checkpoint(tmp_path).step == 30


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="the system has no pipes with names")
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(tmp_path: Path) -> None:
    path = save(tmp_path, 30).path
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["model.safetensors"]["bytes"] = 0
    (path / "manifest.json").write_text(json.dumps(manifest))
    for name in ("model.safetensors", "manifest.json"):
        (path / name).unlink()
        os.mkfifo(path / name)
        with pytest.raises(CheckpointError, match="no ordinary file"):
            load_tensors(read_info(path), "model")


def test_a_run_whose_checkpoints_cannot_be_read_is_not_called_empty(tmp_path: Path) -> None:
    file = save(tmp_path, 30).path / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format_version": 2}))
    with pytest.raises(CheckpointError, match=r"none of the checkpoints in .* can be read .*; one with a manifest of"):
        resolve_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="an empty name is given for a run"):
        resolve_checkpoint("")


def test_a_manifest_takes_the_hashes_that_are_known_and_reads_files_for_the_others(tmp_path: Path) -> None:
    for name in ("model", "optimizer"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    files = write_manifest(tmp_path, 3, {}, sha256={"model.safetensors": "as it was told"})
    assert files == {
        "model.safetensors": {"bytes": 5, "sha256": "as it was told"},
        "optimizer.safetensors": {"bytes": 9, "sha256": hashlib.sha256(b"optimizer").hexdigest()},
    }
    assert read_info(tmp_path).files == files


def test_a_corrupt_file_is_the_error_whatever_was_made_of_it_meanwhile(tmp_path: Path) -> None:
    info = save(tmp_path, 1)
    with checked_file(info, "model") as path:
        assert path == info.path / "model.safetensors"
    with pytest.raises(ZeroDivisionError), checked_file(info, "model"):
        raise ZeroDivisionError  # the file is whole: it is the caller's own error
    corrupt_byte(info.path)
    is_read = False
    with pytest.raises(CheckpointError, match="SHA-256"), checked_file(info, "model"):
        is_read = True
    assert is_read
    with pytest.raises(CheckpointError, match="SHA-256"), checked_file(info, "model"):
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), checked_file(info, "model"):
        raise KeyboardInterrupt
    truncate(info.path)
    with pytest.raises(CheckpointError, match="were written"), checked_file(info, "model"):
        raise AssertionError("its size is looked at first")


def test_a_file_that_changes_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    info = save(tmp_path, 1)
    file = info.path / "model.safetensors"
    whole = file.read_bytes()
    for change in (
        lambda: file.write_bytes(whole),  # the reader may have seen what is no longer there
        lambda: (tmp_path / "other").write_bytes(whole) and (tmp_path / "other").rename(file),
    ):
        with pytest.raises(CheckpointError, match="changed while it was read"), checked_file(info, "model"):
            time.sleep(0.02)  # times of files go on in steps
            change()
    with checked_file(info, "model"):
        file.unlink()  # as a training prunes its checkpoints: who has it open still reads what was there


def test_broken_later_checkpoints_are_set_aside_and_take_no_place_among_the_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save(tmp_path, step)
    truncate(tmp_path / "checkpoints" / "step-00000030")
    set_aside_after(tmp_path, 20)
    assert [info.step for info in list_checkpoints(tmp_path)] == [10, 20]
    assert (tmp_path / "checkpoints" / "passed-over-step-00000030" / "manifest.json").exists()
    save(tmp_path, 25)
    assert prune_checkpoints(tmp_path, keep_last=1) == [10, 20]
    assert [info.step for info in list_checkpoints(tmp_path)] == [25]


def test_the_last_ones_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, loss in ((1, 3.0), (2, 1.5), (3, 2.0), (4, None), (5, 1.9)):
        save(tmp_path, step, loss)
    assert prune_checkpoints(tmp_path, keep_last=2) == [1, 3]
    assert [info.step for info in list_checkpoints(tmp_path)] == [2, 4, 5]
    assert prune_checkpoints(tmp_path, keep_last=9) == []


def test_steps_beyond_eight_digits_stay_in_order(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000, 5):
        save(tmp_path, step)
    assert [info.step for info in list_checkpoints(tmp_path)] == [5, 99_999_999, 100_000_000]


def test_of_equally_good_ones_the_later_is_best(tmp_path: Path) -> None:
    infos = [save(tmp_path, step, loss) for step, loss in ((1, 1.0), (2, 1.0), (3, None))]
    best = best_checkpoint(infos)
    assert best is not None and best.step == 2
    assert best_checkpoint(infos[2:]) is None


def test_a_run_means_its_best_else_its_last_and_at_names_a_step(tmp_path: Path) -> None:
    run = tmp_path / "me@home" / "run"
    for step in (1, 2, 3):
        save(run, step)
    assert resolve_checkpoint(run).step == 3
    save(run, 2, 1.0)
    assert resolve_checkpoint(run).step == resolve_checkpoint(str(run)).step == 2
    assert resolve_checkpoint(f"{run}@3").step == resolve_checkpoint(f"{run}@00000003").step == 3
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 4; it has 1, 2, 3; name one"):
        resolve_checkpoint(f"{run}@4")
    with pytest.raises(CheckpointError, match=r"'best' is not a step; .*number; for example"):
        resolve_checkpoint(f"{run}@best")
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; .*moesaic train.*; check the path"):
        resolve_checkpoint(tmp_path)
    for name, content in (("model.gguf", "GGUF"), ("folder/config.json", '{"model_type": "llama"}')):
        foreign = tmp_path / name.removesuffix("/config.json")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        with pytest.raises(CheckpointError, match=f"a run is required; .*`moesaic convert import {foreign} RUN`"):
            resolve_checkpoint(foreign)
    for absent in ("absent", "absent@3"):
        with pytest.raises(CheckpointError, match=r"absent does not exist; .*moesaic train.*; check the path"):
            resolve_checkpoint(tmp_path / absent)
    with pytest.raises(CheckpointError, match=rf"is one checkpoint of a run; .*; use {re.escape(str(run))}@3\."):
        resolve_checkpoint(run / "checkpoints" / "step-00000003")


def test_a_process_killed_while_saving_leaves_the_earlier_ones_and_nothing_for_long(tmp_path: Path) -> None:
    save(tmp_path, 1)
    left = tmp_path / "checkpoints" / ".writing-step-00000002"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert [info.step for info in list_checkpoints(tmp_path)] == [1]
    found = last_good(tmp_path)
    assert found is not None and found[0].step == 1
    save(tmp_path, 3)
    assert not left.exists()


@pytest.mark.parametrize("failing", ["model.safetensors", "optimizer.safetensors"])
def test_what_cannot_be_written_leaves_nothing_and_names_the_last_good_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    save(tmp_path, 1)
    write_all = stream._write_all

    def full(file: FileIO, place: int, view: memoryview) -> None:
        if Path(os.fsdecode(file.name)).name == failing:
            file.write(b"some of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        write_all(file, place, view)

    monkeypatch.setattr(stream, "_write_all", full)
    with pytest.raises(
        CheckpointError, match=r"step 2 .*No space left on device; .*; free some .*last good.*step-00000001"
    ):
        save(tmp_path, 2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    with pytest.raises(CheckpointError, match="there is no earlier checkpoint"):
        save(tmp_path / "other", 2)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    mount, umount = shutil.which("mount"), shutil.which("umount")
    folder = tmp_path / "disk"
    folder.mkdir()
    if sys.platform != "linux" or os.geteuid() != 0 or mount is None or umount is None:
        pytest.skip("a disk of 1 MiB needs root on Linux")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this system lets no one mount a tmpfs")
    yield folder
    subprocess.run([umount, str(folder)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    save(small_disk, 1)
    big = {"weight": torch.zeros(600, 1024)}
    with pytest.raises(CheckpointError, match=r"step 2 .*[Nn]o space left.*last good.*step-00000001"):
        save_checkpoint(small_disk, 2, model=big, optimizer={}, metadata={})
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-00000001"]
    save(small_disk, 3)
    found = last_good(small_disk)
    assert found is not None and found[0].step == 3


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_may_not_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        save(tmp_path / "run", 1)
    tmp_path.chmod(0o700)


def test_nothing_is_ever_unpickled() -> None:
    root = Path(moesaic.__file__).parent
    unsafe = re.compile(r"\b(torch\.(load|save)\(|import pickle|from pickle|pickle\.loads?|np\.load\(|joblib|dill)")
    found = {
        f"{path.relative_to(root)}: {match[0]}"
        for path in root.rglob("*.py")
        if (match := unsafe.search(path.read_text(encoding="utf-8")))
    }
    # It talks to worker processes of its own through pipes, and reads no file so.
    assert found == {"data/encode.py: import pickle"}


def test_listing_needs_no_torch() -> None:
    code = "import sys; import moesaic.checkpoint.store; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
