"""A layer's feed-forward part: a dense MLP, a MoE layer, or both side by side (residual MoE).

A shared expert is the residual MLP under another name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moesaic.config.model import FeedForwardConfig, ModelConfig
from moesaic.kernels import products
from moesaic.kernels.activation import activate_gated, is_gated, mlp
from moesaic.kernels.packed import PackedMlp, packed_mlp, packed_moe
from moesaic.model.linear import Linear, is_plain
from moesaic.moe.experts import Experts
from moesaic.moe.layer import MoELayer, MoEStatistics, Routes, RoutingDecision
from moesaic.moe.router import finish_weights


class Mlp(nn.Module):
    """Shapes: up_proj (F, H), or gate_proj and up_proj if gated; down_proj (H, F); none of them once packed."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, activation: str, has_bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.gate_proj = Linear(hidden_size, intermediate_size, has_bias=has_bias) if is_gated(activation) else None
        self.up_proj = Linear(hidden_size, intermediate_size, has_bias=has_bias)
        self.down_proj = Linear(intermediate_size, hidden_size, has_bias=has_bias)
        self.packed: PackedMlp | None = None

    def extra_repr(self) -> str:
        if self.packed is None:
            return f"activation={self.activation}"
        return (
            f"hidden_size={self.packed.hidden_size}, intermediate_size={self.packed.intermediate_size}, "
            f"activation={self.activation}, packed={self.packed.up.format}"
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return (T, H) for x (T, H)."""
        if self.packed is not None:
            return packed_mlp(x, self.packed)
        if not all(is_plain(layer) for layer in (self.gate_proj or self.up_proj, self.up_proj, self.down_proj)):
            return self._forward_by_layers(x)
        dtype = products.autocast_dtype(x)  # all of one, also for torch.cat, which autocast does not let mix two halves
        up: Tensor = self.up_proj.weight
        up_bias: Tensor | None = self.up_proj.bias
        if self.gate_proj is not None:
            up = torch.cat([self.gate_proj.weight.to(dtype), up.to(dtype)])
            if up_bias is not None and self.gate_proj.bias is not None:
                up_bias = torch.cat([self.gate_proj.bias.to(dtype), up_bias.to(dtype)])
        down_bias = self.down_proj.bias
        return mlp(
            x,
            up.to(dtype),
            None if up_bias is None else up_bias.to(dtype),
            self.down_proj.weight.to(dtype),
            None if down_bias is None else down_bias.to(dtype),
            self.activation,
        )

    def _forward_by_layers(self, x: Tensor) -> Tensor:
        """The same where an adapter stands in a layer's place, or hooks want to see what it takes and gives."""
        up = self.up_proj(x)
        if self.gate_proj is not None:
            return self.down_proj(activate_gated(self.gate_proj(x), up, self.activation))
        return self.down_proj(F.gelu(up, approximate="tanh" if self.activation == "gelu_tanh" else "none"))


class FeedForward(nn.Module):
    """What one FeedForwardConfig describes.

    Residual MoE mixes the MLP's and the experts' outputs: "sum" adds them (DeepSpeed-MoE's text), "softmax" weighs them
    by a learned two-way softmax of the token (its released code: experts first), "sigmoid" multiplies the MLP's by a
    learned sigmoid gate (Qwen2-MoE's shared expert).
    """

    def __init__(self, config: ModelConfig, layer: FeedForwardConfig) -> None:
        super().__init__()
        hidden_size, activation, has_bias = config.hidden_size, config.activation, config.mlp_bias
        self.residual = layer.residual
        self.mlp = (
            Mlp(hidden_size, layer.intermediate_size, activation=activation, has_bias=has_bias)
            if layer.intermediate_size
            else None
        )
        self.moe = MoELayer(hidden_size, layer, activation=activation, has_bias=has_bias) if layer.is_moe else None
        self.mix: Linear | None = None
        if layer.residual == "softmax":
            self.mix = Linear(hidden_size, 2, has_bias=True)
        elif layer.residual == "sigmoid":
            self.mix = Linear(hidden_size, 1, has_bias=False)

    def extra_repr(self) -> str:
        return "" if self.residual is None else f"residual={self.residual}"

    def infer(self, x: Tensor) -> tuple[Tensor, Routes | None]:
        """Return (T, H) for x (T, H), and where its tokens went, None for a dense layer; for inference."""
        if self.moe is not None and isinstance(self.moe.experts, Experts) and self.moe.experts.packed is not None:
            routes = Routes(*self.moe.router.choose(x, output_scale=self.moe.output_scale))
            return self._combine_packed(x, routes, None, self.moe, self.moe.experts.packed), routes
        out, statistics = self(x)
        return out, None if statistics is None else statistics.routes

    def forward(
        self, x: Tensor, *, valid: Tensor | None = None, seed: int = 0, replay: RoutingDecision | None = None
    ) -> tuple[Tensor, MoEStatistics | None]:
        """Return (T, H) for x (T, H), and the MoE layer's statistics, None for a dense layer."""
        if self.moe is None:
            assert self.mlp is not None
            return self.mlp(x), None
        experts = self.moe.experts
        # An adapter that stands in the experts' place has nothing packed.
        packed = experts.packed if isinstance(experts, Experts) else None
        if packed is not None:
            assert replay is None, "a packed model has no pass to make again"
            return self._forward_packed(x, valid, self.moe, packed)
        routed, statistics = self.moe(x, valid=valid, seed=seed, replay=replay)
        if self.mlp is None:
            return routed, statistics
        dense = self.mlp(x)
        if self.mix is None:
            return dense + routed, statistics
        coefficients = self.mix(x).float()
        if self.residual == "softmax":
            weights = torch.softmax(coefficients, -1).to(x.dtype)  # (T, 2)
            return routed * weights[:, :1] + dense * weights[:, 1:], statistics
        return dense * torch.sigmoid(coefficients).to(x.dtype) + routed, statistics

    def _forward_packed(
        self, x: Tensor, valid: Tensor | None, moe: MoELayer, experts: PackedMlp
    ) -> tuple[Tensor, MoEStatistics]:
        routing = moe.router(x, valid=valid)
        weights = finish_weights(routing.routing_weights, None, moe.config.router, output_scale=moe.output_scale)
        routes = Routes(routing.expert_ids, weights)
        statistics = MoEStatistics(
            tokens_per_expert=routing.tokens_per_expert,
            mean_probabilities=routing.mean_probabilities,
            z=routing.z,
            entropy=routing.entropy,
            drop_rate=torch.zeros_like(routing.z),
            num_tokens=routing.num_tokens,
            decision=None,
            routes=routes,
        )
        return self._combine_packed(x, routes, valid, moe, experts), statistics

    def _combine_packed(
        self, x: Tensor, routes: Routes, valid: Tensor | None, moe: MoELayer, experts: PackedMlp
    ) -> Tensor:
        """All of it in one call, with the residual MLP as one more expert; mixed in fp32."""
        expert_ids, weights, dense_weights = routes.expert_ids, routes.routing_weights, None
        if valid is not None:
            expert_ids = expert_ids.masked_fill(~valid[:, None], -1)
        if self.mix is not None:
            coefficients = self.mix(x.float())
            if self.residual == "softmax":
                shares = torch.softmax(coefficients, -1)  # (T, 2)
                weights, dense_weights = weights * shares[:, :1], shares[:, 1]
            else:
                dense_weights = torch.sigmoid(coefficients[:, 0])
        mlp = None if self.mlp is None else self.mlp.packed
        if moe.add_others is None:
            return packed_moe(x, expert_ids, weights, experts, residual=mlp, residual_weights=dense_weights)
        first, count = moe.experts.first, moe.experts.num_experts
        expert_ids = (expert_ids - first).masked_fill((expert_ids < first) | (expert_ids >= first + count), -1)
        if first > 0:  # those that have the first expert add the residual MLP's
            mlp = dense_weights = None
        out = packed_moe(x.float(), expert_ids, weights, experts, residual=mlp, residual_weights=dense_weights)
        return moe.add_others(out).to(x.dtype)
