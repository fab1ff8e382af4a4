"""How the process ends: by itself, with status 0, and with a true ending for every answer."""

import asyncio
import json
import os
import signal
import sqlite3
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest

import errors
from server import Drain
from tests.client import Client
from tests.conftest import TIMEOUT_SECONDS
from tests.faults import connect_slow_client, get_outcome, provider_env, read_to_end
from tests.upstream import (
    DONE,
    END,
    Connection,
    Script,
    Upstream,
    delta,
    http_chunk,
    response,
    running_upstream,
)

slow = pytest.mark.slow
ROOT = Path(__file__).parent.parent
CHAT = (
    b"POST /api/v1/chat HTTP/1.1\r\nhost: x\r\ncontent-length: 15\r\n"
    b'content-type: application/json\r\n\r\n{"message":"x"}'
)


@dataclass
class Running:
    """A service in a process of its own."""

    process: Process
    url: str
    upstream: Upstream
    file: Path
    lines: list[dict[str, Any]]
    clients: list[Client] = field(default_factory=list)

    async def line(self, event: str, **fields: object) -> dict[str, Any]:
        """The next line of the log that says this."""
        assert self.process.stdout is not None
        while text := await self.process.stdout.readline():
            self.lines.append(json.loads(text))
            if self.lines[-1]["event"] == event and fields.items() <= self.lines[-1].items():
                return self.lines[-1]
        raise AssertionError(f"no line says {event!r}")

    async def connect(self) -> Client:
        return self.held(await Client.connect(self.url))

    def held(self, client: Client) -> Client:
        """A client that is gone when the test ends."""
        self.clients.append(client)
        return client

    def stop(self, sign: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(sign)

    async def stopping(self) -> None:
        """Tell it to stop, and return when it has begun to."""
        self.stop()
        await self.line("Stopping")

    async def ended(self) -> None:
        """The process ends with 0, has closed its sockets in order and said nothing on stderr."""
        out, err = await self.process.communicate()
        self.lines += [json.loads(text) for text in out.splitlines()]
        assert (self.process.returncode, err) == (0, b"")
        assert self.lines[-1]["event"] == "Stopped"
        assert {line["level"] for line in self.lines} <= {"info", "warning"}

    def disconnect(self) -> None:
        for client in self.clients:
            client.disconnect()

    def turns(self) -> list[tuple[str, bool]]:
        """The answers in the file, and whether each is complete."""
        with sqlite3.connect(self.file) as db:
            rows = db.execute("SELECT turns FROM session").fetchall()
        db.close()
        return [(turn[1], turn[2]) for (turns,) in rows for turn in json.loads(turns)]

    def outcomes(self) -> list[str]:
        return [line["outcome"] for line in self.lines if line["event"] == "request"]


@asynccontextmanager
async def process(script: Script, tmp_path: Path, **env: str) -> AsyncIterator[Running]:
    file = tmp_path / "chat.db"
    async with running_upstream(script) as upstream, AsyncExitStack() as stack:
        given = {**provider_env(upstream.url), "PORT": "0", "STATE_URL": f"sqlite:///{file}", **env}
        # What coverage needs to measure a child.
        inherited = {name: os.environ[name] for name in os.environ if name.startswith("COV")}
        child = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service"),
            cwd=tmp_path,
            env={**inherited, "PYTHONPATH": str(ROOT), **given},
            stdout=PIPE,
            stderr=PIPE,
        )
        try:
            with anyio.fail_after(2 * TIMEOUT_SECONDS):
                assert child.stdout is not None
                first = json.loads(await child.stdout.readline())
                url = first["event"].removeprefix("Listening on ").partition(";")[0]
                running = Running(child, url, upstream, file, [first])
                stack.callback(running.disconnect)
                yield running
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()


async def silence(request: Connection) -> None:
    await request.closed.wait()


async def hello(request: Connection) -> None:
    await request.stream(delta("Hel"))
    await request.closed.wait()


# With no other deadline that would end a client that takes too little.
CUT_ALONE = {"DRAIN_SECONDS": "0.3", "WRITE_TIMEOUT_SECONDS": "3600"}


def flood(held_back: asyncio.Event) -> Script:
    """More than all buffers together hold; the event tells that nothing more is taken."""
    part = b"".join(http_chunk(delta("x" * 100)) for _ in range(200))

    async def script(request: Connection) -> None:
        await request.stream()
        while not request.closed.is_set():
            sending = asyncio.ensure_future(request.send(part))
            if (await asyncio.wait([sending], timeout=1))[1]:
                held_back.set()
            await sending

    return script


async def busy(request: Connection) -> None:
    await request.send(response(503, b"{}", "retry-after: 20"))


@pytest.mark.parametrize("sign", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=slow)])
async def test_where_nothing_runs_it_ends_at_once(sign: signal.Signals, tmp_path: Path) -> None:
    async with process(silence, tmp_path, DRAIN_SECONDS="3600") as service:
        # A connection that is kept for later is not an answer.
        idle = await service.connect()
        await (await idle.request("GET", "/healthz")).body()
        service.stop(sign)
        await service.ended()
        await idle.wait_closed()


async def test_an_answer_that_ends_in_time_is_done(tmp_path: Path) -> None:
    going = asyncio.Event()

    async def script(request: Connection) -> None:
        await request.stream(delta("Hel"))
        await going.wait()
        await request.send_events(delta("lo", finish_reason="stop"), DONE)
        await request.send(END)

    async with process(script, tmp_path, DRAIN_SECONDS="3600") as service:
        reply = await (await service.connect()).chat()
        assert (await reply.event())["chunk"] == "Hel"
        await service.stopping()
        going.set()
        text, last = await read_to_end(reply)
        assert (text, get_outcome(last)) == ("lo", "done")
        await service.ended()
        assert service.turns() == [("Hello", True)]
        assert service.outcomes() == ["done"]


async def test_while_it_drains_new_chats_and_readyz_are_refused(tmp_path: Path) -> None:
    async with process(hello, tmp_path, DRAIN_SECONDS="3600") as service:
        running = await (await service.connect()).chat()
        await running.event()
        await service.stopping()
        for path, status in (("/readyz", 503), ("/healthz", 200), ("/metrics", 200)):
            reply = await (await service.connect()).request("GET", path)
            assert reply.status == status
            await reply.body()
        late = await (await service.connect()).chat()
        assert (late.status, late.headers["connection"]) == (503, "close")
        assert (late.headers["retry-after"], get_outcome((await read_to_end(late))[1])) == (
            "1",
            "shutting_down",
        )
        service.stop()
        assert get_outcome((await read_to_end(running))[1]) == "shutting_down"
        await service.ended()
        assert len(service.upstream.requests) == 1


@pytest.mark.parametrize(
    ("drain", "again"),
    [
        pytest.param("0.3", None, id="its_time_is_over"),
        pytest.param("3600", signal.SIGTERM, id="a_second_sigterm", marks=slow),
        pytest.param("3600", signal.SIGINT, id="sigint_after_sigterm", marks=slow),
    ],
)
async def test_an_answer_that_does_not_end_is_told_and_kept(
    drain: str, again: signal.Signals | None, tmp_path: Path
) -> None:
    async with process(hello, tmp_path, DRAIN_SECONDS=drain) as service:
        reply = await (await service.connect()).chat()
        assert (await reply.event())["chunk"] == "Hel"
        await service.stopping()
        if again is not None:
            service.stop(again)
        text, last = await read_to_end(reply)
        assert (text, get_outcome(last), last["error"]["retryable"]) == ("", "shutting_down", True)
        await service.ended()
        assert service.turns() == [("Hel", False)]
        assert service.outcomes() == ["shutting_down"]
        for request in service.upstream.requests:
            await request.closed.wait()


@pytest.mark.parametrize(
    ("script", "retries"),
    [
        pytest.param(silence, "0", id="before_its_first_piece"),
        pytest.param(busy, "2", id="in_the_wait_for_a_retry", marks=slow),
    ],
)
async def test_an_answer_that_has_not_begun_has_the_status_503(
    script: Script, retries: str, tmp_path: Path
) -> None:
    limits = {"DRAIN_SECONDS": "0.3", "MAX_RETRIES": retries}
    async with process(script, tmp_path, **limits) as service:
        client = await service.connect()
        asking = asyncio.ensure_future(client.chat())
        await service.upstream.wait_for_request()
        service.stop()
        reply = await asking
        assert (reply.status, reply.headers["connection"]) == (503, "close")
        assert get_outcome((await read_to_end(reply))[1]) == "shutting_down"
        await client.wait_closed()
        await service.ended()
        assert service.turns() == []
        assert service.outcomes() == ["shutting_down"]
        assert len(service.upstream.requests) == 1
        if script is busy:
            # The log says why each attempt failed; it did not fail for our being stopped.
            [line] = [each for each in service.lines if each["event"] == "request"]
            assert [each["error"] for each in line["attempts"]] == ["upstream_unavailable"]


async def test_a_body_that_is_still_on_its_way_has_the_status_503(tmp_path: Path) -> None:
    async with process(
        silence, tmp_path, DRAIN_SECONDS="0.3", BODY_TIMEOUT_SECONDS="60"
    ) as service:
        client = await service.connect()
        head = b"POST /api/v1/chat HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n"
        client.writer.write(head + b"content-type: application/json\r\n\r\n{")
        other = await service.connect()
        active_streams = b""
        while b"chat_active_streams 1.0" not in active_streams:
            active_streams = await (await other.request("GET", "/metrics")).body()
        service.stop()
        reply = await client.head()
        assert (reply.status, reply.headers["connection"]) == (503, "close")
        assert get_outcome((await read_to_end(reply))[1]) == "shutting_down"
        await client.wait_closed()
        await service.ended()
        assert service.outcomes() == ["shutting_down"]


async def test_a_client_that_never_reads_is_cut_in_the_end(tmp_path: Path) -> None:
    held_back = asyncio.Event()
    async with process(flood(held_back), tmp_path, **CUT_ALONE) as service:
        client = service.held(await connect_slow_client(service.url))
        client.writer.write(CHAT)
        await held_back.wait()
        await service.stopping()
        await service.ended()
        [(text, complete)] = service.turns()
        assert (len(text) > 0, complete) == (True, False)


@pytest.mark.slow
async def test_a_turn_that_is_being_stored_is_stored(tmp_path: Path) -> None:
    going = asyncio.Event()

    async def script(request: Connection) -> None:
        await request.stream(delta("Hel"))
        await going.wait()
        await request.send_events(delta(finish_reason="stop"), DONE)
        await request.closed.wait()

    async with process(script, tmp_path, DRAIN_SECONDS="3600") as service:
        reply = await (await service.connect()).chat()
        assert (await reply.event())["chunk"] == "Hel"
        db = sqlite3.connect(service.file, isolation_level=None)
        db.execute("BEGIN IMMEDIATE")
        going.set()
        await (await service.upstream.wait_for_request()).closed.wait()
        service.stop()
        db.execute("ROLLBACK")
        db.close()
        assert get_outcome((await read_to_end(reply))[1]) == "done"
        await service.ended()
        assert service.turns() == [("Hel", True)]


@pytest.mark.slow
async def test_a_session_that_is_being_opened_is_given_back(tmp_path: Path) -> None:
    async with process(silence, tmp_path, DRAIN_SECONDS="0.3") as service:
        db = sqlite3.connect(service.file, isolation_level=None)
        db.execute("BEGIN IMMEDIATE")
        asking = asyncio.ensure_future((await service.connect()).chat(session_id="demo"))
        other = await service.connect()
        active_streams = b""
        while b"chat_active_streams 1.0" not in active_streams:
            active_streams = await (await other.request("GET", "/metrics")).body()
        await service.stopping()
        db.execute("ROLLBACK")
        db.close()
        reply = await asking
        assert (reply.status, reply.headers["connection"]) == (503, "close")
        assert get_outcome((await read_to_end(reply))[1]) == "shutting_down"
        await service.ended()
        assert (service.turns(), service.upstream.requests) == ([], [])


@pytest.mark.slow
async def test_in_the_middle_of_a_failover_it_is_a_503(tmp_path: Path) -> None:
    async def script(request: Connection) -> None:
        if request.body["model"] == "gpt-4o-mini":
            await request.send(response(500, b"{}"))
        else:
            await request.closed.wait()

    env = {"DRAIN_SECONDS": "0.3", "FALLBACK_MODELS": "other,mock/echo"}
    async with process(script, tmp_path, **env) as service:
        asking = asyncio.ensure_future((await service.connect()).chat())
        await service.upstream.wait_for_request(1)
        service.stop()
        reply = await asking
        assert reply.status == 503
        assert get_outcome((await read_to_end(reply))[1]) == "shutting_down"
        await service.ended()
        [line] = [each for each in service.lines if each["event"] == "request"]
        made = [(each["model"], each["error"]) for each in line["attempts"]]
        assert made == [("openai/gpt-4o-mini", "upstream_error"), ("openai/other", None)]


@pytest.mark.slow
async def test_a_client_that_reads_byte_by_byte_is_cut_and_its_text_kept(tmp_path: Path) -> None:
    held_back = asyncio.Event()
    async with process(flood(held_back), tmp_path, **CUT_ALONE) as service:
        client = service.held(await connect_slow_client(service.url))
        client.writer.write(CHAT)
        await held_back.wait()

        async def trickle() -> None:
            while await client.reader.read(1):  # noqa: ASYNC110 - slowness is what is tried
                await anyio.sleep(0.1)

        reading = asyncio.ensure_future(trickle())
        await service.stopping()
        await service.ended()
        reading.cancel()
        [(text, complete)] = service.turns()
        assert (len(text) > 0, complete) == (True, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", [silence, hello], ids=["before_its_first_piece", "in_the_middle"]
)
async def test_a_request_behind_an_answer_is_left_to_another_connection(
    script: Script, tmp_path: Path
) -> None:
    async with process(script, tmp_path, DRAIN_SECONDS="0.3") as service:
        client = await service.connect()
        client.writer.write(CHAT * 2)
        await service.upstream.wait_for_request()
        if script is hello:
            assert (await (await client.head()).event())["chunk"] == "Hel"
        await service.stopping()
        told = await client.reader.read()
        await service.ended()
        assert told.count(b'"code":"shutting_down"') == 1
        assert told.count(b"HTTP/1.1 503 ") == (script is silence)
        assert service.outcomes() == ["shutting_down"]
        assert len(service.upstream.requests) == 1


@pytest.mark.slow
async def test_a_turn_that_can_not_be_stored_in_the_end_is_told(tmp_path: Path) -> None:
    async with process(hello, tmp_path, DRAIN_SECONDS="0.3") as service:
        reply = await (await service.connect()).chat()
        assert (await reply.event())["chunk"] == "Hel"
        db = sqlite3.connect(service.file, isolation_level=None)
        db.execute("BEGIN IMMEDIATE")
        await service.stopping()
        assert get_outcome((await read_to_end(reply))[1]) == "state_unavailable"
        await service.ended()
        db.close()
        assert service.turns() == []
        assert service.outcomes() == ["state_unavailable"]


# ---- the drain by itself


async def test_a_drain_returns_when_the_last_of_what_is_under_way_has_ended() -> None:
    drain = Drain()
    told: list[errors.ServiceError] = []
    with drain.track(told.append):
        first = asyncio.Event()

        async def short() -> None:
            with drain.track(lambda error: None):
                await first.wait()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(short)
            await anyio.lowlevel.checkpoint()
            tasks.start_soon(drain.drain, 3600)
            await anyio.lowlevel.checkpoint()
            assert drain.draining
            first.set()
            await anyio.lowlevel.checkpoint()
            assert told == []
            drain.force()
    assert [error.code for error in told] == ["shutting_down"]
    await drain.drain(3600)


async def test_what_begins_after_the_drain_is_over_is_ended_at_once() -> None:
    drain = Drain()
    await drain.drain(0)
    told: list[errors.ServiceError] = []
    with drain.track(told.append):
        assert [error.code for error in told] == ["shutting_down"]
