"""Retries and failover: only before the first chunk, within the first-token timeout, and logged."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import anyio
import pytest

from errors import Code
from openai_stream import Chunks
from providers import Call, Completion, LLMProvider, Message, Sink, Target, complete
from settings import from_env
from tests.conftest import raises
from tests.faults import STATUS, expected_level, get_outcome, read_to_end, run_scenario
from tests.test_stream import JumpingLoop
from tests.upstream import Connection, Script, delta, event, response

RETRY_NOW = "retry-after-ms: 1"
QUOTA = b'{"error":{"code":"insufficient_quota"}}'


def create_params(rows: Mapping[str, object], quick: Collection[str]) -> list[object]:
    """Return the rows as parameters. Those not in `quick` run with `make test-all` only."""
    assert set(quick) <= rows.keys()
    return [
        pytest.param(row, id=name, marks=() if name in quick else pytest.mark.slow)
        for name, row in rows.items()
    ]


# ---- scripts of providers


async def send_hello(request: Connection) -> None:
    await request.complete("Hel", "lo")


async def close(request: Connection) -> None:
    request.writer.close()


async def reset(request: Connection) -> None:
    request.reset()


async def send_nothing(request: Connection) -> None:
    await request.closed.wait()


async def fail_after_reasoning(request: Connection) -> None:
    reasoning = {"choices": [{"index": 0, "delta": {"reasoning_content": "hm"}}]}
    await request.stream(event(reasoning), event({"error": "no"}))


def send_status(code: int, *headers: str, body: bytes = b"{}") -> Script:
    async def script(request: Connection) -> None:
        await request.send(response(code, body, *headers))

    return script


def in_turn(*scripts: Script) -> Script:
    """Return a script that plays the first of `scripts` for the first request, and so on."""
    remaining = list(scripts)

    async def script(request: Connection) -> None:
        await remaining.pop(0)(request)

    return script


def retry_after(seconds: float) -> str:
    """Return a Retry-After header with a date."""
    return "retry-after: " + format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), True)


# ---- retries

RETRIED = {
    "closed": close,
    "reset": reset,
    "408": send_status(408, RETRY_NOW),
    "409": send_status(409, RETRY_NOW),
    "429_milliseconds": send_status(429, RETRY_NOW),
    "429_seconds": send_status(429, "retry-after: 0"),
    "429_past_date": send_status(429, retry_after(-3600)),
    "429_malformed_wait": send_status(429, "retry-after: soon"),
    "429_no_wait": send_status(429),
    "500": send_status(500, RETRY_NOW),
    "502": send_status(502, RETRY_NOW),
    "503": send_status(503, RETRY_NOW),
    "504": send_status(504, RETRY_NOW),
    "529": send_status(529, RETRY_NOW),
    "400_should_retry": send_status(400, "x-should-retry: true", RETRY_NOW),
}


@pytest.mark.parametrize("failure", create_params(RETRIED, {"closed", "429_milliseconds", "503"}))
async def test_temporary_failure_is_retried(failure: Script) -> None:
    async with run_scenario(in_turn(failure, send_hello), MAX_RETRIES="2") as scenario:
        text, last = await read_to_end(await scenario.chat())
        assert (text, get_outcome(last)) == ("Hello", "done")
        ids = [request.headers["x-client-request-id"] for request in scenario.upstream.requests]
        assert ids == [last["id"], f"{last['id']}-2"]
        assert await scenario.read_responses() == [("Hello", True)]
        first, second = (await scenario.wait_for_log_line())["attempts"]
        assert first["error"] in STATUS
        assert second["error"] is None
        await scenario.assert_nothing_held()


ERROR, UNAVAILABLE = "upstream_error", "upstream_unavailable"
NOT_RETRIED = {
    "400": (send_status(400), ERROR),
    "401": (send_status(401, RETRY_NOW), ERROR),
    "403": (send_status(403), ERROR),
    "404": (send_status(404), ERROR),
    "422": (send_status(422), ERROR),
    "307": (send_status(307, "location: /"), ERROR),
    "quota": (send_status(429, RETRY_NOW, body=QUOTA), UNAVAILABLE),
    "should_not_retry": (send_status(500, "x-should-retry: false", RETRY_NOW), ERROR),
    "after_reasoning": (fail_after_reasoning, ERROR),
    # A wait beyond the first-token timeout.
    "429_minute": (send_status(429, "retry-after: 60"), UNAVAILABLE),
    "429_day": (send_status(429, "retry-after: 86400"), UNAVAILABLE),
    "503_date": (send_status(503, retry_after(3600)), UNAVAILABLE),
    **{
        f"{code}_hour": (send_status(code, "retry-after: 3600"), ERROR)
        for code in (408, 409, 500, 502, 504)
    },
}


@pytest.mark.parametrize(
    "row",
    create_params(NOT_RETRIED, {"401", "should_not_retry", "after_reasoning", "429_minute"}),
)
async def test_lasting_failure_is_not_retried(row: tuple[Script, str]) -> None:
    failure, code = row
    limits = {"MAX_RETRIES": "2", "FIRST_TOKEN_TIMEOUT_SECONDS": "30"}
    async with run_scenario(failure, **limits) as scenario:
        reply = await scenario.chat()
        _, last = await read_to_end(reply)
        assert (reply.status, get_outcome(last)) == (STATUS[code], code)
        assert len(scenario.upstream.requests) == 1
        attempts = (await scenario.wait_for_log_line())["attempts"]
        assert [attempt["error"] for attempt in attempts] == [code]
        assert await scenario.read_responses() == []
        await scenario.assert_nothing_held()


async def test_failure_after_the_first_chunk_is_neither_retried_nor_failed_over() -> None:
    chunk_read = asyncio.Event()

    async def script(request: Connection) -> None:
        await request.stream(delta("Hel"))
        await chunk_read.wait()
        request.reset()

    env = {"MAX_RETRIES": "2", "FALLBACK_MODELS": "b/m"}
    async with run_scenario(script, script, **env) as scenario:
        reply = await scenario.chat()
        await reply.event()
        chunk_read.set()
        _, last = await read_to_end(reply)
        assert get_outcome(last) == "upstream_error"
        assert [len(each.requests) for each in scenario.upstreams] == [1, 0]
        assert await scenario.read_responses() == [("Hel", False)]
        await scenario.assert_nothing_held()


@pytest.mark.parametrize("retries", [0, pytest.param(3, marks=pytest.mark.slow)])
async def test_request_is_retried_at_most_max_retries_times(retries: int) -> None:
    async with run_scenario(send_status(503, RETRY_NOW), MAX_RETRIES=str(retries)) as scenario:
        _, last = await read_to_end(await scenario.chat())
        assert get_outcome(last) == "upstream_unavailable"
        ids = [request.headers["x-client-request-id"] for request in scenario.upstream.requests]
        assert ids == [last["id"], *(f"{last['id']}-{n}" for n in range(2, retries + 2))]
        assert len((await scenario.wait_for_log_line())["attempts"]) == retries + 1
        await scenario.assert_nothing_held()


async def test_disconnect_ends_the_wait_for_a_retry() -> None:
    async with run_scenario(send_status(503, "retry-after: 20"), MAX_RETRIES="2") as scenario:
        client = await scenario.app.connect()
        chatting = asyncio.ensure_future(client.chat(session_id="mine"))
        await scenario.upstream.wait_for_request()
        # A whole request later, the service has read the 503.
        assert await scenario.app.metric("chat_active_streams") == 1
        chatting.cancel()
        client.disconnect()
        line = await scenario.wait_for_log_line()
        assert line["outcome"] == "client_disconnected"
        assert [attempt["error"] for attempt in line["attempts"]] == ["upstream_unavailable"]
        assert len(scenario.upstream.requests) == 1
        await scenario.assert_nothing_held()


# ---- unreachable providers


@asynccontextmanager
async def refuse_connections(tmp_path: Path) -> AsyncIterator[str]:
    """Reserve a port that does not listen."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"


@asynccontextmanager
async def ignore_connections(tmp_path: Path) -> AsyncIterator[str]:
    """Listen with a full backlog: connections are neither accepted nor refused."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for each in (first, second):
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


@asynccontextmanager
async def use_unknown_host(tmp_path: Path) -> AsyncIterator[str]:
    """Use a name that never resolves (RFC 6761, section 6.4)."""
    yield "http://unknown.invalid/v1"


@asynccontextmanager
async def use_untrusted_certificate(tmp_path: Path) -> AsyncIterator[str]:
    """Run a TLS server with a self-signed certificate."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    await anyio.run_process(["openssl", *request, "-keyout", str(key), "-out", str(certificate)])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    received: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        received.append(await reader.read())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    yield f"https://localhost:{port}/v1"
    server.close()
    assert received == []


UNREACHABLE = {
    "connection_refused": (refuse_connections, "upstream_error"),
    "connection_ignored": (ignore_connections, "upstream_timeout"),
    "unknown_host": (use_unknown_host, "upstream_error"),
    "untrusted_certificate": (use_untrusted_certificate, "upstream_error"),
}


@pytest.mark.parametrize("fallback", ["", "b/m"], ids=["retried", "failed_over"])
@pytest.mark.parametrize("row", create_params(UNREACHABLE, {"connection_refused"}))
async def test_unreachable_provider_is_retried_or_failed_over(
    row: tuple[Callable[[Path], AbstractAsyncContextManager[str]], str],
    fallback: str,
    tmp_path: Path,
) -> None:
    prepare, code = row
    outcome = "done" if fallback else code
    env = {"CONNECT_TIMEOUT_SECONDS": "2", "MAX_RETRIES": "1", "FALLBACK_MODELS": fallback}
    async with (
        prepare(tmp_path) as url,
        run_scenario(send_hello, send_hello, OPENAI_BASE_URL=url, **env) as scenario,
    ):
        reply = await scenario.chat()
        text, last = await read_to_end(reply)
        assert get_outcome(last) == outcome
        assert (reply.status, text) == ((200, "Hello") if fallback else (STATUS[code], ""))
        assert fallback or last["error"]["retryable"]
        line = await scenario.wait_for_log_line()
        assert (line["outcome"], line["level"]) == (outcome, expected_level(outcome))
        errors = [attempt["error"] for attempt in line["attempts"]]
        assert errors == ([code, None] if fallback else [code, code])
        await scenario.assert_nothing_held()


@pytest.mark.parametrize("end", [close, pytest.param(reset, marks=pytest.mark.slow)])
async def test_connection_that_the_provider_closed_while_idle_is_not_used_again(
    end: Script,
) -> None:
    async with run_scenario(send_hello) as scenario:
        await read_to_end(await scenario.chat())
        first = scenario.upstream.requests[0]
        await end(first)
        await first.closed.wait()
        text, last = await read_to_end(await scenario.chat())
        assert (text, get_outcome(last)) == ("Hello", "done")
        assert scenario.upstream.connections == 2
        await scenario.assert_nothing_held()


# ---- failover


@dataclass(frozen=True)
class Failover:
    """The scripts of three providers and the expected requests, attempts and outcome."""

    scripts: tuple[Script, Script, Script]
    requests: tuple[int, int, int]
    errors: list[str | None]
    outcome: str = "done"
    env: dict[str, str] = field(default_factory=dict)


BUSY = send_status(503, RETRY_NOW)
TIMEOUT: Code = "upstream_timeout"
FAILOVERS = {
    "first_responds": Failover((send_hello, send_hello, send_hello), (1, 0, 0), [None]),
    "first_fails": Failover(
        (send_status(500), send_hello, send_hello),
        (1, 1, 0),
        [ERROR, None],
        env={"MAX_RETRIES": "2"},
    ),
    "two_fail": Failover(
        (send_status(429, "retry-after: 60"), close, send_hello),
        (1, 1, 1),
        [UNAVAILABLE, ERROR, None],
    ),
    "wrong_key": Failover((send_status(401), send_hello, send_hello), (1, 1, 0), [ERROR, None]),
    "quota": Failover(
        (send_status(429, body=QUOTA), send_hello, send_hello), (1, 1, 0), [UNAVAILABLE, None]
    ),
    "all_fail": Failover(
        (close, send_status(500), send_status(503)),
        (1, 1, 1),
        [ERROR, ERROR, UNAVAILABLE],
        UNAVAILABLE,
    ),
    "only_the_last_is_retried": Failover(
        (BUSY, BUSY, BUSY), (1, 1, 3), [UNAVAILABLE] * 5, UNAVAILABLE, {"MAX_RETRIES": "2"}
    ),
    "after_reasoning": Failover(
        (fail_after_reasoning, send_hello, send_hello), (1, 0, 0), [ERROR], ERROR
    ),
}


@pytest.mark.parametrize(
    "row", create_params(FAILOVERS, {"first_fails", "only_the_last_is_retried"})
)
async def test_failure_before_the_first_chunk_fails_over_to_the_next_model(row: Failover) -> None:
    env = {"FALLBACK_MODELS": "b/m-b,c/m-c", **row.env}
    async with run_scenario(*row.scripts, **env) as scenario:
        reply = await scenario.chat()
        text, last = await read_to_end(reply)
        assert get_outcome(last) == row.outcome
        assert reply.status == (200 if row.outcome == "done" else STATUS[row.outcome])
        assert tuple(len(each.requests) for each in scenario.upstreams) == row.requests
        line = await scenario.wait_for_log_line()
        assert [attempt["error"] for attempt in line["attempts"]] == row.errors
        assert (line["outcome"], line["level"]) == (row.outcome, expected_level(row.outcome))
        models = [attempt["model"] for attempt in line["attempts"]]
        order = ["openai/gpt-4o-mini", "b/m-b", "c/m-c"]
        assert models == order[: len(models)] + ["c/m-c"] * (len(models) - 3)
        assert await scenario.read_responses() == ([(text, True)] if row.outcome == "done" else [])
        await scenario.assert_nothing_held()


async def test_silent_model_fails_over_and_a_mock_may_be_the_last_fallback() -> None:
    env = {"FIRST_TOKEN_TIMEOUT_SECONDS": "0.3", "FALLBACK_MODELS": "b/m,mock/echo"}
    async with run_scenario(send_nothing, send_nothing, **env) as scenario:
        text, last = await read_to_end(await scenario.chat())
        assert (get_outcome(last), last["model"]) == ("done", "mock/echo")
        attempts = (await scenario.wait_for_log_line())["attempts"]
        assert [attempt["model"] for attempt in attempts] == [
            "openai/gpt-4o-mini",
            "b/m",
            "mock/echo",
        ]
        assert [attempt["error"] for attempt in attempts] == [TIMEOUT, TIMEOUT, None]
        assert await scenario.read_responses() == [(text, True)]
        await scenario.assert_nothing_held()


class SilentProvider(LLMProvider):
    """A provider that never writes a chunk and notes how long it was waited for."""

    name = "silent"

    def __init__(self) -> None:
        self.waits: list[float] = []

    async def stream(
        self, model: str, messages: Sequence[Message], call: Call, sink: Sink
    ) -> Completion:
        started = anyio.current_time()
        try:
            await anyio.sleep_forever()
            raise AssertionError
        finally:
            self.waits.append(anyio.current_time() - started)


@dataclass
class UnusedSink(Sink):
    """A sink for providers that write nothing."""

    on_start: Callable[[], None]
    started: bool = False

    def attach(self, resume: Callable[[], None], finish: Callable[[], bool]) -> None:
        raise AssertionError

    def write(self, chunks: Chunks) -> bool:
        raise AssertionError


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": JumpingLoop})], ids=[""])
async def test_silent_models_get_equal_shares_of_the_first_token_timeout() -> None:
    provider, call = SilentProvider(), Call("req_1")
    targets = [Target(provider, model) for model in ("a", "b", "c")]
    settings = from_env({"FIRST_TOKEN_TIMEOUT_SECONDS": "9", "MAX_RETRIES": "2"})
    with raises(TIMEOUT):
        await complete(targets, [], call, UnusedSink(lambda: None), settings)
    assert provider.waits == pytest.approx([3, 3, 3])
    # No time is left for a retry.
    assert [attempt.model for attempt in call.attempts] == ["silent/a", "silent/b", "silent/c"]


async def test_done_event_names_the_model_that_responded() -> None:
    async def script(request: Connection) -> None:
        await request.stream(event({"choices": [{"delta": {"content": "Hi"}}]}))
        await request.send_events(event({"choices": [{"delta": {}, "finish_reason": "stop"}]}))
        await request.send(b"0\r\n\r\n")

    async with run_scenario(send_status(500), script, FALLBACK_MODELS="b/m-b") as scenario:
        _, last = await read_to_end(await scenario.chat())
        assert last["model"] == "m-b"
        (request,) = scenario.upstreams[1].requests
        assert request.body["model"] == "m-b"
        assert "authorization" not in request.headers


async def test_requested_mock_model_never_fails_over() -> None:
    env = {"MODELS": "gpt-4o-mini,mock/*", "FALLBACK_MODELS": "openai/gpt-4o-mini"}
    async with run_scenario(send_hello, **env) as scenario:
        _, last = await read_to_end(await scenario.chat(model_id="mock/error"))
        assert get_outcome(last) == "upstream_error"
        assert scenario.upstream.requests == []
        await scenario.assert_nothing_held()
