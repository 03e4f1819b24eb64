"""What no tokenizer takes."""

from collections.abc import Callable

import httpx
import pytest
from fastapi import FastAPI

from moesaic.serve.server import jobs

from .conftest import live


def test_a_template_that_makes_no_unicode_is_refused(
    real_app: Callable[..., FastAPI], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "render_chat", lambda *_, **__: "a\ud800" * 3000)
    with live(real_app()) as running:
        body = {"messages": [{"role": "user", "content": "x"}]}
        response = httpx.post(f"{running.url}/v1/chat/completions", json=body)
        assert response.status_code == 400 and "lone surrogate" in response.json()["error"]["message"]
