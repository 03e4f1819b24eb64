"""Routing in C++: router logits, scores, the choice, their statistics and the counting sort, forward and backward.

The definitions are moe/router.Router and moe/dispatch.plan_dispatch, which take these where there is a CPU library and
the case is one of these. The router's product is computed in fp32 whatever comes in, and a token's result depends on
that token alone.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moesaic.kernels import select
from moesaic.kernels.addresses import address_of

_SCORINGS = {"softmax": 0, "sigmoid": 1}


@dataclass(frozen=True)
class Routing:
    """What a router says of T tokens, before any is dropped.

    Shapes: expert_ids (T, K) int64; routing_weights (T, K) fp32; tokens_per_expert (E,) int64 and mean_probabilities
    (E,) fp32 over the valid tokens; z, entropy scalars, the mean over valid tokens of logsumexp(logits)^2 and of the
    entropy of the router's distribution divided by log(E); num_tokens scalar int64, the valid tokens.
    """

    expert_ids: Tensor
    routing_weights: Tensor
    tokens_per_expert: Tensor
    mean_probabilities: Tensor
    z: Tensor
    entropy: Tensor
    num_tokens: Tensor


def can_choose(x: Tensor) -> bool:
    """Whether choose takes router logits of x (T, H)."""
    return select.uses_triton(x.device) and not torch.is_grad_enabled()


def choose(
    logits: Tensor,
    *,
    top_k: int,
    scoring: str,
    renormalize: bool,
    scale: float,
    bias: Tensor | None = None,
    correction_bias: Tensor | None = None,
    output_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return expert_ids (T, K) int64 and routing_weights (T, K) fp32 of router logits (T, E) fp32, on CUDA.

    The definition is moe/router.Router and finish_weights, without groups; equal scores go to the lower expert.
    """
    from moesaic.kernels.triton import rows

    return rows.choose(
        logits, bias, correction_bias, top_k=top_k, scoring=scoring, renormalize=renormalize, scale=scale,
        output_scale=output_scale,
    )  # fmt: skip


def can_route(x: Tensor) -> bool:
    """Whether route takes x (T, H)."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16) and select.cpu_library() is not None


def can_plan(expert_ids: Tensor) -> bool:
    """Whether plan_dispatch takes expert_ids (T, K)."""
    return expert_ids.device.type == "cpu" and select.cpu_library() is not None


def route(
    x: Tensor,
    weight: Tensor,
    *,
    top_k: int,
    scoring: str,
    bias: Tensor | None = None,
    correction_bias: Tensor | None = None,
    num_groups: int = 1,
    top_groups: int = 1,
    valid: Tensor | None = None,
    expert_ids: Tensor | None = None,
) -> Routing:
    """Route x (T, H), bf16 or fp32, by the router's weight (E, H), fp32; equal scores go to the lower expert.

    bias (E,) fp32 is added to the logits, correction_bias (E,) fp32 to the scores for the choice only; valid (T,) bool,
    False for tokens that no statistic counts; expert_ids (T, K) int64: an earlier choice, taken instead of a new one.
    Gradients reach x, weight and bias from routing_weights, mean_probabilities and z.
    """
    num_experts = weight.shape[0]
    assert x.dim() == weight.dim() == 2 and x.shape[1] == weight.shape[1], (x.shape, weight.shape)
    assert weight.dtype == torch.float32 and x.dtype in (torch.float32, torch.bfloat16), (weight.dtype, x.dtype)
    assert 1 <= top_k <= num_experts, (top_k, num_experts)
    assert num_experts % num_groups == 0 and 1 <= top_groups <= num_groups, (num_experts, num_groups, top_groups)
    assert bias is None or (bias.shape == (num_experts,) and bias.dtype == torch.float32), bias
    assert correction_bias is None or correction_bias.shape == (num_experts,), correction_bias
    assert valid is None or (valid.shape == x.shape[:1] and valid.dtype == torch.bool), (valid, x.shape)
    assert expert_ids is None or expert_ids.shape == (x.shape[0], top_k), (expert_ids, x.shape, top_k)
    if correction_bias is not None:
        correction_bias = correction_bias.detach().float()
    weights, mean_probabilities, z, entropy, chosen, tokens_per_expert, num_tokens, _ = torch.ops.moesaic.route(
        x, weight, bias, correction_bias, valid, expert_ids, top_k, scoring, num_groups, top_groups
    )
    return Routing(chosen, weights, tokens_per_expert, mean_probabilities, z, entropy.detach(), num_tokens)


def plan_dispatch(
    expert_ids: Tensor, num_experts: int, *, valid: Tensor | None = None, capacity: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return token_ids (N,), slots (T, K) and tokens_per_expert (E,), int64: those of moe/dispatch.DispatchPlan.

    Routes over capacity are dropped by position: first choices come before second ones, then tokens in order.
    """
    assert expert_ids.dim() == 2 and expert_ids.dtype == torch.int64, (expert_ids.shape, expert_ids.dtype)
    assert valid is None or (valid.shape == expert_ids.shape[:1] and valid.dtype == torch.bool), valid
    return torch.ops.moesaic.plan_dispatch(expert_ids, valid, num_experts, -1 if capacity is None else capacity)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


@torch.library.custom_op("moesaic::route", mutates_args=(), device_types="cpu")
def _route(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    correction_bias: Tensor | None,
    valid: Tensor | None,
    given_ids: Tensor | None,
    top_k: int,
    scoring: str,
    num_groups: int,
    top_groups: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of Routing, those in fp32 before those in int64, then the logits (T, E) for the backward pass."""
    num_tokens, num_experts = x.shape[0], weight.shape[0]
    x, weight, bias = x.contiguous(), weight.contiguous(), _contiguous(bias)
    correction_bias, valid, given_ids = _contiguous(correction_bias), _contiguous(valid), _contiguous(given_ids)
    expert_ids = torch.empty(num_tokens, top_k, dtype=torch.int64, device="cpu")
    routing_weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device="cpu")
    logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device="cpu")
    floats = torch.empty(num_experts + 2, dtype=torch.float32, device="cpu")
    counts = torch.empty(num_experts + 1, dtype=torch.int64, device="cpu")
    failed = select.required_cpu_library().function("moesaic_route", "pippppp" + "i" * 8 + "f" + "p" * 5)(
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        weight.data_ptr(),
        address_of(bias),
        address_of(correction_bias),
        address_of(valid),
        address_of(given_ids),
        num_tokens,
        x.shape[1],
        num_experts,
        top_k,
        _SCORINGS[scoring],
        num_groups,
        top_groups,
        False,
        1.0,
        expert_ids.data_ptr(),
        routing_weights.data_ptr(),
        logits.data_ptr(),
        floats.data_ptr(),
        counts.data_ptr(),
    )
    assert not failed, f"an expert's number is outside [0, {num_experts})"
    # Pieces of their own: outputs of one operator may not share memory.
    return (
        routing_weights,
        floats[:num_experts].clone(),
        floats[num_experts].clone(),
        floats[num_experts + 1].clone(),
        expert_ids,
        counts[:num_experts].clone(),
        counts[num_experts].clone(),
        logits,
    )


@_route.register_fake
def _(x, weight, bias, correction_bias, valid, given_ids, top_k, scoring, num_groups, top_groups):  # type: ignore[no-untyped-def]
    num_tokens, num_experts = x.shape[0], weight.shape[0]
    return (
        x.new_empty(num_tokens, top_k, dtype=torch.float32),
        x.new_empty(num_experts, dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
        x.new_empty((), dtype=torch.float32),
        x.new_empty(num_tokens, top_k, dtype=torch.int64),
        x.new_empty(num_experts, dtype=torch.int64),
        x.new_empty((), dtype=torch.int64),
        x.new_empty(num_tokens, num_experts, dtype=torch.float32),
    )


@torch.library.custom_op("moesaic::route_backward", mutates_args=(), device_types="cpu")
def _route_backward(
    grad_weights: Tensor | None,
    grad_mean: Tensor | None,
    grad_z: Tensor | None,
    x: Tensor,
    weight: Tensor,
    logits: Tensor,
    expert_ids: Tensor,
    valid: Tensor | None,
    num_tokens: Tensor,
    scoring: str,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; the last is empty where there is none."""
    x, weight, valid = x.contiguous(), weight.contiguous(), _contiguous(valid)
    grad_weights, grad_mean = _contiguous(grad_weights), _contiguous(grad_mean)
    logits, expert_ids = logits.contiguous(), expert_ids.contiguous()  # a hook may have kept them in another layout
    grad_x, grad_weight, grad_bias = _route_gradients(x, weight, has_bias)
    select.required_cpu_library().function("moesaic_route_backward", "pipppp" + "i" * 6 + "ppfppp")(
        x.data_ptr(),
        x.dtype == torch.bfloat16,
        weight.data_ptr(),
        logits.data_ptr(),
        expert_ids.data_ptr(),
        address_of(valid),
        x.shape[0],
        x.shape[1],
        weight.shape[0],
        expert_ids.shape[1],
        _SCORINGS[scoring],
        int(num_tokens),
        address_of(grad_weights),
        address_of(grad_mean),
        0.0 if grad_z is None else float(grad_z),
        grad_x.data_ptr(),
        grad_weight.data_ptr(),
        grad_bias.data_ptr() if has_bias else None,
    )
    return grad_x, grad_weight, grad_bias


@_route_backward.register_fake
def _(grad_weights, grad_mean, grad_z, x, weight, logits, expert_ids, valid, num_tokens, scoring, has_bias):  # type: ignore[no-untyped-def]
    return _route_gradients(x, weight, has_bias)


def _route_gradients(x: Tensor, weight: Tensor, has_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[0] if has_bias else 0)


def _keep_for_route_backward(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, bias, _, valid, _, _, scoring, _, _ = inputs
    _, _, _, _, expert_ids, _, num_tokens, logits = output
    ctx.save_for_backward(x, weight, logits, expert_ids, valid, num_tokens)
    ctx.scoring, ctx.has_bias = scoring, bias is not None
    ctx.set_materialize_grads(False)


def _backward_of_route(ctx, *grads):  # type: ignore[no-untyped-def]
    x, weight, logits, expert_ids, valid, num_tokens = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = torch.ops.moesaic.route_backward(
        *grads[:3], x, weight, logits, expert_ids, valid, num_tokens, ctx.scoring, ctx.has_bias
    )
    return grad_x, grad_weight, grad_bias if ctx.has_bias else None, None, None, None, None, None, None, None


_route.register_autograd(_backward_of_route, setup_context=_keep_for_route_backward)


@torch.library.custom_op("moesaic::plan_dispatch", mutates_args=(), device_types="cpu")
def _plan_dispatch(
    expert_ids: Tensor, valid: Tensor | None, num_experts: int, capacity: int
) -> tuple[Tensor, Tensor, Tensor]:
    expert_ids, valid = expert_ids.contiguous(), _contiguous(valid)
    token_ids = torch.empty(expert_ids.numel(), dtype=torch.int64, device="cpu")
    slots = torch.empty_like(expert_ids, memory_format=torch.contiguous_format)
    tokens_per_expert = torch.empty(num_experts, dtype=torch.int64, device="cpu")
    num_rows = select.required_cpu_library().function("moesaic_plan_dispatch", "ppiiiippp")(
        expert_ids.data_ptr(),
        address_of(valid),
        expert_ids.shape[0],
        expert_ids.shape[1],
        num_experts,
        capacity,
        token_ids.data_ptr(),
        slots.data_ptr(),
        tokens_per_expert.data_ptr(),
    )
    assert num_rows >= 0, f"an expert's number is outside [0, {num_experts})"
    if num_rows < expert_ids.numel():
        token_ids = token_ids[:num_rows].clone()
    return token_ids, slots, tokens_per_expert


@_plan_dispatch.register_fake
def _(expert_ids, valid, num_experts, capacity):  # type: ignore[no-untyped-def]
    num_rows = expert_ids.numel()
    if valid is not None or capacity >= 0:
        num_rows = torch.library.get_ctx().new_dynamic_size()
    return (
        expert_ids.new_empty(num_rows),
        torch.empty_like(expert_ids, memory_format=torch.contiguous_format),
        expert_ids.new_empty(num_experts),
    )
