"""A GGUF file is read as the gguf package reads it, and one that is damaged is named, whatever its counts say."""

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from moesaic.convert.gguf import GgufFile
from moesaic.convert.gguf_file import names_of_parts
from moesaic.errors import ConversionError

KINDS = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")
VALUES = {
    "a.bool": True, "a.int": -7, "a.float": 0.25, "a.text": "naïve \u2603\n", "a.list": [3, -4],
    "a.names": ["x", "", "ö"], "a.floats": [0.5, 2.0],
}  # fmt: skip


def blocks(kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return random blocks of a kind, whose scales are ordinary numbers; to some the package cannot quantise."""
    numbers = np.random.default_rng(len(kind)).standard_normal(shape, dtype=np.float32)
    type_ = gguf.GGMLQuantizationType[kind]
    try:
        return gguf.quants.quantize(numbers, type_)
    except NotImplementedError:
        size = gguf.quant_shape_to_byte_shape(shape, type_)
        data = np.random.default_rng(7).integers(0, 256, size, dtype=np.uint8)
        # Wherever a half-precision scale stands, its exponent is small: bytes below 0x3c have no NaN among them.
        return np.minimum(data, 0x3B)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "some.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in VALUES.items():
        add = {bool: writer.add_bool, int: writer.add_int32, float: writer.add_float32, str: writer.add_string,
               list: writer.add_array}[type(value)]  # fmt: skip
        add(name, value)
    for kind in KINDS:
        data = blocks(kind, (3, 2, 512))
        writer.add_tensor(f"of {kind}", data, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.add_tensor("vector", np.arange(5, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_it_is_read_as_the_package_reads_it(file: Path) -> None:
    theirs = gguf.GGUFReader(file)
    with GgufFile(file) as ours:
        assert ours.metadata == {"general.architecture": "llama", **VALUES}
        assert list(ours.layout) == [each.name for each in theirs.tensors]
        for each in theirs.tensors:
            expected = torch.from_numpy(np.array(gguf.quants.dequantize(each.data, each.tensor_type)))
            whole = ours.read(each.name)
            assert whole.shape == ours.layout[each.name].shape == expected.shape
            assert whole.dtype == ours.layout[each.name].dtype
            assert torch.equal(whole.float(), expected), each.name
            for index in range(len(expected)):
                assert torch.equal(ours.read(each.name, index).float(), expected[index])
        assert torch.isfinite(ours.read("of Q6_K")).all()


def test_cut_off_anywhere_it_is_refused(file: Path, tmp_path: Path) -> None:
    data = file.read_bytes()
    cut = tmp_path / "cut.gguf"
    for size in (*range(0, 1200, 7), *range(1200, len(data), 997), len(data) - 13):  # the last twelve are padding
        cut.write_bytes(data[:size])
        with pytest.raises(ConversionError, match=r"cut\.gguf cannot be read as GGUF \(.*\); .*; fetch it again"):
            GgufFile(cut)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*, magic: bytes = b"GGUF", version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, keys)


def tensor(name: str, shape: tuple[int, ...], *, kind: int = 0, offset: int = 0) -> bytes:
    numbers = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + numbers + struct.pack("<IQ", kind, offset)


HUGE = 2**62
HOSTILE = {
    "another format": (b"PK\x03\x04" + bytes(60), "does not begin with GGUF"),
    "old": (header(version=1) + bytes(60), "version 1"),
    "big-endian": (b"GGUF" + struct.pack(">I", 3) + bytes(60), "another byte order"),
    "so many keys": (header(keys=HUGE) + bytes(600), "cut off|twice"),
    "so many tensors": (header(tensors=HUGE) + bytes(600), "cut off|0 dimensions"),
    "so long a name": (header(keys=1) + struct.pack("<Q", HUGE) + bytes(60), "cut off, or a length in it is wrong"),
    "so long a list": (header(keys=1) + text("a") + struct.pack("<IIQ", 9, 0, HUGE) + bytes(60), "cut off"),
    "so many texts": (header(keys=1) + text("a") + struct.pack("<IIQ", 9, 8, HUGE) + bytes(600), "cut off"),
    "lists of lists": (header(keys=1) + text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(60), "holds values of type 9"),
    "no such type": (header(keys=1) + text("a") + struct.pack("<I", 77) + bytes(60), "type 77"),
    "a key twice": (header(keys=2) + 2 * (text("a") + struct.pack("<II", 4, 1)) + bytes(60), "a stands twice"),
    "no UTF-8": (header(keys=1) + struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1), "utf-8"),
    "alignment 0": (header(keys=1) + text("general.alignment") + struct.pack("<II", 4, 0), "no power of two"),
    "alignment a text": (header(keys=1) + text("general.alignment") + struct.pack("<I", 8) + text("x"), "no power"),
    "a tensor twice": (header(tensors=2) + tensor("a", (8,)) + tensor("a", (8,), offset=32) + bytes(99),
                       "a stands twice"),
    "tensors over one another": (header(tensors=2) + tensor("a", (8, 2)) + tensor("b", (8,), offset=32) + bytes(200),
                                 "b begins inside a"),
    "a tensor out of line": (header(tensors=1) + tensor("a", (8,), offset=4) + bytes(200), "not aligned"),
    "a tensor outside": (header(tensors=1) + tensor("a", (8,), offset=2**40) + bytes(200), "cut off"),
    "so large a tensor": (header(tensors=1) + tensor("a", (2**40, 2**40)) + bytes(200), "cut off"),
    "so many dimensions": (header(tensors=1) + text("a") + struct.pack("<I", 2**31) + bytes(200), "dimensions"),
    "half a block": (header(tensors=1) + tensor("a", (33,), kind=2) + bytes(200), "no whole blocks of 32"),
    "no such kind": (header(tensors=1) + tensor("a", (32,), kind=999) + bytes(200), "type 999"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_contradicts_itself_is_named(name: str, tmp_path: Path) -> None:
    data, message = HOSTILE[name]
    path = tmp_path / "hostile.gguf"
    path.write_bytes(data)
    with pytest.raises(ConversionError, match=message):
        GgufFile(path)


def test_a_number_of_parts_that_no_model_has_makes_no_list_of_names() -> None:
    count = 1 << 60
    with pytest.raises(ValueError, match=f"split.count is {count}; at most 65535 parts"):
        names_of_parts(f"m-00001-of-{count}.gguf", {"split.count": count, "split.no": 0})
