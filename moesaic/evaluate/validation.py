"""The validation loss: dropless, without noise, over the same sequences every time."""

from collections.abc import Iterable, Iterator

import torch

from moesaic.data.loader import Batch
from moesaic.kernels.cross_entropy import linear_cross_entropy
from moesaic.model.transformer import Transformer
from moesaic.parallel.world import World


@torch.no_grad()
def validation_loss(
    model: Transformer, batches: Iterable[Batch], *, device: torch.device, world: World | None = None
) -> float:
    """Return the mean cross-entropy in nats per token; the model is in evaluation mode for it, and put back after.

    The processes of a world take turns at the batches, which each of them is given, and all return the mean of all.
    """
    world = world or World()
    was_training = model.training
    model.eval()
    try:
        total = torch.zeros(2, dtype=torch.float64)  # of the losses, and how many there are
        for batch, is_own in turns(batches, world):
            batch = batch.to(device)
            output = model(batch.inputs, documents=batch.documents)
            hidden = output.hidden.view(-1, output.hidden.shape[-1])
            losses = linear_cross_entropy(hidden, model.output_weight(), batch.targets.reshape(-1), reduction="none")
            if is_own:
                total += torch.tensor([losses.sum(dtype=torch.float64).item(), losses.numel()], dtype=torch.float64)
        (total,) = world.sum([total])
        return float(total[0] / total[1].clamp_min(1))
    finally:
        model.train(was_training)


def turns(batches: Iterable[Batch], world: World) -> Iterator[tuple[Batch, bool]]:
    """Yield this process's batches, and one of another's where it has one less: spread experts need all processes.

    bool: whether it is its own.
    """
    first, count = None, 0
    for number, batch in enumerate(batches):
        first, count = first or batch, number + 1
        if number % world.size == world.rank:
            yield batch, True
    if first is not None and count % world.size and world.rank >= count % world.size:
        yield first, False
