"""The service under many clients at once, with faults, leavings and slow readers drawn at random.

`python -m tests.soak` sends 20,000 requests over 200 connections, in no less than three minutes;
`make soak` runs it. All is drawn from one seed, bounded in count and time, and stays on loopback.
"""

import argparse
import asyncio
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import h11

from tests.client import Client
from tests.conftest import RunningService, running_service
from tests.faults import count_open_files, get_outcome, provider_env, read_to_end
from tests.test_kill import running_process
from tests.upstream import Connection, Upstream, delta, http_chunk, response, running_upstream

# What a provider may do, by the message it is asked with, and how that may end. None of it is our
# own defect, so no chat is ever answered 500.
FAULTS = {
    "answers": {"done"},
    "answers slowly": {"done"},
    "resets": {"upstream_error"},
    "hangs up": {"upstream_error"},
    "breaks off": {"upstream_error"},
    "ends early": {"upstream_incomplete"},
    "is silent": {"upstream_timeout"},
    "stops": {"upstream_timeout"},
    "is busy": {"upstream_unavailable"},
    "refuses": {"upstream_error"},
    "talks nonsense": {"upstream_error"},
    "floods": {"upstream_error", "client_stalled"},
}
WEIGHTS = (60, 10, 3, 3, 4, 4, 1, 1, 4, 4, 4, 0.2)
# What is waited for, in whole or in part: by default so long that a machine that is busy with 200
# clients and their service at once is not taken for a silent provider.
WAITS = (
    "FIRST_TOKEN_TIMEOUT_SECONDS",
    "IDLE_TIMEOUT_SECONDS",
    "WRITE_TIMEOUT_SECONDS",
    "BODY_TIMEOUT_SECONDS",
)
LIMITS = {
    "HEARTBEAT_SECONDS": "0.3",
    "MAX_STREAMS_PER_CALLER": "1000",
    "HISTORY_MAX_CHARS": "2000",
}


async def provider(request: Connection) -> None:
    """Does what the message says."""
    # So uvloop calls writing to a connection that was reset.
    with suppress(RuntimeError):
        await _play(request)


async def _play(request: Connection) -> None:
    fault = request.body["messages"][-1]["content"]
    match fault:
        case "answers":
            await request.complete("Hel", "lo")
        case "answers slowly":
            await request.stream(delta("Hel"))
            with anyio.move_on_after(0.05):
                await request.closed.wait()
                return
            await request.send_events(delta("lo", finish_reason="stop"), b"data: [DONE]\n\n")
            await request.send(b"0\r\n\r\n")
        case "resets":
            request.reset()
        case "hangs up":
            request.writer.close()
        case "breaks off":
            await request.stream(delta("Hel"))
            request.writer.close()
        case "ends early":
            await request.stream(delta("Hel"))
            await request.send(b"0\r\n\r\n")
        case "is silent":
            await request.closed.wait()
        case "stops":
            await request.stream(delta("Hel"))
            await request.closed.wait()
        case "is busy":
            await request.send(response(429, b"{}", "retry-after: 1"))
        case "refuses":
            await request.send(response(400, b"<html>no</html>", "content-type: text/html"))
        case "talks nonsense":
            await request.stream(delta("Hel"), b"data: [1]\n\n")
            await request.closed.wait()
        case _:
            await request.stream()
            part = http_chunk(delta("x" * 1000)) * 50
            while not request.closed.is_set():
                await request.send(part)


@dataclass
class Soak:
    """The clients' side: how many chats ended how, as far as a client can know."""

    app: RunningService
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)
    asked: int = 0

    async def client(self, number: int, deadline: float, requests: int) -> None:
        """One connection, made anew when it is lost; `requests` chats, spread to the deadline."""
        draw = random.Random(self.seed * 100_003 + number)
        clock = asyncio.get_running_loop().time
        client: Client | None = None
        for left in range(requests, 0, -1):
            if client is None:
                client = await self.app.connect()
            if not await self.chat(client, draw, f"soak-{number}-{draw.randrange(3)}"):
                client.disconnect()
                self.app.clients.remove(client)
                client = None
            spare = (deadline - clock()) / left
            if spare > 0:
                await anyio.sleep(spare * draw.random())

    async def chat(self, client: Client, draw: random.Random, session: str) -> bool:
        """One chat; whether its connection can be used for another."""
        [fault] = draw.choices(list(FAULTS), WEIGHTS)
        manner = draw.choices(("polite", "leaves", "slow", "half a body"), (90, 6, 3, 1))[0]
        self.asked += 1
        if manner == "half a body":
            client.writer.write(
                b"POST /api/v1/chat HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n"
                b"content-type: application/json\r\n\r\n{"
            )
            reply = await client.head()
            _, last = await read_to_end(reply)
            self.note("half a body", reply.status, get_outcome(last), {"request_timeout"})
            return False
        try:
            with anyio.move_on_after(draw.random() * 0.1 if manner == "leaves" else None) as stay:
                reply = await client.chat(fault, session_id=session)
                if manner == "slow":
                    await anyio.sleep(draw.random())
                _, last = await read_to_end(reply)
        except (ConnectionError, h11.RemoteProtocolError, AssertionError) as error:
            # Cut, as one who does not read is; else it is a defect.
            if manner != "slow":
                self.unexpected.append(f"{fault}: {error!r}")
            self.counts["lost"] += 1
            return False
        if stay.cancelled_caught:
            self.counts["left"] += 1
            return False
        # A session of a client that left a moment ago may still be being stored.
        self.note(fault, reply.status, get_outcome(last), {*FAULTS[fault], "session_busy"})
        return reply.ended and reply.headers.get("connection") != "close"

    def note(self, fault: str, status: int, ended: str, expected: set[str]) -> None:
        self.counts[ended] += 1
        if status == 500 or ended not in expected:
            self.unexpected.append(f"{fault}: {status} {ended}")

    async def agree(self) -> None:
        """The service counts what the clients count. Of one that left, only the service knows
        whether it was too late to be told."""
        while await self.app.metric("chat_active_streams"):
            pass
        counted: Counter[str] = Counter()
        text = (await (await self.app.get("/metrics")).body()).decode()
        for row in text.splitlines():
            if row.startswith("chat_requests_total{") and 'route="/api/v1/chat"' in row:
                name = row.partition('outcome="')[2].partition('"')[0]
                counted[name] += int(float(row.rpartition(" ")[2]))
        assert counted.total() == self.asked == self.counts.total(), (counted, self.counts)
        known = {name: count for name, count in self.counts.items() if name not in ("left", "lost")}
        for name, count in known.items():
            assert count <= counted[name], (name, counted, self.counts)
        assert counted["internal_error"] == 0


Counts = dict[str, int]
# How much the resident memory may grow after the first quarter, for what the allocator keeps.
NOISE_KIB = 32 * 1024


def here() -> Counts:
    """What a service in this process holds."""
    return {"tasks": len(asyncio.all_tasks()), "descriptors": count_open_files()}


def there(process: int) -> Counts:
    """What a process holds: its descriptors, and its resident memory."""
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    files = len(os.listdir(f"/proc/{process}/fd"))  # noqa: PTH208 - a Path would be made of each
    return {"descriptors": files, "KiB": pages * os.sysconf("SC_PAGE_SIZE") // 1024}


async def settled(app: RunningService, measure: Callable[[], Counts]) -> Counts:
    """What is held once nothing runs any more."""
    for client in app.clients:
        client.disconnect()
    app.clients.clear()
    app.log.lines.clear()
    await anyio.sleep(0.3)
    return measure()


@dataclass(frozen=True)
class Size:
    """How many chats, over how many connections, in how many seconds, drawn from which seed."""

    requests: int
    connections: int
    seconds: float
    seed: int


async def soak(
    app: RunningService, provider: Upstream, size: Size, measure: Callable[[], Counts]
) -> str:
    """Raises AssertionError at the first thing that is not as it should be; else what was seen."""
    started = time.monotonic()
    soaking = Soak(app, size.seed)

    async def run(count: int, span: float) -> None:
        deadline = asyncio.get_running_loop().time() + span
        async with anyio.create_task_group() as tasks:
            for number in range(size.connections):
                share = count // size.connections + (number < count % size.connections)
                tasks.start_soon(soaking.client, number, deadline, share)

    # What is made once (pools, caches) is made in the first quarter.
    first = size.requests // 4
    await run(first, size.seconds / 4)
    provider.requests.clear()
    warm = await settled(app, measure)
    await run(size.requests - first, size.seconds * 3 / 4)
    provider.requests.clear()
    await soaking.agree()
    end = await settled(app, measure)
    assert soaking.unexpected == [], Counter(soaking.unexpected)
    for name, count in end.items():
        # Each client may have left an idle connection to the provider.
        noise = NOISE_KIB if name == "KiB" else size.connections
        assert count <= warm[name] + noise, f"{name}: {warm} then {end}"
    took = time.monotonic() - started
    return (
        f"seed {size.seed}: {soaking.asked} chats over {size.connections} connections in"
        f" {took:.0f} s; {dict(soaking.counts)}; after a quarter {warm}, at the end {end}"
    )


def environment(upstream: Upstream, patience: float) -> dict[str, str]:
    return {**provider_env(upstream.url), **LIMITS, **dict.fromkeys(WAITS, str(patience))}


async def soak_here(size: Size, patience: float) -> str:
    """The service in this process, where its tasks can be counted."""
    async with (
        running_upstream(provider) as upstream,
        running_service(environment(upstream, patience)) as app,
    ):
        return await soak(app, upstream, size, here)


async def soak_process(size: Size, patience: float) -> str:
    """The service in a process of its own, which has to end by itself afterwards."""
    with TemporaryDirectory() as directory:
        file = Path(directory, "chat.db")
        async with running_upstream(provider) as upstream:
            env = environment(upstream, patience)
            async with running_process(file, env) as (app, process):
                told = await soak(app, upstream, size, lambda: there(process.pid))
                process.terminate()
                assert await process.wait() == 0
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--connections", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=200.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    size = Size(**vars(options))
    told = anyio.run(soak_process, size, 5.0, backend_options={"use_uvloop": True})
    sys.stdout.write(f"{told}\n")


if __name__ == "__main__":
    main()
