"""A real Redis on a free port, which a test may kill, pause and fill; and a slow way to it."""

import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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
        self.process.communicate()

    def shell(self) -> Redis:
        """An operator's connection."""
        return Redis(port=self.port, decode_responses=True, protocol=2)
