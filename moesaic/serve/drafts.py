"""Tokens that may come next, cheaply: by a smaller model, or from the text itself.

The engine checks them with the model in one pass. Each choice of the model is made with random numbers of its own
place in the text, and a drafted token is kept where it is that choice: so the tokens are those that the model gives
alone, and a draft only decides how many of them one pass gives. A draft model is right more often when it chooses with
the same random numbers, as it does here.
"""

from array import array
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
# Of a pair that is everywhere, so many places are looked at.
_MOST_PLACES = 256


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


class _Pairs:
    """The places of each pair of neighbouring tokens in a growing text."""

    def __init__(self) -> None:
        self._last: dict[tuple[int, int], int] = {}  # the place behind a pair where it stood last
        self._before = array("i", [0, 0])  # of each place, that behind the same pair before; 0: none

    def enter(self, tokens: Sequence_[int]) -> None:
        """Enter what is new; a pair is entered once there is a token behind it."""
        last, before = self._last, self._before
        for place in range(len(before), len(tokens)):
            pair = tokens[place - 2], tokens[place - 1]
            before.append(last.get(pair, 0))
            last[pair] = place

    def find(self, tokens: Sequence_[int]) -> int:
        """Return the place behind which the text may go on as it did there, 0 where there is none: of the last places
        of its last pair, that where most of the tokens before agree too, up to _LONGEST_NGRAM; of equals the last.
        """
        found, longest = 0, 1
        place = self._last.get((tokens[-2], tokens[-1]), 0) if len(tokens) > 1 else 0
        for _ in range(_MOST_PLACES):
            if not place or longest == _LONGEST_NGRAM:
                break
            length = 2
            while length < min(place, _LONGEST_NGRAM) and tokens[place - length - 1] == tokens[-length - 1]:
                length += 1
            if length > longest:
                found, longest = place, length
            place = self._before[place]
        return found


class NgramDraft:
    """What followed the last few tokens where they stood before in the same text: code, tables, quotations."""

    def __init__(self) -> None:
        self._pairs: dict[Sequence, _Pairs] = {}

    def catch_up(self, wanted: Sequence_[Wanted]) -> None:
        for each in wanted:
            self._pairs.setdefault(each.sequence, _Pairs()).enter(each.sequence.tokens)

    def propose(self, wanted: Sequence_[Wanted]) -> list[tuple[int, ...]]:
        return [self._propose(each.sequence, each.count) for each in wanted]

    def _propose(self, sequence: Sequence, count: int) -> tuple[int, ...]:
        place = self._pairs[sequence].find(sequence.tokens)
        return tuple(sequence.tokens[place : place + count]) if place else ()

    def settle(self, sequence: Sequence) -> None:
        pass  # it looks at the tokens only

    def forget(self, sequence: Sequence) -> None:
        self._pairs.pop(sequence, None)

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
