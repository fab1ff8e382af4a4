"""The fault table: for every fault of a provider, one true end for the client, and nothing leaked.

The parser's own tests have more malformed events and more error codes. Here each kind of fault runs
through the service, on real sockets.
"""

import asyncio
import gzip
from dataclasses import dataclass, field, replace

import anyio
import pytest

from providers import MAX_ERROR_BYTES
from tests.faults import STATUS, expected_level, get_outcome, read_to_end, run_scenario
from tests.test_retries import create_params
from tests.upstream import (
    DONE,
    END,
    HEAD,
    Connection,
    Script,
    delta,
    event,
    http_chunk,
    response,
)

slow = pytest.mark.slow
FINISH = delta(finish_reason="stop")


@dataclass(frozen=True)
class Fault:
    """What a provider does, and how the response ends: "done" or an error code."""

    script: Script
    outcome: str = "upstream_error"
    retryable: bool = True
    retry_after: int | None = None
    env: dict[str, str] = field(default_factory=dict)
    # Whether the connection may be used again. Otherwise it is closed when the response ends.
    reusable: bool = False


def times_out(script: Script) -> Fault:
    """Return a fault that only the first-token timeout or the idle timeout ends."""
    return Fault(script, "upstream_timeout", env={"FIRST_TOKEN_TIMEOUT_SECONDS": "0.3"})


async def check(fault: Fault, opening: bytes = b"", text: str = "") -> None:
    """Run one row of a table, after the event `opening`, which contains `text`."""
    received = asyncio.Event()

    async def script(request: Connection) -> None:
        if opening:
            await request.stream(opening)
        if text:
            # Data that is in flight when a connection breaks may be lost.
            await received.wait()
        await fault.script(request)

    async with run_scenario(script, **fault.env) as play:
        reply = await play.chat()
        if text:
            assert (await reply.event())["chunk"] == text
            received.set()
        rest, last = await read_to_end(reply)
        assert (rest, get_outcome(last)) == ("", fault.outcome)
        is_done = fault.outcome == "done"
        if not is_done:
            assert reply.status == (200 if text else STATUS[fault.outcome])
            error = last["error"]
            advice = (error["retryable"], error["retry_after"])
            assert advice == (fault.retryable, fault.retry_after)
        if not fault.reusable:
            await play.wait_for_upstreams_closed()
        assert await play.read_responses() == ([(text, is_done)] if text else [])
        line = await play.wait_for_log_line()
        logged = (line["outcome"], line["status"], line["level"])
        assert logged == (fault.outcome, reply.status, expected_level(fault.outcome))
        [attempt] = line["attempts"]
        assert attempt["error"] == (None if is_done else fault.outcome)
        await play.assert_nothing_held()
        assert len(play.chat_log_lines()) == 1


# ---- scripts


async def wait(request: Connection) -> None:
    await request.closed.wait()


async def respond_too_late(request: Connection) -> None:
    await request.closed.wait()
    await request.complete("too late")


def send(*parts: bytes) -> Script:
    """Return a script that sends `parts` and keeps the connection open."""

    async def script(request: Connection) -> None:
        await request.send(b"".join(parts))

    return script


def send_and_close(*parts: bytes) -> Script:
    async def script(request: Connection) -> None:
        await request.send(b"".join(parts))
        request.writer.close()

    return script


def send_and_reset(*parts: bytes) -> Script:
    async def script(request: Connection) -> None:
        await request.send(b"".join(parts))
        request.reset()

    return script


def repeat(data: bytes, *opening: bytes) -> Script:
    """Return a script that sends `opening`, then `data` every 20 ms until the service closes."""

    async def script(request: Connection) -> None:
        await request.send(b"".join(opening))
        while not request.closed.is_set():
            await request.send(data)
            with anyio.move_on_after(0.02):
                await request.closed.wait()

    return script


# ---- no response head

HEADS: dict[str, Fault] = {
    "silence": times_out(wait),
    "head_too_late": times_out(respond_too_late),
    "reset": Fault(send_and_reset()),
    "reset_within_head": Fault(send_and_reset(HEAD[:40])),
    "close": Fault(send_and_close()),
    "byte_at_a_time": times_out(repeat(b"z", b"HTTP/1.1 200 OK\r\nx-y: ")),
    "megabyte_header": Fault(send(b"HTTP/1.1 200 OK\r\nx-y: " + b"z" * 2**20)),
    "not_http": Fault(send_and_close(b"SSH-2.0-OpenSSH_9.9\r\n\r\n")),
}


@pytest.mark.parametrize("fault", create_params(HEADS, {"silence", "reset_within_head"}))
async def test_provider_without_a_response_head_is_an_error(fault: Fault) -> None:
    await check(fault)


# ---- streams that fail, before and after their first chunk


def http_chunks(*events: bytes) -> bytes:
    return b"".join(http_chunk(each) for each in events)


def ends(*events: bytes, outcome: str = "done") -> Fault:
    """Return a stream that sends these events and ends as HTTP requires."""
    return Fault(send(http_chunks(*events), END), outcome, reusable=True)


def fails(event: bytes, outcome: str = "upstream_error", *, retryable: bool = True) -> Fault:
    """Return a stream that does not end after an event that ends the response."""
    return Fault(send(http_chunk(event)), outcome, retryable)


def malformed(event: bytes) -> Fault:
    return fails(event, retryable=False)


def error_event(**error: object) -> bytes:
    return event({"error": error})


STREAMS: dict[str, Fault] = {
    "silence": times_out(wait),
    "byte_at_a_time": times_out(repeat(http_chunk(b"d"))),
    "comments": times_out(repeat(http_chunk(b": hm\n\n"))),
    "empty_deltas": times_out(repeat(http_chunk(delta("")))),
    "reset": Fault(send_and_reset()),
    "close_within_http_chunk": Fault(send_and_close(b"ff\r\ndata: {")),
    "close_between_http_chunks": Fault(send_and_close()),
    "end_without_done": ends(outcome="upstream_incomplete"),
    "end_within_event": ends(b'data: {"choices":[{"del', outcome="upstream_incomplete"),
    "line_of_10_mb": malformed(b"data: " + b"x" * 10_000_000),
    "event_of_many_lines": malformed(b"data: xxxxx\n" * 2**18),
    "event_of_many_empty_lines": malformed(b"data:\n" * 2**21),
    "not_json": malformed(b'data: {"choices":[\n\n'),
    "not_an_object": malformed(b"data: [1]\n\n"),
    "error": fails(error_event(message="no")),
    "named_error": fails(b'event: error\ndata: {"message":"no"}\n\n'),
    "rate_limit": fails(error_event(code="rate_limit_exceeded"), "upstream_unavailable"),
    "quota": fails(error_event(code="insufficient_quota"), "upstream_unavailable", retryable=False),
    "too_long": fails(
        error_event(code="context_length_exceeded"), "context_too_long", retryable=False
    ),
    "refused": fails(error_event(code="content_filter"), "content_refused", retryable=False),
    "error_after_finish": ends(FINISH, error_event(message="no"), outcome="upstream_error"),
    "finish_without_done": ends(FINISH),
    "done_twice": ends(FINISH, DONE, DONE),
    "text_after_done": ends(FINISH, DONE, delta("more"), DONE),
    "reset_after_done": Fault(send_and_reset(http_chunks(FINISH, DONE)), "done"),
    "reset_after_finish": Fault(send_and_reset(http_chunk(FINISH)), "done"),
    "open_after_done": Fault(send(http_chunks(FINISH, DONE)), "done"),
    "open_after_finish": Fault(send(http_chunk(FINISH)), "done"),
    "invalid_usage": ends(
        FINISH, event({"usage": {"prompt_tokens": -1, "completion_tokens": None}}), DONE
    ),
    "huge_usage": ends(FINISH, event({"usage": {"prompt_tokens": 10**400}}), DONE),
}
STREAM_PARAMS = create_params(
    STREAMS,
    {
        "silence",
        "comments",
        "reset",
        "close_within_http_chunk",
        "end_without_done",
        "line_of_10_mb",
        "not_json",
        "error",
        "text_after_done",
    },
)


@pytest.mark.parametrize("fault", STREAM_PARAMS)
async def test_stream_that_fails_before_its_first_chunk_has_a_status(fault: Fault) -> None:
    await check(fault, opening=b": hello\n\n")


@pytest.mark.parametrize(
    "fault", [*STREAM_PARAMS, pytest.param(ends(DONE), id="done_without_finish", marks=slow)]
)
async def test_stream_that_fails_after_its_first_chunk_ends_with_an_event(fault: Fault) -> None:
    if fault.outcome == "upstream_timeout":
        fault = replace(fault, env={"IDLE_TIMEOUT_SECONDS": "0.3", "HEARTBEAT_SECONDS": "0.2"})
    await check(fault, opening=delta("Hel"), text="Hel")


async def test_stream_of_endless_reasoning_ends_at_the_total_timeout() -> None:
    reasoning = event({"choices": [{"delta": {"reasoning": "hm"}}]})
    env = {"TOTAL_TIMEOUT_SECONDS": "0.4"}
    await check(Fault(repeat(http_chunk(reasoning), HEAD), "upstream_timeout", env=env))


@pytest.mark.parametrize(
    ("opening", "outcomes"),
    [
        pytest.param([], {"upstream_error"}, id="before_finish"),
        # After its finish_reason the response is complete, also if more follows.
        pytest.param([FINISH], {"done", "upstream_error"}, id="after_finish", marks=slow),
    ],
)
async def test_endless_stream_ends_after_4_mib(opening: list[bytes], outcomes: set[str]) -> None:
    data = http_chunks(*[delta("x" * 1000)] * 100)
    sent = 0

    async def flood(request: Connection) -> None:
        nonlocal sent
        await request.stream(*opening)
        while not request.closed.is_set():
            await request.send(data)
            sent += len(data)

    async with run_scenario(flood) as play:
        text, last = await read_to_end(await play.chat())
        outcome = get_outcome(last)
        assert outcome in outcomes
        assert len(text) <= 2**22
        await play.wait_for_upstreams_closed()
        # The kernel's buffers contain the rest.
        assert sent < 4 * 2**22
        assert await play.read_responses() == ([(text, outcome == "done")] if text else [])
        assert (await play.wait_for_log_line())["outcome"] == outcome
        await play.assert_nothing_held()


# ---- responses that are not a stream


def responds(
    status: int,
    body: bytes = b"{}",
    *headers: str,
    outcome: str = "upstream_error",
    retryable: bool = False,
    retry_after: int | None = None,
) -> Fault:
    script = send(response(status, body, *headers))
    return Fault(script, outcome, retryable, retry_after, reusable=True)


def busy(status: int, *headers: str, retry_after: int | None = None) -> Fault:
    return responds(
        status,
        b"{}",
        *headers,
        outcome="upstream_unavailable",
        retryable=True,
        retry_after=retry_after,
    )


def incomplete(body: bytes) -> Fault:
    return responds(200, body, outcome="upstream_incomplete", retryable=True)


def error_body(**error: object) -> bytes:
    return error_event(**error).removeprefix(b"data: ")


EVENTS, GZIP = "content-type: text/event-stream", "content-encoding: gzip"
HTML_503 = b"HTTP/1.1 503 Busy\r\ncontent-type: text/html\r\ncontent-length: 9999999\r\n\r\n"
LENGTH_1000 = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: 1000\r\n"

RESPONSES: dict[str, Fault] = {
    "html": responds(200, b"<html>Welcome</html>", "content-type: text/html; charset=utf-8"),
    # Its message does not make it an error.
    "json_object": incomplete(b'{"message":"The context window is open."}'),
    "json_list": incomplete(b"[1]"),
    "malformed_json": incomplete(b"{"),
    "json_error": responds(200, error_body(message="no"), retryable=True),
    "json_error_429": responds(
        200, error_body(code=429), outcome="upstream_unavailable", retryable=True
    ),
    "json_error_of_type_in_capitals": responds(
        200,
        error_body(code="content_filter"),
        "content-type: Application/JSON",
        outcome="content_refused",
    ),
    "gzip": responds(200, gzip.compress(delta("Hi") + DONE), EVENTS, GZIP),
    "gzip_that_does_not_end": Fault(
        send(LENGTH_1000 + b"content-encoding: gzip\r\n\r\n", gzip.compress(delta("Hi"))),
        retryable=False,
    ),
    "redirect": responds(307, b"", "location: /v1/elsewhere"),
    "reason_not_utf8": Fault(send(HEAD.replace(b"OK", b"\xff"), http_chunks(FINISH, DONE)), "done"),
    "invalid_http_chunk_size": Fault(send(HEAD, b"zz\r\n")),
    "stream_without_events": Fault(send(HEAD, END), "upstream_incomplete", reusable=True),
    "stream_without_choices": Fault(
        send(HEAD, http_chunk(DONE), END), "upstream_incomplete", reusable=True
    ),
    "204": Fault(send(b"HTTP/1.1 204 No Content\r\n\r\n"), retryable=False, reusable=True),
    "299": responds(299),
    "400": responds(400),
    "400_without_content_type": Fault(
        send(b'HTTP/1.1 400 Bad\r\ncontent-length: 19\r\n\r\n{"error":"too long"'),
        retryable=False,
        reusable=True,
    ),
    "400_too_long": responds(
        400, error_body(code="context_length_exceeded"), outcome="context_too_long"
    ),
    "400_refused": responds(400, error_body(code="content_filter"), outcome="content_refused"),
    "401": responds(401, error_body(code="invalid_api_key")),
    "402": responds(402, outcome="upstream_unavailable"),
    "408": responds(408, retryable=True),
    "429": busy(429),
    "429_milliseconds": busy(429, "Retry-After-Ms: 6100", "Retry-After: 9", retry_after=7),
    "429_malformed_wait": busy(429, "retry-after: soon"),
    "429_day": busy(429, "retry-after: 86400", retry_after=86400),
    "429_date": busy(429, "retry-after: Fri, 01 Jan 9999999999999999999 00:00:00 GMT"),
    "429_quota": responds(
        429,
        error_body(code="insufficient_quota"),
        "retry-after: 1",
        outcome="upstream_unavailable",
    ),
    "500": responds(500, retryable=True),
    "500_of_10_mb": Fault(send(response(500, b"x" * 10_000_000))),
    "500_truncated": Fault(send_and_close(response(500, b"x" * 100)[:-50])),
    "500_that_does_not_end": times_out(send(response(500, b"x" * 100)[:-50])),
    "502_html": responds(
        502, b"<html>Bad gateway</html>", "content-type: text/html", retryable=True
    ),
    "503": busy(503, "retry-after: 3", retry_after=3),
    "503_html_that_does_not_end": Fault(
        send(HTML_503, b"x" * (MAX_ERROR_BYTES + 1)), "upstream_unavailable"
    ),
    "503_gzip": responds(
        503, gzip.compress(b"busy"), GZIP, outcome="upstream_unavailable", retryable=True
    ),
}


@pytest.mark.parametrize(
    "fault",
    create_params(
        RESPONSES,
        {
            "json_list",
            "reason_not_utf8",
            "gzip",
            "400_too_long",
            "401",
            "408",
            "429_milliseconds",
            "429_quota",
            "500",
            "503",
        },
    ),
)
async def test_response_that_is_not_a_stream_has_a_status(fault: Fault) -> None:
    await check(fault)


@slow
async def test_unrequested_protocol_switch_is_an_error() -> None:
    head = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"
    await check(Fault(send_and_close(head)))


async def send_after_interim_responses(request: Connection) -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
    await request.send(b"HTTP/1.1 100 Continue\r\n\r\n" + early)
    await request.complete("Hel", "lo")


COMPLETION = b'{"choices":[{"message":{"content":"Hello"},"finish_reason":"stop"}]}'


@pytest.mark.parametrize(
    "script",
    [
        send_after_interim_responses,
        send(response(200, COMPLETION)),
        send(response(200, COMPLETION, EVENTS)),
    ],
    ids=["interim_responses", "json", "json_as_event_stream"],
)
async def test_unusual_response_that_contains_a_completion_is_done(script: Script) -> None:
    async with run_scenario(script) as play:
        text, last = await read_to_end(await play.chat())
        assert (text, get_outcome(last)) == ("Hello", "done")
        await play.assert_nothing_held()
