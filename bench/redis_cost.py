"""`python -m bench.redis_cost`: what sessions and limits in Redis cost a request, beside SQLite and
memory; and what 1, 2 and 4 replicas behind nginx answer on this machine.

First the service is alone on the last core; Redis, callers and upstream share the first. Then the
replicas lie on all cores beside everything else. Needs `redis-server` and `nginx`. What comes out
is also written to `bench/results/redis.md`.
"""

import argparse
import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import cast

import uvloop

from bench.__main__ import free_port, machine
from bench.cases import Figures, whole
from bench.load import Answer, Connection, Questions, connected, percentile
from bench.peers import NGINX, ROOT, UNLIMITED
from bench.process import Program, Running, running
from bench.report import RESULTS

BODY = '{"message":"MESSAGE","session_id":"SESSION"}'
# So many callers at once, each in a session of its own.
CALLERS = 16
# A request's and an answer's length, so that a session holds 20 turns.
WORDS = "word " * 300
ROWS: Mapping[str, str] = {
    "cpu": "CPU of the service, a request, µs",
    "redis_cpu": "CPU of Redis, a request, µs",
    "end_p50": "whole answer, p50, ms",
    "end_p99": "whole answer, p99, ms",
    "busy_cpu": "16 callers: CPU of the service, a request, µs",
    "per_second": "16 callers: requests a second",
}


@asynccontextmanager
async def running_redis(folder: str, port: int) -> AsyncIterator[Running]:
    """Redis as deploy/compose.scale.yaml sets it up."""
    command = ["taskset", "--cpu-list", "0", "redis-server", "--bind", "127.0.0.1"]
    command += ["--port", str(port), "--dir", folder, "--save", ""]
    command += ["--appendonly", "yes", "--appendfsync", "everysec"]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    said = cast(asyncio.StreamReader, process.stdout)  # there is one, as was asked for
    await said.readuntil(b"Ready to accept connections")
    try:
        yield Running(process.pid, 0, 0)
    finally:
        process.terminate()
        await process.wait()


def service(port: int, upstream: int, state_url: str) -> Program:
    env = {
        "PYTHONPATH": str(ROOT),
        "PORT": str(port),
        "OPENAI_API_KEY": "sk-bench",
        "OPENAI_BASE_URL": f"http://127.0.0.1:{upstream}/v1",
        "STATE_URL": state_url,
        "RATE_LIMIT": UNLIMITED,
        "FORWARDED_ALLOW_IPS": "127.0.0.1",
        "MAX_STREAMS_PER_CALLER": "1000",
    }
    return Program([sys.executable, "-m", "service"], port, "/healthz", env)


async def ask(port: int, callers: int, seconds: float) -> list[Answer]:
    """Callers who ask again as soon as they are answered; sessions that are full from the start."""
    questions = Questions(port, "/api/v1/chat", BODY)
    answers: list[Answer] = []
    until = 0.0

    async def talk(connection: Connection, number: int) -> None:
        session = replace(questions, body=BODY.replace("SESSION", f"bench-{number}"))
        request = session.request(20, 0, WORDS)
        while time.monotonic() < until:
            answers.append(await connection.ask(request))

    for share in (0.25, 1.0):
        answers.clear()
        until = time.monotonic() + share * seconds
        await connected(questions, callers, talk)
    return answers


async def cost(port: int, process: Running, server: Running, seconds: float) -> Figures:
    """One after the other, and all at once."""
    figures: Figures = {}
    for callers in (1, CALLERS):
        await ask(port, callers, seconds / 4)
        before, before_redis = process.cpu_seconds(), server.cpu_seconds()
        began = time.monotonic()
        answers = await ask(port, callers, seconds)
        took = time.monotonic() - began
        spent = (process.cpu_seconds() - before) * 1e6
        good = whole(answers, 20)
        if len(good) < len(answers):
            raise RuntimeError(f"{len(answers) - len(good)} of {len(answers)} answers failed")
        # A quarter more were asked to warm up, in a quarter more of the time.
        asked = len(answers) * 1.25
        if callers == 1:
            times = [(each.ended - each.asked) * 1e3 for each in answers]
            figures |= {"end_p50": percentile(times, 0.5), "end_p99": percentile(times, 0.99)}
            figures["redis_cpu"] = (server.cpu_seconds() - before_redis) * 1e6 / asked
            figures["cpu"] = spent / asked
        else:
            figures |= {"busy_cpu": spent / asked, "per_second": asked / took}
    return figures


async def balanced(
    count: int, upstream: int, state_url: str, folder: Path, seconds: float
) -> float:
    """Requests a second that so many replicas answer behind nginx."""
    ports = [free_port() for _ in range(count)]
    cores = os.cpu_count() or 1
    async with AsyncExitStack() as stack:
        for number, port in enumerate(ports):
            program = service(port, upstream, state_url)
            await stack.enter_async_context(running(program, (number + 1) % cores, folder))
        front = free_port()
        text = NGINX.replace(
            "server 127.0.0.1:{upstream};", "".join(f"server 127.0.0.1:{p}; " for p in ports)
        ).format(folder=folder, upstream=0, port=front)
        config = folder / "nginx.conf"
        config.write_text(text)
        nginx = Program(["nginx", "-c", str(config), "-p", str(folder)], front, "/healthz", {})
        await stack.enter_async_context(running(nginx, 0, folder))
        answers = await ask(front, 2 * CALLERS, seconds)
        if len(whole(answers, 20)) < len(answers):
            raise RuntimeError(f"{count} replicas failed")
        return len(answers) / seconds


async def measure(rounds: int, seconds: float) -> str:
    stores: dict[str, list[Figures]] = {}
    replicas: dict[int, list[float]] = {}
    port = free_port()
    serve = [sys.executable, "-m", "bench.upstream", str(port)]
    upstream = Program(serve, port, "/", {"PYTHONPATH": str(ROOT)})
    with TemporaryDirectory() as name, TemporaryDirectory() as data:
        folder = Path(name)
        redis_port = free_port()
        redis = f"redis://127.0.0.1:{redis_port}/0"
        async with running_redis(data, redis_port) as server, running(upstream, 0, folder):
            for number in range(rounds):
                sqlite = f"sqlite:///{folder}/{number}.db"
                for store, url in {"memory": "memory://", "SQLite": sqlite, "Redis": redis}.items():
                    print(f"round {number + 1} of {rounds}: {store}", flush=True)
                    program = service(free_port(), port, url)
                    core = (os.cpu_count() or 1) - 1
                    async with running(program, core, folder) as process:
                        figures = await cost(program.port, process, server, seconds)
                    stores.setdefault(store, []).append(figures)
                for count in (1, 2, 4):
                    rate = await balanced(count, port, redis, folder, seconds)
                    replicas.setdefault(count, []).append(rate)
    return table(stores, replicas)


def told(values: list[float]) -> str:
    return f"{median(values):,.1f} ({min(values):,.1f} to {max(values):,.1f})"


def table(stores: Mapping[str, list[Figures]], replicas: Mapping[int, list[float]]) -> str:
    lines = [f"| a request of 20 chunks in a session of 20 turns | {' | '.join(stores)} |"]
    lines.append("|---|" + "--:|" * len(stores))
    for figure, title in ROWS.items():
        cells = [told([each[figure] for each in rounds]) for rounds in stores.values()]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += ["", "| replicas behind nginx, 32 callers | requests a second |", "|---|--:|"]
    lines += [f"| {count} | {told(rates)} |" for count, rates in replicas.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.redis_cost", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=4.0)
    asked = parser.parse_args()
    os.sched_setaffinity(0, {0})
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        text = runner.run(measure(asked.rounds, asked.seconds))
    RESULTS.mkdir(exist_ok=True)
    head = f"{time.strftime('%Y-%m-%d')}, {machine()}; medians of {asked.rounds} rounds"
    (RESULTS / "redis.md").write_text(f"{head} (lowest to highest)\n\n{text}")
    print(text)


if __name__ == "__main__":
    main()
