"""Whether a device can hold a model's training at all, asked before anything is allocated."""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch

from moesaic.config.model import ModelConfig
from moesaic.config.train import TrainConfig
from moesaic.errors import ConfigError
from moesaic.kernels.limits import available_memory_bytes
from moesaic.parallel.world import World
from moesaic.plan.cost import count_parameters, least_training_bytes
from moesaic.report.model_summary import describe_bytes
from moesaic.report.quantities import short_number


def check_memory(config: TrainConfig, device: torch.device, world: World | None = None) -> None:
    """Refuse a model whose weights, gradients and moments are more than the device can give.

    Over several processes it is what this machine's, which share its memory, or a GPU's own one hold. Activations and a
    teacher are not counted: how much they take at once is an estimate, and this is none.

    Raises: ConfigError with the changes that would fit.
    """
    world = world or World()
    degree = config.parallel.expert_degree or world.size
    num_sharing = world.local_size if device.type == "cpu" else 1

    def least_bytes(model: ModelConfig, optimizer: str = config.optimizer.name) -> int:
        return num_sharing * least_training_bytes(model, optimizer=optimizer, expert_degree=degree)

    needed = least_bytes(config.model)
    obtainable = _obtainable_bytes(device)
    if needed <= obtainable:
        return
    remedies = []
    if config.optimizer.name != "muon" and least_bytes(config.model, "muon") < obtainable:
        remedies.append("--set optimizer.name=muon, which keeps one moment instead of two")
    where = f" in the {num_sharing} processes here" if num_sharing > 1 else ""
    fewer = _fewer_experts(config.model, lambda model: least_bytes(model) < obtainable)
    if fewer is not None:
        remedies.append(f"--set model.moe.num_experts={fewer}")
    raise ConfigError(
        f"the model ({short_number(count_parameters(config.model).total)} parameters) takes {describe_bytes(needed)} "
        f"to train{where} and {device.type} has {describe_bytes(int(obtainable))} available; fp32 weights, gradients "
        f"and the moments of {config.optimizer.name} must fit, with the activations beside them; use "
        f"{', or '.join([*remedies, 'a smaller model (`moesaic inspect CONFIG` says what one takes)'])}, or a device "
        f"with more memory."
    )


def _obtainable_bytes(device: torch.device) -> float:
    """Return what this process could get at most, infinite where the system does not say.

    What it holds already is counted too, since much of that may be free inside it, and so is swap: nobody should be
    refused what would have worked.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return available_memory_bytes(device) + held
    if device.type != "cpu":
        return math.inf
    try:
        resident = re.search(r"^VmRSS:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
        swap = re.search(r"^SwapFree:\s*(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return math.inf
    return available_memory_bytes() + sum(int(match[1]) << 10 for match in (resident, swap) if match)


def _fewer_experts(model: ModelConfig, fits: Callable[[ModelConfig], bool]) -> str | None:
    """Return the most experts per layer, by halving, that would fit, as --set takes them."""
    if model.moe is None:
        return None
    counts = model.moe.num_experts
    while True:
        halved = counts // 2 if isinstance(counts, int) else tuple(max(1, count // 2) for count in counts)
        try:
            smaller: ModelConfig = model.replace(moe=model.moe.replace(num_experts=halved))
        except ConfigError:  # fewer than a token chooses, or than groups
            return None
        if fits(smaller):
            return str(halved) if isinstance(halved, int) else f"[{','.join(map(str, halved))}]"
        if halved == counts:
            return None
        counts = halved
