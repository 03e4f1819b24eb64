"""`moesaic doctor`: what this machine has, what moesaic makes of it, and what to do about what is missing.

The plain call is bench/machine's `examine`.
"""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from moesaic.cli.console import open_console, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="Also measure memory bandwidth and matrix rates (about 10 seconds each).")
    ] = False,
    build: Annotated[
        bool, typer.Option("--build", help="Compile the CPU kernels now, for every instruction set of this machine.")
    ] = False,
    build_all: Annotated[
        bool,
        typer.Option("--build-all", help="And for other x86 processors: for images that run elsewhere, or in CI."),
    ] = False,
) -> None:
    """Show what this machine has, which kernels are in use, what is missing and which command brings it.

    The exit status is 1 when training cannot work here at all.

    Example: moesaic doctor --measure
    """
    from moesaic.bench.machine import examine
    from moesaic.logs import log_to_stderr

    log_to_stderr()  # which says that kernels are being compiled, before a minute of silence
    findings = examine(measure=measure, build=build, build_all=build_all)
    if as_json:
        print_json(findings)
    else:
        _print(findings, open_console())
    if any(problem["is_fatal"] for problem in findings["problems"]):
        raise typer.Exit(1)


def _print(findings: dict[str, Any], console: "Console") -> None:
    """Print tables, then what is to be done: commands in one piece each, as they are pasted, however narrow it is."""
    from rich.text import Text

    console.print(_table(findings))
    console.print()
    missing = [extra for extra in findings["extras"] if extra["missing"]]
    if findings["extras"]:
        console.print(_extras_table(findings["extras"]))
    if missing:
        command = missing[0]["command"].replace(f"[{missing[0]['name']}]", "[NAME]")
        console.print("What is missing comes with (NAME: an extra, or several with commas between):")
        console.print(f"  {command}", soft_wrap=True, highlight=False)
    if findings["extras"]:
        console.print()
    if findings["problems"]:
        console.print(Text("What needs attention", "bold"))
    for problem in findings["problems"]:
        console.print(Text(f"- {problem['problem']}", "red" if problem["is_fatal"] else "yellow"))
        console.print(f"  -> {problem['remedy']}", soft_wrap=True, highlight=False)
    if not findings["problems"]:
        console.print(Text("Nothing needs attention.", "green"))


def _extras_table(extras: list[dict[str, Any]]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Optional extras", title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for column in ("extra", "state"):
        table.add_column(column, overflow="fold")
    for extra in extras:
        missing = Text(f"missing: {', '.join(extra['missing'])}", "yellow")
        table.add_row(extra["name"], missing if extra["missing"] else Text("installed", "green"))
    return table


def _table(findings: dict[str, Any]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    from moesaic.bench.machine import gigabytes
    from moesaic.report.quantities import counted

    torch, cpu, memory, allocator = (findings[key] for key in ("torch", "cpu", "memory", "allocator"))
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")

    def row(name: str, value: str) -> None:
        table.add_row(name, Text(value))

    row("moesaic", f"{findings['moesaic']['version']} in {findings['moesaic']['folder']}")
    row("Python", f"{findings['python']['version']}, {findings['python']['executable']}")
    row("system", findings["python"]["platform"])
    if torch["is_usable"]:
        row("torch", f"{torch['version']}, {torch['build']} build, {counted(torch['threads'], 'thread')}")
    else:
        row("torch", "cannot be imported")
    cores = f"{counted(cpu['cores'], 'core')}, " if cpu["cores"] else ""
    row("CPU", f"{cpu['model']}: {cores}{cpu['logical_cores']} logical, {cpu['usable_threads']} usable here")
    row("instruction sets", " ".join(cpu["instruction_sets"]) or "none beyond the base")
    limit = f", limited to {gigabytes(memory['limit_bytes'])}" if memory["limit_bytes"] else ""
    row("memory", f"{gigabytes(memory['total_bytes'])}, {gigabytes(memory['available_bytes'])} available{limit}")
    row("allocator", f"{allocator['library']}; {allocator['explanation']}")
    row("huge pages", allocator["huge_pages"] or "this system has no switch for them")
    for index, device in enumerate(findings["cuda"]):
        memory_size, capability = gigabytes(device["memory_bytes"]), device["compute_capability"]
        row(f"GPU {index}", f"{device['name']}, {memory_size}, compute capability {capability}")
        row(f"GPU {index} kernels", f"{device['kernels']}: {device['kernels_reason']}")
    if not findings["cuda"]:
        row("GPU", "none that torch can use")
    compiler = findings["compiler"]
    row(
        "C++ compiler",
        f"{compiler['version']} ({compiler['path']})" if compiler else "none found (c++, g++, clang++, or $CXX)",
    )
    kernels = findings["cpu_kernels"]
    if kernels:
        row("CPU kernels", f"{kernels['name'] or 'none'}: {kernels['reason'] or kernels['error']}")
        row("kernels for", ", ".join(kernels["supported"]) or "nothing that this processor has")
        if kernels["library"]:
            megabytes = kernels["library_bytes"] / 1e6
            row("library", f"{kernels['library']}, {megabytes:.1f} MB, self-test passed")
        size = kernels["cache_bytes"]
        held = "which cannot be read"
        if size is not None:
            held = f"{size / 1e6:.1f} MB of {counted(kernels['cache_builds'], 'build')}; may be deleted at any time"
        row("kernel cache", f"{kernels['cache_folder']}, {held}" if kernels["cache_folder"] else "no folder for it")
        row("OpenMP", f"{kernels['openmp']}, {counted(torch['threads'], 'thread')}")
    for built in findings["built"]:
        outcome = "self-test passed" if built["is_tried"] else "for other processors"
        if built["error"] is not None:
            outcome = "does not work here"
        row(f"built {built['instruction_set']}", f"{built['library']} in {built['seconds']:.1f} s, {outcome}")
    implementations: dict[str, list[str]] = {}
    for kernel in findings["kernels"]:
        implementations.setdefault(kernel["implementation"], []).append(kernel["operation"])
    if implementations:
        lines = (f"{implementation}: {', '.join(names)}" for implementation, names in implementations.items())
        row("operations", "\n".join(lines))
    row("network", "not needed")
    for limits in findings["limits"]:
        row(
            f"limits of {limits['device']}",
            f"reads {limits['bandwidth_bytes_per_second'] / 1e9:.1f} GB/s; products "
            f"{limits['bf16_flops_per_second'] / 1e12:.3f} TFLOP/s bf16, "
            f"{limits['fp32_flops_per_second'] / 1e12:.3f} TFLOP/s fp32"
            + (f", {int8 / 1e12:.3f} TOP/s int8" if (int8 := limits["int8_operations_per_second"]) else ""),
        )
    return table
