"""The benchmark's provider: it writes prepared bytes, so it costs far less than what is measured.

`python -m bench.upstream PORT` serves until it is terminated. The last message of a request selects
the response: `bench:20:50` is 20 chunks, one every 50 ms, the first at once. With 0 ms the whole
response is one write. A POST to any path is a completion request; a GET gets a 200.
"""

import asyncio
import gc
import re
import sys
from functools import cache
from typing import cast

import uvloop

COMMAND = re.compile(rb"bench:(\d+):(\d+)")
CONTENT_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
HEAD = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    b"x-request-id: req_0123456789abcdef\r\ntransfer-encoding: chunked\r\n\r\n"
)
# The fields OpenAI sends around each text delta.
EVENT = (
    '{"id":"chatcmpl-CZ0aB1cD2eF3gH4iJ5kL6mN7oP8q","object":"chat.completion.chunk",'
    '"created":1794000000,"model":"gpt-4o-mini-2024-07-18","service_tier":"default",'
    '"system_fingerprint":"fp_0123456789",'
)
# Every text delta contains this byte once and nothing else does, so the client counts chunks by
# counting it, however the network splits the response.
MARK = b"~"
WORDS = ("~The ", "~quick ", "~brown ", "~fox ", "~jumps ", "~over ", "~a ", "~lazy ", "~dog. ")


def _http_chunk(data: str) -> bytes:
    event = f"data: {data}\n\n".encode()
    return b"%x\r\n%b\r\n" % (len(event), event)


def _text_event(text: str) -> bytes:
    choice = f'"choices":[{{"index":0,"delta":{{"content":"{text}"}},"logprobs":null,'
    return _http_chunk(EVENT + choice + '"finish_reason":null}],"usage":null}')


TEXT_EVENTS = [_text_event(word) for word in WORDS]
STOP = '"choices":[{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop"}],"usage":null}'
USAGE = '"choices":[],"usage":{"prompt_tokens":9,"completion_tokens":20,"total_tokens":29}}'
END = _http_chunk(EVENT + STOP) + _http_chunk(EVENT + USAGE) + _http_chunk("[DONE]") + b"0\r\n\r\n"


@cache
def response(chunks: int) -> bytes:
    """Return a complete HTTP response with this many chunks."""
    return HEAD + b"".join(TEXT_EVENTS[i % len(TEXT_EVENTS)] for i in range(chunks)) + END


class ProviderProtocol(asyncio.Protocol):
    """One connection, one response at a time."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio.Transport.
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
        length = CONTENT_LENGTH.search(head)
        if not end or length is None or len(body) < int(length[1]):
            return
        self._received = b""
        chunks, pause_ms = map(int, COMMAND.findall(body)[-1])
        if pause_ms == 0:
            self._transport.write(response(chunks))
            return
        self._pause = pause_ms / 1000
        self._remaining = chunks
        self._due = self._loop.time()
        self._transport.write(HEAD)
        self._write_next()

    def _write_next(self) -> None:
        self._transport.write(TEXT_EVENTS[self._remaining % len(TEXT_EVENTS)])
        self._remaining -= 1
        if self._remaining:
            # Relative to the schedule, not to this write: a late event does not delay the others.
            self._due += self._pause
            self._timer = self._loop.call_at(self._due, self._write_next)
        else:
            self._transport.write(END)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()


async def serve(port: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(ProviderProtocol, "127.0.0.1", port, backlog=4096)
    gc.freeze()
    gc.disable()
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1])))
