"""The auxiliary losses that keep a router balanced and its logits small."""

from torch import Tensor


def balance_loss(mean_probabilities: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """Return E * sum_e P_e * f_e, with f_e the share of routes that went to expert e; 1 when balanced.

    Shapes: mean_probabilities (E,) fp32 with a gradient; tokens_per_expert (E,) int64, of this batch or of a larger one
    (the global batch), before dropping and without padding.
    Source: Switch Transformer (arXiv 2101.03961), eq. 4; for top-k with f_e over all choices.
    """
    counts = tokens_per_expert.float()
    shares = counts / counts.sum().clamp_min(1.0)
    return mean_probabilities.shape[0] * (mean_probabilities * shares).sum()
