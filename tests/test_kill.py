"""The service as a process of its own: stopped, killed, out of disk, refused a start."""

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
from tests.test_conversations import echo, echoed, provider_messages, read_messages, request_session
from tests.upstream import DONE, END, Connection, delta

ROOT = Path(__file__).parent.parent


def environment(file: Path, env: dict[str, str]) -> dict[str, str]:
    """All that the process is told; nothing of what this one was."""
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
    """`python -m service`, listening. Killed at the end of the block if it still runs."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *program,
        cwd=file.parent,
        env=environment(file, env),
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(TIMEOUT_SECONDS):
        line = json.loads(await process.stdout.readline())
    running = RunningService(line["url"], Log())
    # Its log has to be read, or it would wait for that once the pipe is full.
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


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


async def said_to_the_end(app: RunningService, message: str, session_id: str) -> str:
    """The status of the answer's last event."""
    status: str = (await (await app.chat(message, session_id=session_id)).events())[-1]["status"]
    return status


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_a_conversation_goes_on_after_a_stop_and_after_a_kill_in_the_middle_of_an_answer(
    upstream: StartUpstream, tmp_path: Path, how: signal.Signals
) -> None:
    provider = await upstream(echo)
    file = tmp_path / "chat.db"
    env = openai_env(provider.url, SYSTEM_PROMPT="Be brief.")
    async with running_process(file, env) as (app, process):
        assert await said_to_the_end(app, "one", "mine") == "done"
        if how is signal.SIGKILL:

            async def hold(request: Connection) -> None:
                await request.stream(delta("You sa"))

            provider.script = hold
            assert (await (await app.chat("lost", session_id="mine")).event())["chunk"] == "You sa"
            provider.script = echo
        process.send_signal(how)
        await process.wait()
        # What a stop leaves is one file with everything in it.
        assert names(tmp_path) == {"chat.db"} or how is signal.SIGKILL
    async with running_process(file, env) as (app, _):
        assert await read_messages(app, "mine") == echoed("one")
        assert await said_to_the_end(app, "two", "mine") == "done"
        assert await said_to_the_end(app, "three", "mine") == "done"
        assert await read_messages(app, "mine") == echoed("one", "two", "three")
    system = ("system", "Be brief.", True)
    whole = [each for each in provider.requests if each.body["messages"][-1]["content"] != "lost"]
    assert [request.body["messages"] for request in whole] == [
        provider_messages(system, ("user", "one", True)),
        provider_messages(system, *echoed("one"), ("user", "two", True)),
        provider_messages(system, *echoed("one", "two"), ("user", "three", True)),
    ]


@dataclass
class Countdown:
    """Acts `seconds` after it was called for the `left`th time."""

    left: int
    seconds: float
    act: Callable[[], None]

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            asyncio.get_running_loop().call_later(self.seconds, self.act)


@dataclass
class Talk:
    """What one client said in a session, and of which of it it was told that it is done."""

    session_id: str | None
    asked: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    in_the_middle: bool = False

    async def go_on(self, app: RunningService, heard: Callable[[], None]) -> None:
        """One message after the other, until the service dies."""
        with suppress(OSError, h11.RemoteProtocolError):
            while True:
                self.in_the_middle = False
                message = f"This is a message and it has the number {len(self.asked)}"
                self.asked.append(message)
                reply = await app.chat(message, session_id=self.session_id)
                self.session_id = reply.headers["x-session-id"]
                while (event := await reply.event()) is not None:
                    self.in_the_middle = event.get("status") is None
                    heard()
                    if not self.in_the_middle:
                        assert event["status"] == "done"
                        self.done.append(message)

    async def check(self, app: RunningService) -> None:
        """All that was done is remembered, of the last message all or nothing, and nothing else."""
        if self.session_id is None:
            return
        reply = await request_session(app, "GET", self.session_id)
        if reply.status == 404:
            # An issued id, whose first answer never ended.
            assert self.done == []
            return
        messages = (await reply.json())["messages"]
        kept = [(each["role"], each["content"], each["complete"]) for each in messages]
        assert kept in (echoed(*self.done), echoed(*self.asked))
        self.done = [content for role, content, _ in kept if role == "user"]
        self.asked = [*self.done]


def check_integrity(file: Path, directory: Path) -> None:
    """In a copy: to open the file would mend it before the service had to."""
    directory.mkdir()
    for path in (file, file.with_name("chat.db-wal")):
        shutil.copy(path, directory)
    with closing(sqlite3.connect(directory / file.name)) as db:
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert db.execute("PRAGMA foreign_key_check").fetchall() == []


# A hundred in all, in tests of less than a minute.
TEN_TIMES_TEN = [pytest.param(10, marks=pytest.mark.slow, id=f"10-{n}") for n in range(10)]


@pytest.mark.parametrize("kills", [5, *TEN_TIMES_TEN])
async def test_whatever_a_client_was_told_is_done_outlives_a_kill_and_nothing_is_half_there(
    upstream: StartUpstream, tmp_path: Path, kills: int
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")  # noqa: T201 - pytest shows it where the test fails
    dice = random.Random(seed)

    async def word_by_word(request: Connection) -> None:
        """What `echo` says, held until the next request comes: one is always in the middle."""
        after = len(provider.requests)
        await request.stream(delta("You"), delta(" said"))
        await provider.wait_for_request(after)
        if request.closed.is_set():
            return
        for word in request.body["messages"][-1]["content"].split(" "):
            await request.send_events(delta(f" {word}"))
        await request.send_events(delta(finish_reason="stop"), DONE)
        await request.send(END)

    provider = await upstream(word_by_word)
    env = openai_env(provider.url)
    file = tmp_path / "chat.db"
    talks: list[Talk] = []
    cut = 0
    for kill in range(kills + 1):
        async with running_process(file, env) as (app, process):
            # Those of the last kill; in the end all.
            for talk in talks if kill == kills else talks[-4:]:
                await talk.check(app)
            if kill == kills:
                break
            # One session goes on after the kill, two are chosen, two issued.
            talking = [Talk(f"t-{kill}-0"), Talk(f"t-{kill}-1"), Talk(None), Talk(None)]
            talking[:1] = talks[-4:-3] or talking[:1]
            heard = Countdown(dice.randrange(1, 200), dice.uniform(0, 0.005), process.kill)
            async with asyncio.timeout(TIMEOUT_SECONDS):
                await asyncio.gather(*(talk.go_on(app, heard) for talk in talking))
            assert await process.wait() == -signal.SIGKILL
        cut += any(talk.in_the_middle for talk in talking)
        talks += talking
        check_integrity(file, tmp_path / f"after-{kill}")
    assert cut, "none in the middle of an answer"
    assert any(talk.done for talk in talks)
    print(f"{cut} of {kills} in the middle, {sum(len(talk.done) for talk in talks)} turns kept")  # noqa: T201


@contextmanager
def no_larger_file(process: asyncio.subprocess.Process, directory: Path) -> Iterator[None]:
    """What the process writes may not grow, which needs no privilege and harms nobody else."""
    limits = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
    size = (directory / "chat.db-wal").stat().st_size
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, limits[1]))
    yield
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limits)


@contextmanager
def no_space_left(process: asyncio.subprocess.Process, directory: Path) -> Iterator[None]:
    """The disk is full."""
    filler = directory / "filler"
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    yield
    filler.unlink()


@contextmanager
def small_disk(directory: Path) -> Iterator[None]:
    """A disk of one megabyte at `directory`."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(directory)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"this user may not mount a disk: {mounted.stderr.decode().strip()}")
    yield
    subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize(
    ("disk", "full"),
    [
        (nullcontext, no_larger_file),
        pytest.param(small_disk, no_space_left, marks=pytest.mark.slow),
    ],
)
async def test_while_the_disk_is_full_answers_end_in_errors_and_afterwards_all_is_well(
    upstream: StartUpstream,
    tmp_path: Path,
    disk: Callable[[Path], AbstractContextManager[None]],
    full: Callable[[asyncio.subprocess.Process, Path], AbstractContextManager[None]],
) -> None:
    provider = await upstream(echo)
    file = tmp_path / "chat.db"
    with disk(tmp_path):
        async with running_process(file, openai_env(provider.url)) as (app, process):
            assert await said_to_the_end(app, "one", "mine") == "done"
            with full(process, tmp_path):
                events = await (await app.chat("two", session_id="mine")).events()
                assert [each.get("chunk") for each in events] == ["You said ", "two", None]
                assert events[-1]["error"]["code"] == "state_unavailable"
                unsaid = await app.chat("two", session_id="new")
                assert await unsaid.status_and_code() == (503, "state_unavailable")
                assert await read_messages(app, "mine") == echoed("one")
            assert await said_to_the_end(app, "three", "mine") == "done"
            assert await said_to_the_end(app, "two", "new") == "done"
            assert await read_messages(app, "mine") == echoed("one", "three")
            process.kill()
            await process.wait()
        check_integrity(file, tmp_path / "copy")
        async with running_process(file, openai_env(provider.url)) as (app, _):
            assert await read_messages(app, "mine") == echoed("one", "three")


def test_a_state_url_that_cannot_be_used_ends_the_process_with_one_line(tmp_path: Path) -> None:
    file = tmp_path / "missing" / "chat.db"
    ended = subprocess.run(
        [sys.executable, "-m", "service"],
        cwd=tmp_path,
        env=environment(file, {}),
        capture_output=True,
        text=True,
        check=False,
    )
    (line,) = ended.stderr.splitlines()
    assert line.startswith(f"chat-sidecar can't start: STATE_URL: {file} ")
    assert "sqlite:///PATH" in line
    # As for every setting at fault.
    assert ended.returncode == 2
    assert ended.stdout == ""
