"""A provider made of bytes, on a real socket: each test writes down what it sends and when."""

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
    """One event of a stream, holding `chunk` as JSON."""
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def delta(content: object = None, **choice: object) -> bytes:
    """The event of a chunk with one choice: `delta("Hi")`, `delta(finish_reason="stop")`."""
    inner = {"content": content} if content is not None else {}
    return event({"model": "m-1", "choices": [{"index": 0, "delta": inner, **choice}]})


def http_chunk(data: bytes) -> bytes:
    """`data` as one chunk of the chunked transfer encoding."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def response(status: int, body: bytes, *headers: str) -> bytes:
    """A whole HTTP response; JSON unless `headers` say otherwise."""
    lines = [f"HTTP/1.1 {status} Status", f"content-length: {len(body)}", *headers]
    if not any(line.lower().startswith("content-type:") for line in headers):
        lines.append("content-type: application/json")
    return "\r\n".join([*lines, "", ""]).encode() + body


@dataclass
class Connection:
    """One request that reached the upstream, and the socket it came on."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    path: str
    headers: dict[str, str]
    body: Any
    # Set when the other side has closed or reset the connection.
    closed: asyncio.Event

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def stream(self, *events: bytes) -> None:
        """The head of a stream, these events, each a chunk of its own, and no end."""
        await self.send(HEAD + b"".join(http_chunk(data) for data in events))

    async def send_events(self, *events: bytes) -> None:
        """Further events of a stream that has begun."""
        await self.send(b"".join(http_chunk(data) for data in events))

    async def complete(self, *texts: str) -> None:
        """A whole answer of these chunks, ended as OpenAI ends one."""
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
        """Close with a RST, as a crashed server or a firewall does."""
        linger = struct.pack("ii", 1, 0)
        self.writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, linger)
        self.writer.transport.abort()


Script = Callable[[Connection], Awaitable[None]]


@dataclass
class Upstream:
    """The listening side. Each request is handed to `script`; when that returns, the connection
    stays open unless the script closed it."""

    url: str
    script: Script
    requests: list[Connection] = field(default_factory=list)
    connections: int = 0
    # Grows with every request, so that a test can wait for one.
    arrived: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def wait_for_request(self, number: int = 0) -> Connection:
        """The request of that number, waited for if it has not come yet."""
        async with self.arrived:
            await self.arrived.wait_for(lambda: len(self.requests) > number)
        return self.requests[number]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                connection = await _parse(head, reader, writer)
                async with self.arrived:
                    self.requests.append(connection)
                    self.arrived.notify_all()
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
    body = await reader.readexactly(int(headers["content-length"]))
    path = request_line.split(" ")[1]
    watched = cast(_Watched, writer.transport.get_protocol())
    return Connection(reader, writer, path, headers, json.loads(body), watched.closed)


class _Watched(asyncio.StreamReaderProtocol):
    """Tells of the peer's leaving at once, not when somebody next reads."""

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
    """An upstream on a free port of 127.0.0.1; its sockets are gone when the block ends."""
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
    server = await loop.create_server(lambda: _Watched(serve), "127.0.0.1", 0, ssl=tls)
    scheme = "https" if tls else "http"
    upstream.url = f"{scheme}://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    try:
        yield upstream
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
