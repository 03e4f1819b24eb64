"""`moesaic serve`."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from moesaic.cli.start import loading_modules


def serve(
    run: Annotated[str, typer.Argument(metavar="RUN", help="RUN (its best checkpoint) or RUN@step.")],
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="A YAML file with the sections engine, server and overload.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen on; the same as --set server.host=.")] = None,
    port: Annotated[int | None, typer.Option(help="0: any that is free; the same as --set server.port=.")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="a.b=VALUE, as often as needed (docs/guides/serve.md).")
    ] = None,
    precision: Annotated[
        Literal["bf16", "fp32", "int8"] | None,
        typer.Option(help="Of matrix work; int8 rounds the weights. Otherwise as the run was trained or quantised."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Serve a trained model by OpenAI's protocol, with a web page at /.

    Ctrl-C or SIGTERM lets what runs finish; a second one ends it. Log lines are JSON, on standard error.

    Experts on several GPUs or machines: torchrun --nproc-per-node 8 -m moesaic serve ...

    Example: moesaic serve runs/first --port 8000 --set engine.max_sequences=16
    """
    from moesaic.config.load import load_serve_config, with_options
    from moesaic.errors import ElsewhereError, InstallationError, MoesaicError
    from moesaic.folders import run_name
    from moesaic.logs import log_to_stderr, logger

    options = {"server.host": ("--host", host), "server.port": ("--port", port)}
    try:
        resolved = load_serve_config(config, with_options(assignments or [], options))
    except MoesaicError:
        if os.environ.get("RANK", "0") != "0":  # of several processes that were given the same the first says it
            raise ElsewhereError("the first process says it.") from None
        raise
    try:
        with loading_modules():
            from moesaic.serve.server.run import serve as run_server
    except ImportError as error:
        raise InstallationError(
            f"a server was asked for and {error.name} cannot be imported; FastAPI, uvicorn and prometheus-client are "
            f"required; install them with `pip install 'moesaic[serve]'`."
        ) from None
    log_to_stderr(as_json=True)
    elsewhere = " and this machine's other addresses" if resolved.server.host in ("0.0.0.0", "::") else ""

    def announce(url: str) -> None:
        try:
            typer.echo(f"Serving {run} at {url}{elsewhere} (Ctrl-C ends it).")
        except OSError as error:  # it serves all the same
            logger.warning("That it serves at %s could not be printed (%s).", url, error.strerror or error)

    run_server(
        run,
        resolved,
        name=run_name(run),
        device=device,
        precision=precision,
        ready=announce,
    )
