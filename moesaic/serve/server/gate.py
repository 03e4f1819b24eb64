"""What every request passes, before anything of it is understood: a name, a log line, a key, a size.

Plain ASGI: nothing here buffers an answer or hides a client's leaving.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import os
import re
import secrets
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from moesaic.config.api_keys import checked_keys, read_key_file
from moesaic.errors import ConfigError
from moesaic.logs import logger
from moesaic.serve.server.errors import ApiError, error_response
from moesaic.serve.server.log_fields import LogFields, begin_log, log_fields
from moesaic.serve.server.metrics import Metrics

KEYS_VARIABLE = "MOESAIC_API_KEYS"
# What shows nothing of anybody's.
_OPEN_PATHS = frozenset({"/", "/health", "/ready", "/favicon.ico"})
_OPEN_PREFIX = "/static/"
# What pages and orchestrators ask every second: no line of the log unless something is wrong.
_POLLED_PATHS = frozenset({"/health", "/ready", "/metrics", "/v1/stats", "/v1/experts"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# What is read of a body that is too large, so that its sender gets to the answer.
_DISCARDED_BYTES, _DISCARD_SECONDS = 64 << 20, 5.0
_SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Journal:
    """The outermost: names each request, answers what nobody foresaw, sets the security headers, logs and counts."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, known_paths: frozenset[str]) -> None:
        self._app, self._metrics, self._known_paths = app, metrics, known_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"
        fields = begin_log(scope, request_id)
        status = 0

        async def send_named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in _SECURITY_HEADERS.items():
                    headers[name] = value
            await send(message)

        try:
            await self._app(scope, receive, send_named)
        except asyncio.CancelledError:
            # Only at a stopping server's very end: this one has not sent its request, or not read its answer, in time.
            if status:
                fields.values["client_left"] = True
            else:
                stopping = ApiError(503, "the server stops; it takes no new requests; ask another.", code="stopping")
                fields.values["error"] = stopping.code
                await error_response(stopping)(scope, receive, send_named)
        except Exception as error:  # our own fault: the client gets an answer, the log where it happened
            # The exception's text may quote what the client sent; its place does not.
            frames = traceback.extract_tb(error.__traceback__)
            fields.values["exception"] = type(error).__name__
            fields.values["trace"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames[-12:]]
            if not status:
                answer = error_response(
                    ApiError(
                        500, f"the server failed ({type(error).__name__}); it is in its log as {request_id}; report it."
                    )
                )
                await answer(scope, receive, send_named)
        finally:
            self._write(scope, status, fields)

    def _write(self, scope: Scope, status: int, fields: LogFields) -> None:
        seconds = time.perf_counter() - fields.arrival
        path = scope["path"]
        # Only known paths become labels: a scan of random ones must not fill the registry. What was refused before it
        # came to its route has its own path alone.
        known = getattr(scope.get("route"), "path", path)
        if known not in self._known_paths:
            known = "other"
        if "client_left" in fields.values or not status:
            status = 499  # as it left, or before its request was whole
        whole = seconds if fields.had_turn else None
        self._metrics.request_ended(known, fields.values.get("error_status", status), whole)
        client = scope.get("client")
        level = logging.DEBUG if path in _POLLED_PATHS and status == 200 else logging.INFO
        if "exception" in fields.values:
            level = logging.ERROR
        values = {
            "request_id": fields.request_id,
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": path[:200],
            "status": status,
            "seconds": round(seconds, 4),
            **fields.values,
        }
        logger.log(level, "%s %s %d", scope["method"], path[:200], status, extra={"fields": values})


class LocalNames:
    """Lets in who calls the server by a name of this machine's own.

    A server that listens here only, and asks for no key, is within reach of every web page that is open in a browser
    here, if the page's owner lets its name stand for 127.0.0.1; the browser then sends that name.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        host = Headers(scope=scope).get("host", "") if scope["type"] == "http" else "localhost"
        if not host or is_local(re.sub(r":\d+\Z", "", host).strip("[]")):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            403,
            f"the request is for {host[:100]!r}; this server has no keys and answers to localhost and 127.0.0.1 only; "
            f"use one of these (a proxy can pass it as the Host header), or set server.api_key_file.",
            code="foreign_host",
        )
        await error_response(error)(scope, receive, send)


class ApiKeys:
    """Lets requests with one of the keys in; open paths need none. Only hashes of keys are kept."""

    def __init__(self, app: ASGIApp, *, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or _is_open(scope["path"]) or self._is_known(scope):
            await self._app(scope, receive, send)
            return
        error = ApiError(
            401,
            "the request has no valid API key; the header `Authorization: Bearer KEY` with one of the server's keys is "
            "required; send it.",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await error_response(error)(scope, receive, send)

    def _is_known(self, scope: Scope) -> bool:
        kind, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        digest = _digest(key.strip().encode("latin-1", "replace"))
        # All are compared, so that the time says nothing of which one it was.
        matches = [hmac.compare_digest(digest, each) for each in self._digests]
        return kind.lower() == "bearer" and any(matches)


class WholeBody:
    """Reads a request's body before anything else does: no more than so many bytes, and in time."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_seconds: float) -> None:
        self._app, self._max_bytes, self._timeout_seconds = app, max_bytes, timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
        except ApiError as error:
            log_fields(scope).values["error"] = error.code
            await error_response(error)(scope, receive, send)
            return
        if body is None:
            log_fields(scope).values["client_left"] = True
            return
        messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, replay, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the body, None where the client left before its end. Raises: ApiError 413, 408, 415."""
        encoding = Headers(scope=scope).get("content-encoding", "identity")
        if encoding.lower() not in ("", "identity"):
            await self._discard(receive)
            raise ApiError(
                415,
                f"the body came with Content-Encoding: {encoding[:40]}; one as it is, of JSON, is required; send it "
                f"uncompressed.",
                code="unsupported_encoding",
            )
        claimed = Headers(scope=scope).get("content-length", "0")
        if claimed.isdigit() and len(claimed) < 20 and int(claimed) > self._max_bytes:
            is_asking = Headers(scope=scope).get("expect", "").lower() == "100-continue"  # it has sent nothing yet
            if int(claimed) <= _DISCARDED_BYTES and not is_asking:  # more would not be read to its end anyway
                await self._discard(receive)
            raise self._too_large(int(claimed))
        pieces, size = [], 0
        try:
            async with asyncio.timeout(self._timeout_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    piece = message.get("body", b"")
                    size += len(piece)
                    if size > self._max_bytes:
                        await self._discard(receive)
                        raise self._too_large(size)
                    pieces.append(piece)
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise ApiError(
                408,
                f"the body did not arrive within {self._timeout_seconds:g} s; a whole one is required; send it again.",
                code="timeout",
                headers={"Connection": "close"},
            ) from None

    async def _discard(self, receive: Receive) -> None:
        """Read what is still being sent, up to a measure: a client that cannot send it may not see the answer."""
        left = _DISCARDED_BYTES
        with suppress(TimeoutError):
            async with asyncio.timeout(_DISCARD_SECONDS):
                while left > 0:
                    message = await receive()
                    if not message.get("more_body", False):  # a disconnect too
                        return
                    left -= len(message["body"])

    def _too_large(self, size: int) -> ApiError:
        return ApiError(
            413,
            f"the body has {size} bytes or more; at most {self._max_bytes} are read; send less at once.",
            code="body_too_large",
            headers={"Connection": "close"},
        )


def read_keys(file: str | None) -> list[str]:
    """Return the keys of a file, one a line (# first in it: a comment), and of MOESAIC_API_KEYS, comma-separated.

    Raises: ConfigError for a file that cannot be read or holds none, and for a key that no header can carry.
    """
    keys = [] if file is None else read_key_file(file, named=f"server.api_key_file ({file})")
    given = os.environ.get(KEYS_VARIABLE)
    if given is not None:
        named = checked_keys(given.split(","), KEYS_VARIABLE)
        if not named:
            raise ConfigError(
                f"{KEYS_VARIABLE} is set and holds no key; comma-separated keys are required; unset it to serve "
                f"without keys."
            )
        keys += named
    return keys


def is_local(host: str) -> bool:
    """Whether a name or an address means this machine to itself only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost" or host.lower().endswith(".localhost")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _is_open(path: str) -> bool:
    return path in _OPEN_PATHS or path.startswith(_OPEN_PREFIX)
