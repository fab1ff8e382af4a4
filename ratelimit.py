"""Who is asking, how often they may, and how many answers they may have open.

The bucket's arithmetic is in whole numbers and knows no clock. `MemoryRateLimiter` keeps a bucket for each
caller in this process; `StreamLimiter` counts open answers. Neither waits: there is room, or an error.
"""

import hashlib
import heapq
import hmac
import ipaddress
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, Protocol

from errors import ServiceError
from settings import ApiKey, Rate

# In a second: buckets are counted by a clock of microseconds, as Redis has one.
MICROSECONDS = 1_000_000
# 350 bytes a bucket: 50,000 addresses are under 20 MB, in a container that is given 128.
MAX_BUCKETS = 50_000


class Caller(NamedTuple):
    """A key's name, or an address. `owner` tells the two apart, whatever a key is called."""

    kind: Literal["key", "anonymous"]
    name: str

    @property
    def owner(self) -> str:
        return f"{self.kind}:{self.name}"


def authenticate(token_text: str, keys: Sequence[ApiKey]) -> Caller | None:
    """The caller whose key this is. All keys are compared, each in constant time, so that neither
    the time nor the place of a match tells anything about a key."""
    digest = hashlib.sha256(token_text.encode()).digest()
    names = [key.name for key in keys if hmac.compare_digest(key.digest, digest)]
    return Caller("key", names[-1]) if names else None


def anonymous_caller(host: str | None) -> Caller:
    """The anonymous caller at `host`: IPv4 whole, IPv6 by its /64, which one customer is given;
    what is no address at all (a Unix socket, a proxy's `unknown`) level one name."""
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:
        return Caller("anonymous", "unknown")
    address = getattr(address, "ipv4_mapped", None) or address
    if address.version == 6:
        return Caller("anonymous", str(ipaddress.IPv6Network((int(address), 64), strict=False)))
    return Caller("anonymous", str(address))


class Bucket(NamedTuple):
    """A token bucket, counted in level: a token is `seconds * MICROSECONDS` level and every
    microsecond brings `limit` of them, so a full bucket refills in `seconds`. All whole numbers:
    nothing is rounded, here or where a double holds them (to 2**53)."""

    level: int
    updated_at: int


class Decision(NamedTuple):
    """What the bucket said. `wait` is the time until one more token is in it, in whole seconds,
    rounded up: `t` of the RateLimit header, and Retry-After where nothing was left."""

    allowed: bool
    remaining: int
    retry_after: int


def take(bucket: Bucket | None, rate: Rate, now: int) -> tuple[Bucket, Decision]:
    """Take one token at `now`, in microseconds of a clock that never goes back. A caller without a
    bucket has a full one."""
    token = rate.seconds * MICROSECONDS
    full = rate.limit * token
    bucket = bucket or Bucket(full, now)
    level = min(full, bucket.level + max(0, now - bucket.updated_at) * rate.limit)
    allowed = level >= token
    if allowed:
        level -= token
    return Bucket(level, now), decide(allowed, level, rate)


def decide(allowed: bool, level: int, rate: Rate) -> Decision:
    """The decision of a bucket that holds so many level afterwards."""
    token = rate.seconds * MICROSECONDS
    missing = token - level % token
    return Decision(allowed, level // token, -(-missing // (rate.limit * MICROSECONDS)))


def full_at(bucket: Bucket, rate: Rate) -> int:
    """When the bucket is full again, and so says no more than no bucket at all."""
    missing = rate.limit * rate.seconds * MICROSECONDS - bucket.level
    return bucket.updated_at + -(-missing // rate.limit)


class RateLimiter(Protocol):
    """A bucket for each caller, of one rate."""

    rate: Rate

    async def take(self, caller: Caller) -> Decision:
        """One token of the caller's bucket. Raises StateUnavailable."""


class MemoryRateLimiter:
    """Buckets in this process, by a clock of nanoseconds. Full ones are forgotten; when
    `max_buckets` are in use the fullest goes first, so memory is bounded however many addresses
    come."""

    def __init__(
        self, rate: Rate, clock: Callable[[], int], max_buckets: int = MAX_BUCKETS
    ) -> None:
        self.rate = rate
        self._clock = clock
        self._max_buckets = max_buckets
        self.buckets: dict[str, Bucket] = {}
        # One entry a bucket, (a time at which it was not yet full, its caller). Taking a token puts
        # that time off; the entry learns of it when it comes to the top.
        self._due: list[tuple[int, str]] = []

    async def take(self, caller: Caller) -> Decision:
        now = self._clock() // 1000
        bucket, decision = take(self.buckets.get(caller.owner), self.rate, now)
        if caller.owner not in self.buckets:
            self._make_room(now)
            heapq.heappush(self._due, (full_at(bucket, self.rate), caller.owner))
        self.buckets[caller.owner] = bucket
        return decision

    def _make_room(self, now: int) -> None:
        while self._due and (self._due[0][0] <= now or len(self.buckets) >= self._max_buckets):
            due, owner = self._due[0]
            later = full_at(self.buckets[owner], self.rate)
            if later > due:
                heapq.heapreplace(self._due, (later, owner))
            else:
                heapq.heappop(self._due)
                del self.buckets[owner]


class StreamLimiter:
    """How many answers are open in this process, in all and for each caller."""

    def __init__(self, limit: int, limit_per_caller: int) -> None:
        self._limit = limit
        self._limit_per_caller = limit_per_caller
        # For each caller that has any, by its `owner`.
        self.active: Counter[str] = Counter()

    @contextmanager
    def acquire(self, caller: Caller) -> Iterator[None]:
        """Room for one answer while the block runs. Raises Overloaded or TooManyStreams."""
        if self.active.total() >= self._limit:
            raise ServiceError(
                "overloaded", "As many answers are open as fit. Try again.", retry_after=1
            )
        # A key stands for an application and its users, an address for one of them.
        allowed = self._limit_per_caller * (10 if caller.kind == "key" else 1)
        if self.active[caller.owner] >= allowed:
            problem = f"You have {allowed} answers open, as many as you may. End one first."
            raise ServiceError("too_many_streams", problem, retry_after=1)
        self.active[caller.owner] += 1
        try:
            yield
        finally:
            self.active[caller.owner] -= 1
            if not self.active[caller.owner]:
                del self.active[caller.owner]
