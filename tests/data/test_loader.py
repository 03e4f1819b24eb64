"""A batch is a pure function of seed and step; ranks only share it out; an epoch sees every sequence once."""

from pathlib import Path

import numpy as np
import pytest
import torch

from moesaic.data.loader import TrainLoader, ValidationLoader, permute
from moesaic.data.prepare import prepare
from moesaic.data.shards import ShardRecord, ShardSet, SplitRecord, TokenStream
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import DataError, TrainingError

END = 3


def make_stream(folder: Path, num_tokens: int, *, fingerprint: str = "f", vocab_size: int = 2**31) -> TokenStream:
    """A stream whose tokens tell their own position."""
    (folder / "train-00000.bin").write_bytes(np.arange(num_tokens, dtype="<u4").tobytes())
    record = ShardRecord(file="train-00000.bin", num_tokens=num_tokens, num_documents=1, sha256="0")
    split = SplitRecord(shards=(record,), num_documents=1, num_tokens=num_tokens, num_bytes=num_tokens)
    return TokenStream(
        folder,
        split,
        dtype="uint32",
        vocab_size=vocab_size,
        end_of_text_id=END,
        fingerprint=fingerprint,
        name="numbers",
    )


def make_loader(
    stream: TokenStream,
    *,
    sequence_length: int = 8,
    batch_size: int = 4,
    seed: int = 0,
    fixed_windows: bool = False,
) -> TrainLoader:
    return TrainLoader(
        stream,
        sequence_length=sequence_length,
        batch_size=batch_size,
        seed=seed,
        end_of_text_id=END,
        fixed_windows=fixed_windows,
    )


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 63, 64, 65, 1000, 4097])
def test_permute_is_a_permutation(size: int) -> None:
    positions = np.arange(size, dtype=np.int64)
    for key in ("a", "b"):
        assert sorted(permute(positions, size=size, key=key).tolist()) == positions.tolist()
    np.testing.assert_array_equal(
        permute(positions, size=size, key="a")[::2], permute(positions[::2], size=size, key="a")
    )


def test_permute_reaches_corpora_that_no_array_holds() -> None:
    size = 10**13 + 7
    positions = np.asarray([0, 1, 2, size - 1], dtype=np.int64)
    result = permute(positions, size=size, key="a")
    assert len(set(result.tolist())) == 4
    assert result.min() >= 0 and result.max() < size


def test_permute_spreads_evenly() -> None:
    # 2,000 keys: every value at the first position about 2,000 / 10 times; 5 standard deviations are 67.
    firsts = [int(permute(np.zeros(1, dtype=np.int64), size=10, key=str(key))[0]) for key in range(2000)]
    assert np.abs(np.bincount(firsts, minlength=10) - 200).max() < 67
    # Neighbours do not stay neighbours: in a random order of 10,000 about two pairs would.
    steps = np.diff(permute(np.arange(10_000, dtype=np.int64), size=10_000, key="a"))
    assert (np.abs(steps) == 1).sum() < 15


def test_a_token_that_the_tokenizer_does_not_have_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    loader = make_loader(make_stream(tmp_path, 1000, vocab_size=500), batch_size=1)
    outcomes = []
    for step in range(loader.sequences_per_epoch):
        try:
            outcomes.append(int(loader.batch(step).targets.max()) < 500)
        except DataError as error:
            assert "train-00000.bin holds token id" in str(error) and "are below 500; " in str(error)
            outcomes.append(False)
    assert 60 <= sum(outcomes) <= 63  # of 124 sequences, those that end before token 500
    validation = ValidationLoader(
        make_stream(tmp_path, 64, vocab_size=64), sequence_length=8, batch_size=4, sequences=7
    )
    assert len(list(validation)) == 2


def test_targets_are_inputs_shifted_by_one(tmp_path: Path) -> None:
    batch = make_loader(make_stream(tmp_path, 1000)).batch(5)
    assert batch.inputs.shape == batch.targets.shape == (4, 8)
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.is_contiguous() and batch.targets.is_contiguous()
    assert batch.documents is None
    assert torch.equal(batch.targets, batch.inputs + 1)
    assert torch.equal(batch.inputs, batch.inputs[:, :1] + torch.arange(8))


def test_a_batch_depends_on_seed_and_step_and_nothing_else(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 1000)
    loader = make_loader(stream)
    forward = [loader.batch(step).inputs for step in range(70)]
    again = make_loader(stream)
    for step in reversed(range(70)):
        assert torch.equal(again.batch(step).inputs, forward[step])
    assert not torch.equal(make_loader(stream, seed=1).batch(0).inputs, forward[0])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_ranks_share_out_the_same_global_batch(tmp_path: Path, world_size: int) -> None:
    loader = make_loader(make_stream(tmp_path, 1000), batch_size=12)
    for step in (0, 1, 9, 10, 11, 1000):
        parts = [loader.batch(step, rank=rank, world_size=world_size).inputs for rank in range(world_size)]
        assert torch.equal(torch.cat(parts), loader.batch(step).inputs)


def test_a_world_that_does_not_divide_the_batch_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"batch_size \(4\) is not a multiple of world_size \(3\)"):
        make_loader(make_stream(tmp_path, 1000)).batch(0, rank=0, world_size=3)


@pytest.mark.parametrize("num_tokens", [9, 10, 15, 16, 17, 24, 25, 1000, 1003, 1007])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_an_epoch_sees_every_sequence_once_whatever_the_sizes(tmp_path: Path, num_tokens: int, batch_size: int) -> None:
    loader = make_loader(make_stream(tmp_path, num_tokens), batch_size=batch_size)
    per_epoch = loader.sequences_per_epoch
    steps = -(-3 * per_epoch // batch_size)
    starts = torch.cat([loader.batch(step).inputs[:, 0] for step in range(steps)]).tolist()
    for epoch in range(3):
        own = sorted(starts[epoch * per_epoch : (epoch + 1) * per_epoch])
        assert own == list(range(own[0], own[0] + 8 * per_epoch, 8))
        assert 0 <= own[0] < 8 and own[-1] + 9 <= num_tokens
    assert num_tokens - per_epoch * 8 <= 16


@pytest.mark.parametrize("num_tokens", [9, 16, 17, 24, 25, 1000, 1007])
def test_fixed_windows_read_every_whole_window(tmp_path: Path, num_tokens: int) -> None:
    loader = make_loader(make_stream(tmp_path, num_tokens), batch_size=1, fixed_windows=True)
    starts = sorted(loader.batch(step).inputs[0, 0].item() for step in range(loader.sequences_per_epoch))
    assert starts == list(range(0, num_tokens - 8, 8))


def test_a_run_with_other_windows_is_not_gone_on_with(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 100)
    moving, fixed = make_loader(stream), make_loader(stream, fixed_windows=True)
    fixed.check_state(fixed.state_dict())
    with pytest.raises(TrainingError, match=r"fixed_windows was None and is 12"):
        fixed.check_state(moving.state_dict())


def test_epochs_differ_in_order_and_in_where_sequences_begin(tmp_path: Path) -> None:
    loader = make_loader(make_stream(tmp_path, 1000), batch_size=124)
    assert loader.sequences_per_epoch == 124
    epochs = [loader.batch(step).inputs[:, 0].numpy() for step in range(20)]
    assert len({int(epoch.min()) for epoch in epochs}) > 4
    assert len({tuple(epoch // 8) for epoch in epochs}) == 20
    assert loader.epoch(3) == 3.0


def test_a_batch_moves_and_is_cut_as_a_whole(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 100)
    for with_documents in (False, True):
        batch = TrainLoader(
            stream, sequence_length=8, batch_size=6, seed=0, end_of_text_id=END, with_documents=with_documents
        ).batch(0)
        on_meta = batch.to(torch.device("meta"))
        parts = [batch.rows(start, start + 2) for start in range(0, 6, 2)]
        for name in ("inputs", "targets", "documents")[: 2 + with_documents]:
            assert getattr(on_meta, name).device.type == "meta"
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))


def test_documents_number_inside_the_sequence(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 17)
    loader = TrainLoader(stream, sequence_length=16, batch_size=1, seed=0, end_of_text_id=END, with_documents=True)
    documents = loader.batch(0).documents
    assert documents is not None and documents.dtype == torch.int32
    assert documents.tolist() == [[0] * 4 + [1] * 12]
    validation = ValidationLoader(stream, sequence_length=16, batch_size=1, sequences=1, with_documents=True)
    documents = next(iter(validation)).documents
    assert documents is not None and documents.tolist() == [[0] * 4 + [1] * 12]


@pytest.mark.parametrize(
    ("num_tokens", "sequences", "expected"), [(1001, 5, 5), (1001, 1000, 125), (9, 4, 1), (16, 4, 1)]
)
def test_validation_is_fixed_spread_and_without_overlap(
    tmp_path: Path, num_tokens: int, sequences: int, expected: int
) -> None:
    loader = ValidationLoader(make_stream(tmp_path, num_tokens), sequence_length=8, batch_size=2, sequences=sequences)
    batches = list(loader)
    assert len(batches) == len(loader)
    starts = torch.cat([batch.inputs[:, 0] for batch in batches]).tolist()
    assert len(starts) == loader.num_sequences == expected
    gaps = np.diff(starts)
    assert (gaps >= 8).all() and (len(gaps) == 0 or gaps.max() - gaps.min() <= 8)
    assert starts[-1] + 9 <= num_tokens
    assert torch.equal(torch.cat([batch.inputs for batch in loader]), torch.cat([batch.inputs for batch in batches]))


def test_a_corpus_shorter_than_a_sequence_is_refused(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 8)
    message = "holds 8 tokens; one sequence of 8 and its shifted targets take 9"
    with pytest.raises(DataError, match=message):
        make_loader(stream)
    with pytest.raises(DataError, match=message):
        ValidationLoader(stream, sequence_length=8, batch_size=1, sequences=1)
    with pytest.raises(DataError, match="must be positive"):
        make_loader(stream, batch_size=0)
    with pytest.raises(DataError, match="sequences"):
        ValidationLoader(make_stream(tmp_path, 9), sequence_length=8, batch_size=1, sequences=0)


def test_a_run_resumes_only_on_its_own_data(tmp_path: Path) -> None:
    stream = make_stream(tmp_path, 1000)
    state = make_loader(stream).state_dict()
    make_loader(stream).check_state(state)
    for other in (
        make_loader(stream, seed=1),
        make_loader(stream, sequence_length=9),
        make_loader(stream, batch_size=5),
        make_loader(make_stream(tmp_path, 1000, fingerprint="g")),
    ):
        with pytest.raises(TrainingError, match="not the one this run was trained on"):
            other.check_state(state)
    with pytest.raises(TrainingError, match="seed was 0 and is 1"):
        make_loader(stream, seed=1).check_state(state)
    with pytest.raises(TrainingError, match="seed was None"):
        make_loader(stream).check_state({})


def test_real_text_reads_as_text(tmp_path: Path) -> None:
    prepare("embedded", tmp_path / "out", vocab_size=500, sample_bytes=200_000, shard_tokens=300_001)
    shards = ShardSet.open(tmp_path / "out")
    tokenizer: Tokenizer = shards.load_tokenizer()
    loader = TrainLoader(
        shards.train, sequence_length=128, batch_size=8, seed=0, end_of_text_id=tokenizer.end_of_text_id
    )
    words = " ".join(tokenizer.decode(row) for step in range(10) for row in loader.batch(step).inputs.tolist()).split()
    assert sum(word in {"the", "of", "and", "to"} for word in words) > 0.1 * len(words)
    assert loader.state_dict()["data_fingerprint"] == shards.fingerprint
