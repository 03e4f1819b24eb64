"""Attention over a cache that lies in blocks, for decoding and prompts alike.

A sequence's new tokens times the heads that share a key are its rows, and a program takes up to a tile of them over a
range of positions. Where there are few tiles, positions are split between more programs, whose parts a second kernel
brings together. What is computed by whom is planned on the processor, which knows all lengths: once for a step, for all
layers that see the same window.

Blocks are (blocks, block_size, KV, D), those of latent attention (blocks, block_size, R + P); scales of int8 (blocks,
block_size, KV).
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from moesaic.kernels.paged_attention import PagedBatch
from moesaic.kernels.triton.launch import multiprocessors, on_device_of, power_of_two, shared_bytes

# exp(x) = 2 ** (x * log2(e))
_LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Positions of a split at least: fewer cost more to bring together than they save.
_SPLIT = 256
_WORK_FIELDS, _PART_FIELDS = 8, 5


@triton.jit(do_not_specialize=["table_width", "window"])
def _attention_kernel(
    query_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    sinks_ptr,
    work_ptr,
    tables_ptr,
    out_ptr,
    part_ptr,
    part_sums_ptr,
    scale,
    query_stride,
    kv_heads,
    group,
    dim,
    extra,
    table_width,
    block_size,
    window,
    HAS_SCALES: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_LATENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DIM: tl.constexpr,
    EXTRA: tl.constexpr,
):
    """One piece of work for one key/value head. scale: of scores, with log2(e) in it.

    IS_LATENT: keys are vectors of dim + extra numbers, the first dim of which are the values too.
    """
    work = work_ptr + tl.program_id(0) * 8
    kv_head = tl.program_id(1)
    sequence, first_token, first_position = tl.load(work), tl.load(work + 1), tl.load(work + 2)
    first_row, end_row = tl.load(work + 3), tl.load(work + 4)
    begin, end, part = tl.load(work + 5), tl.load(work + 6), tl.load(work + 7)
    row = first_row + tl.arange(0, BLOCK_M)
    is_row = row < end_row
    token = (first_token + row // group).to(tl.int64)
    head = kv_head * group + row % group
    position = first_position + row // group
    channel = tl.arange(0, DIM)
    is_channel = channel < dim
    width = dim + extra
    query_at = query_ptr + token * query_stride + head * width
    query = tl.load(query_at[:, None] + channel[None, :], mask=is_row[:, None] & is_channel[None, :], other=0.0)
    rest = tl.arange(0, EXTRA)
    if IS_LATENT:
        rest_mask = is_row[:, None] & (rest < extra)[None, :]
        query_rest = tl.load(query_at[:, None] + dim + rest[None, :], mask=rest_mask, other=0.0)
    if HAS_SINKS:
        # They weigh like a key without a value, in one part alone.
        sink = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32) * _LOG2_E
        has_sink = is_row & (part < 0)
        largest = tl.where(has_sink, sink, float("-inf"))
        total = tl.where(has_sink, 1.0, 0.0)
    else:
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
    attended = tl.zeros((BLOCK_M, DIM), tl.float32)
    for start in range(begin, end, BLOCK_N):
        at = start + tl.arange(0, BLOCK_N)
        is_there = at < end
        block = tl.load(tables_ptr + sequence.to(tl.int64) * table_width + at // block_size, mask=is_there, other=0)
        slot = block.to(tl.int64) * block_size + at % block_size
        key_at = keys_ptr + (slot * kv_heads + kv_head) * width
        tile_mask = is_there[:, None] & is_channel[None, :]
        key = tl.load(key_at[:, None] + channel[None, :], mask=tile_mask, other=0.0).to(query.dtype)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if IS_LATENT:
            mask = is_there[:, None] & (rest < extra)[None, :]
            key_rest = tl.load(key_at[:, None] + dim + rest[None, :], mask=mask, other=0.0).to(query.dtype)
            scores = tl.dot(query_rest, tl.trans(key_rest), scores, input_precision="ieee")
        if HAS_SCALES:
            key_scale = tl.load(key_scales_ptr + slot * kv_heads + kv_head, mask=is_there, other=0.0)
            scores = scores * key_scale[None, :]
        is_seen = is_there[None, :] & (at[None, :] <= position[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (at[None, :] > position[:, None] - window)
        scores = tl.where(is_seen, scores * scale, float("-inf"))
        rising = tl.maximum(largest, tl.max(scores, 1))
        # A row that has seen nothing yet has no number to subtract.
        base = tl.where(rising == float("-inf"), 0.0, rising)
        shares = tl.exp2(scores - base[:, None])
        fading = tl.exp2(largest - base)
        total = total * fading + tl.sum(shares, 1)
        attended = attended * fading[:, None]
        largest = rising
        if IS_LATENT:
            value = key
        else:
            value_at = values_ptr + (slot * kv_heads + kv_head) * dim
            value = tl.load(value_at[:, None] + channel[None, :], mask=tile_mask, other=0.0).to(query.dtype)
        if HAS_SCALES:
            value_scale = tl.load(value_scales_ptr + slot * kv_heads + kv_head, mask=is_there, other=0.0)
            # What is not seen may hold anything.
            shares = tl.where(is_seen, shares * value_scale[None, :], 0.0)
        attended = tl.dot(shares.to(query.dtype), value, attended, input_precision="ieee")
    if part < 0:
        attended = attended / total[:, None]
        out_at = out_ptr + (token * kv_heads * group + head) * dim
        out = attended.to(out_ptr.dtype.element_ty)
        tl.store(out_at[:, None] + channel[None, :], out, mask=is_row[:, None] & is_channel[None, :])
    else:
        at = (part * kv_heads + kv_head).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        tl.store(part_ptr + at[:, None] * DIM + channel[None, :], attended)
        tl.store(part_sums_ptr + 2 * at, largest)
        tl.store(part_sums_ptr + 2 * at + 1, total)


@triton.jit
def _join_kernel(
    parts_ptr,
    part_ptr,
    part_sums_ptr,
    sinks_ptr,
    out_ptr,
    kv_heads,
    group,
    dim,
    HAS_SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DIM: tl.constexpr,
):
    """Bring the parts of one tile's rows together."""
    own = parts_ptr + tl.program_id(0) * 5
    kv_head = tl.program_id(1)
    first_token, first_row, end_row = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    first_part, end_part = tl.load(own + 3), tl.load(own + 4)
    row = first_row + tl.arange(0, BLOCK_M)
    is_row = row < end_row
    head = kv_head * group + row % group
    channel = tl.arange(0, DIM)
    if HAS_SINKS:
        largest = tl.load(sinks_ptr + head, mask=is_row, other=0.0).to(tl.float32) * _LOG2_E
        total = tl.full((BLOCK_M,), 1.0, tl.float32)
    else:
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
    attended = tl.zeros((BLOCK_M, DIM), tl.float32)
    for part in range(first_part, end_part):
        at = (part * kv_heads + kv_head).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        theirs, their_total = tl.load(part_sums_ptr + 2 * at), tl.load(part_sums_ptr + 2 * at + 1)
        rising = tl.maximum(largest, theirs)
        base = tl.where(rising == float("-inf"), 0.0, rising)
        fading, share = tl.exp2(largest - base), tl.exp2(theirs - base)
        total = total * fading + their_total * share
        attended = (
            attended * fading[:, None] + tl.load(part_ptr + at[:, None] * DIM + channel[None, :]) * share[:, None]
        )
        largest = rising
    token = (first_token + row // group).to(tl.int64)
    out_at = out_ptr + (token * kv_heads * group + head) * dim
    out = (attended / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_at[:, None] + channel[None, :], out, mask=is_row[:, None] & (channel < dim)[None, :])


@dataclass(frozen=True)
class Plan:
    """The work of one attention: which rows see which positions.

    work (pieces, 8) and parts (tiles that are split, 5), int32 on the device; num_parts: of all of these together;
    block_m: rows of a tile.
    """

    work: Tensor
    parts: Tensor
    num_parts: int
    block_m: int


def plan_of(query: Tensor, batch: PagedBatch, *, dim: int, kv_heads: int, window: int | None) -> Plan:
    """Return how to compute attention of query (T, A, D) to a batch, planned once for all layers that see the same."""
    group, tile, device = query.shape[1] // kv_heads, largest_tile(dim, query.dtype), query.device
    return batch.on_device(
        f"plan {group} {kv_heads} {window} {tile}",
        device,
        lambda: plan_attention(
            batch.starts.numpy(), batch.lengths.numpy(), group=group, kv_heads=kv_heads, window=window,
            largest_tile=tile, device=device,
        ),
    )  # fmt: skip


def plan_attention(
    starts: np.ndarray, lengths: np.ndarray, *, group: int, kv_heads: int, window: int | None, largest_tile: int,
    device: torch.device,
) -> Plan:  # fmt: skip
    """Return how to compute a batch: tokens starts[s] to starts[s + 1] are the last of lengths[s] positions.

    group: heads that share a key; largest_tile: rows, a power of two.
    """
    new = np.diff(starts).astype(np.int64)
    rows = new * group
    block_m = min(largest_tile, max(16, power_of_two(int(rows.max(initial=1)))))
    tiles = -(-rows // block_m)
    sequence = np.repeat(np.arange(len(new)), tiles)
    first_row = (np.arange(len(sequence)) - np.repeat(tiles.cumsum() - tiles, tiles)) * block_m
    end_row = np.minimum(first_row + block_m, rows[sequence])
    first_position = lengths[sequence].astype(np.int64) - new[sequence]
    end = first_position + (end_row - 1) // group + 1
    begin = np.zeros_like(end)
    if window is not None:
        begin = np.maximum(0, first_position + first_row // group - window + 1)
    programs, wanted = len(sequence) * kv_heads, 2 * multiprocessors(device)
    splits = np.ones_like(end)
    if programs:
        each = max(_SPLIT, -(-int((end - begin).sum()) * kv_heads // wanted))
        splits = np.maximum(1, -(-(end - begin) // (-(-each // 64) * 64)))
    length = (end - begin + splits * 64 - 1) // (splits * 64) * 64  # whole tiles of positions
    splits = np.maximum(1, -(-(end - begin) // np.maximum(length, 1)))
    is_split = splits > 1
    counts = np.where(is_split, splits, 0)
    first_part = counts.cumsum() - counts
    piece = np.repeat(np.arange(len(sequence)), splits)
    index = np.arange(len(piece)) - np.repeat(splits.cumsum() - splits, splits)
    piece_begin = begin[piece] + index * length[piece]
    work = np.stack(
        [
            sequence[piece],
            starts[sequence[piece]],
            first_position[piece],
            first_row[piece],
            end_row[piece],
            piece_begin,
            np.minimum(piece_begin + length[piece], end[piece]),
            np.where(is_split[piece], first_part[piece] + index, -1),
        ],
        axis=1,
    ).astype(np.int32)
    tile = np.flatnonzero(is_split)
    parts = np.stack(
        [starts[sequence[tile]], first_row[tile], end_row[tile], first_part[tile], first_part[tile] + splits[tile]],
        axis=1,
    ).astype(np.int32)
    assert work.shape[1] == _WORK_FIELDS and parts.shape[1] == _PART_FIELDS, (work.shape, parts.shape)
    both = torch.from_numpy(np.concatenate([work.ravel(), parts.ravel()])).to(device, non_blocking=True)
    return Plan(both[: work.size].view(work.shape), both[work.size :].view(parts.shape), int(counts.sum()), block_m)


@dataclass(frozen=True)
class Tiling:
    """positions: of a tile of keys and values; stages: tiles on their way at once."""

    positions: int
    warps: int
    stages: int

    @classmethod
    def of(cls, rows: int, channels: int, dtype: torch.dtype, device: torch.device) -> "Tiling":
        """rows and channels: of a tile of queries, powers of two; dtype: of queries, which keys are made too."""
        if dtype is torch.float32:  # no matrix instructions: what a thread multiplies is in its registers
            return cls(16, 8, 1)
        positions = 64 if channels <= 128 else 32
        # Queries, keys and values lie there; a tile of latents lies there twice.
        queries, tile = rows * channels * 2, positions * channels * dtype.itemsize * 2
        while positions > 16 and queries + tile + (8 << 10) > shared_bytes(device):
            positions, tile = positions // 2, tile // 2
        stages = 2 if shared_bytes(device) >= queries + 2 * tile + (8 << 10) else 1
        return cls(positions, 8 if rows * channels >= 64 * 256 else 4, stages)


def largest_tile(dim: int, dtype: torch.dtype) -> int:
    """Return how many rows of dim channels a program takes at most; dtype: of queries."""
    if dtype is torch.float32:
        return 32 if dim <= 256 else 16
    return 64 if dim <= 256 else 32


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor | None,
    scales: tuple[Tensor, Tensor] | None,
    batch: PagedBatch,
    *,
    dim: int,
    kv_heads: int,
    block_size: int,
    scale: float,
    window: int | None,
    sinks: Tensor | None,
) -> Tensor:
    """Return (T, A, dim) in query's dtype: attention of query (T, A, D), whose heads lie side by side.

    values: None for latent attention, of whose vectors the first dim numbers are the values.
    """
    tokens, num_heads, width = query.shape
    out = torch.empty(tokens, num_heads, dim, dtype=query.dtype, device=query.device)
    if not tokens:
        return out
    plan, tables = plan_of(query, batch, dim=dim, kv_heads=kv_heads, window=window), batch.tables_on(query.device)
    is_latent = values is None
    block_m, padded = plan.block_m, power_of_two(max(dim, 16))
    tiling = Tiling.of(block_m, padded, query.dtype, query.device)
    # Parts are kept in fp32.
    part = torch.empty(plan.num_parts, kv_heads, block_m, padded, dtype=torch.float32, device=query.device)
    part_sums = torch.empty(plan.num_parts, kv_heads, block_m, 2, dtype=torch.float32, device=query.device)
    key_scales, value_scales = scales or (None, None)
    group = num_heads // kv_heads
    with on_device_of(query):
        _attention_kernel[(plan.work.shape[0], kv_heads)](
            query, keys, values, key_scales, value_scales, sinks, plan.work, tables, out, part, part_sums,
            scale * _LOG2_E.value, query.stride(0), kv_heads, group, dim, width - dim, tables.shape[1], block_size,
            window or 0, scales is not None, sinks is not None, window is not None, is_latent, block_m,
            tiling.positions, padded,
            power_of_two(max(width - dim, 16)), num_warps=tiling.warps, num_stages=tiling.stages,
            enable_fp_fusion=True,
        )  # fmt: skip
        if plan.num_parts:
            _join_kernel[(plan.parts.shape[0], kv_heads)](
                plan.parts, part, part_sums, sinks, out, kv_heads, group, dim, sinks is not None, block_m, padded,
                num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out
