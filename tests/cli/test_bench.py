"""`moesaic bench` prints what was measured, as a table and as JSON, and refuses what cannot be run."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moesaic.cli import bench as bench_module
from moesaic.errors import DataError
from moesaic.kernels.limits import Limits


@pytest.fixture(autouse=True)
def quick(machine_limits: Limits, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """No time spent, nothing measured: returns the options of each measurement asked for."""
    asked: list[dict[str, Any]] = []

    def measure(**options: Any) -> Any:
        asked.append(options)
        return machine_limits

    monkeypatch.setattr("moesaic.kernels.limits.measure_limits", measure)
    monkeypatch.setattr("moesaic.bench.moe_layer.measure_limits", measure)
    monkeypatch.setattr(bench_module, "_LAYER_SECONDS", 0.0)
    return asked


LAYER = ("bench", "moe-layer", "--tokens", 8, "--experts", 4, "--top-k", 2, "--hidden", 64, "--intermediate", 64)


def test_limits_are_a_table_and_json(cli: Any, quick: list[dict[str, Any]]) -> None:
    table = cli("bench", "limits")
    assert table.status == 0, table.err
    for expected in ("reading memory", "10.0 GB/s", "0.200 TFLOP/s", "int8 products", "none"):
        assert expected in table.out
    values = json.loads(cli("bench", "limits", "--json").out)
    assert values["bandwidth_bytes_per_second"] == 1e10 and values["int8_operations_per_second"] is None
    assert [(options["device"], options["reuse"]) for options in quick] == [("cpu", False)] * 2


@pytest.mark.parametrize("flags", [(), ("--backward",), ("--residual", "--backward")])
def test_a_layer_is_json_with_the_case_and_the_result(cli: Any, flags: tuple[str, ...]) -> None:
    result = cli(*LAYER, *flags, "--json")
    assert result.status == 0, result.err
    values = json.loads(result.out)
    assert {"seconds", "dense_seconds", "ratio", "share_of_limit", "limit"} <= set(values)
    assert (values["tokens"], values["num_experts"], values["top_k"]) == (8, 4, 2)
    assert values["has_backward"] is ("--backward" in flags) and values["has_residual"] is ("--residual" in flags)
    assert values["limit"] in ("bytes", "FLOPs")


def test_a_layer_is_a_table(cli: Any) -> None:
    result = cli(*LAYER, "--residual")
    assert result.status == 0, result.err
    for expected in ("4 experts, top-2 and a residual MLP", "ratio to dense", "share of the limit", "bound by"):
        assert expected in result.out


def test_one_is_no_plural(cli: Any) -> None:
    out = cli(*LAYER, "--tokens", 1, "--experts", 1, "--top-k", 1).out
    assert "1 expert, top-1" in out and "1 token, 1 expert touched" in out


def test_what_the_machine_does_not_have_is_refused(cli: Any) -> None:
    result = cli(*LAYER, "--dtype", "int8")  # the fixed limits have no products of bytes
    assert result.status == 2
    assert "no products of bytes" in result.err and "Traceback" not in result.err


@pytest.mark.parametrize("flags", [("--dtype", "int8", "--backward"), ("--top-k", 5)])
def test_a_mistake_is_told_before_anything_is_measured(
    cli: Any, quick: list[dict[str, Any]], flags: tuple[object, ...]
) -> None:
    result = cli(*LAYER, *flags)
    assert result.status == 2 and quick == []
    assert "ConfigError" in result.err


def test_help_shows_examples(cli: Any) -> None:
    assert "Example: moesaic bench limits" in cli("bench", "limits", "--help").out
    assert "Example: moesaic bench moe-layer" in cli("bench", "moe-layer", "--help").out
    assert "Example: moesaic bench serve" in cli("bench", "serve", "--help").out


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """No network: every run gives the same result; returns what each was asked."""
    from moesaic.report.serving import RequestResult, ServingResult

    asked: list[dict[str, Any]] = []

    def bench_serving(endpoint: Any, workload: Any, **options: Any) -> ServingResult:
        workload.check()
        endpoint.base  # noqa: B018  (it is checked by looking)
        asked.append({"endpoint": endpoint, "workload": workload, **options})
        options["show"](1, 2)
        good = RequestResult(
            due_seconds=0.0, sent_seconds=0.0, end_seconds=2.0, chunk_seconds=(1.0, 1.05), asked_prompt_tokens=8,
            asked_output_tokens=2, prompt_tokens=8, output_tokens=2,
        )  # fmt: skip
        bad = replace(good, chunk_seconds=(), output_tokens=None, error="refused", message="status 429: busy")
        return ServingResult(
            name=options["name"] or "tiny", url=endpoint.base, model="tiny", created="2026-01-01T00:00:00+00:00",
            workload={"rate": 2.0}, ttft_limit_seconds=options["ttft_limit_seconds"],
            tpot_limit_seconds=options["tpot_limit_seconds"],
            requests=(bad, bad) if workload.num_requests == 2 else (good, bad),
        )  # fmt: skip

    monkeypatch.setattr("moesaic.bench.serving.bench_serving", bench_serving)
    return asked


SERVE = ("bench", "serve", "http://127.0.0.1:8000", "--prompt-tokens", "4-8", "--output-tokens", 2)


def test_a_server_is_a_table_a_file_and_a_plot(cli: Any, served: list[dict[str, Any]], tmp_path: Path) -> None:
    from moesaic.report.serving import read_serving

    (tmp_path / "key").write_text("# the server's\n\nsecret\nother\n")
    output, plot = tmp_path / "new" / "a.json", tmp_path / "new" / "a.png"
    result = cli(*SERVE, "--rate", 2, "--api-key-file", tmp_path / "key", "--output", output, "--plot", plot)
    assert result.status == 0, result.err
    for expected in ("TTFT", "TPOT", "1.0000", "0.0500", "1 of 2 completed", "1 refused", "status 429: busy", "50.0 %"):
        assert expected in result.out
    assert read_serving(output).requests[1].error == "refused" and plot.read_bytes().startswith(b"\x89PNG")
    asked = served[0]
    assert (asked["workload"].prompt_tokens, asked["workload"].output_tokens) == ((4, 8), (2, 2))
    assert (asked["workload"].rate, asked["endpoint"].api_key, asked["num_warmup"]) == (2.0, "secret", 2)


def test_an_interrupted_run_keeps_what_had_ended(
    cli: Any, served: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import moesaic.bench.serving
    from moesaic.report.serving import read_serving

    whole = moesaic.bench.serving.bench_serving

    def interrupted(*given: Any, **options: Any) -> None:
        options["on_interrupt"](replace(whole(*given, **options), num_unended=3))
        raise KeyboardInterrupt

    monkeypatch.setattr("moesaic.bench.serving.bench_serving", interrupted)
    output, plot = tmp_path / "a.json", tmp_path / "a.png"
    result = cli(*SERVE, "--rate", 2, "--output", output, "--plot", plot)
    assert result.status == 130 and "Stopped; requests that had not ended are not counted." in result.err
    assert "3 requests had not ended" in result.out and "1 of 2 completed" in result.out
    assert read_serving(output).num_unended == 3 and plot.is_file()
    assert json.loads(cli(*SERVE, "--rate", 2, "--json").out)["num_unended"] == 3


def test_a_plot_is_kept_where_the_file_cannot_be(
    cli: Any, served: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, result: Any) -> Path:
        raise DataError("no room; some is required; free it.")

    monkeypatch.setattr("moesaic.report.serving.write_serving", full)
    result = cli(*SERVE, "--rate", 2, "--output", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert result.status == 2 and "no room" in result.err
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_every_file_that_cannot_be_written_is_named(
    cli: Any, served: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: str | bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("moesaic.report.serving.write_whole", full)
    monkeypatch.setattr("moesaic.report.drawing.write_whole", full)
    result = cli(*SERVE, "--rate", 2, "--output", tmp_path / "a.json", "--plot", tmp_path / "a.png")
    assert result.status == 2 and "1 of 2 completed" in result.out
    assert f"{tmp_path / 'a.json'} cannot be written" in result.err
    assert f"{tmp_path / 'a.png'} cannot be written" in result.err


def test_a_file_is_neither_both_nor_in_the_place_of_what_is_no_file(
    cli: Any, served: list[dict[str, Any]], tmp_path: Path
) -> None:
    both, pipe = tmp_path / "a.png", tmp_path / "pipe"  # a pipe of our own: a device would be lost if this failed
    os.mkfifo(pipe)
    result = cli(*SERVE, "--rate", 2, "--output", both, "--plot", both.parent / "new" / ".." / both.name)
    assert result.status == 2 and f"--output and --plot are both {both}; " in result.err
    result = cli(*SERVE, "--rate", 2, "--output", pipe)
    assert result.status == 2 and f"{pipe} cannot be written (it is no regular file" in result.err
    assert served == [] and pipe.is_fifo()


def test_a_servers_figures_are_json(cli: Any, served: list[dict[str, Any]]) -> None:
    result = cli(*SERVE, "--concurrency", 3, "--json", "--ttft-limit", 0.5, "--name", "ours")
    assert result.status == 0, result.err
    values = json.loads(result.out)
    assert values["name"] == "ours" and values["summary"]["errors"] == {"refused": 1}
    assert values["summary"]["goodput_share"] == 0.0 and values["summary"]["ttft"]["p99"] == 1.0


def test_no_answer_at_all_is_a_failure(cli: Any, served: list[dict[str, Any]]) -> None:
    result = cli(*SERVE, "--concurrency", 1, "--requests", 2)
    assert result.status == 1 and "2 refused" in result.out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "of --rate and --concurrency neither was given"),
        (("--rate", 1, "--trace", "t.csv"), "--trace and --prompt-tokens were both given"),
        (("--rate", 1, "--prompt-tokens", "many"), "--prompt-tokens is 'many'"),
        (("--rate", 1, "--api-key-file", "none"), "--api-key-file none cannot be read"),
        (("--rate", 1, "--output", "/"), "/ cannot be written"),
        (("--rate", 1, "--plot", "/dev/null/a.png"), "cannot be written"),
        (("--rate", 1, "--output", "/proc/a.json"), "/proc/a.json cannot be written"),
        (("--rate", 1, "--plot", "p.xyz"), "p.xyz, which ends in .xyz; plots are PNGs; let the name end in .png"),
        (("--rate", 1, "--plot", "plot"), "which ends in nothing"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(
    cli: Any, served: list[dict[str, Any]], flags: tuple[object, ...], message: str
) -> None:
    result = cli(*SERVE, *flags)
    assert result.status == 2 and served == []
    assert "ConfigError" in result.err and message in result.err.replace("\n", " ")
