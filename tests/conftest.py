"""Fixtures: the service on a real socket, in the test's own event loop, and scripted providers."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import hypothesis
import pytest
from starlette.types import ASGIApp, Message

from errors import Code, ServiceError
from providers import LLMProvider
from server import Drain, Server, listen
from service import create_app, log_start
from settings import from_env
from telemetry import JSONFormatter
from tests.client import CANARY, Client, Response
from tests.redis_server import RedisServer
from tests.upstream import Script, Upstream, running_upstream

# Only a hang takes this long, on a busy machine too. Less than half of faulthandler_timeout in
# pyproject.toml, so that a hanging test fails instead of ending the run.
TIMEOUT_SECONDS = 80.0
# Hypothesis would report examples that are slow on a busy machine as failures.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")


def raises(code: Code) -> pytest.RaisesExc[ServiceError]:
    """Expect a ServiceError with this code."""
    return pytest.raises(ServiceError, check=lambda error: error.code == code)


def openai_env(url: str, **more: str) -> dict[str, str]:
    """Return settings with one provider at `url`, without retries, and `more`."""
    return {"OPENAI_API_KEY": CANARY, "OPENAI_BASE_URL": url, "MAX_RETRIES": "0", **more}


class Log(logging.Handler):
    """A handler that keeps the JSON lines of a service's log."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JSONFormatter())
        self.lines: list[str] = []
        self.contains_key = False
        self._changed = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
        self.contains_key |= CANARY in self.lines[-1]
        self._changed.set()

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def requests(self) -> list[dict[str, Any]]:
        """Return the request lines so far, in the order in which the requests ended."""
        return [entry for entry in self.entries if entry["event"] == "request"]

    async def wait_for_request(self, number: int = 0) -> dict[str, Any]:
        """Return request line `number`; wait until it is written."""
        while len(self.requests()) <= number:
            self._changed.clear()
            await self._changed.wait()
        return self.requests()[number]


@dataclass
class RunningService:
    """A service that accepts connections, its log, and its clients, which are closed with it."""

    url: str
    log: Log
    clients: list[Client] = field(default_factory=list)
    drain: Drain = field(default_factory=Drain)

    async def connect(self, host: str | None = None) -> Client:
        """Open a connection, from loopback address `host` if given."""
        client = await Client.connect(self.url, host)
        self.clients.append(client)
        return client

    async def chat(
        self, message: str = "Hello", host: str | None = None, **fields: Any
    ) -> Response:
        """Send a chat request on a new connection."""
        return await (await self.connect(host)).chat(message, **fields)

    async def get(self, path: str) -> Response:
        """Send a GET request on a new connection."""
        return await (await self.connect()).request("GET", path)

    async def metric(self, series: str) -> float:
        """Return the value of the first series of /metrics that starts with `series`, or 0."""
        text = (await (await self.get("/metrics")).body()).decode()
        values = [row.rpartition(" ")[2] for row in text.splitlines() if row.startswith(series)]
        return float(values[0]) if values else 0.0


@asynccontextmanager
async def running_service(env: dict[str, str], *more: LLMProvider) -> AsyncIterator[RunningService]:
    """Run a service with the settings in `env` on a free port of 127.0.0.1.

    `more` are providers beside those of the settings. On exit, fails if a task that the service or
    a request started does not end, or if the provider's key is in the log.
    """
    assert env.get("OPENAI_API_KEY", CANARY) == CANARY, "tests search their output for CANARY only"
    before = asyncio.all_tasks()
    settings = from_env({"PORT": "0", "STATE_URL": "memory://", **env})
    handler, log = create_log()
    drain = Drain()
    app = create_app(settings, log, drain, *more)
    server = Server(
        app,
        settings,
        log,
        drain,
        on_started=partial(log_start, log, settings),
        on_malformed=app.report_malformed,
    )
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    listeners = listen(settings)
    await server.startup(listeners)
    running = RunningService(server.url, handler, drain=drain)
    try:
        yield running
    finally:
        for client in running.clients:
            client.disconnect()
        for accepting in server.servers:
            accepting.close()
        for listener in listeners:
            listener.close()
        while server.server_state.tasks:
            await asyncio.wait(set(server.server_state.tasks))
        await server.lifespan.shutdown()
        await _wait_for_end(asyncio.all_tasks() - before)
        assert not handler.contains_key


def create_log() -> tuple[Log, logging.Logger]:
    """Return a logger outside the logging hierarchy, and the handler that keeps its lines."""
    handler = Log()
    log = logging.Logger("test")
    log.addHandler(handler)
    return handler, log


async def run_lifespan(app: ASGIApp) -> None:
    """Run startup and shutdown of an app that no server runs, to close its resources."""
    messages = iter(("lifespan.startup", "lifespan.shutdown"))

    async def receive() -> Message:
        return {"type": next(messages)}

    async def send(message: Message) -> None:
        assert message["type"].endswith(".complete"), message

    await app({"type": "lifespan"}, receive, send)


async def _wait_for_end(tasks: set[asyncio.Task[Any]]) -> None:
    # The test and its fixtures run in tasks of anyio's test runner, which go on.
    started = {task for task in tasks if "TestRunner" not in repr(task.get_coro())}
    if started:
        _, running = await asyncio.wait(started, timeout=TIMEOUT_SECONDS)
        assert not running, running


StartService = Callable[..., Awaitable[RunningService]]
StartUpstream = Callable[[Script], Awaitable[Upstream]]
StartRelay = Callable[..., Awaitable[tuple[RunningService, Upstream]]]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def service(stack: AsyncExitStack) -> StartService:
    """Return a function that starts a service until the test ends: `service(RATE_LIMIT="off")`."""

    async def start(*more: LLMProvider, **env: str) -> RunningService:
        return await stack.enter_async_context(running_service(env, *more))

    return start


@pytest.fixture
def upstream(stack: AsyncExitStack) -> StartUpstream:
    """Return a function that starts a scripted provider until the test ends."""

    async def start(script: Script) -> Upstream:
        return await stack.enter_async_context(running_upstream(script))

    return start


@pytest.fixture
def relay(service: StartService, upstream: StartUpstream) -> StartRelay:
    """Return a function that starts a scripted provider and a service in front of it:
    `app, provider = await relay(script, HEARTBEAT_SECONDS="1")`."""

    async def start(script: Script, **env: str) -> tuple[RunningService, Upstream]:
        provider = await upstream(script)
        return await service(**openai_env(provider.url, **env)), provider

    return start


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis for all tests that neither stop nor fill it. Each empties it first."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()
