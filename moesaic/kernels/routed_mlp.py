"""A layer's experts on tokens that are all on this device: gather, every expert's MLP, weighted combine, in one call.

One C++ operator where the CPU kernels take the case (bf16, sizes in multiples of 32), which keeps the input, the
pre-activation and the routing for the backward pass; elsewhere its definition, made of kernels/permute and
kernels/grouped_mlp.
"""

from torch import Tensor

from moesaic.kernels.cpu import moe_training
from moesaic.kernels.grouped_mlp import ExpertWeights, grouped_mlp
from moesaic.kernels.permute import combine_tokens, gather_tokens


def routed_mlp(
    x: Tensor,
    weights: ExpertWeights,
    *,
    tokens_per_expert: Tensor,
    token_ids: Tensor,
    slots: Tensor,
    routing_weights: Tensor,
) -> Tensor:
    """Return (T, H): for each token the sum over its kept routes of routing_weight * expert(x).

    Shapes: x (T, H); tokens_per_expert (E,) int64; token_ids (N,) int64, the token of each row in expert order; slots
    (T, K) int64, the row of each route, N for a dropped one; routing_weights (T, K) fp32.
    """
    num_tokens = x.shape[0]
    assert slots.shape == routing_weights.shape and slots.shape[0] == num_tokens, (slots.shape, routing_weights.shape)
    if moe_training.applies(x, weights.up, weights.down):
        out, _ = moe_training.routed_mlp(
            x, tokens_per_expert, token_ids, slots, routing_weights, weights.up, weights.up_bias, weights.down,
            weights.down_bias, weights.activation,
        )  # fmt: skip
        return out
    rows = grouped_mlp(gather_tokens(x, token_ids, slots), tokens_per_expert, weights)
    return combine_tokens(rows, routing_weights, token_ids, slots)
