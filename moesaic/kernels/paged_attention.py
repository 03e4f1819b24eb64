"""Attention over keys and values that lie in blocks: the contract, its definition, and the way to the C++ kernels.

For generation and serving: sequences of any length share one pool of blocks, each names its own in a table, and a call
brings any number of new tokens of each (one, a chunk of a prompt, or none). Which sequence owns which block is decided
by the caller.

On the CPU, for bf16 and int8 caches, one C++ call takes all sequences: the query heads that share a key/value head go
over its keys together, and long contexts are split over the threads at fixed positions, so that a token's result
depends on nothing else in the batch. Everything else is PyTorch's operations on the same storage: the definition.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.kernels import select
from moesaic.kernels.addresses import RemembersAddresses, address_of
from moesaic.kernels.huge_pages import zeros_on_huge_pages
from moesaic.kernels.quantized import quantize_rows
from moesaic.kernels.tracing import untraced

# Positions, and channels, of a panel: the kernels' unit.
PANEL = 32
# Scores (fp32) that exist at once in the definition: a long prompt is taken in chunks.
SCORES = 1 << 23


@dataclass(frozen=True)
class KVBlocks(RemembersAddresses):
    """One layer's blocks, in panels of 32 positions that the kernels read as they are (source/attention_blocks.h), or
    in rows, on CUDA.

    Shapes, with P = block_size / 32 panels and W = head_dim rounded up to 32: keys (blocks, KV, P, W/2, 32, 2), pairs
    of channels of 32 positions; values (blocks, KV, P, W/32, 16, 32, 2), pairs of positions of 32 channels; key_scales,
    value_scales (blocks, KV, block_size) fp32 for int8, else None. In rows keys and values are (blocks, block_size, KV,
    D), scales (blocks, block_size, KV).
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    head_dim: int

    @property
    def num_blocks(self) -> int:
        return self.keys.shape[0]

    @property
    def lie_in_rows(self) -> bool:
        return self.keys.dim() == 4

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[2 if self.lie_in_rows else 1]

    @property
    def block_size(self) -> int:
        return self.keys.shape[1] if self.lie_in_rows else self.keys.shape[2] * PANEL

    @property
    def scales(self) -> tuple[Tensor, Tensor] | None:
        """Of keys and of values."""
        if self.key_scales is None or self.value_scales is None:
            return None
        return self.key_scales, self.value_scales

    @cached_property
    def arguments(self) -> tuple[int, ...]:
        """Addresses and sizes, as the kernels take them."""

        def address(tensor: Tensor | None) -> int:
            return 0 if tensor is None else tensor.data_ptr()

        return (
            self.keys.data_ptr(), self.values.data_ptr(), address(self.key_scales), address(self.value_scales),
            self.num_blocks, self.num_kv_heads, self.head_dim, self.block_size,
        )  # fmt: skip


@dataclass(frozen=True)
class KVStorage(RemembersAddresses):
    """The blocks of every layer; a block number means the same positions in all of them."""

    layers: tuple[KVBlocks, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].keys.dtype

    @cached_property
    def arguments(self) -> Tensor:
        """(layers, 8) int64: every layer's."""
        return torch.tensor([layer.arguments for layer in self.layers], device="cpu")


@dataclass(frozen=True)
class PagedBatch(RemembersAddresses):
    """The sequences of one call: tokens starts[s] to starts[s + 1] are the last of lengths[s] positions of sequence s.

    Shapes: starts (n + 1,), lengths (n,), block_tables (n, m), all int32 on the CPU and contiguous; a sequence's blocks
    stand in the order of its positions, what is behind the last one in use is not read.
    """

    starts: Tensor
    lengths: Tensor
    block_tables: Tensor

    def __post_init__(self) -> None:
        count = self.lengths.shape[0]
        assert self.starts.shape == (count + 1,) and self.block_tables.shape[0] == count, (
            self.starts.shape, self.lengths.shape, self.block_tables.shape,
        )  # fmt: skip
        for tensor in (self.starts, self.lengths, self.block_tables):
            assert tensor.dtype is torch.int32 and tensor.is_contiguous() and tensor.is_cpu, tensor

    @cached_property
    def positions(self) -> Tensor:
        """(T,) int64, the position of each token in its sequence."""
        new = self.starts.diff()
        first = self.lengths - new - self.starts[:-1]  # what a token's index lacks to its position
        return torch.arange(self.num_tokens, device="cpu") + first.repeat_interleave(new)

    def on_device(self, name: str, device: torch.device, make: Callable[[], Any]) -> Any:
        """Return what make gives, which is kept for the other layers of this pass, by its name."""
        key = (name, device)
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    @cached_property
    def _kept(self) -> dict[tuple[str, torch.device], Any]:
        return {}

    def tables_on(self, device: torch.device) -> Tensor:
        """block_tables there."""
        return self.on_device("tables", device, lambda: self.block_tables.to(device, non_blocking=True))

    def slots_on(self, device: torch.device, *, block_size: int, num_blocks: int) -> Tensor:
        """(T,) int64: block * block_size + place in it, of each new token.

        Raises: AssertionError for a table that names other blocks than 0 to num_blocks - 1.
        """

        def make() -> Tensor:
            sequences = torch.arange(self.lengths.shape[0], device="cpu").repeat_interleave(self.starts.diff())
            block = self.block_tables[sequences, self.positions // block_size].long()
            assert bool(((block >= 0) & (block < num_blocks)).all()) and self.is_inside, (self, num_blocks)
            return (block * block_size + self.positions % block_size).to(device, non_blocking=True)

        return self.on_device(f"slots {block_size} {num_blocks}", device, make)

    @cached_property
    def num_tokens(self) -> int:
        """T."""
        return int(self.starts[-1])

    @cached_property
    def is_inside(self) -> bool:
        """Whether no sequence has more new tokens than positions; the kernels see to it themselves."""
        return bool((self.starts.diff() <= self.lengths).all())

    @cached_property
    def arguments(self) -> tuple[int, ...]:
        """Addresses and sizes, as the kernels take them."""
        return (
            self.starts.data_ptr(), self.lengths.data_ptr(), self.block_tables.data_ptr(), self.lengths.shape[0],
            self.block_tables.shape[1],
        )  # fmt: skip


def allocate_blocks(
    num_layers: int,
    num_blocks: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> KVStorage:
    """Return empty blocks of every layer; dtype torch.int8 keeps a scale for each position and head.

    Raises: ConfigError for a block_size that is no multiple of 32.
    """
    check_block_size(block_size)
    panels, width = block_size // PANEL, -(-head_dim // PANEL) * PANEL
    parts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "keys": (dtype, (num_blocks, num_kv_heads, panels, width // 2, PANEL, 2)),
        "values": (dtype, (num_blocks, num_kv_heads, panels, width // PANEL, PANEL // 2, PANEL, 2)),
    }
    scales: tuple[int, ...] = (num_blocks, num_kv_heads, block_size)
    if device.type not in ("cpu", "meta"):
        rows = (num_blocks, block_size, num_kv_heads, head_dim)
        parts, scales = {"keys": (dtype, rows), "values": (dtype, rows)}, rows[:3]
    if dtype is torch.int8:
        parts |= dict.fromkeys(("key_scales", "value_scales"), (torch.float32, scales))
    sizes = {name: math.prod(shape) * kind.itemsize for name, (kind, shape) in parts.items()}
    # One piece for all layers: a panel is one small page or less, and walking the page tables took as long as reading
    # it, but a few sequences' share of a layer does not fill a huge page.
    memory = zeros_on_huge_pages(num_layers * sum(sizes.values()), device)
    layers, at = [], 0
    for _ in range(num_layers):
        tensors = {}
        for name, (kind, shape) in parts.items():
            tensors[name] = memory[at : at + sizes[name]].view(kind).view(shape)
            at += sizes[name]
        layers.append(
            KVBlocks(
                tensors["keys"], tensors["values"], tensors.get("key_scales"), tensors.get("value_scales"), head_dim
            )
        )
    return KVStorage(tuple(layers))


def check_block_size(block_size: int) -> None:
    """Raises: ConfigError for a block_size that is no multiple of 32."""
    if block_size < PANEL or block_size % PANEL:
        raise ConfigError(
            f"block_size ({block_size}) must be a multiple of {PANEL}, the positions that a kernel reads at once; use "
            f"{max(PANEL, block_size // PANEL * PANEL)}."
        )


@untraced
def write_kv(key: Tensor, value: Tensor, blocks: KVBlocks, batch: PagedBatch) -> None:
    """Put the new tokens' keys (after their positions are turned in) and values into their blocks.

    Shapes: key, value (T, KV, D) of the cache's dtype, or bf16 or fp32 for int8.
    """
    shape = (key.shape[0], blocks.num_kv_heads, blocks.head_dim)
    assert key.shape == value.shape == shape, (key.shape, value.shape, shape)
    assert key.dtype == value.dtype, (key.dtype, value.dtype)
    library = _library(key, blocks)
    if library is None:
        _write_reference(key, value, blocks, batch)
        return
    key, value = _rows(key), _rows(value)
    write = library.function("moesaic_paged_write", "pipii" + "ppppiiii" + "pppii")
    failed = write(
        key.data_ptr(), key.stride(0), value.data_ptr(), value.stride(0), key.shape[0], *blocks.arguments,
        *batch.arguments,
    )  # fmt: skip
    assert not failed, _misfit(batch, blocks, key.shape[0])


def can_place_heads(query: Tensor) -> bool:
    """Whether place_heads takes queries like these: on CUDA."""
    return select.uses_triton(query.device) and not (query.requires_grad and torch.is_grad_enabled())


def place_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    blocks: KVBlocks,
    batch: PagedBatch,
    *,
    rotary: tuple[Tensor, Tensor] | None,
    norms: tuple[Tensor, Tensor] | None,
    epsilon: float,
    norms_rotated: bool,
) -> Tensor:
    """Norm and turn the new tokens' heads, put keys and values into their blocks, and return the queries (T, A, D).

    In one kernel, in fp32 and rounded once; what model/attention does in several operations is the definition.

    Shapes: query (T, A, D), key and value (T, KV, D); rotary (T, D/2) each, fp32, of the tokens' positions, None for
    none; norms (D,) fp32 of each head of queries and of keys; norms_rotated: after they are turned.
    """
    from moesaic.kernels.triton import rows

    slots = batch.slots_on(key.device, block_size=blocks.block_size, num_blocks=blocks.num_blocks)
    assert slots.shape[0] == key.shape[0], _misfit(batch, blocks, key.shape[0])
    return rows.place_heads(
        _rows(query), _rows(key), _rows(value), slots, blocks.keys, blocks.values, blocks.scales, rotary=rotary,
        norms=norms, epsilon=epsilon, norms_rotated=norms_rotated,
    )  # fmt: skip


@untraced
def paged_attention(
    query: Tensor,
    blocks: KVBlocks,
    batch: PagedBatch,
    *,
    scale: float | None = None,
    window: int | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return (T, A, D): each token's attention to its sequence up to itself, whose keys and values are in blocks.

    scale, window, sinks: as causal_attention has them.

    Shapes: query (T, A, D), A a multiple of KV; sinks (A,).
    """
    num_tokens, num_heads, head_dim = query.shape
    assert head_dim == blocks.head_dim and num_heads % blocks.num_kv_heads == 0, (query.shape, blocks.keys.shape)
    assert not (query.requires_grad and torch.is_grad_enabled()), "paged attention is for inference: it has no gradient"
    assert scale is None or scale > 0, scale
    assert window is None or window > 0, window
    assert sinks is None or sinks.shape == (num_heads,), (sinks, query.shape)
    scale = head_dim**-0.5 if scale is None else scale
    if select.uses_triton(query.device):
        return _attention_on_cuda(query, blocks, batch, scale, window, sinks)
    library = _library(query, blocks)
    if library is None:
        return _attention_reference(query, blocks, batch, scale, window, sinks)
    query = _rows(query)
    out = torch.empty(num_tokens, num_heads, head_dim, dtype=torch.bfloat16, device="cpu")
    sinks = None if sinks is None else sinks.detach().float().contiguous()
    attend = library.function("moesaic_paged_attention", "pipiifip" + "ppppiiii" + "pppii")
    failed = attend(
        query.data_ptr(), query.stride(0), out.data_ptr(), num_tokens, num_heads, scale, window or 0,
        address_of(sinks),
        *blocks.arguments, *batch.arguments,
    )  # fmt: skip
    assert not failed, _misfit(batch, blocks, num_tokens)
    return out


def read_kv(blocks: KVBlocks, table: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Return keys and values (L, KV, D) of a sequence's first `length` positions; int8 comes back as fp32."""
    used = table[: -(-length // blocks.block_size)].long().to(blocks.keys.device)
    if blocks.lie_in_rows:
        keys, values = (part[used].flatten(0, 1)[:length] for part in (blocks.keys, blocks.values))
        if blocks.scales is not None:
            key_scales, value_scales = (part[used].flatten(0, 1)[:length, :, None] for part in blocks.scales)
            keys, values = keys.float() * key_scales, values.float() * value_scales
        return keys, values
    # (n, KV, P, W/2, 32, 2) -> (n, P, 32, KV, W/2, 2), and (n, KV, P, C, 16, 32, 2) -> (n, P, 16, 2, KV, C, 32)
    keys = blocks.keys[used].permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(2)
    values = blocks.values[used].permute(0, 2, 4, 6, 1, 3, 5).flatten(0, 3).flatten(2)
    if blocks.key_scales is not None and blocks.value_scales is not None:
        keys = keys.float() * blocks.key_scales[used].transpose(1, 2).flatten(0, 1)[..., None]
        values = values.float() * blocks.value_scales[used].transpose(1, 2).flatten(0, 1)[..., None]
    return keys[:length, :, : blocks.head_dim], values[:length, :, : blocks.head_dim]


def _library(x: Tensor, blocks: KVBlocks) -> select.Library | None:
    has_kernel = x.dtype is torch.bfloat16 and blocks.keys.dtype in (torch.bfloat16, torch.int8)
    if x.device.type != "cpu" or not has_kernel:
        return None
    return select.cpu_library()


def _rows(x: Tensor) -> Tensor:
    """Tokens may stand anywhere (a slice of a fused projection), their heads and channels side by side."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


def _misfit(batch: PagedBatch, blocks: KVBlocks, num_tokens: int) -> str:
    return (
        f"{num_tokens} tokens, starts {batch.starts.tolist()}, lengths {batch.lengths.tolist()}, tables of "
        f"{batch.block_tables.shape[1]} blocks from 0 to {blocks.num_blocks - 1} of {blocks.block_size} positions"
    )


def _attention_on_cuda(
    query: Tensor, blocks: KVBlocks, batch: PagedBatch, scale: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    from moesaic.kernels.triton import attention

    assert batch.num_tokens == query.shape[0] and batch.is_inside, _misfit(batch, blocks, query.shape[0])
    return attention.attend(
        _rows(query), blocks.keys, blocks.values, blocks.scales, batch, dim=blocks.head_dim,
        kv_heads=blocks.num_kv_heads, block_size=blocks.block_size, scale=scale, window=window, sinks=sinks,
    )  # fmt: skip


def _write_reference(key: Tensor, value: Tensor, blocks: KVBlocks, batch: PagedBatch) -> None:
    size, device = blocks.block_size, blocks.keys.device
    sequences = torch.arange(batch.lengths.shape[0], device="cpu").repeat_interleave(batch.starts.diff())
    positions = batch.positions
    assert positions.shape[0] == key.shape[0] and batch.is_inside, _misfit(batch, blocks, key.shape[0])
    block = batch.block_tables[sequences, positions // size].long().to(device)
    assert bool(((block >= 0) & (block < blocks.num_blocks)).all()), _misfit(batch, blocks, key.shape[0])
    inside = (positions % size).to(device)
    if blocks.lie_in_rows:
        if blocks.scales is not None:
            for part, own in zip((key, value), blocks.scales, strict=True):
                own[block, inside] = quantize_rows(part)[1]
            key, value = quantize_rows(key)[0], quantize_rows(value)[0]
        blocks.keys[block, inside], blocks.values[block, inside] = (
            key.to(blocks.keys.dtype), value.to(blocks.keys.dtype)
        )  # fmt: skip
        return
    panel, place = inside // PANEL, inside % PANEL
    # What no position has written yet is multiplied by a probability of 0, so it must be finite.
    fresh = place == 0
    blocks.values[block[fresh], :, panel[fresh]] = 0
    if blocks.key_scales is not None and blocks.value_scales is not None:
        key, key_scales = quantize_rows(key)
        value, value_scales = quantize_rows(value)
        blocks.key_scales[block, :, inside] = key_scales
        blocks.value_scales[block, :, inside] = value_scales
    padding = (0, -blocks.head_dim % PANEL)
    key = torch.nn.functional.pad(key, padding).unflatten(2, (-1, 2))  # (T, KV, W/2, 2)
    value = torch.nn.functional.pad(value, padding).unflatten(2, (-1, PANEL))  # (T, KV, W/32, 32)
    blocks.keys[block, :, panel, :, place] = key.to(blocks.keys.dtype)
    blocks.values[block, :, panel, :, place // 2, :, place % 2] = value.to(blocks.values.dtype)


def _attention_reference(
    query: Tensor, blocks: KVBlocks, batch: PagedBatch, scale: float, window: int | None, sinks: Tensor | None
) -> Tensor:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    group = query.shape[1] // blocks.num_kv_heads
    starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
    assert starts[-1] == query.shape[0] and batch.is_inside, _misfit(batch, blocks, query.shape[0])
    for sequence, length in enumerate(lengths):
        first, last = starts[sequence], starts[sequence + 1]
        if first == last:
            continue
        keys, values = (part.float() for part in read_kv(blocks, batch.block_tables[sequence], length))
        rows = max(1, SCORES // (query.shape[1] * length))
        for begin in range(first, last, rows):
            end = min(begin + rows, last)
            new, visible = end - begin, length - last + end  # of the last of these tokens
            asked = query[begin:end].float().unflatten(1, (-1, group))  # (S, KV, G, D)
            scores = torch.einsum("skgd,lkd->kgsl", asked, keys[:visible]) * scale
            hidden = torch.ones(new, visible, dtype=torch.bool, device=query.device).triu_(visible - new + 1)
            if window is not None:
                hidden |= torch.ones_like(hidden).tril_(visible - new - window)
            scores = scores.masked_fill(hidden, float("-inf"))
            if sinks is not None:
                column = sinks.float().view(blocks.num_kv_heads, group, 1, 1).expand(-1, -1, new, 1)
                scores = torch.cat([scores, column], -1)
            probabilities = torch.softmax(scores, -1)[..., :visible]
            attended = torch.einsum("kgsl,lkd->skgd", probabilities, values[:visible])
            out[begin:end] = attended.flatten(1, 2).to(query.dtype)
    return out
