"""The real service on a real socket, in the test's own event loop, beside a scripted upstream."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
from starlette.types import ASGIApp, Message

from errors import Code, ServiceError
from providers import LLMProvider
from server import Drain, Server, listen
from service import create_app
from settings import from_env
from telemetry import JSONFormatter
from tests.client import CANARY, Client, Response
from tests.redis_server import RedisServer
from tests.upstream import Script, Upstream, running_upstream

# Longer than anything that is waited for here takes on the slowest machine.
TIMEOUT_SECONDS = 20.0


def raises(code: Code) -> pytest.RaisesExc[ServiceError]:
    """Expect a ServiceError with this code."""
    return pytest.raises(ServiceError, check=lambda error: error.code == code)


class Log(logging.Handler):
    """The log's lines as they would be printed, and parsed."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JSONFormatter())
        self.lines: list[str] = []
        self.leaked = False
        self._grown = asyncio.Condition()
        self._told: set[asyncio.Task[None]] = set()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))
        self.leaked |= CANARY in self.lines[-1]
        task = asyncio.get_running_loop().create_task(self._tell())
        self._told.add(task)
        task.add_done_callback(self._told.discard)

    async def _tell(self) -> None:
        async with self._grown:
            self._grown.notify_all()

    @property
    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    def requests(self) -> list[dict[str, Any]]:
        return [entry for entry in self.entries if entry["event"] == "request"]

    async def wait_for_request(self, number: int = 0) -> dict[str, Any]:
        """The line of the request of that number, waited for if it has not ended yet."""
        async with self._grown:
            await self._grown.wait_for(lambda: len(self.requests()) > number)
        return self.requests()[number]


@dataclass
class RunningService:
    """A service that listens, its log, and clients that are closed with it."""

    url: str
    log: Log
    clients: list[Client] = field(default_factory=list)

    async def connect(self, host: str | None = None) -> Client:
        client = await Client.connect(self.url, host)
        self.clients.append(client)
        return client

    async def chat(
        self, message: str = "Hello", host: str | None = None, **fields: Any
    ) -> Response:
        """A chat request on a connection of its own."""
        return await (await self.connect(host)).chat(message, **fields)

    async def get(self, path: str) -> Response:
        return await (await self.connect()).request("GET", path)

    async def metric(self, line: str) -> float:
        """The value of one line of /metrics, such as `chat_active_streams`."""
        text = (await (await self.get("/metrics")).body()).decode()
        values = [row.rpartition(" ")[2] for row in text.splitlines() if row.startswith(line)]
        return float(values[0]) if values else 0.0


@asynccontextmanager
async def running_service(env: dict[str, str], *more: LLMProvider) -> AsyncIterator[RunningService]:
    """The service with these variable_names, on a free port of 127.0.0.1. When the block ends it has to
    have given back every stream slot and task that requests of the block took."""
    assert env.get("OPENAI_API_KEY", CANARY) == CANARY, "another key is not looked for"
    before = asyncio.all_tasks()
    settings = from_env({"PORT": "0", "STATE_URL": "memory://", **env})
    handler = Log()
    log = logging.Logger("test")
    log.addHandler(handler)
    drain = Drain()
    server = Server(create_app(settings, log, drain, *more), settings, log, drain)
    server.config.load()
    server.lifespan = server.config.lifespan_class(server.config)
    listeners = listen(settings)
    await server.startup(listeners)
    port = server.servers[0].sockets[0].getsockname()[1]
    running = RunningService(f"http://127.0.0.1:{port}", handler)
    try:
        yield running
    finally:
        for client in running.clients:
            client.disconnect()
        for serving in server.servers:
            serving.close()
        for listener in listeners:
            listener.close()
        while server.server_state.tasks:
            await asyncio.wait(set(server.server_state.tasks))
        await server.lifespan.shutdown()
        await _end(asyncio.all_tasks() - before)
        assert not handler.leaked


async def run_lifespan(app: ASGIApp) -> None:
    """Start and end an app that no server runs: what it holds is closed."""
    said = iter(("lifespan.startup", "lifespan.shutdown"))

    async def receive() -> Message:
        return {"type": next(said)}

    async def send(message: Message) -> None:
        assert message["type"].endswith(".complete"), message

    await app({"type": "lifespan"}, receive, send)


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    """All of `tasks` end, but those in which the test's runner calls the test and its fixtures."""
    ours = {task for task in tasks if "TestRunner" not in repr(task.get_coro())}
    if ours:
        _, left = await asyncio.wait(ours, timeout=TIMEOUT_SECONDS)
        assert not left, left


StartService = Callable[..., Awaitable[RunningService]]
StartUpstream = Callable[[Script], Awaitable[Upstream]]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, bool]]:
    return "asyncio", {"use_uvloop": True}


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


@pytest.fixture
def service(stack: AsyncExitStack) -> StartService:
    """`await service(RATE_LIMIT="off")` starts one; it ends with the test."""

    async def start(*more: LLMProvider, **env: str) -> RunningService:
        return await stack.enter_async_context(running_service(env, *more))

    return start


@pytest.fixture
def upstream(stack: AsyncExitStack) -> StartUpstream:
    """`await upstream(script)` starts a scripted provider; it ends with the test."""

    async def start(script: Script) -> Upstream:
        return await stack.enter_async_context(running_upstream(script))

    return start


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One for all tests that neither stop nor fill it; they empty it before they use it."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.kill()
