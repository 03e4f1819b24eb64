from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

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


def test_tensors_of_the_library_are_read_whole_by_index_and_by_rows(tmp_path: Path) -> None:
    tensors = random_tensors()
    save_file(tensors, tmp_path / "a.safetensors", {"more": "metadata"})
    with TensorReader(tmp_path / "a.safetensors") as reader:
        assert reader.layout == {name: TensorLayout(each.dtype, tuple(each.shape)) for name, each in tensors.items()}
        for name, tensor in sorted(tensors.items(), reverse=True):
            assert torch.equal(reader.read(name), tensor) and reader.read(name).dtype is tensor.dtype
            assert reader.layout[name].num_bytes == tensor.nbytes
            for index in range(len(tensor) if tensor.dim() else 0):
                assert torch.equal(reader.read(name, index), tensor[index])
            rows = tensor.reshape(-1, *tensor.shape[-1:]) if tensor.dim() > 1 else tensor.reshape(-1)
            for start, stop in ((0, len(rows)), (1, len(rows)), (0, 0), (len(rows) // 2, len(rows) // 2 + 1)):
                if stop <= len(rows) and start <= stop:
                    assert torch.equal(reader.read_rows(name, start, stop), rows[start:stop])


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
