"""What NVIDIA's ModelOpt says of a model that it quantised: in NVFP4, FP8 or MX formats, which its tensors tell."""

from collections.abc import Mapping
from typing import Any

import torch

from moesaic.convert.block_floats import MXFP4, MXFP8, NVFP4, BlockFloatPacking
from moesaic.convert.fp8 import Fp8Packing
from moesaic.convert.packing import Known, Packing, check_known
from moesaic.errors import ConversionError

# A matrix has one scale, one for each row, or one for each block of this size.
_BLOCK = (128, 128)
_KINDS: tuple[Packing, ...] = (
    NVFP4, BlockFloatPacking("NVFP4", 4, 32, torch.float8_e4m3fn), MXFP4, MXFP8,
    Fp8Packing((None, None)), Fp8Packing((1, None)), Fp8Packing(_BLOCK),
)  # fmt: skip
_ALGORITHMS = (
    "NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8", "MXFP4", "W4A8_MXFP4_FP8", "MXFP8", "FP8", "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_WO", "fp8_pb_wo", "MIXED_PRECISION",
)  # fmt: skip
_KEYS: Known = {
    "quant_method": None,
    "quant_algo": _ALGORITHMS,
    "config_groups": None,
    "group_size": None,
    "quantized_layers": None,
    "ignore": None,
    "exclude_modules": None,
    "kv_cache_scheme": None,
    "kv_cache_quant_algo": None,
    "producer": None,
    "has_zero_point": (None, False),
    "pre_quant_scale": (None, False),
}


def read_modelopt(given: Mapping[str, Any], where: str) -> tuple[Packing, ...]:
    """Return what a quantization_config of ModelOpt says. Raises: ConversionError for what is not known."""
    check_known(given, _KEYS, f"{where}: quantization_config")
    return _KINDS


def of_its_own_file(given: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return as a quantization_config what hf_quant_config.json says, beside a config.json that says nothing.

    Raises: ConversionError where it says nothing either.
    """
    said = given.get("quantization")
    if not isinstance(said, dict):
        raise ConversionError(
            f"{where} has no object `quantization`; what ModelOpt writes there is required; fetch it again, or remove "
            f"it if the model is not quantised."
        )
    return {**said, "quant_method": "modelopt"}
