"""The cases: what a program is asked, and the figures that come of it.

A figure is a number under the name of its case and itself, such as `burst.cpu_us_per_event`. Times
are in milliseconds unless the name says otherwise, memory in bytes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from statistics import median

from bench.load import Answer, Connection, Questions, closed_loop, open_loop, percentile
from bench.process import Running

Figures = dict[str, float]


@dataclass(frozen=True)
class Size:
    """How much is asked in a round; tests ask for little."""

    seconds: float = 2.0
    paced_streams: int = 100
    paced_pieces: int = 100
    hold_streams: int = 1000
    hold_pieces: int = 200
    hold_spread_seconds: float = 5.0
    refusal_seconds: float = 2.0


@dataclass(frozen=True)
class Subject:
    """A running program and how it is asked; `process` is None for the upstream itself, asked
    directly."""

    questions: Questions
    process: Running | None
    size: Size

    def cpu_us(self) -> float:
        return self.process.cpu_seconds() * 1e6 if self.process else 0.0

    def memory(self) -> float:
        return float(self.process.memory()) if self.process else 0.0


def whole(answers: list[Answer], chunks: int) -> list[Answer]:
    """Those that came to their end with all their chunks."""
    return [each for each in answers if each.ended and each.chunks == chunks]


async def burst(subject: Subject) -> Figures:
    """16 callers; 200 chunks without pauses."""
    before = subject.cpu_us()
    request = subject.questions.request(200, 0)
    answers = await closed_loop(subject.questions, request, 16, subject.size.seconds)
    spent = subject.cpu_us() - before
    good = whole(answers, 200)
    return {
        "cpu_us_per_event": spent / sum(each.chunks for each in answers),
        "ttft_p50": percentile((each.first - each.asked for each in good), 0.5) * 1e3,
        "failed": len(answers) - len(good),
    }


async def paced(subject: Subject) -> Figures:
    """100 streams of 100 chunks, 20 ms apart."""
    size = subject.size
    before = subject.cpu_us()
    request = subject.questions.request(size.paced_pieces, 20)
    answers = await open_loop(subject.questions, request, size.paced_streams, 1.0)
    spent = subject.cpu_us() - before
    good = whole(answers, size.paced_pieces)
    return {
        "cpu_us_per_event": spent / sum(each.chunks for each in answers),
        "ttft_p50": percentile((each.first - each.asked for each in good), 0.5) * 1e3,
        "gap_p99": percentile((gap for each in good for gap in each.gaps), 0.99) * 1e3,
        "failed": size.paced_streams - len(good),
    }


async def latency(subject: Subject) -> Figures:
    """One stream at a time, 20 chunks without pauses."""
    return await one_by_one(subject, subject.questions.request(20, 0))


async def one_by_one(subject: Subject, request: bytes) -> Figures:
    before = subject.cpu_us()
    answers = await closed_loop(subject.questions, request, 1, subject.size.seconds)
    spent = subject.cpu_us() - before
    good = whole(answers, 20)
    return {
        "cpu_us_per_request": spent / len(answers),
        "ttft_p50": percentile((each.first - each.asked for each in good), 0.5) * 1e3,
        "end_p50": percentile((each.ended - each.asked for each in good), 0.5) * 1e3,
        "failed": len(answers) - len(good),
    }


async def sessions(subject: Subject) -> Figures:
    """As latency, in a session of 20 turns: each is long enough that the next pushes the oldest
    out of what a session remembers."""
    body = subject.questions.body.removesuffix("}") + ',"session_id":"bench"}'
    questions = Questions(subject.questions.port, subject.questions.path, body)
    request = questions.request(20, 0, "word " * 300)
    connection = await questions.connect()
    for _ in range(20):
        await connection.ask(request)
    connection.transport.abort()
    return await one_by_one(Subject(questions, subject.process, subject.size), request)


async def hold(subject: Subject) -> Figures:
    """1,000 streams of 200 chunks, 50 ms apart, the first at once; started evenly over 5 s."""
    size = subject.size
    before, idle = subject.cpu_us(), subject.memory()
    request = subject.questions.request(size.hold_pieces, 50)
    run = open_loop(subject.questions, request, size.hold_streams, size.hold_spread_seconds)
    running = asyncio.ensure_future(run)
    # All have begun and none has ended.
    await asyncio.sleep(size.hold_spread_seconds + size.hold_pieces * 0.05 * 0.4)
    held = subject.memory() - idle
    answers = await running
    spent = subject.cpu_us() - before
    good = whole(answers, size.hold_pieces)
    # Who got nothing at all waited to the end.
    now = time.monotonic()
    waits = [(each.first or now) - each.asked for each in answers]
    return {
        "cpu_us_per_event": spent / sum(each.chunks for each in answers),
        "ttft_p50": percentile(waits, 0.5) * 1e3,
        "ttft_p99": percentile(waits, 0.99) * 1e3,
        "gap_p99": percentile((gap for each in good for gap in each.gaps), 0.99) * 1e3,
        "longest_s": max((each.ended - each.asked for each in good), default=0.0),
        "memory_per_stream": held / size.hold_streams,
        "failed": size.hold_streams - len(good),
    }


async def classify_error(subject: Subject) -> Figures:
    """100 streams from ten addresses, 20 ms between chunks, alone and while one more address asks
    as fast as it is refused."""
    size = subject.size
    alone, _ = await _beside(subject, size.refusal_seconds, 10, flood=False)
    flooded, refused = await _beside(subject, size.refusal_seconds, 20, flood=True)
    good = [each for each in refused if each.status == 429]
    return {
        "per_second": len(good) / size.refusal_seconds,
        "gap_p99_alone": alone,
        "gap_p99_flooded": flooded,
        "failed": len(refused) - len(good),
    }


async def _beside(
    subject: Subject, seconds: float, network: int, *, flood: bool
) -> tuple[float, list[Answer]]:
    """The 99th percentile of gaps in 100 streams, and what four impatient callers were told."""
    questions = subject.questions
    callers = [await questions.connect("127.0.9.9") for _ in range(4)] if flood else []
    for caller in callers[:1] * 10:
        await caller.ask(questions.request(1, 0))
    streams = [await questions.connect(f"127.0.{network}.{i % 10 + 1}") for i in range(100)]
    request = questions.request(int(seconds * 50) + 50, 20)
    running = [asyncio.ensure_future(stream.ask(request)) for stream in streams]
    await asyncio.sleep(0.5)
    now = time.monotonic
    until = now() + seconds
    refused: list[Answer] = []

    async def insist(connection: Connection) -> None:
        while now() < until:
            refused.append(await connection.ask(request))

    await asyncio.gather(*(insist(caller) for caller in callers))
    answers = await asyncio.gather(*running)
    for connection in [*streams, *callers]:
        connection.transport.abort()
    return percentile((gap for each in answers for gap in each.gaps), 0.99) * 1e3, refused


Case = Callable[[Subject], Awaitable[Figures]]
# Hold after the others: who can't keep up in it has not ended when it has.
CASES: Mapping[str, Case] = {
    "paced": paced,
    "burst": burst,
    "latency": latency,
    "sessions": sessions,
    "hold": hold,
    "classify_error": classify_error,
}


async def warm(questions: Questions, times: int) -> None:
    """Ask a few times, so that nothing is asked for the first time while it is measured."""
    connection = await questions.connect()
    for _ in range(times):
        await connection.ask(questions.request(20, 0))
    connection.transport.abort()


def medians(rounds: list[Figures]) -> Figures:
    """The median of each figure."""
    return {name: median(each[name] for each in rounds) for name in rounds[0]}
