"""The paged cache holds what was written, whatever is copied, shared, cropped or padded in between."""

import copy

import pytest
import torch
from torch import Tensor

from moesaic.config.model import ModelConfig
from moesaic.errors import GenerationError
from moesaic.hf import PagedCache
from moesaic.kernels.paged_attention import read_kv, write_kv

CONFIG = ModelConfig(vocab_size=5, hidden_size=8, num_layers=2, num_heads=2, max_positions=200)


def new_cache() -> PagedCache:
    return PagedCache(CONFIG, dtype=torch.float32, device=torch.device("cpu"))


class Mirror:
    """A cache, and beside it the plain list of the positions that each sequence should have."""

    def __init__(self, cache: PagedCache, rows: list[list[float]]) -> None:
        self.cache, self.rows = cache, rows

    def write(self, columns: Tensor) -> None:
        """Add the columns (B, S), whose valid places get new numbers."""
        self.cache.prepare(columns)
        step = self.cache.extend(1, int(columns.sum()))
        first = max((max(row, default=0.0) for row in self.rows), default=0.0) + 1
        numbers = torch.arange(first, first + int(columns.sum()))
        for row, new in zip(self.rows, numbers.split(columns.sum(1).tolist()), strict=True):
            row += new.tolist()
        for layer, blocks in enumerate(step.storage.layers):
            values = (numbers + 1000 * layer)[:, None, None].expand(-1, 2, 4)
            write_kv(values, -values, blocks, step.batch)

    def check(self) -> None:
        """Read everything back, through a step that adds nothing."""
        self.cache.prepare(torch.zeros(len(self.rows), 0, dtype=torch.bool))
        step = self.cache.extend(1, 0)
        assert step.batch.lengths.tolist() == [len(row) for row in self.rows]
        for layer, blocks in enumerate(step.storage.layers):
            for table, row in zip(step.batch.block_tables, self.rows, strict=True):
                keys, values = read_kv(blocks, table, len(row))
                assert torch.equal(keys[:, 0, 0], torch.tensor(row) + 1000 * layer)
                assert torch.equal(values, -keys)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def test_random_operations_equal_plain_lists() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for _ in range(5):
        columns = torch.rand(3, 37, generator=generator) < 0.7
        mirror = Mirror(new_cache(), [[], [], []])
        mirror.write(columns)
        for _ in range(60):
            kind = draw(5)
            if kind == 4:  # a pass that could not be computed
                lost = ones(len(mirror.rows), 1 + draw(40))
                mirror.cache.prepare(lost)
                mirror.cache.extend(1, int(lost.sum()))
                mirror.cache.retract(int(lost.sum()))
            elif kind == 0 and mirror.cache.get_seq_length() < 120:
                new = torch.rand(len(mirror.rows), 1 + draw(40), generator=generator) < 0.9
                columns = torch.cat([columns, new], 1)
                mirror.write(new)
            elif kind == 1:
                new = ones(len(mirror.rows), 1)
                columns = torch.cat([columns, new], 1)
                mirror.write(new)
            elif kind == 2:
                chosen = torch.randint(len(mirror.rows), (1 + draw(5),), generator=generator)
                mirror.cache.reorder_cache(chosen)
                mirror.rows = [list(mirror.rows[index]) for index in chosen.tolist()]
                columns = columns[chosen]
            else:
                removed = draw(min(40, columns.shape[1]))
                mirror.cache.crop(-removed)
                kept = columns.shape[1] - removed
                mirror.rows = [row[: int(valid[:kept].sum())] for row, valid in zip(mirror.rows, columns, strict=True)]
                columns = columns[:, :kept]
            mirror.check()
            assert torch.equal(mirror.cache.columns, columns)
            assert mirror.cache.get_seq_length() == columns.shape[1]


def test_a_deep_copy_lives_on_its_own() -> None:
    first = Mirror(new_cache(), [[], []])
    first.write(ones(2, 40))
    second = Mirror(copy.deepcopy(first.cache), copy.deepcopy(first.rows))
    first.write(ones(2, 3))
    second.write(ones(2, 30))
    first.check()
    second.check()


def test_sequences_share_blocks_until_one_writes() -> None:
    mirror = Mirror(new_cache(), [[]])
    mirror.write(ones(1, 64))
    mirror.cache.batch_repeat_interleave(8)
    mirror.rows = [list(mirror.rows[0]) for _ in range(8)]
    mirror.check()
    assert "blocks=2 of 32" in repr(mirror.cache)
    mirror.write(ones(8, 1))
    mirror.check()
    assert "blocks=10 of 32" in repr(mirror.cache)


def test_memory_that_cannot_be_had_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    mirror = Mirror(new_cache(), [[]])
    mirror.write(ones(1, 40))
    mirror.cache.batch_repeat_interleave(2)
    mirror.rows = [list(mirror.rows[0]) for _ in range(2)]

    def refuse(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr("moesaic.hf.cache.allocate_storage", refuse)
        with pytest.raises(MemoryError):
            mirror.cache.prepare(ones(2, 80))
    mirror.check()
    mirror.write(ones(2, 3))
    mirror.check()


def test_a_pass_that_could_not_be_computed_is_forgotten() -> None:
    mirror = Mirror(new_cache(), [[], []])
    mirror.write(torch.tensor([[False, True], [True, True]]))
    lost = torch.cat([ones(2, 40), torch.zeros(2, 1, dtype=torch.bool)], 1)
    mirror.cache.prepare(lost)
    mirror.cache.extend(1, 80)
    mirror.cache.retract(80)
    assert mirror.cache.get_seq_length() == 2
    mirror.write(ones(2, 3))
    mirror.check()


def test_what_transformers_asks_of_it() -> None:
    cache = new_cache()
    assert (cache.get_seq_length(), cache.is_initialized, cache.batch_size) == (0, False, 0)
    assert (len(cache), cache.is_linear, cache.is_croppable, cache.is_compileable) == (2, [False] * 2, True, False)
    mirror = Mirror(cache, [[], []])
    mirror.write(torch.tensor([[False, True, True], [True, True, True]]))
    assert (cache.get_seq_length(), cache.is_initialized, cache.batch_size) == (3, True, 2)
    assert cache.get_mask_sizes(4) == (7, 0)
    cache.crop(2)  # how earlier versions say: keep two
    mirror.rows = [row[:-1] for row in mirror.rows]
    mirror.check()
    cache.reset()
    assert cache.get_seq_length() == 0


def test_refuses_other_batches_and_too_many_positions() -> None:
    cache = new_cache()
    cache.prepare(ones(2, 200))
    with pytest.raises(GenerationError, match="3 sequences were given to a cache of 2"):
        cache.prepare(ones(3, 1))
    with pytest.raises(GenerationError, match="would have 201 positions; the model has 200"):
        cache.prepare(ones(2, 1))
    assert cache.get_seq_length() == 200
