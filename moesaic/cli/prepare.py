"""`moesaic prepare`: text into token shards. Parses, calls moesaic.data.prepare and prints."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.console import open_console, print_json
from moesaic.cli.progress import ends_on_interrupt

if TYPE_CHECKING:
    from rich.progress import TaskID
    from rich.table import Table

    from moesaic.data.prepare import Progress
    from moesaic.data.shards import Manifest


def prepare(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE",
            help="Files (.txt, .md, .jsonl, each also .gz; .parquet), folders of them, saved or hub datasets by name "
            "(owner/name or owner/name:configuration), or `embedded`: 12 MB of real English.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder of token shards to write.")],
    vocab_size: Annotated[
        int | None, typer.Option("--vocab-size", metavar="N", help="Of the tokenizer to train. \\[default: 4096]")
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            "--tokenizer", metavar="PATH", help="Use this tokenizer.json, or the one in this folder, and train none."
        ),
    ] = None,
    validation_fraction: Annotated[
        float, typer.Option("--validation-fraction", metavar="F", help="The share of documents kept for validation.")
    ] = 0.02,
    text_field: Annotated[
        str,
        typer.Option("--text-field", metavar="NAME", help="The field with the text in JSONL, parquet and datasets."),
    ] = "text",
    workers: Annotated[
        int | None,
        typer.Option("--workers", metavar="N", help="Processes that encode. \\[default: one per core, at most 8]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Turn text into a tokenizer and token shards for `moesaic train`.

    Interrupted, it continues when the same command is run again.

    Example: moesaic prepare books/ news.jsonl.gz --output data/mine --vocab-size 16384
    """

    from moesaic.data.prepare import prepare as prepare_folder
    from moesaic.logs import log_to_stderr

    log_to_stderr()
    with ends_on_interrupt("the same command goes on from here"), _shown_progress() as show:
        manifest = prepare_folder(
            sources,
            output,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            validation_fraction=validation_fraction,
            text_field=text_field,
            num_workers=workers,
            on_progress=show,
        )
    if as_json:
        print_json({"output": str(output), "fingerprint": manifest.fingerprint, **manifest.to_dict()})
        return
    console = open_console()
    console.print(_summary(manifest))
    console.print(
        f"Written to {output}. Next: moesaic train CONFIG --data {quote(str(output))} --output RUN", soft_wrap=True
    )


@contextmanager
def _shown_progress() -> "Iterator[Callable[[Progress], None]]":
    """Show a bar on standard error, where it does not mix with --json."""
    from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    stages = {"tokenizer": "reading a sample, training the tokenizer", "encode": "encoding"}
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=open_console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def show(progress: "Progress") -> None:
            if progress.stage not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[progress.stage] = bars.add_task(stages[progress.stage], total=None, detail="")
            detail = f"{progress.num_bytes / 1e6:,.1f} MB"
            if progress.num_tokens:
                detail += f", {progress.num_tokens / 1e6:,.2f} M tokens"
            known = {} if progress.fraction is None else {"total": 1.0, "completed": progress.fraction}
            bars.update(tasks[progress.stage], detail=detail, **known)  # type: ignore[arg-type]

        yield show


def _summary(manifest: "Manifest") -> "Table":
    from rich.table import Table

    table = Table(title=f"vocabulary {manifest.vocab_size:,} ({manifest.dtype})")
    table.add_column("split")
    for name in ("documents", "tokens", "bytes per token", "shards"):
        table.add_column(name, justify="right")
    for name, split in (("train", manifest.train), ("validation", manifest.validation)):
        ratio = f"{split.num_bytes / split.num_tokens:.2f}" if split.num_tokens else "-"
        table.add_row(name, f"{split.num_documents:,}", f"{split.num_tokens:,}", ratio, f"{len(split.shards):,}")
    if manifest.num_empty_documents:
        table.caption = f"{manifest.num_empty_documents:,} empty documents left out"
    return table
