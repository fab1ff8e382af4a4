"""Caller identity, rate limits and concurrency limits.

The token bucket is integer arithmetic without a clock, so the Redis script can compute exactly the
same result. Limiters never wait: a request is admitted or rejected at once.
"""

import hashlib
import heapq
import hmac
import ipaddress
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Literal, NamedTuple, Protocol

from errors import ServiceError
from settings import ApiKey, Rate

# Microseconds in a second. Redis's TIME command has the same resolution.
MICROSECONDS = 1_000_000
# A bucket takes 350 bytes, so 50,000 take less than 20 MB of a 128 MiB container.
MAX_BUCKETS = 50_000


class Caller(NamedTuple):
    """The client a request belongs to: the name of an API key, or an IP address.

    `owner` identifies the caller in limiters and stores. It includes the kind, so a key that is
    named like an address is a different caller.
    """

    kind: Literal["key", "anonymous"]
    name: str

    @property
    def owner(self) -> str:
        return f"{self.kind}:{self.name}"


def authenticate(token: str, keys: Sequence[ApiKey]) -> Caller | None:
    """Return the caller whose API key is `token`, or None if no key matches.

    Compares every key in constant time, so response times reveal nothing about the keys.
    """
    digest = hashlib.sha256(token.encode()).digest()
    names = [key.name for key in keys if hmac.compare_digest(key.digest, digest)]
    return Caller("key", names[-1]) if names else None


# Clients choose their addresses, so the cache needs a limit.
@lru_cache(maxsize=1024)
def anonymous_caller(host: str | None) -> Caller:
    """Return the anonymous caller at the IP address `host`.

    IPv6 clients are identified by their /64, the smallest network that providers assign to a
    customer. All hosts that are not an IP address (a Unix socket, "unknown" from a proxy) are one
    caller named "unknown".
    """
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return Caller("anonymous", "unknown")
    address = getattr(address, "ipv4_mapped", None) or address
    if address.version == 6:
        return Caller("anonymous", str(ipaddress.IPv6Network((int(address), 64), strict=False)))
    return Caller("anonymous", str(address))


def failed_key_caller(host: str | None) -> Caller:
    """Return the caller whose bucket pays for requests from `host` with an unknown API key.

    It is not the anonymous caller at `host`, so wrong keys never use up that caller's tokens.
    """
    return Caller("anonymous", f"failed-key:{anonymous_caller(host).name}")


class Bucket(NamedTuple):
    """The state of one token bucket.

    The level is counted in units to keep the arithmetic exact: one token is `rate.seconds * 10**6`
    units, and every microsecond adds `rate.limit` units. Levels stay below 2**53, so Redis's Lua
    numbers (doubles) represent them exactly.
    """

    level: int
    updated_at: int  # microseconds, monotonic clock


class Decision(NamedTuple):
    """The result of taking a token.

    `retry_after` is the time until the next token in whole seconds, rounded up. It is `t` in the
    RateLimit header, and Retry-After when the request is rejected.
    """

    allowed: bool
    remaining: int
    retry_after: int


def take(bucket: Bucket | None, rate: Rate, now: int) -> tuple[Bucket, Decision]:
    """Take one token at the time `now` and return the new bucket and the decision.

    None is a full bucket. `now` is in microseconds; time that goes backwards adds no tokens.
    """
    token = rate.seconds * MICROSECONDS
    full = rate.limit * token
    bucket = bucket or Bucket(full, now)
    level = min(full, bucket.level + max(0, now - bucket.updated_at) * rate.limit)
    allowed = level >= token
    if allowed:
        level -= token
    return Bucket(level, now), decide(allowed, level, rate)


def decide(allowed: bool, level: int, rate: Rate) -> Decision:
    """Return the decision for a bucket with `level` units left."""
    token = rate.seconds * MICROSECONDS
    missing = token - level % token
    return Decision(allowed, level // token, -(-missing // (rate.limit * MICROSECONDS)))


def full_at(bucket: Bucket, rate: Rate) -> int:
    """Return the time, in microseconds, at which the bucket is full again."""
    missing = rate.limit * rate.seconds * MICROSECONDS - bucket.level
    return bucket.updated_at + -(-missing // rate.limit)


class RateLimiter(Protocol):
    """A token bucket per caller, all with the same rate."""

    rate: Rate

    async def take(self, caller: Caller) -> Decision:
        """Take one token from the caller's bucket.

        Raise state_unavailable if the buckets cannot be reached.
        """


class MemoryRateLimiter:
    """Token buckets in this process.

    A full bucket is the same as no bucket and is dropped. At `max_buckets`, the bucket that is
    closest to full is dropped first, which bounds memory for any number of addresses. `clock`
    returns nanoseconds.
    """

    def __init__(
        self, rate: Rate, clock: Callable[[], int], max_buckets: int = MAX_BUCKETS
    ) -> None:
        self.rate = rate
        self._clock = clock
        self._max_buckets = max_buckets
        self.buckets: dict[str, Bucket] = {}
        # A heap with one entry per bucket: a time at which it is full at the earliest, and its
        # owner. Taking a token delays that time. `_evict` updates an entry when it reaches the top.
        self._expirations: list[tuple[int, str]] = []

    async def take(self, caller: Caller) -> Decision:
        now = self._clock() // 1000
        owner = caller.owner
        bucket, decision = take(self.buckets.get(owner), self.rate, now)
        if owner not in self.buckets:
            self._evict(now)
            heapq.heappush(self._expirations, (full_at(bucket, self.rate), owner))
        self.buckets[owner] = bucket
        return decision

    def _evict(self, now: int) -> None:
        """Drop all full buckets. At `max_buckets`, also drop the one that is closest to full."""
        while self._expirations:
            expires_at, owner = self._expirations[0]
            if expires_at > now and len(self.buckets) < self._max_buckets:
                return
            updated = full_at(self.buckets[owner], self.rate)
            if updated > expires_at:
                heapq.heapreplace(self._expirations, (updated, owner))
            else:
                heapq.heappop(self._expirations)
                del self.buckets[owner]


class StreamLimiter:
    """Limits on the concurrent streams of this process, in total and per caller.

    `active` is the number of streams in flight.
    """

    def __init__(self, limit: int, limit_per_caller: int) -> None:
        self.active = 0
        self._limit = limit
        self._limit_per_caller = limit_per_caller
        self._active_by_owner: Counter[str] = Counter()

    @contextmanager
    def acquire(self, caller: Caller) -> Iterator[None]:
        """Hold one stream slot. Raise overloaded or too_many_streams if none is free."""
        if self.active >= self._limit:
            problem = f"The service is at its limit of {self._limit:,} concurrent streams."
            raise ServiceError("overloaded", f"{problem} Retry in 1 s.", retry_after=1)
        # An API key belongs to an application with many users, an address to one of them.
        limit = self._limit_per_caller * (10 if caller.kind == "key" else 1)
        owner = caller.owner
        if self._active_by_owner[owner] >= limit:
            problem = f"You have {limit:,} streams open, which is the limit. Close one first."
            raise ServiceError("too_many_streams", problem, retry_after=1)
        self.active += 1
        self._active_by_owner[owner] += 1
        try:
            yield
        finally:
            self.active -= 1
            self._active_by_owner[owner] -= 1
            if not self._active_by_owner[owner]:
                del self._active_by_owner[owner]
