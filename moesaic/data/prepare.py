"""`prepare`: from sources of text to a folder of token shards. Streaming, in parallel, restartable.

One process reads documents in order and several encode them (encode.py); this one writes what comes back, in order, so
the output does not depend on the number of processes. While it works the folder holds progress.json, which says up to
which document everything is safely on disk; a run that was killed continues there. manifest.json is written last.
"""

import hashlib
import json
import os
import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from moesaic.config.base import Config
from moesaic.control_groups import usable_processors
from moesaic.data.cut import paragraph_border
from moesaic.data.encode import EncoderPool, Tokens, cut_for, token_dtype
from moesaic.data.shards import (
    MANIFEST_NAME,
    PROGRESS_NAME,
    Manifest,
    SettingsRecord,
    ShardRecord,
    SourceRecord,
    SplitRecord,
    read_manifest,
)
from moesaic.data.sources import TEXT_FIELD, Leaf, open_sources
from moesaic.data.tokenizer import DEFAULT_SAMPLE_BYTES, DEFAULT_VOCAB_SIZE, MIN_VOCAB_SIZE, TOKENIZER_NAME, Tokenizer
from moesaic.errors import ConfigError, DataError
from moesaic.folders import FolderLock, load_json, write_whole, writing_path
from moesaic.logs import logger

DEFAULT_SHARD_TOKENS = 2**26
# More would encode faster, but eight processes are what fits into 1 GB; --workers takes any number.
DEFAULT_MAX_WORKERS = 8
# Text that goes to a process at a time, and the longest piece of a document in it.
_BATCH_CHARS = 2**20
_PIECE_CHARS = 2**18
# A killed run loses this much work at most; each checkpoint waits for the disk.
_CHECKPOINT_SECONDS = 10.0
_PROGRESS_SECONDS = 0.1
_HASH_RANGE = 2**64
_PARTIAL = ".partial"


@dataclass(frozen=True)
class Progress:
    """How far `prepare` is, for a display. `fraction` is None where the sources do not tell their size."""

    stage: str
    fraction: float | None
    num_documents: int
    num_tokens: int
    num_bytes: int


class _Split(Config):
    """Which documents are for validation: those whose content hashes low enough, and any forced one."""

    fraction: float
    forced_validation: int | None = None
    forced_train: int | None = None
    # The corpus is one document: it is cut in two, and the second part is for validation.
    cut_single: bool = False

    def is_validation(self, text: bytes) -> bool:
        """Say where a document belongs. By content, so that no copy of a training document is in validation."""
        number = _content_hash(text)
        if number in (self.forced_validation, self.forced_train):
            return number == self.forced_validation
        return number < self.fraction * _HASH_RANGE


@dataclass(frozen=True)
class _Item:
    """A document ready to encode, and where to go on after it."""

    text: str
    num_bytes: int
    is_validation: bool
    leaf: int
    # None: no run can continue after it, because it is half a document of the source.
    next_document: int | None
    progress: float | None


@dataclass
class _Work:
    """What came along with one batch of texts: per text its split and whether it ends a document."""

    is_validation: list[bool] = field(default_factory=list)
    ends_document: list[bool] = field(default_factory=list)
    num_bytes: list[int] = field(default_factory=list)
    num_empty: int = 0
    # After the batch: None in the middle of a document, where no run can continue.
    position: tuple[int, int] | None = None
    progress: float | None = None


class _WriterState(Config):
    """How much of a split is on disk; in progress.json."""

    shards: tuple[ShardRecord, ...] = ()
    open_tokens: int = 0
    open_documents: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    num_bytes: int = 0


class _ProgressState(Config):
    """progress.json: everything before `leaf`, `document` is in the files that the two states describe."""

    input_fingerprint: str
    tokenizer_fingerprint: str | None = None
    split: _Split
    leaf: int = 0
    document: int = 0
    num_empty: int = 0
    train: _WriterState = _WriterState()
    validation: _WriterState = _WriterState()


def prepare(
    sources: Sequence[str | Path] | str | Path,
    output: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer: Tokenizer | str | Path | None = None,
    validation_fraction: float = 0.02,
    text_field: str = TEXT_FIELD,
    shard_tokens: int = DEFAULT_SHARD_TOKENS,
    num_workers: int | None = None,
    sample_bytes: int | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Write the documents of all sources as token shards into the folder `output`, and return its manifest.

    Trains a byte-level tokenizer of `vocab_size` (4,096) on at most `sample_bytes` (32 MiB) of training documents
    spread over all files, unless one is given. A run that was interrupted continues when called again with the same
    arguments; a finished one returns at once. `num_workers` (one per core, at most 8) changes only the speed.

    Raises: DataError for sources that are missing, unreadable or empty, for settings that cannot work, for a folder
    that holds something else, and when the disk is full. FolderInUseError while another process writes the folder.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    settings, given_tokenizer = _check_settings(
        vocab_size=vocab_size,
        tokenizer=tokenizer,
        validation_fraction=validation_fraction,
        text_field=text_field,
        shard_tokens=shard_tokens,
        sample_bytes=sample_bytes,
    )
    workers = _count_workers(num_workers)
    leaves = open_sources(given)
    input_fingerprint = _input_fingerprint(leaves, settings, given_tokenizer)
    folder = Path(output)
    try:
        lock = FolderLock(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be made ({error.strerror}); a folder is required; choose another.") from None
    report = _Reporter(on_progress)
    with lock:
        if (folder / MANIFEST_NAME).is_file():
            manifest = read_manifest(folder)
            if manifest.input_fingerprint != input_fingerprint:
                raise _other_input(folder, "prepared")
            # Left where a run was killed between its last two steps.
            (folder / PROGRESS_NAME).unlink(missing_ok=True)
            logger.info("%s is prepared already, from these sources and settings.", folder)
            return manifest
        try:
            return _prepare_folder(folder, given, leaves, settings, given_tokenizer, workers, input_fingerprint, report)
        except OSError as error:
            raise DataError(
                f"{error.filename or folder}: {error.strerror or error}; sources have to be read and shards written "
                f"whole; free space or mend the cause, and run the same command again: it continues where it stopped."
            ) from error


def _prepare_folder(
    folder: Path,
    given: Sequence[str | Path],
    leaves: Sequence[Leaf],
    settings: SettingsRecord,
    given_tokenizer: Tokenizer | None,
    num_workers: int,
    input_fingerprint: str,
    report: "_Reporter",
) -> Manifest:
    state = _read_progress(folder, input_fingerprint)
    if state is None:
        state = _ProgressState(input_fingerprint=input_fingerprint, split=_choose_split(leaves, settings))
        _write_atomically(folder / PROGRESS_NAME, state.to_dict())
    split = state.split
    if state.tokenizer_fingerprint is None:
        own = given_tokenizer or _train_tokenizer(leaves, settings, split, report)
        own.save(folder / TOKENIZER_NAME)
        state = state.replace(tokenizer_fingerprint=own.fingerprint)
        _write_atomically(folder / PROGRESS_NAME, state.to_dict())
    else:
        done = state.train.num_documents + state.validation.num_documents
        logger.info("%s: continuing after %d documents.", folder, done)
        own = Tokenizer.load(folder)
        if own.fingerprint != state.tokenizer_fingerprint:
            raise DataError(
                f"{folder / TOKENIZER_NAME} is not the tokenizer this folder was begun with; all shards need the same "
                f"one; delete the folder and run again."
            )

    dtype = token_dtype(own.vocab_size)
    train = _SplitWriter(folder, "train", state.train, dtype, settings.shard_tokens)
    validation = _SplitWriter(folder, "validation", state.validation, dtype, settings.shard_tokens)
    end = np.asarray([own.end_of_text_id], dtype=dtype)
    last_checkpoint, shards_then = time.monotonic(), train.num_shards + validation.num_shards
    num_empty = state.num_empty
    items = _items(leaves, settings, split, start=(state.leaf, state.document))
    try:
        with EncoderPool(own, num_workers=num_workers) as pool:
            for encoded, work in pool.encode(_batches(items, own)):
                num_empty += work.num_empty
                for tokens, is_validation, ends, num_bytes in zip(
                    encoded, work.is_validation, work.ends_document, work.num_bytes, strict=True
                ):
                    writer = validation if is_validation else train
                    writer.write(np.concatenate([tokens, end]) if ends else tokens, num_bytes, ends)
                report.encoded(work.progress, (train, validation))
                shards_now = train.num_shards + validation.num_shards
                is_due = shards_now != shards_then or time.monotonic() - last_checkpoint >= _CHECKPOINT_SECONDS
                if work.position is not None and is_due:
                    leaf, document = work.position
                    state = state.replace(
                        leaf=leaf,
                        document=document,
                        num_empty=num_empty,
                        train=train.flush(),
                        validation=validation.flush(),
                    )
                    _write_atomically(folder / PROGRESS_NAME, state.to_dict())
                    last_checkpoint, shards_then = time.monotonic(), shards_now
        records = [train.finish(), validation.finish()]
    finally:
        train.close()
        validation.close()
    if validation.num_documents == 0 and split.fraction > 0:
        logger.warning("%s: all documents are equal, so none is left for validation.", folder)
    for source in leaves:  # the fingerprint is of what was there at the start
        source.check_unchanged()
    manifest = Manifest(
        dtype=dtype,
        vocab_size=own.vocab_size,
        end_of_text_id=own.end_of_text_id,
        tokenizer_fingerprint=own.fingerprint,
        train=records[0],
        validation=records[1],
        num_empty_documents=num_empty,
        sources=_source_records(given, leaves),
        settings=settings,
        input_fingerprint=input_fingerprint,
    )
    _write_atomically(folder / MANIFEST_NAME, manifest.to_dict())
    (folder / PROGRESS_NAME).unlink()
    report.finish()
    return manifest


def _check_settings(
    *,
    vocab_size: int | None,
    tokenizer: Tokenizer | str | Path | None,
    validation_fraction: float,
    text_field: str,
    shard_tokens: int,
    sample_bytes: int | None,
) -> tuple[SettingsRecord, Tokenizer | None]:
    if not 0 <= validation_fraction < 1:
        raise DataError(
            f"validation_fraction ({validation_fraction}) must be at least 0 and less than 1; it is a share of the "
            f"documents; use for example 0.02."
        )
    if shard_tokens < 1:
        raise DataError(f"shard_tokens ({shard_tokens}) must be positive; use for example {DEFAULT_SHARD_TOKENS}.")
    if tokenizer is not None:
        for name, value in (("vocab_size", vocab_size), ("sample_bytes", sample_bytes)):
            if value is not None:
                raise DataError(
                    f"{name} ({value}) and a tokenizer are both given; {name} is for training one; leave one out."
                )
        loaded = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    else:
        loaded = None
        vocab_size = DEFAULT_VOCAB_SIZE if vocab_size is None else vocab_size
        sample_bytes = DEFAULT_SAMPLE_BYTES if sample_bytes is None else sample_bytes
        if vocab_size < MIN_VOCAB_SIZE:
            raise DataError(
                f"vocab_size ({vocab_size}) is too small; a byte-level tokenizer needs the 256 bytes and an "
                f"end-of-text token; use at least {MIN_VOCAB_SIZE}."
            )
        if sample_bytes < 1:
            raise DataError(f"sample_bytes ({sample_bytes}) must be positive; use for example {DEFAULT_SAMPLE_BYTES}.")
    record = SettingsRecord(
        vocab_size=vocab_size,
        sample_bytes=sample_bytes,
        validation_fraction=validation_fraction,
        text_field=text_field,
        shard_tokens=shard_tokens,
    )
    return record, loaded


def _count_workers(num_workers: int | None) -> int:
    if num_workers is None:
        return min(usable_processors(), DEFAULT_MAX_WORKERS)
    if num_workers < 1:
        raise DataError(f"num_workers ({num_workers}) must be positive; one process encodes; use 1 or more.")
    return num_workers


def _input_fingerprint(leaves: Sequence[Leaf], settings: SettingsRecord, tokenizer: Tokenizer | None) -> str:
    values = {
        "leaves": [[leaf.name, leaf.kind, leaf.size_bytes, leaf.modified_ns] for leaf in leaves],
        "settings": settings.to_dict(),
        "tokenizer": tokenizer.fingerprint if tokenizer else None,
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _source_records(given: Sequence[str | Path], leaves: Sequence[Leaf]) -> tuple[SourceRecord, ...]:
    records = []
    for name in dict.fromkeys(str(source) for source in given):
        own = [leaf for leaf in leaves if leaf.source == name]
        records.append(SourceRecord(name=name, num_files=len(own), num_bytes=sum(leaf.size_bytes for leaf in own)))
    return tuple(records)


def _other_input(folder: Path, how: str) -> DataError:
    return DataError(
        f"{folder} was {how} from other sources or settings (files, sizes, dates, or arguments differ); one folder "
        f"holds one corpus; give the same arguments, choose another --output, or delete the folder."
    )


def _read_progress(folder: Path, input_fingerprint: str) -> _ProgressState | None:
    """Return where to continue, or None in an empty folder."""
    file = folder / PROGRESS_NAME
    if not file.is_file():
        others = sorted(path.name for path in folder.iterdir() if path != writing_path(file))
        if others:
            raise DataError(
                f"{folder} holds other files ({', '.join(others[:3])}); an empty or new folder is required, so that "
                f"nothing of yours is overwritten; choose another --output."
            )
        return None
    try:
        state = _ProgressState(**load_json(file))
    except (ValueError, TypeError, ConfigError):
        raise DataError(f"{file} is damaged; it says where to continue; delete {folder} and run again.") from None
    if state.input_fingerprint != input_fingerprint:
        raise _other_input(folder, "begun")
    return state


def _choose_split(leaves: Sequence[Leaf], settings: SettingsRecord) -> _Split:
    """Read documents until both splits have one, which takes about 1 / fraction of them; else force what is missing.

    Raises: DataError for a corpus without text.
    """
    fraction = settings.validation_fraction
    plain = _Split(fraction=fraction)
    hashes, sizes = array("Q"), array("Q")
    found = {True: False, False: False}
    for item in _items(leaves, settings, plain, start=(0, 0)):
        if not item.text:
            continue
        if fraction == 0:
            return plain
        found[item.is_validation] = True
        if all(found.values()):
            return plain
        hashes.append(_content_hash(item.text.encode()))
        sizes.append(item.num_bytes)
        single = item.text
    if not hashes:
        raise DataError(
            f"the corpus is empty: {', '.join(dict.fromkeys(leaf.source for leaf in leaves))} holds no text; at least "
            f"one document is required; check the sources."
        )
    if len(hashes) == 1 and _cut_in_two(single, fraction) is not None:
        return _Split(fraction=fraction, cut_single=True)
    if found[True] or len(set(hashes)) == 1:
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        return _Split(fraction=fraction, forced_train=hashes[largest])
    wanted = fraction * sum(sizes)
    nearest = min(range(len(sizes)), key=lambda index: abs(sizes[index] - wanted))
    return _Split(fraction=fraction, forced_validation=hashes[nearest])


def _cut_in_two(text: str, fraction: float) -> tuple[str, str] | None:
    """Cut the only document of a corpus so that about `fraction` of it comes second; None where it is too short."""
    target = int(len(text.rstrip()) * (1 - fraction))
    low = max(target - 2**14, target // 2)
    border = paragraph_border(text, low, target) or text.rfind(" ", low, target)
    if border <= 0:
        border = target
    first, second = text[:border], text[border:]
    return (first, second) if first.strip() and second.strip() else None


def _content_hash(text: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def _items(
    leaves: Sequence[Leaf], settings: SettingsRecord, split: _Split, *, start: tuple[int, int]
) -> Iterator[_Item]:
    """Yield the documents from a position on; those without any text as items with an empty text."""
    total = sum(leaf.size_bytes for leaf in leaves)
    is_known = all(leaf.size_bytes for leaf in leaves if leaf.kind == "hub_dataset")
    before = sum(leaf.size_bytes for leaf in leaves[: start[0]])
    for leaf_number, leaf in enumerate(leaves[start[0] :], start=start[0]):
        first = start[1] if leaf_number == start[0] else 0
        for number, document in enumerate(leaf.documents(settings.text_field)):
            if number < first:
                continue
            progress = (before + document.progress * leaf.size_bytes) / total if is_known and total else None
            text, data = document.text, document.text.encode()
            after = number + 1
            if not text.strip():
                yield _Item("", 0, False, leaf_number, after, progress)
                continue
            parts = _cut_in_two(text, split.fraction) if split.cut_single else None
            if parts is None:
                yield _Item(text, len(data), split.is_validation(data), leaf_number, after, progress)
                continue
            for is_validation, part in enumerate(parts):
                resume_at = after if is_validation else None
                yield _Item(part, len(part.encode()), bool(is_validation), leaf_number, resume_at, progress)
        before += leaf.size_bytes


def _batches(items: Iterable[_Item], tokenizer: Tokenizer) -> Iterator[tuple[list[str], _Work]]:
    """Gather documents, cut where they are long and may be, into batches of bounded size."""
    texts: list[str] = []
    work = _Work()
    size = 0
    for item in items:
        is_long = False
        pieces = list(cut_for(tokenizer, item.text, _PIECE_CHARS)) if item.text else []
        for number, piece in enumerate(pieces, start=1):
            if texts and size + len(piece) > _BATCH_CHARS:
                if number > 1:
                    work.position, is_long = None, True
                yield texts, work
                texts, work, size = [], _Work(position=work.position), 0
            is_last = number == len(pieces)
            texts.append(piece)
            size += len(piece)
            work.is_validation.append(item.is_validation)
            work.ends_document.append(is_last)
            work.num_bytes.append(item.num_bytes if is_last else 0)
        work.num_empty += not pieces
        work.progress = item.progress
        work.position = None if item.next_document is None else (item.leaf, item.next_document)
        # A batch that ends with a document is where a killed run can continue, so a long document ends its batch.
        if is_long or size >= _BATCH_CHARS // 2:
            yield texts, work
            texts, work, size = [], _Work(position=work.position), 0
    yield texts, work


def _train_tokenizer(leaves: Sequence[Leaf], settings: SettingsRecord, split: _Split, report: "_Reporter") -> Tokenizer:
    assert settings.vocab_size is not None and settings.sample_bytes is not None, settings
    sample = _sample_texts(leaves, settings, split, settings.sample_bytes, report)
    tokenizer = Tokenizer.train(sample, vocab_size=settings.vocab_size, sample_bytes=settings.sample_bytes)
    if tokenizer.vocab_size < settings.vocab_size:
        logger.warning(
            "The text is too little for a vocabulary of %d; the tokenizer has %d tokens.",
            settings.vocab_size,
            tokenizer.vocab_size,
        )
    return tokenizer


def _sample_texts(
    leaves: Sequence[Leaf], settings: SettingsRecord, split: _Split, sample_bytes: int, report: "_Reporter"
) -> Iterator[str]:
    """Yield training documents from the beginning of every leaf, each giving its share of `sample_bytes`."""
    # Compressed text is four times as much at least; where all of it fits, no leaf need be cut short.
    estimate = sum(leaf.size_bytes * (4 if leaf.is_compressed else 1) for leaf in leaves)
    fits = estimate <= sample_bytes and all(leaf.size_bytes for leaf in leaves)
    used = 0
    for number in range(len(leaves)):
        budget = sample_bytes - used if fits else -(-(sample_bytes - used) // (len(leaves) - number))
        for item in _items(leaves[number : number + 1], settings, split, start=(0, 0)):
            if item.is_validation or not item.text:
                continue
            taken = min(item.num_bytes, budget)
            used += taken
            budget -= taken
            yield item.text if taken == item.num_bytes else item.text.encode()[:taken].decode("utf-8", "ignore")
            report.sampled(used, sample_bytes if not fits else min(sample_bytes, estimate))
            if budget <= 0:
                break
        if used >= sample_bytes:
            return


class _SplitWriter:
    """Writes one split's tokens into shards of equal size; a shard gets its name when it is whole and on the disk."""

    def __init__(self, folder: Path, name: str, state: _WriterState, dtype: str, shard_tokens: int) -> None:
        self._folder = folder
        self._name = name
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._shard_tokens = shard_tokens
        self._shards = list(state.shards)
        self._open_tokens = state.open_tokens
        self._open_documents = state.open_documents
        self.num_documents = state.num_documents
        self.num_tokens = state.num_tokens
        self.num_bytes = state.num_bytes
        self._hash = hashlib.sha256()
        self._file: Any = None
        self._restore()

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def write(self, tokens: Tokens, num_bytes: int, ends_document: bool) -> None:
        """Append tokens; `ends_document` says that the last of them is an end-of-text token of ours."""
        tokens = tokens.astype(self._dtype, copy=False)
        self.num_tokens += len(tokens)
        self.num_bytes += num_bytes
        self.num_documents += ends_document
        while len(tokens):
            if self._file is None:
                self._file = self._partial.open("wb")
                self._hash = hashlib.sha256()
            part, tokens = np.split(tokens, [self._shard_tokens - self._open_tokens])
            data = part.tobytes()
            self._file.write(data)
            self._hash.update(data)
            self._open_tokens += len(part)
            self._open_documents += ends_document and not len(tokens)
            if self._open_tokens == self._shard_tokens:
                self._close_shard()

    def flush(self) -> _WriterState:
        """Bring everything written onto the disk and return the state that continues after it."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        return _WriterState(
            shards=tuple(self._shards),
            open_tokens=self._open_tokens,
            open_documents=self._open_documents,
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            num_bytes=self.num_bytes,
        )

    def finish(self) -> SplitRecord:
        if self._file is not None:
            self._close_shard()
        return SplitRecord(
            shards=tuple(self._shards),
            num_documents=self.num_documents,
            num_tokens=self.num_tokens,
            num_bytes=self.num_bytes,
        )

    def close(self) -> None:
        """Close the open file, whole or not."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def _final(self) -> Path:
        return self._folder / f"{self._name}-{len(self._shards):05d}.bin"

    @property
    def _partial(self) -> Path:
        return self._final.with_name(self._final.name + _PARTIAL)

    def _close_shard(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        self._partial.replace(self._final)
        record = ShardRecord(
            file=self._final.name,
            num_tokens=self._open_tokens,
            num_documents=self._open_documents,
            sha256=self._hash.hexdigest(),
        )
        self._shards.append(record)
        self._open_tokens = self._open_documents = 0

    def _restore(self) -> None:
        """Make the folder hold what the state says: drop later shards, cut the open one back to its known length."""
        width = self._dtype.itemsize
        for shard in self._shards:
            self._require(self._folder / shard.file, shard.num_tokens * width, exactly=True)
        final, partial = self._final, self._partial
        if self._open_tokens:
            # The killed run may have completed this shard after its last progress.json.
            if final.is_file():
                final.replace(partial)
            size = self._open_tokens * width
            self._require(partial, size, exactly=False)
            self._file = partial.open("r+b")
            self._file.truncate(size)
            for block in iter(lambda: self._file.read(2**20), b""):
                self._hash.update(block)
        known = {self._folder / shard.file for shard in self._shards} | ({partial} if self._open_tokens else set())
        for path in [*self._folder.glob(f"{self._name}-*.bin"), *self._folder.glob(f"{self._name}-*.bin{_PARTIAL}")]:
            if path not in known:
                path.unlink()

    def _require(self, file: Path, size: int, *, exactly: bool) -> None:
        found = file.stat().st_size if file.is_file() else None
        if found is None or found < size or (exactly and found != size):
            raise DataError(
                f"{file} has {'no' if found is None else found} bytes; {PROGRESS_NAME} requires {size} to continue; "
                f"delete {self._folder} and run again."
            )


class _Reporter:
    """Calls `on_progress` now and then."""

    def __init__(self, on_progress: Callable[[Progress], None] | None) -> None:
        self._call = on_progress
        self._stage = ""
        self._last = 0.0
        self._latest = Progress("", None, 0, 0, 0)

    def sampled(self, used_bytes: int, expected_bytes: int) -> None:
        fraction = min(1.0, used_bytes / max(1, expected_bytes))
        self._say(Progress("tokenizer", fraction, 0, 0, used_bytes))

    def encoded(self, fraction: float | None, writers: Sequence[_SplitWriter]) -> None:
        self._say(
            Progress(
                "encode",
                fraction,
                sum(writer.num_documents for writer in writers),
                sum(writer.num_tokens for writer in writers),
                sum(writer.num_bytes for writer in writers),
            )
        )

    def finish(self) -> None:
        """Tell the last state, which the pause between calls may have swallowed."""
        if self._call is not None:
            self._call(self._latest)

    def _say(self, progress: Progress) -> None:
        self._latest = progress
        now = time.monotonic()
        if self._call is not None and (now - self._last >= _PROGRESS_SECONDS or progress.stage != self._stage):
            self._call(progress)
            self._last, self._stage = now, progress.stage


def _write_atomically(file: Path, values: dict[str, Any]) -> None:
    write_whole(file, json.dumps(values, indent=2) + "\n")  # after which the shards' names are on the disk too
