"""`moesaic evaluate`: how well runs predict a text, solve tasks, and share domains among their experts."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.console import open_console, print_json
from moesaic.cli.progress import shown_progress
from moesaic.cli.start import loading_modules
from moesaic.errors import ConfigError
from moesaic.logs import logger

if TYPE_CHECKING:
    from moesaic.evaluate.domains import DomainUsage, LayerDomains
    from moesaic.evaluate.perplexity import Perplexity
    from moesaic.model.load import LoadedModel, Precision
    from moesaic.report.evaluations import TaskResult


def evaluate(
    runs: Annotated[list[str], typer.Argument(metavar="RUN", help="RUN (its best checkpoint) or RUN@step.")],
    text: Annotated[
        Path | None,
        typer.Option(
            "--text",
            metavar="PATH",
            help="A text (.txt, .md, .jsonl, .parquet), a folder of them, or shards written by `moesaic prepare`, of "
            "which the validation split is taken.",
        ),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option("--window", help="Of --text: tokens that are seen at once. \\[default: as in training]"),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option("--stride", help="Of --text: tokens from one window to the next. \\[default: half a window]"),
    ] = None,
    limit_tokens: Annotated[
        int | None, typer.Option("--limit-tokens", help="Of --text: measure so many at most.")
    ] = None,
    documents: Annotated[
        bool | None,
        typer.Option("--documents/--no-documents", help="Of --text: keep documents apart. \\[default: as in training]"),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Tasks of the evaluation harness, comma-separated: lambada, piqa, boolq, race_h, triviaqa, webqs "
            "(all six: paper), arc_easy, arc_challenge, hellaswag, winogrande, blimp, wikitext2, or YAML files.",
        ),
    ] = None,
    tasks_data: Annotated[
        Path | None,
        typer.Option(
            "--tasks-data", metavar="DIR", help="The folder with the tasks' records. \\[default: the Hugging Face hub]"
        ),
    ] = None,
    shots: Annotated[int, typer.Option("--shots", help="Of --tasks: solved examples before each question.")] = 0,
    limit: Annotated[int | None, typer.Option("--limit", help="Of --tasks: only so many records of each.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Of --tasks: questions as messages, by the tokenizer's chat template.")
    ] = False,
    samples: Annotated[
        bool, typer.Option("--samples", help="Of --tasks: keep what became of each record, beside the results.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="PNG",
            help="Of --tasks: where to draw. \\[default: plots/evaluations.png of the first run]",
        ),
    ] = None,
    domains: Annotated[
        Path | None,
        typer.Option(
            "--domains", metavar="JSONL", help="Labelled text: which experts serve which labels, against chance."
        ),
    ] = None,
    domain_field: Annotated[
        str | None,
        typer.Option(
            "--domain-field", metavar="NAME", help="Of --domains: the field with the label. \\[default: domain]"
        ),
    ] = None,
    text_field: Annotated[
        str | None,
        typer.Option(
            "--text-field",
            metavar="NAME",
            help="Of --text (JSONL, parquet) and --domains: the field with the text. \\[default: text]",
        ),
    ] = None,
    domain_documents: Annotated[
        int | None, typer.Option("--domain-documents", min=1, help="Of --domains: so many of each label at most.")
    ] = None,
    fp32: Annotated[bool, typer.Option("--fp32", help="Compute in fp32, whatever the run computes in.")] = False,
    keep: Annotated[
        bool, typer.Option("--keep/--no-keep", help="Keep results and plots of tasks and domains in the run's folder.")
    ] = True,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line for each result, and no table.")] = False,
) -> None:
    """Measure runs, and compare them: a text's perplexity and bits per byte, tasks, experts by domain.

    Of a text, every token is predicted once, with at least window - stride tokens before it, where the text has them.

    Example: moesaic evaluate runs/first runs/second --tasks lambada,piqa --tasks-data eval --limit 200
    """
    with loading_modules():
        from moesaic.data.sources import TEXT_FIELD
        from moesaic.evaluate.batched import BatchedScorer
        from moesaic.evaluate.domains import require_experts
        from moesaic.evaluate.perplexity import measure_perplexity, text_windows, window_length
        from moesaic.evaluate.run import TaskSettings, run_domains, run_tasks
        from moesaic.logs import OnProgress, log_to_stderr
        from moesaic.model.load import load_run, load_run_config, resolve_run
        from moesaic.report.evaluations import check_results_can_be_kept
        from moesaic.serve.scorer import EngineScorer

    _check_options(
        text=(
            text,
            {
                "window": window,
                "stride": stride,
                "limit-tokens": limit_tokens,
                "documents": documents,
                "text-field": text_field if domains is None else None,
            },
        ),
        tasks=(
            tasks,
            {
                "tasks-data": tasks_data,
                "shots": shots or None,
                "limit": limit,
                "chat": chat or None,
                "samples": samples or None,
                "plot": plot,
            },
        ),
        domains=(domains, {"domain-field": domain_field, "domain-documents": domain_documents}),
    )
    if samples and not keep:
        raise ConfigError(
            "--samples was given with --no-keep; samples are kept beside the results; leave one of them out."
        )
    if plot is not None:
        from moesaic.report.drawing import check_figure_path

        check_figure_path(plot)
    settings = None
    if tasks is not None:
        settings = TaskSettings(tasks, data=tasks_data, shots=shots, limit=limit, use_chat=chat)
    log_to_stderr()
    precision: Precision | None = "fp32" if fp32 else None
    is_kept = keep and (tasks or domains) is not None
    for run in runs:  # a mistake in the last should not cost what the first has taken
        info = resolve_run(run, pack=not fp32, precision=precision)
        config = load_run_config(info.run_folder)
        if text is not None:
            window_length(config, window)
        if domains is not None:
            require_experts(config.model)
        if is_kept:
            check_results_can_be_kept(info.run_folder, info.step)
    texts: list[tuple[str, Perplexity]] = []
    results: list[TaskResult] = []
    usages: list[tuple[str, DomainUsage]] = []
    folder: Path | None = None

    def take(result: "TaskResult") -> None:
        results.append(result)
        if as_json:
            print_json(result.to_json())

    def measure(run: str, progress: OnProgress) -> Path:
        """Measure one run, return its folder, and keep nothing of it in memory."""
        loaded = load_run(run, device=device, pack=not fp32, precision=precision)
        if text is not None:
            windows = text_windows(
                loaded, text, window=window, stride=stride, limit_tokens=limit_tokens, apart=documents,
                text_field=text_field or TEXT_FIELD,
            )  # fmt: skip
            found = measure_perplexity(loaded.model, windows, device=loaded.device)
            if not math.isfinite(found.loss):
                logger.warning(
                    "%s gives no finite numbers: its loss is %s. Its weights, their packed file or the arithmetic are "
                    "broken; use another step, or delete the checkpoint's packed-*.safetensors, which are made again.",
                    run, found.loss,
                )  # fmt: skip
            texts.append((run, found))
            if as_json:
                print_json(_text_to_json(run, loaded, text, found))
        if settings is not None:
            scorer = EngineScorer(loaded.model, loaded.tokenizer, BatchedScorer(loaded.model))
            run_tasks(
                run, loaded, settings, scorer=scorer, keep=keep, keep_samples=samples, progress=progress,
                on_result=take,
            )  # fmt: skip
        if domains is not None:

            def take_usage(usage: "DomainUsage") -> None:
                usages.append((run, usage))
                if as_json:
                    print_json(_domains_to_json(run, loaded, usage))

            run_domains(
                run, loaded, domains, label_field=domain_field or "domain", text_field=text_field or TEXT_FIELD,
                most_documents=domain_documents, keep=keep, progress=progress, on_result=take_usage,
            )  # fmt: skip
        return loaded.info.run_folder

    kept = "what was finished is in the runs' folders" if is_kept else "nothing was written"
    try:
        with shown_progress(kept=kept) as progress:
            for run in runs:
                run_folder = measure(run, progress)
                folder = folder or run_folder
    finally:  # what has been measured is shown whatever became of the rest
        if not as_json:
            _print_tables(texts, results, usages, text=text, domains=domains)
    if results and (plot is not None or keep):
        from moesaic.report.evaluation_plots import write_comparison

        assert folder is not None
        drawn = write_comparison(results, plot or folder / "plots" / "evaluations.png")
        if not as_json:
            typer.echo(f"Drawn in {drawn}")


def _check_options(**groups: tuple[object, dict[str, object]]) -> None:
    """Raise ConfigError where nothing is asked for, or an option of something that is not."""
    for name, (asked, options) in groups.items():
        given = [f"--{option}" for option, value in options.items() if value is not None]
        if asked is None and given:
            raise ConfigError(
                f"{given[0]} was given without --{name}; it says how that is done, and has no effect alone; give "
                f"--{name} too, or leave it out."
            )
    if all(asked is None for asked, _ in groups.values()):
        raise ConfigError(
            "nothing to evaluate was given; one of --text, --tasks and --domains is required; try --tasks lambada."
        )


def _text_to_json(run: str, loaded: "LoadedModel", text: Path, result: "Perplexity") -> dict[str, Any]:
    return {
        "run": run,
        "step": loaded.info.step,
        "text": str(text),
        "loss": result.loss,
        "perplexity": result.perplexity,
        "bits_per_byte": result.bits_per_byte,
        "tokens": result.num_tokens,
        "bytes": result.num_bytes,
        "documents": result.num_documents,
        "window": result.window,
        "stride": result.stride,
    }


def _domains_to_json(run: str, loaded: "LoadedModel", usage: "DomainUsage") -> dict[str, Any]:
    from moesaic.evaluate.domains import domains_to_json

    return {"run": run, "step": loaded.info.step, **domains_to_json(usage)}


def _print_tables(
    texts: "Sequence[tuple[str, Perplexity]]",
    results: "Sequence[TaskResult]",
    usages: "Sequence[tuple[str, DomainUsage]]",
    *,
    text: Path | None,
    domains: Path | None,
) -> None:
    from moesaic.report.quantities import measured
    from moesaic.report.tables import plain_table

    console = open_console()
    if texts:
        rows: list[tuple[str, Callable[[Perplexity], str]]] = [
            ("perplexity", lambda result: measured(result.perplexity, 3)),
            ("bits per byte", lambda result: f"{result.bits_per_byte:.4f}"),
            ("loss, nats per token", lambda result: f"{result.loss:.4f}"),
            ("tokens predicted", lambda result: f"{result.num_tokens:,}"),
            ("bytes of text", lambda result: f"{result.num_bytes:,}"),
            ("documents", lambda result: f"{result.num_documents:,}"),
            ("window, stride", lambda result: f"{result.window}, {result.stride}"),
        ]
        table = plain_table("", *(run for run, _ in texts), show_header=len(texts) > 1)
        for name, show in rows:
            table.add_row(name, *(show(result) for _, result in texts))
        runs = "the runs predict" if len(texts) > 1 else f"{texts[0][0]} predicts"
        console.print(f"How {runs} {text}", soft_wrap=True)
        console.print(table)
    if results:
        from moesaic.report.evaluations import comparison, run_name

        names = list(dict.fromkeys(run_name(result) for result in results))
        records = {result.label: result.num_records for result in results}
        table = plain_table("task", "metric", "records", *names, left=2)
        for label, metric, cells in comparison(results):
            shown = [_cell(None if each is None else (each.value, each.standard_error)) for each in cells]
            table.add_row(label, metric, f"{records[label]:,}", *shown)
        console.print(table)
    for run, usage in usages:
        table = plain_table("layer", "experts", "bits", "by chance", "up to", "what tells most")
        for each in usage.layers:
            table.add_row(
                str(each.layer),
                str(each.routes.shape[1]),
                f"{each.information_bits:.4f}",
                f"{each.chance_bits:.4f}",
                f"{each.chance_bits_high:.4f}",
                _most_own(usage, each) if each.is_beyond_chance else "no more than chance",
            )
        count = sum(usage.num_documents)
        console.print(f"{run}: what the expert tells of the domain in {domains}, {count:,} documents", soft_wrap=True)
        console.print(table)


def _cell(found: tuple[float, float | None] | None) -> str:
    if found is None:
        return "-"
    from moesaic.report.quantities import measured

    value, error = found
    return measured(value, 4) if error is None else f"{measured(value, 4)} ± {measured(error, 4)}"


def _most_own(usage: "DomainUsage", layer: "LayerDomains") -> str:
    """Name the domain and the expert that tell most of each other."""
    relative = layer.shares / layer.shares.mean(0).clip(min=1e-9)
    domain, expert = divmod(int(layer.contributions.argmax()), relative.shape[1])
    return f"{usage.domains[domain]}: expert {expert}, {relative[domain, expert]:.1f} times the mean"
