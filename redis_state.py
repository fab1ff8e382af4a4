"""Sessions and limits in Redis, for any number of processes: STATE_URL=redis://… or rediss://…

What `sessions.py` and `ratelimit.py` ask for, as scripts that Redis runs one after the other: each
is one round trip, and its clock is Redis's own. A session is a hash (whose it is, when it began and
ends), a list of its turns and, while an answer is being written, a lock, which is a lease: a
process that dies stops renewing it. One Redis or Valkey at one address; no Sentinel, no Cluster.
"""

import asyncio
import hashlib
import math
import secrets
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import redis
from pydantic_core import from_json, to_json

from errors import ServiceError
from ratelimit import MICROSECONDS, Caller, Decision, RateLimiter, decide
from sessions import (
    BUSY,
    ISSUED_ID,
    LOST,
    UNAVAILABLE,
    Session,
    SessionStore,
    Turn,
    new_session,
    trim_history,
)
from settings import Rate, SettingsError

# For a trip, with the one before it and a new connection. A request makes two of them before its
# answer begins, one at its end, and the first that fails is its last.
TRIP_SECONDS = 1.0
# For Redis to take a connection, and to answer: it needs less than a millisecond.
ANSWER_SECONDS = 0.5
# A session is free this long after its process died; renewed four times as often.
LEASE_MILLISECONDS = 4000
# The whole numbers of a double, which Lua counts with.
EXACT = 2**53
TAKES = "redis://USER:PASSWORD@HOST:PORT/DB, or rediss:// for TLS"

# `ratelimit.take` on whole numbers that a double holds. A bucket is "shares at"; it expires when it
# is full, a millisecond late, for Redis cuts its clock to milliseconds. KEYS: the bucket. ARGV: a
# token's shares, a full bucket's, the shares that a microsecond brings.
TAKE = """
local token, full, flow = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local shares = full
local before, at = string.match(redis.call('GET', KEYS[1]) or '', '(%d+) (%d+)')
if before then
  shares = math.min(full, before + math.max(0, now - at) * flow)
end
local allowed = shares >= token
if allowed then
  shares = shares - token
end
local milliseconds = math.ceil((full - shares) / (flow * 1000)) + 1
redis.call('SET', KEYS[1], string.format('%.0f %.0f', shares, now), 'PX', milliseconds)
return {allowed and 1 or 0, shares}
"""

# Redis's time, in milliseconds.
NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# KEYS: session, its turns, its lock, here and below. ARGV: who asks; and, to lock it, a token, the
# lease and, where a session may begin, its time to live. It outlives that time while it is locked.
OPEN = f"""{NOW}
local owner, began, ends = unpack(redis.call('HMGET', KEYS[1], 'owner', 'began', 'ends'))
local new = not owner and ARGV[4]
if new then
  owner, began, ends = ARGV[1], now, now + ARGV[4]
end
if owner ~= ARGV[1] and owner ~= 'anyone' then
  return 'unknown'
end
if ARGV[2] then
  if not redis.call('SET', KEYS[3], ARGV[2], 'NX', 'PX', ARGV[3]) then
    return 'busy'
  end
  if new then
    redis.call('HSET', KEYS[1], 'owner', owner, 'began', began, 'ends', ends)
  end
  redis.call('PEXPIREAT', KEYS[1], math.max(ends, now + ARGV[3]))
  redis.call('PEXPIREAT', KEYS[2], math.max(ends, now + ARGV[3]))
end
return {{owner, began, ends, redis.call('LRANGE', KEYS[2], 0, -1)}}
"""

# ARGV: the lock's token, "" for a session that is stored only now; the owner; the time to live;
# and, with a turn, how many are trim_history, how long it took, and its JSON up to its times. The lock goes
# first: whatever fails after it, the session is free.
END = f"""{NOW}
if ARGV[1] ~= '' then
  if redis.call('GET', KEYS[3]) ~= ARGV[1] then
    return 'lost'
  end
  redis.call('DEL', KEYS[3])
end
local asked = now - (ARGV[5] or 0)
if redis.call('HSETNX', KEYS[1], 'owner', ARGV[2]) == 1 then
  redis.call('HSET', KEYS[1], 'began', asked, 'ends', now + ARGV[3])
end
if ARGV[4] then
  local times = string.format(',%.3f,%.3f]', asked / 1000, now / 1000)
  redis.call('RPUSH', KEYS[2], ARGV[6] .. times)
  redis.call('LTRIM', KEYS[2], -ARGV[4], -1)
  redis.call('HSET', KEYS[1], 'ends', now + ARGV[3])
end
local ends = redis.call('HGET', KEYS[1], 'ends')
redis.call('PEXPIREAT', KEYS[1], ends)
redis.call('PEXPIREAT', KEYS[2], ends)
return 'ended'
"""

# ARGV: who asks.
DELETE = """
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner ~= ARGV[1] and owner ~= 'anyone' then
  return 'unknown'
end
if redis.call('EXISTS', KEYS[3]) == 1 then
  return 'busy'
end
return redis.call('DEL', KEYS[1], KEYS[2])
"""

# KEYS: those of every session whose answer runs here. ARGV: the lease, then their locks' tokens.
RENEW = """
local lease = tonumber(ARGV[1])
for number = 2, #ARGV do
  local lock = KEYS[number * 3 - 3]
  if redis.call('GET', lock) == ARGV[number] then
    redis.call('PEXPIRE', lock, lease)
    if redis.call('PTTL', KEYS[number * 3 - 5]) < lease then
      redis.call('PEXPIRE', KEYS[number * 3 - 5], lease)
      redis.call('PEXPIRE', KEYS[number * 3 - 4], lease)
    end
  end
end
"""

# A script, its keys and arguments.
Question = tuple[str, Sequence[str], Sequence[str | bytes | int]]


def open_redis_state(
    url: str, rates: Mapping[str, Rate], *, ttl: float, max_chars: int
) -> tuple[Mapping[str, RateLimiter], SessionStore]:
    """A limiter for each rate, and the sessions, in the Redis at `url`. Raises SettingsError."""
    server = RedisClient(url)
    limiters = {kind: RedisRateLimiter(server, rate) for kind, rate in rates.items()}
    return limiters, RedisStore(server, ttl=ttl, max_chars=max_chars)


class RedisClient:
    """The Redis at `url`. Raises SettingsError if it does not answer now, or may forget what it was
    given.

    One thread speaks to it, on one connection: the event loop never waits, and a loop that is late
    does not make Redis look slow. What is asked while it waits goes together in the next trip.
    """

    def __init__(self, url: str) -> None:
        self._waiting: list[tuple[asyncio.Future[Any], Question]] = []
        self._sending: asyncio.Task[None] | None = None
        try:
            # Without HELLO and CLIENT SETINFO a new connection costs no further trip.
            self._client = redis.Redis.from_url(
                url, socket_timeout=ANSWER_SECONDS, retry=None, protocol=2, driver_info=None
            )
            memory = self._client.info("memory")
        except (redis.ConnectionError, redis.TimeoutError) as error:
            problem = f"Redis does not serve: start it, or set another ({error})"
            raise SettingsError(f"STATE_URL: {problem}") from None
        except (redis.RedisError, ValueError, TypeError) as error:
            # Their texts may quote the user's name or the password.
            problem = f"can't be used ({type(error).__name__}); it takes {TAKES}"
            raise SettingsError(f"STATE_URL: {problem}") from None
        if memory.get("maxmemory") and memory["maxmemory_policy"] != "noeviction":
            problem = f"forgets when it is full ({memory['maxmemory_policy']}): set noeviction"
            raise SettingsError(f"STATE_URL: this Redis {problem}")
        self._thread = ThreadPoolExecutor(1, "redis")

    async def call(self, script: str, keys: Sequence[str], *args: str | bytes | int) -> Any:
        """What the script returns, which is the script's to say, after one round trip. Raises
        StateUnavailable."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.append((waiting, (script, keys, args)))
        if self._sending is None or self._sending.done():
            self._sending = asyncio.create_task(self._send())
        reply = await waiting
        if isinstance(reply, Exception):
            raise ServiceError("state_unavailable", UNAVAILABLE, retry_after=1) from reply
        return reply

    async def aclose(self) -> None:
        if self._sending is not None:
            await self._sending
        self._thread.shutdown()
        self._client.close()

    async def _send(self) -> None:
        """Trip after trip, until nobody asks."""
        while self._waiting:
            asked, self._waiting = self._waiting, []
            questions = [question for _, question in asked]
            trip = asyncio.get_running_loop().run_in_executor(self._thread, self._trip, questions)
            await asyncio.wait([trip], timeout=TRIP_SECONDS)
            replies = trip.result() if trip.done() else TimeoutError()
            if isinstance(replies, Exception):
                # Who has come meanwhile would wait as long for no more.
                asked += self._waiting
                self._waiting = []
                replies = [replies] * len(asked)
            for (waiting, _), reply in zip(asked, replies, strict=True):
                if not waiting.done():
                    waiting.set_result(reply)

    def _trip(self, questions: Sequence[Question]) -> list[Any] | Exception:
        """In the thread: what each script returned, or raised; or why nothing came of it."""
        try:
            with self._client.pipeline(transaction=False) as pipeline:
                # Whole, not by its SHA-1: Redis compiles it once all the same, and one that was
                # started anew need not be told it.
                for script, keys, args in questions:
                    pipeline.eval(script, len(keys), *keys, *args)
                return pipeline.execute(raise_on_error=False)
        except (redis.RedisError, OSError) as error:
            return error


class RedisRateLimiter:
    """A bucket for each caller, of one rate, shared by all who use this Redis. Raises SettingsError
    for a rate that can't be counted there."""

    def __init__(self, client: RedisClient, rate: Rate) -> None:
        self.rate = rate
        self._client = client
        token = rate.seconds * MICROSECONDS
        # Shares that only ever come and go together are counted as one.
        self._together = math.gcd(token, rate.limit)
        token, flow = token // self._together, rate.limit // self._together
        if rate.limit * token > EXACT:
            rough = f"{rate.limit} in {rate.seconds} s"
            raise SettingsError(f"RATE_LIMIT: Redis can't count {rough}; take a rounder number")
        self._sizes = (token, rate.limit * token, flow)

    async def take(self, caller: Caller) -> Decision:
        """One token of the caller's bucket. Raises StateUnavailable."""
        key = f"chat:bucket:{self.rate.limit}/{self.rate.seconds}:{caller.owner}"
        allowed, shares = await self._client.call(TAKE, [key], *self._sizes)
        return decide(bool(allowed), shares * self._together, self.rate)


class RedisStore(SessionStore):
    """Sessions in Redis, which forgets them by itself when their time is over. Ids are stored as
    SHA-256, as in SQLite; times are Redis's."""

    def __init__(self, client: RedisClient, *, ttl: float, max_chars: int) -> None:
        self._client = client
        self._ttl = ttl
        self._max_chars = max_chars
        # The keys of the sessions whose answers run here, by their locks' tokens.
        self._held: dict[str, Sequence[str]] = {}
        self._renewing: asyncio.Task[None] | None = None

    async def open(self, owner: str, session_id: str | None) -> Session:
        if session_id is None:
            return new_session(owner, time.time(), self._ttl)
        token = secrets.token_urlsafe(16)
        new = () if ISSUED_ID.fullmatch(session_id) else (math.ceil(self._ttl * 1000),)
        session = await self._find(owner, session_id, token, LEASE_MILLISECONDS, *new)
        self._held[token] = _keys(owner, session_id)
        if self._renewing is None or self._renewing.done():
            self._renewing = asyncio.create_task(self._keep_renewing())
        return session._replace(generation=token)

    async def end(self, session: Session, turn: Turn | None) -> None:
        token = str(session.generation or "")
        self._held.pop(token, None)
        said: tuple[int, int, bytes] | tuple[()] = ()
        if turn is not None:
            text = to_json(turn[:3])[:-1]
            count = len(trim_history([*session.turns, turn], self._max_chars))
            took = max(0, round((turn.response_at - turn.message_at) * 1000))
            said = (count, took, text)
        keys, ttl = _keys(session.owner, session.id), math.ceil(self._ttl * 1000)
        if await self._client.call(END, keys, token, session.owner, ttl, *said) == b"lost":
            raise ServiceError("state_unavailable", LOST)

    async def read(self, owner: str, session_id: str) -> Session:
        return await self._find(owner, session_id)

    async def delete(self, owner: str, session_id: str) -> None:
        _raise_if_rejected(await self._client.call(DELETE, _keys(owner, session_id), owner))

    async def sweep(self) -> None:
        """Redis does."""

    async def check(self) -> None:
        await self._client.call(RENEW, [], LEASE_MILLISECONDS)

    async def aclose(self) -> None:
        if self._renewing is not None:
            self._renewing.cancel()
        await self._client.aclose()

    async def _find(self, owner: str, session_id: str, *lock: str | int) -> Session:
        found = await self._client.call(OPEN, _keys(owner, session_id), owner, *lock)
        holder, began, ends, turns = _raise_if_rejected(found)
        history = [Turn(*turn) for turn in from_json(b"[%b]" % b",".join(turns))]
        times = int(began) / 1000, int(ends) / 1000
        return Session(
            session_id, holder.decode(), None, *times, trim_history(history, self._max_chars)
        )

    async def _keep_renewing(self) -> None:
        """The leases of all answers that run here, together, for as long as there are any."""
        while self._held:
            await asyncio.sleep(LEASE_MILLISECONDS / 4000)
            keys = [key for keys in self._held.values() for key in keys]
            # One that could not be renewed now may be yet, until it is over.
            with suppress(ServiceError):
                await self._client.call(RENEW, keys, LEASE_MILLISECONDS, *self._held)


def _keys(owner: str, session_id: str) -> Sequence[str]:
    """Of the session, its turns and its lock. An id of one's own choice is its owner's alone."""
    holder = "" if ISSUED_ID.fullmatch(session_id) else owner
    digest = hashlib.sha256(f"{holder} {session_id}".encode()).hexdigest()
    return [f"chat:{part}:{digest}" for part in ("session", "turns", "lock")]


def _raise_if_rejected(reply: Any) -> Any:
    """What a script returned, if it is not one of the two words for no."""
    if reply == b"unknown":
        raise ServiceError("session_not_found", "There is no such session, or it is not yours.")
    if reply == b"busy":
        raise ServiceError("session_busy", BUSY, retry_after=1)
    return reply
