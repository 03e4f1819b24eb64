"""A teacher's predictions, written once and read by any number of students: its likeliest tokens at every position.

A folder holds teacher-00000.safetensors, ... and manifest.json. A shard has, for each position of its windows, the ids
(W, S, K) of the K likeliest tokens in the narrowest unsigned integers, and fp16 log-probabilities (W, S, K + 1) at the
cache's temperature, of which the last is that of all other tokens together. Window i is tokens i * S to (i + 1) * S of
the training split, what a loader with fixed windows reads: in whatever order a student sees them, its seed and batch
size are its own.

Written shard by shard: a killed process goes on with the shard that it was at.
"""

import json
import math
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.checkpoint.stream import TensorLayout, TensorReader, TensorWriter
from moesaic.config.train import TrainConfig
from moesaic.data.loader import Batch, TrainLoader
from moesaic.data.shards import ShardSet, hash_file
from moesaic.distill.loss import TeacherTopK
from moesaic.distill.teacher import LiveTeacher, TeacherRun
from moesaic.errors import ConfigError, DataError, MoesaicError
from moesaic.folders import FolderLock, load_json, sync, write_whole, writing_path, writing_remedy
from moesaic.logs import OnProgress, no_progress
from moesaic.parallel.world import World

MANIFEST_NAME = "manifest.json"
PROGRESS_NAME = "progress.json"
FORMAT = 2  # 1 had a window less of each text
DEFAULT_TOP_K = 64
# Small enough to lose little when killed, large enough for the number of files.
_SHARD_BYTES = 1 << 27
_MAX_OPEN_SHARDS = 128
_BATCH_TOKENS = 4096
# Windows on which the error is measured, spread over the corpus.
_SAMPLE_WINDOWS = 32
# fp32 logits of a chunk: 16 MiB.
_CHUNK_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class CacheKey:
    """What a cache was written for; a student of anything else cannot read it."""

    teacher_sha256: str
    teacher_precision: str
    temperature: float
    tokenizer_fingerprint: str
    data_fingerprint: str
    sequence_length: int
    document_mask: bool
    vocab_size: int

    @classmethod
    def of(cls, config: TrainConfig, teacher: TeacherRun, shards: ShardSet) -> "CacheKey":
        """Return the key of the cache that a student of this config needs."""
        assert config.distill is not None
        return cls(
            teacher_sha256=teacher.sha256,
            teacher_precision=config.distill.teacher_precision,
            temperature=config.distill.temperature,
            tokenizer_fingerprint=teacher.tokenizer.fingerprint,
            data_fingerprint=shards.fingerprint,
            sequence_length=config.data.sequence_length,
            document_mask=config.data.document_mask,
            vocab_size=config.model.vocab_size,
        )


@dataclass(frozen=True)
class CacheReport:
    """What a cache costs and loses. rest: the mean probability outside the top K; approximation_kl: nats per token.

    approximation_kl is KL(teacher || what is stored, the rest spread evenly), on sample_windows windows: how much the
    cached divergence is below the live one for a student that knows nothing of the rest, rounding included. A
    student's gradient at a position's logits is off by at most 2 * T * rest in the sum of absolute values.
    """

    top_k: int
    num_windows: int
    num_bytes: int
    bytes_per_token: float
    rest: float
    approximation_kl: float
    sample_windows: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def write_cache(
    folder: str | Path,
    config: TrainConfig,
    *,
    top_k: int | None = None,
    device: torch.device | None = None,
    on_progress: OnProgress = no_progress,
    world: World | None = None,
) -> CacheReport:
    """Write the cache that students of this config read, of every window of the training split, or go on with it.

    top_k None: 64, or the cache's own when it is gone on with. The teacher is the config's, its data the config's. The
    processes of a world share the work, and the teacher's experts; each of them calls this, and writes into the folder.

    Raises: ConfigError for a top_k out of range, and for a folder that holds a cache of something else; DataError when
    it cannot be written; FolderInUseError while another process writes it.
    """
    assert config.distill is not None
    device = torch.device("cpu") if device is None else device
    world = world or World()
    folder = Path(folder)
    with ExitStack() as stack:
        stack.enter_context(world.noticing_losses("give the same command again, which goes on where it stopped"))
        with world.together():
            world.check_degree(config.parallel.expert_degree)
            run, shards = TeacherRun.open(config.distill.teacher), ShardSet.open(config.data.path)
        run = run.agreed(world, folder)
        with world.together():
            run.check(
                config.model,
                data=config.data.path,
                tokenizer=shards.load_tokenizer(),
                sequence_length=config.data.sequence_length,
            )
            run.check_precision(config.distill.teacher_precision)
        key = CacheKey.of(config, run, shards)
        world.require_same({"the cache's teacher and text": asdict(key), "the cache's top_k": top_k})
        writer = _Writer(folder, config, key, run, shards, top_k, device, world, on_progress)
        with world.together(), writer.saying_what_it_takes():
            # A finished one students read while others do; only a writer needs it alone.
            if world.is_main and not _is_finished(folder):
                stack.enter_context(FolderLock(folder))
        if not world.main_says(world.is_main and _is_finished(folder)):
            writer.write()
        with world.together():
            return _finished(folder, key, top_k)


def _is_finished(folder: Path) -> bool:
    # The progress goes last: with both, only the process that was killed in between had finished.
    return (folder / MANIFEST_NAME).is_file() and not (folder / PROGRESS_NAME).is_file()


def _finished(folder: Path, key: CacheKey, top_k: int | None) -> CacheReport:
    _known_top_k(folder, _read(folder / MANIFEST_NAME), key, top_k)
    return CachedTeacher.open(folder, key).report


def _known_top_k(folder: Path, values: Mapping[str, Any], key: CacheKey, top_k: int | None) -> int:
    """Return the top_k of a cache. Raises: ConfigError for a cache of something else, or another top_k."""
    _check_key(folder, values, key)
    own = int(values["top_k"])
    if top_k not in (None, own):
        raise ConfigError(
            f"{folder} holds the {own} likeliest tokens of each position and {top_k} are asked for; a cache has one "
            f"top_k; leave it out, or name another folder."
        )
    return own


class _Writer:
    """Writes the shards of one cache: of each round every process one, and the main process what says so."""

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        key: CacheKey,
        run: TeacherRun,
        shards: ShardSet,
        top_k: int | None,
        device: torch.device,
        world: World,
        on_progress: OnProgress,
    ) -> None:
        assert config.distill is not None
        self._folder, self._key, self._run = folder, key, run
        self._precision, self._degree = config.distill.teacher_precision, config.parallel.expert_degree
        self._loader = _loader(config, shards)
        self._device, self._world, self._on_progress = device, world, on_progress
        self._num_windows = self._loader.sequences_per_epoch
        self._asked_top_k = top_k
        self._top_k = min(DEFAULT_TOP_K, key.vocab_size) if top_k is None else top_k

    @contextmanager
    def saying_what_it_takes(self) -> Iterator[None]:
        """Raise DataErrors for what the system refuses."""
        try:
            yield
        except OSError as error:
            raise DataError(
                f"the cache in {self._folder} could not be written ({error.strerror or error}); it takes about "
                f"{_window_bytes(self._key, self._top_k) * self._num_windows / 1e9:.2f} GB; {writing_remedy(error)} "
                f"and give the same command again, which goes on where it stopped, or lower top_k."
            ) from None

    def write(self) -> None:
        world = self._world
        begun = None
        with world.together(), self.saying_what_it_takes():
            if world.is_main:
                begun = self._begun()
        begun = world.values(begun)[0]
        self._top_k, shards = begun["top_k"], begun["shards"]
        self._teacher = LiveTeacher(
            self._run.load(self._precision, device=self._device, world=world, degree=self._degree)
        )
        with world.together(), self.saying_what_it_takes():
            if world.is_main:
                self._save(PROGRESS_NAME, shards, None)
        first = sum(shard["windows"] for shard in shards)
        most = max(1, _SHARD_BYTES // _window_bytes(self._key, self._top_k))
        while first < self._num_windows:
            count = min(most, -(-(self._num_windows - first) // world.size))
            own = range(first + world.rank * count, min(first + (world.rank + 1) * count, self._num_windows))
            with world.together(), self.saying_what_it_takes():
                shard = self._take_part(len(shards) + world.rank, own, count)
            shards += [each for each in world.values(shard) if each is not None]
            first = sum(shard["windows"] for shard in shards)
            with world.together(), self.saying_what_it_takes():
                if world.is_main:
                    self._save(PROGRESS_NAME, shards, None)
        with world.together(), self.saying_what_it_takes():
            sample = self._sample()
        report = self._measure(sample, shards) if world.is_main or self._teacher.is_spread else None
        with world.together(), self.saying_what_it_takes():
            if world.is_main:
                self._forget_others(shards)
                self._save(MANIFEST_NAME, shards, report)
                (self._folder / PROGRESS_NAME).unlink()

    def _begun(self) -> dict[str, Any]:
        """Return top_k and whole shards of the cache that is gone on with, or of the new one, which is begun."""
        done = _progress(self._folder)
        shards = []
        if done is not None:
            self._top_k, shards = _known_top_k(self._folder, done, self._key, self._asked_top_k), list(done["shards"])
        if not 1 <= self._top_k <= self._key.vocab_size:
            raise ConfigError(
                f"top_k ({self._top_k}) of the cache is not from 1 to the vocabulary's {self._key.vocab_size}; that "
                f"many tokens are kept of each position; use 32 or 64."
            )
        if done is None and any(self._folder.iterdir()):
            raise ConfigError(
                f"{self._folder} is not empty and holds no cache; a cache needs a folder of its own; name another."
            )
        return {"top_k": self._top_k, "shards": shards}

    def _take_part(self, number: int, own: range, count: int) -> dict[str, Any] | None:
        """Write this process's file of a round in which each predicts `count` windows; None where it has none."""
        predictions = self._predictions(own, count)
        try:
            shard = self._write_shard(number, own, predictions) if own else None
        except OSError:
            self._finish(predictions)
            raise
        self._finish(predictions)
        return shard

    def _finish(self, predictions: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Make those that are left where the others wait for this process's part of theirs."""
        if self._teacher.is_spread:
            deque(predictions, maxlen=0)

    def _forget_others(self, shards: list[dict[str, Any]]) -> None:
        """Remove files that killed processes have left."""
        own = {shard["file"] for shard in shards}
        for path in [*self._folder.glob("teacher-*.safetensors"), *self._folder.glob(".writing-teacher-*")]:
            if path.name not in own:
                path.unlink()

    def _write_shard(self, number: int, windows: range, predictions: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """Write a file of some windows; return what the manifest says of it."""
        file = self._folder / f"teacher-{number:05d}.safetensors"
        temporary = writing_path(file)
        self._write_predictions(temporary, len(windows), predictions)
        sync(temporary)
        temporary.rename(file)
        return {"file": file.name, "windows": len(windows), "bytes": file.stat().st_size, "sha256": hash_file(file)}

    def _write_predictions(self, path: Path, count: int, predictions: Iterator[tuple[Tensor, Tensor]]) -> None:
        layout = {
            "ids": TensorLayout(_id_dtype(self._key), (count, self._key.sequence_length, self._top_k)),
            "log_probs": TensorLayout(torch.float16, (count, self._key.sequence_length, self._top_k + 1)),
        }
        with TensorWriter(path, layout) as writer:
            for ids, log_probs in predictions:
                writer.append("ids", ids.to(layout["ids"].dtype))
                writer.append("log_probs", log_probs)

    def _predictions(self, windows: range, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids and log-probabilities of windows, and take part in the others' predictions of `count` each.

        What cannot be read is said when these are done.
        """
        step = max(1, _BATCH_TOKENS // self._key.sequence_length)
        failure: Exception | None = None
        for start in range(0, count, step):
            some, batch = windows[start : start + step], None
            if some and failure is None:
                try:
                    batch = self._loader.windows(np.asarray(some))
                except (MoesaicError, OSError) as error:
                    if not self._teacher.is_spread:
                        raise
                    failure = error
            if batch is not None:
                yield self._predict(batch)[:2]
            elif self._teacher.is_spread:
                nothing = torch.zeros(1, self._key.sequence_length, dtype=torch.int64)
                self._predict(Batch(nothing, nothing, None))
            # The first process has a round's first windows, and the others come on as it does.
            done = windows.start + min(start + step, count) * self._world.size
            self._on_progress("writing the teacher's predictions", min(1.0, done / self._num_windows))
        if failure is not None:
            raise failure

    def _predict(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return ids (T, K), fp16 log-probabilities (T, K + 1), and the divergence (T,) of what they stand for."""
        batch = batch.to(self._device)
        logits = self._teacher.targets(batch)
        num_tokens = batch.inputs.numel()
        size = max(1, _CHUNK_ELEMENTS // self._key.vocab_size)
        parts = []
        for start in range(0, num_tokens, size):
            log_p = torch.log_softmax(
                logits.chunk(start, min(start + size, num_tokens)) / self._key.temperature, -1
            )  # (t, V)
            parts.append(compress(log_p, self._top_k))
        return tuple(torch.cat(each) for each in zip(*parts, strict=True))  # type: ignore[return-value]

    def _sample(self) -> list[Batch]:
        """Return evenly spread windows."""
        sample = np.unique(np.linspace(0, self._num_windows - 1, _SAMPLE_WINDOWS).round().astype(np.int64))
        return [self._loader.windows(np.asarray([window])) for window in sample]

    def _measure(self, sample: list[Batch], shards: list[dict[str, Any]]) -> CacheReport:
        """Measure on some windows what the stored numbers leave out."""
        rest = divergence = 0.0
        for done, window in enumerate(sample):
            _, log_probs, lost = self._predict(window)
            rest += float(log_probs[:, -1].double().exp().mean())
            divergence += float(lost.double().mean())
            self._on_progress("measuring what the cache leaves out", (done + 1) / len(sample))
        num_bytes = sum(shard["bytes"] for shard in shards)
        return CacheReport(
            top_k=self._top_k,
            num_windows=self._num_windows,
            num_bytes=num_bytes,
            bytes_per_token=num_bytes / (self._num_windows * self._key.sequence_length),
            rest=rest / len(sample),
            approximation_kl=divergence / len(sample),
            sample_windows=len(sample),
        )

    def _save(self, name: str, shards: list[dict[str, Any]], report: CacheReport | None) -> None:
        values = {
            "format": FORMAT,
            "key": asdict(self._key),
            "teacher": {"run": str(self._run.folder), "step": self._run.info.step},
            "top_k": self._top_k,
            "shards": shards,
            "report": None if report is None else report.to_json(),
        }
        write_whole(self._folder / name, json.dumps(values, indent=1, allow_nan=False))


def compress(log_p: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return of log-probabilities (t, V) what a cache stores, and what that loses.

    Shapes: ids (t, K) int64; log_probs (t, K + 1) fp16; (t,) fp32, KL(log_p || what is stored, the rest spread evenly).
    """
    vocab_size = log_p.shape[1]
    top, ids = log_p.topk(top_k, -1)
    rest = torch.logsumexp(log_p.scatter(1, ids, -math.inf), -1, keepdim=True)  # -inf where all are in the top
    both = torch.cat([top, rest], -1)
    # At a very low temperature they go beyond fp16, which would store an infinity.
    log_probs = both.where(both.isneginf(), both.clamp_min(torch.finfo(torch.float16).min)).to(torch.float16)
    stored = normalized(log_probs)
    others = stored[:, -1:] - math.log(max(vocab_size - top_k, 1))
    meant = others.expand_as(log_p).scatter(1, ids, stored[:, :-1])
    return ids, log_probs, (log_p.exp() * (log_p - meant)).sum(-1)


def normalized(log_probs: Tensor) -> Tensor:
    """Return stored log-probabilities (..., K + 1) in fp32, so that the probabilities add up to 1 again."""
    return torch.log_softmax(log_probs.float(), -1)


class CachedTeacher:
    """A finished cache, opened for the students that it was written for."""

    def __init__(self, folder: Path, key: CacheKey, values: Mapping[str, Any], device: torch.device) -> None:
        self._folder, self._key, self._device = folder, key, device
        self._shards = list(values["shards"])
        self._ends = np.cumsum([shard["windows"] for shard in self._shards])
        self._readers: OrderedDict[int, TensorReader] = OrderedDict()
        self._whole = set[int]()  # shards whose hash has been checked
        self.report = CacheReport(**values["report"])

    @classmethod
    def open(
        cls, folder: str | Path, key: CacheKey, *, device: torch.device | None = None, verify: bool = False
    ) -> "CachedTeacher":
        """Open a cache; verify reads all of it and checks its hashes, else sizes now, and hashes at their first use.

        Raises: ConfigError for the cache of another teacher, text, length or temperature; DataError for one that is
        missing, unfinished, truncated or corrupt.
        """
        folder = Path(folder)
        remedy = "name it with --cache, which writes one where there is none."
        if not (folder / MANIFEST_NAME).is_file():
            reason = "is unfinished" if (folder / PROGRESS_NAME).is_file() else "holds no cache of a teacher"
            raise DataError(f"{folder} {reason}; distill.cache needs a finished one; {remedy}")
        values = _read(folder / MANIFEST_NAME)
        _check_key(folder, values, key)
        for shard in values["shards"]:
            file = folder / shard["file"]
            size = file.stat().st_size if file.is_file() else 0
            if size != shard["bytes"]:
                raise _damaged(file, f"{size} bytes, {shard['bytes']} were written")
        cache = cls(folder, key, values, torch.device("cpu") if device is None else device)
        for number in range(len(cache._shards)) if verify else ():
            cache._check_hash(number)
        return cache

    def targets(self, batch: Batch) -> TeacherTopK:
        """Return what the teacher says of a batch of fixed windows."""
        assert batch.starts is not None, "a cached teacher knows windows, and this batch has none"
        windows, offsets = np.divmod(batch.starts, self._key.sequence_length)
        assert not offsets.any(), offsets
        ids, log_probs = zip(*(self._window(int(window)) for window in windows), strict=True)
        return TeacherTopK(torch.cat(ids).to(self._device).long(), normalized(torch.cat(log_probs).to(self._device)))

    def _window(self, window: int) -> tuple[Tensor, Tensor]:
        """Return a window's ids (S, K) and log-probabilities (S, K + 1), as they are stored."""
        shard = int(np.searchsorted(self._ends, window, side="right"))
        index = window - (int(self._ends[shard - 1]) if shard else 0)
        reader = self._reader(shard)
        return reader.read("ids", index), reader.read("log_probs", index)

    def _reader(self, shard: int) -> TensorReader:
        if shard in self._readers:
            self._readers.move_to_end(shard)
            return self._readers[shard]
        file = self._folder / self._shards[shard]["file"]
        try:
            self._check_hash(shard)
            reader = self._readers[shard] = TensorReader(file)
        except DataError:
            raise
        except (OSError, MoesaicError) as error:
            raise DataError(
                f"{file} cannot be read ({error}); the cached teacher is needed until alpha is 0; put it back and "
                f"resume the run."
            ) from None
        if len(self._readers) > _MAX_OPEN_SHARDS:
            self._readers.popitem(last=False)[1].__exit__()
        return reader

    def _check_hash(self, shard: int) -> None:
        """Read a whole shard, once. Raises: OSError; DataError where it is not what was written."""
        if shard not in self._whole:
            file = self._folder / self._shards[shard]["file"]
            if hash_file(file) != self._shards[shard]["sha256"]:
                raise _damaged(file, "its SHA-256 is not the manifest's")
            self._whole.add(shard)


def _damaged(file: Path, why: str) -> DataError:
    return DataError(
        f"{file} is missing, truncated or corrupt ({why}); a whole cache is required; delete {file.parent} and "
        f"let it be written again."
    )


def _loader(config: TrainConfig, shards: ShardSet) -> TrainLoader:
    return TrainLoader(
        shards.train,
        sequence_length=config.data.sequence_length,
        batch_size=1,
        seed=0,
        end_of_text_id=shards.manifest.end_of_text_id,
        with_documents=config.data.document_mask,
        fixed_windows=True,
    )


def _id_dtype(key: CacheKey) -> torch.dtype:
    return torch.uint8 if key.vocab_size <= 1 << 8 else torch.uint16 if key.vocab_size <= 1 << 16 else torch.int32


def _window_bytes(key: CacheKey, top_k: int) -> int:
    return key.sequence_length * (top_k * _id_dtype(key).itemsize + (top_k + 1) * 2)


def _progress(folder: Path) -> dict[str, Any] | None:
    """Return what an unfinished cache has, without the shards that are not whole; None where there is none."""
    file = folder / PROGRESS_NAME
    if not file.is_file():
        return None
    values = _read(file)
    whole = []
    for shard in values["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["bytes"] or hash_file(path) != shard["sha256"]:
            break
        whole.append(shard)
    return {**values, "shards": whole}


def _read(file: Path) -> dict[str, Any]:
    try:
        values = load_json(file)
        if isinstance(values, dict) and not {"key", "report"} & set(values):
            # A prepared corpus has files of these names.
            raise DataError(
                f"{file.parent} holds no cache of a teacher ({file.name} is something else's); a cache needs a folder "
                f"of its own; name another."
            )
        if values["format"] != FORMAT:
            raise ValueError(f"format {values['format']}")
        CacheKey(**values["key"])
        if values["report"] is not None:
            CacheReport(**values["report"])
        return dict(values)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file} is damaged or of another version ({error}); format {FORMAT} is required; delete {file.parent} and "
            f"let the cache be written again."
        ) from None


def _check_key(folder: Path, values: Mapping[str, Any], key: CacheKey) -> None:
    stored = values["key"]
    different = [
        f"{name} {_short(stored[name])}, here {_short(value)}" for name, value in asdict(key).items()
        if stored[name] != value
    ]  # fmt: skip
    if different:
        raise ConfigError(
            f"{folder} was written for another student ({'; '.join(different)}); a cached teacher is of one teacher, "
            f"one text, one length and one temperature; give the same, or another folder to write one in."
        )


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
