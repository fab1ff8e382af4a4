"""Sessions: their turns, their owners and locks, and the SQLite store.

`SessionStore` is the interface that the service uses. `SQLiteStore` implements it for a file or for
memory, `redis_state.py` for Redis. A request makes two calls: `open` locks the session and returns
its history, `end` stores the new turn and unlocks the session.
"""

import asyncio
import hashlib
import os
import re
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import anyio
from pydantic_core import from_json, to_json

from errors import ServiceError
from settings import SettingsError

# `s_` and 256 random bits. It cannot be guessed, so it serves as a credential.
ISSUED_ID = re.compile("s_[A-Za-z0-9_-]{43}")
ANYONE = "anyone"
BUSY = "Another response is running in this session. Wait until it ends, or close its stream."
LOST = "The turn was not saved: its session was deleted or replaced while the response was running."
NOT_FOUND = "This session does not exist, has expired, or belongs to another caller."
UNAVAILABLE = (
    "The session store does not respond, so the latest turn may not be saved. Retry in 1 s."
)
# Stored in the file. A release rejects a file with a newer version than its own.
SCHEMA_VERSION = 1
# Marks the file as ours (sqlite.org/pragma.html#pragma_application_id).
APPLICATION_ID = int.from_bytes(b"chat")
# How long a write waits for another process (a backup, the sqlite3 shell) to unlock the file.
BUSY_SECONDS = 1.0
# A sweep deletes this many sessions at a time, so that no request waits long behind it.
SWEEP_ROWS = 200

T = TypeVar("T")


class Turn(NamedTuple):
    """A message and its response. Times are in seconds since 1970.

    `complete` is false if the response was truncated.
    """

    message: str
    response: str
    complete: bool
    message_at: float
    response_at: float


class Session(NamedTuple):
    """A snapshot of a session.

    `generation` distinguishes the session from later ones with the same id. It is None until the
    session is stored.
    """

    id: str
    owner: str
    generation: int | str | None
    created_at: float
    expires_at: float
    turns: Sequence[Turn] = ()


class SessionStore(Protocol):
    """Sessions, identified by owner and id.

    `owner` is the caller: `key:NAME` or `anonymous:ADDRESS`. An id that the service issued to a key
    belongs to that key. An id that it issued to an anonymous caller can be used by every caller.
    An id that a caller chose is private to that caller.

    Every method may raise ServiceError with the code state_unavailable.
    """

    async def open(self, owner: str, session_id: str | None) -> Session:
        """Lock the session until `end`, and return it.

        Creates a session if the id is None, or chosen by the caller and unknown. Raises
        session_not_found or session_busy.
        """

    async def end(self, session: Session, turn: Turn | None) -> None:
        """Store the turn, if there is one, and unlock the session.

        The new history is `session.turns` and the turn, trimmed. So a caller that passes a session
        with fewer turns than `open` returned drops the others, in the same step. A blank turn
        counts as none, and without a turn the history does not change.

        Unlocks the session even if it raises. Raises state_unavailable and stores nothing if the
        session no longer exists or its lock was lost.
        """

    async def read(self, owner: str, session_id: str) -> Session:
        """Return the session, locked or not. Raises session_not_found."""

    async def delete(self, owner: str, session_id: str) -> None:
        """Delete the session. Raises session_not_found or session_busy."""

    async def sweep(self) -> None:
        """Delete expired sessions."""

    async def check(self) -> None:
        """Raise state_unavailable if the store does not work."""

    async def aclose(self) -> None:
        """Close the file or the connections."""


def new_session(owner: str, now: float, ttl: float) -> Session:
    """Return a session with an issued id, not stored and not locked: no caller knows the id yet."""
    owner = owner if owner.startswith("key:") else ANYONE
    return Session(f"s_{secrets.token_urlsafe(32)}", owner, None, now, now + ttl)


def allowed_owners(owner: str, session_id: str) -> tuple[str, str]:
    """Return the two owners whose session with this id the caller may use; they may be equal."""
    return (owner, ANYONE if ISSUED_ID.fullmatch(session_id) else owner)


def is_blank(turn: Turn) -> bool:
    """Return whether the response is only white space. Providers reject such messages."""
    return not turn.response.strip()


def trim_history(turns: Iterable[Turn], max_chars: int) -> Sequence[Turn]:
    """Return the turns that a session retains, without blank ones.

    If they have more than `max_chars` characters, the oldest are dropped until half of that is
    left, but never the newest. Dropping many at a time keeps the start of the history the same for
    several turns, so the provider's prompt cache works.
    """
    retained = [turn for turn in turns if not is_blank(turn)]
    sizes = [len(turn.message) + len(turn.response) for turn in retained]
    chars, dropped = sum(sizes), 0
    if chars > max_chars:
        while chars > max_chars // 2 and dropped < len(retained) - 1:
            chars -= sizes[dropped]
            dropped += 1
    return retained[dropped:]


# `turns` is a JSON list, bounded by HISTORY_MAX_CHARS, so every operation touches a single row.
# AUTOINCREMENT never reuses a generation.
SCHEMA = """
CREATE TABLE session (
    generation INTEGER PRIMARY KEY AUTOINCREMENT,
    digest BLOB NOT NULL,
    owner TEXT NOT NULL,
    created_at REAL NOT NULL,
    expires_at REAL NOT NULL,
    turns TEXT NOT NULL,
    UNIQUE (digest, owner)
);
CREATE INDEX session_expires ON session (expires_at);
"""


class SQLiteStore(SessionStore):
    """Sessions in an SQLite database that only this process uses.

    For a file, one thread runs all statements, so the event loop never waits for the disk. For
    `:memory:` the event loop runs them, because a statement is faster than a change of threads.

    Every change is a single statement, which SQLite applies completely or not at all. Session locks
    are a set that only the thread with the statements uses. Ids are stored as SHA-256 hashes, so a
    copy of the file does not let its reader continue a session.
    """

    def __init__(
        self, path: str, *, ttl: float, max_chars: int, clock: Callable[[], float]
    ) -> None:
        self._ttl = ttl
        self._max_chars = max_chars
        self._clock = clock
        self._busy: set[int | str | None] = set()
        try:
            self._db = open_database(path)
        except (OSError, sqlite3.Error) as error:
            raise SettingsError(
                f"STATE_URL: {path} cannot be used: {error}. Set it to sqlite:///PATH, where this"
                " process can write to PATH and its directory, or to memory://"
            ) from None
        self._thread = None if path == ":memory:" else ThreadPoolExecutor(1, "sessions")

    async def open(self, owner: str, session_id: str | None) -> Session:
        if session_id is None:
            return new_session(owner, self._clock(), self._ttl)
        # Even a cancelled caller gets the session, because it has to unlock it.
        return await self._run(lambda: self._open(owner, session_id), shield=True)

    async def end(self, session: Session, turn: Turn | None) -> None:
        await self._run(lambda: self._end(session, turn))

    async def read(self, owner: str, session_id: str) -> Session:
        return await self._run(lambda: self._find(owner, session_id))

    async def delete(self, owner: str, session_id: str) -> None:
        await self._run(lambda: self._delete(owner, session_id))

    async def sweep(self) -> None:
        while await self._run(self._sweep):  # noqa: ASYNC110 - other tasks run between portions
            await asyncio.sleep(0)

    async def check(self) -> None:
        await self._run(lambda: self._db.execute("SELECT 1 FROM session LIMIT 1").fetchone())

    async def aclose(self) -> None:
        await self._run(self._db.close)
        if self._thread is not None:
            self._thread.shutdown()

    async def _run(self, work: Callable[[], T], *, shield: bool = False) -> T:
        """Run `work` to its end, in the store's thread if it has one.

        A cancelled caller waits for the result only if `shield` is true.
        """
        try:
            if self._thread is None:
                return work()
            running = asyncio.get_running_loop().run_in_executor(self._thread, work)
            running.add_done_callback(lambda done: done.exception())
            with anyio.CancelScope(shield=shield):
                result = await asyncio.shield(running)
            return result  # noqa: RET504 - mypy assumes that a scope may suppress exceptions
        except sqlite3.Error as error:
            raise ServiceError("state_unavailable", UNAVAILABLE, retry_after=1) from error

    # `_run` calls the methods below.

    def _open(self, owner: str, session_id: str) -> Session:
        session = self._load(owner, session_id)
        if session is None:
            if ISSUED_ID.fullmatch(session_id):
                raise ServiceError("session_not_found", NOT_FOUND)
            now = self._clock()
            session = self._create(Session(session_id, owner, None, now, now + self._ttl))
        if session.generation in self._busy:
            raise ServiceError("session_busy", BUSY, retry_after=1)
        self._busy.add(session.generation)
        return session

    def _find(self, owner: str, session_id: str) -> Session:
        session = self._load(owner, session_id)
        if session is None:
            raise ServiceError("session_not_found", NOT_FOUND)
        return session

    def _load(self, owner: str, session_id: str) -> Session | None:
        row = self._db.execute(
            "SELECT owner, generation, created_at, expires_at, turns FROM session"
            " WHERE digest = ? AND owner IN (?, ?)",
            (_digest(session_id), *allowed_owners(owner, session_id)),
        ).fetchone()
        if row is None or (row[3] <= self._clock() and row[1] not in self._busy):
            return None
        owner, generation, created_at, expires_at, turns = row
        history = trim_history((Turn(*turn) for turn in from_json(turns)), self._max_chars)
        return Session(session_id, owner, generation, created_at, expires_at, history)

    def _create(self, session: Session) -> Session:
        """Store a new session. It replaces an expired one with the same id."""
        row = (_digest(session.id), session.owner, session.created_at, session.expires_at)
        insert = "INSERT OR REPLACE INTO session VALUES (NULL, ?, ?, ?, ?, ?)"
        generation = self._db.execute(insert, (*row, to_json(session.turns))).lastrowid
        return session._replace(generation=generation)

    def _end(self, session: Session, turn: Turn | None) -> None:
        try:
            turn = None if turn is None or is_blank(turn) else turn
            turns = [*session.turns, turn] if turn else session.turns
            expires_at = (turn.response_at if turn else self._clock()) + self._ttl
            session = session._replace(
                turns=trim_history(turns, self._max_chars), expires_at=expires_at
            )
            if session.generation is None:
                self._create(session)
            elif turn is not None:
                update = "UPDATE session SET turns = ?, expires_at = ? WHERE generation = ?"
                row = (to_json(session.turns), session.expires_at, session.generation)
                if not self._db.execute(update, row).rowcount:
                    raise ServiceError("state_unavailable", LOST)
        finally:
            self._busy.discard(session.generation)

    def _delete(self, owner: str, session_id: str) -> None:
        session = self._find(owner, session_id)
        if session.generation in self._busy:
            raise ServiceError("session_busy", BUSY, retry_after=1)
        self._db.execute("DELETE FROM session WHERE generation = ?", (session.generation,))

    def _sweep(self) -> int:
        """Delete up to SWEEP_ROWS expired sessions and return how many were deleted."""
        deleted = self._db.execute(
            "DELETE FROM session WHERE generation IN (SELECT generation FROM session"
            " WHERE expires_at <= ? AND generation NOT IN (SELECT value FROM json_each(?))"
            " LIMIT ?)",
            (self._clock(), to_json(self._busy).decode(), SWEEP_ROWS),
        )
        # Return free pages to the file system, and truncate the write-ahead log, which still
        # contains deleted text.
        self._db.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)")
        return deleted.rowcount


def _digest(session_id: str) -> bytes:
    return hashlib.sha256(session_id.encode()).digest()


def open_database(path: str) -> sqlite3.Connection:
    """Open the database at `path` (or `:memory:`) and create it if it does not exist.

    Only the file's owner can read it. Raises OSError or sqlite3.Error if the file cannot be written
    or belongs to another program.
    """
    if path != ":memory:":
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    # The store's thread uses the connection; this thread only opens it.
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        _prepare(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: str) -> None:
    application_id = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if (tables or version) and application_id != APPLICATION_ID:
        raise sqlite3.DatabaseError("it is a database of another program")
    if version > SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"a newer release wrote it (schema {version})")
    if path != ":memory:":
        Path(path).chmod(0o600)
    # Overwrite deleted text with zeros, and let a sweep shrink the file.
    db.execute("PRAGMA secure_delete = ON")
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    # A killed process loses no committed turn. A power failure may lose the latest ones but does
    # not corrupt the file (sqlite.org/pragma.html#pragma_synchronous).
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("BEGIN IMMEDIATE")
    # Read again under the lock, because two processes may start at once.
    if not db.execute("PRAGMA user_version").fetchone()[0]:
        for statement in SCHEMA.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    db.execute("COMMIT")
