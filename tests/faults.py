"""What every fault test needs: a service beside its scripted providers, and the proof that nothing
of a request is left when it has ended."""

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

from tests.client import CANARY, Client, Response
from tests.conftest import TIMEOUT_SECONDS, RunningService, running_service
from tests.upstream import Script, Upstream, running_upstream

SESSION = "mine"
# The status that a failure gets where nothing was sent before it.
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


# What is the caller's to change, or nobody's fault, is no news to an operator.
QUIET = {"done", "context_too_long", "content_refused", "shutting_down"}


def expected_level(ended: str) -> str:
    """How loudly the log tells of an answer that ended like this."""
    return "info" if ended in QUIET else "warning"


def provider_env(url: str) -> dict[str, str]:
    """One provider at `url`, asked once, and no limit in the way."""
    return {
        "OPENAI_API_KEY": CANARY,
        "OPENAI_BASE_URL": url,
        "RATE_LIMIT": "off",
        "MAX_RETRIES": "0",
    }


def count_open_files() -> int:
    """How many file descriptors this process holds."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a Path would be made of each


async def wait_for_open_files(before: int) -> None:
    """The event loop closes a socket a few turns after it was told to."""
    for _ in range(1000):
        if count_open_files() <= before:
            return
        await checkpoint()
    raise AssertionError(f"{count_open_files() - before} file descriptors are left over")


@dataclass
class Scenario:
    """A service and its providers, alone in the process."""

    app: RunningService
    upstreams: Sequence[Upstream]

    @property
    def upstream(self) -> Upstream:
        return self.upstreams[0]

    async def chat(self, **fields: Any) -> Response:
        """A chat in the one session, on a connection of its own."""
        return await self.app.chat(**{"session_id": SESSION, **fields})

    def chat_log_lines(self) -> list[dict[str, Any]]:
        """The log lines of chats so far."""
        lines = self.app.log.requests()
        return [line for line in lines if line["route"] == "/api/v1/chat"]

    async def wait_for_log_line(self, number: int = 0) -> dict[str, Any]:
        """The log line of the chat of that number, waited for."""
        await self.app.log.wait_for_request(number)
        while len(self.chat_log_lines()) <= number:
            await self.app.log.wait_for_request(len(self.app.log.requests()))
        return self.chat_log_lines()[number]

    async def read_responses(self) -> list[tuple[str, bool]]:
        """The answers that are stored, and whether each is complete."""
        reply = await self.app.get(f"/api/v1/sessions/{SESSION}")
        messages = (await reply.json()).get("messages", ())
        return [(m["content"], m["complete"]) for m in messages if m["role"] == "assistant"]

    async def assert_nothing_held(self) -> None:
        """No slot is taken, and the session is not locked: it can be deleted."""
        assert await self.app.metric("chat_active_streams") == 0
        reply = await (await self.app.connect()).request("DELETE", f"/api/v1/sessions/{SESSION}")
        assert reply.status in (204, 404)

    async def wait_for_upstreams_closed(self) -> None:
        """Every connection to a provider that was asked is closed."""
        for upstream in self.upstreams:
            for request in upstream.requests:
                await request.closed.wait()


@asynccontextmanager
async def run_scenario(*scripts: Script, **env: str) -> AsyncIterator[Scenario]:
    """A service whose providers follow the scripts: `openai`, then `b`, `c` and so on. Each is
    asked once, and no limit is in the way, unless `env` says so. After the block no connection and
    no file descriptor is left."""
    # A loop that listens for the first time keeps a descriptor in reserve.
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
            found = Scenario(app, upstreams)
            yield found
        await found.wait_for_upstreams_closed()
    await wait_for_open_files(before)


async def read_to_end(reply: Response) -> tuple[str, dict[str, Any]]:
    """The text of an answer and its one terminal event, after which nothing comes; or the body of
    an error of its own status."""
    if reply.status != 200:
        body: dict[str, Any] = await reply.json()
        assert body["id"] == reply.headers["x-request-id"]
        wait = body["error"]["retry_after"]
        assert reply.headers.get("retry-after") == (None if wait is None else str(wait))
        return "", {"status": "error", **body}
    *chunks, last = await reply.events()
    assert all(chunk.keys() == {"chunk", "id"} for chunk in chunks)
    assert last["status"] in ("done", "error")
    assert {each["id"] for each in (*chunks, last)} == {reply.headers["x-request-id"]}
    return "".join(chunk["chunk"] for chunk in chunks), last


def get_outcome(last: dict[str, Any]) -> str:
    """`done` or the error's code."""
    code: str = last["error"]["code"] if last["status"] == "error" else "done"
    return code


async def connect_slow_client(url: str) -> Client:
    """A client for which the kernel keeps little, and which reads nothing unless it is asked to."""
    parts = urlsplit(url)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
    return Client(*await asyncio.open_connection(sock=sock, limit=1))
