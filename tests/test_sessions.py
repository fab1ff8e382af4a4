"""What the assistant remembers and whose it is: the store by itself, with a clock of the test's,
and the service around it."""

import ast
import asyncio
import json
import logging
import os
import re
import socket
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
)
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest

import sessions
from ratelimit import anonymous_caller
from server import Drain
from service import create_app, sweep_periodically
from sessions import APPLICATION_ID, SCHEMA_VERSION, SWEEP_ROWS, SessionStore, SQLiteStore, Turn
from settings import SettingsError, from_env
from tests.conftest import raises

Headers = Mapping[str, str]

TTL = 100.0
MAX_CHARS = 1000
AT = 1_800_000_000.0
ME = anonymous_caller("192.0.2.1").owner
NEIGHBOUR = anonymous_caller("192.0.2.2").owner
NOBODYS_GUESS = "s_" + "A" * 43


@dataclass
class Clock:
    """A clock that a test moves."""

    now: float = AT

    def __call__(self) -> float:
        return self.now


@asynccontextmanager
async def opened(
    file: Path | str, clock: Clock, max_chars: int = MAX_CHARS
) -> AsyncIterator[SQLiteStore]:
    store = SQLiteStore(str(file), ttl=TTL, max_chars=max_chars, clock=clock)
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "chat.db"


@pytest.fixture
async def store(file: Path, clock: Clock) -> AsyncIterator[SQLiteStore]:
    async with opened(file, clock) as store:
        yield store


def said(
    message: str = "Hi", answer: str = "Hello", *, complete: bool = True, at: float = AT
) -> Turn:
    return Turn(message, answer, complete, at, at)


async def talk(
    store: SessionStore, session_id: str | None, *turns: Turn | None, owner: str = ME
) -> str:
    """These turns in one session, None for an answer without text; its id."""
    for turn in turns:
        session = await store.open(owner, session_id)
        session_id = session.id
        await store.end(session, turn)
    assert session_id is not None
    return session_id


async def texts(store: SessionStore, session_id: str, owner: str = ME) -> list[str]:
    """The messages that the session remembers."""
    return [turn.message for turn in (await store.read(owner, session_id)).turns]


@contextmanager
def other_connection(file: Path) -> Iterator[sqlite3.Connection]:
    """An operator's shell on the same file."""
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        yield db


def content(file: Path) -> bytes:
    """All that is in the file; not while it is open, for closing it here would end its locks."""
    return file.read_bytes()


COUNTS = {
    "session": "SELECT count(*) FROM session",
    "turn": "SELECT coalesce(sum(json_array_length(turns)), 0) FROM session",
}


def count(file: Path, what: str) -> int:
    with other_connection(file) as db:
        number: int = db.execute(COUNTS[what]).fetchone()[0]
        return number


HOLD = """
import sqlite3, sys
for path in sys.argv[1:]:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN EXCLUSIVE")
    globals()[path] = db
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held(*files: Path) -> Iterator[None]:
    """Another process has these files locked while the block runs."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield
        process.communicate()


# SQLite undoes a statement that fails, or, as on a full disk, the whole transaction.
FAILURES = ("ABORT", "ROLLBACK")


@contextmanager
def storing_fails(file: Path, how: str = "ROLLBACK") -> Iterator[None]:
    """The table takes nothing while the block runs."""
    with other_connection(file) as db:
        for event in ("INSERT", "UPDATE"):
            db.execute(
                f"CREATE TRIGGER no_{event} BEFORE {event} ON session"
                f" BEGIN SELECT RAISE({how}, 'no'); END"
            )
        yield
        db.execute("DROP TRIGGER no_INSERT")
        db.execute("DROP TRIGGER no_UPDATE")


# ---- the store: one answer at a time, and its end


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("chosen", ["mine", None])
async def test_a_turn_that_cannot_be_stored_is_not_half_stored_and_gives_the_lock_back(
    store: SQLiteStore, file: Path, chosen: str | None, how: str
) -> None:
    session = await store.open(ME, chosen)
    with storing_fails(file, how=how), raises("state_unavailable"):
        await store.end(session, said("lost"))
    if chosen is None:
        assert count(file, "session") == 0
        return
    await talk(store, chosen, said("next"))
    assert await texts(store, chosen) == ["next"]


async def test_a_lock_that_was_taken_reaches_a_caller_who_is_cancelled(store: SQLiteStore) -> None:
    session = None
    with anyio.CancelScope() as scope:
        scope.cancel()
        session = await store.open(ME, "mine")
    assert session is not None
    await store.end(session, None)
    await store.delete(ME, "mine")


async def test_an_end_that_is_given_up_while_it_waits_gives_the_lock_back(
    store: SQLiteStore, file: Path
) -> None:
    """As after FINISH_SECONDS_LIMIT, when the file has been locked for as long."""
    first, second = await store.open(ME, "first"), await store.open(ME, "second")
    with held(file):
        slow = asyncio.create_task(store.end(first, said()))
        with anyio.CancelScope() as scope:
            asyncio.get_running_loop().call_soon(scope.cancel)
            await store.end(second, said())
        with raises("state_unavailable"):
            await slow
    await talk(store, "first", said())
    await talk(store, "second", said())


# ---- the store: expiry


@pytest.mark.parametrize("answering", [0, 1, SWEEP_ROWS])
async def test_a_sweep_removes_all_that_has_expired_and_nothing_else(
    store: SQLiteStore, clock: Clock, file: Path, answering: int
) -> None:
    busy = [await store.open(ME, f"busy-{number}") for number in range(answering)]
    for number in range(2 * SWEEP_ROWS + 1):
        await talk(store, f"old-{number}", said(at=AT))
    clock.now = AT + TTL
    await talk(store, "young", said("young", at=clock.now))
    await store.sweep()
    assert count(file, "session") == 1 + answering
    assert count(file, "turn") == 1
    for session in busy:
        await store.end(session, None)
    await store.sweep()
    assert count(file, "session") == 1
    assert await texts(store, "young") == ["young"]


async def test_the_file_shrinks_and_does_not_grow_for_ever(file: Path, clock: Clock) -> None:
    sizes = []
    for _ in range(10):
        async with opened(file, clock, max_chars=100_000) as store:
            for number in range(50):
                await talk(store, f"s-{number}", said("x" * 10_000, at=clock.now))
        full = len(content(file))
        clock.now += TTL
        async with opened(file, clock) as store:
            await store.sweep()
        sizes.append(len(content(file)))
        assert sizes[-1] < full / 10
    assert max(sizes) == sizes[0]


async def forget_by_delete(store: SQLiteStore, clock: Clock) -> None:
    await store.delete(ME, "mine")


async def forget_by_expiry(store: SQLiteStore, clock: Clock) -> None:
    clock.now += TTL
    await store.sweep()


async def forget_by_trimming(store: SQLiteStore, clock: Clock) -> None:
    await talk(store, "mine", said("y" * MAX_CHARS))


async def forget_by_a_successor(store: SQLiteStore, clock: Clock) -> None:
    clock.now += TTL
    await talk(store, "mine", None)


@pytest.mark.parametrize(
    "forget", [forget_by_delete, forget_by_expiry, forget_by_trimming, forget_by_a_successor]
)
async def test_what_was_deleted_is_in_no_file_after_the_next_sweep(
    file: Path, clock: Clock, forget: Callable[[SQLiteStore, Clock], Awaitable[None]]
) -> None:
    async with opened(file, clock) as store:
        await talk(store, "other", *(said("z" * 90) for _ in range(10)))
        # More than a page, and less.
        await talk(store, "mine", said("private, " * 2000, "private"))
    assert b"private" in content(file)
    async with opened(file, clock) as store:
        await forget(store, clock)
        await store.sweep()
        # In a process of its own: closing a file here would end the store's locks on it.
        found = await anyio.run_process(["grep", "-rl", "private", str(file.parent)], check=False)
        assert (found.returncode, found.stdout) == (1, b"")
    assert [path.name for path in file.parent.iterdir()] == ["chat.db"]
    assert b"private" not in content(file)


async def test_ids_are_not_in_the_file(file: Path, clock: Clock) -> None:
    async with opened(file, clock) as store:
        issued = await talk(store, None, said())
        await talk(store, "a-name-of-my-own", said())
    assert issued.encode() not in content(file)
    assert b"a-name-of-my-own" not in content(file)


# ---- the file


def become(path: Path, mode: int) -> None:
    """An empty file of this mode, or what is there already."""
    if not path.exists():
        path.touch()
    path.chmod(mode)


@pytest.mark.parametrize("before", [None, 0o644, 0o666])
async def test_the_file_is_for_its_owners_eyes_only(
    file: Path, clock: Clock, before: int | None
) -> None:
    if before is not None:
        become(file, before)
    async with opened(file, clock) as store:
        await talk(store, "mine", said())
        modes = {path.name: path.stat().st_mode & 0o777 for path in file.parent.iterdir()}
    assert modes == {"chat.db": 0o600, "chat.db-wal": 0o600, "chat.db-shm": 0o600}


async def test_the_schemas_version_is_stored(store: SQLiteStore, file: Path) -> None:
    with other_connection(file) as db:
        assert db.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION


def newer_schema(file: Path) -> None:
    with other_connection(file) as db:
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")


def not_a_database(file: Path) -> None:
    file.write_text("# A project\n" * 100)


def another_program_s(file: Path) -> None:
    with other_connection(file) as db:
        db.execute("CREATE TABLE invoice (number INTEGER PRIMARY KEY)")


def another_program_s_version(file: Path) -> None:
    another_program_s(file)
    with other_connection(file) as db:
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


def directory(file: Path) -> None:
    file.mkdir()


def missing_directory(file: Path) -> None:
    file.parent.rmdir()


@pytest.mark.parametrize(
    "prepare",
    [
        newer_schema,
        not_a_database,
        another_program_s,
        another_program_s_version,
        directory,
        missing_directory,
    ],
)
def test_a_state_url_that_cannot_be_used_stops_the_start_in_one_line_and_changes_nothing(
    file: Path, prepare: Callable[[Path], None]
) -> None:
    prepare(file)
    before = file.read_bytes() if file.is_file() else None
    with pytest.raises(SettingsError) as classify_error:
        create_app(from_env({"STATE_URL": f"sqlite:///{file}"}), logging.Logger("test"), Drain())
    line = str(classify_error.value)
    assert line.startswith(f"STATE_URL: {file} ")
    assert "sqlite:///PATH" in line
    assert "\n" not in line
    assert (file.read_bytes() if file.is_file() else None) == before


def test_a_redis_that_is_not_there_stops_the_start() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        settings = from_env({"STATE_URL": f"redis://user:password@{address}/0"})
        with pytest.raises(SettingsError) as classify_error:
            create_app(settings, logging.Logger("test"), Drain())
    line = str(classify_error.value)
    assert line.startswith("STATE_URL: Redis does not serve: ")
    assert address in line
    assert "user" not in line
    assert "password" not in line


@contextmanager
def unprivileged(directory: Path) -> Iterator[None]:
    """Root may write anywhere: be somebody else while the block runs, the owner of `directory`."""
    root = os.geteuid() == 0
    if root:
        for path in (directory, *directory.iterdir()):
            os.chown(path, 65534, 65534)
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """A directory that not only this user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize(
    ("of_file", "of_directory"), [(0o400, 0o755), (0o600, 0o555), (None, 0o555)]
)
async def test_a_place_that_may_not_be_written_stops_the_start_with_what_to_set(
    reachable: Path, clock: Clock, of_file: int | None, of_directory: int
) -> None:
    file = reachable / "chat.db"
    if of_file is not None:
        async with opened(file, clock) as store:
            await talk(store, "mine", said("kept"))
        become(file, of_file)
    become(reachable, of_directory)
    with (
        unprivileged(reachable),
        pytest.raises(SettingsError, match=r"STATE_URL: .*sqlite:///PATH"),
    ):
        SQLiteStore(str(file), ttl=TTL, max_chars=MAX_CHARS, clock=clock)
    become(reachable, 0o755)
    if of_file is not None:
        become(file, 0o600)
        async with opened(file, clock) as store:
            assert await texts(store, "mine") == ["kept"]


async def test_a_file_that_another_process_holds_stops_the_start_until_it_is_free(
    file: Path, clock: Clock
) -> None:
    async with opened(file, clock) as store:
        await talk(store, "mine", said("kept"))
    with held(file), pytest.raises(SettingsError, match="locked"):
        SQLiteStore(str(file), ttl=TTL, max_chars=MAX_CHARS, clock=clock)
    async with opened(file, clock) as store:
        assert await texts(store, "mine") == ["kept"]


async def test_while_another_process_holds_the_file_it_can_be_read_and_afterwards_written(
    tmp_path: Path, clock: Clock
) -> None:
    """Each in a file of its own, so that they wait for the lock together."""
    files = [tmp_path / f"{number}.db" for number in range(4)]
    async with (
        opened(files[0], clock) as ends,
        opened(files[1], clock) as begins,
        opened(files[2], clock) as deletes,
        opened(files[3], Clock(AT + TTL)) as sweeps,
    ):
        for store in (ends, begins, deletes, sweeps):
            await talk(store, "mine", said("before"))
        session = await ends.open(ME, "mine")
        with held(*files):
            # What the service does by itself outlives what it can't do now.
            sweeping = asyncio.create_task(sweep_periodically(sweeps))
            refused = await asyncio.gather(
                ends.end(session, said("lost")),
                begins.open(ME, "new"),
                deletes.delete(ME, "mine"),
                # After the sweep, in the same thread.
                sweeps.check(),
                return_exceptions=True,
            )
            assert [type(error) for error in refused[:3]] == ["state_unavailable"] * 3
            assert refused[3] is None
            assert not sweeping.done()
            for store in (ends, begins, deletes):
                await store.check()
                assert await texts(store, "mine") == ["before"]
        sweeping.cancel()
        await talk(ends, "mine", said("after"))
        assert await texts(ends, "mine") == ["before", "after"]
        await talk(begins, "new", said("after"))
        await deletes.delete(ME, "mine")
        await sweeps.sweep()
    assert [count(file, "session") for file in files] == [1, 2, 0, 0]


async def test_a_store_that_does_not_answer_fails_its_check(store: SQLiteStore, file: Path) -> None:
    await store.check()
    with other_connection(file) as db:
        db.execute("ALTER TABLE session RENAME TO elsewhere")
        with raises("state_unavailable") as failure:
            await store.check()
        assert (failure.value.retryable, failure.value.retry_after) == (True, 1)
        db.execute("ALTER TABLE elsewhere RENAME TO session")
    await store.check()


# ---- the store when it holds much


def statements() -> list[str]:
    """All the SQL that works on sessions and turns, as it stands in the module."""
    tree = ast.parse(Path(sessions.__file__).read_text(encoding="utf-8"))
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [
        text
        for text in strings
        if isinstance(text, str)
        and re.match("(SELECT|INSERT|UPDATE|DELETE) ", text)
        and re.search("(FROM|INTO|UPDATE) (session|turn)", text)
    ]


def steps(db: sqlite3.Connection, sql: str, *values: object) -> int:
    """How many instructions of SQLite's machine a statement takes."""
    taken = 0

    def step() -> int:
        nonlocal taken
        taken += 1
        return 0

    db.set_progress_handler(step, 1)
    db.execute(sql, values).fetchall()
    db.set_progress_handler(None, 0)
    return taken


def fill(file: Path, sessions: int) -> None:
    """Sessions of two turns each, the first half of them expired at AT."""
    with other_connection(file) as db:
        db.execute("BEGIN")
        turns = json.dumps([["Hi", "Hello", True, 0.0, 0.0]] * 2)
        db.executemany(
            "INSERT INTO session VALUES (NULL, ?, ?, 0.0, ?, ?)",
            (
                (number.to_bytes(32), ME, AT + number - sessions // 2, turns)
                for number in range(sessions)
            ),
        )
        db.execute("COMMIT")


async def test_no_statement_reads_a_whole_table(store: SQLiteStore, file: Path) -> None:
    found = statements()
    assert len(found) >= 6
    with other_connection(file) as db:
        for sql in found:
            values = [None] * len(set(re.findall(r"\?\d*", sql)) - {"?"} or re.findall(r"\?", sql))
            plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
            # What is locked just now is a list of the process's own.
            scans = [step for step in plan if re.match("SCAN (?!json_each)", step)]
            # One row of any is enough to see that the store answers.
            assert not scans or sql == "SELECT 1 FROM session LIMIT 1", (sql, plan)


@pytest.mark.slow
async def test_a_hundred_thousand_sessions_cost_a_request_no_more_than_a_hundred(
    tmp_path: Path, clock: Clock
) -> None:
    taken: dict[int, list[int]] = {}
    for sessions_stored in (100, 100_000):
        file = tmp_path / f"{sessions_stored}.db"
        async with opened(file, clock):
            fill(file, sessions_stored)
        with other_connection(file) as db:
            middle = sessions_stored // 2
            key = (middle.to_bytes(32), ME)
            taken[sessions_stored] = [
                steps(
                    db,
                    "SELECT generation FROM session WHERE digest = ? AND owner IN (?, 'anyone')",
                    *key,
                ),
                steps(db, "UPDATE session SET expires_at = ? WHERE generation = ?", 0.5, middle),
                steps(db, "DELETE FROM session WHERE generation = ?", middle),
                steps(
                    db,
                    "SELECT generation FROM session WHERE expires_at <= ? AND generation NOT IN"
                    " (SELECT value FROM json_each('[1]')) LIMIT 10",
                    AT,
                ),
            ]
        async with opened(file, clock) as store:
            await store.sweep()
            assert count(file, "session") == sessions_stored // 2 - 1
            await talk(store, "mine", said("one"), said("two"))
            assert await texts(store, "mine") == ["one", "two"]
    assert taken[100_000] == taken[100]
