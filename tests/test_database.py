"""The SQLite file: start, schema, permissions, lock, size limit and full disks."""

import asyncio
import hashlib
import logging
import os
import resource
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from check import check
from database import APPLICATION_ID, DISK_RESERVE_BYTES, SCHEMAS, Database, LockFile, pseudonym
from errors import ServiceError
from server import Drain
from service import create_app, create_state
from sessions import SessionStore
from settings import SettingsError, from_env
from tests.conftest import StartService, StartUpstream, create_log, openai_env, raises
from tests.test_conversations import echo, echoed, read_messages, request_session
from tests.test_kill import ROOT, running_process
from tests.test_sessions import (
    CALLER,
    OTHER_CALLER,
    TTL,
    Clock,
    connect,
    count_stored,
    create_store,
    exclusive_locks,
    make_turn,
    open_store,
    read_bytes,
    store_turns,
    stored_messages,
)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "chat.db"


def set_mode(path: Path, mode: int) -> None:
    """Set the mode of a file or directory. Creates an empty file if there is none."""
    if not path.exists():
        path.touch()
    path.chmod(mode)


def size_of(file: Path) -> int:
    return file.stat().st_size


# ---- start


def newer_schema(file: Path) -> None:
    with connect(file) as db:
        db.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        db.execute(f"PRAGMA user_version = {len(SCHEMAS) + 1}")


def not_a_database(file: Path) -> None:
    file.write_text("# A project\n" * 100)


def foreign_database(file: Path) -> None:
    with connect(file) as db:
        db.execute("CREATE TABLE invoice (number INTEGER PRIMARY KEY)")


def foreign_database_with_version(file: Path) -> None:
    foreign_database(file)
    with connect(file) as db:
        db.execute(f"PRAGMA user_version = {len(SCHEMAS)}")


def directory(file: Path) -> None:
    file.mkdir()


def missing_directory(file: Path) -> None:
    file.parent.rmdir()


def symbolic_link_as_log(file: Path) -> None:
    file.with_name("target").write_bytes(b"other data")
    file.with_name("chat.db-wal").symlink_to("target")


def symbolic_link_as_lock_file(file: Path) -> None:
    file.with_name("target").write_bytes(b"other data")
    file.with_name("chat.db.lock").symlink_to("target")


@pytest.mark.parametrize(
    "prepare",
    [
        newer_schema,
        not_a_database,
        foreign_database,
        foreign_database_with_version,
        directory,
        missing_directory,
        symbolic_link_as_log,
        symbolic_link_as_lock_file,
    ],
)
def test_unusable_file_stops_the_start_with_one_line_and_is_not_changed(
    file: Path, prepare: Callable[[Path], None]
) -> None:
    prepare(file)
    paths = [path for path in file.parent.glob("*") if path.is_file()]
    before = {path: (path.read_bytes(), path.stat().st_mode) for path in paths}
    with pytest.raises(SettingsError) as caught:
        create_app(from_env({"STATE_URL": f"sqlite:///{file}"}), logging.Logger("test"), Drain())
    line = str(caught.value)
    assert line.startswith(f"STATE_URL: {file} ")
    assert "sqlite:///PATH" in line
    assert "\n" not in line
    assert {path: (path.read_bytes(), path.stat().st_mode) for path in paths} == before


@contextmanager
def unprivileged(directory: Path) -> Iterator[None]:
    """Run the block as the unprivileged owner of `directory`, because root can write anywhere."""
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
    """A directory that every user may enter, unlike pytest's."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.mark.parametrize(
    ("file_mode", "directory_mode"), [(0o400, 0o755), (0o600, 0o555), (None, 0o555)]
)
async def test_unwritable_file_or_directory_stops_the_start_and_names_the_setting(
    reachable: Path, clock: Clock, file_mode: int | None, directory_mode: int
) -> None:
    file = reachable / "chat.db"
    if file_mode is not None:
        async with open_store(file, clock) as store:
            await store_turns(store, "mine", make_turn("stored"))
        set_mode(file, file_mode)
    set_mode(reachable, directory_mode)
    with (
        unprivileged(reachable),
        pytest.raises(SettingsError, match=r"STATE_URL: .*sqlite:///PATH"),
    ):
        create_store(file, clock)
    set_mode(reachable, 0o755)
    if file_mode is not None:
        set_mode(file, 0o600)
        async with open_store(file, clock) as store:
            assert await stored_messages(store, "mine") == ["stored"]


async def test_file_locked_by_another_process_stops_the_start(file: Path, clock: Clock) -> None:
    async with open_store(file, clock) as store:
        await store_turns(store, "mine", make_turn("stored"))
    with exclusive_locks(file), pytest.raises(SettingsError, match="locked"):
        create_store(file, clock)
    async with open_store(file, clock) as store:
        assert await stored_messages(store, "mine") == ["stored"]


# ---- schema

# The file of release 0.1.0.
SCHEMA_1 = """
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
PRAGMA application_id = 1667785076;
PRAGMA user_version = 1;
"""
ISSUED_TO_ADDRESS, ISSUED_TO_KEY = "s_" + "B" * 43, "s_" + "C" * 43


def create_schema_1(file: Path, *sessions: tuple[str, str]) -> None:
    """Create a database of release 0.1.0 with sessions of these owners and ids."""
    with connect(file) as db:
        db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        db.execute("PRAGMA journal_mode = WAL")
        db.executescript(SCHEMA_1)
        for owner, session_id in sessions:
            digest = hashlib.sha256(session_id.encode()).digest()
            turns = f'[["from {owner}","Hello",true,1.0,2.0]]'
            row = (digest, owner, Clock.now, Clock.now + TTL, turns)
            db.execute("INSERT INTO session VALUES (NULL, ?, ?, ?, ?, ?)", row)


async def test_sessions_of_schema_1_are_migrated_at_start(file: Path, clock: Clock) -> None:
    create_schema_1(
        file,
        (CALLER, "demo"),
        ("key:app", "demo"),
        ("anyone", ISSUED_TO_ADDRESS),
        ("key:app", ISSUED_TO_KEY),
    )
    assert b"192.0.2.1" in read_bytes(file)
    async with open_store(file, clock) as store:
        assert await stored_messages(store, "demo") == [f"from {CALLER}"]
        assert await stored_messages(store, "demo", "key:app") == ["from key:app"]
        assert await stored_messages(store, ISSUED_TO_ADDRESS, OTHER_CALLER) == ["from anyone"]
        assert await stored_messages(store, ISSUED_TO_KEY, "key:app") == ["from key:app"]
        for owner, session_id in ((OTHER_CALLER, "demo"), (CALLER, ISSUED_TO_KEY)):
            with raises("session_not_found"):
                await store.read(owner, session_id)
        await store_turns(store, "demo", make_turn("new"))
        assert await stored_messages(store, "demo") == [f"from {CALLER}", "new"]
        await store.delete(CALLER, "demo")
        await store_turns(store, "other", make_turn())
        await store.sweep()
    with connect(file) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
        creators = db.execute("SELECT creator FROM session ORDER BY generation").fetchall()
    assert creators == [("key:app",), ("anyone",), ("key:app",), (pseudonym(CALLER),)]
    assert b"192.0.2.1" not in read_bytes(file)


async def test_migrated_schema_is_the_schema_of_a_new_file(tmp_path: Path, clock: Clock) -> None:
    schemas = []
    create_schema_1(tmp_path / "old.db")
    for name in ("old.db", "new.db"):
        async with open_store(tmp_path / name, clock):
            pass
        with connect(tmp_path / name) as db:
            schemas.append(
                [
                    db.execute("SELECT type, name FROM sqlite_master ORDER BY name").fetchall(),
                    db.execute("PRAGMA table_info(session)").fetchall(),
                    db.execute("PRAGMA index_info(session_creator)").fetchall(),
                    db.execute("PRAGMA application_id").fetchall(),
                    db.execute("PRAGMA user_version").fetchall(),
                    db.execute("PRAGMA auto_vacuum").fetchall(),
                ]
            )
    assert schemas[0] == schemas[1]
    assert schemas[0][4] == [(2,)]


# ---- permissions


@pytest.mark.parametrize("before", [None, 0o644, 0o666])
async def test_only_the_owner_can_read_the_files(
    file: Path, clock: Clock, before: int | None
) -> None:
    names = ("chat.db", "chat.db-wal", "chat.db-shm", "chat.db.lock")
    if before is not None:
        async with open_store(file, clock):
            pass
        for name in names:
            set_mode(file.with_name(name), before)
    async with open_store(file, clock) as store:
        await store_turns(store, "mine", make_turn())
        modes = {path.name: path.stat().st_mode & 0o777 for path in file.parent.iterdir()}
    assert modes == dict.fromkeys(names, 0o600)


async def test_log_next_to_the_target_of_a_linked_database_must_not_be_a_symbolic_link(
    tmp_path: Path, clock: Clock
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    file = tmp_path / "chat.db"
    file.symlink_to(data / "chat.db")
    async with open_store(file, clock) as store:
        await store_turns(store, "mine", make_turn())
        assert {path.stat().st_mode & 0o777 for path in data.iterdir()} == {0o600}
    (data / "chat.db-shm").symlink_to(data / "target")
    with pytest.raises(SettingsError, match=r"chat\.db-shm is a symbolic link"):
        create_store(file, clock)


# ---- one process


async def test_second_process_does_not_start_while_probe_check_and_backup_work(
    upstream: StartUpstream, file: Path
) -> None:
    provider = await upstream(echo)
    env = openai_env(provider.url)
    async with running_process(file, env) as (app, process):
        await (await app.chat("one", session_id="mine")).events()
        port = app.url.rpartition(":")[2]
        for arguments, status in (([], 2), (["--probe"], 0)):
            second = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "service", *arguments),
                env={
                    "PYTHONPATH": str(ROOT),
                    "STATE_URL": f"sqlite:///{file}",
                    "PORT": port if arguments else "0",
                    **env,
                },
                cwd=file.parent,
                stderr=subprocess.PIPE,
            )
            _, stderr = await second.communicate()
            assert second.returncode == status
            if not arguments:
                assert f"STATE_URL: {file} is in use by another process" in stderr.decode()
                assert "draining" in stderr.decode()
        lines: list[str] = []
        settings = from_env({"STATE_URL": f"sqlite:///{file}"})
        assert await check(settings, [], create_state, lines.append) == 0
        assert lines[-1].startswith("warning: ")
        assert "in use by another process" in lines[-1]
        # Through another name, too.
        link = file.with_name("link.db")
        link.symlink_to(file)
        with pytest.raises(SettingsError, match="in use"):
            Database(str(link), 2**30, logging.Logger("test"))
        with connect(file) as db, closing(sqlite3.connect(file.with_name("backup.db"))) as backup:
            db.backup(backup)
        assert count_stored(file.with_name("backup.db"), "turn") == 1
        process.kill()
        await process.wait()
    async with running_process(file, env) as (app, _):
        assert await read_messages(app, "mine") == echoed("one")


async def test_file_can_be_opened_again_after_close_or_a_failed_start(
    file: Path, clock: Clock
) -> None:
    for _ in range(2):
        async with open_store(file, clock):
            with pytest.raises(SettingsError, match="in use"):
                create_store(file, clock)
    newer_schema(file)
    for _ in range(2):
        with pytest.raises(SettingsError, match="newer release"):
            create_store(file, clock)


# ---- size limit

MEBIBYTE = 2**20


async def fill(store: SessionStore, clock: Clock) -> list[str]:
    """Create sessions until the store is full. No turn is lost. Return their ids."""
    ids: list[str] = []
    with suppress(ServiceError):
        while True:
            session = await store.open("key:app", None if len(ids) % 2 else f"s-{len(ids)}")
            try:
                await store.end(session, make_turn("x" * 10_000, at=clock.now))
            except ServiceError as error:
                raise AssertionError(error) from error
            ids.append(session.id)
    return ids


@pytest.mark.parametrize("max_bytes", [2**16, MEBIBYTE])
@pytest.mark.parametrize("memory", [False, True])
async def test_full_store_rejects_turns_and_recovers_by_deletion_and_by_expiry(
    file: Path, clock: Clock, memory: bool, max_bytes: int
) -> None:
    path = ":memory:" if memory else file
    async with open_store(path, clock, 100_000, max_bytes=max_bytes) as store:
        await store.check()
        running = [await store.open(CALLER, name) for name in ("running", None)]
        too_large = await store.open(CALLER, None)
        ids = await fill(store, clock)
        assert len(ids) * 10_000 > max_bytes / 4
        for _ in range(2):
            for session_id in (None, "new", ids[0]):
                with raises("state_unavailable") as failure:
                    await store.open("key:app", session_id)
                assert failure.value.retry_after == 5
                assert "full" in str(failure.value)
            with raises("state_unavailable"):
                await store.check()
        for session in running:
            await store.end(session, make_turn("ended", "y" * (max_bytes // 200), at=clock.now))
            assert await stored_messages(store, session.id) == ["ended"]
        with raises("state_unavailable"):
            await store.end(too_large, make_turn("y" * (max_bytes // 2), at=clock.now))
        assert (await store.read("key:app", ids[-1])).turns[0].message == "x" * 10_000

        for session_id in ids[:2] if max_bytes == 2**16 else ids[:8]:
            await store.delete("key:app", session_id)
        await store.check()
        await store_turns(store, None, make_turn(at=clock.now))
        await fill(store, clock)
        clock.now += TTL
        await store.sweep()
        await store.check()
        assert len(await fill(store, clock)) >= len(ids)
    if not memory:
        assert size_of(file) <= max_bytes


async def test_file_larger_than_the_limit_works_at_its_size_with_a_warning(
    file: Path, clock: Clock
) -> None:
    handler, log = create_log()
    async with open_store(file, clock, 100_000, max_bytes=2 * MEBIBYTE) as store:
        ids = await fill(store, clock)
    size = size_of(file)
    async with open_store(file, clock, 100_000, log=log, max_bytes=MEBIBYTE) as store:
        (entry,) = handler.entries
        assert entry["level"] == "warning"
        assert f"{file} has {size} bytes, more than STATE_MAX_BYTES={MEBIBYTE}" in entry["event"]
        await store.check()
        await store_turns(store, ids[0], make_turn(at=clock.now), owner="key:app")
        assert len(await fill(store, clock)) < 10
        for session_id in ids[1:4]:
            await store.delete("key:app", session_id)
        await store.check()
        clock.now += TTL
        await store.sweep()
        await fill(store, clock)
    assert size_of(file) < size + 2**17


async def test_chat_is_rejected_before_its_provider_is_called_while_the_store_is_full(
    service: StartService, upstream: StartUpstream, file: Path
) -> None:
    provider = await upstream(echo)
    env = openai_env(provider.url, STATE_URL=f"sqlite:///{file}", STATE_MAX_BYTES="65536")
    app = await service(**env, RATE_LIMIT="off")
    sessions = 0
    while (reply := await app.chat("x" * 5000, session_id=f"s-{sessions}")).status == 200:
        assert (await reply.events())[-1]["status"] == "done"
        sessions += 1
    for session_id in (None, "s-0", "new"):
        reply = await app.chat("Hi", session_id=session_id)
        assert reply.headers["retry-after"] == "5"
        assert await reply.status_and_code() == (503, "state_unavailable")
    assert len(provider.requests) == sessions
    assert (await app.get("/readyz")).status == 503
    assert (await app.get("/healthz")).status == 200
    assert len(await read_messages(app, "s-0")) == 2
    assert (await request_session(app, "DELETE", "s-0")).status == 204
    assert (await app.get("/readyz")).status == 200
    assert (await (await app.chat("Hi")).events())[-1]["status"] == "done"


async def test_settings_limit_the_sessions_of_a_caller_in_a_half_full_store(
    service: StartService, upstream: StartUpstream, file: Path
) -> None:
    provider = await upstream(echo)
    env = openai_env(provider.url, STATE_URL=f"sqlite:///{file}", STATE_MAX_BYTES="65536")
    app = await service(**env, RATE_LIMIT="off", MAX_SESSIONS_PER_CALLER="1")
    for number in range(20):
        events = await (await app.chat("x" * 5000, session_id=f"s-{number}")).events()
        assert events[-1]["status"] == "done"
    assert (await request_session(app, "GET", "s-0")).status == 404
    assert len(await read_messages(app, "s-19")) == 2


# ---- full disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The directory of a disk of two mebibytes."""
    directory = tmp_path / "disk"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(directory)]
    mounted = subprocess.run(command, capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip(f"this user may not mount a disk: {mounted.stderr.decode().strip()}")
    yield directory
    subprocess.run(["umount", directory], check=True)


def fill_disk(disk: Path, leave: int = 0) -> Path:
    """Write a file until the disk is full, except for `leave` bytes."""
    filler = disk / "filler"
    with filler.open("ab", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    os.truncate(filler, filler.stat().st_size - leave)
    return filler


async def test_on_a_full_disk_turns_end_deletion_and_expiry_work_and_chats_are_rejected(
    disk: Path, clock: Clock
) -> None:
    file = disk / "chat.db"
    async with open_store(file, clock, 100_000) as store:
        await store.check()
        for number in range(8):
            await store_turns(store, f"old-{number}", make_turn("x" * 50_000, at=clock.now))
        clock.now += TTL / 2
        for number in range(8):
            await store_turns(store, f"new-{number}", make_turn("x" * 50_000, at=clock.now))
        running = await store.open(CALLER, "new-0")
        # The log is empty, so the disk has no space left in it either.
        await store.sweep()
        filler = fill_disk(disk)

        for session_id in (None, "other", "new-1"):
            with raises("state_unavailable") as failure:
                await store.open(CALLER, session_id)
            assert "full" in str(failure.value)
        with raises("state_unavailable"):
            await store.check()
        await store.end(running, make_turn("ended", at=clock.now))
        assert (await stored_messages(store, "new-0"))[-1] == "ended"

        for number in range(1, 4):
            size = size_of(file)
            await store.delete(CALLER, f"new-{number}")
            assert size_of(file) < size or number == 1
        clock.now += TTL / 2
        await store.sweep()
        assert count_stored(file, "session") == 5
        # What was deleted is free now, and the store takes turns again.
        await store.check()
        await store_turns(store, "new-0", make_turn("next", at=clock.now))

        fill_disk(disk)
        with raises("state_unavailable"):
            await store.check()
        filler.unlink()
        await store.check()


async def test_sweep_shrinks_a_file_with_many_free_pages_on_a_full_disk(
    disk: Path, clock: Clock
) -> None:
    file = disk / "chat.db"
    async with open_store(file, clock, 100_000) as store:
        for number in range(20):
            await store_turns(store, f"s-{number}", make_turn("x" * 50_000, at=clock.now))
        await store.sweep()
        for number in range(10):
            await store.delete(CALLER, f"s-{number}")
        size = size_of(file)
        fill_disk(disk)
        await store.sweep()
        assert size_of(file) < size * 0.7


async def test_service_starts_on_a_full_disk_and_recovers(disk: Path, clock: Clock) -> None:
    file = disk / "chat.db"
    async with open_store(file, clock, 100_000) as store:
        await store.check()
        await store_turns(store, "mine", make_turn("x" * 50_000, at=clock.now))
    filler = fill_disk(disk)
    async with open_store(file, clock, 100_000) as store:
        with raises("state_unavailable"):
            await store.check()
        assert len(await stored_messages(store, "mine")) == 1
        await store.delete(CALLER, "mine")
        filler.unlink()
        await store.check()


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Let this process write no file beyond `size` bytes, as a quota would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


async def test_quota_that_the_file_system_does_not_report_is_noticed_at_the_first_failure(
    file: Path, clock: Clock
) -> None:
    async with open_store(file, clock, 100_000) as store:
        await store.check()
        await store_turns(store, "mine", make_turn(at=clock.now))
        await store_turns(store, "other", make_turn(at=clock.now))
        session = await store.open(CALLER, "mine")
        with file_size_limit(size_of(file.with_name("chat.db-wal")) + 2**16):
            with raises("state_unavailable"):
                await store.end(session, make_turn("lost", "x" * 99_000, at=clock.now))
            for _ in range(2):
                with raises("state_unavailable") as failure:
                    await store.open(CALLER, "mine")
                assert "full" in str(failure.value)
            with raises("state_unavailable"):
                await store.check()
            await store.delete(CALLER, "other")
        await store.check()
        await store_turns(store, "mine", make_turn("next", at=clock.now))
        assert await stored_messages(store, "mine") == ["Hi", "next"]


def test_lock_file_occupies_the_reserve_until_it_is_released(tmp_path: Path) -> None:
    def occupied() -> int:
        return (tmp_path / "chat.db.lock").stat().st_blocks * 512

    for _ in range(2):
        with closing(LockFile(str(tmp_path / "chat.db"))) as lock_file:
            assert lock_file.reserve == DISK_RESERVE_BYTES
            assert occupied() >= DISK_RESERVE_BYTES
            lock_file.release()
            assert occupied() == 0
            assert lock_file.restore()
        assert occupied() >= DISK_RESERVE_BYTES
