"""Sessions: their turns, their owners and locks, and the SQLite store.

`SessionStore` is the interface that the service uses. `SQLiteStore` implements it for a file or for
memory, `redis_state.py` for Redis. A request makes two calls: `open` locks the session and returns
its history, `end` stores the new turn and unlocks the session.
"""

import asyncio
import hashlib
import logging
import math
import re
import secrets
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar

import anyio
from pydantic_core import from_json, to_json

from database import Database, pseudonym
from errors import ServiceError

# `s_` and 256 random bits. It cannot be guessed, so it serves as a credential.
ISSUED_ID = re.compile("s_[A-Za-z0-9_-]{43}")
ANYONE = "anyone"
BUSY = (
    "Another response is running in this session. Wait until it ends, or resume or stop it: GET or"
    " DELETE /api/v1/sessions/{session_id}/stream."
)
LOST = "The turn was not saved: its session was deleted or replaced while the response was running."
NOT_FOUND = "This session does not exist, has expired, or belongs to another caller."
UNAVAILABLE = (
    "The session store does not respond, so the latest turn may not be saved. Retry in 1 s."
)
EVICTING = (
    "Deleting the oldest idle sessions of a caller that has %d, because the session store is more"
    " than half full. Raise MAX_SESSIONS_PER_CALLER or STATE_MAX_BYTES to keep them"
)
FULL = "The session store is full. Delete sessions that are no longer needed, or retry later."
# A sweep deletes this many sessions at a time, so that no request waits long behind it.
SWEEP_ROWS = 200
# An API key stands for an application with many users.
KEY_FACTOR = 10
EVICTION_WARNING_SECONDS = 60.0

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
    session is stored. `creator` is set until then.
    """

    id: str
    owner: str
    generation: int | str | None
    created_at: float
    expires_at: float
    turns: Sequence[Turn] = ()
    creator: str = ""


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
        session_not_found or session_busy, or state_unavailable if the store is full.
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
        """Raise state_unavailable if the store does not work or is full."""

    async def aclose(self) -> None:
        """Close the file or the connections."""


def new_session(creator: str, now: float, ttl: float) -> Session:
    """Return a session with an issued id, not stored and not locked: no caller knows the id yet."""
    owner = creator if creator.startswith("key:") else ANYONE
    session_id = f"s_{secrets.token_urlsafe(32)}"
    return Session(session_id, owner, None, now, now + ttl, creator=creator)


def allowed_owners(owner: str, session_id: str) -> tuple[str, str]:
    """Return the two owners whose session with this id the caller may use; they may be equal."""
    return (owner, ANYONE if ISSUED_ID.fullmatch(session_id) else owner)


def find_owner(owner: str, session: Session) -> str:
    """Return which of the `allowed_owners` the session of this caller belongs to.

    `session.owner` is a hash if it is an anonymous caller.
    """
    return session.owner if ISSUED_ID.fullmatch(session.id) else owner


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


class SQLiteStore(SessionStore):
    """Sessions in an SQLite database that only this process uses.

    For a file, one thread runs all statements, so the event loop never waits for the disk. For
    `:memory:` the event loop runs them, because a statement is faster than a change of threads.

    Every change is a single statement, which SQLite applies completely or not at all. Session locks
    are a set that only the thread with the statements uses. Ids are stored as SHA-256 hashes, so a
    copy of the file does not let its reader continue a session.

    The database does not grow beyond `max_bytes`. When it is more than half full, a caller that
    creates a session and has `max_sessions` already loses its oldest idle one, and `on_evict` is
    called. When the database or the disk is full, `open` and `check` raise state_unavailable.
    """

    def __init__(
        self,
        path: str,
        *,
        ttl: float,
        max_chars: int,
        clock: Callable[[], float],
        log: logging.Logger,
        max_bytes: int = 2**30,
        max_sessions: int = 1000,
        on_evict: Callable[[], None] = lambda: None,
    ) -> None:
        self._ttl = ttl
        self._max_chars = max_chars
        self._clock = clock
        self._log = log
        self._max_sessions = max_sessions
        self._on_evict = on_evict
        self._warned_at = -math.inf
        self._busy: set[int | str | None] = set()
        self._db = Database(path, max_bytes, log)
        self._thread = None if path == ":memory:" else ThreadPoolExecutor(1, "sessions")

    async def open(self, owner: str, session_id: str | None) -> Session:
        if session_id is None and self._db.is_far_from_full():
            return new_session(pseudonym(owner), self._clock(), self._ttl)
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
        await self._run(self._check)

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

    def _open(self, owner: str, session_id: str | None) -> Session:
        now, creator = self._clock(), pseudonym(owner)
        if session_id is None:
            self._ensure_room()
            return new_session(creator, now, self._ttl)
        session = self._load(owner, session_id)
        if session is None and ISSUED_ID.fullmatch(session_id):
            raise ServiceError("session_not_found", NOT_FOUND)
        if session is not None and session.generation in self._busy:
            raise ServiceError("session_busy", BUSY, retry_after=1)
        self._ensure_room()
        if session is None:
            new = Session(session_id, creator, None, now, now + self._ttl, creator=creator)
            session = self._create(new)
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
            _digest(session_id),
            *allowed_owners(pseudonym(owner), session_id),
        ).fetchone()
        if row is None or (row[3] <= self._clock() and row[1] not in self._busy):
            return None
        owner, generation, created_at, expires_at, turns = row
        history = trim_history((Turn(*turn) for turn in from_json(turns)), self._max_chars)
        return Session(session_id, owner, generation, created_at, expires_at, history)

    def _create(self, session: Session) -> Session:
        """Store a new session. It replaces an expired one with the same id."""
        if self._db.is_half_full():
            self._evict(session.creator)
        row = (_digest(session.id), session.owner, session.created_at, session.expires_at)
        insert = "INSERT OR REPLACE INTO session VALUES (NULL, ?, ?, ?, ?, ?, ?)"
        created = self._db.execute(insert, *row, _serialize(session.turns), session.creator)
        return session._replace(generation=created.lastrowid)

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
                row = (_serialize(session.turns), session.expires_at, session.generation)
                if not self._db.execute(update, *row).rowcount:
                    raise ServiceError("state_unavailable", LOST)
        finally:
            self._busy.discard(session.generation)

    def _delete(self, owner: str, session_id: str) -> None:
        session = self._find(owner, session_id)
        if session.generation in self._busy:
            raise ServiceError("session_busy", BUSY, retry_after=1)
        self._db.execute("DELETE FROM session WHERE generation = ?", session.generation)
        if self._db.is_disk_full():
            self._db.shrink()

    def _sweep(self) -> bool:
        """Delete some expired sessions, shrink the file, and return whether that did anything."""
        deleted = self._db.execute(
            "DELETE FROM session WHERE generation IN (SELECT generation FROM session"
            " WHERE expires_at <= ? AND generation NOT IN (SELECT value FROM json_each(?))"
            " LIMIT ?)",
            self._clock(),
            to_json(self._busy).decode(),
            1 if self._db.is_disk_full() else SWEEP_ROWS,
        )
        return self._db.shrink() or deleted.rowcount > 0

    def _evict(self, creator: str) -> None:
        """Delete the caller's oldest idle session if it has as many as it may have."""
        limit = self._max_sessions * (KEY_FACTOR if creator.startswith("key:") else 1)
        evicted = self._db.execute(
            "DELETE FROM session WHERE generation = (SELECT generation FROM session"
            " WHERE creator = ? AND generation NOT IN (SELECT value FROM json_each(?))"
            " ORDER BY expires_at LIMIT 1)"
            " AND EXISTS (SELECT 1 FROM session WHERE creator = ? LIMIT 1 OFFSET ?)",
            creator,
            to_json(self._busy).decode(),
            creator,
            limit - 1,
        )
        if evicted.rowcount:
            self._on_evict()
            if self._clock() - self._warned_at >= EVICTION_WARNING_SECONDS:
                self._warned_at = self._clock()
                self._log.warning(EVICTING, limit)

    def _check(self) -> None:
        self._db.execute("SELECT 1 FROM session LIMIT 1").fetchone()
        self._ensure_room()

    def _ensure_room(self) -> None:
        if self._db.is_full():
            raise ServiceError("state_unavailable", FULL, retry_after=5)


def _serialize(turns: Iterable[Turn]) -> bytes:
    # pydantic-core serializes tuples four times as fast as named tuples.
    return to_json([tuple(turn) for turn in turns])


def _digest(session_id: str) -> bytes:
    return hashlib.sha256(session_id.encode()).digest()
