"""Streams to clients that do not read."""

import asyncio
import contextlib
import json
import platform
import re
import socket
import time
from contextlib import AsyncExitStack
from typing import Any

import pytest

from moesaic.errors import ConfigError
from moesaic.serve.server import connection
from moesaic.serve.server.connection import EventStream, encode_failure
from moesaic.serve.server.errors import ApiError
from moesaic.serve.server.log_fields import begin_log, log_fields
from moesaic.serve.server.run import end_stalled, listen


@pytest.mark.parametrize("num_read", range(4))  # messages that the client reads
@pytest.mark.parametrize("end", ["time", "failure", "end"])
def test_a_stream_that_is_not_read_holds_nothing_beyond_its_end(
    end: str, num_read: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "_FAREWELL_SECONDS", 0.05)

    async def events() -> Any:
        yield b"data: 1\n\n"
        if end == "time":
            await asyncio.Event().wait()
        if end == "failure":
            raise ApiError(500, "it failed; ask again.", code="engine_error")

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def main() -> None:
        sent: list[Any] = []
        held, is_free = AsyncExitStack(), asyncio.Event()
        held.callback(is_free.set)

        async def send(message: Any) -> None:
            if len(sent) == num_read:
                await asyncio.Event().wait()
            sent.append(message)
            assert is_free.is_set() is (len(sent) > 2), "what ends a stream is sent when nothing is held"

        scope: dict[str, Any] = {"type": "http"}
        begin_log(scope, "name")
        stream = EventStream(events(), held, deadline=asyncio.get_running_loop().time() + 0.05)
        calling = asyncio.ensure_future(stream(scope, receive, send))
        await asyncio.wait_for(is_free.wait(), 20)
        await asyncio.wait_for(calling, 20)
        num_messages = 3 if end == "end" else 4
        assert len(sent) == min(num_read, num_messages)
        assert ("client_left" in log_fields(scope).values) is (num_read < num_messages)

    asyncio.run(main())


@pytest.mark.parametrize("can_tell", [True, False])
def test_a_mistake_of_our_own_is_told_in_the_streams_last_event_and_to_the_log(can_tell: bool) -> None:
    async def events() -> Any:
        yield b"data: 1\n\n"
        raise ValueError("a mistake")

    def failure_event(error: ApiError) -> bytes:
        """Of an answer that tells what was made so far, which may be what could not be written."""
        if not can_tell:
            raise ValueError("another")
        return encode_failure(error)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def main() -> None:
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        scope: dict[str, Any] = {"type": "http"}
        begin_log(scope, "name")
        deadline = asyncio.get_running_loop().time() + 60
        stream = EventStream(events(), AsyncExitStack(), deadline=deadline, failure_event=failure_event)
        with pytest.raises(ValueError, match="a mistake"):
            await asyncio.wait_for(stream(scope, receive, send), 20)
        assert json.loads(sent[2]["body"].removeprefix(b"data: "))["error"]["type"] == "server_error"
        assert sent[3] == {"type": "http.response.body", "body": b"", "more_body": False}
        assert log_fields(scope).values["error_status"] == 500

    asyncio.run(main())


def test_a_small_answer_waits_for_no_acknowledgment() -> None:
    """Of a connection that is kept, the second answer is in two writes: head and body."""

    async def main() -> bool:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def accept(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with listen("127.0.0.1", 0) as listener:
            server = await asyncio.start_server(accept, sock=listener)
            _, writer = await asyncio.open_connection(*listener.getsockname())
            no_delay = await asyncio.wait_for(found, 20)
            writer.close()
            server.close()
        return bool(no_delay)

    assert asyncio.run(main())


@pytest.mark.skipif(
    not hasattr(socket, "TCP_USER_TIMEOUT") or tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (5, 11),
    reason="only Linux, from 5.11 on, ends such connections by itself",
)
def test_a_connection_whose_client_takes_nothing_ends() -> None:
    with listen("127.0.0.1", 0) as listener, socket.socket() as client:
        end_stalled(listener, 1.5)
        listener.listen()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(listener.getsockname())
        connection, _ = listener.accept()
        with connection:
            connection.setblocking(False)
            with pytest.raises(TimeoutError):  # by the system; BlockingIOError until then
                for _ in range(600):
                    with contextlib.suppress(BlockingIOError):
                        connection.send(b" " * 65536)
                    time.sleep(0.05)


@pytest.mark.parametrize("host", ["a\0b", "ü" * 70, "192.0.2.1"])
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot be listened on"):
        listen(host, 0)


def test_a_stream_that_the_server_ended_is_no_client_that_left() -> None:
    """As when the server stops at once: connections are closed while the error is on its way."""

    async def events() -> Any:
        yield b"data: 1\n\n"
        raise ApiError(503, "it stops; ask again.", code="aborted")

    async def main() -> None:
        is_closed, num_sent = asyncio.Event(), 0

        async def receive() -> Any:
            await is_closed.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            nonlocal num_sent
            num_sent += 1
            if num_sent == 3:  # the error
                is_closed.set()
                await asyncio.Event().wait()

        scope: dict[str, Any] = {"type": "http"}
        begin_log(scope, "name")
        stream = EventStream(events(), AsyncExitStack(), deadline=asyncio.get_running_loop().time() + 60)
        await asyncio.wait_for(stream(scope, receive, send), 20)
        fields = log_fields(scope).values
        assert (fields["error"], fields["error_status"]) == ("aborted", 503) and "client_left" not in fields

    asyncio.run(main())
