"""What a quantization_config of compressed-tensors says of its matrices: floats of 4 or 8 bits, or integers."""

from collections.abc import Mapping
from typing import Any

from moesaic.convert.block_floats import MXFP4, MXFP8, NVFP4, BlockFloatPacking
from moesaic.convert.fp8 import Fp8Packing, block_of
from moesaic.convert.integers import BytesPacking, Grouping, PackedPacking
from moesaic.convert.packing import Known, Packing, check_known
from moesaic.errors import ConversionError

_MIXED = "mixed-precision"  # each group of matrices says its own
_OF_BLOCKS = {"nvfp4-pack-quantized": NVFP4, "mxfp4-pack-quantized": MXFP4, "mxfp8-quantized": MXFP8}
_OF_ONE = ("float-quantized", "pack-quantized", "int-quantized", "naive-quantized", *_OF_BLOCKS)
_KEYS: Known = {
    "quant_method": None,
    "format": (*_OF_ONE, _MIXED),
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
    "observer": None,
    "observer_kwargs": None,
    "scale_dtype": None,
    "zp_dtype": None,
}
# Groups of columns that lie anywhere; all other orders are those of columns as they were rounded.
_BY_ACTIVATION = ("group", "dynamic")
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
    "actorder": (None, False, True, *_BY_ACTIVATION, "weight", "static"),
}


def read_compressed(given: Mapping[str, Any], where: str) -> tuple[Packing, ...]:
    """Return what a quantization_config of compressed-tensors says. Raises: ConversionError for what is not known."""
    check_known(given, _KEYS, f"{where}: quantization_config")
    groups = given.get("config_groups")
    found = [
        _packing_of(group, given["format"], f"{where}: config_groups.{name}")
        for name, group in (groups.items() if isinstance(groups, dict) else ())
    ]
    if not found:
        raise ConversionError(
            f"{where}: config_groups describes no matrices; how those that are quantised are is required; mend the "
            f"config, or remove quantization_config if none is."
        )
    return tuple(dict.fromkeys(found))


def _packing_of(group: object, layout: str, where: str) -> Packing:
    group = group if isinstance(group, dict) else {}
    if layout == _MIXED:
        check_known(group, {**_OF_GROUPS, "format": _OF_ONE}, where)
        layout = group["format"]
    else:
        check_known(group, {**_OF_GROUPS, "format": (None, layout)}, where)
    weights = group["weights"] if isinstance(group.get("weights"), dict) else {}
    if layout == "naive-quantized":  # a number each, of either kind
        layout = "float-quantized" if weights.get("type") == "float" else "int-quantized"
    if layout in _OF_BLOCKS:
        packing = _OF_BLOCKS[layout]
        check_known(weights, _block_float_keys(packing), f"{where}.weights")
        return packing
    if layout == "float-quantized":
        check_known(weights, _FLOAT_KEYS, f"{where}.weights")
        if weights["strategy"] == "block":
            return Fp8Packing(block_of(weights.get("block_structure"), f"{where}.weights.block_structure"))
        return Fp8Packing((1 if weights["strategy"] == "channel" else None, None))
    check_known(weights, _INTEGER_KEYS, f"{where}.weights")
    is_symmetric = weights.get("symmetric") is not False
    size = weights.get("group_size") if weights["strategy"] == "group" else None
    if weights["strategy"] == "group" and (type(size) is not int or size < 1):
        raise ConversionError(
            f"{where}.weights: group_size is {size!r}; a number of columns that share a scale is required; mend the "
            f"config."
        )
    grouping = Grouping((size,), weights.get("actorder") in (True, *_BY_ACTIVATION))
    if layout == "int-quantized":  # a byte each, of however many bits
        return BytesPacking(grouping, is_symmetric)
    return PackedPacking(weights["num_bits"], grouping, is_symmetric)


def _block_float_keys(packing: BlockFloatPacking) -> Known:
    return {
        **_OF_WEIGHTS,
        "num_bits": (packing.bits,),
        "type": ("float",),
        "symmetric": (None, True),
        "group_size": (packing.group_size,),
        "strategy": ("tensor_group",) if packing is NVFP4 else ("group",),
        "block_structure": (None,),
        "actorder": (None,),
    }
