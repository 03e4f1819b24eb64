"""Keys and values of the positions already seen: the protocol that attention needs, and the plain contiguous cache."""

from typing import Protocol

import torch
from torch import Tensor

from moesaic.errors import GenerationError


class KVCache(Protocol):
    """What attention asks of a cache. `length` is the number of positions that all layers have stored."""

    @property
    def length(self) -> int: ...

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store key and value (B, S, KV, D) of new positions; return all of the layer's, (B, L, KV, D)."""
        ...


class ContiguousCache:
    """One preallocated tensor per layer; memory num_layers * 2 * B * max_length * KV * D numbers."""

    def __init__(
        self, num_layers: int, batch_size: int, max_length: int, *, num_kv_heads: int, head_dim: int,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        shape = (num_layers, 2, batch_size, max_length, num_kv_heads, head_dim)
        self._store = torch.empty(shape, dtype=dtype, device=device)
        self._lengths = [0] * num_layers
        self.max_length = max_length

    @property
    def length(self) -> int:
        return self._lengths[-1]

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        start = self._lengths[layer]
        end = start + key.shape[1]
        if end > self.max_length:
            raise GenerationError(
                f"the cache would hold {end} positions; it was made for {self.max_length}; make it longer, or generate "
                f"fewer tokens."
            )
        keys, values = self._store[layer, 0], self._store[layer, 1]
        keys[:, start:end], values[:, start:end] = key, value
        self._lengths[layer] = end
        return keys[:, :end], values[:, :end]
