"""The page that a server shows, in a real Chromium: against a server of a few lines whose pace and answers tests set."""

import http.server
import json
import math
import select
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import moesaic

WEB = Path(moesaic.__file__).parent / "serve" / "web"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


class FakeServer(http.server.ThreadingHTTPServer):
    """Speaks what the page needs. Tests set the attributes; `bodies` records what was asked.

    num_experts: one count per MoE layer, which are the model's odd layers. tokens: what an answer consists of. pace:
    None sends them at once; otherwise each waits for a release. failure: (status, error message, headers) of the next
    request for text. cut: the connection ends after so many tokens.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.num_experts: tuple[int, ...] = (8, 8, 16)
        self.top_k = 2
        self.has_chat_template: bool | None = True
        self.key: str | None = None
        self.tokens = ["The", " state", " of", " the", " Union", " is", "\n", "str", "ong", "."]
        self.pace: threading.Semaphore | None = None
        self.failure: tuple[int, str, dict[str, str]] | None = None
        self.cut: int | None = None
        self.finish_reason = "stop"
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.aborted = threading.Event()
        self.steps = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def layers_of(self, token: int) -> list[dict[str, Any]]:
        """Return the experts of one token: ids that differ by layer and token, weights that sum to one."""
        layers = []
        for row, count in enumerate(self.num_experts):
            ids = [(5 * token + 3 * row + count // self.top_k * place) % count for place in range(self.top_k)]
            weights = [2.0**-place for place in range(self.top_k)]
            layers.append(
                {"layer": 2 * row + 1, "expert_ids": ids, "weights": [weight / sum(weights) for weight in weights]}
            )
        return layers

    def experts(self) -> dict[str, Any]:
        """In each layer expert 1 has three times what others have, and the last expert nothing."""
        layers = []
        for row, count in enumerate(self.num_experts):
            tokens = [100] * count
            tokens[1], tokens[-1] = 300, 0
            shares = [value / sum(tokens) for value in tokens if value]
            layers.append(
                {
                    "layer": 2 * row + 1,
                    "num_experts": count,
                    "top_k": self.top_k,
                    "tokens_per_expert": tokens,
                    "recent_tokens_per_expert": [float(value) for value in tokens],
                    "entropy": -sum(share * math.log(share) for share in shares) / math.log(count),
                    "hot": [1],
                    "dead": [count - 1],
                }
            )
        return {"layers": layers, "num_steps": self.steps}

    def stats(self) -> dict[str, Any]:
        """Fifty tokens a step, ten steps a second."""
        self.steps = int(10 * time.monotonic())
        return {
            "num_running": 3,
            "num_waiting": 1,
            "kv_blocks_used": 25,
            "kv_blocks_cached": 10,
            "kv_blocks_total": 100,
            "num_steps": self.steps,
            "num_prompt_tokens": 100 * self.steps,
            "num_cached_tokens": 20 * self.steps,
            "num_generated_tokens": 50 * self.steps,
            "num_preemptions": 0,
            "num_finished": 7,
            "num_drafted_tokens": 0,
            "num_accepted_tokens": 0,
            "step_seconds": 0.02,
            "step_tokens": 50,
            "distinct_experts_per_step": 6.5 if self.num_experts else 0.0,
            "uptime_seconds": 3725.0,
            "model": "tiny",
            "ttft_seconds": {"p50": 0.12, "p90": 0.3, "p99": 1.5},
            "time_per_output_token_seconds": {"p50": 0.02, "p90": 0.03, "p99": 0.05},
        }


class FakeHandler(http.server.BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def answer(self, status: int, body: bytes, content_type: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Security-Policy", POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def answer_json(self, status: int, value: object, headers: dict[str, str] | None = None) -> None:
        self.answer(status, json.dumps(value).encode(), "application/json", headers)

    def answer_error(self, status: int, message: str, headers: dict[str, str] | None = None) -> None:
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
        self.answer_json(status, {"error": error}, headers)

    def has_key(self) -> bool:
        if self.server.key is None or self.headers["Authorization"] == f"Bearer {self.server.key}":
            return True
        self.answer_error(401, "No API key was given; this server requires one; set it in the settings.")
        return False

    def do_GET(self) -> None:
        name = "index.html" if self.path == "/" else self.path.removeprefix("/static/")
        file = WEB / name
        if self.path == "/" or (self.path.startswith("/static/") and file.is_file()):
            self.answer(200, file.read_bytes(), TYPES[file.suffix])
        elif not self.path.startswith("/v1/"):
            self.answer_error(404, f"there is nothing at {self.path}")
        elif not self.has_key():
            return
        elif self.path == "/v1/models":
            model: dict[str, Any] = {"id": "tiny", "object": "model"}
            if self.server.has_chat_template is not None:
                model["has_chat_template"] = self.server.has_chat_template
            self.answer_json(200, {"object": "list", "data": [model]})
        elif self.path == "/v1/experts":
            self.answer_json(200, self.server.experts())
        elif self.path == "/v1/stats":
            self.answer_json(200, self.server.stats())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.has_key():
            return
        self.server.bodies.append((self.path, body))
        if self.server.failure:
            status, message, headers = self.server.failure
            self.server.failure = None
            self.answer_error(status, message, headers)
        elif self.path == "/v1/chat/completions" and not self.server.has_chat_template:
            self.answer_error(400, "this model has no chat template; use /v1/completions instead.")
        else:
            self.answer(200, b"", "text/event-stream")
            try:
                self.stream(self.path == "/v1/chat/completions", body)
            except OSError:
                self.server.aborted.set()

    def send_event(self, value: object) -> None:
        self.wfile.write(f"data: {json.dumps(value)}\n\n".encode())

    def wait_for_turn(self) -> None:
        """Wait until the test lets the next token go. Raises: OSError when the client has gone."""
        while self.server.pace is not None and not self.server.pace.acquire(timeout=0.02):
            if select.select([self.connection], [], [], 0)[0] and not self.connection.recv(1, socket.MSG_PEEK):
                raise OSError("the client has gone")

    def stream(self, is_chat: bool, body: dict[str, Any]) -> None:
        if is_chat:
            self.send_event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        for place, token in enumerate(self.server.tokens):
            self.wait_for_turn()
            if place == self.server.cut:
                return
            choice: dict[str, Any] = {"index": 0, "finish_reason": None}
            choice |= {"delta": {"content": token}} if is_chat else {"text": token}
            if body.get("return_experts"):
                choice["experts"] = [{"token_id": place, "token": token, "layers": self.server.layers_of(place)}]
            self.send_event({"choices": [choice]})
        last: dict[str, Any] = {"index": 0, "finish_reason": self.server.finish_reason}
        self.send_event({"choices": [last | ({"delta": {}} if is_chat else {"text": ""})]})
        self.send_event({"choices": [], "usage": {"completion_tokens": len(self.server.tokens)}})
        self.wfile.write(b"data: [DONE]\n\n")
