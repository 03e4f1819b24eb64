"""Attention over blocks equals attention over the whole sequence, whoever else is in the call and however it is cut."""

from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.errors import ConfigError
from moesaic.kernels import select
from moesaic.kernels.cpu.build import EMULATED_TILES
from moesaic.kernels.paged_attention import KVBlocks, PagedBatch, allocate_blocks, paged_attention, read_kv, write_kv

CPU = torch.device("cpu")
# (query heads, key/value heads, head_dim): grouped, one for all, one each, widths that no panel divides.
HEADS = [(8, 2, 64), (6, 1, 48), (3, 3, 7), (4, 2, 128)]


def make_batch(lengths: list[int], new: list[int], *, block_size: int, seed: int = 0) -> tuple[PagedBatch, int]:
    """Sequences whose blocks lie in any order in a pool, and the number of blocks in it."""
    needed = [-(-length // block_size) for length in lengths]
    free = torch.randperm(sum(needed) + 3, generator=torch.Generator().manual_seed(seed))
    tables = torch.full((len(lengths), max(needed) + 1), -1, dtype=torch.int32)
    taken = 0
    for row, count in enumerate(needed):
        tables[row, :count] = free[taken : taken + count]
        taken += count
    starts = torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()], dtype=torch.int32)
    return PagedBatch(starts, torch.tensor(lengths, dtype=torch.int32), tables), sum(needed) + 3


class Case:
    """Whole sequences, and a cache that holds them up to their new tokens' first."""

    def __init__(
        self, lengths: list[int], new: list[int], heads: tuple[int, int, int], *, dtype: torch.dtype = torch.bfloat16,
        cache_dtype: torch.dtype | None = None, block_size: int = 32,
    ) -> None:  # fmt: skip
        torch.manual_seed(len(lengths) + sum(heads))
        num_heads, num_kv_heads, head_dim = heads
        self.lengths, self.new = lengths, new
        self.batch, num_blocks = make_batch(lengths, new, block_size=block_size)
        self.blocks = allocate_blocks(
            1, num_blocks, num_kv_heads, head_dim, block_size=block_size, dtype=cache_dtype or dtype, device=CPU
        ).layers[0]
        for tensor in (self.blocks.keys, self.blocks.values, self.blocks.key_scales, self.blocks.value_scales):
            if tensor is not None and tensor.is_floating_point():
                tensor.fill_(float("nan"))  # what an earlier owner left must not be seen
        self.keys = [torch.randn(length, num_kv_heads, head_dim).to(dtype) for length in lengths]
        self.values = [torch.randn(length, num_kv_heads, head_dim).to(dtype) for length in lengths]
        self.query = torch.randn(sum(new), num_heads, head_dim).to(dtype)

    def write(self, ends: list[int], counts: list[int]) -> None:
        starts = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
        batch = PagedBatch(starts, torch.tensor(ends, dtype=torch.int32), self.batch.block_tables)

        def part(whole: list[Tensor]) -> Tensor:
            return torch.cat([rows[end - n : end] for rows, end, n in zip(whole, ends, counts, strict=True)])

        write_kv(part(self.keys), part(self.values), self.blocks, batch)

    def fill(self) -> "Case":
        """Everything before the new tokens in one call, they in a second."""
        before = [length - n for length, n in zip(self.lengths, self.new, strict=True)]
        self.write(before, before)
        self.write(self.lengths, self.new)
        return self

    def attend(self, **options: Any) -> Tensor:
        return paged_attention(self.query, self.blocks, self.batch, **options)

    def expected(
        self, keys: list[Tensor], values: list[Tensor], *, window: int = 10_000, sinks: Tensor | None = None
    ) -> Tensor:
        out = []
        for (first, last), key, value in zip(pairwise(self.batch.starts.tolist()), keys, values, strict=True):
            count, length = last - first, key.shape[0]
            mask = torch.ones(count, length, dtype=torch.bool).tril_(length - count).triu_(length - count + 1 - window)
            query = self.query[first:last].float().transpose(0, 1)[None]
            pair = (key.float().transpose(0, 1)[None], value.float().transpose(0, 1)[None])
            attended = F.scaled_dot_product_attention(query, *pair, attn_mask=mask, enable_gqa=True)[0]
            if sinks is not None:  # a share of what the softmax of the others gives
                heads = pair[0][0].repeat_interleave(query.shape[1] // key.shape[1], 0)
                scores = (query[0] @ heads.mT * query.shape[3] ** -0.5).masked_fill(~mask, float("-inf"))
                attended = attended * torch.sigmoid(scores.logsumexp(-1) - sinks[:, None])[..., None]
            out.append(attended.transpose(0, 1))
        return torch.cat(out)


# Decode, a prompt, chunks that continue, a sequence that is not asked, one position, more than one split of 256.
RAGGED = ([300, 7, 45, 64, 1, 33], [1, 7, 20, 0, 1, 33])


@pytest.mark.parametrize("heads", HEADS)
def test_equals_attention_over_whole_sequences(kernels: str, heads: tuple[int, int, int]) -> None:
    case = Case(*RAGGED, heads).fill()
    # Probabilities are rounded to bf16 (2^-9 each, of values near 1) and so is the result.
    torch.testing.assert_close(case.attend().float(), case.expected(case.keys, case.values), rtol=8e-3, atol=8e-3)


def test_torch_compile_leaves_it_alone() -> None:
    case = Case(*RAGGED, HEADS[0])
    starts = torch.tensor([0, 45], dtype=torch.int32)
    key, value, query = case.keys[0][:45], case.values[0][:45], case.query[:45]

    def write_and_attend(query: Tensor) -> Tensor:
        batch = PagedBatch(starts, starts[1:], case.batch.block_tables[:1])
        write_kv(key * 2, value * 2, case.blocks, batch)
        return paged_attention(query * 2, case.blocks, batch) * 2

    got = torch.compile(write_and_attend, backend="aot_eager")(query)
    assert torch.equal(got, write_and_attend(query))
    torch.compiler.reset()


# Chunks in a later split than the first, whose rows see part of one, none of one, or all of it; several heads of two
# blocks of rows a task; rows left over that are few.
CHUNKS = [([530, 512], [70, 19]), ([600, 300], [5, 6]), ([530, 290], [13, 26])]


@pytest.mark.parametrize("heads", [(10, 2, 64), (5, 1, 96), (9, 1, 16)])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("lengths", "new"), CHUNKS)
def test_chunks_that_begin_in_a_later_split(
    kernels: str, heads: tuple[int, int, int], cache_dtype: torch.dtype, lengths: list[int], new: list[int]
) -> None:
    block_size = 96 if cache_dtype == torch.int8 else 32
    before = torch.get_num_threads()
    case = Case(lengths, new, heads, cache_dtype=cache_dtype, block_size=block_size).fill()
    read = [read_kv(case.blocks, case.batch.block_tables[s], n) for s, n in enumerate(case.lengths)]
    wanted = case.expected([keys for keys, _ in read], [values for _, values in read])
    try:
        for threads in (1, 3):  # how many heads a task has depends on them
            torch.set_num_threads(threads)
            torch.testing.assert_close(case.attend().float(), wanted, rtol=8e-3, atol=8e-3)
    finally:
        torch.set_num_threads(before)


# Inside a panel of 32, one, more, whole splits; longer than all. Rows of a chunk that begin in different splits.
@pytest.mark.parametrize("window", [1, 20, 32, 40, 256, 300, 9_000])
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("lengths", "new"), [RAGGED, *CHUNKS])
def test_windows_and_sinks(
    kernels: str, window: int, cache_dtype: torch.dtype, lengths: list[int], new: list[int]
) -> None:
    case = Case(lengths, new, (8, 2, 64), cache_dtype=cache_dtype).fill()
    read = [read_kv(case.blocks, case.batch.block_tables[s], n) for s, n in enumerate(case.lengths)]
    pairs = [keys for keys, _ in read], [values for _, values in read]
    sinks = torch.linspace(-6, 6, 8)
    for given in (None, sinks):
        wanted = case.expected(*pairs, window=window, sinks=given)
        got = case.attend(window=window, sinks=given).float()
        torch.testing.assert_close(got, wanted, rtol=8e-3, atol=8e-3)


def test_a_scale_of_its_own(kernels: str) -> None:
    case = Case(*RAGGED, (8, 2, 64)).fill()
    out = paged_attention(case.query, case.blocks, case.batch, scale=0.05)
    case.query = case.query.float() * (0.05 * 8)  # 8 = sqrt(64)
    torch.testing.assert_close(out.float(), case.expected(case.keys, case.values), rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("block_size", [32, 64, 96])
def test_what_was_written_is_read_back(kernels: str, block_size: int) -> None:
    case = Case(*RAGGED, (4, 2, 40), block_size=block_size).fill()
    for number, length in enumerate(case.lengths):
        keys, values = read_kv(case.blocks, case.batch.block_tables[number], length)
        assert torch.equal(keys, case.keys[number]) and torch.equal(values, case.values[number])
    torch.testing.assert_close(case.attend().float(), case.expected(case.keys, case.values), rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize(("at_once", "rows"), [(1, 1), (2_000, 10), (1 << 23, 33)])
@pytest.mark.parametrize("window", [40, 10_000])
def test_fp32_is_exact_to_rounding(
    kernels: str, at_once: int, rows: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In chunks of any size too; rows: of the largest one."""
    monkeypatch.setattr("moesaic.kernels.paged_attention.SCORES", at_once)
    case = Case(*RAGGED, (6, 3, 24), dtype=torch.float32).fill()
    sinks = torch.linspace(-2, 2, 6)
    largest: list[int] = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda x, *rest: (largest.append(x.shape[-2]), softmax(x, *rest))[1])
    got = case.attend(window=window, sinks=sinks)
    assert max(largest) == rows
    wanted = case.expected(case.keys, case.values, window=window, sinks=sinks)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
def test_int8_stores_what_its_definition_says_and_attends_to_that(kernels: str, heads: tuple[int, int, int]) -> None:
    case = Case(*RAGGED, heads, cache_dtype=torch.int8).fill()
    read = [read_kv(case.blocks, case.batch.block_tables[s], n) for s, n in enumerate(case.lengths)]
    with select.forced("reference"):
        again = Case(*RAGGED, heads, cache_dtype=torch.int8).fill()
    for number, (keys, values) in enumerate(read):
        defined = read_kv(again.blocks, again.batch.block_tables[number], case.lengths[number])
        assert torch.equal(keys, defined[0]) and torch.equal(values, defined[1])
        # Half a step of 1/127 of the row's largest.
        for got, given in ((keys, case.keys[number].float()), (values, case.values[number].float())):
            assert bool(((got - given).abs() <= given.abs().amax(-1, keepdim=True) / 253).all())
    wanted = case.expected([keys for keys, _ in read], [values for _, values in read])
    torch.testing.assert_close(case.attend().float(), wanted, rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize(
    ("heads", "window"),
    [
        *(((4, 2, 32), None), ((2, 2, 64), None), ((5, 1, 96), None), ((3, 1, 160), None)),
        *(((4, 2, 32), 70), ((5, 1, 96), 300)),
    ],
)
@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.int8])
def test_a_token_gives_the_same_bits_alone_in_chunks_and_with_any_threads(
    kernels: str, cache_dtype: torch.dtype, heads: tuple[int, int, int], window: int | None
) -> None:
    if kernels == "reference":
        pytest.skip("PyTorch's products depend on their sizes")
    length = 600 if kernels != EMULATED_TILES else 290
    together = Case([length, 40], [length, 1], heads, cache_dtype=cache_dtype).fill()
    sinks = None if window is None else torch.linspace(-2, 2, heads[0])
    whole = together.attend(window=window, sinks=sinks)[:length]
    queries = together.query[:length]
    blocks, table = together.blocks, together.batch.block_tables[:1].clone()
    before = torch.get_num_threads()
    try:
        every_count = list(accumulate(range(1, 14)))  # of rows, where heads are not grouped, to more than are few
        for threads, cuts in ((1, [5, 31, 250, 258]), (3, [length - 1]), (2, [*every_count, 256])):
            torch.set_num_threads(threads)
            for first, last in pairwise([0, *cuts, length]):
                starts = torch.tensor([0, last - first], dtype=torch.int32)
                batch = PagedBatch(starts, torch.tensor([last], dtype=torch.int32), table)
                part = paged_attention(queries[first:last], blocks, batch, window=window, sinks=sinks)
                assert torch.equal(part, whole[first:last]), (first, last)
    finally:
        torch.set_num_threads(before)


def test_rows_may_be_slices_of_a_fused_projection(kernels: str) -> None:
    case = Case([70, 9], [70, 9], (4, 2, 64))
    fused = torch.cat([case.query.flatten(1), torch.cat(case.keys).flatten(1), torch.cat(case.values).flatten(1)], 1)
    query, key, value = fused.split([256, 128, 128], 1)
    write_kv(key.unflatten(1, (2, 64)), value.unflatten(1, (2, 64)), case.blocks, case.batch)
    out = paged_attention(query.unflatten(1, (4, 64)), case.blocks, case.batch)
    torch.testing.assert_close(out.float(), case.expected(case.keys, case.values), rtol=8e-3, atol=8e-3)


@pytest.mark.parametrize("new", [2, 40])
def test_scores_of_any_size(kernels: str, new: int) -> None:
    case = Case([280], [new], (2, 1, 32))
    case.keys[0][5] *= 1e3  # one key takes all, of either sign
    case.query *= 1e3
    case.fill()
    torch.testing.assert_close(case.attend().float(), case.expected(case.keys, case.values), rtol=8e-3, atol=8e-3)


def test_nan_and_infinity_reach_those_who_see_them_and_nobody_else(kernels: str) -> None:
    case = Case([40, 300], [40, 30], (2, 2, 32))
    case.keys[0][30, 0, 3] = float("nan")
    case.values[1][280, 1, 4] = float("inf")
    case.fill()
    out = case.attend()
    wanted = Case([40, 300], [40, 30], (2, 2, 32)).fill().attend()
    # A value of infinity is 0 * infinity where a probability is 0: rows before it, of its panel, may be NaN as well.
    assert out[30:40, 0].isnan().all() and out[:40, 1].isfinite().all() and out[40:, 0].isfinite().all()
    assert torch.equal(out[:30], wanted[:30])
    assert not out[40 + 10 :, 1, 4].isfinite().any()
    assert torch.equal(out[40:, 1, :4], wanted[40:, 1, :4])


@pytest.mark.parametrize("new", [3, 40])
def test_keys_that_are_not_finite_in_a_later_split(kernels: str, new: int) -> None:
    case = Case([300], [new], (2, 2, 32))
    case.keys[0][298, 0, 3] = float("nan")
    case.keys[0][297, 1, 3] = float("inf")
    case.query[:, 1, 3] = torch.where(torch.arange(new) % 2 == 0, 1.0, -1.0)
    case.fill()
    out = case.attend().float()
    query, key, value = (x.float().transpose(0, 1) for x in (case.query, case.keys[0], case.values[0]))
    unseen = torch.ones(new, 300, dtype=torch.bool).triu_(300 - new + 1)
    weights = (query @ key.mT / 32**0.5).masked_fill(unseen, float("-inf")).softmax(-1)
    wanted = (weights @ value).transpose(0, 1)
    assert out[-2:, 0].isnan().all() and out[:-2, 0].isfinite().all()
    # A score of infinity is NaN among its exponentials, one of -infinity a weight of 0.
    assert torch.equal(out.isnan(), wanted.isnan())
    assert out[:, 1].isnan().any() and out[-3:, 1].isfinite().any()
    torch.testing.assert_close(out, wanted, rtol=8e-3, atol=8e-3, equal_nan=True)


@pytest.mark.parametrize("new", [1, 20])  # few rows and many
@pytest.mark.parametrize("which", ["keys", "values"])
def test_an_infinite_key_or_value_is_nan_in_int8(kernels: str, which: str, new: int) -> None:
    case = Case([30], [new], (1, 1, 32), cache_dtype=torch.int8)
    getattr(case, which)[0][3] = float("inf")
    case.fill()
    read = dict(zip(("keys", "values"), read_kv(case.blocks, case.batch.block_tables[0], 30), strict=True))
    assert read[which][3].isnan().all()
    assert case.attend().isnan().all()


@pytest.mark.parametrize("wrong", ["block", "length", "tokens"])
def test_positions_without_a_block_are_refused(kernels: str, wrong: str) -> None:
    case = Case([40], [3], (2, 1, 32)).fill()
    changes: dict[str, Any] = {
        "block": {"block_tables": torch.tensor([[0, 99]], dtype=torch.int32)},
        "length": {"lengths": torch.tensor([4000], dtype=torch.int32)},
        "tokens": {"starts": torch.tensor([0, 4], dtype=torch.int32)},
    }
    values: dict[str, Any] = {
        "starts": case.batch.starts, "lengths": case.batch.lengths, "block_tables": case.batch.block_tables
    }  # fmt: skip
    with pytest.raises((AssertionError, IndexError)):
        write_kv(case.keys[0][:3], case.values[0][:3], case.blocks, PagedBatch(**{**values, **changes[wrong]}))


def test_more_new_tokens_than_positions_are_refused(kernels: str) -> None:
    case = Case([40], [3], (2, 1, 32)).fill()
    batch = replace(case.batch, lengths=torch.tensor([2], dtype=torch.int32))
    with pytest.raises(AssertionError):
        write_kv(case.keys[0][:3], case.values[0][:3], case.blocks, batch)
    with pytest.raises(AssertionError):
        paged_attention(case.query, case.blocks, batch)


def test_inputs_that_would_be_misread_are_refused(kernels: str) -> None:
    case = Case([40], [3], (2, 1, 32)).fill()
    with pytest.raises(AssertionError, match="float32"):
        write_kv(case.keys[0][:3], case.values[0][:3].float(), case.blocks, case.batch)
    query = torch.ones(3, 2, 32, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="no gradient"):
        paged_attention(query.clone().requires_grad_(), case.blocks, case.batch)
    with pytest.raises(AssertionError, match=r"-1\.0"):
        paged_attention(query, case.blocks, case.batch, scale=-1.0)
    with pytest.raises(AssertionError):
        paged_attention(query, case.blocks, case.batch, window=0)
    with pytest.raises(AssertionError):
        paged_attention(query, case.blocks, case.batch, sinks=torch.zeros(3))


def test_a_cache_of_another_type_is_read_as_what_it_is(kernels: str) -> None:
    blocks = allocate_blocks(1, 2, 1, 32, block_size=32, dtype=torch.float16, device=CPU).layers[0]
    batch = PagedBatch(*(torch.tensor(part, dtype=torch.int32) for part in ([0, 3], [3], [[0]])))
    key, value = (torch.randn(3, 1, 32, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (1, 2))
    write_kv(key, value, blocks, batch)
    for read, written in zip(read_kv(blocks, batch.block_tables[0], 3), (key, value), strict=True):
        torch.testing.assert_close(read.float(), written.float(), atol=1e-6, rtol=1e-3)


def test_a_block_is_whole_panels() -> None:
    with pytest.raises(ConfigError, match=r"block_size \(16\) must be a multiple of 32, .*; use 32"):
        allocate_blocks(1, 1, 1, 8, block_size=16, dtype=torch.bfloat16, device=CPU)


def test_positions_of_a_ragged_batch() -> None:
    batch, _ = make_batch(*RAGGED, block_size=32)
    expected = [n for length, new in zip(*RAGGED, strict=True) for n in range(length - new, length)]
    assert batch.positions.tolist() == expected


def test_storage_is_what_the_docstring_says() -> None:
    storage = allocate_blocks(5, 3, 2, 40, block_size=64, dtype=torch.int8, device=CPU)
    blocks: KVBlocks = storage.layers[4]
    assert len(storage.layers) == 5
    for layer in storage.layers:  # no two share memory, and each has its own scales
        for number, tensor in enumerate((layer.keys, layer.values, layer.key_scales, layer.value_scales)):
            assert tensor is not None and tensor.is_contiguous() and tensor.data_ptr() % 64 == 0 and not tensor.any()
            tensor.fill_(number + 1)
    assert blocks.keys.shape == (3, 2, 2, 32, 32, 2) and blocks.values.shape == (3, 2, 2, 2, 16, 32, 2)
    assert blocks.key_scales is not None and blocks.key_scales.shape == (3, 2, 64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
def test_storage_without_blocks_has_its_shapes(dtype: torch.dtype) -> None:
    blocks = allocate_blocks(2, 0, 2, 40, block_size=32, dtype=dtype, device=CPU).layers[1]
    assert blocks.keys.shape == (0, 2, 1, 32, 32, 2) and blocks.values.shape == (0, 2, 1, 2, 16, 32, 2)
