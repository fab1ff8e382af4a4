"""What the assistant remembers, whose it is, and where it is trim_history.

`SessionStore` is what the service needs of a store; `SQLiteStore` keeps one in a file, or in
memory. Opening a session (its lock and its history) and ending a turn (append, trim, release) are
one call each. Nothing here cleans text or knows providers.
"""

import asyncio
import hashlib
import os
import re
import secrets
import sqlite3
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import anyio
from pydantic_core import from_json, to_json

from errors import ServiceError
from settings import SettingsError

# `s_` and 256 random bits: nobody guesses one, so holding it is the right to use it.
ISSUED_ID = re.compile("s_[A-Za-z0-9_-]{43}")
ANYONE = "anyone"
BUSY = "Another answer is being written in this session. Wait for its end, or close its stream."
LOST = "The session ended, or was lost, before its answer did; this turn is not stored."
NOT_FOUND = "This session does not exist, has expired, or belongs to another caller."
UNAVAILABLE = "Conversations can't be reached just now; the latest answer may not be remembered."
# Stored in the file; a release that knows only older ones refuses it.
SCHEMA_VERSION = 1
# SQLite's own place for a file's owner (sqlite.org/pragma.html#pragma_application_id): "chat".
APPLICATION_ID = int.from_bytes(b"chat")
# How long a writer waits for another process (a backup, an operator's shell) to let go of the file.
BUSY_SECONDS = 1.0
# Expired sessions leave in portions, so that no request waits long behind them.
SWEEP_ROWS = 200

T = TypeVar("T")


class Turn(NamedTuple):
    """A message and its answer; times in seconds since 1970. `complete` is false where the answer
    was cut."""

    message: str
    response: str
    complete: bool
    message_at: float
    response_at: float


class Session(NamedTuple):
    """A session as it was when it was opened. `generation` is the store's own name for it, which
    no later session of the same id has; None for one that is not stored yet."""

    id: str
    owner: str
    generation: int | str | None
    created_at: float
    expires_at: float
    turns: Sequence[Turn] = ()


class SessionStore(Protocol):
    """Sessions by owner and id. Every call may raise StateUnavailable.

    An owner is `key:NAME` or `anonymous:ADDRESS`. An id that the service issued belongs to the key
    it was issued to, or to anyone who holds it; any other id is private to its owner.
    """

    async def open(self, owner: str, session_id: str | None) -> Session:
        """The session, locked until `end`; a new one for None or an unknown id of the caller's
        choice. Raises SessionNotFound, SessionBusy."""

    async def end(self, session: Session, turn: Turn | None) -> None:
        """Store the turn, if any, forget what no longer fits, and unlock; the unlocking always. A
        turn of a session that has meanwhile ended, or whose lock was lost, is StateUnavailable."""

    async def read(self, owner: str, session_id: str) -> Session:
        """The session, whether locked or not. Raises SessionNotFound."""

    async def delete(self, owner: str, session_id: str) -> None:
        """Raises SessionNotFound, SessionBusy."""

    async def sweep(self) -> None:
        """Remove what has expired."""

    async def check(self) -> None:
        """Raises StateUnavailable if the store does not answer."""

    async def aclose(self) -> None:
        """Give back the file or the connections."""


def new_session(owner: str, now: float, ttl: float) -> Session:
    """A new session with an id of ours. It is the key's to which it is issued, or anyone's who
    holds the id. Nobody can know the id yet, so there is nothing to read and nothing to lock."""
    holder = owner if owner.startswith("key:") else ANYONE
    return Session(f"s_{secrets.token_urlsafe(32)}", holder, None, now, now + ttl)


def allowed_owners(owner: str, session_id: str) -> tuple[str, str]:
    """Those whose session of this id the caller may use. Only issued ids are anyone's."""
    return (owner, ANYONE if ISSUED_ID.fullmatch(session_id) else owner)


def trim_history(turns: Sequence[Turn], max_chars: int) -> Sequence[Turn]:
    """The newest whole turns that fit into `max_chars`; the newest one always."""
    chars = 0
    for count, turn in enumerate(reversed(turns)):
        chars += len(turn.message) + len(turn.response)
        if chars > max_chars and count:
            return turns[len(turns) - count :]
    return turns


# `turns` is a JSON list of turns, as long as a history may be: appending, trimming and reading are
# one row each.
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
    """Sessions in one SQLite file, for one process.

    All work is done by one thread, and each change is one statement, which SQLite does whole or not
    at all. So the event loop never waits for the disk, and the sessions' locks, which are that
    thread's alone, need no locking of their own; they go with the process. Ids are stored as
    SHA-256: whoever reads the file has the conversations, but not the right to go on with them.
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
                f"STATE_URL: {path} can't be used: {error}. Name a place that this process may"
                " write, as in sqlite:///PATH, or memory:// to keep nothing"
            ) from None
        self._thread = ThreadPoolExecutor(1, "sessions")

    async def open(self, owner: str, session_id: str | None) -> Session:
        if session_id is None:
            return new_session(owner, self._clock(), self._ttl)
        # A lock that was taken must reach whoever is to give it back.
        with anyio.CancelScope(shield=True):
            session = await self._run(lambda: self._open(owner, session_id))
        return session  # noqa: RET504 - mypy takes a scope for something that may swallow errors

    async def end(self, session: Session, turn: Turn | None) -> None:
        await self._run(lambda: self._end(session, turn))

    async def read(self, owner: str, session_id: str) -> Session:
        return await self._run(lambda: self._find(owner, session_id))

    async def delete(self, owner: str, session_id: str) -> None:
        await self._run(lambda: self._delete(owner, session_id))

    async def sweep(self) -> None:
        while await self._run(self._sweep):
            pass

    async def check(self) -> None:
        await self._run(lambda: self._db.execute("SELECT 1 FROM session LIMIT 1").fetchone())

    async def aclose(self) -> None:
        await self._run(self._db.close)
        self._thread.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        """`work` in the store's thread."""
        try:
            # Who gives up waiting does not take the work back: an end has to free its lock.
            running = asyncio.get_running_loop().run_in_executor(self._thread, work)
            running.add_done_callback(lambda done: done.exception())
            return await asyncio.shield(running)
        except sqlite3.Error as error:
            raise ServiceError("state_unavailable", UNAVAILABLE, retry_after=1) from error

    # In the store's thread

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
        holder, generation, created_at, expires_at, turns = row
        history = trim_history([Turn(*turn) for turn in from_json(turns)], self._max_chars)
        return Session(session_id, holder, generation, created_at, expires_at, history)

    def _create(self, session: Session) -> Session:
        """A new generation, in place of one of this id that has expired."""
        row = (_digest(session.id), session.owner, session.created_at, session.expires_at)
        insert = "INSERT OR REPLACE INTO session VALUES (NULL, ?, ?, ?, ?, ?)"
        generation = self._db.execute(insert, (*row, to_json(session.turns))).lastrowid
        return session._replace(generation=generation)

    def _end(self, session: Session, turn: Turn | None) -> None:
        try:
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
        """How many sessions went; 0 when there is nothing left to do."""
        swept = self._db.execute(
            "DELETE FROM session WHERE generation IN (SELECT generation FROM session"
            " WHERE expires_at <= ? AND generation NOT IN (SELECT value FROM json_each(?))"
            " LIMIT ?)",
            (self._clock(), to_json(self._busy).decode(), SWEEP_ROWS),
        )
        # Gives the freed pages back to the file system, and with the journal the last copies of
        # what was deleted.
        self._db.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)")
        return swept.rowcount


def _digest(session_id: str) -> bytes:
    return hashlib.sha256(session_id.encode()).digest()


def open_database(path: str) -> sqlite3.Connection:
    """The database at `path` (`:memory:` for none), made if it is not there, for its owner's eyes
    only. Raises OSError or sqlite3.Error if it can't be written or is another's."""
    if path != ":memory:":
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    # All use is in the store's one thread; only this opening is not.
    db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        _prepare(db, path)
    except BaseException:
        db.close()
        raise
    return db


def _prepare(db: sqlite3.Connection, path: str) -> None:
    program = db.execute("PRAGMA application_id").fetchone()[0]
    version = db.execute("PRAGMA user_version").fetchone()[0]
    tables = db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if (tables or version) and program != APPLICATION_ID:
        raise sqlite3.DatabaseError("it is another program's")
    if version > SCHEMA_VERSION:
        raise sqlite3.DatabaseError(f"it was written by a newer release, in schema {version}")
    if path != ":memory:":
        Path(path).chmod(0o600)
    # What is deleted is overwritten, and the file shrinks again.
    db.execute("PRAGMA secure_delete = ON")
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    # A killed process loses nothing of what was committed; a machine without power may lose the
    # last moments, never the file (sqlite.org/pragma.html#pragma_synchronous).
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("BEGIN IMMEDIATE")
    # Looked at again under the lock: two processes may start at once.
    if not db.execute("PRAGMA user_version").fetchone()[0]:
        for statement in SCHEMA.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    db.execute("COMMIT")
