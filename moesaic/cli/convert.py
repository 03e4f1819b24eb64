"""`moesaic convert`: a model into another form. Its verbs are in the files beside this one."""

import typer

from moesaic.cli.convert_models import export_, import_, verify
from moesaic.cli.convert_quantize import quantize
from moesaic.cli.convert_upcycle import upcycle

app = typer.Typer(no_args_is_help=True)


@app.callback()
def convert() -> None:
    """Bring models in, take them out, give them experts, make them smaller.

    Example: moesaic convert import downloads/Qwen3-0.6B runs/qwen3
    """


app.command("import")(import_)
app.command("export")(export_)
app.command()(verify)
app.command()(upcycle)
app.command()(quantize)
