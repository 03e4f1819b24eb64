"""Runs a model over the parts of a step: the tensors that say what is computed, the pass, and logits where needed."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moesaic.kernels.decode import Decoded
from moesaic.kernels.paged_attention import PagedBatch
from moesaic.model.kv_cache import BatchCache, CacheStep, allocate_storage
from moesaic.model.transformer import Transformer


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
        batch = PagedBatch(
            _tensor([0, *accumulate(len(part.tokens) for part in parts)], np.int32),
            _tensor([part.length for part in parts], np.int32),
            torch.from_numpy(tables),
        )
        tokens = _tensor([token for part in parts for token in part.tokens], np.int64)
        step = CacheStep(self._storage, batch)
        return self.model.infer(tokens.to(self._device), step, _tensor(rows, np.int64) if rows else None)

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
    # In less than half of the time of torch.tensor.
    return torch.from_numpy(np.array(numbers, dtype=dtype))


def block_bytes(model: Transformer, *, block_size: int, dtype: torch.dtype) -> int:
    """Return the memory of one block in all layers."""
    one = allocate_storage(model.config, 1, block_size=block_size, dtype=dtype, device=model.device)
    return sum(value.nbytes for layer in one.layers for value in vars(layer).values() if isinstance(value, Tensor))
