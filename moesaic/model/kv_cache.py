"""What is kept of the positions already seen: the protocol that a model asks of a cache, and the one of a batch.

Keys and values, and attention over them, are kernels/paged_attention; the vectors of latent attention, that they are
made from, kernels/latent_attention.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from moesaic.config.model import ModelConfig
from moesaic.errors import GenerationError
from moesaic.kernels.decode import Storage
from moesaic.kernels.latent_attention import allocate_latent_blocks
from moesaic.kernels.paged_attention import PagedBatch, allocate_blocks


@dataclass(frozen=True)
class CacheStep:
    """One forward pass: where every layer's part of the cache lies, and which positions of which sequences are new."""

    storage: Storage
    batch: PagedBatch


def allocate_storage(
    config: ModelConfig, num_blocks: int, *, block_size: int, dtype: torch.dtype, device: torch.device
) -> Storage:
    """Return empty blocks for every layer, of the kind that the model's attention reads.

    Raises: ConfigError for a block_size or a dtype that this kind does not have.
    """
    latent = config.latent_attention
    if latent is not None:
        return allocate_latent_blocks(
            config.num_layers, num_blocks, latent.kv_rank, latent.rope_head_dim, block_size=block_size, dtype=dtype,
            device=device,
        )  # fmt: skip
    return allocate_blocks(
        config.num_layers, num_blocks, config.num_kv_heads, config.head_dim, block_size=block_size, dtype=dtype,
        device=device,
    )  # fmt: skip


def copy_blocks(source: Storage, from_blocks: Sequence[int], target: Storage, to_blocks: Sequence[int]) -> None:
    """Copy blocks of every layer from one storage to another of the same kind, or within one."""
    # Ranges as slices, which need no memory between.
    taken, given = (slice(each.start, each.stop) if isinstance(each, range) and each.step == 1 else list(each)
                    for each in (from_blocks, to_blocks))  # fmt: skip
    pairs: Iterable[tuple[Any, Any]] = zip(source.layers, target.layers, strict=True)
    for old, new in pairs:
        for field in fields(old):
            values = getattr(old, field.name)
            if isinstance(values, Tensor):  # every tensor of a layer has the blocks in front
                getattr(new, field.name)[given] = values[taken]


class KVCache(Protocol):
    """What a model asks of a cache, once a forward pass."""

    def extend(self, batch_size: int, length: int) -> CacheStep:
        """Make room for the new tokens (batch_size, length) of a pass, and say where.

        A cache of ragged sequences is given them end to end, as a batch of one, and knows itself whose they are.
        """
        ...

    def retract(self, length: int) -> None:
        """Forget the last `length` positions: of a pass that could not be computed."""
        ...


class BatchCache:
    """The cache of sequences of equal length, with all the memory it will need from the start."""

    def __init__(
        self, config: ModelConfig, batch_size: int, max_length: int, *, dtype: torch.dtype, device: torch.device,
        block_size: int = 32,
    ) -> None:  # fmt: skip
        self.max_length = max_length
        self.length = self._step_length = 0
        self._starts = torch.zeros(1, dtype=torch.int32, device="cpu")
        blocks_each = -(-max_length // block_size)
        self._tables = torch.arange(batch_size * blocks_each, dtype=torch.int32, device="cpu").view(
            batch_size, blocks_each
        )
        self._storage = allocate_storage(
            config, batch_size * blocks_each, block_size=block_size, dtype=dtype, device=device
        )

    def extend(self, batch_size: int, length: int) -> CacheStep:
        """Raises: GenerationError for more positions than the cache was made for."""
        assert batch_size == self._tables.shape[0], (batch_size, self._tables.shape)
        end = self.length + length
        if end > self.max_length:
            raise GenerationError(
                f"the cache would hold {end} positions; it was made for {self.max_length}; make it longer, or generate "
                f"fewer tokens."
            )
        self.length = end
        if length != self._step_length:  # token after token it is the same
            self._step_length = length
            self._starts = torch.arange(0, length * (batch_size + 1), length, dtype=torch.int32, device="cpu")
        lengths = torch.full((batch_size,), end, dtype=torch.int32, device="cpu")
        return CacheStep(self._storage, PagedBatch(self._starts, lengths, self._tables))

    def retract(self, length: int) -> None:
        assert 0 <= length <= self.length, (length, self.length)
        self.length -= length
