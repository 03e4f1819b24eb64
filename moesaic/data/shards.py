"""Token shards on disk: the manifest that describes them, and reading them through memory maps.

Writing them is prepare.py's business; cutting sequences and torch tensors are loader.py's.

A prepared folder holds tokenizer.json, train-00000.bin, ..., validation-00000.bin, ... and manifest.json. A shard is a
bare array of little-endian uint16 or uint32 token ids; a split is its shards end to end; each document in it ends with
the end-of-text token, which occurs nowhere else.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from types import MappingProxyType
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from moesaic.config.base import Config
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, DataError
from moesaic.folders import load_json
from moesaic.logs import logger

MANIFEST_NAME = "manifest.json"
PROGRESS_NAME = "progress.json"
FORMAT = 1
# Open files per split. Each memory map holds a file descriptor, of which a process usually has 1,024.
_MAX_OPEN_SHARDS = 128
# More takes seconds, and is announced.
_LONG_HASH_BYTES = 1 << 30
_REMEDY = "copy the folder again from where it is whole, or delete it and run `moesaic prepare` again."


class ShardRecord(Config):
    """One file of token ids."""

    file: str
    num_tokens: int = Field(ge=1)
    num_documents: int = Field(ge=0, description="documents that end in it")
    sha256: str


class SplitRecord(Config):
    """The shards of train or validation, in order, and their sums."""

    shards: tuple[ShardRecord, ...] = ()
    num_documents: int = Field(default=0, ge=0)
    num_tokens: int = Field(default=0, ge=0)
    num_bytes: int = Field(default=0, ge=0, description="of UTF-8 text")

    @model_validator(mode="after")
    def _check(self) -> "SplitRecord":
        count = sum(shard.num_tokens for shard in self.shards)
        if self.num_tokens != count:
            raise ConfigError(f"num_tokens is {self.num_tokens} and the shards' are {count} together")
        return self


class SourceRecord(Config):
    """One source as it was given."""

    name: str
    num_files: int
    num_bytes: int = Field(description="on disk; 0 for a dataset on the hub")


class SettingsRecord(Config):
    """What the content of the shards depends on, besides sources and tokenizer."""

    vocab_size: int | None = Field(description="asked for; null: a tokenizer was given")
    sample_bytes: int | None = Field(description="text the tokenizer was trained on at most; null: one was given")
    validation_fraction: float
    text_field: str
    shard_tokens: int


class Manifest(Config):
    """What a prepared folder holds."""

    format: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    vocab_size: int = Field(ge=1, description="of the tokenizer, added tokens included")
    end_of_text_id: int = Field(ge=0)
    tokenizer_fingerprint: str
    train: SplitRecord
    validation: SplitRecord
    num_empty_documents: int = Field(ge=0, description="left out")
    sources: tuple[SourceRecord, ...]
    settings: SettingsRecord
    input_fingerprint: str = Field(description="of sources, settings and tokenizer: what a restart compares")

    @property
    def fingerprint(self) -> str:
        """The sha256 that stands for the data: equal for two folders with the same tokens and the same tokenizer."""
        parts = [self.dtype, str(self.end_of_text_id), self.tokenizer_fingerprint]
        for split in (self.train, self.validation):
            parts += ["split", *(shard.sha256 for shard in split.shards)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class TokenStream:
    """The tokens of one split, end to end over its shards. Reading maps files into memory; nothing is loaded whole."""

    def __init__(
        self,
        folder: Path,
        split: SplitRecord,
        *,
        dtype: str,
        vocab_size: int,
        end_of_text_id: int,
        fingerprint: str,
        name: str,
    ) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.num_tokens = split.num_tokens
        self.num_documents = split.num_documents
        self.end_of_text_id = end_of_text_id
        self.fingerprint = fingerprint
        self._files = [folder / shard.file for shard in split.shards]
        self._dtype = np.dtype(dtype).newbyteorder("<")
        ends = np.cumsum([0, *(shard.num_tokens for shard in split.shards)], dtype=np.int64)
        self._starts = ends[:-1]
        self._ends = ends[1:]
        self._maps: OrderedDict[int, npt.NDArray[np.unsignedinteger]] = OrderedDict()

    def read(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return tokens start .. start + count, over shard borders where need be. Shapes: (count,) int64."""
        out = np.empty(count, dtype=np.int64)
        self.read_into(out, start)
        return out

    def read_into(self, out: npt.NDArray[np.int64], start: int) -> None:
        """Fill `out` with the tokens from `start`.

        Raises: DataError for a range that is not all inside the stream.
        """
        count = len(out)
        if start < 0 or start + count > self.num_tokens:
            raise DataError(
                f"tokens {start} to {start + count} of {self.name} are asked for; it holds {self.num_tokens}; read "
                f"inside that range."
            )
        done = 0
        shard = int(np.searchsorted(self._ends, start, side="right"))
        while done < count:
            offset = start + done - int(self._starts[shard])
            tokens = self._map(shard)[offset : offset + count - done]
            out[done : done + len(tokens)] = tokens
            done += len(tokens)
            shard += 1

    def file_of(self, position: int) -> Path:
        """Return the shard that holds a token."""
        return self._files[int(np.searchsorted(self._ends, position, side="right"))]

    def _map(self, shard: int) -> npt.NDArray[np.unsignedinteger]:
        if shard in self._maps:
            self._maps.move_to_end(shard)
            return self._maps[shard]
        # A plain array view of the map: np.memmap's own slices are several times slower to make.
        tokens = np.asarray(np.memmap(self._files[shard], dtype=self._dtype, mode="r"))
        self._maps[shard] = tokens
        if len(self._maps) > _MAX_OPEN_SHARDS:
            self._maps.popitem(last=False)
        return tokens


def count_documents(tokens: npt.NDArray[np.int64], *, end_of_text_id: int) -> npt.NDArray[np.int32]:
    """Number the documents along the last dimension, from 0; an end-of-text token belongs to the one that it ends.

    Shapes: tokens (..., S) -> (..., S) int32
    """
    is_end = tokens == end_of_text_id
    return (np.cumsum(is_end, axis=-1) - is_end).astype(np.int32)


class ShardSet:
    """A prepared folder, opened and checked."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.train = self._stream("train", manifest.train)
        self.validation = self._stream("validation", manifest.validation)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = False) -> "ShardSet":
        """Open a folder that `moesaic prepare` wrote. Sizes are always checked; `verify` reads all and checks hashes.

        Raises: DataError for a folder that is not (wholly) prepared, and for missing, truncated or corrupt shards.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        width = np.dtype(manifest.dtype).itemsize
        for split in (manifest.train, manifest.validation):
            for shard in split.shards:
                _check_size(folder / shard.file, shard, width)
        if manifest.train.num_tokens == 0:
            raise DataError(f"{folder} holds no training tokens; a corpus with text is required; prepare one.")
        shards = cls(folder, manifest)
        if verify:
            shards.verify()
        return shards

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    def verify(self, *, known_times: Mapping[str, int] = MappingProxyType({})) -> None:
        """Check the shards' hashes, but for those that were last changed when `known_times` says.

        Raises: DataError for a corrupt one.
        """
        changed = [(file, shard) for file, shard in self._files() if known_times.get(shard.file) != _time(file)]
        num_bytes = sum(file.stat().st_size for file, _ in changed)
        if num_bytes > _LONG_HASH_BYTES:
            logger.info("%s: checking the hashes of %.1f GB of shards.", self.path, num_bytes / 1e9)
        for file, shard in changed:
            if hash_file(file) != shard.sha256:
                raise DataError(
                    f"{file} is corrupt: its sha256 is not the manifest's {shard.sha256[:12]}...; {_REMEDY}"
                )

    def times(self) -> dict[str, int]:
        """Return when each shard was last changed, in ns, for a later `verify`."""
        return {shard.file: _time(file) for file, shard in self._files()}

    def _files(self) -> Iterator[tuple[Path, ShardRecord]]:
        for split in (self.manifest.train, self.manifest.validation):
            yield from ((self.path / shard.file, shard) for shard in split.shards)

    def load_tokenizer(self) -> Tokenizer:
        """Load the folder's tokenizer, checked to be the one that wrote the shards."""
        tokenizer = Tokenizer.load(self.path)
        self.check_tokenizer(tokenizer)
        return tokenizer

    def check_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Raise DataError unless the shards were written with this very tokenizer."""
        manifest = self.manifest
        if tokenizer.fingerprint != manifest.tokenizer_fingerprint:
            raise DataError(
                f"the tokenizer (vocabulary {tokenizer.vocab_size}, fingerprint {tokenizer.fingerprint[:12]}) did not "
                f"write the shards in {self.path}; theirs has vocabulary {manifest.vocab_size} and fingerprint "
                f"{manifest.tokenizer_fingerprint[:12]}; use the tokenizer.json of that folder, or prepare the text "
                f"again with --tokenizer."
            )
        if tokenizer.end_of_text_id != manifest.end_of_text_id:
            raise DataError(
                f"the tokenizer ends texts with id {tokenizer.end_of_text_id} ({tokenizer.end_of_text}); documents in "
                f"{self.path} end with id {manifest.end_of_text_id}; copy tokenizer_config.json from there."
            )

    def _stream(self, name: str, split: SplitRecord) -> TokenStream:
        return TokenStream(
            self.path,
            split,
            dtype=self.manifest.dtype,
            vocab_size=self.manifest.vocab_size,
            end_of_text_id=self.manifest.end_of_text_id,
            fingerprint=self.manifest.fingerprint,
            name=f"{self.path} ({name})",
        )


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest of a prepared folder.

    Raises: DataError when the folder is missing, not prepared, only half prepared, or its manifest is damaged.
    """
    remedy = "write one with `moesaic prepare SOURCE --output DIR`."
    if folder.is_file():
        raise DataError(
            f"{folder} is a file; a folder of token shards is required; write one with `moesaic prepare "
            f"{quote(str(folder))} --output DIR`."
        )
    if not folder.is_dir():
        # A run keeps the path as it was given, and may be used from another folder.
        place = "" if folder.is_absolute() else f" in {Path.cwd()}"
        raise DataError(
            f"{folder} does not exist{place}; a folder of token shards is required; check the path, or {remedy}"
        )
    file = folder / MANIFEST_NAME
    if not file.is_file():
        if (folder / PROGRESS_NAME).is_file():
            raise DataError(
                f"{folder} is only half prepared (it has {PROGRESS_NAME} and no {MANIFEST_NAME}); a finished folder is "
                f"required; run the same `moesaic prepare` command again: it continues where it stopped."
            )
        raise DataError(f"{folder} has no {MANIFEST_NAME}; a folder of token shards is required; {remedy}")
    try:
        values = load_json(file)
        if not isinstance(values, dict):
            raise ValueError("no object")
        return Manifest(**values)
    except OSError as error:
        raise _unreadable(file, error) from None
    except (ValueError, ConfigError) as error:
        reason = str(error).split("\n", 1)[0]
        raise DataError(
            f"{file} is damaged or of another version ({reason}); format {FORMAT} is required; name another "
            f"folder, or {remedy}"
        ) from None


def hash_file(file: Path) -> str:
    """Return the sha256 of a file, read in blocks."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _unreadable(file: Path, error: OSError) -> DataError:
    return DataError(
        f"{file} cannot be read ({error.strerror or error}); token shards have to be readable by who trains on them; "
        f"check its permissions."
    )


def _check_size(file: Path, shard: ShardRecord, width: int) -> None:
    required = shard.num_tokens * width
    if not file.is_file():
        raise DataError(f"{file} is missing; the manifest lists it with {required} bytes; {_REMEDY}")
    try:
        with file.open("rb"):  # what may not be read is told before anything is begun
            pass
    except OSError as error:
        raise _unreadable(file, error) from None
    size = file.stat().st_size
    if size != required:
        problem = "truncated" if size < required else "too long"
        raise DataError(f"{file} is {problem}: {size} bytes; the manifest requires {required}; {_REMEDY}")


def _time(file: Path) -> int:
    return file.stat().st_mtime_ns
