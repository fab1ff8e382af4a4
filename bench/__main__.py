"""`python -m bench`: measure the service beside its peers and print the ratios.

The measured program has the last core for itself. The load generator and the provider share the
first. Each load runs on a fresh process of one program after the other before the next load begins,
so that the two figures of a ratio are taken seconds apart.
"""

import argparse
import asyncio
import gc
import os
import platform
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import uvloop

from bench.loads import LOADS, Figures, Size, Subject, warm_up
from bench.peers import PEERS, SERVICE, Peer, Site, upstream
from bench.process import Process, running
from bench.report import TABLE, table

LOAD_CORE = 0
# The table of fewer rounds is printed, but not kept.
KEPT_ROUNDS = 5
# Above this share of its core, the load generator distorts the times it measures.
MAX_GENERATOR_USE = 0.85


@dataclass(frozen=True)
class Bench:
    """What to measure, and the provider to measure it with."""

    loads: Sequence[str]
    peers: Sequence[Peer]
    size: Size
    env: Mapping[str, str]
    provider: Process
    provider_port: int

    async def round(self) -> dict[str, Figures]:
        """Run every load on every peer once and return the figures of each peer."""
        figures: dict[str, Figures] = {peer.name: {"failed": 0} for peer in self.peers}
        for load in self.loads:
            for peer in self.peers:
                if load in peer.skipped_loads:
                    continue
                try:
                    found = await self._measure(load, peer)
                except (OSError, RuntimeError) as error:
                    print(f"{peer.name} failed under the load {load!r}: {error}", flush=True)
                    continue
                figures[peer.name]["failed"] += found.pop("failed")
                figures[peer.name] |= {f"{load}.{name}": found[name] for name in found}
        return figures

    async def _measure(self, load: str, peer: Peer) -> Figures:
        with TemporaryDirectory() as name:
            site = Site(Path(name), free_port(), self.provider_port, self.env)
            async with running(peer.program(site), last_core(), site.folder) as process:
                subject = Subject(peer.endpoint(site.port), process, self.size)
                await warm_up(subject.endpoint)
                gc.collect()
                started_at, cpu = time.monotonic(), self._generator_cpu()
                figures = await LOADS[load](subject)
                seconds = time.monotonic() - started_at
                use = (self._generator_cpu() - cpu) / seconds
        print(f"  {load:8} {peer.name:8} {seconds:4.0f} s", flush=True)
        # Only these loads time a busy program. The others may use all of the generator's core.
        if load in ("arrival", "hold") and use > MAX_GENERATOR_USE:
            print(f"WARNING: the load generator used {use:.0%} of its core; ignore the times.")
        return figures

    def _generator_cpu(self) -> float:
        return time.process_time() + self.provider.cpu_seconds()


def last_core() -> int:
    return (os.cpu_count() or 1) - 1


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def machine() -> str:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    name = cpu[0].partition(":")[2].strip() if cpu else platform.machine()
    python = subprocess.check_output([SERVICE.executable, "--version"], text=True).strip()
    return f"{name}, {os.cpu_count()} cores, Linux {platform.release()}, {python}"


async def measure(
    loads: Sequence[str], peers: Sequence[Peer], rounds: int, env: Mapping[str, str]
) -> None:
    port = free_port()
    results: dict[str, list[Figures]] = {}
    with TemporaryDirectory() as folder:
        async with running(upstream(port), LOAD_CORE, Path(folder)) as provider:
            bench = Bench(loads, peers, Size(), env, provider, port)
            for number in range(rounds):
                print(f"round {number + 1} of {rounds}", flush=True)
                for name, figures in (await bench.round()).items():
                    results.setdefault(name, []).append(figures)
    text = f"{time.strftime('%Y-%m-%d')}, {machine()}; rounds: {rounds}.\n\n{table(results)}"
    print(f"\n{text}")
    if rounds >= KEPT_ROUNDS and set(loads) == set(LOADS) and len(peers) > 1 and not env:
        TABLE.write_text(text)


def main() -> None:
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--peers", nargs="+", choices=names, default=names)
    parser.add_argument("--rounds", type=int, default=KEPT_ROUNDS)
    parser.add_argument(
        "--env", nargs="+", default=[], metavar="NAME=VALUE", help="settings of the service"
    )
    options = parser.parse_args()
    peers = [peer for peer in PEERS if peer.name in options.peers]
    for peer in peers:
        if not peer.executable.exists():
            print(f"Skipping {peer.title}: {peer.executable} does not exist.")
    peers = [peer for peer in peers if peer.executable.exists()]
    env = dict(setting.split("=", 1) for setting in options.env)
    os.sched_setaffinity(0, {LOAD_CORE})
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(options.loads, peers, options.rounds, env))


if __name__ == "__main__":
    main()
