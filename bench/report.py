"""From figures to what people read: ratios of the service to each peer, as Markdown and as SVG.

A ratio is taken within one round, so that what slows a machine down slows both sides; told are the
median of the rounds and the lowest and highest. Below 1 the service needs less.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

from bench.peers import PEERS, SERVICE

# The figures of each round, by peer: {"service": [{"burst.failed": 0, …}, …], "nginx": …}.
Results = Mapping[str, Sequence[Mapping[str, float]]]
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One figure of the table: where it is found, how it is told, what it is divided by."""

    figure: str
    title: str
    unit: str
    scale: float = 1.0
    more_is_better: bool = False
    # The highest ratio that is wanted, by peer.
    goals: Mapping[str, float] | None = None
    # The highest value that is wanted, in the row's unit.
    limit: float | None = None
    pictured: bool = False


# fmt: off
ROWS = (
    Row("burst.cpu_us_per_event", "burst: CPU per event", "µs", pictured=True,
        goals={"ferro": 0.5, "fastapi": 1 / 15, "litellm": 1 / 60}),
    Row("paced.cpu_us_per_event", "paced: CPU per event", "µs", pictured=True,
        goals={"ferro": 1.4, "fastapi": 1 / 3, "litellm": 1 / 10, "nginx": 4}),
    Row("paced.gap_p99", "paced: gap between chunks, p99", "ms"),
    Row("latency.cpu_us_per_request", "latency: CPU per request", "µs", pictured=True,
        goals={"ferro": 1.5, "fastapi": 1 / 6, "litellm": 1 / 25}),
    Row("latency.added_ttft", "latency: added to the first chunk, p50", "ms", limit=1.0),
    Row("latency.added_end", "latency: added to the end, p50", "ms"),
    Row("hold.ttft_p50", "hold: first chunk, p50", "ms"),
    Row("hold.ttft_p99", "hold: first chunk, p99", "ms", pictured=True,
        goals={"ferro": 3, "fastapi": 1 / 10}),
    Row("hold.longest", "hold: slowest stream, of the direct time", "x", limit=1.05),
    Row("hold.gap_p99", "hold: gap between chunks, p99", "ms"),
    Row("hold.cpu_us_per_event", "hold: CPU per event", "µs"),
    Row("hold.memory_per_stream", "hold: memory per stream", "KiB", 1 / 1024, pictured=True,
        goals={"ferro": 0.5}),
    Row("start.cpu", "start: CPU to the first 200", "s", limit=0.6, pictured=True,
        goals={"fastapi": 1 / 2, "litellm": 1 / 15}),
    Row("start.wall", "start: time to the first 200", "s"),
    Row("start.idle_memory", "start: idle memory", "MB", 1e-6, limit=65),
    Row("start.installed", "start: installed", "MB", 1e-6),
    Row("start.packages", "start: packages", ""),
    Row("sessions.cpu_us_per_request", "sessions: CPU per request", "µs"),
    Row("sessions.added_ttft", "sessions: added to the first chunk, p50", "ms"),
    Row("classify_error.per_second", "classify_error: 429s in a second", "", more_is_better=True),
    Row("classify_error.gap_p99_flooded", "classify_error: gap beside them, p99", "ms"),
)
# fmt: on


class Spread(NamedTuple):
    """The median of some rounds, and their extremes."""

    middle: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def own(results: Results, row: Row, name: str = SERVICE.name) -> Spread | None:
    """A program's figure in the row's unit; None where it was not measured."""
    values = [each[row.figure] * row.scale for each in results[name] if row.figure in each]
    return spread(values) if values else None


def ratio(results: Results, row: Row, peer: str) -> Spread | None:
    """Service against peer, round by round; None where one of the two was not measured."""
    pairs = zip(results[SERVICE.name], results.get(peer, ()), strict=False)
    values = [
        ours[row.figure] / theirs[row.figure]
        for ours, theirs in pairs
        if ours.get(row.figure) and theirs.get(row.figure)
    ]
    return spread(values) if values else None


def number(value: float) -> str:
    """Three digits that mean something: 0.0123, 1.23, 123, 12,345."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _cell(found: Spread | None, goal: float | None, unit: str = "") -> str:
    if found is None:
        return ""
    text = number(found.middle) + (f" {unit}" if unit else "")
    if found.low != found.high:
        text += f" <sub>{number(found.low)}-{number(found.high)}</sub>"
    if goal is not None and found.middle > goal:
        text = f"**{text}** (goal {number(goal)})"
    return text


def summary() -> str:
    """The table of the last whole run, those rows of it that have a goal; when and where it was."""
    results: Results = json.loads((RESULTS / "figures.json").read_text())
    head = (RESULTS / "table.md").read_text().partition("\n")[0]
    return f"{table(results, [row for row in ROWS if row.goals or row.limit])}\n{head}.\n"


def table(results: Results, rows: Sequence[Row] = ROWS) -> str:
    """A Markdown table: the service's own figures, and the ratios to each peer's."""
    peers = [peer for peer in PEERS if peer is not SERVICE]
    titles = [peer.title + ("" if results.get(peer.name) else " (missing)") for peer in peers]
    lines = [
        "| | " + " | ".join([SERVICE.title, *titles]) + " |",
        "|---|--:|" + "--:|" * len(peers),
    ]
    for row in rows:
        cells = [_cell(own(results, row), row.limit, row.unit)]
        for peer in peers:
            goal = (row.goals or {}).get(peer.name)
            cells.append(_cell(ratio(results, row, peer.name), goal))
        if any(cells):
            lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# ---- the picture

COLOURS = {"nginx": "#8a8a8a", "ferro": "#0b84a5", "fastapi": "#e07b39", "litellm": "#a23b72"}
WIDTH, LEFT, RIGHT, TOP, STEP = 860, 250, 40, 70, 44
# The axis runs from a hundredth of the service's cost to a hundred times.
DECADES = (-2, 2)


def _x(times: float) -> float:
    low, high = DECADES
    place = (math.log10(times) - low) / (high - low)
    return LEFT + min(1.0, max(0.0, place)) * (WIDTH - LEFT - RIGHT)


def _text(x: float, y: float, text: str, **style: str) -> str:
    extra = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in style.items())
    return f'<text x="{x:.0f}" y="{y:.0f}"{extra}>{text}</text>'


def svg(x_y_size: tuple[int, int], body: Sequence[str]) -> str:
    """A whole picture on white, so that it can be read on any page."""
    width, height = x_y_size
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="system-ui, sans-serif" font-size="13" fill="#222">'
        f'<rect width="{width}" height="{height}" fill="#fff"/>'
    )
    return "\n".join([head, *body, "</svg>"]) + "\n"


def picture(results: Results) -> str:
    """What each peer needs, in multiples of what the service needs, on a logarithmic axis."""
    rows = [row for row in ROWS if row.pictured and own(results, row)]
    height = TOP + STEP * len(rows) + 40
    body = [
        _text(16, 26, "What others need, as a multiple of what this service needs", font_size="16")
    ]
    x = 16.0
    for peer in PEERS:
        if peer.name in COLOURS and results.get(peer.name):
            body.append(f'<circle cx="{x + 5:.0f}" cy="45" r="6" fill="{COLOURS[peer.name]}"/>')
            body.append(_text(x + 16, 50, peer.title))
            x += 40 + 7.2 * len(peer.title)
    for exponent in range(DECADES[0], DECADES[1] + 1):
        x = _x(10.0**exponent)
        line = "#222" if exponent == 0 else "#ddd"
        body.append(f'<path d="M{x:.0f} {TOP}V{height - 36}" stroke="{line}"/>')
        label = "this service" if exponent == 0 else f"{10.0**exponent:g}x"
        body.append(_text(x, height - 16, label, text_anchor="middle"))
    for place, row in enumerate(rows):
        y = TOP + STEP * place + STEP / 2
        body.append(_text(LEFT - 12, y + 4, row.title, text_anchor="end"))
        for name, colour in COLOURS.items():
            if found := ratio(results, row, name):
                x = _x(1 / found.middle)
                body.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="6" fill="{colour}"/>')
                told = number(1 / found.middle)
                body.append(
                    _text(x, y - 9, told, text_anchor="middle", font_size="11", fill=colour)
                )
    return svg((WIDTH, height), body)


def curve(axis: str, unit: str, points: Sequence[tuple[float, float]]) -> str:
    """What it costs (in `unit`) against how many there are, the latter on a logarithmic axis."""
    width, height, left, bottom = 520, 300, 56, 50
    most = 1.25 * max(cost for _, cost in points)
    low, high = (math.log10(count) for count in (points[0][0], points[-1][0]))
    body = [_text(16, 24, f"{unit}, against {axis}", font_size="15")]
    places = []
    for count, cost in points:
        x = left + (math.log10(count) - low) / (high - low) * (width - left - 40)
        y = height - bottom - cost / most * (height - bottom - 50)
        places.append(f"{x:.0f},{y:.0f}")
        body.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" fill="#0b84a5"/>')
        body.append(_text(x, y - 10, number(cost), text_anchor="middle", font_size="11"))
        body.append(_text(x, height - bottom + 20, f"{count:,.0f}", text_anchor="middle"))
    line = f'<polyline points="{" ".join(places)}" fill="none" stroke="#0b84a5"/>'
    ground = f'<path d="M{left} {height - bottom}H{width - 20}" stroke="#222"/>'
    return svg((width, height), [*body, line, ground])
