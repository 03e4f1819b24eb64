"""Attention over a compressed cache equals attention over whole sequences of its vectors, however the calls are cut."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.kernels import latent_attention as module
from moesaic.kernels.latent_attention import (
    LatentBlocks,
    allocate_latent_blocks,
    latent_attention,
    read_latents,
    write_latents,
)
from moesaic.kernels.paged_attention import PagedBatch

CPU = torch.device("cpu")
RANK, KEY_DIM, HEADS = 9, 4, 3
# Decode, a prompt, chunks that continue, a sequence that is not asked, one position, one without any.
LENGTHS, NEW = [300, 7, 45, 64, 1, 33, 0], [1, 7, 20, 0, 1, 33, 0]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_batch(ends: list[int], new: list[int], *, block_size: int, in_a_row: bool) -> tuple[PagedBatch, int]:
    needed = [-(-length // block_size) for length in LENGTHS]
    free = torch.arange(sum(needed) + 3)
    if not in_a_row:
        free = torch.randperm(len(free), generator=torch.Generator().manual_seed(0))
    tables, taken = torch.full((len(LENGTHS), max(needed) + 1), -1, dtype=torch.int32), 0
    for row, count in enumerate(needed):
        tables[row, :count] = free[taken : taken + count]
        taken += count
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    return PagedBatch(starts, torch.tensor(ends, dtype=torch.int32), tables), len(free)


def filled(
    vectors: list[Tensor], *, block_size: int, in_a_row: bool, dtype: torch.dtype = torch.float32
) -> tuple[LatentBlocks, PagedBatch]:
    """Everything before the new tokens in one call, they in a second."""
    before = [length - new for length, new in zip(LENGTHS, NEW, strict=True)]
    batch, num_blocks = make_batch(LENGTHS, NEW, block_size=block_size, in_a_row=in_a_row)
    blocks = allocate_latent_blocks(num_blocks, RANK, KEY_DIM, block_size=block_size, dtype=dtype, device=CPU)
    blocks.latents.fill_(float("nan"))  # what an earlier owner left must not be seen
    for ends, counts in ((before, before), (LENGTHS, NEW)):
        step, _ = make_batch(ends, counts, block_size=block_size, in_a_row=in_a_row)
        rows = [each[end - count : end] for each, end, count in zip(vectors, ends, counts, strict=True)]
        write_latents(torch.cat(rows), blocks, step)
    return blocks, batch


def sequences() -> list[Tensor]:
    return [normal(length, RANK + KEY_DIM, seed=seed) for seed, length in enumerate(LENGTHS)]


@pytest.mark.parametrize("in_a_row", [False, True])
@pytest.mark.parametrize("block_size", [1, 32, 50])
def test_what_was_written_is_read_back(block_size: int, in_a_row: bool) -> None:
    vectors = sequences()
    blocks, batch = filled(vectors, block_size=block_size, in_a_row=in_a_row)
    for number, whole in enumerate(vectors):
        for length in {1, len(whole) // 2, len(whole)} - {0}:
            if length <= len(whole):
                got = read_latents(blocks, batch.block_tables[number], length)
                assert torch.equal(got, whole[:length])
                assert (got.data_ptr() == blocks.latents[batch.block_tables[number, 0]].data_ptr()) or not in_a_row


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 23])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2**-7)])
def test_equals_attention_over_whole_sequences(
    dtype: torch.dtype, tolerance: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of any size too."""
    monkeypatch.setattr(module, "_SCORES", at_once)
    vectors = [each.to(dtype) for each in sequences()]
    blocks, batch = filled(vectors, block_size=32, in_a_row=False, dtype=dtype)
    query = normal(sum(NEW), HEADS, RANK + KEY_DIM, seed=9).to(dtype)
    out = latent_attention(query, blocks, batch, scale=0.4)
    assert out.dtype == dtype and out.shape == (sum(NEW), HEADS, RANK)
    for (first, last), whole in zip(pairwise(batch.starts.tolist()), vectors, strict=True):
        for row in range(first, last):
            seen = whole[: len(whole) - (last - first) + row - first + 1].double()
            weights = torch.softmax(query[row].double() @ seen.t() * 0.4, -1)
            wanted = weights @ seen[:, :RANK]
            torch.testing.assert_close(out[row].double(), wanted, rtol=tolerance, atol=tolerance)


def test_integers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a cache of int8 is asked for; .* floating-point dtype; use bf16"):
        allocate_latent_blocks(2, RANK, KEY_DIM, block_size=32, dtype=torch.int8, device=CPU)


def test_positions_without_a_block_are_refused() -> None:
    blocks, _ = filled(sequences(), block_size=32, in_a_row=True)
    batch = PagedBatch(*(torch.tensor(each, dtype=torch.int32) for each in ([0, 1], [33], [[0, 99]])))
    with pytest.raises(AssertionError):
        write_latents(torch.zeros(1, RANK + KEY_DIM), blocks, batch)
