"""Inference with a model whose experts are spread over processes: each takes every token and has all else.

A process computes what its own experts make of a batch, and adds the others' to it, layer by layer. The sum is made in
the order of the ranks for every number by itself, so that it has the same bits on all processes and for any batch.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moesaic.errors import ConfigError
from moesaic.moe.layer import MoELayer
from moesaic.parallel.world import World

# What one process gets from all others at once, rather than a part of the rows to add up for all.
_GATHERED_BYTES = 1 << 20
# Its name from PyTorch 2.13 on, and before.
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def share_experts(model: nn.Module, world: World) -> None:
    """Leave the model, on the meta device yet, this process's experts of each layer: as many as its share, or one more.

    Raises: ConfigError for a model with a layer of fewer experts than processes, or of none.
    """
    layers = [each for each in model.modules() if isinstance(each, MoELayer)]
    fewest = min((each.config.num_experts for each in layers), default=0)
    if fewest < world.size:
        has = f"{fewest} experts in a layer" if layers else "no experts"
        raise ConfigError(
            f"{world.size} processes were started for a model with {has}; each has to have some of every layer's; "
            f"start {f'at most {fewest}' if fewest > 1 else 'one, without torchrun'}."
        )
    for layer in layers:
        count = layer.config.num_experts
        layer.experts.keep(count * world.rank // world.size, count * (world.rank + 1) // world.size)
        layer.add_others = Addition(world)


class Addition:
    """Makes the sum of tensors (T, H) that the processes of a world have, on each of them."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __call__(self, x: Tensor) -> Tensor:
        size, group = self._world.size, self._world.group_for(x.device)
        rows, columns = x.shape
        if size * x.nbytes <= _GATHERED_BYTES:
            parts = x.new_empty(size, rows, columns)
            _gather(parts.view(size * rows, columns), x.contiguous(), group=group)
            return _add_up(parts)
        share = -(-rows // size)
        padded = x if rows == share * size else torch.cat([x, x.new_zeros(share * size - rows, columns)])
        parts = x.new_empty(size, share, columns)  # of this process's rows, from each
        dist.all_to_all_single(parts.view(size * share, columns), padded.contiguous(), group=group)
        out = x.new_empty(share * size, columns)
        _gather(out, _add_up(parts), group=group)
        return out[:rows]


def _add_up(parts: Tensor) -> Tensor:
    """Return the sum (T, H) of parts (P, T, H), each number's in the order of P."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
