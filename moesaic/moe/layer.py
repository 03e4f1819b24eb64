"""The MoE layer: router -> dispatcher -> experts -> combine. Knows no attention and no process group."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from moesaic.config.model import Activation, FeedForwardConfig
from moesaic.errors import ConfigError
from moesaic.kernels.routing import Routing
from moesaic.moe.dispatch import Dispatcher, DispatchPlan, expert_capacity, plan_dispatch
from moesaic.moe.experts import Experts
from moesaic.moe.router import Router, finish_weights
from moesaic.moe.seeds import generator, mix_seeds
from moesaic.moe.tensor_tree import tensor_tree


@tensor_tree
@dataclass(frozen=True)
class RoutingDecision:
    """Everything discrete that a forward pass decided; handing it back makes the same pass again, bit for bit."""

    expert_ids: Tensor
    plan: DispatchPlan


@tensor_tree
@dataclass(frozen=True)
class Routes:
    """Where each token went: expert_ids (T, K) int64, and the weights (T, K) fp32 that their outputs got."""

    expert_ids: Tensor
    routing_weights: Tensor


@tensor_tree
@dataclass(frozen=True)
class MoEStatistics:
    """What one MoE layer reports of one forward pass, beside its output.

    Shapes: tokens_per_expert (E,) int64, before dropping; mean_probabilities (E,) and z, with a gradient, for the
    losses; entropy, drop_rate scalars in 0..1; num_tokens scalar int64 without padding; decision None once it has
    served; routes None in training.
    """

    tokens_per_expert: Tensor
    mean_probabilities: Tensor
    z: Tensor
    entropy: Tensor
    drop_rate: Tensor
    num_tokens: Tensor
    decision: RoutingDecision | None
    routes: Routes | None


class MoELayer(nn.Module):
    """A layer of experts as one FeedForwardConfig describes it, without its residual MLP.

    Raises: ConfigError for a config without experts, and for an activation that is not known.
    """

    output_scale: Tensor | None  # () fp32

    def __init__(self, hidden_size: int, config: FeedForwardConfig, *, activation: str, has_bias: bool) -> None:
        super().__init__()
        if not config.is_moe:
            raise ConfigError(
                "num_experts (0) of a MoELayer's config is that of a dense layer; at least one expert is required; "
                "give num_experts, or take the config of one of ModelConfig.moe_layers."
            )
        if activation not in get_args(Activation):
            raise ConfigError(
                f"activation ({activation!r}) is not known; one of {', '.join(get_args(Activation))} is required; use "
                f"one of them."
            )
        self.hidden_size = hidden_size
        self.config = config
        self.router = Router(hidden_size, config.num_experts, top_k=config.top_k, config=config.router)
        self.experts = Experts(
            hidden_size, config.expert_intermediate_size, config.num_experts, activation=activation, has_bias=has_bias
        )
        # On the weights and not on the output: one operation stays one, and the sum is in fp32 all the same.
        self.register_parameter("output_scale", nn.Parameter(torch.ones(())) if config.output_scale else None)
        # None: all experts are on this device, and one operation gathers, computes and combines.
        self.dispatcher: Dispatcher[Any] | None = None
        # For inference with some experts alone: makes the sum of what they and the others' make of the same tokens.
        self.add_others: Callable[[Tensor], Tensor] | None = None

    def reset_parameters(self) -> None:
        """Draw router and experts anew, from torch's global generator: for a layer made on the meta device."""
        self.router.reset_parameters()
        self.experts.reset_parameters()
        if self.output_scale is not None:
            nn.init.ones_(self.output_scale)

    def extra_repr(self) -> str:
        factor = self.config.capacity.factor
        return "" if factor is None else f"capacity_factor={factor}"

    def forward(
        self, x: Tensor, *, valid: Tensor | None = None, seed: int = 0, replay: RoutingDecision | None = None
    ) -> tuple[Tensor, MoEStatistics]:
        """Return the output (..., H) for x (..., H), and the statistics of its T tokens.

        valid (...) bool: False for padding, which reaches no expert and no statistic. seed: for noise and random
        dropping in training. replay: an earlier pass's decision, taken instead of a new one.

        Raises: ConfigError for an x or a mask of another shape or kind.
        """
        self._check(x, valid)
        shape, x = x.shape, x.reshape(-1, self.hidden_size)  # (T, H)
        valid = None if valid is None else valid.reshape(-1)
        expert_ids = None if replay is None else replay.expert_ids
        routing = self.router(x, valid=valid, seed=mix_seeds(seed, 0), expert_ids=expert_ids)
        plan = self._plan(routing, valid, mix_seeds(seed, 1)) if replay is None else replay.plan
        weights = finish_weights(routing.routing_weights, plan.kept, self.config.router, output_scale=self.output_scale)
        if self.add_others is not None:
            experts = self.experts
            own = plan.of_experts(experts.first, experts.first + experts.num_experts)
            out = self.add_others(experts(x, own, weights).float()).to(x.dtype)
        elif self.dispatcher is None:
            out = self.experts(x, plan, weights)
        else:
            dispatched = self.dispatcher.dispatch(x, plan)
            y = self.experts.sorted_rows(dispatched.tokens, dispatched.tokens_per_expert)
            out = self.dispatcher.combine(y, weights, dispatched.receipt)
        routes = routing.tokens_per_expert.sum()
        drop_rate = (routes - plan.tokens_per_expert.sum()) / routes.clamp_min(1)
        statistics = MoEStatistics(
            tokens_per_expert=routing.tokens_per_expert,
            mean_probabilities=routing.mean_probabilities,
            z=routing.z,
            entropy=routing.entropy,
            drop_rate=drop_rate,
            num_tokens=routing.num_tokens,
            decision=RoutingDecision(routing.expert_ids, plan),
            routes=None if self.training else Routes(routing.expert_ids, weights.detach()),
        )
        return out.view(shape), statistics

    def _check(self, x: Tensor, valid: Tensor | None) -> None:
        if x.dim() < 2 or x.shape[-1] != self.hidden_size or not x.is_floating_point():
            raise ConfigError(
                f"x of shape {tuple(x.shape)} and {x.dtype} was given to a MoELayer; (..., {self.hidden_size}) of "
                f"floating point, a row for each token, is required; make the layer with x's last size, or reshape x."
            )
        if valid is not None and (valid.shape != x.shape[:-1] or valid.dtype is not torch.bool):
            raise ConfigError(
                f"valid of shape {tuple(valid.shape)} and {valid.dtype} was given with x {tuple(x.shape)}; "
                f"{tuple(x.shape[:-1])} of torch.bool, True for each token that is not padding, is required; reshape "
                f"it, or use mask.bool()."
            )

    def _plan(self, routing: Routing, valid: Tensor | None, seed: int) -> DispatchPlan:
        expert_ids, num_experts = routing.expert_ids, self.config.num_experts
        if not self.training or self.config.capacity.factor is None:  # evaluation and serving never drop
            return plan_dispatch(expert_ids, num_experts, valid=valid)
        num_tokens = expert_ids.shape[0] if valid is None else int(routing.num_tokens)
        capacity = expert_capacity(num_tokens, num_experts, top_k=self.config.top_k, config=self.config.capacity)
        priority = None
        if self.config.capacity.drop_policy == "probability":
            priority = routing.routing_weights.detach()
        elif self.config.capacity.drop_policy == "random":
            device = expert_ids.device
            priority = torch.rand(
                expert_ids.shape, generator=generator(device, seed), dtype=torch.float32, device=device
            )
        return plan_dispatch(expert_ids, num_experts, valid=valid, capacity=capacity, priority=priority)
