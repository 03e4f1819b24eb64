"""Seeds are repeatable and tell every counter apart."""

import itertools

import torch

from moesaic.moe.seeds import generator, mix_seeds


def test_every_seed_step_and_layer_gets_its_own() -> None:
    seeds = {mix_seeds(*counters) for counters in itertools.product(range(12), repeat=3)}
    assert len(seeds) == 12**3
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_seed_and_counter_do_not_commute() -> None:
    assert mix_seeds(0, 1) != mix_seeds(1, 0)
    assert mix_seeds(3) != mix_seeds(3, 0)


def test_any_integer_is_a_seed() -> None:
    for seed in (0, -1, 1 << 200):
        drawn = torch.rand(3, generator=generator(torch.device("cpu"), mix_seeds(seed, seed)))
        again = torch.rand(3, generator=generator(torch.device("cpu"), mix_seeds(seed, seed)))
        assert torch.equal(drawn, again)
