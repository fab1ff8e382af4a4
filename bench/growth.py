"""`python -m bench.growth`: what a thing costs when there is more of something.

CPU per event against open streams, at one rate of events; per turn against a session's length; per
request against stored sessions; and the limiter's part of a request against the addresses that it
knows. One picture each in `bench/results/`.
"""

import argparse
import asyncio
import gc
import json
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import uvloop

from bench.__main__ import LOAD_CORE, free_port, last_core
from bench.cases import Size, Subject, one_by_one, warm
from bench.load import Questions
from bench.peers import SERVICE, Place, upstream
from bench.process import running
from bench.report import RESULTS, curve
from bench.upstream import WORDS
from ratelimit import Caller, MemoryRateLimiter
from sessions import open_database
from settings import Rate

Points = list[tuple[float, float]]
# Of all streams together: a quarter of what the service can do.
EVENTS_PER_SECOND = 2000
# StreamLimiter are opened at this rate, and then watched for so long.
STARTS_PER_SECOND = 200
WATCHED_SECONDS = 4.0
MESSAGE = "word " * 60


@asynccontextmanager
async def subject(folder: Path, seconds: float, **env: str) -> AsyncIterator[Subject]:
    """The service, with these settings beside the bench's, warm."""
    port = free_port()
    async with running(upstream(port), LOAD_CORE, folder):
        place = Place(folder, free_port(), port)
        program = SERVICE.program(place, False)
        program = replace(program, env={**program.env, **env})
        async with running(program, last_core(), folder) as process:
            questions = SERVICE.questions(place.port)
            await warm(questions, 50)
            yield Subject(questions, process, Size(seconds=seconds))


async def active_streams(count: int, seconds: float) -> float:
    """CPU per event, in microseconds, while `count` streams are open."""
    pause = 1000 * count // EVENTS_PER_SECOND
    ramp = count / STARTS_PER_SECOND
    with TemporaryDirectory() as folder:
        async with subject(Path(folder), seconds) as service:
            chunks = int((ramp + 2 * seconds) * 1000 / pause) + 10
            request = service.questions.request(chunks, pause)
            connections = [await service.questions.connect() for _ in range(count)]
            asking = []
            for connection in connections:
                asking.append(asyncio.ensure_future(connection.ask(request)))
                await asyncio.sleep(1 / STARTS_PER_SECOND)
            # Until the last has begun.
            await asyncio.sleep(seconds / 2)
            before = sum(each.answer.chunks for each in connections), service.cpu_us()
            await asyncio.sleep(seconds)
            after = sum(each.answer.chunks for each in connections), service.cpu_us()
            for connection in connections:
                connection.transport.abort()
            await asyncio.gather(*asking)
    return (after[1] - before[1]) / (after[0] - before[0])


async def history(turns: int, seconds: float) -> float:
    """CPU per turn, in microseconds, in a session that remembers so many."""
    answer = sum(len(WORDS[i % len(WORDS)]) for i in range(20))
    room = turns * (len(f"{MESSAGE}bench:20:0") + answer)
    with TemporaryDirectory() as folder:
        async with subject(Path(folder), seconds, HISTORY_MAX_CHARS=str(room)) as service:
            return await _in_session(service, turns)


async def stored(sessions: int, seconds: float) -> float:
    """CPU per turn, in microseconds, in one of so many sessions."""
    with TemporaryDirectory() as folder:
        turns = json.dumps([["Hi", "Hello", True, 0.0, 0.0]] * 2)
        expires = time.time() + 86400
        with closing(open_database(f"{folder}/chat.db")) as db:
            db.execute("BEGIN")
            db.executemany(
                "INSERT INTO session VALUES (NULL, ?, 'anyone', 0.0, ?, ?)",
                ((number.to_bytes(32), expires, turns) for number in range(sessions)),
            )
            db.execute("COMMIT")
        async with subject(Path(folder), seconds) as service:
            return await _in_session(service, 20)


async def _in_session(service: Subject, turns: int) -> float:
    """As the case `sessions`, once the session is as long as it gets."""
    body = service.questions.body.removesuffix("}") + ',"session_id":"bench"}'
    questions = Questions(service.questions.port, service.questions.path, body)
    request = questions.request(20, 0, MESSAGE)
    connection = await questions.connect()
    for _ in range(turns):
        await connection.ask(request)
    connection.transport.abort()
    found = await one_by_one(replace(service, questions=questions), request)
    return found["cpu_us_per_request"]


async def addresses(known: int, seconds: float) -> float:
    """The limiter's CPU per request, in microseconds, when so many addresses have asked; it keeps
    a bucket for the 50,000 of them that need one most. Measured in this process."""
    limiter = MemoryRateLimiter(Rate(10, 60), lambda: time.monotonic_ns() // 1000)
    for number in range(known):
        await limiter.take(Caller("anonymous", f"10.{number}"))
    drawn = Random(1).choices(range(known), k=20_000)  # noqa: S311 - no secret
    callers = [Caller("anonymous", f"10.{number}") for number in drawn]
    began = time.process_time()
    for caller in callers:
        await limiter.take(caller)
    return (time.process_time() - began) / len(callers) * 1e6


Measure = Callable[[int, float], Coroutine[object, object, float]]
# Name, title of the axis, unit, what is measured, at which counts.
CURVES: Sequence[tuple[str, str, str, Measure, Sequence[int]]] = (
    ("streams", "open streams", "µs CPU per event", active_streams, (10, 30, 100, 300, 1000, 2000)),
    ("history", "turns in the session", "µs CPU per turn", history, (1, 3, 10, 30, 100, 300)),
    ("stored", "stored sessions", "µs CPU per turn", stored, (1, 100, 1000, 10_000, 100_000)),
    (
        "addresses",
        "addresses that have asked",
        "µs CPU of the limiter per request",
        addresses,
        (1, 100, 10_000, 100_000, 1_000_000),
    ),
)


async def measure(names: Sequence[str], seconds: float) -> None:
    for name, axis, unit, cost, counts in CURVES:
        if name in names:
            points = []
            for count in counts:
                points.append((float(count), await cost(count, seconds)))
                print(f"{axis} {count:,}: {points[-1][1]:.1f} {unit}", flush=True)
            (RESULTS / f"growth-{name}.svg").write_text(curve(axis, unit, points))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.growth", description=__doc__)
    parser.add_argument("--curves", default=",".join(each[0] for each in CURVES))
    parser.add_argument("--seconds", type=float, default=WATCHED_SECONDS)
    asked = parser.parse_args()
    os.sched_setaffinity(0, {LOAD_CORE})
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(measure(asked.curves.split(","), asked.seconds))


if __name__ == "__main__":
    main()
