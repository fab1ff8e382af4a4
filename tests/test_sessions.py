"""What the assistant remembers and whose it is: the store by itself, with a clock of the test's,
and the service around it."""

import ast
import asyncio
import json
import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import sessions
from errors import ServiceError, SessionBusy, SessionNotFound, StateUnavailable
from ratelimit import by_address
from server import Drain
from service import create_app, keep_sweeping
from sessions import APPLICATION_ID, ISSUED, SCHEMA_VERSION, SWEEP_ROWS, Session, SQLiteStore, Turn
from settings import SettingsError, from_env

Headers = Mapping[str, str]

TTL = 100.0
MAX_CHARS = 1000
AT = 1_800_000_000.0
ME = by_address("192.0.2.1").owner
NEIGHBOUR = by_address("192.0.2.2").owner
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
    store: SQLiteStore, session_id: str | None, *turns: Turn | None, owner: str = ME
) -> str:
    """These turns in one session, None for an answer without text; its id."""
    for turn in turns:
        session = await store.open(owner, session_id)
        session_id = session.id
        await store.end(session, turn)
    assert session_id is not None
    return session_id


async def texts(store: SQLiteStore, session_id: str, owner: str = ME) -> list[str]:
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


# ---- the store: what it keeps


async def test_a_session_is_what_was_said_in_it_also_after_the_file_was_reopened(
    file: Path, clock: Clock
) -> None:
    first = said("a\x00b", "\U0001f469\u200d\U0001f680 \u0646\u0645\u06cc\n")
    second = Turn("two", "cut o", False, AT + 1.25, AT + 2.5)
    async with opened(file, clock) as store:
        issued = await talk(store, None, first, second)
        before = await store.read(ME, issued)
    async with opened(file, clock) as store:
        session = await store.read(ME, issued)
        assert session == before
        assert session == await store.open(ME, issued)
    assert session.turns == [first, second]
    assert (session.id, session.created_at) == (issued, AT)
    assert session.expires_at == second.answered_at + TTL


async def test_issued_ids_hold_256_bits_and_are_never_the_same(store: SQLiteStore) -> None:
    issued = {(await store.open(ME, None)).id for _ in range(100)}
    assert len(issued) == 100
    assert all(ISSUED.fullmatch(session_id) for session_id in issued)


@pytest.mark.parametrize("chosen", ["mine", None])
async def test_an_answer_without_text_leaves_a_session_without_turns(
    store: SQLiteStore, clock: Clock, chosen: str | None
) -> None:
    session_id = await talk(store, chosen, None)
    session = await store.read(ME, session_id)
    assert (session.turns, session.expires_at) == ([], AT + TTL)


@pytest.mark.parametrize(
    ("sizes", "kept"),
    [
        ([400, 300, 300], [400, 300, 300]),
        ([400, 300, 301], [300, 301]),
        ([1, 999, 1], [999, 1]),
        ([400, 300, 1000], [1000]),
        ([400, 300, 5000], [5000]),
        ([5000, 1], [1]),
        ([400, 5000, 300, 200], [300, 200]),
    ],
)
async def test_the_newest_whole_turns_that_fit_are_kept_and_the_newest_always(
    store: SQLiteStore, file: Path, sizes: Sequence[int], kept: list[int]
) -> None:
    for size in sizes:
        # A character is a code point, in the message as in the answer.
        await talk(store, "mine", said("\U0001f642" * (size // 3), "é" * (size - size // 3)))
    session = await store.read(ME, "mine")
    assert [turn.chars for turn in session.turns] == kept
    assert count(file, "turn") == len(kept)


async def test_a_smaller_history_max_chars_counts_from_the_next_request_on(
    file: Path, clock: Clock
) -> None:
    async with opened(file, clock) as store:
        await talk(store, "mine", *(said(name * 100, "") for name in "abc"))
    async with opened(file, clock, max_chars=250) as store:
        session = await store.open(ME, "mine")
        assert [turn.message[0] for turn in session.turns] == ["b", "c"]
        await store.end(session, said("d" * 100, ""))
        assert [text[0] for text in await texts(store, "mine")] == ["c", "d"]
    assert count(file, "turn") == 2


async def test_the_thousandth_turn_reads_and_keeps_no_more_than_the_tenth(
    store: SQLiteStore, file: Path
) -> None:
    sizes = {}
    for number in range(1, 1001):
        session = await store.open(ME, "mine")
        await store.end(session, said(f"{number:0100}", ""))
        if number in (11, 1000):
            sizes[number] = (
                len(session.turns),
                sum(turn.chars for turn in session.turns),
                count(file, "turn"),
            )
    assert sizes[1000] == sizes[11] == (10, 1000, 10)


# ---- the store: whose it is


async def test_a_guessed_id_of_an_issued_ones_shape_is_not_adopted(
    store: SQLiteStore, file: Path
) -> None:
    for use in (store.open, store.read, store.delete, store.open):
        with pytest.raises(SessionNotFound):
            await use(ME, NOBODYS_GUESS)
    assert count(file, "session") == 0


async def test_an_issued_id_is_valid_once_its_first_answer_has_ended(store: SQLiteStore) -> None:
    session = await store.open(ME, None)
    for use in (store.open, store.read, store.delete):
        with pytest.raises(SessionNotFound):
            await use(ME, session.id)
    await store.end(session, said())
    assert await texts(store, session.id) == ["Hi"]


async def test_a_deleted_session_is_gone_and_its_name_begins_anew(store: SQLiteStore) -> None:
    for session_id in (await talk(store, None, said()), await talk(store, "mine", said())):
        await store.delete(ME, session_id)
        for use in (store.read, store.delete):
            with pytest.raises(SessionNotFound):
                await use(ME, session_id)
    with pytest.raises(SessionNotFound):
        await store.open(ME, NOBODYS_GUESS)
    assert (await store.open(ME, "mine")).turns == ()


# ---- the store: one answer at a time, and its end


async def test_only_one_answer_is_written_in_a_session_at_a_time(store: SQLiteStore) -> None:
    for session_id in (await talk(store, None, said("before")), "mine"):
        session = await store.open(ME, session_id)
        for use in (store.open, store.delete):
            with pytest.raises(SessionBusy):
                await use(ME, session_id)
        assert (await store.read(ME, session_id)).turns == [*session.turns]
        await store.end(session, said("after"))
        assert (await texts(store, session_id))[-1] == "after"
        await store.end(await store.open(ME, session_id), None)
        await store.delete(ME, session_id)


@pytest.mark.parametrize("how", FAILURES)
@pytest.mark.parametrize("chosen", ["mine", None])
async def test_a_turn_that_cannot_be_stored_is_not_half_stored_and_gives_the_lock_back(
    store: SQLiteStore, file: Path, chosen: str | None, how: str
) -> None:
    session = await store.open(ME, chosen)
    with storing_fails(file, how=how), pytest.raises(StateUnavailable):
        await store.end(session, said("lost"))
    if chosen is None:
        assert count(file, "session") == 0
        return
    await talk(store, chosen, said("next"))
    assert await texts(store, chosen) == ["next"]


async def test_an_answer_that_outlives_its_session_gives_nothing_to_its_successor(
    store: SQLiteStore, file: Path
) -> None:
    old = await store.open(ME, "mine")
    with other_connection(file) as db:
        db.execute("DELETE FROM session")
    new = await store.open(ME, "mine")
    with pytest.raises(StateUnavailable):
        await store.end(old, said("the old one's"))
    with pytest.raises(SessionBusy):
        await store.open(ME, "mine")
    await store.end(new, said("the new one's"))
    assert await texts(store, "mine") == ["the new one's"]
    await store.delete(ME, "mine")
    with pytest.raises(SessionNotFound):
        await store.read(ME, "mine")


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
    """As after SETTLE_SECONDS, when the file has been locked for as long."""
    first, second = await store.open(ME, "first"), await store.open(ME, "second")
    with held(file):
        slow = asyncio.create_task(store.end(first, said()))
        with anyio.CancelScope() as scope:
            asyncio.get_running_loop().call_soon(scope.cancel)
            await store.end(second, said())
        with pytest.raises(StateUnavailable):
            await slow
    await talk(store, "first", said())
    await talk(store, "second", said())


# ---- the store: expiry


async def test_a_session_ends_when_its_time_is_over_after_its_last_turn(
    store: SQLiteStore, clock: Clock, file: Path
) -> None:
    issued = await talk(store, None, said(at=AT))
    await talk(store, "mine", said(at=AT))
    clock.now = AT + TTL - 1
    assert await texts(store, issued) == ["Hi"]
    await talk(store, "mine", said("again", at=clock.now))
    clock.now = AT + TTL
    for use in (store.open, store.read, store.delete):
        with pytest.raises(SessionNotFound):
            await use(ME, issued)
    assert await texts(store, "mine") == ["Hi", "again"]
    clock.now = AT + 2 * TTL - 1
    session = await store.open(ME, "mine")
    assert (session.turns, session.created_at) == ((), clock.now)
    assert count(file, "turn") == 1, "only the issued one's is left for the sweep"


async def test_a_session_never_ends_during_an_answer(store: SQLiteStore, clock: Clock) -> None:
    await talk(store, "mine", said("before"))
    session = await store.open(ME, "mine")
    clock.now = AT + TTL + 1
    await store.sweep()
    assert await texts(store, "mine") == ["before"]
    for use in (store.open, store.delete):
        with pytest.raises(SessionBusy):
            await use(ME, "mine")
    await store.end(session, said("after", at=clock.now))
    assert await texts(store, "mine") == ["before", "after"]
    assert (await store.read(ME, "mine")).expires_at == clock.now + TTL


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
    with pytest.raises(SettingsError) as refusal:
        create_app(from_env({"STATE_URL": f"sqlite:///{file}"}), logging.Logger("test"), Drain())
    line = str(refusal.value)
    assert line.startswith(f"STATE_URL: {file} ")
    assert "sqlite:///PATH" in line
    assert "\n" not in line
    assert (file.read_bytes() if file.is_file() else None) == before


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
            sweeping = asyncio.create_task(keep_sweeping(sweeps))
            refused = await asyncio.gather(
                ends.end(session, said("lost")),
                begins.open(ME, "new"),
                deletes.delete(ME, "mine"),
                # After the sweep, in the same thread.
                sweeps.check(),
                return_exceptions=True,
            )
            assert [type(error) for error in refused[:3]] == [StateUnavailable] * 3
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
        with pytest.raises(StateUnavailable) as failure:
            await store.check()
        assert (failure.value.retryable, failure.value.retry_after) == (True, 1)
        db.execute("ALTER TABLE elsewhere RENAME TO session")
    await store.check()


async def test_in_memory_a_store_does_the_same_and_keeps_nothing(clock: Clock) -> None:
    async with opened(":memory:", clock) as store:
        await talk(store, "mine", said())
        assert await texts(store, "mine") == ["Hi"]
        clock.now += TTL
        await store.sweep()
    async with opened(":memory:", clock) as store:
        with pytest.raises(SessionNotFound):
            await store.read(ME, "mine")


# ---- the store against a model of it

OWNERS = st.sampled_from(["key:app", "key:web", ME, NEIGHBOUR])
CHOSEN = st.sampled_from(["demo", "test"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
MODEL_MAX_CHARS = 60
ANYONE = "anyone"


@dataclass
class Remembered:
    """A session as the contract has it; one that was issued is not stored before its first end."""

    expires_at: float
    turns: list[Turn] = field(default_factory=list)
    busy: bool = True
    stored: bool = True


class Model(RuleBasedStateMachine):
    """The store beside a dictionary, each told the same."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.runner = asyncio.Runner()
        self.clock = Clock()
        # By whose they are, a caller's, a key's or anyone's, and their id.
        self.sessions: dict[tuple[str, str], Remembered] = {}
        self.answers: list[tuple[Session, Remembered]] = []
        self.open_file()

    def open_file(self) -> None:
        self.store = SQLiteStore(
            str(self.directory / "chat.db"), ttl=TTL, max_chars=MODEL_MAX_CHARS, clock=self.clock
        )

    def teardown(self) -> None:
        self.runner.run(self.store.aclose())
        self.runner.close()
        shutil.rmtree(self.directory)

    def alive(self, known: Remembered) -> bool:
        return known.stored and (known.busy or known.expires_at > self.clock.now)

    def find(self, owner: str, session_id: str) -> Remembered | None:
        """The caller's own, or one that was issued to anyone."""
        for holder in (owner, ANYONE):
            known = self.sessions.get((holder, session_id))
            if known is not None and self.alive(known):
                return known
        return None

    def refused(self, error: type[ServiceError], call: Coroutine[Any, Any, object]) -> None:
        with pytest.raises(error):
            self.runner.run(call)

    @rule(target=ids, chosen=st.one_of(CHOSEN, st.just(NOBODYS_GUESS)))
    def choose(self, chosen: str) -> str:
        return chosen

    @rule(target=ids, owner=OWNERS)
    def create(self, owner: str) -> str:
        session = self.runner.run(self.store.open(owner, None))
        made = Remembered(0, stored=False)
        self.sessions[owner if owner.startswith("key:") else ANYONE, session.id] = made
        self.answers.append((session, made))
        return session.id

    @rule(owner=OWNERS, session_id=ids)
    def open(self, owner: str, session_id: str) -> None:
        known = self.find(owner, session_id)
        opening = self.store.open(owner, session_id)
        if known is None and ISSUED.fullmatch(session_id):
            self.refused(SessionNotFound, opening)
        elif known is not None and known.busy:
            self.refused(SessionBusy, opening)
        else:
            if known is None:
                known = Remembered(self.clock.now + TTL)
                self.sessions[owner, session_id] = known
            session = self.runner.run(opening)
            assert [*session.turns] == known.turns
            known.busy = True
            self.answers.append((session, known))

    def some_answer(self, data: st.DataObject) -> tuple[Session, Remembered]:
        return self.answers.pop(data.draw(st.integers(0, len(self.answers) - 1)))

    @precondition(lambda self: self.answers)
    @rule(message=TEXT, answer=TEXT.filter(bool), complete=st.booleans(), data=st.data())
    def end(self, message: str, answer: str, complete: bool, data: st.DataObject) -> None:
        session, known = self.some_answer(data)
        turn = Turn(message, answer, complete, self.clock.now - 1, self.clock.now)
        self.runner.run(self.store.end(session, turn))
        known.turns.append(turn)
        while len(known.turns) > 1 and sum(turn.chars for turn in known.turns) > MODEL_MAX_CHARS:
            known.turns.pop(0)
        known.expires_at = self.clock.now + TTL
        known.busy, known.stored = False, True

    @precondition(lambda self: self.answers)
    @rule(data=st.data())
    def end_without_text(self, data: st.DataObject) -> None:
        session, known = self.some_answer(data)
        self.runner.run(self.store.end(session, None))
        if not known.stored:
            known.expires_at = self.clock.now + TTL
        known.busy, known.stored = False, True

    @rule(owner=OWNERS, session_id=ids)
    def delete(self, owner: str, session_id: str) -> None:
        known = self.find(owner, session_id)
        deleting = self.store.delete(owner, session_id)
        if known is None:
            self.refused(SessionNotFound, deleting)
        elif known.busy:
            self.refused(SessionBusy, deleting)
        else:
            self.runner.run(deleting)
            self.sessions = {key: it for key, it in self.sessions.items() if it is not known}

    @rule(seconds=st.sampled_from([1.0, TTL / 2, TTL, 3 * TTL]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    @rule()
    def sweep(self) -> None:
        self.runner.run(self.store.sweep())
        alive = [known for known in self.sessions.values() if self.alive(known)]
        assert count(self.directory / "chat.db", "session") == len(alive)
        assert count(self.directory / "chat.db", "turn") == sum(len(it.turns) for it in alive)

    @rule()
    def restart(self) -> None:
        """The answers that were being written are lost, and with them their locks."""
        self.runner.run(self.store.aclose())
        self.answers.clear()
        self.sessions = {key: it for key, it in self.sessions.items() if it.stored}
        for known in self.sessions.values():
            known.busy = False
        self.open_file()

    @rule(owner=OWNERS, session_id=ids)
    def read(self, owner: str, session_id: str) -> None:
        known = self.find(owner, session_id)
        if known is None:
            self.refused(SessionNotFound, self.store.read(owner, session_id))
            return
        session = self.runner.run(self.store.read(owner, session_id))
        assert (session.turns, session.expires_at) == (known.turns, known.expires_at)

    @invariant()
    def each_is_as_its_holder_left_it(self) -> None:
        for (holder, session_id), known in self.sessions.items():
            if self.alive(known):
                owner = ME if holder == ANYONE else holder
                session = self.runner.run(self.store.read(owner, session_id))
                assert (session.turns, session.expires_at) == (known.turns, known.expires_at)


@pytest.mark.parametrize("examples", [12, pytest.param(150, marks=pytest.mark.slow)])
def test_the_store_does_what_a_dictionary_would(examples: int) -> None:
    run_state_machine_as_test(
        Model,
        settings=hypothesis_settings(max_examples=examples, stateful_step_count=30, deadline=None),
    )


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
    assert len(found) >= 7
    with other_connection(file) as db:
        for sql in found:
            values = [None] * len(set(re.findall(r"\?\d*", sql)) - {"?"} or re.findall(r"\?", sql))
            plan = [row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {sql}", values)]
            scans = [step for step in plan if step.startswith("SCAN")]
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
                    "SELECT incarnation FROM session WHERE digest = ? AND owner IN (?, 'anyone')",
                    *key,
                ),
                steps(db, "UPDATE session SET expires_at = ? WHERE incarnation = ?", 0.5, middle),
                steps(db, "DELETE FROM session WHERE incarnation = ?", middle),
                steps(db, "SELECT incarnation FROM session WHERE expires_at <= ? LIMIT 10", AT),
            ]
        async with opened(file, clock) as store:
            await store.sweep()
            assert count(file, "session") == sessions_stored // 2 - 1
            await talk(store, "mine", said("one"), said("two"))
            assert await texts(store, "mine") == ["one", "two"]
    assert taken[100_000] == taken[100]
