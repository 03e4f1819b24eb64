"""The cache that transformers' `generate` keeps: ragged sequences in blocks, which are shared, copied and cropped.

transformers counts columns of a padded batch; here padding takes no place, so that a sequence's positions are the same
as without it. Which block is whose is decided in lists; the blocks themselves are model/kv_cache's.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from moesaic.config.model import ModelConfig
from moesaic.errors import GenerationError
from moesaic.kernels.paged_attention import PagedBatch
from moesaic.model.kv_cache import CacheStep, Storage, allocate_storage, copy_blocks


@dataclass
class _Sequence:
    """Its positions, and the blocks that hold them, in order; other sequences may have the same blocks."""

    length: int
    blocks: list[int]


class PagedCache(Cache):
    """The keys and values of a batch, made empty; a model's forward takes it, extends it and gives it back."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype, device: torch.device, block_size: int = 32) -> None:
        super().__init__(layers=[])
        self._config, self._dtype, self._device, self._block_size = config, dtype, device, block_size
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self._storage: Storage | None = None
        self._users: list[int] = []  # of each block, how many sequences have it
        self._free: list[int] = []
        self._sequences: list[_Sequence] = []
        self._tables = torch.zeros(0, 0, dtype=torch.int32, device="cpu")  # (B, more than any has), their blocks
        self._columns = torch.ones(0, 0, dtype=torch.bool, device="cpu")  # (B, columns), False for padding
        self._next: CacheStep | None = None
        self._before: tuple[list[int], Tensor] = [], self._columns  # the last prepare: lengths and columns

    def prepare(self, columns: Tensor) -> None:
        """Make room for the next columns (B, S) of the batch, bool on the CPU and False for padding.

        Raises: GenerationError for another batch size than before, and for more positions than the model has.
        """
        if not self._sequences:
            self._sequences = [_Sequence(0, []) for _ in range(columns.shape[0])]
            self._tables = torch.zeros(columns.shape[0], 0, dtype=torch.int32, device="cpu")
            self._columns = columns[:, :0]
        if len(self._sequences) != columns.shape[0]:
            raise GenerationError(
                f"{columns.shape[0]} sequences were given to a cache of {len(self._sequences)}; the same sequences, in "
                f"the same order, are required; start with a new cache."
            )
        counts = columns.sum(1)
        new: list[int] = counts.tolist()
        ends = [sequence.length + count for sequence, count in zip(self._sequences, new, strict=True)]
        if max(ends) > self._config.max_positions:
            raise GenerationError(
                f"a sequence would have {max(ends)} positions; the model has {self._config.max_positions}; shorten the "
                f"prompt or lower max_new_tokens."
            )
        self._make_room(ends)
        self._before = [sequence.length for sequence in self._sequences], self._columns
        for sequence, end in zip(self._sequences, ends, strict=True):
            sequence.length = end
        self._columns = torch.cat([self._columns, columns], 1)
        starts = torch.zeros(len(new) + 1, dtype=torch.int32, device="cpu")
        starts[1:] = counts.cumsum(0)
        width = max(len(sequence.blocks) for sequence in self._sequences)
        tables = self._tables[:, :width].contiguous()
        assert self._storage is not None
        self._next = CacheStep(
            self._storage, PagedBatch(starts, torch.tensor(ends, dtype=torch.int32, device="cpu"), tables)
        )

    def extend(self, batch_size: int, length: int) -> CacheStep:
        """Return what `prepare` made ready, for its valid tokens end to end (moesaic.model.kv_cache.KVCache)."""
        step, self._next = self._next, None
        assert step is not None and (batch_size, length) == (1, step.batch.num_tokens), (batch_size, length, step)
        return step

    def retract(self, length: int) -> None:
        """Forget what the last `prepare` made room for, `length` tokens in all, whose pass could not be computed."""
        lengths, self._columns = self._before
        assert sum(sequence.length for sequence in self._sequences) - sum(lengths) == length, (lengths, length)
        for sequence, before in zip(self._sequences, lengths, strict=True):
            self._cut(sequence, before)

    def _make_room(self, ends: Sequence[int]) -> None:
        """Give each sequence blocks of its own for the positions up to its end."""
        size, needed = self._block_size, 0
        copied: list[int] = []
        users: dict[int, int] = {}  # of blocks in which a sequence goes on, how many are left
        for number, (sequence, end) in enumerate(zip(self._sequences, ends, strict=True)):
            needed += -(-end // size) - len(sequence.blocks)
            if end > sequence.length and sequence.length % size:
                block = sequence.blocks[-1]
                if users.setdefault(block, self._users[block]) > 1:
                    # Another sequence too has begun it.
                    users[block] -= 1
                    copied.append(number)
        needed += len(copied)
        if needed > len(self._free) or self._storage is None:
            self._grow(needed - len(self._free))  # which may fail, so that nothing has changed before
        for block, count in users.items():
            self._users[block] = count
        assert self._storage is not None
        width = -(-max(ends) // size)
        if width > self._tables.shape[1]:
            self._tables = torch.nn.functional.pad(self._tables, (0, 2 * width - self._tables.shape[1]))
        if copied:
            shared = [self._sequences[number].blocks.pop() for number in copied]
            copy_blocks(self._storage, shared, self._storage, [self._add_block(number) for number in copied])
        for number, end in enumerate(ends):
            while len(self._sequences[number].blocks) * size < end:
                self._add_block(number)

    def _add_block(self, number: int) -> int:
        """Give a sequence another block, and return it."""
        block, blocks = self._free.pop(), self._sequences[number].blocks
        self._users[block] = 1
        self._tables[number, len(blocks)] = block
        blocks.append(block)
        return block

    def _cut(self, sequence: _Sequence, length: int) -> None:
        """Forget a sequence's positions from a length on."""
        sequence.length = length
        kept = -(-length // self._block_size)
        for block in sequence.blocks[kept:]:
            self._users[block] -= 1
            if not self._users[block]:
                self._free.append(block)
        del sequence.blocks[kept:]

    def _grow(self, at_least: int) -> None:
        """Have more blocks, and half as many again; on the CPU those that are not used are only addresses."""
        before = len(self._users)
        count = before + at_least
        count += count // 2 + 1
        storage = allocate_storage(
            self._config, count, block_size=self._block_size, dtype=self._dtype, device=self._device
        )
        if self._storage is not None:
            copy_blocks(self._storage, range(before), storage, range(before))
        self._storage = storage
        self._users += [0] * (count - before)
        self._free += range(before, count)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these sequences, in this order, any of them several times; they share their blocks."""
        chosen: list[int] = indices.tolist()
        sequences = [self._sequences[index] for index in chosen]
        self._sequences = [_Sequence(sequence.length, list(sequence.blocks)) for sequence in sequences]
        self._users = [0] * len(self._users)
        for sequence in self._sequences:
            for block in sequence.blocks:
                self._users[block] += 1
        self._free = [block for block, users in enumerate(self._users) if not users]
        rows = torch.tensor(chosen, dtype=torch.int64, device="cpu")
        self._columns, self._tables = self._columns[rows], self._tables[rows]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The same under the name that beam search calls."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Have every sequence several times, side by side."""
        self.batch_select_indices(torch.arange(len(self._sequences), device="cpu").repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last columns: -n forgets n; as in earlier transformers, n > 0 keeps the first n at most."""
        removed = -tokens_to_remove if tokens_to_remove <= 0 else max(self.get_seq_length() - tokens_to_remove, 0)
        kept = max(self.get_seq_length() - removed, 0)
        counts: list[int] = self._columns[:, kept:].sum(1).tolist()
        for sequence, count in zip(self._sequences, counts, strict=True):
            self._cut(sequence, sequence.length - count)
        self._columns = self._columns[:, :kept]

    @property
    def columns(self) -> Tensor:
        """(B, columns) bool of everything seen so far, False for padding."""
        return self._columns

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns seen, padding included."""
        return self._columns.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """Return the columns that a mask would have with the next ones, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Return -1: it grows."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """The same under its earlier name."""
        return -1

    @property
    def batch_size(self) -> int:
        return len(self._sequences)

    @property
    def max_batch_size(self) -> int:
        """The same under its earlier name."""
        return self.batch_size

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_initialized(self) -> bool:
        return bool(self._sequences)

    @property
    def is_croppable(self) -> bool:
        return True

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self)

    def __len__(self) -> int:
        return self._config.num_layers

    def __repr__(self) -> str:
        lengths = [sequence.length for sequence in self._sequences]
        used = len(self._users) - len(self._free)
        return f"PagedCache(positions={lengths}, blocks={used} of {self._block_size})"

    def __deepcopy__(self, memo: dict[int, object]) -> "PagedCache":
        """Blocks hold the addresses of their tensors, so a copy has storage of its own."""
        other = PagedCache(self._config, dtype=self._dtype, device=self._device, block_size=self._block_size)
        other._sequences = copy.deepcopy(self._sequences, memo)
        other._columns, other._tables = self._columns.clone(), self._tables.clone()
        other._users, other._free = list(self._users), list(self._free)
        if self._storage is not None:
            every = range(len(self._users))
            other._storage = allocate_storage(
                self._config, len(every), block_size=self._block_size, dtype=self._dtype, device=self._device
            )
            copy_blocks(self._storage, every, other._storage, every)
        return other
