"""Which tokens of which sequences the next step computes. Ints and lists: no tensor, no model.

A step has a budget of tokens. Sequences that generate come first, one token each; what is left of the budget goes to
prompts, in chunks, and what these leave to drafted tokens. Where blocks run out, the sequence that counts least (by
priority, then by arrival) gives its own up and is computed again later.
"""

import heapq
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from moesaic.serve.kv_blocks import BlockHash, BlockPool, hash_block


@dataclass(eq=False)
class Sequence:
    """One text: its tokens (the prompt's first), and how far its keys and values are computed.

    priority: lower comes first; arrival, of which no two are equal, breaks ties. may_find_prefix: False where every
    position of the prompt has to be computed, because its results are asked for. num_cached: positions that were there
    when it first ran, None before. blocks: int32, as they go into a block table. num_admissions: how often it began to
    run, each time with other blocks. is_broken: some of its numbers are none, so that its blocks are its own alone.
    """

    tokens: list[int]
    num_prompt: int
    priority: int
    arrival: int
    may_find_prefix: bool = True
    num_computed: int = 0
    num_cached: int | None = None
    blocks: "array[int]" = field(default_factory=lambda: array("i"))
    hashes: list[BlockHash] = field(default_factory=list)
    num_published: int = 0
    num_admissions: int = 0
    is_running: bool = False
    is_broken: bool = False

    @property
    def order(self) -> tuple[int, int]:
        return self.priority, self.arrival

    @property
    def num_missing(self) -> int:
        """Tokens whose keys and values are not computed: 1 while it generates."""
        return len(self.tokens) - self.num_computed


@dataclass(frozen=True)
class Scheduled:
    """A sequence's part of a step: its tokens from num_computed on, num_tokens of them, then so many drafted ones.

    is_last: nothing of it is missing after this, so that its next token can be chosen.
    """

    sequence: Sequence
    num_tokens: int
    num_drafted: int
    is_last: bool


@dataclass
class _Step:
    """A step being made: what is left of its budget, and what it holds already."""

    budget: int
    parts: dict[Sequence, Scheduled] = field(default_factory=dict)


class Scheduler:
    """The sequences of an engine, waiting and running."""

    def __init__(self, pool: BlockPool, *, max_sequences: int, max_batch_tokens: int, prefix_caching: bool) -> None:
        self.pool = pool
        self.max_sequences, self.max_batch_tokens = max_sequences, max_batch_tokens
        self.prefix_caching = prefix_caching
        self.running: list[Sequence] = []  # by order
        self._waiting: set[Sequence] = set()
        # By order. It may hold some that wait no longer, no more than wait and a few; none of those is its first.
        self._queue: list[tuple[tuple[int, int], Sequence]] = []
        self.num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def has_work(self) -> bool:
        return bool(self.running or self._waiting)

    @property
    def _first_waiting(self) -> Sequence | None:
        return self._queue[0][1] if self._queue else None

    def add(self, sequence: Sequence) -> None:
        self._waiting.add(sequence)
        heapq.heappush(self._queue, (sequence.order, sequence))

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is; what it computed may be found by others until it is needed."""
        if sequence.is_running:
            self._stop(sequence)
        else:
            self._leave_queue(sequence)

    def _leave_queue(self, sequence: Sequence) -> None:
        self._waiting.remove(sequence)
        if len(self._queue) > 2 * len(self._waiting) + 16:
            self._queue = [each for each in self._queue if each[1] in self._waiting]
            heapq.heapify(self._queue)
        while self._queue and self._queue[0][1] not in self._waiting:
            heapq.heappop(self._queue)

    def schedule(self, num_drafted: Mapping[Sequence, int] | None = None) -> list[Scheduled]:
        """Return the parts of the next step; their blocks are allocated.

        num_drafted: of sequences that generate, how many tokens to check beyond the next.
        """
        self._give_way()
        step = _Step(self.max_batch_tokens)
        for sequence in sorted(self.running, key=lambda each: each.num_missing > 1):  # otherwise as they are
            self._take(sequence, step)
        while (first := self._first_waiting) is not None and step.budget > 0 and self._has_room(first):
            self._admit(first)
            self._take(first, step)
        for sequence, count in (num_drafted or {}).items():
            self._draft(sequence, count, step)
        return list(step.parts.values())

    def _take(self, sequence: Sequence, step: "_Step") -> None:
        """Put as much of a sequence into a step as the budget and the blocks allow."""
        if not sequence.is_running or step.budget <= 0:
            return
        num_tokens = min(sequence.num_missing, step.budget)
        while not self._reserve(sequence, sequence.num_computed + num_tokens):
            victim = self.running[-1]
            self.preempt(victim)
            if victim is sequence:
                return
            if (part := step.parts.pop(victim, None)) is not None:  # it generates, and has been before a prompt
                step.budget += part.num_tokens
        step.parts[sequence] = Scheduled(sequence, num_tokens, 0, is_last=num_tokens == sequence.num_missing)
        step.budget -= num_tokens

    def _draft(self, sequence: Sequence, count: int, step: "_Step") -> None:
        """Have drafted tokens checked behind a part that is a last one, as the budget and the blocks allow."""
        part, count = step.parts.get(sequence), min(count, step.budget)
        if part is None or not part.is_last or count <= 0:
            return
        if self._reserve(sequence, len(sequence.tokens) + count):
            step.parts[sequence] = replace(part, num_drafted=count)
            step.budget -= count

    def _give_way(self) -> None:
        """Stop those that run and count less than the first that waits, the last first, if that makes room."""
        first = self._first_waiting
        if first is None or not self.running or self.running[-1].priority <= first.priority or self._has_room(first):
            return
        kept = {block for each in self.running if each.priority <= first.priority for block in each.blocks}
        shared = kept.intersection(self.pool.look_up(self._find_hashes(first)))
        if self._num_needed(first) - len(shared) > self.pool.num_blocks - len(kept):
            return
        while not self._has_room(first):
            self.preempt(self.running[-1])

    def _has_room(self, sequence: Sequence) -> bool:
        """Whether a waiting sequence could run.

        It needs the blocks of all its tokens, so that two prompts that are half computed do not stop each other in
        turn.
        """
        if len(self.running) >= self.max_sequences:
            return False
        needed = self._num_needed(sequence)
        if not self.running or needed <= self.pool.num_free:
            return True
        # Last, since this goes through a long prompt's blocks.
        return needed - self.pool.count_found(self._find_hashes(sequence)) <= self.pool.num_free

    def _num_needed(self, sequence: Sequence) -> int:
        """Blocks of all its tokens and the next."""
        return -(-(len(sequence.tokens) + 1) // self.pool.block_size)

    def _admit(self, sequence: Sequence) -> None:
        """Let one that waits run, with the blocks of its beginning that are there."""
        self._leave_queue(sequence)
        sequence.blocks = array("i", self.pool.find(self._find_hashes(sequence)))
        sequence.num_published = len(sequence.blocks)
        sequence.num_computed = len(sequence.blocks) * self.pool.block_size
        if sequence.num_cached is None:
            sequence.num_cached = sequence.num_computed
        sequence.num_admissions += 1
        sequence.is_running = True
        self.running.append(sequence)
        self.running.sort(key=lambda each: each.order)

    def _find_hashes(self, sequence: Sequence) -> list[BlockHash]:
        """The hashes of its full blocks, but for the one with its last token, which is computed in any case."""
        if not self.prefix_caching or not sequence.may_find_prefix:
            return []
        count = (len(sequence.tokens) - 1) // self.pool.block_size
        self._extend_hashes(sequence, count)
        return sequence.hashes[:count]

    def _extend_hashes(self, sequence: Sequence, count: int) -> None:
        size = self.pool.block_size
        for index in range(len(sequence.hashes), count):
            parent = sequence.hashes[-1] if sequence.hashes else b""
            sequence.hashes.append(hash_block(parent, sequence.tokens[index * size : (index + 1) * size]))

    def computed(self, sequence: Sequence, num_tokens: int) -> None:
        """Note that so many tokens more are computed, those drafted that were right included, and share full blocks.

        The sequence's tokens must hold them already.
        """
        sequence.num_computed += num_tokens
        assert sequence.num_computed <= len(sequence.tokens), (sequence.num_computed, len(sequence.tokens))
        full = sequence.num_computed // self.pool.block_size
        if self.prefix_caching and not sequence.is_broken and full > sequence.num_published:
            self._extend_hashes(sequence, full)
            for index in range(sequence.num_published, full):
                self.pool.publish(sequence.blocks[index], sequence.hashes[index])
            sequence.num_published = full

    def _reserve(self, sequence: Sequence, length: int) -> bool:
        """Allocate blocks for so many positions; False, with what could be had kept, where there are not enough."""
        while len(sequence.blocks) * self.pool.block_size < length:
            block = self.pool.allocate()
            if block is None:
                return False
            sequence.blocks.append(block)
        return True

    def preempt(self, sequence: Sequence) -> None:
        """Take what a running sequence has computed away, and let it wait."""
        self._stop(sequence)
        self.num_preemptions += 1
        self.add(sequence)

    def _stop(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.pool.release(sequence.blocks)
        sequence.blocks = array("i")
        sequence.num_computed = sequence.num_published = 0
        sequence.is_running = sequence.is_broken = False
