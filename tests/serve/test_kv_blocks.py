import random

import pytest

from moesaic.serve.kv_blocks import BlockPool, hash_block


def test_a_hash_stands_for_everything_before_it_and_nothing_else() -> None:
    first = hash_block(b"", [1, 2])
    assert hash_block(b"", [1, 2]) == first
    assert hash_block(first, [3, 4]) != hash_block(b"", [3, 4])
    assert hash_block(b"", [1, 2, 3]) != hash_block(b"", [1, 2]) != hash_block(b"", [2, 1])


def test_blocks_are_given_out_once_and_come_back() -> None:
    pool = BlockPool(3, 32)
    blocks = [pool.allocate() for _ in range(3)]
    assert sorted(block for block in blocks if block is not None) == [0, 1, 2]
    assert pool.allocate() is None and pool.num_free == 0 and pool.num_used == 3
    pool.release([0, 1, 2])
    assert pool.num_free == 3 and pool.num_cached == 0


def test_published_blocks_are_found_in_use_and_after() -> None:
    pool = BlockPool(4, 2)
    hashes = [hash_block(b"", [5, 6])]
    hashes.append(hash_block(hashes[0], [7, 8]))
    blocks = [pool.allocate(), pool.allocate()]
    owned = [block for block in blocks if block is not None]
    for block, each in zip(owned, hashes, strict=True):
        pool.publish(block, each)
    assert pool.find(hashes) == owned  # shared
    pool.release(owned)
    assert pool.num_used == 2 and pool.count_found(hashes) == 2
    pool.release(owned)
    assert pool.num_used == 0 and pool.num_cached == 2 and pool.count_found(hashes) == 0
    assert pool.find(hashes) == owned and pool.num_cached == 0
    assert pool.find([hash_block(b"", [0, 0]), *hashes]) == []  # a beginning, not a part


def test_the_longest_unused_goes_first_and_of_a_sequence_its_end() -> None:
    pool = BlockPool(3, 1)
    hashes = [hash_block(b"", [token]) for token in range(3)]
    for token in range(3):
        block = pool.allocate()
        assert block == token
        pool.publish(block, hashes[token])
    pool.release([0, 1])  # a sequence of two blocks, then one of one
    pool.release([2])
    assert pool.allocate() == 1 and pool.find([hashes[1]]) == []
    assert pool.allocate() == 0
    assert pool.find([hashes[2]]) == [2]


def test_an_equal_block_is_published_once() -> None:
    pool = BlockPool(2, 1)
    for block in (pool.allocate(), pool.allocate()):
        assert block is not None
        pool.publish(block, b"same")
    assert pool.find([b"same"]) == [0]
    pool.release([1])
    assert pool.num_cached == 0 and pool.num_free == 1  # the second one's contents are nobody's


@pytest.mark.parametrize("seed", range(3))
def test_whatever_happens_no_block_is_lost_or_given_twice(seed: int) -> None:
    rng = random.Random(seed)
    pool = BlockPool(7, 1)
    owners: list[list[int]] = []
    for _ in range(2000):
        if owners and rng.random() < 0.45:
            pool.release(owners.pop(rng.randrange(len(owners))))
        else:
            names = [bytes([rng.randrange(4), place]) for place in range(rng.randrange(1, 4))]
            blocks = pool.find(names)
            shared = len(blocks)
            while len(blocks) < len(names) and (block := pool.allocate()) is not None:
                assert all(block not in owned for owned in owners), "given to two"
                blocks.append(block)
            for block, name in list(zip(blocks, names, strict=False))[shared:]:
                pool.publish(block, name)
            if blocks:
                owners.append(blocks)
        used = {block for owned in owners for block in owned}
        assert pool.num_used == len(used) and pool.num_free == 7 - len(used)
    for owned in owners:
        pool.release(owned)
    assert pool.num_free == 7
