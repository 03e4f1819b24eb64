"""A layer's experts as stacked tensors, every expert initialised on its own."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from moesaic.kernels.activation import is_gated
from moesaic.kernels.grouped_mlp import ExpertWeights, grouped_mlp
from moesaic.kernels.packed import PackedMlp
from moesaic.kernels.routed_mlp import routed_mlp
from moesaic.moe.dispatch import DispatchPlan


class Experts(nn.Module):
    """E MLPs.

    Shapes: up_proj (E, F, H), or gate_up_proj (E, 2F, H) as [gate, up] if gated; down_proj (E, H, F); biases (E, F or
    2F) and (E, H). Packed for inference it has none of them, but `packed`. Of a layer whose experts are spread over
    processes it has E of `total_experts`, from `first` on.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, num_experts: int, *, activation: str, has_bias: bool
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_size, self.intermediate_size = num_experts, hidden_size, intermediate_size
        self.activation, self.has_bias = activation, has_bias
        self.is_gated = is_gated(activation)
        self.first, self.total_experts = 0, num_experts
        self.packed: PackedMlp | None = None
        inner = 2 * intermediate_size if self.is_gated else intermediate_size
        name = "gate_up" if self.is_gated else "up"
        self.register_parameter(f"{name}_proj", nn.Parameter(torch.empty(num_experts, inner, hidden_size)))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        self.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(num_experts, inner)) if has_bias else None)
        self.register_parameter("down_bias", nn.Parameter(torch.zeros(num_experts, hidden_size)) if has_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every expert on its own, as nn.Linear is, from torch's global generator; biases are 0."""
        for name, parameter in self.named_parameters():
            if name.endswith("_bias"):
                nn.init.zeros_(parameter)
            else:
                bound = parameter.shape[2] ** -0.5
                self.draw(parameter, partial(nn.init.uniform_, a=-bound, b=bound))

    @torch.no_grad()
    def draw(self, weight: Tensor, fill: Callable[[Tensor], object]) -> None:
        """Give the experts of a weight (E, ...) the random numbers that fill writes; each those it has among all."""
        if self.num_experts == self.total_experts:
            fill(weight)
            return
        whole = weight.new_empty(self.total_experts, *weight.shape[1:])
        fill(whole)
        weight.copy_(whole[self.first : self.first + self.num_experts])

    def keep(self, first: int, last: int) -> None:
        """Forget all experts but those from first to last, which become parameters of their own."""
        for name, parameter in list(self.named_parameters()):
            kept = nn.Parameter(parameter.detach()[first:last].clone(), requires_grad=parameter.requires_grad)
            self.register_parameter(name, kept)
        self.first, self.num_experts = self.first + first, last - first

    def extra_repr(self) -> str:
        packed = "" if self.packed is None else f", packed={self.packed.up.format}"
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_size}, "
            f"intermediate_size={self.intermediate_size}, activation={self.activation}, bias={self.has_bias}{packed}"
        )

    def weights(self) -> ExpertWeights:
        up, up_bias = (self.gate_up_proj, self.gate_up_bias) if self.is_gated else (self.up_proj, self.up_bias)
        return ExpertWeights(up, self.down_proj, up_bias, self.down_bias, self.activation)  # type: ignore[arg-type]

    def sorted_rows(self, tokens: Tensor, tokens_per_expert: Tensor) -> Tensor:
        """Return (N, H) for tokens (N, H) sorted by expert; computed in the tokens' dtype."""
        return grouped_mlp(tokens, tokens_per_expert, self.weights().to(tokens.dtype))

    def forward(self, x: Tensor, plan: DispatchPlan, routing_weights: Tensor) -> Tensor:
        """Return (T, H) for x (T, H) and routing_weights (T, K): every expert's work on its tokens, combined.

        It is `forward`, since adapters (PEFT) change the weights for as long as a module is called.
        """
        return routed_mlp(
            x,
            self.weights().to(x.dtype),
            tokens_per_expert=plan.tokens_per_expert,
            token_ids=plan.token_ids,
            slots=plan.slots,
            routing_weights=routing_weights,
        )


def own_rows(model: nn.Module) -> dict[str, tuple[slice, int]]:
    """Return, by name, the parameters of which a model has the rows of some experts alone: these, of how many."""
    return {
        f"{name}.{each}" if name else each: (slice(part.first, part.first + part.num_experts), part.total_experts)
        for name, part in model.named_modules()
        if isinstance(part, Experts) and part.num_experts != part.total_experts
        for each, _ in part.named_parameters()
    }
