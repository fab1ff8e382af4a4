"""Clients and stores that misbehave: each affects no response but its own."""

import asyncio
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import pytest

from tests.client import Client
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
BODY = b'{"message":"Hello","session_id":"mine"}'


def chat_request(body: bytes = BODY, content_length: int | None = None) -> bytes:
    """Return the bytes of a chat request. Its Content-Length may be wrong."""
    length = len(body) if content_length is None else content_length
    head = f"POST /api/v1/chat HTTP/1.1\r\nhost: x\r\ncontent-length: {length}\r\n"
    return (head + "content-type: application/json\r\n\r\n").encode() + body


def chunked_request(body: bytes) -> bytes:
    """Return the bytes of a chunked chat request, up to where its trailers begin."""
    head = chat_request(b"").replace(b"content-length: 0", b"transfer-encoding: chunked")
    return head + http_chunk(body) + b"0\r\n"


async def send_nothing(request: Connection) -> None:
    await request.closed.wait()


async def send_one_chunk(request: Connection) -> None:
    await request.stream(delta("Hel"))
    await request.closed.wait()


async def complete(request: Connection) -> None:
    await request.complete("Hel", "lo")


async def send_a_megabyte(request: Connection) -> None:
    """Send more than all buffers between provider and slow client can contain."""
    await request.stream(*[delta("x" * 100)] * 10_000)
    await request.closed.wait()


# ---- disconnects

Disconnect = Callable[[Client], Awaitable[None]]


async def reset(client: Client) -> None:
    client.disconnect()


async def close(client: Client) -> None:
    client.writer.close()


async def half_close(client: Client) -> None:
    client.writer.write_eof()


@pytest.mark.parametrize(
    ("disconnect", "pipelined"),
    [
        pytest.param(reset, None, id="reset"),
        pytest.param(close, None, id="close", marks=slow),
        pytest.param(half_close, None, id="half_close"),
        pytest.param(reset, "with the first", id="second_request"),
        pytest.param(reset, "later", id="second_request_later"),
    ],
)
@pytest.mark.parametrize("text", ["", "Hel"], ids=["before_first_chunk", "after_first_chunk"])
async def test_client_disconnect_closes_the_upstream_and_stores_the_text(
    disconnect: Disconnect, pipelined: str | None, text: str
) -> None:
    script = send_one_chunk if text else send_nothing
    async with run_scenario(script, HEARTBEAT_SECONDS="3600") as play:
        client = await play.app.connect()
        client.writer.write(chat_request() * (2 if pipelined == "with the first" else 1))
        request = await play.upstream.wait_for_request()
        if pipelined == "later":
            client.writer.write(chat_request())
            await play.app.get("/healthz")
        if text:
            assert (await (await client.head()).event())["chunk"] == text
        await disconnect(client)
        await request.closed.wait()
        line = await play.wait_for_log_line()
        assert (line["outcome"], line["level"]) == ("client_disconnected", "info")
        assert line["status"] == (200 if text else None)
        assert await play.read_responses() == ([(text, False)] if text else [])
        await play.assert_nothing_held()


# ---- stalled clients


async def read_slowly(client: Client) -> None:
    while await client.reader.read(1):  # noqa: ASYNC110 - the delay is the point, not polling
        await asyncio.sleep(0.02)


@pytest.mark.parametrize(
    "pipelined",
    [b"", pytest.param(chat_request(), marks=slow)],
    ids=["one_request", "two_requests"],
)
@pytest.mark.parametrize("reads", [False, pytest.param(True, marks=slow)], ids=["never", "slowly"])
async def test_client_that_does_not_read_its_stream_is_reset(reads: bool, pipelined: bytes) -> None:
    env = {"WRITE_TIMEOUT_SECONDS": "0.3", "HEARTBEAT_SECONDS": "0.2"}
    async with run_scenario(send_a_megabyte, **env) as play:
        client = await connect_slow_client(play.app.url)
        play.app.clients.append(client)
        client.writer.write(chat_request() + pipelined)
        reading = asyncio.ensure_future(read_slowly(client)) if reads else None
        line = await play.wait_for_log_line()
        assert (line["outcome"], line["status"]) == ("client_stalled", 200)
        await play.wait_for_upstreams_closed()
        [(text, is_complete)] = await play.read_responses()
        assert (len(text) > 0, is_complete) == (True, False)
        await play.assert_nothing_held()
        if reading:
            reading.cancel()
        client.disconnect()


@slow
async def test_client_that_reads_no_response_is_reset_on_every_route() -> None:
    async with run_scenario(complete, WRITE_TIMEOUT_SECONDS="0.3") as play:
        other = await play.app.connect()
        client = await connect_slow_client(play.app.url)
        play.app.clients.append(client)
        await (await other.request("GET", "/healthz")).body()
        before = count_open_files()
        sent = 0
        while count_open_files() == before:
            # The next request follows when the server has sent the previous response.
            lines = play.app.log.requests()
            if sum(line["route"] == "/openapi.json" for line in lines) == sent:
                client.writer.write(b"GET /openapi.json HTTP/1.1\r\n\r\n")
                sent += 1
            await (await other.request("GET", "/healthz")).body()
        assert count_open_files() == before - 1


# ---- HTTP framing


async def test_body_that_trickles_in_returns_408() -> None:
    async with run_scenario(complete, BODY_TIMEOUT_SECONDS="0.2") as play:
        client = await play.app.connect()
        client.writer.write(chat_request(b"", 10_000))

        async def trickle() -> None:
            while True:
                client.writer.write(b" ")
                await asyncio.sleep(0.01)

        trickling = asyncio.ensure_future(trickle())
        reply = await client.head()
        trickling.cancel()
        assert reply.headers["connection"] == "close"
        assert await reply.status_and_code() == (408, "request_timeout")
        await client.wait_closed()
        assert (await play.wait_for_log_line())["outcome"] == "request_timeout"
        assert play.upstream.requests == []
        await play.assert_nothing_held()


@pytest.mark.parametrize(
    "opening",
    [
        pytest.param(b"GET /", id="target"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nx: ", id="header"),
        pytest.param(chunked_request(b"{") + b"x: ", id="trailer", marks=slow),
    ],
)
async def test_request_head_over_64_kib_returns_400(opening: bytes) -> None:
    async with run_scenario(complete) as play:
        client = await play.app.connect()
        client.writer.write(opening)
        await play.app.get("/healthz")
        client.writer.write(b"x" * (2**16 + 1))
        received = await client.reader.read()
        assert received.startswith(b"HTTP/1.1 400 Bad Request\r\n")
        assert received.endswith(b"The head of this request is too large.")
        assert play.upstream.requests == []
        await play.assert_nothing_held()


async def test_trailers_do_not_count_as_headers() -> None:
    # Otherwise a client of a trusted proxy could choose the address that is rate limited.
    async with run_scenario(complete, FORWARDED_ALLOW_IPS="127.0.0.1") as play:
        client = await play.app.connect()
        client.writer.write(chunked_request(BODY) + b"x-forwarded-for: 9.9.9.9\r\n\r\n")
        assert get_outcome((await read_to_end(await client.head()))[1]) == "done"
        assert (await play.wait_for_log_line())["caller"] == "127.0.0.0/24"


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(chat_request(), id="request"),
        pytest.param(b"GET /healthz HTTP/1.1\r\n\r\n" * 17, id="many_requests"),
        pytest.param(chat_request(b"x" * 2**20), id="large_body"),
        pytest.param(b"Hello?\r\n\r\n", id="not_http", marks=slow),
    ],
)
@pytest.mark.parametrize("when", ["with the request", "before the response", "during the response"])
async def test_data_behind_a_request_is_ignored_until_its_response_ends(
    data: bytes, when: str
) -> None:
    starting, ending = asyncio.Event(), asyncio.Event()

    async def script(request: Connection) -> None:
        await starting.wait()
        await request.stream(delta("Hel"))
        await ending.wait()
        await request.send_events(delta("lo"), delta(finish_reason="stop"), DONE)
        await request.send(END)

    async with run_scenario(script) as play:
        client = await play.app.connect()

        async def send_data() -> None:
            client.writer.write(data)
            await client.writer.drain()
            await play.app.get("/healthz")

        client.writer.write(chat_request() + (data if when == "with the request" else b""))
        await play.upstream.wait_for_request()
        if when == "before the response":
            await send_data()
        starting.set()
        reply = await client.head()
        assert (await reply.event())["chunk"] == "Hel"
        if when == "during the response":
            await send_data()
        else:
            # The client sends its other request again on another connection.
            assert reply.headers["connection"] == "close"
        ending.set()
        received = await client.reader.read()
        assert b"HTTP" not in received
        assert received.count(b'"status":"done"') == 1
        assert (await play.wait_for_log_line())["outcome"] == "done"
        assert await play.read_responses() == [("Hello", True)]
        assert len(play.upstream.requests) == 1
        await play.assert_nothing_held()


# ---- stores


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "chat.db"


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Lock the database, as another process does. The service waits 1 s for such a lock."""
    db = sqlite3.connect(file, isolation_level=None)
    try:
        db.execute("BEGIN IMMEDIATE")
        yield
        db.execute("ROLLBACK")
    finally:
        db.close()


async def test_store_that_fails_is_not_logged_as_a_failure_of_the_provider(file: Path) -> None:
    ending = asyncio.Event()

    async def script(request: Connection) -> None:
        await request.stream(delta("Hel"))
        await ending.wait()
        await request.send_events(delta(finish_reason="stop"), DONE)
        await request.send(END)

    async with run_scenario(script, STATE_URL=f"sqlite:///{file}") as play:
        reply = await play.chat()
        with locked(file):
            ending.set()
            text, last = await read_to_end(reply)
            assert (text, get_outcome(last)) == ("Hel", "state_unavailable")
            line = await play.wait_for_log_line()
            assert line["outcome"] == "state_unavailable"
            assert [attempt["error"] for attempt in line["attempts"]] == [None]
        assert await play.read_responses() == []
        await play.assert_nothing_held()


async def test_turn_stays_complete_when_client_disconnects_while_it_is_stored(file: Path) -> None:
    ending = asyncio.Event()

    async def script(request: Connection) -> None:
        await request.stream(delta("Hel"))
        await ending.wait()
        await request.send_events(delta(finish_reason="stop"), DONE)
        await request.closed.wait()

    async with run_scenario(script, STATE_URL=f"sqlite:///{file}") as play:
        client = await play.app.connect()
        await (await client.chat(session_id=SESSION)).event()
        with locked(file):
            ending.set()
            await (await play.upstream.wait_for_request()).closed.wait()
            client.disconnect()
            await client.wait_closed()
        assert (await play.wait_for_log_line())["outcome"] == "client_disconnected"
        assert await play.read_responses() == [("Hel", True)]
        await play.assert_nothing_held()


@pytest.mark.parametrize(
    ("data", "lock"),
    [(chat_request(BODY[:5], 100), nullcontext), (chat_request(), locked)],
    ids=["while_it_sends_its_body", "while_its_session_is_opened"],
)
async def test_client_disconnect_releases_slot_and_session(
    data: bytes, lock: Callable[[Path], AbstractContextManager[None]], file: Path
) -> None:
    async with run_scenario(send_nothing, STATE_URL=f"sqlite:///{file}") as play:
        client = await play.app.connect()
        with lock(file):
            client.writer.write(data)
            while not await play.app.metric("chat_active_streams"):
                pass
            client.disconnect()
            await client.wait_closed()
        assert (await play.wait_for_log_line())["outcome"] == "client_disconnected"
        await play.wait_for_upstreams_closed()
        assert await play.read_responses() == []
        await play.assert_nothing_held()


@slow
async def test_sessions_are_released_when_their_turns_cannot_be_stored(file: Path) -> None:
    # Each waits 1 s for the database, one after the other: longer than finishing may take.
    names = [f"mine-{number}" for number in range(8)]
    async with run_scenario(send_one_chunk, STATE_URL=f"sqlite:///{file}") as play:
        clients = [await play.app.connect() for _ in names]
        for client, name in zip(clients, names, strict=True):
            await (await client.chat(session_id=name)).event()
        with locked(file):
            for client in clients:
                client.disconnect()
            for number in range(len(names)):
                await play.wait_for_log_line(number)
        other = await play.app.connect()
        for name in names:
            reply = await other.request("DELETE", f"/api/v1/sessions/{name}")
            await reply.body()
            assert reply.status == 204
