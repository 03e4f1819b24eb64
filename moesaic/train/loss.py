"""The training loss of one micro-batch: the objective's loss at the head, and each MoE layer's balance and z losses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from moesaic.data.loader import Batch
from moesaic.errors import ConfigError
from moesaic.kernels.cross_entropy import linear_cross_entropy
from moesaic.model.transformer import Transformer
from moesaic.moe.balance import balance_loss
from moesaic.moe.layer import MoEStatistics


@dataclass(frozen=True)
class HeadLoss:
    """Scalars, fp32. total is what is differentiated; cross_entropy and terms, by name, are for the records."""

    total: Tensor
    cross_entropy: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)


# (hidden (T, H), output_weight (V, H), targets (T,)) -> HeadLoss
Head = Callable[[Tensor, Tensor, Tensor], HeadLoss]


@dataclass(frozen=True)
class Losses:
    """Scalars, fp32. total is what is differentiated; balance and z are summed over layers, without coefficients.

    terms: what the objective reports beside the cross-entropy.
    """

    total: Tensor
    cross_entropy: Tensor
    balance: Tensor
    z: Tensor
    moe: tuple[MoEStatistics, ...]
    terms: Mapping[str, Tensor] = field(default_factory=dict)


def next_token_loss(hidden: Tensor, output_weight: Tensor, targets: Tensor) -> HeadLoss:
    """Return the mean cross-entropy of the next token."""
    cross_entropy = linear_cross_entropy(hidden, output_weight, targets)
    return HeadLoss(cross_entropy, cross_entropy.detach())


def language_model_loss(
    model: Transformer | DistributedDataParallel,
    batch: Batch,
    *,
    seed: int,
    batch_counts: Callable[[list[Tensor]], list[Tensor]] | None = None,
    head: Head = next_token_loss,
) -> Losses:
    """Return the losses of a batch of (B, S) tokens.

    batch_counts: given each MoE layer's (E,) tokens_per_expert, returns those of the step's batch as far as they are
    known, earlier micro-batches' and other processes' included: a balance loss of scope global_batch takes them. It is
    called where a layer has that scope. head: the objective's loss of the hidden states.

    Raises: ConfigError for targets of another shape or kind.
    """
    if batch.targets.shape != batch.inputs.shape or batch.targets.dtype != torch.int64:
        raise ConfigError(
            f"targets {tuple(batch.targets.shape)} {batch.targets.dtype} were given with inputs "
            f"{tuple(batch.inputs.shape)}; one int64 id for each input is required; give the tokens that come next, "
            f"-100 where there is none."
        )
    own = model.module if isinstance(model, DistributedDataParallel) else model
    output = model(batch.inputs, documents=batch.documents, seed=seed)
    hidden = output.hidden.view(-1, output.hidden.shape[-1])
    at_head = head(hidden, own.output_weight(), batch.targets.reshape(-1))
    total = at_head.total
    balance_sum = torch.zeros_like(at_head.cross_entropy)
    z_sum = torch.zeros_like(at_head.cross_entropy)
    routers = [layer.router for layer in own.config.layers if layer.is_moe]
    own_counts = [statistics.tokens_per_expert for statistics in output.moe]
    is_global = [router.balance_scope == "global_batch" for router in routers]
    all_counts = batch_counts(own_counts) if batch_counts is not None and any(is_global) else own_counts
    for index, (statistics, router) in enumerate(zip(output.moe, routers, strict=True)):
        balance = balance_loss(
            statistics.mean_probabilities, all_counts[index] if is_global[index] else own_counts[index]
        )
        balance_sum = balance_sum + balance.detach()
        z_sum = z_sum + statistics.z.detach()
        if router.balance_loss:
            total = total + router.balance_loss * balance
        if router.z_loss:
            total = total + router.z_loss * statistics.z
    # What is reported has no gradient, and only numbers. torch.compile makes z_sum and the z of a single layer one
    # tensor, and its backward pass fails if only one of the two has a gradient.
    reported = tuple(
        replace(
            each, mean_probabilities=each.mean_probabilities.detach(), z=each.z.detach(), decision=None, routes=None
        )
        for each in output.moe
    )
    return Losses(total, at_head.cross_entropy, balance_sum, z_sum, reported, at_head.terms)
