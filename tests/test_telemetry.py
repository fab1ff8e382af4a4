"""Request ids, log lines that no value can forge, and metrics whose labels no client can invent."""

import json
import logging
import platform
import re
import socket
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from prometheus_client import generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import VERSION
from telemetry import (
    Attempt,
    JSONFormatter,
    Metrics,
    RequestContext,
    RequestRecord,
    StreamReport,
    TextFormatter,
    short_address,
    short_hash,
)
from tests.client import CANARY
from tests.conftest import RunningService, StartRelay, StartService, StartUpstream, create_log
from tests.upstream import DONE, END, HEAD, Connection, event, http_chunk, response

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"
FORMATTERS = pytest.mark.parametrize("formatter", [JSONFormatter(), TextFormatter()])


def create_scope(path: str = "/", method: str = "GET", **headers: str) -> Scope:
    pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return {
        "type": "http",
        "method": method,
        "path": path,
        "headers": [(name.encode(), value.encode("latin-1")) for name, value in pairs],
        "client": ("127.0.0.1", 1),
    }


async def call(app: ASGIApp, scope: Scope) -> list[Message]:
    """Return the messages that `app` sends."""
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent


def headers_of(sent: Sequence[Message]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in sent[0]["headers"]}


async def send_hello(scope: Scope, receive: Receive, send: Send) -> None:
    """The smallest ASGI application."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
    await send({"type": "http.response.body", "body": b"Hello"})


def series(text: str, prefix: str = "chat_") -> dict[str, float]:
    """Return the values of the series in an exposition, without times of creation."""
    rows = [row.rpartition(" ") for row in text.splitlines() if row.startswith(prefix)]
    return {name: float(value) for name, _, value in rows if "_created" not in name}


async def scrape(app: RunningService, prefix: str = "chat_") -> dict[str, float]:
    reply = await app.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    return series((await reply.body()).decode(), prefix)


# ---- request id and trace context


@pytest.mark.parametrize(
    ("given_id", "kept"),
    [
        *[(each, True) for each in ("a", "A-z0.9_:+/=-", "0", "x" * 128)],
        *[(each, False) for each in ("", "x" * 129, "a b", "a\n", "a\nb", "a\r\nset-cookie: b")],
        *[(each, False) for each in ("a,b", 'a"', "é", "a\x00")],
    ],
)
async def test_valid_request_id_is_kept_and_any_other_replaced(given_id: str, kept: bool) -> None:
    handler, log = create_log()
    app = RequestContext(send_hello, log, Metrics("1"))
    sent = await call(app, create_scope(x_request_id=given_id))
    headers = headers_of(sent)
    assert headers.keys() == {"x-own", "x-request-id", "x-content-type-options"}
    request_id = headers["x-request-id"]
    assert request_id == given_id if kept else re.fullmatch("req_[0-9a-f]{32}", request_id)
    assert (await handler.wait_for_request())["request_id"] == request_id


async def test_generated_request_ids_differ(service: StartService) -> None:
    app = await service()
    ids = [(await app.get("/healthz")).headers["x-request-id"] for _ in range(3)]
    assert all(re.fullmatch("req_[0-9a-f]{32}", each) for each in ids)
    assert len(set(ids)) == 3


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
async def test_only_a_valid_traceparent_is_kept(traceparent: str, kept: bool) -> None:
    seen = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope["state"]["record"].traceparent)
        await send_hello(scope, receive, send)

    handler, log = create_log()
    await call(RequestContext(app, log, Metrics("1")), create_scope(traceparent=traceparent))
    assert seen == [traceparent if kept else None]
    assert (await handler.wait_for_request()).get("trace_id") == (TRACE_ID if kept else None)


async def test_other_scopes_than_http_pass_through_without_a_record() -> None:
    seen: list[Scope] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        seen.append(scope)

    handler, log = create_log()
    await call(RequestContext(app, log, Metrics("1")), {"type": "lifespan"})
    assert seen == [{"type": "lifespan"}]
    assert handler.lines == []


# ---- one log line per request


@pytest.mark.parametrize("status", [None, 200])
async def test_exception_outside_all_handlers_is_logged_with_its_traceback(
    status: int | None,
) -> None:
    async def fail(scope: Scope, receive: Receive, send: Send) -> None:
        if status:
            await send_hello(scope, receive, send)
        raise ValueError

    handler, log = create_log()
    sent = await call(RequestContext(fail, log, Metrics("1")), create_scope())
    assert len(sent) == (2 if status else 0)
    line = await handler.wait_for_request()
    assert (line["level"], line["status"], line["outcome"]) == ("error", status, "internal_error")
    assert "ValueError" in line["trace"]


async def test_log_line_and_histograms_have_times_of_the_given_clock() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        record = scope["state"]["record"]
        record.headers["X-More"] = "2"
        record.outcome = "some_outcome"
        record.wait_seconds = 0.2
        record.fields |= {"caller": "app", "chunks": 3}
        await send_hello(scope, receive, send)

    handler, log = create_log()
    ticks, metrics = iter([10.0, 10.25]), Metrics("1")
    context = RequestContext(app, log, metrics, clock=lambda: next(ticks))
    sent = await call(context, create_scope("/somewhere", "POST", x_request_id="mine"))
    assert headers_of(sent)["x-own"] == "1"
    assert headers_of(sent)["x-more"] == "2"
    line = await handler.wait_for_request()
    assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert line == {
        "level": "info",
        "event": "request",
        "request_id": "mine",
        "method": "POST",
        "route": "unmatched",
        "status": 200,
        "outcome": "some_outcome",
        "duration_ms": 250.0,
        "overhead_ms": 50.0,
        "caller": "app",
        "chunks": 3,
    }
    found = series(generate_latest(metrics.registry).decode())
    assert found['chat_request_duration_seconds_sum{route="unmatched"}'] == 0.25
    assert found['chat_request_duration_seconds_bucket{le="0.1",route="unmatched"}'] == 0
    assert found['chat_request_duration_seconds_bucket{le="0.3",route="unmatched"}'] == 1
    assert found['chat_overhead_seconds_sum{route="unmatched"}'] == pytest.approx(0.05)


async def send_two_chunks(request: Connection) -> None:
    await request.complete("Hel", "lo")


async def test_chat_is_reported_in_the_log_and_the_metrics(relay: StartRelay) -> None:
    app, provider = await relay(send_two_chunks)
    client = await app.connect()
    reply = await client.chat("Sesame", {"traceparent": TRACEPARENT}, session_id="my-session")
    await reply.events()
    line = await app.log.wait_for_request()
    expected = {
        "level": "info",
        "route": "/api/v1/chat",
        "outcome": "done",
        "trace_id": TRACE_ID,
        "caller": "127.0.0.0/24",
        "session": short_hash("my-session"),
        "requested_model": "openai/gpt-4o-mini",
        "provider": "openai",
        "model": "m-1",
        "finish_reason": "stop",
        "prompt_tokens": 1,
        "completion_tokens": 2,
        "attempts": [
            {
                "model": "openai/gpt-4o-mini",
                "status": 200,
                "provider_request_id": "up_1",
                "error": None,
                "cause": None,
                "reason": None,
            }
        ],
        "chunks": 2,
    }
    assert {name: line[name] for name in expected} == expected
    for part in ("overhead_ms", "ttft_ms", "max_chunk_gap_ms"):
        assert 0 <= line[part] <= line["duration_ms"]
    assert provider.requests[0].headers["traceparent"] == TRACEPARENT
    for secret in ("Sesame", "Hel", "my-session", CANARY, "127.0.0.1"):
        assert secret not in app.log.lines[-1]
    found = await scrape(app)
    counts = {
        'chat_requests_total{outcome="done",route="/api/v1/chat",status="200"}': 1,
        'chat_request_duration_seconds_count{route="/api/v1/chat"}': 1,
        'chat_overhead_seconds_count{route="/api/v1/chat"}': 1,
        "chat_time_to_first_token_seconds_count": 1,
        "chat_max_chunk_gap_seconds_count": 1,
        'chat_chunks_total{model="gpt-4o-mini",provider="openai"}': 2,
        'chat_tokens_total{kind="prompt_tokens",model="gpt-4o-mini",provider="openai"}': 1,
        'chat_tokens_total{kind="completion_tokens",model="gpt-4o-mini",provider="openai"}': 2,
        "chat_active_streams": 0,
        f'chat_build_info{{python="{platform.python_version()}",version="{VERSION}"}}': 1,
    }
    assert {name: found.get(name) for name in counts} == counts
    assert len(await scrape(app, "process_")) > 3


async def test_log_line_has_the_network_of_the_caller(service: StartService) -> None:
    app = await service(FORWARDED_ALLOW_IPS="127.0.0.1")
    client = await app.connect()
    for headers in ({}, {"x-forwarded-for": "2001:db8:1:2::3"}, {"x-forwarded-for": "mine"}):
        await (await client.request("GET", "/nowhere", headers=headers)).body()
    await app.log.wait_for_request(2)
    callers = [line["caller"] for line in app.log.requests()]
    assert callers == ["127.0.0.0/24", "2001:db8:1::/48", "unknown"]


@pytest.mark.parametrize("disconnects", [True, False])
async def test_waiting_for_a_body_is_not_overhead(disconnects: bool, service: StartService) -> None:
    app = await service(BODY_TIMEOUT_SECONDS="60" if disconnects else "0.2")
    client = await app.connect()
    head = "POST /api/v1/chat HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
    client.writer.write(f"{head}expect: 100-continue\r\ncontent-length: 9\r\n\r\n".encode())
    assert b"100 Continue" in await client.reader.readline()
    if disconnects:
        client.disconnect()
    line = await app.log.wait_for_request()
    assert line["outcome"] == ("client_disconnected" if disconnects else "request_timeout")
    assert disconnects or line["overhead_ms"] <= line["duration_ms"] - 100
    overhead = await app.metric('chat_overhead_seconds_sum{route="/api/v1/chat"}')
    assert overhead < await app.metric('chat_request_duration_seconds_sum{route="/api/v1/chat"}')


async def test_untrusted_names_from_a_provider_are_truncated_or_not_logged(
    relay: StartRelay,
) -> None:
    async def script(request: Connection) -> None:
        chunk = {"model": "several words", "choices": [{"finish_reason": "x" * 129}]}
        head = HEAD.replace(b"up_1", b"u" * 1000)
        await request.send(head + http_chunk(event(chunk)) + http_chunk(DONE) + END)

    app, _ = await relay(script)
    await (await app.chat()).events()
    line = await app.log.wait_for_request()
    assert (line["outcome"], line["model"], line["finish_reason"]) == ("done", None, None)
    assert line["attempts"][0]["provider_request_id"] == "u" * 128


async def test_log_line_names_the_first_cause_of_each_failed_attempt(service: StartService) -> None:
    with socket.socket() as unreachable:
        unreachable.bind(("127.0.0.1", 0))
        app = await service(
            OPENAI_API_KEY=CANARY,
            OPENAI_BASE_URL=f"http://127.0.0.1:{unreachable.getsockname()[1]}/v1",
            MAX_RETRIES="0",
            FALLBACK_MODELS="mock/error",
        )
        await (await app.chat()).body()
    line = await app.log.wait_for_request()
    causes = [attempt["cause"] for attempt in line["attempts"]]
    assert causes == ["ConnectionRefusedError", None]


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
async def test_successful_probes_are_logged_at_debug_level(
    path: str, service: StartService
) -> None:
    app = await service()
    assert (await app.get(path)).status == 200
    assert (await app.log.wait_for_request())["level"] == "debug"
    rejected = await (await app.connect()).request("DELETE", path)
    assert rejected.status == 405
    assert (await app.log.wait_for_request(1))["level"] == "info"


# ---- the text of a log line


@pytest.mark.parametrize(
    ("host", "network"),
    [
        ("192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1::/48"),
        ("::ffff:192.0.2.77", "192.0.2.0/24"),
        ("fe80::1%eth0", "fe80::/48"),
        ("unknown", "unknown"),
        ("", "unknown"),
    ],
)
def test_address_is_shortened_to_its_network(host: str, network: str) -> None:
    assert short_address(host) == network


def test_short_hash_is_stable_and_does_not_contain_the_value() -> None:
    assert short_hash("s_1") == short_hash("s_1") != short_hash("s_2")
    assert re.fullmatch("[0-9a-f]{12}", short_hash("s_1"))


def format_line(
    formatter: logging.Formatter,
    message: str,
    fields: dict[str, Any] | None = None,
    error: BaseException | None = None,
    level: str = "INFO",
) -> str:
    number = logging.getLevelNamesMapping()[level]
    attributes = {"msg": "%s", "args": (message,), "levelname": level, "levelno": number}
    extra: dict[str, Any] = {"fields": fields} if fields else {}
    if error is not None:
        extra["exc_info"] = (type(error), error, error.__traceback__)
    return formatter.format(logging.makeLogRecord({**attributes, **extra}))


REQUEST = {
    "method": "POST",
    "route": "/api/v1/chat",
    "status": 200,
    "outcome": "done",
    "duration_ms": 69.4,
    "request_id": "req_1",
}
texts = st.text(st.one_of(st.characters(), st.sampled_from('\n\r\x85\u2028\x1b"\\{}\x00\x7f')))
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(texts, st.dictionaries(st.text().map("a_{}".format), values, max_size=4))
@example("\ud800", {})
def test_json_line_is_one_line_of_ascii_with_all_fields(
    message: str, fields: dict[str, Any]
) -> None:
    line = format_line(JSONFormatter(), message, fields)
    assert re.fullmatch("[ -~]*", line)
    entry = json.loads(line)
    assert entry["event"] == message
    assert {name: entry[name] for name in fields} == fields
    assert len(entry) == 3 + len(fields)


@given(texts)
@example("\x1b[2J\u202e\r\n")
def test_text_line_is_one_line_of_ascii(text: str) -> None:
    for line in (
        format_line(TextFormatter(), f"Look at {text}"),
        format_line(TextFormatter(), "request", {**REQUEST, "model": text}),
    ):
        assert re.fullmatch("[ -~]*", line)


def test_value_that_is_not_json_is_logged_as_its_text() -> None:
    assert '"1j"' in format_line(JSONFormatter(), "request", {"value": 1j})


@pytest.mark.parametrize(
    ("level", "shown"), [("INFO", "Look at it"), ("WARNING", "warning: Look at it")]
)
def test_text_line_has_the_time_the_message_and_no_level_for_info(level: str, shown: str) -> None:
    line = format_line(TextFormatter(), "Look at it", {"url": "http://x"}, level=level)
    assert re.fullmatch(rf"\d\d:\d\d:\d\d {shown}", line)


@pytest.mark.parametrize(
    ("fields", "shown"),
    [
        ({}, "POST /api/v1/chat 200 done 69 ms req_1"),
        (
            {
                "requested_model": "openai/gpt-4o-mini",
                "model": "gpt-4o-mini",
                "ttft_ms": 5.2,
                "prompt_tokens": 12,
                "completion_tokens": 34,
            },
            "POST /api/v1/chat 200 done 69 ms gpt-4o-mini ttft 5 ms 12+34 tokens req_1",
        ),
        (
            {
                "status": None,
                "outcome": "client_disconnected",
                "requested_model": "openai/gpt-4o-mini",
            },
            "POST /api/v1/chat client_disconnected 69 ms openai/gpt-4o-mini req_1",
        ),
    ],
)
def test_request_is_a_short_line_at_a_terminal(fields: dict[str, Any], shown: str) -> None:
    assert format_line(TextFormatter(), "request", REQUEST | fields)[9:] == shown


# ---- tracebacks. `text` is the exceptions' message; the quoted source lines do not contain it.


def raise_one(text: str) -> None:
    raise KeyError(text)


def raise_from_another(text: str) -> None:
    # Outside of a handler, so that only the cause is set, not the context.
    raise ValueError(text) from catch(raise_one, text)


def raise_while_handling(text: str) -> None:
    try:
        raise_one(text)
    except KeyError:
        raise ValueError(text)  # noqa: B904 - the test is about the context


def raise_group(text: str) -> None:
    try:
        raise_one(text)
    except KeyError as error:
        raise ExceptionGroup(text, [ValueError(text), error])  # noqa: B904 - as task groups do


def catch(function: Callable[[str], None], text: str) -> Exception:
    try:
        function(text)
    except Exception as error:
        return error
    raise AssertionError


@FORMATTERS
@pytest.mark.parametrize(
    "function", [raise_one, raise_from_another, raise_while_handling, raise_group]
)
def test_traceback_has_causes_contexts_and_group_members_without_messages(
    function: Callable[[str], None], formatter: logging.Formatter
) -> None:
    line = format_line(formatter, "Failed", error=catch(function, "a private text"))
    assert "KeyError" in line
    assert "raise KeyError(text)" in line
    assert ("ValueError" in line) == (function is not raise_one)
    assert "private" not in line


class CyclicError(Exception):
    """An exception that is its own cause."""

    reads = 0

    @property
    def __cause__(self) -> BaseException:  # type: ignore[override] # counts how often it is read
        self.reads += 1
        assert self.reads < 10, "the traceback does not end"
        return self


def test_traceback_of_a_cycle_of_causes_ends() -> None:
    assert "CyclicError" in format_line(TextFormatter(), "Failed", error=CyclicError())


@FORMATTERS
def test_line_without_an_exception_has_no_traceback(formatter: logging.Formatter) -> None:
    record = logging.makeLogRecord({"msg": "Done"})
    without = formatter.format(record)
    record.exc_info = (None, None, None)  # exc_info=True outside of an exception handler
    assert formatter.format(record) == without


# ---- metrics


async def test_retries_and_failovers_are_counted_with_provider_and_error(
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
    app = await service(
        OPENAI_API_KEY=CANARY,
        OPENAI_BASE_URL=provider.url,
        PROVIDERS="second",
        SECOND_BASE_URL=provider.url,
        FALLBACK_MODELS="second/other",
    )
    await (await app.chat()).events()
    await app.log.wait_for_request()
    name = 'chat_upstream_retries_total{{error="{}",kind="{}",provider="{}"}}'
    assert await scrape(app, "chat_upstream_retries") == {
        name.format("upstream_error", "failover", "openai"): 1,
        name.format("upstream_unavailable", "retry", "second"): 1,
    }


async def test_failed_and_limited_requests_are_counted_without_a_first_chunk(
    service: StartService,
) -> None:
    app = await service(RATE_LIMIT="1/day")
    for _ in range(2):
        await (await app.chat(model_id="mock/error")).body()
    await app.log.wait_for_request(1)
    requests = 'chat_requests_total{{outcome="{}",route="/api/v1/chat",status="{}"}}'
    found = await scrape(app)
    assert found[requests.format("upstream_error", 502)] == 1
    assert found[requests.format("rate_limited", 429)] == 1
    assert found['chat_rate_limited_total{caller="anonymous"}'] == 1
    assert found["chat_time_to_first_token_seconds_count"] == 0


async def test_unknown_paths_and_models_never_become_labels(service: StartService) -> None:
    app = await service(RATE_LIMIT="off")
    client = await app.connect()
    for number in range(3):
        await (await client.request("GET", f"/made-up/{number}")).body()
        await (await client.request("DELETE", f"/healthz?{number}")).body()
        await (await client.chat(model_id=f"mock/made-up-{number}")).events()
    names = "\n".join(await scrape(app))
    assert set(re.findall('route="([^"]*)"', names)) == {"unmatched", "/healthz", "/api/v1/chat"}
    assert set(re.findall('model="([^"]*)"', names)) == {"other"}


@pytest.mark.parametrize(
    "usage", [{"prompt_tokens": -1}, {"completion_tokens": 10**400}, {"prompt_tokens": "many"}]
)
def test_invalid_token_counts_are_not_counted(usage: dict[str, Any]) -> None:
    metrics, record = Metrics("1"), RequestRecord("req_1", None, 0.0)
    report = StreamReport(outcome="done", usage=usage)
    metrics.finish_stream(record, report, [Attempt("openai/m")], {"openai/m"})
    assert record.fields.keys().isdisjoint(usage)
    assert series(generate_latest(metrics.registry).decode(), "chat_tokens") == {}
