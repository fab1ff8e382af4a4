"""The load generator: connections that send one request at a time and time the response.

It counts bytes and parses nothing, so that it is not the bottleneck.
"""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from bench.upstream import CONTENT_LENGTH, MARK

# A response that takes longer is aborted and counts as failed.
RESPONSE_SECONDS = 30.0


@dataclass(slots=True)
class Response:
    """One response. Times are seconds of the monotonic clock, 0 for what never happened."""

    sent_at: float
    status: int = 0
    chunks: int = 0
    first_chunk_at: float = 0.0
    ended_at: float = 0.0


class Connection(asyncio.Protocol):
    """A client's connection, reused for one request after the other."""

    def __init__(self) -> None:
        self._finished: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio.Transport.
        self.transport = cast(asyncio.Transport, transport)

    async def send(self, request: bytes) -> Response:
        """Return the response, as far as it arrived before the connection was closed."""
        # Not the event loop's clock: uvloop counts whole milliseconds.
        response = self._response = Response(time.monotonic())
        self._tail = b""
        self._content_length: int | None = None
        self._body_bytes = 0
        self._finished = asyncio.get_running_loop().create_future()
        if self.transport.is_closing():
            raise ConnectionError("The connection is closed.")
        self.transport.write(request)
        await self._finished
        return response

    def data_received(self, data: bytes) -> None:
        response, now = self._response, time.monotonic()
        if not response.status:
            head, end, data = (self._tail + data).partition(b"\r\n\r\n")
            if not end:
                self._tail = head
                return
            self._read_head(head)
        if chunks := data.count(MARK):
            response.first_chunk_at = response.first_chunk_at or now
            response.chunks += chunks
        self._body_bytes += len(data)
        # The end of a chunked body, which may arrive in two reads.
        self._tail = self._tail[-4:] + data[-5:]
        chunked = self._content_length is None and self._tail.endswith(b"0\r\n\r\n")
        if chunked or self._body_bytes == self._content_length:
            response.ended_at = now
            self._finish()

    def _read_head(self, head: bytes) -> None:
        self._response.status = int(head.split(b" ", 2)[1])
        length = CONTENT_LENGTH.search(head)
        self._content_length = int(length[1]) if length else None
        self._tail = b""

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish()

    def _finish(self) -> None:
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)


@dataclass(frozen=True)
class Endpoint:
    """Where a program takes chat requests, and a JSON body with MESSAGE in the message's place."""

    port: int
    path: str
    body: str

    def request(self, chunks: int, pause_ms: int) -> bytes:
        """Return a request for this many chunks, one every `pause_ms`."""
        body = self.body.replace("MESSAGE", f"bench:{chunks}:{pause_ms}").encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, "127.0.0.1", self.port)
        return connection


async def run_clients(
    endpoint: Endpoint,
    request: bytes,
    count: int,
    *,
    start_seconds: float = 0.0,
    repeat_seconds: float = 0.0,
) -> list[Response]:
    """Send the request from each client, once or again and again for `repeat_seconds`.

    The clients' starts are spread evenly over `start_seconds`.
    """
    responses: list[Response] = []
    deadline = time.monotonic() + repeat_seconds

    async def client(connection: Connection, number: int) -> None:
        await asyncio.sleep(start_seconds * number / count)
        responses.append(await connection.send(request))
        while time.monotonic() < deadline:
            responses.append(await connection.send(request))

    connections = [await endpoint.connect() for _ in range(count)]
    tasks = [asyncio.ensure_future(client(each, i)) for i, each in enumerate(connections)]
    await asyncio.wait(tasks, timeout=RESPONSE_SECONDS)
    # Ends the responses that are still running.
    for connection in connections:
        connection.transport.abort()
    await asyncio.gather(*tasks)
    return responses


def percentile(values: Iterable[float], fraction: float) -> float:
    """Return the value at this fraction of the sorted values, or 0 if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(fraction * len(ordered)))] if ordered else 0.0
