"""`moesaic inspect`: what a preset, a config file or a run is: layers, parameters, FLOPs, memory, progress.

A preset or a file needs no torch: every number follows from the config.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.console import open_console, print_json

if TYPE_CHECKING:
    from rich.table import Table

    from moesaic.checkpoint.store import CheckpointInfo
    from moesaic.config.model import ModelConfig
    from moesaic.config.train import TrainConfig
    from moesaic.report.model_summary import ModelSummary
    from moesaic.report.records import Metrics

# Train records read of a run's metrics; more than a terminal can show.
_MOST_RECORDS = 2000


def inspect(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="A preset, a YAML file, or a run folder (RUN or RUN@STEP).")
    ],
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a value of a preset or file; may be repeated."),
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", min=1, help="Positions that a token attends to. \\[default: the longest]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show a model's layers, parameters, active parameters, FLOPs per token and memory; of a run also its progress.

    Example: moesaic inspect pr-moe-350m-32-64 --context 1024
    """
    from moesaic.folders import split_run

    folder, _ = split_run(source)
    if folder.is_dir():
        _inspect_run(source, assignments or [], context=context, as_json=as_json)
    else:
        _inspect_config(source, assignments or [], context=context, as_json=as_json)


def _inspect_config(source: str, assignments: list[str], *, context: int | None, as_json: bool) -> None:
    from moesaic.config.load import apply_assignments, load_model_config, read_values
    from moesaic.config.train import TrainConfig
    from moesaic.report.model_summary import render_model

    values = apply_assignments(read_values(source), assignments)
    if {"model", "data", "tokens"} <= values.keys():
        # A whole training config: checked as `train` will check it, but for the data, which need not exist yet.
        data = {"path": "unnamed", **values["data"]} if isinstance(values["data"], dict) else values["data"]
        training = TrainConfig.from_dict({**values, "data": data})
        summary = _summarize_training(training, name=source, context=context)
    else:
        summary = summarize_model(load_model_config(source, assignments), name=source, context=context)
    if as_json:
        print_json({"source": source, **summary.to_json(), "model": summary.config.to_dict()})
    else:
        open_console().print(render_model(summary))


def _inspect_run(source: str, assignments: list[str], *, context: int | None, as_json: bool) -> None:
    from moesaic.checkpoint.quantized import describe_quantization, is_quantized
    from moesaic.checkpoint.store import best_checkpoint, list_checkpoints, resolve_checkpoint
    from moesaic.config.load import load_train_config
    from moesaic.errors import ConfigError
    from moesaic.folders import foreign_model, split_run
    from moesaic.report.model_summary import render_model
    from moesaic.report.summary import summarize
    from moesaic.report.terminal import render_run

    folder, at = split_run(source)
    if not (folder / "config.yaml").is_file():
        if (foreign := foreign_model(folder)) is not None:
            raise ConfigError(foreign)
        raise ConfigError(
            f"{folder} is a folder without config.yaml; a run folder written by `moesaic train`, a YAML file or a "
            f"preset is required; check the path."
        )
    if assignments:
        raise ConfigError(
            f"--set {assignments[0]} is given for the run {folder}; what a run is cannot be changed; use "
            f"`moesaic inspect {folder / 'config.yaml'} --set {assignments[0]}` to see what a change would cost."
        )
    config = load_train_config(folder / "config.yaml")
    summary = _summarize_training(config, name=str(folder), context=context)
    checkpoints = list_checkpoints(folder)
    named = resolve_checkpoint(source) if at or checkpoints else None
    metrics = _read_metrics(folder, last_step=named.step if at and named else None)
    best = best_checkpoint(checkpoints)
    if as_json:
        progress = summarize(metrics)
        print_json(
            {
                "source": source,
                **summary.to_json(),
                "model": config.model.to_dict(),
                "total_tokens": config.total_tokens,
                "total_steps": config.total_steps,
                "origin": None if not checkpoints else _origin(checkpoints[0]),
                "progress": None if progress is None else progress.to_json(),
                "checkpoint": None if named is None else named.step,
                "checkpoints": [
                    {
                        "step": info.step,
                        "path": str(info.path),
                        "bytes": _size(info),
                        "validation_loss": info.validation_loss,
                        "is_best": info == best,
                        "quantization": describe_quantization(info) if is_quantized(info) else None,
                    }
                    for info in checkpoints
                ],
            }
        )
        return
    console = open_console()
    console.print(render_model(summary))
    console.print()
    origin = _origin(checkpoints[0]) if checkpoints else None
    if origin is not None and not metrics.train:
        console.print(f"{origin}; not trained here", soft_wrap=True)
    else:
        steps = f"up to step {named.step:,}" if at and named else f"towards {config.total_steps:,} steps"
        console.print(render_run(metrics, title=f"progress {steps}"))
    console.print()
    console.print(
        _checkpoint_table(checkpoints, best=best, named=named if at else None) if checkpoints else "no checkpoint yet"
    )


def _summarize_training(config: "TrainConfig", *, name: str, context: int | None) -> "ModelSummary":
    return summarize_model(
        config.model,
        name=name,
        context=context,
        micro_batch_size=config.micro_batch_size,
        sequence_length=config.data.sequence_length,
        optimizer=config.optimizer.name,
    )


def _read_metrics(folder: Path, *, last_step: int | None) -> "Metrics":
    """Return the run's metrics, up to a step if one is given; none before training has begun."""
    from moesaic.report.records import METRICS_FILE, Metrics, read_metrics

    if not (folder / METRICS_FILE).is_file():
        return Metrics()
    metrics = read_metrics(folder, most_records=_MOST_RECORDS)
    return metrics if last_step is None else metrics.up_to(last_step)


def _checkpoint_table(
    checkpoints: "list[CheckpointInfo]", *, best: "CheckpointInfo | None", named: "CheckpointInfo | None"
) -> "Table":
    from moesaic.checkpoint.quantized import describe_quantization, is_quantized
    from moesaic.report.model_summary import describe_bytes
    from moesaic.report.tables import plain_table

    table = plain_table("checkpoint", "validation loss", "size")
    table.add_column()
    for info in checkpoints:
        loss = "" if info.validation_loss is None else f"{info.validation_loss:.4f}"
        notes = [note for note, of in (("best", best), ("last", checkpoints[-1]), ("this one", named)) if info == of]
        if is_quantized(info):
            notes.append(describe_quantization(info))
        table.add_row(info.path.name, loss, describe_bytes(_size(info)), ", ".join(notes))
    return table


def _origin(info: "CheckpointInfo") -> str | None:
    """Return what a run was made of, where that was not training."""
    from moesaic.checkpoint.quantized import KEY, describe_quantization, is_quantized
    from moesaic.report.model_summary import describe_bytes

    if is_quantized(info):
        kinds = describe_quantization(info)  # first: it refuses a manifest that does not say
        source = info.metadata[KEY].get("source")
        return f"quantised from {source}, step {info.step}: {kinds}, {describe_bytes(_size(info))} (above in bf16)"
    imported, upcycled = info.metadata.get("imported"), info.metadata.get("upcycled")
    if imported:
        return f"imported from {imported.get('path')} ({imported.get('family')})"
    return f"upcycled from {upcycled.get('source')}, step {upcycled.get('step')}" if upcycled else None


def _size(info: "CheckpointInfo") -> int:
    return sum(int(file["bytes"]) for file in info.files.values())


def summarize_model(
    config: "ModelConfig",
    *,
    name: str,
    context: int | None = None,
    micro_batch_size: int = 1,
    sequence_length: int | None = None,
    optimizer: str = "adamw",
) -> "ModelSummary":
    """Return everything that `moesaic inspect` shows of a model; context and sequence_length None: max_positions.

    Raises: ConfigError for a context beyond the model's positions.
    """
    from moesaic.errors import ConfigError
    from moesaic.plan.cost import count_parameters, flops_per_token, memory, training_flops_per_token
    from moesaic.report.model_summary import ModelSummary

    context = config.max_positions if context is None else context
    if not 1 <= context <= config.max_positions:
        raise ConfigError(
            f"context ({context}) is not from 1 to max_positions ({config.max_positions}); a token attends to itself "
            f"and to positions that the model has; use a context in that range, or raise model.max_positions."
        )
    count = count_parameters(config)
    estimate = memory(config, micro_batch_size=micro_batch_size, sequence_length=sequence_length, optimizer=optimizer)
    return ModelSummary(
        name=name,
        config=config,
        parameters=count.total,
        active_parameters=count.active,
        parts={
            "embedding": count.embedding,
            "output": 0 if count.is_tied else count.output,
            "attention": count.attention,
            "dense_mlp": count.dense_mlp,
            "experts": count.experts,
            "router": count.router,
            "norms": count.norms,
        },
        layer_parameters=tuple(layer.total for layer in count.layers),
        layer_active_parameters=tuple(layer.active for layer in count.layers),
        context=context,
        flops_per_token=flops_per_token(config, context=context),
        sequence_length=estimate.sequence_length,
        micro_batch_size=micro_batch_size,
        training_flops_per_token=training_flops_per_token(config, estimate.sequence_length),
        weights_bytes=estimate.weights_bytes,
        training_state_bytes=estimate.training_state_bytes,
        optimizer=optimizer,
        kv_cache_bytes_per_token=estimate.kv_cache_bytes_per_token,
        activation_bytes=estimate.activation_bytes,
        checkpointed_activation_bytes=estimate.checkpointed_activation_bytes,
    )
