"""Clients and stores that misbehave: each loses no more than its own answer."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.client import JSON, Client
from tests.faults import (
    SESSION,
    connect_slow_client,
    count_open_files,
    get_outcome,
    read_to_end,
    run_scenario,
)
from tests.upstream import DONE, END, Connection, delta, http_chunk

slow = pytest.mark.slow
CHAT = b'{"message":"Hello","session_id":"mine"}'


def raw(body: bytes = CHAT, length: int | None = None) -> bytes:
    """A chat request in bytes, whose body may have another length than it says."""
    size = len(body) if length is None else length
    head = f"POST /api/v1/chat HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n"
    return (head + "content-type: application/json\r\n\r\n").encode() + body


async def silence(request: Connection) -> None:
    await request.closed.wait()


async def hello(request: Connection) -> None:
    """An answer that begins and does not end."""
    await request.stream(delta("Hel"))
    await request.closed.wait()


async def answer(request: Connection) -> None:
    await request.complete("Hel", "lo")


async def flood(request: Connection) -> None:
    """More than all buffers on the way hold."""
    await request.stream()
    part = b"".join(http_chunk(delta("x" * 100)) for _ in range(200))
    while not request.closed.is_set():
        await request.send(part)


# ---- clients that leave

Leaving = Callable[[Client], Awaitable[None]]


async def resets(client: Client) -> None:
    client.disconnect()


async def closes(client: Client) -> None:
    client.writer.close()


async def half_closes(client: Client) -> None:
    client.writer.write_eof()


@pytest.mark.parametrize(
    "leaving", [resets, pytest.param(closes, marks=slow), pytest.param(half_closes)]
)
@pytest.mark.parametrize("said", ["", "Hel"], ids=["before_the_first_piece", "in_the_middle"])
async def test_a_client_that_leaves_ends_its_answer(leaving: Leaving, said: str) -> None:
    async with run_scenario(hello if said else silence) as play:
        client = await play.app.connect()
        client.writer.write(raw())
        request = await play.upstream.wait_for_request()
        if said:
            assert (await (await client.head()).event())["chunk"] == said
        await leaving(client)
        await request.closed.wait()
        line = await play.wait_for_log_line()
        assert (line["outcome"], line["level"]) == ("client_disconnected", "info")
        assert line["status"] == (200 if said else None)
        assert await play.read_responses() == ([(said, False)] if said else [])
        await play.assert_nothing_held()


@pytest.mark.parametrize("later", [False, True], ids=["at_once", "later"])
@pytest.mark.parametrize("said", ["", "Hel"], ids=["before_the_first_piece", "in_the_middle"])
async def test_a_client_that_asked_for_more_and_leaves_ends_its_answer(
    said: str, later: bool
) -> None:
    # Two requests pipelined; the second one is passed over.
    async with run_scenario(hello if said else silence, HEARTBEAT_SECONDS="3600") as play:
        client = await play.app.connect()
        client.writer.write(raw() * (1 if later else 2))
        request = await play.upstream.wait_for_request()
        if later:
            client.writer.write(raw())
            await play.app.get("/healthz")
        if said:
            assert (await (await client.head()).event())["chunk"] == said
        client.disconnect()
        await request.closed.wait()
        assert (await play.wait_for_log_line())["outcome"] == "client_disconnected"
        assert await play.read_responses() == ([(said, False)] if said else [])
        await play.assert_nothing_held()


@pytest.mark.parametrize("later", [False, True], ids=["at_once", "later"])
async def test_of_two_requests_sent_at_once_the_first_is_answered(later: bool) -> None:
    going = asyncio.Event()

    async def script(request: Connection) -> None:
        await going.wait()
        await request.complete("Hel", "lo")

    async with run_scenario(script) as play:
        client = await play.app.connect()
        client.writer.write(raw() * (1 if later else 2))
        await play.upstream.wait_for_request()
        if later:
            client.writer.write(raw())
            await play.app.get("/healthz")
        going.set()
        told = await client.reader.read()
        # Whoever is told to close the connection asks again on another.
        assert b"\r\nconnection: close\r\n" in told
        assert told.count(b"HTTP/1.1 ") == told.count(b'"status":"done"') == 1
        assert await play.read_responses() == [("Hello", True)]
        assert len(play.upstream.requests) == 1
        await play.assert_nothing_held()


# ---- clients that are slow


async def trickle(client: Client) -> None:
    while await client.reader.read(1):  # noqa: ASYNC110 - it is slow, it does not wait
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "behind",
    [b"", pytest.param(raw(), marks=slow)],
    ids=["alone", "with_another_request_behind"],
)
@pytest.mark.parametrize(
    "reading", [False, pytest.param(True, marks=slow)], ids=["nothing", "a_byte_at_a_time"]
)
async def test_a_client_that_takes_nothing_is_cut(reading: bool, behind: bytes) -> None:
    async with run_scenario(flood, WRITE_TIMEOUT_SECONDS="0.3", HEARTBEAT_SECONDS="0.2") as play:
        client = await connect_slow_client(play.app.url)
        play.app.clients.append(client)
        client.writer.write(raw() + behind)
        trickling = asyncio.ensure_future(trickle(client)) if reading else None
        line = await play.wait_for_log_line()
        assert (line["outcome"], line["status"]) == ("client_stalled", 200)
        await play.wait_for_upstreams_closed()
        [(text, complete)] = await play.read_responses()
        assert (len(text) > 0, complete) == (True, False)
        await play.assert_nothing_held()
        if trickling:
            trickling.cancel()
        client.disconnect()


@slow
async def test_a_client_that_takes_no_answer_is_cut_whatever_it_asked_for() -> None:
    async with run_scenario(answer, WRITE_TIMEOUT_SECONDS="0.3") as play:
        other = await play.app.connect()
        client = await connect_slow_client(play.app.url)
        play.app.clients.append(client)
        await (await other.request("GET", "/healthz")).body()
        held = count_open_files()
        sent = 0
        while count_open_files() == held:
            # One after the other, until one is not taken.
            lines = play.app.log.requests()
            if sum(line["route"] == "/openapi.json" for line in lines) == sent:
                client.writer.write(b"GET /openapi.json HTTP/1.1\r\n\r\n")
                sent += 1
            await (await other.request("GET", "/healthz")).body()
        assert count_open_files() == held - 1


# ---- bodies


@pytest.mark.parametrize(
    ("body", "length"),
    [(b"", 10), pytest.param(CHAT[:5], 40, marks=slow)],
    ids=["nothing", "half"],
)
async def test_a_body_that_does_not_arrive_is_answered_408(body: bytes, length: int) -> None:
    async with run_scenario(answer, BODY_TIMEOUT_SECONDS="0.2") as play:
        client = await play.app.connect()
        client.writer.write(raw(body, length))
        reply = await client.head()
        assert (reply.status, reply.headers["connection"]) == (408, "close")
        assert get_outcome((await read_to_end(reply))[1]) == "request_timeout"
        await client.wait_closed()
        assert (await play.wait_for_log_line())["outcome"] == "request_timeout"
        assert play.upstream.requests == []
        await play.assert_nothing_held()


async def test_a_body_in_drips_is_answered_408() -> None:
    async with run_scenario(answer, BODY_TIMEOUT_SECONDS="0.3") as play:
        client = await play.app.connect()
        client.writer.write(raw(b"", 10_000))

        async def drip() -> None:
            while True:
                client.writer.write(b" ")
                await asyncio.sleep(0.01)

        dripping = asyncio.ensure_future(drip())
        assert get_outcome((await read_to_end(await client.head()))[1]) == "request_timeout"
        dripping.cancel()
        assert (await play.wait_for_log_line())["outcome"] == "request_timeout"
        await play.assert_nothing_held()


async def test_a_request_without_a_body_is_answered_400() -> None:
    async with run_scenario(answer) as play:
        reply = await (await play.app.connect()).request("POST", "/api/v1/chat", None, JSON)
        assert get_outcome((await read_to_end(reply))[1]) == "invalid_json"
        assert (await play.wait_for_log_line())["outcome"] == "invalid_json"
        await play.assert_nothing_held()


async def test_a_client_that_leaves_in_its_body_is_gone() -> None:
    async with run_scenario(answer) as play:
        client = await play.app.connect()
        client.writer.write(raw(CHAT[:5], 100))
        while not await play.app.metric("chat_active_streams"):
            pass
        client.disconnect()
        assert (await play.wait_for_log_line())["outcome"] == "client_disconnected"
        await play.assert_nothing_held()


# ---- more than a request

TRAILERS = (
    raw(b"").replace(b"content-length: 0", b"transfer-encoding: chunked") + b"1\r\n{\r\n0\r\n"
)


@pytest.mark.parametrize(
    "opening",
    [
        pytest.param(b"GET /", id="target"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nx: ", id="header"),
        pytest.param(TRAILERS + b"x: ", id="trailer", marks=slow),
    ],
)
async def test_a_head_that_does_not_end_is_refused(opening: bytes) -> None:
    async with run_scenario(answer) as play:
        client = await play.app.connect()
        client.writer.write(opening)
        await play.app.get("/healthz")
        client.writer.write(b"x" * (2**16 + 1))
        told = await client.reader.read()
        assert told.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert told.endswith(b"The head of this request is too large.")
        assert play.upstream.requests == []
        await play.assert_nothing_held()


@pytest.mark.parametrize(
    "behind",
    [
        pytest.param(b"GET /healthz HTTP/1.1\r\n\r\n" * 17, id="requests"),
        pytest.param(raw(b"x" * 2**20), id="a_body"),
        pytest.param(b"Hello?\r\n\r\n", id="no_request", marks=slow),
    ],
)
async def test_of_what_comes_behind_an_answer_nothing_is_told_in_its_middle(behind: bytes) -> None:
    going = asyncio.Event()

    async def script(request: Connection) -> None:
        await request.stream(delta("Hel"))
        await going.wait()
        await request.send_events(delta("lo"), delta(finish_reason="stop"), DONE)
        await request.send(END)

    async with run_scenario(script) as play:
        client = await play.app.connect()
        client.writer.write(raw())
        reply = await client.head()
        assert (await reply.event())["chunk"] == "Hel"
        client.writer.write(behind)
        await client.writer.drain()
        await play.app.get("/healthz")
        going.set()
        told = await client.reader.read()
        assert b"HTTP" not in told
        assert told.count(b'"status":"done"') == 1
        assert (await play.wait_for_log_line())["outcome"] == "done"
        assert await play.read_responses() == [("Hello", True)]
        await play.assert_nothing_held()


async def test_trailers_are_no_headers() -> None:
    # Or one behind a trusted proxy could name the address by which it is limited.
    async with run_scenario(answer, FORWARDED_ALLOW_IPS="127.0.0.1") as play:
        client = await play.app.connect()
        head = raw(b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
        body = b"%x\r\n%b\r\n0\r\n" % (len(CHAT), CHAT)
        client.writer.write(head + body + b"x-forwarded-for: 9.9.9.9\r\n\r\n")
        assert get_outcome((await read_to_end(await client.head()))[1]) == "done"
        assert (await play.wait_for_log_line())["caller"] == "127.0.0.0/24"


# ---- the session's lock, and its store


async def test_one_session_has_one_answer_at_a_time_and_is_not_deleted_meanwhile() -> None:
    async with run_scenario(hello) as play:
        client = await play.app.connect()
        reply = await client.chat(session_id=SESSION)
        await reply.event()
        second = await play.chat()
        assert (second.status, second.headers["retry-after"]) == (409, "1")
        assert get_outcome((await read_to_end(second))[1]) == "session_busy"
        deleting = await (await play.app.connect()).request("DELETE", f"/api/v1/sessions/{SESSION}")
        assert get_outcome((await read_to_end(deleting))[1]) == "session_busy"
        assert len(play.upstream.requests) == 1
        client.disconnect()
        outcomes = {(await play.wait_for_log_line(number))["outcome"] for number in (0, 1)}
        assert outcomes == {"client_disconnected", "session_busy"}
        assert await play.read_responses() == [("Hel", False)]
        await play.assert_nothing_held()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "chat.db"


@contextmanager
def held(file: Path) -> Iterator[None]:
    """Another process writes to the file, and takes its time."""
    db = sqlite3.connect(file, isolation_level=None)
    try:
        db.execute("BEGIN EXCLUSIVE")
        yield
        db.execute("ROLLBACK")
    finally:
        db.close()


async def test_a_store_that_can_not_open_a_session_is_answered_503(file: Path) -> None:
    async with run_scenario(answer, STATE_URL=f"sqlite:///{file}") as play:
        with held(file):
            reply = await play.chat()
            assert (reply.status, reply.headers["retry-after"]) == (503, "1")
            assert get_outcome((await read_to_end(reply))[1]) == "state_unavailable"
            assert (await play.wait_for_log_line())["outcome"] == "state_unavailable"
            assert play.upstream.requests == []
            assert await play.app.metric("chat_active_streams") == 0
        assert get_outcome((await read_to_end(await play.chat()))[1]) == "done"
        await play.assert_nothing_held()


@pytest.mark.parametrize("said", ["Hel", pytest.param("", marks=slow)], ids=["text", "no_text"])
async def test_a_store_that_can_not_append_a_turn_says_so_in_the_end(file: Path, said: str) -> None:
    going = asyncio.Event()

    async def script(request: Connection) -> None:
        await request.stream(*([delta("Hel")] if said else []))
        await going.wait()
        await request.send_events(delta(finish_reason="stop"), DONE)
        await request.send(END)

    # Without text there is a session to be stored only where it is new and of our own naming.
    fields = {"session_id": SESSION if said else None}
    env = {"STATE_URL": f"sqlite:///{file}"}
    async with run_scenario(script, **env) as play:
        asking = asyncio.ensure_future(play.chat(**fields))
        await play.upstream.wait_for_request()
        with held(file):
            going.set()
            reply = await asking
            text, last = await read_to_end(reply)
            assert (text, get_outcome(last)) == (said, "state_unavailable")
            assert reply.status == (200 if said else 503)
            line = await play.wait_for_log_line()
            assert line["outcome"] == "state_unavailable"
            # The provider did its part.
            assert [attempt["error"] for attempt in line["attempts"]] == [None]
        assert await play.read_responses() == []
        await play.assert_nothing_held()


async def test_a_turn_is_kept_whole_when_its_client_leaves_while_it_is_stored(file: Path) -> None:
    going = asyncio.Event()

    async def script(request: Connection) -> None:
        await request.stream(delta("Hel"))
        await going.wait()
        await request.send_events(delta(finish_reason="stop"), DONE)
        await request.closed.wait()

    async with run_scenario(script, STATE_URL=f"sqlite:///{file}") as play:
        client = await play.app.connect()
        reply = await client.chat(session_id=SESSION)
        await reply.event()
        with held(file):
            going.set()
            await (await play.upstream.wait_for_request()).closed.wait()
            client.disconnect()
            await client.wait_closed()
        assert (await play.wait_for_log_line())["outcome"] == "client_disconnected"
        assert await play.read_responses() == [("Hel", True)]
        await play.assert_nothing_held()


async def test_a_client_that_leaves_while_its_session_is_opened_gives_it_back(file: Path) -> None:
    async with run_scenario(silence, STATE_URL=f"sqlite:///{file}") as play:
        client = await play.app.connect()
        with held(file):
            client.writer.write(raw())
            while not await play.app.metric("chat_active_streams"):
                pass
            client.disconnect()
            await client.wait_closed()
        assert (await play.wait_for_log_line())["outcome"] == "client_disconnected"
        await play.wait_for_upstreams_closed()
        assert await play.read_responses() == []
        await play.assert_nothing_held()


@pytest.mark.slow
async def test_no_session_stays_locked_when_many_could_not_be_stored(file: Path) -> None:
    # Each waits a second for the file, one after the other: longer than an ending may take.
    names = [f"mine-{number}" for number in range(8)]
    async with run_scenario(hello, STATE_URL=f"sqlite:///{file}") as play:
        clients = [await play.app.connect() for _ in names]
        for client, name in zip(clients, names, strict=True):
            await (await client.chat(session_id=name)).event()
        with held(file):
            for client in clients:
                client.disconnect()
            for number in range(len(names)):
                await play.wait_for_log_line(number)
        asker = await play.app.connect()
        deleted = []
        for name in names:
            reply = await asker.request("DELETE", f"/api/v1/sessions/{name}")
            await reply.body()
            deleted.append(reply.status)
        assert deleted == [204] * len(names)
