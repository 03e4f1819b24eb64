"""A mixture-of-experts run made from a dense one, whose MLPs become the experts; training goes on from there.

With a residual MLP the new model computes exactly what the dense one does: its MLP stays beside the experts, whose
output is multiplied by a learned factor that starts at 0. Without one the MLP is gone, and the experts are its copies.

Tensors are read, and the experts made, one at a time. Source: Sparse Upcycling (arXiv 2212.05055).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.quantized import require_unquantized
from moesaic.checkpoint.store import CheckpointInfo, checked_file, read_info, resolve_checkpoint
from moesaic.checkpoint.stream import TensorLayout, TensorReader, TensorWriter
from moesaic.config.model import ModelConfig, MoEConfig, RouterConfig
from moesaic.config.train import TrainConfig
from moesaic.convert.folder import check_is_new, check_is_outside, finish_run, folder_in_progress, new_weights
from moesaic.convert.tensors import common_dtype, own_tensors, require_finite
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import CheckpointError, ConfigError, ConversionError
from moesaic.kernels.finite import is_finite
from moesaic.kernels.limits import available_memory_bytes
from moesaic.logs import OnProgress, no_progress
from moesaic.model.load import copy_weights, load_run_config
from moesaic.model.transformer import Transformer
from moesaic.moe.seeds import generator, mix_seeds
from moesaic.plan.cost import count_parameters

REPORT_NAME = "upcycle.json"
# Beside a residual MLP noise costs nothing, since the experts' factor starts at 0; a hundredth tells experts apart, so
# that the router has something to choose by from its first gradient, and changes each of them by a hundredth. Copies
# that have to compute what the MLP did get none: tokens that reach different experts tell those apart too.
RESIDUAL_NOISE = 0.01
# Every other MLP, as in the source.
DEFAULT_EVERY = 2
PROMPT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of"


@dataclass(frozen=True)
class UpcycleReport:
    """What an upcycling made: the layers that have experts now and how many each, the sizes before and after.

    max_logit_difference: between both models' logits on a fixed prompt; None where the model did not fit in memory.
    """

    source: str
    source_step: int
    layers: tuple[int, ...]
    num_experts: tuple[int, ...]
    top_k: int
    expert_intermediate_size: int
    residual: bool
    granularity: int
    noise: float
    seed: int
    parameters_before: int
    parameters_after: int
    active_parameters_before: int
    active_parameters_after: int
    bytes_before: int
    bytes_after: int
    max_logit_difference: float | None

    @property
    def is_same_function(self) -> bool:
        """Whether the new model computes what the dense one does, up to rounding."""
        return self.residual or (self.top_k > 1 and self.noise == 0)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def upcycle_run(
    dense: str | Path,
    output: str | Path,
    *,
    experts: int | Sequence[int],
    layers: Sequence[int] | None = None,
    every: int | None = None,
    top_k: int = 1,
    residual: bool = False,
    granularity: int = 1,
    noise: float | None = None,
    seed: int = 0,
    on_progress: OnProgress = no_progress,
) -> UpcycleReport:
    """Write a mixture-of-experts run made from the dense one that RUN or RUN@step names to a new folder.

    experts: of every MoE layer, or one count for each. layers: which those are, counted from 0; else every n-th, the
    n-th first (2). residual: keep the MLP beside the experts, which start with a factor of 0. granularity N: experts of
    an N-th of the MLP's width, expert e with the slice e mod N; residual only. noise: Gaussian, on the experts'
    matrices, in units of each matrix's own standard deviation; None: 0.01 with residual, 0 without. seed: of noise and
    routers.

    Raises: ConfigError for a run that is not dense or options that cannot work; CheckpointError; ConversionError when
    the folder cannot be written, or the new model does not compute what it has to. Nothing is left behind then.
    """
    info = resolve_checkpoint(dense)
    training = load_run_config(info.run_folder)
    _check_dense(info, training.model)
    noise = (RESIDUAL_NOISE if residual else 0.0) if noise is None else noise
    model = _upcycled(
        training.model, experts=experts, layers=layers, every=every, top_k=top_k, residual=residual,
        granularity=granularity, noise=noise,
    )  # fmt: skip
    output = Path(output)
    check_is_new(output)
    check_is_outside(output, info.run_folder)
    tokenizer = Tokenizer.load(info.run_folder)
    with folder_in_progress(output) as folder:
        target = new_weights(folder, 0)
        with checked_file(info, "model") as path:
            _write_tensors(path, target, training.model, model, noise=noise, seed=seed, on_progress=on_progress)
        metadata = {
            "tokens": 0,
            "model": model.to_dict(),
            "upcycled": {"source": str(info.run_folder), "step": info.step},
        }
        config = training.replace(model=model, init_from=None, distill=None)
        finish_run(target, 0, config=config, tokenizer=tokenizer, metadata=metadata)
        on_progress("comparing with the dense run", 0.0)
        new = read_info(target.parent)
        before, after = count_parameters(training.model), count_parameters(model)
        report = UpcycleReport(
            source=str(info.run_folder),
            source_step=info.step,
            layers=model.moe_layers,
            num_experts=tuple(model.layers[layer].num_experts for layer in model.moe_layers),
            top_k=top_k,
            expert_intermediate_size=training.model.intermediate_size // granularity,
            residual=residual,
            granularity=granularity,
            noise=noise,
            seed=seed,
            parameters_before=before.total,
            parameters_after=after.total,
            active_parameters_before=before.active,
            active_parameters_after=after.active,
            bytes_before=info.files["model.safetensors"]["bytes"],
            bytes_after=target.stat().st_size,
            max_logit_difference=_logit_difference(info, new, training, model, tokenizer),
        )
        if residual and report.max_logit_difference not in (None, 0.0):
            raise ConversionError(
                f"the upcycled model's logits differ by {report.max_logit_difference} from those of {info.path}; with "
                f"a residual MLP they must not differ at all; report it, with the config of the run."
            )
        (folder / REPORT_NAME).write_text(json.dumps(report.to_json(), indent=1), encoding="utf-8")
    return report


def _check_dense(info: CheckpointInfo, config: ModelConfig) -> None:
    require_unquantized(info, "upcycling requires the weights as they were trained", error=ConfigError)
    if config.moe_layers:
        raise ConfigError(
            f"{info.path} has experts already, in layers {', '.join(map(str, config.moe_layers))}; upcycling makes "
            f"experts of a dense model's MLPs; give a dense run."
        )


def _upcycled(
    config: ModelConfig,
    *,
    experts: int | Sequence[int],
    layers: Sequence[int] | None,
    every: int | None,
    top_k: int,
    residual: bool,
    granularity: int,
    noise: float,
) -> ModelConfig:
    if layers is not None and every is not None:
        raise ConfigError(
            f"layers ({', '.join(map(str, layers))}) and every ({every}) are both given; one of them places the "
            f"experts; leave one out."
        )
    if granularity < 1 or config.intermediate_size % granularity:
        raise ConfigError(
            f"granularity ({granularity}) does not divide the MLP's intermediate_size ({config.intermediate_size}); "
            f"slices are of equal width; use a divisor."
        )
    if granularity > 1 and not residual:
        raise ConfigError(
            f"granularity ({granularity}) is given without a residual MLP; no choice of slices computes what the whole "
            f"MLP did; add residual (--residual), or use granularity 1."
        )
    if not 0 <= noise < float("inf"):
        raise ConfigError(
            f"noise ({noise}) is not a size; a share of the weights' standard deviation is required; use 0 or "
            f"{RESIDUAL_NOISE}."
        )
    moe = MoEConfig(
        num_experts=experts if isinstance(experts, int) else tuple(experts),
        top_k=top_k,
        intermediate_size=config.intermediate_size // granularity if granularity > 1 else None,
        every=1 if layers is not None else DEFAULT_EVERY if every is None else every,
        layers=None if layers is None else tuple(layers),
        residual="sum" if residual else None,
        output_scale=residual,
        # Weights that add up to 1 make a mean of the copies, which is the MLP.
        router=RouterConfig(renormalize=top_k > 1 and not residual),
    )
    return config.replace(moe=moe)


@dataclass(frozen=True)
class _Stack:
    """A stacked tensor of the experts, and the MLP's tensors that stand one behind the other in each expert's part.

    dim: of those, the one along which the intermediate width lies; None for the bias behind it.
    """

    name: str
    sources: tuple[str, ...]
    dim: int | None


def _stacks(config: ModelConfig) -> list[_Stack]:
    up = ("gate_proj", "up_proj") if config.is_gated else ("up_proj",)
    name = "gate_up" if len(up) == 2 else "up"
    stacks = [
        _Stack(f"{name}_proj", tuple(f"{each}.weight" for each in up), 0),
        _Stack("down_proj", ("down_proj.weight",), 1),
    ]
    if config.mlp_bias:
        stacks.append(_Stack(f"{name}_bias", tuple(f"{each}.bias" for each in up), 0))
        stacks.append(_Stack("down_bias", ("down_proj.bias",), None))
    return stacks


def _write_tensors(
    source: Path,
    target: Path,
    before: ModelConfig,
    after: ModelConfig,
    *,
    noise: float,
    seed: int,
    on_progress: OnProgress,
) -> None:
    with TensorReader(source) as reader:
        _check_stored(source, reader.layout, before)
        layout = _layout(reader.layout, after)
        with TensorWriter(target, layout) as writer:
            for name in reader.layout.keys() & layout.keys():
                writer.append(name, reader.read(name))
            for done, layer in enumerate(after.moe_layers):
                on_progress("upcycling", done / len(after.moe_layers))
                _write_experts(reader, writer, layout, after, layer, noise=noise, seed=seed)


def _check_stored(path: Path, stored: Mapping[str, TensorLayout], config: ModelConfig) -> None:
    expected, found = own_tensors(config), {name: each.shape for name, each in stored.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong:
        raise CheckpointError(
            f"{path} does not fit its run's config in {', '.join(wrong[:3])}; the tensors of that model are required; "
            f"use the config.yaml that the checkpoint was written with."
        )


def _layout(stored: Mapping[str, TensorLayout], after: ModelConfig) -> dict[str, TensorLayout]:
    """Return the new model's tensors: copies as they are stored, experts in the dtype of the MLP, the rest fp32."""
    layout = {}
    for name, shape in own_tensors(after).items():
        dtype = torch.float32
        if name in stored:
            dtype = stored[name].dtype
        elif ".experts." in name:
            prefix, _, own = name.partition("moe.experts.")
            (stack,) = (each for each in _stacks(after) if each.name == own)
            dtype = common_dtype(stored[f"{prefix}mlp.{each}"].dtype for each in stack.sources)
        layout[name] = TensorLayout(dtype, shape)
    return layout


def _write_experts(
    reader: TensorReader,
    writer: TensorWriter,
    layout: Mapping[str, TensorLayout],
    config: ModelConfig,
    layer: int,
    *,
    noise: float,
    seed: int,
) -> None:
    prefix, settings = f"blocks.{layer}.feed_forward.", config.layers[layer]
    width = settings.expert_intermediate_size
    granularity = config.intermediate_size // width
    cpu = torch.device("cpu")
    matrices = 0
    for stack in _stacks(config):
        name = f"{prefix}moe.experts.{stack.name}"
        sources = [f"{prefix}mlp.{each}" for each in stack.sources]
        tensors = [require_finite(each, reader.read(each)) for each in sources]
        is_noisy = noise > 0 and tensors[0].dim() == 2
        deviations = [noise * float(each.float().std(correction=0)) if is_noisy else 0.0 for each in tensors]
        for expert in range(settings.num_experts):
            for number, (tensor, deviation) in enumerate(zip(tensors, deviations, strict=True)):
                if stack.dim is not None:
                    piece = tensor.narrow(stack.dim, expert % granularity * width, width)
                else:  # the slices' outputs add up to the MLP's, its bias once
                    piece = tensor.float() / granularity
                if is_noisy:
                    drawn = torch.empty(piece.shape)
                    drawn.normal_(
                        0.0, deviation, generator=generator(cpu, mix_seeds(seed, layer, expert, matrices + number))
                    )
                    piece = drawn.add_(piece)
                    if not is_finite(piece):
                        raise ConfigError(
                            f"noise ({noise}) makes weights of {name} that are not finite; a share of the weights' "
                            f"standard deviation is required; use {RESIDUAL_NOISE}, or 0."
                        )
                writer.append(name, piece.to(layout[name].dtype))
        matrices += len(tensors)
    router = torch.empty(layout[f"{prefix}moe.router.weight"].shape)
    router.normal_(0.0, config.init_std, generator=generator(cpu, mix_seeds(seed, layer)))
    writer.append(f"{prefix}moe.router.weight", router)
    if settings.output_scale:
        writer.append(f"{prefix}moe.output_scale", torch.zeros(()))


@torch.no_grad()
def _logit_difference(
    dense: CheckpointInfo, new: CheckpointInfo, training: TrainConfig, model: ModelConfig, tokenizer: Tokenizer
) -> float | None:
    """Return the largest difference of both models' logits on a prompt; None where the new one does not fit."""
    # Master weights in fp32, and as much again as a quarter of them for what a pass casts.
    if 5 * count_parameters(model).total > available_memory_bytes():
        return None
    tokens = torch.tensor([tokenizer.encode(PROMPT)[: model.max_positions]])
    logits = []
    for config, info in ((training.model, dense), (model, new)):
        compute_dtype = torch.bfloat16 if training.precision == "bf16" else torch.float32
        loaded = Transformer.uninitialized(config, compute_dtype=compute_dtype)
        copy_weights(loaded, info)
        loaded.eval()
        logits.append(loaded.logits(loaded(tokens).hidden))
        del loaded  # before the next one is built
    return float((logits[0] - logits[1]).abs().max())
