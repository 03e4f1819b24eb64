"""A student of a teacher: its model's config, and its first weights from the teacher's layers.

Config: an eighth fewer layers, the last MoE layers' larger expert counts kept (DeepSpeed-MoE, arXiv 2201.05596, section
4.2). Weights: a layer map names the teacher's layer that each of the student's copies; where a layer has fewer experts
than the teacher's, the most loaded ones stay. The training is objective.py's business.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.quantized import require_unquantized
from moesaic.checkpoint.store import checked_file
from moesaic.checkpoint.stream import TensorReader
from moesaic.config.base import differing
from moesaic.config.model import FeedForwardConfig, ModelConfig
from moesaic.data.loader import Batch
from moesaic.distill.teacher import TeacherRun
from moesaic.errors import ConfigError
from moesaic.evaluate.validation import turns
from moesaic.model.transformer import Transformer
from moesaic.moe.experts import own_rows
from moesaic.parallel.world import World

# What may differ between a student and the teacher whose layers it copies; feed-forward parts are compared by layer.
_FREE = (
    "num_layers",
    "intermediate_size",
    "dropout",
    "init_std",
    "moe",
    "max_positions",
    "sliding_window",
    "sliding_layers",
    "rope_layers",
)


def student_model(
    teacher: ModelConfig,
    *,
    num_layers: int | None = None,
    num_experts: int | Sequence[int] | None = None,
    is_dense: bool = False,
) -> ModelConfig:
    """Return a student's model: the teacher's with an eighth fewer layers (rounded, at least one), or num_layers.

    MoE layers, windows and rotated layers stand by the teacher's pattern, and the first have the sizes of its last
    ones: 10 x 32 + 2 x 64 experts become 8 x 32 + 2 x 64. num_experts: of every MoE layer, or one count for each.
    is_dense: no experts at all.

    Raises: ConfigError for what makes no model, or a deeper one.
    """
    count = _num_layers(teacher, num_layers)
    moe = teacher.moe
    if moe is None or moe.layers is not None:
        model = model_of_layers(teacher, kept_layers(teacher, count, is_dense=is_dense))
    elif is_dense:
        model = teacher.replace(num_layers=count, moe=None, **_attention_patterns(teacher, range(count)))
    else:
        kept = _num_moe_layers(teacher, count, is_dense=False)
        changes = {
            name: value[len(value) - kept :]
            for name in ("num_experts", "top_k", "intermediate_size")
            if isinstance(value := getattr(moe, name), tuple)
        }
        patterns = _attention_patterns(teacher, range(count))
        model = teacher.replace(num_layers=count, moe=moe.replace(**changes), **patterns)
    return with_experts(model, num_experts=num_experts, is_dense=is_dense)


def with_experts(
    model: ModelConfig, *, num_experts: int | Sequence[int] | None = None, is_dense: bool = False
) -> ModelConfig:
    """Return the model with other expert counts, or dense. Raises: ConfigError for experts of a dense model."""
    if is_dense and num_experts is not None:
        raise ConfigError(f"a dense student and num_experts ({num_experts}) are both asked for; leave one out.")
    if is_dense:
        return model.replace(moe=None)
    if num_experts is None:
        return model
    if model.moe is None:
        raise ConfigError(
            f"num_experts ({num_experts}) is asked of a student whose teacher has no experts; a student has at most "
            f"its teacher's; leave it out, or upcycle the teacher first (`moesaic convert upcycle`)."
        )
    counts = num_experts if isinstance(num_experts, int) else tuple(num_experts)
    return model.replace(moe=model.moe.replace(num_experts=counts))


def kept_layers(teacher: ModelConfig, num_layers: int | None = None, *, is_dense: bool = False) -> tuple[int, ...]:
    """Return the teacher's layers that a student which starts from them keeps, in order.

    As many MoE and dense ones as `student_model` has, the MoE ones with the same sizes, evenly spread; so the first
    and the last of each kind stay. is_dense: the student has no experts, and may keep dense layers alone.

    Raises: ConfigError for a student that would have no MoE layer without being asked for.
    """
    count = _num_layers(teacher, num_layers)
    places = teacher.moe_layers
    dense = [layer for layer in range(teacher.num_layers) if layer not in places]
    num_moe = _num_moe_layers(teacher, count, is_dense=is_dense)
    num_moe = min(max(num_moe, count - len(dense)), len(places), count)
    sizes = [_sizes(teacher.layers[layer]) for layer in places]
    wanted = sizes[len(sizes) - num_moe :]
    chosen = _evenly(num_moe, len(places), lambda own, theirs: wanted[own] == sizes[theirs])
    others = _evenly(count - num_moe, len(dense), lambda own, theirs: True)
    assert chosen is not None and others is not None, (teacher.layers, count)
    return tuple(sorted([*(places[index] for index in chosen), *(dense[index] for index in others)]))


def _num_moe_layers(teacher: ModelConfig, count: int, *, is_dense: bool) -> int:
    """Return how many of a student's layers the teacher's pattern makes MoE layers: at least one, or it is refused."""
    moe = teacher.moe
    if moe is None:
        return 0
    if moe.layers is not None:
        return max(round(len(moe.layers) * count / teacher.num_layers), 0 if is_dense else 1)
    if count < moe.every and not is_dense:
        raise ConfigError(
            f"a student of {count} layers has no MoE layer (moe.every is {moe.every}); it needs one, or none at "
            f"all; use at least {moe.every} layers, or a dense student."
        )
    return count // moe.every


def model_of_layers(teacher: ModelConfig, layer_map: Sequence[int]) -> ModelConfig:
    """Return the model whose layers are these of the teacher's. Raises: ConfigError for one that it does not have."""
    _check_map(teacher, layer_map)
    if tuple(layer_map) == tuple(range(teacher.num_layers)):
        return teacher
    layers = [teacher.layers[index] for index in layer_map]
    places = tuple(index for index, layer in enumerate(layers) if layer.is_moe)
    patterns = _attention_patterns(teacher, layer_map)
    if teacher.moe is None or not places:
        return teacher.replace(num_layers=len(layers), moe=None, **patterns)
    every = teacher.moe.every
    is_pattern = teacher.moe.layers is None and places == tuple(range(every - 1, len(layers), every))
    moe = teacher.moe.replace(
        num_experts=_one_or_all([layers[index].num_experts for index in places]),
        top_k=_one_or_all([layers[index].top_k for index in places]),
        intermediate_size=None
        if teacher.moe.intermediate_size is None
        else _one_or_all([layers[index].expert_intermediate_size for index in places]),
        every=every if is_pattern else 1,
        layers=None if is_pattern else places,
    )
    return teacher.replace(num_layers=len(layers), moe=moe, **patterns)


def _attention_patterns(teacher: ModelConfig, layer_map: Sequence[int]) -> dict[str, Any]:
    """Return what a model of these layers of the teacher's says of their windows, and of whose heads are turned."""

    def places(layers: Sequence[int]) -> tuple[int, ...] | None:
        found = tuple(index for index, source in enumerate(layer_map) if source in layers)
        return None if len(found) == len(layer_map) else found

    patterns: dict[str, Any] = {}
    if teacher.sliding_layers is not None:
        patterns["sliding_layers"] = places(teacher.sliding_layers)
        if patterns["sliding_layers"] == ():
            patterns = {"sliding_window": None, "sliding_layers": None}
    if teacher.rope_layers is not None:
        patterns["rope_layers"] = places(teacher.rope_layers)
    return patterns


def default_map(teacher: ModelConfig, student: ModelConfig) -> tuple[int, ...]:
    """Return for each layer of a student the teacher's that it copies: in order, evenly spread, each of its own kind.

    With the same window and rotation where that can be. Raises: ConfigError when there is no such map.
    """

    def fits(own: int, theirs: int) -> bool:
        return _misfit(student.layers[own], teacher.layers[theirs]) is None

    def attends_alike(own: int, theirs: int) -> bool:
        is_alike = student.window_of(own) == teacher.window_of(theirs)
        return fits(own, theirs) and is_alike and student.is_rotated(own) == teacher.is_rotated(theirs)

    count, total = student.num_layers, teacher.num_layers
    found = _evenly(count, total, attends_alike) or _evenly(count, total, fits)
    if found is None:
        raise ConfigError(
            f"the student's {student.num_layers} layers ({_describe(student)}) are not, in order, like some of the "
            f"teacher's {teacher.num_layers} ({_describe(teacher)}); distill.init = teacher copies each from one of "
            f"its kind with as many experts or more; name them with distill.layer_map, or use distill.init = scratch."
        )
    return tuple(found)


def check_copyable(teacher: TeacherRun, student: ModelConfig, layer_map: Sequence[int]) -> None:
    """Raise unless a student can start from these layers of a teacher: CheckpointError, ConfigError."""
    require_unquantized(
        teacher.info,
        "distill.init = teacher copies the weights before they were rounded",
        named=f"the teacher {teacher.folder}",
        do="use scratch, or name",
    )
    model = teacher.config.model
    different = differing(student, model, before="model.", ignore=lambda key: key.split(".")[0] in _FREE)
    if different:
        raise ConfigError(
            f"{different}: not as in the teacher {teacher.folder}; distill.init = teacher copies its matrices, so "
            f"they must be of one size; leave these settings as they are, or use distill.init = scratch."
        )
    if student.positions == "learned" and student.max_positions > model.max_positions:
        raise ConfigError(
            f"model.max_positions ({student.max_positions}) is more than the teacher's {model.max_positions} learned "
            f"ones, of which distill.init = teacher copies the first; lower it, or use distill.init = scratch."
        )
    _check_map(model, layer_map)
    for index, (layer, source) in enumerate(zip(student.layers, layer_map, strict=True)):
        reason = _misfit(layer, model.layers[source])
        if reason is not None:
            raise ConfigError(
                f"layer {index} of the student cannot start from the teacher's layer {source} (distill.layer_map): "
                f"{reason}; a layer copies one of its kind and sizes, with as many experts or more; map it to another."
            )


@torch.no_grad()
def expert_loads(
    model: Transformer, batches: Iterable[Batch], *, device: torch.device, world: World | None = None
) -> dict[int, Tensor]:
    """Return for each MoE layer the tokens (E,) that each expert gets on some batches, in evaluation mode.

    The processes of a world take turns at the batches, which each of them is given.
    """
    world = world or World()
    model.eval()
    layers = model.config.moe_layers
    totals = [torch.zeros(model.config.layers[layer].num_experts, dtype=torch.int64) for layer in layers]
    for batch, is_own in turns(batches, world):
        batch = batch.to(device)
        output = model(batch.inputs, documents=batch.documents)
        if is_own:
            for total, statistics in zip(totals, output.moe, strict=True):
                total += statistics.tokens_per_expert.cpu()
    return dict(zip(layers, world.sum(totals), strict=True))


def has_fewer_experts(teacher: ModelConfig, student: ModelConfig, layer_map: Sequence[int]) -> bool:
    """Whether some layer leaves experts of its teacher's layer out, so that their loads must be known."""
    return any(
        teacher.layers[source].is_moe and _num_kept(layer, teacher.layers[source]) < teacher.layers[source].num_experts
        for layer, source in zip(student.layers, layer_map, strict=True)
    )


@dataclass(frozen=True)
class CopiedLayer:
    """Where a layer of the student came from; experts: of the teacher's layer, and the share of its routes they had.

    None where all stayed, or there were none.
    """

    source: int
    experts: tuple[int, ...] | None
    load: float | None

    def to_json(self) -> dict[str, Any]:
        return {"layer": self.source, "experts": self.experts, "load": self.load}


@torch.no_grad()
def copy_layers(
    model: Transformer, teacher: TeacherRun, layer_map: Sequence[int], *, loads: Mapping[int, Tensor]
) -> tuple[CopiedLayer, ...]:
    """Copy embeddings, the final norm and, for every layer, all of the teacher's layer that the map names.

    loads: tokens per expert of the teacher's layers that have more experts than the student's; the most loaded stay, in
    their order, with their rows of the router. A dense layer takes the teacher's MLP, dense or residual; where that
    has experts alone, the most loaded one. A model whose experts are spread over processes takes its own of each layer.

    Raises: as `check_copyable`, and CheckpointError when the file is corrupt.
    """
    check_copyable(teacher, model.config, layer_map)
    theirs = teacher.config.model
    copied = []
    for layer, source in zip(model.config.layers, layer_map, strict=True):
        total, kept = theirs.layers[source].num_experts, _num_kept(layer, theirs.layers[source])
        if kept in (0, total):
            copied.append(CopiedLayer(source, None, None))
            continue
        load = loads[source].double()
        ids = sorted(load.argsort(descending=True, stable=True)[:kept].tolist())
        copied.append(CopiedLayer(source, tuple(ids), float(load[ids].sum() / load.sum().clamp_min(1))))
    rows = own_rows(model)
    with checked_file(teacher.info, "model") as path, TensorReader(path) as reader:
        for name, tensor in model.state_dict().items():
            whole = _source_of(name, reader, model.config, theirs, copied)
            tensor.copy_(whole[rows[name][0]] if name in rows else whole)
    return tuple(copied)


def _source_of(
    name: str, reader: TensorReader, student: ModelConfig, teacher: ModelConfig, copied: Sequence[CopiedLayer]
) -> Tensor:
    """Return the teacher's numbers for one tensor of the student."""
    if not name.startswith("blocks."):
        tensor = reader.read(name)
        return tensor[: student.max_positions] if name == "position_embedding" else tensor
    _, number, rest = name.split(".", 2)
    layer = copied[int(number)]
    theirs = teacher.layers[layer.source]
    prefix = f"blocks.{layer.source}."
    if rest.startswith("feed_forward.mlp.") and theirs.intermediate_size == 0:
        (expert,) = layer.experts or (0,)
        return _expert_as_mlp(reader, f"{prefix}feed_forward.moe.experts.", rest.split(".", 2)[2], expert, theirs)
    tensor = reader.read(prefix + rest)
    is_by_expert = rest.startswith(("feed_forward.moe.experts.", "feed_forward.moe.router."))
    return tensor[list(layer.experts)] if is_by_expert and layer.experts is not None else tensor


def _expert_as_mlp(reader: TensorReader, prefix: str, name: str, expert: int, theirs: FeedForwardConfig) -> Tensor:
    """Return a tensor of a dense MLP (gate_proj.weight, ...) from an expert, whose gate and up stand in one matrix."""
    matrix, kind = name.split(".")
    suffix = "proj" if kind == "weight" else "bias"
    if matrix == "down_proj":
        return reader.read(f"{prefix}down_{suffix}", expert)
    if f"{prefix}gate_up_{suffix}" not in reader.layout:
        return reader.read(f"{prefix}up_{suffix}", expert)
    stacked = reader.read(f"{prefix}gate_up_{suffix}", expert)
    width = theirs.expert_intermediate_size
    return stacked[:width] if matrix == "gate_proj" else stacked[width:]


def _num_kept(layer: FeedForwardConfig, source: FeedForwardConfig) -> int:
    """How many experts of its source a layer takes."""
    if layer.is_moe or not source.is_moe:
        return layer.num_experts
    return 0 if source.intermediate_size else 1


def _misfit(layer: FeedForwardConfig, source: FeedForwardConfig) -> str | None:
    """Why a layer cannot start from a teacher's, None where it can."""
    if not layer.is_moe:
        width = source.intermediate_size or source.expert_intermediate_size
        return None if layer.intermediate_size == width else f"its MLP is {layer.intermediate_size} wide, there {width}"
    if not source.is_moe:
        return "it has experts, and that one is dense"
    if layer.num_experts > source.num_experts:
        return f"it has {layer.num_experts} experts, and that one {source.num_experts}"
    for name in ("expert_intermediate_size", "intermediate_size", "residual", "output_scale"):
        own, theirs = getattr(layer, name), getattr(source, name)
        if own != theirs:
            return f"its {name} is {own}, there {theirs}"
    for name in ("score_correction_bias", "bias"):
        if getattr(layer.router, name) != getattr(source.router, name):
            return f"one has a router with {name} and the other none"
    return None


def _sizes(layer: FeedForwardConfig) -> tuple[int, int, int]:
    return layer.num_experts, layer.top_k, layer.expert_intermediate_size


def _num_layers(teacher: ModelConfig, num_layers: int | None) -> int:
    total = teacher.num_layers
    count = total - max(1, (total + 4) // 8) if num_layers is None else num_layers
    if not 1 <= count <= total:
        raise ConfigError(
            f"the student would have {count} layers; from 1 to the teacher's {total} are possible; give another number "
            f"(--layers), or a model of your own (--student)."
        )
    return count


def _check_map(teacher: ModelConfig, layer_map: Sequence[int]) -> None:
    wrong = [index for index in layer_map if not 0 <= index < teacher.num_layers]
    if wrong or not layer_map:
        raise ConfigError(
            f"distill.layer_map names layer {wrong[0] if wrong else 'none'}; the teacher's are 0 to "
            f"{teacher.num_layers - 1}; name these."
        )


def _evenly(count: int, total: int, fits: Callable[[int, int], bool]) -> list[int] | None:
    """Return rising indices below total for 0 .. count - 1, each fitting, as near to evenly spread as there are.

    The first and the last stay where they fit. None when there are none.
    """
    if count == 0:
        return []
    step = (total - 1) / (count - 1) if count > 1 else 0.0
    cost = [0.0 if fits(0, place) else math.inf for place in range(total)]
    cost = [each + place**2 for place, each in enumerate(cost)]
    previous: list[list[int]] = []
    for own in range(1, count):
        best, best_place = math.inf, -1
        now, back = [], []
        for place in range(total):
            now.append(best + (place - own * step) ** 2 if fits(own, place) else math.inf)
            back.append(best_place)
            if cost[place] < best:
                best, best_place = cost[place], place
        cost, previous = now, [*previous, back]
    place = min(range(total), key=lambda each: cost[each])
    if cost[place] == math.inf:
        return None
    found = [place]
    for back in reversed(previous):
        found.append(back[found[-1]])
    return found[::-1]


def _one_or_all(values: list[int]) -> int | tuple[int, ...]:
    return values[0] if len(set(values)) == 1 else tuple(values)


def _describe(model: ModelConfig) -> str:
    return ", ".join(str(layer.num_experts) if layer.is_moe else "dense" for layer in model.layers)
