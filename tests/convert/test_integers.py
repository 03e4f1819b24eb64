"""GPTQ, AWQ and compressed-tensors' integers are read as the bf16 nearest to what they stand for, in each layout."""

import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moesaic.checkpoint.stream import TensorLayout
from moesaic.convert import integers
from moesaic.convert.compressed import read_compressed
from moesaic.convert.fp8 import Fp8Packing
from moesaic.convert.importer import import_model
from moesaic.convert.integers import (
    BytesPacking,
    Grouping,
    PackedPacking,
    read_auto_round,
    read_awq,
    read_gptq,
    unpack,
)
from moesaic.convert.opened import open_model
from moesaic.convert.packing import PackedTensors, Packing
from moesaic.convert.source import CONFIG_NAME, WEIGHTS_NAME, HuggingFaceFolder
from moesaic.errors import ConversionError

pytestmark = pytest.mark.usefixtures("short_check")

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
GPTQ: dict[str, Any] = {
    "bits": 4, "checkpoint_format": "gptq", "damp_percent": 0.01, "desc_act": False, "group_size": 8, "lm_head": False,
    "model_file_base_name": None, "model_name_or_path": None, "quant_method": "gptq", "static_groups": False,
    "sym": True, "true_sequential": True, "meta": {"quantizer": ["gptqmodel:2.1.0"]},
}  # fmt: skip
AWQ: dict[str, Any] = {
    "backend": "autoawq", "bits": 4, "do_fuse": False, "exllama_config": None, "fuse_max_seq_len": None,
    "group_size": 8, "modules_to_fuse": None, "modules_to_not_convert": ["gate"], "quant_method": "awq",
    "version": "gemm", "zero_point": True,
}  # fmt: skip
PACKED: dict[str, Any] = {
    "config_groups": {
        "group_0": {
            "format": "pack-quantized",
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {"actorder": "weight", "block_structure": None, "dynamic": False, "group_size": 8,
                        "num_bits": 4, "observer": "mse", "observer_kwargs": {}, "strategy": "group",
                        "symmetric": True, "type": "int"},
        }
    },
    "format": "pack-quantized",
    "global_compression_ratio": None,
    "ignore": ["lm_head"],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
    "sparsity_config": {},
    "transform_config": {},
    "version": "0.12.3",
}  # fmt: skip


# As Intel/Qwen3-14B-int4-AutoRound-gptq-inc has it.
AUTOROUND: dict[str, Any] = {
    "act_bits": 16, "act_data_type": "int", "act_dynamic": True, "act_group_size": 128, "act_sym": True, "amp": True,
    "autoround_version": "0.5.1", "batch_size": 8, "bits": 4, "damp_percent": 0.01, "data_type": "int",
    "desc_act": False, "enable_minmax_tuning": True, "enable_norm_bias_tuning": False, "enable_quanted_input": True,
    "gradient_accumulate_steps": 1, "group_size": 8, "iters": 1000, "low_gpu_mem_usage": True, "lr": 0.001,
    "minmax_lr": 0.001, "nsamples": 512, "quant_method": "gptq", "scale_dtype": "torch.float16", "seqlen": 2048,
    "super_bits": None, "super_group_size": None, "sym": True, "to_quant_block_names": None, "true_sequential": False,
}  # fmt: skip


def packed_config(layout: str = "pack-quantized", **values: object) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(json.dumps(PACKED))
    config["format"] = config["config_groups"]["group_0"]["format"] = layout
    config["config_groups"]["group_0"]["weights"] |= values
    return config


def in_words(numbers: Tensor, bits: int, *, has_gaps: bool = False) -> Tensor:
    """Numbers (R, C) along each row, the lowest bits first, in int32 words; what is over is 0.

    has_gaps: no number lies in two words.
    """
    rows, in_word = [], 32 // bits
    for row in numbers.tolist():
        places = [32 * (at // in_word) + bits * (at % in_word) if has_gaps else bits * at for at in range(len(row))]
        whole = sum(number << place for number, place in zip(row, places, strict=True))
        words = -(-len(row) // in_word) if has_gaps else -(-len(row) * bits // 32)
        rows.append([(whole >> (32 * word)) & 0xFFFFFFFF for word in range(words)])
    words = torch.tensor(rows, dtype=torch.int64)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


class Integers:
    """Random integers of `bits` bits of a matrix (N, K), a zero and a scale for each row and group of columns."""

    def __init__(self, matrix: Tensor, bits: int, groups: Tensor, *, symmetric: bool, dtype: torch.dtype) -> None:
        rows, columns = matrix.shape
        self.bits, self.groups, self.symmetric = bits, groups, symmetric
        count = int(groups.max()) + 1
        generator = torch.Generator().manual_seed(rows * columns)
        self.values = torch.randint(1 << bits, (rows, columns), generator=generator)
        # At least 1: AutoGPTQ cannot write 0.
        self.zeros = torch.randint(1, 1 << bits, (rows, count), generator=generator)
        if symmetric:
            self.zeros.fill_(1 << (bits - 1))
        spread = float(matrix.abs().max()) / (1 << bits)
        self.scales = ((torch.rand(rows, count, generator=generator) + 0.5) * spread).to(dtype)

    def standing_for(self) -> Tensor:
        """The matrix, number by number."""
        rows, columns = self.values.shape
        out = torch.empty(rows, columns)
        for row in range(rows):
            for column in range(columns):
                group = self.groups[column]
                integer = float(self.values[row, column] - self.zeros[row, group])
                out[row, column] = integer * self.scales[row, group].float()
        return out.bfloat16()

    def as_gptq(self, *, version: int, with_groups: bool) -> dict[str, Tensor]:
        zeros = self.zeros.t() - (1 if version == 1 else 0)
        parts = {
            ".qweight": in_words(self.values, self.bits).t(),
            ".qzeros": in_words(zeros, self.bits),
            ".scales": self.scales.t(),
        }
        return parts | ({".g_idx": self.groups.int()} if with_groups else {})

    def as_awq(self) -> dict[str, Tensor]:
        def mixed(numbers: Tensor) -> Tensor:
            return in_words(numbers.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2), 4)

        return {".qweight": mixed(self.values.t()), ".qzeros": mixed(self.zeros.t()), ".scales": self.scales.t()}

    def as_packed(self, *, with_groups: bool = False, has_gaps: bool = False) -> dict[str, Tensor]:
        parts = {
            ".weight_packed": in_words(self.values, self.bits, has_gaps=has_gaps),
            ".weight_scale": self.scales,
            ".weight_shape": torch.tensor(self.values.shape),
        }
        if not self.symmetric:
            parts[".weight_zero_point"] = in_words(self.zeros.t(), self.bits, has_gaps=has_gaps).t()
        return parts | ({".weight_g_idx": self.groups.int()} if with_groups else {})

    def as_bytes(self) -> dict[str, Tensor]:
        middle = 1 << (self.bits - 1)
        parts = {".weight": (self.values - middle).to(torch.int8), ".weight_scale": self.scales}
        return parts if self.symmetric else parts | {".weight_zero_point": (self.zeros - middle).to(torch.int8)}


Make = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
Published = tuple[dict[str, Any], Make]
Publish = Callable[[Path, Mapping[str, Any], Make], dict[str, Tensor]]


def published(
    config: dict[str, Any], write: Callable[[Integers], dict[str, Tensor]], *, bits: int = 4, size: int | None = 8,
    symmetric: bool = True, dtype: torch.dtype = torch.float16, is_mixed: bool = False,
) -> Published:  # fmt: skip
    """Return a config, and what makes a matrix's parts and what they stand for. is_mixed: columns in any group."""

    def make(matrix: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        columns = matrix.shape[1]
        groups = torch.arange(columns) // (size or columns)
        if is_mixed:
            groups = groups[torch.randperm(columns, generator=torch.Generator().manual_seed(columns))]
        numbers = Integers(matrix, bits, groups, symmetric=symmetric, dtype=dtype)
        return {suffix: part.contiguous() for suffix, part in write(numbers).items()}, numbers.standing_for()

    return config, make


LAYOUTS: dict[str, Published] = {
    "gptq": published(GPTQ, lambda each: each.as_gptq(version=1, with_groups=True)),
    "gptq, groups of one size": published(GPTQ, lambda each: each.as_gptq(version=1, with_groups=False)),
    "gptq, no groups, 8 bits": published(
        GPTQ | {"bits": 8}, lambda each: each.as_gptq(version=1, with_groups=True), bits=8, size=None
    ),
    "gptq v2, asymmetric, by activation": published(
        GPTQ | {"checkpoint_format": "gptq_v2", "desc_act": True, "sym": False},
        lambda each: each.as_gptq(version=2, with_groups=True), symmetric=False, is_mixed=True,
    ),
    "gptq, asymmetric, 2 bits, bf16": published(
        GPTQ | {"bits": 2, "format": "gptq"}, lambda each: each.as_gptq(version=1, with_groups=True), bits=2,
        symmetric=False, dtype=torch.bfloat16,
    ),
    "auto-round": published(
        AUTOROUND | {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"},
        lambda each: each.as_gptq(version=1, with_groups=False),
    ),
    "awq, saved again": published(AWQ | {"backend": "marlin", "format": "gemm"}, lambda each: each.as_awq()),
    "awq": published(AWQ, lambda each: each.as_awq(), symmetric=False),
    "awq, no groups": published(AWQ | {"group_size": -1}, lambda each: each.as_awq(), size=None, symmetric=False),
    "packed": published(packed_config(), lambda each: each.as_packed(), dtype=torch.bfloat16),
    "packed, asymmetric": published(
        packed_config(symmetric=False), lambda each: each.as_packed(), symmetric=False, dtype=torch.bfloat16
    ),
    "packed, by activation": published(
        packed_config(actorder="group"), lambda each: each.as_packed(with_groups=True), is_mixed=True
    ),
    "packed, by rows, 8 bits": published(
        packed_config(strategy="channel", group_size=None, num_bits=8), lambda each: each.as_packed(), bits=8, size=None
    ),
    "packed, by rows, 3 bits, asymmetric": published(
        packed_config(num_bits=3, symmetric=False), lambda each: each.as_packed(), bits=3, symmetric=False
    ),
    "bytes": published(
        packed_config("int-quantized", strategy="channel", group_size=None, num_bits=8), lambda each: each.as_bytes(),
        bits=8, size=None, dtype=torch.bfloat16,
    ),
    "bytes, of 4 bits, by groups": published(packed_config("int-quantized"), lambda each: each.as_bytes()),
    "bytes, asymmetric": published(
        packed_config("int-quantized", strategy="channel", group_size=None, num_bits=8, symmetric=False),
        lambda each: each.as_bytes(), bits=8, size=None, symmetric=False, dtype=torch.float32,
    ),
}  # fmt: skip


@pytest.fixture
def model(saved: Callable[..., Path], tmp_path: Path) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 64, "mlp_only_layers": [0]}
    return shutil.copytree(saved("qwen3-moe", **sizes), tmp_path / "model")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 7, 8, 32, 45])
def test_numbers_follow_each_other_from_the_lowest_bits_on(bits: int, count: int) -> None:
    numbers = torch.randint(1 << bits, (3, count), generator=torch.Generator().manual_seed(count))
    words = in_words(numbers, bits)
    assert torch.equal(unpack(words, bits, count), numbers.to(torch.uint8))
    assert torch.equal(unpack(words.t().contiguous().t(), bits, count), numbers.to(torch.uint8))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_published_model_becomes_the_bf16_one(
    model: Path, publish: Publish, comes_in_as: Callable[..., None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole and out again; transformers, of the numbers that we unpack, is the judge of all else."""
    monkeypatch.setattr(integers, "_ROWS", 24)
    plain = publish(model, *LAYOUTS[name])
    comes_in_as(model, plain)


@pytest.mark.parametrize("name", ["gptq", "awq", "packed", "bytes"])
def test_a_config_that_says_nothing_of_it_is_named(model: Path, publish: Publish, name: str) -> None:
    """As some tools say it in a file of their own alone."""
    publish(model, *LAYOUTS[name])
    values = json.loads((model / CONFIG_NAME).read_text())
    del values["quantization_config"]
    (model / CONFIG_NAME).write_text(json.dumps(values))
    with pytest.raises(ConversionError, match=r"holds .*, a part of a quantised matrix, and its config.json does not"):
        open_model(model)


def test_an_older_name_of_the_key_is_read(model: Path, publish: Publish, tmp_path: Path) -> None:
    """As compressed-tensors wrote its configs in 2024."""
    publish(model, *LAYOUTS["bytes"])
    values = json.loads((model / CONFIG_NAME).read_text())
    values["compression_config"] = values.pop("quantization_config")
    (model / CONFIG_NAME).write_text(json.dumps(values))
    imported = import_model(model, tmp_path / "run")
    assert imported.failure is None and imported.judge == "transformers" and imported.not_compared is None


def test_biases_of_zeros_are_left_out(model: Path, publish: Publish, tmp_path: Path) -> None:
    """As AutoGPTQ gave every matrix one before 2024, and Qwen's own files have them."""
    plain = publish(model, *LAYOUTS["gptq"])
    tensors = load_file(model / WEIGHTS_NAME)
    biases = {
        name.removesuffix("qweight") + "bias": torch.zeros(part.shape[1], dtype=torch.float16)
        for name, part in tensors.items()
        if name.endswith(".qweight")
    }
    save_file(tensors | biases, model / WEIGHTS_NAME)
    imported = import_model(model, tmp_path / "run")
    assert imported.failure is None and imported.judge == "transformers" and imported.tensors is not None
    assert imported.tensors.left_out == dict.fromkeys(biases, "zeros that came with the quantised matrix")
    assert imported.tensors.used == len(plain)
    biases[f"{NAME}.bias"][3] = 1e-7
    save_file(tensors | biases, model / WEIGHTS_NAME)
    with pytest.raises(ConversionError, match=rf"not used by any part 1: {NAME}.bias"):
        open_model(model)
    # Beside a matrix that is none of the tool's it is a mistake whatever it holds.
    save_file(tensors | {"model.layers.0.mlp.gate.bias": torch.zeros(4)}, model / WEIGHTS_NAME)
    with pytest.raises(ConversionError, match=r"not used by any part 1: model.layers.0.mlp.gate.bias"):
        open_model(model)


def of_one(kinds: Sequence[Packing], parts: Mapping[str, Tensor]) -> Tensor:
    """What packings make of one matrix."""
    stored = {f"one{suffix}": part for suffix, part in parts.items()}
    layout = {name: TensorLayout(part.dtype, tuple(part.shape)) for name, part in stored.items()}
    packed = PackedTensors(kinds, layout, lambda name, index=None: stored[name], "here")
    (name, plain), *others = packed.layout.items()
    assert name == "one.weight" and not others
    found = packed.read(name)
    assert found.dtype is plain.dtype is torch.bfloat16 and found.shape == plain.shape
    assert torch.equal(packed.read(name, len(found) - 1), found[-1])
    return found


@pytest.mark.parametrize(("rows", "columns"), [(5, 64), (12, 96), (1030, 32)])
def test_sizes_that_fill_no_words(rows: int, columns: int) -> None:
    """Zeros of GPTQ lie along the rows, and so do compressed-tensors': the last word may not be full."""
    groups = torch.arange(columns) // 32
    for bits in (2, 3, 4, 8):
        for symmetric in (True, False):
            each = Integers(torch.ones(rows, columns), bits, groups, symmetric=symmetric, dtype=torch.float16)
            due = each.standing_for()
            for version in (1, 2):
                layout = f"gptq_v{version}".replace("_v1", "")
                config = GPTQ | {"bits": bits, "checkpoint_format": layout, "group_size": 32}
                for with_groups in (True, False):
                    parts = each.as_gptq(version=version, with_groups=with_groups)
                    assert torch.equal(of_one(read_gptq(config, "here"), parts), due)
            config = packed_config(num_bits=bits, group_size=32, symmetric=symmetric)
            assert torch.equal(of_one(read_compressed(config, "here"), each.as_packed()), due)
    if rows % 8 == 0:
        assert torch.equal(of_one(read_awq(AWQ | {"group_size": 32}, "here"), each.as_awq()), due)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_words_of_whole_numbers_are_read_as_older_versions_wrote_them(bits: int, symmetric: bool) -> None:
    """Before compressed-tensors 0.18 no number lay in two words. How many words there are says which it was."""
    for rows, columns, size in ((33, 64, 32), (5, 96, 32), (64, 200, None), (200, 128, 8), (4, 4, None)):
        groups = torch.arange(columns) // (size or columns)
        each = Integers(torch.ones(rows, columns), bits, groups, symmetric=symmetric, dtype=torch.bfloat16)
        strategy = {"strategy": "channel" if size is None else "group", "group_size": size, "symmetric": symmetric}
        packings = read_compressed(packed_config(num_bits=bits, **strategy), "here")
        for has_gaps in (True, False):
            assert torch.equal(of_one(packings, each.as_packed(has_gaps=has_gaps)), each.standing_for()), columns


def test_words_that_could_be_of_either_kind_are_refused() -> None:
    for bits, columns in ((3, 20), (5, 12), (6, 9), (7, 8)):
        groups = torch.zeros(columns).long()
        each = Integers(torch.ones(4, columns), bits, groups, symmetric=True, dtype=torch.float16)
        packings = read_compressed(packed_config(strategy="channel", group_size=None, num_bits=bits), "here")
        count = 32 // bits
        for has_gaps in (True, False):
            with pytest.raises(ConversionError, match=rf"K {bits} / 32 or K / {count}, whichever is not the other's"):
                of_one(packings, each.as_packed(has_gaps=has_gaps))


def test_what_autoround_says_of_its_making_changes_nothing() -> None:
    each = Integers(torch.ones(8, 64), 4, torch.arange(64) // 16, symmetric=True, dtype=torch.float16)
    parts = each.as_gptq(version=1, with_groups=True)
    assert torch.equal(of_one(read_gptq(AUTOROUND, "here"), parts), each.standing_for())
    config = AUTOROUND | {"quant_method": "awq", "version": "gemm", "zero_point": False, "provider": "auto-round"}
    config |= {"group_size": 16}
    assert torch.equal(of_one(read_awq(config, "here"), each.as_awq()), each.standing_for())
    for key in ("static_kv_dtype", "rotation_configs", "super_bits"):
        with pytest.raises(ConversionError, match=rf"{key} is 'x'; None is required"):
            read_gptq(AUTOROUND | {key: "x"}, "here")


def test_a_module_may_have_other_bits_and_groups_than_the_config_says() -> None:
    """As gptqmodel's `dynamic` has it: the tensors tell."""
    config = GPTQ | {"dynamic": {r"+:.*\.up_proj": {"bits": 3, "group_size": 16}, r"-:.*\.gate": {}}}
    for rows, bits in itertools.product((32, 33, 45, 96), (2, 3, 8)):
        each = Integers(torch.ones(rows, 64), bits, torch.arange(64) // 16, symmetric=True, dtype=torch.float16)
        for with_groups in (True, False):
            parts = each.as_gptq(version=1, with_groups=with_groups)
            assert torch.equal(of_one(read_gptq(config, "here"), parts), each.standing_for())


def as_published(each: Integers, size: int | None) -> list[tuple[tuple[Packing, ...], dict[str, Tensor]]]:
    """Every layout that may do without a tensor of groups, with what its config makes of it."""
    of_model, auto = {"group_size": -1 if size is None else size}, {"quant_method": "auto-round"}
    strategy = {"strategy": "channel" if size is None else "group", "group_size": size, "symmetric": False}
    gptq = each.as_gptq(version=1, with_groups=False)
    own = {"bits": 4, "group_size": 7, "packing_format": "auto_round:auto_gptq", "extra_config": {"x": of_model}}
    return [
        (read_gptq(GPTQ | of_model, "here"), gptq),
        (read_auto_round(auto | own, "here"), gptq),
        (read_awq(AWQ | of_model, "here"), each.as_awq()),
        (read_awq({**AWQ, "group_size": None, "q_group_size": of_model["group_size"]}, "here"), each.as_awq()),
        (read_compressed(packed_config("int-quantized", **strategy), "here"), each.as_bytes()),
    ]


@pytest.mark.parametrize(("columns", "size"), [(960, 128), (200, 64), (64, 128), (64, None)])
def test_groups_are_of_the_size_that_the_config_says(columns: int, size: int | None) -> None:
    """The last has what is left: 960 columns are 7 groups of 128 and one of 64, and not 8 of 120."""
    groups = torch.arange(columns) // (size or columns)
    each = Integers(torch.ones(8, columns), 4, groups, symmetric=False, dtype=torch.float16)
    for packings, parts in as_published(each, size):
        assert torch.equal(of_one(packings, parts), each.standing_for()), packings


def test_groups_that_were_lost_are_missed() -> None:
    """What is left would be groups of another size."""
    whole = Integers(torch.ones(8, 64), 4, torch.arange(64) // 8, symmetric=False, dtype=torch.float16)
    half = Integers(torch.ones(8, 64), 4, torch.arange(64) // 16, symmetric=False, dtype=torch.float16)
    for (packings, _), (_, parts) in zip(as_published(whole, 8), as_published(half, 16), strict=True):
        with pytest.raises(ConversionError, match=r"one: (qweight|weight) is int.*of 8( or all columns)?,|of 7 or 8,"):
            of_one(packings, parts)


def test_a_size_that_could_be_either_is_refused() -> None:
    """960 columns are 8 groups of 128 as well as of 120."""
    each = Integers(torch.ones(8, 960), 4, torch.arange(960) // 120, symmetric=True, dtype=torch.float16)
    config = GPTQ | {"group_size": 120, "dynamic": {"+:x": {"group_size": 128}}}
    with pytest.raises(ConversionError, match=r"scales is float16 \[8, 8\]; .* or groups of 120 or 128, are required"):
        of_one(read_gptq(config, "here"), each.as_gptq(version=1, with_groups=False))
    parts = each.as_gptq(version=1, with_groups=True)
    assert torch.equal(of_one(read_gptq(config, "here"), parts), each.standing_for())


def test_groups_by_activation_are_named_by_a_tensor() -> None:
    """Its columns were in another order when they were grouped."""
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    each = Integers(torch.ones(8, 64), 4, (torch.arange(64) // 8)[order], symmetric=True, dtype=torch.float16)
    gptq = read_gptq(GPTQ | {"desc_act": True}, "here")
    assert torch.equal(of_one(gptq, each.as_gptq(version=1, with_groups=True)), each.standing_for())
    with pytest.raises(ConversionError, match=r"and int32 g_idx \(K\) are required"):
        of_one(gptq, each.as_gptq(version=1, with_groups=False))
    named, silent = {".weight_g_idx": each.groups.int()}, {".weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    for order_name, layout in itertools.product((True, "group", "dynamic"), ("pack-quantized", "int-quantized")):
        packings = read_compressed(packed_config(layout, actorder=order_name), "here")
        parts = each.as_packed() if layout == "pack-quantized" else each.as_bytes()
        assert torch.equal(of_one(packings, parts | named), each.standing_for())
        with pytest.raises(ConversionError, match=r"weight_g_idx .K. where groups are by activation, are required"):
            of_one(packings, parts)
        with pytest.raises(ConversionError, match="one has 64 columns in 8 groups, and -1 for the group of each"):
            of_one(packings, parts | silent)
    # A group of all columns has them in any order.
    whole = Integers(torch.ones(8, 64), 4, torch.zeros(64).long(), symmetric=True, dtype=torch.float16)
    config = GPTQ | {"desc_act": True, "group_size": -1}
    parts = whole.as_gptq(version=1, with_groups=False)
    assert torch.equal(of_one(read_gptq(config, "here"), parts), whole.standing_for())


@pytest.mark.parametrize("size", [0, -2, 8.0, "8", True])
def test_sizes_of_groups_that_are_none_are_refused(size: object) -> None:
    for config in (GPTQ | {"group_size": size}, GPTQ | {"dynamic": {"+:x": {"group_size": size}}}):
        with pytest.raises(ConversionError, match=rf"says group_size {size!r}; a number of columns that share a scale"):
            read_gptq(config, "here")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_few_rows_and_columns_have_the_bits_that_the_config_says(bits: int) -> None:
    """Their words would hold numbers of other bits too."""
    for rows, columns in itertools.product((1, 5, 8, 31, 32), (8, 16, 32)):
        each = Integers(
            torch.ones(rows, columns), bits, torch.zeros(columns).long(), symmetric=True, dtype=torch.float16
        )
        parts = each.as_gptq(version=1, with_groups=True)
        assert torch.equal(of_one(read_gptq(GPTQ | {"bits": bits}, "here"), parts), each.standing_for())


def test_autoround_s_own_format_is_one_of_the_others() -> None:
    """What it calls auto_gptq has zeros less 1, what it calls gptqmodel, or nothing, has them as they are."""
    config = AUTOROUND | {"quant_method": "auto-round", "extra_config": {"lm_head": {"bits": 16}}}
    each = Integers(torch.ones(32, 64), 4, torch.arange(64) // 8, symmetric=False, dtype=torch.float16)
    for layout, version in (("auto_gptq", 1), ("gptqmodel", 2)):
        packing = read_auto_round(config | {"packing_format": f"auto_round:{layout}"}, "here")
        parts = each.as_gptq(version=version, with_groups=False)
        assert torch.equal(of_one(packing, parts), each.standing_for())
    assert packing == read_auto_round(config | {"packing_format": "auto_round"}, "here")
    packing = read_auto_round(config | {"packing_format": "auto_round:auto_awq"}, "here")
    assert torch.equal(of_one(packing, each.as_awq()), each.standing_for())
    with pytest.raises(ConversionError, match="packing_format is 'auto_round:fp8_static'; 'auto_round:auto_awq' or"):
        read_auto_round(config | {"packing_format": "auto_round:fp8_static"}, "here")


def test_naive_is_a_number_each() -> None:
    values = {"strategy": "channel", "group_size": None, "num_bits": 8}
    integers = BytesPacking(Grouping((None,)), is_symmetric=True)
    assert read_compressed(packed_config("naive-quantized", **values), "here") == (integers,)
    floats = packed_config("naive-quantized", **values, type="float", actorder=None)
    assert read_compressed(floats, "here") == (Fp8Packing((1, None)),)


@pytest.mark.parametrize("said", [{"quantization_status": "frozen"}, {"provider": "auto-round"}])
def test_what_compressed_tensors_says_of_its_making_changes_nothing(said: dict[str, Any]) -> None:
    assert read_compressed(packed_config() | said, "here") == read_compressed(packed_config(), "here")
    with pytest.raises(
        ConversionError, match="quantization_status is 'decompressed'; None or 'compressed' or 'frozen'"
    ):
        read_compressed(packed_config() | {"quantization_status": "decompressed"}, "here")
    with pytest.raises(ConversionError, match=r"moe_sparsity_config is \{'method': 'prune'\}; None is required"):
        read_compressed(packed_config() | {"moe_sparsity_config": {"method": "prune"}}, "here")


@pytest.mark.parametrize("shape", [(1,), ()])
def test_one_scale_for_a_matrix(shape: tuple[int, ...]) -> None:
    each = Integers(torch.ones(8, 64), 8, torch.zeros(64).long(), symmetric=True, dtype=torch.bfloat16)
    each.scales[:] = each.scales[0]
    for layout, parts in (("int-quantized", each.as_bytes()), ("pack-quantized", each.as_packed())):
        config = packed_config(layout, strategy="tensor", group_size=None, num_bits=8)
        parts |= {".weight_scale": each.scales[0].reshape(shape)}
        assert torch.equal(of_one(read_compressed(config, "here"), parts), each.standing_for())


def test_groups_that_are_all_minus_one_say_nothing() -> None:
    each = Integers(torch.ones(8, 64), 4, torch.arange(64) // 8, symmetric=True, dtype=torch.bfloat16)
    parts = each.as_packed() | {".weight_g_idx": torch.full((64,), -1, dtype=torch.int32)}
    assert torch.equal(of_one(read_compressed(packed_config(), "here"), parts), each.standing_for())


NAME = "model.layers.1.mlp.experts.3.down_proj"
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
        ("gptq", without(".qzeros"), rf"{NAME}: qweight is int32 \[8, 32\], scales is float16 \[8, 32\], g_idx"),
        ("gptq", without(".scales"), r"qzeros is int32 \[8, 4\], g_idx is int32 \[64\]; int32 qweight"),
        ("gptq", with_part(".scales", lambda part: part[:4]), r"scales is float16 \[4, 32\]"),
        ("gptq", with_part(".scales", lambda part: part.int()), r"scales is int32 \[8, 32\]"),
        ("gptq", with_part(".qzeros", lambda part: part[:, :2]), r"qzeros is int32 \[8, 2\]"),
        ("gptq", with_part(".qweight", lambda part: part[:7]), r"qweight is int32 \[7, 32\]"),
        ("gptq", with_part(".qweight", lambda part: part.flatten()), r"qweight is int32 \[256\]"),
        ("gptq", with_part(".g_idx", lambda part: part[:0]), r"g_idx is int32 \[0\]"),
        ("gptq", with_part(".g_idx", lambda part: part.long()), r"g_idx is int64 \[64\]"),
        ("gptq", with_part(".g_idx", lambda part: part + 1), rf"{NAME} has columns of groups 1 to 8; .*, 0 to 7, are"),
        ("gptq", with_part(".g_idx", lambda part: part - 1), r"has columns of groups -1 to 6"),
        ("gptq", with_part(".qzeros", lambda part: part | 0xF), rf"{NAME} has a zero point written as 15, which some"),
        ("gptq", with_part(".scales", lambda part: part * torch.inf), "holds numbers that are not finite"),
        ("gptq", lambda tensors: tensors.update({f"{NAME}.weight": torch.ones(32, 64)}), rf"{NAME}: qweight is"),
        ("gptq, groups of one size", with_part(".scales", lambda part: part[:5]), r"scales is float16 \[5, 32\]"),
        ("awq", with_part(".qweight", lambda part: part[:, :3]), r"qweight is int32 \[64, 3\]"),
        ("awq", with_part(".qweight", lambda part: part[:56]), r"qweight is int32 \[56, 4\]"),
        ("awq", without(".qzeros"), r"qweight is int32 \[64, 4\], scales is float16 \[8, 32\]; int32 qweight \(K, N"),
        ("packed", without(".weight_shape"), r"weight_packed is int32 \[32, 8\], weight_scale is bfloat16 \[32, 8\]; "),
        (
            "packed",
            with_part(".weight_shape", lambda part: part * 2),
            r"shape is int64 \[2\] \(\[64, 128\]\); weight_",
        ),
        ("packed", with_part(".weight_shape", lambda part: part[:1]), r"weight_shape is int64 \[1\]"),
        ("packed", with_part(".weight_scale", lambda part: part[:, :7]), r"weight_scale is bfloat16 \[32, 7\]"),
        ("packed", with_part(".weight_scale", lambda part: part[:7]), r"weight_scale is bfloat16 \[7, 8\]"),
        ("packed, asymmetric", without(".weight_zero_point"), r"weight_shape is int64 \[2\] \(\[32, 64\]\); weight_"),
        (
            "packed, asymmetric",
            with_part(".weight_zero_point", lambda part: part[:3]),
            r"weight_zero_point is int32 \[3, 8\]",
        ),
        (
            "packed, by activation",
            with_part(".weight_g_idx", lambda part: part[:3]),
            r"weight_g_idx is int32 \[3\], weight_shape",
        ),
        ("bytes", without(".weight_scale"), r"weight is int8 \[32, 64\]; int8 weight \(N, K\)"),
        ("bytes, asymmetric", without(".weight_zero_point"), r"weight is int8 \[32, 64\], weight_scale is float32"),
        ("bytes", lambda tensors: tensors.update({f"{NAME}.weight_zero_point": torch.ones(32, 1)}), r"is float32 \[32"),
    ],
)
def test_what_does_not_fit_is_refused(
    model: Path,
    publish: Publish,
    refuses: Callable[..., None],
    layout: str,
    change: Callable[[Tensors], None],
    message: str,
) -> None:
    publish(model, *LAYOUTS[layout])
    refuses(model, change, message)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTQ | {"bits": 5}, "bits is 5; 2 or 3 or 4 or 8 is required"),
        (GPTQ | {"bits": 4.0}, "bits is 4.0; 2 or 3 or 4 or 8 is required"),
        ({"quant_method": "gptq"}, "bits is None; 2 or 3"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'; None or 'gptq' or 'gptq_v2' is"),
        (GPTQ | {"format": "gptq_v2"}, "says checkpoint_format gptq and format gptq_v2, whose zero points differ by 1"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format is True"),
        (GPTQ | {"rotation": "hadamard"}, "rotation is 'hadamard'; None is required"),
        (GPTQ | {"pack_dtype": "int16"}, "pack_dtype is 'int16'"),
        (GPTQ | {"sparse": 1}, "has keys that are not understood: sparse; "),
        (AWQ | {"bits": 8}, "bits is 8; None or 4 is required"),
        (AWQ | {"version": "gemv"}, "version is 'gemv'; None or 'gemm' or 'GEMM' is required"),
        (AWQ | {"backend": "llm-awq"}, "backend is 'llm-awq'; None or 'autoawq' or .* is required"),
        (AWQ | {"backend": "gemv"}, "backend is 'gemv'"),
        (packed_config() | {"format": "int-quantized"}, "group_0: format is 'pack-quantized'; None or 'int-quantized'"),
        (packed_config(num_bits=16), "weights: num_bits is 16; 2 or 3 or 4 or 5 or 6 or 7 or 8 is required"),
        (packed_config(num_bits=4.0), "weights: num_bits is 4.0; 2 or 3 or 4"),
        (packed_config(symmetric=0), "weights: symmetric is 0; None or True or False is required"),
        (packed_config(type="float"), "weights: type is 'float'; 'int' is required"),
        (packed_config(strategy="block"), "strategy is 'block'; 'tensor' or 'channel' or 'group' is required"),
        (packed_config(group_size=None), "weights: group_size is None; a number of columns"),
        (packed_config(group_size=0), "weights: group_size is 0; a number of columns"),
        (packed_config(dynamic=True), "weights: dynamic is True"),
        (packed_config("int-quantized", num_bits=9), "weights: num_bits is 9; 2 or 3 or 4"),
        (packed_config("mxfp6-pack-quantized"), "format is 'mxfp6-pack-quantized'; 'float-quantized' or 'pack-quant"),
    ],
)
def test_what_would_change_the_numbers_is_refused(model: Path, config: dict[str, Any], message: str) -> None:
    values = json.loads((model / CONFIG_NAME).read_text())
    (model / CONFIG_NAME).write_text(json.dumps({**values, "quantization_config": config}))
    with pytest.raises(ConversionError, match=message) as caught:
        open_model(model)
    assert str(caught.value).count(";") >= 2, caught.value


def two_groups(**of_second: object) -> dict[str, Any]:
    config = packed_config()
    second = json.loads(json.dumps(config["config_groups"]["group_0"]))
    second["weights"] |= of_second
    config["config_groups"]["group_1"] = second
    return config


def test_matrices_may_have_other_bits_and_groups_than_others(
    model: Path, publish: Publish, comes_in_as: Callable[..., None]
) -> None:
    """What each one has, its parts tell."""
    config = two_groups(strategy="channel", group_size=None, num_bits=8)
    four, eight = LAYOUTS["packed"][1], LAYOUTS["packed, by rows, 8 bits"][1]
    plain = publish(model, config, lambda matrix: (eight if matrix.shape == (32, 64) else four)(matrix))
    with open_model(model) as opened:
        assert isinstance(opened.source, HuggingFaceFolder) and opened.source.is_packed(f"{NAME}.weight")
    comes_in_as(model, plain)


def test_a_matrix_that_two_groups_read_otherwise_is_refused() -> None:
    """Eight numbers, of whatever bits, take a word."""
    each = Integers(torch.ones(4, 8), 4, torch.zeros(8).long(), symmetric=True, dtype=torch.float16)
    kinds = [PackedPacking(bits, Grouping((8,)), is_symmetric=True) for bits in (2, 4)]
    with pytest.raises(ConversionError, match=r"one.weight could be packed in 2 of the ways that the config names"):
        of_one(kinds, each.as_packed())
    assert torch.equal(of_one([kinds[1], kinds[1]], each.as_packed()), each.standing_for())


def test_scales_of_activations_are_left_out(model: Path, publish: Publish) -> None:
    """As W8A8 with static activations has them."""
    plain = publish(model, *LAYOUTS["bytes"])
    tensors = load_file(model / WEIGHTS_NAME)
    scales = {
        name.replace("weight_scale", kind): torch.tensor([3])
        for name in tensors
        for kind in ("input_scale", "input_zero_point")
        if name.endswith("_scale")
    }
    save_file(tensors | scales, model / WEIGHTS_NAME)
    with open_model(model) as opened:
        assert opened.left_out == dict.fromkeys(scales, "of quantised activations, and these are read as bf16")
        assert opened.source.layout.keys() == plain.keys() | scales.keys()
    save_file(tensors | {"model.layers.0.mlp.gate.input_scale": torch.tensor([3])}, model / WEIGHTS_NAME)
    with pytest.raises(ConversionError, match=r"not used by any part 1: model.layers.0.mlp.gate.input_scale"):
        open_model(model)


@pytest.mark.parametrize("name", ["gptq", "awq", "packed", "bytes"])
def test_a_config_and_tensors_that_disagree_are_refused(model: Path, name: str) -> None:
    plain = json.loads((model / CONFIG_NAME).read_text())
    (model / CONFIG_NAME).write_text(json.dumps({**plain, "quantization_config": LAYOUTS[name][0]}))
    with pytest.raises(ConversionError, match=r"is said to be quantised \(.*\) and holds no \w+ of int(32|8); both or"):
        open_model(model)
