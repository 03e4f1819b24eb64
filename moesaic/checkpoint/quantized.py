"""How a checkpoint says that it is quantised, and how a quantised matrix is named in it.

A matrix NAME is stored as NAME.values and NAME.scales, and int4 as NAME.steps too (kernels/quantized.py says what these
hold); the manifest's metadata has `quantization`, with the format of the integers, and the bits and the group size of
every such matrix. All other tensors are as ever.
"""

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesaic.checkpoint.store import CheckpointInfo
from moesaic.errors import CheckpointError, MoesaicError

if TYPE_CHECKING:
    from torch import Tensor

    from moesaic.kernels.quantized import QuantizedWeight

KEY = "quantization"
# Of what the integers stand for. 1, without a word in the manifest: the matrix as it is; 2: rotated; 3: int4 has steps.
FORMAT = 3
VALUES, STEPS, SCALES = ".values", ".steps", ".scales"


@dataclass(frozen=True)
class Scheme:
    """How a matrix is quantised: 8 bits with one scale a row, 4 bits with a step for group_size columns, or MXFP4."""

    bits: int
    group_size: int | None
    is_mxfp4: bool = False  # 4 bits by 32

    @property
    def has_steps(self) -> bool:
        return self.bits == 4 and not self.is_mxfp4

    @property
    def name(self) -> str:
        if self.is_mxfp4:
            return "mxfp4"
        return f"int{self.bits}" if self.group_size is None else f"int{self.bits} by {self.group_size}"


def is_quantized(info: CheckpointInfo) -> bool:
    """Whether the checkpoint holds quantised matrices, and so can infer and not train."""
    return KEY in info.metadata


def describe_quantization(info: CheckpointInfo) -> str:
    """Return for example "experts int4, rest int8"; only for a quantised checkpoint."""
    record = info.metadata[KEY]
    if not isinstance(record, dict) or not {"experts", "rest"} <= record.keys():
        raise _unsaid(info, record)
    return f"experts {record['experts']}, rest {record['rest']}" if record["experts"] else str(record["rest"])


def require_unquantized(
    info: CheckpointInfo,
    why: str,
    *,
    named: str | None = None,
    do: str = "give",
    error: type[MoesaicError] = CheckpointError,
) -> None:
    """Raise an error for a quantised checkpoint where the weights are needed as they were before.

    named: what the message calls it, where that is not its folder; do: what to do with the run that it was made from.
    """
    if is_quantized(info):
        raise error(
            f"{named or info.path} is quantised ({describe_quantization(info)}); {why}; {do} the run that it was made "
            f"from ({info.metadata[KEY].get('source')})."
        )


def quantization_record(schemes: dict[str, Scheme], *, experts: str | None, rest: str) -> dict[str, Any]:
    """Return what the manifest's metadata says under KEY; experts None: the model has none."""
    matrices: dict[str, dict[str, Any]] = {}
    for name, each in schemes.items():
        matrices[name] = {"bits": each.bits, "group_size": each.group_size}
        if each.is_mxfp4:
            matrices[name]["is_mxfp4"] = True
    return {"format": FORMAT, "experts": experts, "rest": rest, "matrices": matrices}


def quantization_schemes(info: CheckpointInfo) -> dict[str, Scheme]:
    """Return how each quantised matrix of a checkpoint is stored; none for one that is not quantised.

    Raises: CheckpointError for a manifest that does not say it, and for integers of another format.
    """
    from moesaic.kernels.quantized import GROUP_SIZES

    _check_format(info)
    try:
        matrices = info.metadata.get(KEY, {}).get("matrices", {})
        schemes = {
            name: Scheme(int(each["bits"]), each["group_size"], each.get("is_mxfp4", False))
            for name, each in matrices.items()
        }
        for group_size in (each.group_size for each in schemes.values() if each.group_size is not None):
            if type(group_size) is not int or group_size not in GROUP_SIZES:
                raise ValueError(f"group_size {group_size!r}")
        return schemes
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise _unsaid(info, error) from None


def _unsaid(info: CheckpointInfo, found: object) -> CheckpointError:
    return CheckpointError(
        f"{info.path} does not say how its matrices are quantised ({found!r}); bits and group_size of each are "
        f"required; quantise the run again."
    )


def take_quantized(tensors: "dict[str, Tensor]", info: CheckpointInfo) -> "dict[str, QuantizedWeight]":
    """Take the quantised matrices out of a checkpoint's tensors and return them by the name of the whole matrix.

    Raises: CheckpointError when the tensors are not as the manifest says, or of another format, and for scales that no
    matrix has.
    """
    from moesaic.kernels.quantized import MAX_STEP, QuantizedWeight

    weights = {}
    for name, scheme in quantization_schemes(info).items():
        try:
            values, scales = tensors.pop(name + VALUES), tensors.pop(name + SCALES)
            steps = tensors.pop(name + STEPS) if scheme.has_steps else None
            weights[name] = QuantizedWeight(values, scales, scheme.bits, scheme.group_size, steps)
            assert weights[name].is_mxfp4 == scheme.is_mxfp4, scales.dtype
            assert name not in tensors, f"{name} beside its integers"
            if steps is not None and not steps.is_meta and steps.numel():
                reach = [int(end) for end in steps.aminmax()]
                assert max(-reach[0], reach[1]) <= MAX_STEP, f"steps of {reach[0]} to {reach[1]}"
        except (KeyError, AssertionError) as error:
            raise CheckpointError(
                f"{info.path} does not hold {name} as its manifest says ({error!r}); {name}{VALUES}, {name}{SCALES} "
                f"and of int4 {name}{STEPS}, as the manifest names the format, are required; quantise the run again."
            ) from None
        _check_scales(name + SCALES, weights[name], info)
    return weights


def _check_scales(name: str, weight: "QuantizedWeight", info: CheckpointInfo) -> None:
    """Raise CheckpointError for scales that are no numbers, below 0, or of MXFP4 beyond what bf16 holds."""
    from moesaic.kernels.mxfp4 import LARGEST_SCALE

    if weight.scales.is_meta or not weight.scales.numel():
        return
    least, most = (end.item() for end in weight.scales.aminmax())  # NaN is both then
    largest = LARGEST_SCALE if weight.is_mxfp4 else sys.float_info.max
    if not 0 <= least <= most <= largest:
        wanted = f"of at most {LARGEST_SCALE}" if weight.is_mxfp4 else "from 0 on that are finite"
        raise CheckpointError(
            f"{info.path}: {name} holds {least:g} to {most:g}; scales {wanted} are required; quantise the run again."
        )


def _check_format(info: CheckpointInfo) -> None:
    record = info.metadata.get(KEY)
    if not isinstance(record, dict) or record.get("format", 1) == FORMAT:
        return
    source = record.get("source") or "the run that it was made from"
    raise CheckpointError(
        f"{info.path} holds integers of format {record.get('format', 1)}, of another version of moesaic; "
        f"format {FORMAT} is required; quantise {source} again."
    )
