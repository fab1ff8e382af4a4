"""Graceful shutdown: every response ends truthfully, and the process exits with status 0."""

import asyncio
import json
import signal
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest

from errors import ServiceError
from server import Drain
from tests.client import Client
from tests.conftest import TIMEOUT_SECONDS
from tests.faults import connect_slow_client, get_outcome, provider_env, read_to_end
from tests.test_clients import locked, send_a_megabyte, send_nothing, send_one_chunk
from tests.test_process import ServiceProcess, running_process
from tests.upstream import (
    DONE,
    END,
    Connection,
    Script,
    Upstream,
    delta,
    response,
    running_upstream,
)

slow = pytest.mark.slow
HEAD = b"POST /api/v1/chat HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
CHAT = HEAD + b'content-length: 15\r\n\r\n{"message":"x"}'


@dataclass
class Scenario:
    """A service in its own process, and its provider."""

    process: ServiceProcess
    url: str
    upstream: Upstream
    file: Path
    clients: list[Client] = field(default_factory=list)

    async def connect(self, connect: Callable[..., Any] = Client.connect) -> Client:
        client: Client = await connect(self.url)
        self.clients.append(client)
        return client

    async def wait_for_active_stream(self) -> None:
        client = await self.connect()
        metrics = b""
        while b"chat_active_streams 1.0" not in metrics:
            metrics = await (await client.request("GET", "/metrics")).body()

    def signal(self, sign: signal.Signals = signal.SIGTERM) -> None:
        self.process.process.send_signal(sign)

    async def begin_shutdown(self) -> None:
        """Send SIGTERM. Return when the service has noticed it."""
        self.signal()
        await self.process.wait_for_line("^Shutting down")

    def chat_log_lines(self) -> list[dict[str, Any]]:
        return [line for line in self.process.lines if line.get("route") == "/api/v1/chat"]

    async def wait_for_exit(self) -> list[str]:
        """Return the outcomes of all chats. Check that the process exits without an error."""
        assert await self.process.wait_for_exit() == (0, "")
        lines = self.process.lines
        assert lines[-1]["event"] == "Shut down"
        assert {line["level"] for line in lines} <= {"info", "warning"}
        return [line["outcome"] for line in self.chat_log_lines()]

    def read_turns(self) -> list[tuple[str, bool]]:
        """Return text and `complete` of each stored response."""
        db = sqlite3.connect(self.file)
        rows = db.execute("SELECT turns FROM session").fetchall()
        db.close()
        return [(turn[1], turn[2]) for (turns,) in rows for turn in json.loads(turns)]


@asynccontextmanager
async def run_scenario(script: Script, directory: Path, **env: str) -> AsyncIterator[Scenario]:
    file = directory / "chat.db"
    async with running_upstream(script) as upstream:
        env = {**provider_env(upstream.url), "STATE_URL": f"sqlite:///{file}", **env}
        async with running_process(directory, env) as process:
            play = Scenario(process, await process.wait_for_url(), upstream, file)
            try:
                with anyio.fail_after(TIMEOUT_SECONDS):
                    yield play
            finally:
                for client in play.clients:
                    client.disconnect()


async def reject(request: Connection) -> None:
    await request.send(response(503, b"{}", "retry-after: 20"))


async def fail_first_model(request: Connection) -> None:
    if request.body["model"] == "gpt-4o-mini":
        await request.send(response(500, b"{}"))
    else:
        await request.closed.wait()


# ---- the process


async def test_process_without_streams_exits_at_once(tmp_path: Path) -> None:
    async with run_scenario(send_nothing, tmp_path, DRAIN_SECONDS="3600") as play:
        # The drain does not wait for idle connections.
        idle = await play.connect()
        await (await idle.request("GET", "/healthz")).body()
        play.signal()
        assert await play.wait_for_exit() == []
        await idle.wait_closed()


async def test_stream_that_ends_within_the_drain_is_done(tmp_path: Path) -> None:
    ending = asyncio.Event()

    async def script(request: Connection) -> None:
        await request.stream(delta("Hel"))
        await ending.wait()
        await request.send_events(delta("lo", finish_reason="stop"), DONE)
        await request.send(END)

    async with run_scenario(script, tmp_path, DRAIN_SECONDS="3600") as play:
        reply = await (await play.connect()).chat()
        assert (await reply.event())["chunk"] == "Hel"
        await play.begin_shutdown()
        ending.set()
        text, last = await read_to_end(reply)
        assert (text, get_outcome(last)) == ("lo", "done")
        assert await play.wait_for_exit() == ["done"]
        assert play.read_turns() == [("Hello", True)]


async def test_new_chats_return_503_during_the_drain(tmp_path: Path) -> None:
    async with run_scenario(send_one_chunk, tmp_path, DRAIN_SECONDS="3600") as play:
        running = await (await play.connect()).chat()
        await running.event()
        await play.begin_shutdown()
        for path, status in (("/readyz", 503), ("/healthz", 200), ("/metrics", 200)):
            reply = await (await play.connect()).request("GET", path)
            assert reply.status == status
            await reply.body()
        late = await (await play.connect()).chat()
        assert (late.headers["connection"], late.headers["retry-after"]) == ("close", "1")
        assert await late.status_and_code() == (503, "shutting_down")
        play.signal()
        assert get_outcome((await read_to_end(running))[1]) == "shutting_down"
        assert await play.wait_for_exit() == ["shutting_down", "shutting_down"]
        assert len(play.upstream.requests) == 1


@pytest.mark.parametrize(
    ("drain_seconds", "second_signal"),
    [
        pytest.param("0.3", None, id="deadline"),
        pytest.param("3600", signal.SIGINT, id="second_signal", marks=slow),
    ],
)
async def test_stream_that_outlasts_the_drain_is_aborted_and_its_text_stored(
    drain_seconds: str, second_signal: signal.Signals | None, tmp_path: Path
) -> None:
    async with run_scenario(send_one_chunk, tmp_path, DRAIN_SECONDS=drain_seconds) as play:
        reply = await (await play.connect()).chat()
        assert (await reply.event())["chunk"] == "Hel"
        await play.begin_shutdown()
        if second_signal is not None:
            play.signal(second_signal)
        text, last = await read_to_end(reply)
        assert (text, get_outcome(last), last["error"]["retryable"]) == ("", "shutting_down", True)
        assert await play.wait_for_exit() == ["shutting_down"]
        assert play.read_turns() == [("Hel", False)]
        await (await play.upstream.wait_for_request()).closed.wait()


@pytest.mark.parametrize(
    ("script", "env", "attempts"),
    [
        pytest.param(send_nothing, {}, [None], id="waiting_for_the_first_chunk"),
        # The attempts that failed before the shutdown keep their own error.
        pytest.param(
            reject,
            {"MAX_RETRIES": "2"},
            ["upstream_unavailable"],
            id="waiting_to_retry",
            marks=slow,
        ),
        pytest.param(
            fail_first_model,
            {"FALLBACK_MODELS": "other,mock/echo"},
            ["upstream_error", None],
            id="after_a_failover",
            marks=slow,
        ),
    ],
)
async def test_stream_without_a_status_line_returns_503(
    script: Script, env: dict[str, str], attempts: list[str | None], tmp_path: Path
) -> None:
    async with run_scenario(script, tmp_path, DRAIN_SECONDS="0.3", **env) as play:
        client = await play.connect()
        chatting = asyncio.ensure_future(client.chat())
        await play.upstream.wait_for_request(len(attempts) - 1)
        play.signal()
        reply = await chatting
        assert reply.headers["connection"] == "close"
        assert await reply.status_and_code() == (503, "shutting_down")
        await client.wait_closed()
        assert await play.wait_for_exit() == ["shutting_down"]
        [line] = play.chat_log_lines()
        assert [attempt["error"] for attempt in line["attempts"]] == attempts
        assert len(play.upstream.requests) == len(attempts)
        assert play.read_turns() == []


@pytest.mark.parametrize(
    ("data", "lock"),
    [
        pytest.param(HEAD + b"content-length: 99\r\n\r\n{", nullcontext, id="body_arriving"),
        pytest.param(
            HEAD + b'content-length: 35\r\n\r\n{"message":"x","session_id":"mine"}',
            locked,
            id="session_being_opened",
            marks=slow,
        ),
    ],
)
async def test_request_that_has_not_reached_a_provider_returns_503(
    data: bytes, lock: Callable[[Path], AbstractContextManager[None]], tmp_path: Path
) -> None:
    env = {"DRAIN_SECONDS": "0.3", "BODY_TIMEOUT_SECONDS": "3600"}
    async with run_scenario(send_nothing, tmp_path, **env) as play:
        client = await play.connect()
        with lock(play.file):
            client.writer.write(data)
            await play.wait_for_active_stream()
            await play.begin_shutdown()
        reply = await client.head()
        assert reply.headers["connection"] == "close"
        status, code = await reply.status_and_code()
        # On a slow machine the service may give up the lock before the shutdown begins.
        assert (status, code in ("shutting_down", "state_unavailable")) == (503, True)
        await client.wait_closed()
        assert await play.wait_for_exit() == [code]
        assert (play.read_turns(), play.upstream.requests) == ([], [])


@pytest.mark.parametrize("reads", [False, pytest.param(True, marks=slow)], ids=["never", "slowly"])
async def test_client_that_does_not_read_is_reset_after_the_drain(
    reads: bool, tmp_path: Path
) -> None:
    # No other deadline ends the connection.
    env = {"DRAIN_SECONDS": "0.3", "WRITE_TIMEOUT_SECONDS": "3600"}
    async with run_scenario(send_a_megabyte, tmp_path, **env) as play:
        client = await play.connect(connect_slow_client)
        client.writer.write(CHAT)
        assert (await (await client.head()).event())["chunk"] == "x" * 100

        async def read_slowly() -> None:
            while await client.reader.read(1):  # noqa: ASYNC110 - the delay is the point
                await anyio.sleep(0.1)

        reading = asyncio.ensure_future(read_slowly()) if reads else None
        await play.begin_shutdown()
        [outcome] = await play.wait_for_exit()
        # The terminal event is not read either, unless a slow machine has not filled the buffers.
        assert outcome in ("client_disconnected", "shutting_down")
        if reading:
            reading.cancel()
        [(text, is_complete)] = play.read_turns()
        assert (len(text) > 0, is_complete) == (True, False)


@slow
async def test_turn_that_is_being_stored_is_not_lost(tmp_path: Path) -> None:
    ending = asyncio.Event()

    async def script(request: Connection) -> None:
        await request.stream(delta("Hel"))
        await ending.wait()
        await request.send_events(delta(finish_reason="stop"), DONE)
        await request.closed.wait()

    async with run_scenario(script, tmp_path, DRAIN_SECONDS="3600") as play:
        reply = await (await play.connect()).chat()
        assert (await reply.event())["chunk"] == "Hel"
        with locked(play.file):
            ending.set()
            await (await play.upstream.wait_for_request()).closed.wait()
            play.signal()
        outcome = get_outcome((await read_to_end(reply))[1])
        assert await play.wait_for_exit() == [outcome]
        # On a slow machine the service may give up the lock, and says so.
        stored = {"done": [("Hel", True)], "state_unavailable": []}
        assert play.read_turns() == stored[outcome]


@slow
async def test_turn_that_cannot_be_stored_ends_with_state_unavailable(tmp_path: Path) -> None:
    async with run_scenario(send_one_chunk, tmp_path, DRAIN_SECONDS="0.3") as play:
        reply = await (await play.connect()).chat()
        assert (await reply.event())["chunk"] == "Hel"
        with locked(play.file):
            await play.begin_shutdown()
            assert get_outcome((await read_to_end(reply))[1]) == "state_unavailable"
            assert await play.wait_for_exit() == ["state_unavailable"]
        assert play.read_turns() == []


@slow
@pytest.mark.parametrize(
    "script", [send_nothing, send_one_chunk], ids=["before_first_chunk", "after_first_chunk"]
)
async def test_pipelined_request_gets_no_response(script: Script, tmp_path: Path) -> None:
    async with run_scenario(script, tmp_path, DRAIN_SECONDS="0.3") as play:
        client = await play.connect()
        client.writer.write(CHAT * 2)
        await play.upstream.wait_for_request()
        if script is send_one_chunk:
            assert (await (await client.head()).event())["chunk"] == "Hel"
        await play.begin_shutdown()
        received = await client.reader.read()
        assert await play.wait_for_exit() == ["shutting_down"]
        assert received.count(b'"code":"shutting_down"') == 1
        assert received.count(b"HTTP/1.1 503 ") == (script is send_nothing)
        assert len(play.upstream.requests) == 1


# ---- Drain


async def test_drain_returns_when_the_last_tracked_block_ends() -> None:
    drain = Drain()
    aborts: list[ServiceError] = []
    ending = asyncio.Event()

    async def short() -> None:
        with drain.track(aborts.append):
            await ending.wait()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(short)
        tasks.start_soon(drain.drain, 3600)
        await anyio.wait_all_tasks_blocked()
        assert drain.draining
        ending.set()
    assert aborts == []


async def test_forced_drain_aborts_what_is_tracked_and_what_begins_later() -> None:
    drain = Drain()
    aborts: list[ServiceError] = []
    with drain.track(aborts.append):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(drain.drain, 3600)
            await anyio.wait_all_tasks_blocked()
            drain.force()
    with drain.track(aborts.append):
        pass
    assert [error.code for error in aborts] == ["shutting_down", "shutting_down"]
