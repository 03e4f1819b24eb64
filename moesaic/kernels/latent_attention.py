"""Attention over a compressed cache that lies in blocks: one vector per token, which all heads read.

The vector is the latent that keys and values are products of, and behind it one key that all heads share and that knows
its position. Queries are brought into that space by the caller, so that all heads are queries of one key/value head.
Blocks, tables and batches are those of paged_attention.py; everything here is PyTorch's operations.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.kernels.paged_attention import PagedBatch

# Scores (fp32) that exist at once: a long prompt is taken in chunks.
_SCORES = 1 << 23


@dataclass(frozen=True)
class LatentBlocks:
    """One layer's blocks. Shapes: latents (blocks, block_size, R + P), a token's latent (R) and its shared key (P)."""

    latents: Tensor
    rank: int

    @property
    def num_blocks(self) -> int:
        return self.latents.shape[0]

    @property
    def block_size(self) -> int:
        return self.latents.shape[1]


@dataclass(frozen=True)
class LatentStorage:
    """The blocks of every layer; a block number means the same positions in all of them."""

    layers: tuple[LatentBlocks, ...]


def allocate_latent_blocks(
    num_blocks: int, rank: int, key_dim: int, *, block_size: int, dtype: torch.dtype, device: torch.device
) -> LatentBlocks:
    """Return empty blocks of one layer for latents of `rank` numbers and shared keys of `key_dim`.

    Raises: ConfigError for a dtype that is not a floating-point one.
    """
    if not dtype.is_floating_point:
        raise ConfigError(
            f"a cache of {str(dtype).removeprefix('torch.')} is asked for; the vectors of latent attention are small "
            f"already and are kept in a floating-point dtype; use bf16."
        )
    return LatentBlocks(torch.zeros(num_blocks, block_size, rank + key_dim, dtype=dtype, device=device), rank)


def write_latents(latents: Tensor, blocks: LatentBlocks, batch: PagedBatch) -> None:
    """Put the new tokens' latents and shared keys (T, R + P) into their blocks."""
    assert latents.shape == (int(batch.starts[-1]), blocks.latents.shape[2]), (latents.shape, blocks.latents.shape)
    sequences = torch.arange(batch.lengths.shape[0]).repeat_interleave(batch.starts.diff())
    positions = batch.positions
    block = batch.block_tables[sequences, positions // blocks.block_size].long()
    assert bool(((block >= 0) & (block < blocks.num_blocks)).all()), (batch, blocks.num_blocks)
    places = (block * blocks.block_size + positions % blocks.block_size).to(blocks.latents.device)
    blocks.latents.view(-1, blocks.latents.shape[2])[places] = latents.to(blocks.latents.dtype)


def read_latents(blocks: LatentBlocks, table: Tensor, length: int) -> Tensor:
    """Return the vectors (L, R + P) of a sequence's first `length` positions: a view where its blocks are in a row."""
    used = table[: -(-length // blocks.block_size)]
    first, count = int(used[0]), used.shape[0]
    is_run = torch.equal(used, torch.arange(first, first + count, dtype=used.dtype))
    whole = blocks.latents[first : first + count] if is_run else blocks.latents[used.to(blocks.latents.device)]
    return whole.flatten(0, 1)[:length]


def latent_attention(query: Tensor, blocks: LatentBlocks, batch: PagedBatch, *, scale: float) -> Tensor:
    """Return (T, A, R): the mean of the latents of each token's sequence up to itself, weighed by its query.

    Scores, weights and their sums are fp32. scale: on the products of queries and vectors.

    Shapes: query (T, A, R + P).
    """
    num_tokens, num_heads, width = query.shape
    starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
    assert width == blocks.latents.shape[2] and num_tokens == starts[-1], (query.shape, blocks.latents.shape, starts)
    out = query.new_empty(num_tokens, num_heads, blocks.rank)
    for sequence, length in enumerate(lengths):
        first, last = starts[sequence], starts[sequence + 1]
        if first == last:
            continue
        vectors = read_latents(blocks, batch.block_tables[sequence], length).float()
        rows = max(1, _SCORES // (num_heads * length))
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
