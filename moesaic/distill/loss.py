"""The loss of a student at its head: cross-entropy + alpha * T^2 * divergence from the teacher, a mean over tokens.

`distillation_loss` computes value and gradient chunk by chunk of tokens in the forward pass, so that of neither model
more logits exist than a chunk's. `reference_loss` is its plain definition, over whole logits, by autograd; of a cached
teacher `reference_bucket_divergence` is.

Source: DeepSpeed-MoE (arXiv 2201.05596), equation 1; T^2 keeps the gradient's size (Hinton et al., arXiv 1503.02531).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moesaic.config.distill import Divergence
from moesaic.kernels import products
from moesaic.kernels.distillation import teach
from moesaic.kernels.gradient import once_differentiable
from moesaic.kernels.tracing import untraced

_CHUNK_ELEMENTS = 1 << 22  # of logits: 16 MiB in fp32, of which some five exist at a time
# With fewer tokens, adding a large vocabulary's weight gradient once more per chunk costs more than the chunk.
_MIN_CHUNK_TOKENS = 128
_NOTHING = -100
_NEVER = -1e4


@dataclass(frozen=True)
class TeacherLogits:
    """A teacher that ran: fp32 logits (end - start, V) of tokens start to end, made when they are asked for."""

    chunk: Callable[[int, int], Tensor]


@dataclass(frozen=True)
class TeacherTopK:
    """What a cached teacher holds, at its own temperature. Shapes: ids (T, K) int64; log_probs (T, K + 1) fp32.

    The last log-probability is of all other tokens together, -inf where there are none.
    """

    ids: Tensor
    log_probs: Tensor


Teacher = TeacherLogits | TeacherTopK


@dataclass(frozen=True)
class DistillationLoss:
    """Scalars, fp32: total is differentiated; the cross-entropy, and the divergence without alpha and T^2, are not."""

    total: Tensor
    cross_entropy: Tensor
    divergence: Tensor


@untraced
def distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: Teacher,
    *,
    alpha: float,
    temperature: float,
    divergence: Divergence,
) -> DistillationLoss:
    """Return the loss of a student with hidden states (T, H) and output matrix (V, H) of one dtype (autocast casts).

    targets (T,) int64, -100 where there is nothing to predict: outside every mean. A mean over nothing is 0.
    """
    hidden, weight = products.autocast(hidden), products.autocast(weight)
    assert isinstance(teacher, TeacherLogits) or divergence == "forward_kl", divergence
    values = _Distillation.apply(hidden, weight, targets, teacher, alpha, temperature, divergence)
    return DistillationLoss(*values)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, teacher, alpha, temperature, divergence):  # type: ignore[no-untyped-def]
        num_tokens, vocab_size = hidden.shape[0], weight.shape[0]
        count = (targets != _NOTHING).sum().clamp_min(1)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        sums = torch.zeros(2, dtype=torch.float32, device=hidden.device)  # of cross-entropy and divergence
        size = max(1, min(num_tokens, max(_CHUNK_ELEMENTS // vocab_size, _MIN_CHUNK_TOKENS)))
        for start in range(0, num_tokens, size):
            rows = slice(start, min(start + size, num_tokens))
            x = hidden[rows]
            logits = products.linear(x, weight)  # (t, V)
            if isinstance(teacher, TeacherTopK):
                taught = _as_logits(logits, teacher.ids[rows], teacher.log_probs[rows], temperature)
            else:
                taught = teacher.chunk(rows.start, rows.stop)
            if divergence == "forward_kl":
                losses, distance = teach(logits, taught, targets[rows], alpha=alpha, temperature=temperature)
                gradient = logits
            else:
                losses, distance, gradient = _step_by_step(
                    logits, taught, targets[rows], alpha, temperature, _OTHERS[divergence]
                )
            sums[0] += losses.sum()
            sums[1] += distance.sum()
            products.mm(gradient, weight, out=grad_hidden[rows])
            grad_weight += products.mm(gradient.t(), x)
        ctx.save_for_backward(grad_hidden, grad_weight, count)
        ctx.weight_dtype = weight.dtype
        cross_entropy, distance = (sums / count).unbind()
        ctx.mark_non_differentiable(cross_entropy, distance)
        return cross_entropy + alpha * temperature**2 * distance, cross_entropy, distance

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):  # type: ignore[no-untyped-def]
        grad_hidden, grad_weight, count = ctx.saved_tensors
        scale = grad / count
        # A number of fp32 multiplies bf16 as it is: rounded to bf16, 1 / count would be up to 0.2 % off.
        grads = grad_hidden * scale, (grad_weight * scale).to(ctx.weight_dtype)
        return *grads, None, None, None, None, None


def _step_by_step(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    alpha: float,
    temperature: float,
    diverge: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a chunk's cross-entropies (t,), divergences (t,) and gradient (t, V), in the logits' dtype."""
    is_nothing = targets == _NOTHING
    classes = targets.masked_fill(is_nothing, 0)[:, None]
    log_q = torch.log_softmax(logits, -1, dtype=torch.float32)
    losses = -log_q.gather(1, classes)[:, 0]
    gradient = log_q.exp()
    gradient.scatter_add_(1, classes, gradient.new_full(classes.shape, -1.0))
    if temperature != 1.0:
        log_q = torch.log_softmax(logits.float() / temperature, -1)
    distance, slope = diverge(torch.log_softmax(teacher_logits / temperature, -1), log_q)
    gradient.add_(slope, alpha=alpha * temperature)  # T^2 of the loss, 1 / T of the logits
    gradient.masked_fill_(is_nothing[:, None], 0.0)
    return losses.masked_fill_(is_nothing, 0.0), distance.masked_fill_(is_nothing, 0.0), gradient.to(logits.dtype)


# Each takes log-probabilities (t, V) of teacher and student and returns the divergence (t,) and its gradient (t, V)
# with respect to the logits that log_q is the log-softmax of.


def _reverse_kl(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    q, difference = log_q.exp(), log_q - log_p
    distance = (q * difference).sum(-1)
    return distance, difference.sub_(distance[:, None]).mul_(q)


def _jensen_shannon(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    log_m = torch.logaddexp(log_p, log_q).sub_(math.log(2.0))
    q, half = log_q.exp(), (log_q - log_m).mul_(0.5)
    own = (q * half).sum(-1)
    distance = own + 0.5 * (log_p.exp() * (log_p - log_m)).sum(-1)
    return distance, half.sub_(own[:, None]).mul_(q)


_OTHERS: dict[Divergence, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "reverse_kl": _reverse_kl,
    "jsd": _jensen_shannon,
}


def _as_logits(logits: Tensor, ids: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """Return the logits (t, V) of a teacher who spreads the bucket over the other tokens as this very student does.

    Inside the bucket the two do not differ, so their KL is the one over the K + 1 outcomes, and so is its gradient:
    how the bucket is spread moves it by nothing where both spread it alike.
    """
    scaled = logits.float() if temperature == 1.0 else logits.float() / temperature
    others = torch.logsumexp(scaled.scatter(1, ids, -math.inf), -1, keepdim=True)
    # An empty bucket gets a probability that is 0 in fp32, but no infinity, which times 0 would be NaN; where no token
    # is left for it, nothing is.
    shift = (log_probs[:, -1:] - others).clamp_min(_NEVER).masked_fill(others == -math.inf, 0.0)
    return (scaled + shift).scatter_(1, ids, log_probs[:, :-1]).mul_(temperature)


def divergence_of(log_p: Tensor, log_q: Tensor, divergence: Divergence) -> Tensor:
    """Return the divergence (...) of log-probabilities (..., V) of teacher and student, by its definition."""
    if divergence == "forward_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if divergence == "reverse_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    return (divergence_of(log_p, log_m, "forward_kl") + divergence_of(log_q, log_m, "forward_kl")) / 2


def reference_loss(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    *,
    alpha: float,
    temperature: float,
    divergence: Divergence,
) -> DistillationLoss:
    """Return what distillation_loss computes, of whole logits (T, V) of student and teacher."""
    kept = targets != _NOTHING
    count = kept.sum().clamp_min(1)
    cross_entropy = F.cross_entropy(logits[kept].float(), targets[kept], reduction="sum") / count
    log_p = torch.log_softmax(teacher_logits[kept].float() / temperature, -1)
    log_q = torch.log_softmax(logits[kept].float() / temperature, -1)
    distance = divergence_of(log_p, log_q, divergence).sum() / count
    total = cross_entropy + alpha * temperature**2 * distance
    return DistillationLoss(total, cross_entropy.detach(), distance.detach())


def reference_bucket_divergence(teacher: TeacherTopK, log_q: Tensor) -> Tensor:
    """Return the forward KL (T,) over each token's K + 1 outcomes, of the student's log-probabilities (T, V)."""
    distances = []
    for ids, log_probs, own in zip(teacher.ids, teacher.log_probs, log_q, strict=True):
        is_other = torch.ones_like(own, dtype=torch.bool)
        is_other[ids] = False
        outcomes = torch.cat([own[ids], torch.logsumexp(own[is_other], 0)[None]])
        kept = log_probs > -math.inf
        distances.append((log_probs[kept].exp() * (log_probs[kept] - outcomes[kept])).sum())
    return torch.stack(distances)
