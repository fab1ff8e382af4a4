"""A provider made of ready bytes: what it sends costs it nothing but the writing.

`python -m bench.upstream PORT` serves until it is ended. What an answer is like stands in the last
message: `bench:20:50` is 20 chunks, 50 ms apart, the first at once; with 0 ms they leave in one
write. Any POST is a question, whatever its path; any GET asks whether it is there.
"""

import asyncio
import gc
import re
import sys
from functools import cache
from typing import cast

import uvloop

ASKED = re.compile(rb"bench:(\d+):(\d+)")
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.I)
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"x-request-id: req_0123456789abcdef\r\ntransfer-encoding: chunked\r\n\r\n"
)
# A chunk as OpenAI sends it today, with as much around the text.
CHUNK = (
    '{"id":"chatcmpl-CZ0aB1cD2eF3gH4iJ5kL6mN7oP8q","object":"chat.completion.chunk",'
    '"created":1794000000,"model":"gpt-4o-mini-2024-07-18","service_tier":"default",'
    '"system_fingerprint":"fp_0123456789",'
)
# Counting this one byte counts chunks, however an answer is cut into reads: it stands in every
# chunk of text and nowhere else.
MARK = b"~"
WORDS = ("~The ", "~quick ", "~brown ", "~fox ", "~jumps ", "~over ", "~a ", "~lazy ", "~dog. ")


def _chunk(data: str) -> bytes:
    event = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


def _piece(text: str) -> bytes:
    delta = f'"choices":[{{"index":0,"delta":{{"content":"{text}"}},"logprobs":null,'
    return _chunk(CHUNK + delta + '"finish_reason":null}],"usage":null}')


PIECES = [_piece(word) for word in WORDS]
USAGE = '"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":20,"total_tokens":29}}'
STOP = '"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}'
END = _chunk(CHUNK + STOP) + _chunk(CHUNK + USAGE) + _chunk("[DONE]") + b"0\r\n\r\n"


@cache
def whole(chunks: int) -> bytes:
    """An answer of so many chunks, from its head to its end."""
    return HEAD + b"".join(PIECES[i % len(PIECES)] for i in range(chunks)) + END


class Connection(asyncio.Protocol):
    """One connection, one answer at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no asyncio.Transport.
        self._transport = cast(asyncio.Transport, transport)
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self._timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, end, body = self._received.partition(b"\r\n\r\n")
        if head.startswith(b"GET ") and end:
            self._transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            self._received = b""
            return
        length = LENGTH.search(head)
        if not end or length is None or len(body) < int(length[1]):
            return
        self._received = b""
        chunks, pause = map(int, ASKED.findall(body)[-1])
        if pause == 0:
            self._transport.write(whole(chunks))
            return
        self._pause = pause / 1000
        self._left = chunks - 1
        self._due = self._loop.time()
        self._transport.write(HEAD + PIECES[0])
        self._wait()

    def _wait(self) -> None:
        # By the clock, not by the last chunk: a late one does not put off those behind it.
        self._due += self._pause
        self._timer = self._loop.call_at(self._due, self._next)

    def _next(self) -> None:
        self._transport.write(PIECES[self._left % len(PIECES)])
        self._left -= 1
        if self._left:
            self._wait()
        else:
            self._transport.write(END)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(
        Connection, "127.0.0.1", port, backlog=4096
    )
    gc.freeze()
    gc.disable()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
