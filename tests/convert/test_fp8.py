"""FP8 is read as the bf16 nearest to what it stands for, in each layout it is published in; what is not, is refused."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.checkpoint.store import load_tensors, resolve_checkpoint
from moesaic.checkpoint.stream import TensorLayout
from moesaic.convert.fp8 import Block, Fp8Packing
from moesaic.convert.importer import import_model
from moesaic.convert.opened import open_model
from moesaic.convert.source import CONFIG_NAME, WEIGHTS_NAME
from moesaic.errors import CheckpointError, ConversionError

pytestmark = pytest.mark.usefixtures("short_check")

Make = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
Publish = Callable[[Path, Mapping[str, Any], Make], dict[str, Tensor]]
# Of small models that divide into such blocks, as transformers requires of what it is to read.
BLOCK = (8, 4)
SIZES: dict[str, dict[str, int]] = {
    "deepseek-v3": {"hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16, "kv_lora_rank": 12,
                    "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4, "q_lora_rank": 8},
    "qwen3-moe": {"hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16},
    "minimax-m2": {"hidden_size": 32, "intermediate_size": 16},
    "glm4-moe, as GLM-4.5-Air": {"hidden_size": 32, "intermediate_size": 24, "moe_intermediate_size": 16},
}  # fmt: skip
PUBLISHED = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": list(BLOCK),
    "modules_to_not_convert": ["lm_head"],
}  # fmt: skip
COMPRESSED = {
    "config_groups": {
        "group_0": {
            "input_activations": {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True,
                                  "type": "float"},
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {"actorder": None, "block_structure": None, "dynamic": False, "group_size": None, "num_bits": 8,
                        "observer": "minmax", "observer_kwargs": {}, "strategy": "channel", "symmetric": True,
                        "type": "float"},
        }
    },
    "format": "float-quantized",
    "global_compression_ratio": 1.5,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}  # fmt: skip


def standing_for(values: Tensor, scales: Tensor, block: Block) -> Tensor:
    """A matrix (N, K), number by number, as the formats define it."""
    rows, columns = values.shape
    of_row = torch.arange(rows) // (block[0] or rows)
    of_column = torch.arange(columns) // (block[1] or columns)
    grid = scales.float().reshape(int(of_row[-1]) + 1, int(of_column[-1]) + 1)
    return (values.float() * grid[of_row][:, of_column]).bfloat16()


def pack(matrix: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Return a matrix (N, K) in FP8 and its scales, fp32."""
    rows, columns = matrix.shape
    height, width = block[0] or rows, block[1] or columns
    grid = [
        [max(float(part.abs().max()), 1e-6) / 448 for part in band.split(width, 1)] for band in matrix.split(height)
    ]
    scales = torch.tensor(grid)
    spread = scales.repeat_interleave(height, 0)[:rows].repeat_interleave(width, 1)[:, :columns]
    return (matrix / spread).to(torch.float8_e4m3fn), scales


def in_fp8(block: Block, *, suffix: str = "_scale_inv", dtype: torch.dtype = torch.float32) -> Make:
    """Return what makes a matrix's parts, and the matrix that they stand for."""

    def make(matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        values, scales = pack(matrix.float(), block)
        scales = scales.to(dtype)
        return {".weight": values, f".weight{suffix}": scales}, standing_for(values, scales, block)

    return make


@pytest.fixture
def model(saved: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function (name of families.py, **values of its config) that returns such a model's folder."""
    return lambda name, /, **values: shutil.copytree(saved(name, **values), tmp_path / "model")


@pytest.mark.parametrize("shape", [(24, 12), (21, 10), (1, 1), (3, 300), (1030, 5)])
@pytest.mark.parametrize("block", [(8, 4), (1, None), (None, None), (128, 128), (None, 3), (1 << 60, 1 << 60)])
def test_every_byte_stands_for_its_number_times_its_blocks_scale(shape: tuple[int, int], block: Block) -> None:
    """At the ends blocks are smaller, and the numbers of no more than some rows are fp32 at a time."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(rows)
    values = torch.randint(256, shape, dtype=torch.uint8, generator=generator).view(torch.float8_e4m3fn)
    grid = (-(-rows // min(block[0] or rows, rows)), -(-columns // min(block[1] or columns, columns)))
    scales = torch.rand(grid, generator=generator) + 0.1
    found, due = Fp8Packing(block).dequantize(values, scales), standing_for(values, scales, block)
    assert found.dtype is torch.bfloat16 and torch.equal(found.view(torch.int16), due.view(torch.int16))
    stack = Fp8Packing(block).dequantize(torch.stack([values, values]), torch.stack([scales, scales * 2]))
    assert torch.equal(stack[1].view(torch.int16), standing_for(values, scales * 2, block).view(torch.int16))


@pytest.mark.parametrize("block", [(None, None), (128, 128), (1, None)])
def test_no_more_than_some_rows_are_fp32_at_a_time(block: Block, largest_fp32: Any) -> None:
    """A scale for the matrix, too; of a stack, of all matrices together."""
    values = torch.zeros(4, 3000, 40, dtype=torch.float8_e4m3fn)
    grid = Fp8Packing(block)._grids((4, 3000, 40))[0]
    with largest_fp32:
        Fp8Packing(block).dequantize(values[0], torch.ones(grid[1:]))
        Fp8Packing(block).dequantize(values, torch.ones(grid))
    assert 0 < largest_fp32.numbers <= 1024 * 40


@pytest.mark.parametrize("block", [(8, 4), (1, None), (None, None)])
def test_a_row_of_a_matrix_is_read_by_its_number(block: Block) -> None:
    """As a bias of one expert is of gpt-oss's (E, H)."""
    parts, due = in_fp8(block)(torch.randn(21, 12, generator=torch.Generator().manual_seed(1)))
    stored = {f"one{suffix.removeprefix('.weight')}": part for suffix, part in parts.items()}
    layout = {name: TensorLayout(part.dtype, tuple(part.shape)) for name, part in stored.items()}

    def read(name: str, index: int | None = None) -> Tensor:
        return stored[name] if index is None else stored[name][index]

    for index in (0, 9, 20):
        assert torch.equal(Fp8Packing(block).read("one", index, layout, read), due[index])


def test_it_is_what_transformers_makes_of_it() -> None:
    module = pytest.importorskip("transformers.integrations.finegrained_fp8")
    values, scales = pack(torch.randn(32, 24), (8, 8))
    theirs = module.Fp8Dequantize(None).convert({"weight": values, "weight_scale_inv": scales})["weight"]
    assert torch.equal(Fp8Packing((8, 8)).dequantize(values, scales), theirs.bfloat16())


@pytest.mark.parametrize("name", SIZES)
def test_a_published_model_becomes_the_bf16_one(
    model: Callable[..., Path], publish: Publish, comes_in_as: Callable[..., None], tmp_path: Path, name: str
) -> None:
    """Whole and out again; transformers, with its own conversion, is the judge of all of it."""
    folder = model(name, **SIZES[name])
    plain = publish(folder, PUBLISHED, in_fp8(BLOCK))
    comes_in_as(folder, plain)
    assert {each.dtype for each in load_tensors(resolve_checkpoint(tmp_path / "run"), "model").values()} <= {
        torch.bfloat16, torch.float32,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "block", "grid"),
    [
        ("channel", (1, None), lambda scales: scales),
        ("tensor", (None, None), lambda scales: scales.reshape(1)),
        ("tensor", (None, None), lambda scales: scales.reshape(())),
        ("block", BLOCK, lambda scales: scales),
    ],
)
def test_what_compressed_tensors_writes_is_read_too(
    model: Callable[..., Path], publish: Publish, comes_in_as: Callable[..., None], strategy: str, block: Block,
    grid: Callable[[Tensor], Tensor],
) -> None:  # fmt: skip
    """Whose scales have another name, and are bf16."""
    folder = model("qwen3-moe", **SIZES["qwen3-moe"])
    config: dict[str, Any] = json.loads(json.dumps(COMPRESSED))
    structure = list(BLOCK) if strategy == "block" else None
    config["config_groups"]["group_0"]["weights"] |= {"strategy": strategy, "block_structure": structure}
    plain = publish(folder, config, in_fp8(block, suffix="_scale", dtype=torch.bfloat16))
    stored = load_file(folder / WEIGHTS_NAME)
    shaped = {name: grid(each).contiguous() if name.endswith("_scale") else each for name, each in stored.items()}
    save_file(shaped, folder / WEIGHTS_NAME)
    comes_in_as(folder, plain)


# As AutoFP8 wrote its models, and as llm-compressor writes them.
STATIC: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
    "compressed-tensors": {
        **COMPRESSED,
        "config_groups": {
            "group_0": {
                "input_activations": {"dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": True,
                                      "type": "float"},
                "weights": {"dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"},
                "targets": ["Linear"],
            }
        },
        "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"},
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", STATIC)
def test_scales_of_activations_keys_and_values_are_left_out(
    model: Callable[..., Path], publish: Publish, tmp_path: Path, kind: str
) -> None:
    """They are for products, and a cache, in 8 bits; the matrices are the ones that they are."""
    folder = model("qwen3-moe", **SIZES["qwen3-moe"])
    plain = publish(folder, STATIC[kind], in_fp8((None, None), suffix="_scale"))
    tensors = load_file(folder / WEIGHTS_NAME)
    scales = {
        name.replace("weight_scale", "input_scale"): torch.tensor(0.3) for name in tensors if name.endswith("_scale")
    }
    scales |= {f"model.layers.0.self_attn.{each}_scale": torch.tensor([0.2]) for each in "kv"}
    scales["model.layers.0.self_attn.k_proj.output_scale"] = torch.tensor([0.2])
    save_file(tensors | scales, folder / WEIGHTS_NAME)
    imported = import_model(folder, tmp_path / "run")
    assert imported.failure is None and imported.judge == "transformers" and imported.not_compared is None
    assert imported.tensors is not None and imported.tensors.used == len(plain)
    assert imported.tensors.left_out == dict.fromkeys(scales, "of quantised activations, and these are read as bf16")
    with open_model(folder) as opened:
        assert all(torch.equal(opened.source.read(name), tensor) for name, tensor in plain.items())
    # Beside a matrix that is not quantised, or by itself, nobody knows what a scale is for.
    for stray in ("lm_head.input_scale", "model.k_scale", "model.layers.0.self_attn.k_proj.pre_quant_scale"):
        save_file(tensors | {stray: torch.tensor([0.3])}, folder / WEIGHTS_NAME)
        with pytest.raises(ConversionError, match=f"not used by any part 1: {stray}"):
            open_model(folder)


@pytest.mark.parametrize(("name", "sizes"), [("deepseek-v3", {}), ("qwen3-moe", {"moe_intermediate_size": 24})])
def test_a_matrix_that_its_blocks_do_not_divide(
    model: Callable[..., Path], publish: Publish, tmp_path: Path, name: str, sizes: dict[str, int]
) -> None:
    """As DeepSeek-V3's 576 rows of compressed keys and values: transformers 5.24 fails, or takes two blocks of 12.

    It is given the numbers that we unpack.
    """
    folder = model(name, **{**SIZES[name], "intermediate_size": 32, **(sizes or {"hidden_size": 24})})
    plain = publish(folder, {**PUBLISHED, "weight_block_size": [16, 16]}, in_fp8((16, 16)))
    with open_model(folder) as opened:
        assert opened.source.layout.keys() == plain.keys()
        assert all(torch.equal(opened.source.read(name), tensor) for name, tensor in plain.items())
    imported = import_model(folder, tmp_path / "run")
    assert imported.failure is None and imported.not_compared is None and imported.judge == "transformers"


NAME = "model.layers.1.mlp.experts.3.down_proj.weight"
SCALES = f"{NAME}_scale_inv"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(SCALES),
            rf"{NAME} is float8_e4m3fn \[32, 16\], {SCALES} is missing; scales \[4, 4\]",
        ),
        (
            lambda tensors: tensors.update({SCALES: tensors[SCALES][:3]}),
            rf"{SCALES} is float32 \[3, 4\]; scales \[4, 4\]",
        ),
        (lambda tensors: tensors.update({SCALES: tensors[SCALES].reshape(16)}), r"is float32 \[16\]; scales \[4, 4\]"),
        (lambda tensors: tensors.update({SCALES: tensors[SCALES].byte()}), r"is uint8 \[4, 4\]; scales \[4, 4\]"),
        (
            lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].to(torch.float8_e4m3fn)}),
            r"model.norm.weight is float8_e4m3fn \[32\], model.norm.weight_scale_inv is missing; scales of a matrix",
        ),
        (lambda tensors: tensors.update({NAME: tensors[NAME].bfloat16()}), rf"not used by any part 1: {SCALES}"),
        (lambda tensors: tensors[SCALES].fill_(torch.inf), rf"{NAME} holds numbers that are not finite"),
        (lambda tensors: tensors[SCALES].fill_(3e38), rf"{NAME} holds numbers that are not finite"),
        (lambda tensors: tensors[NAME].view(torch.uint8)[3].fill_(127), rf"{NAME} holds numbers that are not finite"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: Callable[..., Path],
    publish: Publish,
    refuses: Callable[..., None],
    change: Callable[[dict[str, Tensor]], object],
    message: str,
) -> None:
    folder = model("qwen3-moe", **{**SIZES["qwen3-moe"], "mlp_only_layers": []})
    publish(folder, PUBLISHED, in_fp8(BLOCK))
    refuses(folder, change, message)


WEIGHTS: dict[str, Any] = COMPRESSED["config_groups"]["group_0"]["weights"]  # type: ignore[index]


def group(**values: object) -> dict[str, object]:
    return {**COMPRESSED, "config_groups": {"group_0": {"weights": {**WEIGHTS, **values}}}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**PUBLISHED, "activation_scheme": "none"}, "activation_scheme is 'none'; 'dynamic' or 'static' is required"),
        ({**PUBLISHED, "fmt": "e5m2"}, "fmt is 'e5m2'; None or 'e4m3' or 'float8_e4m3fn' is required"),
        ({**PUBLISHED, "expert_dtype": "fp4"}, "expert_dtype is 'fp4'"),
        ({**PUBLISHED, "weight_block_size": [128]}, r"weight_block_size is \[128\]; a list of two sizes"),
        ({**PUBLISHED, "weight_block_size": [0, 128]}, r"weight_block_size is \[0, 128\]; a list of two sizes"),
        ({**PUBLISHED, "weight_block_size": 128}, r"weight_block_size is 128; a list of two sizes"),
        ({**PUBLISHED, "rotation": True}, "has keys that are not understood: rotation; quant_method, activation_"),
        ({**COMPRESSED, "format": "mxfp6-pack-quantized"}, "format is 'mxfp6-pack-quantized'; 'float-quantized' or"),
        ({**COMPRESSED, "transform_config": {"a": 1}}, "transform_config is {'a': 1}"),
        ({**COMPRESSED, "config_groups": {}}, "config_groups describes no matrices; how those"),
        ({**COMPRESSED, "config_groups": [1]}, "config_groups describes no matrices; how those"),
        ({**COMPRESSED, "config_groups": {"a": {"weights": None}}}, "config_groups.a.weights: num_bits is None; 8 is"),
        (group(num_bits=4), "config_groups.group_0.weights: num_bits is 4; 8 is required"),
        (group(type="int"), "type is 'int'; 'float' is required"),
        (group(symmetric=False), "symmetric is False; None or True is required"),
        (group(strategy="group"), "strategy is 'group'; 'tensor' or 'channel' or 'block' is required"),
        (group(strategy="block"), "block_structure is None; a list of two sizes"),
        ({"quant_method": "hqq"}, r"is quantised \(hqq\); weights in bf16, fp16, fp32, FP8, MXFP4"),
        ({"quant_method": ["fp8"]}, r"is quantised \(\['fp8'\]\)"),
    ],
)
def test_what_would_change_the_numbers_is_refused(
    model: Callable[..., Path], config: dict[str, object], message: str
) -> None:
    folder = model("llama")
    values = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**values, "quantization_config": config}))
    with pytest.raises(ConversionError, match=message) as caught:
        open_model(folder)
    assert str(caught.value).count(";") >= 2, caught.value


def test_a_config_and_tensors_that_disagree_are_refused(model: Callable[..., Path], publish: Publish) -> None:
    folder = model("qwen3-moe", **SIZES["qwen3-moe"])
    plain = json.loads((folder / CONFIG_NAME).read_text())
    (folder / CONFIG_NAME).write_text(json.dumps({**plain, "quantization_config": PUBLISHED}))
    with pytest.raises(ConversionError, match=r"is said to be quantised \(FP8\) and holds no tensor of float8_e4m3fn"):
        open_model(folder)
    publish(folder, PUBLISHED, in_fp8(BLOCK))
    (folder / CONFIG_NAME).write_text(json.dumps(plain))
    with pytest.raises(CheckpointError, match=r"is of dtype F8_E4M3; one of F32, .* is required; convert"):
        open_model(folder)
