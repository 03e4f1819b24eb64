"""Checkpoints, written by one process: safetensors and JSON, whole or not at all, checked when read.

A run folder holds `checkpoints/step-00000123/` with `model.safetensors`, `optimizer.safetensors` and `manifest.json`
(sizes, SHA-256, metadata). A checkpoint appears by one rename of a finished, synced folder, so a process killed at any
moment leaves the earlier ones untouched. Nothing is ever unpickled. What several processes hold comes as a stream.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import FileIO, RawIOBase
from math import isfinite
from pathlib import Path
from threading import Event
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from moesaic.errors import CheckpointError
from moesaic.folders import foreign_model, load_own_json, split_run, sync, writing_remedy
from moesaic.logs import logger

if TYPE_CHECKING:  # listing a run's checkpoints needs no torch
    from hashlib import _Hash

    from torch import Tensor

    from moesaic.checkpoint.stream import TensorStream

FORMAT_VERSION = 1
_STEP = re.compile(r"step-(\d{8,})")
_HASH_BLOCK = 1 << 22


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint's folder and what its manifest says; its tensors are not read yet."""

    path: Path
    step: int
    metadata: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def run_folder(self) -> Path:
        return self.path.parent.parent

    @property
    def run_at_step(self) -> str:
        """RUN@step: this checkpoint, while a run in training has others."""
        return f"{self.run_folder}@{self.step}"

    @property
    def model_sha256(self) -> str:
        """Of the file of the weights: what makes them these, wherever they lie."""
        return str(self.files["model.safetensors"]["sha256"])

    @property
    def validation_loss(self) -> float | None:
        return self.metadata.get("validation_loss")


def save_checkpoint(
    run_folder: Path,
    step: int,
    *,
    model: "Mapping[str, Tensor] | TensorStream",
    optimizer: "Mapping[str, Tensor] | TensorStream",
    metadata: dict[str, Any],
) -> CheckpointInfo:
    """Write a checkpoint atomically and return it. metadata must be JSON-able.

    Memory: a few buffers of 8 MiB, beside a copy of each piece that is not contiguous or not on the CPU.

    Raises: CheckpointError when it cannot be written (a full disk, say); nothing of it is left behind then.
    """
    from moesaic.checkpoint.stream import TensorStream, TensorWriter

    folder = run_folder / "checkpoints"
    final = folder / f"step-{step:08d}"
    temporary = folder / f".writing-step-{step:08d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".writing-*"):  # by a process that was killed while it saved
            shutil.rmtree(left, ignore_errors=True)
        temporary.mkdir()
        hashes = {}
        for name, tensors in (("model.safetensors", model), ("optimizer.safetensors", optimizer)):
            stream = tensors if isinstance(tensors, TensorStream) else TensorStream.of(tensors)
            with TensorWriter(temporary / name, stream.layout, is_hashed=True) as writer:
                writer.write(stream.pieces)
            hashes[name] = writer.sha256
        files = write_manifest(temporary, step, metadata, sha256=hashes)
        if final.exists():
            shutil.rmtree(final)
        temporary.rename(final)
        sync(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(
            f"the checkpoint of step {step} could not be written to {final}: {error}; it needs a writable folder with "
            f"enough free space; {writing_remedy(error)}, or move the run; {_describe_last(run_folder)}."
        ) from None
    return CheckpointInfo(final, step, metadata, files)


def write_manifest(
    folder: Path, step: int, metadata: dict[str, Any], *, sha256: Mapping[str, str] = MappingProxyType({})
) -> dict[str, dict[str, Any]]:
    """Write the manifest of a checkpoint folder whose files are complete, and put all of it on the disk.

    sha256: hashes that are known, by file name; other files are read for theirs.
    Returns the files by name, with their sizes and hashes. Raises: OSError.
    """
    files = {}
    for path in sorted(folder.glob("*.safetensors")):
        sync(path)
        with path.open("rb", buffering=0) as file:
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256.get(path.name) or _sha256(file)}
    manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files, "metadata": metadata}
    path = folder / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1, allow_nan=False), encoding="utf-8")
    sync(path)
    sync(folder)
    return files


def list_checkpoints(run_folder: Path) -> list[CheckpointInfo]:
    """Return all checkpoints with a readable manifest, by rising step; others are named in the log.

    Raises: CheckpointError where the folder may not be read.
    """
    infos = []
    folder = run_folder / "checkpoints"
    try:
        paths = sorted(folder.iterdir()) if folder.is_dir() else []
    except PermissionError as error:
        raise CheckpointError(
            f"{folder} cannot be read ({error.strerror}); its user or a readable folder is required; check its "
            f"permissions."
        ) from None
    for path in paths:
        if _STEP.fullmatch(path.name):
            try:
                infos.append(read_info(path))
            except CheckpointError as error:
                logger.warning("%s", error)
    return sorted(infos, key=lambda info: info.step)


def read_info(path: Path) -> CheckpointInfo:
    """Read a checkpoint's manifest.

    Raises: CheckpointError when it is missing, not JSON, or of another format version.
    """
    try:
        manifest = load_own_json(path / "manifest.json")
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}; this moesaic reads {FORMAT_VERSION}; use the moesaic that wrote "
                f"it."
            )
        info = CheckpointInfo(path, int(manifest["step"]), dict(manifest["metadata"]), dict(manifest["files"]))
        if not all(isinstance(each["bytes"], int) and isinstance(each["sha256"], str) for each in info.files.values()):
            raise ValueError("a file's bytes and sha256 are a number and a text")
        if not isinstance(info.validation_loss, int | float | None) or not isfinite(info.validation_loss or 0):
            raise ValueError("a validation loss is a number")
        return info
    except PermissionError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); its user or a readable folder is required; check its "
            f"permissions."
        ) from None
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        raise CheckpointError(
            f"{path} has no readable manifest.json ({error!r}); a complete checkpoint is required; delete the "
            f"folder or use another step."
        ) from None


def load_tensors(info: CheckpointInfo, name: str) -> "dict[str, Tensor]":
    """Return the tensors of one of the checkpoint's files ("model" or "optimizer"), after checking size and hash.

    Raises: CheckpointError for a missing, truncated or corrupt file.
    """
    with checked_tensors(info, name) as tensors:
        return tensors


@contextmanager
def checked_tensors(info: CheckpointInfo, name: str, *, device: str = "cpu") -> "Iterator[dict[str, Tensor]]":
    """Give the tensors of one of the checkpoint's files, as checked_file gives its path."""
    from safetensors.torch import load_file

    with checked_file(info, name) as path:
        try:
            tensors = load_file(path, device=device)
        except (SafetensorError, OSError, TypeError, OverflowError) as error:  # the latter two of impossible shapes
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{path} cannot be read: {reason}; use another step.") from None
        yield tensors


@contextmanager
def checked_file(info: CheckpointInfo, name: str) -> Iterator[Path]:
    """Give the path of one of the checkpoint's files ("model" or "optimizer"), and check its hash in the meantime.

    Its size is right at once. Only after the context is it known to be what was written, and to have been that all the
    time: until then, keep what is made of it aside. Whatever else a corrupt file led to, the error is that it is
    corrupt.

    Raises: CheckpointError for a missing, truncated or corrupt file, and for one that changes meanwhile.
    """
    file_name = f"{name}.safetensors"
    path, expected = info.path / file_name, info.files.get(file_name)
    if expected is None:
        raise CheckpointError(f"{info.path} holds no {file_name}; it holds {', '.join(info.files)}; use another step.")
    try:
        size = path.stat().st_size if path.exists() else 0
        if size != expected["bytes"]:
            raise CheckpointError(
                f"{path} has {size} bytes; {expected['bytes']} were written; it is truncated or missing; use another "
                f"step."
            )
        if not path.is_file():  # to open a pipe would be to wait for ever
            raise OSError("no ordinary file")
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from None
    is_over = Event()
    with file, ThreadPoolExecutor(1) as pool:
        before = os.fstat(file.fileno())
        hashing = pool.submit(_sha256, file, is_over)
        try:
            try:
                yield path
            except Exception:
                _require_as_written(path, file, before, hashing, expected["sha256"])
                raise
            _require_as_written(path, file, before, hashing, expected["sha256"])
        finally:
            is_over.set()  # nobody waits for a large file's hash after Ctrl-C


def _require_as_written(path: Path, file: FileIO, before: os.stat_result, hashing: Future[str], expected: str) -> None:
    """Raise CheckpointError unless the open file has its hash, the path still means it, and nothing was written to it
    since `before`."""
    try:
        found = hashing.result()
    except OSError as error:
        raise _unreadable(path, error) from None
    if found != expected:
        raise CheckpointError(f"{path} does not have the SHA-256 it was written with; it is corrupt; use another step.")

    now = os.fstat(file.fileno())
    try:
        is_other = not os.path.samestat(path.stat(), now)
    except FileNotFoundError:  # a training may delete what others still read
        is_other = False
    if is_other or (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
        raise CheckpointError(
            f"{path} changed while it was read; weights that stay as they are are required; try again when nothing "
            f"writes there."
        )


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error}; use another step.")


def last_good(run_folder: Path) -> "tuple[CheckpointInfo, dict[str, Tensor], dict[str, Tensor]] | None":
    """Return the newest whole checkpoint, with its model and optimizer tensors; the log names those passed over.

    None when the run has no checkpoint at all.
    Raises: CheckpointError when there are some and none is whole.
    """
    infos = list_checkpoints(run_folder)
    for info in reversed(infos):
        try:
            return info, load_tensors(info, "model"), load_tensors(info, "optimizer")
        except CheckpointError as error:
            logger.warning("%s", error)
            logger.warning("Passing over step %d; trying the checkpoint before it.", info.step)
    if has_checkpoints(run_folder):
        raise CheckpointError(
            f"none of the checkpoints in {run_folder / 'checkpoints'} is whole; resuming requires one; restore a "
            f"backup, or start a new run in another folder."
        )
    return None


def resolve_checkpoint(run: str | Path) -> CheckpointInfo:
    """Return the checkpoint that RUN or RUN@step names: RUN means its best by validation loss, else its last.

    Raises: CheckpointError when there is no such run or step.
    """
    if not str(run).strip():
        raise CheckpointError(
            "an empty name is given for a run; a run folder is required; name one, '.' for this folder."
        )
    folder, step_text = split_run(run)
    if folder != Path(run) and not step_text.isdigit():
        raise CheckpointError(f"{run}: {step_text!r} is not a step; RUN@step takes a number; for example {folder}@100.")
    infos = list_checkpoints(folder)
    if not folder.exists():
        raise CheckpointError(
            f"{folder} does not exist; a run folder written by `moesaic train` is required; check the path."
        )
    if not infos and _STEP.fullmatch(folder.name) and (folder / "manifest.json").is_file():
        own = folder.parents[1] if len(folder.parts) > 2 else folder.absolute().parents[1]
        raise CheckpointError(
            f"{folder} is one checkpoint of a run; the run's folder is required, and a step of it is named with @; use "
            f"{own}@{int(folder.name.removeprefix('step-'))}."
        )
    if not infos:
        if (foreign := foreign_model(folder)) is not None:
            raise CheckpointError(foreign)
        if has_checkpoints(folder):
            raise CheckpointError(
                f"none of the checkpoints in {folder / 'checkpoints'} can be read (the log says why); one with a "
                f"manifest of format {FORMAT_VERSION} is required; use the moesaic that wrote it, or restore a backup."
            )
        raise CheckpointError(
            f"{folder} holds no checkpoint; a run folder written by `moesaic train` is required; check the path."
        )
    if step_text:
        for info in infos:
            if info.step == int(step_text):
                return info
        steps = ", ".join(str(info.step) for info in infos)
        raise CheckpointError(f"{folder} has no checkpoint of step {step_text}; it has {steps}; name one of these.")
    return best_checkpoint(infos) or infos[-1]


def best_checkpoint(infos: list[CheckpointInfo]) -> CheckpointInfo | None:
    """Return the one with the lowest validation loss, the later of equals; None when none has one."""
    scored = [info for info in infos if info.validation_loss is not None]
    return min(scored, key=lambda info: (info.validation_loss, -info.step)) if scored else None


def prune_checkpoints(run_folder: Path, *, keep_last: int) -> list[int]:
    """Delete all but the last `keep_last` checkpoints and the best one; return the steps deleted."""
    infos = list_checkpoints(run_folder)
    best = best_checkpoint(infos)
    deleted = []
    for info in infos[:-keep_last]:
        if best is None or info.step != best.step:
            shutil.rmtree(info.path, ignore_errors=True)
            deleted.append(info.step)
    return deleted


def set_aside_after(run_folder: Path, step: int) -> None:
    """Rename checkpoints of later steps, which resuming passed over: they would count among the last ones to keep."""
    folder = run_folder / "checkpoints"
    for path in sorted(folder.iterdir()):
        match = _STEP.fullmatch(path.name)
        if match and int(match[1]) > step:
            aside = folder / f"passed-over-{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            logger.warning("%s is not whole; it is now called %s.", path, aside.name)


def has_checkpoints(run_folder: Path) -> bool:
    """Whether there is any checkpoint, readable or not."""
    folder = run_folder / "checkpoints"
    return folder.is_dir() and any(_STEP.fullmatch(path.name) for path in folder.iterdir())


def _describe_last(run_folder: Path) -> str:
    infos = list_checkpoints(run_folder)
    return f"the last good checkpoint is {infos[-1].path}" if infos else "there is no earlier checkpoint"


def update_digest(digest: "_Hash", file: RawIOBase, is_over: Event | None = None) -> None:
    """Take in the rest of an unbuffered file; less of it when another thread says that it is over."""
    view = memoryview(bytearray(_HASH_BLOCK))
    while (count := file.readinto(view)) and not (is_over and is_over.is_set()):
        digest.update(view[:count])


def _sha256(file: FileIO, is_over: Event | None = None) -> str:
    digest = hashlib.sha256()
    update_digest(digest, file, is_over)
    return digest.hexdigest()
