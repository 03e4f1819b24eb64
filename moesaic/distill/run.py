"""A student's run: its config from a teacher's, and the training of it. The loop itself is train/'s."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moesaic.checkpoint.store import CheckpointInfo, list_checkpoints
from moesaic.config.base import differing
from moesaic.config.distill import DistillConfig
from moesaic.config.load import apply_assignments, load_train_config, merge, read_values, run_folder_of, text_assignment
from moesaic.config.model import ModelConfig
from moesaic.config.train import TrainConfig
from moesaic.distill.cache import DEFAULT_TOP_K, CacheReport, write_cache
from moesaic.distill.objective import Distillation, DistillationState, check_cache_top_k
from moesaic.distill.student import default_map, kept_layers, model_of_layers, student_model, with_experts
from moesaic.distill.teacher import TeacherRun
from moesaic.errors import ConfigError
from moesaic.logs import OnProgress
from moesaic.parallel.world import World
from moesaic.train.loop import Display, Trainer, TrainResult


def distill(
    config: TrainConfig,
    run_folder: str | Path,
    *,
    device: str = "auto",
    resume: bool = False,
    display: Display | None = None,
) -> TrainResult:
    """Train a student as config says, into run_folder; with resume, go on from its last good checkpoint.

    Of several processes each calls it, as it would `train`; the experts of teacher and student are spread over them.

    Raises: as `train` does, and ConfigError for a config without a distill section.
    """
    return make_trainer(config, run_folder, device=device, resume=resume, display=display).run()


def student_config(
    teacher: str | Path,
    assignments: Sequence[str] = (),
    *,
    student: str | Path | None = None,
    num_layers: int | None = None,
    num_experts: int | Sequence[int] | None = None,
    is_dense: bool = False,
) -> TrainConfig:
    """Return the config of a student of the run that RUN or RUN@step names, with `--set` assignments applied.

    Its settings are the teacher's, and its model is one with fewer layers (student.py), or experts, or dense; with
    distill.init = teacher the model is made of the teacher's layers that it starts from, in their order. student: a
    preset, a YAML file or a run, of which it takes model and settings instead.

    Raises: ConfigError, CheckpointError.
    """
    run = TeacherRun.open(teacher)
    section: dict[str, Any] = {"teacher": str(teacher)}
    if student is not None:
        if num_layers is not None or num_experts is not None or is_dense:
            raise ConfigError(
                f"a student of its own config ({student}) is given together with layers, experts or dense, which "
                f"change the teacher's; one of the two makes the model; leave one out."
            )
        values = _values_of(student)
        values["distill"] = merge(values.get("distill") or {}, section)
    else:
        values = {**run.config.to_dict(), "distill": section}
    asked = apply_assignments(values, assignments)["distill"]
    if not isinstance(asked, dict):
        raise ConfigError(f"distill is set to {asked!r}; a section with keys is required; set distill.KEY=VALUE.")
    if student is None:
        if asked.get("init") == "teacher":
            section["layer_map"] = _layer_map(run, asked.get("layer_map"), num_layers, is_dense)
            model = with_experts(
                model_of_layers(run.config.model, section["layer_map"]), num_experts=num_experts, is_dense=is_dense
            )
        else:
            model = student_model(run.config.model, num_layers=num_layers, num_experts=num_experts, is_dense=is_dense)
        values["model"] = model.to_dict()
        if run.config.micro_batch_size == run.config.batch_size:
            values["micro_batch_size"] = None  # it was derived, and is again when --set changes the batch
    values["init_from"] = None
    data = values.get("data")
    if asked.get("cache") is not None and isinstance(data, dict):
        # A run's config has every key, also those that nobody gave; what a file says is meant, and may be an error.
        is_file = student is not None and run_folder_of(student) is None
        values["data"] = {"fixed_windows": True, **data} if is_file else {**data, "fixed_windows": True}
    config = TrainConfig.from_dict(apply_assignments(values, assignments))
    assert config.distill is not None
    if config.distill.init == "teacher" and config.distill.layer_map is None:
        layer_map = default_map(run.config.model, config.model)
        config = config.replace(distill=config.distill.replace(layer_map=layer_map))
    return config


def resumed_config(
    run_folder: str | Path,
    teacher: str | Path,
    assignments: Sequence[str] = (),
    *,
    student: str | Path | None = None,
    num_layers: int | None = None,
    num_experts: int | Sequence[int] | None = None,
    is_dense: bool = False,
) -> TrainConfig:
    """Return the config that a resumed student goes on with: its own, with `--set` assignments applied.

    What the teacher's config says by now is nothing to it. What chose its model when it began (student, num_layers,
    num_experts, is_dense) may be given again, and has to agree.

    Raises: ConfigError.
    """
    teacher_is = text_assignment("distill.teacher", teacher)
    config = load_train_config(Path(run_folder) / "config.yaml", [*assignments, teacher_is, "init_from=null"])
    model = config.model
    counts = [model.layers[layer].num_experts for layer in model.moe_layers]
    differs = []
    if num_layers not in (None, model.num_layers):
        differs.append(f"layers ({num_layers}, there {model.num_layers})")
    if num_experts is not None:
        asked = [num_experts] * len(counts) if isinstance(num_experts, int) else list(num_experts)
        if asked != counts or not counts:
            differs.append(f"experts ({num_experts}, there {counts or 'none'})")
    if is_dense and counts:
        differs.append(f"dense (there are {counts} experts)")
    if student is not None:
        given = ModelConfig.from_dict(
            apply_assignments(_values_of(student), assignments).get("model") or {}, path="model"
        )
        different = differing(given, model, before="model.", after=f" of {student}")
        if different:
            differs.append(different)
    if differs:
        raise ConfigError(
            f"{', '.join(differs)}: not as in {Path(run_folder) / 'config.yaml'}; a resumed student keeps its "
            f"model; leave the options that make one out, or start a new run in another folder."
        )
    return config


def write_needed_cache(
    config: TrainConfig,
    resumed: str | Path | None,
    *,
    top_k: int | None,
    device: torch.device,
    on_progress: OnProgress,
    world: World | None = None,
) -> CacheReport | None:
    """Write the cache of a student's config, or finish it; resumed: the folder of a run that is gone on with.

    None where a resumed run needs its teacher no more. The processes of a world share the work. Raises: as write_cache
    does, and ConfigError for a resumed run that began with another top_k, or without a cache.
    """
    assert config.distill is not None and config.distill.cache is not None
    world = world or World()
    folder = config.distill.cache
    with world.together():
        infos = [] if resumed is None else list_checkpoints(Path(resumed))
        if infos:
            assert resumed is not None
            resumption = _cache_of_resumed(config, Path(resumed), infos[-1], top_k)
            if resumption is None:
                return None
            config, top_k = resumption
    return write_cache(folder, config, top_k=top_k, device=device, on_progress=on_progress, world=world)


def _cache_of_resumed(
    config: TrainConfig, run_folder: Path, info: CheckpointInfo, top_k: int | None
) -> tuple[TrainConfig, int | None] | None:
    """Return the config, with the very teacher, and the top_k of the cache that a checkpoint's run goes on with.

    None where it needs its teacher no more.
    """
    assert config.distill is not None
    objective = info.metadata.get("objective")
    if not objective:
        raise ConfigError(
            f"{run_folder} was not distilled; what is resumed is the run of a student; name that one, or a new folder "
            f"and leave --resume out."
        )
    state = DistillationState(**objective)
    if not state.needs_teacher(config, info.metadata["tokens"]):
        return None
    top_k = state.cache_top_k if top_k is None else top_k
    check_cache_top_k(DEFAULT_TOP_K if top_k is None else top_k, state.cache_top_k)
    run = TeacherRun.reopen(config.distill.teacher, run_folder, sha256=state.teacher_sha256, step=state.teacher_step)
    return config.replace(distill=config.distill.replace(teacher=run.info.run_at_step)), top_k


def _values_of(student: str | Path) -> dict[str, Any]:
    folder = run_folder_of(student)
    return read_values(student if folder is None else folder / "config.yaml")


def _layer_map(run: TeacherRun, given: Any, num_layers: int | None, is_dense: bool) -> tuple[int, ...]:
    """Return the teacher's layers that the student is made of."""
    if given is None:
        return kept_layers(run.config.model, num_layers, is_dense=is_dense)
    layer_map = DistillConfig(teacher="-", init="teacher", layer_map=given).layer_map or ()
    if num_layers is not None and num_layers != len(layer_map):
        raise ConfigError(
            f"{num_layers} layers are asked for and distill.layer_map names {len(layer_map)}; both say how many the "
            f"student has; leave one out."
        )
    return layer_map


def make_trainer(
    config: TrainConfig, run_folder: str | Path, *, device: str, resume: bool, display: Display | None
) -> Trainer:
    """Return the trainer of a student, everything checked."""
    if config.distill is None:
        raise ConfigError(
            "the config has no distill section; a student needs a teacher; set distill.teacher, or train without one: "
            "`moesaic train`."
        )
    return Trainer(
        config, Path(run_folder), device=device, resume=resume, display=display, objective=Distillation(config)
    )
