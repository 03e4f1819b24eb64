from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moesaic.checkpoint.stream import TensorLayout, TensorWriter


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
