"""Rate limits and sessions in a real Redis: arithmetic, leases, start, and Redis failures.

Rules that hold for every store are tested in test_stores.py, replicas in test_replicas.py.
"""

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
from redis_state import MAX_EXACT_INTEGER, TAKE, RedisClient, RedisRateLimiter, RedisStore
from server import Drain
from service import create_app
from settings import Rate, SettingsError, from_env
from tests.client import CANARY
from tests.conftest import RunningService, StartService, StartUpstream, openai_env, raises
from tests.redis_server import RedisServer, find_program, free_port, running_relay
from tests.test_conversations import echo, echoed, read_messages, request_session
from tests.test_ratelimit import Clock, gaps, rates
from tests.test_sessions import (
    CALLER,
    MAX_CHARS,
    TTL,
    make_turn,
    store_turns,
    stored_messages,
)
from tests.upstream import DONE, END, Connection, delta

pytestmark = pytest.mark.slow

TEN_A_MINUTE = Rate(10, 60)


@pytest.fixture(scope="session")
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url


@pytest.fixture
def shell(redis_server: RedisServer) -> Iterator[Redis]:
    """A connection to an empty Redis, as an operator's redis-cli has it."""
    with closing(redis_server.shell()) as shell:
        shell.flushdb()
        yield shell


StartRedis = Callable[..., RedisServer]


@pytest.fixture
def start_redis(tmp_path: Path) -> Iterator[StartRedis]:
    """`start_redis("--option", "value")` starts a Redis that the test can stop and fill."""
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


# ---- rate limiter


@pytest.fixture(params=["memory", "redis"])
async def limiters(
    request: pytest.FixtureRequest, redis_server: RedisServer, shell: Redis
) -> AsyncIterator[Callable[[Rate], RateLimiter]]:
    """Create limiters. The clock stands still in memory; in Redis a test takes almost no time."""
    if request.param == "memory":
        clock = Clock()
        yield lambda rate: MemoryRateLimiter(rate, clock)
        return
    client = RedisClient(redis_server.url)
    yield lambda rate: RedisRateLimiter(client, rate)
    await client.aclose()


async def test_eleventh_request_is_rejected_with_the_time_until_the_next_token(
    limiters: Callable[[Rate], RateLimiter],
) -> None:
    limiter = limiters(TEN_A_MINUTE)
    decisions = [await limiter.take(anonymous(1)) for _ in range(11)]
    assert decisions[0] == Decision(allowed=True, remaining=9, retry_after=6)
    assert decisions[9] == Decision(allowed=True, remaining=0, retry_after=6)
    assert decisions[10] == Decision(allowed=False, remaining=0, retry_after=6)
    assert await limiter.take(anonymous(2)) == decisions[0]
    assert await limiter.take(Caller("key", "192.0.2.1")) == decisions[0]


async def test_limiters_with_different_rates_share_no_bucket(
    limiters: Callable[[Rate], RateLimiter],
) -> None:
    one, two = limiters(Rate(1, 60)), limiters(Rate(2, 60))
    assert (await one.take(anonymous(1))).remaining == 0
    assert (await two.take(anonymous(1))).remaining == 1


async def test_concurrent_requests_on_four_connections_share_one_limit(
    redis_server: RedisServer, shell: Redis
) -> None:
    clients = [RedisClient(redis_server.url) for _ in range(4)]
    limiters = [RedisRateLimiter(client, TEN_A_MINUTE) for client in clients]
    decisions = await asyncio.gather(*(limiters[n % 4].take(anonymous(1)) for n in range(200)))
    assert sum(decision.allowed for decision in decisions) == 10
    assert shell.dbsize() == 1
    for client in clients:
        await client.aclose()


# The script with the test's clock and without expiry. It also returns the expiry it would set.
TAKE_AT = (
    TAKE.replace("redis.call('TIME')", "{ARGV[4], ARGV[5]}")
    .replace(", 'PX', milliseconds", "")
    .replace(", level}", ", level, milliseconds}")
)


@hypothesis_settings(deadline=None, max_examples=300)
@given(rate=rates, gaps=gaps, start=st.integers(0, 2**51))
def test_script_computes_the_same_as_the_bucket_in_memory(
    redis_url: str, rate: Rate, gaps: list[int], start: int
) -> None:
    token = rate.seconds * MICROSECONDS
    divisor = math.gcd(token, rate.limit)
    sizes = (token // divisor, rate.limit * token // divisor, rate.limit // divisor)
    if sizes[1] > MAX_EXACT_INTEGER:
        return
    with closing(Redis.from_url(redis_url, protocol=2, decode_responses=True)) as shell:
        shell.flushdb()
        bucket: Bucket | None = None
        now = start
        for gap in gaps:
            now += gap
            bucket, decision = take(bucket, rate, now)
            args = (*sizes, now // MICROSECONDS, now % MICROSECONDS)
            reply: Any = shell.eval(TAKE_AT, 1, "bucket", *map(str, args))
            until_full = full_at(bucket, rate) - now
            # The bucket expires when it is full, and not earlier.
            assert reply == [decision.allowed, bucket.level // divisor, -(-until_full // 1000) + 1]


def test_rate_that_redis_cannot_count_exactly_is_rejected(redis_url: str) -> None:
    client = RedisClient(redis_url)
    for rate in (Rate(10**6, 86400), Rate(999_999_999, 1), Rate(10**8, 3600)):
        RedisRateLimiter(client, rate)
    with pytest.raises(SettingsError, match="rounder"):
        RedisRateLimiter(client, Rate(1_000_003, 86400))


async def test_full_bucket_expires(redis_url: str, shell: Redis) -> None:
    client = RedisClient(redis_url)
    await RedisRateLimiter(client, Rate(100, 1)).take(anonymous(1))
    while shell.dbsize():
        pass
    await client.aclose()


# ---- session store


@asynccontextmanager
async def open_store(url: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(RedisClient(url), ttl=TTL, max_chars=MAX_CHARS)
    try:
        yield store
    finally:
        await store.aclose()


async def test_session_ids_are_not_in_redis_and_every_key_expires(
    redis_url: str, shell: Redis
) -> None:
    async with open_store(redis_url) as store:
        issued = await store_turns(store, None, make_turn())
        await store_turns(store, "mine", make_turn(), None)
        await store.open(CALLER, "mine")
        await store.open(CALLER, "new")
    keys = list(shell.scan_iter("*"))
    assert len(keys) == 7
    for key in keys:
        assert shell.pttl(key) > 0
    assert not any(name in key for name in (issued, "mine", "new") for key in keys)


async def test_lock_is_renewed_while_a_response_runs_and_expires_after_its_process_died(
    redis_url: str, shell: Redis
) -> None:
    async with open_store(redis_url) as other:
        async with open_store(redis_url) as store:
            await store.open(CALLER, "mine")
            [lock] = shell.scan_iter("chat:lock:*")
            for _ in range(2):
                # The remaining time only grows when the lease is renewed.
                before = int(str(shell.pttl(lock)))
                while (left := int(str(shell.pttl(lock)))) <= before:
                    assert left > 0
                    before = left
                    await asyncio.sleep(0.01)
            with raises("session_busy"):
                await other.open(CALLER, "mine")
        while True:
            with suppress(ServiceError):
                await other.open(CALLER, "mine")
                break
            await asyncio.sleep(0.05)


async def test_turn_is_not_stored_after_its_lock_expired(redis_url: str, shell: Redis) -> None:
    async with open_store(redis_url) as store:
        await store_turns(store, "mine", make_turn("before"))
        for turn in (make_turn("lost"), None):
            session = await store.open(CALLER, "mine")
            [lock] = shell.scan_iter("chat:lock:*")
            shell.delete(lock)
            with raises("state_unavailable"):
                await store.end(session, turn)
        await store_turns(store, "mine", make_turn("after"))
        assert await stored_messages(store, "mine") == ["before", "after"]


async def test_failed_renewal_is_retried(own_redis: RedisServer) -> None:
    async with open_store(own_redis.url) as store, open_store(own_redis.url) as other:
        session = await store.open(CALLER, "mine")
        async with own_redis.paused(2.0):
            with raises("state_unavailable"):
                await store.check()
        await store.end(session, make_turn())
        assert await stored_messages(other, "mine") == ["Hi"]


async def test_cancelled_call_does_not_affect_the_others_in_its_batch(redis_url: str) -> None:
    async with open_store(redis_url) as store:
        reading = [asyncio.create_task(store.check()) for _ in range(3)]
        await asyncio.sleep(0)
        reading[1].cancel()
        results = await asyncio.gather(*reading, return_exceptions=True)
        assert [type(result) for result in results] == [
            type(None),
            asyncio.CancelledError,
            type(None),
        ]
        await store_turns(store, "mine", make_turn())


# ---- start


def start_error(url: str) -> str:
    """Return the error that stops the start. It contains neither user nor password."""
    with pytest.raises(SettingsError) as caught:
        create_app(from_env({"STATE_URL": url}), logging.Logger("test"), Drain())
    line = str(caught.value)
    assert line.startswith("STATE_URL: ")
    assert "\n" not in line
    assert CANARY not in line
    assert "operator" not in line
    return line


def test_unreachable_redis_stops_the_start(own_redis: RedisServer) -> None:
    own_redis.kill()
    url = own_redis.url.replace("//", f"//operator:{CANARY}@")
    assert f"127.0.0.1:{own_redis.port}" in start_error(url)
    done = subprocess.run(
        [sys.executable, "-m", "service"],
        env={"STATE_URL": url, "PORT": "0", "PYTHONPATH": str(Path(__file__).parent.parent)},
        cwd=own_redis.directory,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "STATE_URL: Redis does not respond: " in done.stderr
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
def test_invalid_url_stops_the_start(url: str) -> None:
    assert "redis://USER:PASSWORD@HOST:PORT/DB" in start_error(url)


def test_wrong_password_or_missing_permission_stops_the_start(
    start_redis: StartRedis,
) -> None:
    server = start_redis("--user", "operator", "on", f">{CANARY}", "-@all")
    address = f"127.0.0.1:{server.port}/0"
    start_error(f"redis://operator:{CANARY}x@{address}")
    assert "NoPermissionError" in start_error(f"redis://operator:{CANARY}@{address}")


def test_redis_that_evicts_keys_stops_the_start(start_redis: StartRedis) -> None:
    server = start_redis("--maxmemory", "100mb", "--maxmemory-policy", "volatile-lru")
    assert "noeviction" in start_error(server.url)


async def test_tls_requires_a_trusted_certificate(start_redis: StartRedis, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out"]
    await anyio.run_process([find_program("openssl"), *command, str(certificate)])
    port = free_port()
    options = ["--tls-port", str(port), "--tls-auth-clients", "no", "--tls-key-file", str(key)]
    start_redis(*options, "--tls-cert-file", str(certificate))
    url = f"rediss://127.0.0.1:{port}/0"
    assert "CERTIFICATE_VERIFY_FAILED" in start_error(url)
    async with open_store(f"{url}?ssl_ca_certs={certificate}") as store:
        await store_turns(store, "mine", make_turn())
        assert await stored_messages(store, "mine") == ["Hi"]


# ---- the service with Redis


async def hold(request: Connection) -> None:
    """Send one chunk and keep the stream open."""
    await request.stream(delta("You said "))


async def finish(request: Connection) -> None:
    """End a stream that `hold` began."""
    await request.send_events(delta("it"), delta(finish_reason="stop"), DONE)
    await request.send(END)


async def test_chat_request_makes_at_most_three_round_trips(
    service: StartService, upstream: StartUpstream, own_redis: RedisServer
) -> None:
    provider = await upstream(echo)
    app = await service(**openai_env(provider.url, STATE_URL=own_redis.url))
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
            # Commands called by scripts are not round trips.
            trips.append([e["command"].split()[0] for e in seen if e["client_type"] != "lua"])
    assert trips == [["EVAL"] * 3] * 2


async def expect_unavailable(app: RunningService) -> None:
    """Check the responses of all routes while Redis does not respond."""
    reply = await app.chat("lost", session_id="mine")
    assert reply.headers["retry-after"] == "1"
    assert await reply.status_and_code() == (503, "state_unavailable")
    assert (await app.get("/readyz")).status == 503
    assert (await app.get("/healthz")).status == 200
    assert (await request_session(app, "GET", "mine")).status == 503


async def outcome(chat: Awaitable[Any]) -> str:
    """Return the status of the stream's terminal event, or its error code."""
    event = (await (await chat).events())[-1]
    code: str = event["error"]["code"] if event["status"] == "error" else event["status"]
    return code


async def test_service_recovers_after_redis_was_killed_and_restarted(
    service: StartService, upstream: StartUpstream, own_redis: RedisServer
) -> None:
    provider = await upstream(echo)
    app = await service(**openai_env(provider.url, STATE_URL=own_redis.url, RATE_LIMIT="off"))
    assert await outcome(app.chat("one", session_id="mine")) == "done"
    provider.script = hold
    running = [await app.chat("cut", session_id=name) for name in ("mine", None)]
    for reply in running:
        await reply.event()
    own_redis.kill()
    await expect_unavailable(app)
    for number, reply in enumerate(running, 1):
        await finish(await provider.wait_for_request(number))
        ended = (await reply.events())[-1]
        assert (ended["status"], ended["error"]["code"]) == ("error", "state_unavailable")
    own_redis.start()
    provider.script = echo
    while True:
        reply = await app.chat("two", session_id="mine")
        if reply.status == 200:
            break
        # The lock of the failed response, until its lease expires.
        assert await reply.status_and_code() == (409, "session_busy")
        await asyncio.sleep(0.1)
    await reply.events()
    assert await read_messages(app, "mine") == echoed("one", "two")
    assert (await app.get("/readyz")).status == 200


async def test_service_recovers_after_redis_was_paused(
    service: StartService, upstream: StartUpstream, own_redis: RedisServer
) -> None:
    provider = await upstream(hold)
    app = await service(**openai_env(provider.url, STATE_URL=own_redis.url))
    running = await app.chat("cut", session_id="other")
    async with own_redis.paused(5.0):
        await asyncio.gather(*(expect_unavailable(app) for _ in range(20)))
        await finish(await provider.wait_for_request())
        ended = (await running.events())[-1]
        assert ended["error"]["code"] == "state_unavailable"
    provider.script = echo
    assert await outcome(app.chat("one", session_id="mine")) == "done"
    assert await read_messages(app, "mine") == echoed("one")


@pytest.mark.parametrize("rate_limit", ["100/day", "off"])
async def test_full_redis_rejects_chats_while_running_ones_end_and_deletion_works(
    service: StartService, upstream: StartUpstream, own_redis: RedisServer, rate_limit: str
) -> None:
    provider = await upstream(echo)
    env = openai_env(provider.url, STATE_URL=own_redis.url, RATE_LIMIT=rate_limit)
    app = await service(**env)
    assert await outcome(app.chat("one", session_id="other")) == "done"
    provider.script = hold
    running = [await app.chat("started", session_id=name) for name in ("mine", None)]
    with own_redis.full():
        for session_id in ("other", "new", None):
            reply = await app.chat("rejected", session_id=session_id)
            assert reply.headers["retry-after"] == "5"
            error = await reply.error()
            assert (reply.status, error["code"]) == (503, "state_unavailable")
            assert "full" in error["message"]
        assert len(provider.requests) == 3
        assert (await app.get("/readyz")).status == 503
        assert await read_messages(app, "other") == echoed("one")
        assert (await request_session(app, "DELETE", "other")).status == 204
        for number, reply in enumerate(running, 1):
            await finish(await provider.wait_for_request(number))
            assert (await reply.events())[-1]["status"] == "done"
    assert (await app.get("/readyz")).status == 200
    provider.script = echo
    assert await outcome(app.chat("next", session_id="mine")) == "done"
    assert await outcome(app.chat("next")) == "done"


async def test_full_redis_does_not_lift_the_rate_limit(
    service: StartService, upstream: StartUpstream, own_redis: RedisServer
) -> None:
    provider = await upstream(echo)
    app = await service(**openai_env(provider.url, STATE_URL=own_redis.url, RATE_LIMIT="3/day"))
    with own_redis.full():
        statuses = [(await app.chat("Hi")).status for _ in range(4)]
    assert statuses == [503, 503, 503, 429]
    assert (await app.chat("Hi")).status == 429


async def test_service_works_with_slow_redis_and_recovers_after_lost_replies(
    service: StartService, upstream: StartUpstream, own_redis: RedisServer
) -> None:
    provider = await upstream(echo)
    with running_relay(own_redis.port) as (relay, url):
        relay.delay = 0.1
        app = await service(**openai_env(provider.url, STATE_URL=url))
        assert await outcome(app.chat("one", session_id="mine")) == "done"
        relay.dropping = True
        await expect_unavailable(app)
        relay.dropping = False
        assert await outcome(app.chat("two", session_id="mine")) == "done"
        assert await read_messages(app, "mine") == echoed("one", "two")
        relay.delay = 3.0
        await expect_unavailable(app)
