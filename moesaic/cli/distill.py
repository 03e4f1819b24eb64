"""`moesaic distill`."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.console import open_console, print_json
from moesaic.cli.lists import expert_counts
from moesaic.cli.start import loading_modules
from moesaic.cli.training import one_of_several, print_end, print_run, result_values, run_shown

if TYPE_CHECKING:
    from moesaic.config.train import TrainConfig
    from moesaic.distill.latency import Ratio
    from moesaic.distill.report import DistillationReport
    from moesaic.parallel.world import World


def distill(
    teacher: Annotated[str, typer.Argument(metavar="TEACHER", help="RUN (its best checkpoint) or RUN@step.")],
    output: Annotated[Path, typer.Argument(metavar="STUDENT_RUN", help="The student's run folder.")],
    data: Annotated[Path | None, typer.Option(help="Prepared shards; the same as --set data.path=DIR.")] = None,
    student: Annotated[
        str | None,
        typer.Option(
            "--student",
            metavar="CONFIG",
            help="A preset, YAML file or run with the student's model and settings. \\[default: the teacher's, with an "
            "eighth fewer layers]",
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option("--layers", metavar="N", help="Layers of the student.")] = None,
    experts: Annotated[
        str | None,
        typer.Option("--experts", metavar="N", help="Of every MoE layer, or one count for each: 8 or 4,4,8."),
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="A student without experts.")] = False,
    init: Annotated[
        str | None, typer.Option("--init", help="scratch, or teacher: from its layers. \\[default: scratch]")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option("--schedule", help="none, throughout, staged, linear or automatic. \\[default: staged]"),
    ] = None,
    cache: Annotated[
        Path | None,
        typer.Option(
            "--cache",
            metavar="DIR",
            help="Read the teacher's predictions from here; they are written first where there are none.",
        ),
    ] = None,
    cache_top_k: Annotated[
        int | None, typer.Option("--cache-top-k", metavar="K", help="Tokens of each position in it. \\[default: 64]")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="a.b=VALUE, as often as needed; distill.alpha=0.5, for example.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run's last good checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON, and no progress.")] = False,
) -> None:
    """Train a smaller student of a trained run, which also learns from the teacher's predictions.

    The default is the paper's Mixture-of-Students: an eighth fewer layers, and the teacher's part of the loss ends
    after 70 % of the tokens. The student is a run like any other; Ctrl-C saves, --resume goes on.

    On several GPUs or machines: torchrun --nproc-per-node 8 -m moesaic distill ...

    Example: moesaic distill runs/first runs/student --data shards/ --set tokens=2e6
    """
    with loading_modules():
        from moesaic.config.load import with_options
        from moesaic.distill.report import try_report
        from moesaic.distill.run import make_trainer, resumed_config, student_config
        from moesaic.errors import ConfigError
        from moesaic.report.terminal import TrainingDisplay
        from moesaic.train.loop import check_processes, refuse_taken

    options = {
        "data.path": ("--data", data),
        "distill.init": ("--init", init),
        "distill.schedule": ("--schedule", schedule),
        "distill.cache": ("--cache", cache),
    }
    with one_of_several() as world:
        with world.together():
            settings = with_options(assignments or [], options)
            is_there = resume and (output / "config.yaml").is_file()
            make_config = partial(resumed_config, output) if is_there else student_config
            config = make_config(
                teacher,
                settings,
                student=student,
                num_layers=layers,
                num_experts=None if experts is None else expert_counts(experts),
                is_dense=dense,
            )
            check_processes(config, world)  # now, and not when a cache has been written
            if not resume:
                refuse_taken(output)
            has_cache = config.distill is not None and config.distill.cache is not None
            if cache_top_k is not None and not has_cache:
                raise ConfigError(
                    f"--cache-top-k ({cache_top_k}) is given without a cache; it says how many tokens one keeps; give "
                    f"--cache DIR too, or leave it out."
                )
        is_quiet = as_json or not world.is_main
        if has_cache:
            _write_cache(config, cache_top_k, device, world, resumed=output if resume else None, is_quiet=is_quiet)
        display = None if is_quiet else TrainingDisplay(total_tokens=config.total_tokens, title="distilling")
        result = run_shown(make_trainer(config, output, device=device, resume=resume, display=display), display)
    if not world.is_main:
        return
    if not as_json:
        print_end(result)
    report = None if result.stopped_by else try_report(output, device=device)
    if as_json:
        print_json({**result_values(result), "report": None if report is None else report.to_json()})
        return
    if report is not None:
        _print(report)
    print_run(result)


def _write_cache(
    config: "TrainConfig", top_k: int | None, device: str, world: "World", *, resumed: Path | None, is_quiet: bool
) -> None:
    """Write the cache where there is none, or finish it, and say what it costs and loses."""
    from moesaic.cli.progress import shown_progress
    from moesaic.distill.run import write_needed_cache
    from moesaic.logs import no_progress

    assert config.distill is not None and config.distill.cache is not None
    with world.together():
        own_device = world.device(device)
    shown = shown_progress(kept="the same command goes on from here") if world.is_main else nullcontext(no_progress)
    with shown as show:
        report = write_needed_cache(config, resumed, top_k=top_k, device=own_device, on_progress=show, world=world)
    if report is not None and not is_quiet:
        typer.echo(
            f"Cached teacher {config.distill.cache}: {report.top_k} tokens of each of {report.num_windows:,} windows, "
            f"{report.num_bytes / 1e6:,.1f} MB ({report.bytes_per_token:.0f} bytes per token); "
            f"{report.rest:.2%} of the probability is in the rest, the divergence {report.approximation_kl:.4f} nats "
            f"too low for a student that knows nothing of it."
        )


def _print(report: "DistillationReport") -> None:
    from moesaic.report.quantities import short_number
    from moesaic.report.tables import plain_table

    teacher, student = report.teacher, report.student
    table = plain_table("", "teacher", "student", "student / teacher")

    def add(name: str, theirs: float, own: float, show: Callable[[float], str], ratio: "Ratio | None" = None) -> None:
        if ratio is None:
            quotient = f"{own / theirs:.3f}" if theirs else "-"
        else:  # what the rounds do not agree on is no number
            quotient = f"{ratio.median:.3f}" if ratio.is_clear else f"{ratio.low:.2f} to {ratio.high:.2f}"
        table.add_row(name, show(theirs), show(own), quotient)

    add("parameters", teacher.parameters, student.parameters, short_number)
    add("active per token", teacher.active_parameters, student.active_parameters, short_number)
    add("validation loss, nats per token", teacher.validation_loss, student.validation_loss, lambda x: f"{x:.4f}")
    prompt = f"prompt of {report.prompt_tokens} tokens, ms"
    for name, theirs, own, ratio in (
        (prompt, teacher.prefill_seconds, student.prefill_seconds, report.prefill_ratio),
        ("a token after it, ms", teacher.decode_seconds, student.decode_seconds, report.decode_ratio),
    ):
        add(name, theirs, own, lambda x: f"{1000 * x:.2f}", ratio)
    for name, score in teacher.tasks.items():
        if name in student.tasks:
            add(f"{name} ({score.metric})", score.value, student.tasks[name].value, lambda x: f"{x:.4g}")
    console = open_console()
    console.print(table)
    kept = report.perplexity_retention
    times = f"{1 / kept:.3f}" if kept else "more than 1e300"
    summary = f"The student's perplexity is {times} times the teacher's"
    if report.task_retention is not None:
        summary += f"; it keeps {report.task_retention:.1%} of its mean task score"
    console.print(f"{summary}.", soft_wrap=True, highlight=False)
