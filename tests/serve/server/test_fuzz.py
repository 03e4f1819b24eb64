"""Whatever the OpenAPI document allows, and much that it does not, never makes the server fail."""

from typing import Any

import httpx
import pytest

from .conftest import Live

pytest.importorskip("schemathesis", reason="schemathesis makes the requests (extra `dev`)")

import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

PATHS = (
    "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/tokenize", "/detokenize",
    "/v1/models/{model}",
)  # fmt: skip
_SETTINGS = settings(
    max_examples=25,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.parametrize(
    ("path", "mode"),
    # No path is a wrong name of a model: every text may be one.
    [(path, mode) for path in PATHS for mode in GenerationMode if "{" not in path or mode is GenerationMode.POSITIVE],
)
def test_no_request_makes_it_fail(real: Live, path: str, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"{real.url}/openapi.json")
    operation = schema[path]["GET" if "{" in path else "POST"]
    statuses = set()

    @seed(1)
    @_SETTINGS
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        body = case.body
        limit = "max_output_tokens" if "responses" in path else "max_tokens"
        generates = "completions" in path or "responses" in path
        if isinstance(body, dict) and generates and isinstance(body.get(limit), int | None):
            body[limit] = 2  # long texts are tested elsewhere, many requests here
            body.pop("max_completion_tokens", None)
        response = case.call(timeout=30)
        assert response.status_code < 500, (response.status_code, response.text, case.as_curl_command())
        if response.status_code >= 400 and response.headers["content-type"] == "application/json":
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}
        statuses.add(response.status_code)

    check()
    assert statuses
    assert httpx.get(f"{real.url}/health").status_code == 200


@seed(2)
@_SETTINGS
@given(content=st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")))
def _check_bytes(url: str, content: bytes) -> None:
    response = httpx.post(url, content=content, headers={"Content-Type": "application/json"}, timeout=30)
    assert response.status_code == 400 and "error" in response.json()


def test_no_bytes_make_it_fail(real: Live) -> None:
    _check_bytes(f"{real.url}/v1/completions")  # type: ignore[call-arg]


def test_the_document_names_every_endpoint_and_only_our_errors(real: Live) -> None:
    document = httpx.get(f"{real.url}/openapi.json").json()
    expected = {*PATHS, "/v1/models", "/v1/experts", "/v1/stats", "/metrics", "/health", "/ready", "/tokenizer_info"}
    assert set(document["paths"]) == expected
    for operations in document["paths"].values():
        for operation in operations.values():
            assert set(operation["responses"]) == {"200", "default"}
    assert "HTTPValidationError" not in document["components"]["schemas"]
