import errno
import gc
import hashlib
import os
import random
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from io import FileIO
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesaic.checkpoint import stream
from moesaic.checkpoint.stream import DTYPES, TensorLayout, TensorReader, TensorWriter
from moesaic.errors import CheckpointError


def test_tensors_written_in_pieces_and_any_order_are_read_by_the_library(tmp_path: Path) -> None:
    tensors = {
        "half": torch.randn(3, 5).bfloat16(),
        "bytes": torch.arange(7, dtype=torch.uint8),
        "stack": torch.randn(4, 2, 3),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3),
        "signed": torch.tensor([[-127, 5]], dtype=torch.int8),
    }
    layout = {name: TensorLayout(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorWriter(tmp_path / "a.safetensors", layout) as writer:
        writer.append("bytes", tensors["bytes"])
        for index in range(4):
            writer.append("stack", tensors["stack"][index])
            if index == 1:
                writer.append("half", tensors["half"].t().contiguous().t())  # not contiguous
        for name in ("empty", "scalar", "signed"):
            writer.append(name, tensors[name])
    read = load_file(tmp_path / "a.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensor) and read[name].dtype == tensor.dtype for name, tensor in tensors.items())


def test_what_does_not_fit_the_layout_is_refused(tmp_path: Path) -> None:
    layout = {"a": TensorLayout(torch.float32, (2, 2))}
    with pytest.raises(AssertionError, match="'a'"), TensorWriter(tmp_path / "a.safetensors", layout) as writer:
        writer.append("a", torch.zeros(2))
    with pytest.raises(AssertionError), TensorWriter(tmp_path / "a.safetensors", layout) as writer:
        writer.append("a", torch.zeros(5))
    with pytest.raises(AssertionError), TensorWriter(tmp_path / "a.safetensors", layout) as writer:
        writer.append("a", torch.zeros(4, dtype=torch.bfloat16))


def random_tensors() -> dict[str, torch.Tensor]:
    """One of every dtype, and every number of dimensions from none to four."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(), (5,), (3, 7), (4, 2, 3), (2, 3, 1, 5), (0, 4), (1,), (6, 1), (2, 2)]
    return {
        f"{name}.{len(shape)}": torch.randint(0, 100, shape, generator=generator).to(dtype)
        for (name, dtype), shape in zip(DTYPES.items(), cycle(shapes), strict=False)
    }


def test_tensors_of_the_library_are_read_whole_by_index_and_in_part(tmp_path: Path) -> None:
    tensors = random_tensors()
    save_file(tensors, tmp_path / "a.safetensors", {"more": "metadata"})
    with TensorReader(tmp_path / "a.safetensors") as reader:
        assert reader.layout == {name: TensorLayout(each.dtype, tuple(each.shape)) for name, each in tensors.items()}
        for name, tensor in sorted(tensors.items(), reverse=True):
            assert torch.equal(reader.read(name), tensor) and reader.read(name).dtype is tensor.dtype
            assert reader.layout[name].num_bytes == tensor.nbytes
            for index in range(len(tensor) if tensor.dim() else 0):
                assert torch.equal(reader.read(name, index), tensor[index])
            flat = tensor.flatten()
            for start, stop in ((0, len(flat)), (1, len(flat)), (0, 0), (len(flat) // 2, len(flat) // 2 + 1)):
                if stop <= len(flat) and start <= stop:
                    assert torch.equal(reader.read_numbers(name, start, stop), flat[start:stop])


def test_what_is_read_is_the_readers_own(tmp_path: Path) -> None:
    """The importer changes what it reads in place; the file, and the next to read it, must not see it."""
    save_file({"a": torch.ones(4)}, tmp_path / "a.safetensors")
    with TensorReader(tmp_path / "a.safetensors") as reader:
        reader.read("a").zero_()
        assert reader.read("a").sum() == 4


def test_what_is_written_is_the_librarys_file_byte_for_byte(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5), "a.weight": torch.randn(7).bfloat16(), "c": torch.randn(2, 2), "b.bias": torch.zeros(0),
        "z": torch.arange(5, dtype=torch.uint8), "a": torch.randn(1, 3).bfloat16(),
    }  # fmt: skip
    save_file(tensors, tmp_path / "theirs.safetensors", {"format": "pt"})
    layout = {name: TensorLayout(each.dtype, tuple(each.shape)) for name, each in tensors.items()}
    with TensorWriter(tmp_path / "ours.safetensors", layout) as writer:
        for name in reversed(writer.order):
            writer.append(name, tensors[name])
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


@pytest.mark.parametrize(
    "dtype",
    [
        *DTYPES.values(),
        *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu),
        *(torch.int16, torch.uint32, torch.uint64, torch.complex64),
    ],
)
def test_every_dtype_of_the_library_is_written(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of those that torch shares with it and the reader does not take, too: a checkpoint holds what it was given."""
    tensor = torch.tensor([[1, 4, 0], [2, 1, 1]]).to(dtype)
    with TensorWriter(tmp_path / "a.safetensors", {"a": TensorLayout(dtype, (2, 3))}) as writer:
        writer.append("a", tensor)
    read = load_file(tmp_path / "a.safetensors")["a"]
    assert read.dtype is dtype and torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


# More than the buffers below hold, in sizes that no buffer divides, with one that is empty.
BULK = {
    f"t{index}": torch.arange(index * count, index * count + count).to(dtype)
    for index, (dtype, count) in enumerate(
        ((torch.float32, 3001), (torch.bfloat16, 7), (torch.uint8, 9999), (torch.float32, 0), (torch.int64, 1029))
    )
}


@pytest.fixture(params=["through the page cache", "past the page cache"])
def small_buffers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_BUFFER_BYTES", 4096)
    monkeypatch.setattr(stream, "_NUM_BUFFERS", 3)
    if request.param.startswith("past"):
        monkeypatch.setattr(stream, "_LARGE_BYTES", 0)


def write(path: Path, order: Callable[[list[str]], list[str]], *, piece: int = 1 << 20) -> TensorWriter:
    """Write all of BULK, tensor after tensor, in pieces of that many elements."""
    layout = {name: TensorLayout(each.dtype, tuple(each.shape)) for name, each in BULK.items()}
    with TensorWriter(path, layout, is_hashed=True) as writer:
        for name in order(writer.order):
            for part in BULK[name].split(piece):
                writer.append(name, part)
    return writer


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("piece", [1 << 20, 1000, 13])
@pytest.mark.parametrize(
    "order",
    [
        lambda names: names,
        lambda names: names[::-1],
        lambda names: [*names[:3], names[4], names[3]],
        lambda names: [names[1], names[0], *names[2:]],
    ],
    ids=["as they stand", "backwards", "the last two exchanged", "the first two exchanged"],
)
def test_the_hash_taken_while_writing_is_that_of_the_file(
    tmp_path: Path, order: Callable[[list[str]], list[str]], piece: int
) -> None:
    save_file(BULK, tmp_path / "theirs.safetensors", {"format": "pt"})
    writer = write(tmp_path / "a.safetensors", order, piece=piece)
    written = (tmp_path / "a.safetensors").read_bytes()
    assert written == (tmp_path / "theirs.safetensors").read_bytes()
    assert writer.sha256 == hashlib.sha256(written).hexdigest()


@pytest.mark.usefixtures("small_buffers")
@pytest.mark.parametrize("seed", range(4))
def test_pieces_of_several_tensors_by_turns_have_the_right_hash(tmp_path: Path, seed: int) -> None:
    chance = random.Random(seed)
    pieces = {name: list(tensor.split(chance.randint(1, 2000))) for name, tensor in BULK.items()}
    layout = {name: TensorLayout(each.dtype, tuple(each.shape)) for name, each in BULK.items()}
    with TensorWriter(tmp_path / "a.safetensors", layout, is_hashed=True) as writer:
        first = writer.order[0]
        writer.append(first, pieces[first].pop(0))  # a stream at first
        while left := [name for name, each in pieces.items() if each]:
            name = chance.choice(left)
            writer.append(name, pieces[name].pop(0))
    assert writer.sha256 == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()
    read = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(read[name], tensor) for name, tensor in BULK.items())


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no way past the page cache")
@pytest.mark.parametrize("place", ["open", "write"])
def test_a_file_system_that_cannot_go_past_the_page_cache_is_written_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setattr(stream, "_BUFFER_BYTES", 4096)
    monkeypatch.setattr(stream, "_LARGE_BYTES", 0)
    refused, really_open, really_write = 0, os.open, stream._write_all

    def opens(name: Any, flags: int, *rest: int) -> int:
        nonlocal refused
        if flags & os.O_DIRECT and place == "open":
            refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        return really_open(name, flags & ~os.O_DIRECT, *rest)

    def writes(file: FileIO, start: int, view: memoryview) -> None:
        nonlocal refused
        if place == "write" and not refused:
            refused += 1
            raise OSError(errno.EINVAL, "Invalid argument")
        really_write(file, start, view)

    monkeypatch.setattr(os, "open", opens)
    monkeypatch.setattr(stream, "_write_all", writes)
    writer = write(tmp_path / "a.safetensors", lambda names: names)
    assert refused == 1
    assert writer.sha256 == hashlib.sha256((tmp_path / "a.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("after", [0, 1, 5, 7])
def test_a_disk_that_is_full_is_the_writers_error_and_no_thread_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    monkeypatch.setattr(stream, "_BUFFER_BYTES", 4096)
    really_write, seen = stream._write_all, 0

    def writes(file: FileIO, start: int, view: memoryview) -> None:
        nonlocal seen
        seen += 1
        if seen > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        really_write(file, start, view)

    monkeypatch.setattr(stream, "_write_all", writes)
    before = threading.active_count()
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "a.safetensors", lambda names: names)
    assert threading.active_count() == before


@pytest.mark.parametrize("num_elements", [10, 100_000])
def test_an_error_keeps_nothing_of_what_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_elements: int
) -> None:
    monkeypatch.setattr(stream, "_BUFFER_BYTES", 4096)

    def full(file: FileIO, start: int, view: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_ones() -> weakref.ref[torch.Tensor]:
        ones = torch.ones(num_elements)
        layout = {"a": TensorLayout(ones.dtype, tuple(ones.shape))}
        with suppress(OSError), TensorWriter(tmp_path / "a.safetensors", layout) as writer:
            writer.append("a", ones)
        return weakref.ref(ones)

    monkeypatch.setattr(stream, "_write_all", full)
    gc.disable()
    try:
        assert write_ones()() is None
    finally:
        gc.enable()


def test_what_is_given_up_or_not_asked_for_has_no_hash(tmp_path: Path) -> None:
    layout, before = {"a": TensorLayout(torch.float32, (4,))}, threading.active_count()
    writer = TensorWriter(tmp_path / "a.safetensors", layout, is_hashed=True)
    with pytest.raises(KeyboardInterrupt), writer:
        writer.append("a", torch.ones(4))
        raise KeyboardInterrupt
    assert threading.active_count() == before
    with TensorWriter(tmp_path / "b.safetensors", layout) as other:
        other.append("a", torch.ones(4))
    for each in (writer, other):
        with pytest.raises(AssertionError):
            each.sha256  # noqa: B018


def test_a_file_that_leaves_the_page_cache_is_read_as_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "_LARGE_BYTES", 0)
    save_file(BULK, tmp_path / "a.safetensors")
    with TensorReader(tmp_path / "a.safetensors", is_read_once=True) as reader:
        for name in (*BULK, *BULK):
            assert torch.equal(reader.read(name), BULK[name])


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data + b"0",
        lambda data: data[:4],
        lambda data: b"",
        lambda data: (1 << 60).to_bytes(8, "little") + data[8:],
        lambda data: data.replace(b"[0,16]", b"[0,99]"),
        lambda data: data.replace(b'"F32"', b'"F99"'),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(4)}, path)
    data = path.read_bytes()
    assert damage(data) != data
    path.write_bytes(damage(data))
    with pytest.raises(CheckpointError, match=r"a.safetensors cannot be read \(.*\); a whole safetensors file .*again"):
        TensorReader(path)


def test_a_dtype_that_torch_has_otherwise_is_refused_by_name(tmp_path: Path) -> None:
    save_file({"half": torch.ones(4).to(torch.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"half is of dtype F8_E4M3; one of F32, .* is required; convert"):
        TensorReader(tmp_path / "a.safetensors")


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a": torch.ones(1000)}, path)
    with TensorReader(path) as reader:
        with path.open("r+b") as file:
            file.truncate(2000)
        with pytest.raises(CheckpointError, match="ends before its tensors do; it is truncated"):
            reader.read("a")
