"""Several processes behind a real load balancer, with one Redis: they are one service, also while
one of them, or Redis, dies."""

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
from tests.conftest import Log, RunningService, StartUpstream
from tests.redis_server import RedisServer, free_port, program
from tests.test_conversations import answered, classify_error, on_session, repeat, sent
from tests.test_kill import running_process
from tests.test_redis_state import finish, hold
from tests.test_service import openai

pytestmark = pytest.mark.slow

NGINX = Path(__file__).parent.parent / "deploy" / "nginx.scale.conf"
KEY = "key-of-0123456789abcdefghij"
AUTH = {"authorization": f"Bearer {KEY}"}
# A process whose clock is an hour ahead.
AHEAD = """
import time
real = time.time
time.time = lambda: real() + 3600
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
    """The address of the load balancer, and those behind it."""

    balancer: RunningService
    each: list[RunningService]
    processes: list[Process]

    async def chat(self, message: str, session_id: str | None = "mine") -> Response:
        client = await self.balancer.connect()
        return await client.chat(message, AUTH, session_id=session_id)

    async def done(self, message: str) -> None:
        """Says this as often as the session is busy, which it is until a lease is over."""
        reply = await self.chat(message)
        while reply.status == 409:
            await asyncio.sleep(0.1)
            reply = await self.chat(message)
        assert (await reply.events())[-1]["status"] == "done"

    async def remembered(self, session_id: str = "mine") -> list[tuple[str, str, bool]]:
        view = await (await on_session(self.balancer, "GET", session_id, AUTH)).json()
        return [(each["role"], each["content"], each["complete"]) for each in view["messages"]]


@asynccontextmanager
async def balancing(directory: Path, urls: list[str]) -> AsyncIterator[RunningService]:
    """nginx, as deploy/ sets it up, before these."""
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
        program("nginx"), "-p", directory, "-c", config, "-e", "stderr"
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
    count: int, redis: RedisServer, directory: Path, url: str, **more: str
) -> AsyncIterator[Replicas]:
    """So many, every second one with a clock that is an hour ahead."""
    env = {
        "STATE_URL": redis.url,
        "FORWARDED_ALLOW_IPS": "127.0.0.1",
        "RATE_LIMIT": "10/hour",
        "RATE_LIMIT_API_KEY": "off",
        "API_KEYS": f"app:{KEY}",
        **openai(url, **more),
    }
    async with AsyncExitStack() as stack:
        started = [
            await stack.enter_async_context(
                running_process(
                    directory / "no.db", env, ("-c", AHEAD) if number % 2 else ("-m", "service")
                )
            )
            for number in range(count)
        ]
        each = [running for running, _ in started]
        balancer = await stack.enter_async_context(
            balancing(directory, [running.url for running in each])
        )
        yield Replicas(balancer, each, [process for _, process in started])


@pytest.mark.parametrize("count", [2, 4])
async def test_any_number_of_replicas_are_one_service(
    upstream: StartUpstream, redis: RedisServer, tmp_path: Path, count: int
) -> None:
    provider = await upstream(repeat)
    async with running_replicas(count, redis, tmp_path, provider.url) as replicas:
        words = [f"number {n}" for n in range(3 * count)]
        for word in words:
            await replicas.done(word)
        assert await replicas.remembered() == answered(*words)
        last = provider.requests[-1].body["messages"]
        assert last == sent(*answered(*words[:-1]), ("user", words[-1], True))
        for replica in replicas.each:
            assert await replica.metric('chat_requests_total{outcome="done",route="/api/v1/chat"')
        view = await (await on_session(replicas.balancer, "GET", "mine", AUTH)).json()
        for shown in (view["created_at"], *(each["created_at"] for each in view["messages"])):
            age = datetime.now(UTC) - datetime.fromisoformat(shown)
            assert abs(age) < timedelta(minutes=10)

        # 200 at once from one address
        replies = await asyncio.gather(*(replicas.balancer.chat("Hi") for _ in range(200)))
        assert Counter(reply.status for reply in replies) == {200: 10, 429: 190}
        for reply in replies:
            await reply.body()

        # 50 at once in one session
        provider.script = hold
        before = len(provider.requests)
        replies = await asyncio.gather(*(replicas.chat("Hi", "other") for _ in range(50)))
        assert Counter(reply.status for reply in replies) == {200: 1, 409: 49}
        await finish(await provider.wait_for_request(before))
        for reply in replies:
            await reply.body()


async def test_a_replica_that_is_killed_in_the_middle_of_an_answer_frees_its_session(
    upstream: StartUpstream, redis: RedisServer, tmp_path: Path
) -> None:
    provider = await upstream(repeat)
    async with running_replicas(2, redis, tmp_path, provider.url) as replicas:
        await replicas.done("one")
        await replicas.done("two")
        provider.script = hold
        reply = await (await replicas.each[0].connect()).chat("lost", AUTH, session_id="mine")
        assert (await reply.event())["chunk"] == "You said "
        replicas.processes[0].kill()
        await replicas.processes[0].wait()
        provider.script = repeat
        assert await classify_error(await replicas.chat("too early")) == (409, "session_busy")
        with redis.shell() as shell:
            [lock] = shell.scan_iter("chat:lock:*")
            assert 0 < int(str(shell.pttl(lock))) < 5000
        await replicas.done("three")
        assert await replicas.remembered() == answered("one", "two", "three")


async def test_a_replica_that_stalls_past_its_lease_stores_nothing(
    upstream: StartUpstream, redis: RedisServer, tmp_path: Path
) -> None:
    provider = await upstream(hold)
    async with running_replicas(2, redis, tmp_path, provider.url) as replicas:
        reply = await (await replicas.each[0].connect()).chat("lost", AUTH, session_id="mine")
        await reply.event()
        replicas.processes[0].send_signal(signal.SIGSTOP)
        # What is to come through the balancer must not wait for the one that stands still.
        other = Replicas(replicas.each[1], [], [])
        provider.script = repeat
        await other.done("kept")
        replicas.processes[0].send_signal(signal.SIGCONT)
        await finish(await provider.wait_for_request())
        ended = (await reply.events())[-1]
        assert (ended["status"], ended["error"]["code"]) == ("error", "state_unavailable")
        assert await replicas.remembered() == answered("kept")


@dataclass
class Talker:
    """A client that goes on talking whatever happens, and remembers what it was told is done."""

    replicas: Replicas
    name: str
    asked: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    heard: asyncio.Event = field(default_factory=asyncio.Event)

    async def talk(self) -> None:
        while True:
            message = f"{self.name} says number {len(self.asked)}"
            self.asked.append(message)
            reply = await self.replicas.chat(message, self.name)
            if reply.status != 200:
                assert await classify_error(reply) in (
                    (503, "state_unavailable"),
                    # The lock of an answer that could not be stored, until its lease is over.
                    (409, "session_busy"),
                )
                await asyncio.sleep(0.05)
            elif (ended := (await reply.events())[-1])["status"] == "done":
                self.done.append(message)
                self.heard.set()
            else:
                assert ended["error"]["code"] == "state_unavailable"

    async def go_on(self) -> None:
        """Returns when one more is done."""
        self.heard.clear()
        await self.heard.wait()

    async def check(self) -> None:
        """Nothing that was done is lost, nothing is there twice, or out of order, or half."""
        kept = await self.replicas.remembered(self.name)
        messages = [content for role, content, _ in kept if role == "user"]
        assert kept == answered(*messages)
        assert messages == [message for message in self.asked if message in messages]
        assert set(self.done) <= set(messages)


async def test_redis_killed_and_started_again_under_load_loses_no_turn_and_lifts_no_limit(
    upstream: StartUpstream, redis: RedisServer, tmp_path: Path
) -> None:
    provider = await upstream(repeat)
    let_through = 0

    async def knock(replicas: Replicas) -> None:
        """An anonymous caller, who may ask ten times an hour."""
        nonlocal let_through
        while True:
            reply = await replicas.balancer.chat("Hi")
            let_through += reply.status == 200
            await reply.body()

    roomy = {"HISTORY_MAX_CHARS": "1000000"}
    async with running_replicas(2, redis, tmp_path, provider.url, **roomy) as replicas:
        talkers = [Talker(replicas, f"talker-{n}") for n in range(6)]
        tasks = [asyncio.create_task(talker.talk()) for talker in talkers]
        tasks.append(asyncio.create_task(knock(replicas)))
        for _ in range(3):
            await asyncio.gather(*(talker.go_on() for talker in talkers))
            redis.kill()
            # Until all have noticed.
            for replica in replicas.each:
                assert (await replica.get("/readyz")).status == 503
            redis.start()
        await asyncio.gather(*(talker.go_on() for talker in talkers))
        for task in tasks:
            assert not task.done() or task.result()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert let_through == 10
        for talker in talkers:
            await talker.check()
