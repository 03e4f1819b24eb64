"""Expert parallelism: a model's experts spread over processes, all else on each of them; data parallelism without any.

A layer of E experts on a world of P ranks has the degree d, the greatest common divisor of both (or of E and a smaller
degree that is asked for): d ranks that follow each other have E / d experts each, and every such group of ranks has the
same ones. So a pyramid's layers each have their own. Gradients are the averages over the ranks that data parallelism
has, of all parameters.
"""

import math
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.utils import get_total_norm

from moesaic.checkpoint.stream import TensorLayout, TensorStream, file_order
from moesaic.errors import ConfigError
from moesaic.moe.experts import own_rows
from moesaic.moe.layer import MoELayer
from moesaic.parallel.dispatch import AllToAllDispatcher

# Gradients that travel together, and weights at once on their way into a checkpoint.
_BUCKET_BYTES = 32 << 20
# On a CPU PyTorch's norm of more elements loses digits.
_NORM_PIECE = 1 << 20


class ExpertParallel:
    """A model whose experts are spread over the processes of torch.distributed, by what it is given in place.

    Each process makes the same model, with the same weights or on the meta device, and hands it over before it makes an
    optimizer. degrees: of each MoE layer, by its name; a dense model has none, and all of it on every process.

    Raises: ConfigError without a process group, for a degree that does not divide the processes, for a model that is
    packed, and one whose experts are spread already.
    """

    def __init__(self, model: nn.Module, *, degree: int | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                "experts were to be spread before torch.distributed was initialised; a process group is required; call "
                "torch.distributed.init_process_group() first, under torchrun."
            )
        self.model = model
        self.num_ranks, self.rank = dist.get_world_size(), dist.get_rank()
        wanted = self.num_ranks if degree is None else degree
        if type(wanted) is not int or wanted < 1 or self.num_ranks % wanted:
            raise ConfigError(
                f"degree ({degree!r}) is not a divisor of the {self.num_ranks} processes; groups of one size, of 1 to "
                f"{self.num_ranks} processes, are required; give a divisor, or leave it out."
            )
        layers = {name: each for name, each in model.named_modules() if isinstance(each, MoELayer)}
        _check(layers)
        device = next(model.parameters()).device
        device_type = "cpu" if device.type == "meta" else device.type
        self.degrees = {name: math.gcd(each.config.num_experts, wanted) for name, each in layers.items()}
        # Groups are made in one order everywhere.
        meshes = {
            size: init_device_mesh(device_type, (self.num_ranks // size, size), mesh_dim_names=("replica", "expert"))
            for size in sorted(set(self.degrees.values()))
        }
        self._expert_groups = {size: mesh.get_group("expert") for size, mesh in meshes.items()}
        self._replica_groups = {size: mesh.get_group("replica") for size, mesh in meshes.items()}
        self._layers = layers
        for name, layer in layers.items():
            size = self.degrees[name]
            if size > 1:
                count = layer.config.num_experts // size
                first = self.rank % size * count
                layer.experts.keep(first, first + count)
                layer.dispatcher = AllToAllDispatcher(self._expert_groups[size], layer.config.num_experts)

    def average_gradients(self) -> None:
        """Make every gradient the average over all ranks of those of their losses, after the backward pass.

        What has a gradient on no rank keeps none.
        """
        spread = {id(each): size for size, each in self._spread_parameters()}
        shared = [each for each in self.model.parameters() if id(each) not in spread]
        _sum_over(None, shared)
        for size, group in self._replica_groups.items():
            own = [each for each in self.model.parameters() if spread.get(id(each)) == size]
            if own:
                # Of an expert's tokens on the ranks of its group autograd has made the sum.
                _sum_over(group, own)
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(self.num_ranks)

    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients as of one vector, fp32, the same on every rank to the last bit."""
        spread = {id(each): size for size, each in self._spread_parameters()}
        device = next(self.model.parameters()).device
        sums = {size: torch.zeros((), dtype=torch.float32, device=device) for size in (None, *self._expert_groups)}
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                pieces = parameter.grad.flatten().split(_NORM_PIECE)
                sums[spread.get(id(parameter))] += get_total_norm(pieces).float().square()
        for size, group in self._expert_groups.items():
            dist.all_reduce(sums[size], group=group)
        norm = torch.stack(list(sums.values())).sum().sqrt()
        dist.broadcast(norm, src=0)  # other processors may add up otherwise
        return norm

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scale all gradients so that their norm is at most max_norm; return what it was.

        Where it is not finite they are left alone: that step is for the caller to skip, on every rank alike.
        """
        norm = self.gradient_norm()
        if max_norm < float(norm) < float("inf"):
            for parameter in self.model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(max_norm / float(norm))
        return norm

    def full_state(self) -> dict[str, Tensor] | None:
        """Return, on rank 0, the state of the model with all its experts, on the CPU; elsewhere None.

        It is the state_dict of a model whose experts are not spread, and as that shares memory with the model's other
        parameters where these are on the CPU. Every rank has to call it.
        """
        stream = self.gather(self.model.state_dict())
        parts: dict[str, list[Tensor]] = {}
        for name, piece in stream.pieces:
            parts.setdefault(name, []).append(piece.cpu())
        if self.rank > 0:
            return None
        return {name: each[0] if len(each) == 1 else torch.cat(each) for name, each in parts.items()}

    def gather(self, tensors: Mapping[str, Tensor]) -> TensorStream:
        """Return the stream of tensors of all experts for those of each rank's; it gives pieces on rank 0 alone.

        tensors: by the names of parameters, or as an optimizer's state is by `key.parameter`, the same ones on every
        rank. What is not of a spread parameter, or not of its shape, is taken from rank 0. Every rank has to take the
        pieces, all of them: what is not on rank 0 is sent while they are taken, so that no rank has more in memory than
        its own and a piece of another's.
        """
        spread = {id(each): size for size, each in self._spread_parameters()}
        own = {name: each for name, each in self.model.named_parameters() if id(each) in spread}
        sizes = {}
        layout = {}
        for name, tensor in tensors.items():
            parameter = own.get(name, own.get(name.partition(".")[2]))
            sizes[name] = 1 if parameter is None or tensor.shape != parameter.shape else spread[id(parameter)]
            layout[name] = TensorLayout(tensor.dtype, tuple(tensor.shape))
            if sizes[name] > 1:
                layout[name] = TensorLayout(tensor.dtype, (len(tensor) * sizes[name], *tensor.shape[1:]))
        return TensorStream(layout, self._pieces(tensors, file_order(layout), sizes))

    def _pieces(
        self, tensors: Mapping[str, Tensor], order: list[str], sizes: Mapping[str, int]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what gather says; sizes: over how many ranks each tensor is spread."""
        for name in order:
            tensor, size = tensors[name].detach(), sizes[name]
            if self.rank == 0:
                yield name, tensor
            if size == 1 or self.rank >= size:  # the first group has them all
                continue
            group = self._expert_groups[size]
            pieces = tensor.split(max(1, _BUCKET_BYTES // tensor[0].nbytes))
            if self.rank > 0:
                for piece in pieces:
                    dist.send(piece.contiguous(), dst=0, group=group)
                continue
            for source in range(1, size):
                for piece in pieces:
                    received = torch.empty_like(piece)
                    dist.recv(received, src=source, group=group)
                    yield name, received

    def own_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what is this rank's of the state, as `gather` gives it, of a model whose experts are not spread."""
        rows = own_rows(self.model)

        def take(name: str, tensor: Tensor) -> Tensor:
            own, total = rows.get(name, rows.get(name.partition(".")[2], (slice(None), -1)))
            return tensor[own] if tensor.dim() > 1 and len(tensor) == total else tensor

        return {name: take(name, tensor) for name, tensor in state.items()}

    def _spread_parameters(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Yield the parameters of which each rank has some experts, with the layer's degree."""
        for name, layer in self._layers.items():
            if self.degrees[name] > 1:
                for parameter in layer.experts.parameters():
                    yield self.degrees[name], parameter


def _check(layers: Mapping[str, MoELayer]) -> None:
    for name, layer in layers.items():
        if layer.experts.packed is not None or layer.dispatcher is not None:
            what = "packed for inference" if layer.experts.packed is not None else "spread already"
            raise ConfigError(f"the experts of {name} are {what}; whole ones are required; make the model anew.")


def _sum_over(group: dist.ProcessGroup | None, parameters: list[nn.Parameter]) -> None:
    """Sum the gradients of parameters over a group, of all ranks where none is given; what one rank lacks is 0."""
    if dist.get_world_size(group) == 1 or not parameters:
        return
    has_grad = torch.tensor([each.grad is not None for each in parameters], dtype=torch.int32)
    has_grad = has_grad.to(parameters[0].device)
    dist.all_reduce(has_grad, op=dist.ReduceOp.MAX, group=group)
    used = [each for each, some in zip(parameters, has_grad.tolist(), strict=True) if some]
    for parameter in used:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([each.grad for each in used if each.grad is not None]):
        # A large one travels by itself, from where it is.
        flat = bucket[0].reshape(-1) if len(bucket) == 1 else torch.cat([each.reshape(-1) for each in bucket])
        dist.all_reduce(flat, group=group)
        for each, summed in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
            each.copy_(summed.view_as(each))


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Yield gradients in their order, some of one dtype at a time."""
    bucket: list[Tensor] = []
    size = 0
    for each in gradients:
        if bucket and (each.dtype is not bucket[0].dtype or size + each.nbytes > _BUCKET_BYTES):
            yield bucket
            bucket, size = [], 0
        bucket.append(each)
        size += each.nbytes
    if bucket:
        yield bucket
