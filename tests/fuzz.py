"""A fuzzer: mutated requests to a running service, and mutated bodies to `parse_request`.

`make fuzz` runs it for about five minutes and prints how many responses had which status. One seed
determines all random choices. Every response must be one that the API documents, or the server's
own plain-text 400 for bytes that are not HTTP.
"""

import argparse
import asyncio
import json
import logging
import random
import re
import sys
from collections import Counter
from contextlib import suppress

import anyio
from hypothesis import strategies as st

from chat import ChatRequest, parse_request
from errors import ServiceError
from tests.client import Client
from tests.conftest import running_service

# The statuses of the API while the provider and the service work.
STATUSES = {200, 204, 400, 401, 404, 405, 408, 409, 413, 415, 422, 429}
# The HTTP server's own 400, which has no request id.
SERVER_400 = re.compile(rb"\r\ncontent-type: text/plain", re.IGNORECASE)
# Appended to the bytes. It ends an unfinished request, or has the server close the connection.
FINAL_REQUEST = b"\r\n\r\nGET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
REQUEST_ID = re.compile(rb"\r\nx-request-id: [A-Za-z0-9._:+/=-]{1,128}\r\n", re.IGNORECASE)
KEY = "key-0123456789abcdefghij"
MAX_CHARS = 100
WORKERS = 20

VALID_REQUESTS = [
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
FRAGMENTS = [
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


def mutate_request(draw: random.Random) -> bytes:
    """Return a valid request with up to 8 mutations."""
    data = bytearray(draw.choice(VALID_REQUESTS))
    for _ in range(draw.choice((0, 1, 1, 2, 3, 8))):
        index, length = draw.randrange(len(data) + 1), draw.randrange(1, 12)
        match draw.randrange(6):
            case 0:
                data[index : index + 1] = bytes([draw.randrange(256)])
            case 1:
                del data[index : index + length]
            case 2:
                data[index:index] = draw.choice(FRAGMENTS)
            case 3:
                data[index : index + length] = draw.choice(FRAGMENTS)
            case 4:
                data[index:index] = data[index : index + length]
            case _:
                data[index:] = draw.choice(VALID_REQUESTS)[index:]
    return bytes(data)


async def exchange(url: str, data: bytes) -> bytes:
    """Return everything the service sends for these bytes.

    The connection stays open if the bytes end in an unfinished request or body, so this stops after
    0.25 s.
    """
    client = await Client.connect(url)
    received = bytearray()
    try:
        client.writer.write(data)
        with anyio.move_on_after(0.25), suppress(ConnectionError):
            while part := await client.reader.read(65536):
                received += part
    finally:
        client.disconnect()
    return bytes(received)


def check_responses(data: bytes, received: bytes, counts: Counter[str]) -> None:
    """Count the responses by status. Raise AssertionError for one that the API does not have."""
    if not received:
        counts["none"] += 1
        return
    for response in re.split(rb"(?=HTTP/1\.1 \d\d\d )", received)[1:]:
        status = int(response[9:12])
        if status == 100:
            continue
        from_server = status == 400 and SERVER_400.search(response)
        counts["server 400" if from_server else str(status)] += 1
        assert status in STATUSES, (data, received)
        assert REQUEST_ID.search(response) or from_server, (data, received)


async def fuzz_service(messages: int, seed: int) -> Counter[str]:
    """Send this many messages of mutated requests. Return how many responses had which status."""
    counts: Counter[str] = Counter()
    env = {
        "RATE_LIMIT": "off",
        "RATE_LIMIT_API_KEY": "off",
        "BODY_TIMEOUT_SECONDS": "0.02",
        "MAX_STREAMS_PER_CALLER": "1000",
        "MAX_MESSAGE_CHARS": str(MAX_CHARS),
        "API_KEYS": f"app:{KEY}",
        "CORS_ORIGINS": "https://a.example",
        "LOG_LEVEL": "info",
    }
    server_log = logging.getLogger("uvicorn.error")
    # uvicorn logs a warning for each request that is not HTTP. An error is a bug.
    server_log.setLevel(logging.ERROR)
    async with running_service(env) as app:
        server_log.addHandler(app.log)

        async def work(number: int) -> None:
            draw = random.Random(seed * 1009 + number)
            for _ in range(messages // WORKERS):
                requests = (mutate_request(draw) for _ in range(draw.choice((1, 1, 2, 4))))
                data = b"".join(requests)
                data += FINAL_REQUEST if draw.randrange(10) else b""
                check_responses(data, await exchange(app.url, data), counts)
                # An internal error is logged even where the client got another response.
                assert not any(line["level"] == "error" for line in app.log.entries), data
                app.log.lines.clear()

        async with anyio.create_task_group() as tasks:
            for number in range(WORKERS):
                tasks.start_soon(work, number)
        while await app.metric("chat_active_streams"):
            pass
        server_log.removeHandler(app.log)
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
    # Lone surrogates as bytes. `json.dumps` would escape them.
    st.builds(
        lambda text: b'{"message":"' + text.encode("utf-8", "surrogatepass") + b'"}',
        st.text(st.characters(exclude_characters='"\\')),
    ),
    st.builds(lambda text: json.dumps({"message": text}).encode(), st.text(max_size=150)),
)


def check_body(body: bytes) -> str:
    """Parse a body and return "accepted" or the error code.

    Checks that an accepted message is within its limits and stays the same when cleaned again, and
    that an error is short.
    """
    try:
        chat = parse_request(body, MAX_CHARS)
    except ServiceError as raised:
        error = raised
    else:
        assert 1 <= len(chat.message) <= MAX_CHARS
        assert ChatRequest(message=chat.message).message == chat.message
        chat.message.encode()
        return "accepted"
    assert len(error.detail().model_dump_json()) < 4000
    return error.code


def fuzz_bodies(count: int, seed: int) -> Counter[str]:
    """Parse mutated bodies. Return how many were accepted or rejected with which code."""
    draw = random.Random(seed)
    counts: Counter[str] = Counter()
    bodies = [data.partition(b"\r\n\r\n")[2] for data in VALID_REQUESTS if b"{" in data]
    for _ in range(count):
        data = bytearray(draw.choice(bodies))
        for _ in range(draw.randrange(6)):
            index = draw.randrange(len(data) + 1)
            if draw.random() < 0.5:
                data[index : index + draw.randrange(4)] = draw.choice(FRAGMENTS[:-1])
            else:
                data[index : index + 1] = draw.randbytes(draw.randrange(4))
        counts[check_body(bytes(data))] += 1
    return counts


async def fuzz(messages: int, seed: int) -> None:
    # Parsing a body takes 30 microseconds, a request to the service a millisecond.
    bodies = await asyncio.to_thread(fuzz_bodies, messages * 10, seed)
    sys.stdout.write(f"seed {seed}: {bodies.total()} bodies: {dict(bodies)}\n")
    responses = await fuzz_service(messages, seed)
    counts = dict(sorted(responses.items()))
    sys.stdout.write(f"seed {seed}: {responses.total()} responses: {counts}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    anyio.run(fuzz, options.messages, options.seed, backend_options={"use_uvloop": True})


if __name__ == "__main__":
    main()
