"""bitsandbytes' matrices, of 4-bit codes and of int8, are read as the bf16 nearest to what they stand for."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.checkpoint.stream import TensorLayout
from moesaic.convert import bitsandbytes
from moesaic.convert.bitsandbytes import CodedPacking, RowsPacking
from moesaic.convert.opened import open_model
from moesaic.convert.packing import PackedTensors
from moesaic.convert.source import CONFIG_NAME, WEIGHTS_NAME
from moesaic.errors import ConversionError

pytestmark = pytest.mark.usefixtures("short_check")

Make = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
Publish = Callable[[Path, Mapping[str, Any], Make], dict[str, Tensor]]
NAME = "model.layers.1.mlp.experts.3.down_proj"
STATE = ".weight.quant_state.bitsandbytes__nf4"
# As unsloth/Qwen3-30B-A3B-bnb-4bit has it.
CONFIG: dict[str, Any] = {
    "_load_in_4bit": True, "_load_in_8bit": False, "bnb_4bit_compute_dtype": "bfloat16",
    "bnb_4bit_quant_storage": "uint8", "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
    "llm_int8_skip_modules": ["lm_head", "gate"], "llm_int8_threshold": 6.0, "load_in_4bit": True,
    "load_in_8bit": False, "quant_method": "bitsandbytes",
}  # fmt: skip


def in_codes(
    matrix: Tensor, *, block_size: int = 64, nested_size: int | None = None, kind: str = "nf4"
) -> tuple[dict[str, Tensor], Tensor]:
    """Return the parts of random codes, and number by number what they stand for.

    nested_size: scales that share one, where they are codes themselves.
    """
    rows, columns = matrix.shape
    count, generator = rows * columns, torch.Generator().manual_seed(rows + columns)
    codes = torch.randint(16, (count,), generator=generator)
    code = torch.linspace(-1, 1, 16) ** 3
    num_blocks = -(-count // block_size)
    state: dict[str, Any] = {
        "quant_type": kind, "blocksize": block_size, "dtype": "bfloat16", "shape": [rows, columns],
    }  # fmt: skip
    parts = dict[str, Tensor]()
    if nested_size is None:
        scales = parts[".weight.absmax"] = torch.rand(num_blocks, generator=generator)
    else:
        nested = torch.randint(256, (num_blocks,), dtype=torch.uint8, generator=generator)
        largest = torch.rand(-(-num_blocks // nested_size), generator=generator) / 4
        nested_code = torch.linspace(-1, 1, 256) ** 3
        offset = 0.30000000000000004
        scales = torch.stack(
            [nested_code[int(each)] * largest[index // nested_size] + offset for index, each in enumerate(nested)]
        )
        parts |= {
            ".weight.absmax": nested, ".weight.nested_absmax": largest, ".weight.nested_quant_map": nested_code,
        }  # fmt: skip
        state |= {"nested_blocksize": nested_size, "nested_dtype": "float32", "nested_offset": offset}
    numbers = torch.stack([code[int(each)] * scales[index // block_size] for index, each in enumerate(codes)])
    padded = torch.cat([codes, codes.new_zeros(count % 2)]).view(-1, 2)
    parts |= {
        ".weight": (padded[:, 0] << 4 | padded[:, 1]).to(torch.uint8)[:, None], ".weight.quant_map": code,
        f".weight.quant_state.bitsandbytes__{kind}": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }  # fmt: skip
    return parts, numbers.bfloat16().view(rows, columns)


def in_rows(matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = matrix.shape
    generator = torch.Generator().manual_seed(rows + columns)
    values = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator)
    scales = torch.rand(rows, generator=generator)
    plain = torch.stack([row.float() * scale * (1 / 127) for row, scale in zip(values, scales, strict=True)]).bfloat16()
    return {".weight": values, ".SCB": scales, ".weight_format": torch.tensor(0, dtype=torch.uint8)}, plain


LAYOUTS: dict[str, tuple[dict[str, Any], Make]] = {
    "nf4": (CONFIG, lambda matrix: in_codes(matrix, nested_size=16)),
    "fp4, scales in fp32": (CONFIG | {"bnb_4bit_quant_type": "fp4"}, lambda matrix: in_codes(matrix, kind="fp4")),
    "int8": (CONFIG | {"load_in_4bit": False, "load_in_8bit": True}, in_rows),
}


@pytest.fixture
def model(saved: Callable[..., Path], tmp_path: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 64, "mlp_only_layers": [0]}
    return shutil.copytree(saved("qwen3-moe", **sizes), tmp_path / "model")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_model_becomes_the_bf16_one(
    model: Path, publish: Publish, comes_in_as: Callable[..., None], name: str
) -> None:
    """Whole and out again; transformers, of the numbers that we unpack, is the judge of all else."""
    comes_in_as(model, publish(model, *LAYOUTS[name]))


def of_one(parts: Mapping[str, Tensor]) -> Tensor:
    """What is made of one matrix."""
    stored = {f"one{suffix}": part for suffix, part in parts.items()}
    layout = {name: TensorLayout(part.dtype, tuple(part.shape)) for name, part in stored.items()}

    def read(name: str, index: int | None = None) -> Tensor:
        return stored[name] if index is None else stored[name][index]

    packed = PackedTensors([CodedPacking(), RowsPacking()], layout, read, "here")
    (name, plain), *others = packed.layout.items()
    assert name == "one.weight" and not others
    found = packed.read(name)
    assert found.dtype is plain.dtype is torch.bfloat16 and found.shape == plain.shape
    assert torch.equal(packed.read(name, len(found) - 1), found[-1])
    return found


@pytest.mark.parametrize("shape", [(1, 5), (33, 17), (64, 64), (2, 1)])
@pytest.mark.parametrize("block_size", [1, 3, 64, 4096])
def test_sizes_that_fill_no_bytes_and_no_blocks(
    shape: tuple[int, int], block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks go over the ends of rows, and the last is smaller. The numbers of no more than some are fp32 at a time."""
    monkeypatch.setattr(bitsandbytes, "_NUMBERS", 256)
    monkeypatch.setattr(bitsandbytes, "_ROWS", 10)
    for nested_size in (None, 1, 5, 1 << 40):
        parts, due = in_codes(torch.ones(shape), block_size=block_size, nested_size=nested_size)
        assert torch.equal(of_one(parts), due)
    parts, due = in_rows(torch.ones(shape))
    assert torch.equal(of_one(parts), due)
    del parts[".weight_format"]
    assert torch.equal(of_one(parts), due)


def test_no_more_than_some_rows_are_fp32_at_a_time(largest_fp32: Any) -> None:
    parts, due = in_rows(torch.ones(3000, 40))
    with largest_fp32:
        assert torch.equal(of_one(parts), due)
    assert 0 < largest_fp32.numbers <= 1024 * 40


def test_blocks_that_the_library_does_not_have_are_refused() -> None:
    """Those of a file that somebody has changed would be made fp32 whole."""
    for block_size, nested_size in ((8192, None), (1, 8192)):
        parts, _ = in_codes(torch.ones(2, 4096), block_size=block_size, nested_size=nested_size)
        with pytest.raises(ConversionError, match=r"one.weight: it is uint8 \[4096, 1\], absmax is"):
            of_one(parts)


Tensors = dict[str, Tensor]


def with_part(suffix: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        changed = change(tensors.pop(NAME + suffix))
        if changed is not None:
            tensors[NAME + suffix] = changed.contiguous()

    return apply


def without(suffix: str) -> Callable[[Tensors], None]:
    return with_part(suffix, lambda part: None)


def saying(**values: object) -> Callable[[Tensors], None]:
    def change(text: Tensor) -> Tensor:
        changed = json.dumps({**json.loads(bytes(text.tolist())), **values})
        return torch.tensor(list(changed.encode()), dtype=torch.uint8)

    return with_part(STATE, change)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("nf4", without(".weight"), rf"{NAME}.weight: absmax is uint8 \[32\], quant_map is float32 \[16\], nested_"),
        ("nf4", without(".weight.absmax"), r"it is uint8 \[1024, 1\], quant_map is"),
        ("nf4", without(".weight.quant_map"), r"absmax is uint8 \[32\], nested_absmax is float32 \[2\]"),
        ("nf4", without(".weight.nested_absmax"), r"quant_map is float32 \[16\], nested_quant_map"),
        ("nf4", without(".weight.nested_quant_map"), r"nested_absmax is float32 \[2\], quant_state.bitsandbytes__nf4"),
        ("nf4", with_part(".weight", lambda part: part[1:]), r"it is uint8 \[1023, 1\]"),
        ("nf4", with_part(".weight", lambda part: part.view(torch.int8)), r"it is int8 \[1024, 1\]"),
        ("nf4", with_part(".weight.absmax", lambda part: part.float()), r"absmax is float32 \[32\]"),
        ("nf4", with_part(STATE, lambda part: part[:-1]), r"quant_state.bitsandbytes__nf4 is uint8 \[\d+\]; as bits"),
        ("nf4", with_part(STATE, lambda part: part.int()), r"quant_state.bitsandbytes__nf4 is int32"),
        ("nf4", saying(shape=[64, 32]), rf"of another shape 1: {NAME}.weight is \[64, 32\], \[32, 64\] is required"),
        ("nf4", saying(shape=[32, 32]), rf"{NAME}.weight: it is uint8 \[1024, 1\]"),
        ("nf4", saying(shape=[2048]), r"it is uint8 \[1024, 1\], absmax"),
        ("nf4", saying(shape=[-32, -64]), r"it is uint8 \[1024, 1\], absmax"),
        ("nf4", saying(shape=None), r"it is uint8 \[1024, 1\], absmax"),
        ("nf4", saying(blocksize=32), r"absmax is uint8 \[32\], quant_map"),
        ("nf4", saying(blocksize=64.0), r"absmax is uint8 \[32\], quant_map"),
        ("nf4", saying(nested_blocksize=0), r"nested_absmax is float32 \[2\]"),
        ("nf4", saying(nested_offset="0"), r"nested_absmax is float32 \[2\]"),
        ("nf4", saying(nested_offset=1e300), r"nested_absmax is float32 \[2\]"),
        ("nf4", saying(nested_offset=-(10**400)), r"nested_absmax is float32 \[2\]"),
        ("nf4", saying(nested_offset=float("nan")), f"{NAME}.weight holds numbers that are not finite"),
        (
            "nf4",
            lambda tensors: tensors.update({f"{NAME}.weight.quant_state.bitsandbytes__fp4": tensors[NAME + STATE] + 0}),
            r"bitsandbytes__nf4 is uint8 \[\d+\], quant_state.bitsandbytes__fp4 is",
        ),
        ("int8", without(".weight"), rf"{NAME}: SCB is float32 \[32\], weight_format is uint8 \[\]; int8 weight"),
        ("int8", without(".SCB"), "not used by any part"),
        ("int8", with_part(".SCB", lambda part: part[1:]), r"SCB is float32 \[31\]"),
        ("int8", with_part(".SCB", lambda part: part.half()), r"SCB is float16 \[32\]"),
        ("int8", with_part(".weight", lambda part: part[None]), r"weight is int8 \[1, 32, 64\]"),
        ("int8", with_part(".weight_format", lambda part: part + 1), r"weight_format is uint8 \[\]; int8 weight"),
        ("int8", with_part(".weight_format", lambda part: part * torch.nan), r"weight_format is float32 \[\]; int8"),
        ("int8", with_part(".SCB", lambda part: part * torch.inf), "holds numbers that are not finite"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    model: Path, publish: Publish, refuses: Callable[..., None], layout: str, change: Callable[[Tensors], None],
    message: str,
) -> None:  # fmt: skip
    publish(model, *LAYOUTS[layout])
    refuses(model, change, message)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bnb_4bit_quant_storage": "bfloat16"}, "bnb_4bit_quant_storage is 'bfloat16'; None or 'uint8' is required"),
        ({"llm_int8_has_fp16_weight": True}, "llm_int8_has_fp16_weight is True; None or False is required"),
        ({"bnb_4bit_quant_type": "nf3"}, "bnb_4bit_quant_type is 'nf3'"),
        ({"outliers": 1}, "not understood: outliers; "),
        ({}, r"is said to be quantised \(bitsandbytes, 4 bits, bitsandbytes, 8 bits\) and holds no tensor quant_state"),
    ],
)
def test_what_would_change_the_numbers_is_refused(model: Path, values: dict[str, Any], message: str) -> None:
    plain = json.loads((model / CONFIG_NAME).read_text())
    (model / CONFIG_NAME).write_text(json.dumps({**plain, "quantization_config": CONFIG | values}))
    with pytest.raises(ConversionError, match=message) as caught:
        open_model(model)
    assert str(caught.value).count(";") >= 2, caught.value


def test_a_part_that_has_parts_of_its_own_is_refused(model: Path, publish: Publish) -> None:
    publish(model, *LAYOUTS["nf4"])
    parts, _ = in_codes(torch.ones(4, 8))
    tensors = load_file(model / WEIGHTS_NAME)
    inner = {f"{NAME}.weight.absmax{suffix.removeprefix('.weight')}": part for suffix, part in parts.items()}
    save_file(tensors | inner, model / WEIGHTS_NAME)
    with pytest.raises(ConversionError, match=rf"{NAME}.weight: it is uint8|{NAME}.weight.absmax"):
        open_model(model)
