"""From a run folder to a model that computes: config, tokenizer and a checkpoint's weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moesaic.checkpoint.quantized import Scheme, is_quantized, quantization_schemes, require_unquantized, take_quantized
from moesaic.checkpoint.store import CheckpointInfo, checked_file, checked_tensors, resolve_checkpoint
from moesaic.config.load import load_train_config
from moesaic.config.train import TrainConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import CheckpointError, ConfigError
from moesaic.kernels import select
from moesaic.kernels.device import select_device
from moesaic.kernels.quantized import QuantizedWeight
from moesaic.model.pack import pack_transformer, packed_parts, packed_shapes, packed_shell
from moesaic.model.packed_file import PackedFile, PackedFilePolicy, load_packed
from moesaic.model.transformer import Transformer
from moesaic.moe.experts import own_rows

# What weights are stored in, by the names of safetensors files.
_WEIGHT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, packed or not, the tokenizer it was trained with, and the checkpoint it came from."""

    model: Transformer
    tokenizer: Tokenizer
    config: TrainConfig
    info: CheckpointInfo
    device: torch.device


Precision = Literal["bf16", "fp32", "int8"]


def resolve_run(run: str | Path, *, pack: bool = True, precision: Precision | None = None) -> CheckpointInfo:
    """Return the checkpoint that load_run would read, without reading it.

    Raises: CheckpointError for a run or step that is missing, and for a quantised run with pack=False or a precision.
    """
    info = resolve_checkpoint(run)
    if not pack:
        require_unquantized(info, "it was asked for unpacked; a quantised model can only infer", do="load")
    if precision is not None:
        why = f"it was asked for in {precision}; what is rounded stays so"
        require_unquantized(info, why, do="leave the precision out, or load")
    return info


def load_run(
    run: str | Path,
    *,
    device: str = "auto",
    pack: bool = True,
    precision: Precision | None = None,
    packed_file: PackedFilePolicy = "read",
    share: Callable[[Transformer], None] | None = None,
) -> LoadedModel:
    """Load the model that RUN or RUN@step names.

    pack: a model of bf16 precision is packed where there are kernels of ours (model/pack.py), which makes it faster and
    half the size, and leaves no parameters to train or to convert.

    A quantised run is always packed, and has its own precision. precision: of matrix work; None: as the run was
    trained; int8 rounds every matrix to the nearest, and packs.

    packed_file: of a model that is packed on the CPU (model/packed_file.py): "read" maps the file of packed weights
    that an earlier start has left, "write" leaves one, "off" does neither and packs. A model that does not fit into
    memory has one written by "read" too.

    share: is given the model on the meta device and may leave it a part of each layer's experts, of which the weights
    are then read; there is no file of packed ones.

    Raises: CheckpointError for a run, step or file that is missing or corrupt, and for a quantised run with pack=False
    or a precision; DeviceError.
    """
    target = select_device(device)
    info = resolve_run(run, pack=pack, precision=precision)
    config = load_run_config(info.run_folder)
    wanted = config.precision if precision is None else precision
    dtype = torch.float32 if wanted == "fp32" else torch.bfloat16
    has_kernels = dtype is torch.bfloat16 and select.has_kernels(target)
    if is_quantized(info) or wanted == "int8" or (pack and has_kernels):
        model = _load_packed(config, info, target, rounds=wanted == "int8", policy=packed_file, share=share)
    else:
        with torch.device("meta"):
            model = Transformer(config.model, compute_dtype=dtype)
        if share is not None:
            share(model)
        model.to_empty(device="cpu")
        copy_weights(model, info)
        model.to(target).eval()
    return LoadedModel(model, Tokenizer.load(info.run_folder), config, info, target)


def _load_packed(
    config: TrainConfig,
    info: CheckpointInfo,
    device: torch.device,
    *,
    rounds: bool,
    policy: PackedFilePolicy,
    share: Callable[[Transformer], None] | None,
) -> Transformer:
    """rounds: to int8 first."""

    def pack() -> Transformer:
        # Read on the CPU: in the checkpoint's dtype they need not all fit on a GPU.
        with checked_tensors(info, "model") as tensors:
            return pack_transformer(*_unpacked(config, info, tensors, share), rounds=rounds, device=device)

    def parts() -> Iterator[tuple[str, Tensor]]:
        with checked_tensors(info, "model") as tensors:
            yield from packed_parts(*_unpacked(config, info, tensors), rounds=rounds)

    if device.type != "cpu" or share is not None:
        return pack()
    schemes = quantization_schemes(info)
    if rounds:
        with torch.device("meta"):
            schemes = dict.fromkeys(packed_shapes(Transformer(config.model)), Scheme(8, None))
    precision = "int8" if rounds else "stored" if is_quantized(info) else "bf16"
    try:
        shell = packed_shell(config.model, schemes)
    except (ConfigError, AssertionError):
        return pack()  # the manifest names what cannot be, which is said where the weights are read
    return load_packed(PackedFile.of(info, config.model, precision=precision), shell, pack, parts, policy=policy)


def _unpacked(
    config: TrainConfig,
    info: CheckpointInfo,
    tensors: dict[str, Tensor],
    share: Callable[[Transformer], None] | None = None,
) -> tuple[Transformer, dict[str, QuantizedWeight]]:
    """Return an unpacked model on a file's tensors, which are taken, and the quantised matrices that replace its own.

    Where share leaves it some experts alone, it takes these.

    Matrices go straight from their stored dtype, or their quantised form, into the packed layout: fp32 copies of them
    never exist.
    """
    weights = take_quantized(tensors, info)
    with torch.device("meta"):
        model = Transformer(config.model, compute_dtype=torch.bfloat16)
    if share is not None:
        share(model)
    _check_fit(_whole_shapes(model), {**tensors, **weights}, info)
    for name, (rows, _) in own_rows(model).items():
        if name in weights:
            weights[name] = weights[name].map(itemgetter(rows))
        else:
            tensors[name] = tensors[name][rows]
    for name, tensor in tensors.items():
        # Biases, norms, scales and routers compute in fp32.
        if tensor.dim() < 2 or name.endswith("router.weight"):
            tensors[name] = tensor.float()
    model.load_state_dict(tensors, strict=False, assign=True)
    tensors.clear()  # so that each goes as soon as it is packed
    return model, weights


def load_run_config(run_folder: str | Path) -> TrainConfig:
    """Return the resolved config that a run folder holds."""
    path = Path(run_folder) / "config.yaml"
    if not path.is_file():
        raise CheckpointError(
            f"{run_folder} has no config.yaml; a run folder written by `moesaic train` is required; check the path."
        )
    return load_train_config(path)


def load_model_state(model: Transformer, tensors: dict[str, Tensor], info: CheckpointInfo) -> None:
    """Copy a checkpoint's tensors into a model of the same config; every tensor is used exactly once.

    A model whose experts are spread over processes takes its own of each layer.
    """
    _check_fit(_whole_shapes(model), tensors, info)
    rows = own_rows(model)
    model.load_state_dict({name: each[rows[name][0]] if name in rows else each for name, each in tensors.items()})


def copy_weights(model: Transformer, info: CheckpointInfo) -> None:
    """Copy a checkpoint's tensors, of whatever dtype, into a model of the same config, one after the other.

    A model whose experts are spread over processes takes its own of each layer.

    Raises: CheckpointError for a file that is missing or corrupt, or does not fit the model.
    """
    rows = own_rows(model)
    with checked_file(info, "model") as path, _opened(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: _shape_of(each, path) for name, each in slices.items()}
        _check_fit(_whole_shapes(model), shapes, info)
        for name, tensor in model.state_dict().items():
            tensor.copy_(slices[name][rows[name][0]] if name in rows else file.get_tensor(name))


def _whole_shapes(model: Transformer) -> dict[str, Tensor]:
    """Return a model's state, of parameters that it has a part of what has the whole one's shape, and no memory."""
    state = dict(model.state_dict())
    for name, (_, total) in own_rows(model).items():
        state[name] = torch.empty(total, *state[name].shape[1:], dtype=state[name].dtype, device="meta")
    return state


def _shape_of(part: Any, path: Path) -> Tensor:
    """Return a tensor of a file's shape and dtype, without memory; bool for a dtype that no weights have."""
    try:
        return torch.empty(part.get_shape(), device="meta", dtype=_WEIGHT_DTYPES.get(part.get_dtype(), torch.bool))
    except (TypeError, RuntimeError):  # a dimension that is no size
        raise CheckpointError(
            f"{path} has a tensor of shape {part.get_shape()}; sizes that can be are required; use another step, or "
            f"restore a backup."
        ) from None


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    """Raises: CheckpointError for what the library cannot open or read, a path that is no UTF-8 for one."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error}); a whole safetensors file is required, under a name in UTF-8; rename it, "
            f"use another step, or restore a backup."
        ) from None


def _check_fit(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor | QuantizedWeight], info: CheckpointInfo
) -> None:
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    shapes = sorted(name for name in own.keys() & tensors.keys() if own[name].shape != tensors[name].shape)
    others = sorted(
        n for n, each in tensors.items() if isinstance(each, Tensor) and each.dtype not in _WEIGHT_DTYPES.values()
    )
    if others:
        raise CheckpointError(
            f"{info.path} holds {others[:3]} in a dtype that is none of weights; fp32, bf16, fp16 or fp64 is required; "
            f"use another step, or restore a backup."
        )
    if missing or extra or shapes:
        raise CheckpointError(
            f"{info.path} does not fit the model: missing {missing[:3]}, unknown {extra[:3]}, other shapes "
            f"{shapes[:3]}; the config of the run that wrote it is required; use the config.yaml beside it."
        )
