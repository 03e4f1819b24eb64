"""`moesaic convert import`, `export` and `verify`: models in, models out, and the proof that they are the same.

Each parses, calls moesaic.convert and prints.
"""

from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from moesaic.cli.console import open_console, print_json
from moesaic.cli.progress import shown_progress
from moesaic.cli.start import loading_modules

if TYPE_CHECKING:
    from rich.table import Table

    from moesaic.convert.parity import Certificate

_JSON = typer.Option("--json", help="Print the certificate as JSON instead of a table.")
_FORCE = typer.Option("--force", help="Keep the result even if the check says that it computes something else.")


def import_(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="PATH", help="A folder in Hugging Face's layout (config.json, safetensors, ...), or a .gguf."
        ),
    ],
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder, to be made.")],
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="A tokenizer.json, or a folder with one, where the model brings none. \\[default: its own]"),
    ] = None,
    force: Annotated[bool, _FORCE] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Make a run of another tool's model; every tensor is used exactly once, or it fails and names it.

    Families: Llama, Mistral, Qwen2, Qwen3, Mixtral, OLMoE, Qwen2-MoE, Qwen3-MoE, DeepSeek-V2 and V3, Seed-OSS,
    dots.llm1, GLM-4.5 and 4.7-Flash, gpt-oss, ERNIE 4.5, MiniMax-M2, Solar Open, Granite 3, Hunyuan, SmolLM3, EXAONE 4
    and K-EXAONE, OLMo 2, FlexOlmo. It ends with a check: the same prompts through both models, written into the run as
    parity.json.
    GGUF needs pip install 'moesaic\\[gguf]', the check of logits pip install 'moesaic\\[huggingface]'.

    Example: moesaic convert import downloads/Qwen3-0.6B runs/qwen3
    """
    with loading_modules():
        from moesaic.convert.importer import import_model
        from moesaic.logs import log_to_stderr

    log_to_stderr()
    with shown_progress(kept="nothing was written", output=run) as show:
        certificate = import_model(path, run, tokenizer=tokenizer, force=force, on_progress=show)
    _print(certificate, as_json, f"Written to {run}. Next: moesaic generate {quote(str(run))} --prompt '...'")


def export_(
    run: Annotated[str, typer.Argument(metavar="RUN", help="RUN (its best checkpoint) or RUN@step.")],
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The folder, to be made.")],
    format_: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="huggingface, or gguf (PATH/model.gguf).")
    ] = "huggingface",
    dtype: Annotated[
        str | None, typer.Option(metavar="DTYPE", help="fp32, bf16 or fp16, of the weights. \\[default: as stored]")
    ] = None,
    force: Annotated[bool, _FORCE] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Write a run's model for other tools, in the layout of the family that describes it exactly.

    A residual MoE with the same experts in each of its layers becomes a Qwen2-MoE; what no family describes (a pyramid)
    is written for transformers with the classes that `import moesaic.hf` registers, which needs pip install
    'moesaic\\[huggingface]'. It ends with a check, and needs the same packages, as import.

    Example: moesaic convert export runs/first exported --dtype bf16
    """
    with loading_modules():
        from moesaic.convert.exporter import export_run
        from moesaic.convert.families import OWN_NAME
        from moesaic.logs import log_to_stderr

    log_to_stderr()
    with shown_progress(kept="nothing was written", output=path) as show:
        certificate = export_run(
            run,
            path,
            format=format_,  # type: ignore[arg-type]  # checked there
            dtype=dtype,
            force=force,
            on_progress=show,
        )
    last = f"Written to {path}, as {certificate.family}."
    if certificate.family == OWN_NAME:
        last += (
            f" In Python:\n    from moesaic.hf import MoesaicForCausalLM\n"
            f"    model = MoesaicForCausalLM.from_pretrained({str(path)!r})"
        )
    _print(certificate, as_json, last)


def verify(
    first: Annotated[Path, typer.Argument(metavar="A", help="A run, a Hugging Face folder or a .gguf.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another.")],
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Compare two models: tensors, where they have the same ones, tokenizers, and prompts through both in fp32.

    The exit status is 1 when they do not compute the same.

    Example: moesaic convert verify downloads/Qwen3-0.6B runs/qwen3
    """
    with loading_modules():
        from moesaic.convert.parity import verify_models
        from moesaic.logs import log_to_stderr

    log_to_stderr()
    with shown_progress(kept="nothing was written") as show:
        certificate = verify_models(first, second, on_progress=show)
    verdict = "They compute the same." if certificate.failure is None else f"They differ: {certificate.failure}."
    _print(certificate, as_json, verdict if certificate.comparison or certificate.failure else "")
    if certificate.failure is not None:
        raise typer.Exit(1)


def _print(certificate: "Certificate", as_json: bool, last: str) -> None:
    if as_json:
        print_json(certificate.to_json())
        return
    console = open_console()
    console.print(_table(certificate))
    if last:
        console.print(last, soft_wrap=True)


def _table(certificate: "Certificate") -> "Table":
    from moesaic.report.model_summary import describe_bytes
    from moesaic.report.quantities import percent
    from moesaic.report.tables import plain_table

    table = plain_table(show_header=False)
    tensors, weights, found = certificate.tensors, certificate.weights, certificate.comparison
    if tensors is not None:
        table.add_row("tensors", f"{tensors.used} of {tensors.source} used, {describe_bytes(tensors.bytes)} written")
        for reason in dict.fromkeys(tensors.left_out.values()):
            names = [name for name, each in tensors.left_out.items() if each == reason]
            more = ", ..." if len(names) > 2 else ""
            table.add_row("left out", f"{len(names)}, {reason}: {', '.join(names[:2])}{more}")
    if weights is not None:
        rounded = sum(len(each) for each in weights.rounded)
        table.add_row(
            "tensors",
            f"{weights.equal} equal bit by bit, {rounded} but for the dtype's rounding, {len(weights.different)} "
            f"different",
        )
        if weights.max_absolute:
            table.add_row("", f"by {weights.max_absolute:.3g} at most")
        if weights.configs:
            table.add_row("configs", "; ".join(weights.configs[:3]))
        if weights.alone:
            table.add_row("", f"{len(weights.alone)} in one of them alone: {', '.join(weights.alone[:3])}")
    if found is None:
        table.add_row("logits", f"not compared: {certificate.not_compared}")
        return table
    table.add_row(
        "logits in fp32",
        f"differ by {found.max_absolute:.2g} at most, {found.max_relative:.2g} of the largest; {found.num_tokens} "
        f"tokens, by {certificate.judge}",
    )
    table.add_row("likeliest token", f"the same for {percent(found.top1_agreement)}")
    table.add_row("greedy text", f"the same for {found.greedy_equal} of {found.num_prompts} prompts")
    if found.routing_agreement:
        lowest = min(found.routing_agreement)
        table.add_row("experts", f"the same for {percent(lowest)} of tokens at least, in every MoE layer")
    if found.num_undecided:
        table.add_row("", f"{found.num_undecided} tokens not compared: rounding decided between two experts")
    return table
