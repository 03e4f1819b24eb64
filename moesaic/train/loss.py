"""The training loss of one micro-batch: cross-entropy, and each MoE layer's balance and z losses."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.data.loader import Batch
from moesaic.kernels.cross_entropy import linear_cross_entropy
from moesaic.model.transformer import Transformer
from moesaic.moe.balance import balance_loss
from moesaic.moe.layer import MoEStatistics


@dataclass(frozen=True)
class Losses:
    """Scalars, fp32. total is what is differentiated; balance and z are summed over layers, without coefficients."""

    total: Tensor
    cross_entropy: Tensor
    balance: Tensor
    z: Tensor
    moe: tuple[MoEStatistics, ...]


def language_model_loss(
    model: Transformer, batch: Batch, *, seed: int, earlier_counts: list[Tensor] | None = None
) -> Losses:
    """Return the losses of a batch of (B, S) tokens.

    earlier_counts: for each MoE layer the (E,) tokens_per_expert of this step's earlier micro-batches, which a balance
    loss of scope global_batch adds to its own.
    """
    output = model(batch.inputs, documents=batch.documents, seed=seed)
    hidden = output.hidden.view(-1, output.hidden.shape[-1])
    cross_entropy = linear_cross_entropy(hidden, model.output_weight(), batch.targets.reshape(-1))
    total = cross_entropy
    balance_sum = torch.zeros_like(cross_entropy)
    z_sum = torch.zeros_like(cross_entropy)
    routers = [layer.router for layer in model.config.layers if layer.is_moe]
    for index, (statistics, router) in enumerate(zip(output.moe, routers, strict=True)):
        counts = statistics.tokens_per_expert
        if router.balance_scope == "global_batch" and earlier_counts:
            counts = counts + earlier_counts[index]
        balance = balance_loss(statistics.mean_probabilities, counts)
        balance_sum = balance_sum + balance.detach()
        z_sum = z_sum + statistics.z.detach()
        if router.balance_loss:
            total = total + router.balance_loss * balance
        if router.z_loss:
            total = total + router.z_loss * statistics.z
    return Losses(total, cross_entropy.detach(), balance_sum, z_sum, output.moe)
