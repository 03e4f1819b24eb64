"""What a quantization_config of compressed-tensors says of its matrices: FP8, or integers in words or bytes."""

from collections.abc import Mapping
from typing import Any

from moesaic.convert.fp8 import Fp8Packing, block_of
from moesaic.convert.integers import BytesPacking, PackedPacking
from moesaic.convert.packing import Known, Packing, check_known
from moesaic.errors import ConversionError

_FORMATS = ("float-quantized", "pack-quantized", "int-quantized", "naive-quantized")
_KEYS: Known = {
    "quant_method": None,
    "format": _FORMATS,
    "quantization_status": (None, "compressed", "frozen"),  # older files say the latter, and are compressed too
    "config_groups": None,
    "ignore": None,
    "kv_cache_scheme": None,
    "sparsity_config": (None, {}),
    "transform_config": (None, {}),
    "global_compression_ratio": None,
    "version": None,
    "provider": None,
    "moe_sparsity_config": (None,),
}
_OF_GROUPS: Known = {"targets": None, "weights": None, "input_activations": None, "output_activations": None}
_OF_WEIGHTS: Known = {
    "dynamic": (None, False),
    "actorder": None,  # of columns in groups of their own, weight_g_idx tells
    "observer": None,
    "observer_kwargs": None,
    "scale_dtype": None,
    "zp_dtype": None,
}
_FLOAT_KEYS: Known = {
    **_OF_WEIGHTS,
    "num_bits": (8,),
    "type": ("float",),
    "symmetric": (None, True),
    "group_size": (None,),
    "strategy": ("tensor", "channel", "block"),
    "block_structure": None,
    "actorder": (None,),
}
_INTEGER_KEYS: Known = {
    **_OF_WEIGHTS,
    "num_bits": tuple(range(2, 9)),
    "type": ("int",),
    "symmetric": (None, True, False),
    "group_size": None,
    "strategy": ("tensor", "channel", "group"),
    "block_structure": (None,),
}
_BYTE_KEYS: Known = {**_INTEGER_KEYS, "num_bits": (8,)}


def read_compressed(given: Mapping[str, Any], where: str) -> Packing:
    """Return what a quantization_config of compressed-tensors says. Raises: ConversionError for what is not known."""
    check_known(given, _KEYS, f"{where}: quantization_config")
    groups = given.get("config_groups")
    found = [
        _packing_of(group, given["format"], f"{where}: config_groups.{name}")
        for name, group in (groups.items() if isinstance(groups, dict) else ())
    ]
    if not found or any(each != found[0] for each in found):
        raise ConversionError(
            f"{where}: config_groups describes {len(found)} kinds of scales; one, for all matrices, is required; take "
            f"the model as it was before it was quantised."
        )
    return found[0]


def _packing_of(group: object, layout: str, where: str) -> Packing:
    group = group if isinstance(group, dict) else {}
    check_known(group, {**_OF_GROUPS, "format": (None, layout)}, where)
    weights = group["weights"] if isinstance(group.get("weights"), dict) else {}
    if layout == "naive-quantized":  # a number each, of either kind
        layout = "float-quantized" if weights.get("type") == "float" else "int-quantized"
    if layout == "float-quantized":
        check_known(weights, _FLOAT_KEYS, f"{where}.weights")
        if weights["strategy"] == "block":
            return Fp8Packing(block_of(weights.get("block_structure"), f"{where}.weights.block_structure"))
        return Fp8Packing((1 if weights["strategy"] == "channel" else None, None))
    is_symmetric = weights.get("symmetric") is not False
    if layout == "int-quantized":
        check_known(weights, _BYTE_KEYS, f"{where}.weights")
        return BytesPacking(is_symmetric)
    check_known(weights, _INTEGER_KEYS, f"{where}.weights")
    size = weights.get("group_size") if weights["strategy"] == "group" else None
    if weights["strategy"] == "group" and (type(size) is not int or size < 1):
        raise ConversionError(
            f"{where}.weights: group_size is {size!r}; a number of columns that share a scale is required; mend the "
            f"config."
        )
    return PackedPacking(weights["num_bits"], size, is_symmetric)
