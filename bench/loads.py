"""The loads and the figures each of them yields.

A figure is named after its load: `burst.cpu_us_per_event`. Times are in milliseconds unless the
name says otherwise, memory is in bytes.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from bench.client import Endpoint, Response, closed_loop, open_loop, percentile
from bench.process import Process

Figures = dict[str, float]
# A stream is on time if it takes at most this multiple of the time the provider takes.
ON_TIME = 1.05
WARM_UP_REQUESTS = 50


@dataclass(frozen=True)
class Size:
    """How much load a round generates. Tests use less."""

    seconds: float = 2.0
    paced_streams: int = 100
    paced_chunks: int = 100
    hold_streams: int = 1000
    hold_chunks: int = 200
    hold_spread_seconds: float = 5.0


@dataclass(frozen=True)
class Subject:
    """A running program under measurement."""

    endpoint: Endpoint
    process: Process
    size: Size


async def warm_up(endpoint: Endpoint) -> None:
    """Send a few requests, so that caches are full and the provider's connection is open."""
    connection = await endpoint.connect()
    for _ in range(WARM_UP_REQUESTS):
        await connection.send(endpoint.request(20, 0))
    connection.transport.abort()


async def start(subject: Subject) -> Figures:
    """No load: the CPU time until the program serves, and its memory after a few requests."""
    process = subject.process
    return {"cpu": process.start_cpu_seconds, "idle_memory": process.memory()}


async def request(subject: Subject) -> Figures:
    """One stream at a time, 20 chunks without pauses."""
    cpu_before = subject.process.cpu_seconds()
    data = subject.endpoint.request(20, 0)
    responses = await closed_loop(subject.endpoint, data, 1, subject.size.seconds)
    cpu = subject.process.cpu_seconds() - cpu_before
    return {
        "cpu_us_per_request": cpu * 1e6 / len(responses),
        "ttft_p50": percentile(times_to_first_chunk(responses), 0.5),
        "failed": failures(responses, 20),
    }


async def paced(subject: Subject) -> Figures:
    """100 streams of 100 chunks, one every 20 ms, started over one second."""
    size = subject.size
    cpu_before = subject.process.cpu_seconds()
    data = subject.endpoint.request(size.paced_chunks, 20)
    responses = await open_loop(subject.endpoint, data, size.paced_streams, 1.0)
    return {
        "cpu_us_per_event": cpu_us_per_event(subject, cpu_before, responses),
        "failed": failures(responses, size.paced_chunks),
    }


async def burst(subject: Subject) -> Figures:
    """16 streams at a time, 200 chunks without pauses."""
    cpu_before = subject.process.cpu_seconds()
    data = subject.endpoint.request(200, 0)
    responses = await closed_loop(subject.endpoint, data, 16, subject.size.seconds)
    return {
        "cpu_us_per_event": cpu_us_per_event(subject, cpu_before, responses),
        "failed": failures(responses, 200),
    }


async def arrival(subject: Subject) -> Figures:
    """1,000 streams of 20 chunks, one every 50 ms, all started at once."""
    data = subject.endpoint.request(20, 50)
    responses = await open_loop(subject.endpoint, data, subject.size.hold_streams, 0)
    return {
        "ttft_p99": percentile(times_to_first_chunk(responses), 0.99),
        "failed": failures(responses, 20),
    }


async def hold(subject: Subject) -> Figures:
    """1,000 streams of 200 chunks, one every 50 ms, started over five seconds."""
    size = subject.size
    stream_seconds = (size.hold_chunks - 1) * 0.05
    cpu_before, memory_before = subject.process.cpu_seconds(), subject.process.memory()
    data = subject.endpoint.request(size.hold_chunks, 50)
    load = open_loop(subject.endpoint, data, size.hold_streams, size.hold_spread_seconds)
    running = asyncio.ensure_future(load)
    # Now all streams have started and none has ended.
    await asyncio.sleep(size.hold_spread_seconds + stream_seconds * 0.4)
    memory = subject.process.memory() - memory_before
    responses = await running
    on_time = sum(
        0 < response.ended_at - response.sent_at <= stream_seconds * ON_TIME
        for response in responses
    )
    return {
        "cpu_us_per_event": cpu_us_per_event(subject, cpu_before, responses),
        "ttft_p99": percentile(times_to_first_chunk(responses), 0.99),
        "late": size.hold_streams - on_time,
        "memory_per_stream": memory / size.hold_streams,
        "failed": failures(responses, size.hold_chunks),
    }


Load = Callable[[Subject], Awaitable[Figures]]
LOADS: Mapping[str, Load] = {
    "start": start,
    "request": request,
    "paced": paced,
    "burst": burst,
    "arrival": arrival,
    "hold": hold,
}


def cpu_us_per_event(subject: Subject, cpu_before: float, responses: list[Response]) -> float:
    cpu = subject.process.cpu_seconds() - cpu_before
    return cpu * 1e6 / max(1, sum(response.chunks for response in responses))


def times_to_first_chunk(responses: list[Response]) -> list[float]:
    """Return each response's TTFT in ms. A response without a chunk counts as waiting until now."""
    now = time.monotonic()
    return [((each.first_chunk_at or now) - each.sent_at) * 1e3 for each in responses]


def failures(responses: list[Response], chunks: int) -> int:
    """Return how many responses are not complete."""
    return sum(not each.ended_at or each.chunks != chunks for each in responses)
