"""The kernels in Triton compiled for GPUs that are not there: to machine code, with their registers and shared memory.

As they are launched for a decode step and for a prompt; `make triton` runs it. It holds that they compile, fit into a
multiprocessor and keep what they compute in registers.
"""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moesaic.kernels.panels import PackedFormat
from moesaic.kernels.triton import activations, attention, products, rows

CPU = torch.device("cpu")
# Compute capability, and the shared memory that one program may have: A100, consumer cards of Ada, H100, B200.
GPUS = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Sizes and strides of real models are multiples of 16, which triton is told at a launch too.
EVEN = {"columns", "out_columns", "query_stride", "key_stride", "value_stride", "dim"}


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], gpu: int, folder: Path, **options: Any
) -> tuple[int, int, str]:
    """Return shared memory (bytes), bytes of registers that went to memory, and the instructions."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in constants and (types[name].startswith("*") or name in EVEN)
    }
    values = {(names.index(name),): value for name, value in constants.items()}
    built = triton.compile(
        ASTSource(kernel, signature, values, aligned), target=GPUTarget("cuda", gpu, 32), options=options
    )
    binary = folder / "kernel.cubin"
    binary.write_bytes(built.asm["cubin"])
    usage = subprocess.run(
        [str(CUOBJDUMP), "-res-usage", str(binary)], capture_output=True, text=True, check=True
    ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    return built.metadata.shared, int(found[2]), built.asm["ptx"]


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    from moesaic.kernels.triton import launch

    monkeypatch.setattr(launch, "_SHARED_BYTES", GPUS[request.param])
    launch.shared_bytes.cache_clear()
    return int(request.param)


@pytest.mark.parametrize(("each", "is_gated"), [(1, True), (128, True), (128, False)])
@pytest.mark.parametrize(
    ("format", "group"), [("bf16", None), ("int8", None), ("int4", 32), ("int4", 128), ("mxfp4", 32)]
)
def test_experts(format: PackedFormat, group: int | None, is_gated: bool, each: int, gpu: int, tmp_path: Path) -> None:
    """64 experts of 768 and 2048, as Qwen3-MoE has them; each: rows of an expert."""
    out_columns, columns = (768, 2048) if is_gated else (2048, 768)
    tiling = products._Tiling.of(
        format, group, 64 * each, 64, out_columns, columns, gated=is_gated, is_routed=True, device=CPU
    )
    numbers = {"bf16": "*bf16", "int8": "*i8"}
    types = {
        "x_ptr": numbers["bf16" if format == "bf16" else "int8"], "x_scales_ptr": "*fp32",
        "w_ptr": numbers.get(format, "*u8"), "w_scales_ptr": "*u8" if format == "mxfp4" else "*fp32",
        "steps_ptr": "*i8", "bias_ptr": "*fp32", "routes_ptr": "*i64", "starts_ptr": "*i32",
        "out_ptr": "*bf16" if is_gated else "*fp32",
        **dict.fromkeys(("num_rows", "columns", "out_columns", "num_experts", "routes_per_row"), "i32"),
    }  # fmt: skip
    constants: dict[str, Any] = {
        "FORMAT": format, "GROUP": group or 0, "ACTIVATION": "swiglu" if is_gated else None, "IS_GATED": is_gated,
        "HAS_BIAS": False, "IS_ROUTED": True, "EXPERTS": 64, "IS_EVEN": True, "BLOCK_M": tiling.rows,
        "BLOCK_N": tiling.columns, "BLOCK_K": tiling.depth, "bias_ptr": None,
    }  # fmt: skip
    if format == "bf16":
        constants |= {"x_scales_ptr": None, "w_scales_ptr": None}
    if format != "int4":
        constants |= {"steps_ptr": None}
    shared, spilled, ptx = compiled(
        products._product_kernel, types, constants, gpu, tmp_path, num_warps=tiling.warps, num_stages=tiling.stages,
        enable_fp_fusion=False,
    )  # fmt: skip
    assert shared <= GPUS[gpu] and spilled <= 256, (shared, spilled)
    kinds = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
    kind = kinds[gpu] if tiling.rows >= 64 and (gpu != 100 or tiling.rows >= 128) else "mma"
    multiplied = "(bf16|::f16)" if format == "bf16" else "(s8|::i8)"
    assert re.search(rf"{re.escape(kind)}.*{multiplied}", ptx), kind
    # Weights are on their way while others are multiplied.
    assert tiling.stages >= 2 and "cp.async" in ptx


ATTENTIONS = {
    # dim, int8, latent, extra, queries
    "decode": (128, False, False, 16, "*bf16"),
    "prompt, int8": (128, True, False, 16, "*bf16"),
    "latent": (512, False, True, 64, "*bf16"),
    "prompt, fp32": (128, False, False, 16, "*fp32"),
    "latent, fp32": (512, False, True, 64, "*fp32"),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention(name: str, gpu: int, tmp_path: Path) -> None:
    dim, is_int8, is_latent, extra, queries = ATTENTIONS[name]
    dtype = torch.float32 if queries == "*fp32" else torch.bfloat16
    block_m = 16 if name == "decode" else attention.largest_tile(dim, dtype)
    tiling = attention.Tiling.of(block_m, dim, dtype, CPU)
    cache = "*i8" if is_int8 else queries
    types = {
        **dict.fromkeys(("query_ptr", "out_ptr"), queries), **dict.fromkeys(("keys_ptr", "values_ptr"), cache),
        **dict.fromkeys(("key_scales_ptr", "value_scales_ptr", "sinks_ptr", "part_ptr", "part_sums_ptr"), "*fp32"),
        **dict.fromkeys(("work_ptr", "tables_ptr"), "*i32"), "scale": "fp32",
        **dict.fromkeys(
            ("query_stride", "kv_heads", "group", "dim", "extra", "table_width", "block_size", "window"), "i32"
        ),
    }  # fmt: skip
    constants: dict[str, Any] = {
        "HAS_SCALES": is_int8, "HAS_SINKS": True, "HAS_WINDOW": True, "IS_LATENT": is_latent, "BLOCK_M": block_m,
        "BLOCK_N": tiling.positions, "DIM": dim, "EXTRA": extra,
    }  # fmt: skip
    if not is_int8:
        constants |= {"key_scales_ptr": None, "value_scales_ptr": None}
    if is_latent:
        constants |= {"values_ptr": None}
    shared, spilled, _ = compiled(
        attention._attention_kernel, types, constants, gpu, tmp_path, enable_fp_fusion=True, num_stages=tiling.stages,
        num_warps=tiling.warps,
    )  # fmt: skip
    assert shared <= GPUS[gpu] and spilled <= 256, (shared, spilled)


def test_rows(gpu: int, tmp_path: Path) -> None:
    kernels: list[tuple[Any, dict[str, str], dict[str, Any]]] = [
        (
            rows._norm_kernel,
            {
                **dict.fromkeys(("x_ptr", "out_ptr"), "*bf16"), **dict.fromkeys(("weight_ptr", "bias_ptr"), "*fp32"),
                "stride": "i32", "columns": "i32", "epsilon": "fp32",
            },
            {"IS_LAYER_NORM": True, "BLOCK": 2048},
        ),
        (
            rows._choose_kernel,
            {
                **dict.fromkeys(("logits_ptr", "bias_ptr", "correction_ptr", "factor_ptr", "weights_ptr"), "*fp32"),
                "ids_ptr": "*i64", "num_experts": "i32", "top_k": "i32", "factor": "fp32",
            },
            {"IS_SIGMOID": True, "RENORMALIZES": True, "EXPERTS": 256, "ROUTES": 8},
        ),
        (
            rows._rotate_kernel,
            {
                **dict.fromkeys(("x_ptr", "out_ptr"), "*bf16"), **dict.fromkeys(("cosines_ptr", "sines_ptr"), "*fp32"),
                **dict.fromkeys(("token_stride", "head_stride", "length", "heads", "half"), "i32"),
            },
            {"BLOCK": 32},
        ),
        (
            rows._place_kernel,
            {
                **dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "out_ptr"), "*bf16"),
                **dict.fromkeys(("query_norm_ptr", "key_norm_ptr", "cosines_ptr", "sines_ptr"), "*fp32"),
                **dict.fromkeys(("key_scales_ptr", "value_scales_ptr"), "*fp32"), "slots_ptr": "*i64",
                **dict.fromkeys(("keys_ptr", "values_ptr"), "*i8"), "epsilon": "fp32",
                **dict.fromkeys(("query_stride", "key_stride", "value_stride", "heads", "kv_heads", "dim"), "i32"),
            },
            {"IS_ROTATED": True, "NORMS_ROTATED": False, "HAS_SCALES": True, "DIM": 128},
        ),
    ]  # fmt: skip
    for kernel, types, constants in kernels:
        shared, spilled, _ = compiled(kernel, types, constants, gpu, tmp_path, num_warps=4, enable_fp_fusion=True)
        assert shared <= GPUS[gpu] and spilled == 0, kernel


def test_the_others(gpu: int, tmp_path: Path) -> None:
    shared, spilled, _ = compiled(
        activations._rotate_and_round_kernel,
        {"x_ptr": "*bf16", "values_ptr": "*i8", "scales_ptr": "*fp32", "columns": "i32"},
        {"PADDED": 2048, "STEPS": 11, "ROUNDS": True, "EVEN_FIRST": True},
        gpu, tmp_path, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    assert shared <= GPUS[gpu] and spilled == 0
    pointers = ("y_ptr", "weights_ptr", "residual_ptr", "residual_weights_ptr")
    shared, spilled, _ = compiled(
        products._combine_kernel,
        {
            **dict.fromkeys(pointers, "*fp32"), "ids_ptr": "*i64", "out_ptr": "*bf16",
            **dict.fromkeys(("columns", "num_experts", "top_k"), "i32"),
        },
        {"ROUTES": 8, "HAS_RESIDUAL": True, "HAS_RESIDUAL_WEIGHTS": True, "BLOCK": 1024},
        gpu, tmp_path, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    assert shared <= GPUS[gpu] and spilled == 0
