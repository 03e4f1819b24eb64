"""Runs a model over the parts of a step: the tensors that say what is computed, the pass, and logits where needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.kernels import select
from moesaic.kernels.decode import Decoded
from moesaic.kernels.paged_attention import PagedBatch
from moesaic.logs import logger
from moesaic.model.kv_cache import BatchCache, CacheStep, allocate_storage
from moesaic.model.transformer import Transformer

# Texts that are continued at once, in a warm-up: more are computed in the same form.
_WARM_ROWS = 128


@dataclass(frozen=True)
class Part:
    """New tokens of one sequence, which end at position `length`, and the blocks of all its positions."""

    tokens: Sequence[int]
    length: int
    blocks: Sequence[int]


class Runner:
    """A model and its memory for keys and values, in blocks that others hand out."""

    def __init__(self, model: Transformer, num_blocks: int, *, block_size: int, dtype: torch.dtype) -> None:
        self.model = model.eval()
        self._dtype, self._device = dtype, model.device
        self._num_blocks, self._block_size = num_blocks, block_size
        self._storage = allocate_storage(
            model.config, num_blocks, block_size=block_size, dtype=dtype, device=model.device
        )

    def run(self, parts: Sequence[Part], rows: Sequence[int] = ()) -> Decoded:
        """Compute the new tokens of all parts, end to end, and keep their keys and values.

        rows: of these tokens, strictly rising, those whose logits are wanted.
        """
        tables = np.zeros((len(parts), max(len(part.blocks) for part in parts)), dtype=np.int32)
        for table, part in zip(tables, parts, strict=True):
            table[: len(part.blocks)] = part.blocks
        token_ids = [token for part in parts for token in part.tokens]
        are_single = all(len(part.tokens) == 1 for part in parts)
        starts = range(len(parts) + 1) if are_single else [0, *accumulate(len(part.tokens) for part in parts)]
        batch = PagedBatch(
            _tensor(starts, np.int32), _tensor([part.length for part in parts], np.int32), torch.from_numpy(tables)
        )
        tokens = _tensor(token_ids, np.int64)
        wanted = range(len(token_ids)) if len(rows) == len(token_ids) else rows
        return self.model.infer(
            tokens.to(self._device, non_blocking=True),
            CacheStep(self._storage, batch),
            _tensor(wanted, np.int64) if rows else None,
        )

    def warm_up(self, most_tokens: int) -> None:
        """Have kernels compiled that are otherwise at their first use, while others wait: on CUDA.

        They differ with the number of a pass's new tokens, and for a context that is computed in parts. Before any
        sequence has blocks: their contents are lost.
        """
        if not select.uses_triton(self._device):
            return
        logger.info("Preparing the kernels for this GPU; what it has not compiled yet takes some seconds.")
        longest = min(self._num_blocks * self._block_size, self.model.config.max_positions)
        counts = [1 << power for power in range(min(most_tokens, longest).bit_length())]
        for new, length in [*((count, count) for count in counts), (1, longest)]:
            part = Part([0] * new, length, range(-(-length // self._block_size)))
            self.run([part], range(min(new, _WARM_ROWS)))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits (R, V) on the CPU, where tokens are chosen."""
        return self.model.logits(hidden).cpu()

    @torch.no_grad()
    def embed(self, tokens: Sequence[int], *, chunk: int) -> Tensor:
        """Return the mean (H,) fp32 of a text's final hidden states, with memory of its own for keys and values."""
        model = self.model
        cache = BatchCache(model.config, 1, len(tokens), dtype=self._dtype, device=model.device)
        total = torch.zeros(model.config.hidden_size, dtype=torch.float32)
        for start in range(0, len(tokens), chunk):
            part = torch.tensor([list(tokens[start : start + chunk])], device=model.device)
            total += model(part, cache=cache).hidden[0].float().sum(0).cpu()
        return total / len(tokens)


def _tensor(numbers: Sequence[int], dtype: type[np.integer[Any]]) -> Tensor:
    """For reading: ranges from 0 on, as steps of single tokens need them, are kept."""
    # In less than half of the time of torch.tensor.
    return (
        _counting(len(numbers), np.dtype(dtype))
        if isinstance(numbers, range)
        else torch.from_numpy(np.array(numbers, dtype))
    )


@lru_cache(maxsize=256)
def _counting(count: int, dtype: np.dtype[Any]) -> Tensor:
    return torch.from_numpy(np.arange(count, dtype=dtype))


def block_bytes(model: Transformer, *, block_size: int, dtype: torch.dtype) -> int:
    """Return the memory of one block in all layers."""
    one = allocate_storage(model.config, 1, block_size=block_size, dtype=dtype, device=model.device)
    return sum(value.nbytes for layer in one.layers for value in vars(layer).values() if isinstance(value, Tensor))
