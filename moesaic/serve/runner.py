"""Runs a model over the parts of a step: the tensors that say what is computed, the pass, and logits where needed."""

from array import array
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from moesaic.kernels import select
from moesaic.kernels.decode import Decoded, DecodePlan
from moesaic.kernels.paged_attention import PagedBatch
from moesaic.logs import logger
from moesaic.model.kv_cache import BatchCache, CacheStep, allocate_storage
from moesaic.model.transformer import Transformer

# Sequences grow: tables that are kept have room for some blocks more.
_SPARE_BLOCKS = 8
# Logits of more tokens are much memory to keep, and making room for them is little of their step.
_REUSED_ROWS = 16
# Texts that are continued at once, in a warm-up: more are computed in the same form.
_WARM_ROWS = 128


@dataclass(frozen=True)
class Part:
    """New tokens of one sequence, which end at position `length`, and the blocks of all its positions."""

    tokens: Sequence[int]
    length: int
    blocks: "array[int]"


class Others(Protocol):
    """Other processes that compute every pass too (followers.py)."""

    def start(self, num_blocks: int, *, block_size: int, dtype: torch.dtype) -> None: ...

    def running(self, parts: Sequence[Part]) -> AbstractContextManager[None]: ...

    def embed(self, length: int) -> None: ...

    def embedding(self, tokens: Sequence[int]) -> AbstractContextManager[None]: ...


class Embedding:
    """A text on its way to the sum of its final hidden states, with memory of its own for keys and values."""

    def __init__(self, model: Transformer, length: int, dtype: torch.dtype) -> None:
        self._model = model
        self._cache = BatchCache(model.config, 1, length, dtype=dtype, device=model.device)
        self.total = torch.zeros(model.config.hidden_size, dtype=torch.float32, device="cpu")
        self._num_left = length

    @property
    def is_complete(self) -> bool:
        return self._num_left <= 0

    @torch.no_grad()
    def add(self, tokens: Sequence[int]) -> None:
        """Make a pass over its next tokens."""
        self._num_left -= len(tokens)
        part = torch.tensor([list(tokens)], device=self._model.device)
        self.total += self._model(part, cache=self._cache).hidden[0].float().sum(0).cpu()


class Runner:
    """A model and its memory for keys and values, in blocks that others hand out."""

    def __init__(
        self, model: Transformer, num_blocks: int, *, block_size: int, dtype: torch.dtype, others: Others | None = None
    ) -> None:
        """others: are told of every pass before it is made here."""
        self.model = model.eval()
        self._dtype, self._device = dtype, model.device
        self._num_blocks, self._block_size = num_blocks, block_size
        self._storage = allocate_storage(
            model.config, num_blocks, block_size=block_size, dtype=dtype, device=model.device
        )
        self._plan: DecodePlan | None = None
        self._singles: _Singles | None = None
        self._others = others
        if others is not None:
            others.start(num_blocks, block_size=block_size, dtype=dtype)

    def run(self, parts: Sequence[Part], rows: Sequence[int] = ()) -> Decoded:
        """Compute the new tokens of all parts, end to end, and keep their keys and values.

        rows: of these tokens, strictly rising, those whose logits are wanted. What is returned may be overwritten by
        the next run.
        """
        if self._others is not None:
            with self._others.running(parts):
                return self._run(parts, rows)
        return self._run(parts, rows)

    def _run(self, parts: Sequence[Part], rows: Sequence[int]) -> Decoded:
        plan = self._find_plan() if all(len(part.tokens) == 1 for part in parts) else None
        if plan is not None:
            return self._run_singles(plan, parts, rows)
        tables = np.zeros((len(parts), max(len(part.blocks) for part in parts)), dtype=np.int32)
        for table, part in zip(tables, parts, strict=True):
            table[: len(part.blocks)] = part.blocks
        token_ids = [token for part in parts for token in part.tokens]
        starts = [0, *accumulate(len(part.tokens) for part in parts)]
        batch = PagedBatch(
            _tensor(starts, np.int32), _tensor([part.length for part in parts], np.int32), torch.from_numpy(tables)
        )
        return self.model.infer(
            _tensor(token_ids, np.int64).to(self._device, non_blocking=True),
            CacheStep(self._storage, batch),
            _wanted(rows, len(token_ids)),
        )

    def _find_plan(self) -> DecodePlan | None:
        plan = self._plan
        if plan is None or plan.library is not select.cpu_library() or plan.reads_ahead != self.model.reads_ahead:
            plan = self._plan = self.model.find_plan()
        return plan

    def _run_singles(self, plan: DecodePlan, parts: Sequence[Part], rows: Sequence[int]) -> Decoded:
        """Compute one new token for each part."""
        count, width = len(parts), max(len(part.blocks) for part in parts)
        singles = self._singles
        if singles is None or singles.count != count or singles.width < width:
            singles = self._singles = _Singles(count, -(-width // _SPARE_BLOCKS) * _SPARE_BLOCKS)
        singles.fill(parts)
        into = singles.decoded if len(rows) == count else None
        decoded = plan.run(singles.tokens, self._storage, singles.batch, _wanted(rows, count), into=into)
        if len(rows) == count <= _REUSED_ROWS:
            singles.decoded = decoded
        return decoded

    def warm_up(self, most_tokens: int) -> None:
        """Have done what is otherwise done at the first use, while others wait.

        PyTorch's operators load a compiler, a second or more, for models whose pass is not one call. On CUDA kernels
        are compiled, which differ with the number of a pass's new tokens, and for a context that is computed in parts.
        Before any sequence has blocks: their contents are lost.
        """
        if self._device.type != "cpu":
            select.cpu_library()  # which draws tokens
        elif self._find_plan() is None:
            self.run([Part([0], 1, array("i", [0]))], [0])
        if not select.uses_triton(self._device):
            return
        logger.info("Preparing the kernels for this GPU; what it has not compiled yet takes some seconds.")
        longest = min(self._num_blocks * self._block_size, self.model.config.max_positions)
        counts = [1 << power for power in range(min(most_tokens, longest).bit_length())]
        for new, length in [*((count, count) for count in counts), (1, longest)]:
            part = Part([0] * new, length, array("i", range(-(-length // self._block_size))))
            self.run([part], range(min(new, _WARM_ROWS)))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Return fp32 logits (R, V) on the CPU, where tokens are chosen."""
        return self.model.logits(hidden).cpu()

    def start_embedding(self, length: int) -> Embedding:
        return Embedding(self.model, length, self._dtype)

    def embed(self, tokens: Sequence[int], *, chunk: int) -> Generator[bool, None, Tensor]:
        """Return the mean (H,) fp32 of a text's final hidden states, with memory of its own for keys and values.

        It stops after each pass, of chunk tokens, but the last, and says that the text is not done: False.
        """
        text = self.start_embedding(len(tokens))
        if self._others is not None:
            self._others.embed(len(tokens))
        for start in range(0, len(tokens), chunk):
            if start:
                yield False
            part = tokens[start : start + chunk]
            with nullcontext() if self._others is None else self._others.embedding(part):
                text.add(part)
        return text.total / len(tokens)


class _Singles:
    """What a step of one token for each of so many sequences reads and gives, in memory that the next such step reuses.

    Making arrays and tensors was a third of a step's Python, whose own code and data the weights have pushed out of the
    caches. Only for a pass in one call: it is done with them when it returns, and asks of the batch nothing that this
    remembers of its lengths.
    """

    def __init__(self, count: int, width: int) -> None:
        """width: blocks that there is room for, of each sequence."""
        self.count, self.width = count, width
        self._tokens, self._lengths = array("q", bytes(8 * count)), array("i", bytes(4 * count))
        self._tables = array("i", bytes(4 * count * width))
        self.tokens = torch.frombuffer(self._tokens, dtype=torch.int64)
        self.batch = PagedBatch(
            torch.arange(count + 1, dtype=torch.int32, device="cpu"),
            torch.frombuffer(self._lengths, dtype=torch.int32),
            torch.frombuffer(self._tables, dtype=torch.int32).view(count, width),
        )
        self.decoded: Decoded | None = None  # with the logits of all

    def fill(self, parts: Sequence[Part]) -> None:
        for place, part in enumerate(parts):
            (self._tokens[place],) = part.tokens
            self._lengths[place] = part.length
            start = place * self.width
            self._tables[start : start + len(part.blocks)] = part.blocks


def _wanted(rows: Sequence[int], count: int) -> Tensor | None:
    """Return which of a step's `count` tokens' logits are wanted, None for none."""
    if not rows:
        return None
    return _all_rows(count) if len(rows) == count else _tensor(rows, np.int64)


@lru_cache(maxsize=256)
def _all_rows(count: int) -> Tensor:
    return torch.arange(count, device="cpu")


def _tensor(numbers: Sequence[int], dtype: type[np.integer[Any]]) -> Tensor:
    return torch.from_numpy(np.array(numbers, dtype))  # in less than half of the time of torch.tensor


def block_bytes(model: Transformer, *, block_size: int, dtype: torch.dtype) -> int:
    """Return the memory of one block in all layers."""
    one = allocate_storage(model.config, 1, block_size=block_size, dtype=dtype, device=model.device)
    return sum(value.nbytes for layer in one.layers for value in vars(layer).values() if isinstance(value, Tensor))
