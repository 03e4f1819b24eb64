"""Cross-entropy of a linear layer's output without the (T, V) logits ever existing at once.

The gradient is computed in the forward pass, chunk by chunk of tokens, while a chunk's logits are in the cache; what is
kept for the backward pass is the gradient of the hidden states and, unless it is frozen, of the weight. In C++ one
operator does all of it in bf16, where hidden size and vocabulary are multiples of 32; else PyTorch's products go with a
kernel for the rest. The oracle is F.cross_entropy.
"""

import torch
from torch import Tensor

from moesaic.kernels import products, select
from moesaic.kernels.gradient import once_differentiable

_CHUNK_ELEMENTS = 1 << 22  # of logits: 8 MiB in bf16, and as fp32 probabilities still within a shared cache
# With fewer tokens, adding a large vocabulary's weight gradient once more per chunk costs more than the chunk.
_MIN_CHUNK_TOKENS = 512


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
    """Return the cross-entropy of softmax(hidden @ weight^T) at targets, fp32: the mean, or one per token for "none".

    Shapes: hidden (T, H) and weight (V, H) of one dtype, which autocast sees to; targets (T,) int64, -100 where there
    is nothing to predict (outside the mean, 0 in "none"; a mean over nothing is 0). Only "mean" has a gradient.
    """
    hidden, weight = products.autocast(hidden), products.autocast(weight)
    _check_operands(hidden, weight)
    assert targets.shape == hidden.shape[:1] and targets.dtype == torch.int64, (targets.shape, targets.dtype)
    if reduction == "none":
        return _forward(hidden.detach(), weight.detach(), targets)
    assert reduction == "mean", reduction
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(hidden, weight, targets)
    return _forward(hidden, weight, targets).sum() / _count(targets)


def _check_operands(hidden: Tensor, weight: Tensor) -> None:
    assert hidden.dim() == weight.dim() == 2 and hidden.shape[1] == weight.shape[1], (hidden.shape, weight.shape)
    assert weight.shape[0] > 0, f"weight {tuple(weight.shape)} has no classes"
    assert hidden.dtype == weight.dtype, (hidden.dtype, weight.dtype)


def _count(targets: Tensor) -> Tensor:
    return (targets != -100).sum().clamp_min(1)


def _chunks(num_tokens: int, vocab_size: int) -> list[tuple[int, int]]:
    size = max(1, min(num_tokens, max(_CHUNK_ELEMENTS // vocab_size, _MIN_CHUNK_TOKENS)))
    return [(start, min(start + size, num_tokens)) for start in range(0, num_tokens, size)]


def _classes(targets: Tensor) -> Tensor:
    """Any class where there is nothing to predict; every other negative target stays, and is refused as an index."""
    return targets.masked_fill(targets == -100, 0)


def _has_kernel(hidden: Tensor) -> bool:
    return (
        hidden.device.type == "cpu"
        and hidden.dtype in (torch.bfloat16, torch.float32)
        and select.cpu_library() is not None
    )


def _is_fused(hidden: Tensor, weight: Tensor) -> bool:
    """Whether the products too are in C++, for sizes without remainders."""
    return (
        _has_kernel(hidden)
        and hidden.dtype == weight.dtype == torch.bfloat16
        and hidden.shape[1] % 32 == weight.shape[0] % 32 == 0
        and hidden.shape[1] > 0
    )


def outside_vocabulary(target: Tensor, vocab_size: int) -> IndexError:
    """Return the error for a target that is no class."""
    return IndexError(
        f"target {int(target)} is outside the vocabulary; a number in [0, {vocab_size}), or -100 for nothing to "
        "predict, is required; take the tokenizer that the model was trained with."
    )


@torch.library.custom_op("moesaic::cross_entropy", mutates_args=("logits",), device_types="cpu")
def _cross_entropy(logits: Tensor, targets: Tensor, wants_gradient: bool) -> Tensor:
    """The (t,) losses of logits (t, V) at targets; with wants_gradient their gradient takes the place of the logits."""
    library = select.required_cpu_library()
    assert logits.dim() == 2 and logits.is_contiguous(), (logits.shape, logits.stride())
    assert logits.dtype in (torch.bfloat16, torch.float32), logits.dtype
    assert targets.shape == logits.shape[:1] and targets.dtype == torch.int64, (targets.shape, targets.dtype)
    targets = targets.contiguous()
    losses = torch.empty(logits.shape[0], dtype=torch.float32, device="cpu")
    wrong = library.function("moesaic_cross_entropy", "pipiipi")(
        logits.data_ptr(),
        logits.dtype == torch.bfloat16,
        targets.data_ptr(),
        logits.shape[0],
        logits.shape[1],
        losses.data_ptr(),
        wants_gradient,
    )
    if wrong:
        raise outside_vocabulary(targets[wrong - 1], logits.shape[1])
    return losses


@_cross_entropy.register_fake
def _(logits, targets, wants_gradient):  # type: ignore[no-untyped-def]
    return logits.new_empty(logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("moesaic::linear_cross_entropy", mutates_args=(), device_types="cpu")
def _fused(
    hidden: Tensor, weight: Tensor, targets: Tensor, wants_hidden: bool, wants_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The (T,) losses, and the gradients of their sum that are wanted, (T, H) bf16 and (V, H) fp32, else empty ones.

    That of the weight comes only with that of the hidden states.
    """
    assert wants_hidden or not wants_weight
    library = select.required_cpu_library()
    _check_operands(hidden, weight)
    assert hidden.shape[1] > 0 and hidden.shape[1] % 32 == weight.shape[0] % 32 == 0, (hidden.shape, weight.shape)
    assert hidden.dtype == torch.bfloat16, hidden.dtype
    assert targets.shape == hidden.shape[:1] and targets.dtype == torch.int64, (targets.shape, targets.dtype)
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device="cpu")
    grad_hidden = torch.empty_like(hidden) if wants_hidden else hidden.new_empty(0)
    grad_weight = torch.empty(weight.shape if wants_weight else 0, dtype=torch.float32, device="cpu")
    wrong = library.function("moesaic_linear_cross_entropy", "pppiiippp")(
        hidden.data_ptr(),
        weight.data_ptr(),
        targets.data_ptr(),
        hidden.shape[0],
        hidden.shape[1],
        weight.shape[0],
        losses.data_ptr(),
        grad_hidden.data_ptr() if wants_hidden else None,
        grad_weight.data_ptr() if wants_weight else None,
    )
    if wrong:
        raise outside_vocabulary(targets[wrong - 1], weight.shape[0])
    return losses, grad_hidden, grad_weight


@_fused.register_fake
def _(hidden, weight, targets, wants_hidden, wants_weight):  # type: ignore[no-untyped-def]
    return (
        hidden.new_empty(hidden.shape[0], dtype=torch.float32),
        hidden.new_empty(hidden.shape if wants_hidden else 0),
        weight.new_empty(weight.shape if wants_weight else 0, dtype=torch.float32),
    )


def _longest(chunks: list[tuple[int, int]]) -> int:
    """The length of the first: none is longer. (torch.compile knows no max() of nothing.)"""
    return chunks[0][1] - chunks[0][0] if chunks else 0


class _Workspace:
    """The buffers of one chunk, used for all of them: fresh ones would be faulted in from the kernel every time."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunks: list[tuple[int, int]]) -> None:
        shape = (_longest(chunks), weight.shape[0])
        self._logits = hidden.new_empty(shape)
        self._probabilities = torch.empty(shape, dtype=torch.float32, device=hidden.device)

    def losses(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        """Return a chunk's (t,) losses."""
        return self._losses_and_probabilities(x, weight, targets)[0]

    def losses_and_gradient(self, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return a chunk's (t,) losses and the gradient (t, V) of its logits, in a buffer of this workspace."""
        losses, probabilities, gradient = self._losses_and_probabilities(x, weight, targets)
        probabilities[torch.arange(x.shape[0], device=x.device), _classes(targets)] -= 1.0
        gradient.copy_(probabilities)
        gradient[targets == -100] = 0
        return losses, gradient

    def _losses_and_probabilities(self, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the (t,) losses, the (t, V) fp32 probabilities, and the (t, V) buffer of logits, free to reuse.

        The probability of the largest logit is 1 / sum exp(z - max), so log p_target = z_target - max + log p_max:
        exact even where p_target underflows, and no second exponential pass.
        """
        logits, probabilities = self._logits[: x.shape[0]], self._probabilities[: x.shape[0]]
        products.mm(x, weight.t(), out=logits)
        torch.softmax(logits, -1, dtype=torch.float32, out=probabilities)
        chosen = logits.gather(1, _classes(targets)[:, None])[:, 0].float()
        losses = logits.amax(-1).float() - chosen - probabilities.amax(-1).log()
        return losses.masked_fill_(targets == -100, 0.0), probabilities, logits


class _KernelWorkspace:
    """The same in C++: one pass over the logits, whose gradient takes their place."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunks: list[tuple[int, int]]) -> None:
        self._logits = hidden.new_empty(_longest(chunks), weight.shape[0])

    def losses(self, x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = self._logits[: x.shape[0]]
        products.mm(x, weight.t(), out=logits)
        return torch.ops.moesaic.cross_entropy(logits, targets, False)

    def losses_and_gradient(self, x: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._logits[: x.shape[0]]
        products.mm(x, weight.t(), out=logits)
        return torch.ops.moesaic.cross_entropy(logits, targets, True), logits


def _workspace(hidden: Tensor, weight: Tensor, chunks: list[tuple[int, int]]) -> _Workspace | _KernelWorkspace:
    return (_KernelWorkspace if _has_kernel(hidden) else _Workspace)(hidden, weight, chunks)


def _forward(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    if _is_fused(hidden, weight):
        return torch.ops.moesaic.linear_cross_entropy(hidden, weight, targets, False, False)[0]
    losses = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    chunks = _chunks(hidden.shape[0], weight.shape[0])
    workspace = _workspace(hidden, weight, chunks)
    with torch.no_grad():
        for start, end in chunks:
            losses[start:end] = workspace.losses(hidden[start:end], weight, targets[start:end])
    return losses


def _by_chunks(hidden: Tensor, weight: Tensor, targets: Tensor, *, wants_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the sum of the losses, and its gradients of hidden (T, H) and, if wanted, in fp32, of weight (V, H)."""
    chunks = _chunks(hidden.shape[0], weight.shape[0])
    workspace = _workspace(hidden, weight, chunks)
    grad_hidden = torch.empty_like(hidden)
    grad_weight = torch.zeros(weight.shape if wants_weight else 0, dtype=torch.float32, device=weight.device)
    product = weight.new_empty(grad_weight.shape)
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start, end in chunks:
        x, target = hidden[start:end], targets[start:end]
        losses, grad_logits = workspace.losses_and_gradient(x, weight, target)
        total += losses.sum()
        products.mm(grad_logits, weight, out=grad_hidden[start:end])
        if wants_weight:
            grad_weight += products.mm(grad_logits.t(), x, out=product)
    return total, grad_hidden, grad_weight


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):  # type: ignore[no-untyped-def]
        count, wants_weight = _count(targets), ctx.needs_input_grad[1]
        if _is_fused(hidden, weight):
            losses, grad_hidden, grad_weight = torch.ops.moesaic.linear_cross_entropy(
                hidden, weight, targets, True, wants_weight
            )
            total = losses.sum()
        else:
            total, grad_hidden, grad_weight = _by_chunks(hidden, weight, targets, wants_weight=wants_weight)
        ctx.save_for_backward(grad_hidden, grad_weight, count)
        ctx.weight_dtype = weight.dtype
        return total / count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad / count
        # A number of fp32 multiplies bf16 as it is: rounded to bf16, 1 / count would be up to 0.2 % off.
        of_hidden, of_weight = ctx.needs_input_grad[:2]
        return (
            grad_hidden * scale if of_hidden else None,
            (grad_weight * scale).to(ctx.weight_dtype) if of_weight else None,
            None,
        )
