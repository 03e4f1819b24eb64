"""The router: which experts each token goes to, with what weight, and the statistics that balance needs.

All in fp32. Choices (`expert_ids`) are integers without a gradient; the weights carry it. Definitions:
docs/moe-layer.md.
"""

import torch
from torch import Tensor, nn

from moesaic.config.model import RouterConfig
from moesaic.kernels import routing
from moesaic.kernels.routing import Routing
from moesaic.moe.seeds import generator


class Router(nn.Module):
    """A linear layer in fp32, a scoring function, and the choice of top_k experts."""

    score_correction_bias: Tensor | None

    def __init__(self, hidden_size: int, num_experts: int, *, top_k: int, config: RouterConfig) -> None:
        super().__init__()
        self.top_k = top_k
        self.config = config
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if config.bias else None
        correction = torch.zeros(num_experts) if config.score_correction_bias else None
        self.register_buffer("score_correction_bias", correction)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight as nn.Linear is, from torch's global generator; biases are 0."""
        bound = self.weight.shape[1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        if self.score_correction_bias is not None:
            nn.init.zeros_(self.score_correction_bias)

    def extra_repr(self) -> str:
        num_experts, hidden_size = self.weight.shape
        return (
            f"hidden_size={hidden_size}, num_experts={num_experts}, top_k={self.top_k}, "
            f"scoring={self.config.scoring}, bias={self.bias is not None}"
        )

    def forward(
        self, x: Tensor, *, valid: Tensor | None = None, seed: int = 0, expert_ids: Tensor | None = None
    ) -> Routing:
        """Route x (T, H).

        valid (T,) bool marks the tokens that are not padding; seed makes training noise repeatable; expert_ids (T, K)
        replays an earlier choice instead of making one (activation checkpointing, parity tests).
        """
        noise = self.config.noise if self.training else "none"
        # Without rsample's draw, which is PyTorch's: a replay has to take the path that the first pass took.
        if noise != "rsample" and routing.can_route(x):
            return self._route_in_one_call(self._jitter(x, seed) if noise == "jitter" else x, valid, expert_ids)
        x = x.float()
        if noise == "jitter":
            x = self._jitter(x, seed)
        with torch.autocast(x.device.type, enabled=False):
            router_logits = x @ self.weight.float().t()  # (T, E)
            if self.bias is not None:
                router_logits = router_logits + self.bias.float()
        if self.config.scoring == "softmax":
            scores = probabilities = torch.softmax(router_logits, -1)
        else:
            scores = torch.sigmoid(router_logits)
            probabilities = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)  # all may underflow
        if expert_ids is None:
            with torch.no_grad():
                expert_ids = self._choose(router_logits, scores, noise == "rsample", seed)
        routing_weights = scores.gather(1, expert_ids)
        return self._with_statistics(expert_ids, routing_weights, router_logits, probabilities, valid)

    def choose(self, x: Tensor, *, output_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return expert_ids (T, K) and the weights (T, K) that their outputs get, of x (T, H), for inference.

        As forward and finish_weights, without statistics.
        """
        config = self.config
        if routing.can_choose(x) and (config.num_groups == 1 or config.top_groups == config.num_groups):
            with torch.autocast(x.device.type, enabled=False):
                router_logits = x.float() @ self.weight.float().t()
            return routing.choose(
                router_logits,
                top_k=self.top_k,
                scoring=config.scoring,
                renormalize=config.renormalize,
                scale=config.scale,
                bias=None if self.bias is None else self.bias.float(),
                correction_bias=self.score_correction_bias,
                output_scale=output_scale,
            )
        routed = self(x)
        return routed.expert_ids, finish_weights(routed.routing_weights, None, config, output_scale=output_scale)

    def _jitter(self, x: Tensor, seed: int) -> Tensor:
        """Return x times a factor near 1, drawn for every element, in fp32."""
        epsilon = self.config.jitter_epsilon
        draw = torch.rand(x.shape, generator=generator(x.device, seed), dtype=torch.float32, device=x.device)
        return x.float() * (1 - epsilon + 2 * epsilon * draw)

    def _route_in_one_call(self, x: Tensor, valid: Tensor | None, expert_ids: Tensor | None) -> Routing:
        config = self.config
        return routing.route(
            x,
            self.weight.float(),
            top_k=self.top_k,
            scoring=config.scoring,
            bias=None if self.bias is None else self.bias.float(),
            correction_bias=self.score_correction_bias,
            num_groups=config.num_groups,
            top_groups=config.top_groups,
            valid=valid,
            expert_ids=expert_ids,
        )

    def _choose(self, router_logits: Tensor, scores: Tensor, is_sampled: bool, seed: int) -> Tensor:
        ranking = scores
        if is_sampled:  # argmax of logits plus Gumbel noise is a sample of the softmax
            device = scores.device
            draw = torch.rand(scores.shape, generator=generator(device, seed), dtype=torch.float32, device=device)
            ranking = router_logits - torch.log(-torch.log(draw.clamp(1e-20, 1 - 1e-7)))
        if self.score_correction_bias is not None:
            ranking = ranking + self.score_correction_bias
        config = self.config
        if config.num_groups > 1 and config.top_groups < config.num_groups:
            grouped = ranking.unflatten(1, (config.num_groups, ranking.shape[1] // config.num_groups))  # (T, G, E/G)
            # A group's score: its best expert for softmax (DeepSeek-V2), the sum of its best two for sigmoid (V3).
            best = 1 if config.scoring == "softmax" else min(2, grouped.shape[-1])
            group_ids = grouped.topk(best, dim=-1).values.sum(-1).topk(config.top_groups, dim=-1).indices
            is_open = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(1, group_ids, True)
            ranking = grouped.masked_fill(~is_open[..., None], float("-inf")).view_as(ranking)
        if self.top_k == 1:
            return ranking.argmax(-1, keepdim=True)
        return ranking.topk(self.top_k, dim=-1).indices

    def _with_statistics(
        self,
        expert_ids: Tensor,
        routing_weights: Tensor,
        router_logits: Tensor,
        probabilities: Tensor,
        valid: Tensor | None,
    ) -> Routing:
        num_experts = probabilities.shape[1]
        ones = torch.ones_like(expert_ids) if valid is None else valid[:, None].expand_as(expert_ids).long()
        # scatter_add and not bincount, which reads the result back to the host on CUDA even with minlength.
        tokens_per_expert = torch.zeros(num_experts, dtype=torch.int64, device=expert_ids.device)
        tokens_per_expert.scatter_add_(0, expert_ids.reshape(-1), ones.reshape(-1))
        num_tokens = ones[:, 0].sum()
        weight = 1.0 / num_tokens.clamp_min(1)  # of one valid token in a mean

        def mean(values: Tensor) -> Tensor:
            """Mean over valid tokens of (T, ...)."""
            if valid is not None:
                values = values.masked_fill(~valid.view(-1, *[1] * (values.dim() - 1)), 0.0)
            return values.sum(0) * weight

        with torch.no_grad():
            entropy = torch.special.entr(probabilities).sum(-1)
            scale = torch.log(torch.tensor(float(max(num_experts, 2)), dtype=torch.float32, device=entropy.device))
        return Routing(
            expert_ids=expert_ids,
            routing_weights=routing_weights,
            tokens_per_expert=tokens_per_expert,
            mean_probabilities=mean(probabilities),
            z=mean(torch.logsumexp(router_logits, -1).square()),
            entropy=mean(entropy) / scale,
            num_tokens=num_tokens,
        )

    @torch.no_grad()
    def update_score_correction(self, tokens_per_expert: Tensor) -> None:
        """Move the bias towards balance: up for experts with fewer tokens than the mean of the global batch, centred.

        Source: auxiliary-loss-free load balancing (arXiv 2408.15664), b += rate * sign(mean - count).
        """
        assert self.score_correction_bias is not None, "this router has no score_correction_bias"
        counts = tokens_per_expert.double()  # a global batch may hold more tokens than fp32 can tell apart
        direction = torch.sign(counts.mean() - counts).to(self.score_correction_bias.dtype)
        self.score_correction_bias += self.config.score_correction_rate * direction
        self.score_correction_bias -= self.score_correction_bias.mean()


def finish_weights(
    routing_weights: Tensor, kept: Tensor | None, config: RouterConfig, *, output_scale: Tensor | None = None
) -> Tensor:
    """Return the (T, K) weights the experts' outputs are multiplied with: dropped routes 0, renormalised, scaled.

    kept (T, K) bool, or None when every route is kept; output_scale () fp32, the layer's learned factor, or None.
    """
    if kept is not None:
        routing_weights = routing_weights.masked_fill(~kept, 0.0)
    if config.renormalize:
        routing_weights = routing_weights / routing_weights.sum(-1, keepdim=True).clamp_min(1e-20)
    factor = config.scale if output_scale is None else output_scale * config.scale
    return routing_weights if output_scale is None and config.scale == 1.0 else routing_weights * factor
