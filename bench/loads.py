"""The loads and the figures each of them yields.

A figure is named after its load: `burst.cpu_us_per_event`. Times are in milliseconds unless the
name says otherwise, memory is in bytes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from bench.client import Endpoint, Response, percentile, run_clients
from bench.process import Process

Figures = dict[str, float]
WARM_UP_REQUESTS = 50
# A stream is on time if it takes at most this multiple of the time the provider takes.
ON_TIME = 1.05


@dataclass(frozen=True)
class Size:
    """How much load a round generates. Tests use less."""

    seconds: float = 2.0
    paced_streams: int = 100
    paced_chunks: int = 100
    hold_streams: int = 1000
    hold_chunks: int = 200
    hold_start_seconds: float = 5.0


@dataclass(frozen=True)
class Subject:
    """A running program under measurement."""

    endpoint: Endpoint
    process: Process
    size: Size


@dataclass(frozen=True)
class Result:
    """The responses of a load, each of which should have `chunks` chunks, and the CPU time."""

    responses: list[Response]
    chunks: int
    cpu_us: float

    @property
    def failed(self) -> int:
        return sum(not each.ended_at or each.chunks != self.chunks for each in self.responses)

    def cpu_us_per_event(self) -> float:
        return self.cpu_us / max(1, sum(each.chunks for each in self.responses))

    def ttft(self, fraction: float) -> float:
        """Return a percentile of TTFT in ms. A response without chunks counts as still waiting."""
        now = time.monotonic()
        times = ((each.first_chunk_at or now) - each.sent_at for each in self.responses)
        return percentile(times, fraction) * 1e3


async def run(subject: Subject, clients: int, chunks: int, pause_ms: int, **times: float) -> Result:
    """Run clients that request this many chunks; `times` as `run_clients` takes them."""
    cpu_before = subject.process.cpu_seconds()
    request = subject.endpoint.request(chunks, pause_ms)
    responses = await run_clients(subject.endpoint, request, clients, **times)
    return Result(responses, chunks, (subject.process.cpu_seconds() - cpu_before) * 1e6)


async def warm_up(endpoint: Endpoint) -> None:
    """Send a few requests, so that caches are full and the provider's connection is open."""
    connection = await endpoint.connect()
    for _ in range(WARM_UP_REQUESTS):
        await connection.send(endpoint.request(20, 0))
    connection.transport.abort()


async def start(subject: Subject) -> Figures:
    """No load: the CPU time until the program serves, and its memory after the warm-up."""
    process = subject.process
    return {"cpu": process.start_cpu_seconds, "idle_memory": process.memory(), "failed": 0}


async def request(subject: Subject) -> Figures:
    """One stream at a time, 20 chunks without pauses."""
    result = await run(subject, 1, 20, 0, repeat_seconds=subject.size.seconds)
    cpu = result.cpu_us / len(result.responses)
    return {"cpu_us": cpu, "ttft_p50": result.ttft(0.5), "failed": result.failed}


async def paced(subject: Subject) -> Figures:
    """100 streams of 100 chunks, one every 20 ms, started over one second."""
    size = subject.size
    result = await run(subject, size.paced_streams, size.paced_chunks, 20, start_seconds=1.0)
    return {"cpu_us_per_event": result.cpu_us_per_event(), "failed": result.failed}


async def burst(subject: Subject) -> Figures:
    """16 streams at a time, 200 chunks without pauses."""
    result = await run(subject, 16, 200, 0, repeat_seconds=subject.size.seconds)
    return {"cpu_us_per_event": result.cpu_us_per_event(), "failed": result.failed}


async def arrival(subject: Subject) -> Figures:
    """1,000 streams of 20 chunks, one every 50 ms, all started at once."""
    result = await run(subject, subject.size.hold_streams, 20, 50)
    return {"ttft_p99": result.ttft(0.99), "failed": result.failed}


async def hold(subject: Subject) -> Figures:
    """1,000 streams of 200 chunks, one every 50 ms, started over five seconds."""
    size, memory_before = subject.size, subject.process.memory()
    start_seconds, stream_seconds = size.hold_start_seconds, (size.hold_chunks - 1) * 0.05
    streams = asyncio.ensure_future(
        run(subject, size.hold_streams, size.hold_chunks, 50, start_seconds=start_seconds)
    )
    # Now all streams have started and none has ended.
    await asyncio.sleep(start_seconds + stream_seconds * 0.4)
    memory = subject.process.memory() - memory_before
    result = await streams
    longest = stream_seconds * ON_TIME
    on_time = sum(0 < each.ended_at - each.sent_at <= longest for each in result.responses)
    return {
        "cpu_us_per_event": result.cpu_us_per_event(),
        "ttft_p99": result.ttft(0.99),
        "memory_per_stream": memory / size.hold_streams,
        "late": size.hold_streams - on_time,
        "failed": result.failed,
    }


LOADS: Mapping[str, Callable[[Subject], Awaitable[Figures]]] = {
    "start": start,
    "request": request,
    "paced": paced,
    "burst": burst,
    "arrival": arrival,
    "hold": hold,
}
