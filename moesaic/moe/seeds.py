"""Repeatable randomness: one generator from a seed and the counters that tell its uses apart (step, layer, ...)."""

import torch


def mix_seeds(seed: int, *counters: int) -> int:
    """Return a 63-bit seed that differs wherever any counter does (splitmix64 steps)."""
    mask = (1 << 64) - 1
    state = 0
    for counter in (seed, *counters):  # the seed too is mixed in, or seed 0 step 1 would be seed 1 step 0
        state = (state ^ (counter & mask)) + 0x9E3779B97F4A7C15 & mask
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & mask
        state = (state ^ state >> 27) * 0x94D049BB133111EB & mask
        state ^= state >> 31
    return state >> 1


def generator(device: torch.device, seed: int) -> torch.Generator:
    """Return a new generator on the device; the global one is left alone."""
    return torch.Generator(device=device).manual_seed(seed)
