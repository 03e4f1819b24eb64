"""Text to measure a model on: documents of token ids, from files or prepared shards, and windows of equal context.

Which numbers are computed over the windows is perplexity.py's business.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moesaic.data.encode import encode_text
from moesaic.data.shards import MANIFEST_NAME, ShardSet, TokenStream
from moesaic.data.sources import TEXT_FIELD, open_sources
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, DataError

# Tokens of one forward pass. Fixed, so that a measurement is the same every time.
_BATCH_TOKENS = 4096
_READ_TOKENS = 1 << 16
NOTHING = -100


@dataclass(frozen=True)
class TokenDocument:
    """One text: ids (n,) int32 without begin or end token, and the UTF-8 bytes they stand for."""

    ids: npt.NDArray[np.int32]
    num_bytes: int


def read_documents(
    source: str | Path,
    tokenizer: Tokenizer,
    *,
    split: Literal["train", "validation"] = "validation",
    limit_tokens: int | None = None,
    text_field: str = TEXT_FIELD,
    vocab_size: int | None = None,
) -> list[TokenDocument]:
    """Return the documents of a source, at most limit_tokens tokens, the last one cut where that is reached.

    source is whatever `moesaic prepare` reads, or a folder that it wrote, of which `split` is taken. vocab_size: a
    model's, for which a tokenizer may be too large as long as no text has ids beyond it.

    Raises: DataError for a source that is missing, unreadable or empty, for shards of another tokenizer, and for ids
    that the model does not have.
    """
    if limit_tokens is not None and limit_tokens < 1:
        raise ConfigError(
            f"limit_tokens ({limit_tokens}) is less than 1; something must be measured; raise or omit it."
        )
    documents: list[TokenDocument] = []
    left = limit_tokens
    for document in _documents(source, tokenizer, split, text_field):
        if left is not None and len(document.ids) > left:
            ids = document.ids[:left]
            document = TokenDocument(ids, _count_bytes(tokenizer, ids))
        if vocab_size is not None and (largest := int(document.ids.max(initial=0))) >= vocab_size:
            raise DataError(
                f"{source} has token id {largest} by the run's tokenizer; ids from 0 to {vocab_size - 1} are required, "
                f"which the model has; put the run's own tokenizer.json back, or name another text."
            )
        documents.append(document)
        if left is not None:
            left -= len(document.ids)
            if left == 0:
                break
    if not documents:
        raise DataError(f"{source} holds no text; at least one token is required; name another source.")
    return documents


def _documents(
    source: str | Path, tokenizer: Tokenizer, split: Literal["train", "validation"], text_field: str
) -> Iterator[TokenDocument]:
    if str(source).strip() and (Path(source) / MANIFEST_NAME).is_file():
        shards = ShardSet.open(source)
        shards.check_tokenizer(tokenizer)
        for ids in _split_stream(shards.train if split == "train" else shards.validation):
            yield TokenDocument(ids, _count_bytes(tokenizer, ids))
        return
    for leaf in open_sources([source]):
        pieces: list[npt.NDArray[np.int32]] = []
        num_bytes = 0
        for document in leaf.documents(text_field):
            ids = encode_text(tokenizer, document.text, dtype="int32").astype(np.int32)
            size = len(document.text.encode())
            if leaf.kind == "text":  # a long file comes in pieces and is one document all the same
                pieces.append(ids)
                num_bytes += size
            elif len(ids):
                yield TokenDocument(ids, size)
        if sum(len(piece) for piece in pieces):
            yield TokenDocument(np.concatenate(pieces), num_bytes)


def _split_stream(stream: TokenStream) -> Iterator[npt.NDArray[np.int32]]:
    """Yield the documents of a split without their end-of-text tokens; one cut off by the end of the split too."""
    pieces: list[npt.NDArray[np.int32]] = []
    for start in range(0, stream.num_tokens, _READ_TOKENS):
        tokens = stream.read(start, min(_READ_TOKENS, stream.num_tokens - start)).astype(np.int32)
        first = 0
        for end in np.flatnonzero(tokens == stream.end_of_text_id).tolist():
            whole = np.concatenate([*pieces, tokens[first:end]])
            if len(whole):
                yield whole
            pieces, first = [], end + 1
        pieces.append(tokens[first:])
    if sum(len(piece) for piece in pieces):
        yield np.concatenate(pieces)


def _count_bytes(tokenizer: Tokenizer, ids: npt.NDArray[np.int32]) -> int:
    return len(tokenizer.decode(ids.tolist()).encode("utf-8"))


@dataclass(frozen=True)
class WindowBatch:
    """Shapes: inputs, targets (B, S) int64; a target is NOTHING where another window predicts the token, where the
    token ends a document, and in the padding behind a shorter window, which no earlier position sees."""

    inputs: Tensor
    targets: Tensor


class Windows:
    """Every token of some documents, predicted once, with at least length - stride tokens before it where there are.

    Documents stand one behind another, first_id (Tokenizer.first_id) before each, as in training; or apart, each with
    that token and nothing else before it. The token itself is not predicted, since it stands for no text.
    """

    def __init__(
        self, documents: Sequence[TokenDocument], *, length: int, stride: int, first_id: int, apart: bool
    ) -> None:
        """Raises: ConfigError for a length below 1 or a stride outside 1..length."""
        if length < 1:
            raise ConfigError(f"window ({length}) is less than 1; a window holds tokens; use the sequence length.")
        if not 1 <= stride <= length:
            raise ConfigError(
                f"stride ({stride}) is not from 1 to the window ({length}); windows must neither stand still nor leave "
                f"tokens out; use {max(1, length // 2)}, for example."
            )
        self.length, self.stride = length, stride
        self.num_documents = len(documents)
        self.num_tokens = sum(len(document.ids) for document in documents)
        self.num_bytes = sum(document.num_bytes for document in documents)
        self._first_id = first_id
        border = np.array([first_id], dtype=np.int32)
        texts = [np.concatenate([border, document.ids]) for document in documents]
        self._texts = texts if apart else [np.concatenate(texts)]
        # (text, first input, first target that is new, last target) of every window, longest first, so that a batch
        # of short documents is padded little.
        self._places = [
            (number, start, known, min(start + length, len(text) - 1))
            for number, text in enumerate(self._texts)
            for start, known in _starts(len(text) - 1, length, stride)
        ]
        self._places.sort(key=lambda place: place[1] - place[3])

    def __iter__(self) -> Iterator[WindowBatch]:
        rows = max(1, _BATCH_TOKENS // self.length)
        for first in range(0, len(self._places), rows):
            yield self._batch(self._places[first : first + rows])

    def __len__(self) -> int:
        return -(-len(self._places) // max(1, _BATCH_TOKENS // self.length))

    def _batch(self, places: list[tuple[int, int, int, int]]) -> WindowBatch:
        longest = max(end - start for _, start, _, end in places)
        inputs = np.full((len(places), longest), self._first_id, dtype=np.int64)
        targets = np.full((len(places), longest), NOTHING, dtype=np.int64)
        for row, (number, start, known, end) in enumerate(places):
            text = self._texts[number]
            inputs[row, : end - start] = text[start:end]
            new = text[known + 1 : end + 1]
            targets[row, known - start : end - start] = np.where(new == self._first_id, NOTHING, new)
        return WindowBatch(torch.from_numpy(inputs), torch.from_numpy(targets))


def _starts(num_targets: int, length: int, stride: int) -> list[tuple[int, int]]:
    """Where windows over so many targets start, and how many targets are known by then."""
    starts, known = [], 0
    for start in range(0, num_targets, stride):
        if known >= num_targets:
            break
        starts.append((start, known))
        known = start + length
    return starts
