"""Which sequence owns which block of keys and values: reference counts, sharing of equal beginnings, eviction.

Block numbers and hashes only; what a block holds is kernels/paged_attention's. A block whose positions are all computed
gets the hash of everything up to its end, and can be found by it: by sequences that begin alike while it is in use, and
after that until its memory is needed, the longest unused first.
"""

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

BlockHash = bytes


def hash_block(parent: BlockHash, tokens: Sequence[int]) -> BlockHash:
    """Return the hash of a block's tokens after all that `parent` stands for (b"" at the beginning)."""
    return blake2b(array("q", tokens).tobytes(), digest_size=16, key=parent).digest()


class BlockPool:
    """Blocks 0 to num_blocks - 1, each free, in use by so many sequences, or unused with contents that may return."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0 and block_size > 0, (num_blocks, block_size)
        self.num_blocks, self.block_size = num_blocks, block_size
        self._references = [0] * num_blocks
        self._hashes: list[BlockHash | None] = [None] * num_blocks
        self._by_hash: dict[BlockHash, int] = {}
        self._empty = list(range(num_blocks - 1, -1, -1))  # taken from the end: low numbers first
        self._unused: OrderedDict[int, None] = OrderedDict()  # with contents, the longest unused first

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated, those with contents that may return included."""
        return len(self._empty) + len(self._unused)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_cached(self) -> int:
        """Unused blocks whose contents may return."""
        return len(self._unused)

    def allocate(self) -> int | None:
        """Return a block whose contents are gone, in use once; None where every block is in use."""
        if self._empty:
            block = self._empty.pop()
        elif self._unused:
            block, _ = self._unused.popitem(last=False)
            self._forget(block)
        else:
            return None
        assert self._references[block] == 0, block
        self._references[block] = 1
        return block

    def look_up(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Return the blocks of the longest beginning that is there, and leave them as they are."""
        blocks = []
        for each in hashes:
            block = self._by_hash.get(each)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def find(self, hashes: Iterable[BlockHash]) -> list[int]:
        """Return the blocks of the longest beginning that is there, each in use once more."""
        blocks = self.look_up(hashes)
        for block in blocks:
            if self._references[block] == 0:
                del self._unused[block]
            self._references[block] += 1
        return blocks

    def count_found(self, hashes: Iterable[BlockHash]) -> int:
        """Return how many blocks find would give that are in use now, so that they cost nothing of what is free."""
        return sum(self._references[block] > 0 for block in self.look_up(hashes))

    def publish(self, block: int, block_hash: BlockHash) -> None:
        """Let a block in use be found. Where an equal one can be found already, that one stays the one to find."""
        assert self._references[block] > 0, block
        if self._hashes[block] is None and block_hash not in self._by_hash:
            self._hashes[block] = block_hash
            self._by_hash[block_hash] = block

    def release(self, blocks: Sequence[int]) -> None:
        """Take a sequence's hold off its blocks, given in their order: of those unused now, the last goes first."""
        for block in reversed(blocks):
            assert self._references[block] > 0, block
            self._references[block] -= 1
            if self._references[block] == 0:
                if self._hashes[block] is None:
                    self._empty.append(block)
                else:
                    self._unused[block] = None

    def forget_all(self) -> None:
        """Let no block be found any more; those that are unused are empty."""
        for block in [block for block, block_hash in enumerate(self._hashes) if block_hash is not None]:
            self._forget(block)
        self._empty.extend(reversed(self._unused))
        self._unused.clear()

    def _forget(self, block: int) -> None:
        block_hash = self._hashes[block]
        assert block_hash is not None, block
        del self._by_hash[block_hash]
        self._hashes[block] = None
