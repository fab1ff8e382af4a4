"""A real Redis on a free port, which a test may kill, pause and fill; and a slow way to it."""

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


def program(name: str) -> str:
    """Where the program is. Without it a test is skipped at home, and fails in CI."""
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
    """`redis-server`, which writes every change to its directory's append-only file at once, so
    that it knows after a kill what it knew before."""

    directory: Path
    options: Sequence[str] = ()
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        """Returns when it serves."""
        command = [program("redis-server"), "--bind", "127.0.0.1", "--port", str(self.port)]
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
        """An operator's connection."""
        return Redis(port=self.port, decode_responses=True, protocol=2)

    @asynccontextmanager
    async def paused(self, seconds: float) -> AsyncIterator[None]:
        """It answers nobody for so long, which is longer than the block may take."""
        with self.shell() as shell:
            shell.client_pause(round(seconds * 1000))
            pong = asyncio.create_task(asyncio.to_thread(shell.ping))
            yield
            assert not pong.done()
            await pong

    @contextmanager
    def full(self) -> Iterator[None]:
        """It has no memory left while the block runs."""
        with self.shell() as shell:
            shell.config_set("maxmemory", 1)
            try:
                yield
            finally:
                shell.config_set("maxmemory", 0)


@dataclass
class Relay:
    """A way to a port that takes its time: what the server says is held back for `delay` seconds,
    or for ever while `dropping`."""

    port: int
    delay: float = 0.0
    dropping: bool = False

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.port)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pass(reader, back, 0))
            tasks.create_task(self._pass(there, writer, 1))

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, late: int
    ) -> None:
        try:
            while data := await reader.read(65536):
                await asyncio.sleep(self.delay * late)
                if not self.dropping:
                    writer.write(data)
        except ConnectionError:
            pass
        finally:
            writer.close()


@contextmanager
def running_relay(port: int) -> Iterator[tuple[Relay, str]]:
    """A relay to that port, and the URL of a Redis at its end; in a thread of its own, for the
    service waits at its start without its event loop."""
    relay = Relay(port)
    told: Queue[tuple[asyncio.AbstractEventLoop, asyncio.Event, int]] = Queue()

    async def run() -> None:
        over = asyncio.Event()
        server = await asyncio.start_server(relay.serve, "127.0.0.1", 0)
        told.put((asyncio.get_running_loop(), over, server.sockets[0].getsockname()[1]))
        await over.wait()
        server.close()

    thread = Thread(target=asyncio.run, args=(run(),))
    thread.start()
    loop, over, listening = told.get()
    try:
        yield relay, f"redis://127.0.0.1:{listening}/0"
    finally:
        loop.call_soon_threadsafe(over.set)
        thread.join()
