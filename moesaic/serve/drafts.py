"""Tokens that may come next, cheaply: by a smaller model, or from the text itself.

The engine checks them with the model in one pass. Each choice of the model is made with random numbers of its own
place in the text, and a drafted token is kept where it is that choice: so the tokens are those that the model gives
alone, and a draft only decides how many of them one pass gives. A draft model is right more often when it chooses with
the same random numbers, as it does here.
"""

from collections.abc import Sequence as Sequence_
from dataclasses import dataclass
from itertools import accumulate
from typing import Protocol

from moesaic.errors import ConfigError, GenerationError
from moesaic.model.transformer import Transformer
from moesaic.serve.kv_blocks import BlockHash
from moesaic.serve.runner import Part, Runner
from moesaic.serve.sampler import RowSampler, SamplingState
from moesaic.serve.scheduler import Sequence

_LONGEST_NGRAM = 4
_SHORTEST_NGRAM = 2


@dataclass(frozen=True)
class Wanted:
    """So many tokens to draft for a sequence, all of whose tokens but the last are computed."""

    sequence: Sequence
    state: SamplingState
    count: int


class Draft(Protocol):
    """What drafts."""

    def catch_up(self, wanted: Sequence_[Wanted]) -> None:
        """Do what was missed of these texts, once: what it costs is not the price of the next tokens."""
        ...

    def propose(self, wanted: Sequence_[Wanted]) -> list[tuple[int, ...]]:
        """Return at most `count` tokens for each, after catching up."""
        ...

    def settle(self, sequence: Sequence) -> None:
        """Take note of a sequence's tokens as they are now, after drafted ones were checked."""
        ...

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended."""
        ...

    def reset(self) -> None:
        """Nothing is at work, and weights have changed."""
        ...


class NgramDraft:
    """What followed the last few tokens where they stood before in the same text: code, tables, quotations."""

    def __init__(self) -> None:
        # For each n, the places behind its n-grams, the last one counting; and how many tokens are entered.
        self._places: dict[Sequence, tuple[dict[tuple[int, ...], int], int]] = {}

    def catch_up(self, wanted: Sequence_[Wanted]) -> None:
        for each in wanted:
            tokens = each.sequence.tokens
            places, entered = self._places.get(each.sequence, ({}, 0))
            # An n-gram is entered once there is a token behind it.
            for end in range(max(entered, 1), len(tokens)):
                for length in range(_SHORTEST_NGRAM, min(_LONGEST_NGRAM, end) + 1):
                    places[tuple(tokens[end - length : end])] = end
            self._places[each.sequence] = places, len(tokens)

    def propose(self, wanted: Sequence_[Wanted]) -> list[tuple[int, ...]]:
        return [self._propose(each.sequence, each.count) for each in wanted]

    def _propose(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        tokens, (places, _) = sequence.tokens, self._places[sequence]
        for length in range(min(_LONGEST_NGRAM, len(tokens)), _SHORTEST_NGRAM - 1, -1):
            place = places.get(tuple(tokens[-length:]))
            if place is not None:
                return tuple(tokens[place : place + count])
        return ()

    def settle(self, sequence: Sequence) -> None:
        pass  # it looks at the tokens only

    def forget(self, sequence: Sequence) -> None:
        self._places.pop(sequence, None)

    def reset(self) -> None:
        """Nothing: texts do not depend on weights."""


class ModelDraft:
    """A smaller model with the same tokenizer, a Mixture-of-Students of the model say.

    It keeps its keys and values under the model's block numbers, so that what sequences share they share here too.
    """

    def __init__(
        self, model: Transformer, *, target: Transformer, num_blocks: int, block_size: int, max_length: int, chunk: int
    ) -> None:
        """chunk: at most so many tokens are computed at once.

        Raises: ConfigError for a model that cannot draft for the target.
        """
        own, other = model.config, target.config
        if own.vocab_size != other.vocab_size:
            raise ConfigError(
                f"the draft model has a vocabulary of {own.vocab_size} and the model one of {other.vocab_size}; the "
                f"same tokens are required; draft with a model of the same tokenizer."
            )
        if own.max_positions < max_length:
            raise ConfigError(
                f"the draft model has {own.max_positions} positions; texts here have up to {max_length}; use another "
                f"one, or set max_length to {own.max_positions}."
            )
        self._runner = Runner(model, num_blocks, block_size=block_size, dtype=model.compute_dtype)
        self._runner.warm_up(chunk)
        self._block_size, self._chunk = block_size, chunk
        self._computed: dict[Sequence, tuple[int, int]] = {}  # at which admission, how many tokens
        self._valid: dict[int, BlockHash] = {}  # of which contents a block holds this model's keys and values

    def catch_up(self, wanted: Sequence_[Wanted]) -> None:
        """Compute all but the last token of texts that lack more than a check leaves: it, and one that was right."""
        try:
            self._catch_up(wanted)
        except BaseException:  # what is noted was not computed, or not all of it
            self._computed.clear()
            self._valid.clear()
            raise

    def _catch_up(self, wanted: Sequence_[Wanted]) -> None:
        parts: list[Part] = []
        room = self._chunk
        for sequence in (each.sequence for each in wanted):
            start, last = self._start(sequence), len(sequence.tokens) - 1
            while last - start > 1:
                end = min(start + room, last)
                parts.append(Part(sequence.tokens[start:end], end, sequence.blocks))
                room -= end - start
                start = end
                if not room:
                    self._runner.run(parts)
                    parts, room = [], self._chunk
                self._computed[sequence] = sequence.num_admissions, start
            whole = start // self._block_size
            self._valid |= zip(sequence.blocks[:whole], sequence.hashes, strict=False)
            for block in sequence.blocks[whole:]:  # written next
                self._valid.pop(block, None)
        if parts:
            self._runner.run(parts)

    def propose(self, wanted: Sequence_[Wanted]) -> list[tuple[int, ...]]:
        proposed: list[list[int]] = [[] for _ in wanted]
        states = [each.state.fork() for each in wanted]
        going_on = list(range(len(wanted)))
        while going_on:
            parts = []
            for index in going_on:
                sequence, new = wanted[index].sequence, proposed[index]
                done = self._start(sequence) if not new else len(sequence.tokens) + len(new) - 1
                tokens = [*sequence.tokens[done:], *new][-1:] if new else sequence.tokens[done:]
                parts.append(Part(tokens, len(sequence.tokens) + len(new), sequence.blocks))
            last = [end - 1 for end in accumulate(len(part.tokens) for part in parts)]
            decoded = self._runner.run(parts, last)
            sampler = RowSampler(decoded, [(row, states[index], 0) for row, index in enumerate(going_on)])
            left = []
            for row, index in enumerate(going_on):
                try:
                    token = sampler.sample(row, states[index]).token_id
                except GenerationError:
                    continue  # a draft that is no number is no draft; the model is asked alone
                states[index].append(token)
                proposed[index].append(token)
                if len(proposed[index]) < wanted[index].count:
                    left.append(index)
            going_on = left
        for each, new in zip(wanted, proposed, strict=True):
            # The last one drafted was not computed.
            length = len(each.sequence.tokens) + max(0, len(new) - 1)
            self._computed[each.sequence] = each.sequence.num_admissions, length
        return [tuple(new) for new in proposed]

    def _start(self, sequence: Sequence) -> int:
        """How many of a sequence's tokens are computed, at most all but the last."""
        admission, computed = self._computed.get(sequence, (0, 0))
        if admission != sequence.num_admissions:
            computed = 0
            for block, contents in zip(sequence.blocks, sequence.hashes, strict=False):
                if self._valid.get(block) != contents:
                    break
                computed += self._block_size
        return min(computed, len(sequence.tokens) - 1)

    def settle(self, sequence: Sequence) -> None:
        """What was drafted and is not in the text counts as not computed."""
        if sequence in self._computed:
            admission, computed = self._computed[sequence]
            self._computed[sequence] = admission, min(computed, len(sequence.tokens) - 1)

    def forget(self, sequence: Sequence) -> None:
        self._computed.pop(sequence, None)

    def reset(self) -> None:
        self._computed.clear()
        self._valid.clear()
