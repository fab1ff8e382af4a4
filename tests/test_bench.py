"""The benchmark's arithmetic, table and load generator, and a small run of every load."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from bench.__main__ import LOAD_CORE, Bench, free_port
from bench.client import Endpoint, percentile, run_clients
from bench.loads import LOADS, Size
from bench.peers import OPENAI_BODY, SERVICE, upstream
from bench.process import running
from bench.report import ROWS, Results, number, ratios, table, values
from bench.upstream import ProviderProtocol, response

ROW = next(row for row in ROWS if row.figure == "burst.cpu_us_per_event")
GOAL = ROW.ratios["ferro"]
SMALL = Size(
    seconds=0.1,
    paced_streams=3,
    paced_chunks=5,
    hold_streams=5,
    hold_chunks=10,
    hold_start_seconds=0.1,
)


def rounds(*figures: float, figure: str = ROW.figure) -> list[dict[str, float]]:
    return [{figure: value} for value in figures]


# ---- arithmetic


@pytest.mark.parametrize(
    ("numbers", "fraction", "expected"),
    [([3, 1, 2], 0.5, 2), (range(100), 0.99, 99), (range(1000), 0.99, 990), ([7], 0.99, 7)],
)
def test_percentile_is_one_of_the_values(
    numbers: list[float], fraction: float, expected: float
) -> None:
    assert percentile(numbers, fraction) == expected


def test_percentile_of_no_values_is_zero() -> None:
    assert percentile([], 0.99) == 0.0


def test_ratio_divides_figures_of_the_same_round() -> None:
    # In the second round the machine was half as fast for both.
    results = {"service": rounds(10, 20, 12), "ferro": rounds(20, 40, 20)}
    assert ratios(results, ROW, "ferro") == [0.5, 0.5, 0.6]
    assert values(results, ROW, "ferro") == [20, 40, 20]


@pytest.mark.parametrize(
    "results",
    [
        {"service": rounds(10)},
        {"service": rounds(10), "ferro": []},
        {"service": rounds(10), "ferro": [{}]},
        {"service": rounds(10), "ferro": rounds(0)},
    ],
)
def test_unmeasured_peer_has_no_ratio(results: Results) -> None:
    assert ratios(results, ROW, "ferro") == []


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1.234, "1.23"),
        (7.0, "7"),
        (12.34, "12.3"),
        (123.4, "123"),
        (12345.6, "12,346"),
    ],
)
def test_number_has_at_most_three_significant_digits_below_100(value: float, expected: str) -> None:
    assert number(value) == expected


# ---- the table


def test_figures_and_titles_of_the_rows_are_unique() -> None:
    assert len({row.figure for row in ROWS}) == len({row.title for row in ROWS}) == len(ROWS)


def test_table_shows_medians_and_ranges_of_measured_rows_and_peers() -> None:
    results: Results = {"service": rounds(10, 12, 14), "0.1.0": rounds(40, 40, 40), "litellm": [{}]}
    header, _, *lines = table(results).splitlines()
    assert header == "| | this service | 0.1.0 |"
    ours = "12 µs <sub>10 to 14</sub>"
    goal = ROW.ratios["0.1.0"]
    ratio = f"0.300 <sub>0.250 to 0.350</sub> (goal: {goal})"
    assert lines == [f"| burst: CPU per event | {ours} | {ratio} |"]


def test_missed_ratio_is_marked_in_the_table() -> None:
    missed = table({"service": rounds(GOAL * 30), "ferro": rounds(20)})
    assert f"| **{number(GOAL * 1.5)}** (missed goal: {GOAL}) |" in missed
    assert "missed" not in table({"service": rounds(GOAL * 20), "ferro": rounds(20)})


def test_missed_limit_of_the_service_is_marked_in_the_table() -> None:
    row = next(row for row in ROWS if row.figure == "start.cpu")
    assert row.limit is not None
    missed = table({"service": rounds(row.limit * 2, figure=row.figure)})
    assert f"**{number(row.limit * 2)} s** (missed goal: {row.limit})" in missed


def test_absolute_row_shows_the_peers_own_value() -> None:
    figures = {"service": rounds(0, figure="failed"), "ferro": rounds(7, figure="failed")}
    assert "| failed requests, all loads | 0 (goal: 0) | 7 |" in table(figures)


# ---- load generator and provider


class OneByteWrites(ProviderProtocol):
    """Sends a response byte by byte."""

    def data_received(self, data: bytes) -> None:
        self._bytes = iter(response(3))
        self._write_byte()

    def _write_byte(self) -> None:
        byte = next(self._bytes, None)
        if byte is not None:
            self._transport.write(bytes([byte]))
            asyncio.get_running_loop().call_soon(self._write_byte)


@pytest.mark.parametrize(
    ("protocol", "pause_ms"), [(ProviderProtocol, 0), (ProviderProtocol, 2), (OneByteWrites, 0)]
)
async def test_client_counts_every_chunk(protocol: type[ProviderProtocol], pause_ms: int) -> None:
    loop = asyncio.get_running_loop()
    async with await loop.create_server(protocol, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        endpoint = Endpoint(port, "/v1/chat/completions", OPENAI_BODY)
        request = endpoint.request(3, pause_ms)
        responses = await run_clients(endpoint, request, 3, start_seconds=0.01)
        responses += await run_clients(endpoint, request, 2, repeat_seconds=0.01)
    assert len(responses) >= 5
    for each in responses:
        assert (each.status, each.chunks) == (200, 3)
        assert each.sent_at < each.first_chunk_at <= each.ended_at


async def test_response_of_a_closed_connection_is_incomplete() -> None:
    class HangsUp(ProviderProtocol):
        def data_received(self, data: bytes) -> None:
            self._transport.write(response(3)[:-5])
            self._transport.close()

    loop = asyncio.get_running_loop()
    async with await loop.create_server(HangsUp, "127.0.0.1", 0) as server:
        endpoint = Endpoint(server.sockets[0].getsockname()[1], "/", OPENAI_BODY)
        [only] = await run_clients(endpoint, endpoint.request(3, 0), 1)
    assert (only.status, only.chunks, only.ended_at) == (200, 3, 0.0)


async def test_program_that_ends_at_once_reports_its_output(tmp_path: Path) -> None:
    broken = replace(upstream(free_port()), env={})
    with pytest.raises(RuntimeError, match="No module named"):
        async with running(broken, LOAD_CORE, tmp_path):
            raise AssertionError("It must not start.")


# ---- every load


@pytest.mark.slow
async def test_service_completes_every_load(tmp_path: Path) -> None:
    port = free_port()
    async with running(upstream(port), LOAD_CORE, tmp_path) as provider:
        found = await Bench(tuple(LOADS), [SERVICE], SMALL, {}, provider, port).round()
    figures = found["service"]
    assert figures["failed"] == 0
    assert figures.keys() == {row.figure for row in ROWS}
