"""NVFP4, MXFP4 and MXFP8 are read as the bf16 nearest to what they stand for, as two tools write them."""

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
from moesaic.convert import block_floats
from moesaic.convert.block_floats import MXFP4, MXFP8, NVFP4, BlockFloatPacking
from moesaic.convert.fp8 import Fp8Packing
from moesaic.convert.importer import import_model
from moesaic.convert.opened import open_model
from moesaic.convert.packing import PackedTensors
from moesaic.convert.source import CONFIG_NAME, WEIGHTS_NAME
from moesaic.errors import CheckpointError, ConversionError

pytestmark = pytest.mark.usefixtures("short_check")

Make = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
Publish = Callable[[Path, Mapping[str, Any], Make], dict[str, Tensor]]
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NAME = "model.layers.1.mlp.experts.3.down_proj"


def group(bits: int, size: int, strategy: str, **values: object) -> dict[str, Any]:
    """Return a group of compressed-tensors' as llm-compressor writes it."""
    weights = {
        "actorder": None, "block_structure": None, "dynamic": False, "group_size": size, "num_bits": bits,
        "observer": "static_minmax", "observer_kwargs": {}, "scale_dtype": None, "strategy": strategy,
        "symmetric": True, "type": "float", "zp_dtype": None,
    }  # fmt: skip
    return {"input_activations": None, "output_activations": None, "targets": ["Linear"], "weights": weights, **values}


def compressed(layout: str, *groups: dict[str, Any]) -> dict[str, Any]:
    return {
        "config_groups": {f"group_{index}": each for index, each in enumerate(groups)}, "format": layout,
        "global_compression_ratio": None, "ignore": ["lm_head", "re:.*mlp.gate$"], "kv_cache_scheme": None,
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
        "transform_config": {}, "version": "0.12.3",
    }  # fmt: skip


def modelopt(algorithm: str, **values: object) -> dict[str, Any]:
    """Return what NVIDIA's models have in config.json."""
    of_group = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}
    return {
        "config_groups": {"group_0": {"input_activations": of_group, "weights": of_group, "targets": ["Linear"]}},
        "ignore": ["lm_head", "model.layers.0.mlp.gate"], "quant_algo": algorithm,
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "producer": {"name": "modelopt", "version": "0.33.0"}, "quant_method": "modelopt", **values,
    }  # fmt: skip


def random_bytes(*shape: int) -> Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(sum(shape)))


def random_floats(rows: int, columns: int, *, largest: float = 448.0) -> Tensor:
    """Return finite FP8."""
    numbers = torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows + columns))
    return (numbers * 2 * largest - largest).to(torch.float8_e4m3fn)


def standing_for(values: Tensor, factors: Tensor) -> Tensor:
    """A matrix, number by number, as the formats define it. factors (N, G): fp32."""
    if values.dtype is torch.uint8:
        pairs = [[byte & 15, byte >> 4] for byte in values.flatten().tolist()]
        numbers = [(-1 if code & 8 else 1) * E2M1[code & 7] for pair in pairs for code in pair]
        wide = torch.tensor(numbers).view(len(values), -1)
    else:
        wide = values.float()
    size = wide.shape[1] // factors.shape[1]
    return torch.stack([wide[:, each] * factors[:, each // size] for each in range(wide.shape[1])], 1).bfloat16()


def in_nvfp4(matrix: Tensor, *, tool: str, size: int = 16) -> tuple[dict[str, Tensor], Tensor]:
    """Return parts of random numbers as large as the matrix's, and what they stand for."""
    rows, columns = matrix.shape
    values, scales = random_bytes(rows, columns // 2), random_floats(rows, columns // size).float().abs()
    scales = scales.to(torch.float8_e4m3fn)
    factor = matrix.float().abs().max() / (6 * 448)
    if tool == "modelopt":
        parts = {".weight": values, ".weight_scale": scales, ".weight_scale_2": factor}
        return parts, standing_for(values, scales.float() * factor)
    divisor = (1 / factor).reshape(1)
    parts = {".weight_packed": values, ".weight_scale": scales, ".weight_global_scale": divisor}
    return parts, standing_for(values, scales.float() / divisor)


def in_mx(matrix: Tensor, *, bits: int, name: str = ".weight") -> tuple[dict[str, Tensor], Tensor]:
    rows, columns = matrix.shape
    values = random_bytes(rows, columns // 2) if bits == 4 else random_floats(rows, columns, largest=6)
    scales = 118 + random_bytes(rows, columns // 32) % 8
    return {name: values, ".weight_scale": scales}, standing_for(values, 2.0 ** (scales.float() - 127))


def in_fp8(matrix: Tensor, *, suffix: str, shape: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """One scale for a matrix, or for each of its rows."""
    values = random_floats(*matrix.shape)
    count = len(matrix) if len(matrix) in shape else 1
    scales = (torch.rand(count, generator=torch.Generator().manual_seed(count)) + 0.5) / 4000
    plain = standing_for(values, scales.reshape(count, 1).expand(len(matrix), 1))
    return {".weight": values, f".weight_{suffix}": scales.reshape(shape)}, plain


LAYOUTS: dict[str, tuple[dict[str, Any], Make]] = {
    "nvfp4": (
        compressed("nvfp4-pack-quantized", group(4, 16, "tensor_group")),
        lambda matrix: in_nvfp4(matrix, tool="compressed-tensors"),
    ),
    "mxfp4": (
        compressed("mxfp4-pack-quantized", group(4, 32, "group", format="mxfp4-pack-quantized")),
        lambda matrix: in_mx(matrix, bits=4, name=".weight_packed"),
    ),
    "mxfp8": (compressed("mxfp8-quantized", group(8, 32, "group")), lambda matrix: in_mx(matrix, bits=8)),
    "mixed": (
        compressed(
            "mixed-precision",
            {**group(8, 0, "channel", format="float-quantized"), "targets": ["re:.*self_attn.*"]}
            | {"weights": {**group(8, 0, "channel")["weights"], "group_size": None}},
            {**group(4, 16, "tensor_group", format="nvfp4-pack-quantized"), "targets": ["re:.*mlp.*"]},
        ),
        lambda matrix: (
            in_nvfp4(matrix, tool="compressed-tensors")
            if matrix.shape == (32, 64)
            else in_fp8(matrix, suffix="scale", shape=(len(matrix), 1))
        ),
    ),
    "modelopt, nvfp4": (modelopt("NVFP4"), lambda matrix: in_nvfp4(matrix, tool="modelopt")),
    "modelopt, nvfp4 of 32": (modelopt("W4A8_NVFP4_FP8"), lambda matrix: in_nvfp4(matrix, tool="modelopt", size=32)),
    "modelopt, mxfp4": (modelopt("W4A8_MXFP4_FP8"), lambda matrix: in_mx(matrix, bits=4)),
    "modelopt, mxfp8": (modelopt("MXFP8", quant_method="modelopt_mxfp8"), lambda matrix: in_mx(matrix, bits=8)),
    "modelopt, fp8": (modelopt("FP8"), lambda matrix: in_fp8(matrix, suffix="scale", shape=())),
    "modelopt, fp8 by rows": (
        modelopt("FP8_PER_CHANNEL_PER_TOKEN"), lambda matrix: in_fp8(matrix, suffix="scale", shape=(len(matrix),)),
    ),
    "modelopt, fp8 by blocks": (
        modelopt("fp8_pb_wo", quant_method="modelopt"),
        lambda matrix: in_fp8(matrix, suffix="scale", shape=(1, 1, 1, 1)),
    ),
    "modelopt, mixed": (
        modelopt("MIXED_PRECISION", quantized_layers={NAME: {"quant_algo": "NVFP4", "group_size": 16}}),
        lambda matrix: (
            in_nvfp4(matrix, tool="modelopt")
            if matrix.shape == (32, 64)
            else in_fp8(matrix, suffix="scale", shape=())
        ),
    ),
}  # fmt: skip


@pytest.fixture
def model(saved: Callable[..., Path], tmp_path: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 64, "mlp_only_layers": [0]}
    return shutil.copytree(saved("qwen3-moe", **sizes), tmp_path / "model")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_model_becomes_the_bf16_one(
    model: Path, publish: Publish, comes_in_as: Callable[..., None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and out again; transformers, of the numbers that we unpack, is the judge of all else."""
    monkeypatch.setattr(block_floats, "_ROWS", 24)
    plain = publish(model, *LAYOUTS[name])
    with open_model(model) as opened:
        packed = [each for each in opened.source.layout if opened.source.is_packed(each)]  # type: ignore[attr-defined]
    assert len(packed) > 20 and f"{NAME}.weight" in packed
    comes_in_as(model, plain)


def of_one(kind: BlockFloatPacking, parts: Mapping[str, Tensor]) -> Tensor:
    """What a packing makes of one matrix."""
    stored = {f"one{suffix}": part for suffix, part in parts.items()}
    layout = {name: TensorLayout(part.dtype, tuple(part.shape)) for name, part in stored.items()}
    packed = PackedTensors([kind], layout, lambda name, index=None: stored[name], "here")
    (name, plain), *others = packed.layout.items()
    assert name == "one.weight" and not others
    found = packed.read(name)
    assert found.dtype is plain.dtype is torch.bfloat16 and found.shape == plain.shape
    assert torch.equal(packed.read(name, len(found) - 1), found[-1])
    return found


@pytest.mark.parametrize("shape", [(1, 32), (5, 96), (1030, 64)])
def test_every_byte_stands_for_its_numbers_times_its_groups_scale(shape: tuple[int, int]) -> None:
    matrix = torch.ones(shape)
    for tool in ("modelopt", "compressed-tensors"):
        parts, due = in_nvfp4(matrix, tool=tool)
        assert torch.equal(of_one(NVFP4, parts), due)
    for kind, bits in ((MXFP4, 4), (MXFP8, 8)):
        parts, due = in_mx(matrix, bits=bits)
        assert torch.equal(of_one(kind, parts), due)


def test_every_code_keeps_its_sign_and_every_scale_is_a_power_of_two() -> None:
    """Down to the smallest; a zero with a sign too."""
    values = torch.arange(256, dtype=torch.uint8).repeat(16).view(-1, 16)
    scales = (torch.arange(256) % 253).to(torch.uint8).view(-1, 1)
    found = of_one(MXFP4, {".weight_packed": values, ".weight_scale": scales})
    due = standing_for(values, torch.ldexp(torch.ones(256, 1), scales.int() - 127))
    assert torch.equal(found.view(torch.int16), due.view(torch.int16))


def test_what_modelopt_says_in_a_file_of_its_own_counts_where_the_config_says_nothing(
    model: Path, publish: Publish, comes_in_as: Callable[..., None]
) -> None:
    """As its models of 2025 have it."""
    plain = publish(model, *LAYOUTS["modelopt, nvfp4"])
    values = json.loads((model / CONFIG_NAME).read_text())
    del values["quantization_config"]
    (model / CONFIG_NAME).write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="is of dtype F8_E4M3"):
        open_model(model)
    said: dict[str, Any] = {
        "producer": {"name": "modelopt", "version": "0.23.0"},
        "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": None, "group_size": 16,
                         "exclude_modules": ["lm_head"]},
    }  # fmt: skip
    own = model / "hf_quant_config.json"
    for broken, message in (
        ({}, "has no object `quantization`; what"),
        ({"quantization": {"x": 1}}, "not understood: x;"),
    ):
        own.write_text(json.dumps(broken))
        with pytest.raises(ConversionError, match=message):
            open_model(model)
    own.write_text(json.dumps(said))
    comes_in_as(model, plain)


@pytest.mark.parametrize("name", ["nvfp4", "modelopt, nvfp4", "modelopt, fp8"])
def test_scales_of_activations_keys_and_values_are_left_out(
    model: Path, publish: Publish, tmp_path: Path, name: str
) -> None:
    plain = publish(model, *LAYOUTS[name])
    tensors = load_file(model / WEIGHTS_NAME)
    kind = "input_global_scale" if name == "nvfp4" else "input_scale"
    scales = {
        each.removesuffix("weight_scale") + kind: torch.tensor(0.3) for each in tensors if each.endswith("weight_scale")
    }
    scales |= {f"model.layers.0.self_attn.{each}_proj.{each}_scale": torch.tensor(0.2) for each in "kv"}
    save_file(tensors | scales, model / WEIGHTS_NAME)
    imported = import_model(model, tmp_path / "run")
    assert imported.failure is None and imported.judge == "transformers" and imported.tensors is not None
    assert imported.tensors.used == len(plain)
    assert imported.tensors.left_out == dict.fromkeys(scales, "of quantised activations, and these are read as bf16")
    save_file(tensors | {f"{NAME}.pre_quant_scale": torch.ones(64)}, model / WEIGHTS_NAME)
    with pytest.raises(ConversionError, match=f"not used by any part 1: {NAME}.pre_quant_scale"):
        open_model(model)


Tensors = dict[str, Tensor]


def with_part(suffix: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[Tensors], None]:
    def apply(tensors: Tensors) -> None:
        changed = change(tensors.pop(NAME + suffix))
        if changed is not None:
            tensors[NAME + suffix] = changed.contiguous()

    return apply


def without(suffix: str) -> Callable[[Tensors], None]:
    return with_part(suffix, lambda part: None)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("nvfp4", without(".weight_scale"), "not used by any part 2: .*down_proj.weight_global_scale, .*weight_packed"),
        (
            "nvfp4",
            without(".weight_global_scale"),
            rf"{NAME}: weight_packed is uint8 \[32, 32\], weight_scale is float8_e4m3fn \[32, 4\]; uint8 \(N, K / 2\)",
        ),
        ("nvfp4", with_part(".weight_scale", lambda part: part[:, :3]), r"weight_scale is float8_e4m3fn \[32, 3\], "),
        ("nvfp4", with_part(".weight_scale", lambda part: part.float()), r"weight_scale is float32 \[32, 4\]"),
        ("nvfp4", with_part(".weight_packed", lambda part: part[:, :7]), r"weight_packed is uint8 \[32, 7\]"),
        ("nvfp4", with_part(".weight_packed", lambda part: part.flatten()), r"weight_packed is uint8 \[1024\]"),
        ("nvfp4", with_part(".weight_global_scale", lambda part: part.expand(2)), r"global_scale is float32 \[2\]"),
        ("nvfp4", with_part(".weight_global_scale", lambda part: part.bfloat16()), r"global_scale is bfloat16 \[1\]"),
        ("nvfp4", with_part(".weight_global_scale", lambda part: part * 0), "holds numbers that are not finite"),
        (
            "nvfp4",
            lambda tensors: tensors.update({f"{NAME}.weight_scale_2": torch.tensor(1.0)}),
            r"weight_global_scale is float32 \[1\], weight_scale_2 is float32 \[\]; uint8",
        ),
        ("nvfp4", lambda tensors: tensors.update({f"{NAME}.weight": torch.ones(32, 64)}), rf"{NAME}: weight_packed"),
        ("mxfp4", with_part(".weight_scale", lambda part: part.to(torch.int32)), r"weight_scale is int32 \[32, 2\]; "),
        ("mxfp4", with_part(".weight_scale", lambda part: part.fill_(255)), "holds numbers that are not finite"),
        ("mxfp8", with_part(".weight_scale", lambda part: part[:31]), r"weight_scale is uint8 \[31, 2\]; float8"),
        ("modelopt, nvfp4", without(".weight_scale_2"), r"weight_scale is float8_e4m3fn \[32, 4\]; uint8 \(N, K / 2\)"),
        ("modelopt, fp8", with_part(".weight_scale", lambda part: part.expand(3)), r"weight_scale is float32 \[3\]"),
        ("mixed", without(".weight_global_scale"), rf"{NAME}: weight_packed is uint8"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    model: Path, publish: Publish, refuses: Callable[..., None], layout: str, change: Callable[[Tensors], None],
    message: str,
) -> None:  # fmt: skip
    publish(model, *LAYOUTS[layout])
    refuses(model, change, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (modelopt("NVFP4_SVD"), "quant_algo is 'NVFP4_SVD'; 'NVFP4' or"),
        (modelopt("W4A16_AWQ"), "quant_algo is 'W4A16_AWQ'"),
        (modelopt("NVFP4", pre_quant_scale=True), "pre_quant_scale is True; None or False is required"),
        (modelopt("NVFP4", lora_rank=8), "not understood: lora_rank; "),
        ({"quant_method": "modelopt"}, "quant_algo is None"),
        (compressed("nvfp4-pack-quantized", group(4, 32, "tensor_group")), "weights: group_size is 32; 16 is required"),
        (compressed("nvfp4-pack-quantized", group(4, 16, "group")), "strategy is 'group'; 'tensor_group' is required"),
        (compressed("mxfp4-pack-quantized", group(8, 32, "group")), "num_bits is 8; 4 is required"),
        (compressed("mixed-precision", group(4, 16, "tensor_group")), "group_0: format is None; 'float-quantized' or"),
        (compressed("mixed-precision"), "config_groups describes no matrices; how those that are quantised are is"),
    ],
)  # fmt: skip
def test_what_would_change_the_numbers_is_refused(model: Path, config: dict[str, Any], message: str) -> None:
    values = json.loads((model / CONFIG_NAME).read_text())
    (model / CONFIG_NAME).write_text(json.dumps({**values, "quantization_config": config}))
    with pytest.raises(ConversionError, match=message) as caught:
        open_model(model)
    assert str(caught.value).count(";") >= 2, caught.value


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "modelopt, nvfp4", "mixed"])
def test_a_config_and_tensors_that_disagree_are_refused(model: Path, name: str) -> None:
    plain = json.loads((model / CONFIG_NAME).read_text())
    (model / CONFIG_NAME).write_text(json.dumps({**plain, "quantization_config": LAYOUTS[name][0]}))
    with pytest.raises(ConversionError, match=r"is said to be quantised \(.*\) and holds no .*; both or neither is"):
        open_model(model)


def test_scales_of_nvfp4_are_no_matrices_of_fp8() -> None:
    """Though they are FP8 of two dimensions."""
    parts, _ = in_nvfp4(torch.ones(8, 32), tool="modelopt")
    layout = {f"one{suffix}": TensorLayout(part.dtype, tuple(part.shape)) for suffix, part in parts.items()}
    assert Fp8Packing((None, None)).find(layout) == []
