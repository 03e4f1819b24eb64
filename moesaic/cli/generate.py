"""`moesaic generate`."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.console import print_json
from moesaic.cli.start import loading_modules
from moesaic.errors import ConfigError

if TYPE_CHECKING:
    from moesaic.data.tokenizer import Tokenizer


def generate(
    run: Annotated[str, typer.Argument(metavar="RUN", help="RUN (its best checkpoint) or RUN@step.")],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="The text to continue; special tokens are themselves. \\[default: what standard input holds]",
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="At most so many tokens.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token every time.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Draw among so many likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw among the fewest tokens that reach this probability.")
    ] = 0.95,
    seed: Annotated[int, typer.Option(help="The same seed gives the same text.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    packed_file: Annotated[
        bool, typer.Option(help="Keep a large run's packed weights beside its checkpoint: later starts take seconds.")
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print prompt, text and token ids as JSON.")] = False,
) -> None:
    """Continue a text with a trained model.

    Example: moesaic generate runs/first --prompt "The state of the Union" --max-new-tokens 60
    """
    with loading_modules():
        from moesaic.data.sources import mend_text
        from moesaic.logs import log_to_stderr
        from moesaic.model.generate import stream
        from moesaic.model.load import load_run

    log_to_stderr()
    prompt = mend_text(_read_prompt() if prompt is None else prompt)  # a command line need not be UTF-8
    loaded = load_run(run, device=device, packed_file="write" if packed_file else "off")
    tokenizer = loaded.tokenizer
    prompt_ids = tokenizer.encode_prompt(prompt, add_special_tokens=True) or [tokenizer.end_of_text_id]
    tokens = stream(
        loaded.model,
        prompt_ids,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop_ids=tokenizer.stop_ids,
    )
    if as_json:
        ids = list(tokens)
        text = "".join(_pieces(tokenizer, prompt_ids, ids))
        print_json({"prompt": prompt, "text": text, "token_ids": ids})
        return
    typer.echo(prompt, nl=False)
    for piece in _pieces(tokenizer, prompt_ids, tokens):
        typer.echo(piece, nl=False)
    typer.echo()


def _read_prompt() -> str:
    """Return what standard input holds, without the line end that closes it.

    Raises: ConfigError where it is a terminal or closed, or holds nothing.
    """
    text, state = "", "closed"
    if sys.stdin is not None:
        state = "a terminal" if sys.stdin.isatty() else "empty"
        text = "" if sys.stdin.isatty() else sys.stdin.buffer.read().decode("utf-8-sig", "replace")
    if not text:
        raise ConfigError(
            f"no --prompt was given, and standard input is {state}; a text to continue is required; give --prompt "
            f"TEXT, or a file: moesaic generate RUN < FILE."
        )
    return text.removesuffix("\n").removesuffix("\r")


def _pieces(tokenizer: "Tokenizer", prompt_ids: Sequence[int], tokens: Iterable[int]) -> Iterator[str]:
    """Yield what each token makes certain of the text behind a prompt; special tokens are shown too."""
    from moesaic.serve.detokenizer import Detokenizer

    text = Detokenizer(tokenizer, prompt=prompt_ids)
    for token in tokens:
        yield text.flush() + tokenizer.decode([token]) if token in tokenizer.special_ids else text.append(token)
    yield text.flush()  # what is left where it ends amid a character
