"""The rules of `SessionStore`, for SQLite in a file, SQLite in memory and a real Redis."""

import asyncio
import json
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

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

from errors import Code, ServiceError
from redis_state import RedisClient, RedisStore
from sessions import ISSUED_ID, Session, SessionStore, Turn
from tests.conftest import raises
from tests.redis_server import RedisServer
from tests.test_sessions import (
    CALLER,
    MAX_CHARS,
    OTHER_CALLER,
    TTL,
    UNKNOWN_ISSUED_ID,
    Clock,
    connect,
    count_stored,
    create_store,
    make_turn,
    store_turns,
    stored_messages,
)


def count_chars(turn: Turn) -> int:
    return len(turn.message) + len(turn.response)


class Backend(ABC):
    """A database with a clock. Tests open stores on it and look into it."""

    # How far the store's times may differ from `now`, in seconds.
    tolerance = 0.0

    # Seconds by which `advance` made the stored sessions older without changing `now`.
    aged = 0.0

    @property
    @abstractmethod
    def now(self) -> float:
        """The time in seconds since 1970."""

    @abstractmethod
    def create_store(self, max_chars: int = MAX_CHARS) -> SessionStore:
        """Return a store that uses this database."""

    @abstractmethod
    def advance(self, seconds: float) -> None:
        """Let time pass for the stored sessions. Locked ones stay locked."""

    @abstractmethod
    def assert_stored(self, sessions: int, turns: int) -> None:
        """Check how many sessions and turns the database contains."""

    @abstractmethod
    def append_turn(self, turn: Turn) -> None:
        """Append a turn to the only stored session, as an earlier release did."""

    @abstractmethod
    def clear(self) -> None:
        """Delete all sessions and their locks."""

    @abstractmethod
    def expire_locks(self) -> None:
        """Remove the locks of a killed process."""


@dataclass
class SQLiteBackend(Backend):
    path: Path
    clock: Clock = field(default_factory=Clock)

    @property
    def now(self) -> float:
        return self.clock.now

    def create_store(self, max_chars: int = MAX_CHARS) -> SessionStore:
        return create_store(self.path, self.clock, max_chars)

    def advance(self, seconds: float) -> None:
        self.clock.now += seconds

    def assert_stored(self, sessions: int, turns: int) -> None:
        assert (count_stored(self.path, "session"), count_stored(self.path, "turn")) == (
            sessions,
            turns,
        )

    def append_turn(self, turn: Turn) -> None:
        with connect(self.path) as db:
            db.execute(
                "UPDATE session SET turns = json_insert(turns, '$[#]', json(?))",
                (json.dumps(turn),),
            )

    def clear(self) -> None:
        with connect(self.path) as db:
            db.execute("DELETE FROM session")

    def expire_locks(self) -> None:
        """Do nothing: the locks were in the memory of the process."""


class MemoryBackend(SQLiteBackend):
    """No other connection can see the database, and closing the store deletes it."""

    def assert_stored(self, sessions: int, turns: int) -> None:
        pass

    def clear(self) -> None:
        pass


# Make all sessions older. Locked ones do not expire, as if their leases were renewed.
AGE_SESSIONS = """
local time = redis.call('TIME')
for _, key in ipairs(redis.call('KEYS', 'chat:session:*')) do
  local turns, lock = string.gsub(key, 'session', 'turns'), string.gsub(key, 'session', 'lock')
  local ends = redis.call('HGET', key, 'ends') - ARGV[1]
  redis.call('HSET', key, 'ends', ends)
  if redis.call('EXISTS', lock) == 1 then
    ends = math.max(ends, (time[1] + 60) * 1000)
  end
  redis.call('PEXPIREAT', key, ends)
  redis.call('PEXPIREAT', turns, ends)
end
"""


@dataclass
class RedisBackend(Backend):
    server: RedisServer
    tolerance = 0.9

    def __post_init__(self) -> None:
        self.shell = self.server.shell()
        self.shell.flushdb()

    @property
    def now(self) -> float:
        return time.time()

    def create_store(self, max_chars: int = MAX_CHARS) -> SessionStore:
        return RedisStore(RedisClient(self.server.url), ttl=TTL, max_chars=max_chars)

    def advance(self, seconds: float) -> None:
        self.aged += seconds
        self.shell.eval(AGE_SESSIONS, 0, str(round(seconds * 1000)))

    def assert_stored(self, sessions: int, turns: int) -> None:
        keys = [str(key) for key in self.shell.scan_iter("*")]
        lengths = [self.shell.llen(key) for key in keys if key.startswith("chat:turns:")]
        found = [key for key in keys if key.startswith("chat:session:")]
        assert (len(found), sum(map(int, lengths))) == (sessions, turns)

    def append_turn(self, turn: Turn) -> None:
        [key] = self.shell.scan_iter("chat:turns:*")
        self.shell.rpush(key, json.dumps(turn))

    def clear(self) -> None:
        self.shell.flushdb()

    def expire_locks(self) -> None:
        for key in self.shell.scan_iter("chat:lock:*"):
            self.shell.delete(key)
        # Sessions that had expired but were locked expire now.
        self.advance(0)


DURABLE = ["sqlite", pytest.param("redis", marks=pytest.mark.slow)]
BACKENDS = [*DURABLE, "memory"]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    if request.param == "redis":
        server: RedisServer = request.getfixturevalue("redis_server")
        found = RedisBackend(server)
        with closing(found.shell):
            yield found
    elif request.param == "memory":
        yield MemoryBackend(Path(":memory:"))
    else:
        yield SQLiteBackend(tmp_path / "chat.db")


@asynccontextmanager
async def open_store(backend: Backend, max_chars: int = MAX_CHARS) -> AsyncIterator[SessionStore]:
    store = backend.create_store(max_chars)
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture
async def store(backend: Backend) -> AsyncIterator[SessionStore]:
    async with open_store(backend) as store:
        yield store


# ---- turns


async def test_session_returns_its_turns_and_times(store: SessionStore, backend: Backend) -> None:
    first = make_turn("a\x00b", "\U0001f469\u200d\U0001f680 \u0646\u0645\u06cc\n", at=backend.now)
    second = Turn("two", "cut o", False, backend.now - 1.25, backend.now)
    issued = await store_turns(store, None, first, second)
    session = await store.read(CALLER, issued)
    assert session.id == issued
    assert [turn[:3] for turn in session.turns] == [first[:3], second[:3]]
    times = [time for turn in session.turns for time in turn[3:]]
    expected = [time for turn in (first, second) for time in turn[3:]]
    assert times == pytest.approx(expected, rel=0, abs=backend.tolerance)
    assert times[3] - times[2] == pytest.approx(1.25, abs=0.002)
    assert session.created_at == pytest.approx(backend.now, rel=0, abs=backend.tolerance)
    assert session.expires_at == pytest.approx(times[3] + TTL, rel=0, abs=0.001)
    assert (await store.open(CALLER, issued)).turns == session.turns


@pytest.mark.parametrize("backend", DURABLE, indirect=True)
async def test_sessions_survive_a_restart(backend: Backend) -> None:
    async with open_store(backend) as store:
        issued = await store_turns(store, None, make_turn(), make_turn())
        before = await store.read(CALLER, issued)
    async with open_store(backend) as store:
        assert await store.read(CALLER, issued) == before


async def test_issued_ids_have_256_bits_and_never_repeat(store: SessionStore) -> None:
    issued = {(await store.open(CALLER, None)).id for _ in range(100)}
    assert len(issued) == 100
    assert all(ISSUED_ID.fullmatch(session_id) for session_id in issued)


@pytest.mark.parametrize("chosen", ["mine", None])
async def test_response_without_text_leaves_a_session_without_turns(
    store: SessionStore, backend: Backend, chosen: str | None
) -> None:
    session_id = await store_turns(store, chosen, None)
    session = await store.read(CALLER, session_id)
    assert session.turns == []
    assert session.expires_at == pytest.approx(backend.now + TTL, rel=0, abs=backend.tolerance)


@pytest.mark.parametrize(
    ("sizes", "retained"),
    [
        # MAX_CHARS is 1000.
        ([400, 300, 300], [400, 300, 300]),
        ([501, 300, 200], [300, 200]),
        ([400, 101, 300, 200], [300, 200]),
        ([400, 101, 300, 201], [201]),
        ([2, 996, 3], [3]),
        ([400, 300, 1000], [1000]),
        ([400, 300, 5000], [5000]),
        ([5000, 2], [2]),
        ([400, 5000, 300, 200], [300, 200]),
    ],
)
async def test_history_that_no_longer_fits_is_trimmed_to_half_but_always_has_the_newest_turn(
    store: SessionStore, backend: Backend, sizes: Sequence[int], retained: list[int]
) -> None:
    for size in sizes:
        # Characters are code points, in messages and responses.
        await store_turns(
            store, "mine", make_turn("\U0001f642" * (size // 3), "é" * (size - size // 3))
        )
    session = await store.read(CALLER, "mine")
    assert [count_chars(turn) for turn in session.turns] == retained
    backend.assert_stored(1, len(retained))


@pytest.mark.parametrize("backend", DURABLE, indirect=True)
async def test_smaller_history_max_chars_applies_to_stored_sessions(backend: Backend) -> None:
    async with open_store(backend) as store:
        await store_turns(store, "mine", *(make_turn(name * 90, name * 10) for name in "abcde"))
    async with open_store(backend, max_chars=450) as store:
        session = await store.open(CALLER, "mine")
        assert [turn.message[0] for turn in session.turns] == ["d", "e"]
        await store.end(session, make_turn("f" * 100))
        assert [text[0] for text in await stored_messages(store, "mine")] == ["d", "e", "f"]
        backend.assert_stored(1, 3)


async def test_start_of_the_history_changes_only_when_it_is_trimmed(
    store: SessionStore, backend: Backend
) -> None:
    oldest = ["0"]
    for number in range(1000):
        session = await store.open(CALLER, "mine")
        assert sum(map(count_chars, session.turns)) <= MAX_CHARS
        if session.turns and session.turns[0].message != oldest[-1]:
            oldest.append(session.turns[0].message)
        await store.end(session, make_turn(str(number), "x" * (100 - len(str(number)))))
    # Ten turns fit. The eleventh leaves five, so every sixth turn trims the history.
    assert oldest == [str(number) for number in range(0, 996, 6)]
    backend.assert_stored(1, len(session.turns) + 1)


async def test_end_replaces_the_history_with_the_turns_of_the_session(
    store: SessionStore, backend: Backend
) -> None:
    await store_turns(store, "mine", *(make_turn(name) for name in "abcd"))
    without_last, nothing = slice(-1), slice(0)
    steps = [
        (without_last, make_turn("e"), ["a", "b", "c", "e"]),
        (slice(2, None), make_turn("f"), ["c", "e", "f"]),
        # Without a turn, or with a blank one, nothing changes.
        (without_last, None, ["c", "e", "f"]),
        (without_last, make_turn("g", " \n"), ["c", "e", "f"]),
        (nothing, make_turn("h"), ["h"]),
        (nothing, make_turn("i"), ["i"]),
        (slice(None), make_turn("j"), ["i", "j"]),
    ]
    for passed, turn, expected in steps:
        session = await store.open(CALLER, "mine")
        await store.end(session._replace(turns=session.turns[passed]), turn)
        assert await stored_messages(store, "mine") == expected
        backend.assert_stored(1, len(expected))


@pytest.mark.parametrize("response", ["", "\n\n", "\u2003\t\x85 "])
@pytest.mark.parametrize("session_id", ["mine", None])
async def test_blank_turn_is_not_stored_but_its_session_is(
    store: SessionStore, session_id: str | None, response: str
) -> None:
    session_id = await store_turns(store, session_id, make_turn("blank", response))
    assert await stored_messages(store, session_id) == []
    await store_turns(store, session_id, make_turn("one"), make_turn("blank", response))
    assert await stored_messages(store, session_id) == ["one"]


@pytest.mark.parametrize("backend", DURABLE, indirect=True)
async def test_stored_blank_turns_are_skipped_and_dropped_with_the_next_turn(
    store: SessionStore, backend: Backend
) -> None:
    await store_turns(store, "mine", make_turn("one"))
    for turn in (make_turn("blank", "\n"), make_turn("two"), make_turn("blank", "")):
        backend.append_turn(turn)
    assert await stored_messages(store, "mine") == ["one", "two"]
    session = await store.open(CALLER, "mine")
    assert [turn.message for turn in session.turns] == ["one", "two"]
    backend.assert_stored(1, 4)
    await store.end(session, make_turn("three"))
    assert await stored_messages(store, "mine") == ["one", "two", "three"]
    backend.assert_stored(1, 3)


# ---- owners


async def test_unknown_id_in_the_form_of_an_issued_one_is_not_found(
    store: SessionStore, backend: Backend
) -> None:
    for use in (store.open, store.read, store.delete, store.open):
        with raises("session_not_found"):
            await use(CALLER, UNKNOWN_ISSUED_ID)
    backend.assert_stored(0, 0)


async def test_issued_id_is_valid_after_its_first_response(store: SessionStore) -> None:
    session = await store.open(CALLER, None)
    for use in (store.open, store.read, store.delete):
        with raises("session_not_found"):
            await use(CALLER, session.id)
    await store.end(session, make_turn())
    assert await stored_messages(store, session.id) == ["Hi"]


async def test_id_issued_to_a_key_is_not_found_for_other_callers_even_while_busy(
    store: SessionStore,
) -> None:
    issued = await store_turns(store, None, make_turn(), owner="key:app")
    session = await store.open("key:app", issued)
    for owner in ("key:web", CALLER):
        for use in (store.open, store.read, store.delete):
            with raises("session_not_found"):
                await use(owner, issued)
    await store.end(session, make_turn("again"))
    assert await stored_messages(store, issued, owner="key:app") == ["Hi", "again"]


async def test_deleted_session_is_not_found_and_its_chosen_id_starts_empty(
    store: SessionStore,
) -> None:
    for session_id in (
        await store_turns(store, None, make_turn()),
        await store_turns(store, "mine", make_turn()),
    ):
        await store.delete(CALLER, session_id)
        for use in (store.read, store.delete):
            with raises("session_not_found"):
                await use(CALLER, session_id)
    with raises("session_not_found"):
        await store.open(CALLER, UNKNOWN_ISSUED_ID)
    assert [*(await store.open(CALLER, "mine")).turns] == []


# ---- locks


async def test_open_session_is_busy_for_open_and_delete_until_it_ends(store: SessionStore) -> None:
    for session_id in (await store_turns(store, None, make_turn("before")), "mine"):
        session = await store.open(CALLER, session_id)
        for use in (store.open, store.delete):
            with raises("session_busy"):
                await use(CALLER, session_id)
        assert [*(await store.read(CALLER, session_id)).turns] == [*session.turns]
        await store.end(session, make_turn("after"))
        assert (await stored_messages(store, session_id))[-1] == "after"
        await store.end(await store.open(CALLER, session_id), None)
        await store.delete(CALLER, session_id)


async def test_one_of_fifty_concurrent_opens_succeeds(store: SessionStore) -> None:
    await store_turns(store, "mine", make_turn())
    opening = (store.open(CALLER, "mine") for _ in range(50))
    results = await asyncio.gather(*opening, return_exceptions=True)
    (session,) = [result for result in results if isinstance(result, Session)]
    codes = [result.code for result in results if isinstance(result, ServiceError)]
    assert codes == ["session_busy"] * 49
    await store.end(session, None)


@pytest.mark.parametrize("backend", DURABLE, indirect=True)
async def test_turn_of_a_deleted_session_is_not_stored_in_a_new_one_with_the_same_id(
    store: SessionStore, backend: Backend
) -> None:
    old = await store.open(CALLER, "mine")
    backend.clear()
    new = await store.open(CALLER, "mine")
    with raises("state_unavailable"):
        await store.end(old, make_turn("old"))
    with raises("session_busy"):
        await store.open(CALLER, "mine")
    await store.end(new, make_turn("new"))
    assert await stored_messages(store, "mine") == ["new"]
    await store.delete(CALLER, "mine")
    with raises("session_not_found"):
        await store.read(CALLER, "mine")


# ---- expiry


async def test_session_expires_its_ttl_after_its_last_turn(
    store: SessionStore, backend: Backend
) -> None:
    issued = await store_turns(store, None, make_turn(at=backend.now))
    await store_turns(store, "mine", make_turn(at=backend.now))
    backend.advance(TTL - 10)
    assert await stored_messages(store, issued) == ["Hi"]
    await store_turns(store, "mine", make_turn("again", at=backend.now))
    backend.advance(10)
    for use in (store.open, store.read, store.delete):
        with raises("session_not_found"):
            await use(CALLER, issued)
    assert await stored_messages(store, "mine") == ["Hi", "again"]
    backend.advance(TTL)
    session = await store.open(CALLER, "mine")
    assert [*session.turns] == []
    assert session.created_at == pytest.approx(backend.now, rel=0, abs=backend.tolerance)
    await store.sweep()
    backend.assert_stored(1, 0)


async def test_session_does_not_expire_while_a_response_runs(
    store: SessionStore, backend: Backend
) -> None:
    await store_turns(store, "mine", make_turn("before", at=backend.now))
    session = await store.open(CALLER, "mine")
    backend.advance(TTL + 1)
    await store.sweep()
    assert await stored_messages(store, "mine") == ["before"]
    for use in (store.open, store.delete):
        with raises("session_busy"):
            await use(CALLER, "mine")
    await store.end(session, make_turn("after", at=backend.now))
    assert await stored_messages(store, "mine") == ["before", "after"]
    ends = (await store.read(CALLER, "mine")).expires_at
    assert ends == pytest.approx(backend.now + TTL, rel=0, abs=backend.tolerance)


# ---- each store compared with a model

OWNERS = st.sampled_from(["key:app", "key:web", CALLER, OTHER_CALLER])
CHOSEN = st.sampled_from(["demo", "test"])
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
MODEL_MAX_CHARS = 60
ANYONE = "anyone"


@dataclass
class ModelSession:
    """The expected state of a session. An issued one is not stored before its first `end`."""

    expires_at: float
    turns: list[Turn] = field(default_factory=list)
    busy: bool = True
    stored: bool = True


class Model(RuleBasedStateMachine):
    """Runs the same calls on a store and on a dictionary, and compares them."""

    ids = Bundle("ids")

    backend: ClassVar[Backend]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        # By owner and id.
        self.sessions: dict[tuple[str, str], ModelSession] = {}
        self.running: list[tuple[Session, ModelSession]] = []
        self.store = self.backend.create_store(MODEL_MAX_CHARS)
        self.backend.clear()

    def teardown(self) -> None:
        self.runner.run(self.store.aclose())
        self.runner.close()

    @property
    def now(self) -> float:
        return self.backend.now + self.backend.aged

    def alive(self, known: ModelSession) -> bool:
        return known.stored and (known.busy or known.expires_at > self.now)

    def find(self, owner: str, session_id: str) -> ModelSession | None:
        """Return the session that the caller may use, if it exists."""
        for session_owner in (owner, ANYONE):
            known = self.sessions.get((session_owner, session_id))
            if known is not None and self.alive(known):
                return known
        return None

    def assert_raises(self, code: Code, call: Coroutine[Any, Any, object]) -> None:
        with raises(code):
            self.runner.run(call)

    @rule(target=ids, chosen=st.one_of(CHOSEN, st.just(UNKNOWN_ISSUED_ID)))
    def choose(self, chosen: str) -> str:
        return chosen

    @rule(target=ids, owner=OWNERS)
    def create(self, owner: str) -> str:
        session = self.runner.run(self.store.open(owner, None))
        created = ModelSession(0, stored=False)
        self.sessions[owner if owner.startswith("key:") else ANYONE, session.id] = created
        self.running.append((session, created))
        return session.id

    @rule(owner=OWNERS, session_id=ids)
    def open(self, owner: str, session_id: str) -> None:
        known = self.find(owner, session_id)
        opening = self.store.open(owner, session_id)
        if known is None and ISSUED_ID.fullmatch(session_id):
            self.assert_raises("session_not_found", opening)
        elif known is not None and known.busy:
            self.assert_raises("session_busy", opening)
        else:
            if known is None:
                known = ModelSession(self.now + TTL)
                self.sessions[owner, session_id] = known
            session = self.runner.run(opening)
            assert [turn[:3] for turn in session.turns] == [turn[:3] for turn in known.turns]
            known.busy = True
            self.running.append((session, known))

    def take_running(self, data: st.DataObject) -> tuple[Session, ModelSession]:
        return self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))

    @precondition(lambda self: self.running)
    @rule(message=TEXT, response=TEXT.filter(bool), complete=st.booleans(), data=st.data())
    def end(self, message: str, response: str, complete: bool, data: st.DataObject) -> None:
        session, known = self.take_running(data)
        turn = Turn(message, response, complete, self.backend.now - 1, self.backend.now)
        self.runner.run(self.store.end(session, turn))
        if response.strip():
            known.turns.append(turn)
            if sum(map(count_chars, known.turns)) > MODEL_MAX_CHARS:
                while len(known.turns) > 1 and (
                    sum(map(count_chars, known.turns)) > MODEL_MAX_CHARS // 2
                ):
                    known.turns.pop(0)
        if response.strip() or not known.stored:
            known.expires_at = self.now + TTL
        known.busy, known.stored = False, True

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def end_without_text(self, data: st.DataObject) -> None:
        session, known = self.take_running(data)
        self.runner.run(self.store.end(session, None))
        if not known.stored:
            known.expires_at = self.now + TTL
        known.busy, known.stored = False, True

    @rule(owner=OWNERS, session_id=ids)
    def delete(self, owner: str, session_id: str) -> None:
        known = self.find(owner, session_id)
        deleting = self.store.delete(owner, session_id)
        if known is None:
            self.assert_raises("session_not_found", deleting)
        elif known.busy:
            self.assert_raises("session_busy", deleting)
        else:
            self.runner.run(deleting)
            self.sessions = {key: each for key, each in self.sessions.items() if each is not known}

    @rule(seconds=st.sampled_from([1.0, TTL / 2, TTL, 3 * TTL]))
    def wait(self, seconds: float) -> None:
        self.backend.advance(seconds)

    @rule()
    def sweep(self) -> None:
        self.runner.run(self.store.sweep())
        alive = [known for known in self.sessions.values() if self.alive(known)]
        self.backend.assert_stored(len(alive), sum(len(known.turns) for known in alive))

    @rule()
    def restart(self) -> None:
        """Restart after a kill: running responses and their locks are lost."""
        self.runner.run(self.store.aclose())
        self.running.clear()
        self.backend.expire_locks()
        self.sessions = {key: each for key, each in self.sessions.items() if each.stored}
        if isinstance(self.backend, MemoryBackend):
            self.sessions.clear()
        for known in self.sessions.values():
            known.busy = False
        self.store = self.backend.create_store(MODEL_MAX_CHARS)

    @rule(owner=OWNERS, session_id=ids)
    def read(self, owner: str, session_id: str) -> None:
        known = self.find(owner, session_id)
        if known is None:
            self.assert_raises("session_not_found", self.store.read(owner, session_id))
            return
        self.assert_matches(self.runner.run(self.store.read(owner, session_id)), known)

    def assert_matches(self, session: Session, known: ModelSession) -> None:
        assert [turn[:3] for turn in session.turns] == [turn[:3] for turn in known.turns]
        ends = session.expires_at + self.backend.aged
        assert ends == pytest.approx(known.expires_at, rel=0, abs=self.backend.tolerance)

    @invariant()
    def all_sessions_match(self) -> None:
        for (owner, session_id), known in self.sessions.items():
            if self.alive(known):
                owner = CALLER if owner == ANYONE else owner
                self.assert_matches(self.runner.run(self.store.read(owner, session_id)), known)


@pytest.mark.parametrize("examples", [12, pytest.param(60, marks=pytest.mark.slow)])
def test_store_behaves_like_its_model(backend: Backend, examples: int) -> None:
    class BackendModel(Model):
        pass

    BackendModel.backend = backend
    run_state_machine_as_test(
        BackendModel,
        settings=hypothesis_settings(max_examples=examples, stateful_step_count=30, deadline=None),
    )
