"""`moesaic evaluate`: how well a run predicts a text."""

import json
import math
from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    run: Annotated[str, typer.Argument(help="RUN (its best checkpoint) or RUN@step.")],
    text: Annotated[
        Path,
        typer.Option(
            "--text",
            metavar="PATH",
            help="A text (.txt, .md, .jsonl, .parquet), a folder of them, or shards written by `moesaic prepare`, of "
            "which the validation split is taken.",
        ),
    ],
    window: Annotated[
        int | None, typer.Option("--window", help="Tokens that are seen at once. [default: as in training]")
    ] = None,
    stride: Annotated[
        int | None, typer.Option("--stride", help="Tokens from one window to the next. [default: half a window]")
    ] = None,
    limit_tokens: Annotated[int | None, typer.Option("--limit-tokens", help="Measure so many at most.")] = None,
    documents: Annotated[
        bool | None,
        typer.Option("--documents/--no-documents", help="Keep documents apart. [default: as in training]"),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the perplexity of a text, and its bits per byte, which do not depend on the tokenizer.

    Every token is predicted once, with at least window - stride tokens before it, where the text has them.

    Example: moesaic evaluate runs/first --text book.txt --limit-tokens 50000
    """
    from rich.console import Console
    from rich.table import Table

    from moesaic.evaluate.perplexity import measure_perplexity, text_windows
    from moesaic.logs import log_to_stderr
    from moesaic.model.load import load_run

    log_to_stderr()
    loaded = load_run(run, device=device)
    windows = text_windows(loaded, text, window=window, stride=stride, limit_tokens=limit_tokens, apart=documents)
    result = measure_perplexity(loaded.model, windows, device=loaded.device)
    if as_json:
        values = {
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
        # JSON has no NaN and no infinity.
        finite = {
            key: None if isinstance(each, float) and not math.isfinite(each) else each for key, each in values.items()
        }
        typer.echo(json.dumps(finite))
        return
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_row("perplexity", f"{result.perplexity:,.3f}")
    table.add_row("bits per byte", f"{result.bits_per_byte:.4f}")
    table.add_row("loss, nats per token", f"{result.loss:.4f}")
    table.add_row("tokens predicted", f"{result.num_tokens:,}")
    table.add_row("bytes of text", f"{result.num_bytes:,}")
    table.add_row("documents", f"{result.num_documents:,}")
    table.add_row("window, stride", f"{result.window}, {result.stride}")
    Console().print(table)
