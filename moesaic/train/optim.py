"""Optimizers: AdamW (PyTorch's fused one), and Muon for matrices, in a batched form that takes stacked experts."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from moesaic.config.train import OptimizerConfig
from moesaic.kernels import products

# Coefficients of the quintic Newton-Schulz iteration (Keller Jordan, 2024): steep at 0, roughly 1 on (0, 1].
_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
_NEWTON_SCHULZ_STEPS = 5
# Elements whose norm PyTorch takes at once. On a CPU it adds their squares up in a few fp32 sums, which get too large
# to take them: of 2^26 normal numbers the norm comes out at 0.995 of what it is, of 2^30 at 0.80, of these at 1.0000.
_NORM_PIECE = 1 << 20


def orthogonalize(matrices: Tensor) -> Tensor:
    """Return, for matrices (..., M, N), approximately U V^T of each one's singular value decomposition.

    In bf16, or fp32 on processors whose bf16 products are slower.
    One batched product per step for all of them: a layer's stacked experts are one call.
    """
    a, b, c = _NEWTON_SCHULZ
    is_widened = products.is_widened(matrices.device, torch.bfloat16)
    x = matrices.to(torch.float32 if is_widened else torch.bfloat16)
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    # Rows first: a large matrix has too many squares for fp32 sums (_NORM_PIECE).
    norms = x.float().norm(dim=-1, keepdim=True).norm(dim=-2, keepdim=True)
    x = x / norms.clamp_min(1e-7).to(x.dtype)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


# The factor on the experts' output has some 1 to go (from 0 after upcycling), where a matrix's elements have their
# deviation of about 0.02; Adam takes steps of the learning rate whatever the gradient, so its rate is so much higher.
OUTPUT_SCALE_RATE = 50.0


class Muon(torch.optim.Optimizer):
    """Momentum orthogonalised by Newton-Schulz, for matrices (M, N) and stacks of them (E, M, N).

    The update is scaled by 0.2 * sqrt(max(M, N)), which gives it AdamW's usual size, so that one learning rate serves
    both. Sources: Muon (Keller Jordan, 2024); the scale: Moonlight (arXiv 2502.16982), section 2.2.
    """

    def __init__(self, params: Iterable[dict], *, lr: float, momentum: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": 0.0, "num_fused": 1})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                buffer = state["momentum"]
                buffer.lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(buffer, group["momentum"])
                # [gate, up] stacked in one tensor are two matrices each.
                parts = update.unflatten(-2, (group["num_fused"], -1))
                direction = orthogonalize(parts).flatten(-3, -2).to(parameter.dtype)
                scale = 0.2 * max(parts.shape[-2:]) ** 0.5
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(direction, alpha=-group["lr"] * scale)


class Optimizers:
    """The optimizers of one model, stepped together, their state by parameter name."""

    def __init__(self, model: nn.Module, config: OptimizerConfig) -> None:
        self._names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        groups = _groups(model, config)
        self._optimizers: list[torch.optim.Optimizer] = []
        if groups["muon"]:
            self._optimizers.append(Muon(groups["muon"], lr=0.0, momentum=config.momentum))
        # The rate is set at every step; a tensor-valued epsilon or beta would cost a sync, so they are numbers.
        self._optimizers.append(
            torch.optim.AdamW(
                groups["adamw"], lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=True
            )
        )

    def step(self, learning_rate: float) -> None:
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * group.get("rate", 1.0)
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad(set_to_none=True)

    def named_state(self) -> dict[str, Tensor]:
        """Return every state tensor as `key.parameter.name`, for a checkpoint."""
        return {
            f"{key}.{self._names[parameter]}": value
            for optimizer in self._optimizers
            for parameter, state in optimizer.state.items()
            for key, value in state.items()
        }

    def load_named_state(self, tensors: dict[str, Tensor]) -> None:
        """Take back what named_state gave."""
        by_name: dict[str, dict[str, Tensor]] = {}
        for full_name, tensor in tensors.items():
            key, _, name = full_name.partition(".")
            by_name.setdefault(name, {})[key] = tensor
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    state = by_name.get(self._names[parameter])
                    if state is not None:
                        optimizer.state[parameter] = {key: value.to(parameter.device) for key, value in state.items()}

    def copy_state(self) -> list[dict[Tensor, dict[str, Tensor]]]:
        """Return a copy of every optimizer's state, for restore_state."""
        return [
            {parameter: {key: value.clone() for key, value in state.items()} for parameter, state in each.state.items()}
            for each in self._optimizers
        ]

    def restore_state(self, states: list[dict[Tensor, dict[str, Tensor]]]) -> None:
        """Be again as when the states were copied; they are taken over and not copied."""
        for optimizer, state in zip(self._optimizers, states, strict=True):
            optimizer.state.clear()
            optimizer.state.update(state)


def clip_gradients(model: nn.Module, max_norm: float | None) -> float:
    """Scale all gradients so that their total norm is at most max_norm; return the norm before, finite or not.

    Gradients are left alone when the norm is not finite: that step is for the caller to skip.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    pieces = [piece for gradient in gradients for piece in gradient.flatten().split(_NORM_PIECE)]
    norm = float(torch.nn.utils.get_total_norm(pieces))
    if max_norm is not None and max_norm < norm < float("inf"):
        torch._foreach_mul_(gradients, max_norm / norm)
    return norm


def _groups(model: nn.Module, config: OptimizerConfig) -> dict[str, list[dict]]:
    """Weight decay on matrices, on the router its own, on biases, norms and factors none; Muon takes hidden matrices.

    rate: the factor on the learning rate, 1 where there is none.
    """
    decayed: list[nn.Parameter] = []
    router: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    scales: list[nn.Parameter] = []
    single: list[nn.Parameter] = []
    fused: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            router.append(parameter)
        elif name.endswith("output_scale"):
            scales.append(parameter)
        elif name.endswith("bias") or parameter.dim() < 2:
            plain.append(parameter)
        elif config.name == "muon" and name.startswith("blocks.") and ".mix." not in name:
            (fused if name.endswith("gate_up_proj") else single).append(parameter)
        else:
            decayed.append(parameter)
    adamw = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": router, "weight_decay": config.router_weight_decay},
        {"params": plain, "weight_decay": 0.0},
        {"params": scales, "weight_decay": 0.0, "rate": OUTPUT_SCALE_RATE},
    ]
    muon = [
        {"params": single, "weight_decay": config.weight_decay, "num_fused": 1},
        {"params": fused, "weight_decay": config.weight_decay, "num_fused": 2},
    ]
    return {
        "adamw": [group for group in adamw if group["params"]],
        "muon": [group for group in muon if group["params"]],
    }
