"""From a run folder to a model that computes: config, tokenizer and a checkpoint's weights."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from moesaic.checkpoint.store import CheckpointInfo, load_tensors, resolve_checkpoint
from moesaic.config.load import load_train_config
from moesaic.config.train import TrainConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import CheckpointError
from moesaic.kernels import select
from moesaic.kernels.device import select_device
from moesaic.model.pack import pack_transformer
from moesaic.model.transformer import Transformer


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, packed or not, the tokenizer it was trained with, and the checkpoint it came from."""

    model: Transformer
    tokenizer: Tokenizer
    config: TrainConfig
    info: CheckpointInfo
    device: torch.device


def load_run(run: str | Path, *, device: str = "auto", pack: bool = True) -> LoadedModel:
    """Load the model that RUN or RUN@step names.

    pack: a model of bf16 precision for the CPU's own kernels is packed (model/pack.py), which makes it faster and half
    the size, and leaves no parameters to train or to convert.

    Raises: CheckpointError for a run, step or file that is missing or corrupt; DeviceError.
    """
    target = select_device(device)
    info = resolve_checkpoint(run)
    run_folder = info.path.parent.parent
    config = load_run_config(run_folder)
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = Transformer(config.model, compute_dtype=dtype)
    load_model_state(model, load_tensors(info, "model"), info)
    model.to(target).eval()
    if pack and dtype is torch.bfloat16 and target.type == "cpu" and select.cpu_library() is not None:
        pack_transformer(model)
    return LoadedModel(model, Tokenizer.load(run_folder), config, info, target)


def load_run_config(run_folder: str | Path) -> TrainConfig:
    """Return the resolved config that a run folder holds."""
    path = Path(run_folder) / "config.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"{run_folder} has no config.yaml; a run folder written by `moesaic train` is required; check the path."
        )
    return load_train_config(path)


def load_model_state(model: Transformer, tensors: dict[str, Tensor], info: CheckpointInfo) -> None:
    """Copy a checkpoint's tensors into a model of the same config; every tensor is used exactly once."""
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    if missing or extra or shapes:
        raise CheckpointError(
            f"{info.path} does not fit the model: missing {missing[:3]}, unknown {extra[:3]}, other shapes "
            f"{shapes[:3]}; the config of the run that wrote it is required; use the config.yaml beside it."
        )
    model.load_state_dict(tensors)
