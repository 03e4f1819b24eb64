"""The learning rate as a function of the tokens trained on."""

import math

from moesaic.config.train import ScheduleConfig


def learning_rate(config: ScheduleConfig, tokens: int, *, total_tokens: int) -> float:
    """Return the rate of the step that brings the tokens trained on to `tokens`, of `total_tokens` in all."""
    if tokens < config.warmup_tokens:
        return config.learning_rate * tokens / config.warmup_tokens
    if config.kind == "cosine":
        start, end = config.warmup_tokens, config.decay_tokens or total_tokens
    else:
        end = total_tokens
        start = max(config.warmup_tokens, end - (config.decay_tokens or max(1, total_tokens // 10)))
    progress = min(1.0, max(0.0, (tokens - start) / max(1, end - start)))
    # Cosine falls by half a period; WSD's last part falls linearly.
    falling = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
    return config.min_learning_rate + (config.learning_rate - config.min_learning_rate) * falling
