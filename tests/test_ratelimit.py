"""Rate limits, concurrency limits and caller identity: arithmetic, memory, and HTTP behaviour."""

import asyncio
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ratelimit import (
    MICROSECONDS,
    Bucket,
    Caller,
    Decision,
    MemoryRateLimiter,
    StreamLimiter,
    anonymous_caller,
    authenticate,
    failed_key_caller,
    full_at,
    take,
)
from settings import Rate, from_env
from tests.client import JSON, Client, Response
from tests.conftest import RunningService, StartService, raises

TEN_A_MINUTE = Rate(10, 60)
DAY = 86400 * MICROSECONDS
# On a busy machine an example may take longer than Hypothesis allows by default.
patient = settings(deadline=None)
KEY, NEW_KEY = "key-of-0123456789abcdefghij", "new-of-0123456789abcdefghij"
WRONG_KEY = "wrong-key-0123456789"


@dataclass
class Clock:
    """A clock that only a test advances. `now` is in microseconds, calls return nanoseconds."""

    now: int = 0

    def __call__(self) -> int:
        return self.now * 1000


def tokens_in(bucket: Bucket, rate: Rate, now: int) -> int:
    """Return the number of tokens in the bucket at the time `now`."""
    _, decision = take(bucket, rate, now)
    return decision.remaining + decision.allowed


# Token bucket

# A few steps use up a small limit. Large limits test the arithmetic.
rates = st.builds(
    Rate,
    st.one_of(st.integers(1, 20), st.integers(1, 10**9 - 1)),
    st.sampled_from([1, 60, 3600, 86400]),
)
gaps = st.lists(
    st.one_of(st.just(0), st.integers(0, 10 * MICROSECONDS), st.integers(0, 2 * DAY)), max_size=60
)


@st.composite
def buckets(draw: st.DrawFn) -> tuple[Rate, Bucket]:
    """Draw a rate and a bucket with any level, usually an almost empty one."""
    rate = draw(rates)
    full = rate.limit * rate.seconds * MICROSECONDS
    level = draw(st.one_of(st.integers(0, full), st.integers(0, full // rate.limit)))
    return rate, Bucket(level, draw(st.integers(0, DAY)))


@patient
@given(rates, gaps)
def test_no_interval_admits_more_than_limit_plus_refill(rate: Rate, gaps: list[int]) -> None:
    bucket: Bucket | None = None
    now, admitted = 0, []
    for gap in gaps:
        now += gap
        bucket, decision = take(bucket, rate, now)
        if decision.allowed:
            admitted.append(now)
    for first, start in enumerate(admitted):
        for last, end in enumerate(admitted[first:], first):
            refill = (end - start) * rate.limit // (rate.seconds * MICROSECONDS)
            assert last - first + 1 <= rate.limit + refill


@patient
@given(rates, gaps)
def test_decisions_equal_exact_fraction_arithmetic(rate: Rate, gaps: list[int]) -> None:
    bucket: Bucket | None = None
    now, tokens = 0, Fraction(rate.limit)
    for gap in gaps:
        now += gap
        refill = Fraction(gap * rate.limit, rate.seconds * MICROSECONDS)
        tokens = min(Fraction(rate.limit), tokens + refill)
        bucket, decision = take(bucket, rate, now)
        assert decision.allowed == (tokens >= 1)
        tokens -= decision.allowed
        assert decision.remaining == math.floor(tokens)


@patient
@given(buckets())
def test_next_token_arrives_after_exactly_retry_after_seconds(state: tuple[Rate, Bucket]) -> None:
    rate, bucket = state
    bucket, decision = take(bucket, rate, bucket.updated_at)
    ready_at = bucket.updated_at + decision.retry_after * MICROSECONDS
    assert decision.retry_after >= 1
    assert tokens_in(bucket, rate, ready_at) > decision.remaining
    assert tokens_in(bucket, rate, ready_at - MICROSECONDS) == decision.remaining


@patient
@given(buckets())
def test_rejected_request_takes_no_token(state: tuple[Rate, Bucket]) -> None:
    rate, bucket = state
    after, decision = take(bucket, rate, bucket.updated_at)
    assume(not decision.allowed)
    assert after == bucket
    assert decision.remaining == 0


@patient
@given(buckets())
def test_full_at_is_the_first_microsecond_of_a_full_bucket(state: tuple[Rate, Bucket]) -> None:
    rate, bucket = state
    full = full_at(bucket, rate)
    assert tokens_in(bucket, rate, full) == rate.limit
    if full > bucket.updated_at:
        assert tokens_in(bucket, rate, full - 1) < rate.limit


@patient
@given(buckets(), st.integers(1, DAY))
def test_clock_going_backwards_adds_no_tokens(state: tuple[Rate, Bucket], back: int) -> None:
    rate, bucket = state
    now = bucket.updated_at - back
    assert tokens_in(bucket, rate, now) == tokens_in(bucket, rate, bucket.updated_at)
    bucket, decision = take(bucket, rate, now)
    assert tokens_in(bucket, rate, now + decision.retry_after * MICROSECONDS) > decision.remaining


def test_eleventh_request_in_a_second_must_wait_six_seconds() -> None:
    bucket: Bucket | None = None
    decisions = []
    for number in range(11):
        bucket, decision = take(bucket, TEN_A_MINUTE, number * 90_000)
        decisions.append(decision)
    assert decisions[0] == Decision(allowed=True, remaining=9, retry_after=6)
    assert decisions[9] == Decision(allowed=True, remaining=0, retry_after=6)
    assert decisions[10] == Decision(allowed=False, remaining=0, retry_after=6)


# MemoryRateLimiter


def anonymous(number: int) -> Caller:
    return Caller("anonymous", f"caller {number}")


async def test_ten_thousand_callers_have_ten_tokens_each() -> None:
    limiter = MemoryRateLimiter(TEN_A_MINUTE, Clock())
    callers = [anonymous(number) for number in range(10_000)]
    for expected in [True] * 10 + [False]:
        assert {(await limiter.take(caller)).allowed for caller in callers} == {expected}
    assert len(limiter.buckets) == 10_000


async def test_full_buckets_are_dropped_when_a_new_caller_arrives() -> None:
    clock = Clock()
    limiter = MemoryRateLimiter(TEN_A_MINUTE, clock)
    await limiter.take(anonymous(1))
    await limiter.take(anonymous(2))
    await limiter.take(anonymous(2))
    clock.now = 6 * MICROSECONDS
    await limiter.take(anonymous(3))
    assert limiter.buckets.keys() == {anonymous(2).owner, anonymous(3).owner}
    clock.now = 12 * MICROSECONDS
    await limiter.take(anonymous(4))
    assert limiter.buckets.keys() == {anonymous(4).owner}


async def test_bucket_that_was_used_again_is_not_dropped_early() -> None:
    clock = Clock()
    limiter = MemoryRateLimiter(TEN_A_MINUTE, clock)
    await limiter.take(anonymous(1))
    clock.now = 5 * MICROSECONDS
    assert (await limiter.take(anonymous(1))).remaining == 8
    clock.now = 6 * MICROSECONDS
    await limiter.take(anonymous(2))
    # Nine tokens were left. A new bucket would have nine after this request.
    assert (await limiter.take(anonymous(1))).remaining == 8


async def test_at_max_buckets_the_fullest_bucket_is_dropped() -> None:
    limiter = MemoryRateLimiter(TEN_A_MINUTE, Clock(), max_buckets=2)
    for number in (1, 2, 1, 1):
        await limiter.take(anonymous(number))
    await limiter.take(anonymous(3))
    assert limiter.buckets.keys() == {anonymous(1).owner, anonymous(3).owner}
    assert (await limiter.take(anonymous(1))).remaining == 6


async def test_empty_bucket_survives_requests_from_many_other_addresses() -> None:
    limiter = MemoryRateLimiter(TEN_A_MINUTE, Clock(), max_buckets=100)
    for _ in range(10):
        await limiter.take(anonymous(0))
    for number in range(1, 1000):
        await limiter.take(anonymous(number))
    assert not (await limiter.take(anonymous(0))).allowed


@pytest.mark.parametrize(
    ("addresses", "gap", "maximum"),
    [
        (200_000, 1, 1000),
        (5_000, 0, 1000),
        # One new address every 10 ms. A bucket is full again, and dropped, after 6 s.
        (5_000, 10_000, 600),
    ],
)
async def test_number_of_buckets_never_exceeds_its_maximum(
    addresses: int, gap: int, maximum: int
) -> None:
    clock = Clock()
    limiter = MemoryRateLimiter(TEN_A_MINUTE, clock, max_buckets=1000)
    sizes = set()
    for number in range(addresses):
        clock.now += gap
        await limiter.take(anonymous(number))
        sizes.add(len(limiter.buckets))
    assert max(sizes) == maximum


@patient
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20 * MICROSECONDS)), max_size=80))
def test_dropping_full_buckets_changes_no_decision(requests: list[tuple[int, int]]) -> None:
    clock = Clock()
    rate = Rate(3, 60)
    limiter = MemoryRateLimiter(rate, clock)
    never_dropped: dict[int, Bucket] = {}

    async def send_requests() -> None:
        for number, gap in requests:
            clock.now += gap
            bucket, expected = take(never_dropped.get(number), rate, clock.now)
            never_dropped[number] = bucket
            assert await limiter.take(anonymous(number)) == expected

    asyncio.run(send_requests())


# Caller identity


@pytest.mark.parametrize(
    ("host", "name"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("::ffff:c000:201", "192.0.2.1"),
        ("fe80::1%eth0", "fe80::/64"),
        ("fe80::2%eth1", "fe80::/64"),
        ("::1", "::/64"),
        ("192.0.2.1:80", "unknown"),
        ("192.0.2.01", "unknown"),
        ("192.0.2.0/24", "unknown"),
        ("[::1]", "unknown"),
        ("3221225985", "unknown"),
        ("unknown", "unknown"),
        ("evil<script>", "unknown"),
        ("", "unknown"),
        (None, "unknown"),
    ],
)
def test_anonymous_caller_is_the_address_or_unknown(host: str | None, name: str) -> None:
    assert anonymous_caller(host) == Caller("anonymous", name)


@patient
@given(st.ip_addresses(network="2000::/3"), st.integers(0, 2**64 - 1))
def test_ipv6_addresses_of_one_64_are_one_caller(
    address: IPv4Address | IPv6Address, suffix: int
) -> None:
    neighbour = IPv6Address(int(address) >> 64 << 64 | suffix)
    assert anonymous_caller(str(neighbour)) == anonymous_caller(str(address))
    outside = IPv6Address(int(address) ^ 1 << 64)
    assert anonymous_caller(str(outside)) != anonymous_caller(str(address))


def test_address_cache_is_bounded() -> None:
    for number in range(2000):
        anonymous_caller(f"192.0.{number // 250}.{number % 250}")
    assert anonymous_caller.cache_info().currsize <= 1024


def test_caller_of_a_key_is_the_name_of_the_key() -> None:
    keys = from_env({"API_KEYS": f"app:{KEY},other:{NEW_KEY[::-1]},app:{NEW_KEY}"}).api_keys
    assert authenticate(KEY, keys) == Caller("key", "app")
    assert authenticate(NEW_KEY, keys) == Caller("key", "app")
    assert authenticate(NEW_KEY[::-1], keys) == Caller("key", "other")


@pytest.mark.parametrize("token", ["", KEY[:-1], f"{KEY}x", KEY.upper(), "app", "é", "\x00"])
def test_unknown_key_has_no_caller(token: str) -> None:
    assert authenticate(token, from_env({"API_KEYS": f"app:{KEY}"}).api_keys) is None
    assert authenticate(token, ()) is None


def test_owners_of_keys_addresses_and_failed_keys_never_collide() -> None:
    names = ("unknown", "192.0.2.1")
    callers = [Caller("key", name) for name in names]
    callers += [anonymous_caller(name) for name in names]
    callers += [failed_key_caller(name) for name in names]
    assert len({caller.owner for caller in callers}) == 6


# StreamLimiter


@pytest.mark.parametrize(("caller", "limit"), [(anonymous(1), 3), (Caller("key", "app"), 30)])
def test_caller_at_its_limit_gets_too_many_streams(caller: Caller, limit: int) -> None:
    streams = StreamLimiter(limit=100, limit_per_caller=3)
    with ExitStack() as slots:
        for _ in range(limit):
            slots.enter_context(streams.acquire(caller))
        for _ in range(2):
            with raises("too_many_streams") as error, streams.acquire(caller):
                pass
            assert error.value.retry_after == 1
            assert f"{limit} streams" in str(error.value)
        with streams.acquire(anonymous(2)):
            assert streams.active == limit + 1
    assert streams.active == 0
    with streams.acquire(caller):
        assert streams.active == 1


def test_service_at_its_limit_gets_overloaded() -> None:
    streams = StreamLimiter(limit=2, limit_per_caller=2)
    with streams.acquire(anonymous(1)), streams.acquire(anonymous(2)):
        with raises("overloaded") as error, streams.acquire(anonymous(3)):
            pass
        assert error.value.retry_after == 1
        assert "limit of 2 " in str(error.value)
    assert streams.active == 0


def test_slot_is_released_when_the_stream_raises() -> None:
    streams = StreamLimiter(limit=1, limit_per_caller=1)
    for error in (ValueError, asyncio.CancelledError, KeyboardInterrupt):
        with pytest.raises(error), streams.acquire(anonymous(1)):
            raise error
        assert streams.active == 0


# Over HTTP


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def take_token(client: Client, headers: dict[str, str] | None = None) -> Response:
    """Send a chat request that passes the rate limit and is then rejected with 422."""
    response = await client.request("POST", "/api/v1/chat", b"{}", {**JSON, **(headers or {})})
    await response.body()
    return response


def logged_callers(app: RunningService) -> list[str]:
    return [entry["caller"] for entry in app.log.requests()]


async def test_eleventh_request_in_a_second_returns_429(service: StartService) -> None:
    client = await (await service()).connect()
    started = time.monotonic()
    admitted = [await take_token(client) for _ in range(10)]
    rejected = await client.request("POST", "/api/v1/chat", b"{}", JSON)
    elapsed = time.monotonic() - started
    assert [response.status for response in admitted] == [422] * 10
    assert [response.headers["ratelimit"][:15] for response in admitted] == [
        f'"anonymous";r={remaining}' for remaining in range(9, -1, -1)
    ]
    assert rejected.status == 429
    # The next token arrives six seconds after the first request.
    retry_after = int(rejected.headers["retry-after"])
    assert math.ceil(6 - elapsed) <= retry_after <= 6
    assert rejected.headers["ratelimit-policy"] == '"anonymous";q=10;w=60'
    assert rejected.headers["ratelimit"] == f'"anonymous";r=0;t={retry_after}'
    error = (await rejected.json())["error"]
    assert error["code"] == "rate_limited"
    assert error["retryable"] is True
    assert error["retry_after"] == retry_after


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b'{"message":"Hello"}', JSON, 200),
        (b'{"message":"Hello"}', {}, 415),
        (b'{"message":"%b"}' % (b"x" * 100), JSON, 413),
        (b"{", JSON, 400),
        (b"{}", JSON, 422),
    ],
)
async def test_every_admitted_request_has_rate_limit_headers(
    body: bytes, headers: dict[str, str], status: int, service: StartService
) -> None:
    app = await service(RATE_LIMIT="2/day", MAX_BODY_BYTES="64")
    response = await (await app.connect()).request("POST", "/api/v1/chat", body, headers)
    assert response.status == status
    assert {
        name: value for name, value in response.headers.items() if name.startswith("ratelimit")
    } == {
        "ratelimit-policy": '"anonymous";q=2;w=86400',
        "ratelimit": '"anonymous";r=1;t=43200',
    }


async def test_other_routes_take_no_token(service: StartService) -> None:
    app = await service(RATE_LIMIT="1/day")
    for path in ("/healthz", "/readyz", "/metrics", "/api/v1/models", "/api/v1/chat", "/nowhere"):
        response = await app.get(path)
        assert "ratelimit" not in response.headers
    assert (await app.chat()).status == 200
    assert (await app.chat()).status == 429


async def test_each_address_has_its_own_bucket(service: StartService) -> None:
    app = await service(RATE_LIMIT="1/day")
    for expected in (422, 429):
        for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
            assert (await take_token(await app.connect(host))).status == expected


async def test_rate_limit_off_admits_all_requests_without_headers(service: StartService) -> None:
    app = await service(RATE_LIMIT="off", RATE_LIMIT_API_KEY="1/day", API_KEYS=f"app:{KEY}")
    client = await app.connect()
    responses = [await take_token(client) for _ in range(20)]
    assert {response.status for response in responses} == {422}
    assert not [name for each in responses for name in each.headers if name.startswith("ratel")]
    assert (await take_token(client, bearer(WRONG_KEY))).status == 401
    assert [(await take_token(client, bearer(KEY))).status for _ in range(2)] == [422, 429]


# Proxies


async def test_x_forwarded_for_from_untrusted_peer_is_ignored(service: StartService) -> None:
    app = await service(RATE_LIMIT="1/day", FORWARDED_ALLOW_IPS="127.0.0.1")
    client = await app.connect("127.0.0.2")
    responses = [await take_token(client, {"x-forwarded-for": f"192.0.2.{n}"}) for n in (1, 2)]
    assert [response.status for response in responses] == [422, 429]
    assert logged_callers(app) == ["127.0.0.0/24"] * 2


@pytest.mark.parametrize(
    ("forwarded", "caller"),
    [
        ("192.0.2.1", "192.0.2.0/24"),
        ("198.51.100.1, 192.0.2.1", "192.0.2.0/24"),
        ("198.51.100.1, 192.0.2.1, 10.9.9.9, 127.0.0.1", "192.0.2.0/24"),
        ("192.0.2.1:4711", "192.0.2.0/24"),
        ("[2001:db8:1:2::3]:4711", "2001:db8:1::/48"),
        ("::ffff:192.0.2.1", "192.0.2.0/24"),
        ("10.1.1.1, 10.2.2.2", "10.1.1.0/24"),
        ("192.0.2.1, unknown", "unknown"),
        ("evil<script>", "unknown"),
        ("", "127.0.0.0/24"),
    ],
)
async def test_caller_behind_trusted_proxy_is_the_rightmost_untrusted_address(
    forwarded: str, caller: str, service: StartService
) -> None:
    app = await service(FORWARDED_ALLOW_IPS="127.0.0.1,10.0.0.0/8")
    await take_token(await app.connect(), {"x-forwarded-for": forwarded})
    assert logged_callers(app) == [caller]


async def test_clients_behind_trusted_proxy_have_their_own_buckets(service: StartService) -> None:
    app = await service(RATE_LIMIT="1/day", FORWARDED_ALLOW_IPS="127.0.0.1")
    proxy = await app.connect()
    clients = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2", "unknown", "garbage"]
    responses = [await take_token(proxy, {"x-forwarded-for": client}) for client in clients]
    assert [response.status for response in responses] == [422, 422, 422, 429, 422, 429]


@pytest.mark.parametrize(("trusted", "warnings"), [("", 1), ("10.0.0.0/8", 0)])
async def test_untrusted_proxy_on_loopback_is_reported_once(
    trusted: str, warnings: int, service: StartService
) -> None:
    app = await service(FORWARDED_ALLOW_IPS=trusted)
    client = await app.connect()

    def reported() -> int:
        entries = [entry for entry in app.log.entries if entry["level"] == "warning"]
        return sum("FORWARDED_ALLOW_IPS" in entry["event"] for entry in entries)

    await take_token(client)
    assert reported() == 0
    for user in ("192.0.2.1", "192.0.2.2"):
        await take_token(client, {"x-forwarded-for": user})
    assert reported() == warnings


# API keys


async def test_key_has_one_bucket_for_all_addresses(service: StartService) -> None:
    app = await service(
        RATE_LIMIT="1/day", RATE_LIMIT_API_KEY="3/hour", API_KEYS=f"app:{KEY},app:{NEW_KEY}"
    )
    results = []
    for host, key in (("127.0.0.1", KEY), ("127.0.0.2", NEW_KEY), ("127.0.0.1", KEY)):
        response = await take_token(await app.connect(host), bearer(key))
        assert response.headers["ratelimit-policy"] == '"key";q=3;w=3600'
        results.append((response.status, response.headers["ratelimit"].partition(";t=")[0]))
    assert results == [(422, '"key";r=2'), (422, '"key";r=1'), (422, '"key";r=0')]
    assert (await take_token(await app.connect(), bearer(NEW_KEY))).status == 429
    assert logged_callers(app) == ["app"] * 4
    # The anonymous caller at the same address still has its token.
    assert (await take_token(await app.connect())).status == 422


async def test_unknown_keys_use_a_bucket_of_their_own(service: StartService) -> None:
    app = await service(RATE_LIMIT="2/day", API_KEYS=f"app:{KEY}")
    client = await app.connect()
    for remaining in (1, 0):
        response = await take_token(client, bearer(WRONG_KEY))
        assert response.status == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.headers["ratelimit"].startswith(f'"anonymous";r={remaining};')
        assert (await take_token(client, bearer(KEY))).status == 422
    response = await take_token(client, bearer(WRONG_KEY))
    assert response.status == 429
    assert "www-authenticate" not in response.headers
    # Neither a valid key nor an anonymous caller at this address is limited by it.
    assert (await take_token(client, bearer(KEY))).status == 422
    response = await take_token(client)
    assert response.status == 422
    assert response.headers["ratelimit"].startswith('"anonymous";r=1;')
    assert (await take_token(await app.connect("127.0.0.2"), bearer(WRONG_KEY))).status == 401


@pytest.mark.parametrize("authorization", ["Bearer", "bearer wrong"])
async def test_unknown_bearer_token_returns_401(authorization: str, service: StartService) -> None:
    client = await (await service()).connect()
    response = await client.chat(headers={"authorization": authorization})
    assert response.status == 401
    error = (await response.json())["error"]
    assert (error["code"], error["retryable"]) == ("invalid_api_key", False)
    assert "wrong" not in error["message"]


async def test_bearer_scheme_is_case_insensitive(service: StartService) -> None:
    app = await service(API_KEYS=f"app:{KEY}")
    client = await app.connect()
    for scheme in ("bearer", "BEARER", "Bearer "):
        await take_token(client, {"authorization": f"{scheme} {KEY}"})
    assert logged_callers(app) == ["app"] * 3


@pytest.mark.parametrize("authorization", [f"Basic {KEY}", f"Token {KEY}", KEY, f"BearerX {KEY}"])
async def test_other_schemes_are_anonymous(authorization: str, service: StartService) -> None:
    app = await service(API_KEYS=f"app:{KEY}")
    response = await take_token(await app.connect(), {"authorization": authorization})
    assert response.status == 422
    assert response.headers["ratelimit-policy"].startswith('"anonymous"')


async def test_anonymous_request_returns_401_and_takes_a_token_when_keys_are_required(
    service: StartService,
) -> None:
    app = await service(ALLOW_ANONYMOUS="false", API_KEYS=f"app:{KEY}", RATE_LIMIT="1/day")
    client = await app.connect()
    response = await client.chat()
    assert response.status == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert "Authorization: Bearer" in (await response.json())["error"]["message"]
    assert (await take_token(client)).status == 429
    assert (await take_token(client, bearer(KEY))).status == 422
