"""`python -m bench`: the service beside its peers, round by round, in ratios.

Everything runs on this machine: the program under measurement alone on the last core, callers and
upstream on the first. What comes out is written to `bench/results/`.
"""

import argparse
import asyncio
import gc
import json
import os
import platform
import socket
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import uvloop

from bench.cases import CASES, Figures, Size, Subject, warm
from bench.load import Questions
from bench.peers import OPENAI_BODY, PEERS, SERVICE, Peer, Place, upstream
from bench.process import running
from bench.report import RESULTS, picture, table

# LiteLLM would be measured for minutes with a thousand streams; the SDK and the proxies have no
# sessions, only these two a limit of their own.
LEFT_OUT = {
    "litellm": {"hold", "sessions", "classify_error"},
    "fastapi": {"sessions"},
    "ferro": {"sessions", "classify_error"},
    "nginx": {"sessions", "classify_error"},
}
DIRECT = "direct"
# Callers and upstream run here, and what is measured on the last core.
LOAD_CORE = 0


@dataclass(frozen=True)
class Bench:
    """What is measured how often, on which cores."""

    cases: Sequence[str]
    peers: Sequence[Peer]
    size: Size
    core: int
    upstream: int

    async def round(self) -> dict[str, Figures]:
        """Every peer once through every case."""
        direct = Questions(self.upstream, "/v1/chat/completions", OPENAI_BODY)
        subject = Subject(direct, None, self.size)
        found = {DIRECT: await self._measure(subject, {"hold", "latency"})}
        for peer in self.peers:
            print(f"  {peer.name}", end="", flush=True)
            began = time.monotonic()
            try:
                found[peer.name] = await self._peer(peer, found[DIRECT])
            except RuntimeError as error:
                print(f" MISSING: {error}", flush=True)
            print(f" {time.monotonic() - began:.0f} s", flush=True)
        return found

    async def _peer(self, peer: Peer, direct: Figures) -> Figures:
        with TemporaryDirectory() as folder:
            place = Place(Path(folder), free_port(), self.upstream)
            async with running(peer.program(place, False), self.core, place.folder) as process:
                figures = {"start.wall": process.wall, "start.cpu": process.cpu}
                subject = Subject(peer.questions(place.port), process, self.size)
                await warm(subject.questions, peer.warming)
                figures["start.idle_memory"] = process.memory()
                wanted = set(CASES) - LEFT_OUT.get(peer.name, set()) - {"classify_error"}
                figures |= await self._measure(subject, wanted)
        if "classify_error" in self.cases and "classify_error" not in LEFT_OUT.get(
            peer.name, set()
        ):
            with TemporaryDirectory() as folder:
                place = Place(Path(folder), free_port(), self.upstream)
                async with running(peer.program(place, True), self.core, place.folder) as process:
                    subject = Subject(peer.questions(place.port), process, self.size)
                    figures |= await self._measure(subject, {"classify_error"})
        for name in ("latency", "sessions"):
            for what in ("ttft", "end"):
                if f"{name}.{what}_p50" in figures and f"latency.{what}_p50" in direct:
                    added = figures[f"{name}.{what}_p50"] - direct[f"latency.{what}_p50"]
                    figures[f"{name}.added_{what}"] = added
        if "hold.longest_s" in figures and "hold.longest_s" in direct:
            figures["hold.longest"] = figures["hold.longest_s"] / direct["hold.longest_s"]
        return figures | installed(peer)

    async def _measure(self, subject: Subject, wanted: set[str]) -> Figures:
        figures: Figures = {}
        for name, case in CASES.items():
            if name in self.cases and name in wanted:
                gc.collect()
                measured = await case(subject)
                figures |= {f"{name}.{figure}": value for figure, value in measured.items()}
        return figures


def last_core() -> int:
    return (os.cpu_count() or 1) - 1


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def installed(peer: Peer) -> Figures:
    """The bytes and the packages of a peer's virtual environment, the installer's own aside."""
    site = next(peer.needs.parent.parent.glob("lib/python*/site-packages"), None)
    if site is None:
        return {}
    ours = ("pip", "setuptools", "_distutils_hack", "pkg_resources", "distutils-precedence")
    entries = [entry for entry in site.iterdir() if not entry.name.startswith(ours)]
    files = [file for entry in entries for file in (entry, *entry.rglob("*")) if file.is_file()]
    # A wheel may put a program beside the interpreter.
    files += peer.needs.parent.glob("ferrogw")
    packages = sum(entry.name.endswith(".dist-info") for entry in entries)
    size = sum(file.stat().st_size for file in files)
    return {"start.installed": size, "start.packages": packages}


def machine() -> str:
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    name = cpu[0].partition(":")[2].strip() if cpu else platform.machine()
    version = subprocess.check_output([SERVICE.needs, "--version"], text=True).strip()
    system = f"Linux {platform.release()}, {version}"
    return f"{name}, {os.cpu_count()} cores, {system}"


async def measure(cases: Sequence[str], peers: Sequence[Peer], rounds: int, size: Size) -> None:
    port = free_port()
    bench = Bench(cases, peers, size, last_core(), port)
    found: dict[str, list[Figures]] = {}
    with TemporaryDirectory() as folder:
        async with running(upstream(port), LOAD_CORE, Path(folder)):
            for number in range(rounds):
                print(f"round {number + 1} of {rounds}", flush=True)
                for name, figures in (await bench.round()).items():
                    found.setdefault(name, []).append(figures)
    print(table(found))
    if set(cases) == set(CASES) and len(peers) > 1:
        write(found, rounds)


def write(found: dict[str, list[Figures]], rounds: int) -> None:
    """Keep a whole run; `make docs` puts it into the README."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "figures.json").write_text(json.dumps(found, indent=1) + "\n")
    head = f"{time.strftime('%Y-%m-%d')}, {machine()}; rounds: {rounds}\n\n"
    (RESULTS / "table.md").write_text(head + table(found))
    (RESULTS / "ratios.svg").write_text(picture(found))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    known = {peer.name: peer for peer in PEERS}
    parser.add_argument("--cases", default=",".join(CASES), help="default: %(default)s")
    parser.add_argument("--peers", default=",".join(known), help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    peers = [known[name] for name in asked.peers.split(",")]
    for peer in peers:
        if peer.missing:
            print(f"MISSING: {peer.title} is not at {peer.needs}")
    peers = [peer for peer in peers if not peer.missing]
    os.sched_setaffinity(0, {LOAD_CORE})
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(asked.cases.split(","), peers, asked.rounds, Size()))


if __name__ == "__main__":
    main()
