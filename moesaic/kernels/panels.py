"""How packed matrices lie for the CPU's kernels: in panels of 32 rows, each one stream for the memory.

A matrix (N, K) is a run of panels. In bf16 a panel is [K/2][32][2]; with 8 bits [K/4][32][4], each byte the value plus
128; with 4 bits, for each group of K, the steps of its 32 rows in int16 and then [group/4][16][4], each byte with row n
in its low nibble and row n + 16 in its high one. MXFP4 is laid out as 4 bits in groups of 64, but with 32 scales of a
byte for the first 32 columns and then 32 for the others. K is padded to 32 (bf16) or 64 (8 bits, MXFP4). Of a gated
MLP's [gate, up] a panel holds 16 rows of the gate and the same 16 of up.

The kernels pack by themselves; this is the definition, and what unpacks.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels.quantized import QuantizedWeight

PackedFormat = Literal["bf16", "int8", "int4", "mxfp4"]

# Of this layout. Files of packed weights name it: raise it with every change of it.
LAYOUT_VERSION = 3
PANEL = 32
# Of the steps or scales that stand before every group of 4 bits.
_HEADER_BYTES = 2 * PANEL
_MXFP4_DEPTH = 64  # columns behind such a header of MXFP4


def format_of(weight: Tensor | QuantizedWeight) -> tuple[PackedFormat, int | None, torch.device]:
    """Return a weight's format packed (a tensor in bf16, whatever it is), its group_size, and its device."""
    if isinstance(weight, Tensor):
        return "bf16", None, weight.device
    format: PackedFormat = "mxfp4" if weight.is_mxfp4 else "int8" if weight.bits == 8 else "int4"
    return format, weight.group_size, weight.values.device


def row_bytes(format: PackedFormat, in_size: int, group_size: int | None) -> int:
    """Bytes of a row of a panel, padding and its share of the headers included."""
    if format == "bf16":
        return -(-in_size // 32) * 32 * 2
    if format == "int8":
        return -(-in_size // 64) * 64
    assert group_size is not None
    depth = _header_depth(format, group_size)
    return -(-in_size // depth) * (2 + depth // 2)


def _header_depth(format: PackedFormat, group_size: int) -> int:
    """Columns of 4 bits that share a header."""
    return _MXFP4_DEPTH if format == "mxfp4" else group_size


def _header_dtype(format: PackedFormat) -> torch.dtype:
    return torch.uint8 if format == "mxfp4" else torch.int16


def panel_order(out_size: int, is_gated: bool) -> Tensor:
    """Return the row of every packed row, out_size for padding: as they are, or 16 of the gate and 16 of up in turn."""
    if not is_gated:
        order = torch.arange(-(-out_size // PANEL) * PANEL, device="cpu")
        return order.clamp_max(out_size)
    half = out_size // 2
    padded = torch.arange(-(-half // 16) * 16, device="cpu")
    gate = torch.where(padded < half, padded, out_size)
    up = torch.where(padded < half, padded + half, out_size)
    return torch.stack([gate.view(-1, 16), up.view(-1, 16)], dim=1).flatten()


def take_rows(rows: Tensor, order: Tensor, fill: int) -> Tensor:
    """Return rows[order], with rows of `fill` where order says padding."""
    padding = torch.full((1, *rows.shape[1:]), fill, dtype=rows.dtype, device=rows.device)
    return torch.cat([rows, padding])[order]


def pack_matrix(weight: Tensor | QuantizedWeight, index: int | None, order: Tensor, out: Tensor) -> None:
    """Write a matrix, or the one of a stack that index says, with its rows in the order of panel_order."""

    def own(tensor: Tensor) -> Tensor:
        return tensor if index is None else tensor[index]

    if isinstance(weight, Tensor):
        _pack_bf16(own(weight), order, out)
    elif weight.group_size is None:
        _pack_int8(own(weight.values), order, out)
    else:
        assert weight.of_groups is not None
        _pack_nibbles(weight, own(weight.values), own(weight.of_groups), order, out)


def _pack_bf16(matrix: Tensor, order: Tensor, out: Tensor) -> None:
    rows = take_rows(matrix.detach().to(torch.bfloat16), order, 0)
    _write_panels(F.pad(rows, (0, -matrix.shape[1] % 32)), out)


def _pack_int8(values: Tensor, order: Tensor, out: Tensor) -> None:
    rows = take_rows(values.view(torch.uint8) ^ 128, order, 128)
    _write_panels(F.pad(rows, (0, -values.shape[1] % 64), value=128), out)


def _pack_nibbles(weight: QuantizedWeight, values: Tensor, of_groups: Tensor, order: Tensor, out: Tensor) -> None:
    """values (N, K/2), of_groups (N, groups): of one matrix of the weight."""
    assert weight.group_size is not None
    format = format_of(weight)[0]
    depth = _header_depth(format, weight.group_size)
    nibbles = torch.stack([values & 15, values >> 4], dim=-1).flatten(-2)  # (N, K)
    rows = F.pad(take_rows(nibbles, order, 0 if weight.is_mxfp4 else 8), (0, -nibbles.shape[1] % depth))
    halves = rows.view(-1, 2, 16, rows.shape[1])
    both = (halves[:, 0] | (halves[:, 1] << 4)).contiguous()  # (panels, 16, K)
    panels, _, padded = both.shape
    parts = out.view(panels, padded // depth, -1)
    dwords = both.view(torch.int32).transpose(1, 2).contiguous()  # (panels, K/4, 16)
    parts[..., _HEADER_BYTES:] = dwords.view(torch.uint8).view(*parts.shape[:2], -1)
    groups = padded // weight.group_size
    grouped = F.pad(take_rows(of_groups, order, 0), (0, groups - of_groups.shape[1]))
    headers = grouped.to(_header_dtype(format)).view(panels, PANEL, groups).transpose(1, 2).contiguous()
    parts[..., :_HEADER_BYTES] = headers.view(torch.uint8).view(*parts.shape[:2], -1)


def _write_panels(rows: Tensor, out: Tensor) -> None:
    """Write rows (N, bytes of K) as [N/32][dword of K][32]."""
    dwords = rows.view(torch.int32).view(-1, PANEL, rows.shape[1] * rows.element_size() // 4)
    out.view(torch.int32).view(dwords.shape[0], -1, PANEL).copy_(dwords.transpose(1, 2))


def unpack_matrix(
    data: Tensor, scales: Tensor | None, format: PackedFormat, shape: tuple[int, int], group_size: int | None,
    *, is_gated: bool,
) -> Tensor | QuantizedWeight:  # fmt: skip
    """Return a matrix (N, K) as it was: in bf16, or quantised. scales (N padded to panels,): of integers alone."""
    out_size, in_size = shape
    order = panel_order(out_size, is_gated).to(data.device)
    kept = order < out_size
    place = torch.empty(out_size, dtype=torch.int64, device=order.device)
    place[order[kept]] = torch.arange(len(order), device=order.device)[kept]  # packed row of every row
    panels = len(order) // PANEL
    if group_size is not None:
        depth = _header_depth(format, group_size)
        padded = -(-in_size // depth) * depth
        parts = data.view(panels, padded // depth, -1)
        headers = parts[..., :_HEADER_BYTES].contiguous().view(_header_dtype(format))
        headers = headers.view(panels, -1, PANEL)  # (panels, groups, 32)
        both = parts[..., _HEADER_BYTES:].reshape(panels, padded // 4, 16, 4)
        nibbles = torch.stack([both & 15, both >> 4], dim=1)  # (panels, 2, K/4, 16, 4)
        rows = nibbles.permute(0, 1, 3, 2, 4).reshape(len(order), padded)[place, :in_size]
        of_groups = headers.transpose(1, 2).reshape(len(order), -1)[place, : in_size // group_size].contiguous()
        values = rows[:, 0::2] | (rows[:, 1::2] << 4)
        if format == "mxfp4":
            return QuantizedWeight(values, of_groups, 4, group_size)
        assert scales is not None
        return QuantizedWeight(values, scales[place], 4, group_size, of_groups.to(torch.int8))
    dwords = data.view(torch.int32).view(panels, -1, PANEL).transpose(1, 2).reshape(len(order), -1)[place]
    if format == "bf16":
        return dwords.view(torch.bfloat16)[:, :in_size].contiguous()
    values = (dwords.view(torch.uint8)[:, :in_size] ^ 128).contiguous().view(torch.int8)
    assert scales is not None
    return QuantizedWeight(values, scales[place], 8, None)


def unpack_bf16_stack(data: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Return all matrices (E, N, K) of a stack in bf16 that is not gated."""
    num_matrices, out_size, in_size = shape
    panels = data.view(torch.int32).view(num_matrices, -(-out_size // PANEL), -1, PANEL)
    rows = panels.transpose(2, 3).flatten(1, 2)[:, :out_size].contiguous()
    return rows.view(torch.bfloat16)[..., :in_size]
