"""Documents out of files, folders and datasets, one at a time. What becomes of them is prepare.py's business.

A source as the user gives it (a path, `embedded`, a dataset's name) opens into leaves: single files or datasets, in a
fixed order, each of which yields its documents again and again in the same order.
"""

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from moesaic.data.corpus import embedded_corpus
from moesaic.data.cut import paragraph_border
from moesaic.errors import DataError
from moesaic.logs import logger

EMBEDDED = "embedded"
# Where JSONL, parquet and datasets have their text, unless another field is named.
TEXT_FIELD = "text"
# A text file up to this length is one document; a longer one is cut at blank lines into documents of this length.
MAX_DOCUMENT_CHARS = 2**20

Kind = Literal["text", "jsonl", "parquet", "saved_dataset", "hub_dataset"]
_KINDS: dict[str, Kind] = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSIBLE: tuple[Kind, ...] = ("text", "jsonl")
_DATASETS_REMEDY = "install them with `pip install 'moesaic[datasets]'`."
_PARQUET_ROWS = 256
# Anything else is a path, and not looked for on the network.
_DATASET_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(:.+)?")


@dataclass(frozen=True)
class Document:
    """One document, and how much of its leaf is read after it (0 to 1; 0 where unknown)."""

    text: str
    progress: float


@dataclass(frozen=True)
class Leaf:
    """One file or dataset. `name` is relative to the source, so that a moved folder is the same source."""

    source: str
    name: str
    kind: Kind
    path: Path | None
    size_bytes: int
    modified_ns: int

    @property
    def is_compressed(self) -> bool:
        return self.kind == "parquet" or self.name.lower().endswith(".gz")

    def check_unchanged(self) -> None:
        """Raise DataError where the file or saved dataset is no longer what it was when the source was opened."""
        if self.path is None:
            return
        try:
            size, modified = _size_and_time(self.path)
        except OSError as error:
            raise DataError(
                f"{_label(self)} is gone ({error.strerror}); sources must stay as they are while they are read; put it "
                f"back, or delete the output folder, and run again."
            ) from None
        if (size, modified) != (self.size_bytes, self.modified_ns):
            raise DataError(
                f"{_label(self)} has changed while it was read (it had {self.size_bytes} bytes, now {size}, or another "
                f"date); sources must stay as they are until the end; delete the output folder and run again."
            )

    def documents(self, text_field: str) -> Iterator[Document]:
        """Yield the documents in order; empty ones too, so that positions count the same for every reader.

        Raises: DataError naming file and place for text that is not UTF-8, not JSON, or lacks the field.
        """
        if self.kind == "text":
            return _text_documents(self)
        if self.kind == "jsonl":
            return _jsonl_documents(self, text_field)
        if self.kind == "parquet":
            return _parquet_documents(self, text_field)
        return _dataset_documents(self, text_field)


def mend_text(text: str) -> str:
    """Return a text that UTF-8 can hold: lone surrogates, which JSON and a command line can smuggle in, are U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def open_sources(sources: Sequence[str | Path]) -> list[Leaf]:
    """Return the leaves of all sources: files as given, folders recursively and sorted, datasets by name.

    Raises: DataError for a source that does not exist, or of a kind that cannot be read.
    """
    if not sources:
        raise DataError("no sources are given; at least one file, folder or dataset is required; name one.")
    return [leaf for source in sources for leaf in _open_source(source)]


def _open_source(source: str | Path) -> list[Leaf]:
    given = str(source)
    if not given.strip():
        raise DataError(
            "an empty name is given for a text; a file, a folder or a dataset is required; name one, '.' for this "
            "folder."
        )
    if given == EMBEDDED:
        return _folder_leaves(given, embedded_corpus())
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return [_saved_dataset_leaf(given, path)]
        return _folder_leaves(given, path)
    if path.is_file():
        kind = _kind(path)
        if kind is None:
            raise DataError(
                f"{given} ends in {path.suffix or 'nothing'!r}; files ending in {_endings()} can be read; convert or "
                f"rename it."
            )
        return [_file_leaf(given, path.name, path, kind)]
    is_path = isinstance(source, Path) or _kind(path) is not None or Path(*path.parts[:1]).is_dir()
    if is_path or not _DATASET_NAME.fullmatch(given):
        raise DataError(
            f"{given} does not exist; a file, a folder, {EMBEDDED!r} or a dataset's name (owner/name or "
            f"owner/name:configuration) is required; check the path."
        )
    return [Leaf(given, given, "hub_dataset", None, 0, 0)]


def _kind(path: Path) -> Kind | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        kind = _KINDS.get(suffixes[-2]) if len(suffixes) > 1 else None
        return kind if kind in _COMPRESSIBLE else None
    return _KINDS.get(suffixes[-1]) if suffixes else None


def _endings() -> str:
    return ", ".join(ending + ("[.gz]" if kind in _COMPRESSIBLE else "") for ending, kind in _KINDS.items())


def _file_leaf(source: str, name: str, path: Path, kind: Kind) -> Leaf:
    return Leaf(source, name, kind, path, *_size_and_time(path))


def _size_and_time(path: Path) -> tuple[int, int]:
    """Return the bytes and the last change, in ns since 1970, of a file or of all files in a folder."""
    stats = [each.stat() for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path.stat()]
    return sum(stat.st_size for stat in stats), max((stat.st_mtime_ns for stat in stats), default=0)


def _folder_leaves(source: str, folder: Path) -> list[Leaf]:
    leaves = []
    ignored: set[str] = set()
    for path in sorted(_files_below(folder)):
        kind = _kind(path)
        if kind is None:
            ignored.add(path.suffix or path.name)
        else:
            leaves.append(_file_leaf(source, path.relative_to(folder).as_posix(), path, kind))
    if not leaves:
        raise DataError(f"{source} holds no text; files ending in {_endings()} are required in it; check the folder.")
    if ignored:
        logger.info("%s: files ending in %s are not read; %s are.", source, ", ".join(sorted(ignored)), _endings())
    return leaves


def _files_below(folder: Path) -> list[Path]:
    """Return the files in a folder and its folders, none of a name that begins with a dot.

    Links to folders are followed, each folder being read once: by its own name where that is below the folder too.

    Raises: DataError for a folder that may not be read.
    """

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename} cannot be read ({error.strerror}); every folder in a source is; change its permissions, "
            f"or name the others one by one."
        )

    files: list[Path] = []
    seen: set[tuple[int, int]] = set()
    tops = [folder]  # links come when all that is no link has been read
    for top in tops:
        for place, folders, names in os.walk(top, onerror=refuse):
            here = Path(place)
            try:
                stat = here.stat()
                if (stat.st_dev, stat.st_ino) in seen:
                    folders.clear()
                    continue
                seen.add((stat.st_dev, stat.st_ino))
                folders[:] = sorted(name for name in folders if not name.startswith("."))
                tops += [here / name for name in folders if (here / name).is_symlink()]
                files += [here / name for name in names if not name.startswith(".") and (here / name).is_file()]
            except OSError as error:
                refuse(error)
    return files


def _saved_dataset_leaf(source: str, folder: Path) -> Leaf:
    return _file_leaf(source, folder.name, folder, "saved_dataset")


def _path(leaf: Leaf) -> Path:
    assert leaf.path is not None, leaf
    return leaf.path


def _label(leaf: Leaf) -> str:
    return leaf.source if leaf.path is None or leaf.name == Path(leaf.source).name else f"{leaf.source}: {leaf.name}"


def _open_binary(leaf: Leaf) -> tuple[IO[bytes], IO[bytes]]:
    """Return the stream of content and the file below it, whose position tells the progress."""
    raw = _path(leaf).open("rb", buffering=2**18)
    if _path(leaf).suffix.lower() == ".gz":
        if not leaf.size_bytes:  # which Python takes for nothing, packed
            raise _unreadable(leaf, EOFError("it has no bytes"))
        return io.BufferedReader(gzip.GzipFile(fileobj=raw), 2**18), raw
    return raw, raw


def _unreadable(leaf: Leaf, error: Exception) -> DataError:
    if _label(leaf).endswith(".gz"):
        return DataError(f"{_label(leaf)} cannot be unpacked ({error}); a whole gzip file is required; fetch it again.")
    return DataError(f"{_label(leaf)} cannot be read ({error}); a whole file is required; fetch it again.")


def _text_documents(leaf: Leaf) -> Iterator[Document]:
    content, raw = _open_binary(leaf)
    with raw, io.TextIOWrapper(content, encoding="utf-8-sig", newline="") as stream:
        rest = ""
        while True:
            try:
                rest += stream.read(MAX_DOCUMENT_CHARS + 1 - len(rest))
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{_label(leaf)} is not UTF-8 text ({error.reason} in the byte {error.object[error.start]:#04x}); "
                    f"UTF-8 is required; convert it, for example with iconv -f latin1 -t utf-8."
                ) from None
            except (EOFError, OSError, zlib.error) as error:
                raise _unreadable(leaf, error) from None
            progress = min(1.0, raw.tell() / max(1, leaf.size_bytes))
            if len(rest) <= MAX_DOCUMENT_CHARS:
                if rest:
                    yield Document(rest, 1.0)
                return
            border = paragraph_border(rest, MAX_DOCUMENT_CHARS // 2, MAX_DOCUMENT_CHARS) or MAX_DOCUMENT_CHARS
            yield Document(rest[:border], progress)
            rest = rest[border:]


def _jsonl_documents(leaf: Leaf, text_field: str) -> Iterator[Document]:
    content, raw = _open_binary(leaf)
    with raw, content:
        number = 0
        while True:
            try:
                line = content.readline()
            except (EOFError, OSError, zlib.error) as error:
                raise _unreadable(leaf, error) from None
            if not line:
                return
            number += 1
            if not line.strip():
                continue
            place = f"{_label(leaf)}, line {number},"
            try:
                record = json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{place} is not UTF-8 text ({error.reason}); UTF-8 is required; convert it, for example with "
                    f"iconv -t utf-8 -f latin1 or -f utf-16."
                ) from None
            except (ValueError, RecursionError) as error:  # JSONDecodeError; nested too deeply
                raise DataError(f"{place} is not JSON ({error}); one object a line is required; mend it.") from None
            if not isinstance(record, dict):
                raise DataError(f"{place} holds {type(record).__name__}; one object a line is required; mend it.")
            text = _field(record, text_field, place)
            yield Document(text, min(1.0, raw.tell() / max(1, leaf.size_bytes)))


def _parquet_documents(leaf: Leaf, text_field: str) -> Iterator[Document]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(f"{_label(leaf)} is parquet; pyarrow and datasets read it; {_DATASETS_REMEDY}") from None
    try:
        file = parquet.ParquetFile(_path(leaf), buffer_size=2**20)
    except (ArrowException, OSError) as error:
        raise DataError(f"{_label(leaf)} is not a whole parquet file ({error}); fetch it again.") from None
    with file:
        _require_field(text_field, list(file.schema_arrow.names), _label(leaf))
        total, row = file.metadata.num_rows, 0
        batches = file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_field])
        while True:
            try:
                batch = next(batches, None)
                texts = None if batch is None else batch.column(0).to_pylist()
            except (ArrowException, OSError, UnicodeDecodeError) as error:
                raise DataError(
                    f"{_label(leaf)} cannot be read beyond row {row} ({error}); a whole parquet file with UTF-8 text "
                    f"is required; fetch it again."
                ) from None
            if texts is None:
                return
            for text in texts:
                row += 1
                yield Document(text_of(text, text_field, f"{_label(leaf)}, row {row},"), row / total)


def _dataset_documents(leaf: Leaf, text_field: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        known = "is a saved dataset" if leaf.kind == "saved_dataset" else "is no file or folder here"
        raise DataError(
            f"{leaf.source!r} {known}; datasets are read through the library `datasets`; check the path, or "
            f"{_DATASETS_REMEDY}"
        ) from None
    total = 0
    if leaf.kind == "saved_dataset":
        try:
            data: Any = datasets.load_from_disk(str(leaf.path))
        except Exception as error:  # the library raises many kinds for a damaged folder
            raise DataError(f"{leaf.source} is not a whole saved dataset ({error}); save it again.") from None
        if isinstance(data, dict):
            if "train" not in data:
                raise DataError(
                    f"{leaf.source} has the splits {', '.join(data)}; the split train is read; save the split that "
                    f"you want on its own."
                )
            data = data["train"]
        total = len(data)
    else:
        name, _, configuration = leaf.source.partition(":")
        try:
            data = datasets.load_dataset(name, configuration or None, split="train", streaming=True)
        except Exception as error:  # missing, private, offline: the library raises many kinds
            reason = str(error).split("\n", 1)[0] or type(error).__name__
            raise DataError(
                f"{leaf.source!r} is neither a file or folder here nor a dataset that `datasets` can open ({reason}); "
                f"a path, or a dataset's name (owner/name or owner/name:configuration) is required; check it, and the "
                f"network."
            ) from None
    if data.column_names is not None:
        _require_field(text_field, list(data.column_names), leaf.source)
        data = data.select_columns([text_field])
    for row, record in enumerate(data, start=1):
        yield Document(_field(record, text_field, f"{leaf.source}, row {row},"), row / total if total else 0.0)


def _require_field(text_field: str, names: Sequence[str], place: str) -> None:
    if text_field not in names:
        raise DataError(
            f"{place} has no field {text_field!r}; the text is read from it; name the right one with --text-field: "
            f"{', '.join(names)}."
        )


def _field(record: dict[str, Any], text_field: str, place: str) -> str:
    _require_field(text_field, list(record), place)
    return text_of(record[text_field], text_field, place)


def text_of(value: Any, text_field: str, place: str) -> str:
    """Return a field's text, mended; "" for null. place: of the record, for errors. Raises: DataError for no text."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{place} has {type(value).__name__} in the field {text_field!r}; text is required; name another field "
            f"with --text-field."
        )
    return mend_text(value)
