"""The learning rate as a function of the tokens trained on."""

import math

from moesaic.config.train import ScheduleConfig


def learning_rate(config: ScheduleConfig, tokens: int, *, total_tokens: int) -> float:
    """Return the rate for a step that starts after `tokens` tokens of `total_tokens`."""
    if tokens < config.warmup_tokens:
        return config.learning_rate * (tokens + 1) / (config.warmup_tokens + 1)
    if config.kind == "cosine":
        end = config.decay_tokens or total_tokens
        start = config.warmup_tokens
    else:
        end = total_tokens
        length = config.decay_tokens or max(1, total_tokens // 10)
        start = max(config.warmup_tokens, total_tokens - length)
    if tokens <= start:
        return config.learning_rate
    progress = min(1.0, (tokens - start) / max(1, end - start))
    # Cosine falls by half a period; WSD's last part falls linearly.
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * falling
