"""Every kind of source gives the same documents, in a fixed order, and bad ones are named by file and place."""

import builtins
import errno
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from moesaic.data import sources
from moesaic.data.sources import Leaf, open_sources
from moesaic.errors import DataError

TEXTS = ["first text, ünïcode", "second\n\nwith a blank line\r\nand a return", "", "third 日本 👩‍👧"]


def read(*given: str | Path, text_field: str = "text") -> list[str]:
    return [document.text for leaf in open_sources(given) for document in leaf.documents(text_field)]


def write_jsonl(path: Path, texts: list[Any], field: str = "text") -> Path:
    data = "".join(json.dumps({"id": number, field: text}) + "\n" for number, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, texts: list[str | None]) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="the datasets extra is not installed")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"id": range(len(texts)), "text": texts}), path, row_group_size=2)
    return path


def test_a_text_file_is_one_document_to_the_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(TEXTS[1].encode())
    (tmp_path / "b.md").write_bytes(b"\xef\xbb\xbf" + TEXTS[0].encode())
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(TEXTS[3].encode()))
    (tmp_path / "d.txt").write_bytes(b"")
    assert read(tmp_path / "a.txt", tmp_path / "b.md", tmp_path / "c.txt.gz", tmp_path / "d.txt") == [
        TEXTS[1],
        TEXTS[0],
        TEXTS[3],
    ]


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_a_huge_text_file_is_cut_at_blank_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARS", 1000)
    text = "\n\n".join(f"paragraph {number} é " * 9 for number in range(200))
    data = text.encode()
    (tmp_path / f"huge{ending}").write_bytes(gzip.compress(data) if ending.endswith("gz") else data)
    documents = read(tmp_path / f"huge{ending}")
    assert "".join(documents) == text
    assert all(len(document) <= 1000 for document in documents)
    assert all(document.startswith("paragraph") and document.endswith("\n\n") for document in documents[:-1])


def test_a_huge_text_without_any_border_is_still_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_DOCUMENT_CHARS", 100)
    (tmp_path / "a.txt").write_text("x" * 1050)
    documents = read(tmp_path / "a.txt")
    assert [len(document) for document in documents] == [100] * 10 + [50]


def test_folders_are_read_recursively_and_sorted_and_other_files_left_alone(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, text in (("z.txt", "z"), ("a.txt", "a"), ("b/m.txt", "m"), ("b/x.csv", "no"), (".git/h.txt", "no")):
        (tmp_path / name).write_text(text)
    write_jsonl(tmp_path / "b" / "l.jsonl", ["l1", "l2"])
    assert read(tmp_path) == ["a", "l1", "l2", "m", "z"]


def test_links_to_folders_are_followed_and_each_folder_is_read_once(tmp_path: Path) -> None:
    for name in ("in/a", "in/b", "out/deep", "out/.git"):
        (tmp_path / name).mkdir(parents=True)
    for name, text in (("in/a/1.txt", "a"), ("in/b/2.txt", "b"), ("out/3.txt", "c"), ("out/deep/4.txt", "d")):
        (tmp_path / name).write_text(text)
    (tmp_path / "out" / ".git" / "5.txt").write_text("no")
    for link, target in (
        ("in/a/back", "in"), ("in/0", "in/b"), ("in/more", "out"), ("in/zz", "out/deep"), ("out/deep/in", "in"),
        ("in/none", "nowhere"), ("in/b/6.txt", "out/3.txt"),
    ):  # fmt: skip
        (tmp_path / link).symlink_to(tmp_path / target)
    names = [leaf.name for leaf in open_sources([tmp_path / "in"])]
    assert names == ["a/1.txt", "b/2.txt", "b/6.txt", "more/3.txt", "more/deep/4.txt"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "locked").mkdir()
    (tmp_path / "a.txt").write_text("a")
    scan = os.scandir

    def refuse(path: Any) -> Any:
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"locked cannot be read .Permission denied.; every folder"):
        open_sources([tmp_path])


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".ndjson"])
def test_jsonl_gives_its_field(tmp_path: Path, ending: str) -> None:
    assert read(write_jsonl(tmp_path / f"a{ending}", TEXTS)) == TEXTS
    assert read(write_jsonl(tmp_path / f"b{ending}", TEXTS, "body"), text_field="body") == TEXTS


def test_null_texts_are_empty_documents_and_blank_lines_are_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n\n{"text": "x"}')
    assert read(tmp_path / "a.jsonl") == ["", "x"]


def test_parquet_gives_its_field_over_row_groups(tmp_path: Path) -> None:
    assert read(write_parquet(tmp_path / "a.parquet", [*TEXTS, None] * 3)) == [*TEXTS, ""] * 3


def test_a_saved_dataset_gives_its_field(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets extra is not installed")
    data = datasets.Dataset.from_dict({"text": TEXTS, "n": [1, 2, 3, 4]})
    data.save_to_disk(str(tmp_path / "alone"))
    datasets.DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(str(tmp_path / "splits"))
    datasets.DatasetDict({"test": data}).save_to_disk(str(tmp_path / "test-only"))
    assert read(tmp_path / "alone") == TEXTS
    assert read(tmp_path / "splits") == TEXTS
    with pytest.raises(DataError, match="has the splits test; the split train is read"):
        read(tmp_path / "test-only")
    with pytest.raises(DataError, match=r"has no field 'body'.*text, n"):
        read(tmp_path / "alone", text_field="body")


def test_a_hub_dataset_is_streamed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets extra is not installed")
    asked = []

    def load_dataset(name: str, configuration: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((name, configuration, split, streaming))
        return datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read("owner/name", "owner/name:small") == TEXTS * 2
    assert asked == [("owner/name", None, "train", True), ("owner/name", "small", "train", True)]


def test_a_name_that_is_neither_path_nor_dataset_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets", reason="the datasets extra is not installed")

    def load_dataset(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no network\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"'owner/corpuss' is neither .* \(no network\)"):
        read("owner/corpuss")


@pytest.mark.parametrize("source", ["corpuss", "a/b/c", "-/b", "a/", "~/b", "../b", "/b", "a:b"])
def test_what_is_no_name_of_a_dataset_is_a_path_that_is_missing(source: str) -> None:
    with pytest.raises(DataError, match="does not exist; a file, a folder, 'embedded' or a dataset's name"):
        open_sources([source])


def test_a_name_in_a_folder_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpora").mkdir()
    with pytest.raises(DataError, match="corpora/corpuss does not exist"):
        open_sources(["corpora/corpuss"])


@pytest.mark.parametrize("missing", ["datasets", "pyarrow"])
def test_without_the_extra_the_command_that_brings_it_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")
    original = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == missing:
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    source = "owner/name" if missing == "datasets" else tmp_path / "a.parquet"
    with pytest.raises(DataError, match=r"pip install 'moesaic\[datasets\]'"):
        read(source)


def test_leaves_do_not_depend_on_where_a_folder_lies(tmp_path: Path) -> None:
    for parent in ("one", "two"):
        (tmp_path / parent).mkdir()
        (tmp_path / parent / "a.txt").write_text("a")

    def names(leaves: list[Leaf]) -> list[str]:
        return [leaf.name for leaf in leaves]

    assert names(open_sources([tmp_path / "one"])) == names(open_sources([tmp_path / "two"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9 latin-1", r"a\.txt is not UTF-8 text .*0xe9.*iconv"),
        ("a.txt.gz", b"not gzip at all", r"a\.txt\.gz cannot be unpacked"),
        ("b.txt.gz", gzip.compress(b"text " * 1000, mtime=0)[:-9], r"b\.txt\.gz cannot be unpacked"),
        ("c.jsonl.gz", gzip.compress(b'{"text": "x"}\n', mtime=0)[:-9], r"c\.jsonl\.gz cannot be unpacked"),
        ("d.txt.gz", b"", r"d\.txt\.gz cannot be unpacked \(it has no bytes\)"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2, is not JSON"),
        ("b.jsonl", b'{"text": "x"}\n[1]\n', r"b\.jsonl, line 2, holds list"),
        ("c.jsonl", b'{"body": "x", "id": 1}\n', r"c\.jsonl, line 1, has no field 'text'.*--text-field: body, id"),
        ("d.jsonl", b'{"text": 3}\n', r"d\.jsonl, line 1, has int in the field 'text'"),
        ("e.jsonl", b'{"text": "caf\xe9"}\n', r"e\.jsonl, line 1, is not UTF-8 text .*iconv"),
        ("g.jsonl", '{"text": "x"}\n'.encode("utf-16"), r"g\.jsonl, line 1, is not UTF-8 text .*utf-16"),
        ("f.jsonl", b"[" * 100_000, r"f\.jsonl, line 1, is not JSON"),
        ("a.parquet", b"PAR1 no", r"a\.parquet is not a whole parquet file"),
        ("a.csv", b"x", r"a\.csv ends in '\.csv'; files ending in \.txt"),
        ("noending", b"x", r"ends in 'nothing'"),
        ("a.parquet.gz", b"x", r"ends in '\.gz'"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)


def test_missing_sources_are_named(tmp_path: Path) -> None:
    for source in (tmp_path / "none", "./none", "none.txt", "some/none.jsonl.gz"):
        with pytest.raises(DataError, match="does not exist"):
            read(source)
    with pytest.raises(DataError, match="no sources"):
        open_sources([])
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match="holds no text"):
        read(tmp_path)


def test_parquet_that_is_damaged_or_no_utf8_is_named_with_its_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["first", "second", "a text that is to be found " * 20])
    whole = path.read_bytes()
    place = whole.index(b"a text that is")
    path.write_bytes(whole[:place] + bytes([0xFF] * 9) + whole[place + 9 :])  # the page's compression or its text
    with pytest.raises(
        DataError, match=r"a\.parquet cannot be read beyond row \d .*; .* UTF-8 text is required; fetch"
    ):
        read(path)
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    binary = pyarrow.array([b"fine", b"\xff\xfe"], pyarrow.binary()).view(pyarrow.utf8())
    parquet.write_table(pyarrow.table({"text": binary}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read beyond row 0 .*; fetch"):
        read(tmp_path / "b.parquet")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="a file whose reading fails is required (Linux)")
def test_a_file_whose_reading_fails_is_no_broken_gzip(tmp_path: Path) -> None:
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).symlink_to("/proc/self/mem")
        with pytest.raises(DataError, match=rf"{name} cannot be read .*; a whole file is required"):
            read(tmp_path / name)


def test_parquet_without_the_field_lists_what_it_has(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.parquet has no field 'body'.*id, text"):
        read(write_parquet(tmp_path / "a.parquet", ["x"]), text_field="body")
