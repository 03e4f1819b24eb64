"""`moesaic serve` as a process: it says where it is, serves, and ends at a signal when what runs has ended."""

import errno
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer

from moesaic.data.tokenizer import Tokenizer

httpx = pytest.importorskip("httpx", reason="httpx asks the server (extra `dev`)")
pytest.importorskip("fastapi", reason="the server is FastAPI's (extra `serve`)")


def test_it_serves_and_a_signal_lets_what_runs_finish(trained_run: Path) -> None:
    command = [sys.executable, "-m", "moesaic", "serve", str(trained_run), "--port", "0", "--device", "cpu"]
    draft = f"engine.speculation={{method: model, model: {trained_run}}}"  # it drafts for itself
    helper = f"overload={{model: {trained_run}, max_texts: 1}}"
    settings = ["--set", "server.served_model_name=served", "--set", "engine.max_sequences=2", "--set", draft]
    settings += ["--set", helper, "--set", "server.max_texts_per_request=2000"]
    settings += ["--precision", "int8", "--host", "0.0.0.0"]
    process = subprocess.Popen(
        [*command, *settings], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    said = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", said)  # an address that a browser can go to
    assert found and f"{found[0]} and this machine's other addresses (Ctrl-C" in said, process.communicate()
    # Seconds of work, of which nobody waits for the end.
    long = {"prompt": ["x"] * 2000, "max_tokens": 60, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{found[0]}/v1/completions", json=long, timeout=60) as busy:
        events = busy.iter_lines()
        assert '"model":"served"' in next(events)
        answered = httpx.post(f"{found[0]}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=60).json()
    assert answered["model"] == trained_run.name  # the model was at work
    body = {"prompt": "x", "max_tokens": 60, "ignore_eos": True, "stream": True, "model": "served"}
    with httpx.stream("POST", f"{found[0]}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and out == ""
    logged = [json.loads(line) for line in err.splitlines()]
    assert any("SIGTERM: no new requests are taken" in line["message"] for line in logged)
    assert any(line.get("path") == "/v1/completions" and line["status"] == 200 for line in logged)


def test_a_second_signal_ends_what_runs_without_a_traceback(trained_run: Path) -> None:
    command = [sys.executable, "-m", "moesaic", "serve", str(trained_run), "--port", "0", "--device", "cpu"]
    command += ["--precision", "fp32"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert process.stdout is not None and process.stderr is not None
    found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
    assert found, process.communicate()
    # Half a request is a connection that the drain waits for: the second signal comes while it does.
    with socket.create_connection(("127.0.0.1", int(found[0].rpartition(":")[2]))) as asking:
        asking.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n")
        process.send_signal(signal.SIGINT)
        lines = [process.stderr.readline()]
        while "no new requests are taken" not in lines[-1]:
            assert process.poll() is None
            lines.append(process.stderr.readline())
        assert any("runs by PyTorch's operations: what runs beside a text may round it" in line for line in lines)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err


def test_a_start_that_cannot_be_printed_is_one_all_the_same(
    cli: Any, trained_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def run_server(*_: object, ready: Callable[[str], None], **__: object) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(typer, "echo", refuse)
            ready("http://127.0.0.1:1")

    monkeypatch.setattr("moesaic.serve.server.run.serve", run_server)
    result = cli("serve", trained_run)
    assert result.status == 0 and "could not be printed (No space left on device)" in result.err


def test_a_mistake_ends_with_what_to_do(cli: Any, trained_run: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for arguments, words in (
            ([trained_run, "--port", port], f"port {port} cannot be listened on"),
            ([tmp_path / "none", "--port", "0"], "CheckpointError"),
            ([trained_run, "--set", "server.prot=1"], "did you mean port"),
            ([trained_run, "--set", "server.allowed_origins=[example.org]"], "allowed_origins has 'example.org'"),
            ([trained_run, "--config", tmp_path / "none.yaml"], "none.yaml is no file; a YAML file with the sections"),
            (
                [trained_run, "--set", f"overload={{model: {trained_run}@1, max_texts: 1}}"],
                f"overload.model ({trained_run}@1) would be called {trained_run.name!r} in answers, as the model",
            ),
            ([trained_run, "--host", "::1", "--set", "server.host=127.0.0.1"], "--host ::1 and --set server.host=127"),
            ([trained_run, "--set", "server.api_key_file=none"], "api_key_file (none) cannot be read"),
        ):
            result = cli("serve", *arguments)
            assert result.status == 2 and words in result.err and result.err.count(";") >= 2
            assert "Traceback" not in result.err and result.out == ""


def test_a_broken_chat_template_is_told_at_the_start(cli: Any, trained_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    (run / "chat_template.jinja").write_text("{% for m in messages %}")
    result = cli("serve", run, "--port", "0", "--device", "cpu")
    assert result.status == 2 and f"{run}: the chat template in chat_template.jinja cannot be used" in result.err
    assert result.err.count(";") >= 2 and "Traceback" not in result.err


def test_a_draft_of_another_tokenizer_is_refused(cli: Any, trained_run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained_run, other)
    Tokenizer.train(["other words " * 50], vocab_size=280).save(other)
    draft = f"engine.speculation={{method: model, model: {other}}}"
    result = cli("serve", trained_run, "--port", "0", "--device", "cpu", "--set", draft)
    assert result.status == 2 and "has another tokenizer" in result.err and result.err.count(";") >= 2
