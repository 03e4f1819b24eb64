"""The page that a server shows, in a real Chromium, against a small server whose pace and answers the tests set."""

import http.server
import json
import math
import re
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import moesaic

WEB = Path(moesaic.__file__).parent / "serve" / "web"
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
TIMES = "\N{MULTIPLICATION SIGN}"
TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}


class FakeServer(http.server.ThreadingHTTPServer):
    """Speaks what the page needs. Tests set the attributes; `bodies` records what was asked.

    num_experts: one count per MoE layer, which are the model's odd layers. tokens: what an answer consists of. pace:
    None sends them at once; otherwise each waits for a release. failure: (status, error message, headers) of the next
    request for text, and failure_code the code of all errors. cut: the connection ends after so many tokens.
    knows_experts: until it is set, /v1/experts does not answer.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), FakeHandler)
        self.num_experts: tuple[int, ...] = (8, 8, 16)
        self.top_k = 2
        self.has_chat_template: bool | None = True
        self.model = "tiny"
        self.answers_as: str | None = None  # what events call the model; None: nothing
        self.key: str | None = None
        self.knows_experts = threading.Event()
        self.knows_experts.set()
        self.tokens = ["The", " state", " of", " the", " Union", " is", "\n", "str", "ong", "."]
        self.pace: threading.Semaphore | None = None
        self.failure: tuple[int, str, dict[str, str]] | None = None
        self.failure_code: str | None = None
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
            if count > 2:
                tokens[1], tokens[-1] = 300, 0
            shares = [value / sum(tokens) for value in tokens if value]
            evenness = -sum(share * math.log(share) for share in shares) / math.log(max(count, 2))
            layers.append(
                {
                    "layer": 2 * row + 1,
                    "num_experts": count,
                    "top_k": self.top_k,
                    "tokens_per_expert": tokens,
                    "recent_tokens_per_expert": [float(value) for value in tokens],
                    "entropy": evenness,
                    "hot": [expert for expert, value in enumerate(tokens) if value == 300],
                    "dead": [expert for expert, value in enumerate(tokens) if value == 0],
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
            "model": self.model,
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
        error = {"message": message, "type": "invalid_request_error", "param": None, "code": self.server.failure_code}
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
            model: dict[str, Any] = {"id": self.server.model, "object": "model"}
            if self.server.has_chat_template is not None:
                model["has_chat_template"] = self.server.has_chat_template
            self.answer_json(200, {"object": "list", "data": [model]})
        elif self.path == "/v1/experts":
            self.server.knows_experts.wait(60)
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

    def send_event(self, value: dict[str, Any]) -> None:
        if self.server.answers_as is not None:
            value = {**value, "model": self.server.answers_as}
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


@pytest.fixture
def server() -> Iterator[FakeServer]:
    fake = FakeServer()
    thread = threading.Thread(target=fake.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield fake
    fake.shutdown()
    fake.server_close()


@pytest.fixture
def open_page(server: FakeServer, open_address: Callable[..., Any]) -> Callable[..., Any]:
    """A function (fragment="", width=1200, height=900, scheme="light") that opens the fake server's page.

    The server is made first, so that pages are closed before it is.
    """
    return lambda fragment="", **looks: open_address(server.url + fragment, **looks)


def send(page: Any, text: str = "Hello") -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def finished(page: Any) -> Any:
    return page.locator(".foot:not(:empty)")


def wait_until(page: Any, condition: str, value: Any = None) -> None:
    """Wait until a condition in JavaScript holds.

    Playwright's own wait evaluates it in the page once more when it did not hold at once, which the page's policy
    forbids.
    """
    for _ in range(800):
        if page.evaluate(condition, value):
            return
        page.wait_for_timeout(10)
    raise AssertionError(condition)


def is_ready(page: Any) -> None:
    page.locator('#status[data-state="ready"]').wait_for()


def routes_shown(page: Any) -> list[tuple[str, str]]:
    rows = page.locator("#token-routes tr").all()
    return [(row.locator("th").inner_text(), " ".join(row.locator(".route").all_inner_texts())) for row in rows]


def routes_of(server: FakeServer, token: int) -> list[tuple[str, str]]:
    """Return what the table should say of a token: per layer its experts and their weights."""
    return [
        (
            str(layer["layer"]),
            " ".join(
                f"{expert} ({weight:.2f})" for expert, weight in zip(layer["expert_ids"], layer["weights"], strict=True)
            ),
        )
        for layer in server.layers_of(token)
    ]


def test_an_answer_appears_piece_by_piece(server: FakeServer, open_page: Any, expect: Any) -> None:
    server.pace = threading.Semaphore(0)
    page = open_page()
    send(page)
    text = ""
    for token in server.tokens:
        expect(page.locator(".answer")).to_have_text(text, use_inner_text=False)
        assert page.locator(".answer").evaluate("node => node.textContent") == text
        server.pace.release()
        text += token
        wait_until(page, "text => document.querySelector('.answer').textContent === text", text)
    expect(finished(page)).to_contain_text("10 tokens")
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def test_the_last_line_of_an_answer_comes_into_sight(server: FakeServer, open_page: Any, expect: Any) -> None:
    server.tokens = ["line\n"] * 80
    server.pace = threading.Semaphore(79)
    page = open_page()
    send(page)
    wait_until(page, "document.querySelector('.answer').textContent.length === 79 * 5")
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
    server.tokens[79] = ""  # nothing more to be seen but the foot
    server.pace.release()
    expect(finished(page)).to_contain_text("80 tokens")
    expect(finished(page)).to_be_in_viewport(ratio=1)


@pytest.mark.parametrize("count", [2, 7, 8])
def test_a_rate_is_shown_of_so_many_tokens_as_have_one(
    server: FakeServer, open_page: Any, expect: Any, count: int
) -> None:
    server.tokens = server.tokens[:count]
    server.pace = threading.Semaphore(1)
    page = open_page()
    send(page)
    page.locator(".token").first.wait_for()
    server.pace.release(count)
    expect(finished(page)).to_contain_text(f"{count} tokens")
    assert ("tokens/s" in finished(page).inner_text()) == (count == 8)


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</script>",
    "<script>alert(2)</script>",
    " &lt;b&gt; ",
    "<svg onload=alert(3)>",
]


def test_letters_of_the_right_begin_there(server: FakeServer, open_page: Any, expect: Any) -> None:
    server.tokens = ["שלום", " (", "טוב", ") ", "123", "."]
    page = open_page()
    send(page, "מה נשמע? 1.")
    expect(finished(page)).to_be_visible()
    ends = """node => {
        const range = document.createRange(), walker = document.createTreeWalker(node, NodeFilter.SHOW_TEXT);
        const texts = [];
        while (walker.nextNode()) if (walker.currentNode.length) texts.push(walker.currentNode);
        const left = (text, place) => {
            range.setStart(text, place);
            range.setEnd(text, place + 1);
            return range.getBoundingClientRect().left;
        };
        return [left(texts[0], 0), left(texts.at(-1), texts.at(-1).length - 1)];
    }"""
    for kind in (".user", ".answer"):
        first, last = page.locator(kind).evaluate(ends)
        assert first > last, kind
    assert page.get_by_label("Message").get_attribute("dir") == "auto"


def test_a_token_does_not_turn_the_words_of_its_label_around(server: FakeServer, open_page: Any, expect: Any) -> None:
    server.tokens = ["\u202eevil", " and", " good"]
    page = open_page()
    is_ready(page)
    send(page)
    expect(finished(page)).to_be_visible()
    page.locator(".token").first.focus()
    expect(page.locator("#map-status")).to_have_text("“U+202E evil”: its experts in every layer")
    expect(page.locator("#token-name")).to_have_text("U+202E evil")


def test_markup_of_models_and_users_shows_as_text(server: FakeServer, open_page: Any, expect: Any) -> None:
    server.tokens = HOSTILE
    page = open_page()
    is_ready(page)
    send(page, "".join(HOSTILE))
    expect(finished(page)).to_be_visible()
    assert page.locator(".answer").evaluate("node => node.textContent") == "".join(HOSTILE)
    expect(page.locator(".user")).to_contain_text("".join(HOSTILE).strip())
    assert page.locator("#messages :is(img, script, svg, b)").count() == 0
    page.locator(".token").first.hover()
    expect(page.locator("#token-name")).to_have_text(HOSTILE[0])
    server.failure = (400, "".join(HOSTILE), {})
    send(page)
    expect(page.locator(".failure p")).to_have_text("".join(HOSTILE).strip())
    assert page.locator("#messages :is(img, script, svg, b)").count() == 0


@pytest.mark.parametrize("way", ["button", "Escape", "Clear"])
def test_stopping_ends_the_request_at_the_server(server: FakeServer, open_page: Any, expect: Any, way: str) -> None:
    server.pace = threading.Semaphore(2)
    page = open_page()
    send(page)
    expect(page.locator(".answer")).to_contain_text("The state")
    if way == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop" if way == "button" else way).click()
    assert server.aborted.wait(5)
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    if way == "Clear":
        expect(page.locator("#messages li")).to_have_count(0)
        return
    expect(finished(page)).to_contain_text("stopped")
    expect(page.locator(".answer")).to_have_text("The state")
    # What was said until then belongs to the conversation.
    server.pace = None
    send(page, "Go on")
    expect(finished(page)).to_have_count(2)
    assert [message["content"] for message in server.bodies[-1][1]["messages"]] == ["Hello", "The state", "Go on"]


def test_keys_of_an_input_method_neither_send_nor_stop(server: FakeServer, open_page: Any, expect: Any) -> None:
    server.pace = threading.Semaphore(2)
    page = open_page()
    send(page)
    expect(page.locator(".answer")).to_have_text("The state")
    field = page.get_by_label("Message")
    field.fill("next")
    for key in ("Enter", "Escape"):
        field.dispatch_event("keydown", {"key": key, "isComposing": True})
    server.pace.release(8)
    expect(page.locator(".answer")).to_have_text("".join(server.tokens))
    expect(finished(page)).not_to_contain_text("stopped")
    field.dispatch_event("keydown", {"key": "Enter", "isComposing": True})
    expect(field).to_have_value("next")
    # Safari ends a composition before the key that ended it; 229 tells.
    field.dispatch_event("keydown", {"key": "Enter", "keyCode": 229})
    expect(field).to_have_value("next")
    assert len(server.bodies) == 1


def test_a_lost_connection_is_told_and_tried_again(server: FakeServer, open_page: Any, expect: Any) -> None:
    server.cut = 3
    page = open_page()
    send(page)
    expect(page.locator(".failure")).to_contain_text("ended before the answer did")
    expect(page.locator(".answer")).to_have_text("The state of")
    server.cut = None
    page.get_by_role("button", name="Try again").click()
    expect(page.locator(".answer")).to_have_text("".join(server.tokens))
    expect(page.locator(".failure")).to_have_count(0)


def test_a_refused_message_says_why_and_is_not_sent_on(server: FakeServer, open_page: Any, expect: Any) -> None:
    server.failure = (429, "64 requests run and 64 wait; no more are taken; come back later.", {"Retry-After": "7"})
    page = open_page()
    send(page, "First")
    expect(page.locator(".failure p")).to_have_text(
        "64 requests run and 64 wait; no more are taken; come back later. The server asks to wait 7 s."
    )
    expect(page.locator("#messages")).to_contain_text("First")
    send(page, "Second")
    expect(finished(page)).to_be_visible()
    assert server.bodies[-1][1]["messages"] == [{"role": "user", "content": "Second"}]


def test_the_end_of_the_answer_stays_in_sight_until_the_reader_goes_up(
    server: FakeServer, open_page: Any, expect: Any
) -> None:
    server.tokens = [f"{line}\n" for line in range(120)]
    server.pace = threading.Semaphore(60)
    page = open_page()
    is_ready(page)  # before it knows of experts, an answer is not divided into tokens
    send(page)
    expect(page.get_by_text("59", exact=True)).to_be_in_viewport()
    page.locator("#conversation").hover()
    page.mouse.wheel(0, -3000)
    expect(page.locator(".user")).to_be_in_viewport()
    server.pace.release(60)
    expect(finished(page)).to_be_attached()
    expect(page.locator(".user")).to_be_in_viewport()


def test_an_answer_that_was_cut_says_so(server: FakeServer, open_page: Any, expect: Any) -> None:
    server.finish_reason = "length"
    page = open_page()
    send(page)
    expect(finished(page)).to_contain_text("cut at the most tokens allowed")


def test_a_key_is_asked_for_and_kept_only_when_told(server: FakeServer, open_page: Any, expect: Any) -> None:
    server.key = "secret"
    page = open_page()
    expect(page.locator("#status")).to_have_text("needs an API key")
    send(page, "Please")
    expect(page.get_by_label("API key")).to_be_focused()
    expect(page.locator("#key-message")).to_contain_text("with an API key only")
    page.keyboard.type("sécret")  # which no header can carry
    page.keyboard.press("Enter")
    expect(page.locator("#key-message")).to_contain_text("ASCII only")
    expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-message")).to_contain_text("does not take this key")
    expect(page.locator("#status")).to_have_text("wrong API key")
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator(".answer")).to_have_text("".join(server.tokens))
    expect(page.locator("#model")).to_have_text("tiny")
    assert page.evaluate("JSON.stringify([{...sessionStorage}, {...localStorage}])") == "[{},{}]"
    page.get_by_label("Keep it").check()
    page.reload()
    is_ready(page)
    assert page.evaluate("Object.values(sessionStorage)") == ["secret"]
    assert page.evaluate("Object.values(localStorage)") == []
    page.get_by_text("Settings").click()
    page.get_by_label("Keep it").uncheck()
    page.reload()
    expect(page.locator("#status")).to_have_text("needs an API key")


def test_a_key_is_taken_by_the_first_click(server: FakeServer, open_page: Any, expect: Any) -> None:
    """The button stays where it is while it is pressed, though the field has been left by then."""
    server.key = "secret"
    page = open_page()
    send(page, "Please")
    expect(page.locator("#key-message")).to_contain_text("with an API key only")
    for key, said in (("wrong", "does not take this key"), ("secret", "")):
        page.get_by_label("API key").focus()
        page.get_by_label("API key").fill("")
        page.keyboard.type(key)
        page.get_by_role("button", name="Use it").click()
        expect(page.locator("#key-message")).to_have_text(re.compile(said) if said else "")
    expect(page.locator(".answer")).to_have_text("".join(server.tokens))


@pytest.mark.parametrize("told", [False, None])
def test_a_model_without_a_chat_template_continues_text(
    server: FakeServer, open_page: Any, expect: Any, told: bool | None
) -> None:
    server.has_chat_template = told
    page = open_page()
    is_ready(page)
    for text in ("Once", "Then"):
        send(page, text)
        expect(finished(page)).to_have_count(1 if text == "Once" else 2)
    expect(page.get_by_text("no chat template")).to_be_visible()
    # Where the server did not say it beforehand, its refusal does, once.
    refused = ["/v1/chat/completions"] if told is None else []
    assert [path for path, _ in server.bodies] == [*refused, "/v1/completions", "/v1/completions"]
    assert server.bodies[-1][1]["prompt"] == "Once\n" + "".join(server.tokens) + "\nThen"


@pytest.mark.parametrize("has_template", [True, False])
def test_where_less_fits_than_the_settings_allow_that_is_asked_for(
    server: FakeServer, open_page: Any, expect: Any, has_template: bool
) -> None:
    server.has_chat_template = has_template
    server.failure_code = "context_length_exceeded"
    server.failure = (400, "max_tokens is 256; behind a prompt of 9 tokens at most 151 fit into 160; lower it.", {})
    page = open_page()
    is_ready(page)
    send(page)
    expect(finished(page)).to_have_count(1)
    (path, first), (again, second) = server.bodies
    assert path == again and second == {**first, "max_tokens": 151}
    expect(finished(page)).not_to_contain_text("conversation is full")
    server.failure = (400, "max_tokens is 256; behind a prompt of 30 tokens at most 2 fit into 160; lower it.", {})
    server.finish_reason = "length"
    send(page)
    expect(finished(page).last).to_contain_text("cut where the conversation is full")


def test_settings_are_sent_and_wrong_ones_are_not(server: FakeServer, open_page: Any, expect: Any) -> None:
    page = open_page()
    is_ready(page)
    send(page)
    expect(finished(page)).to_have_count(1)
    body = server.bodies[-1][1]
    assert (body["model"], body["temperature"], body["top_p"], body["max_tokens"]) == ("tiny", 0.7, 1, 256)
    assert "seed" not in body
    page.get_by_text("Settings").click()
    for label, value in (("Temperature", "0"), ("Top p", "0.9"), ("Most tokens", "12"), ("Seed", "0")):
        page.get_by_label(label).fill(value)
    send(page)
    expect(finished(page)).to_have_count(2)
    body = server.bodies[-1][1]
    assert (body["temperature"], body["top_p"], body["max_tokens"], body["seed"]) == (0, 0.9, 12, 0)
    page.get_by_label("Temperature").fill("3")
    send(page, "Kept")
    expect(page.locator("#settings-message")).to_contain_text("Temperature: ")
    expect(page.get_by_label("Temperature")).to_be_focused()
    expect(page.get_by_label("Message")).to_have_value("Kept")
    assert len(server.bodies) == 2
    page.get_by_label("Temperature").fill("1")
    expect(page.locator("#settings-message")).to_be_empty()


@pytest.mark.parametrize("way", ["hover", "focus"])
def test_a_token_shows_its_experts(server: FakeServer, open_page: Any, expect: Any, way: str) -> None:
    page = open_page()
    is_ready(page)
    send(page)
    expect(finished(page)).to_be_visible()
    for place in (4, 7, 0):
        token = page.locator(".token").nth(place)
        token.hover() if way == "hover" else token.focus()
        expect(page.locator("#token-name")).to_have_text(server.tokens[place].replace(" ", "␣"))
        assert routes_shown(page) == routes_of(server, place)
        expected = {
            (row, expert) for row, layer in enumerate(server.layers_of(place)) for expert in layer["expert_ids"]
        }
        assert ringed_cells(page, server.num_experts) == expected
    # The other view colours the same cells and no others.
    page.get_by_text("This token", exact=True).first.click()
    page.locator(".token").nth(4).hover()
    expect(page.locator("#token-name")).to_have_text("␣Union")
    expected = {(row, expert) for row, layer in enumerate(server.layers_of(4)) for expert in layer["expert_ids"]}
    assert cells_unlike_the_first_color(page, server.num_experts) == expected


def test_a_chosen_token_is_let_go_with_the_next_message(server: FakeServer, open_page: Any, expect: Any) -> None:
    page = open_page()
    is_ready(page)
    send(page)
    expect(finished(page)).to_have_count(1)
    page.locator(".token").nth(4).click()
    expect(page.locator(".token[aria-current]")).to_have_text(" Union", use_inner_text=False)
    send(page, "More")
    expect(finished(page)).to_have_count(2)
    expect(page.locator(".token[aria-current]")).to_have_count(0)
    page.locator(".answer").last.locator(".token").nth(2).click()
    expect(page.locator(".token[aria-current]")).to_have_text([" of"])


PIXELS = """async ([counts, of]) => {
  const { layoutOf } = await import("/static/heatmap.js");
  const canvas = document.getElementById("map");
  const layout = layoutOf(counts, canvas.parentElement.clientWidth);
  const context = canvas.getContext("2d");
  const pixels = [];
  for (const line of layout.lines) {
    for (let expert = line.first; expert < line.last; expert++) {
      const x = Math.floor(layout.left + (expert - line.first + 0.5) * layout.cell);
      // The upper edge of a ring, which no ring of the row above reaches; or a corner of the cell, without its mark.
      const y = of === "rings" ? line.y - 2 : line.y + 2;
      pixels.push([line.row, expert, ...context.getImageData(x, y, 1, 1).data]);
    }
  }
  return pixels;
}"""


def ringed_cells(page: Any, counts: tuple[int, ...]) -> set[tuple[int, int]]:
    ring = page.evaluate("getComputedStyle(document.getElementById('map')).textDecorationColor")
    color = [int(part) for part in ring.removeprefix("rgb(").removesuffix(")").split(",")]
    return {(row, expert) for row, expert, *rgba in page.evaluate(PIXELS, [counts, "rings"]) if rgba[:3] == color}


def cells_unlike_the_first_color(page: Any, counts: tuple[int, ...]) -> set[tuple[int, int]]:
    first = page.evaluate("import('/static/colors.js').then(({ scaleOf }) => scaleOf('light')[0])")
    return {(row, expert) for row, expert, *rgba in page.evaluate(PIXELS, [counts, "cells"]) if rgba[:3] != first}


def test_the_axes_of_the_map_have_names(server: FakeServer, open_page: Any) -> None:
    page = open_page(width=360)
    is_ready(page)
    wait_until(page, "document.getElementById('map').height > 0")
    expert, layer = page.evaluate(
        """() => {
          const canvas = document.getElementById("map");
          const hasInk = (...box) => canvas.getContext("2d").getImageData(...box).data.some((value) => value > 0);
          return [hasInk(0, 0, 30, 17), hasInk(0, 18, 12, canvas.height - 18)];
        }"""
    )
    assert expert and layer
    assert "row for each layer, a column for each expert" in page.locator("#map").get_attribute("aria-label")


@pytest.mark.parametrize("counts", [(8, 8, 16), (1,), (16, 4, 4, 32)])
def test_a_row_is_as_long_as_its_layer_has_experts(server: FakeServer, open_page: Any, counts: tuple[int, ...]) -> None:
    server.num_experts, server.top_k = counts, 1
    plain = server.experts
    # Few tokens: no marks, which would cut cells in two.
    server.experts = lambda: {  # type: ignore[method-assign]
        **plain(),
        "layers": [{**layer, "tokens_per_expert": [1] * layer["num_experts"]} for layer in plain()["layers"]],
    }
    page = open_page()
    is_ready(page)
    wait_until(page, "document.getElementById('map').height > 0")
    runs = page.evaluate(
        """async (counts) => {
          const canvas = document.getElementById("map");
          const { layoutOf } = await import("/static/heatmap.js");
          const { left, columns, cell } = layoutOf(counts, canvas.width);
          const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const isFilled = (x, y) => data[4 * (y * canvas.width + x) + 3] > 0;
          const runs = [];
          // Left of the cells are the layers' numbers, right of them the entropy.
          const right = left + columns * cell;
          for (let y = 18; y < canvas.height; y++) {
            let count = 0;
            for (let x = left - 2; x < right; x++) if (isFilled(x, y) && !isFilled(x - 1, y)) count++;
            if (count !== (runs.at(-1) ?? 0) || count === 0) runs.push(count);
          }
          return runs.filter((count, place) => count && count !== runs[place - 1]);
        }""",
        counts,
    )
    # Between two rows is a line without a cell, so that two of equal length count as two.
    assert runs == list(counts)
    words = " and ".join(str(count) for count in sorted(set(counts)))
    summary = page.locator("#map-status").inner_text()
    assert f"of {words.replace('4 and 16 and 32', '4, 16 and 32')} experts" in summary


def test_the_map_is_read_with_the_keyboard(server: FakeServer, open_page: Any, expect: Any) -> None:
    page = open_page()
    is_ready(page)
    page.get_by_role("radio", name="This token").focus()
    page.keyboard.press("Tab")
    expect(page.locator("#map")).to_be_focused()
    status = page.locator("#map-status")
    # 8 experts: six with 100 tokens, one with 300, one with none.
    expect(status).to_have_text(f"Layer 1, expert 0: 11.1 % of recent routes, 0.9 {TIMES} the mean")
    page.keyboard.press("ArrowRight")
    expect(status).to_have_text(f"Layer 1, expert 1: 33.3 % of recent routes, 2.7 {TIMES} the mean, hot")
    expect(page.locator("#map-spoken")).to_have_text(
        f"Layer 1, expert 1: 33.3 % of recent routes, 2.7 {TIMES} the mean, hot"
    )
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    expect(status).to_have_text(f"Layer 5, expert 15: 0.0 % of recent routes, 0.0 {TIMES} the mean, dead")
    page.keyboard.press("ArrowUp")
    expect(status).to_contain_text("Layer 3, expert 7: ")
    page.get_by_text("Each layer in figures").click()
    expect(page.locator("#layer-rows tr").nth(2)).to_contain_text(f"1 (2.8 {TIMES})")


def test_pointing_at_a_cell_names_it(server: FakeServer, open_page: Any, expect: Any) -> None:
    page = open_page()
    is_ready(page)
    for row, expert in ((0, 0), (2, 13), (1, 7)):
        place = page.evaluate(
            """async ([counts, row, expert]) => {
              const { layoutOf } = await import("/static/heatmap.js");
              const width = document.getElementById("map").parentElement.clientWidth;
              const { lines, left, cell, lineHeight } = layoutOf(counts, width);
              return { x: left + (expert + 0.5) * cell, y: lines[row].y + lineHeight / 2 };
            }""",
            [server.num_experts, row, expert],
        )
        page.locator("#map").hover(position=place)
        expect(page.locator("#map-status")).to_contain_text(f"Layer {2 * row + 1}, expert {expert}: ")


def test_a_cell_that_a_finger_pointed_at_is_let_go_by_the_next_touch(
    server: FakeServer, open_page: Any, expect: Any
) -> None:
    page = open_page()
    is_ready(page)
    send(page)
    expect(finished(page)).to_be_visible()
    canvas = page.locator("#map")
    box = canvas.bounding_box()
    touch = {"pointerType": "touch", "clientX": box["x"] + 40, "clientY": box["y"] + 24}
    for kind in ("pointerdown", "pointerleave"):
        canvas.dispatch_event(kind, {**touch, "bubbles": kind == "pointerdown"})
    expect(page.locator("#map-status")).to_contain_text("Layer 1, expert 0: ")
    token = page.locator(".token").nth(4)
    token.dispatch_event("pointerdown", {"pointerType": "touch", "bubbles": True})
    token.focus()
    expect(page.locator("#map-status")).to_have_text("“␣Union”: its experts in every layer")


def test_few_tokens_make_no_dead_experts(server: FakeServer, open_page: Any, expect: Any) -> None:
    plain = server.experts
    server.experts = lambda: {  # type: ignore[method-assign]
        **plain(),
        "layers": [{**layer, "tokens_per_expert": [1] * layer["num_experts"]} for layer in plain()["layers"]],
    }
    page = open_page()
    expect(page.get_by_text("Too few tokens yet")).to_be_visible()
    page.locator("#map").focus()
    page.keyboard.press("End")
    expect(page.locator("#map-status")).not_to_contain_text("dead")


def test_every_cell_of_a_large_model_can_be_seen(open_page: Any) -> None:
    page = open_page()
    layouts = page.evaluate(
        """async () => {
          const { layoutOf } = await import("/static/heatmap.js");
          const sizes = [Array(48).fill(128), Array(24).fill(64), [8, 8, 16], [1], [32, 32, 64, 128, 3]];
          const widths = [280, 332, 640, 1200];
          return sizes.flatMap((counts) => widths.map((width) => ({ counts, width, ...layoutOf(counts, width) })));
        }"""
    )
    for layout in layouts:
        assert layout["cell"] >= 6 and layout["lineHeight"] >= 7
        assert layout["left"] + layout["columns"] * layout["cell"] <= layout["width"]
        lines = layout["lines"]
        for row, count in enumerate(layout["counts"]):
            assert sum(line["last"] - line["first"] for line in lines if line["row"] == row) == count
        assert all(one["y"] + layout["lineHeight"] <= other["y"] for one, other in pairwise(lines))


def test_a_dense_model_has_no_map_and_is_not_asked_for_experts(server: FakeServer, open_page: Any, expect: Any) -> None:
    server.num_experts = ()
    page = open_page()
    is_ready(page)
    expect(page.locator("#experts")).to_be_hidden()
    send(page)
    expect(finished(page)).to_be_visible()
    assert "return_experts" not in server.bodies[-1][1]
    assert page.locator(".answer").evaluate("node => node.textContent") == "".join(server.tokens)
    page.get_by_role("link", name="Load").click()
    expect(page.locator("#figure-distinct")).to_be_hidden()
    expect(page.locator("#figure-generated")).to_be_visible()


def test_a_message_before_the_server_has_described_itself_is_answered_with_experts(
    server: FakeServer, open_page: Any, expect: Any
) -> None:
    server.knows_experts.clear()
    page = open_page()
    send(page)
    expect(finished(page)).to_contain_text("10 tokens")
    expect(page.locator(".token")).to_have_count(10)
    server.knows_experts.set()
    is_ready(page)
    page.locator(".token").nth(1).hover()
    expect(page.locator("#token-name")).to_have_text("␣state")
    assert routes_shown(page) == routes_of(server, 1)


def test_a_dense_model_not_yet_known_as_one_has_no_tokens_to_point_at(
    server: FakeServer, open_page: Any, expect: Any
) -> None:
    server.num_experts = ()
    server.knows_experts.clear()
    page = open_page()
    send(page)
    expect(finished(page)).to_contain_text("10 tokens")
    assert page.locator(".token").count() == 0
    assert page.locator(".answer").evaluate("node => node.textContent") == "".join(server.tokens)
    server.knows_experts.set()
    is_ready(page)
    expect(page.locator("#experts")).to_be_hidden()


ALIGNMENTS: dict[str, tuple[list[tuple[str, list[str]]], list[tuple[str, str]]]] = {
    # name: ((text, tokens) as they come, (piece, token) at the end)
    "together": ([("Hello", ["Hello"]), (" you", [" you"])], [("Hello", "Hello"), (" you", " you")]),
    "held back": ([("", ["a"]), ("", [" b"]), ("a b", [])], [("a", "a"), (" b", " b")]),
    "text first": ([("a b", []), ("", ["a", " b"])], [("a", "a"), (" b", " b")]),
    "bytes of one character": (
        [("", ["\ufffd"]), ("", ["\ufffd"]), ("日", ["\ufffd"]), (" x", [" x"])],
        [("", "\ufffd"), ("", "\ufffd"), ("日", "\ufffd"), (" x", " x")],
    ),
    "no leading space": ([("Hello", [" Hello"]), (" you", [" you"])], [("Hello", " Hello"), (" you", " you")]),
    "cut by a stop text": ([("a", ["a"]), (" b", [" beta", " c"])], [("a", "a"), (" b", " beta")]),
    "cut at once": ([("", ["STOP"])], []),
    "end of the text": ([("a", ["a"]), ("", ["<end>"])], [("a", "a")]),
    "special in the middle": ([("a b", ["a", "<x>", " b"])], [("a", "a"), ("", "<x>"), (" b", " b")]),
    "half a character at the end": ([("a\ufffd", ["a", "\ufffd"])], [("a", "a"), ("\ufffd", "\ufffd")]),
    "repeated": ([("no no no", ["no", " no", " no"])], [("no", "no"), (" no", " no"), (" no", " no")]),
}


def test_text_is_divided_among_tokens_and_never_lost(open_page: Any) -> None:
    page = open_page()
    for name, (steps, expected) in ALIGNMENTS.items():
        pieces, shown = page.evaluate(
            """async (steps) => {
              const { TokenAligner } = await import("/static/tokens.js");
              const aligner = new TokenAligner();
              const pieces = [];
              const shown = [];
              for (const [text, tokens] of steps) {
                pieces.push(...aligner.push(text, tokens.map((token) => ({ token }))));
                shown.push(pieces.map((piece) => piece.text).join("") + aligner.rest);
              }
              pieces.push(...aligner.push("", [], true));
              shown.push(pieces.map((piece) => piece.text).join("") + aligner.rest);
              return [pieces.map(({ text, token }) => [text, token.token]), shown];
            }""",
            steps,
        )
        assert [tuple(piece) for piece in pieces] == expected, name
        texts = ["".join(text for text, _ in steps[: count + 1]) for count in range(len(steps))]
        assert shown == [*texts, texts[-1]], name


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_events_do_not_depend_on_how_the_stream_is_cut(open_page: Any, end: str) -> None:
    page = open_page()
    stream = end.join(
        [": a comment", "data: one", "", "event: x", "data:two", "data: lines", "", "data: [DONE]", "", ""]
    )
    results = page.evaluate(
        """async (stream) => {
          const { eventsOf } = await import("/static/api.js");
          const results = [];
          for (let cut = 0; cut <= stream.length; cut++) {
            async function* pieces() { yield stream.slice(0, cut); yield stream.slice(cut); }
            const events = [];
            for await (const event of eventsOf(pieces())) events.push(event);
            results.push(events);
          }
          return results;
        }""",
        stream,
    )
    assert results == [["one", "two\nlines", "[DONE]"]] * (len(stream) + 1)


def test_the_load_page_draws_what_the_server_says(server: FakeServer, open_page: Any, expect: Any) -> None:
    page = open_page("#load")
    expect(page.locator("#chat-page")).to_be_hidden()
    # Fifty tokens a step and ten steps a second, measured over about a second by two clocks.
    expect(page.locator("#figure-generated b")).to_contain_text("tokens/s")
    rate = float(page.locator("#figure-generated b").inner_text().removesuffix(" tokens/s"))
    assert 250 < rate < 1000
    for figure, words in {
        "ttft": "p50 120 ms",
        "tpot": "p99 50 ms",
        "requests": "running 3",
        "kv": "kept for reuse 10 %",
        "distinct": "6.5",
    }.items():
        expect(page.locator(f"#figure-{figure} .keys")).to_contain_text(words)
        assert page.locator(f"#figure-{figure} .plot .line").count() >= 1
    expect(page.locator("#totals")).to_contain_text("1 h 2 min")
    page.locator("#figure-kv .plot svg").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.locator("#figure-ttft .crosshair")).to_have_count(1)


@pytest.mark.parametrize("width", [360, 1200])
def test_large_figures_have_room_beside_their_charts(
    server: FakeServer, open_page: Any, expect: Any, width: int
) -> None:
    plain = server.stats

    def busy() -> dict[str, Any]:
        stats = plain()
        return stats | dict.fromkeys(("num_prompt_tokens", "num_generated_tokens"), 400_000 * stats["num_steps"])

    server.stats = busy  # type: ignore[method-assign]
    page = open_page("#load", width=width)
    expect(page.locator("#figure-generated b")).to_contain_text("tokens/s")
    none, *ticks = page.locator("#figure-generated .at-left").all_text_contents()
    assert none == "0" and all(re.fullmatch(r"[0-9.]+M", tick) for tick in ticks)
    cut = page.evaluate("""() => [...document.querySelectorAll(".plot text")].filter((text) => {
        const inner = text.getBoundingClientRect(), outer = text.ownerSVGElement.getBoundingClientRect();
        return inner.left < outer.left - 0.5 || inner.right > outer.right + 0.5;
    }).map((text) => text.textContent)""")
    assert cut == []


def test_an_idle_server_looks_idle(server: FakeServer, open_page: Any, expect: Any) -> None:
    busy = server.stats()
    nothing: dict[str, Any] = {name: type(value)() for name, value in busy.items() if name != "model"}
    nothing |= {"ttft_seconds": {"p50": None, "p90": None, "p99": None}, "time_per_output_token_seconds": None}
    server.stats = lambda: nothing  # type: ignore[method-assign]
    page = open_page("#load")
    expect(page.locator("#status")).to_have_text("idle")
    expect(page.locator("#figure-generated b")).to_have_text("0 tokens/s")
    expect(page.locator("#figure-ttft")).to_contain_text("No request yet")
    expect(page.locator("#figure-requests .keys")).to_contain_text("running 0")
    expect(page.locator("#figure-kv .keys")).to_contain_text("used \N{EN DASH}")
    assert "NaN" not in page.content() and "Infinity" not in page.content()


def test_counters_become_rates_and_silences_gaps(open_page: Any) -> None:
    page = open_page()
    rates, gauges = page.evaluate(
        """async () => {
          const { History } = await import("/static/history.js");
          const history = new History();
          // A second, two seconds, a restart, a silence; the first sample is older than what is kept.
          for (const [time, count] of [[-1000, 7], [0, 10], [1, 20], [3, 60], [4, 5], [100, 205], [101, 206]]) {
            history.add(time, { count });
          }
          const values = (stats) => [stats.count];
          return [history.rates(values), history.gauges(values)];
        }"""
    )
    assert [(point["time"], point["values"][0]) for point in rates] == [
        (1, 10), (3, 20), (4, None), (52, None), (100, None), (101, 1)
    ]  # fmt: skip
    assert [(point["time"], point["values"][0]) for point in gauges] == [
        (0, 10), (1, 20), (3, 60), (4, 5), (52, None), (100, 205), (101, 206)
    ]  # fmt: skip


def test_a_server_whose_steps_are_long_has_rates(open_page: Any) -> None:
    """It answers between two steps: what it was asked soon after its last answer makes no gap."""
    page = open_page()
    rates, gauges = page.evaluate(
        """async () => {
          const { History } = await import("/static/history.js");
          const history = new History();
          for (const [asked, time, count] of [[0, 8, 0], [9, 29, 100], [30, 50, 310], [60, 70, 400]]) {
            history.add(time, { count }, asked);
          }
          const values = (stats) => [stats.count];
          return [history.rates(values), history.gauges(values)];
        }"""
    )
    assert [(point["time"], point["values"][0]) for point in rates] == [
        (29, 100 / 21),
        (50, 10),
        (60, None),
        (70, None),
    ]
    assert [(point["time"], point["values"][0]) for point in gauges] == [
        (8, 0), (29, 100), (50, 310), (60, None), (70, 400)
    ]  # fmt: skip


def test_a_hidden_tab_asks_nothing(server: FakeServer, open_page: Any) -> None:
    asked = []
    plain = server.stats

    def counted() -> dict[str, Any]:
        asked.append(1)
        return plain()

    server.stats = counted  # type: ignore[method-assign]
    page = open_page()
    is_ready(page)
    hide = """(isHidden) => {
      Object.defineProperty(document, "hidden", { value: isHidden, configurable: true });
      document.dispatchEvent(new Event("visibilitychange"));
    }"""
    page.evaluate(hide, True)
    page.wait_for_timeout(1300)  # a turn may have been under way
    before = len(asked)
    page.wait_for_timeout(1500)
    assert len(asked) == before
    page.evaluate(hide, False)
    page.wait_for_timeout(500)
    assert len(asked) > before


def test_a_server_that_went_away_is_noticed_and_found_again(server: FakeServer, open_page: Any, expect: Any) -> None:
    plain = server.stats
    page = open_page()
    is_ready(page)
    server.key = "lost"
    expect(page.locator("#status")).to_have_text("needs an API key")
    expect(page.get_by_role("status")).to_have_text("The server: needs an API key.")
    expect(page.locator("#load-page")).to_have_class("stale")
    expect(page.locator("#status")).to_have_attribute("title", re.compile("No API key"))
    server.key = None
    expect(page.locator("#status")).to_have_text("3 running, 1 waiting")
    expect(page.get_by_role("status")).to_have_text("The server is ready.")
    expect(page.locator("#load-page")).to_have_class("")
    expect(page.locator("#status")).to_have_attribute("title", "")
    server.stats = lambda: {**plain(), "num_running": 0, "num_waiting": 0}  # type: ignore[method-assign]
    expect(page.locator("#status")).to_have_text("idle")
    # Spoken are changes of state only.
    expect(page.get_by_role("status")).to_have_text("The server is ready.")


def test_a_server_that_does_not_answer_at_all_is_noticed(server: FakeServer, open_page: Any, expect: Any) -> None:
    """One that is stopped, or cut off, leaves the browser waiting."""
    go = threading.Event()
    plain = server.stats
    page = open_page()
    is_ready(page)
    server.stats = lambda: plain() if go.wait(60) else {}  # type: ignore[method-assign]
    expect(page.locator("#status")).to_have_text("no answer yet", timeout=20_000)
    expect(page.locator("#load-page")).to_have_class("stale")
    go.set()
    is_ready(page)
    expect(page.locator("#status")).to_have_text("3 running, 1 waiting")


def test_another_model_after_a_restart_is_noticed(server: FakeServer, open_page: Any, expect: Any) -> None:
    page = open_page()
    is_ready(page)
    server.model = "other"
    expect(page.locator("#model")).to_have_text("other")
    send(page)
    expect(finished(page)).to_be_visible()
    assert server.bodies[-1][1]["model"] == "other"


def test_tokens_of_a_model_that_was_served_before_are_not_on_the_new_ones_map(
    server: FakeServer, open_page: Any, expect: Any
) -> None:
    page = open_page()
    send(page)
    expect(finished(page)).to_be_visible()
    page.get_by_text("This token", exact=True).first.click()
    page.locator(".token").nth(4).hover()
    expect(page.locator("#token-name")).to_have_text("␣Union")
    routes = routes_of(server, 4)
    server.model, server.num_experts = "other", (4, 4)
    expect(page.locator("#model")).to_have_text("other")
    expect(page.locator("#token-name")).not_to_have_text("␣Union")
    page.locator(".token").nth(3).hover()
    page.locator(".token").nth(4).hover()
    expect(page.locator("#token-name")).to_have_text("␣Union")
    expect(page.get_by_text("“␣Union” is another model's")).to_be_visible()
    assert routes_shown(page) == routes
    assert cells_unlike_the_first_color(page, server.num_experts) == set()
    assert ringed_cells(page, server.num_experts) == set()


def test_an_answer_of_the_student_says_so_and_its_experts_are_not_drawn_as_the_models(
    server: FakeServer, open_page: Any, expect: Any
) -> None:
    server.answers_as = "tiny"
    page = open_page()
    is_ready(page)
    send(page)
    expect(finished(page)).not_to_contain_text("by tiny")
    page.get_by_text(" Union", exact=True).click()
    expect(page.locator("#map-status")).to_have_text("“␣Union”: its experts in every layer")
    server.answers_as = "student"
    send(page)
    expect(finished(page).last).to_contain_text("by student · 10 tokens")
    page.get_by_text(" Union", exact=True).last.click()
    expect(page.locator("#map-status")).to_have_text("“␣Union” was written by student")


@pytest.mark.parametrize(("num_experts", "top_k", "width"), [(128, 8, 360), (128, 8, 1200), (512, 10, 1200)])
def test_the_experts_of_a_token_do_not_run_into_each_other(
    server: FakeServer, open_page: Any, num_experts: int, top_k: int, width: int
) -> None:
    server.num_experts, server.top_k = (num_experts,) * 2, top_k
    page = open_page(width=width)
    is_ready(page)
    send(page)
    finished(page).wait_for()
    page.get_by_text(" Union", exact=True).click()
    wait_until(page, "() => document.querySelectorAll('.route').length > 2")
    gaps = page.evaluate("""() => [...document.querySelectorAll('.routes')].flatMap((routes) => {
        const ends = [...routes.children].map((route) => {
            const range = document.createRange();
            range.selectNodeContents(route);
            return range.getBoundingClientRect();
        });
        return ends.slice(1).map((next, i) => next.top > ends[i].top + 4 ? 99 : next.left - ends[i].right);
    })""")
    assert len(gaps) == 2 * (top_k - 1) and min(gaps) >= 4


@pytest.mark.parametrize("width", [360, 414, 900])
def test_what_the_server_is_at_can_be_read_beside_a_long_name(
    server: FakeServer, open_page: Any, expect: Any, width: int
) -> None:
    server.model = "Qwen1.5-MoE-A2.7B-Chat-int4" if width < 500 else "a-very-long-name-of-a-model-" * 4
    page = open_page(width=width)
    is_ready(page)
    server.key = "lost"
    status = page.locator("#status")
    expect(status).to_have_text("needs an API key")
    assert status.evaluate("(node) => node.scrollWidth <= node.clientWidth")
    assert page.locator("#model").evaluate("(node) => node.clientWidth") >= 50


def test_an_older_message_that_is_tried_again_stays_in_sight(server: FakeServer, open_page: Any, expect: Any) -> None:
    server.tokens = [f"{line}\n" for line in range(60)]
    server.failure = (429, "it is busy.", {})
    page = open_page()
    send(page, "First")
    expect(page.locator(".failure")).to_be_visible()
    for text in ("Second", "Third"):
        send(page, text)
        expect(finished(page)).to_have_count(1 if text == "Second" else 2)
    page.get_by_role("button", name="Try again").click()
    expect(finished(page)).to_have_count(3)
    assert page.locator("#messages > li").first.evaluate("""(node) => {
        const frame = document.getElementById("conversation").getBoundingClientRect();
        const box = node.getBoundingClientRect();
        return box.top < frame.bottom && box.bottom > frame.top;
    }""")


def test_a_conversation_that_grew_too_long_says_how_to_go_on(server: FakeServer, open_page: Any, expect: Any) -> None:
    page = open_page()
    send(page)
    expect(finished(page)).to_be_visible()
    server.failure = (400, "too long", {})
    server.failure_code = "context_length_exceeded"
    send(page)
    expect(page.locator(".failure p")).to_have_text("too long The conversation counts too: Clear begins a new one.")


def test_the_keyboard_is_enough(server: FakeServer, open_page: Any, expect: Any) -> None:
    page = open_page()
    is_ready(page)
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.type("Two")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("lines")
    page.keyboard.press("Enter")
    expect(finished(page)).to_be_visible()
    assert server.bodies[-1][1]["messages"][-1]["content"] == "Two\nlines"
    expect(page.get_by_label("Message")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    expect(page.locator("#settings summary")).to_be_focused()
    page.keyboard.press("Shift+Tab")
    tokens = page.locator(".token")
    expect(tokens.nth(0)).to_be_focused()
    for key, place in (
        ("ArrowRight", 1),
        ("ArrowRight", 2),
        ("ArrowLeft", 1),
        ("End", 9),
        ("Home", 0),
        ("ArrowLeft", 0),
    ):
        page.keyboard.press(key)
        expect(tokens.nth(place)).to_be_focused()
        expect(page.locator("#token-name")).to_have_text(server.tokens[place].replace(" ", "␣"))
    assert routes_shown(page) == routes_of(server, 0)
    page.keyboard.press("ArrowDown")
    expect(tokens.nth(7)).to_be_focused()  # below "The" stands "str"
    page.keyboard.press("ArrowUp")
    expect(tokens.nth(0)).to_be_focused()
    # The token stays chosen when the focus goes on to the map, and Escape lets it go.
    page.keyboard.press("End")
    page.locator("#map").focus()
    expect(page.locator("#token-name")).to_have_text(".")
    page.keyboard.press("Escape")
    expect(page.get_by_label("Message")).to_be_focused()
    expect(page.locator("#token-state")).to_contain_text("newest")


@pytest.mark.parametrize("fragment", ["", "#load"])
def test_the_first_link_leads_to_the_message_field_from_either_page(
    server: FakeServer, open_page: Any, expect: Any, fragment: str
) -> None:
    page = open_page(fragment)
    is_ready(page)
    page.get_by_role("link", name="To the message field").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_label("Message")).to_be_focused()


def test_the_answer_is_spoken_in_sentences(server: FakeServer, open_page: Any, expect: Any) -> None:
    server.tokens = ["One", " sentence.", " And", " another", "."]
    server.pace = threading.Semaphore(0)
    page = open_page()
    send(page)
    spoken = page.locator("#spoken")
    server.pace.release(2)
    expect(page.locator(".answer")).to_have_text("One sentence.")
    expect(spoken).to_be_empty()
    server.pace.release()
    expect(page.locator(".answer")).to_have_text("One sentence. And")
    expect(spoken.locator("p")).to_have_text(["One sentence."])
    server.pace.release(2)
    expect(spoken.locator("p")).to_have_text(["One sentence.", "And another.", "End of the answer."])
    assert spoken.get_attribute("aria-live") == "polite"


def test_what_was_not_spoken_yet_goes_with_the_conversation(server: FakeServer, open_page: Any, expect: Any) -> None:
    server.tokens = ["Half", " a", " sentence"]
    server.pace = threading.Semaphore(2)
    page = open_page()
    send(page)
    expect(page.locator(".answer")).to_have_text("Half a")
    page.get_by_role("button", name="Clear").click()
    server.pace, server.tokens = None, ["Another", " one", "."]
    send(page)
    expect(page.locator("#spoken p")).to_have_text(["Another one.", "End of the answer."])


def test_everything_that_can_be_used_has_a_name(server: FakeServer, open_page: Any) -> None:
    page = open_page()
    is_ready(page)
    page.get_by_text("Settings").click()
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("input, textarea, button, summary, a, [tabindex]")].filter((node) => {
          const name = node.getAttribute("aria-label") ?? node.labels?.[0]?.textContent ?? node.textContent;
          const labelled = node.getAttribute("aria-labelledby");
          return !(labelled ? document.getElementById(labelled)?.textContent : name)?.trim();
        }).map((node) => node.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("counts", [(), (32,) * 10 + (64, 64), (128,) * 48], ids=["dense", "pr-moe", "large"])
def test_a_phone_never_scrolls_sideways(
    server: FakeServer, open_page: Any, expect: Any, scheme: str, counts: tuple[int, ...]
) -> None:
    server.num_experts, server.top_k = counts, 4
    server.tokens = ["Donaudampfschifffahrt" * 20, " and", " so", " on", "\n\n", "x" * 400]
    page = open_page(width=360, height=740, scheme=scheme)
    is_ready(page)
    send(page, "y" * 500)
    expect(finished(page)).to_be_visible()
    for state in ("answer", "settings", "layers", "load"):
        if state == "settings":
            page.get_by_text("Settings").click()
        elif state == "layers" and counts:
            page.get_by_text("Settings").click()
            page.get_by_text("Each layer in figures").click()
        elif state == "load":
            page.get_by_role("link", name="Load").click()
        wide = page.evaluate(
            """() => [...document.querySelectorAll("html, #conversation, #experts, #load-page, .below")]
              .filter((node) => node.clientWidth && node.scrollWidth > node.clientWidth)
              .map((node) => node.id || node.className || node.tagName)"""
        )
        assert wide == [], state
        if state == "answer" and counts:
            label = page.locator("#map-status").bounding_box()
            panel = page.locator("#experts").bounding_box()
            assert label["height"] < panel["height"] / 3, "a long token's label hides what is below it"
    if counts:
        page.get_by_role("link", name="Chat").click()
        page.get_by_role("button", name="Hide").click()
        expect(page.locator("#map")).to_be_hidden()
        page.get_by_role("button", name="Show").click()
        expect(page.locator("#map")).to_be_visible()


@pytest.mark.parametrize(("width", "height"), [(360, 640), (390, 844)])
def test_a_phone_shows_the_experts_again_once_its_key_is_taken(
    server: FakeServer, open_page: Any, expect: Any, width: int, height: int
) -> None:
    """The settings, which are opened to ask for it, take their place meanwhile."""
    server.key = "secret"
    page = open_page(width=width, height=height)
    send(page, "Please")
    expect(page.locator("#key-message")).to_contain_text("with an API key only")
    for hidden in ("#map", "#experts-fold", ".switch"):
        expect(page.locator(hidden)).to_be_hidden()
    page.get_by_label("API key").fill("secret")
    page.get_by_role("button", name="Use it").click()
    expect(finished(page)).to_be_visible()
    expect(page.get_by_label("API key")).to_be_hidden()
    expect(page.locator("#map")).to_be_visible()
    page.locator(".answer .token").first.click()
    expect(page.locator("#token-table")).to_be_visible()
    # A setting that is wrong stays open, to be mended.
    page.get_by_text("Settings").click()
    page.get_by_label("Temperature").fill("9")
    send(page, "Again")
    expect(page.locator("#settings-message")).to_be_visible()


def test_a_phone_held_sideways_has_both_side_by_side(server: FakeServer, open_page: Any, expect: Any) -> None:
    page = open_page(width=740, height=360)
    is_ready(page)
    send(page)
    expect(finished(page)).to_be_visible()
    talk, panel = page.locator(".talk").bounding_box(), page.locator("#experts").bounding_box()
    assert talk["x"] + talk["width"] <= panel["x"] + 1 and panel["height"] > 250
    page.locator(".answer .token").first.click()
    expect(page.locator("#map")).to_be_visible()
    page.get_by_text("Settings").click()
    expect(page.locator("#map")).to_be_visible()
    conversation, below = page.locator("#conversation").bounding_box(), page.locator(".below").bounding_box()
    assert conversation["height"] > 60 and below["y"] + below["height"] <= 360
    page.get_by_role("button", name="Use it").scroll_into_view_if_needed()
    expect(page.get_by_role("button", name="Use it")).to_be_in_viewport()
    assert page.evaluate("document.documentElement.scrollHeight <= innerHeight")


CONTRASTS = """() => {
  const parse = (text) => {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 1;
    const context = canvas.getContext("2d");
    context.fillStyle = text;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (rgb) => rgb.slice(0, 3).map((byte) => byte / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, i) => sum + value * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !node.checkVisibility()) continue;
    if (node.closest(".unseen, .skip, :disabled")) continue;
    let ground = node;
    while (parse(getComputedStyle(ground).backgroundColor)[3] < 255) ground = ground.parentElement;
    const style = getComputedStyle(node);
    const ink = node.namespaceURI.endsWith("svg") ? style.fill : style.color;
    const [one, other] = [luminance(parse(ink)), luminance(parse(getComputedStyle(ground).backgroundColor))];
    const ratio = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    found.push([ratio, walker.currentNode.data.trim()]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_in_both_schemes(server: FakeServer, open_page: Any, expect: Any, scheme: str) -> None:
    """WCAG 2 AA asks for 4.5 to 1."""
    page = open_page(scheme=scheme)
    is_ready(page)
    send(page)
    expect(finished(page)).to_be_visible()
    server.failure = (400, "refused", {})
    send(page)
    expect(page.locator(".failure")).to_be_visible()
    page.get_by_text("Settings").click()
    page.get_by_text("Each layer in figures").click()
    page.locator(".token").nth(4).focus()
    for link in ("Chat", "Load"):
        page.get_by_role("link", name=link).click()
        expect(page.locator("#load-title" if link == "Load" else "#experts-title")).to_be_visible()
        contrasts = page.evaluate(CONTRASTS)
        assert len(contrasts) > 20
        assert [text for ratio, text in contrasts if ratio < 4.5] == []


def test_the_scheme_follows_the_system_until_the_reader_chooses(open_page: Any, expect: Any) -> None:
    page = open_page(scheme="dark")
    is_ready(page)

    def ground() -> str:
        return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))

    dark = ground()
    page.emulate_media(color_scheme="light")
    light = ground()
    assert light != dark
    page.get_by_role("button", name="Switch to dark colours").click()
    assert ground() == dark
    page.reload()
    is_ready(page)
    assert ground() == dark
    page.get_by_role("button", name="Switch to light colours").click()
    assert ground() == light


def oklab(rgb: list[int]) -> list[float]:
    """Return L, a, b. Source: B. Ottosson, "A perceptual color space for image processing", 2020."""
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4
        for value in (byte / 255 for byte in rgb)
    )
    long = (0.4122214708 * red + 0.5363325363 * green + 0.0514459929 * blue) ** (1 / 3)
    medium = (0.2119034982 * red + 0.6806995451 * green + 0.1073969566 * blue) ** (1 / 3)
    short = (0.0883024619 * red + 0.2817188376 * green + 0.6299787005 * blue) ** (1 / 3)
    return [
        0.2104542553 * long + 0.7936177850 * medium - 0.0040720468 * short,
        1.9779984951 * long - 2.4285922050 * medium + 0.4505937099 * short,
        0.0259040371 * long + 0.7827717662 * medium - 0.8086757660 * short,
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_equal_steps_of_the_scale_look_equal(open_page: Any, scheme: str) -> None:
    page = open_page()
    colors = page.evaluate(f"import('/static/colors.js').then(({{ scaleOf }}) => scaleOf('{scheme}'))")
    points = [oklab(color) for color in colors]
    assert len(points) == 256
    # Lightness alone tells the order, so that it holds for every kind of colour blindness.
    lightness = [point[0] for point in points[:: 1 if scheme == "dark" else -1]]
    assert all(one < other + 1e-3 for one, other in pairwise(lightness))
    assert max(lightness) - min(lightness) > 0.6
    # Over 15 steps rounding to bytes does not matter; across a bend of the curve the straight way is a tenth shorter.
    steps = [math.dist(points[place], points[place + 15]) for place in range(0, 255, 15)]
    assert max(steps) / min(steps) < 1.15


def test_the_files_load_nothing_from_elsewhere() -> None:
    for file in WEB.iterdir():
        text = file.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "innerHTML" not in text, file.name
    page = (WEB / "index.html").read_text(encoding="utf-8")
    assert re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", page) is None
