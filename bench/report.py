"""The table of a run: the service's figures, and their ratio to each peer's.

A ratio is taken within a round, so that a slow moment of the machine affects both sides. The table
shows the median of the rounds and, below it, the lowest and highest. Below 1 the service is
cheaper.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from bench.peers import PEERS, SERVICE

# The figures of each round by peer: {"service": [{"burst.failed": 0, ...}, ...], "nginx": ...}.
Results = Mapping[str, Sequence[Mapping[str, float]]]
TABLE = Path(__file__).parent / "results/table.md"


@dataclass(frozen=True)
class Row:
    """One figure: its title, its unit, and the goals it has to meet."""

    figure: str
    title: str
    unit: str
    scale: float = 1.0
    # The highest acceptable value of the service, in the row's unit.
    limit: float | None = None
    # The highest acceptable ratio, by peer.
    ratios: Mapping[str, float] = field(default_factory=dict)
    # Whether a peer's column contains its own value instead of the ratio to it.
    absolute: bool = False


# fmt: off
ROWS = (
    Row("request.cpu_us", "request: CPU per request", "µs",
        ratios={"0.1.0": 0.50, "ferro": 0.80}),
    Row("request.ttft_p50", "request: TTFT p50", "ms", ratios={"ferro": 1.4}),
    Row("paced.cpu_us_per_event", "paced: CPU per event", "µs",
        ratios={"0.1.0": 0.60, "ferro": 0.80}),
    Row("burst.cpu_us_per_event", "burst: CPU per event", "µs",
        ratios={"0.1.0": 0.60, "ferro": 0.38}),
    Row("arrival.ttft_p99", "arrival: TTFT p99", "ms"),
    Row("hold.cpu_us_per_event", "hold: CPU per event", "µs",
        ratios={"0.1.0": 0.50, "ferro": 0.90}),
    Row("hold.ttft_p99", "hold: TTFT p99", "ms", ratios={"ferro": 1.0}),
    Row("hold.memory_per_stream", "hold: memory per stream", "KiB", 1 / 1024,
        ratios={"ferro": 0.42}),
    Row("hold.late", "hold: late streams", "", limit=0, absolute=True),
    Row("start.cpu", "start: CPU until ready", "s", limit=0.35),
    Row("start.idle_memory", "start: idle memory", "MB", 1e-6, limit=50),
    Row("failed", "failed requests, all loads", "", limit=0, absolute=True),
)
# fmt: on


def table(results: Results) -> str:
    """Return a Markdown table of the measured rows. Goals are shown, and misses are bold."""
    peers = [peer for peer in PEERS if peer is SERVICE or any(results.get(peer.name, ()))]
    lines = [
        "| | " + " | ".join(peer.title for peer in peers) + " |",
        "|---|" + "--:|" * len(peers),
    ]
    for row in ROWS:
        cells = [_cell(values(results, row, SERVICE.name), row.unit, row.limit)]
        for peer in peers[1:]:
            if row.absolute:
                cells.append(_cell(values(results, row, peer.name), row.unit))
            else:
                cells.append(_cell(ratios(results, row, peer.name), "", row.ratios.get(peer.name)))
        if any(cells):
            lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def values(results: Results, row: Row, peer: str) -> list[float]:
    """Return a program's figure in each round in which it was measured, in the row's unit."""
    return [each[row.figure] * row.scale for each in results.get(peer, ()) if row.figure in each]


def ratios(results: Results, row: Row, peer: str) -> list[float]:
    """Return the service's figure divided by the peer's, for each round that has both."""
    rounds = zip(results.get(SERVICE.name, ()), results.get(peer, ()), strict=False)
    return [
        ours[row.figure] / theirs[row.figure]
        for ours, theirs in rounds
        if ours.get(row.figure) and theirs.get(row.figure)
    ]


def number(value: float) -> str:
    """Return the value with three significant digits: 0.0123, 1.23, 12, 12,345."""
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _cell(rounds: Sequence[float], unit: str, goal: float | None = None) -> str:
    if not rounds:
        return ""
    middle, low, high = median(rounds), min(rounds), max(rounds)
    text = f"{number(middle)} {unit}".strip()
    missed = goal is not None and middle > goal
    if missed:
        text = f"**{text}**"
    if low != high:
        text += f" <sub>{number(low)} to {number(high)}</sub>"
    if goal is not None:
        text += f" ({'missed goal' if missed else 'goal'}: {goal:g})"
    return text


def summary() -> str:
    """Return the table of the last complete run, for the documentation."""
    return TABLE.read_text()
