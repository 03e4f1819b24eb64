"""What the experts of a model do while it serves: counts per layer and expert, and of the last step."""

import numpy as np

from moesaic.config.model import ModelConfig
from moesaic.kernels.decode import Decoded
from moesaic.serve.outputs import LayerLoad, TokenExperts

# Recent counts lose half their weight in so many tokens.
_HALF_LIFE_TOKENS = 2048.0


class ExpertLoad:
    """Counts routes; one pass over all layers' routes a step."""

    def __init__(self, config: ModelConfig) -> None:
        moe = [(index, layer) for index, layer in enumerate(config.layers) if layer.is_moe]
        self.layer_numbers = tuple(index for index, _ in moe)
        self._num_experts = [layer.num_experts for _, layer in moe]
        self._top_k = np.array([layer.top_k for _, layer in moe], dtype=np.int64)
        self._starts = np.cumsum([0, *self._num_experts])[:-1]
        self._total = np.zeros(sum(self._num_experts), dtype=np.int64)
        self._recent = np.zeros(len(self._total))
        self.distinct_experts_per_step = 0.0

    def add(self, decoded: Decoded) -> None:
        """Count a step's routes."""
        num_tokens = decoded.hidden.shape[0]
        if not self._num_experts or not num_tokens:
            return
        ids = decoded.all_expert_ids.cpu().numpy()
        flat = ids + np.repeat(self._starts, self._top_k * num_tokens)
        counts = np.bincount(flat, minlength=len(self._total))
        self._total += counts
        self._recent *= 0.5 ** (num_tokens / _HALF_LIFE_TOKENS)
        self._recent += counts
        self.distinct_experts_per_step = float(np.count_nonzero(counts)) / len(self._num_experts)

    def layers(self) -> tuple[LayerLoad, ...]:
        ends = self._starts + self._num_experts
        return tuple(
            LayerLoad(
                layer=layer,
                num_experts=count,
                top_k=int(top_k),
                tokens_per_expert=tuple(self._total[start:end].tolist()),
                recent_tokens_per_expert=tuple(self._recent[start:end].tolist()),
            )
            for layer, count, top_k, start, end in zip(
                self.layer_numbers, self._num_experts, self._top_k, self._starts, ends, strict=True
            )
        )


def token_experts(decoded: Decoded, row: int) -> TokenExperts:
    """Return what one token of a step chose."""
    return TokenExperts(
        tuple(tuple(each[row].tolist()) for each in decoded.expert_ids),
        tuple(tuple(each[row].tolist()) for each in decoded.routing_weights),
    )
