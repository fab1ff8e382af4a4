"""Several replicas with one Redis behave as one service, also while one of them dies."""

import asyncio
import signal
from asyncio.subprocess import Process
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from tests.client import Response
from tests.conftest import Log, RunningService, StartUpstream, openai_env
from tests.redis_server import RedisServer, find_program, free_port
from tests.test_conversations import echo, echoed, provider_messages, request_session
from tests.test_kill import running_process
from tests.test_redis_state import finish, hold

pytestmark = pytest.mark.slow

NGINX = Path(__file__).parent.parent / "deploy" / "nginx.scale.conf"
KEY = "key-of-0123456789abcdefghij"
AUTH = {"authorization": f"Bearer {KEY}"}
# Runs the service with a clock that is an hour ahead.
CLOCK_AHEAD = """
import time
system_time = time.time
time.time = lambda: system_time() + 3600
import service
service.main()
"""


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    directory = tmp_path / "redis"
    directory.mkdir()
    server = RedisServer(directory)
    yield server
    server.kill()


@dataclass
class Replicas:
    """A load balancer and the replicas behind it."""

    balancer: RunningService
    services: list[RunningService]
    processes: list[Process]

    async def chat(self, message: str, session_id: str | None = "mine") -> Response:
        client = await self.balancer.connect()
        return await client.chat(message, AUTH, session_id=session_id)

    async def complete(self, message: str) -> None:
        """Send the message until the session is not busy, and expect a complete response.

        The session stays busy until the lease of a dead replica expires.
        """
        reply = await self.chat(message)
        while reply.status == 409:
            await asyncio.sleep(0.1)
            reply = await self.chat(message)
        assert (await reply.events())[-1]["status"] == "done"

    async def stored_messages(self, session_id: str = "mine") -> list[tuple[str, str, bool]]:
        view = await (await request_session(self.balancer, "GET", session_id, AUTH)).json()
        return [(item["role"], item["content"], item["complete"]) for item in view["messages"]]


@asynccontextmanager
async def running_balancer(directory: Path, urls: list[str]) -> AsyncIterator[RunningService]:
    """Run nginx with the configuration from deploy/ before the services at `urls`."""
    port = free_port()
    text = NGINX.read_text(encoding="utf-8")
    before, _, rest = text.partition("        server chat-1:8000;\n")
    servers = "".join(f"        server {url.removeprefix('http://')};\n" for url in urls)
    text = before + servers + rest.partition("        server chat-2:8000;\n")[2]
    text = text.replace("listen 8080;", f"listen 127.0.0.1:{port};")
    config = directory / "nginx.conf"
    text = f"daemon off;\npid {directory}/nginx.pid;\n{text}"
    config.write_text(text.replace("http {", "http {\n    access_log off;"), encoding="utf-8")
    process = await asyncio.create_subprocess_exec(
        find_program("nginx"), "-p", directory, "-c", config, "-e", "stderr"
    )
    running = RunningService(f"http://127.0.0.1:{port}", Log())
    while True:
        with suppress(ConnectionRefusedError):
            (await running.connect()).disconnect()
            break
        assert process.returncode is None
        await asyncio.sleep(0.01)
    try:
        yield running
    finally:
        for client in running.clients:
            client.disconnect()
        process.terminate()
        await process.wait()


@asynccontextmanager
async def running_replicas(
    count: int, redis: RedisServer, directory: Path, url: str, **settings: str
) -> AsyncIterator[Replicas]:
    """Run `count` replicas behind nginx. Every second one has a clock that is an hour ahead."""
    env = {
        "STATE_URL": redis.url,
        "FORWARDED_ALLOW_IPS": "127.0.0.1",
        "RATE_LIMIT": "10/hour",
        "RATE_LIMIT_API_KEY": "off",
        "API_KEYS": f"app:{KEY}",
        **openai_env(url, **settings),
    }
    async with AsyncExitStack() as stack:
        started = [
            await stack.enter_async_context(
                running_process(
                    directory / "no.db",
                    env,
                    ("-c", CLOCK_AHEAD) if number % 2 else ("-m", "service"),
                )
            )
            for number in range(count)
        ]
        services = [running for running, _ in started]
        balancer = await stack.enter_async_context(
            running_balancer(directory, [running.url for running in services])
        )
        yield Replicas(balancer, services, [process for _, process in started])


@pytest.mark.parametrize("count", [2, 4])
async def test_replicas_share_sessions_locks_and_rate_limits(
    upstream: StartUpstream, redis: RedisServer, tmp_path: Path, count: int
) -> None:
    provider = await upstream(echo)
    async with running_replicas(count, redis, tmp_path, provider.url) as replicas:
        messages = [f"number {n}" for n in range(3 * count)]
        for message in messages:
            await replicas.complete(message)
        assert await replicas.stored_messages() == echoed(*messages)
        last = provider.requests[-1].body["messages"]
        assert last == provider_messages(*echoed(*messages[:-1]), ("user", messages[-1], True))
        for replica in replicas.services:
            assert await replica.metric('chat_requests_total{outcome="done",route="/api/v1/chat"')
        view = await (await request_session(replicas.balancer, "GET", "mine", AUTH)).json()
        times = [view["created_at"], *(message["created_at"] for message in view["messages"])]
        for text in times:
            age = datetime.now(UTC) - datetime.fromisoformat(text)
            assert abs(age) < timedelta(minutes=10)

        # 200 concurrent requests from one address
        replies = await asyncio.gather(*(replicas.balancer.chat("Hi") for _ in range(200)))
        assert Counter(reply.status for reply in replies) == {200: 10, 429: 190}
        for reply in replies:
            await reply.body()

        # 50 concurrent requests in one session
        provider.script = hold
        before = len(provider.requests)
        replies = await asyncio.gather(*(replicas.chat("Hi", "other") for _ in range(50)))
        assert Counter(reply.status for reply in replies) == {200: 1, 409: 49}
        await finish(await provider.wait_for_request(before))
        for reply in replies:
            await reply.body()


async def test_session_of_a_killed_replica_is_unlocked(
    upstream: StartUpstream, redis: RedisServer, tmp_path: Path
) -> None:
    provider = await upstream(echo)
    async with running_replicas(2, redis, tmp_path, provider.url) as replicas:
        await replicas.complete("one")
        await replicas.complete("two")
        provider.script = hold
        reply = await (await replicas.services[0].connect()).chat("lost", AUTH, session_id="mine")
        assert (await reply.event())["chunk"] == "You said "
        replicas.processes[0].kill()
        await replicas.processes[0].wait()
        provider.script = echo
        assert await (await replicas.chat("too early")).status_and_code() == (409, "session_busy")
        with redis.shell() as shell:
            [lock] = shell.scan_iter("chat:lock:*")
            assert 0 < int(str(shell.pttl(lock))) < 5000
        await replicas.complete("three")
        assert await replicas.stored_messages() == echoed("one", "two", "three")


async def test_replica_that_stalled_past_its_lease_stores_nothing(
    upstream: StartUpstream, redis: RedisServer, tmp_path: Path
) -> None:
    provider = await upstream(hold)
    async with running_replicas(2, redis, tmp_path, provider.url) as replicas:
        reply = await (await replicas.services[0].connect()).chat("lost", AUTH, session_id="mine")
        await reply.event()
        replicas.processes[0].send_signal(signal.SIGSTOP)
        # Not through the balancer, which could choose the stopped replica.
        other = Replicas(replicas.services[1], [], [])
        provider.script = echo
        await other.complete("stored")
        replicas.processes[0].send_signal(signal.SIGCONT)
        await finish(await provider.wait_for_request())
        ended = (await reply.events())[-1]
        assert (ended["status"], ended["error"]["code"]) == ("error", "state_unavailable")
        assert await replicas.stored_messages() == echoed("stored")


@dataclass
class PersistentClient:
    """A client that sends messages in spite of errors, and records which of them were done."""

    replicas: Replicas
    session_id: str
    sent: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    progress: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self) -> None:
        while True:
            message = f"message {len(self.sent)} of {self.session_id}"
            self.sent.append(message)
            reply = await self.replicas.chat(message, self.session_id)
            if reply.status != 200:
                assert await reply.status_and_code() in (
                    (503, "state_unavailable"),
                    # The lock of a turn that could not be stored, until its lease expires.
                    (409, "session_busy"),
                )
                await asyncio.sleep(0.05)
            elif (ended := (await reply.events())[-1])["status"] == "done":
                self.done.append(message)
                self.progress.set()
            else:
                assert ended["error"]["code"] == "state_unavailable"

    async def next_done(self) -> None:
        """Wait until one more message is done."""
        self.progress.clear()
        await self.progress.wait()

    async def check(self) -> None:
        """Check that each done message is stored, once, in order and with its response."""
        stored = await self.replicas.stored_messages(self.session_id)
        messages = [content for role, content, _ in stored if role == "user"]
        assert stored == echoed(*messages)
        assert messages == [message for message in self.sent if message in messages]
        assert set(self.done) <= set(messages)


async def test_restarts_of_redis_under_load_lose_no_turn_and_no_rate_limit(
    upstream: StartUpstream, redis: RedisServer, tmp_path: Path
) -> None:
    provider = await upstream(echo)
    admitted = 0
    limited = asyncio.Event()

    async def send_anonymous_requests(replicas: Replicas) -> None:
        """Send requests as an anonymous caller, whose limit is ten per hour."""
        nonlocal admitted
        while True:
            reply = await replicas.balancer.chat("Hi")
            admitted += reply.status == 200
            if reply.status == 429:
                limited.set()
            await reply.body()

    long_history = {"HISTORY_MAX_CHARS": "1000000"}
    async with running_replicas(2, redis, tmp_path, provider.url, **long_history) as replicas:
        clients = [PersistentClient(replicas, f"client-{n}") for n in range(6)]
        tasks = [asyncio.create_task(client.run()) for client in clients]
        tasks.append(asyncio.create_task(send_anonymous_requests(replicas)))
        for _ in range(3):
            await asyncio.gather(*(client.next_done() for client in clients))
            redis.kill()
            # Every replica notices.
            for replica in replicas.services:
                assert (await replica.get("/readyz")).status == 503
            redis.start()
        await asyncio.gather(*(client.next_done() for client in clients))
        await limited.wait()
        for task in tasks:
            assert not task.done() or task.result()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        # Each kill of Redis may fail one request whose token is already taken.
        assert 7 <= admitted <= 10
        for client in clients:
            await client.check()
