"""A scripted provider on a real socket: each test decides which bytes it sends and when."""

import asyncio
import json
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from socket import SO_LINGER, SOL_SOCKET
from typing import Any, cast

HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-request-id: up_1\r\n"
    b"transfer-encoding: chunked\r\n\r\n"
)
END = b"0\r\n\r\n"
DONE = b"data: [DONE]\n\n"


def event(chunk: object) -> bytes:
    """Return a server-sent event with `chunk` as JSON."""
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def delta(content: object = None, **choice: object) -> bytes:
    """Return an event with one choice: `delta("Hi")`, `delta(finish_reason="stop")`."""
    inner = {"content": content} if content is not None else {}
    return event({"model": "m-1", "choices": [{"index": 0, "delta": inner, **choice}]})


def http_chunk(data: bytes) -> bytes:
    """Return `data` as one chunk of the chunked transfer encoding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def response(status: int, body: bytes, *headers: str) -> bytes:
    """Return a whole HTTP response, JSON unless `headers` contain a content type."""
    lines = [f"HTTP/1.1 {status} Status", f"content-length: {len(body)}", *headers]
    if not any(line.lower().startswith("content-type:") for line in headers):
        lines.append("content-type: application/json")
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Connection:
    """One request that reached the upstream, and its connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    path: str
    headers: dict[str, str]
    body: Any
    # Set when the service has closed or reset the connection.
    closed: asyncio.Event

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def stream(self, *events: bytes) -> None:
        """Start a stream: send the headers and these events, each in its own HTTP chunk."""
        await self.send(HEAD + b"".join(http_chunk(data) for data in events))

    async def send_events(self, *events: bytes) -> None:
        """Send more events of a stream that has started."""
        await self.send(b"".join(http_chunk(data) for data in events))

    async def complete(self, *texts: str) -> None:
        """Send a whole stream with these chunks and OpenAI's ending."""
        chunks = [delta(text) for text in texts]
        usage = {
            "prompt_tokens": 1,
            "completion_tokens": len(texts),
            "total_tokens": 1 + len(texts),
        }
        end = [delta(finish_reason="stop"), event({"choices": [], "usage": usage}), DONE]
        await self.stream(*chunks, *end)
        await self.send(END)

    def reset(self) -> None:
        """Reset the connection, as a crashed server or a firewall does."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, linger)
        self.writer.transport.abort()


Script = Callable[[Connection], Awaitable[None]]


@dataclass
class Upstream:
    """A listening provider. Each request runs `script`. The connection stays open afterwards,
    unless the script closed it."""

    url: str
    script: Script
    requests: list[Connection] = field(default_factory=list)
    connections: int = 0
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def wait_for_request(self, number: int = 0) -> Connection:
        """Return request `number`; wait until it arrives."""
        while len(self.requests) <= number:
            self._changed.clear()
            await self._changed.wait()
        return self.requests[number]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                connection = await _parse(head, reader, writer)
                self.requests.append(connection)
                self._changed.set()
                await self.script(connection)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


async def _parse(
    head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> Connection:
    request_line, *lines = head.decode("latin-1").rstrip("\r\n").split("\r\n")
    pairs = (line.split(": ", 1) for line in lines)
    headers = {name.lower(): value for name, value in pairs}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    path = request_line.split(" ")[1]
    protocol = cast(_WatchedProtocol, writer.transport.get_protocol())
    return Connection(reader, writer, path, headers, json.loads(body or b"null"), protocol.closed)


class _WatchedProtocol(asyncio.StreamReaderProtocol):
    """Sets `closed` as soon as the peer disconnects, whether or not the script reads."""

    def __init__(self, serve: Callable[..., Awaitable[None]]) -> None:
        super().__init__(asyncio.StreamReader(), serve)
        self.closed = asyncio.Event()

    def eof_received(self) -> bool | None:
        self.closed.set()
        return super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()
        super().connection_lost(exc)


@asynccontextmanager
async def running_upstream(
    script: Script, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Upstream]:
    """Run an upstream on a free port of 127.0.0.1. Close its sockets on exit."""
    upstream = Upstream("", script)
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await upstream.serve(reader, writer)
        except asyncio.CancelledError:
            writer.transport.abort()
        finally:
            tasks.discard(task)

    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _WatchedProtocol(serve), "127.0.0.1", 0, ssl=tls)
    scheme = "https" if tls else "http"
    upstream.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield upstream
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
