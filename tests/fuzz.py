"""Requests that are wrong in every way: bytes at a live service, and bodies at `parse_request`.

`python -m tests.fuzz` goes on for five minutes and says how many there were; `make fuzz` runs it.
All is drawn from one seed. Every answer has to be one of the contract's, or the server's own bare
400 for what is not HTTP.
"""

import argparse
import asyncio
import json
import logging
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import anyio
from hypothesis import strategies as st

from chat import ChatRequest, parse_request
from errors import ServiceError
from tests.client import Client
from tests.conftest import running_service

# What a request can be answered with where the provider and the service are well.
STATUSES = {200, 204, 400, 401, 404, 405, 408, 409, 413, 415, 422, 429}
# The server's own words, before there is a request.
BARE_400 = re.compile(rb"(Invalid HTTP request received|The head of this request is too large)\.$")
# Ends what came before it, whatever that was: a head, or the connection after an answer.
LAST = b"\r\n\r\nGET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
REQUEST_ID = re.compile(rb"\r\nx-request-id: [A-Za-z0-9._:+/=-]{1,128}\r\n", re.IGNORECASE)
KEY = "key-0123456789abcdefghij"
MAX_CHARS = 100

GOOD = [
    b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n",
    b"GET /api/v1/models HTTP/1.1\r\nhost: x\r\nx-request-id: abc\r\n\r\n",
    b"GET /api/v1/sessions/demo HTTP/1.1\r\nhost: x\r\nx-forwarded-for: 10.0.0.1\r\n\r\n",
    b"DELETE /api/v1/sessions/s_%41 HTTP/1.1\r\nhost: x\r\n\r\n",
    (
        b"OPTIONS /api/v1/chat HTTP/1.1\r\nhost: x\r\norigin: https://a.example\r\n"
        b"access-control-request-method: POST\r\n\r\n"
    ),
    (
        b"POST /api/v1/chat HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b'content-length: 16\r\n\r\n{"message":"Hi"}'
    ),
    b"POST /api/v1/chat HTTP/1.1\r\nhost: x\r\nauthorization: Bearer " + KEY.encode() + b"\r\n"
    b"content-type: application/json; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    b'8\r\n{"messag\r\n1a\r\ne":"Hi","session_id":null}\r\n0\r\n\r\n',
    (
        b"POST /api/v1/chat HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        b"traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n"
        b'content-length: 56\r\n\r\n{"message":"Hi","session_id":"demo","model_id":"mock/x"}'
    ),
]
WORDS = [
    b"\r\n",
    b"\n",
    b"\r",
    b"\0",
    b" ",
    b":",
    b"%00",
    b"%ff",
    b"%2f",
    b"..",
    b"//",
    b"?",
    b"#",
    b"\xff\xfe",
    b"\xe2\x80\xa8",
    b"\\ud800",
    b'"',
    b"{",
    b"}",
    b"[" * 300,
    b"null",
    b"1e999",
    b"-1",
    b"99999999999999999999",
    b"HTTP/1.0",
    b"HTTP/9.9",
    b"HEAD",
    b"POST",
    b"connection: close\r\n",
    b"connection: upgrade\r\nupgrade: websocket\r\n",
    b"expect: 100-continue\r\n",
    b"content-length: 5\r\n",
    b"transfer-encoding: chunked\r\n",
    b"content-encoding: gzip\r\n",
    b"authorization: Bearer \xff\r\n",
    b"authorization: Basic x\r\n",
    b"forwarded: for=1.2.3.4\r\n",
    b"x-request-id: \x7f\r\n",
    b"a" * 70_000,
]


def mutated(draw: random.Random) -> bytes:
    """A request with some of its bytes changed, moved, doubled, left out or put in."""
    data = bytearray(draw.choice(GOOD))
    for _ in range(draw.choice((0, 1, 1, 2, 3, 8))):
        place, length = draw.randrange(len(data) + 1), draw.randrange(1, 12)
        match draw.randrange(6):
            case 0:
                data[place : place + 1] = bytes([draw.randrange(256)])
            case 1:
                del data[place : place + length]
            case 2:
                data[place:place] = draw.choice(WORDS)
            case 3:
                data[place : place + length] = draw.choice(WORDS)
            case 4:
                data[place:place] = data[place : place + length]
            case _:
                data[place:] = draw.choice(GOOD)[place:]
    return bytes(data)


async def exchange(url: str, data: bytes) -> bytes:
    """Everything that comes back for these bytes, to the end of the connection."""
    client = await Client.connect(url)
    told = bytearray()
    try:
        client.writer.write(data)
        # What is left of a request that never ends is not waited for.
        with anyio.move_on_after(0.25), suppress(ConnectionError):
            while part := await client.reader.read(65536):
                told += part
    finally:
        client.disconnect()
    return bytes(told)


def check_answer(data: bytes, told: bytes, counts: Counter[str]) -> None:
    """Raises AssertionError where an answer is none of the contract's."""
    if not told:
        counts["none"] += 1
        return
    for head in re.split(rb"(?=HTTP/1\.1 \d\d\d )", told)[1:]:
        status = int(head[9:12])
        if status == 100:
            continue
        bare = status == 400 and BARE_400.search(head)
        counts["bare 400" if bare else str(status)] += 1
        assert status in STATUSES, (data, told)
        assert REQUEST_ID.search(head) or bare, (data, told)


async def fuzz_service(seconds: float, seed: int, workers: int = 20) -> Counter[str]:
    """Mutated requests at a live service; how many there were of each status."""
    counts: Counter[str] = Counter()
    env = {"RATE_LIMIT": "off", "RATE_LIMIT_API_KEY": "off", "BODY_TIMEOUT_SECONDS": "0.02"}
    env |= {"MAX_STREAMS_PER_CALLER": "1000", "API_KEYS": f"app:{KEY}", "LOG_LEVEL": "info"}
    env |= {"CORS_ORIGINS": "https://a.example", "MAX_MESSAGE_CHARS": str(MAX_CHARS)}
    server = logging.getLogger("uvicorn.error")
    # A warning is for every request that is not HTTP; an error is a defect.
    server.setLevel(logging.ERROR)
    async with running_service(env) as app:
        server.addHandler(app.log)
        until = time.monotonic() + seconds

        async def work(number: int) -> None:
            draw = random.Random(seed * 1009 + number)
            while time.monotonic() < until:
                data = b"".join(mutated(draw) for _ in range(draw.choice((1, 1, 2, 4))))
                data += LAST if draw.randrange(10) else b""
                check_answer(data, await exchange(app.url, data), counts)
                # A defect of ours is logged as one, whatever was answered.
                assert not any(line["level"] == "error" for line in app.log.entries), data
                app.log.lines.clear()

        async with anyio.create_task_group() as tasks:
            for number in range(workers):
                tasks.start_soon(work, number)
        while await app.metric("chat_active_streams"):
            pass
        server.removeHandler(app.log)
    return counts


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
FIELDS = st.sampled_from([*ChatRequest.model_fields, "sesion_id", "", "\x00"])
OBJECTS = st.dictionaries(FIELDS | st.text(), JSON_VALUES, max_size=5)
BODIES = st.one_of(
    st.binary(max_size=200),
    st.builds(lambda value: json.dumps(value).encode(), OBJECTS | JSON_VALUES),
    # Lone surrogates as they stand, which JSON's own escapes would hide.
    st.builds(
        lambda text: b'{"message":"' + text.encode("utf-8", "surrogatepass") + b'"}',
        st.text(st.characters(exclude_characters='"\\')),
    ),
    st.builds(lambda text: json.dumps({"message": text}).encode(), st.text(max_size=150)),
)


def check_body(body: bytes) -> str:
    """What a body comes to: an accepted message keeps every promise, a refusal has its code."""
    try:
        chat = parse_request(body, MAX_CHARS)
    except ServiceError as error:
        detail = error.detail().model_dump_json()
        assert len(detail) < 4000
        return error.code
    assert 1 <= len(chat.message) <= MAX_CHARS
    again = ChatRequest(message=chat.message)
    assert again.message == chat.message
    chat.message.encode()
    return "accepted"


def fuzz_bodies(seconds: float, seed: int) -> Counter[str]:
    """Bytes at `parse_request`, without a socket between: a thousand times as many."""
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    until = time.monotonic() + seconds
    seeds = [data.partition(b"\r\n\r\n")[2] for data in GOOD if b"{" in data]
    while time.monotonic() < until:
        data = bytearray(draw.choice(seeds))
        for _ in range(draw.randrange(6)):
            place = draw.randrange(len(data) + 1)
            if draw.random() < 0.5:
                data[place : place + draw.randrange(4)] = draw.choice(WORDS[:-1])
            else:
                data[place : place + 1] = draw.randbytes(draw.randrange(4))
        counts[check_body(bytes(data))] += 1
    return counts


Report = Callable[[str], object]


async def fuzz(seconds: float, seed: int, report: Report) -> None:
    # A body takes 30 microseconds, an answer of the service a millisecond.
    bodies = await asyncio.to_thread(fuzz_bodies, seconds / 5, seed)
    report(f"seed {seed}: {bodies.total()} bodies: {dict(bodies)}\n")
    requests = await fuzz_service(seconds * 4 / 5, seed)
    report(f"seed {seed}: {requests.total()} answers: {dict(sorted(requests.items()))}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    arguments = (options.seconds, options.seed, sys.stdout.write)
    anyio.run(fuzz, *arguments, backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main()
