"""What holds of every store alike: SQLite's file, SQLite's memory and a real Redis."""

import asyncio
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

from errors import Code
from redis_state import RedisClient, RedisStore
from sessions import ISSUED_ID, Session, SessionStore, SQLiteStore, Turn
from tests.conftest import raises
from tests.redis_server import RedisServer
from tests.test_sessions import (
    MAX_CHARS,
    ME,
    NEIGHBOUR,
    NOBODYS_GUESS,
    TTL,
    Clock,
    count,
    other_connection,
    said,
    talk,
    texts,
)


def chars(turn: Turn) -> int:
    return len(turn.message) + len(turn.response)


class Backend(ABC):
    """Where stores keep what the tests put into them, and the time there."""

    # How far the times of a store may be from those of `now`, in seconds.
    slack = 0.0

    # What `wait` has let pass, where that does not move `now`.
    waited = 0.0

    @property
    @abstractmethod
    def now(self) -> float:
        """In seconds since 1970."""

    @abstractmethod
    def store(self, max_chars: int = MAX_CHARS) -> SessionStore:
        """Another one on the same."""

    @abstractmethod
    def wait(self, seconds: float) -> None:
        """So much time passes; who holds a lock goes on holding it."""

    @abstractmethod
    def holds(self, sessions: int, turns: int) -> None:
        """Fails unless so much is stored."""

    @abstractmethod
    def lose(self) -> None:
        """Everything that was stored is gone, with it the locks."""

    @abstractmethod
    def free(self) -> None:
        """The locks of a process that was killed are no more."""


@dataclass
class SQLiteBackend(Backend):
    path: Path
    clock: Clock = field(default_factory=Clock)

    @property
    def now(self) -> float:
        return self.clock.now

    def store(self, max_chars: int = MAX_CHARS) -> SessionStore:
        return SQLiteStore(str(self.path), ttl=TTL, max_chars=max_chars, clock=self.clock)

    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    def holds(self, sessions: int, turns: int) -> None:
        assert (count(self.path, "session"), count(self.path, "turn")) == (sessions, turns)

    def lose(self) -> None:
        with other_connection(self.path) as db:
            db.execute("DELETE FROM session")

    def free(self) -> None:
        """They were in the process."""


class MemoryBackend(SQLiteBackend):
    """Nobody else can look into it, or take anything away; it goes with its process."""

    def holds(self, sessions: int, turns: int) -> None:
        pass

    def lose(self) -> None:
        pass


# All sessions are so much older; those with a lock live on, as if it were renewed.
AGE = """
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
    slack = 0.9

    def __post_init__(self) -> None:
        self.shell = self.server.shell()
        self.shell.flushdb()

    @property
    def now(self) -> float:
        return time.time()

    def store(self, max_chars: int = MAX_CHARS) -> SessionStore:
        return RedisStore(RedisClient(self.server.url), ttl=TTL, max_chars=max_chars)

    def wait(self, seconds: float) -> None:
        self.waited += seconds
        self.shell.eval(AGE, 0, str(round(seconds * 1000)))

    def holds(self, sessions: int, turns: int) -> None:
        keys = [str(key) for key in self.shell.scan_iter("*")]
        lengths = [self.shell.llen(key) for key in keys if key.startswith("chat:turns:")]
        found = [key for key in keys if key.startswith("chat:session:")]
        assert (len(found), sum(map(int, lengths))) == (sessions, turns)

    def lose(self) -> None:
        self.shell.flushdb()

    def free(self) -> None:
        for key in self.shell.scan_iter("chat:lock:*"):
            self.shell.delete(key)
        # What had outlived its time by its lock ends.
        self.wait(0)


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
async def opened(backend: Backend, max_chars: int = MAX_CHARS) -> AsyncIterator[SessionStore]:
    store = backend.store(max_chars)
    try:
        yield store
    finally:
        await store.aclose()


@pytest.fixture
async def store(backend: Backend) -> AsyncIterator[SessionStore]:
    async with opened(backend) as store:
        yield store


# ---- what it keeps


async def test_a_session_is_what_was_said_in_it(store: SessionStore, backend: Backend) -> None:
    first = said("a\x00b", "\U0001f469\u200d\U0001f680 \u0646\u0645\u06cc\n", at=backend.now)
    second = Turn("two", "cut o", False, backend.now - 1.25, backend.now)
    issued = await talk(store, None, first, second)
    session = await store.read(ME, issued)
    assert session.id == issued
    assert [turn[:3] for turn in session.turns] == [first[:3], second[:3]]
    times = [time for turn in session.turns for time in turn[3:]]
    told = [time for turn in (first, second) for time in turn[3:]]
    assert times == pytest.approx(told, rel=0, abs=backend.slack)
    assert times[3] - times[2] == pytest.approx(1.25, abs=0.002)
    assert session.created_at == pytest.approx(backend.now, rel=0, abs=backend.slack)
    assert session.expires_at == pytest.approx(times[3] + TTL, rel=0, abs=0.001)
    assert (await store.open(ME, issued)).turns == session.turns


@pytest.mark.parametrize("backend", DURABLE, indirect=True)
async def test_what_was_said_is_there_for_the_next_process(backend: Backend) -> None:
    async with opened(backend) as store:
        issued = await talk(store, None, said(), said())
        before = await store.read(ME, issued)
    async with opened(backend) as store:
        assert await store.read(ME, issued) == before


async def test_issued_ids_hold_256_bits_and_are_never_the_same(store: SessionStore) -> None:
    issued = {(await store.open(ME, None)).id for _ in range(100)}
    assert len(issued) == 100
    assert all(ISSUED_ID.fullmatch(session_id) for session_id in issued)


@pytest.mark.parametrize("chosen", ["mine", None])
async def test_an_answer_without_text_leaves_a_session_without_turns(
    store: SessionStore, backend: Backend, chosen: str | None
) -> None:
    session_id = await talk(store, chosen, None)
    session = await store.read(ME, session_id)
    assert session.turns == []
    assert session.expires_at == pytest.approx(backend.now + TTL, rel=0, abs=backend.slack)


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
    store: SessionStore, backend: Backend, sizes: Sequence[int], kept: list[int]
) -> None:
    for size in sizes:
        # A character is a code point, in the message as in the answer.
        await talk(store, "mine", said("\U0001f642" * (size // 3), "é" * (size - size // 3)))
    session = await store.read(ME, "mine")
    assert [chars(turn) for turn in session.turns] == kept
    backend.holds(1, len(kept))


@pytest.mark.parametrize("backend", DURABLE, indirect=True)
async def test_a_smaller_history_max_chars_counts_from_the_next_request_on(
    backend: Backend, store: SessionStore
) -> None:
    await talk(store, "mine", *(said(name * 100, "") for name in "abc"))
    async with opened(backend, max_chars=250) as smaller:
        session = await smaller.open(ME, "mine")
        assert [turn.message[0] for turn in session.turns] == ["b", "c"]
        await smaller.end(session, said("d" * 100, ""))
        assert [text[0] for text in await texts(smaller, "mine")] == ["c", "d"]
    backend.holds(1, 2)


async def test_the_thousandth_turn_reads_and_keeps_no_more_than_the_tenth(
    store: SessionStore, backend: Backend
) -> None:
    for number in range(1, 1001):
        session = await store.open(ME, "mine")
        await store.end(session, said(f"{number:0100}", ""))
        if number in (11, 1000):
            assert len(session.turns) == 10
            assert sum(map(chars, session.turns)) == 1000
            backend.holds(1, 10)


# ---- whose it is


async def test_a_guessed_id_of_an_issued_ones_shape_is_not_adopted(
    store: SessionStore, backend: Backend
) -> None:
    for use in (store.open, store.read, store.delete, store.open):
        with raises("session_not_found"):
            await use(ME, NOBODYS_GUESS)
    backend.holds(0, 0)


async def test_an_issued_id_is_valid_once_its_first_answer_has_ended(store: SessionStore) -> None:
    session = await store.open(ME, None)
    for use in (store.open, store.read, store.delete):
        with raises("session_not_found"):
            await use(ME, session.id)
    await store.end(session, said())
    assert await texts(store, session.id) == ["Hi"]


async def test_an_id_that_was_issued_to_a_key_needs_that_key_even_while_it_is_busy(
    store: SessionStore,
) -> None:
    issued = await talk(store, None, said(), owner="key:app")
    session = await store.open("key:app", issued)
    for owner in ("key:web", ME):
        for use in (store.open, store.read, store.delete):
            with raises("session_not_found"):
                await use(owner, issued)
    await store.end(session, said("again"))
    assert await texts(store, issued, owner="key:app") == ["Hi", "again"]


async def test_a_deleted_session_is_gone_and_its_name_begins_anew(store: SessionStore) -> None:
    for session_id in (await talk(store, None, said()), await talk(store, "mine", said())):
        await store.delete(ME, session_id)
        for use in (store.read, store.delete):
            with raises("session_not_found"):
                await use(ME, session_id)
    with raises("session_not_found"):
        await store.open(ME, NOBODYS_GUESS)
    assert [*(await store.open(ME, "mine")).turns] == []


# ---- one answer at a time, and its end


async def test_only_one_answer_is_written_in_a_session_at_a_time(store: SessionStore) -> None:
    for session_id in (await talk(store, None, said("before")), "mine"):
        session = await store.open(ME, session_id)
        for use in (store.open, store.delete):
            with raises("session_busy"):
                await use(ME, session_id)
        assert [*(await store.read(ME, session_id)).turns] == [*session.turns]
        await store.end(session, said("after"))
        assert (await texts(store, session_id))[-1] == "after"
        await store.end(await store.open(ME, session_id), None)
        await store.delete(ME, session_id)


async def test_of_fifty_at_once_one_gets_the_session(store: SessionStore) -> None:
    await talk(store, "mine", said())
    opening = (store.open(ME, "mine") for _ in range(50))
    got = await asyncio.gather(*opening, return_exceptions=True)
    sessions = [one for one in got if isinstance(one, Session)]
    assert len(sessions) == 1
    assert sum(one.code == "session_busy" for one in got) == 49
    await store.end(sessions[0], None)


@pytest.mark.parametrize("backend", DURABLE, indirect=True)
async def test_an_answer_that_outlives_its_session_gives_nothing_to_its_successor(
    store: SessionStore, backend: Backend
) -> None:
    old = await store.open(ME, "mine")
    backend.lose()
    new = await store.open(ME, "mine")
    with raises("state_unavailable"):
        await store.end(old, said("the old one's"))
    with raises("session_busy"):
        await store.open(ME, "mine")
    await store.end(new, said("the new one's"))
    assert await texts(store, "mine") == ["the new one's"]
    await store.delete(ME, "mine")
    with raises("session_not_found"):
        await store.read(ME, "mine")


# ---- expiry


async def test_a_session_ends_when_its_time_is_over_after_its_last_turn(
    store: SessionStore, backend: Backend
) -> None:
    issued = await talk(store, None, said(at=backend.now))
    await talk(store, "mine", said(at=backend.now))
    backend.wait(TTL - 10)
    assert await texts(store, issued) == ["Hi"]
    await talk(store, "mine", said("again", at=backend.now))
    backend.wait(10)
    for use in (store.open, store.read, store.delete):
        with raises("session_not_found"):
            await use(ME, issued)
    assert await texts(store, "mine") == ["Hi", "again"]
    backend.wait(TTL)
    session = await store.open(ME, "mine")
    assert [*session.turns] == []
    assert session.created_at == pytest.approx(backend.now, rel=0, abs=backend.slack)
    await store.sweep()
    backend.holds(1, 0)


async def test_a_session_never_ends_during_an_answer(store: SessionStore, backend: Backend) -> None:
    await talk(store, "mine", said("before", at=backend.now))
    session = await store.open(ME, "mine")
    backend.wait(TTL + 1)
    await store.sweep()
    assert await texts(store, "mine") == ["before"]
    for use in (store.open, store.delete):
        with raises("session_busy"):
            await use(ME, "mine")
    await store.end(session, said("after", at=backend.now))
    assert await texts(store, "mine") == ["before", "after"]
    ends = (await store.read(ME, "mine")).expires_at
    assert ends == pytest.approx(backend.now + TTL, rel=0, abs=backend.slack)


# ---- each store against a model of it

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

    backend: ClassVar[Backend]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        # By whose they are, a caller's, a key's or anyone's, and their id.
        self.sessions: dict[tuple[str, str], Remembered] = {}
        self.answers: list[tuple[Session, Remembered]] = []
        self.store = self.backend.store(MODEL_MAX_CHARS)
        self.backend.lose()

    def teardown(self) -> None:
        self.runner.run(self.store.aclose())
        self.runner.close()

    @property
    def now(self) -> float:
        return self.backend.now + self.backend.waited

    def alive(self, known: Remembered) -> bool:
        return known.stored and (known.busy or known.expires_at > self.now)

    def find(self, owner: str, session_id: str) -> Remembered | None:
        """The caller's own, or one that was issued to anyone."""
        for holder in (owner, ANYONE):
            known = self.sessions.get((holder, session_id))
            if known is not None and self.alive(known):
                return known
        return None

    def refused(self, code: Code, call: Coroutine[Any, Any, object]) -> None:
        with raises(code):
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
        if known is None and ISSUED_ID.fullmatch(session_id):
            self.refused("session_not_found", opening)
        elif known is not None and known.busy:
            self.refused("session_busy", opening)
        else:
            if known is None:
                known = Remembered(self.now + TTL)
                self.sessions[owner, session_id] = known
            session = self.runner.run(opening)
            assert [turn[:3] for turn in session.turns] == [turn[:3] for turn in known.turns]
            known.busy = True
            self.answers.append((session, known))

    def some_answer(self, data: st.DataObject) -> tuple[Session, Remembered]:
        return self.answers.pop(data.draw(st.integers(0, len(self.answers) - 1)))

    @precondition(lambda self: self.answers)
    @rule(message=TEXT, answer=TEXT.filter(bool), complete=st.booleans(), data=st.data())
    def end(self, message: str, answer: str, complete: bool, data: st.DataObject) -> None:
        session, known = self.some_answer(data)
        turn = Turn(message, answer, complete, self.backend.now - 1, self.backend.now)
        self.runner.run(self.store.end(session, turn))
        known.turns.append(turn)
        while len(known.turns) > 1 and sum(map(chars, known.turns)) > MODEL_MAX_CHARS:
            known.turns.pop(0)
        known.expires_at = self.now + TTL
        known.busy, known.stored = False, True

    @precondition(lambda self: self.answers)
    @rule(data=st.data())
    def end_without_text(self, data: st.DataObject) -> None:
        session, known = self.some_answer(data)
        self.runner.run(self.store.end(session, None))
        if not known.stored:
            known.expires_at = self.now + TTL
        known.busy, known.stored = False, True

    @rule(owner=OWNERS, session_id=ids)
    def delete(self, owner: str, session_id: str) -> None:
        known = self.find(owner, session_id)
        deleting = self.store.delete(owner, session_id)
        if known is None:
            self.refused("session_not_found", deleting)
        elif known.busy:
            self.refused("session_busy", deleting)
        else:
            self.runner.run(deleting)
            self.sessions = {key: it for key, it in self.sessions.items() if it is not known}

    @rule(seconds=st.sampled_from([1.0, TTL / 2, TTL, 3 * TTL]))
    def wait(self, seconds: float) -> None:
        self.backend.wait(seconds)

    @rule()
    def sweep(self) -> None:
        self.runner.run(self.store.sweep())
        alive = [known for known in self.sessions.values() if self.alive(known)]
        self.backend.holds(len(alive), sum(len(it.turns) for it in alive))

    @rule()
    def restart(self) -> None:
        """The answers that were being written are lost, and with them their locks."""
        self.runner.run(self.store.aclose())
        self.answers.clear()
        self.backend.free()
        self.sessions = {key: it for key, it in self.sessions.items() if it.stored}
        if isinstance(self.backend, MemoryBackend):
            self.sessions.clear()
        for known in self.sessions.values():
            known.busy = False
        self.store = self.backend.store(MODEL_MAX_CHARS)

    @rule(owner=OWNERS, session_id=ids)
    def read(self, owner: str, session_id: str) -> None:
        known = self.find(owner, session_id)
        if known is None:
            self.refused("session_not_found", self.store.read(owner, session_id))
            return
        self.same(self.runner.run(self.store.read(owner, session_id)), known)

    def same(self, session: Session, known: Remembered) -> None:
        assert [turn[:3] for turn in session.turns] == [turn[:3] for turn in known.turns]
        ends = session.expires_at + self.backend.waited
        assert ends == pytest.approx(known.expires_at, rel=0, abs=self.backend.slack)

    @invariant()
    def each_is_as_its_holder_left_it(self) -> None:
        for (holder, session_id), known in self.sessions.items():
            if self.alive(known):
                owner = ME if holder == ANYONE else holder
                self.same(self.runner.run(self.store.read(owner, session_id)), known)


@pytest.mark.parametrize("examples", [12, pytest.param(150, marks=pytest.mark.slow)])
def test_the_store_does_what_a_dictionary_would(backend: Backend, examples: int) -> None:
    class Here(Model):
        pass

    Here.backend = backend
    run_state_machine_as_test(
        Here,
        settings=hypothesis_settings(max_examples=examples, stateful_step_count=30, deadline=None),
    )
