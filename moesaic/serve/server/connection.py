"""An answer on its way: for as long as the client is there and the time of its request lasts."""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from fastapi import Request, Response
from starlette.types import Receive, Scope, Send

from moesaic.serve.server.errors import ApiError, error_body
from moesaic.serve.server.log_fields import log_fields

_Result = TypeVar("_Result")

# A client that reads its stream slowly has so long for the last event, at the end of the time for a request.
_FAREWELL_SECONDS = 5


def encode_event(value: dict[str, Any]) -> bytes:
    """Return a stream's event that has no name."""
    return b"data: " + json.dumps(value, separators=(",", ":"), allow_nan=False).encode() + b"\n\n"


def encode_failure(error: ApiError) -> bytes:
    """Return a stream's last event, where its answer cannot be finished."""
    return encode_event(error_body(error))


class EventStream(Response):
    """Server-sent events while the client listens and the time lasts; then what it holds is let go."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        held: AsyncExitStack,
        *,
        deadline: float,
        failure_event: Callable[[ApiError], bytes] = encode_failure,
    ) -> None:
        super().__init__(None, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events, self._held, self._deadline = events, held, deadline
        self._failure_event = failure_event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._held:
            sending = asyncio.ensure_future(self._send(scope, send))
            leaving = asyncio.ensure_future(_disconnected(receive))
            try:
                await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
                if not sending.done():
                    fields = log_fields(scope).values
                    if "error" not in fields:  # else the server ended it, and stops before the end is sent
                        fields["client_left"] = True
                    sending.cancel()
                await asyncio.gather(sending, leaving, return_exceptions=True)
            if not sending.cancelled() and (error := sending.exception()) is not None:
                raise error

    async def _send(self, scope: Scope, send: Send) -> None:
        failure: ApiError | None = None
        mistake: Exception | None = None
        try:
            async with asyncio.timeout_at(self._deadline), aclosing(self._events):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                async for piece in self._events:
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
        except TimeoutError:
            failure = _too_long()
        except ApiError as error:
            failure = error
        except Exception as error:  # our own fault, which the log is told of behind the stream's last event
            mistake, failure = error, ApiError(500, "the server failed; its log says how; report it.")
        # Sending may wait for as long as the client does not read, and meanwhile others need the place.
        await self._held.aclose()
        try:
            async with asyncio.timeout_at(max(self._deadline, asyncio.get_running_loop().time() + _FAREWELL_SECONDS)):
                if failure is not None:
                    await self._send_error(scope, send, failure)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            log_fields(scope).values["client_left"] = True  # an unfinished answer has its connection closed
        if mistake is not None:
            raise mistake

    async def _send_error(self, scope: Scope, send: Send, error: ApiError) -> None:
        """The status is sent already: an error is the stream's last event."""
        log_fields(scope).values |= {"error": error.code, "error_status": error.status_code}
        try:
            event = self._failure_event(error)
        except Exception:  # it tells of what was made so far, which may be what could not be written
            event = encode_failure(error)
        await send({"type": "http.response.body", "body": event, "more_body": True})


async def while_connected(request: Request, work: Awaitable[_Result], *, deadline: float) -> _Result:
    """Wait for work as long as the client is there and the time lasts; else cancel it.

    Raises: ApiError 504, or 499 where nobody is there to read it.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(request.receive))
    try:
        async with asyncio.timeout_at(deadline):
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
    except TimeoutError:
        raise _too_long() from None
    finally:
        leaving.cancel()
        working.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    log_fields(request.scope).values["client_left"] = True
    raise ApiError(499, "the client has gone; its request was ended; stay connected for an answer.", code="client_left")


def _too_long() -> ApiError:
    return ApiError(
        504,
        "the answer took longer than the server allows a request; it was ended; ask for fewer tokens.",
        code="timeout",
    )


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
