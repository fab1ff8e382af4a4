"""Retries and failover: only before the first chunk, within the time for it, and in the log."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import anyio
import pytest

from tests.faults import STATUS, expected_level, get_outcome, read_to_end, run_scenario
from tests.upstream import Connection, Script, event, response

slow = pytest.mark.slow
RETRY_NOW = "retry-after-ms: 1"


async def answer(request: Connection) -> None:
    await request.complete("Hel", "lo")


async def hang_up(request: Connection) -> None:
    request.writer.close()


async def reset(request: Connection) -> None:
    request.reset()


async def silence(request: Connection) -> None:
    await request.closed.wait()


def status(code: int, *headers: str, body: bytes = b"{}") -> Script:
    async def script(request: Connection) -> None:
        await request.send(response(code, body, *headers))

    return script


async def reason_and_fail(request: Connection) -> None:
    """An answer that shows that the provider works, and then fails."""
    delta = {"reasoning_content": "hm"}
    await request.stream(event({"choices": [{"index": 0, "delta": delta}]}), event({"error": "no"}))


def in_turn(*scripts: Script) -> Script:
    """The first request is for the first script, and so on; the last one takes the rest."""
    left = list(scripts)

    async def script(request: Connection) -> None:
        await (left.pop(0) if len(left) > 1 else left[0])(request)

    return script


QUOTA = b'{"error":{"code":"insufficient_quota"}}'


def after(seconds: float) -> str:
    """A date so far from now, as a header has it."""
    return "retry-after: " + format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), True)


@pytest.mark.parametrize(
    "failure",
    [
        pytest.param(hang_up, id="hung_up"),
        pytest.param(reset, id="reset", marks=slow),
        pytest.param(status(408, RETRY_NOW), id="408", marks=slow),
        pytest.param(status(409, RETRY_NOW), id="409", marks=slow),
        pytest.param(status(429, RETRY_NOW), id="429_milliseconds"),
        pytest.param(status(429, "retry-after: 0"), id="429_seconds", marks=slow),
        pytest.param(status(429, after(-3600)), id="429_past_date", marks=slow),
        pytest.param(status(429, "retry-after: soon"), id="429_nonsense", marks=slow),
        pytest.param(status(429), id="429_no_wait", marks=slow),
        pytest.param(status(500, RETRY_NOW), id="500", marks=slow),
        pytest.param(status(502, RETRY_NOW), id="502", marks=slow),
        pytest.param(status(503, RETRY_NOW), id="503"),
        pytest.param(status(504, RETRY_NOW), id="504", marks=slow),
        pytest.param(status(529, RETRY_NOW), id="529", marks=slow),
        pytest.param(status(400, "x-should-retry: true", RETRY_NOW), id="400_should", marks=slow),
    ],
)
async def test_what_may_pass_is_tried_again(failure: Script) -> None:
    async with run_scenario(in_turn(failure, answer), MAX_RETRIES="2") as play:
        text, last = await read_to_end(await play.chat())
        assert (text, get_outcome(last)) == ("Hello", "done")
        ids = [request.headers["x-client-request-id"] for request in play.upstream.requests]
        assert ids == [last["id"], f"{last['id']}-2"]
        assert await play.read_responses() == [("Hello", True)]
        first, second = (await play.wait_for_log_line())["attempts"]
        assert first["error"] in STATUS
        assert second["error"] is None
        await play.assert_nothing_held()


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        pytest.param(status(400), "upstream_error", id="400", marks=slow),
        pytest.param(status(401, RETRY_NOW), "upstream_error", id="401"),
        pytest.param(status(403), "upstream_error", id="403", marks=slow),
        pytest.param(status(404), "upstream_error", id="404", marks=slow),
        pytest.param(status(422), "upstream_error", id="422", marks=slow),
        pytest.param(status(307, "location: /"), "upstream_error", id="307", marks=slow),
        pytest.param(
            status(429, RETRY_NOW, body=QUOTA), "upstream_unavailable", id="quota", marks=slow
        ),
        pytest.param(
            status(500, "x-should-retry: false", RETRY_NOW), "upstream_error", id="should_not"
        ),
        # A wait that does not fit is not waited for.
        pytest.param(status(429, "retry-after: 60"), "upstream_unavailable", id="a_minute"),
        pytest.param(
            status(429, "retry-after: 86400"), "upstream_unavailable", id="a_day", marks=slow
        ),
        pytest.param(
            status(503, after(3600)), "upstream_unavailable", id="a_date_to_come", marks=slow
        ),
        pytest.param(reason_and_fail, "upstream_error", id="reasoning_came"),
        pytest.param(silence, "upstream_timeout", id="all_time_used", marks=slow),
    ],
)
async def test_what_will_not_pass_is_not_tried_again(failure: Script, code: str) -> None:
    time = "0.3" if failure is silence else "30"
    limits = {"MAX_RETRIES": "2", "FIRST_TOKEN_TIMEOUT_SECONDS": time}
    async with run_scenario(failure, **limits) as play:
        reply = await play.chat()
        _, last = await read_to_end(reply)
        assert (reply.status, get_outcome(last)) == (STATUS[code], code)
        assert len(play.upstream.requests) == 1
        assert [each["error"] for each in (await play.wait_for_log_line())["attempts"]] == [code]
        assert await play.read_responses() == []
        await play.assert_nothing_held()


async def test_nothing_is_tried_again_after_the_first_piece() -> None:
    chunk = {"choices": [{"index": 0, "delta": {"content": "Hel"}}]}
    begun = asyncio.Event()

    async def script(request: Connection) -> None:
        await request.stream(event(chunk))
        await begun.wait()
        request.reset()

    async with run_scenario(script, script, MAX_RETRIES="2", FALLBACK_MODELS="b/m") as play:
        reply = await play.chat()
        await reply.event()
        begun.set()
        _, last = await read_to_end(reply)
        assert get_outcome(last) == "upstream_error"
        assert [len(each.requests) for each in play.upstreams] == [1, 0]
        assert await play.read_responses() == [("Hel", False)]
        await play.assert_nothing_held()


@pytest.mark.parametrize("retries", [0, pytest.param(3, marks=slow)])
async def test_no_more_than_max_retries_follow(retries: int) -> None:
    async with run_scenario(status(503, RETRY_NOW), MAX_RETRIES=str(retries)) as play:
        _, last = await read_to_end(await play.chat())
        assert get_outcome(last) == "upstream_unavailable"
        ids = [request.headers["x-client-request-id"] for request in play.upstream.requests]
        assert ids == [last["id"], *(f"{last['id']}-{n}" for n in range(2, retries + 2))]
        assert len((await play.wait_for_log_line())["attempts"]) == retries + 1
        await play.assert_nothing_held()


@pytest.mark.parametrize("code", [408, 409, 500, 502, 504])
@pytest.mark.slow
async def test_every_failure_that_names_its_wait_is_waited_for_so_long(code: int) -> None:
    # A wait that does not fit is not waited for, whatever the status: one attempt, at once.
    script = status(code, "retry-after: 3600")
    async with run_scenario(script, MAX_RETRIES="2") as play:
        _, last = await read_to_end(await play.chat())
        assert get_outcome(last) == "upstream_error"
        assert len(play.upstream.requests) == 1


async def test_a_client_that_leaves_in_the_wait_for_a_retry_ends_it() -> None:
    async with run_scenario(status(503, "retry-after: 20"), MAX_RETRIES="2") as play:
        client = await play.app.connect()
        asking = asyncio.ensure_future(client.chat(session_id="mine"))
        await play.upstream.wait_for_request()
        while not await play.app.metric("chat_active_streams"):
            pass
        asking.cancel()
        client.disconnect()
        line = await play.wait_for_log_line()
        assert line["outcome"] == "client_disconnected"
        assert [each["error"] for each in line["attempts"]] == ["upstream_unavailable"]
        assert len(play.upstream.requests) == 1
        await play.assert_nothing_held()


# ---- no way to the provider


@asynccontextmanager
async def refusing(tmp_path: Path) -> AsyncIterator[str]:
    """An address at which nobody listens, and nobody will."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"


@asynccontextmanager
async def full(tmp_path: Path) -> AsyncIterator[str]:
    """An address at which connections are neither taken nor refused."""
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for each in (first, second):
            each.setblocking(False)
            each.connect_ex(listener.getsockname())
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"


@asynccontextmanager
async def unknown(tmp_path: Path) -> AsyncIterator[str]:
    """A name that is not resolved (RFC 6761, 6.4)."""
    yield "http://nobody.invalid/v1"


@asynccontextmanager
async def untrusted(tmp_path: Path) -> AsyncIterator[str]:
    """A TLS server with a certificate of its own making."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    request = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    await anyio.run_process(["openssl", *request, "-keyout", str(key), "-out", str(certificate)])
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    told: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        told.append(await reader.read())
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    yield f"https://localhost:{port}/v1"
    server.close()
    assert told == []


Way = Callable[[Path], AbstractAsyncContextManager[str]]
WAYS = [
    pytest.param(refusing, "upstream_error", id="refused"),
    pytest.param(full, "upstream_timeout", id="not_accepted", marks=slow),
    pytest.param(unknown, "upstream_error", id="name_not_resolved", marks=slow),
    pytest.param(untrusted, "upstream_error", id="certificate_not_trusted", marks=slow),
]


@pytest.mark.parametrize(("way", "code"), WAYS)
async def test_a_provider_that_can_not_be_reached_is_answered_for(
    way: Way, code: str, tmp_path: Path
) -> None:
    limits = {"CONNECT_TIMEOUT_SECONDS": "2", "FIRST_TOKEN_TIMEOUT_SECONDS": "10"}
    async with (
        way(tmp_path) as url,
        run_scenario(answer, OPENAI_BASE_URL=url, MAX_RETRIES="1", **limits) as play,
    ):
        reply = await play.chat()
        _, last = await read_to_end(reply)
        assert (reply.status, get_outcome(last)) == (STATUS[code], code)
        assert last["error"]["retryable"]
        assert play.upstream.requests == []
        line = await play.wait_for_log_line()
        assert (line["outcome"], line["level"]) == (code, "warning")
        assert [each["error"] for each in line["attempts"]] == [code, code]
        await play.assert_nothing_held()


@pytest.mark.parametrize(("way", "code"), WAYS)
async def test_a_provider_that_can_not_be_reached_is_replaced(
    way: Way, code: str, tmp_path: Path
) -> None:
    limits = {"CONNECT_TIMEOUT_SECONDS": "2", "FALLBACK_MODELS": "b/m"}
    async with (
        way(tmp_path) as url,
        run_scenario(answer, answer, OPENAI_BASE_URL=url, **limits) as play,
    ):
        text, last = await read_to_end(await play.chat())
        assert (text, get_outcome(last)) == ("Hello", "done")
        assert [each["error"] for each in (await play.wait_for_log_line())["attempts"]] == [
            code,
            None,
        ]
        await play.assert_nothing_held()


@pytest.mark.parametrize("end", [hang_up, pytest.param(reset, marks=slow)])
async def test_a_connection_that_the_provider_closed_while_idle_is_not_used_again(
    end: Script,
) -> None:
    closing: list[Connection] = []

    async def script(request: Connection) -> None:
        await request.complete("Hel", "lo")
        closing.append(request)

    async with run_scenario(script) as play:
        await read_to_end(await play.chat())
        await end(closing[0])
        await closing[0].closed.wait()
        text, last = await read_to_end(await play.chat())
        assert (text, get_outcome(last)) == ("Hello", "done")
        assert play.upstream.connections == 2
        await play.assert_nothing_held()


# ---- failover


FALLBACK = {"FALLBACK_MODELS": "b/m-b,c/m-c"}


@dataclass(frozen=True)
class Row:
    """What each of three providers does, who is asked how often, and how it ends."""

    scripts: tuple[Script, Script, Script]
    asked: tuple[int, int, int]
    errors: list[str | None]
    outcome: str = "done"
    env: dict[str, str] = field(default_factory=dict)


FAILOVER = {
    "the_first_answers": Row((answer, answer, answer), (1, 0, 0), [None]),
    "one_fails": Row(
        (status(500), answer, answer), (1, 1, 0), ["upstream_error", None], env={"MAX_RETRIES": "2"}
    ),
    "two_fail": Row(
        (status(429, "retry-after: 60"), hang_up, answer),
        (1, 1, 1),
        ["upstream_unavailable", "upstream_error", None],
    ),
    "the_operator_s_fault_goes_on_too": Row(
        (status(401), answer, answer), (1, 1, 0), ["upstream_error", None]
    ),
    "quota_goes_on_too": Row(
        (status(429, body=QUOTA), answer, answer), (1, 1, 0), ["upstream_unavailable", None]
    ),
    "silence_leaves_time_for_the_others": Row(
        (silence, silence, answer),
        (1, 1, 1),
        ["upstream_timeout", "upstream_timeout", None],
        env={"FIRST_TOKEN_TIMEOUT_SECONDS": "3"},
    ),
    "all_are_silent": Row(
        (silence, silence, silence),
        (1, 1, 1),
        ["upstream_timeout"] * 3,
        "upstream_timeout",
        {"FIRST_TOKEN_TIMEOUT_SECONDS": "0.6", "MAX_RETRIES": "2"},
    ),
    "all_fail_and_the_last_is_answered": Row(
        (hang_up, status(500), status(503)),
        (1, 1, 1),
        ["upstream_error", "upstream_error", "upstream_unavailable"],
        "upstream_unavailable",
    ),
    "only_the_last_is_tried_again": Row(
        (status(503, RETRY_NOW), status(503, RETRY_NOW), status(503, RETRY_NOW)),
        (1, 1, 3),
        ["upstream_unavailable"] * 5,
        "upstream_unavailable",
        {"MAX_RETRIES": "2"},
    ),
    "reasoning_is_a_beginning": Row(
        (reason_and_fail, answer, answer), (1, 0, 0), ["upstream_error"], "upstream_error"
    ),
}
QUICK = {"one_fails", "silence_leaves_time_for_the_others", "only_the_last_is_tried_again"}


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=name, marks=() if name in QUICK else slow)
        for name, row in FAILOVER.items()
    ],
)
async def test_a_failure_before_the_first_piece_goes_to_the_next_model(row: Row) -> None:
    async with run_scenario(*row.scripts, **FALLBACK, **row.env) as play:
        reply = await play.chat()
        text, last = await read_to_end(reply)
        assert get_outcome(last) == row.outcome
        assert reply.status == (200 if row.outcome == "done" else STATUS[row.outcome])
        assert tuple(len(each.requests) for each in play.upstreams) == row.asked
        line = await play.wait_for_log_line()
        assert [each["error"] for each in line["attempts"]] == row.errors
        assert (line["outcome"], line["level"]) == (row.outcome, expected_level(row.outcome))
        models = [each["model"] for each in line["attempts"]]
        order = ["openai/gpt-4o-mini", "b/m-b", "c/m-c"]
        assert models == order[: len(models)] + ["c/m-c"] * (len(models) - 3)
        assert await play.read_responses() == ([(text, True)] if row.outcome == "done" else [])
        await play.assert_nothing_held()


async def test_done_names_the_model_that_answered() -> None:
    async def script(request: Connection) -> None:
        await request.stream(event({"choices": [{"delta": {"content": "Hi"}}]}))
        await request.send_events(event({"choices": [{"delta": {}, "finish_reason": "stop"}]}))
        await request.send(b"0\r\n\r\n")

    async with run_scenario(status(500), script, FALLBACK_MODELS="b/m-b") as play:
        _, last = await read_to_end(await play.chat())
        assert last["model"] == "m-b"
        assert play.upstreams[1].requests[0].body["model"] == "m-b"
        assert "authorization" not in play.upstreams[1].requests[0].headers


async def test_a_mock_that_is_asked_for_never_fails_over() -> None:
    models = {"MODELS": "gpt-4o-mini,mock/*", "FALLBACK_MODELS": "openai/gpt-4o-mini"}
    async with run_scenario(answer, **models) as play:
        _, last = await read_to_end(await play.chat(model_id="mock/error"))
        assert get_outcome(last) == "upstream_error"
        assert play.upstream.requests == []
        await play.assert_nothing_held()


async def test_a_mock_may_be_the_last_to_answer() -> None:
    async with run_scenario(hang_up, FALLBACK_MODELS="mock/echo") as play:
        text, last = await read_to_end(await play.chat())
        assert (get_outcome(last), last["model"]) == ("done", "mock/echo")
        assert await play.read_responses() == [(text, True)]
        await play.assert_nothing_held()
