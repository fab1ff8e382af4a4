"""The HTTP contract, over real sockets."""

import asyncio
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from providers import Call, ChunkStream, LLMProvider, Message
from tests.client import CANARY, JSON, Client, Response
from tests.conftest import RunningService, StartService, StartUpstream
from tests.upstream import (
    DONE,
    END,
    Connection,
    Script,
    Upstream,
    delta,
    event,
    http_chunk,
    response,
)

CHAT = "/api/v1/chat"
HELLO = b'{"message": "Hello"}'
# What no machine that runs these tests takes so long for: the other ending comes first.
NEVER = "3600"


def openai(url: str, **more: str) -> dict[str, str]:
    """The settings of a service that has one provider, at `url`."""
    return {
        "OPENAI_API_KEY": CANARY,
        "OPENAI_BASE_URL": url,
        "MAX_RETRIES": "0",
        **more,
    }


Relay = Callable[..., Awaitable[tuple[RunningService, Upstream]]]


@pytest.fixture
def relay(service: StartService, upstream: StartUpstream) -> Relay:
    """`await relay(script, HEARTBEAT_SECONDS="1")` starts a provider and a service that asks it."""

    async def start(script: Script, **env: str) -> tuple[RunningService, Upstream]:
        provider = await upstream(script)
        return await service(**openai(provider.url, **env)), provider

    return start


# What a provider does


async def hello(request: Connection) -> None:
    await request.complete("Hel", "lo")


async def silence(request: Connection) -> None:
    """Takes the request and answers nothing."""
    await request.closed.wait()


async def text(request: Connection) -> None:
    """One chunk, then nothing."""
    await request.stream(delta("first"))
    await request.closed.wait()


async def reasoning(request: Connection) -> None:
    """A sign of life, then nothing."""
    await request.stream(REASONING)
    await request.closed.wait()


async def nothing_at_all(request: Connection) -> None:
    """A head, then nothing."""
    await request.stream()
    await request.closed.wait()


async def flood(request: Connection) -> None:
    """Text without end, as fast as it is taken."""
    await request.stream()
    while True:
        await request.send_events(delta("x" * 60_000))


REASONING = event({"choices": [{"index": 0, "delta": {"reasoning_content": "hmm"}}]})
FAILURE = event({"error": {"message": "out of memory", "code": "server_error"}})


# What an answer is


async def failure(reply: Response) -> dict[str, Any]:
    """The error that an answer is, of the one shape that all have."""
    body = await reply.json()
    assert list(body) == ["error", "id"]
    assert body["id"] == reply.headers["x-request-id"]
    error: dict[str, Any] = body["error"]
    assert list(error)[:4] == ["code", "message", "retryable", "retry_after"]
    assert list(error)[4:] == (["fields"] if error["code"] == "invalid_request" else [])
    wait = error["retry_after"]
    assert reply.headers.get("retry-after") == (None if wait is None else str(wait))
    assert reply.headers["content-type"] == "application/json"
    assert reply.headers["cache-control"] == "no-store"
    assert reply.headers["x-content-type-options"] == "nosniff"
    assert "text/event-stream" not in str(reply.headers)
    return error


async def code(reply: Response) -> tuple[int, str]:
    return reply.status, (await failure(reply))["code"]


async def exchange(app: RunningService, request: bytes) -> bytes:
    """All that the service answers on one connection, until it closes it."""
    client = await app.connect()
    client.writer.write(request)
    return await client.reader.read()


async def connected(app: RunningService, receive_buffer: int = 65536) -> socket.socket:
    """A connection of which nothing is read but what a test reads."""
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.setblocking(False)
    host, _, port = app.url.removeprefix("http://").rpartition(":")
    await asyncio.get_running_loop().sock_connect(sock, (host, int(port)))
    return sock


async def client_on(app: RunningService, sock: socket.socket) -> Client:
    client = Client(*await asyncio.open_connection(sock=sock, limit=1024))
    app.clients.append(client)
    return client


def raw(method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    """A request as it goes over the wire."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


# ---- an answer


async def test_a_chat_streams_each_piece_and_one_done(relay: Relay) -> None:
    app, _ = await relay(hello)
    reply = await app.chat("Hi", session_id="mine")
    assert reply.status == 200
    first, second, done = await reply.events()
    request_id = reply.headers["x-request-id"]
    assert first == {"chunk": "Hel", "id": request_id}
    assert second == {"chunk": "lo", "id": request_id}
    assert done == {
        "status": "done",
        "id": request_id,
        "session_id": "mine",
        "model": "m-1",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
    }


async def test_every_event_is_one_data_line_and_a_blank_line(relay: Relay) -> None:
    app, _ = await relay(hello)
    reply = await (await app.connect()).chat(headers={"x-request-id": "req_123"}, session_id="s-1")
    assert (await reply.body()).decode() == (
        'data: {"chunk":"Hel","id":"req_123"}\n\n'
        'data: {"chunk":"lo","id":"req_123"}\n\n'
        'data: {"status":"done","id":"req_123","session_id":"s-1","model":"m-1",'
        '"finish_reason":"stop",'
        '"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}\n\n'
    )


async def test_a_stream_has_these_headers_and_no_others(relay: Relay) -> None:
    app, _ = await relay(hello)
    reply = await (await app.connect()).chat(headers={"x-request-id": "r"}, session_id="s-1")
    assert reply.headers == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-store",
        "x-accel-buffering": "no",
        "x-content-type-options": "nosniff",
        "x-request-id": "r",
        "x-session-id": "s-1",
        "ratelimit-policy": '"anonymous";q=10;w=60',
        "ratelimit": '"anonymous";r=9;t=6',
        "transfer-encoding": "chunked",
    }


async def test_without_a_session_id_each_request_gets_a_new_one(relay: Relay) -> None:
    app, _ = await relay(hello)
    names = []
    unnamed: list[dict[str, Any]] = [{}, {"session_id": None}]
    for asked in unnamed:
        reply = await app.chat(**asked)
        names.append(reply.headers["x-session-id"])
        assert (await reply.events())[-1]["session_id"] == names[-1]
    assert all(re.fullmatch("s_[A-Za-z0-9_-]{43}", name) for name in names)
    assert len(set(names)) == 2


async def test_a_piece_arrives_while_the_provider_still_holds_the_next(relay: Relay) -> None:
    app, provider = await relay(text)
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "first"
    request = await provider.wait_for_request()
    await request.send_events(delta("second"), delta(finish_reason="stop"), DONE)
    await request.send(END)
    assert [event.get("chunk") for event in await reply.events()] == ["second", None]


async def test_pieces_are_never_merged_split_or_dropped(relay: Relay) -> None:
    chunks = [
        "a",
        "b",
        " ",
        "\n",
        "\r\n",
        "\u2028",
        "data: {}\n\n",
        "👩‍👩‍👧",
        "\x00",
        "x" * 100_000,
    ]

    async def script(request: Connection) -> None:
        await request.complete(*chunks[:5], "", *chunks[5:])

    app, _ = await relay(script)
    events = await (await app.chat()).events()
    assert [event["chunk"] for event in events[:-1]] == chunks


async def test_the_message_goes_to_the_provider_cleaned(relay: Relay) -> None:
    app, provider = await relay(hello)
    await (await app.chat(" e\u0301\r\n\u202eok\u200b ")).events()
    asked = (await provider.wait_for_request()).body
    assert asked["messages"] == [{"role": "user", "content": "é\nok"}]


async def test_the_system_prompt_goes_before_the_message(relay: Relay) -> None:
    app, provider = await relay(hello, SYSTEM_PROMPT="Be brief.")
    await (await app.chat("Hi")).events()
    assert (await provider.wait_for_request()).body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
    ]


async def test_an_answer_without_text_is_only_the_end(relay: Relay) -> None:
    async def script(request: Connection) -> None:
        await request.complete()

    app, _ = await relay(script)
    reply = await app.chat()
    assert reply.status == 200
    [done] = await reply.events()
    assert (done["status"], done["finish_reason"]) == ("done", "stop")


async def test_what_the_provider_did_not_tell_is_null(relay: Relay) -> None:
    async def script(request: Connection) -> None:
        await request.stream(delta("Hi"), DONE)
        await request.send(END)

    app, _ = await relay(script)
    done = (await (await app.chat()).events())[-1]
    assert (done["usage"], done["finish_reason"]) == (None, None)


# ---- errors before the stream


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "expected"),
    [
        ("POST", CHAT, b"hello", JSON, 400, "invalid_json"),
        ("POST", CHAT, b"", JSON, 400, "invalid_json"),
        ("POST", CHAT, b'["Hello"]', JSON, 400, "invalid_json"),
        ("POST", CHAT, b'{"message": "\xff"}', JSON, 400, "invalid_json"),
        ("POST", CHAT, b'{"message": "\\ud800"}', JSON, 400, "invalid_json"),
        ("GET", "/nowhere", None, {}, 404, "not_found"),
        ("POST", "/api/v1/chats", HELLO, JSON, 404, "not_found"),
        ("GET", "/healthz/", None, {}, 404, "not_found"),
        ("POST", CHAT + "/", HELLO, JSON, 404, "not_found"),
        ("POST", "/" + CHAT, HELLO, JSON, 404, "not_found"),
        ("GET", "/%ff%00%0a", None, {}, 404, "not_found"),
        ("GET", CHAT, None, {}, 405, "method_not_allowed"),
        ("OPTIONS", CHAT, None, {}, 405, "method_not_allowed"),
        ("POST", "/api/v1/models", b"", {}, 405, "method_not_allowed"),
        ("DELETE", "/healthz", None, {}, 405, "method_not_allowed"),
        ("POST", CHAT, b"{}", JSON, 422, "invalid_request"),
        ("POST", CHAT, b'{"message": " "}', JSON, 422, "invalid_request"),
    ],
)
async def test_a_request_that_has_to_change_is_refused(
    service: StartService,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
    status: int,
    expected: str,
) -> None:
    app = await service()
    reply = await (await app.connect()).request(method, path, body, headers)
    error = await failure(reply)
    assert (reply.status, error["code"]) == (status, expected)
    assert (error["retryable"], error["retry_after"]) == (False, None)
    assert (await app.log.wait_for_request())["outcome"] == expected


@pytest.mark.parametrize(
    ("path", "allowed"), [(CHAT, {"POST"}), ("/api/v1/models", {"GET", "HEAD"})]
)
async def test_a_method_that_is_not_allowed_is_told_those_that_are(
    service: StartService, path: str, allowed: set[str]
) -> None:
    reply = await (await (await service()).connect()).request("DELETE", path)
    assert set(reply.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize(
    "media_type",
    [
        None,
        "",
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=application/json",
        "text/json",
        "application/jsonp",
        "application/problem+json",
        "application/json, text/plain",
    ],
)
async def test_a_body_that_does_not_say_it_is_json_is_refused(
    service: StartService, media_type: str | None
) -> None:
    app = await service()
    headers = {} if media_type is None else {"content-type": media_type}
    reply = await (await app.connect()).request("POST", CHAT, HELLO, headers)
    assert reply.status == 415
    error = await failure(reply)
    assert error["code"] == "unsupported_media_type"
    assert "-H 'Content-Type: application/json'" in error["message"]


@pytest.mark.parametrize(
    "media_type",
    ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"],
)
async def test_parameters_and_case_of_the_media_type_do_not_matter(
    relay: Relay, media_type: str
) -> None:
    app, _ = await relay(hello)
    reply = await (await app.connect()).request("POST", CHAT, HELLO, {"content-type": media_type})
    assert reply.status == 200
    await reply.events()


CHUNKED = {"transfer-encoding": "chunked"}


@pytest.mark.parametrize("headers", [{}, CHUNKED], ids=["with a length", "chunked"])
async def test_a_body_of_just_the_limit_is_taken_and_one_byte_more_is_not(
    relay: Relay, headers: dict[str, str]
) -> None:
    app, _ = await relay(hello, MAX_BODY_BYTES="100")
    accepted = await (await app.connect()).request(
        "POST", CHAT, HELLO.ljust(100), {**JSON, **headers}
    )
    assert accepted.status == 200
    await accepted.events()
    refused = await (await app.connect()).request(
        "POST", CHAT, HELLO.ljust(101), {**JSON, **headers}
    )
    assert await code(refused) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Content-Type: application/json\r\nContent-Length: 3000000", 413),
        ("Content-Type: application/json\r\nTransfer-Encoding: chunked", 413),
        ("Content-Type: text/plain\r\nContent-Length: 3000000", 415),
    ],
    ids=["length", "chunked", "media type"],
)
async def test_a_client_that_writes_all_of_a_refused_body_first_reads_the_answer(
    service: StartService, headers: str, status: int
) -> None:
    app = await service()
    body = b"x" * 3_000_000
    if "chunked" in headers:
        body = http_chunk(body) + END
    sock = await connected(app)
    await asyncio.get_running_loop().sock_sendall(sock, raw("POST", CHAT, headers) + body)
    reply = await (await client_on(app, sock)).head()
    assert reply.status == status
    assert (await failure(reply))["retryable"] is False


async def test_after_a_body_that_is_too_large_the_connection_is_closed(
    service: StartService,
) -> None:
    app = await service(MAX_BODY_BYTES="100")
    client = await app.connect()
    reply = await client.request("POST", CHAT, b"x" * 101, JSON)
    assert reply.headers["connection"] == "close"
    await reply.body()
    await client.wait_closed()


async def test_a_body_that_never_ends_is_not_read_for_ever(service: StartService) -> None:
    app = await service(BODY_TIMEOUT_SECONDS=NEVER)
    client = await app.connect()
    client.writer.write(
        raw("POST", CHAT, "Content-Type: application/json", "Content-Length: 1" + "0" * 12)
    )

    async def write() -> None:
        while True:
            client.writer.write(b" " * 65536)
            await client.writer.drain()

    writing = asyncio.create_task(write())
    reply = await client.head()
    assert await code(reply) == (413, "body_too_large")
    with pytest.raises(ConnectionError):
        await writing


@pytest.mark.parametrize(
    "arrived", [b"", b'{"message":'], ids=["nothing of it arrives", "half of it arrives"]
)
@pytest.mark.parametrize(
    "length", ["Content-Length: 20", "Transfer-Encoding: chunked"], ids=["length", "chunked"]
)
async def test_a_body_that_does_not_arrive_in_time_is_refused_and_the_connection_closed(
    service: StartService, length: str, arrived: bytes
) -> None:
    app = await service(BODY_TIMEOUT_SECONDS="0.2")
    client = await app.connect()
    body = b"%x\r\n%b\r\n" % (len(arrived), arrived) if arrived and "chunked" in length else arrived
    client.writer.write(raw("POST", CHAT, "Content-Type: application/json", length) + body)
    reply = await client.head()
    error = await failure(reply)
    assert (reply.status, error["code"], error["retryable"]) == (408, "request_timeout", True)
    await client.wait_closed()
    assert await app.metric("chat_active_streams") == 0


async def test_a_body_that_is_too_large_and_late_as_well_is_too_large(
    service: StartService,
) -> None:
    app = await service(BODY_TIMEOUT_SECONDS="0.2", MAX_BODY_BYTES="100")
    client = await app.connect()
    head = raw("POST", CHAT, "Content-Type: application/json", "Content-Length: 1000")
    client.writer.write(head + b" " * 200)
    assert await code(await client.head()) == (413, "body_too_large")


async def test_a_client_that_leaves_before_its_body_is_whole_is_gone(service: StartService) -> None:
    app = await service()
    client = await app.connect()
    head = raw("POST", CHAT, "Content-Type: application/json", "Content-Length: 20")
    client.writer.write(head + b'{"message":')
    client.disconnect()
    assert (await app.log.wait_for_request())["outcome"] == "client_disconnected"
    assert await app.metric("chat_active_streams") == 0


async def test_a_client_may_wait_to_be_told_to_send_its_body(relay: Relay) -> None:
    app, _ = await relay(hello)
    reply = await (await app.connect()).chat(headers={"expect": "100-continue"})
    assert reply.status == 200
    await reply.events()


async def test_a_model_that_is_not_allowed_is_refused_with_those_that_are(
    service: StartService,
) -> None:
    app = await service(OPENAI_API_KEY=CANARY, MODELS="gpt-4o-mini,gpt-9")
    reply = await app.chat(model_id="gpt-8")
    assert reply.status == 422
    problem = "is not a model of this service; it has gpt-4o-mini, gpt-9"
    assert await failure(reply) == {
        "code": "invalid_request",
        "message": f"model_id {problem}",
        "retryable": False,
        "retry_after": None,
        "fields": [{"field": "model_id", "message": problem}],
    }


async def test_a_caller_may_have_so_many_answers_open_and_no_more(relay: Relay) -> None:
    app, _ = await relay(text, MAX_STREAMS_PER_CALLER="2", RATE_LIMIT="off")
    held = [await app.connect(), await app.connect()]
    for client in held:
        await (await client.chat()).event()
    refused = await app.chat()
    error = await failure(refused)
    assert (refused.status, error["code"]) == (429, "too_many_streams")
    assert (error["retryable"], error["retry_after"]) == (True, 1)
    # Another caller may.
    assert (await app.chat(host="127.0.0.2")).status == 200
    held[0].disconnect()
    await app.log.wait_for_request(1)
    assert (await app.chat()).status == 200


async def test_a_server_has_so_many_answers_open_and_no_more(relay: Relay) -> None:
    app, _ = await relay(text, MAX_STREAMS="1")
    held = await app.connect()
    await (await held.chat()).event()
    refused = await app.chat(host="127.0.0.2")
    error = await failure(refused)
    assert (refused.status, error["code"]) == (503, "overloaded")
    assert (error["retryable"], error["retry_after"]) == (True, 1)
    held.disconnect()
    await app.log.wait_for_request(1)
    assert (await app.chat(host="127.0.0.2")).status == 200


async def test_what_is_refused_gives_its_slot_back(relay: Relay) -> None:
    app, _ = await relay(hello, MAX_STREAMS="1", RATE_LIMIT="off")
    client = await app.connect()
    for body in (b"", b"{}", b'{"message": "Hi", "model_id": "x"}'):
        assert (await client.request("POST", CHAT, body, JSON)).status in (400, 422)
        client = await app.connect()
    reply = await app.chat()
    assert reply.status == 200
    await reply.events()


SECRET = "my secret 5512"


def broken(record: logging.LogRecord) -> bool:
    """A log that fails when it is to warn of a proxy: a defect, as far as a request can tell."""
    if record.levelno == logging.WARNING:
        raise ValueError(SECRET)
    return True


async def test_a_defect_is_an_internal_error_and_is_logged_without_its_text(
    service: StartService,
) -> None:
    app = await service(CORS_ORIGINS="https://app.example")
    app.log.addFilter(broken)
    headers = {"x-forwarded-for": "192.0.2.1", "origin": "https://app.example"}
    client = await app.connect()
    reply = await client.chat(headers=headers)
    error = await failure(reply)
    assert (reply.status, error["code"], error["retryable"]) == (500, "internal_error", False)
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    line = await app.log.wait_for_request()
    assert (line["status"], line["outcome"], line["level"]) == (500, "internal_error", "error")
    assert line["request_id"] == reply.headers["x-request-id"]
    assert "ValueError" in line["trace"]
    assert SECRET not in json.dumps([line, error])
    # It is one request's failure.
    app.log.removeFilter(broken)
    assert (await client.chat(headers=headers)).status == 200


# ---- the order of the checks

WRONG_KEY = {"authorization": "Bearer wrong"}
WRONG_TYPE = {"content-type": "text/plain"}
TOO_LARGE = b"x" * 200


@pytest.mark.parametrize(
    ("env", "headers", "body", "expected"),
    [
        ({"MAX_STREAMS": "1"}, {**WRONG_TYPE, **WRONG_KEY}, TOO_LARGE, (401, "invalid_api_key")),
        ({"RATE_LIMIT": "1/day"}, WRONG_KEY, HELLO, (429, "rate_limited")),
        ({"MAX_STREAMS": "1", "RATE_LIMIT": "1/day"}, JSON, HELLO, (429, "rate_limited")),
        (
            {"MAX_STREAMS": "1", "MAX_STREAMS_PER_CALLER": "1"},
            WRONG_TYPE,
            TOO_LARGE,
            (503, "overloaded"),
        ),
        ({"MAX_STREAMS_PER_CALLER": "1"}, WRONG_TYPE, TOO_LARGE, (429, "too_many_streams")),
        ({}, WRONG_TYPE, TOO_LARGE, (415, "unsupported_media_type")),
        ({}, JSON, TOO_LARGE, (413, "body_too_large")),
        ({}, JSON, b'{"message": 5, "x": 1', (400, "invalid_json")),
        ({}, JSON, b'{"message": 5, "model_id": "unknown"}', (422, "invalid_request")),
        ({}, JSON, b'{"message": "Hi", "model_id": "unknown"}', (422, "invalid_request")),
    ],
)
async def test_of_two_reasons_to_refuse_a_request_the_first_is_told(
    relay: Relay,
    env: dict[str, str],
    headers: dict[str, str],
    body: bytes,
    expected: tuple[int, str],
) -> None:
    app, provider = await relay(text, MAX_BODY_BYTES="100", **env)
    await (await app.chat()).event()
    reply = await (await app.connect()).request("POST", CHAT, body, headers)
    assert await code(reply) == expected
    assert len(provider.requests) == 1


# ---- the late commit


async def fails(request: Connection) -> None:
    await request.send(response(500, b'{"error": {"message": "out of memory"}}'))


async def fails_after_reasoning(request: Connection) -> None:
    await request.stream(REASONING, FAILURE)


async def fails_after_text(request: Connection) -> None:
    await request.stream(delta("Hel"), delta("lo"), FAILURE)


@pytest.mark.parametrize("script", [fails, fails_after_reasoning])
async def test_what_fails_before_the_first_text_gets_a_status_of_its_own(
    relay: Relay, script: Script
) -> None:
    app, _ = await relay(script)
    client = await app.connect()
    reply = await client.chat()
    error = await failure(reply)
    assert (reply.status, error["code"], error["retryable"]) == (502, "upstream_error", True)
    assert "memory" not in error["message"]
    assert reply.headers["ratelimit"] == '"anonymous";r=9;t=6'
    assert "x-session-id" not in reply.headers
    line = await app.log.wait_for_request()
    assert (line["status"], line["outcome"]) == (502, "upstream_error")
    # The connection is as good as after any other answer.
    assert (await client.request("GET", "/healthz")).status == 200


async def test_what_fails_after_the_first_text_is_the_one_terminal_event(relay: Relay) -> None:
    app, _ = await relay(fails_after_text)
    client = await app.connect()
    reply = await client.chat(session_id="mine")
    assert reply.status == 200
    *chunks, end = await reply.events()
    assert [event["chunk"] for event in chunks] == ["Hel", "lo"]
    assert list(end) == ["status", "id", "session_id", "error"]
    assert (end["status"], end["session_id"]) == ("error", "mine")
    assert end["id"] == reply.headers["x-request-id"]
    assert list(end["error"]) == ["code", "message", "retryable", "retry_after"]
    assert end["error"]["code"] == "upstream_error"
    assert end["error"]["retryable"] is True
    assert "memory" not in end["error"]["message"]
    line = await app.log.wait_for_request()
    assert (line["status"], line["outcome"], line["chunks"]) == (200, "upstream_error", 2)
    assert (await client.request("GET", "/healthz")).status == 200


async def test_what_fails_after_a_heartbeat_is_the_terminal_event(relay: Relay) -> None:
    app, provider = await relay(silence, HEARTBEAT_SECONDS="0.05")
    reply = await app.chat()
    assert reply.status == 200
    assert await reply.block() == ": keep-alive"
    await (await provider.wait_for_request()).send(response(429, b"{}", "retry-after: 7"))
    [end] = await reply.events()
    assert (end["status"], end["error"]["code"]) == ("error", "upstream_unavailable")
    assert end["error"]["retry_after"] == 7


async def test_heartbeats_go_on_while_the_provider_says_nothing(relay: Relay) -> None:
    app, provider = await relay(text, HEARTBEAT_SECONDS="0.05")
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "first"
    assert [await reply.block() for _ in range(3)] == [": keep-alive"] * 3
    await (await provider.wait_for_request()).send_events(delta("second"), DONE)
    assert [event.get("chunk") for event in await reply.events()] == ["second", None]


# ---- times


@pytest.mark.parametrize(
    ("script", "env", "said"),
    [
        (silence, {"FIRST_TOKEN_TIMEOUT_SECONDS": "0.2"}, "did not begin"),
        (nothing_at_all, {"FIRST_TOKEN_TIMEOUT_SECONDS": "0.2"}, "did not begin"),
        (reasoning, {"IDLE_TIMEOUT_SECONDS": "0.2"}, "stopped in the middle"),
        (silence, {"TOTAL_TIMEOUT_SECONDS": "0.2"}, "took too long"),
        (reasoning, {"TOTAL_TIMEOUT_SECONDS": "0.2"}, "took too long"),
    ],
)
async def test_a_provider_that_is_late_before_its_first_text_is_a_504(
    relay: Relay, script: Script, env: dict[str, str], said: str
) -> None:
    app, provider = await relay(script, HEARTBEAT_SECONDS="1", **env)
    reply = await app.chat()
    assert reply.status == 504
    error = await failure(reply)
    assert (error["code"], error["retryable"]) == ("upstream_timeout", True)
    assert said in error["message"]
    await (await provider.wait_for_request()).closed.wait()
    assert await app.metric("chat_active_streams") == 0


@pytest.mark.parametrize(
    ("script", "env", "said"),
    [
        (silence, {"FIRST_TOKEN_TIMEOUT_SECONDS": "0.3"}, "did not begin"),
        (reasoning, {"IDLE_TIMEOUT_SECONDS": "0.3"}, "stopped in the middle"),
        (text, {"IDLE_TIMEOUT_SECONDS": "0.3"}, "stopped in the middle"),
        (text, {"TOTAL_TIMEOUT_SECONDS": "0.3"}, "took too long"),
    ],
)
async def test_a_provider_that_is_late_after_the_commit_is_the_terminal_event(
    relay: Relay, script: Script, env: dict[str, str], said: str
) -> None:
    app, provider = await relay(script, HEARTBEAT_SECONDS="0.05", **env)
    reply = await app.chat()
    assert reply.status == 200
    end = (await reply.events())[-1]
    assert (end["status"], end["error"]["code"]) == ("error", "upstream_timeout")
    assert said in end["error"]["message"]
    await (await provider.wait_for_request()).closed.wait()


async def test_reasoning_stops_the_timer_of_the_first_piece(relay: Relay) -> None:
    app, provider = await relay(reasoning, FIRST_TOKEN_TIMEOUT_SECONDS="1", HEARTBEAT_SECONDS="1.5")
    reply = await app.chat()
    # By now the first chunk would be overdue.
    assert await reply.block() == ": keep-alive"
    await (await provider.wait_for_request()).send_events(delta("Hi"), DONE)
    assert [event.get("chunk") for event in await reply.events()] == ["Hi", None]


# ---- clients that leave, and clients that stay and take nothing


def close(client: Client) -> None:
    client.disconnect()


def half_close(client: Client) -> None:
    client.writer.write_eof()


@pytest.mark.parametrize("leave", [close, half_close])
@pytest.mark.parametrize("script", [silence, nothing_at_all, reasoning])
async def test_leaving_before_the_first_text_closes_the_provider(
    relay: Relay, script: Script, leave: Callable[[Client], None]
) -> None:
    app, provider = await relay(script)
    client = await app.connect()
    client.writer.write(raw("POST", CHAT, body=HELLO))
    request = await provider.wait_for_request()
    leave(client)
    await request.closed.wait()
    line = await app.log.wait_for_request()
    assert (line["outcome"], line["status"], line["chunks"]) == ("client_disconnected", None, 0)
    assert await app.metric("chat_active_streams") == 0


@pytest.mark.parametrize("leave", [close, half_close])
async def test_leaving_after_the_first_text_closes_the_provider(
    relay: Relay, leave: Callable[[Client], None]
) -> None:
    app, provider = await relay(text)
    client = await app.connect()
    await (await client.chat()).event()
    assert await app.metric("chat_active_streams") == 1
    leave(client)
    await (await provider.wait_for_request()).closed.wait()
    line = await app.log.wait_for_request(1)
    assert (line["outcome"], line["status"], line["chunks"]) == ("client_disconnected", 200, 1)
    assert await app.metric("chat_active_streams") == 0


async def test_leaving_with_another_request_waiting_closes_the_provider(relay: Relay) -> None:
    # Where leaving is not noticed, the answer ends by itself, with another outcome.
    app, provider = await relay(
        text, TOTAL_TIMEOUT_SECONDS="3", HEARTBEAT_SECONDS="0.5", WRITE_TIMEOUT_SECONDS="1"
    )
    client = await app.connect()
    client.writer.write(raw("POST", CHAT, body=HELLO) * 2)
    assert (await client.head()).status == 200
    client.disconnect()
    await (await provider.wait_for_request()).closed.wait()
    assert (await app.log.wait_for_request())["outcome"] == "client_disconnected"
    assert len(provider.requests) == 1


async def narrow(app: RunningService) -> Client:
    """A client that takes a few kilobytes and no more until it is read from."""
    return await client_on(app, await connected(app, receive_buffer=4096))


async def test_a_client_that_takes_nothing_is_cut_and_the_provider_held_back(
    relay: Relay,
) -> None:
    app, provider = await relay(flood, WRITE_TIMEOUT_SECONDS="0.3", HEARTBEAT_SECONDS="0.1")
    client = await narrow(app)
    assert (await client.chat()).status == 200
    await (await provider.wait_for_request()).closed.wait()
    line = await app.log.wait_for_request()
    assert (line["outcome"], line["status"]) == ("client_stalled", 200)
    assert await app.metric("chat_active_streams") == 0
    # What a few buffers of the kernel hold; without backpressure it would be all memory.
    assert line["chunks"] * 60_000 < 32 * 2**20
    # What was on its way is thrown away, the kernel's megabytes too: that takes a reset.
    with pytest.raises(ConnectionResetError):
        await client.reader.read()


async def test_a_client_that_reads_slowly_gets_all_of_a_long_answer(relay: Relay) -> None:
    chunks = [f"{n}:" + "x" * 50_000 for n in range(80)]

    async def script(request: Connection) -> None:
        await request.complete(*chunks)

    app, _ = await relay(script)
    reply = await (await narrow(app)).chat()
    assert [event.get("chunk") for event in await reply.events()] == [*chunks, None]


# ---- the connection


async def test_a_connection_serves_one_request_after_another_whatever_was_answered(
    relay: Relay,
) -> None:
    app, provider = await relay(hello)
    client = await app.connect()
    for path, body, headers, status in (
        (CHAT, HELLO, JSON, 200),
        (CHAT, b"x" * 1_000_000, {"content-type": "text/plain"}, 415),
        (CHAT, b"{}", JSON, 422),
        (CHAT, b"no", JSON, 400),
        ("/nowhere", HELLO, JSON, 404),
        (CHAT, HELLO, JSON, 200),
    ):
        reply = await client.request("POST", path, body, headers)
        assert reply.status == status
        await reply.body()
    assert provider.connections == 1


BARE = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: 30\r\nconnection: close\r\n\r\nInvalid HTTP request received."
)


@pytest.mark.parametrize(
    "request_",
    [
        b"Hello?\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        raw("POST", CHAT, "Content-Length: -1"),
        raw("POST", CHAT, "Content-Length: 5", "Content-Length: 6"),
        raw("POST", CHAT, "Content-Length: 5", "Transfer-Encoding: chunked"),
    ],
    ids=lambda data: ascii(data[-24:]),
)
async def test_what_is_not_http_gets_a_bare_400(service: StartService, request_: bytes) -> None:
    app = await service()
    assert await exchange(app, request_) == BARE
    assert app.log.requests() == []


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (raw("GET", CHAT, "Connection: close, Upgrade", "Upgrade: websocket"), b"405"),
        (raw("GET", "/ws", "Connection: close, Upgrade", "Upgrade: websocket"), b"404"),
        (raw("GET", "/healthz", "Connection: close, Upgrade", "Upgrade: h2c"), b"200"),
        # As Java's client and `curl --http2` ask.
        (raw("POST", CHAT, "Connection: close, Upgrade", "Upgrade: h2c", body=HELLO), b"200"),
    ],
)
async def test_an_upgrade_is_not_taken_and_the_request_answered(
    service: StartService, request_: bytes, status: bytes
) -> None:
    app = await service()
    assert (await exchange(app, request_)).startswith(b"HTTP/1.1 %b " % status)


NEXT = b"GET /next HTTP/1.1\r\nHost: localhost\r\n\r\n "


async def test_a_body_that_speaks_of_upgrades_is_not_read_on_as_the_next_request(
    service: StartService,
) -> None:
    app = await service()
    client = await app.connect()
    # Two bytes more for each line would push all of NEXT out of the body.
    body = b"\r\nupgrade:" * (len(NEXT) // 2) + NEXT
    length = f"Content-Length: {len(body)}"
    head = raw("POST", CHAT, "Expect: 100-continue", "Content-Type: application/json", length)
    client.writer.write(head)
    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.writer.write(body)
    assert (await client.head()).status == 400
    client.writer.write(raw("GET", "/healthz", "Connection: close"))
    assert (await client.reader.read()).endswith(b'{"status":"ok"}')
    assert [line["route"] for line in app.log.requests()] == [CHAT, "/healthz"]


async def test_what_follows_a_wish_to_upgrade_is_not_read_as_the_next_request(
    service: StartService,
) -> None:
    app = await service()
    client = await app.connect()
    body = NEXT * 2
    wish = raw("POST", CHAT, "Connection: Upgrade", "Upgrade: h2c", f"Content-Length: {len(body)}")
    client.writer.write(wish[:30])
    await app.get("/healthz")
    client.writer.write(wish[30:])
    client.writer.write(body)
    assert b"\r\nconnection: close\r\n" in await client.reader.read()
    assert [line["route"] for line in app.log.requests()] == ["/healthz", CHAT]


async def test_a_client_of_http_1_0_gets_its_answer(relay: Relay) -> None:
    app, _ = await relay(hello)
    answered = await exchange(app, raw("POST", CHAT, body=HELLO).replace(b"1.1", b"1.0"))
    assert answered.startswith(b"HTTP/1.1 200 OK")
    assert answered.count(b'"status":"done"') == 1


# ---- the other routes


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/healthz", {"status": "ok"}),
        ("/readyz", {"status": "ready"}),
        ("/api/v1/models", {"default": "gpt-4o-mini", "models": ["gpt-4o-mini", "gpt-9"]}),
    ],
)
async def test_what_is_asked_often_needs_no_token_and_answers_head_too(
    service: StartService, path: str, body: object
) -> None:
    app = await service(
        OPENAI_API_KEY=CANARY,
        MODELS="gpt-4o-mini,gpt-9",
        RATE_LIMIT="1/day",
        API_KEYS="me:0123456789abcdefghij",
        ALLOW_ANONYMOUS="false",
    )
    client = await app.connect()
    for _ in range(2):
        reply = await client.request("GET", path)
        assert reply.status == 200
        assert reply.headers["content-type"] == "application/json"
        assert "x-request-id" in reply.headers
        assert "ratelimit" not in reply.headers
        assert await reply.json() == body
    answered = await exchange(app, raw("HEAD", path, "Connection: close"))
    assert answered.startswith(b"HTTP/1.1 200 OK")
    assert answered.endswith(b"\r\n\r\n")


async def test_metrics_are_prometheus_text(relay: Relay) -> None:
    app, _ = await relay(hello)
    await (await app.chat()).events()
    reply = await app.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    lines = (await reply.body()).decode().splitlines()
    assert 'chat_requests_total{outcome="done",route="/api/v1/chat",status="200"} 1.0' in lines
    assert 'chat_chunks_total{model="gpt-4o-mini",provider="openai"} 2.0' in lines


async def test_metrics_can_be_switched_off(service: StartService) -> None:
    app = await service(METRICS="off")
    assert await code(await app.get("/metrics")) == (404, "not_found")


async def test_a_model_that_a_caller_makes_up_is_no_label_of_the_metrics(
    service: StartService,
) -> None:
    app = await service()
    await (await app.chat(model_id="mock/made-up")).events()
    assert b"made-up" not in await (await app.get("/metrics")).body()


# ---- browsers

HERE = "https://app.example"
EXPOSED = {"X-Request-ID", "X-Session-ID", "RateLimit", "RateLimit-Policy", "Retry-After"}


@pytest.mark.parametrize(
    ("path", "body", "env", "status"),
    [
        (CHAT, HELLO, {}, 200),
        (CHAT, b"{}", {}, 422),
        (CHAT, HELLO, {"RATE_LIMIT": "1/day"}, 429),
        (CHAT, HELLO, {"API_KEYS": "me:0123456789abcdefghij", "ALLOW_ANONYMOUS": "false"}, 401),
        ("/nowhere", b"", {}, 404),
    ],
)
async def test_a_page_of_an_allowed_origin_may_read_every_answer(
    service: StartService, path: str, body: bytes, env: dict[str, str], status: int
) -> None:
    app = await service(CORS_ORIGINS=f"{HERE},https://other.example", **env)
    client = await app.connect()
    reply = await client.request("POST", path, body, {**JSON, "origin": HERE})
    if reply.status == 200 != status:
        await reply.body()
        reply = await client.request("POST", path, body, {**JSON, "origin": HERE})
    assert reply.status == status
    assert reply.headers["access-control-allow-origin"] == HERE
    assert set(reply.headers["access-control-expose-headers"].split(", ")) == EXPOSED
    assert "access-control-allow-credentials" not in reply.headers
    assert "origin" in reply.headers["vary"].lower()


@pytest.mark.parametrize(
    ("env", "origin"),
    [
        ({"CORS_ORIGINS": HERE}, "https://evil.example"),
        ({"CORS_ORIGINS": HERE}, "https://app.example.evil.example"),
        ({"CORS_ORIGINS": HERE}, "http://app.example"),
        ({"CORS_ORIGINS": HERE}, "null"),
        ({}, HERE),
    ],
)
async def test_a_page_of_another_origin_may_read_none(
    service: StartService, env: dict[str, str], origin: str
) -> None:
    app = await service(**env)
    reply = await (await app.connect()).chat(headers={"origin": origin})
    assert "access-control-allow-origin" not in reply.headers


def preflight(origin: str, method: str = "POST") -> dict[str, str]:
    return {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type,traceparent,x-request-id",
    }


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
async def test_a_preflight_is_answered_and_takes_no_token(
    service: StartService, method: str
) -> None:
    app = await service(CORS_ORIGINS=HERE, RATE_LIMIT="1/day")
    client = await app.connect()
    for _ in range(3):
        reply = await client.request("OPTIONS", CHAT, headers=preflight(HERE, method))
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == HERE
        assert method in reply.headers["access-control-allow-methods"]
        assert "x-request-id" in reply.headers
        await reply.body()
    assert (await client.chat()).status == 200


async def test_a_preflight_from_elsewhere_is_refused(service: StartService) -> None:
    app = await service(CORS_ORIGINS=HERE)
    reply = await (await app.connect()).request(
        "OPTIONS", CHAT, headers=preflight("https://evil.example")
    )
    assert reply.status == 400
    assert "access-control-allow-origin" not in reply.headers


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("localhost:8000", 200),
        ("LOCALHOST", 200),
        ("api.example.com", 200),
        ("[::1]:8000", 200),
        ("evil.example", 400),
        ("localhost.evil.example", 400),
        ("example.com", 400),
        ("", 400),
    ],
)
async def test_only_allowed_hosts_are_answered(
    service: StartService, host: str, status: int
) -> None:
    app = await service(ALLOWED_HOSTS="localhost,*.example.com,[::1]")
    reply = await (await app.connect()).request("GET", "/healthz", headers={"host": host})
    assert reply.status == status
    assert "x-request-id" in reply.headers


async def test_two_services_with_other_settings_live_side_by_side(service: StartService) -> None:
    one = await service(RATE_LIMIT="1/day", DEFAULT_MODEL="one", METRICS="off")
    two = await service(RATE_LIMIT="off", DEFAULT_MODEL="two")
    for app, name in ((one, "one"), (two, "two")):
        assert (await (await app.get("/api/v1/models")).json())["default"] == name
        await (await app.chat()).events()
    assert (await one.chat()).status == 429
    assert (await two.chat()).status == 200
    assert (await one.get("/metrics")).status == 404
    assert await two.metric('chat_requests_total{outcome="done",route="/api/v1/chat"') == 1
    assert {line["request_id"] for line in one.log.requests()}.isdisjoint(
        {line["request_id"] for line in two.log.requests()}
    )


@pytest.mark.parametrize(("host", "address"), [("127.0.0.1", r"127\.0\.0\.1"), ("::1", r"\[::1\]")])
async def test_the_log_says_where_it_listens_and_who_answers(
    service: StartService, host: str, address: str
) -> None:
    app = await service(HOST=host, **openai("http://localhost:1/v1"))
    said = app.log.entries[0]["event"]
    told = r"; answers come from openai \(gpt-4o-mini\)"
    assert re.fullmatch(f"Listening on http://{address}:[1-9][0-9]*{told}", said)


# ---- the process

ROOT = Path(__file__).parents[1]


class Process:
    """`python -m service`, and what it wrote so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []

    async def line(self, start: str) -> dict[str, Any]:
        """The next line of the log whose event begins like this."""
        assert self.process.stdout is not None
        while text := await self.process.stdout.readline():
            self.lines.append(json.loads(text))
            if self.lines[-1]["event"].startswith(start):
                return self.lines[-1]
        raise AssertionError(self.lines)

    async def url(self) -> str:
        said: str = (await self.line("Listening on "))["event"]
        return said.removeprefix("Listening on ").partition(";")[0]

    async def ended(self) -> tuple[int, str]:
        """Its exit code and what it wrote to stderr, when it has ended by itself."""
        out, err = await self.process.communicate()
        self.lines += [json.loads(text) for text in out.splitlines()]
        assert self.process.returncode is not None
        return self.process.returncode, err.decode()


Launch = Callable[..., Awaitable[Process]]


@asynccontextmanager
async def launched(
    directory: Path, env: dict[str, str], stdout: int, *arguments: str
) -> AsyncIterator[Process]:
    # Nothing of this process's own environment but what measures coverage.
    measured = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE")}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "service",
        *arguments,
        cwd=directory,
        env={"PYTHONPATH": str(ROOT), "PORT": "0", **measured, **env},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Process(process)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.communicate()


@pytest.fixture
def launch(tmp_path: Path, stack: AsyncExitStack) -> Launch:
    """`await launch(PORT="80")` starts the service as a process, in `tmp_path`."""

    async def start(*arguments: str, stdout: int = asyncio.subprocess.PIPE, **env: str) -> Process:
        return await stack.enter_async_context(launched(tmp_path, env, stdout, *arguments))

    return start


async def test_the_process_serves_until_it_is_told_to_stop(launch: Launch) -> None:
    process = await launch()
    client = await Client.connect(await process.url())
    reply = await client.chat(model_id="mock/lorem-3")
    assert [event.get("chunk") for event in await reply.events()] == [
        "lorem ",
        "ipsum ",
        "dolor ",
        None,
    ]
    assert (await process.line("request"))["request_id"] == reply.headers["x-request-id"]
    assert any(line["event"].startswith("NO MODEL ANSWERS") for line in process.lines)
    client.disconnect()
    process.process.send_signal(signal.SIGTERM)
    status, errors = await process.ended()
    assert status in (0, -signal.SIGTERM)
    assert errors == ""


async def test_interrupted_from_the_keyboard_it_stops_as_well(launch: Launch) -> None:
    process = await launch()
    await process.url()
    process.process.send_signal(signal.SIGINT)
    status, _ = await process.ended()
    assert status in (0, 130, -signal.SIGINT)


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"PORT": "many"}, "PORT='many'"),
        ({"HOST": "a..b"}, "HOST='a..b', PORT=0: "),
        ({"RATE_LIMIT": "10"}, "RATE_LIMIT='10'"),
        ({"API_KEYS": "me:tooshort-4711"}, "API_KEYS: "),
        (
            {"MODELS": "gpt-9"},
            "DEFAULT_MODEL='gpt-4o-mini' is not among MODELS: set it to one of them",
        ),
    ],
)
async def test_a_bad_setting_stops_the_start_with_one_line_that_names_it(
    launch: Launch, env: dict[str, str], told: str
) -> None:
    process = await launch(**env)
    status, errors = await process.ended()
    assert errors.startswith(f"chat-sidecar can't start: {told}")
    assert errors.count("\n") == 1
    assert "-4711" not in errors
    assert process.lines == []
    assert status == 2


async def test_a_port_that_is_taken_stops_the_start_with_one_line(launch: Launch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = await launch(PORT=str(port))
        status, errors = await process.ended()
    (line,) = errors.splitlines()
    assert line.startswith(f"chat-sidecar can't start: HOST='127.0.0.1', PORT={port}: ")
    assert "in use" in line
    assert (process.lines, status) == ([], 2)


async def test_a_probe_asks_the_service_that_has_the_same_settings(launch: Launch) -> None:
    serving = await launch(HOST="0.0.0.0", ALLOWED_HOSTS="*.example.com")
    port = (await serving.url()).rpartition(":")[2]
    probe = {"HOST": "0.0.0.0", "PORT": port}
    assert await (await launch("--probe", ALLOWED_HOSTS="*.example.com", **probe)).ended() == (
        0,
        "",
    )
    told = f"Not ready: 0.0.0.0:{port} answers 400\n"
    assert await (await launch("--probe", ALLOWED_HOSTS="other", **probe)).ended() == (1, told)
    serving.process.terminate()
    await serving.ended()
    status, told = await (await launch("--probe", **probe)).ended()
    assert (status, told.count("\n")) == (1, 1)
    assert told.startswith(f"Nothing answers at 0.0.0.0:{port}: ")


async def test_an_argument_that_is_unknown_is_refused(launch: Launch) -> None:
    status, told = await (await launch("--port=80")).ended()
    assert status == 2
    assert "unrecognized arguments: --port=80" in told


async def test_a_file_of_settings_is_read_and_the_environment_wins(
    launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(
        "DEFAULT_MODEL=from-file\nMODELS=from-file,from-env,other\nOPENAI_API_KY=sk-secret-4711\n"
    )
    for given, default in (("", "from-file"), ("from-env", "from-env")):
        process = await launch(DEFAULT_MODEL=given)
        url = await process.url()
        client = await Client.connect(url)
        models = await (await client.request("GET", "/api/v1/models")).json()
        assert models == {"default": default, "models": ["from-file", "from-env", "other"]}
        client.disconnect()
        warned = [line["event"] for line in process.lines if line["level"] == "warning"]
        assert warned[0] == (
            "OPENAI_API_KY in .env is not a setting of this service; did you mean OPENAI_API_KEY?"
        )
        assert "-4711" not in json.dumps(process.lines)


async def test_a_file_that_is_not_text_stops_the_start_with_one_line(
    launch: Launch, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_bytes(b"SYSTEM_PROMPT=caf\xe9\n")
    status, errors = await (await launch()).ended()
    assert errors.startswith("chat-sidecar can't start: .env")
    assert errors.count("\n") == 1
    assert status == 2


async def test_with_a_provider_it_warns_of_nothing(launch: Launch) -> None:
    process = await launch(OPENAI_API_KEY="sk-secret-4711")
    assert "openai (gpt-4o-mini)" in (await process.line("Listening on "))["event"]
    assert [line["level"] for line in process.lines] == ["info"]
    assert "-4711" not in json.dumps(process.lines)


async def test_at_a_terminal_the_log_is_text(launch: Launch) -> None:
    shown, terminal = os.openpty()
    try:
        await launch(stdout=terminal)
        said = b""
        while b"Listening on" not in said:
            said += await asyncio.to_thread(os.read, shown, 65536)
    finally:
        os.close(terminal)
        os.close(shown)
    assert re.search(rb"^\d\d:\d\d:\d\d info +Listening on http://127", said, re.MULTILINE)


class Defective(LLMProvider):
    """Fails as only a defect of ours can, after these chunks."""

    name = "defective"

    def __init__(self, *chunks: str) -> None:
        self.chunks = chunks

    async def stream(self, model: str, messages: Sequence[Message], call: Call) -> ChunkStream:
        for chunk in self.chunks:
            yield [chunk]
        raise ValueError("what the caller " + "said")


@pytest.mark.parametrize("chunks", [(), ("Hel",)], ids=["before the first text", "after it"])
async def test_a_providers_defect_is_an_internal_error_and_gives_all_back(
    service: StartService, chunks: tuple[str, ...]
) -> None:
    app = await service(Defective(*chunks), MODELS="gpt-4o-mini,mock/*,defective/*")
    reply = await app.chat(model_id="defective/x", session_id="mine")
    told = (await reply.events())[-1] if chunks else await reply.json()
    assert (reply.status, told["error"]["code"]) == (200 if chunks else 500, "internal_error")
    line = await app.log.wait_for_request()
    assert (line["outcome"], line["level"], line["cause"]) == (
        "internal_error",
        "error",
        "ValueError",
    )
    assert "Defective" not in told["error"]["message"]
    assert "test_service.py" in line["trace"]
    assert "what the caller said" not in app.log.lines[-1]
    assert await app.metric("chat_active_streams") == 0
    assert (await app.chat(model_id="mock/echo", session_id="mine")).status == 200
