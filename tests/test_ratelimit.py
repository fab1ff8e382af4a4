"""The bucket held to its definition, the limiter to its memory, and both to the contract's numbers
over a socket."""

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

from errors import ServiceError
from ratelimit import (
    MICROSECONDS,
    Bucket,
    Caller,
    Decision,
    MemoryRateLimiter,
    StreamLimiter,
    anonymous_caller,
    authenticate,
    full_at,
    take,
)
from settings import ApiKey, Rate, from_env
from tests.client import JSON, Client, Response
from tests.conftest import RunningService, StartService, raises

TEN_A_MINUTE = Rate(10, 60)
DAY = 86400 * MICROSECONDS
# A machine with other work to do proves nothing about the code.
patient = settings(deadline=None)
KEY, NEW_KEY = "key-of-0123456789abcdefghij", "new-of-0123456789abcdefghij"


@dataclass
class Clock:
    """Stands at `now`, in microseconds, until a test moves it; tells it in nanoseconds."""

    now: int = 0

    def __call__(self) -> int:
        return self.now * 1000


def in_bucket(bucket: Bucket, rate: Rate, now: int) -> int:
    """The tokens that are there at `now`."""
    _, decision = take(bucket, rate, now)
    return decision.remaining + decision.allowed


# The bucket

# Small limits are used up within a few steps, large ones stress the arithmetic.
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
    """A rate, and a bucket of it that was left in any state, most often an almost empty one."""
    rate = draw(rates)
    full = rate.limit * rate.seconds * MICROSECONDS
    shares = draw(st.one_of(st.integers(0, full), st.integers(0, full // rate.limit)))
    return rate, Bucket(shares, draw(st.integers(0, DAY)))


@patient
@given(rates, gaps)
def test_no_span_of_time_admits_more_than_the_limit_and_what_flowed_in(
    rate: Rate, gaps: list[int]
) -> None:
    bucket: Bucket | None = None
    now, admitted = 0, []
    for gap in gaps:
        now += gap
        bucket, decision = take(bucket, rate, now)
        if decision.allowed:
            admitted.append(now)
    for first, start in enumerate(admitted):
        for last, end in enumerate(admitted[first:], first):
            flowed = (end - start) * rate.limit // (rate.seconds * MICROSECONDS)
            assert last - first + 1 <= rate.limit + flowed


@patient
@given(rates, gaps)
def test_a_bucket_never_strays_from_exact_fractions(rate: Rate, gaps: list[int]) -> None:
    bucket: Bucket | None = None
    now, tokens = 0, Fraction(rate.limit)
    for gap in gaps:
        now += gap
        flowed = Fraction(gap * rate.limit, rate.seconds * MICROSECONDS)
        tokens = min(Fraction(rate.limit), tokens + flowed)
        bucket, decision = take(bucket, rate, now)
        assert decision.allowed == (tokens >= 1)
        tokens -= decision.allowed
        assert decision.remaining == math.floor(tokens)


@patient
@given(buckets())
def test_after_exactly_the_wait_one_more_token_is_there_and_a_second_earlier_it_is_not(
    state: tuple[Rate, Bucket],
) -> None:
    rate, bucket = state
    bucket, decision = take(bucket, rate, bucket.updated_at)
    ready = bucket.updated_at + decision.retry_after * MICROSECONDS
    assert decision.retry_after >= 1
    assert in_bucket(bucket, rate, ready) > decision.remaining
    assert in_bucket(bucket, rate, ready - MICROSECONDS) == decision.remaining


@patient
@given(buckets())
def test_a_refusal_takes_nothing(state: tuple[Rate, Bucket]) -> None:
    rate, bucket = state
    after, decision = take(bucket, rate, bucket.updated_at)
    assume(not decision.allowed)
    assert after == bucket
    assert decision.remaining == 0


@patient
@given(buckets())
def test_a_bucket_is_full_when_it_says_so_and_not_a_microsecond_earlier(
    state: tuple[Rate, Bucket],
) -> None:
    rate, bucket = state
    full = full_at(bucket, rate)
    assert in_bucket(bucket, rate, full) == rate.limit
    if full > bucket.updated_at:
        assert in_bucket(bucket, rate, full - 1) < rate.limit


@patient
@given(rates.filter(lambda rate: rate.limit <= 100))
def test_a_clock_that_stands_still_admits_the_limit_and_no_more(rate: Rate) -> None:
    bucket: Bucket | None = None
    allowed = []
    for _ in range(rate.limit + 2):
        bucket, decision = take(bucket, rate, 7)
        allowed.append(decision.allowed)
    assert allowed == [True] * rate.limit + [False, False]


@patient
@given(buckets(), st.integers(1, DAY))
def test_a_clock_that_goes_back_brings_no_token_and_the_bucket_fills_on_from_there(
    state: tuple[Rate, Bucket], back: int
) -> None:
    rate, bucket = state
    now = bucket.updated_at - back
    assert in_bucket(bucket, rate, now) == in_bucket(bucket, rate, bucket.updated_at)
    bucket, decision = take(bucket, rate, now)
    assert in_bucket(bucket, rate, now + decision.retry_after * MICROSECONDS) > decision.remaining


def test_the_eleventh_request_within_a_second_is_refused_for_six_seconds() -> None:
    bucket: Bucket | None = None
    decisions = []
    for number in range(11):
        bucket, decision = take(bucket, TEN_A_MINUTE, number * 90_000)
        decisions.append(decision)
    assert decisions[0] == Decision(allowed=True, remaining=9, retry_after=6)
    assert decisions[9] == Decision(allowed=True, remaining=0, retry_after=6)
    assert decisions[10] == Decision(allowed=False, remaining=0, retry_after=6)


# The limiter


def anonymous(number: int) -> Caller:
    return Caller("anonymous", f"caller {number}")


async def test_each_of_ten_thousand_callers_has_ten_of_its_own() -> None:
    limiter = MemoryRateLimiter(TEN_A_MINUTE, Clock())
    callers = [anonymous(number) for number in range(10_000)]
    for expected in [True] * 10 + [False]:
        assert {(await limiter.take(caller)).allowed for caller in callers} == {expected}
    assert len(limiter.buckets) == 10_000


async def test_full_buckets_are_forgotten_when_somebody_new_comes() -> None:
    clock = Clock()
    limiter = MemoryRateLimiter(TEN_A_MINUTE, clock)
    await limiter.take(anonymous(1))
    await limiter.take(anonymous(2))
    await limiter.take(anonymous(2))
    clock.now = 6 * MICROSECONDS
    await limiter.take(anonymous(3))
    assert len(limiter.buckets) == 2, "the first was full, the second was not"
    clock.now = 12 * MICROSECONDS
    await limiter.take(anonymous(4))
    assert len(limiter.buckets) == 1, "the others were full"


async def test_a_caller_who_comes_back_is_not_forgotten_for_having_come_early() -> None:
    clock = Clock()
    limiter = MemoryRateLimiter(TEN_A_MINUTE, clock)
    await limiter.take(anonymous(1))
    clock.now = 5 * MICROSECONDS
    assert (await limiter.take(anonymous(1))).remaining == 8
    clock.now = 6 * MICROSECONDS
    await limiter.take(anonymous(2))
    # Nine were left at six seconds, had the bucket been forgotten it would be full.
    assert (await limiter.take(anonymous(1))).remaining == 8


async def test_at_the_cap_the_fullest_bucket_goes_first() -> None:
    limiter = MemoryRateLimiter(TEN_A_MINUTE, Clock(), max_buckets=2)
    for number in (1, 2, 1, 1):
        await limiter.take(anonymous(number))
    await limiter.take(anonymous(3))
    assert len(limiter.buckets) == 2
    assert (await limiter.take(anonymous(1))).remaining == 6, "it is still known"
    assert (await limiter.take(anonymous(2))).remaining == 9, "it was forgotten"


async def test_nobody_gets_a_new_bucket_by_coming_from_other_addresses_meanwhile() -> None:
    limiter = MemoryRateLimiter(TEN_A_MINUTE, Clock(), max_buckets=100)
    for _ in range(10):
        await limiter.take(anonymous(0))
    for number in range(1, 1000):
        await limiter.take(anonymous(number))
    assert not (await limiter.take(anonymous(0))).allowed


@pytest.mark.parametrize(
    ("addresses", "gap", "most"),
    [
        (200_000, 1, 1000),
        (5_000, 0, 1000),
        # One every 10 ms: when the 601st comes, the first one's six seconds are over.
        (5_000, 10_000, 600),
    ],
)
async def test_however_many_addresses_come_it_never_grows_past_its_cap(
    addresses: int, gap: int, most: int
) -> None:
    clock = Clock()
    limiter = MemoryRateLimiter(TEN_A_MINUTE, clock, max_buckets=1000)
    sizes = set()
    for number in range(addresses):
        clock.now += gap
        await limiter.take(anonymous(number))
        sizes.add(len(limiter.buckets))
    assert max(sizes) == most


@patient
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 20 * MICROSECONDS)), max_size=80))
def test_forgetting_full_buckets_changes_no_verdict(visits: list[tuple[int, int]]) -> None:
    clock = Clock()
    rate = Rate(3, 60)
    limiter = MemoryRateLimiter(rate, clock)
    kept: dict[int, Bucket] = {}

    async def visit() -> None:
        for number, gap in visits:
            clock.now += gap
            kept[number], decision = take(kept.get(number), rate, clock.now)
            assert await limiter.take(anonymous(number)) == decision

    asyncio.run(visit())


async def test_limiters_of_two_rates_share_nothing() -> None:
    clock = Clock()
    one, two = MemoryRateLimiter(Rate(1, 60), clock), MemoryRateLimiter(Rate(2, 60), clock)
    assert (one.rate, two.rate) == (Rate(1, 60), Rate(2, 60))
    assert (await one.take(anonymous(1))).remaining == 0
    assert (await two.take(anonymous(1))).remaining == 1


# Who is asking


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
def test_an_anonymous_caller_is_known_by(host: str | None, name: str) -> None:
    assert anonymous_caller(host) == Caller("anonymous", name)


@patient
@given(st.ip_addresses(network="2000::/3"), st.integers(0, 2**64 - 1))
def test_all_addresses_of_one_64_are_one_caller(
    address: IPv4Address | IPv6Address, suffix: int
) -> None:
    other = IPv6Address(int(address) >> 64 << 64 | suffix)
    assert anonymous_caller(str(other)) == anonymous_caller(str(address))
    beyond = IPv6Address(int(address) ^ 1 << 64)
    assert anonymous_caller(str(beyond)) != anonymous_caller(str(address))


def test_keys_are_found_by_what_they_are_and_known_by_their_name() -> None:
    keys = from_env({"API_KEYS": f"app:{KEY},other:{'o' * 20},app:{NEW_KEY}"}).api_keys
    assert authenticate(KEY, keys) == Caller("key", "app")
    assert authenticate(NEW_KEY, keys) == Caller("key", "app")
    assert authenticate("o" * 20, keys) == Caller("key", "other")


@pytest.mark.parametrize("presented", ["", KEY[:-1], f"{KEY}x", KEY.upper(), "app", "é", "\x00"])
def test_what_is_no_key_is_nobodys(presented: str) -> None:
    assert authenticate(presented, from_env({"API_KEYS": f"app:{KEY}"}).api_keys) is None
    assert authenticate(presented, ()) is None


def test_a_key_that_is_named_like_an_address_is_another_caller() -> None:
    keys = [ApiKey(name, digest=b"") for name in ("unknown", "2001-db8")]
    owners = {Caller("key", key.name).owner for key in keys}
    assert owners.isdisjoint(Caller("anonymous", key.name).owner for key in keys)


# Open answers


def open_until_refused(
    streams: StreamLimiter, caller: Caller, held: ExitStack
) -> tuple[int, ServiceError]:
    """How many answers could be opened, all of them held, and what the next one met."""
    count = 0
    while True:
        try:
            held.enter_context(streams.acquire(caller))
        except ServiceError as refused:
            return count, refused
        count += 1


@pytest.mark.parametrize(("caller", "most"), [(anonymous(1), 3), (Caller("key", "app"), 30)])
def test_a_caller_has_its_number_of_answers_open_and_a_key_ten_times_that(
    caller: Caller, most: int
) -> None:
    streams = StreamLimiter(limit=100, limit_per_caller=3)
    with ExitStack() as held:
        count, refused = open_until_refused(streams, caller, held)
        assert (count, streams.active.total()) == (most, most)
        assert refused.code == "too_many_streams"
        assert refused.retry_after == 1
        assert str(most) in str(refused)
        with streams.acquire(anonymous(2)):
            assert streams.active.total() == most + 1
    assert not streams.active


def test_all_callers_together_have_the_servers_number_of_answers_open() -> None:
    streams = StreamLimiter(limit=2, limit_per_caller=2)
    with ExitStack() as held:
        held.enter_context(streams.acquire(anonymous(1)))
        held.enter_context(streams.acquire(anonymous(2)))
        with raises("overloaded") as refused, streams.acquire(anonymous(3)):
            pass
        assert refused.value.retry_after == 1
    assert not streams.active


def test_a_slot_is_given_back_however_its_answer_ends() -> None:
    streams = StreamLimiter(limit=1, limit_per_caller=1)
    for ending in (ValueError, asyncio.CancelledError, KeyboardInterrupt):
        with pytest.raises(ending), streams.acquire(anonymous(1)):
            raise ending
        assert not streams.active
    with streams.acquire(anonymous(1)):
        assert streams.active.total() == 1


def test_a_refused_answer_holds_nothing() -> None:
    streams = StreamLimiter(limit=5, limit_per_caller=1)
    with streams.acquire(anonymous(1)):
        for _ in range(5):
            with raises("too_many_streams"), streams.acquire(anonymous(1)):
                pass
        assert streams.active.total() == 1
    with streams.acquire(anonymous(1)):
        assert streams.active.total() == 1


# Over a socket


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def knock(client: Client, headers: dict[str, str] | None = None) -> Response:
    """A chat request that is refused for its fields once it has passed the limiter: the cheapest
    one that takes a token."""
    reply = await client.request("POST", "/api/v1/chat", b"{}", {**JSON, **(headers or {})})
    await reply.body()
    return reply


def callers(app: RunningService) -> list[str]:
    """Who each chat request came from, as the log says."""
    return [entry["caller"] for entry in app.log.requests()]


async def test_the_eleventh_request_within_a_second_is_answered_429(service: StartService) -> None:
    client = await (await service()).connect()
    started = time.monotonic()
    passed = [await knock(client) for _ in range(10)]
    refused = await client.request("POST", "/api/v1/chat", b"{}", JSON)
    elapsed = time.monotonic() - started
    assert [reply.status for reply in passed] == [422] * 10
    assert [reply.headers["ratelimit"][:15] for reply in passed] == [
        f'"anonymous";r={left}' for left in range(9, -1, -1)
    ]
    assert refused.status == 429
    # Six, unless this machine needed more than a second.
    wait = int(refused.headers["retry-after"])
    assert math.ceil(6 - elapsed) <= wait <= 6
    assert refused.headers["ratelimit-policy"] == '"anonymous";q=10;w=60'
    assert refused.headers["ratelimit"] == f'"anonymous";r=0;t={wait}'
    error = (await refused.json())["error"]
    assert (error["code"], error["retryable"], error["retry_after"]) == ("rate_limited", True, wait)


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
async def test_every_answer_that_passed_the_limiter_tells_what_is_left(
    body: bytes, headers: dict[str, str], status: int, service: StartService
) -> None:
    app = await service(RATE_LIMIT="2/day", MAX_BODY_BYTES="64")
    reply = await (await app.connect()).request("POST", "/api/v1/chat", body, headers)
    assert reply.status == status
    assert reply.headers["ratelimit-policy"] == '"anonymous";q=2;w=86400'
    assert reply.headers["ratelimit"] == '"anonymous";r=1;t=43200'
    assert [name for name in reply.headers if name.startswith("ratelimit")] == [
        "ratelimit-policy",
        "ratelimit",
    ]


async def test_what_is_no_chat_takes_no_token(service: StartService) -> None:
    app = await service(RATE_LIMIT="1/day")
    for path in ("/healthz", "/readyz", "/metrics", "/api/v1/models", "/api/v1/chat", "/nowhere"):
        reply = await app.get(path)
        assert "ratelimit" not in reply.headers
    assert (await app.chat()).status == 200
    assert (await app.chat()).status == 429


async def test_each_address_has_its_own_tokens(service: StartService) -> None:
    app = await service(RATE_LIMIT="1/day")
    for expected in (422, 429):
        for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
            assert (await knock(await app.connect(host))).status == expected


async def test_off_sends_neither_header_and_limits_nobody(service: StartService) -> None:
    app = await service(RATE_LIMIT="off", RATE_LIMIT_API_KEY="1/day", API_KEYS=f"app:{KEY}")
    client = await app.connect()
    replies = [await knock(client) for _ in range(20)]
    assert {reply.status for reply in replies} == {422}
    assert not [name for reply in replies for name in reply.headers if name.startswith("ratel")]
    assert (await knock(client, bearer("x" * 20))).status == 401
    assert [(await knock(client, bearer(KEY))).status for _ in range(2)] == [422, 429]


# Proxies


async def test_x_forwarded_for_changes_nothing_unless_its_sender_is_trusted(
    service: StartService,
) -> None:
    app = await service(RATE_LIMIT="1/day", FORWARDED_ALLOW_IPS="127.0.0.1")
    stranger = await app.connect("127.0.0.2")
    replies = [await knock(stranger, {"x-forwarded-for": f"192.0.2.{n}"}) for n in (1, 2)]
    assert [reply.status for reply in replies] == [422, 429]
    assert callers(app) == ["127.0.0.0/24"] * 2


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
async def test_behind_a_trusted_proxy_the_caller_is_the_rightmost_that_is_not_trusted(
    forwarded: str, caller: str, service: StartService
) -> None:
    app = await service(FORWARDED_ALLOW_IPS="127.0.0.1,10.0.0.0/8")
    await knock(await app.connect(), {"x-forwarded-for": forwarded})
    assert callers(app) == [caller]


async def test_a_proxys_users_have_tokens_of_their_own_and_share_those_of_one_64(
    service: StartService,
) -> None:
    app = await service(RATE_LIMIT="1/day", FORWARDED_ALLOW_IPS="127.0.0.1")
    proxy = await app.connect()
    users = ["192.0.2.1", "192.0.2.2", "2001:db8::1", "2001:db8::2", "unknown", "garbage"]
    statuses = [(await knock(proxy, {"x-forwarded-for": user})).status for user in users]
    assert statuses == [422, 422, 422, 429, 422, 429]


def proxy_warnings(app: RunningService) -> list[str]:
    told = [entry["event"] for entry in app.log.entries if entry["level"] == "warning"]
    return [text for text in told if "FORWARDED_ALLOW_IPS=127.0.0.1" in text]


async def test_a_proxy_on_this_machine_that_is_not_trusted_gives_one_warning(
    service: StartService,
) -> None:
    app = await service()
    client = await app.connect()
    await knock(client)
    assert proxy_warnings(app) == []
    for user in ("192.0.2.1", "192.0.2.2"):
        await knock(client, {"x-forwarded-for": user})
    assert len(proxy_warnings(app)) == 1


async def test_where_a_proxy_is_configured_no_other_gives_a_warning(service: StartService) -> None:
    app = await service(FORWARDED_ALLOW_IPS="10.0.0.0/8")
    await knock(await app.connect(), {"x-forwarded-for": "192.0.2.1"})
    assert proxy_warnings(app) == []


# Keys


async def test_a_key_has_tokens_of_its_own_wherever_it_comes_from(service: StartService) -> None:
    app = await service(
        RATE_LIMIT="1/day", RATE_LIMIT_API_KEY="3/hour", API_KEYS=f"app:{KEY},app:{NEW_KEY}"
    )
    seen = []
    for host, key in (("127.0.0.1", KEY), ("127.0.0.2", NEW_KEY), ("127.0.0.1", KEY)):
        reply = await knock(await app.connect(host), bearer(key))
        assert reply.headers["ratelimit-policy"] == '"key";q=3;w=3600'
        seen.append((reply.status, reply.headers["ratelimit"].partition(";t=")[0]))
    assert seen == [(422, '"key";r=2'), (422, '"key";r=1'), (422, '"key";r=0')]
    assert (await knock(await app.connect(), bearer(NEW_KEY))).status == 429
    assert callers(app) == ["app"] * 4
    # The address's own token is untouched.
    assert (await knock(await app.connect())).status == 422


async def test_an_unknown_key_is_401_and_charged_to_its_address_and_a_right_one_never_is(
    service: StartService,
) -> None:
    app = await service(RATE_LIMIT="2/day", API_KEYS=f"app:{KEY}")
    client = await app.connect()
    for left in (1, 0):
        reply = await knock(client, bearer("x" * 30))
        assert reply.status == 401
        assert reply.headers["www-authenticate"] == "Bearer"
        assert reply.headers["ratelimit"].startswith(f'"anonymous";r={left};')
        assert (await knock(client, bearer(KEY))).status == 422
    reply = await knock(client, bearer("x" * 30))
    assert reply.status == 429
    assert "www-authenticate" not in reply.headers
    assert (await knock(client)).status == 429
    assert (await knock(client, bearer(KEY))).status == 422
    assert (await knock(await app.connect("127.0.0.2"), bearer("x" * 30))).status == 401


@pytest.mark.parametrize("authorization", ["Bearer", "bearer wrong"])
async def test_a_bearer_token_that_is_no_key_is_never_anonymous(
    authorization: str, service: StartService
) -> None:
    client = await (await service()).connect()
    reply = await client.chat(headers={"authorization": authorization})
    assert reply.status == 401
    error = (await reply.json())["error"]
    assert (error["code"], error["retryable"]) == ("invalid_api_key", False)
    assert "wrong" not in error["message"]


async def test_the_scheme_is_read_in_any_case(service: StartService) -> None:
    app = await service(API_KEYS=f"app:{KEY}")
    client = await app.connect()
    for scheme in ("bearer", "BEARER", "Bearer "):
        await knock(client, {"authorization": f"{scheme} {KEY}"})
    assert callers(app) == ["app"] * 3


@pytest.mark.parametrize("authorization", [f"Basic {KEY}", f"Token {KEY}", KEY, f"BearerX {KEY}"])
async def test_other_schemes_count_as_no_key(authorization: str, service: StartService) -> None:
    app = await service(API_KEYS=f"app:{KEY}")
    reply = await knock(await app.connect(), {"authorization": authorization})
    assert reply.status == 422
    assert reply.headers["ratelimit-policy"].startswith('"anonymous"')


async def test_where_anonymous_callers_are_not_served_they_get_401_and_pay_for_it(
    service: StartService,
) -> None:
    app = await service(ALLOW_ANONYMOUS="false", API_KEYS=f"app:{KEY}", RATE_LIMIT="1/day")
    client = await app.connect()
    reply = await client.chat()
    assert reply.status == 401
    assert reply.headers["www-authenticate"] == "Bearer"
    assert "Authorization: Bearer" in (await reply.json())["error"]["message"]
    assert (await knock(client)).status == 429
    assert (await knock(client, bearer(KEY))).status == 422
