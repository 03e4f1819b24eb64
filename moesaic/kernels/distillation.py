"""Cross-entropy and forward KL from a teacher, of a block of logits, with the gradient of both in their place.

In C++ one pass over a row of student and teacher each way, where PyTorch's is a dozen element-wise operations. What
calls it block by block, and other divergences, is distill/loss.py.
"""

import torch
from torch import Tensor

from moesaic.kernels import select
from moesaic.kernels.cross_entropy import outside_vocabulary

_NOTHING = -100


def teach(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, *, alpha: float, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy (t,) and KL(teacher || student) (t,) at the temperature, fp32; both 0 at target -100.

    The gradient of their sum over tokens, cross-entropy + alpha * temperature^2 * KL, takes the place of the logits.

    Shapes: logits (t, V) bf16 or fp32, contiguous; teacher_logits (t, V) fp32; targets (t,) int64.
    """
    assert logits.is_contiguous() and logits.shape == teacher_logits.shape, (logits.stride(), teacher_logits.shape)
    assert teacher_logits.dtype == torch.float32, teacher_logits.dtype
    assert targets.shape == logits.shape[:1] and targets.dtype == torch.int64, (targets.shape, targets.dtype)
    library = select.cpu_library() if logits.device.type == "cpu" else None
    if library is None or logits.dtype not in (torch.bfloat16, torch.float32):
        return _teach(logits, teacher_logits, targets, alpha, temperature)
    teacher_logits, targets = teacher_logits.contiguous(), targets.contiguous()
    losses, distances = torch.empty(2, logits.shape[0], dtype=torch.float32, device="cpu").unbind()
    scalars = torch.tensor([alpha, temperature], dtype=torch.float32, device="cpu")
    wrong = library.function("moesaic_distillation", "pippiippp")(
        logits.data_ptr(),
        logits.dtype == torch.bfloat16,
        teacher_logits.data_ptr(),
        targets.data_ptr(),
        logits.shape[0],
        logits.shape[1],
        scalars.data_ptr(),
        losses.data_ptr(),
        distances.data_ptr(),
    )
    if wrong:
        raise outside_vocabulary(targets[wrong - 1], logits.shape[1])
    return losses, distances


def _teach(
    logits: Tensor, teacher_logits: Tensor, targets: Tensor, alpha: float, temperature: float
) -> tuple[Tensor, Tensor]:
    is_nothing = targets == _NOTHING
    classes = targets.masked_fill(is_nothing, 0)[:, None]
    log_q = torch.log_softmax(logits.float(), -1)
    losses = -log_q.gather(1, classes)[:, 0]
    gradient = log_q.exp()
    gradient.scatter_add_(1, classes, gradient.new_full(classes.shape, -1.0))
    if temperature != 1.0:
        log_q = torch.log_softmax(logits.float() / temperature, -1)
    log_p = torch.log_softmax(teacher_logits / temperature, -1)
    p = log_p.exp()
    distances = (p * (log_p - log_q)).sum(-1)
    gradient.add_(log_q.exp().sub_(p), alpha=alpha * temperature)
    logits.copy_(gradient.masked_fill_(is_nothing[:, None], 0.0))
    return losses.masked_fill_(is_nothing, 0.0), distances.masked_fill_(is_nothing, 0.0)
