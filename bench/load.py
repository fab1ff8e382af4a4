"""The callers: connections that ask one question at a time and note when what of the answer came.

Bytes are counted, not parsed: the load must not be what is slow.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from typing import cast

from bench.upstream import LENGTH, MARK

# What takes longer is given up, and counted as failed.
PATIENCE_SECONDS = 30.0


@dataclass(slots=True)
class Answer:
    """What came of one question; times in seconds of the monotonic clock, 0 for what never
    came."""

    asked: float
    status: int = 0
    chunks: int = 0
    first: float = 0.0
    last: float = 0.0
    ended: float = 0.0
    gaps: list[float] = field(default_factory=list)


class Connection(asyncio.Protocol):
    """One connection of a caller's, kept between questions."""

    def __init__(self) -> None:
        # uvloop's own clock counts whole milliseconds.
        self._now = time.monotonic
        self._waiting: asyncio.Future[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no asyncio.Transport.
        self.transport = cast(asyncio.Transport, transport)

    async def ask(self, request: bytes) -> Answer:
        """The answer, whole, or as far as it came before the connection was lost."""
        answer = self.answer = Answer(self._now())
        self._tail = b""
        self._length: int | None = None
        self._body = 0
        self._waiting = asyncio.get_running_loop().create_future()
        if self.transport.is_closing():
            raise ConnectionError("The connection was lost; nothing more can be asked on it.")
        self.transport.write(request)
        await self._waiting
        return answer

    def data_received(self, data: bytes) -> None:
        answer, now = self.answer, self._now()
        if not answer.status:
            data = self._tail + data
            head, end, data = data.partition(b"\r\n\r\n")
            if not end:
                self._tail = head
                return
            self._begin(head)
        if chunks := data.count(MARK):
            if answer.chunks:
                answer.gaps.append(now - answer.last)
            else:
                answer.first = now
            answer.chunks += chunks
            answer.last = now
        self._body += len(data)
        self._tail = self._tail[-4:] + data[-5:]
        chunked = self._length is None and self._tail.endswith(b"0\r\n\r\n")
        if chunked or self._body == self._length:
            answer.ended = now
            self._end()

    def _begin(self, head: bytes) -> None:
        self.answer.status = int(head.split(b" ", 2)[1])
        length = LENGTH.search(head)
        self._length = int(length[1]) if length else None
        self._tail = b""

    def connection_lost(self, exc: Exception | None) -> None:
        self._end()

    def _end(self) -> None:
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)


@dataclass(frozen=True)
class Questions:
    """A target, and how to ask it for so many chunks, so many milliseconds apart."""

    port: int
    path: str
    # The body, with a place for the message.
    body: str
    headers: str = ""

    def request(self, chunks: int, pause: int, message: str = "") -> bytes:
        body = self.body.replace("MESSAGE", f"{message}bench:{chunks}:{pause}").encode()
        head = (
            f"POST {self.path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\n{self.headers}"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def connect(self, host: str | None = None) -> Connection:
        """A connection to the target; from `host`, another loopback address, if given."""
        _, connection = await asyncio.get_running_loop().create_connection(
            Connection, "127.0.0.1", self.port, local_addr=(host, 0) if host else None
        )
        return connection


async def connected(
    questions: Questions, count: int, talk: Callable[[Connection, int], Coroutine[None, None, None]]
) -> None:
    """`talk` on so many connections at once, to the end of all or of our patience."""
    connections = [await questions.connect() for _ in range(count)]
    talking = [asyncio.ensure_future(talk(each, i)) for i, each in enumerate(connections)]
    await asyncio.wait(talking, timeout=PATIENCE_SECONDS)
    # What has not ended ends now, with what came of it.
    for connection in connections:
        connection.transport.abort()
    await asyncio.gather(*talking)


async def closed_loop(
    questions: Questions, request: bytes, count: int, seconds: float
) -> list[Answer]:
    """`count` callers who ask again as soon as they are answered, for so long."""
    now = time.monotonic
    until = now() + seconds
    answers: list[Answer] = []

    async def talk(connection: Connection, number: int) -> None:
        answers.append(await connection.ask(request))
        while now() < until:
            answers.append(await connection.ask(request))

    await connected(questions, count, talk)
    return answers


async def open_loop(
    questions: Questions, request: bytes, count: int, seconds: float
) -> list[Answer]:
    """`count` callers who ask once, their starts evenly over so long."""
    answers: list[Answer] = []

    async def talk(connection: Connection, number: int) -> None:
        await asyncio.sleep(seconds * number / count)
        answers.append(await connection.ask(request))

    await connected(questions, count, talk)
    return answers


def percentile(values: Iterable[float], share: float) -> float:
    """The value that `share` of the values do not exceed; 0 where there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
