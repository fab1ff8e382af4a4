"""Rate limits and sessions in Redis, shared by any number of processes (STATE_URL=redis://...).

Implements `RateLimiter` and `SessionStore` with Lua scripts. A script is atomic, takes one round
trip, and reads the time from Redis, so the clocks of the processes do not matter.

A session is a hash (owner, start, end), a list of turns and, while a response is running, a lock.
The lock is a lease: its process renews it, and it expires soon after the process died.

Supports one Redis or Valkey server at one address, without Sentinel or Cluster.
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
    FULL,
    ISSUED_ID,
    LOST,
    NOT_FOUND,
    UNAVAILABLE,
    Session,
    SessionStore,
    Turn,
    is_blank,
    new_session,
    trim_history,
)
from settings import Rate, SettingsError

# The deadline of a batch, including the end of the one before it and a new connection. A chat
# request waits for at most three batches, and it ends at the first that fails.
BATCH_TIMEOUT_SECONDS = 1.0
# To connect, and for each reply. Redis needs less than a millisecond.
SOCKET_TIMEOUT_SECONDS = 0.5
# A session is unlocked this long after its process died. Leases are renewed four times as often.
LEASE_MILLISECONDS = 4000
# Lua's numbers are doubles, which represent integers up to this one exactly.
MAX_EXACT_INTEGER = 2**53
URL_FORMAT = "redis://USER:PASSWORD@HOST:PORT/DB, or rediss:// for TLS"

# Take a token, as `ratelimit.take` does. The bucket is stored as "LEVEL UPDATED_AT" and expires
# when it is full. It expires a millisecond late, because Redis truncates its clock to milliseconds.
# When Redis is out of memory, it rejects commands that need memory, unless the script has already
# written. So the script deletes first: the limiter has to admit the DELETE that makes room.
# KEYS: the bucket.
# ARGV: the units of a token, of a full bucket, and those added per microsecond.
TAKE = """
local token, full, refill = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local level = full
local stored, updated_at = string.match(redis.call('GET', KEYS[1]) or '', '(%d+) (%d+)')
if stored then
  level = math.min(full, stored + math.max(0, now - updated_at) * refill)
end
local allowed = level >= token
if allowed then
  level = level - token
end
local milliseconds = math.ceil((full - level) / (refill * 1000)) + 1
redis.call('DEL', KEYS[1])
redis.call('SET', KEYS[1], string.format('%.0f %.0f', level, now), 'PX', milliseconds)
return {allowed and 1 or 0, level}
"""

# Redis's clock in milliseconds.
NOW = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# Read a session and, with a token, lock it. A locked session does not expire before its lock.
# KEYS: session, turns, lock; the same in the scripts below.
# ARGV: the caller; to lock: the lock's token and lease; to create it if missing: its time to live.
OPEN = f"""{NOW}
local owner, began, ends = unpack(redis.call('HMGET', KEYS[1], 'owner', 'began', 'ends'))
local new = not owner and ARGV[4]
if new then
  owner, began, ends = ARGV[1], now, now + ARGV[4]
end
if owner ~= ARGV[1] and owner ~= 'anyone' then
  return 'not found'
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

# Store a turn and unlock the session. The script deletes the lock first, so it is not rejected when
# Redis is out of memory: the response has been paid for.
# ARGV: the lock's token ("" for a session that is not stored yet), the owner, the time to live;
# with a turn: its duration and its JSON without the times; if the stored turns are not the turns to
# retain: 'rewrite' and the JSON of each turn to retain.
END = f"""{NOW}
if ARGV[1] ~= '' and redis.call('GET', KEYS[3]) ~= ARGV[1] then
  return 'lost'
end
redis.call('DEL', KEYS[3])
local message_at = now - (ARGV[4] or 0)
if redis.call('HSETNX', KEYS[1], 'owner', ARGV[2]) == 1 then
  redis.call('HSET', KEYS[1], 'began', message_at, 'ends', now + ARGV[3])
end
if ARGV[5] then
  if ARGV[6] then
    redis.call('DEL', KEYS[2])
  end
  for number = 7, #ARGV do
    redis.call('RPUSH', KEYS[2], ARGV[number])
  end
  local times = string.format(',%.3f,%.3f]', message_at / 1000, now / 1000)
  redis.call('RPUSH', KEYS[2], ARGV[5] .. times)
  redis.call('HSET', KEYS[1], 'ends', now + ARGV[3])
end
local ends = redis.call('HGET', KEYS[1], 'ends')
redis.call('PEXPIREAT', KEYS[1], ends)
redis.call('PEXPIREAT', KEYS[2], ends)
return 'ended'
"""

# Delete a session.
# ARGV: the caller.
DELETE = """
local owner = redis.call('HGET', KEYS[1], 'owner')
if owner ~= ARGV[1] and owner ~= 'anyone' then
  return 'not found'
end
if redis.call('EXISTS', KEYS[3]) == 1 then
  return 'busy'
end
return redis.call('DEL', KEYS[1], KEYS[2])
"""

# Fail if Redis rejects writes, for example because it is out of memory. The command itself changes
# nothing.
# KEYS: a key that does not exist.
CHECK = """
return redis.call('LPUSHX', KEYS[1], '')
"""

# Renew the leases of this process.
# KEYS: session, turns and lock of each open session.
# ARGV: the lease, then the lock's token of each.
RENEW = """
local lease = tonumber(ARGV[1])
for number = 2, #ARGV do
  local session, turns, lock = unpack(KEYS, number * 3 - 5, number * 3 - 3)
  if redis.call('GET', lock) == ARGV[number] then
    redis.call('PEXPIRE', lock, lease)
    if redis.call('PTTL', session) < lease then
      redis.call('PEXPIRE', session, lease)
      redis.call('PEXPIRE', turns, lease)
    end
  end
end
"""

# A script with its keys and arguments.
ScriptCall = tuple[str, Sequence[str], Sequence[str | bytes | int]]


def open_redis_state(
    url: str, rates: Mapping[str, Rate], *, ttl: float, max_chars: int
) -> tuple[Mapping[str, RateLimiter], SessionStore]:
    """Return a rate limiter for each rate, and the session store, in the Redis at `url`.

    Raises SettingsError if Redis cannot be used.
    """
    client = RedisClient(url)
    limiters = {kind: RedisRateLimiter(client, rate) for kind, rate in rates.items()}
    return limiters, RedisStore(client, ttl=ttl, max_chars=max_chars)


class RedisClient:
    """A connection to the Redis at `url` that pipelines concurrent calls.

    One thread uses the connection, so the event loop never waits for Redis, and a busy event loop
    does not make Redis look slow. Calls made while a batch is in flight form the next batch.

    Raises SettingsError if Redis does not respond, or evicts keys when it is full.
    """

    def __init__(self, url: str) -> None:
        self._queue: list[tuple[asyncio.Future[Any], ScriptCall]] = []
        self._sender: asyncio.Task[None] | None = None
        try:
            # RESP 2 without client information needs no extra round trip per connection.
            self._client = redis.Redis.from_url(
                url, socket_timeout=SOCKET_TIMEOUT_SECONDS, retry=None, protocol=2, driver_info=None
            )
            memory = self._client.info("memory")
        except (redis.ConnectionError, redis.TimeoutError) as error:
            problem = f"Redis does not respond: {error}. Start it, or set another address"
            raise SettingsError(f"STATE_URL: {problem}") from None
        except (redis.RedisError, ValueError, TypeError) as error:
            # The error's text is not shown, because it may contain the user or the password.
            problem = f"Redis cannot be used ({type(error).__name__}). The format is {URL_FORMAT}"
            raise SettingsError(f"STATE_URL: {problem}") from None
        if memory.get("maxmemory") and memory["maxmemory_policy"] != "noeviction":
            problem = f"this Redis evicts keys when it is full ({memory['maxmemory_policy']})"
            raise SettingsError(f"STATE_URL: {problem}. Set its maxmemory-policy to noeviction")
        self._thread = ThreadPoolExecutor(1, "redis")

    async def call(self, script: str, keys: Sequence[str], *args: str | bytes | int) -> Any:
        """Run a script and return its result. Raises state_unavailable."""
        future = asyncio.get_running_loop().create_future()
        self._queue.append((future, (script, keys, args)))
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())
        reply = await future
        if isinstance(reply, redis.OutOfMemoryError):
            raise ServiceError("state_unavailable", FULL, retry_after=5) from reply
        if isinstance(reply, Exception):
            raise ServiceError("state_unavailable", UNAVAILABLE, retry_after=1) from reply
        return reply

    async def aclose(self) -> None:
        if self._sender is not None:
            await self._sender
        self._thread.shutdown()
        self._client.close()

    async def _send(self) -> None:
        """Send the queued calls, batch after batch, until the queue is empty."""
        while self._queue:
            batch, self._queue = self._queue, []
            calls = [call for _, call in batch]
            sent = asyncio.get_running_loop().run_in_executor(self._thread, self._execute, calls)
            await asyncio.wait([sent], timeout=BATCH_TIMEOUT_SECONDS)
            replies = sent.result() if sent.done() else TimeoutError()
            if isinstance(replies, Exception):
                # Calls that arrived meanwhile would wait for the same failure.
                batch += self._queue
                self._queue = []
                replies = [replies] * len(batch)
            for (future, _), reply in zip(batch, replies, strict=True):
                if not future.done():
                    future.set_result(reply)

    def _execute(self, calls: Sequence[ScriptCall]) -> list[Any] | Exception:
        """Run the scripts and return the result or the error of each, or the connection's error."""
        try:
            with self._client.pipeline(transaction=False) as pipeline:
                # EVAL, not EVALSHA: Redis caches compiled scripts by their text anyway, and a
                # restarted Redis needs no reloading.
                for script, keys, args in calls:
                    pipeline.eval(script, len(keys), *keys, *args)
                return pipeline.execute(raise_on_error=False)
        except (redis.RedisError, OSError) as error:
            return error


class RedisRateLimiter:
    """A token bucket per caller, shared by all processes that use this Redis.

    Raises SettingsError if Lua's numbers cannot represent the buckets of `rate` exactly.
    """

    def __init__(self, client: RedisClient, rate: Rate) -> None:
        self.rate = rate
        self._client = client
        token = rate.seconds * MICROSECONDS
        # Levels are multiples of this divisor. Dividing by it keeps the numbers in Redis small.
        self._divisor = math.gcd(token, rate.limit)
        token, refill = token // self._divisor, rate.limit // self._divisor
        if rate.limit * token > MAX_EXACT_INTEGER:
            problem = f"Redis cannot count {rate.limit} requests per {rate.seconds} s exactly"
            raise SettingsError(f"RATE_LIMIT: {problem}. Set a rounder number")
        self._sizes = (token, rate.limit * token, refill)

    async def take(self, caller: Caller) -> Decision:
        """Take one token from the caller's bucket. Raises state_unavailable."""
        key = f"chat:bucket:{self.rate.limit}/{self.rate.seconds}:{caller.owner}"
        allowed, level = await self._client.call(TAKE, [key], *self._sizes)
        return decide(bool(allowed), level * self._divisor, self.rate)


class RedisStore(SessionStore):
    """Sessions in Redis, which deletes expired ones. Ids are stored as SHA-256 hashes.

    The generation of an open session is the random token of its lock.
    """

    def __init__(self, client: RedisClient, *, ttl: float, max_chars: int) -> None:
        self._client = client
        self._ttl = ttl
        self._max_chars = max_chars
        # The sessions that this process has open, by lock token: their keys and how many turns are
        # stored.
        self._locked: dict[str, tuple[Sequence[str], int]] = {}
        self._renewal: asyncio.Task[None] | None = None

    async def open(self, owner: str, session_id: str | None) -> Session:
        if session_id is None:
            # A provider is called only if its response can be stored.
            await self.check()
            return new_session(owner, time.time(), self._ttl)
        token = secrets.token_urlsafe(16)
        ttl = () if ISSUED_ID.fullmatch(session_id) else (math.ceil(self._ttl * 1000),)
        session, count = await self._load(owner, session_id, token, LEASE_MILLISECONDS, *ttl)
        self._locked[token] = _keys(owner, session_id), count
        if self._renewal is None or self._renewal.done():
            self._renewal = asyncio.create_task(self._renew_leases())
        return session._replace(generation=token)

    async def end(self, session: Session, turn: Turn | None) -> None:
        token = str(session.generation or "")
        keys, count = self._locked.pop(token, (_keys(session.owner, session.id), 0))
        args: list[str | bytes | int] = [token, session.owner, math.ceil(self._ttl * 1000)]
        if turn is not None and not is_blank(turn):
            duration = max(0, round((turn.response_at - turn.message_at) * 1000))
            args += [duration, to_json(turn[:3])[:-1]]
            *retained, _ = trim_history([*session.turns, turn], self._max_chars)
            if len(retained) != count:
                args += ["rewrite", *(to_json(tuple(turn)) for turn in retained)]
        if await self._client.call(END, keys, *args) == b"lost":
            raise ServiceError("state_unavailable", LOST)

    async def read(self, owner: str, session_id: str) -> Session:
        session, _ = await self._load(owner, session_id)
        return session

    async def delete(self, owner: str, session_id: str) -> None:
        _raise_if_rejected(await self._client.call(DELETE, _keys(owner, session_id), owner))

    async def sweep(self) -> None:
        """Do nothing: Redis deletes expired sessions."""

    async def check(self) -> None:
        await self._client.call(CHECK, ["chat:check"])

    async def aclose(self) -> None:
        if self._renewal is not None:
            self._renewal.cancel()
        await self._client.aclose()

    async def _load(self, owner: str, session_id: str, *lock: str | int) -> tuple[Session, int]:
        """Return the session and how many turns are stored, which may be more than it retains."""
        reply = await self._client.call(OPEN, _keys(owner, session_id), owner, *lock)
        stored_owner, began, ends, turns = _raise_if_rejected(reply)
        history = (Turn(*turn) for turn in from_json(b"[%b]" % b",".join(turns)))
        retained = trim_history(history, self._max_chars)
        times = int(began) / 1000, int(ends) / 1000
        return Session(session_id, stored_owner.decode(), None, *times, retained), len(turns)

    async def _renew_leases(self) -> None:
        """Renew the leases of all open sessions, until there are none."""
        while self._locked:
            await asyncio.sleep(LEASE_MILLISECONDS / 4000)
            keys = [key for keys, _ in self._locked.values() for key in keys]
            # A failed renewal is tried again before the lease expires.
            with suppress(ServiceError):
                await self._client.call(RENEW, keys, LEASE_MILLISECONDS, *self._locked)


def _keys(owner: str, session_id: str) -> Sequence[str]:
    """Return the keys of the session, its turns and its lock. Chosen ids are private per owner."""
    owner = "" if ISSUED_ID.fullmatch(session_id) else owner
    digest = hashlib.sha256(f"{owner} {session_id}".encode()).hexdigest()
    return [f"chat:{part}:{digest}" for part in ("session", "turns", "lock")]


def _raise_if_rejected(reply: Any) -> Any:
    """Return the result of a script, or raise the error that it stands for."""
    if reply == b"not found":
        raise ServiceError("session_not_found", NOT_FOUND)
    if reply == b"busy":
        raise ServiceError("session_busy", BUSY, retry_after=1)
    return reply
