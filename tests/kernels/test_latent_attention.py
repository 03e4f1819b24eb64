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
# (rank, shared key, heads): as models have them (DeepSeek-V2-Lite's, GLM's heads, more heads than a task has rows), and
# sizes that nothing divides.
SHAPES = [(512, 64, 16), (64, 32, 20), (40, 6, 70), (RANK, KEY_DIM, HEADS)]
# Decode, a prompt, chunks that continue, a sequence that is not asked, one position, one without any.
LENGTHS, NEW = [300, 7, 45, 64, 1, 33, 0], [1, 7, 20, 0, 1, 33, 0]
# One sequence whose splits are shared out; one that is long beside short ones; a long prompt.
OTHERS = [([1100], [1]), ([1100, 40, 3, 290], [2, 1, 1, 1]), ([600], [600])]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make_batch(lengths: list[int], ends: list[int], new: list[int], *, block_size: int) -> tuple[PagedBatch, int]:
    needed = [-(-length // block_size) for length in lengths]
    free = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(0))
    tables, taken = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32), 0
    for row, count in enumerate(needed):
        tables[row, :count] = free[taken : taken + count]
        taken += count
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    return PagedBatch(starts, torch.tensor(ends, dtype=torch.int32), tables), len(free)


def filled(
    vectors: list[Tensor], new: list[int], *, rank: int, block_size: int = 32, dtype: torch.dtype = torch.float32
) -> tuple[LatentBlocks, PagedBatch]:
    """Everything before the new tokens in one call, they in a second."""
    lengths = [len(each) for each in vectors]
    before = [length - count for length, count in zip(lengths, new, strict=True)]
    batch, num_blocks = make_batch(lengths, lengths, new, block_size=block_size)
    key_dim = vectors[0].shape[1] - rank
    blocks = allocate_latent_blocks(
        1, num_blocks, rank, key_dim, block_size=block_size, dtype=dtype, device=CPU
    ).layers[0]
    blocks.latents.fill_(float("nan"))  # what an earlier owner left must not be seen
    for ends, counts in ((before, before), (lengths, new)):
        step, _ = make_batch(lengths, ends, counts, block_size=block_size)
        rows = [each[end - count : end] for each, end, count in zip(vectors, ends, counts, strict=True)]
        write_latents(torch.cat(rows), blocks, step)
    return blocks, batch


def sequences(lengths: list[int] = LENGTHS, dim: int = RANK + KEY_DIM) -> list[Tensor]:
    return [normal(length, dim, seed=seed) for seed, length in enumerate(lengths)]


def expected(query: Tensor, vectors: list[Tensor], batch: PagedBatch, rank: int, scale: float) -> Tensor:
    out = []
    for (first, last), whole in zip(pairwise(batch.starts.tolist()), vectors, strict=True):
        count, length = last - first, len(whole)
        hidden = torch.ones(count, length, dtype=torch.bool).triu_(length - count + 1)
        scores = torch.einsum("tad,ld->tal", query[first:last].double(), whole.double()) * scale
        weights = scores.masked_fill(hidden[:, None], float("-inf")).softmax(-1)
        out.append(weights @ whole[:, :rank].double())
    return torch.cat(out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [32, 96])
def test_what_was_written_is_read_back(kernels: str, block_size: int, dtype: torch.dtype) -> None:
    vectors = [each.to(dtype) for each in sequences()]
    blocks, batch = filled(vectors, NEW, rank=RANK, block_size=block_size, dtype=dtype)
    for number, whole in enumerate(vectors):
        for length in {1, len(whole) // 2, len(whole)} - {0}:
            if length <= len(whole):
                assert torch.equal(read_latents(blocks, batch.block_tables[number], length), whole[:length])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("lengths", "new"), [(LENGTHS, NEW), *OTHERS])
def test_equals_attention_over_whole_sequences(
    kernels: str, lengths: list[int], new: list[int], shape: tuple[int, int, int]
) -> None:
    rank, key_dim, heads = shape
    vectors = [each.bfloat16() for each in sequences(lengths, rank + key_dim)]
    blocks, batch = filled(vectors, new, rank=rank, dtype=torch.bfloat16)
    query, scale = normal(sum(new), heads, rank + key_dim, seed=9).bfloat16(), 2 * (rank + key_dim) ** -0.5
    out = latent_attention(query, blocks, batch, scale=scale)
    assert out.dtype == torch.bfloat16 and out.shape == (sum(new), heads, rank)
    # Probabilities are rounded to bf16 (2^-9 each, of values near 1) and so is the result.
    wanted = expected(query, vectors, batch, rank, scale)
    torch.testing.assert_close(out.double(), wanted, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("at_once", [1, 1000, 1 << 23])
def test_fp32_is_exact_to_rounding(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of any size too."""
    monkeypatch.setattr(module, "SCORES", at_once)
    vectors = sequences()
    blocks, batch = filled(vectors, NEW, rank=RANK)
    query = normal(sum(NEW), HEADS, RANK + KEY_DIM, seed=9)
    wanted = expected(query, vectors, batch, RANK, 0.4)
    torch.testing.assert_close(latent_attention(query, blocks, batch, scale=0.4).double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_token_gives_the_same_bits_whoever_else_is_in_the_call_and_with_any_threads(
    kernels: str, shape: tuple[int, int, int]
) -> None:
    if kernels == "reference":
        pytest.skip("PyTorch's products depend on how many rows they have")
    rank, key_dim, heads = shape
    lengths, new = [700, 290, 40], [130, 3, 1]
    vectors = [each.bfloat16() for each in sequences(lengths, rank + key_dim)]
    blocks, batch = filled(vectors, new, rank=rank, dtype=torch.bfloat16)
    query = normal(sum(new), heads, rank + key_dim, seed=9).bfloat16()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        whole = latent_attention(query, blocks, batch, scale=0.1)
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for token in (0, 57, 129, 130, 132, 133):
                sequence = [token < end for end in batch.starts[1:].tolist()].index(True)
                length = lengths[sequence] - (int(batch.starts[sequence + 1]) - 1 - token)
                alone = PagedBatch(
                    torch.tensor([0, 1], dtype=torch.int32), torch.tensor([length], dtype=torch.int32),
                    batch.block_tables[sequence][None].contiguous(),
                )  # fmt: skip
                out = latent_attention(query[token : token + 1], blocks, alone, scale=0.1)
                assert torch.equal(out[0], whole[token]), (threads, token)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_sequence_and_reaches_who_sees_it(kernels: str, bad: float) -> None:
    lengths, new = [300, 290], [2, 1]
    vectors = [each.bfloat16() for each in sequences(lengths, 40)]
    vectors[0][7, 3] = bad
    blocks, batch = filled(vectors, new, rank=32, dtype=torch.bfloat16)
    out = latent_attention(normal(3, 5, 40, seed=1).bfloat16(), blocks, batch, scale=0.1)
    assert not bool(out[:2].isfinite().all()) and bool(out[2].isfinite().all())


def test_integers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"a cache of int8 is asked for; .* floating-point dtype; use bf16"):
        allocate_latent_blocks(1, 2, RANK, KEY_DIM, block_size=32, dtype=torch.int8, device=CPU)


@pytest.mark.parametrize("block_size", [1, 31, 50])
def test_blocks_are_whole_panels(block_size: int) -> None:
    with pytest.raises(ConfigError, match=rf"block_size \({block_size}\) must be a multiple of 32, .*; use 32"):
        allocate_latent_blocks(1, 2, RANK, KEY_DIM, block_size=block_size, dtype=torch.bfloat16, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_positions_without_a_block_are_refused(kernels: str, dtype: torch.dtype) -> None:
    blocks, _ = filled([each.to(dtype) for each in sequences()], NEW, rank=RANK, dtype=dtype)
    batch = PagedBatch(*(torch.tensor(each, dtype=torch.int32) for each in ([0, 1], [33], [[0, 99]])))
    with pytest.raises(AssertionError):
        write_latents(torch.zeros(1, RANK + KEY_DIM, dtype=dtype), blocks, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_new_tokens_than_positions_are_refused(kernels: str, dtype: torch.dtype) -> None:
    blocks, _ = filled([each.to(dtype) for each in sequences()], NEW, rank=RANK, dtype=dtype)
    batch = PagedBatch(*(torch.tensor(each, dtype=torch.int32) for each in ([0, 3], [2], [[0]])))
    with pytest.raises(AssertionError):
        write_latents(torch.zeros(3, RANK + KEY_DIM, dtype=dtype), blocks, batch)
    with pytest.raises(AssertionError):
        latent_attention(torch.zeros(3, 2, RANK + KEY_DIM, dtype=dtype), blocks, batch, scale=1.0)
