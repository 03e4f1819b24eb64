"""Batches of packed sequences: which tokens a step sees. The only file of this package that knows torch.

The order is a pure function of the seed and the step. No state is kept, so resuming is asking for the next step, and
ranks need no agreement: each computes the step's global batch and reads its own part.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from moesaic.config.train import TrainConfig
from moesaic.data.shards import TokenStream, count_documents
from moesaic.errors import DataError, TrainingError

_FEISTEL_ROUNDS = 8


@dataclass(frozen=True)
class Batch:
    """Some sequences. Shapes: inputs, targets (B, S) int64, documents (B, S) int32, starts (B,) int64.

    `targets` are `inputs` shifted by one; `documents` numbers each token's document within its sequence; `starts` says
    where in the stream each sequence starts, None for a batch that comes from none.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor | None
    starts: npt.NDArray[np.int64] | None = None

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; starts stay where they are."""
        documents = None if self.documents is None else self.documents.to(device)
        return Batch(self.inputs.to(device), self.targets.to(device), documents, self.starts)

    def rows(self, start: int, end: int) -> "Batch":
        """Return the sequences from start to end, a micro-batch."""
        documents = None if self.documents is None else self.documents[start:end]
        starts = None if self.starts is None else self.starts[start:end]
        return Batch(self.inputs[start:end], self.targets[start:end], documents, starts)


class TrainLoader:
    """Training batches: each epoch is a seeded permutation of all sequences, cut at an offset of its own.

    With fixed windows the offset is 0 in every epoch, so that sequence i starts at token i * sequence_length, and only
    what is left behind the last whole one is not read.
    """

    def __init__(
        self,
        stream: TokenStream,
        *,
        sequence_length: int,
        batch_size: int,
        seed: int,
        end_of_text_id: int,
        with_documents: bool = False,
        fixed_windows: bool = False,
    ) -> None:
        """`batch_size` is in sequences over all ranks; `with_documents` fills Batch.documents.

        Raises: DataError for a corpus shorter than one sequence.
        """
        _check_sizes(stream, sequence_length=sequence_length, batch_size=batch_size)
        self._stream = stream
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._seed = seed
        self._end_of_text_id = end_of_text_id
        self._with_documents = with_documents
        self._has_fixed_windows = fixed_windows
        if fixed_windows:
            self._num_sequences, self._max_offset = (stream.num_tokens - 1) // sequence_length, 0
        else:
            # One sequence less than fits, so that every epoch has the same number and can start at any offset.
            self._num_sequences = max(1, stream.num_tokens // sequence_length - 1)
            self._max_offset = min(sequence_length - 1, stream.num_tokens - 1 - self._num_sequences * sequence_length)

    @property
    def sequences_per_epoch(self) -> int:
        return self._num_sequences

    def epoch(self, step: int) -> float:
        """Return how often the corpus has been seen before `step`."""
        return step * self._batch_size / self._num_sequences

    def batch(self, step: int, *, rank: int = 0, world_size: int = 1) -> Batch:
        """Return a rank's part of the global batch of a step (from 0).

        The ranks' parts, in order, are the same global batch for every world size.
        """
        if self._batch_size % world_size:
            raise DataError(
                f"batch_size ({self._batch_size}) is not a multiple of world_size ({world_size}); every rank takes the "
                f"same number of sequences; use a batch_size that {world_size} divides."
            )
        assert step >= 0 and 0 <= rank < world_size, (step, rank, world_size)
        share = self._batch_size // world_size
        first = step * self._batch_size + rank * share
        starts = self._starts(np.arange(first, first + share, dtype=np.int64))
        return _read_batch(
            self._stream, starts, self._sequence_length, self._end_of_text_id if self._with_documents else None
        )

    def windows(self, numbers: npt.NDArray[np.int64]) -> Batch:
        """Return sequences by their number in the text, from 0, as fixed windows cut it."""
        starts = numbers.astype(np.int64) * self._sequence_length
        return _read_batch(
            self._stream, starts, self._sequence_length, self._end_of_text_id if self._with_documents else None
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what the order of the data depends on; a checkpoint keeps it (the step is the trainer's)."""
        state = {
            "seed": self._seed,
            "sequence_length": self._sequence_length,
            "batch_size": self._batch_size,
            "num_tokens": self._stream.num_tokens,
            "data_fingerprint": self._stream.fingerprint,
        }
        return {**state, "fixed_windows": self._num_sequences} if self._has_fixed_windows else state

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Raise TrainingError unless a run with this state goes on to the batches it would have seen unbroken."""
        own = self.state_dict()
        differences = [key for key in own if state.get(key) != own[key]]
        if differences:
            listed = ", ".join(f"{key} was {state.get(key)!r} and is {own[key]!r}" for key in differences)
            raise TrainingError(
                f"the data is not the one this run was trained on ({listed}); resuming needs the same tokens in the "
                f"same order; give the original folder and settings, or start a new run."
            )

    def _starts(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the first token of the sequences at these positions of the endless global order."""
        starts = np.empty_like(positions)
        epochs = positions // self._num_sequences
        for epoch in np.unique(epochs).tolist():
            chosen = epochs == epoch
            order = positions[chosen] - epoch * self._num_sequences
            sequences = permute(order, size=self._num_sequences, key=f"{self._seed}:{epoch}")
            offset = _hash(f"{self._seed}:{epoch}:offset") % (self._max_offset + 1)
            starts[chosen] = sequences * self._sequence_length + offset
        return starts


class ValidationLoader:
    """A fixed set of evenly spaced sequences that do not overlap, in batches; iterate as often as you like."""

    def __init__(
        self,
        stream: TokenStream,
        *,
        sequence_length: int,
        batch_size: int,
        sequences: int,
        with_documents: bool = False,
    ) -> None:
        """`sequences` is how many at most; a shorter corpus gives what it has.

        Raises: DataError for a corpus shorter than one sequence.
        """
        _check_sizes(stream, sequence_length=sequence_length, batch_size=batch_size)
        if sequences < 1:
            raise DataError(f"sequences ({sequences}) is not positive; an evaluation needs one; use 1 or more.")
        self._stream = stream
        self._sequence_length = sequence_length
        self._batch_size = batch_size
        self._with_documents = with_documents
        available = (stream.num_tokens - 1) // sequence_length
        self.num_sequences = min(sequences, available)
        self._starts = np.arange(self.num_sequences, dtype=np.int64) * available // self.num_sequences * sequence_length

    @classmethod
    def of(cls, config: TrainConfig, stream: TokenStream) -> Self:
        """Return the loader that a run validates with."""
        return cls(
            stream,
            sequence_length=config.data.sequence_length,
            batch_size=config.micro_batch_size,
            sequences=config.evaluation.sequences,
            with_documents=config.data.document_mask,
        )

    def __len__(self) -> int:
        return -(-self.num_sequences // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Yield all batches; the last one may be smaller."""
        end_of_text_id = self._stream.end_of_text_id if self._with_documents else None
        for first in range(0, self.num_sequences, self._batch_size):
            starts = self._starts[first : first + self._batch_size]
            yield _read_batch(self._stream, starts, self._sequence_length, end_of_text_id)


def permute(positions: npt.NDArray[np.int64], *, size: int, key: str) -> npt.NDArray[np.int64]:
    """Map positions 0 .. size - 1 one to one onto themselves in an order that `key` chooses.

    A Feistel network over the next larger even number of bits, walked until it falls below `size`: any position of any
    epoch costs the same, and nothing of the size of the corpus is held.
    """
    half_bits = max(1, (max(1, size - 1).bit_length() + 1) // 2)
    shift, mask = np.uint64(half_bits), np.uint64(2**half_bits - 1)
    keys = [np.uint64(_hash(f"{key}:{number}")) for number in range(_FEISTEL_ROUNDS)]

    def network(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> shift, values & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        return (left << shift) | right

    result = network(positions.astype(np.uint64))
    outside = result >= size
    while outside.any():
        result[outside] = network(result[outside])
        outside = result >= size
    return result.astype(np.int64)


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64 bits; wraps around by intent. Source: the finaliser of SplitMix64 (Steele et al., 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _read_batch(
    stream: TokenStream, starts: npt.NDArray[np.int64], sequence_length: int, end_of_text_id: int | None
) -> Batch:
    tokens = np.empty((len(starts), sequence_length + 1), dtype=np.int64)  # (B, S + 1)
    for row, start in enumerate(starts.tolist()):
        stream.read_into(tokens[row], start)
    if tokens.size and tokens.max() >= stream.vocab_size:
        worst, column = divmod(int(tokens.argmax()), tokens.shape[1])
        file = stream.file_of(int(starts[worst]) + column)
        raise DataError(
            f"{file} holds token id {tokens.max()}; the ids of its tokenizer are below {stream.vocab_size}; the file "
            f"is corrupt: copy it again from where it is whole, or delete the folder and run `moesaic prepare` again."
        )
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    documents = None
    if end_of_text_id is not None:
        documents = torch.from_numpy(count_documents(inputs, end_of_text_id=end_of_text_id))
    # Copies, so that the two are contiguous and share no memory.
    return Batch(torch.from_numpy(inputs.copy()), torch.from_numpy(targets.copy()), documents, starts)


def _check_sizes(stream: TokenStream, *, sequence_length: int, batch_size: int) -> None:
    if sequence_length < 1 or batch_size < 1:
        raise DataError(
            f"sequence_length ({sequence_length}) and batch_size ({batch_size}) must be positive; use 1 or more."
        )
    if stream.num_tokens < sequence_length + 1:
        raise DataError(
            f"{stream.name} holds {stream.num_tokens} tokens; one sequence of {sequence_length} and its shifted "
            f"targets take {sequence_length + 1}; prepare more text, raise --validation-fraction if it is the "
            f"validation split, or shorten data.sequence_length."
        )
