"""Keys, sizes, queues, times, leaving clients, failures, draining: an engine that can be made slow shows them."""

import concurrent.futures
import contextlib
import http.client
import json
import logging
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from torch import Tensor

from moesaic.config.serve import ServerConfig
from moesaic.data.tokenizer import Tokenizer
from moesaic.errors import ConfigError, NotFiniteError
from moesaic.logs import JsonFormatter, logger
from moesaic.serve.async_engine import AsyncEngine
from moesaic.serve.server import jobs, run
from moesaic.serve.server.app import create_app
from moesaic.serve.server.gate import read_keys

from ..fake_engine import FakeEngine
from .conftest import Live, live

Serve = Callable[..., AbstractContextManager[Live]]
ENDLESS = {"prompt": "x", "max_tokens": 10**9}


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.005)


def complete(running: Live, body: Any = None, **options: Any) -> httpx.Response:
    body = body or {"prompt": "x", "max_tokens": 2}
    return httpx.post(f"{running.url}/v1/completions", json=body, timeout=30, **options)


@contextlib.contextmanager
def log_lines() -> Iterator[list[str]]:
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler, level = Keep(), logger.level
    handler.setFormatter(JsonFormatter())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_with_keys_only_they_open(serve_fake: Serve, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / "page.js").write_text("1;")
    with serve_fake(keys=("first-key", "second-key"), web_folder=tmp_path) as running:
        closed = ("/v1/models", "/v1/stats", "/v1/experts", "/metrics", "/openapi.json", "/tokenizer_info")
        for path in closed:
            for header in (None, "Bearer", "Bearer wrong", "Basic first-key", "first-key", "Bearer first-key2"):
                response = httpx.get(f"{running.url}{path}", headers={"Authorization": header} if header else {})
                assert response.status_code == 401 and response.headers["WWW-Authenticate"] == "Bearer"
                assert response.json()["error"]["code"] == "invalid_api_key"
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"):
            assert httpx.post(f"{running.url}{path}", json={}).status_code == 401
        for path in ("/health", "/ready", "/", "/static/page.js"):
            assert httpx.get(f"{running.url}{path}").status_code == 200
        for key in ("first-key", "second-key"):
            assert complete(running, headers={"Authorization": f"bearer {key}"}).status_code == 200
        with (
            openai.OpenAI(base_url=f"{running.url}/v1", api_key="wrong", max_retries=0) as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.models.list()


def test_without_keys_it_answers_to_this_machines_own_names_only(serve_fake: Serve) -> None:
    with serve_fake() as running:
        port = running.url.rpartition(":")[2]
        for host in (f"localhost:{port}", "127.0.0.1", f"[::1]:{port}", "LocalHost", "moesaic.localhost"):
            assert complete(running, headers={"Host": host}).status_code == 200, host
        for host in (
            "rebound.example",
            f"rebound.example:{port}",
            "localhost.example",
            "127.0.0.1.example",
            "10.0.0.1",
        ):
            for path in ("/", "/v1/models"):
                answer = httpx.get(f"{running.url}{path}", headers={"Host": host})
                assert answer.status_code == 403 and answer.json()["error"]["code"] == "foreign_host", host
    with serve_fake(keys=["k"]) as running:
        headers = {"Host": "served.example", "Authorization": "Bearer k"}
        assert complete(running, headers=headers).status_code == 200


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOESAIC_API_KEYS", raising=False)
    assert read_keys(None) == []
    file = tmp_path / "keys"
    file.write_text("\ufeff# ours\nfirst#key\n\n  second \n", encoding="utf-8")
    assert read_keys(str(file)) == ["first#key", "second"]
    monkeypatch.setenv("MOESAIC_API_KEYS", "third, fourth,")
    assert read_keys(str(file)) == ["first#key", "second", "third", "fourth"]
    for text, words in (
        ("# none\n", "holds no key"),
        ("a b\n", r"an API key of server.api_key_file \(.*keys\) has a space"),
        ("schlüssel\n", "ASCII"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=words):
            read_keys(str(file))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(str(tmp_path / "absent"))
    monkeypatch.setenv("MOESAIC_API_KEYS", " , ")
    with pytest.raises(ConfigError, match="MOESAIC_API_KEYS is set and holds no key"):
        read_keys(None)


def test_a_large_body_is_refused_while_it_arrives(serve_fake: Serve) -> None:
    with serve_fake(max_body_bytes=1000) as running:
        assert complete(running, {"prompt": "x" * 10, "max_tokens": 1}).status_code == 200
        response = complete(running, {"prompt": "x" * 1000})
        assert response.status_code == 413 and response.json()["error"]["code"] == "body_too_large"
        sent = 0

        def pieces() -> Iterator[bytes]:
            nonlocal sent
            for _ in range(10_000):  # chunked: no length is claimed
                sent += 1000
                yield b" " * 1000

        headers = {"Content-Type": "application/json"}
        with contextlib.suppress(httpx.WriteError, httpx.RemoteProtocolError):
            chunked = httpx.post(f"{running.url}/v1/completions", content=pieces(), headers=headers)
            assert chunked.status_code == 413
        assert complete(running).status_code == 200


def test_the_refusal_of_a_large_body_reaches_who_sends_all_of_it_first(serve_fake: Serve) -> None:
    with serve_fake(max_body_bytes=1000) as running:
        for _ in range(3):
            connection = http.client.HTTPConnection(running.url.removeprefix("http://"), timeout=30)
            connection.request("POST", "/v1/completions", b" " * 3_000_000, {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status == 413
            assert json.loads(response.read())["error"]["code"] == "body_too_large"
            connection.close()


def test_a_claim_of_more_than_would_be_read_is_refused_at_once(
    serve_fake: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.serve.server.gate._DISCARD_SECONDS", 600.0)
    with serve_fake() as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n"
            connection.sendall(head.encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_who_asks_before_sending_a_large_body_is_refused_at_once(
    serve_fake: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moesaic.serve.server.gate._DISCARD_SECONDS", 600.0)
    with serve_fake(max_body_bytes=1000) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000\r\n"
            connection.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
            assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize(
    ("soft", "hard", "expected"), [(1024, 65_536, 5376), (1024, 2048, 2048), (10_000, 65_536, None), (-1, -1, None)]
)
def test_as_many_files_may_be_open_as_requests_are_let_in(
    soft: int, hard: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    resource = pytest.importorskip("resource", reason="limits of a process are Unix's")
    asked: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda which: (soft, hard))
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append((which, limits)))
    with log_lines() as lines:
        run.allow_connections(ServerConfig())  # 256 and 1,024 waiting
    assert asked == ([] if expected is None else [(resource.RLIMIT_NOFILE, (expected, hard))])
    assert ["ulimit -Hn" in line for line in lines] == ([True] if expected == 2048 else [])


def test_connections_that_cannot_be_taken_are_one_line(serve_fake: Serve) -> None:
    with serve_fake() as running, log_lines() as lines:
        loop = running.server._loop
        assert loop is not None
        context = {"message": "socket.accept() out of system resource", "exception": OSError(24, "Too many open files")}
        for _ in range(100):
            loop.call_soon_threadsafe(loop.call_exception_handler, context)
        assert complete(running).status_code == 200
    assert sum("connections cannot be taken" in line and "Too many open files" in line for line in lines) == 1


def test_long_texts_to_tokenize_wait_for_a_place_and_short_ones_do_not(serve_fake: Serve, fake: FakeEngine) -> None:
    with (
        serve_fake(max_concurrent_requests=1, max_queued_requests=0) as running,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        served = running.app.state.served
        fake.go.clear()
        first = pool.submit(complete, running)
        until(lambda: served.admission.num_inside == 1)
        text, ids = "x" * 5000, [0] * 5000
        for path, body in (("/tokenize", {"prompt": text}), ("/detokenize", {"tokens": ids})):
            assert httpx.post(f"{running.url}{path}", json=body).status_code == 429
        assert httpx.post(f"{running.url}/tokenize", json={"prompt": "x"}).json()["count"] == 1
        fake.go.set()
        assert first.result().status_code == 200
        found = httpx.post(f"{running.url}/tokenize", json={"prompt": text}).json()
        assert httpx.post(f"{running.url}/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": text}
    assert served.admission.num_inside == 0


@pytest.mark.parametrize("path", ["/", "/health", "/ready"])
def test_who_asks_only_whether_it_is_there_gets_no_body(serve_fake: Serve, path: str) -> None:
    with serve_fake() as running:
        answer = httpx.head(f"{running.url}{path}")
        assert answer.status_code == 200 and answer.content == b""


def test_a_body_that_does_not_come_is_not_waited_for(serve_fake: Serve) -> None:
    with serve_fake(request_timeout_seconds=0.3) as running:
        host, port = running.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            connection.settimeout(20)
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_prompts_may_be_limited_below_the_model(serve_fake: Serve) -> None:
    with serve_fake(max_prompt_tokens=3, max_texts_per_request=2) as running:
        assert complete(running, {"prompt": [1, 2, 3], "max_tokens": 1}).status_code == 200
        long = complete(running, {"prompt": [1, 2, 3, 4], "max_tokens": 1})
        assert long.status_code == 400 and long.json()["error"]["code"] == "context_length_exceeded"
        assert complete(running, {"prompt": ["a", "b", "c"]}).json()["error"]["code"] == "too_many_texts"


def test_log_probabilities_of_many_texts_prompts_are_limited(
    serve_fake: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_MOST_LOGPROBS", 100)
    with serve_fake() as running:
        asked = {"prompt": [1] * 10, "max_tokens": 2, "echo": True, "logprobs": 4}
        assert complete(running, {**asked, "n": 2}).status_code == 200  # 10 * 5 for each
        for more in ({"n": 3}, {"n": 2, "logprobs": 5}, {"prompt": [[1] * 10, [1] * 11]}):
            error = complete(running, {**asked, **more}).json()["error"]
            assert error["code"] == "too_many_logprobs" and "at most 100; ask for fewer" in error["message"]
        for fewer in (
            {"n": 2, "max_tokens": 9},
            {"n": 3, "echo": False},
            {"n": 3, "logprobs": None},
            {"prompt": [1] * 30},
        ):
            assert complete(running, {**asked, **fewer}).status_code == 200


def test_so_many_are_worked_on_so_many_wait_and_the_rest_is_refused(serve_fake: Serve, fake: FakeEngine) -> None:
    with (
        serve_fake(max_concurrent_requests=2, max_queued_requests=3) as running,
        concurrent.futures.ThreadPoolExecutor(8) as pool,
    ):
        served = running.app.state.served
        fake.go.clear()
        futures = [pool.submit(complete, running) for _ in range(2)]
        until(lambda: served.admission.num_inside == 2)
        for count, priority in enumerate((5, 0, 5), start=1):
            body = {"prompt": "x", "max_tokens": 2, "priority": priority}
            futures.append(pool.submit(complete, running, body))
            until(lambda count=count: served.admission.num_waiting == count)  # type: ignore[misc]
        refused = complete(running)
        assert refused.status_code == 429 and 1 <= int(refused.headers["Retry-After"]) <= 60
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert httpx.get(f"{running.url}/health").status_code == 200
        fake.go.set()
        assert [future.result().status_code for future in futures] == [200] * 5
        assert served.admission.num_inside == served.admission.num_waiting == 0
        assert complete(running).status_code == 200


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_ends_its_request(serve_fake: Serve, fake: FakeEngine, streams: bool) -> None:
    with serve_fake() as running, log_lines() as lines:
        with httpx.Client() as client:
            if streams:
                with client.stream("POST", f"{running.url}/v1/completions", json={**ENDLESS, "stream": True}) as answer:
                    next(answer.iter_lines())
            else:
                with pytest.raises(httpx.ReadTimeout):
                    client.post(f"{running.url}/v1/completions", json=ENDLESS, timeout=0.3)
        until(lambda: not fake.has_work)
        until(lambda: running.app.state.served.admission.num_inside == 0)
        until(lambda: lines)
        assert json.loads(lines[-1])["client_left"] is True
        assert complete(running).status_code == 200


def test_one_that_leaves_the_queue_makes_room(serve_fake: Serve, fake: FakeEngine) -> None:
    with serve_fake(max_concurrent_requests=1, max_queued_requests=1) as running:
        served = running.app.state.served
        with httpx.stream("POST", f"{running.url}/v1/completions", json={**ENDLESS, "stream": True}) as answer:
            next(answer.iter_lines())
            for _ in range(3):
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{running.url}/v1/completions", json=ENDLESS, timeout=0.2)
                until(lambda: served.admission.num_waiting == 0)
        until(lambda: served.admission.num_inside == 0)
        assert complete(running).status_code == 200


@pytest.mark.parametrize("streams", [False, True])
def test_what_takes_too_long_is_ended(serve_fake: Serve, fake: FakeEngine, streams: bool) -> None:
    # A stream has to have begun by then, on a busy machine too.
    with serve_fake(request_timeout_seconds=4.0 if streams else 0.5) as running:
        response = complete(running, {**ENDLESS, "stream": streams})
        if streams:
            assert response.status_code == 200
            events = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
            assert json.loads(events[-1])["error"]["code"] == "timeout" and "[DONE]" not in events
        else:
            assert response.status_code == 504 and response.json()["error"]["code"] == "timeout"
        until(lambda: not fake.has_work)


def test_a_chat_template_that_goes_on_for_ever_ends_with_its_request(
    fake: FakeEngine, chat_tokenizer: Tokenizer
) -> None:
    """Whoever waits for it: its thread would compute on, and keep the process from ending."""
    values = json.loads(chat_tokenizer.companions["tokenizer_config.json"])
    values["chat_template"] = (
        "{{ messages[0].content }}{% if messages[0].content == 'long' %}"
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    )
    tokenizer = Tokenizer(chat_tokenizer.json_text, companions={"tokenizer_config.json": json.dumps(values)})
    config = ServerConfig(request_timeout_seconds=0.5)
    app = create_app(AsyncEngine(fake), tokenizer, config, name="fake", max_length=fake.max_length, hidden_size=2)

    def threads() -> list[threading.Thread]:
        return [each for each in threading.enumerate() if each.name == "chat template"]

    with live(app) as running:
        for content, status in (("long", 504), ("long", 504), ("a", 200)):
            body = {"messages": [{"role": "user", "content": content}], "max_tokens": 2}
            response = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=30)
            assert response.status_code == status, response.text
            until(lambda: not threads())
        with pytest.raises(httpx.ReadTimeout):  # a client that goes before
            body["messages"][0]["content"] = "long"
            httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=0.2)
        until(lambda: not threads())


@pytest.mark.parametrize("streams", [False, True])
def test_a_failing_engine_answers_everybody_and_goes_on(serve_fake: Serve, fake: FakeEngine, streams: bool) -> None:
    with serve_fake() as running:
        for _ in range(3):
            fake.num_failing_steps = 1
            response = complete(running, {**ENDLESS, "stream": streams})
            if streams:
                with pytest.raises(openai.APIError, match="a step of the engine failed"):
                    fake.num_failing_steps = 1
                    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="-", max_retries=0) as client:
                        list(client.completions.create(model="fake", prompt="x", max_tokens=9, stream=True))
            else:
                assert response.status_code == 500
                assert "step of the engine failed" in response.json()["error"]["message"]
        unhealthy = httpx.get(f"{running.url}/health")
        assert unhealthy.status_code == 503 and "steps of the engine failed" in unhealthy.json()["error"]["message"]
        assert httpx.get(f"{running.url}/ready").status_code == 503
        assert complete(running).status_code == 200
        assert httpx.get(f"{running.url}/health").status_code == 200


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_vectors_that_are_no_numbers_are_the_servers_failure(
    serve_fake: Serve, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, encoding_format: str
) -> None:
    def broken(_: object) -> Tensor:
        raise NotFiniteError("the vector has NaN in it; numbers are required; evaluate the model.")

    monkeypatch.setattr(fake, "embed_in_pieces", broken)
    with serve_fake() as running:
        body = {"input": "x", "encoding_format": encoding_format}
        response = httpx.post(f"{running.url}/v1/embeddings", json=body)
        assert response.status_code == 500 and response.json()["error"]["code"] == "engine_error"


def test_what_nobody_foresaw_is_an_error_of_the_usual_shape(
    serve_fake: Serve, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> str:
        raise ZeroDivisionError("a secret prompt")

    monkeypatch.setattr(fake, "add_request", broken)
    with serve_fake() as running, log_lines() as lines:
        response = complete(running, headers={"X-Request-Id": "mine-1"})
        assert response.status_code == 500 and "mine-1" in response.json()["error"]["message"]
        until(lambda: lines)
        line = json.loads(lines[-1])
        assert line["exception"] == "ZeroDivisionError" and any("broken" in frame for frame in line["trace"])
        assert "secret" not in "".join(lines) + response.text


def test_every_request_has_a_name_and_a_line_without_its_text(serve_fake: Serve) -> None:
    with serve_fake() as running, log_lines() as lines:
        response = complete(running, {"prompt": "a secret prompt", "max_tokens": 2}, headers={"X-Request-Id": "id-7"})
        assert response.headers["X-Request-Id"] == "id-7"
        for name in ("", "a b", "x" * 129, 'a"b'):
            other = complete(running, {"secret": "a secret key"}, headers={"X-Request-Id": name})
            assert re.fullmatch(r"req-[0-9a-f]{24}", other.headers["X-Request-Id"])
        until(lambda: len(lines) == 5)
        first = json.loads(lines[0])
        assert first["request_id"] == "id-7" and first["path"] == "/v1/completions" and first["status"] == 200
        assert first["completion_tokens"] == 2 and first["finish_reasons"] == ["length"] and first["seconds"] > 0
        assert json.loads(lines[1])["error"] == "unknown_key"
        assert "secret" not in "".join(lines)


def test_a_line_has_counts_however_the_answer_was_given(serve_fake: Serve) -> None:
    with serve_fake(request_timeout_seconds=2) as running, log_lines() as lines:
        complete(running, {"prompt": [1, 2, 3], "max_tokens": 2, "stream": True})
        httpx.post(f"{running.url}/v1/embeddings", json={"input": [[1, 2, 3, 4]]})
        assert complete(running, {**ENDLESS, "prompt": [1, 2]}).status_code == 504
        until(lambda: len(lines) == 3)
        stream, embedding, late = map(json.loads, lines)
        assert (stream["prompt_tokens"], stream["completion_tokens"], stream["finish_reasons"]) == (3, 2, ["length"])
        assert embedding["prompt_tokens"] == 4
        assert late["prompt_tokens"] == 2 and late["completion_tokens"] > 0 and late["finish_reasons"] == []
        assert all("queue_seconds" in line for line in (stream, embedding, late))


def test_a_line_says_how_long_a_request_waited(serve_fake: Serve, fake: FakeEngine) -> None:
    with (
        serve_fake(max_concurrent_requests=1) as running,
        concurrent.futures.ThreadPoolExecutor(2) as pool,
        log_lines() as lines,
    ):
        admission = running.app.state.served.admission
        fake.go.clear()
        first = pool.submit(complete, running)
        until(lambda: admission.num_inside == 1)
        second = pool.submit(complete, running)
        until(lambda: admission.num_waiting == 1)
        time.sleep(0.05)
        fake.go.set()
        assert first.result().status_code == second.result().status_code == 200
        until(lambda: len(lines) == 2)
        assert max(json.loads(line)["queue_seconds"] for line in lines) >= 0.05


def test_durations_are_of_what_had_its_turn(serve_fake: Serve) -> None:
    with serve_fake(keys=("k",)) as running:
        key = {"Authorization": "Bearer k"}
        assert complete(running).status_code == 401
        assert httpx.get(f"{running.url}/v1/completions", headers=key).status_code == 405
        assert complete(running, headers=key).status_code == 200
        text = httpx.get(f"{running.url}/metrics", headers=key).text
        assert "moesaic_request_seconds_count 1.0" in text and "moesaic_queue_seconds_count 1.0" in text


def test_without_a_compiler_grammars_are_refused(serve_fake: Serve) -> None:
    with serve_fake() as running:
        response = complete(running, {"prompt": "x", "grammar": {"kind": "json_object"}})
        assert response.status_code == 400 and response.json()["error"]["code"] == "not_installed"


def test_the_page_and_its_policy(serve_fake: Serve, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("<!doctype html><title>page</title>")
    (tmp_path / "page.js").write_text("export const a = 1;")
    with serve_fake(web_folder=tmp_path) as running:
        page = httpx.get(f"{running.url}/")
        assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
        script = httpx.get(f"{running.url}/static/page.js")
        assert "javascript" in script.headers["content-type"]
        for response in (page, script, httpx.get(f"{running.url}/health")):
            assert response.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Referrer-Policy"] == "no-referrer"
        for path in ("/static/absent.js", "/static/%2e%2e/conftest.py", "/static/"):
            assert httpx.get(f"{running.url}{path}").status_code == 404
    with serve_fake(web_folder=tmp_path / "absent") as running:
        assert httpx.get(f"{running.url}/").json()["error"]["code"] == "unknown_path"


def test_other_origins_may_ask_only_where_the_config_says(serve_fake: Serve) -> None:
    asks = {"Origin": "https://example.org", "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type,x-stainless-os"}  # fmt: skip
    with serve_fake(keys=("k",)) as running:
        response = httpx.options(f"{running.url}/v1/completions", headers=asks)
        assert "access-control-allow-origin" not in response.headers
    with serve_fake(keys=("k",), allowed_origins=("https://example.org",)) as running:
        response = httpx.options(f"{running.url}/v1/completions", headers=asks)
        assert response.status_code == 200
        assert response.headers["access-control-allow-origin"] == "https://example.org"
        refused = httpx.options(f"{running.url}/v1/completions", headers={**asks, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in refused.headers
        answer = complete(running, headers={"Origin": "https://example.org", "Authorization": "Bearer k"})
        assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://example.org"
        assert complete(running, headers={"Origin": "https://example.org"}).status_code == 401


def test_while_it_drains_newcomers_are_refused_and_what_runs_finishes(serve_fake: Serve, fake: FakeEngine) -> None:
    with serve_fake(drain_seconds=60) as running:
        body = {"prompt": "x", "max_tokens": 50, "stream": True}
        fake.go.clear()
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=30) as answer:
            assert answer.status_code == 200  # it is under way, without a token so far
            running.server.handle_exit(signal.SIGTERM, None)
            refused = complete(running)
            assert refused.status_code == 503 and "Retry-After" in refused.headers
            assert httpx.get(f"{running.url}/ready").status_code == 503
            assert httpx.get(f"{running.url}/health").status_code == 200
            fake.go.set()
            assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"
        until(lambda: running.server.should_exit)


def test_at_the_end_of_the_drain_what_still_runs_is_ended(serve_fake: Serve, fake: FakeEngine) -> None:
    with serve_fake(drain_seconds=0.2) as running, concurrent.futures.ThreadPoolExecutor(1) as pool:
        whole = pool.submit(complete, running, ENDLESS)
        until(lambda: running.app.state.served.admission.num_inside == 1)
        with httpx.stream("POST", f"{running.url}/v1/completions", json={**ENDLESS, "stream": True}) as answer:
            lines = answer.iter_lines()
            next(lines)
            running.server.handle_exit(signal.SIGTERM, None)
            rest = [line for line in lines if line]
        assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "aborted"
        refused = whole.result()
        assert refused.status_code == 503 and "Retry-After" in refused.headers
        assert refused.json()["error"]["code"] == "aborted"
        assert not fake.has_work


@contextlib.contextmanager
def unread_stream(running: Live) -> Iterator[socket.socket]:
    """A stream without end, of which a client reads the beginning only."""
    host, port = running.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        body = json.dumps({**ENDLESS, "stream": True, "n": 100}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        connection.recv(10)
        yield connection


def test_a_client_that_does_not_read_keeps_no_place_beyond_its_time(serve_fake: Serve, fake: FakeEngine) -> None:
    with serve_fake(request_timeout_seconds=2, max_concurrent_requests=1) as running, unread_stream(running):
        until(lambda: running.app.state.served.admission.num_inside == 0)
        until(lambda: not fake.has_work)
        assert complete(running).status_code == 200


def test_a_client_that_does_not_read_is_no_failure_of_the_server(
    serve_fake: Serve, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(run, "_FAREWELL_SECONDS", 0.3)
    with serve_fake(drain_seconds=0.2) as running, log_lines() as lines, unread_stream(running):
        until(lambda: fake.num_steps > 1000)  # 20 MB and more, which no buffer holds
        running.server.handle_exit(signal.SIGTERM, None)
        until(lambda: any("client_left" in line for line in lines))
    assert "Traceback" not in caplog.text and not any("exception" in line for line in lines)


def test_a_drain_of_no_time_warns_of_nobody(serve_fake: Serve, caplog: pytest.LogCaptureFixture) -> None:
    with serve_fake(drain_seconds=0) as running:
        assert complete(running).status_code == 200
        running.server.handle_exit(signal.SIGTERM, None)
        until(lambda: running.server.should_exit)
    assert "had not finished" not in caplog.text
