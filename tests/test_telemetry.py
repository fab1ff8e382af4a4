"""What the operator sees: ids, one line for each request that cannot be forged, metrics whose
labels nobody can invent; and what none of them ever holds."""

import json
import logging
import re
import socket
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import Drain
from service import create_app
from settings import from_env
from telemetry import (
    JSONFormatter,
    Metrics,
    RequestContext,
    TextFormatter,
    short_address,
    short_hash,
)
from tests.client import CANARY, JSON
from tests.conftest import Log, StartService, StartUpstream, run_lifespan
from tests.upstream import DONE, END, HEAD, Connection, delta, event, http_chunk, response

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
FORMATTERS = pytest.mark.parametrize("formatter", [JSONFormatter(), TextFormatter()])
# A machine with other work to do proves nothing about the code.
patient = settings(deadline=None)


def scope_of(path: str = "/", method: str = "GET", **headers: str) -> Scope:
    pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return {
        "type": "http",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in pairs],
        "client": ("127.0.0.1", 1),
    }


async def nothing() -> Message:
    return {"type": "http.request", "body": b"", "more_body": False}


async def call(app: ASGIApp, scope: Scope, receive: Receive = nothing) -> list[Message]:
    """What `app` sends, a message at a time."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def head_of(sent: Sequence[Message]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in sent[0]["headers"]}


def a_log() -> tuple[Log, logging.Logger]:
    handler = Log()
    log = logging.Logger("test")
    log.addHandler(handler)
    return handler, log


async def hello(scope: Scope, receive: Receive, send: Send) -> None:
    """The smallest application."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
    await send({"type": "http.response.body", "body": b"Hello"})


def line_of(told: str, formatter: logging.Formatter, error: BaseException | None = None) -> str:
    attributes: dict[str, object] = {"msg": f"request {told}", "fields": {"told": told}}
    if error is not None:
        attributes["exc_info"] = (type(error), error, error.__traceback__)
    return formatter.format(logging.makeLogRecord(attributes))


# The request id


@pytest.mark.parametrize("asked", ["a", "A-z0.9_:+/=-", "0", "x" * 128])
async def test_a_callers_own_request_id_is_kept(asked: str) -> None:
    handler, log = a_log()
    sent = await call(RequestContext(hello, log, Metrics()), scope_of(x_request_id=asked))
    assert head_of(sent) == {
        "x-own": "1",
        "x-request-id": asked,
        "x-content-type-options": "nosniff",
    }
    assert (await handler.wait_for_request())["request_id"] == asked


@pytest.mark.parametrize(
    "asked", ["", "x" * 129, "a b", "a\n", "a\nb", "a\r\nset-cookie: b", "a,b", 'a"', "é", "a\x00"]
)
async def test_any_other_request_id_is_replaced(asked: str) -> None:
    handler, log = a_log()
    sent = await call(RequestContext(hello, log, Metrics()), scope_of(x_request_id=asked))
    made = head_of(sent)["x-request-id"]
    assert re.fullmatch("req_[0-9a-f]{32}", made)
    assert (await handler.wait_for_request())["request_id"] == made


async def test_ids_that_are_made_are_of_128_random_bits(service: StartService) -> None:
    app = await service()
    ids = [(await app.get("/healthz")).headers["x-request-id"] for _ in range(3)]
    assert all(re.fullmatch("req_[0-9a-f]{32}", each) for each in ids)
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "outcome"),
    [
        ("GET", "/healthz", None, {}, 200, "done"),
        ("POST", "/api/v1/chat", b'{"message":"Hi"}', JSON, 200, "done"),
        ("POST", "/api/v1/chat", b"{", JSON, 400, "invalid_json"),
        ("GET", "/healthz", None, {"host": "elsewhere"}, 400, "refused"),
        ("POST", "/api/v1/chat", b"{}", {"authorization": "Bearer x"}, 401, "invalid_api_key"),
        ("GET", "/nowhere", None, {}, 404, "not_found"),
        ("PUT", "/api/v1/chat", b"{}", JSON, 405, "method_not_allowed"),
        ("POST", "/api/v1/chat", b"x" * 100, JSON, 413, "body_too_large"),
        ("POST", "/api/v1/chat", b"{}", {}, 415, "unsupported_media_type"),
        ("POST", "/api/v1/chat", b"{}", JSON, 422, "invalid_request"),
        (
            "POST",
            "/api/v1/chat",
            b'{"message":"Hi","model_id":"mock/error"}',
            JSON,
            502,
            "upstream_error",
        ),
        (
            "POST",
            "/api/v1/chat",
            b'{"message":"Hi","model_id":"mock/truncated"}',
            JSON,
            200,
            "upstream_incomplete",
        ),
    ],
)
async def test_every_answer_has_the_id_and_one_line_that_says_how_it_ended(
    method: str,
    path: str,
    body: bytes | None,
    headers: dict[str, str],
    status: int,
    outcome: str,
    service: StartService,
) -> None:
    app = await service(ALLOWED_HOSTS="localhost", MAX_BODY_BYTES="64")
    client = await app.connect()
    reply = await client.request(method, path, body, {**headers, "x-request-id": "mine"})
    content = (await reply.body()).decode()
    assert (reply.status, reply.headers["x-request-id"]) == (status, "mine")
    assert reply.headers["x-content-type-options"] == "nosniff"
    if reply.headers["content-type"] == "application/json" and status >= 400:
        assert json.loads(content)["id"] == "mine"
    line = await app.log.wait_for_request()
    assert len(app.log.requests()) == 1
    told = (line["request_id"], line["method"], line["status"], line["outcome"])
    assert told == ("mine", method, status, outcome)


async def test_a_defect_is_answered_500_with_the_id_and_logged_with_its_trace_alone() -> None:
    handler, log = a_log()
    app = create_app(from_env({"STATE_URL": "memory://"}), log, Drain())
    told = "what the caller " + "said"

    async def receive() -> Message:
        raise RuntimeError(told)

    scope = scope_of("/api/v1/chat", "POST", content_type="application/json", x_request_id="mine")
    sent = await call(app, scope, receive)
    assert sent[0]["status"] == 500
    assert head_of(sent)["x-request-id"] == "mine"
    answer = json.loads(sent[1]["body"])
    assert (answer["error"]["code"], answer["id"]) == ("internal_error", "mine")
    line = await handler.wait_for_request()
    assert (line["level"], line["outcome"]) == ("error", "internal_error")
    assert "RuntimeError" in line["trace"]
    assert "raise RuntimeError(told)" in line["trace"]
    assert told not in handler.lines[0] + str(sent)
    await run_lifespan(app)


@pytest.mark.parametrize("status", [None, 200])
async def test_what_breaks_outside_of_all_handlers_is_logged_with_its_trace_and_goes_no_further(
    status: int | None,
) -> None:
    async def broken(scope: Scope, receive: Receive, send: Send) -> None:
        if status:
            await hello(scope, receive, send)
        raise ValueError

    handler, log = a_log()
    sent = await call(RequestContext(broken, log, Metrics()), scope_of())
    assert len(sent) == (2 if status else 0)
    line = await handler.wait_for_request()
    assert (line["level"], line["status"]) == ("error", status)
    assert "ValueError" in line["trace"]


async def test_only_http_has_records_and_lines() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    handler, log = a_log()
    await call(RequestContext(app, log, Metrics()), {"type": "lifespan"})
    assert seen == [{"type": "lifespan"}]
    assert handler.lines == []


# The trace context


@pytest.mark.parametrize(
    ("traceparent", "kept"),
    [
        (TRACEPARENT, True),
        ("cc" + TRACEPARENT[2:], True),
        ("", False),
        (TRACEPARENT.upper(), False),
        (TRACEPARENT[:-1], False),
        (TRACEPARENT + "0", False),
        (TRACEPARENT + "\n", False),
        (TRACEPARENT.replace("-", "_"), False),
    ],
)
async def test_a_traceparent_is_kept_as_it_came_or_not_at_all(traceparent: str, kept: bool) -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"]["record"].traceparent)
        await hello(scope, receive, send)

    handler, log = a_log()
    await call(RequestContext(app, log, Metrics()), scope_of(traceparent=traceparent))
    assert seen == [traceparent if kept else None]
    line = await handler.wait_for_request()
    assert line.get("trace_id") == ("0af7651916cd43dd8448eb211c80319c" if kept else None)


# The line


async def test_a_line_tells_times_on_the_clock_it_was_given_and_what_the_handler_added() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        record = scope["state"]["record"]
        record.headers["X-More"] = "2"
        record.outcome = "as it ended"
        record.waited = 0.2
        record.fields |= {"caller": "app", "chunks": 3}
        await hello(scope, receive, send)

    handler, log = a_log()
    ticks = iter([10.0, 10.25])
    app_in_context = RequestContext(app, log, Metrics(), clock=lambda: next(ticks))
    sent = await call(app_in_context, scope_of("/somewhere", "POST", x_request_id="mine"))
    assert head_of(sent)["x-own"] == "1"
    assert head_of(sent)["x-more"] == "2"
    line = await handler.wait_for_request()
    assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert line == {
        "level": "info",
        "event": "request",
        "request_id": "mine",
        "method": "POST",
        "route": "unmatched",
        "status": 200,
        "outcome": "as it ended",
        "ms": 250.0,
        "overhead_ms": 50.0,
        "caller": "app",
        "chunks": 3,
    }


async def test_a_chats_line_tells_who_asked_whom_and_what_came_of_it(
    service: StartService, upstream: StartUpstream
) -> None:
    async def script(request: Connection) -> None:
        await request.complete("Hel", "lo")

    provider = await upstream(script)
    app = await service(OPENAI_API_KEY=CANARY, OPENAI_BASE_URL=provider.url)
    client = await app.connect()
    reply = await client.chat("Sesame", {"traceparent": TRACEPARENT}, session_id="my-session")
    await reply.events()
    line = await app.log.wait_for_request()
    expected = {
        "level": "info",
        "route": "/api/v1/chat",
        "outcome": "done",
        "trace_id": TRACEPARENT[3:35],
        "caller": "127.0.0.0/24",
        "session": short_hash("my-session"),
        "requested_model": "openai/gpt-4o-mini",
        "provider": "openai",
        "model": "m-1",
        "finish_reason": "stop",
        "attempts": [
            {
                "model": "openai/gpt-4o-mini",
                "status": 200,
                "provider_request_id": "up_1",
                "error": None,
                "cause": None,
            }
        ],
        "chunks": 2,
    }
    assert {name: line[name] for name in expected} == expected
    assert 0 <= line["overhead_ms"] <= line["ms"]
    assert 0 <= line["ttft_ms"] <= line["ms"]
    assert provider.requests[0].headers["traceparent"] == TRACEPARENT
    for secret in ("Sesame", "Hel", "my-session", CANARY, "127.0.0.1"):
        assert secret not in app.log.lines[-1]


async def test_every_line_tells_from_where_it_was_asked(service: StartService) -> None:
    app = await service(FORWARDED_ALLOW_IPS="127.0.0.1")
    client = await app.connect()
    for headers in ({}, {"x-forwarded-for": "2001:db8:1:2::3"}, {"x-forwarded-for": "mine"}):
        await (await client.request("GET", "/nowhere", headers=headers)).body()
    callers = [line["caller"] for line in app.log.requests()]
    assert callers == ["127.0.0.0/24", "2001:db8:1::/48", "unknown"]


@pytest.mark.parametrize("leaves", [True, False])
async def test_time_in_which_a_body_is_waited_for_is_not_ours(
    leaves: bool, service: StartService
) -> None:
    app = await service(BODY_TIMEOUT_SECONDS="60" if leaves else "0.2")
    client = await app.connect()
    head = "POST /api/v1/chat HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    client.writer.write(f"{head}expect: 100-continue\r\ncontent-length: 9\r\n\r\n".encode())
    assert b"100 Continue" in await client.reader.readline()
    if leaves:
        client.disconnect()
    line = await app.log.wait_for_request()
    assert line["outcome"] == ("client_disconnected" if leaves else "request_timeout")
    assert leaves or line["overhead_ms"] <= line["ms"] - 100
    own = await app.metric('chat_overhead_seconds_sum{route="/api/v1/chat"}')
    assert own < await app.metric('chat_request_duration_seconds_sum{route="/api/v1/chat"}')


async def test_what_a_provider_calls_things_is_logged_as_a_name_or_not_at_all(
    service: StartService, upstream: StartUpstream
) -> None:
    async def script(request: Connection) -> None:
        chunk = {"model": "what the caller said", "choices": [{"finish_reason": "x" * 129}]}
        head = HEAD.replace(b"up_1", b"u" * 1000)
        await request.send(head + http_chunk(event(chunk)) + http_chunk(DONE) + END)

    provider = await upstream(script)
    app = await service(OPENAI_API_KEY=CANARY, OPENAI_BASE_URL=provider.url)
    await (await app.chat()).events()
    line = await app.log.wait_for_request()
    assert (line["outcome"], line["model"], line["finish_reason"]) == ("done", None, None)
    assert line["attempts"][0]["provider_request_id"] == "u" * 128


async def test_a_line_says_why_each_attempt_failed_in_the_end(service: StartService) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
    app = await service(
        OPENAI_API_KEY=CANARY, OPENAI_BASE_URL=url, MAX_RETRIES="0", FALLBACK_MODELS="mock/error"
    )
    await (await app.chat()).body()
    line = await app.log.wait_for_request()
    causes = [attempt["cause"] for attempt in line["attempts"]]
    assert causes == ["ConnectionRefusedError", None]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
async def test_probes_and_scrapes_are_logged_for_debugging_only_while_they_succeed(
    path: str, service: StartService
) -> None:
    app = await service()
    assert (await app.get(path)).status == 200
    assert (await app.log.wait_for_request())["level"] == "debug"
    refused = await (await app.connect()).request("DELETE", path)
    assert refused.status == 405
    assert (await app.log.wait_for_request(1))["level"] == "info"


# What never shows


@pytest.mark.parametrize(
    ("host", "shown"),
    [
        ("192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1::/48"),
        ("::ffff:192.0.2.77", "192.0.2.0/24"),
        ("fe80::1%eth0", "fe80::/48"),
        ("unknown", "unknown"),
        ("", "unknown"),
    ],
)
def test_an_address_is_shortened(host: str, shown: str) -> None:
    assert short_address(host) == shown


def test_a_hash_follows_a_value_and_does_not_give_it_away() -> None:
    assert short_hash("s_1") == short_hash("s_1") != short_hash("s_2")
    assert re.fullmatch("[0-9a-f]{12}", short_hash("s_1"))


texts = st.text(st.one_of(st.characters(), st.sampled_from('\n\r\x85\u2028\x1b"\\{}\x00\x7f')))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@patient
@given(texts, st.dictionaries(st.text().map("a_{}".format), values, max_size=4))
def test_whatever_a_line_tells_it_is_one_line_of_json_that_says_so(
    message: str, fields: dict[str, Any]
) -> None:
    attributes = {"msg": "%s", "args": (message,), "fields": fields}
    line = JSONFormatter().format(logging.makeLogRecord(attributes))
    assert re.fullmatch("[ -~]*", line)
    entry = json.loads(line)
    assert {name: entry[name] for name in fields} == fields
    assert len(entry) == 3 + len(fields)


@FORMATTERS
@patient
@given(told=texts)
def test_no_value_begins_a_line_or_reaches_the_terminal(
    formatter: logging.Formatter, told: str
) -> None:
    assert re.fullmatch("[ -~]*", line_of(told, formatter))


@FORMATTERS
def test_what_is_not_json_is_logged_as_its_text(formatter: logging.Formatter) -> None:
    attributes = {"msg": "request", "fields": {"told": {1j}}}
    assert '"{1j}"' in formatter.format(logging.makeLogRecord(attributes))


def test_a_line_for_a_person_has_time_level_event_and_fields() -> None:
    attributes = {"levelname": "WARNING", "msg": "Look at %s", "args": ("it",)}
    bare = TextFormatter().format(logging.makeLogRecord(attributes))
    assert re.fullmatch("[0-9]{2}:[0-9]{2}:[0-9]{2} warning Look at it", bare)
    attempts = [{"model": "mock/echo", "status": None, "error": "e"}]
    fields = {"status": 200, "caller": "a b", "usage": None, "attempts": attempts}
    told = TextFormatter().format(logging.makeLogRecord({**attributes, "fields": fields}))
    assert told[8:] == f'{bare[8:]} status=200 caller="a b" attempts=[{{model=mock/echo error=e}}]'


@patient
@given(texts)
@example('x"y')
def test_at_a_terminal_no_value_passes_for_a_field_or_for_the_end_of_one(told: str) -> None:
    shown = line_of(told, TextFormatter()).partition("told=")[2]
    assert re.fullmatch(r'[A-Za-z0-9._:/+@-]+|"([^"\\]|\\.)*"', shown)


# Each raises an error whose text is `told`; the source line that a trace quotes does not hold it.


def raise_plain(told: str) -> None:
    raise KeyError(told)


def raise_from_another(told: str) -> None:
    # Not while it is handled: the cause is not the context.
    raise ValueError(told) from caught(raise_plain, told)


def raise_while_handling(told: str) -> None:
    try:
        raise_plain(told)
    except KeyError:
        raise ValueError(told)  # noqa: B904 - the context is what is looked at


def raise_in_a_group(told: str) -> None:
    try:
        raise_plain(told)
    except KeyError as error:
        raise ExceptionGroup(told, [ValueError(told), error])  # noqa: B904 - as task groups do


def caught(raise_it: Callable[[str], None], told: str) -> Exception:
    try:
        raise_it(told)
    except Exception as error:
        return error
    raise AssertionError


@FORMATTERS
@pytest.mark.parametrize(
    "raise_it", [raise_plain, raise_from_another, raise_while_handling, raise_in_a_group]
)
def test_a_trace_shows_where_it_broke_and_what_caused_it_and_no_errors_own_text(
    raise_it: Callable[[str], None], formatter: logging.Formatter
) -> None:
    shown = line_of("", formatter, caught(raise_it, "what the caller said"))
    assert "KeyError" in shown
    assert "raise KeyError(told)" in shown
    assert ("ValueError" in shown) == (raise_it is not raise_plain)
    assert "what the caller said" not in shown


def test_a_group_that_task_groups_raise_shows_what_it_holds() -> None:
    error = ExceptionGroup("", [caught(raise_plain, ""), OSError()])
    shown = line_of("", TextFormatter(), error)
    assert "raise KeyError(told)" in shown
    assert "OSError" in shown


class Circular(Exception):
    """An error that is its own cause, as `raise a from b` with an `a` that caused `b` makes it."""

    asked = 0

    @property
    def __cause__(self) -> BaseException:  # type: ignore[override] # counts how often it is asked
        self.asked += 1
        assert self.asked < 10, "the trace goes round and round"
        return self


def test_a_trace_of_errors_that_cause_each_other_ends() -> None:
    assert "Circular" in line_of("", TextFormatter(), Circular())


@FORMATTERS
def test_a_log_call_without_an_error_has_no_trace(formatter: logging.Formatter) -> None:
    record = logging.makeLogRecord({"msg": "told"})
    without = formatter.format(record)
    record.exc_info = (None, None, None)  # what exc_info=True gives outside of a handler
    assert formatter.format(record) == without


# Metrics


def series(text: str, prefix: str = "chat_") -> dict[str, float]:
    """The values in an exposition, by series, times of creation left out."""
    rows = [row.rpartition(" ") for row in text.splitlines() if row.startswith(prefix)]
    return {name: float(value) for name, _, value in rows if "_created" not in name}


async def test_a_chat_leaves_these_numbers(service: StartService, upstream: StartUpstream) -> None:
    async def script(request: Connection) -> None:
        await request.complete("Hel", "lo")

    provider = await upstream(script)
    app = await service(OPENAI_API_KEY=CANARY, OPENAI_BASE_URL=provider.url)
    await (await app.chat()).events()
    await app.log.wait_for_request()
    found = series((await (await app.get("/metrics")).body()).decode())
    expected = {
        'chat_requests_total{outcome="done",route="/api/v1/chat",status="200"}': 1,
        'chat_request_duration_seconds_count{route="/api/v1/chat"}': 1,
        'chat_request_duration_seconds_bucket{le="+Inf",route="/api/v1/chat"}': 1,
        'chat_overhead_seconds_count{route="/api/v1/chat"}': 1,
        "chat_time_to_first_token_seconds_count": 1,
        "chat_max_chunk_gap_seconds_count": 1,
        'chat_chunks_total{model="gpt-4o-mini",provider="openai"}': 2,
        'chat_tokens_total{kind="prompt_tokens",model="gpt-4o-mini",provider="openai"}': 1,
        'chat_tokens_total{kind="completion_tokens",model="gpt-4o-mini",provider="openai"}': 2,
        "chat_active_streams": 0,
    }
    assert {name: found.get(name) for name in expected} == expected
    assert 0 < found["chat_first_piece_seconds_sum"] < 60
    assert len(series((await (await app.get("/metrics")).body()).decode(), "process_")) > 3


async def test_retries_and_failovers_are_counted_by_the_error_before_them(
    service: StartService, upstream: StartUpstream
) -> None:
    async def script(request: Connection) -> None:
        if request.body["model"] == "gpt-4o-mini":
            await request.send(response(500, b"{}"))
        elif len(provider.requests) == 2:
            await request.send(response(429, b"{}", "retry-after-ms: 1"))
        else:
            await request.complete("Hello")

    provider = await upstream(script)
    env = {"OPENAI_API_KEY": CANARY, "OPENAI_BASE_URL": provider.url, "FALLBACK_MODELS": "other"}
    app = await service(**env)
    await (await app.chat()).events()
    await app.log.wait_for_request()
    found = series((await (await app.get("/metrics")).body()).decode(), "chat_further")
    assert found == {
        'chat_upstream_retries_total{error="upstream_error",kind="failover"}': 1,
        'chat_upstream_retries_total{error="upstream_unavailable",kind="retry"}': 1,
    }


async def test_a_refusal_is_counted_by_its_code_and_has_no_first_piece(
    service: StartService,
) -> None:
    app = await service(RATE_LIMIT="1/day")
    for _ in range(2):
        await (await app.chat(model_id="mock/error")).body()
    requests = 'chat_requests_total{{outcome="{}",route="/api/v1/chat",status="{}"}}'
    assert await app.metric(requests.format("upstream_error", 502)) == 1
    assert await app.metric(requests.format("rate_limited", 429)) == 1
    assert await app.metric('chat_rate_limited_total{caller="anonymous"}') == 1
    assert await app.metric("chat_time_to_first_token_seconds_count") == 0


async def test_durations_are_measured_on_the_clock_that_was_given() -> None:
    _, log = a_log()
    metrics = Metrics()
    ticks = iter([1.0, 3.0])
    await call(RequestContext(hello, log, metrics, clock=lambda: next(ticks)), scope_of())
    found = series(generate_latest(metrics.registry).decode(), "chat_request_duration_seconds")
    assert found['chat_request_duration_seconds_sum{route="unmatched"}'] == 2
    assert found['chat_request_duration_seconds_bucket{le="1.0",route="unmatched"}'] == 0
    assert found['chat_request_duration_seconds_bucket{le="2.0",route="unmatched"}'] == 1


def labels(found: Iterable[str], label: str) -> set[str]:
    return {match[1] for name in found if (match := re.search(f'{label}="([^"]*)"', name))}


async def test_what_is_asked_for_and_does_not_exist_never_becomes_a_label(
    service: StartService,
) -> None:
    app = await service()
    client = await app.connect()
    for number in range(5):
        await (await client.request("GET", f"/made/up/{number}")).body()
        await (await client.request("DELETE", f"/healthz?{number}")).body()
    found = series((await (await client.request("GET", "/metrics")).body()).decode())
    assert labels(found, "route") == {"unmatched", "/healthz"}
    assert "made" not in str(found)


async def test_a_model_that_only_a_glob_allows_never_becomes_a_label(service: StartService) -> None:
    app = await service(RATE_LIMIT="off")
    client = await app.connect()
    for number in range(3):
        await (await client.chat(model_id=f"mock/made-up-{number}")).events()
    found = series((await (await client.request("GET", "/metrics")).body()).decode())
    assert len(labels(found, "model")) == 1


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": -1}, {"completion_tokens": 10**400}, {"prompt_tokens": "many"}]
)
async def test_token_counts_that_make_no_sense_spoil_neither_the_answer_nor_the_metrics(
    usage: dict[str, object], service: StartService, upstream: StartUpstream
) -> None:
    async def script(request: Connection) -> None:
        await request.stream(
            delta("Hi"), delta(finish_reason="stop"), event({"choices": [], "usage": usage}), DONE
        )
        await request.send(END)

    provider = await upstream(script)
    app = await service(OPENAI_API_KEY=CANARY, OPENAI_BASE_URL=provider.url)
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "Hi"
    assert (await app.log.wait_for_request())["outcome"] == "done"
    assert (await reply.event())["status"] == "done"
    assert await app.metric("chat_tokens_total") == 0


async def test_two_services_count_apart(service: StartService) -> None:
    one, two = await service(), await service()
    await (await one.chat()).events()
    requests = 'chat_requests_total{outcome="done",route="/api/v1/chat"'
    await one.log.wait_for_request()
    assert (await one.metric(requests), await two.metric(requests)) == (1, 0)


async def test_metrics_off_removes_the_route(service: StartService) -> None:
    app = await service(METRICS="off")
    assert (await app.get("/metrics")).status == 404
