"""Scenarios of a service and scripted providers, which check that no request leaks resources."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import anyio
from anyio.lowlevel import checkpoint

from tests.client import Client, Response
from tests.conftest import TIMEOUT_SECONDS, RunningService, openai_env, running_service
from tests.upstream import Script, Upstream, running_upstream

SESSION = "mine"
# The HTTP status of each failure before the first chunk.
STATUS = {
    "upstream_error": 502,
    "upstream_incomplete": 502,
    "upstream_unavailable": 503,
    "upstream_timeout": 504,
    "context_too_long": 422,
    "content_refused": 422,
    "state_unavailable": 503,
    "shutting_down": 503,
}
# Outcomes that need no operator: success, errors that the caller has to fix, and a shutdown.
INFO_OUTCOMES = {"done", "context_too_long", "content_refused", "shutting_down"}


def expected_level(outcome: str) -> str:
    """Return the level of the log line of a stream with this outcome."""
    return "info" if outcome in INFO_OUTCOMES else "warning"


def provider_env(url: str) -> dict[str, str]:
    """Return settings with one provider at `url`, without retries and rate limit."""
    return openai_env(url, RATE_LIMIT="off")


def count_open_files() -> int:
    """Return the number of this process's open file descriptors."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - iterdir would add a Path for each


async def wait_for_open_files(limit: int) -> None:
    """Return when at most `limit` files are open: the event loop closes sockets a little later."""
    with anyio.move_on_after(TIMEOUT_SECONDS):
        while count_open_files() > limit:
            await checkpoint()
    excess = count_open_files() - limit
    assert excess <= 0, f"{excess} file descriptors were not closed"


@dataclass
class Scenario:
    """A service and its providers."""

    app: RunningService
    upstreams: Sequence[Upstream]

    @property
    def upstream(self) -> Upstream:
        return self.upstreams[0]

    async def chat(self, **fields: Any) -> Response:
        """Send a chat request in SESSION on a new connection."""
        return await self.app.chat(**{"session_id": SESSION, **fields})

    def chat_log_lines(self) -> list[dict[str, Any]]:
        """Return the log lines of the chat requests that have ended."""
        lines = self.app.log.requests()
        return [line for line in lines if line["route"] == "/api/v1/chat"]

    async def wait_for_log_line(self, number: int = 0) -> dict[str, Any]:
        """Return the log line of chat request `number`; wait until it is written."""
        while len(self.chat_log_lines()) <= number:
            await self.app.log.wait_for_request(len(self.app.log.requests()))
        return self.chat_log_lines()[number]

    async def read_responses(self) -> list[tuple[str, bool]]:
        """Return text and `complete` of each response stored in SESSION."""
        reply = await self.app.get(f"/api/v1/sessions/{SESSION}")
        messages = (await reply.json()).get("messages", ())
        return [(m["content"], m["complete"]) for m in messages if m["role"] == "assistant"]

    async def assert_nothing_held(self) -> None:
        """Check that no stream slot is in use and that SESSION can be deleted, so is not locked."""
        assert await self.app.metric("chat_active_streams") == 0
        reply = await (await self.app.connect()).request("DELETE", f"/api/v1/sessions/{SESSION}")
        assert reply.status in (204, 404)

    async def wait_for_upstreams_closed(self) -> None:
        """Return when every connection to a provider is closed."""
        for upstream in self.upstreams:
            for request in upstream.requests:
                await request.closed.wait()


@asynccontextmanager
async def run_scenario(*scripts: Script, **env: str) -> AsyncIterator[Scenario]:
    """Run a service whose providers `openai`, `b`, `c` and so on follow the scripts.

    There are no retries and no rate limit unless `env` sets them. On exit, checks that every
    connection and file descriptor is closed.
    """
    # The event loop reserves a file descriptor when it listens for the first time.
    loop = asyncio.get_running_loop()
    (await loop.create_server(asyncio.Protocol, "127.0.0.1", 0)).close()
    await checkpoint()
    before = count_open_files()
    async with AsyncExitStack() as stack:
        stack.enter_context(anyio.fail_after(TIMEOUT_SECONDS))
        upstreams = [await stack.enter_async_context(running_upstream(each)) for each in scripts]
        names = [chr(ord("a") + number) for number in range(1, len(scripts))]
        defaults = {**provider_env(upstreams[0].url), "PROVIDERS": ",".join(names)}
        for name, upstream in zip(names, upstreams[1:], strict=True):
            defaults[f"{name.upper()}_BASE_URL"] = upstream.url
        async with running_service({**defaults, **env}) as app:
            scenario = Scenario(app, upstreams)
            yield scenario
        await scenario.wait_for_upstreams_closed()
    await wait_for_open_files(before)


async def read_to_end(reply: Response) -> tuple[str, dict[str, Any]]:
    """Return a response's text and its terminal event. Check that nothing follows the event.

    For an error response the text is empty, and the error takes the place of the event.
    """
    if reply.status != 200:
        return "", {
            "status": "error",
            "id": reply.headers["x-request-id"],
            "error": await reply.error(),
        }
    *chunks, last = await reply.events()
    assert all(chunk.keys() == {"chunk", "id"} for chunk in chunks)
    assert last["status"] in ("done", "error")
    assert {each["id"] for each in (*chunks, last)} == {reply.headers["x-request-id"]}
    return "".join(chunk["chunk"] for chunk in chunks), last


def get_outcome(last: dict[str, Any]) -> str:
    """Return "done" or the error code of a terminal event."""
    code: str = last["error"]["code"] if last["status"] == "error" else "done"
    return code


async def connect_slow_client(url: str) -> Client:
    """Return a client that buffers 4 KiB in the kernel and nothing itself until it reads.

    Its small segments let the service's kernel buffer 100 kB for it. On loopback, 3 MB are usual.
    """
    parts = urlsplit(url)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1460)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
    return Client(*await asyncio.open_connection(sock=sock, limit=1))
