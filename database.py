"""The SQLite database of the session store: schema, permissions, size limit, and full disks.

Knows nothing of sessions but their schema. The methods of `Database` block.
"""

import fcntl
import hashlib
import logging
import os
import sqlite3
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TypeVar

from settings import InUseError, SettingsError

# Marks the file as ours (sqlite.org/pragma.html#pragma_application_id).
APPLICATION_ID = int.from_bytes(b"chat")
# How long a write waits for another process (a backup, the sqlite3 shell) to unlock the file.
BUSY_SECONDS = 1.0
# Disk space that is reserved for deleting sessions, and for storing the turns of responses that are
# still running. On small disks it is an eighth of the disk.
DISK_RESERVE_BYTES = 2**22
# Space in the file for these turns. In small files it is a quarter of the file.
FILE_RESERVE_BYTES = 2**24
# How many pages `shrink` returns to the file system at a time, usually and on a full disk. To do so
# it writes about twice as many to the write-ahead log.
SHRINK_PAGES = 1000
FULL_DISK_SHRINK_PAGES = 8
# More than a turn adds to the file: a response has up to 4 MiB, and a page has 4 KiB.
MAX_TURN_PAGES = 2**11
# The scripts that create the database, one for each version of the schema. A file with an older
# version gets those that it lacks. A file with a newer version is rejected.
SCHEMAS = (
    # `turns` is a JSON list, bounded by HISTORY_MAX_CHARS, so every operation touches a single row.
    # AUTOINCREMENT never reuses a generation.
    """
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
    """,
    # `creator` is the caller whose sessions are counted. For older sessions with an issued id it is
    # unknown, and 'anyone' is no caller.
    """
    ALTER TABLE session ADD COLUMN creator TEXT NOT NULL DEFAULT '';
    UPDATE session SET owner = pseudonym(owner), creator = pseudonym(owner);
    CREATE INDEX session_creator ON session (creator, expires_at);
    """,
)

T = TypeVar("T")


def pseudonym(owner: str) -> str:
    """Return an owner as it is stored: a key's name as it is, an address as a hash."""
    if owner.startswith("anonymous:"):
        return hashlib.sha256(owner.encode()).hexdigest()
    return owner


class Database:
    """An SQLite file that only this process writes, or `:memory:`.

    The file does not grow beyond `max_bytes`. Raises SettingsError if it cannot be used, and
    sqlite3.Error if a statement fails.
    """

    def __init__(self, path: str, max_bytes: int, log: logging.Logger) -> None:
        self._lock_file: LockFile | None = None
        try:
            with ExitStack() as opened:
                if path != ":memory:":
                    self._lock_file = opened.enter_context(closing(LockFile(path)))
                self._db = open_database(path)
                opened.pop_all()
        except (OSError, sqlite3.Error) as error:
            raise SettingsError(
                f"STATE_URL: {path} cannot be used: {error}. Set it to sqlite:///PATH, where this"
                " process can write to PATH and its directory, or to memory://"
            ) from None
        page_size, pages = self._pragma("page_size"), self._pragma("page_count")
        limit = max_bytes // page_size
        reserve = min(limit // 4, FILE_RESERVE_BYTES // page_size)
        self._half = limit // 2
        # The file is certainly less than half full until so many turns have been checked.
        self._turns_left = 0
        if pages > limit:
            size = f"{path} has {pages * page_size} bytes, more than STATE_MAX_BYTES={max_bytes}"
            log.warning("%s; it does not grow. Raise STATE_MAX_BYTES, or let sessions expire", size)
            limit = pages + reserve
        self._full = limit - reserve
        self._pragma(f"max_page_count = {limit}")
        if self._lock_file is not None:
            # Half of the reserved space is enough for writing the log to the file, which may grow.
            self._pragma(f"wal_autocheckpoint = {self._lock_file.reserve // 2 // page_size}")

    def execute(self, statement: str, *values: object) -> sqlite3.Cursor:
        """Run a statement."""
        return self._use_reserve(lambda: self._db.execute(statement, values))

    def is_half_full(self) -> bool:
        return self._uses_more_than(self._half)

    def is_full(self) -> bool:
        """Return whether the file or the disk has no room for another turn."""
        return self.is_disk_full() or self._uses_more_than(self._full)

    def is_far_from_full(self) -> bool:
        """Return whether there certainly is room for another turn, without blocking.

        The event loop calls this while the store's thread works, so `_turns_left` may be off by a
        few. MAX_TURN_PAGES allows for that.
        """
        self._turns_left -= 1
        return self._turns_left > 0 and (self._lock_file is None or self._lock_file.has_room())

    def is_disk_full(self) -> bool:
        return self._lock_file is not None and not self._lock_file.restore()

    def shrink(self) -> bool:
        """Return some free pages to the file system, and whether there were any.

        Also truncates the write-ahead log, which still contains deleted text.
        """
        before = self._pragma("page_count")
        pages = FULL_DISK_SHRINK_PAGES if self.is_disk_full() else SHRINK_PAGES
        script = f"PRAGMA incremental_vacuum({pages}); PRAGMA wal_checkpoint(TRUNCATE)"
        self._use_reserve(lambda: self._db.executescript(script))
        return self._pragma("page_count") < before

    def close(self) -> None:
        self._db.close()
        if self._lock_file is not None:
            self._lock_file.close()

    def _use_reserve(self, work: Callable[[], T]) -> T:
        """Run `work`. If that fails because the disk is full, release the space and try again."""
        try:
            return work()
        except sqlite3.OperationalError as error:
            # The low byte is the primary code (sqlite.org/rescode.html). A quota is an I/O error.
            full = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
            if self._lock_file is None or not full:
                raise
            self._lock_file.release()
            return work()

    def _uses_more_than(self, pages: int) -> bool:
        """Return whether more than `pages` pages, which are at least half of all, contain data."""
        self._turns_left -= 1
        if self._turns_left > 0:
            return False
        used = self._pragma("page_count") - self._pragma("freelist_count")
        self._turns_left = (self._half - used) // MAX_TURN_PAGES
        return used > pages

    def _pragma(self, pragma: str) -> int:
        value: int = self._db.execute(f"PRAGMA {pragma}").fetchone()[0]
        return value


class LockFile:
    """The file PATH.lock. It keeps other processes away from PATH, and reserves disk space.

    On a full disk SQLite cannot even delete, because it writes every change to a log first. With
    the reserved space it can.
    """

    def __init__(self, path: str) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        self._file = os.open(f"{os.path.realpath(path)}.lock", flags, 0o600)
        os.fchmod(self._file, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise InUseError(
                f"STATE_URL: {path} is in use by another process. If that is an old process that"
                " is still draining, wait until it has ended; otherwise set another path, or"
                " redis:// to share sessions between processes"
            ) from None
        disk = os.fstatvfs(self._file)
        # Some file systems report 0 for their size.
        size = disk.f_blocks * disk.f_frsize or 2**40
        self.reserve = min(DISK_RESERVE_BYTES, size // 8)
        self._reserved = os.fstat(self._file).st_size == self.reserve
        # On a full disk, SQLite needs the reserved space to open the database.
        if not self.restore():
            self.release()

    def has_room(self) -> bool:
        """Return whether the space is reserved and as much is free beside it."""
        return self._reserved and self._is_free(self.reserve)

    def restore(self) -> bool:
        """Reserve the space, if it is not and the disk has room, and return `has_room`."""
        if not self._reserved and self._is_free(2 * self.reserve):
            # Random bytes, because file systems that compress reserve nothing for zeros.
            with suppress(OSError):
                written = os.pwrite(self._file, os.urandom(self.reserve), 0)
                self._reserved = written == self.reserve
        return self.has_room()

    def _is_free(self, size: int) -> bool:
        disk = os.fstatvfs(self._file)
        return not disk.f_blocks or disk.f_bavail * disk.f_frsize >= size

    def release(self) -> None:
        """Let SQLite use the reserved space."""
        os.ftruncate(self._file, 0)
        self._reserved = False

    def close(self) -> None:
        """Unlock PATH. The space stays reserved for the next start."""
        os.close(self._file)


def open_database(path: str) -> sqlite3.Connection:
    """Open the database at `path` (or `:memory:`). Create it or update its schema if necessary.

    Only the file's owner can read it. Raises OSError or sqlite3.Error if the file cannot be written
    or belongs to another program.
    """
    if path != ":memory:":
        path = os.path.realpath(path)
        for companion in (f"{path}-wal", f"{path}-shm"):
            if Path(companion).is_symlink():
                raise OSError(f"{companion} is a symbolic link, which SQLite never creates")
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
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
    if version > len(SCHEMAS):
        raise sqlite3.DatabaseError(f"a newer release wrote it (schema {version})")
    # Overwrite deleted text with zeros, and let `shrink` work.
    db.execute("PRAGMA secure_delete = ON")
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    # A killed process loses no committed turn. A power failure may lose the latest ones but does
    # not corrupt the file (sqlite.org/pragma.html#pragma_synchronous).
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    db.create_function("pseudonym", 1, pseudonym)
    db.execute("BEGIN IMMEDIATE")
    for script in SCHEMAS[version:]:
        for statement in script.split(";"):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {len(SCHEMAS)}")
    db.execute("COMMIT")
    for file in (Path(path), Path(f"{path}-wal"), Path(f"{path}-shm")):
        if file.exists():
            file.chmod(0o600)
