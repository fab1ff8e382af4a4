"""Start a measured program on one core, wait until it serves, and read its CPU time and memory."""

import asyncio
import os
import subprocess
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# The slowest peer starts in 20 s on a slow machine.
START_SECONDS = 120.0
POLL_SECONDS = 0.005
STOP_SECONDS = 10.0


@dataclass(frozen=True)
class Program:
    """A command, its environment, and the URL path that returns 200 once it serves."""

    command: Sequence[str]
    env: Mapping[str, str]
    port: int
    health_path: str


@dataclass(frozen=True)
class Process:
    """A running program. All programs measured here are single processes."""

    pid: int
    # CPU time until the program served.
    start_cpu_seconds: float = 0.0

    def cpu_seconds(self) -> float:
        """Return the CPU time (user and system) of all threads so far.

        Reads the process's CPU clock (clock_getcpuclockid(3)): /proc has 10 ms resolution only.
        """
        return time.clock_gettime((~self.pid << 3) | 2)

    def memory(self) -> int:
        """Return the proportional set size in bytes: private memory and a share of the shared."""
        rollup = Path(f"/proc/{self.pid}/smaps_rollup").read_text()
        return int(rollup.partition("\nPss:")[2].split()[0]) * 1024


@asynccontextmanager
async def running(program: Program, core: int, folder: Path) -> AsyncIterator[Process]:
    """Run the program on one core, with `folder` as its directory, until the block ends.

    Raises RuntimeError with the end of its output if it does not start.
    """
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
        deadline = time.monotonic() + START_SECONDS
        while not await _healthy(program):
            if process.returncode is not None or time.monotonic() > deadline:
                text = (folder / "output.txt").read_text(errors="replace")[-2000:]
                raise RuntimeError(f"{program.command[0]} did not start:\n{text}")
            await asyncio.sleep(POLL_SECONDS)
        yield Process(process.pid, Process(process.pid).cpu_seconds())
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), STOP_SECONDS)
            process.kill()
        await process.wait()


async def _healthy(program: Program) -> bool:
    with suppress(OSError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_connection("127.0.0.1", program.port)
        try:
            writer.write(f"GET {program.health_path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            return b" 200 " in await reader.readuntil(b"\r\n")
        finally:
            writer.close()
    return False
