"""A real Redis on a free port that a test can kill, pause and fill, and a slow proxy before it."""

import asyncio
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from threading import Thread

import pytest
from redis import Redis


def find_program(name: str) -> str:
    """Return the program's path. If it is not installed, skip the test, or fail it in CI."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if path is None and os.environ.get("CI"):
        pytest.fail(f"{name} is not installed")
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class RedisServer:
    """A `redis-server` process.

    It writes every change to its append-only file at once, so a kill loses nothing.
    """

    directory: Path
    options: Sequence[str] = ()
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        command = [find_program("redis-server"), "--bind", "127.0.0.1", "--port", str(self.port)]
        command += ["--dir", str(self.directory), "--save", "", "--appendonly", "yes"]
        command += ["--appendfsync", "always", *self.options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            lines.append(line)
            if "Ready to accept connections" in line:
                return
        raise AssertionError("".join(lines))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def shell(self) -> Redis:
        """Return a connection as an operator's redis-cli has it."""
        return Redis(port=self.port, decode_responses=True, protocol=2)

    @asynccontextmanager
    async def paused(self, seconds: float) -> AsyncIterator[None]:
        """Let the server reply to no client for so many seconds, longer than the block takes."""
        with self.shell() as shell:
            shell.client_pause(round(seconds * 1000))
            pong = asyncio.create_task(asyncio.to_thread(shell.ping))
            yield
            assert not pong.done()
            await pong

    @contextmanager
    def full(self) -> Iterator[None]:
        """Let the server be out of memory while the block runs."""
        with self.shell() as shell:
            shell.config_set("maxmemory", 1)
            try:
                yield
            finally:
                shell.config_set("maxmemory", 0)


@dataclass
class Relay:
    """A TCP proxy that delays replies by `delay` seconds and, while `dropping`, drops all data."""

    port: int
    delay: float = 0.0
    dropping: bool = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replies, requests = await asyncio.open_connection("127.0.0.1", self.port)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._forward(reader, requests, delayed=False))
            tasks.create_task(self._forward(replies, writer, delayed=True))

    async def _forward(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, delayed: bool
    ) -> None:
        try:
            while data := await reader.read(65536):
                await asyncio.sleep(self.delay if delayed else 0)
                if not self.dropping:
                    writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()


@contextmanager
def running_relay(port: int) -> Iterator[tuple[Relay, str]]:
    """Run a proxy before the Redis at `port`, and yield it with its Redis URL.

    It runs in a thread of its own, because the service blocks its event loop while it starts.
    """
    relay = Relay(port)
    started: Queue[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Queue()

    async def run() -> None:
        stopped = asyncio.Event()
        server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
        started.put((asyncio.get_running_loop(), stopped, server.sockets[0].getsockname()[1]))
        await stopped.wait()
        server.close()

    thread = Thread(target=asyncio.run, args=(run(),))
    thread.start()
    loop, stopped, listening_port = started.get()
    try:
        yield relay, f"redis://127.0.0.1:{listening_port}/0"
    finally:
        loop.call_soon_threadsafe(stopped.set)
        thread.join()
