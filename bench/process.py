"""Programs under measurement: started on a core, asked until they answer, accounted by the kernel.

What a program costs is read from /proc, for all the processes it became.
"""

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
# The slowest peer takes 20 s on a slow machine.
START_SECONDS = 120.0
# How soon a program that listens is noticed.
POLL_SECONDS = 0.005
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Program:
    """A command, what it is told, and where it says that it is ready."""

    command: Sequence[str]
    port: int
    ready: str
    env: Mapping[str, str]


@dataclass(frozen=True)
class Running:
    """A program that has answered its first request with 200: after `wall` seconds and `cpu`
    seconds of processor time."""

    pid: int
    wall: float
    cpu: float

    def tree(self) -> list[int]:
        """The program's processes: its first, and all that came from it."""
        parents = {pid: int(fields[1]) for pid, fields in _stats().items()}
        found = [self.pid]
        for pid in found:
            found += [child for child, parent in parents.items() if parent == pid]
        return found

    def cpu_seconds(self) -> float:
        """Processor time so far, user and system, that of its ended children included."""
        stats = _stats()
        # proc(5): utime, stime, cutime, cstime; numbered from the state, which is 0 here.
        return sum(sum(map(int, stats[pid][11:15])) for pid in self.tree()) / TICKS

    def memory(self) -> int:
        """Bytes in memory that are its own; of what is shared with others, its share."""
        return sum(_memory(pid) for pid in self.tree())


def _stats() -> dict[int, list[str]]:
    """The fields of /proc/PID/stat from the third on, of every process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            found[int(path.parent.name)] = path.read_text().rpartition(")")[2].split()
    return found


def _memory(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return int(rollup.partition("\nPss:")[2].split()[0]) * 1024


@asynccontextmanager
async def running(program: Program, core: int, folder: Path) -> AsyncIterator[Running]:
    """The program on its core, until the block ends; what it prints is in `folder`."""
    began = time.monotonic()
    with (folder / "output.txt").open("ab") as output:
        process = await asyncio.create_subprocess_exec(
            *("taskset", "--cpu-list", str(core), *program.command),
            cwd=folder,
            env={"PATH": os.environ["PATH"], "HOME": str(folder), **program.env},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        await _answering(process, program, folder)
        wall = time.monotonic() - began
        yield Running(process.pid, wall, Running(process.pid, 0, 0).cpu_seconds())
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            process.kill()
        await process.wait()


async def _answering(process: asyncio.subprocess.Process, program: Program, folder: Path) -> None:
    """Return at its first 200. Raises RuntimeError if it ends instead, or says nothing."""
    deadline = time.monotonic() + START_SECONDS
    while process.returncode is None and time.monotonic() < deadline:
        with suppress(OSError, asyncio.IncompleteReadError):
            if b" 200 " in await _status(program):
                return
        await asyncio.sleep(POLL_SECONDS)
    said = (folder / "output.txt").read_text(errors="replace")[-2000:]
    raise RuntimeError(f"{program.command[0]} does not answer:\n{said}")


async def _status(program: Program) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", program.port)
    try:
        writer.write(f"GET {program.ready} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        return await reader.readuntil(b"\r\n")
    finally:
        writer.close()
