"""The SQLite store: threads, locks, expiry, eviction, failures of the database, many sessions.

Rules that hold for every store are tested in test_stores.py, the file in test_database.py.
"""

import ast
import asyncio
import json
import logging
import re
import socket
import sqlite3
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import pytest

import sessions
from errors import ServiceError
from ratelimit import anonymous_caller
from server import Drain
from service import create_app, sweep_periodically
from sessions import SWEEP_ROWS, SessionStore, SQLiteStore, Turn
from settings import SettingsError, from_env
from tests.conftest import create_log, raises

TTL = 100.0
MAX_CHARS = 1000
START = 1_800_000_000.0
CALLER = anonymous_caller("192.0.2.1").owner
OTHER_CALLER = anonymous_caller("192.0.2.2").owner
# Has the form of an issued id, but was never issued.
UNKNOWN_ISSUED_ID = "s_" + "A" * 43


@dataclass
class Clock:
    """A clock that the test sets."""

    now: float = START

    def __call__(self) -> float:
        return self.now


def create_store(
    file: Path | str,
    clock: Clock,
    max_chars: int = MAX_CHARS,
    log: logging.Logger | None = None,
    **options: Any,
) -> SQLiteStore:
    log = log or logging.Logger("test")
    return SQLiteStore(str(file), ttl=TTL, max_chars=max_chars, clock=clock, log=log, **options)


@asynccontextmanager
async def open_store(
    file: Path | str, clock: Clock, max_chars: int = MAX_CHARS, **options: Any
) -> AsyncIterator[SQLiteStore]:
    store = create_store(file, clock, max_chars, **options)
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
    async with open_store(file, clock) as store:
        yield store


def make_turn(
    message: str = "Hi", response: str = "Hello", *, complete: bool = True, at: float = START
) -> Turn:
    return Turn(message, response, complete, at, at)


async def store_turns(
    store: SessionStore, session_id: str | None, *turns: Turn | None, owner: str = CALLER
) -> str:
    """Store these turns in one session and return its id. None is a response without text."""
    for turn in turns:
        session = await store.open(owner, session_id)
        session_id = session.id
        await store.end(session, turn)
    assert session_id is not None
    return session_id


async def stored_messages(store: SessionStore, session_id: str, owner: str = CALLER) -> list[str]:
    """Return the messages of the session's turns."""
    return [turn.message for turn in (await store.read(owner, session_id)).turns]


@contextmanager
def connect(file: Path) -> Iterator[sqlite3.Connection]:
    """Connect to the file as an operator's sqlite3 shell does."""
    with closing(sqlite3.connect(file, isolation_level=None)) as db:
        yield db


def read_bytes(file: Path) -> bytes:
    """Return the content of a file that no store has open.

    Closing the file here would drop the locks that SQLite holds on it in this process.
    """
    return file.read_bytes()


COUNTS = {
    "session": "SELECT count(*) FROM session",
    "turn": "SELECT coalesce(sum(json_array_length(turns)), 0) FROM session",
}


def count_stored(file: Path, item: str) -> int:
    """Return how many sessions or turns the file contains."""
    with connect(file) as db:
        number: int = db.execute(COUNTS[item]).fetchone()[0]
        return number


LOCK_FILES = """
import sqlite3, sys
for path in sys.argv[1:]:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("BEGIN EXCLUSIVE")
    globals()[path] = db
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def exclusive_locks(*files: Path) -> Iterator[None]:
    """Another process holds an exclusive SQLite lock on each file while the block runs."""
    with subprocess.Popen(
        [sys.executable, "-c", LOCK_FILES, *files], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"locked\n"
        yield
        process.communicate()


# SQLite rolls back the failed statement or, as on a full disk, the whole transaction.
FAILURE_MODES = ("ABORT", "ROLLBACK")


@contextmanager
def failing_writes(file: Path, mode: str = "ROLLBACK") -> Iterator[None]:
    """Inserts and updates of sessions fail while the block runs."""
    with connect(file) as db:
        for event in ("INSERT", "UPDATE"):
            db.execute(
                f"CREATE TRIGGER no_{event} BEFORE {event} ON session"
                f" BEGIN SELECT RAISE({mode}, 'no'); END"
            )
        yield
        db.execute("DROP TRIGGER no_INSERT")
        db.execute("DROP TRIGGER no_UPDATE")


# ---- threads


@pytest.mark.parametrize(("path", "count"), [("chat.db", 1), (":memory:", 0)])
async def test_only_a_store_in_a_file_has_a_thread(
    tmp_path: Path, clock: Clock, path: str, count: int
) -> None:
    async with open_store(path if path == ":memory:" else tmp_path / path, clock) as store:
        await store_turns(store, "mine", make_turn())
        names = [thread.name for thread in threading.enumerate()]
        assert sum(name.startswith("sessions") for name in names) == count


async def test_sweep_in_memory_lets_requests_run_in_between(clock: Clock) -> None:
    async with open_store(":memory:", clock) as store:
        for number in range(2 * SWEEP_ROWS):
            await store_turns(store, f"old-{number}", make_turn())
        clock.now += TTL
        sweeping = asyncio.create_task(store.sweep())
        await asyncio.sleep(0)
        assert not sweeping.done()
        await store_turns(store, "new", make_turn())
        await sweeping


# ---- locks


@pytest.mark.parametrize("mode", FAILURE_MODES)
@pytest.mark.parametrize("chosen", ["mine", None])
async def test_failed_end_stores_nothing_and_unlocks_the_session(
    store: SQLiteStore, file: Path, chosen: str | None, mode: str
) -> None:
    session = await store.open(CALLER, chosen)
    with failing_writes(file, mode), raises("state_unavailable"):
        await store.end(session, make_turn("lost"))
    if chosen is None:
        assert count_stored(file, "session") == 0
        return
    await store_turns(store, chosen, make_turn("next"))
    assert await stored_messages(store, chosen) == ["next"]


async def test_cancelled_open_still_returns_the_locked_session(store: SQLiteStore) -> None:
    session = None
    with anyio.CancelScope() as scope:
        scope.cancel()
        session = await store.open(CALLER, "mine")
    assert session is not None
    await store.end(session, None)
    await store.delete(CALLER, "mine")


async def test_cancelled_end_still_unlocks_the_session(store: SQLiteStore, file: Path) -> None:
    """The stream cancels `end` when it takes too long, for example while the file is locked."""
    first, second = await store.open(CALLER, "first"), await store.open(CALLER, "second")
    with exclusive_locks(file):
        slow = asyncio.create_task(store.end(first, make_turn()))
        with anyio.CancelScope() as scope:
            asyncio.get_running_loop().call_soon(scope.cancel)
            await store.end(second, make_turn())
        with raises("state_unavailable"):
            await slow
    await store_turns(store, "first", make_turn())
    await store_turns(store, "second", make_turn())


# ---- expiry and deletion


@pytest.mark.parametrize("active", [0, 1, SWEEP_ROWS])
async def test_sweep_deletes_expired_sessions_that_are_not_locked(
    store: SQLiteStore, clock: Clock, file: Path, active: int
) -> None:
    busy = [await store.open(CALLER, f"busy-{number}") for number in range(active)]
    for number in range(2 * SWEEP_ROWS + 1):
        await store_turns(store, f"old-{number}", make_turn(at=START))
    clock.now = START + TTL
    await store_turns(store, "young", make_turn("young", at=clock.now))
    await store.sweep()
    assert count_stored(file, "session") == 1 + active
    assert count_stored(file, "turn") == 1
    for session in busy:
        await store.end(session, None)
    await store.sweep()
    assert count_stored(file, "session") == 1
    assert await stored_messages(store, "young") == ["young"]


async def test_file_shrinks_when_sessions_expire(file: Path, clock: Clock) -> None:
    sizes = []
    for _ in range(10):
        async with open_store(file, clock, max_chars=100_000) as store:
            for number in range(50):
                await store_turns(store, f"s-{number}", make_turn("x" * 10_000, at=clock.now))
        full = len(read_bytes(file))
        clock.now += TTL
        async with open_store(file, clock) as store:
            await store.sweep()
        sizes.append(len(read_bytes(file)))
        assert sizes[-1] < full / 10
    assert max(sizes) == sizes[0]


async def remove_by_delete(store: SQLiteStore, clock: Clock) -> None:
    await store.delete(CALLER, "mine")


async def remove_by_expiry(store: SQLiteStore, clock: Clock) -> None:
    clock.now += TTL
    await store.sweep()


async def remove_by_trimming(store: SQLiteStore, clock: Clock) -> None:
    await store_turns(store, "mine", make_turn("y" * MAX_CHARS))


async def remove_by_replacement(store: SQLiteStore, clock: Clock) -> None:
    clock.now += TTL
    await store_turns(store, "mine", None)


@pytest.mark.parametrize(
    "remove", [remove_by_delete, remove_by_expiry, remove_by_trimming, remove_by_replacement]
)
async def test_deleted_text_is_in_no_file_after_the_next_sweep(
    file: Path, clock: Clock, remove: Callable[[SQLiteStore, Clock], Awaitable[None]]
) -> None:
    async with open_store(file, clock) as store:
        await store_turns(store, "other", *(make_turn("z" * 90) for _ in range(10)))
        # One text is larger than a database page, the other is smaller.
        await store_turns(store, "mine", make_turn("private, " * 2000, "private"))
    assert b"private" in read_bytes(file)
    async with open_store(file, clock) as store:
        await remove(store, clock)
        await store.sweep()
        # grep runs in another process, because closing the file here would drop the store's locks.
        found = await anyio.run_process(["grep", "-rl", "private", str(file.parent)], check=False)
        assert (found.returncode, found.stdout) == (1, b"")
    assert {path.name for path in file.parent.iterdir()} == {"chat.db", "chat.db.lock"}
    assert b"private" not in read_bytes(file)


async def test_session_ids_are_not_in_the_file(file: Path, clock: Clock) -> None:
    async with open_store(file, clock) as store:
        issued = await store_turns(store, None, make_turn())
        await store_turns(store, "chosen-id", make_turn())
    assert issued.encode() not in read_bytes(file)
    assert b"chosen-id" not in read_bytes(file)


# ---- eviction


async def create_sessions(store: SessionStore, clock: Clock, *names: str, owner: str) -> None:
    """Create sessions, each a second after the one before it."""
    for name in names:
        clock.now += 1
        await store_turns(store, name, make_turn(at=clock.now), owner=owner)


async def existing(store: SessionStore, *names: str, owner: str) -> list[str]:
    """Return the names of the sessions that exist."""
    found = []
    for name in names:
        with suppress(ServiceError):
            await store.read(owner, name)
            found.append(name)
    return found


@pytest.fixture
async def half_full(file: Path, clock: Clock) -> AsyncIterator[tuple[SQLiteStore, list[None]]]:
    """A store of 1 MiB that is half full with sessions of a key, and a list of its evictions."""
    evictions: list[None] = []
    async with open_store(
        file,
        clock,
        max_chars=2**20,
        max_bytes=2**20,
        max_sessions=3,
        on_evict=lambda: evictions.append(None),
    ) as store:
        for number in range(6):
            turn = make_turn("x" * 100_000, at=clock.now)
            await store_turns(store, f"large-{number}", turn, owner="key:large")
        yield store, evictions


async def test_caller_loses_its_oldest_idle_session_for_each_new_one_in_a_half_full_store(
    half_full: tuple[SQLiteStore, list[None]], clock: Clock
) -> None:
    store, evictions = half_full
    await create_sessions(store, clock, "a", "b", "c", owner=OTHER_CALLER)
    await create_sessions(store, clock, "a", "b", "c", owner=CALLER)
    assert evictions == []
    # Chosen and issued ids count alike, and a new turn makes a session younger.
    clock.now += 2
    await store_turns(store, "a", make_turn(at=clock.now - 1))
    issued = await store_turns(store, None, make_turn(at=clock.now))
    assert await existing(store, "a", "b", "c", issued, owner=CALLER) == ["a", "c", issued]
    # A session whose response is running stays.
    running = await store.open(CALLER, "c")
    await create_sessions(store, clock, "d", "e", owner=CALLER)
    found = await existing(store, "a", "c", "d", "e", issued, owner=CALLER)
    assert found == ["c", "d", "e"]
    await store.end(running, make_turn(at=clock.now))
    assert len(evictions) == 3
    # Other callers lose nothing.
    assert await existing(store, "a", "b", "c", owner=OTHER_CALLER) == ["a", "b", "c"]
    assert len(await existing(store, *(f"large-{n}" for n in range(6)), owner="key:large")) == 6


async def test_issued_sessions_of_anonymous_callers_count_for_their_creators(
    half_full: tuple[SQLiteStore, list[None]], clock: Clock
) -> None:
    store, evictions = half_full
    issued = [await store_turns(store, None, make_turn(at=clock.now)) for _ in range(3)]
    for session_id in issued:
        clock.now += 1
        await store_turns(store, session_id, make_turn(at=clock.now), owner=OTHER_CALLER)
    await create_sessions(store, clock, "a", owner=OTHER_CALLER)
    assert evictions == []
    await create_sessions(store, clock, "a", owner=CALLER)
    assert await existing(store, *issued, owner=CALLER) == issued[1:]


async def test_key_may_have_ten_times_as_many_sessions(
    half_full: tuple[SQLiteStore, list[None]], clock: Clock
) -> None:
    store, evictions = half_full
    await create_sessions(store, clock, *(f"s-{n}" for n in range(30)), owner="key:app")
    assert evictions == []
    await create_sessions(store, clock, "s-30", owner="key:app")
    assert len(evictions) == 1
    assert await existing(store, "s-0", "s-1", "s-30", owner="key:app") == ["s-1", "s-30"]


async def test_nothing_is_evicted_below_half(file: Path, clock: Clock) -> None:
    async with open_store(file, clock, max_bytes=2**20, max_sessions=1) as store:
        names = [f"s-{number}" for number in range(50)]
        await create_sessions(store, clock, *names, owner=CALLER)
        assert await existing(store, *names, owner=CALLER) == names


@pytest.mark.parametrize("chosen", [True, False])
async def test_large_store_notices_that_it_is_half_full(clock: Clock, chosen: bool) -> None:
    """The store does not look at its size for every turn."""
    number = 0
    evictions: list[int] = []
    async with open_store(
        ":memory:",
        clock,
        max_chars=2**20,
        max_bytes=2**26,
        max_sessions=3,
        on_evict=lambda: evictions.append(number),
    ) as store:
        for number in range(60):
            turn = make_turn("x" * 2**20)
            await store_turns(store, f"s-{number}" if chosen else None, turn)
    # Half of 64 MiB.
    assert evictions == list(range(32, 60))


async def test_evictions_are_logged_once_a_minute_with_the_settings(
    file: Path, clock: Clock
) -> None:
    handler, log = create_log()
    async with open_store(file, clock, log=log, max_bytes=2**16, max_sessions=1) as store:
        await store_turns(store, "large", make_turn("x" * 8000), owner=OTHER_CALLER)
        await create_sessions(store, clock, *(f"s-{n}" for n in range(60)), owner=CALLER)
        assert len(handler.entries) == 1
        await create_sessions(store, clock, "next-1", "next-2", "next-3", owner=CALLER)
    assert [entry["level"] for entry in handler.entries] == ["warning", "warning"]
    for entry in handler.entries:
        assert "MAX_SESSIONS_PER_CALLER" in entry["event"]
        assert "STATE_MAX_BYTES" in entry["event"]


# ---- failures of the database


def test_unreachable_redis_stops_the_start_without_showing_the_password() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        settings = from_env({"STATE_URL": f"redis://user:password@{address}/0"})
        with pytest.raises(SettingsError) as caught:
            create_app(settings, logging.Logger("test"), Drain())
    line = str(caught.value)
    assert line.startswith("STATE_URL: Redis does not respond: ")
    assert address in line
    assert "user" not in line
    assert "password" not in line


async def test_while_another_process_locks_the_file_reads_work_and_writes_fail(
    tmp_path: Path, clock: Clock
) -> None:
    """Each operation has a file of its own, so that all wait for their locks at the same time."""
    files = [tmp_path / f"{number}.db" for number in range(4)]
    async with (
        open_store(files[0], clock) as ends,
        open_store(files[1], clock) as begins,
        open_store(files[2], clock) as deletes,
        open_store(files[3], Clock(START + TTL)) as sweeps,
    ):
        for store in (ends, begins, deletes, sweeps):
            await store_turns(store, "mine", make_turn("before"))
        session = await ends.open(CALLER, "mine")
        with exclusive_locks(*files):
            # The service's sweeper continues after a sweep that failed.
            sweeping = asyncio.create_task(sweep_periodically(sweeps))
            results = await asyncio.gather(
                ends.end(session, make_turn("lost")),
                begins.open(CALLER, "new"),
                deletes.delete(CALLER, "mine"),
                # Runs after the sweep, in the same thread.
                sweeps.check(),
                return_exceptions=True,
            )
            codes = [error.code for error in results[:3] if isinstance(error, ServiceError)]
            assert codes == ["state_unavailable"] * 3
            assert results[3] is None
            assert not sweeping.done()
            for store in (ends, begins, deletes):
                await store.check()
                assert await stored_messages(store, "mine") == ["before"]
        sweeping.cancel()
        await store_turns(ends, "mine", make_turn("after"))
        assert await stored_messages(ends, "mine") == ["before", "after"]
        await store_turns(begins, "new", make_turn("after"))
        await deletes.delete(CALLER, "mine")
        await sweeps.sweep()
    assert [count_stored(file, "session") for file in files] == [1, 2, 0, 0]


async def test_check_fails_while_the_store_does_not_work(store: SQLiteStore, file: Path) -> None:
    await store.check()
    with connect(file) as db:
        db.execute("ALTER TABLE session RENAME TO renamed")
        with raises("state_unavailable") as failure:
            await store.check()
        assert (failure.value.retryable, failure.value.retry_after) == (True, 1)
        db.execute("ALTER TABLE renamed RENAME TO session")
    await store.check()


# ---- many sessions


def statements() -> list[str]:
    """Return all SQL statements in sessions.py that use the table."""
    tree = ast.parse(Path(sessions.__file__).read_text(encoding="utf-8"))
    strings = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return [
        text
        for text in strings
        if isinstance(text, str)
        and re.match("(SELECT|INSERT|UPDATE|DELETE) ", text)
        and re.search("(FROM|INTO|UPDATE) session", text)
    ]


def steps(db: sqlite3.Connection, sql: str, *values: object) -> int:
    """Return how many instructions of SQLite's virtual machine a statement executes."""
    executed = 0

    def step() -> int:
        nonlocal executed
        executed += 1
        return 0

    db.set_progress_handler(step, 1)
    db.execute(sql, values).fetchall()
    db.set_progress_handler(None, 0)
    return executed


def fill(file: Path, sessions: int) -> None:
    """Store so many sessions of two turns, of which the first half has expired at START."""
    with connect(file) as db:
        db.execute("BEGIN")
        turns = json.dumps([["Hi", "Hello", True, 0.0, 0.0]] * 2)
        db.executemany(
            "INSERT INTO session VALUES (NULL, ?, ?, 0.0, ?, ?, '')",
            (
                (number.to_bytes(32), CALLER, START + number - sessions // 2, turns)
                for number in range(sessions)
            ),
        )
        db.execute("COMMIT")


async def test_no_statement_scans_the_table(store: SQLiteStore, file: Path) -> None:
    found = statements()
    assert len(found) >= 6
    with connect(file) as db:
        for sql in found:
            values = [None] * len(set(re.findall(r"\?\d*", sql)) - {"?"} or re.findall(r"\?", sql))
            plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
            # The list of locked sessions is short.
            scans = [step for step in plan if re.match("SCAN (?!json_each)", step)]
            # The check reads any one row.
            assert not scans or sql == "SELECT 1 FROM session LIMIT 1", (sql, plan)


@pytest.mark.slow
async def test_cost_of_a_request_does_not_depend_on_the_number_of_sessions(
    tmp_path: Path, clock: Clock
) -> None:
    executed: dict[int, list[int]] = {}
    for sessions_stored in (100, 100_000):
        file = tmp_path / f"{sessions_stored}.db"
        async with open_store(file, clock):
            fill(file, sessions_stored)
        with connect(file) as db:
            middle = sessions_stored // 2
            key = (middle.to_bytes(32), CALLER)
            executed[sessions_stored] = [
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
                    START,
                ),
            ]
        async with open_store(file, clock) as store:
            await store.sweep()
            assert count_stored(file, "session") == sessions_stored // 2 - 1
            await store_turns(store, "mine", make_turn("one"), make_turn("two"))
            assert await stored_messages(store, "mine") == ["one", "two"]
    assert executed[100_000] == executed[100]
