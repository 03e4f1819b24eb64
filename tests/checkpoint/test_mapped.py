"""What is written is what is mapped, by ours and any reader; what is not whole is refused."""

import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from moesaic.checkpoint.mapped import PAGE_BYTES, mapped_size, open_mapped, write_mapped
from moesaic.errors import CheckpointError


def tensors() -> dict[str, Tensor]:
    """Of every kind that packing makes, of sizes that no page divides, empty and larger than a block among them."""
    generator = torch.Generator().manual_seed(0)
    return {
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "page": torch.arange(PAGE_BYTES // 4, dtype=torch.int32),
        "bf16": torch.randn(3, 5, 7, generator=generator).to(torch.bfloat16),
        "large": torch.randint(0, 256, ((9 << 20) + 11,), generator=generator, dtype=torch.uint8),
        "turned": torch.randn(4, 6, generator=generator).t(),
    }


def write(path: Path, values: dict[str, Tensor], key: str = "key") -> Path:
    with path.open("wb", buffering=0) as file:
        write_mapped(file, values, iter(values.items()), key=key)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "file.safetensors", tensors())


def test_tensors_come_back_bit_for_bit_each_on_a_page(path: Path) -> None:
    mapped = open_mapped(path, key="key")
    assert list(mapped.tensors) == list(tensors())
    for name, wanted in tensors().items():
        got = mapped.tensors[name]
        assert torch.equal(got, wanted) and got.dtype == wanted.dtype and got.is_contiguous(), name
        if got.numel():
            assert got.data_ptr() % PAGE_BYTES == 0, name
    mapped.check()
    assert abs(path.stat().st_size - mapped_size(tensors())) <= 2 * PAGE_BYTES
    assert open_mapped(write(path.with_name("none"), {}), key="key").tensors == {}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names here")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="it is no ordinary file"):
        open_mapped(tmp_path / "pipe", key="key")


def test_one_tensor_is_kept_at_a_time(tmp_path: Path) -> None:
    written: list[weakref.ref[Tensor]] = []

    def made_in_turn() -> Iterator[tuple[str, Tensor]]:
        for name in tensors():
            assert all(each() is None for each in written), name
            tensor = tensors()[name].clone()
            written.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    with (tmp_path / "file").open("wb", buffering=0) as file:
        write_mapped(file, tensors(), made_in_turn(), key="key")
    assert len(written) == len(tensors())


def test_other_readers_of_safetensors_know_the_file(path: Path) -> None:
    read = load_file(path)
    for name, wanted in tensors().items():
        assert torch.equal(read[name], wanted), name
    assert all(name in tensors() or name.startswith("padding.") for name in read)


def test_the_tensors_outlive_the_file_and_each_other(path: Path) -> None:
    large = open_mapped(path, key="key").tensors["large"]
    path.unlink()
    assert torch.equal(large, tensors()["large"])


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_nobody_can_write_into_it(path: Path) -> None:
    before = path.read_bytes()
    script = (
        "import sys; from pathlib import Path; from moesaic.checkpoint.mapped import open_mapped\n"
        "tensor = open_mapped(Path(sys.argv[1]), key='key').tensors['bf16']\n"
        "print('opened', flush=True)\ntensor.zero_()\nprint('written')"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGSEGV, "opened\n", "")
    assert path.read_bytes() == before


def header_of(data: bytes) -> tuple[dict, int]:
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), 8 + length


def with_header(data: bytes, header: dict) -> bytes:
    _, start = header_of(data)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(start - 8)
    return len(text).to_bytes(8, "little") + text + data[start:]


def test_a_file_that_is_not_whole_is_refused(path: Path) -> None:
    data = path.read_bytes()
    header, start = header_of(data)
    moved = {**header, "page": {**header["page"], "shape": [1, PAGE_BYTES // 4]}}
    wrong = {
        "hold no header": [b"", b"\0" * 7, b"\0" * 4096, b"\xff" * 4096, data[:8], data[: start - 1], data[8:]],
        "its header is not what was written": [with_header(data, moved)],
        "truncated": [data[:-PAGE_BYTES], data[: start + 10], data[:start]],
        "are required and there are": [data + b"\0"],
        "'__metadata__'": [b"\x02" + b"\0" * 7 + b"{}"],
        "list indices": [b"\x02" + b"\0" * 7 + b"[]"],
    }
    for message, contents in wrong.items():
        for content in contents:
            path.write_bytes(content)
            with pytest.raises(CheckpointError, match=rf"cannot be mapped \(.*{message}.*\); .*; delete it"):
                open_mapped(path, key="key")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be mapped .*No such file.* delete it"):
        open_mapped(path, key="key")


def test_a_file_of_something_else_is_refused(path: Path) -> None:
    with pytest.raises(CheckpointError, match="made of other weights"):
        open_mapped(path, key="another")


def test_a_file_whose_end_was_never_written_is_refused(path: Path) -> None:
    """The header comes last, so a process that dies while it writes leaves none."""

    class Dies:
        def __init__(self, file: object, room: int) -> None:
            self.file, self.room = file, room

        def write(self, data: memoryview) -> int:
            if self.room < len(data):
                raise OSError(28, os.strerror(28))
            self.room -= len(data)
            return self.file.write(data)  # type: ignore[attr-defined]

    with path.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        write_mapped(Dies(file, 9 << 20), tensors(), tensors().items(), key="key")  # type: ignore[arg-type]
    assert path.stat().st_size == 8 << 20
    with pytest.raises(CheckpointError, match="hold no header"):
        open_mapped(path, key="key")


def test_a_changed_tensor_is_found_by_the_full_check_alone(path: Path) -> None:
    data = bytearray(path.read_bytes())
    header, start = header_of(data)
    data[start + header["large"]["data_offsets"][0] + 77] ^= 1
    path.write_bytes(data)
    mapped = open_mapped(path, key="key")
    with pytest.raises(CheckpointError, match=r"large does not have the SHA-256 .* corrupt; delete it"):
        mapped.check()
