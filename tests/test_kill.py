"""Stored turns survive when the process is stopped, killed or out of disk space."""

import asyncio
import json
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    asynccontextmanager,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass, field
from pathlib import Path

import h11
import pytest

from tests.conftest import TIMEOUT_SECONDS, Log, RunningService, StartUpstream, openai_env
from tests.test_conversations import (
    echo,
    echoed,
    finish,
    provider_messages,
    read_messages,
    request_session,
    wait_after_text,
)
from tests.upstream import Connection, delta

slow = pytest.mark.slow
ROOT = Path(__file__).parent.parent


def environment(file: Path, env: dict[str, str]) -> dict[str, str]:
    """Return the environment of a service with sessions in `file`, without this process's own."""
    return {
        "PYTHONPATH": str(ROOT),
        "PORT": "0",
        "RATE_LIMIT": "off",
        "STATE_URL": f"sqlite:///{file}",
        **env,
    }


@asynccontextmanager
async def running_process(
    file: Path, env: dict[str, str], program: Sequence[str] = ("-m", "service")
) -> AsyncIterator[tuple[RunningService, asyncio.subprocess.Process]]:
    """Run the service in its own process, with sessions in `file`. Kill it at the end."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, *program),
        cwd=file.parent,
        env=environment(file, env),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT_SECONDS):
        line = json.loads(await process.stdout.readline())
    running = RunningService(line["url"], Log())
    # The service would block once the pipe is full.
    reading = asyncio.create_task(process.stdout.read())
    try:
        yield running, process
    finally:
        for client in running.clients:
            client.disconnect()
        if process.returncode is None:
            process.kill()
        await process.wait()
        await reading


def file_names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


async def chat_to_end(app: RunningService, message: str, session_id: str) -> str:
    """Return the status of the terminal event."""
    status: str = (await (await app.chat(message, session_id=session_id)).events())[-1]["status"]
    return status


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGKILL])
async def test_conversation_continues_after_the_process_ended(
    upstream: StartUpstream, tmp_path: Path, sign: signal.Signals
) -> None:
    provider = await upstream(echo)
    file = tmp_path / "chat.db"
    env = openai_env(provider.url, SYSTEM_PROMPT="Be brief.")
    async with running_process(file, env) as (app, process):
        assert await chat_to_end(app, "one", "mine") == "done"
        if sign is signal.SIGKILL:
            provider.script = wait_after_text
            assert (await (await app.chat("lost", session_id="mine")).event())["chunk"] == "You sa"
            provider.script = echo
        process.send_signal(sign)
        await process.wait()
        if sign is signal.SIGTERM:
            # A stopped service leaves everything in one file, besides an empty one for its lock.
            assert file_names(tmp_path) == {"chat.db", "chat.db.lock"}
    async with running_process(file, env) as (app, _):
        assert await read_messages(app, "mine") == echoed("one")
        assert await chat_to_end(app, "two", "mine") == "done"
        assert await chat_to_end(app, "three", "mine") == "done"
        assert await read_messages(app, "mine") == echoed("one", "two", "three")
    system = ("system", "Be brief.", True)
    bodies = [request.body["messages"] for request in provider.requests]
    assert [messages for messages in bodies if messages[-1]["content"] != "lost"] == [
        provider_messages(system, ("user", "one", True)),
        provider_messages(system, *echoed("one"), ("user", "two", True)),
        provider_messages(system, *echoed("one", "two"), ("user", "three", True)),
    ]


@dataclass
class Countdown:
    """Calls `act` some seconds after it was itself called for the `count`th time."""

    count: int
    seconds: float
    act: Callable[[], None]

    def __call__(self) -> None:
        self.count -= 1
        if self.count == 0:
            asyncio.get_running_loop().call_later(self.seconds, self.act)


@dataclass
class Conversation:
    """One client's session: the messages it sent, and those whose response was done."""

    session_id: str | None
    sent: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    in_response: bool = False

    async def run(self, app: RunningService, on_event: Callable[[], None]) -> None:
        """Send one message after the other until the service dies."""
        with suppress(OSError, h11.RemoteProtocolError):
            while True:
                self.in_response = False
                message = f"This is a message and it has the number {len(self.sent)}"
                self.sent.append(message)
                reply = await app.chat(message, session_id=self.session_id)
                self.session_id = reply.headers["x-session-id"]
                while (event := await reply.event()) is not None:
                    self.in_response = event.get("status") is None
                    on_event()
                    if not self.in_response:
                        assert event["status"] == "done"
                        self.done.append(message)

    async def check(self, app: RunningService) -> None:
        """Check that every turn that was done is stored, and of the last turn all or nothing."""
        if self.session_id is None:
            return
        reply = await request_session(app, "GET", self.session_id)
        if reply.status == 404:
            # The session's id was issued, but its first response never ended.
            assert self.done == []
            return
        messages = (await reply.json())["messages"]
        stored = [(each["role"], each["content"], each["complete"]) for each in messages]
        assert stored in (echoed(*self.done), echoed(*self.sent))
        self.done = [content for role, content, _ in stored if role == "user"]
        self.sent = [*self.done]


def check_integrity(file: Path, directory: Path) -> None:
    """Check a copy of the database: opening the file would recover it before the service does."""
    directory.mkdir()
    for path in (file, file.with_name("chat.db-wal")):
        shutil.copy(path, directory)
    with closing(sqlite3.connect(directory / file.name)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []


# Each test starts three processes or more. With more it would not end in time on a busy machine.
KILLS = 2


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=slow) for n in range(1, 50))])
async def test_turns_that_were_done_survive_kills_and_no_turn_is_stored_in_part(
    upstream: StartUpstream, tmp_path: Path, number: int
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - pytest shows it if the test fails
    dice = random.Random(seed)

    async def echo_by_word(request: Connection) -> None:
        """Echo, but wait for the next request, so that one response is always in progress."""
        next_request = len(provider.requests)
        await request.stream(delta("You"), delta(" said"))
        await provider.wait_for_request(next_request)
        if request.closed.is_set():
            return
        for word in request.body["messages"][-1]["content"].split(" "):
            await request.send_events(delta(f" {word}"))
        await finish(request)

    provider = await upstream(echo_by_word)
    env = openai_env(provider.url)
    file = tmp_path / "chat.db"
    conversations: list[Conversation] = []
    interrupted = False
    kill = 0
    # Go on until a kill has interrupted a response and a turn was done.
    while kill < KILLS or not interrupted or not any(each.done for each in conversations):
        async with running_process(file, env) as (app, process):
            for conversation in conversations[-4:]:
                await conversation.check(app)
            # One session continues after the kill. Of the new ones, one or two have a chosen id.
            running = [Conversation(f"{kill}-0"), Conversation(f"{kill}-1")]
            running += [Conversation(None), Conversation(None)]
            running[:1] = conversations[-4:-3] or running[:1]
            on_event = Countdown(dice.randrange(1, 200), dice.uniform(0, 0.005), process.kill)
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await asyncio.gather(*(each.run(app, on_event) for each in running))
            assert await process.wait() == -signal.SIGKILL
        interrupted = interrupted or any(each.in_response for each in running)
        conversations += running
        check_integrity(file, tmp_path / f"after-{kill}")
        kill += 1
    async with running_process(file, env) as (app, _):
        for conversation in conversations:
            await conversation.check(app)


@contextmanager
def limited_file_size(process: asyncio.subprocess.Process, directory: Path) -> Iterator[None]:
    """Let no file of the process grow. This needs no privilege and affects no other process."""
    limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    size = (directory / "chat.db-wal").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, limits[1]))
    yield
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)


@contextmanager
def full_disk(process: asyncio.subprocess.Process, directory: Path) -> Iterator[None]:
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """Mount a disk of 1 MiB at `directory`."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"this user cannot mount a disk: {mounted.stderr.decode().strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize(
    ("disk", "exhausted"),
    [(nullcontext, limited_file_size), pytest.param(small_disk, full_disk, marks=slow)],
)
async def test_full_disk_rejects_chats_until_there_is_space(
    upstream: StartUpstream,
    tmp_path: Path,
    disk: Callable[[Path], AbstractContextManager[None]],
    exhausted: Callable[[asyncio.subprocess.Process, Path], AbstractContextManager[None]],
) -> None:
    provider = await upstream(echo)
    file = tmp_path / "chat.db"
    with disk(tmp_path):
        async with running_process(file, openai_env(provider.url)) as (app, process):
            assert await chat_to_end(app, "one", "mine") == "done"
            with exhausted(process, tmp_path):
                if exhausted is limited_file_size:
                    # The service does not see this limit before a write fails.
                    await (await app.chat("x" * 8000, session_id="lost")).body()
                requests = len(provider.requests)
                for session_id in ("mine", "new", None):
                    rejected = await app.chat("two", session_id=session_id)
                    assert await rejected.status_and_code() == (503, "state_unavailable")
                assert len(provider.requests) == requests
                assert (await app.get("/readyz")).status == 503
                assert await read_messages(app, "mine") == echoed("one")
            assert await chat_to_end(app, "three", "mine") == "done"
            assert await chat_to_end(app, "two", "new") == "done"
            assert await read_messages(app, "mine") == echoed("one", "three")
            process.kill()
            await process.wait()
        check_integrity(file, tmp_path / "copy")
        async with running_process(file, openai_env(provider.url)) as (app, _):
            assert await read_messages(app, "mine") == echoed("one", "three")
