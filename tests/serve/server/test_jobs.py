"""What chat templates are given, and what they make that no tokenizer takes."""

from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from moesaic.serve.server import jobs

from .conftest import live


def test_keys_of_a_message_that_say_nothing_do_not_reach_the_template(
    real_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def render(tokenizer: Any, messages: list[dict[str, Any]], **settings: Any) -> str:
        seen.extend(messages)
        return "x"

    monkeypatch.setattr(jobs, "render_chat", render)
    # As model_dump() of the official client's message.
    dumped = {"role": "assistant", "content": "a", "refusal": None, "annotations": None, "audio": None}
    calls = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": null}'}}]
    messages = [
        {"role": "user", "content": "x", "name": "me"},
        {**dumped, "function_call": None, "tool_calls": None},
        {**dumped, "tool_calls": []},
        {**dumped, "content": None, "tool_calls": calls},
    ]
    with live(real_app()) as running:
        body = {"messages": messages, "max_tokens": 1}
        assert httpx.post(f"{running.url}/v1/chat/completions", json=body).status_code == 200
    assert seen == [
        messages[0],
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": None}}}]},
    ]  # fmt: skip


def test_a_template_that_makes_no_unicode_is_refused(
    real_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "render_chat", lambda *_, **__: "a\ud800" * 3000)
    with live(real_app()) as running:
        body = {"messages": [{"role": "user", "content": "x"}]}
        response = httpx.post(f"{running.url}/v1/chat/completions", json=body)
        assert response.status_code == 400 and "lone surrogate" in response.json()["error"]["message"]
