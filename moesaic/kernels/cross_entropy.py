"""Cross-entropy of a linear layer's output without the (T, V) logits ever existing at once.

The gradient is computed in the forward pass, chunk by chunk of tokens, while a chunk's logits are in the cache; what is
kept for the backward pass is the gradient of the hidden states and of the weight. The oracle is F.cross_entropy.
"""

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22  # of logits: 8 MiB in bf16, and as fp32 probabilities still within a shared cache


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of softmax(hidden @ weight^T) at targets, fp32: the mean, or one per token for "none".

    Shapes: hidden (T, H) and weight (V, H) of one dtype; targets (T,) int64, -100 where there is nothing to predict
    (outside the mean, 0 in "none"; a mean over nothing is 0). Only "mean" has a gradient.
    """
    if reduction == "none":
        return _forward(hidden.detach(), weight.detach(), targets)
    assert reduction == "mean", reduction
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets)
    return _forward(hidden, weight, targets).sum() / _count(targets)


def _count(targets: Tensor) -> Tensor:
    return (targets != -100).sum().clamp_min(1)


def _chunks(num_tokens: int, vocab_size: int) -> list[tuple[int, int]]:
    size = max(1, min(num_tokens, _CHUNK_ELEMENTS // vocab_size))
    return [(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _classes(targets: Tensor) -> Tensor:
    """Any class where there is nothing to predict; every other negative target stays, and is refused as an index."""
    return targets.masked_fill(targets == -100, 0)


def _chunk_losses(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (t,) losses and (t, V) fp32 probabilities of a chunk.

    The probability of the largest logit is 1 / sum exp(z - max), so log p_target = z_target - max + log p_max: exact
    even where p_target underflows, and no second exponential pass.
    """
    probabilities = torch.softmax(logits, -1, dtype=torch.float32)
    chosen = logits.gather(1, _classes(targets)[:, None])[:, 0].float()
    losses = logits.amax(-1).float() - chosen - probabilities.amax(-1).log()
    return losses.masked_fill_(targets == -100, 0.0), probabilities


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    for start, end in _chunks(hidden.shape[0], weight.shape[0]):
        losses[start:end] = _chunk_losses(hidden[start:end] @ weight.t(), targets[start:end])[0]
    return losses


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):  # type: ignore[no-untyped-def]
        num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
        count = _count(targets)
        grad_hidden = torch.empty_like(hidden)
        chunks = _chunks(num_tokens, vocab_size)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start, end in chunks:
            x, target = hidden[start:end], targets[start:end]
            losses, probabilities = _chunk_losses(x @ weight.t(), target)
            total += losses.sum()
            rows = torch.arange(end - start, device=hidden.device)
            probabilities[rows, _classes(target)] -= 1.0
            grad_logits = probabilities.to(hidden.dtype)
            if bool((target == -100).any()):
                grad_logits[target == -100] = 0
            torch.mm(grad_logits, weight, out=grad_hidden[start:end])
            grad_weight += grad_logits.t() @ x
        ctx.save_for_backward(grad_hidden, grad_weight, count)
        ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad / count
        return grad_hidden * scale.to(grad_hidden.dtype), (grad_weight * scale).to(ctx.weight_dtype), None
