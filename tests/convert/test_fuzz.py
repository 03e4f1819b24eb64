"""Whatever a file says, an import ends in a model that passed its check, or in an error of ours that leaves nothing."""

import json
import os
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.convert.exporter import export_run
from moesaic.convert.importer import import_model
from moesaic.errors import MoesaicError

pytestmark = pytest.mark.usefixtures("short_check")

ODD: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 3, 7, 2**31, 2**63, 10**30, -0.5, 0.0, 0.5, 1e-300, 1e300, "", "x", "24", "\ud800",
    [], [1], ["x"], [[]], {}, {"x": 1}, {"rope_type": "yarn"}, {"rope_type": "linear", "factor": 3}, [None] * 9,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(saved: Callable[..., Path]) -> Path:
    return saved("llama", num_hidden_layers=1, hidden_size=16)


@pytest.fixture(scope="module")
def mixtral(saved: Callable[..., Path]) -> Path:
    return saved("mixtral", num_hidden_layers=1, hidden_size=16)


@pytest.fixture(scope="module")
def gpt_oss(saved: Callable[..., Path]) -> Path:
    return saved("gpt-oss", num_hidden_layers=2, layer_types=None, hidden_size=16)


@pytest.fixture(scope="module")
def ernie(saved: Callable[..., Path]) -> Path:
    return saved("ernie4.5-moe", num_hidden_layers=2, hidden_size=16)


@pytest.fixture(scope="module")
def minimax(saved: Callable[..., Path]) -> Path:
    return saved("minimax-m2", num_hidden_layers=1, hidden_size=16)


@pytest.fixture(scope="module")
def granite(saved: Callable[..., Path]) -> Path:
    return saved("granite-moe-shared", num_hidden_layers=1, hidden_size=16)


@pytest.fixture(scope="module")
def hunyuan(saved: Callable[..., Path]) -> Path:
    return saved("hunyuan-moe", num_hidden_layers=1, hidden_size=16)


@pytest.fixture(scope="module")
def exaone(saved: Callable[..., Path]) -> Path:
    return saved("exaone-moe", num_hidden_layers=2, hidden_size=16)


@pytest.fixture
def law(tmp_path: Path, bounded_memory: Callable[[], AbstractContextManager[None]]) -> Callable[[Path], bool]:
    """A function (source) that imports it under the law, and returns whether that succeeded."""
    room = tmp_path / "room"
    room.mkdir()

    def check(source: Path) -> bool:
        try:
            with bounded_memory():
                certificate = import_model(source, room / "deep" / "run")
        except MoesaicError as error:
            assert not list(room.iterdir()), error
            assert ";" in str(error), error
            return False
        assert certificate.failure is None
        assert [path.name for path in (room / "deep").iterdir()] == ["run"]
        shutil.rmtree(room / "deep")
        return True

    return check


@pytest.mark.parametrize("family", ["model", "mixtral", "gpt_oss", "ernie", "minimax", "granite", "hunyuan", "exaone"])
def test_configs_with_odd_values(
    family: str, law: Callable[[Path], bool], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = shutil.copytree(request.getfixturevalue(family), tmp_path / "source")
    config = json.loads((folder / "config.json").read_text())
    keys = [*config, "rope_theta", "rope_scaling", "sliding_window", "quantization_config", "head_dim", "auto_map", "x"]
    draw, succeeded = random.Random(5), 0
    for _ in range(80):
        changed = dict(config)
        for key in draw.sample(keys, draw.choice((1, 1, 2))):
            if draw.random() < 0.15:
                changed.pop(key, None)
            elif isinstance(changed.get(key), dict) and draw.random() < 0.5:
                changed[key] = changed[key] | {draw.choice(["rope_type", "factor", "rope_theta"]): draw.choice(ODD)}
            else:
                changed[key] = draw.choice(ODD)
        (folder / "config.json").write_text(json.dumps(changed))
        succeeded += law(folder)
    assert 0 < succeeded < 40  # some changes change nothing, and most do


def quantized(tensors: dict[str, Tensor], kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return a quantization_config, and tensors with every matrix of the layer in such parts, of random integers."""
    of_weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 8, "symmetric": True}
    config: dict[str, Any] = {
        "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False, "checkpoint_format": "gptq_v2"},
        "awq": {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm", "modules_to_not_convert": None},
        "auto-round": {"quant_method": "auto-round", "bits": 4, "group_size": 8, "data_type": "int",
                       "packing_format": "auto_round"},
        "packed": {"quant_method": "compressed-tensors", "format": "pack-quantized", "ignore": [],
                   "config_groups": {"group_0": {"targets": ["Linear"], "weights": of_weights}}},
        "mixed": {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": {
            "group_0": {"format": "nvfp4-pack-quantized", "weights": {"num_bits": 4, "type": "float", "group_size": 16,
                                                                      "strategy": "tensor_group"}},
            "group_1": {"format": "pack-quantized", "weights": of_weights}}},
        "modelopt": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]},
        "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    }[kind]  # fmt: skip
    parts = dict[str, Tensor]()
    for name, matrix in tensors.items():
        if matrix.dim() != 2 or "proj" not in name:
            parts[name] = matrix
            continue
        (rows, columns), stem = matrix.shape, name.removesuffix(".weight")

        def words(*shape: int) -> Tensor:
            return torch.randint(1 << 20, shape, dtype=torch.int32)

        scales = torch.rand(columns // 8, rows) / 100
        is_fp4 = kind == "modelopt" or (kind == "mixed" and "self_attn" in name)
        if is_fp4:
            values, of_matrix = (name, "scale_2") if kind == "modelopt" else (f"{name}_packed", "global_scale")
            parts |= {
                values: words(rows, columns // 8).view(torch.uint8), f"{name}_{of_matrix}": torch.tensor([3.0]),
                f"{name}_scale": torch.rand(rows, columns // 16).to(torch.float8_e4m3fn),
            }  # fmt: skip
        elif kind == "bitsandbytes":
            state = {"blocksize": 64, "shape": [rows, columns], "nested_blocksize": 16, "nested_offset": 0.1}
            blocks = rows * columns // 64
            parts |= {
                name: words(rows * columns // 8, 1).view(torch.uint8).view(-1, 1),
                f"{name}.absmax": words(blocks).to(torch.uint8), f"{name}.quant_map": torch.linspace(-1, 1, 16),
                f"{name}.nested_absmax": torch.rand(-(-blocks // 16)),
                f"{name}.nested_quant_map": torch.linspace(-1, 1, 256),
                f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(
                    list(json.dumps(state).encode()), dtype=torch.uint8
                ),
            }  # fmt: skip
        elif kind in ("packed", "mixed"):
            parts |= {
                f"{name}_packed": words(rows, columns // 8), f"{name}_scale": scales.t().contiguous(),
                f"{name}_shape": torch.tensor([rows, columns]),
            }  # fmt: skip
        else:
            qweight = words(columns, rows // 8) if kind == "awq" else words(columns // 8, rows)
            zeros = words(columns // 8, rows // 8)
            parts |= {f"{stem}.qweight": qweight, f"{stem}.qzeros": zeros, f"{stem}.scales": scales}
            if kind == "gptq":
                parts[f"{stem}.g_idx"] = torch.arange(columns, dtype=torch.int32) // 8
    return config, parts


def with_another_byte(part: Tensor, draw: random.Random) -> Tensor:
    """Return a tensor of which one byte is changed."""
    data = part.contiguous().flatten().view(torch.uint8).clone()
    data[draw.randrange(len(data))] = draw.randrange(256)
    return data.view(part.dtype).view(part.shape)


def with_an_odd_value(values: Any, draw: random.Random) -> Any:
    """Return JSON values with one of them, at whatever depth, changed."""
    if isinstance(values, dict) and values and draw.random() < 0.8:
        key = draw.choice([*values])
        return {**values, key: with_an_odd_value(values[key], draw)}
    return draw.choice(ODD)


@pytest.mark.parametrize("kind", ["gptq", "awq", "auto-round", "packed", "mixed", "modelopt", "bitsandbytes"])
def test_quantized_folders_with_odd_values(
    kind: str, saved: Callable[..., Path], law: Callable[[Path], bool], tmp_path: Path
) -> None:
    """In their configs, and in the kinds, shapes and numbers of their tensors."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 64}
    folder = shutil.copytree(saved("llama", **sizes), tmp_path / "source")
    file, described = folder / "model.safetensors", folder / "config.json"
    config, tensors = quantized(load_file(file), kind)
    given = json.loads(described.read_text())

    def write(changed: Any) -> None:
        described.write_text(json.dumps({**given, "quantization_config": changed}))

    write(config)
    save_file(tensors, file)
    assert law(folder)
    draw, succeeded = random.Random(7), 0
    for _ in range(50):
        write(with_an_odd_value(config, draw))
        succeeded += law(folder)
    assert succeeded < 40  # group_size, say, and what is to be left alone, the tensors tell
    write(config)
    for _ in range(50):
        name = draw.choice([each for each in tensors if "proj" in each])
        part = tensors[name]
        changed = draw.choice(
            [
                lambda part: part[:0],
                lambda part: part[..., : part.shape[-1] // 2],
                lambda part: torch.cat([part, part]),
                lambda part: part.flatten(),
                lambda part: part[None],
                lambda part: part.t() if part.dim() == 2 else part.flip(0),
                lambda part: part.to(draw.choice([torch.int8, torch.int64, torch.float64, torch.uint8, torch.bool])),
                lambda part: part.float().fill_(draw.choice([-1, 0, 127])).to(part.dtype),
                lambda part: torch.full(part.shape, torch.inf),
                lambda part: with_another_byte(part, draw),
                lambda part: part[0, 0] if part.dim() == 2 else part[0],
            ]
        )(part)
        save_file({**tensors, name: changed.contiguous()}, file)
        law(folder)


def bent(data: bytes, draw: random.Random, *, end: int) -> bytes:
    """Return data with one of the usual kinds of damage in its first `end` bytes."""
    place, kind = draw.randrange(end), draw.randrange(6)
    if kind == 0:
        return data[:place]
    if kind == 1:
        return data[:place] + data[place + draw.choice((1, 4, 8)) :]
    if kind == 2:
        return data[:place] + draw.randbytes(draw.choice((1, 8))) + data[place:]
    size = draw.choice((1, 1, 4, 8))
    power = (1 << draw.randrange(8 * size)).to_bytes(size, "little")
    damage = draw.choice((draw.randbytes(size), b"\xff" * size, bytes(size), power))
    return data[:place] + damage + data[place + size :]


def test_safetensors_files_with_damaged_headers(model: Path, law: Callable[[Path], bool], tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "source")
    file = folder / "model.safetensors"
    data = file.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    draw = random.Random(6)
    for _ in range(150):
        file.write_bytes(bent(data, draw, end=end))
        law(folder)
    header = json.loads(data[8:end])
    for _ in range(100):
        changed = json.loads(json.dumps(header))
        entry = changed[draw.choice([name for name in changed if name != "__metadata__"])]
        key = draw.choice(["dtype", "shape", "data_offsets"])
        entry[key] = draw.choice([*ODD, "I64", "F64", "BOOL", [16], [2**62, 4], [0, 64], entry[key][::-1]])
        text = json.dumps(changed).encode("utf-8", "surrogatepass")
        file.write_bytes(struct.pack("<Q", len(text)) + text + data[end:])
        law(folder)


def test_gguf_files_with_damaged_bytes(model: Path, law: Callable[[Path], bool], tmp_path: Path) -> None:
    import_model(model, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", format="gguf")
    data = (tmp_path / "out" / "model.gguf").read_bytes()
    # Where the numbers and names are; the vocabulary, which is most of the header, is damaged seldom.
    tokens, infos = data.index(b"tokenizer.ggml.tokens"), data.index(b"output_norm.weight")
    draw, file, succeeded = random.Random(7), tmp_path / "bent.gguf", 0
    for index in range(100):
        if index % 5 == 0:
            changed = bent(data, draw, end=len(data))
        elif index % 2:
            changed = bent(data, draw, end=tokens)
        else:
            start = infos - 300
            changed = data[:start] + bent(data[start:], draw, end=900)
        file.write_bytes(changed)
        succeeded += law(file)
    assert succeeded < 50
    assert not os.path.lexists(tmp_path / "room" / "deep")


def test_tokenizer_files_with_damaged_bytes(model: Path, law: Callable[[Path], bool], tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "source")
    draw = random.Random(8)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"):
        data = (folder / name).read_bytes()
        for _ in range(8):
            (folder / name).write_bytes(bent(data, draw, end=min(len(data), 700)))
            law(folder)
        (folder / name).write_bytes(data)
