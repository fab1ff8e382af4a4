"""The HTTP contract, over real sockets."""

import asyncio
import json
import logging
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from providers import Call, Completion, LLMProvider, Message, Sink
from tests.client import CANARY, JSON, Client
from tests.conftest import RunningService, StartRelay, StartService
from tests.faults import connect_slow_client
from tests.upstream import (
    DONE,
    END,
    Connection,
    Script,
    delta,
    event,
    http_chunk,
    response,
)

CHAT = "/api/v1/chat"
HELLO = b'{"message": "Hello"}'
WRONG_KEY = {"authorization": "Bearer wrong"}
# A timeout that no test waits for.
NEVER = "3600"


# Scripts of a provider

REASONING = event({"choices": [{"index": 0, "delta": {"reasoning_content": "hmm"}}]})
FAILURE = event({"error": {"message": "out of memory", "code": "server_error"}})


async def send_hello(request: Connection) -> None:
    await request.complete("Hel", "lo")


async def send_nothing(request: Connection) -> None:
    await request.closed.wait()


async def send_headers(request: Connection) -> None:
    await request.stream()
    await request.closed.wait()


async def send_reasoning(request: Connection) -> None:
    await request.stream(REASONING)
    await request.closed.wait()


async def send_one_chunk(request: Connection) -> None:
    await request.stream(delta("first"))
    await request.closed.wait()


async def send_flood(request: Connection) -> None:
    """Send chunks until the connection closes, as fast as they are read."""
    await request.stream()
    while True:
        await request.send_events(delta("x" * 60_000))


async def send_error_500(request: Connection) -> None:
    await request.send(response(500, b'{"error": {"message": "out of memory"}}'))


async def fail_after_reasoning(request: Connection) -> None:
    await request.stream(REASONING, FAILURE)


async def fail_after_text(request: Connection) -> None:
    await request.stream(delta("Hel"), delta("lo"), FAILURE)


# Requests as bytes


def encode_request(method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", *headers]
    if body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*lines, "", ""]).encode() + body


async def exchange(app: RunningService, request: bytes) -> bytes:
    """Send `request` and return all that the service sends until it closes the connection."""
    client = await app.connect()
    client.writer.write(request)
    return await client.reader.read()


# ---- streams


async def test_chat_streams_chunk_events_and_one_done_event(relay: StartRelay) -> None:
    app, _ = await relay(send_hello)
    reply = await (await app.connect()).chat(headers={"x-request-id": "req_123"}, session_id="s-1")
    assert reply.status == 200
    assert reply.headers == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-store",
        "x-accel-buffering": "no",
        "x-content-type-options": "nosniff",
        "x-request-id": "req_123",
        "x-session-id": "s-1",
        "ratelimit-policy": '"anonymous";q=10;w=60',
        "ratelimit": '"anonymous";r=9;t=6',
        "transfer-encoding": "chunked",
    }
    assert (await reply.body()).decode() == (
        'data: {"chunk":"Hel","id":"req_123"}\n\n'
        'data: {"chunk":"lo","id":"req_123"}\n\n'
        'data: {"status":"done","id":"req_123","session_id":"s-1","model":"m-1",'
        '"finish_reason":"stop",'
        '"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}\n\n'
    )


async def test_each_request_without_session_id_gets_a_new_session(relay: StartRelay) -> None:
    app, _ = await relay(send_hello)
    ids = []
    without_id: list[dict[str, Any]] = [{}, {"session_id": None}]
    for fields in without_id:
        reply = await app.chat(**fields)
        ids.append(reply.headers["x-session-id"])
        assert (await reply.events())[-1]["session_id"] == ids[-1]
    assert all(re.fullmatch("s_[A-Za-z0-9_-]{43}", each) for each in ids)
    assert len(set(ids)) == 2


async def test_chunks_are_never_merged_split_or_dropped(relay: StartRelay) -> None:
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


async def test_provider_gets_the_system_prompt_and_the_cleaned_message(relay: StartRelay) -> None:
    app, provider = await relay(send_hello, SYSTEM_PROMPT="Be brief.")
    await (await app.chat(" e\u0301\r\n\u202eok\u200b ")).events()
    assert (await provider.wait_for_request()).body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "é\nok"},
    ]


@pytest.mark.parametrize(
    ("events", "finish_reason"), [([delta(finish_reason="stop")], "stop"), ([delta("Hi")], None)]
)
async def test_done_event_has_null_for_what_the_provider_did_not_send(
    relay: StartRelay, events: list[bytes], finish_reason: str | None
) -> None:
    async def script(request: Connection) -> None:
        await request.stream(*events, DONE)
        await request.send(END)

    app, _ = await relay(script)
    reply = await app.chat()
    assert reply.status == 200
    *chunks, done = await reply.events()
    # A completion without text is a stream of the done event alone.
    assert len(chunks) == (0 if finish_reason else 1)
    assert done["status"] == "done"
    assert (done["finish_reason"], done["usage"]) == (finish_reason, None)


# ---- errors before the stream


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "code"),
    [
        ("POST", CHAT, b"hello", JSON, 400, "invalid_json"),
        ("POST", CHAT, b"", JSON, 400, "invalid_json"),
        ("POST", CHAT, b'["Hello"]', JSON, 400, "invalid_json"),
        ("POST", CHAT, b'{"message": "\xff"}', JSON, 400, "invalid_json"),
        ("POST", CHAT, b'{"message": "\\ud800"}', JSON, 400, "invalid_json"),
        ("POST", CHAT, HELLO, {**JSON, **WRONG_KEY}, 401, "invalid_api_key"),
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
        ("POST", CHAT, b"x" * 101, JSON, 413, "body_too_large"),
        ("POST", CHAT, HELLO, {}, 415, "unsupported_media_type"),
        ("POST", CHAT, b"{}", JSON, 422, "invalid_request"),
        ("POST", CHAT, b'{"message": " "}', JSON, 422, "invalid_request"),
    ],
)
async def test_invalid_request_returns_an_error_with_its_id_and_one_log_line(
    service: StartService,
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
    status: int,
    code: str,
) -> None:
    app = await service(MAX_BODY_BYTES="100")
    headers = {**headers, "x-request-id": "mine"}
    reply = await (await app.connect()).request(method, path, body, headers)
    error = await reply.error()
    assert (reply.status, error["code"]) == (status, code)
    assert (error["retryable"], error["retry_after"]) == (False, None)
    await app.log.wait_for_request()
    (line,) = app.log.requests()
    fields = (line["request_id"], line["method"], line["status"], line["outcome"])
    assert fields == ("mine", method, status, code)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/api/v1/chat/completions"])
async def test_openai_path_returns_404_that_names_the_services_own_api(
    service: StartService, path: str
) -> None:
    reply = await (await (await service()).connect()).request("POST", path, HELLO, JSON)
    assert reply.status == 404
    message = (await reply.error())["message"]
    assert "POST /api/v1/chat" in message
    assert "/openapi.json" in message


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        (CHAT, {"POST"}),
        ("/api/v1/models", {"GET", "HEAD"}),
        ("/api/v1/sessions/mine", {"GET", "HEAD", "DELETE"}),
    ],
)
async def test_405_response_lists_the_allowed_methods(
    service: StartService, path: str, allowed: set[str]
) -> None:
    reply = await (await (await service()).connect()).request("PUT", path)
    assert await reply.status_and_code() == (405, "method_not_allowed")
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
async def test_other_media_type_returns_415_with_the_missing_header(
    service: StartService, media_type: str | None
) -> None:
    app = await service()
    headers = {} if media_type is None else {"content-type": media_type}
    reply = await (await app.connect()).request("POST", CHAT, HELLO, headers)
    assert reply.status == 415
    error = await reply.error()
    assert error["code"] == "unsupported_media_type"
    assert "-H 'Content-Type: application/json'" in error["message"]


@pytest.mark.parametrize(
    "media_type",
    ["application/json; charset=utf-8", "Application/JSON", "application/json ;x=y"],
)
async def test_media_type_parameters_and_case_are_ignored(
    relay: StartRelay, media_type: str
) -> None:
    app, _ = await relay(send_hello)
    reply = await (await app.connect()).request("POST", CHAT, HELLO, {"content-type": media_type})
    assert reply.status == 200
    await reply.events()


@pytest.mark.parametrize(
    "headers", [JSON, {**JSON, "transfer-encoding": "chunked"}], ids=["length", "chunked"]
)
async def test_body_one_byte_over_the_limit_returns_413_and_closes_the_connection(
    relay: StartRelay, headers: dict[str, str]
) -> None:
    app, _ = await relay(send_hello, MAX_BODY_BYTES="100")
    client = await app.connect()
    accepted = await client.request("POST", CHAT, HELLO.ljust(100), headers)
    assert accepted.status == 200
    await accepted.events()
    rejected = await client.request("POST", CHAT, HELLO.ljust(101), headers)
    assert rejected.headers["connection"] == "close"
    assert await rejected.status_and_code() == (413, "body_too_large")
    await client.wait_closed()


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ("Content-Type: application/json\r\nContent-Length: 3000000", 413),
        ("Content-Type: application/json\r\nTransfer-Encoding: chunked", 413),
        ("Content-Type: text/plain\r\nContent-Length: 3000000", 415),
    ],
    ids=["length", "chunked", "media type"],
)
async def test_client_that_sends_a_whole_rejected_body_before_it_reads_gets_the_error(
    service: StartService, headers: str, status: int
) -> None:
    app = await service()
    client = await app.connect()
    body = b"x" * 3_000_000
    transport = cast(asyncio.Transport, client.writer.transport)
    transport.pause_reading()
    # A limit of 0: `drain` returns when everything is sent.
    transport.set_write_buffer_limits(0)
    client.writer.write(encode_request("POST", CHAT, headers))
    client.writer.write(http_chunk(body) + END if "chunked" in headers else body)
    await client.writer.drain()
    transport.resume_reading()
    reply = await client.head()
    assert reply.status == status
    assert (await reply.error())["retryable"] is False


async def test_endless_body_returns_413_and_closes_the_connection(service: StartService) -> None:
    app = await service(BODY_TIMEOUT_SECONDS=NEVER)
    client = await app.connect()
    length = "Content-Length: 1" + "0" * 12
    client.writer.write(encode_request("POST", CHAT, "Content-Type: application/json", length))

    async def send_body() -> None:
        while True:
            client.writer.write(b" " * 65536)
            await client.writer.drain()

    sending = asyncio.create_task(send_body())
    assert await (await client.head()).status_and_code() == (413, "body_too_large")
    with pytest.raises(ConnectionError):
        await sending


@pytest.mark.parametrize("part", [b"", b'{"message":'], ids=["nothing", "half"])
@pytest.mark.parametrize("length", ["Content-Length: 20", "Transfer-Encoding: chunked"])
async def test_late_body_returns_408_and_closes_the_connection(
    service: StartService, length: str, part: bytes
) -> None:
    app = await service(BODY_TIMEOUT_SECONDS="0.2")
    client = await app.connect()
    body = http_chunk(part) if part and "chunked" in length else part
    client.writer.write(
        encode_request("POST", CHAT, "Content-Type: application/json", length) + body
    )
    reply = await client.head()
    error = await reply.error()
    assert (reply.status, error["code"], error["retryable"]) == (408, "request_timeout", True)
    await client.wait_closed()
    assert await app.metric("chat_active_streams") == 0


async def test_late_body_that_is_already_too_large_returns_413(service: StartService) -> None:
    app = await service(BODY_TIMEOUT_SECONDS="0.2", MAX_BODY_BYTES="100")
    client = await app.connect()
    head = encode_request("POST", CHAT, "Content-Type: application/json", "Content-Length: 1000")
    client.writer.write(head + b" " * 200)
    assert await (await client.head()).status_and_code() == (413, "body_too_large")


async def test_unknown_model_returns_422_with_the_allowed_models(service: StartService) -> None:
    app = await service(OPENAI_API_KEY=CANARY, MODELS="gpt-4o-mini,gpt-9")
    reply = await app.chat(model_id="gpt-8")
    assert reply.status == 422
    error = await reply.error()
    (problem,) = error["fields"]
    assert problem["field"] == "model_id"
    assert "gpt-4o-mini, gpt-9" in problem["message"]
    assert error["message"] == f"model_id {problem['message']}"


@pytest.mark.parametrize(
    ("setting", "host", "expected"),
    [
        ("MAX_STREAMS_PER_CALLER", None, (429, "too_many_streams")),
        ("MAX_STREAMS", "127.0.0.2", (503, "overloaded")),
    ],
)
async def test_request_beyond_a_stream_limit_is_rejected_until_a_stream_ends(
    relay: StartRelay, setting: str, host: str | None, expected: tuple[int, str]
) -> None:
    app, _ = await relay(send_one_chunk, **{setting: "2"}, RATE_LIMIT="off")
    streaming = [await app.connect(), await app.connect()]
    for client in streaming:
        await (await client.chat()).event()
    rejected = await app.chat(host=host)
    error = await rejected.error()
    assert (rejected.status, error["code"]) == expected
    assert (error["retryable"], error["retry_after"]) == (True, 1)
    if setting == "MAX_STREAMS_PER_CALLER":
        assert (await app.chat(host="127.0.0.2")).status == 200
    streaming[0].disconnect()
    await app.log.wait_for_request(1)
    assert (await app.chat(host=host)).status == 200


async def test_rejected_request_releases_its_stream_slot(relay: StartRelay) -> None:
    app, _ = await relay(send_hello, MAX_STREAMS="1", RATE_LIMIT="off")
    client = await app.connect()
    for body in (b"", b"{}", b'{"message": "Hi", "model_id": "x"}'):
        reply = await client.request("POST", CHAT, body, JSON)
        assert reply.status in (400, 422)
        await reply.body()
    assert (await client.chat()).status == 200


WRONG_TYPE = {"content-type": "text/plain"}
TOO_LARGE = b"x" * 200


@pytest.mark.parametrize(
    ("env", "headers", "body", "expected"),
    [
        ({"MAX_STREAMS": "1"}, {**WRONG_TYPE, **WRONG_KEY}, TOO_LARGE, (401, "invalid_api_key")),
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
async def test_request_with_several_errors_gets_the_first_in_the_order_of_checks(
    relay: StartRelay,
    env: dict[str, str],
    headers: dict[str, str],
    body: bytes,
    expected: tuple[int, str],
) -> None:
    app, provider = await relay(send_one_chunk, MAX_BODY_BYTES="100", **env)
    await (await app.chat()).event()
    reply = await (await app.connect()).request("POST", CHAT, body, headers)
    assert await reply.status_and_code() == expected
    assert len(provider.requests) == 1


# ---- bugs

SECRET = "my secret 5512"


def fail_on_warning(record: logging.LogRecord) -> bool:
    """A logging filter with a bug: it fails when the service warns of a proxy."""
    if record.levelno == logging.WARNING:
        raise ValueError(SECRET)
    return True


async def test_bug_in_the_service_returns_500_and_is_logged_without_its_message(
    service: StartService,
) -> None:
    app = await service(CORS_ORIGINS="https://app.example")
    app.log.addFilter(fail_on_warning)
    headers = {"x-forwarded-for": "192.0.2.1", "origin": "https://app.example"}
    client = await app.connect()
    reply = await client.chat(headers=headers)
    error = await reply.error()
    assert (reply.status, error["code"], error["retryable"]) == (500, "internal_error", False)
    assert reply.headers["access-control-allow-origin"] == "https://app.example"
    line = await app.log.wait_for_request()
    assert (line["status"], line["outcome"], line["level"]) == (500, "internal_error", "error")
    assert line["request_id"] == reply.headers["x-request-id"]
    assert "ValueError" in line["trace"]
    assert SECRET not in json.dumps([line, error])
    # The connection and the service go on.
    app.log.removeFilter(fail_on_warning)
    assert (await client.chat(headers=headers)).status == 200


class BuggyProvider(LLMProvider):
    """A provider that raises an unexpected exception after its chunks."""

    name = "buggy"

    def __init__(self, *chunks: str) -> None:
        self.chunks = chunks

    async def stream(
        self, model: str, messages: Sequence[Message], call: Call, sink: Sink
    ) -> Completion:
        for chunk in self.chunks:
            sink.write([chunk])
        raise ValueError(SECRET)


@pytest.mark.parametrize("chunks", [(), ("Hel",)], ids=["before_first_chunk", "after_first_chunk"])
async def test_bug_in_a_provider_is_an_internal_error_and_releases_slot_and_session(
    service: StartService, chunks: tuple[str, ...]
) -> None:
    app = await service(BuggyProvider(*chunks), MODELS="gpt-4o-mini,mock/*,buggy/*")
    reply = await app.chat(model_id="buggy/x", session_id="mine")
    body = (await reply.events())[-1] if chunks else await reply.json()
    assert (reply.status, body["error"]["code"]) == (200 if chunks else 500, "internal_error")
    line = await app.log.wait_for_request()
    assert (line["outcome"], line["level"]) == ("internal_error", "error")
    assert line["cause"] == "ValueError"
    assert "BuggyProvider" not in body["error"]["message"]
    assert "test_service.py" in line["trace"]
    assert SECRET not in app.log.lines[-1]
    assert await app.metric("chat_active_streams") == 0
    assert (await app.chat(model_id="mock/echo", session_id="mine")).status == 200


# ---- failures of the provider


@pytest.mark.parametrize("script", [send_error_500, fail_after_reasoning])
async def test_failure_before_the_first_chunk_has_its_own_status(
    relay: StartRelay, script: Script
) -> None:
    app, _ = await relay(script)
    client = await app.connect()
    reply = await client.chat()
    error = await reply.error()
    assert (reply.status, error["code"], error["retryable"]) == (502, "upstream_error", True)
    assert "memory" not in error["message"]
    assert reply.headers["ratelimit"] == '"anonymous";r=9;t=6'
    assert "x-session-id" not in reply.headers
    line = await app.log.wait_for_request()
    assert (line["status"], line["outcome"]) == (502, "upstream_error")
    # The connection stays usable.
    assert (await client.request("GET", "/healthz")).status == 200


async def test_failure_after_the_first_chunk_is_the_terminal_event(relay: StartRelay) -> None:
    app, _ = await relay(fail_after_text)
    client = await app.connect()
    reply = await client.chat(session_id="mine")
    assert reply.status == 200
    *chunks, last = await reply.events()
    assert [event["chunk"] for event in chunks] == ["Hel", "lo"]
    assert list(last) == ["status", "id", "session_id", "error"]
    assert (last["status"], last["session_id"]) == ("error", "mine")
    assert last["id"] == reply.headers["x-request-id"]
    assert list(last["error"]) == ["code", "message", "retryable", "retry_after"]
    assert (last["error"]["code"], last["error"]["retryable"]) == ("upstream_error", True)
    assert "memory" not in last["error"]["message"]
    line = await app.log.wait_for_request()
    assert (line["status"], line["outcome"], line["chunks"]) == (200, "upstream_error", 2)
    assert (await client.request("GET", "/healthz")).status == 200


async def test_failure_after_a_heartbeat_is_the_terminal_event(relay: StartRelay) -> None:
    app, provider = await relay(send_nothing, HEARTBEAT_SECONDS="0.05")
    reply = await app.chat()
    assert reply.status == 200
    assert await reply.block() == ": keep-alive"
    await (await provider.wait_for_request()).send(response(429, b"{}", "retry-after: 7"))
    [last] = await reply.events()
    assert (last["status"], last["error"]["code"]) == ("error", "upstream_unavailable")
    assert last["error"]["retry_after"] == 7


async def test_chunk_is_sent_at_once_and_heartbeats_follow_while_the_provider_is_silent(
    relay: StartRelay,
) -> None:
    app, provider = await relay(send_one_chunk, HEARTBEAT_SECONDS="0.05")
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "first"
    assert [await reply.block() for _ in range(3)] == [": keep-alive"] * 3
    await (await provider.wait_for_request()).send_events(delta("second"), DONE)
    assert [event.get("chunk") for event in await reply.events()] == ["second", None]


FIRST_TOKEN, IDLE, TOTAL = (
    {f"{name}_TIMEOUT_SECONDS": "0.2"} for name in ("FIRST_TOKEN", "IDLE", "TOTAL")
)


@pytest.mark.parametrize(
    "committed", [False, True], ids=["before_the_status_line", "after_the_status_line"]
)
@pytest.mark.parametrize(
    ("script", "env", "reason"),
    [
        (send_nothing, FIRST_TOKEN, "did not start"),
        (send_headers, FIRST_TOKEN, "did not start"),
        (send_reasoning, IDLE, "sent nothing for 0.2 s"),
        (send_one_chunk, IDLE, "sent nothing for 0.2 s"),
        (send_nothing, TOTAL, "not complete within 0.2 s"),
        (send_reasoning, TOTAL, "not complete within 0.2 s"),
        (send_one_chunk, TOTAL, "not complete within 0.2 s"),
    ],
)
async def test_provider_timeout_is_504_before_the_status_line_and_the_terminal_event_after_it(
    relay: StartRelay, script: Script, env: dict[str, str], reason: str, committed: bool
) -> None:
    heartbeat = "0.05" if committed else NEVER
    app, provider = await relay(script, HEARTBEAT_SECONDS=heartbeat, **env)
    reply = await app.chat()
    if committed or script is send_one_chunk:
        last = (await reply.events())[-1]
        assert (reply.status, last["status"]) == (200, "error")
        error = last["error"]
    else:
        assert reply.status == 504
        error = await reply.error()
    assert (error["code"], error["retryable"]) == ("upstream_timeout", True)
    assert reason in error["message"]
    for request in provider.requests:
        await request.closed.wait()
    assert await app.metric("chat_active_streams") == 0


class ReasoningProvider(LLMProvider):
    """A provider that reasons at once and sends its first chunk when `reply` is set."""

    name = "reasoning"

    def __init__(self) -> None:
        self.reply = asyncio.Event()

    async def stream(
        self, model: str, messages: Sequence[Message], call: Call, sink: Sink
    ) -> Completion:
        sink.write([])
        await self.reply.wait()
        sink.write(["Hi"])
        return Completion(model, "stop", None)


async def test_first_token_timeout_ends_with_the_first_reasoning(service: StartService) -> None:
    provider = ReasoningProvider()
    env = {"FIRST_TOKEN_TIMEOUT_SECONDS": "0.1", "HEARTBEAT_SECONDS": "0.2"}
    app = await service(provider, MODELS="gpt-4o-mini,reasoning/*", **env)
    reply = await app.chat(model_id="reasoning/x")
    assert await reply.block() == ": keep-alive"
    provider.reply.set()
    assert [event.get("chunk") for event in await reply.events()] == ["Hi", None]


# ---- clients that disconnect, and clients that do not read


def close(client: Client) -> None:
    client.disconnect()


def half_close(client: Client) -> None:
    client.writer.write_eof()


@pytest.mark.parametrize("disconnect", [close, half_close])
@pytest.mark.parametrize("script", [send_nothing, send_headers, send_reasoning, send_one_chunk])
async def test_disconnect_closes_the_connection_to_the_provider(
    relay: StartRelay, script: Script, disconnect: Callable[[Client], None]
) -> None:
    app, provider = await relay(script)
    client = await app.connect()
    client.writer.write(encode_request("POST", CHAT, body=HELLO))
    request = await provider.wait_for_request()
    status, chunks = (200, 1) if script is send_one_chunk else (None, 0)
    if chunks:
        await (await client.head()).event()
    assert await app.metric("chat_active_streams") == 1
    disconnect(client)
    await request.closed.wait()
    line = await app.log.wait_for_request(1)
    assert (line["outcome"], line["status"]) == ("client_disconnected", status)
    assert line["chunks"] == chunks
    assert await app.metric("chat_active_streams") == 0


async def test_client_that_does_not_read_slows_the_provider_down_and_is_reset(
    relay: StartRelay,
) -> None:
    app, provider = await relay(send_flood, WRITE_TIMEOUT_SECONDS="0.3", HEARTBEAT_SECONDS="0.1")
    client = await connect_slow_client(app.url)
    app.clients.append(client)
    client.writer.write(encode_request("POST", CHAT, body=HELLO))
    await (await provider.wait_for_request()).closed.wait()
    line = await app.log.wait_for_request()
    assert (line["outcome"], line["status"]) == ("client_stalled", 200)
    assert await app.metric("chat_active_streams") == 0
    # The kernel buffers a few megabytes. Without backpressure the chunks would fill all memory.
    assert line["chunks"] * 60_000 < 32 * 2**20
    # A reset discards what is still in the kernel's buffers.
    with pytest.raises(ConnectionResetError):
        await client.reader.read()


async def test_slow_client_gets_all_of_a_long_response(relay: StartRelay) -> None:
    chunks = [f"{n}:" + "x" * 50_000 for n in range(80)]

    async def script(request: Connection) -> None:
        await request.complete(*chunks)

    app, _ = await relay(script)
    client = await connect_slow_client(app.url)
    app.clients.append(client)
    events = await (await client.chat()).events()
    assert [event.get("chunk") for event in events] == [*chunks, None]


# ---- the connection


async def test_connection_is_reused_after_success_and_after_each_error(relay: StartRelay) -> None:
    app, provider = await relay(send_hello)
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


BARE_400 = (
    b"HTTP/1.1 400 Bad Request\r\ncontent-type: text/plain; charset=utf-8\r\n"
    b"content-length: 30\r\nconnection: close\r\n\r\nInvalid HTTP request received."
)


@pytest.mark.parametrize(
    "data",
    [
        b"Hello?\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\n\r\n",
        encode_request("POST", CHAT, "Content-Length: -1"),
        encode_request("POST", CHAT, "Content-Length: 5", "Content-Length: 6"),
        encode_request("POST", CHAT, "Content-Length: 5", "Transfer-Encoding: chunked"),
    ],
    ids=lambda data: ascii(data[-24:]),
)
async def test_malformed_http_returns_a_bare_400_and_is_logged_and_counted(
    service: StartService, data: bytes
) -> None:
    app = await service()
    assert await exchange(app, data) == BARE_400
    assert app.log.requests() == []
    line = app.log.entries[-1]
    assert (line["status"], line["outcome"]) == (400, "malformed_request")
    assert await app.metric('chat_requests_total{outcome="malformed_request"') == 1


@pytest.mark.parametrize(
    ("method", "path", "protocol", "body", "status"),
    [
        ("GET", CHAT, "websocket", b"", b"405"),
        ("GET", "/ws", "websocket", b"", b"404"),
        ("GET", "/healthz", "h2c", b"", b"200"),
        # Java's client and `curl --http2` send this.
        ("POST", CHAT, "h2c", HELLO, b"200"),
    ],
)
async def test_upgrade_header_is_ignored(
    service: StartService, method: str, path: str, protocol: str, body: bytes, status: bytes
) -> None:
    app = await service()
    headers = ("Connection: close, Upgrade", f"Upgrade: {protocol}")
    reply = await exchange(app, encode_request(method, path, *headers, body=body))
    assert reply.startswith(b"HTTP/1.1 %b " % status)


SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n "


async def test_body_that_contains_upgrade_lines_is_not_parsed_as_the_next_request(
    service: StartService,
) -> None:
    app = await service()
    client = await app.connect()
    # Two bytes more for each line would push all of SMUGGLED out of the body.
    body = b"\r\nupgrade:" * (len(SMUGGLED) // 2) + SMUGGLED
    length = f"Content-Length: {len(body)}"
    media_type = "Content-Type: application/json"
    client.writer.write(encode_request("POST", CHAT, "Expect: 100-continue", media_type, length))
    assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    client.writer.write(body)
    assert (await client.head()).status == 400
    client.writer.write(encode_request("GET", "/healthz", "Connection: close"))
    assert (await client.reader.read()).endswith(b'{"status":"ok"}')
    assert [line["route"] for line in app.log.requests()] == [CHAT, "/healthz"]


async def test_body_after_a_split_upgrade_request_is_not_parsed_as_the_next_request(
    service: StartService,
) -> None:
    app = await service()
    client = await app.connect()
    body = SMUGGLED * 2
    headers = ("Connection: Upgrade", "Upgrade: h2c", f"Content-Length: {len(body)}")
    head = encode_request("POST", CHAT, *headers)
    client.writer.write(head[:30])
    await app.get("/healthz")
    client.writer.write(head[30:])
    client.writer.write(body)
    assert b"\r\nconnection: close\r\n" in await client.reader.read()
    assert [line["route"] for line in app.log.requests()] == ["/healthz", CHAT]


async def test_http_1_0_client_gets_a_whole_stream_without_http_chunks(relay: StartRelay) -> None:
    app, _ = await relay(send_hello)
    request = encode_request("POST", CHAT, body=HELLO).replace(b"1.1", b"1.0")
    reply = await exchange(app, request)
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert b"transfer-encoding" not in head
    assert body.startswith(b'data: {"chunk":"Hel"')
    assert body.count(b'"status":"done"') == 1


# ---- the other routes


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/healthz", {"status": "ok"}),
        ("/readyz", {"status": "ready"}),
        ("/api/v1/models", {"default": "gpt-4o-mini", "models": ["gpt-4o-mini", "gpt-9"]}),
    ],
)
async def test_probes_and_models_need_no_key_and_take_no_token(
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
    head = await exchange(app, encode_request("HEAD", path, "Connection: close"))
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert head.endswith(b"\r\n\r\n")


# ---- browsers

ORIGIN = "https://app.example"
EXPOSED = {
    *("X-Request-ID", "X-Session-ID", "RateLimit", "RateLimit-Policy", "Retry-After"),
    "Idempotent-Replayed",
}


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
async def test_allowed_origin_may_read_every_response(
    service: StartService, path: str, body: bytes, env: dict[str, str], status: int
) -> None:
    app = await service(CORS_ORIGINS=f"{ORIGIN},https://other.example", **env)
    client = await app.connect()
    headers = {**JSON, "origin": ORIGIN}
    if "RATE_LIMIT" in env:
        await (await client.request("POST", path, body, headers)).body()
    reply = await client.request("POST", path, body, headers)
    assert reply.status == status
    assert reply.headers["access-control-allow-origin"] == ORIGIN
    assert set(reply.headers["access-control-expose-headers"].split(", ")) == EXPOSED
    assert "access-control-allow-credentials" not in reply.headers
    assert "origin" in reply.headers["vary"].lower()


@pytest.mark.parametrize(
    ("env", "origin"),
    [
        ({"CORS_ORIGINS": ORIGIN}, "https://evil.example"),
        ({"CORS_ORIGINS": ORIGIN}, "https://app.example.evil.example"),
        ({"CORS_ORIGINS": ORIGIN}, "http://app.example"),
        ({"CORS_ORIGINS": ORIGIN}, "null"),
        ({}, ORIGIN),
    ],
)
async def test_other_origin_may_read_no_response(
    service: StartService, env: dict[str, str], origin: str
) -> None:
    app = await service(**env)
    reply = await (await app.connect()).chat(headers={"origin": origin})
    assert "access-control-allow-origin" not in reply.headers


def preflight(origin: str, method: str = "POST") -> dict[str, str]:
    """Return the headers of a preflight request."""
    return {
        "origin": origin,
        "access-control-request-method": method,
        "access-control-request-headers": "authorization,content-type,traceparent,x-request-id",
    }


@pytest.mark.parametrize("method", ["POST", "GET", "DELETE"])
async def test_preflight_is_accepted_and_takes_no_token(service: StartService, method: str) -> None:
    app = await service(CORS_ORIGINS=ORIGIN, RATE_LIMIT="1/day")
    client = await app.connect()
    for _ in range(3):
        reply = await client.request("OPTIONS", CHAT, headers=preflight(ORIGIN, method))
        assert reply.status == 200
        assert reply.headers["access-control-allow-origin"] == ORIGIN
        assert method in reply.headers["access-control-allow-methods"]
        assert "x-request-id" in reply.headers
        await reply.body()
    assert (await client.chat()).status == 200


async def test_preflight_of_another_origin_returns_400(service: StartService) -> None:
    app = await service(CORS_ORIGINS=ORIGIN)
    headers = preflight("https://evil.example")
    reply = await (await app.connect()).request("OPTIONS", CHAT, headers=headers)
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
async def test_host_outside_allowed_hosts_returns_400(
    service: StartService, host: str, status: int
) -> None:
    app = await service(ALLOWED_HOSTS="localhost,*.example.com,[::1]")
    reply = await (await app.connect()).request("GET", "/healthz", headers={"host": host})
    assert reply.status == status
    line = await app.log.wait_for_request()
    assert line["request_id"] == reply.headers["x-request-id"]
    assert line["outcome"] == ("done" if status == 200 else "rejected")


async def test_two_services_in_one_process_share_no_state(service: StartService) -> None:
    one = await service(RATE_LIMIT="1/day", DEFAULT_MODEL="one", METRICS="off")
    two = await service(RATE_LIMIT="off", DEFAULT_MODEL="two")
    for app, name in ((one, "one"), (two, "two")):
        assert (await (await app.get("/api/v1/models")).json())["default"] == name
        await (await app.chat()).events()
    assert (await one.chat()).status == 429
    assert (await two.chat()).status == 200
    assert (await one.get("/metrics")).status == 404
    assert await two.metric('chat_requests_total{outcome="done",route="/api/v1/chat"') == 1
    ids = [{line["request_id"] for line in app.log.requests()} for app in (one, two)]
    assert ids[0].isdisjoint(ids[1])
