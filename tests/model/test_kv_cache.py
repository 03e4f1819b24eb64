"""The contiguous cache gives back all that was appended, per layer, and refuses more than it holds."""

import pytest
import torch

from moesaic.errors import GenerationError
from moesaic.model.kv_cache import ContiguousCache


def make_cache(max_length: int = 5) -> ContiguousCache:
    return ContiguousCache(
        2, 3, max_length, num_kv_heads=2, head_dim=4, dtype=torch.float32, device=torch.device("cpu")
    )


def test_gives_back_what_was_appended() -> None:
    cache = make_cache()
    pieces = [torch.randn(2, 2, 3, length, 2, 4) for length in (2, 1, 2)]  # (layer, key or value, B, S, KV, D)
    for number, piece in enumerate(pieces):
        assert cache.length == (0, 2, 3)[number]
        for layer in range(2):
            keys, values = cache.append(layer, piece[layer, 0], piece[layer, 1])
            everything = torch.cat(pieces[: number + 1], 3)[layer]
            assert torch.equal(keys, everything[0]) and torch.equal(values, everything[1])
    assert cache.length == 5


def test_refuses_more_than_it_was_made_for() -> None:
    cache = make_cache()
    piece = torch.zeros(3, 4, 2, 4)
    cache.append(0, piece, piece)
    with pytest.raises(GenerationError, match="would hold 8 positions; it was made for 5; make it longer"):
        cache.append(0, piece, piece)
