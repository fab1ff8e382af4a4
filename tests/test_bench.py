"""The bench: its arithmetic, its tables, its callers; and that the service still goes through every
case, with numbers too small to mean anything."""

import asyncio
from pathlib import Path
from xml.etree import ElementTree

import pytest

from bench.__main__ import Bench, free_port, last_core
from bench.cases import CASES, Size
from bench.growth import CURVES
from bench.load import Questions, closed_loop, open_loop, percentile
from bench.peers import OPENAI_BODY, SERVICE, upstream
from bench.process import running
from bench.report import ROWS, Results, Spread, curve, number, own, picture, ratio, table
from bench.upstream import Connection, whole

BURST = ROWS[0]
TINY = Size(
    seconds=0.1,
    paced_streams=3,
    paced_pieces=5,
    hold_streams=5,
    hold_pieces=10,
    hold_spread_seconds=0.1,
    refusal_seconds=0.1,
)


def rounds(*values: float, figure: str = BURST.figure) -> list[dict[str, float]]:
    return [{figure: value} for value in values]


# ---- arithmetic


@pytest.mark.parametrize(
    ("values", "share", "found"),
    [([3, 1, 2], 0.5, 2), (range(100), 0.99, 99), (range(1000), 0.99, 990), ([7], 0.99, 7)],
)
def test_a_percentile_is_one_of_the_values(values: list[float], share: float, found: float) -> None:
    assert percentile(values, share) == found


def test_a_percentile_of_nothing_is_nothing() -> None:
    assert percentile([], 0.99) == 0.0


def test_a_ratio_is_taken_within_each_round() -> None:
    # The second round was twice as slow for both.
    results = {"service": rounds(10, 20, 12), "ferro": rounds(20, 40, 20)}
    assert ratio(results, BURST, "ferro") == Spread(0.5, 0.5, 0.6)
    assert own(results, BURST) == Spread(12, 10, 20)


@pytest.mark.parametrize(
    "results",
    [
        {"service": rounds(10)},
        {"service": rounds(10), "ferro": []},
        {"service": rounds(10), "ferro": [{}]},
        {"service": rounds(10), "ferro": rounds(0)},
    ],
)
def test_there_is_no_ratio_to_what_was_not_measured(results: Results) -> None:
    assert ratio(results, BURST, "ferro") is None


@pytest.mark.parametrize(
    ("value", "told"),
    [(0, "0"), (0.01234, "0.0123"), (1.234, "1.23"), (12.34, "12.3"), (123.4, "123")],
)
def test_a_number_has_three_digits_that_mean_something(value: float, told: str) -> None:
    assert number(value) == told
    assert number(12345.6) == "12,346"


def test_every_figure_of_the_table_is_known_by_one_title() -> None:
    assert len({row.figure for row in ROWS}) == len({row.title for row in ROWS}) == len(ROWS)


# ---- what people read


def test_the_table_shows_spreads_missed_goals_and_missing_peers() -> None:
    results = {"service": rounds(10, 12, 14), "ferro": rounds(20, 20, 20)}
    text = table(results)
    assert "| burst: CPU per event | 12.0 µs <sub>10.0-14.0</sub> |" in text
    assert "**0.600 <sub>0.500-0.700</sub>** (goal 0.500)" in text
    assert "LiteLLM proxy (missing)" in text
    assert "Ferro AI gateway (Go) |" in text
    # Rows of what nobody measured are left out.
    assert len(text.splitlines()) == 3


def test_a_goal_that_is_met_is_only_a_number() -> None:
    assert "(goal" not in table({"service": rounds(9), "ferro": rounds(20)})


def test_a_limit_of_the_services_own_is_a_goal_too() -> None:
    row = next(row for row in ROWS if row.figure == "start.cpu")
    assert row.limit is not None
    missed = table({"service": rounds(row.limit * 2, figure=row.figure)})
    assert f"**{number(row.limit * 2)} s** (goal {number(row.limit)})" in missed


def test_the_pictures_are_well_formed_and_show_every_measurement() -> None:
    pictured = [row for row in ROWS if row.pictured]
    figures = [{row.figure: 2.0 for row in pictured}]
    root = ElementTree.fromstring(picture({"service": figures, "ferro": figures}))
    # One in the legend.
    assert len(root.findall("{*}circle")) == len(pictured) + 1
    points = ElementTree.fromstring(curve("streams", "µs", [(1, 5.0), (10, 6.0), (100, 7.0)]))
    assert len(points.findall("{*}circle")) == 3


# ---- callers and upstream


async def serve(protocol: type[Connection]) -> asyncio.Server:
    return await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)


class Crumbs(Connection):
    """Sends an answer byte by byte."""

    def data_received(self, data: bytes) -> None:
        self._left_over = iter(whole(3))
        self._crumb()

    def _crumb(self) -> None:
        byte = next(self._left_over, None)
        if byte is not None:
            self._transport.write(bytes([byte]))
            asyncio.get_running_loop().call_soon(self._crumb)


@pytest.mark.parametrize("protocol", [Connection, Crumbs])
@pytest.mark.parametrize("pause", [0, 2])
async def test_the_callers_count_every_piece_however_it_comes(
    protocol: type[Connection], pause: int
) -> None:
    async with await serve(protocol) as server:
        port = server.sockets[0].getsockname()[1]
        questions = Questions(port, "/v1/chat/completions", OPENAI_BODY)
        request = questions.request(3, pause)
        answers = await open_loop(questions, request, 3, 0.01)
        answers += await closed_loop(questions, request, 2, 0.01)
    assert len(answers) >= 5
    for answer in answers:
        assert (answer.status, answer.chunks) == (200, 3)
        assert answer.asked < answer.first <= answer.last <= answer.ended


# ---- the whole


@pytest.mark.slow
async def test_the_service_goes_through_every_case(tmp_path: Path) -> None:
    port = free_port()
    async with running(upstream(port), 0, tmp_path):
        found = await Bench(tuple(CASES), [SERVICE], TINY, last_core(), port).round()
    figures = found["service"]
    assert {name for name in figures if name.endswith(".failed") and figures[name]} == set()
    assert {row.figure for row in ROWS} <= figures.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", [each[0] for each in CURVES])
async def test_a_curve_has_its_first_point(name: str) -> None:
    measure, counts = next((each[3], each[4]) for each in CURVES if each[0] == name)
    assert await measure(counts[0], 0.2) > 0
