"""The processes that train one model together, as torchrun starts them, and how they agree.

What they tell one another here are a few numbers at a time, on the CPU; a process that is alone asks nobody.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moesaic.errors import ConfigError, DeviceError, ElsewhereError, MoesaicError, TrainingError
from moesaic.kernels.device import select_device


@dataclass(frozen=True)
class World:
    """One process among `size`; the first, of rank 0, is the main one. local_*: among those of this machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    # For numbers on the CPU; None: the default one.
    _group: dist.ProcessGroup | None = field(default=None, repr=False)
    _is_own: bool = False

    @classmethod
    def join(cls) -> "World":
        """Return this process's place: in torch.distributed's group, or in the one that torchrun's variables ask for.

        Without either it is alone. Raises: ConfigError where the variables are not all there.
        """
        if not dist.is_available():
            return cls()
        is_own = not dist.is_initialized()
        if is_own:
            if os.environ.get("WORLD_SIZE", "1") == "1" or "RANK" not in os.environ:
                return cls()
            try:
                dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            except ValueError as error:
                raise ConfigError(
                    f"WORLD_SIZE and RANK are set, and the processes cannot find one another ({error}); MASTER_ADDR "
                    f"and MASTER_PORT are required too; start them with torchrun, which sets all, or unset WORLD_SIZE."
                ) from None
        rank, size = dist.get_rank(), dist.get_world_size()
        group = None if "cpu:" in dist.get_backend_config() else dist.new_group(backend="gloo")
        local_rank, local_size = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(rank, size, local_rank, local_size, group, is_own)

    def leave(self) -> None:
        """Take leave of the others, where join has made the group; at a process's end, as it may not be made anew."""
        if self._is_own and dist.is_initialized():
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes and speaks for all."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """Return the device that "auto", "cpu" or "cuda" means for this process: of a machine's GPUs each has its own.

        Raises: DeviceError.
        """
        device = select_device(name)
        if self.size == 1 or device.type != "cuda":
            return device
        if self.local_rank >= torch.cuda.device_count():
            raise DeviceError(
                f"{self.local_size} processes were started on a machine with {torch.cuda.device_count()} GPUs; one for "
                f"each is required; start at most so many (torchrun --nproc-per-node), or use --device cpu."
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def check_degree(self, degree: int | None) -> None:
        """Raise ConfigError unless experts can be spread over groups of so many processes; None: over all."""
        if degree is not None and self.size % degree:
            raise ConfigError(
                f"parallel.expert_degree is {degree} and the run has {self.size} "
                f"{'process' if self.size == 1 else 'processes'}; a divisor of their number is required; set another, "
                f"or null, or start as many with torchrun as it needs."
            )

    @contextmanager
    def together(self) -> Iterator[None]:
        """Do what may fail on some processes: all go on, or all raise a MoesaicError.

        The lowest of those that failed raises its own error, every other process an ElsewhereError. The work inside
        asks nothing of other processes, or fails on all of them before it does.
        """
        own: MoesaicError | None = None
        try:
            yield
        except MoesaicError as error:
            if self.size == 1:
                raise
            own = error
        failed = -self.highest(-self.size if own is None else -self.rank)
        if failed == self.size:
            return
        if own is not None and failed == self.rank:
            raise own
        raise ElsewhereError(f"process {failed} of this run has failed; all are required; see what it says.")

    @contextmanager
    def noticing_losses(self, do: str = "go on with the same command and --resume") -> Iterator[None]:
        """Raise MoesaicErrors for what torch raises when another process of the run is gone, saying what to do."""
        try:
            yield
        except RuntimeError as error:
            is_lost = isinstance(error, dist.DistError) or "gloo" in str(error)
            if self.size == 1 or not is_lost:
                raise
            if not self.is_main:
                raise ElsewhereError(
                    "another process of this run is gone; all are required; see what it says."
                ) from error
            raise TrainingError(
                f"another process of this run has ended or cannot be reached ({str(error).strip().splitlines()[0]}); "
                f"all are required; see what it says, and {do}."
            ) from error

    def group_for(self, device: torch.device) -> dist.ProcessGroup | None:
        """Return the group in which tensors of a device travel, None for the default one."""
        return self._group if device.type == "cpu" else None

    def sum(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the sums over all processes of tensors of one dtype and device, each of its own shape."""
        if self.size == 1 or not tensors:
            return tensors
        flat = torch.cat([each.reshape(-1) for each in tensors])
        dist.all_reduce(flat, group=self.group_for(flat.device))
        parts = flat.split([each.numel() for each in tensors])
        return [part.view_as(each) for part, each in zip(parts, tensors, strict=True)]

    def mean(self, values: list[float]) -> list[float]:
        """Return the means over all processes, in double precision."""
        if self.size == 1 or not values:
            return values
        (total,) = self.sum([torch.tensor(values, dtype=torch.float64)])
        return [float(each) for each in total / self.size]

    def highest(self, number: int) -> int:
        """Return the highest of the processes' numbers."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return int(tensor)

    def main_says(self, answer: bool) -> bool:
        """Return the main process's answer."""
        return self.highest(int(answer and self.is_main)) == 1

    def values(self, own: Any) -> list[Any]:
        """Return the JSON-able value that each process gives, by rank."""
        if self.size == 1:
            return [own]
        text = list(json.dumps(own).encode())
        length = self.highest(len(text))
        padded = torch.tensor([*text, *b" " * (length - len(text))], dtype=torch.uint8)
        every = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(every, padded, group=self._group)
        return [json.loads(bytes(each.tolist())) for each in every]

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Raise ConfigError, all together, unless every process has the same JSON-able values, of which it names."""
        texts = (json.dumps(value, sort_keys=True) for value in values.values())
        every = self.values([hashlib.sha256(text.encode()).hexdigest() for text in texts])
        different = [name for name, *digests in zip(values, *every, strict=True) if len(set(digests)) > 1]
        with self.together():
            if different:
                raise ConfigError(
                    f"the processes of this run differ in {' and '.join(different)}; the same is required of all; "
                    f"start each with the same command, where the same files are."
                )
