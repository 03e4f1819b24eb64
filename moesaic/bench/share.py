"""The share of the machine's limit that an operation reaches: by what it must move and do, and how long it took."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from moesaic.errors import DeviceError
from moesaic.kernels.limits import Limits

Rate = Literal["bf16", "fp32", "int8"]


@dataclass(frozen=True)
class Work:
    """What an operation must move and do, whoever implements it.

    memory_bytes: read and written once each. operations: by the kind of product, a multiplication and an addition
    being two.
    """

    memory_bytes: float
    operations: Mapping[Rate, float]


@dataclass(frozen=True)
class Bound:
    """The shortest time that the limits allow, and which of them sets it."""

    seconds: float
    limit: Literal["bytes", "FLOPs"]

    def share(self, seconds: float) -> float:
        """Return max(bytes / bandwidth, FLOPs / peak) / time."""
        return self.seconds / seconds


def bound(work: Work, limits: Limits) -> Bound:
    """Return how fast the work could be done on a machine of these limits.

    Raises: DeviceError for products that the machine does not have.
    """
    moving = work.memory_bytes / limits.bandwidth_bytes_per_second
    doing = sum(count / operations_per_second(limits, rate) for rate, count in work.operations.items())
    return Bound(moving, "bytes") if moving >= doing else Bound(doing, "FLOPs")


def operations_per_second(limits: Limits, rate: Rate) -> float:
    """Return the peak for one kind of product.

    Raises: DeviceError where there is no such product.
    """
    peaks = {
        "bf16": limits.bf16_flops_per_second,
        "fp32": limits.fp32_flops_per_second,
        "int8": limits.int8_operations_per_second,
    }
    peak = peaks[rate]
    if peak is None:
        raise DeviceError(
            f"{limits.name} has no products of bytes; int8, int4 and mxfp4 need them; use --dtype bf16, or "
            f"--device cpu."
        )
    return peak
