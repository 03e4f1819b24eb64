"""Errors as OpenAI's clients read them: {"error": {"message", "type", "param", "code"}}, and a status.

The messages are ours, in three parts. Which exceptions become which status is decided here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException

from moesaic.config.base import nearest
from moesaic.errors import ConfigError, InstallationError, MoesaicError, NotFiniteError
from moesaic.serve.async_engine import EngineStoppedError
from moesaic.serve.grammar import GrammarProcessError
from moesaic.serve.sampler import RequestError
from moesaic.serve.server.log_fields import log_fields

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_MAX_SHOWN_CHARS = 60
_RETRY_SECONDS = 10  # after which another server may be there
_MAX_MESSAGE_CHARS = 2000  # what quotes a request without measure is cut


class ApiError(HTTPException):
    """An answer that is an error. param: the key of the request that is to blame."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        if status == 503:
            headers = {"Retry-After": str(_RETRY_SECONDS), **(headers or {})}
        super().__init__(status, message, dict(headers) if headers else None)
        self.param, self.code = param, code


def refusal(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error of a request that cannot be met as it stands."""
    return ApiError(400, message, param=param, code=code)


def error_body(error: ApiError) -> dict[str, Any]:
    """Return an error as OpenAI's clients read it."""
    status, message = error.status_code, str(error.detail)
    if len(message) > _MAX_MESSAGE_CHARS:
        message = f"{message[: _MAX_MESSAGE_CHARS // 2]} ... {message[-_MAX_MESSAGE_CHARS // 2 :]}"
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError) -> Response:
    """Return the answer that an error is."""
    return json_response(error_body(error), status=error.status_code, headers=error.headers)


def json_text(value: Any) -> str:
    """Return JSON in ASCII: what a client sent may come back in an error, and need not be valid Unicode."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def json_response(body: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return an answer of JSON."""
    return Response(
        json_text(body), status_code=status, media_type="application/json", headers=dict(headers) if headers else None
    )


def as_api_error(error: Exception) -> ApiError | None:
    """Return what an exception means to a client; None where it is our own fault."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineStoppedError):
        return ApiError(503, str(error), code="stopping")
    if isinstance(error, GrammarProcessError):
        return ApiError(503, str(error), code="grammar_process")
    if isinstance(error, InstallationError):
        return refusal(str(error), code="not_installed")
    if isinstance(error, RequestError):
        return refusal(str(error), code="cannot_be_met")
    if isinstance(error, NotFiniteError):
        return ApiError(500, str(error), code="engine_error")
    if isinstance(error, ConfigError):
        return refusal(str(error), param=error.key, code="invalid_value")
    if isinstance(error, MoesaicError):
        return refusal(str(error))
    if isinstance(error, RequestValidationError):
        return explain(error.errors())
    if isinstance(error, StarletteHTTPException):
        return _explain_http(error)
    return None


async def answer_error(request: Request, error: Exception) -> Response:
    """Turn any exception that means something to a client into its answer (FastAPI's handler for all of them)."""
    found = as_api_error(error)
    if found is None:
        raise error
    log_fields(request.scope).values["error"] = found.code or found.param
    return error_response(found)


def explain(errors: Sequence[Any], *, names: Mapping[str, str] | None = None) -> ApiError:
    """Return the error of a request that does not fit its model: the first key that is wrong, and why.

    names: of fields that a request calls otherwise.
    """
    first = errors[0]
    location = [part for part in first["loc"] if part != "body"]
    if not location and isinstance(first.get("input"), bytes):
        return refusal(
            "the body came without the header Content-Type: application/json, so it is not read; a JSON object is "
            "required; send it with that header.",
            code="invalid_body",
        )
    if not location:
        given = first.get("input")
        return refusal(
            f"the body is {'missing' if given is None else _shown(given)}; a JSON object is required, as "
            f"application/json; send one with the header Content-Type: application/json.",
            code="invalid_body",
        )
    # Of a value of several allowed kinds there is one finding for each, below a common path.
    alike = [each for each in errors if [part for part in each["loc"] if part != "body"][:1] == location[:1]]
    path = ".".join(str(part) for part in _common([each["loc"] for each in alike]) if part != "body")
    path = (names or {}).get(path, path)
    if first["type"] == "missing":
        return refusal(f"{path} is missing; it is required; send it.", param=path, code="missing_key")
    required = " or ".join(dict.fromkeys(_required(each["msg"]) for each in alike[:6]))
    return refusal(
        f"{path} is {_shown(first.get('input'))}; {required}; change it, or leave it out where it may be.",
        param=path,
        code="invalid_value",
    )


def _common(paths: Sequence[Sequence[Any]]) -> Sequence[Any]:
    """Return the beginning that all paths share."""
    first, *others = paths
    length = next((n for n, part in enumerate(first) if any(path[n : n + 1] != (part,) for path in others)), len(first))
    return first[:length]


def explain_values(error: ValidationError, *, names: Mapping[str, str]) -> ApiError:
    """Return the error of values that a config refuses, by the names that a request has for them."""
    return explain(error.errors(include_url=False), names=names)


def unknown_key(key: str, known: Sequence[str], *, inside: str) -> ApiError:
    """Return the error of a key that there is not, with the nearest that there are.

    inside: the path of the object that has it, empty for the body.
    """
    shown = key[:_MAX_SHOWN_CHARS]
    return refusal(
        f"{_shown(key)} is not a key of {inside or 'this request'}; keys are fixed so that none is silently ignored; "
        f"{nearest(shown, list(known))}",
        param=f"{inside}.{shown}" if inside else shown,
        code="unknown_key",
    )


def _explain_http(error: StarletteHTTPException) -> ApiError:
    if error.status_code == 404:
        message = (
            "there is nothing at this path; one of the server's is required; see /openapi.json (the base URL of a "
            "client of OpenAI's ends in /v1)."
        )
        return ApiError(404, message, code="unknown_path")
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another one")
        message = f"this path has another method; {allowed} is required; use it."
        return ApiError(405, message, code="wrong_method", headers=error.headers)
    return ApiError(error.status_code, f"{error.detail}; a request as in /openapi.json is required; mend it.")


def _required(message: str) -> str:
    return message.replace("Input should be", "it must be")


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[: _MAX_SHOWN_CHARS - 3]}..."
