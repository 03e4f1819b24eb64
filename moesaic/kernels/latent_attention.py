"""Attention over a compressed cache that lies in blocks: one vector per token, which all heads read.

The vector is the latent that keys and values are products of, and behind it one key that all heads share and that knows
its position. Queries are brought into that space by the caller, so that all heads are queries of one key/value head.
Blocks, tables and batches are those of paged_attention.py.

On the CPU, for a bf16 cache, one C++ call takes all sequences; a token's result depends on nothing else in the batch.
Everything else is PyTorch's operations on the same storage: the definition.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.kernels import select
from moesaic.kernels.addresses import RemembersAddresses
from moesaic.kernels.huge_pages import zeros_on_huge_pages
from moesaic.kernels.paged_attention import PANEL, SCORES, PagedBatch, check_block_size
from moesaic.kernels.tracing import untraced


@dataclass(frozen=True)
class LatentBlocks(RemembersAddresses):
    """One layer's blocks, in panels of 32 positions that the kernels read as they are (source/attention_latent.h), or
    in rows, on CUDA.

    Shapes: latents (blocks, block_size / 32, W/2, 32, 2), pairs of channels of 32 positions; W is R + P rounded up to
    32, the channels a token's latent (R), its shared key (P), and zeros. In rows (blocks, block_size, R + P).
    """

    latents: Tensor
    rank: int
    key_dim: int

    @property
    def num_blocks(self) -> int:
        return self.latents.shape[0]

    @property
    def lie_in_rows(self) -> bool:
        return self.latents.dim() == 3

    @property
    def block_size(self) -> int:
        return self.latents.shape[1] * (1 if self.lie_in_rows else PANEL)

    @property
    def dim(self) -> int:
        """R + P."""
        return self.rank + self.key_dim

    @property
    def width(self) -> int:
        """W."""
        return 2 * self.latents.shape[2]

    @cached_property
    def arguments(self) -> tuple[int, int, int, int]:
        """Address and sizes, as the kernels take them."""
        return self.latents.data_ptr(), self.num_blocks, self.dim, self.block_size


@dataclass(frozen=True)
class LatentStorage(RemembersAddresses):
    """The blocks of every layer; a block number means the same positions in all of them."""

    layers: tuple[LatentBlocks, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.layers[0].latents.dtype

    @cached_property
    def arguments(self) -> Tensor:
        """(layers, 8) int64: every layer's, as the pass in one call takes them: keys of one head, and no values."""
        rows = []
        for layer in self.layers:
            address, num_blocks, dim, block_size = layer.arguments
            rows.append((address, 0, 0, 0, num_blocks, 1, dim, block_size))
        return torch.tensor(rows, device="cpu")


def allocate_latent_blocks(
    num_layers: int,
    num_blocks: int,
    rank: int,
    key_dim: int,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> LatentStorage:
    """Return empty blocks of every layer for latents of `rank` numbers and shared keys of `key_dim`.

    Raises: ConfigError for a block_size that is no multiple of 32, or a dtype that is not a floating-point one.
    """
    check_block_size(block_size)
    if not dtype.is_floating_point:
        raise ConfigError(
            f"a cache of {str(dtype).removeprefix('torch.')} is asked for; the vectors of latent attention are small "
            f"already and are kept in a floating-point dtype; use bf16."
        )
    width = -(-(rank + key_dim) // PANEL) * PANEL
    shape: tuple[int, ...] = (num_layers, num_blocks, block_size // PANEL, width // 2, PANEL, 2)
    if device.type not in ("cpu", "meta"):
        shape = (num_layers, num_blocks, block_size, rank + key_dim)
    # One piece for all layers, as of keys and values.
    memory = zeros_on_huge_pages(math.prod(shape) * dtype.itemsize, device).view(dtype).view(shape)
    return LatentStorage(tuple(LatentBlocks(layer, rank, key_dim) for layer in memory))


@untraced
def write_latents(latents: Tensor, blocks: LatentBlocks, batch: PagedBatch) -> None:
    """Put the new tokens' latents and shared keys (T, R + P), of the cache's dtype, into their blocks."""
    assert latents.shape == (batch.num_tokens, blocks.dim), (latents.shape, blocks.dim, batch.starts)
    if blocks.lie_in_rows:
        slots = batch.slots_on(latents.device, block_size=blocks.block_size, num_blocks=blocks.num_blocks)
        blocks.latents.view(-1, blocks.dim).index_copy_(0, slots, latents.to(blocks.latents.dtype))
        return
    library = _library(latents, blocks)
    if library is None:
        _write_reference(latents, blocks, batch)
        return
    latents = latents if latents.stride(1) == 1 else latents.contiguous()
    failed = library.function("moesaic_latent_write", "pii" + "piii" + "pppii")(
        latents.data_ptr(), latents.stride(0), latents.shape[0], *blocks.arguments, *batch.arguments
    )
    assert not failed, (batch, blocks.num_blocks)


def read_latents(blocks: LatentBlocks, table: Tensor, length: int) -> Tensor:
    """Return the vectors (L, R + P) of a sequence's first `length` positions."""
    used = table[: -(-length // blocks.block_size)].long().to(blocks.latents.device)
    if blocks.lie_in_rows:
        return blocks.latents[used].flatten(0, 1)[:length]
    # (n, P, W/2, 32, 2) -> (n, P, 32, W/2, 2)
    vectors = blocks.latents[used].transpose(2, 3).flatten(0, 2).flatten(1)
    return vectors[:length, : blocks.dim]


@untraced
def latent_attention(query: Tensor, blocks: LatentBlocks, batch: PagedBatch, *, scale: float) -> Tensor:
    """Return (T, A, R): the mean of the latents of each token's sequence up to itself, weighed by its query.

    Scores, weights and their sums are fp32. scale: on the products of queries and vectors.

    Shapes: query (T, A, R + P).
    """
    num_tokens, num_heads, dim = query.shape
    assert dim == blocks.dim and num_tokens == batch.num_tokens, (query.shape, blocks.dim, batch.starts)
    assert not (query.requires_grad and torch.is_grad_enabled()), "it is for inference: it has no gradient"
    assert scale > 0, scale
    if select.uses_triton(query.device):
        return _attention_on_cuda(query, blocks, batch, scale)
    library = _library(query, blocks)
    if library is None:
        return _attention_reference(query, blocks, batch, scale)
    query = F.pad(query, (0, blocks.width - dim)).contiguous()
    channels = -(-blocks.rank // PANEL) * PANEL
    out = torch.empty(num_tokens, num_heads, channels, dtype=torch.bfloat16, device="cpu")
    failed = library.function("moesaic_latent_attention", "ppiiif" + "piii" + "pppii")(
        query.data_ptr(), out.data_ptr(), num_tokens, num_heads, blocks.rank, scale, *blocks.arguments,
        *batch.arguments,
    )  # fmt: skip
    assert not failed, (batch, blocks.num_blocks)
    return out[..., : blocks.rank]


def _library(x: Tensor, blocks: LatentBlocks) -> select.Library | None:
    if x.device.type != "cpu" or x.dtype is not torch.bfloat16 or blocks.latents.dtype is not torch.bfloat16:
        return None
    return select.cpu_library()


def _attention_on_cuda(query: Tensor, blocks: LatentBlocks, batch: PagedBatch, scale: float) -> Tensor:
    from moesaic.kernels.triton import attention

    assert batch.is_inside, (batch, blocks.num_blocks)
    return attention.attend(
        query.contiguous(), blocks.latents, None, None, batch, dim=blocks.rank, kv_heads=1,
        block_size=blocks.block_size, scale=scale, window=None, sinks=None,
    )  # fmt: skip


def _write_reference(latents: Tensor, blocks: LatentBlocks, batch: PagedBatch) -> None:
    size, device = blocks.block_size, blocks.latents.device
    sequences = torch.arange(batch.lengths.shape[0], device="cpu").repeat_interleave(batch.starts.diff())
    positions = batch.positions
    block = batch.block_tables[sequences, positions // size].long()
    assert bool(((block >= 0) & (block < blocks.num_blocks)).all()) and batch.is_inside, (batch, blocks.num_blocks)
    block, inside = block.to(device), (positions % size).to(device)
    panel, place = inside // PANEL, inside % PANEL
    padded = F.pad(latents, (0, blocks.width - blocks.dim)).unflatten(1, (-1, 2))  # (T, W/2, 2)
    fresh = place == 0  # what no position has written yet is multiplied by a weight of 0: it must be finite
    blocks.latents[block[fresh], panel[fresh]] = 0
    blocks.latents[block, panel, :, place] = padded.to(blocks.latents.dtype)


def _attention_reference(query: Tensor, blocks: LatentBlocks, batch: PagedBatch, scale: float) -> Tensor:
    num_tokens, num_heads, _ = query.shape
    assert batch.is_inside, (batch, blocks.num_blocks)
    starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
    out = query.new_empty(num_tokens, num_heads, blocks.rank)
    for sequence, length in enumerate(lengths):
        first, last = starts[sequence], starts[sequence + 1]
        if first == last:
            continue
        vectors = read_latents(blocks, batch.block_tables[sequence], length).float()
        rows = max(1, SCORES // (num_heads * length))
        for begin in range(first, last, rows):
            end = min(begin + rows, last)
            visible = length - last + end  # of the last of these tokens
            asked = query[begin:end].float().flatten(0, 1)
            scores = (asked @ vectors[:visible].t()).view(end - begin, num_heads, visible).mul_(scale)
            if end - begin > 1:
                hidden = torch.ones(end - begin, visible, dtype=torch.bool, device=query.device)
                scores.masked_fill_(hidden.triu_(visible - (end - begin) + 1)[:, None], float("-inf"))
            weights = torch.softmax(scores, -1)
            out[begin:end] = (weights.flatten(0, 1) @ vectors[:visible, : blocks.rank]).view(end - begin, num_heads, -1)
    return out
