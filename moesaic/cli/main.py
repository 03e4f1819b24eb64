"""The command line: parse, call, print. Each verb is a file beside this one and a plain Python call behind it.

Nothing here or at the top of a verb's file imports torch, so that `moesaic --help` is instant.
"""

import errno
import io
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import typer

from moesaic import __version__
from moesaic.cli.start import heed_termination
from moesaic.errors import ConfigError, ElsewhereError, MoesaicError
from moesaic.kernels.allocator import tune_allocator
from moesaic.kernels.threads import limit_threads, spin_briefly

_LEAST_COLUMNS = 20  # of a terminal, in which something can be read

app = typer.Typer(
    name="moesaic",
    help="Train, shrink and serve Mixture-of-Experts language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# Verb -> its module, in the order of a model's life; the function there has the verb's name. A verb with verbs of its
# own also has `app`, and its function is the callback of that.
VERBS = (
    "prepare",
    "train",
    "distill",
    "evaluate",
    "convert",
    "generate",
    "serve",
    "inspect",
    "bench",
    "doctor",
    "quickstart",
)

for _verb in VERBS:
    _module = import_module(f"moesaic.cli.{_verb}")
    if hasattr(_module, "app"):
        app.add_typer(_module.app, name=_verb)
    else:
        app.command(name=_verb)(getattr(_module, _verb))


# What several processes do together; of all else each would do the whole, into one folder.
_OF_SEVERAL = ("train", "distill", "serve")


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if version:
        typer.echo(f"moesaic {__version__}")
        raise typer.Exit
    count, verb = os.environ.get("WORLD_SIZE", "1"), context.invoked_subcommand
    if "TORCHELASTIC_RUN_ID" in os.environ and count != "1" and verb not in _OF_SEVERAL:
        if os.environ.get("RANK") != "0":
            raise ElsewhereError("the first process says it.")
        raise ConfigError(
            f"torchrun has started {count} processes and `moesaic {verb}` is done by one; several can only "
            f"{', '.join(_OF_SEVERAL)}; start it without torchrun."
        )


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; a caller's mistake prints its message and exits with status 2, and so does a file that
    may not be read or written, or a path that is none.

    Where memory is refused, or standard output has no room left, a full disk say, the status is 1.
    """
    heed_termination()
    if os.environ.get("COLUMNS", "").isdigit() and int(os.environ["COLUMNS"]) < _LEAST_COLUMNS:
        del os.environ["COLUMNS"]  # 0 is "not known" to those that set it, and tables of no width to rich
    try:
        Path.cwd()
    except FileNotFoundError:  # in which torch's libraries end the process
        _end("the folder that this was started in is gone; one that exists is required; cd to one.", status=2)
    # Before torch is loaded and allocates anything.
    limit_threads()
    spin_briefly()
    tune_allocator()
    for stream in (sys.stdout, sys.stderr):  # a table that is cut ends in a character that few encodings have
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")
    try:
        return app(args=arguments)
    except ElsewhereError:  # which another process says
        sys.exit(2)
    except MoesaicError as error:
        _end(f"{type(error).__name__}: {error}", status=2)
    except (MemoryError, RuntimeError, OSError, ImportError) as error:
        if "can't start new thread" in str(error):
            _end(
                "the system allows this user, or this container, no more threads; a few for each processor are "
                "required; end other programs, or raise the limit (ulimit -u, a container's limit on processes).",
                status=1,
            )
        if (message := _refused_memory(error)) is not None:
            _end(message, status=1)
        if isinstance(error, PermissionError) and error.filename is not None:
            _end(
                f"{error.filename}: {error.strerror}; what is named here has to be readable, and where something is "
                f"written writable, by this user; check its permissions, or name another.",
                status=2,
            )
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            name = str(error.filename)
            name = name if len(name) <= 80 else f"{name[:80]}..."
            _end(
                f"{name}: {error.strerror}; a path that the system can follow is required; name another.",
                status=2,
            )
        if (
            not isinstance(error, OSError)
            or error.errno not in (errno.ENOSPC, errno.EDQUOT)
            or error.filename is not None
        ):
            raise
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115 (what is left in its buffer has no place either)
        _end(f"what was printed is not whole ({error.strerror}); room for it is required; free some space.", status=1)


def _end(message: str, *, status: int) -> NoReturn:
    typer.secho(message, err=True, fg=typer.colors.RED)
    sys.exit(status)


def _refused_memory(error: Exception) -> str | None:
    """Return what to say of an error by which the system, or a GPU, refused memory; None for any other error."""
    text = " ".join(str(error).split())
    is_known = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    words = error.strerror if isinstance(error, OSError) and error.strerror else text  # a file may have any name
    refusals = r"allocate memory|bad_alloc|out of memory|failed to map segment"
    if not is_known and not re.search(refusals, words):
        return None
    asked = re.search(r"allocate ([\d.]+ (?:bytes|[KMGT]iB))", text)
    library = re.search(r"([^\s/]+): failed to map segment", text)
    if library:
        said = f"{library[1]} could not be loaded"
    else:
        said = f"{asked[1]} more were asked for" if asked else text.partition(";")[0]
    limit = _address_space_limit()
    remedy = "close other programs" if limit is None else f"raise the limit (ulimit -v is {limit >> 10} here)"
    return (
        f"memory was refused{f' ({said})' if said else ''}; room for the model and for what is computed with it is "
        f"required; {remedy}, or take a smaller model, or less at a time (shorter sequences, smaller batches)."
    )


def _address_space_limit() -> int | None:
    """Return the bytes of addresses that this process may have; None where nothing limits them."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if soft == resource.RLIM_INFINITY else soft
