"""The page on the real server: what a browser shows is what the engine did."""

import time
from collections.abc import Callable
from typing import Any

import httpx

from ..fake_engine import FakeEngine
from .conftest import Live


def ask(page: Any, text: str) -> None:
    page.get_by_label("Message").fill(text)
    page.keyboard.press("Enter")


def test_the_page_shows_what_the_engine_did(real: Live, open_address: Callable[..., Any], expect: Any) -> None:
    page = open_address(real.url)
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.locator("#map-status")).to_have_text("2 MoE layers of 4 and 8 experts, 2 for each token")
    page.get_by_text("Settings").click()
    for label, value in (("Temperature", "1"), ("Most tokens", "40"), ("Seed", "5")):
        page.get_by_label(label).fill(value)
    ask(page, "The state of the Union")
    expect(page.locator(".foot:not(:empty)")).to_contain_text("40 tokens")
    # The same seed gives the same tokens, so the server can be asked for what the page should show.
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "The state of the Union"}],
        "temperature": 1,
        "max_tokens": 40,
        "seed": 5,
        "return_experts": True,
    }
    [choice] = httpx.post(f"{real.url}/v1/chat/completions", json=body, timeout=30).json()["choices"]
    assert page.locator(".answer").evaluate("node => node.textContent") == choice["message"]["content"]
    spans = page.locator(".token")
    shown = spans.all_text_contents()
    assert "".join(shown) == choice["message"]["content"]
    # What was generated beyond the last whole character is no part of the text.
    assert 30 <= len(shown) <= len(choice["experts"]) == 40
    for place in (0, len(shown) // 2, len(shown) - 1):
        spans.nth(place).focus()
        expect(page.locator("#token-state")).to_contain_text("each layer chose")
        expected = [
            [f"{expert} ({weight:.2f})" for expert, weight in zip(each["expert_ids"], each["weights"], strict=True)]
            for each in choice["experts"][place]["layers"]
        ]
        for row, routes in enumerate(expected):  # the table is drawn with the next picture
            expect(page.locator("#token-routes tr").nth(row).locator(".route")).to_have_text(routes)
        expect(page.locator("#token-routes tr")).to_have_count(len(expected))
    page.get_by_role("link", name="Load").click()
    expect(page.locator("#figure-kv")).to_be_visible()
    expect(page.locator("#figure-ttft .key").first).to_contain_text("s")


def wait(page: Any, condition: Callable[[], Any]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it never came"
        page.wait_for_timeout(10)


def test_stopping_aborts_in_the_engine(
    serve_fake: Callable[..., Any], fake: FakeEngine, open_address: Callable[..., Any], expect: Any
) -> None:
    with serve_fake() as running:
        page = open_address(running.url)
        expect(page.locator("#status")).to_have_text("idle")
        fake.go.clear()
        ask(page, "Whatever the experts say")
        admission = running.app.state.served.admission
        wait(page, lambda: fake.running)
        page.keyboard.press("Escape")
        expect(page.locator(".foot:not(:empty)")).to_contain_text("stopped")
        wait(page, lambda: not admission.num_inside)  # the server has noticed too
        fake.go.set()
        wait(page, lambda: fake.aborted)
        assert len(fake.aborted) == 1 and not fake.running
        expect(page.locator("#status")).to_have_text("idle")


def test_with_its_key_the_page_works(
    serve_fake: Callable[..., Any], open_address: Callable[..., Any], expect: Any
) -> None:
    with serve_fake(keys=("the-key",)) as running:
        page = open_address(running.url)
        expect(page.locator("#status")).to_have_text("needs an API key")
        ask(page, "Hello")
        expect(page.get_by_label("API key")).to_be_focused()
        page.keyboard.type("the-key")
        page.keyboard.press("Enter")
        expect(page.locator(".foot:not(:empty)")).to_contain_text("tokens")
        expect(page.locator("#model")).to_have_text("fake")


def test_a_refusal_of_the_server_stands_on_the_page(real: Live, open_address: Callable[..., Any], expect: Any) -> None:
    page = open_address(real.url)
    expect(page.locator("#model")).to_have_text("tiny")
    ask(page, "too long " * 200)
    expect(page.locator(".failure p")).to_contain_text("159")
