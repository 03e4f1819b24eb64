"""The MoE layer's arithmetic, written as plainly as possible: a loop over tokens, and the one-hot einsum of 2022."""

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.kernels.grouped_mlp import ExpertWeights


def activate(pre: Tensor, activation: str) -> Tensor:
    """Apply the MLP's activation to (..., F), or to (..., 2F) as [gate, up] for gated ones."""
    if activation == "swiglu":
        gate, up = pre.chunk(2, dim=-1)
        return F.silu(gate) * up
    if activation == "swiglu_oai":
        gate, up = pre.chunk(2, dim=-1)
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    return F.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def mlp(x: Tensor, weights: ExpertWeights, expert: int) -> Tensor:
    """Return expert's MLP of x (..., H)."""
    up_bias = None if weights.up_bias is None else weights.up_bias[expert]
    down_bias = None if weights.down_bias is None else weights.down_bias[expert]
    hidden = activate(F.linear(x, weights.up[expert], up_bias), weights.activation)
    return F.linear(hidden, weights.down[expert], down_bias)


def grouped_mlp(x: Tensor, tokens_per_expert: list[int], weights: ExpertWeights) -> Tensor:
    """Each expert's MLP on its run of rows of x (N, H), rows sorted by expert."""
    rows = x.split(tokens_per_expert)
    return torch.cat([mlp(part, weights, expert) for expert, part in enumerate(rows)])


def moe_per_token(
    x: Tensor, expert_ids: Tensor, routing_weights: Tensor, kept: Tensor, weights: ExpertWeights
) -> Tensor:
    """The layer's definition, token by token: sum over its kept routes of weight * expert(x).

    Shapes: x (T, H); expert_ids, routing_weights, kept (T, K); result (T, H).
    """
    outputs = []
    for token in range(x.shape[0]):
        total = torch.zeros(x.shape[1], dtype=torch.float32, device=x.device)
        for choice in range(expert_ids.shape[1]):
            if kept[token, choice]:
                out = mlp(x[token], weights, int(expert_ids[token, choice]))
                total = total + routing_weights[token, choice].float() * out.float()
        outputs.append(total.to(x.dtype))
    return torch.stack(outputs) if outputs else x.new_zeros(x.shape)


def one_hot_masks(
    expert_ids: Tensor, routing_weights: Tensor, num_experts: int, capacity: int
) -> tuple[Tensor, Tensor]:
    """Return the (T, E, C) dispatch mask and combine weights, slots filled by position (first choices first).

    Source: the GShard formulation that DeepSpeed-MoE's section 5.4 replaces; S*E*M*C multiplications, nearly all by 0.
    """
    num_tokens, top_k = expert_ids.shape
    one_hot = F.one_hot(expert_ids.t().reshape(-1), num_experts)  # (K*T, E), choice-major
    slots = (one_hot.cumsum(0) - 1) * one_hot  # (K*T, E)
    slot = slots.sum(-1)
    inside = slot < capacity
    mask = one_hot.unsqueeze(-1) * F.one_hot(slot.clamp_max(capacity - 1), capacity).unsqueeze(1)  # (K*T, E, C)
    mask = (mask * inside[:, None, None]).view(top_k, num_tokens, num_experts, capacity)
    combine = mask * routing_weights.t()[:, :, None, None]
    return mask.sum(0).to(routing_weights.dtype), combine.sum(0)


def one_hot_dispatch(x: Tensor, mask: Tensor) -> Tensor:
    """(T, H), (T, E, C) -> (E, C, H) by einsum."""
    return torch.einsum("tec,th->ech", mask.to(x.dtype), x)


def one_hot_combine(expert_outputs: Tensor, combine: Tensor) -> Tensor:
    """(E, C, H), (T, E, C) -> (T, H) by einsum."""
    return torch.einsum("tec,ech->th", combine.to(expert_outputs.dtype), expert_outputs)
