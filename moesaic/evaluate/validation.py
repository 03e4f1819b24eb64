"""The validation loss: dropless, without noise, over the same sequences every time."""

from collections.abc import Iterable

import torch

from moesaic.data.loader import Batch
from moesaic.kernels.cross_entropy import linear_cross_entropy
from moesaic.model.transformer import Transformer


@torch.no_grad()
def validation_loss(model: Transformer, batches: Iterable[Batch], *, device: torch.device) -> float:
    """Return the mean cross-entropy in nats per token; the model is in evaluation mode for it, and put back after."""
    was_training = model.training
    model.eval()
    try:
        total = torch.zeros((), dtype=torch.float64)
        count = 0
        for batch in batches:
            batch = batch.to(device)
            output = model(batch.inputs, documents=batch.documents)
            hidden = output.hidden.view(-1, output.hidden.shape[-1])
            losses = linear_cross_entropy(hidden, model.output_weight(), batch.targets.reshape(-1), reduction="none")
            total += losses.sum(dtype=torch.float64).cpu()
            count += losses.numel()
        return float(total / max(count, 1))
    finally:
        model.train(was_training)
