"""Limits and sessions in a real Redis: the arithmetic, the leases, and what becomes of requests
when Redis is away, slow, paused, full or not what it should be. What holds of every store is in
test_stores.py, what holds of several processes in test_replicas.py."""

import asyncio
import logging
import math
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from redis import Redis

from errors import ServiceError
from ratelimit import (
    MICROSECONDS,
    Bucket,
    Caller,
    Decision,
    MemoryRateLimiter,
    RateLimiter,
    full_at,
    take,
)
from redis_state import EXACT, TAKE, RedisClient, RedisRateLimiter, RedisStore
from server import Drain
from service import create_app
from settings import Rate, SettingsError, from_env
from tests.client import CANARY
from tests.conftest import RunningService, StartService, StartUpstream, raises
from tests.redis_server import RedisServer, free_port, program, running_relay
from tests.test_conversations import answered, classify_error, on_session, remembered, repeat
from tests.test_ratelimit import Clock, gaps, rates
from tests.test_service import openai
from tests.test_sessions import MAX_CHARS, ME, TTL, said, talk, texts
from tests.upstream import DONE, END, Connection, delta

pytestmark = pytest.mark.slow

TEN_A_MINUTE = Rate(10, 60)


@pytest.fixture(scope="session")
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url


@pytest.fixture
def shell(redis_server: RedisServer) -> Iterator[Redis]:
    """An operator's connection to a Redis that holds nothing."""
    with closing(redis_server.shell()) as shell:
        shell.flushdb()
        yield shell


StartRedis = Callable[..., RedisServer]


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[StartRedis]:
    """`start_redis("--option", "value")` starts one, which the test may stop and fill."""
    servers: list[RedisServer] = []

    def start(*options: str) -> RedisServer:
        servers.append(RedisServer(tmp_path, options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def own_redis(start_redis: StartRedis) -> RedisServer:
    return start_redis()


def anonymous(number: int) -> Caller:
    return Caller("anonymous", f"192.0.2.{number}")


# ---- the limiter


@pytest.fixture(params=["memory", "redis"])
async def limiters(
    request: pytest.FixtureRequest, redis_server: RedisServer, shell: Redis
) -> AsyncIterator[Callable[[Rate], RateLimiter]]:
    """Makes limiters where time stands still, or nearly so."""
    if request.param == "memory":
        clock = Clock()
        yield lambda rate: MemoryRateLimiter(rate, clock)
        return
    server = RedisClient(redis_server.url)
    yield lambda rate: RedisRateLimiter(server, rate)
    await server.aclose()


async def test_the_eleventh_request_is_refused_with_the_time_until_the_next(
    limiters: Callable[[Rate], RateLimiter],
) -> None:
    limiter = limiters(TEN_A_MINUTE)
    decisions = [await limiter.take(anonymous(1)) for _ in range(11)]
    assert decisions[0] == Decision(allowed=True, remaining=9, retry_after=6)
    assert decisions[9] == Decision(allowed=True, remaining=0, retry_after=6)
    assert decisions[10] == Decision(allowed=False, remaining=0, retry_after=6)
    assert await limiter.take(anonymous(2)) == decisions[0]
    assert await limiter.take(Caller("key", "192.0.2.1")) == decisions[0]


async def test_limiters_of_two_rates_share_nothing(
    limiters: Callable[[Rate], RateLimiter],
) -> None:
    one, two = limiters(Rate(1, 60)), limiters(Rate(2, 60))
    assert (await one.take(anonymous(1))).remaining == 0
    assert (await two.take(anonymous(1))).remaining == 1


async def test_two_hundred_at_once_through_four_processes_connections_are_ten(
    redis_server: RedisServer, shell: Redis
) -> None:
    servers = [RedisClient(redis_server.url) for _ in range(4)]
    each = [RedisRateLimiter(server, TEN_A_MINUTE) for server in servers]
    decisions = await asyncio.gather(*(each[n % 4].take(anonymous(1)) for n in range(200)))
    assert sum(decision.allowed for decision in decisions) == 10
    assert shell.dbsize() == 1
    for server in servers:
        await server.aclose()


# The script by a clock of the test's, with a bucket that does not expire meanwhile.
STILL = (
    TAKE.replace("redis.call('TIME')", "{ARGV[4], ARGV[5]}")
    .replace(", 'PX', milliseconds", "")
    .replace(", shares}", ", shares, milliseconds}")
)


@hypothesis_settings(deadline=None, max_examples=300)
@given(rate=rates, gaps=gaps, start=st.integers(0, 2**51))
def test_the_script_counts_exactly_as_the_bucket_in_memory_does(
    redis_url: str, rate: Rate, gaps: list[int], start: int
) -> None:
    token = rate.seconds * MICROSECONDS
    together = math.gcd(token, rate.limit)
    sizes = (token // together, rate.limit * token // together, rate.limit // together)
    if sizes[1] > EXACT:
        return
    with closing(Redis.from_url(redis_url, protocol=2, decode_responses=True)) as shell:
        shell.flushdb()
        bucket: Bucket | None = None
        now = start
        for gap in gaps:
            now += gap
            bucket, decision = take(bucket, rate, now)
            args = (*sizes, now // MICROSECONDS, now % MICROSECONDS)
            reply: Any = shell.eval(STILL, 1, "bucket", *map(str, args))
            left = full_at(bucket, rate) - now
            # Full after so many microseconds, and forgotten not before.
            assert reply == [decision.allowed, bucket.level // together, -(-left // 1000) + 1]


def test_the_largest_rates_are_counted_exactly_or_refused(redis_url: str) -> None:
    server = RedisClient(redis_url)
    for rate in (Rate(10**6, 86400), Rate(999_999_999, 1), Rate(10**8, 3600)):
        RedisRateLimiter(server, rate)
    with pytest.raises(SettingsError, match="rounder"):
        RedisRateLimiter(server, Rate(1_000_003, 86400))


async def test_a_bucket_is_forgotten_when_it_is_full(redis_url: str, shell: Redis) -> None:
    server = RedisClient(redis_url)
    await RedisRateLimiter(server, Rate(100, 1)).take(anonymous(1))
    while shell.dbsize():
        pass
    await server.aclose()


# ---- the store


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(RedisClient(url), ttl=TTL, max_chars=MAX_CHARS)
    try:
        yield store
    finally:
        await store.aclose()


async def test_ids_are_not_in_redis_and_everything_there_expires(
    redis_url: str, shell: Redis
) -> None:
    async with opened(redis_url) as store:
        issued = await talk(store, None, said())
        await talk(store, "mine", said(), None)
        await store.open(ME, "mine")
        await store.open(ME, "new")
    keys = list(shell.scan_iter("*"))
    assert len(keys) == 7
    for key in keys:
        assert shell.pttl(key) > 0
    assert not any(name in key for name in (issued, "mine", "new") for key in keys)


async def test_a_lock_is_held_for_as_long_as_the_answer_and_freed_soon_after_a_death(
    redis_url: str, shell: Redis
) -> None:
    async with opened(redis_url) as other:
        async with opened(redis_url) as store:
            await store.open(ME, "mine")
            [lock] = shell.scan_iter("chat:lock:*")
            for _ in range(2):
                # Each renewal is one; without them the lock would be gone.
                before = int(str(shell.pttl(lock)))
                while (left := int(str(shell.pttl(lock)))) <= before:
                    assert left > 0
                    before = left
                    await asyncio.sleep(0.01)
            with raises("session_busy"):
                await other.open(ME, "mine")
        while True:
            with suppress(ServiceError):
                await other.open(ME, "mine")
                break
            await asyncio.sleep(0.05)


async def test_an_answer_whose_lock_was_lost_stores_nothing_even_if_nobody_took_it(
    redis_url: str, shell: Redis
) -> None:
    async with opened(redis_url) as store:
        await talk(store, "mine", said("before"))
        for turn in (said("lost"), None):
            session = await store.open(ME, "mine")
            [lock] = shell.scan_iter("chat:lock:*")
            shell.delete(lock)
            with raises("state_unavailable"):
                await store.end(session, turn)
        await talk(store, "mine", said("after"))
        assert await texts(store, "mine") == ["before", "after"]


async def test_a_renewal_that_fails_is_tried_again(own_redis: RedisServer) -> None:
    async with opened(own_redis.url) as store, opened(own_redis.url) as other:
        session = await store.open(ME, "mine")
        async with own_redis.paused(2.0):
            with raises("state_unavailable"):
                await store.check()
        await store.end(session, said())
        assert await texts(other, "mine") == ["Hi"]


async def test_who_gives_up_waiting_keeps_nobody_else_from_an_answer(redis_url: str) -> None:
    async with opened(redis_url) as store:
        reading = [asyncio.create_task(store.check()) for _ in range(3)]
        await asyncio.sleep(0)
        reading[1].cancel()
        told = await asyncio.gather(*reading, return_exceptions=True)
        assert [type(each) for each in told] == [type(None), asyncio.CancelledError, type(None)]
        await talk(store, "mine", said())


# ---- the start


def no_start(url: str) -> str:
    with pytest.raises(SettingsError) as caught:
        create_app(from_env({"STATE_URL": url}), logging.Logger("test"), Drain())
    line = str(caught.value)
    assert line.startswith("STATE_URL: ")
    assert "\n" not in line
    assert CANARY not in line
    assert "operator" not in line
    return line


def test_redis_away_stops_the_start(own_redis: RedisServer) -> None:
    own_redis.kill()
    url = own_redis.url.replace("//", f"//operator:{CANARY}@")
    assert f"127.0.0.1:{own_redis.port}" in no_start(url)
    done = subprocess.run(
        [sys.executable, "-m", "service"],
        env={"STATE_URL": url, "PORT": "0", "PYTHONPATH": str(Path(__file__).parent.parent)},
        cwd=own_redis.directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("chat-sidecar can't start: STATE_URL: Redis does not serve: ")
    assert CANARY not in done.stdout + done.stderr


@pytest.mark.parametrize(
    "url",
    [
        f"redis://operator:{CANARY}@127.0.0.1:port/0",
        f"redis://operator:{CANARY}@[::1/0",
        f"redis://operator:{CANARY}@127.0.0.1/0?no_such_option=1",
        f"redis://operator:{CANARY}@127.0.0.1/0?max_connections=many",
    ],
)
def test_an_address_that_is_none_stops_the_start(url: str) -> None:
    assert "redis://USER:PASSWORD@HOST:PORT/DB" in no_start(url)


def test_a_wrong_password_and_a_user_who_may_do_nothing_stop_the_start(
    start_redis: StartRedis,
) -> None:
    server = start_redis("--user", "operator", "on", f">{CANARY}", "-@all")
    address = f"127.0.0.1:{server.port}/0"
    no_start(f"redis://operator:{CANARY}x@{address}")
    assert "NoPermissionError" in no_start(f"redis://operator:{CANARY}@{address}")


def test_a_redis_that_forgets_what_it_was_given_stops_the_start(start_redis: StartRedis) -> None:
    server = start_redis("--maxmemory", "100mb", "--maxmemory-policy", "volatile-lru")
    assert "noeviction" in no_start(server.url)


async def test_tls_needs_a_certificate_that_is_trusted(
    start_redis: StartRedis, tmp_path: Path
) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    made = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    made += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out"]
    await anyio.run_process([program("openssl"), *made, str(certificate)])
    port = free_port()
    options = ["--tls-port", str(port), "--tls-auth-clients", "no", "--tls-key-file", str(key)]
    start_redis(*options, "--tls-cert-file", str(certificate))
    url = f"rediss://127.0.0.1:{port}/0"
    assert "CERTIFICATE_VERIFY_FAILED" in no_start(url)
    async with opened(f"{url}?ssl_ca_certs={certificate}") as store:
        await talk(store, "mine", said())
        assert await texts(store, "mine") == ["Hi"]


# ---- the service around it


async def hold(request: Connection) -> None:
    await request.stream(delta("You said "))


async def finish(request: Connection) -> None:
    await request.send_events(delta("it"), delta(finish_reason="stop"), DONE)
    await request.send(END)


async def test_a_request_makes_at_most_three_round_trips(
    service: StartService, upstream: StartUpstream, own_redis: RedisServer
) -> None:
    provider = await upstream(repeat)
    app = await service(**openai(provider.url, STATE_URL=own_redis.url))
    client = await app.connect()
    await (await client.chat("one", session_id="mine")).events()
    with own_redis.shell() as shell, shell.monitor() as monitor:
        trips = []
        for session_id in ("mine", None):
            await (await client.chat("two", session_id=session_id)).events()
            shell.echo("end")
            seen = []
            while (each := monitor.next_command())["command"] != "ECHO end":
                seen.append(each)
            # What a script calls is no trip, and neither is the renewal in the background.
            trips.append([e["command"].split()[0] for e in seen if e["client_type"] != "lua"])
    assert trips == [["EVAL"] * 3, ["EVAL"] * 2]


async def unavailable(app: RunningService) -> None:
    """What a request gets while Redis can't be asked."""
    reply = await app.chat("lost", session_id="mine")
    assert reply.headers["retry-after"] == "1"
    assert await classify_error(reply) == (503, "state_unavailable")
    assert (await app.get("/readyz")).status == 503
    assert (await app.get("/healthz")).status == 200
    assert (await on_session(app, "GET", "mine")).status == 503


async def last(client: Awaitable[Any]) -> str:
    """The code, or the status, of an answer's last event."""
    event = (await (await client).events())[-1]
    code: str = event["error"]["code"] if event["status"] == "error" else event["status"]
    return code


async def test_redis_killed_and_started_again(
    service: StartService, upstream: StartUpstream, own_redis: RedisServer
) -> None:
    provider = await upstream(repeat)
    app = await service(**openai(provider.url, STATE_URL=own_redis.url, RATE_LIMIT="off"))
    assert await last(app.chat("one", session_id="mine")) == "done"
    provider.script = hold
    running = [await app.chat("cut", session_id=name) for name in ("mine", None)]
    for reply in running:
        await reply.event()
    own_redis.kill()
    await unavailable(app)
    for number, reply in enumerate(running, 1):
        await finish(await provider.wait_for_request(number))
        ended = (await reply.events())[-1]
        assert (ended["status"], ended["error"]["code"]) == ("error", "state_unavailable")
    own_redis.start()
    provider.script = repeat
    while True:
        reply = await app.chat("two", session_id="mine")
        if reply.status == 200:
            break
        # The lock of the answer that was cut, until its lease is over.
        assert await classify_error(reply) == (409, "session_busy")
        await asyncio.sleep(0.1)
    await reply.events()
    assert await remembered(app, "mine") == answered("one", "two")
    assert (await app.get("/readyz")).status == 200


async def test_redis_paused(
    service: StartService, upstream: StartUpstream, own_redis: RedisServer
) -> None:
    provider = await upstream(hold)
    app = await service(**openai(provider.url, STATE_URL=own_redis.url))
    running = await app.chat("cut", session_id="other")
    async with own_redis.paused(5.0):
        # More than there are connections, all at once.
        await asyncio.gather(*(unavailable(app) for _ in range(20)))
        await finish(await provider.wait_for_request())
        ended = (await running.events())[-1]
        assert ended["error"]["code"] == "state_unavailable"
    provider.script = repeat
    assert await last(app.chat("one", session_id="mine")) == "done"
    assert await remembered(app, "mine") == answered("one")


async def test_redis_full(
    service: StartService, upstream: StartUpstream, own_redis: RedisServer
) -> None:
    provider = await upstream(hold)
    app = await service(**openai(provider.url, STATE_URL=own_redis.url, RATE_LIMIT="3/day"))
    running = await app.chat("begun", session_id="mine")
    with own_redis.full():
        for _ in range(3):
            reply = await app.chat("lost", session_id="other")
            assert reply.headers["retry-after"] == "1"
            assert await classify_error(reply) == (503, "state_unavailable")
        await finish(await provider.wait_for_request())
        # What has begun may end: its lock gave room.
        assert (await running.events())[-1]["status"] == "done"
    provider.script = repeat
    assert await last(app.chat("next", session_id="mine")) == "done"
    assert await last(app.chat("last", session_id="mine")) == "done"
    assert (await app.chat("too many", session_id="mine")).status == 429


async def test_an_issued_session_that_is_stored_first_when_redis_is_full_is_not_told_done(
    service: StartService, upstream: StartUpstream, own_redis: RedisServer
) -> None:
    provider = await upstream(repeat)
    app = await service(**openai(provider.url, STATE_URL=own_redis.url, RATE_LIMIT="off"))
    with own_redis.full():
        assert await last(app.chat("lost")) == "state_unavailable"
    assert await last(app.chat("kept")) == "done"


async def test_redis_slow_and_then_dropping_what_it_is_sent(
    service: StartService, upstream: StartUpstream, own_redis: RedisServer
) -> None:
    provider = await upstream(repeat)
    with running_relay(own_redis.port) as (relay, url):
        relay.delay = 0.1
        app = await service(**openai(provider.url, STATE_URL=url))
        assert await last(app.chat("one", session_id="mine")) == "done"
        relay.dropping = True
        await unavailable(app)
        relay.dropping = False
        assert await last(app.chat("two", session_id="mine")) == "done"
        assert await remembered(app, "mine") == answered("one", "two")
        relay.delay = 3.0
        await unavailable(app)
