"""The fault table: whatever fails, the client gets one true ending and nothing is lost or left.

Each row is a fault on real sockets; the scene asserts that nothing is left of it.
"""

import asyncio
import gzip
from dataclasses import dataclass, field

import anyio
import pytest

from tests.faults import STATUS, expected_level, get_outcome, read_to_end, run_scenario
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

SOON = {"FIRST_TOKEN_TIMEOUT_SECONDS": "0.3", "IDLE_TIMEOUT_SECONDS": "0.3"}
FINISH = delta(finish_reason="stop")


@dataclass(frozen=True)
class Fault:
    """What a provider does, and how the answer ends: `done` or an error's code."""

    script: Script
    outcome: str
    retryable: bool = True
    retry_after: int | None = None
    env: dict[str, str] = field(default_factory=dict)
    # Whether the connection may be used again; else it is closed when the answer ends.
    reusable: bool = False


Params = list[object]


def table(quick: set[str], rows: dict[str, Fault]) -> Params:
    """The rows as parameters; those that are not `quick` run with `make test-all`."""
    assert quick <= rows.keys()
    return [
        pytest.param(fault, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, fault in rows.items()
    ]


async def check(fault: Fault, opening: bytes = b"", said: str = "") -> None:
    """Play one row, where the answer has begun with the event `opening`, which says `said`."""
    begun = asyncio.Event()

    async def script(request: Connection) -> None:
        if opening:
            await request.stream(opening)
        if said:
            # What is still on its way when a connection breaks may be lost.
            await begun.wait()
        await fault.script(request)

    async with run_scenario(
        script, **{**fault.env, **({"HEARTBEAT_SECONDS": "0.2"} if said else {})}
    ) as play:
        reply = await play.chat()
        if said:
            assert (await reply.event())["chunk"] == said
            begun.set()
        text, last = await read_to_end(reply)
        assert (said + text, get_outcome(last)) == (said, fault.outcome)
        if fault.outcome != "done":
            assert reply.status == (200 if said else STATUS[fault.outcome])
            error = last["error"]
            assert (error["retryable"], error["retry_after"]) == (
                fault.retryable,
                fault.retry_after,
            )
        if not fault.reusable:
            await play.wait_for_upstreams_closed()
        assert await play.read_responses() == ([(said, fault.outcome == "done")] if said else [])
        line = await play.wait_for_log_line()
        ends = (line["outcome"], line["status"], line["level"])
        assert ends == (fault.outcome, reply.status, expected_level(fault.outcome))
        [attempt] = line["attempts"]
        assert attempt["error"] == (None if fault.outcome == "done" else fault.outcome)
        await play.assert_nothing_held()
        assert len(play.chat_log_lines()) == 1


# ---- no answer at all


async def wait(request: Connection) -> None:
    await request.closed.wait()


def send(*parts: bytes) -> Script:
    """The provider sends this and closes the connection."""

    async def script(request: Connection) -> None:
        await request.send(b"".join(parts))
        request.writer.close()

    return script


def send_and_wait(*parts: bytes) -> Script:
    """The provider sends this and nothing more, but stays."""

    async def script(request: Connection) -> None:
        await request.send(b"".join(parts))
        await request.closed.wait()

    return script


def send_and_reset(*parts: bytes) -> Script:
    """The provider sends this, is quiet until it is taken, and resets the connection."""

    async def script(request: Connection) -> None:
        await request.send(b"".join(parts))
        request.reset()

    return script


def for_ever(part: bytes, *opening: bytes, seconds: float = 0.02) -> Script:
    """The provider sends `opening`, then `part` again and again until the other side leaves."""

    async def script(request: Connection) -> None:
        await request.send(b"".join(opening))
        while True:
            with anyio.move_on_after(seconds):
                await request.closed.wait()
                return
            await request.send(part)

    return script


async def late_head(request: Connection) -> None:
    await request.closed.wait()
    await request.complete("too late")


HEADERS: dict[str, Fault] = {
    "accepted_and_silent": Fault(wait, "upstream_timeout", env=SOON),
    "reset_before_headers": Fault(send_and_reset(), "upstream_error"),
    "closed_before_headers": Fault(send(), "upstream_error"),
    "reset_within_headers": Fault(send_and_reset(HEAD[:40]), "upstream_error"),
    "headers_a_byte_at_a_time": Fault(
        for_ever(b"z", b"HTTP/1.1 200 OK\r\nx-y: "), "upstream_timeout", env=SOON
    ),
    "headers_after_the_limit": Fault(late_head, "upstream_timeout", env=SOON),
    "a_header_of_a_megabyte": Fault(
        send_and_wait(b"HTTP/1.1 200 OK\r\nx-y: " + b"z" * 2**20), "upstream_error"
    ),
    "not_http": Fault(send(b"SSH-2.0-OpenSSH_9.9\r\n\r\n"), "upstream_error"),
}


@pytest.mark.parametrize("fault", table({"accepted_and_silent", "reset_within_headers"}, HEADERS))
async def test_a_provider_without_a_head_is_answered_for(fault: Fault) -> None:
    await check(fault)


# ---- a stream that goes wrong, before its first chunk and after it


def chunks(*events: bytes) -> bytes:
    return b"".join(http_chunk(each) for each in events)


def in_stream(*events: bytes, end: bytes = END) -> Script:
    """The provider sends these events in a stream, which it ends."""

    async def script(request: Connection) -> None:
        await request.send(chunks(*events) + end)

    return script


NONSENSE = ("upstream_error", False)
FAILED = ("upstream_error", True)


def broken(event: bytes, ended: tuple[str, bool] = NONSENSE) -> Fault:
    """A stream that goes on for ever after an event that ends it for us."""
    return Fault(send_and_wait(http_chunk(event)), *ended)


def json_event(text: str) -> bytes:
    return b"data: " + text.encode() + b"\n\n"


STREAMS: dict[str, Fault] = {
    "no_further_piece": Fault(wait, "upstream_timeout", env=SOON),
    "reset": Fault(send_and_reset(), "upstream_error"),
    "closed_within_a_chunk": Fault(send(b"ff\r\ndata: {"), "upstream_error"),
    "closed_between_chunks": Fault(send(), "upstream_error"),
    "ended_without_an_end": Fault(in_stream(), "upstream_incomplete", reusable=True),
    "half_an_event_then_ended": Fault(
        in_stream(b'data: {"choices":[{"del'), "upstream_incomplete", reusable=True
    ),
    "a_byte_at_a_time_for_ever": Fault(for_ever(http_chunk(b"d")), "upstream_timeout", env=SOON),
    "comments_for_ever": Fault(for_ever(http_chunk(b": hm\n\n")), "upstream_timeout", env=SOON),
    "empty_deltas_for_ever": Fault(for_ever(http_chunk(delta(""))), "upstream_timeout", env=SOON),
    "ten_megabytes_without_a_line_end": broken(b"data: " + b"x" * 10_000_000),
    "an_event_of_two_megabytes_in_many_lines": broken(b"data: xxxxx\n" * 2**18),
    "an_event_of_many_empty_lines": broken(b"data:\n" * 2**21),
    "bad_utf8": broken(b'data: {"choices":[{"delta":{"content":"\xff"}}]}\n\n'),
    "a_lone_surrogate": broken(json_event('{"choices":[{"delta":{"content":"\\ud800"}}]}')),
    "bad_json": broken(json_event('{"choices":[')),
    "not_a_number": broken(json_event('{"choices":[],"usage":{"total_tokens":NaN}}')),
    "nested_too_deep": broken(json_event("[" * 10_000 + "]" * 10_000)),
    "a_list": broken(json_event("[1]")),
    "a_number": broken(json_event("1")),
    "a_string": broken(json_event('"Hello"')),
    "null": broken(json_event("null")),
    "choices_of_numbers": broken(json_event('{"choices":[1]}')),
    "choices_an_object": broken(json_event('{"choices":{"index":0}}')),
    "choices_null_missing_empty_or_an_index_only": Fault(
        in_stream(
            json_event('{"choices":null}'),
            json_event("{}"),
            json_event('{"choices":[]}'),
            json_event('{"choices":[{"index":0}]}'),
        ),
        "upstream_incomplete",
        reusable=True,
    ),
    "an_error_object": broken(json_event('{"error":{"message":"no"}}'), FAILED),
    "an_error_string": broken(json_event('{"error":"no"}'), FAILED),
    "an_error_beside_choices": broken(json_event('{"error":{"code":502},"choices":[]}'), FAILED),
    "an_error_event": broken(b'event: error\ndata: {"message":"no"}\n\n', FAILED),
    "an_error_event_in_words": broken(b"event: error\ndata: no\n\n", FAILED),
    "an_error_line": broken(b'error: {"message":"no"}\n\n', FAILED),
    "busy_in_an_event": broken(
        json_event('{"error":{"code":"rate_limit_exceeded"}}'), ("upstream_unavailable", True)
    ),
    "out_of_quota_in_an_event": broken(
        json_event('{"error":{"code":"insufficient_quota"}}'), ("upstream_unavailable", False)
    ),
    "too_long_in_an_event": broken(
        json_event('{"error":{"code":"context_length_exceeded"}}'), ("context_too_long", False)
    ),
    "refused_in_an_event": broken(
        json_event('{"error":{"code":"content_filter"}}'), ("content_refused", False)
    ),
    "an_error_after_the_finish": Fault(
        in_stream(FINISH, json_event('{"error":{"message":"no"}}')),
        "upstream_error",
        reusable=True,
    ),
    "the_whole_answer_too_slow": Fault(
        for_ever(http_chunk(json_event('{"choices":[{"delta":{"reasoning":"hm"}}]}'))),
        "upstream_timeout",
        env={"TOTAL_TIMEOUT_SECONDS": "0.4"},
    ),
    "no_finish_but_done": Fault(in_stream(DONE), "done", reusable=True),
    "no_done_but_a_finish": Fault(in_stream(FINISH), "done", reusable=True),
    "done_twice": Fault(in_stream(FINISH, DONE, DONE), "done", reusable=True),
    "text_after_done": Fault(in_stream(DONE, delta("more"), DONE), "done", reusable=True),
    "reset_after_done": Fault(send_and_reset(chunks(FINISH, DONE)), "done"),
    "open_after_done": Fault(send_and_wait(chunks(FINISH, DONE)), "done"),
    "nothing_after_the_finish": Fault(
        send_and_wait(chunks(FINISH)), "done", env={"IDLE_TIMEOUT_SECONDS": "0.3"}
    ),
    "counts_that_are_none": Fault(
        in_stream(FINISH, event({"usage": {"prompt_tokens": -1, "completion_tokens": None}}), DONE),
        "done",
        reusable=True,
    ),
    "a_count_beyond_all_bounds": Fault(
        in_stream(FINISH, event({"usage": {"prompt_tokens": 10**400}}), DONE), "done", reusable=True
    ),
}
QUICK_STREAMS = {
    "no_further_piece",
    "reset",
    "closed_within_a_chunk",
    "ended_without_an_end",
    "comments_for_ever",
    "ten_megabytes_without_a_line_end",
    "bad_utf8",
    "null",
    "an_error_object",
    "the_whole_answer_too_slow",
    "text_after_done",
}


@pytest.mark.parametrize("fault", table(QUICK_STREAMS, STREAMS))
async def test_a_stream_that_fails_before_its_first_piece_has_a_status(fault: Fault) -> None:
    await check(fault, opening=b": hello\n\n")


@pytest.mark.parametrize("fault", table(QUICK_STREAMS, STREAMS))
async def test_a_stream_that_fails_after_its_first_piece_ends_in_band(fault: Fault) -> None:
    await check(fault, opening=delta("Hel"), said="Hel")


@pytest.mark.parametrize(
    "opening",
    [
        pytest.param((), id="before_the_finish"),
        pytest.param((FINISH,), id="after_the_finish", marks=pytest.mark.slow),
    ],
)
async def test_an_answer_without_an_end_is_cut_at_4_mib(opening: tuple[bytes, ...]) -> None:
    part = chunks(*[delta("x" * 1000)] * 100)
    sent = 0

    async def flood(request: Connection) -> None:
        nonlocal sent
        await request.stream(*opening)
        while not request.closed.is_set():
            await request.send(part)
            sent += len(part)

    async with run_scenario(flood) as play:
        text, last = await read_to_end(await play.chat())
        # After its finish the answer is whole, whatever else is sent.
        assert get_outcome(last) in (("done", "upstream_error") if opening else ("upstream_error",))
        assert len(text) <= 2**22
        await play.wait_for_upstreams_closed()
        # The sockets' own buffers, and no more, lie between what was sent and what was read.
        assert sent < 4 * 2**22
        assert await play.read_responses() == (
            [(text, get_outcome(last) == "done")] if text else []
        )
        assert (await play.wait_for_log_line())["outcome"] == get_outcome(last)
        await play.assert_nothing_held()


async def test_a_gap_is_noticed_however_long_the_heartbeat() -> None:
    async def script(request: Connection) -> None:
        await request.stream(delta("Hel"))
        await request.closed.wait()

    async with run_scenario(script, IDLE_TIMEOUT_SECONDS="0.1", HEARTBEAT_SECONDS="3600") as play:
        text, last = await read_to_end(await play.chat())
        assert (text, get_outcome(last)) == ("Hel", "upstream_timeout")


# ---- an answer that is no stream


def answered(status: int, body: bytes = b"{}", *headers: str) -> Script:
    async def script(request: Connection) -> None:
        await request.send(response(status, body, *headers))

    return script


def refused(code: str, retryable: bool, status: int, body: bytes = b"{}", *headers: str) -> Fault:
    wait = None
    return Fault(answered(status, body, *headers), code, retryable, wait, reusable=True)


def told(**error: object) -> bytes:
    return event({"error": error}).removeprefix(b"data: ")


def waiting(seconds: int | None, *headers: str, status: int = 429) -> Fault:
    """The provider is busy, and says with `headers` for how long."""
    return Fault(
        answered(status, b"{}", *headers),
        "upstream_unavailable",
        retry_after=seconds,
        reusable=True,
    )


COMPLETION = b'{"choices":[{"message":{"content":"Hello"},"finish_reason":"stop"}]}'
QUOTA = told(code="insufficient_quota", message="You exceeded your current quota")
EVENTS = "content-type: text/event-stream"

ANSWERS: dict[str, Fault] = {
    "html_with_status_200": refused(*NONSENSE, 200, b"<html>", "content-type: text/html"),
    "a_whole_completion": refused(*NONSENSE, 200, COMPLETION),
    "a_whole_completion_called_a_stream": refused(
        "upstream_incomplete", True, 200, COMPLETION, EVENTS
    ),
    "an_error_with_status_200": refused(*FAILED, 200, told(message="no")),
    "gzip_unasked": refused(
        *NONSENSE, 200, gzip.compress(delta("Hi") + DONE), EVENTS, "content-encoding: gzip"
    ),
    "a_redirect": refused(*NONSENSE, 307, b"", "location: /v1/elsewhere"),
    "a_reason_that_is_not_text": Fault(
        send_and_wait(HEAD.replace(b"OK", b"\xff"), chunks(FINISH, DONE)), "done"
    ),
    "a_chunk_size_that_is_none": Fault(send_and_wait(HEAD, b"zz\r\n"), *FAILED),
    "switching_protocols": Fault(
        send(b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"),
        *NONSENSE,
    ),
    "204": Fault(send_and_wait(b"HTTP/1.1 204 No Content\r\n\r\n"), *NONSENSE, reusable=True),
    "400": refused(*NONSENSE, 400),
    "400_too_long": refused("context_too_long", False, 400, told(code="context_length_exceeded")),
    "400_content_filter": refused("content_refused", False, 400, told(code="content_filter")),
    "401": refused(*NONSENSE, 401, told(code="invalid_api_key")),
    "402": refused("upstream_unavailable", False, 402),
    "403": refused(*NONSENSE, 403),
    "404": refused(*NONSENSE, 404, told(code="model_not_found")),
    "408": refused(*FAILED, 408),
    "409": refused(*FAILED, 409),
    "422": refused(*NONSENSE, 422),
    "429": waiting(None),
    "429_seconds": waiting(7, "retry-after: 7"),
    "429_milliseconds": waiting(2, "retry-after-ms: 1500", "retry-after: 7"),
    "429_a_past_date": waiting(None, "retry-after: Wed, 21 Oct 2015 07:28:00 GMT"),
    "429_a_day": waiting(86400, "retry-after: 86400"),
    "429_nonsense": waiting(None, "retry-after: soon"),
    "429_not_a_number": waiting(None, "retry-after: NaN"),
    "429_negative": waiting(None, "retry-after: -1"),
    "429_a_year_that_never_comes": waiting(
        None, "retry-after: Fri, 01 Jan 9999999999999999999 00:00:00 GMT"
    ),
    "429_quota": refused("upstream_unavailable", False, 429, QUOTA, "retry-after: 1"),
    "500": refused(*FAILED, 500),
    "502_html": refused(*FAILED, 502, b"<html>Bad gateway</html>", "content-type: text/html"),
    "503": waiting(3, "retry-after: 3", status=503),
    "529": waiting(None, status=529),
    "503_gzip": refused(
        "upstream_unavailable", True, 503, gzip.compress(b"busy"), "content-encoding: gzip"
    ),
    "500_of_10_megabytes": Fault(answered(500, b"x" * 10_000_000), *FAILED),
    "500_cut": Fault(send(response(500, b"x" * 100)[:-50]), *FAILED),
    "500_never_ending": Fault(
        send_and_wait(response(500, b"x" * 100)[:-50]), "upstream_timeout", env=SOON
    ),
    "a_status_of_its_own": refused(*NONSENSE, 299),
}
QUICK_ANSWERS = {
    "a_whole_completion",
    "a_reason_that_is_not_text",
    "gzip_unasked",
    "401",
    "408",
    "429_milliseconds",
    "429_nonsense",
    "429_quota",
    "500",
    "503",
}


@pytest.mark.parametrize("fault", table(QUICK_ANSWERS, ANSWERS))
async def test_an_answer_that_is_no_stream_has_a_status(fault: Fault) -> None:
    await check(fault)


async def test_what_precedes_the_answer_proper_is_passed_over() -> None:
    async def script(request: Connection) -> None:
        early = b"HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n"
        await request.send(b"HTTP/1.1 100 Continue\r\n\r\n" + early)
        await request.complete("Hel", "lo")

    async with run_scenario(script) as play:
        text, last = await read_to_end(await play.chat())
        assert (text, get_outcome(last)) == ("Hello", "done")
        await play.assert_nothing_held()
