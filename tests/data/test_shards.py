"""Reading gives the written tokens across any border; every way a folder can be bad has its own message."""

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesaic.data import shards as shards_module
from moesaic.data.shards import Manifest, SettingsRecord, ShardRecord, ShardSet, SplitRecord, count_documents
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError

END = 7


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["a little text to train on, and a little more"], vocab_size=270)


def write_split(folder: Path, name: str, tokens: np.ndarray, dtype: str, sizes: list[int]) -> SplitRecord:
    records, start = [], 0
    for number, size in enumerate(sizes):
        part = tokens[start : start + size].astype(dtype)
        file = f"{name}-{number:05d}.bin"
        (folder / file).write_bytes(part.tobytes())
        digest = hashlib.sha256(part.tobytes()).hexdigest()
        records.append(ShardRecord(file=file, num_tokens=size, num_documents=int((part == END).sum()), sha256=digest))
        start += size
    assert start == len(tokens)
    count = int((tokens == END).sum())
    return SplitRecord(shards=tuple(records), num_documents=count, num_tokens=start, num_bytes=4 * start)


def write_folder(
    folder: Path, tokenizer: Tokenizer, *, dtype: Any = "uint16", sizes: tuple[int, ...] = (50, 1, 49)
) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(0, 200, sum(sizes))
    tokenizer.save(folder)
    manifest = Manifest(
        dtype=dtype,
        vocab_size=tokenizer.vocab_size,
        end_of_text_id=tokenizer.end_of_text_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
        train=write_split(folder, "train", tokens, dtype, list(sizes)),
        validation=write_split(folder, "validation", tokens[:20], dtype, [20] if len(tokens) else []),
        num_empty_documents=0,
        sources=(),
        settings=SettingsRecord(
            vocab_size=270, sample_bytes=1, validation_fraction=0.1, text_field="text", shard_tokens=50
        ),
        input_fingerprint="0",
    )
    (folder / "manifest.json").write_text(json.dumps(manifest.to_dict()))
    return tokens


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
@pytest.mark.parametrize("sizes", [(100,), (50, 1, 49), (1,) * 100, (99, 1)])
def test_any_range_reads_as_written(tmp_path: Path, tokenizer: Tokenizer, dtype: str, sizes: tuple[int, ...]) -> None:
    tokens = write_folder(tmp_path, tokenizer, dtype=dtype, sizes=sizes)
    stream = ShardSet.open(tmp_path, verify=True).train
    assert stream.num_tokens == 100
    for start in range(0, 101, 7):
        for count in (0, 1, 2, 50, 51, 100):
            if start + count <= 100:
                read = stream.read(start, count)
                assert read.dtype == np.int64
                np.testing.assert_array_equal(read, tokens[start : start + count])


def test_reading_keeps_a_bounded_number_of_files_open(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards_module, "_MAX_OPEN_SHARDS", 3)
    tokens = write_folder(tmp_path, tokenizer, sizes=(10,) * 10)
    stream = ShardSet.open(tmp_path).train
    for _ in range(2):
        np.testing.assert_array_equal(stream.read(0, 100), tokens)
        assert len(stream._maps) == 3


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 101), (100, 1)])
def test_reading_outside_is_refused(tmp_path: Path, tokenizer: Tokenizer, start: int, count: int) -> None:
    write_folder(tmp_path, tokenizer)
    with pytest.raises(DataError, match="it holds 100"):
        ShardSet.open(tmp_path).train.read(start, count)


def test_documents_are_numbered_and_an_end_belongs_to_what_it_ends() -> None:
    tokens = np.asarray([[1, END, 2, 3, END, END, 4], [END, 1, 1, 1, 1, 1, 1]])
    expected = [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]
    numbers = count_documents(tokens, end_of_text_id=END)
    assert numbers.dtype == np.int32 and numbers.tolist() == expected


def test_the_fingerprint_follows_the_tokens(tmp_path: Path, tokenizer: Tokenizer) -> None:
    prints = set()
    for number, sizes in enumerate([(100,), (50, 50), (100,)]):
        (tmp_path / str(number)).mkdir()
        write_folder(tmp_path / str(number), tokenizer, sizes=sizes)
        prints.add(ShardSet.open(tmp_path / str(number)).fingerprint)
    assert len(prints) == 2


def test_truncated_longer_and_missing_shards_are_found_at_opening(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_folder(tmp_path, tokenizer)
    file = tmp_path / "train-00002.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"train-00002\.bin is truncated: 97 bytes; the manifest requires 98"):
        ShardSet.open(tmp_path)
    file.write_bytes(whole + b"\0")
    with pytest.raises(DataError, match="is too long: 99 bytes"):
        ShardSet.open(tmp_path)
    file.unlink()
    with pytest.raises(DataError, match=r"train-00002\.bin is missing"):
        ShardSet.open(tmp_path)


def test_a_flipped_bit_is_found_when_asked(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_folder(tmp_path, tokenizer)
    file = tmp_path / "validation-00000.bin"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    ShardSet.open(tmp_path)
    with pytest.raises(DataError, match=r"validation-00000\.bin is corrupt"):
        ShardSet.open(tmp_path, verify=True)


def test_where_a_relative_path_was_looked_for_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        DataError, match=rf"^data/mine does not exist in {re.escape(str(tmp_path))}; .*; check the path"
    ):
        ShardSet.open("data/mine")


def test_folders_that_are_not_prepared_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        ShardSet.open(tmp_path / "none")
    (tmp_path / "my text.txt").write_text("A text.")
    with pytest.raises(DataError, match=r"text\.txt is a file; .*`moesaic prepare '.*my text\.txt' --output DIR`"):
        ShardSet.open(tmp_path / "my text.txt")
    with pytest.raises(DataError, match=r"has no manifest\.json.*moesaic prepare"):
        ShardSet.open(tmp_path)
    (tmp_path / "progress.json").write_text("{}")
    with pytest.raises(DataError, match="only half prepared"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 1, "dtype": "int8"}', "[" * 100_000])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest\.json is damaged or of another version .*; name another") as caught:
        ShardSet.open(tmp_path)
    assert "delete" not in str(caught.value)  # the folder may be anybody's: so many things have a manifest.json


@pytest.mark.parametrize("change", [{"num_tokens": 7}, {"shards": []}])
def test_a_manifest_whose_sums_are_not_its_shards_is_named(
    tmp_path: Path, tokenizer: Tokenizer, change: dict[str, Any]
) -> None:
    write_folder(tmp_path, tokenizer)
    values = json.loads((tmp_path / "manifest.json").read_text())
    values["train"] |= change
    (tmp_path / "manifest.json").write_text(json.dumps(values))
    with pytest.raises(DataError, match=r"manifest\.json is damaged .*num_tokens is \d+ and the shards' are \d+"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "train-00000.bin", "validation-00000.bin"])
def test_a_file_that_may_not_be_read_is_named(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    write_folder(tmp_path, tokenizer)
    assert (tmp_path / name).is_file()

    def refuse(self: Path, *args: Any, **settings: Any) -> Any:
        if self.name == name:
            raise PermissionError(13, "Permission denied", str(self))
        return io.open(self, *args, **settings)  # noqa: UP020 (what Path.open calls)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=rf"{name} cannot be read \(Permission denied\); .*; check its permissions"):
        ShardSet.open(tmp_path)


def test_another_format_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_folder(tmp_path, tokenizer)
    values = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(values | {"format": 2}))
    with pytest.raises(DataError, match="format 1 is required"):
        ShardSet.open(tmp_path)


def test_a_folder_without_training_tokens_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_folder(tmp_path, tokenizer, sizes=())
    with pytest.raises(DataError, match="holds no training tokens"):
        ShardSet.open(tmp_path)


def test_only_the_tokenizer_that_wrote_the_shards_passes(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_folder(tmp_path, tokenizer)
    shards = ShardSet.open(tmp_path)
    assert shards.load_tokenizer().fingerprint == tokenizer.fingerprint
    shards.check_tokenizer(tokenizer)
    other = Tokenizer.train(["quite different words were used here"], vocab_size=265)
    with pytest.raises(DataError, match=r"vocabulary 265, .* did not write the shards .* vocabulary 270"):
        shards.check_tokenizer(other)
    other.save(tmp_path)
    with pytest.raises(DataError, match="did not write the shards"):
        shards.load_tokenizer()


def test_a_tokenizer_with_another_end_is_refused(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_folder(tmp_path, tokenizer)
    shards = ShardSet.open(tmp_path)
    moved = shards.manifest.replace(end_of_text_id=5)
    with pytest.raises(DataError, match="ends texts with id 0"):
        ShardSet(tmp_path, moved).check_tokenizer(tokenizer)
