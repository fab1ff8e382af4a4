"""Draws deploy/grafana.json from a real run: the service, a provider that is sometimes slow and
sometimes fails, callers who come and go, and a Prometheus that watches them.

`python -m tools.dashboard` writes deploy/dashboard.svg after three minutes; it needs Debian's
`prometheus`. Grafana itself is not needed: its expressions are evaluated and drawn as they stand.
"""

import asyncio
import json
import math
import random
import shutil
import sys
import time
from asyncio.subprocess import DEVNULL
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from html import escape
from pathlib import Path
from socket import create_server
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from urllib.parse import urlencode
from urllib.request import urlopen

from tests.client import Client
from tests.upstream import DONE, END, Connection, delta, event, response, running_upstream

ROOT = Path(__file__).parent.parent
GRAFANA = ROOT / "deploy" / "grafana.json"
KEY = "a-key-of-this-run-alone"
SECONDS = 180
# A scrape a second, so that a short run has enough of them; rates over fifteen.
CONFIG = """
global: {scrape_interval: 1s}
scrape_configs:
- {job_name: chat-sidecar, static_configs: [{targets: ["127.0.0.1:PORT"]}]}
"""
RATE_INTERVAL = "15s"


class Line(NamedTuple):
    """One line of a panel: its name, and its value at each time."""

    name: str
    points: list[tuple[float, float]]


class Panel(NamedTuple):
    """What grafana.json shows in one place: `asked` is pairs of an expression and a legend."""

    title: str
    unit: str
    asked: list[tuple[str, str]]


def panels() -> list[Panel]:
    """The panels of deploy/grafana.json."""
    return [
        Panel(
            panel["title"],
            panel["fieldConfig"]["defaults"]["unit"],
            [(target["expr"], target["legendFormat"]) for target in panel["targets"]],
        )
        for panel in json.loads(GRAFANA.read_text(encoding="utf-8"))["panels"]
    ]


# ---- the run


async def provide(request: Connection) -> None:
    """A provider on a mixed day."""
    large = request.body["model"] == "large"
    luck = random.random()  # noqa: S311 - no secret
    await asyncio.sleep(random.lognormvariate(-0.7 if large else -1.5, 0.5))
    if luck < 0.06:
        await request.send(response(500, b"{}"))
    elif luck < 0.09:
        await request.send(response(429, b"{}", "retry-after-ms: 200"))
    else:
        await request.stream(delta("Hello"))
        count = random.randint(20, 120 if large else 60)  # noqa: S311 - no secret
        for _ in range(count):
            await asyncio.sleep(random.lognormvariate(-4, 0.7))
            await request.send_events(delta(" word"))
        if luck > 0.98:
            request.reset()
            return
        usage = {"prompt_tokens": count // 2, "completion_tokens": count + 1}
        end = event({"choices": [], "usage": usage})
        await request.send_events(delta(finish_reason="stop"), end, DONE)
        await request.send(END)


async def chat(url: str) -> None:
    client = await Client.connect(url)
    try:
        model = random.choice(["small", "small", "large"])  # noqa: S311 - no secret
        known = {"authorization": f"Bearer {KEY}"}
        headers = known if random.random() < 0.7 else {}  # noqa: S311 - no secret
        reply = await client.chat("Hello", headers, model_id=model)
        await reply.body()
    finally:
        client.disconnect()


async def load(url: str, seconds: float) -> None:
    """Chats for `seconds`, now fewer, now more, at most ten new ones a second."""
    began = time.monotonic()
    async with asyncio.TaskGroup() as chats:
        while (passed := time.monotonic() - began) < seconds:
            chats.create_task(chat(url))
            rate = 6 + 4 * math.sin(passed / 15)
            await asyncio.sleep(random.expovariate(rate))


@asynccontextmanager
async def started(port: int, *command: str, **env: str) -> AsyncIterator[None]:
    """The program, once it listens on `port`."""
    process = await asyncio.create_subprocess_exec(*command, env=env, stdout=DEVNULL)
    try:
        while process.returncode is None:
            with suppress(ConnectionRefusedError):
                (await Client.connect(f"http://127.0.0.1:{port}")).disconnect()
                break
            await asyncio.sleep(0.1)
        yield
    finally:
        process.terminate()
        await process.wait()


def free_port() -> int:
    with create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


async def measured(prometheus: str, seconds: float) -> list[list[Line]]:
    """The lines of each panel, after a run of `seconds`."""
    port, address = free_port(), f"127.0.0.1:{free_port()}"
    async with AsyncExitStack() as stack:
        upstream = await stack.enter_async_context(running_upstream(provide))
        directory = Path(stack.enter_context(TemporaryDirectory()))
        env = {
            "PYTHONPATH": str(ROOT),
            "PORT": str(port),
            "STATE_URL": "memory://",
            "OPENAI_API_KEY": "sk-none",
            "OPENAI_BASE_URL": upstream.url,
            "PROVIDERS": "backup",
            "BACKUP_BASE_URL": upstream.url,
            "DEFAULT_MODEL": "small",
            "MODELS": "small,large",
            "FALLBACK_MODELS": "backup/small",
            "API_KEYS": f"app:{KEY}",
            "RATE_LIMIT": "2/second",
            "RATE_LIMIT_API_KEY": "off",
        }
        await stack.enter_async_context(started(port, sys.executable, "-m", "service", **env))
        config = directory / "prometheus.yml"
        config.write_text(CONFIG.replace("PORT", str(port)))
        flags = (f"--storage.tsdb.path={directory}/data", f"--web.listen-address={address}")
        command = (prometheus, f"--config.file={config}", *flags, "--log.level=error")
        await stack.enter_async_context(started(int(address.rpartition(":")[2]), *command))
        began = time.time()
        await load(f"http://127.0.0.1:{port}", seconds)
        return [await asyncio.to_thread(ask, address, panel, began) for panel in panels()]


def ask(address: str, panel: Panel, began: float) -> list[Line]:
    """What Prometheus says of a panel's expressions from `began` to now."""
    lines = []
    for expression, legend in panel.asked:
        query = expression.replace("$__rate_interval", RATE_INTERVAL)
        span = {"query": query, "start": began, "end": time.time(), "step": 1}
        with urlopen(f"http://{address}/api/v1/query_range?{urlencode(span)}") as answer:
            found = json.load(answer)["data"]["result"]
        for series in found:
            points = [(at - began, float(value)) for at, value in series["values"]]
            known = [(at, value) for at, value in points if math.isfinite(value)]
            lines.append(Line(named(legend, series["metric"]), known))
    return lines


def named(legend: str, labels: dict[str, Any]) -> str:
    """`legend` with the labels' values in place of `{{label}}`."""
    for label, value in labels.items():
        legend = legend.replace("{{" + label + "}}", value)
    return legend


# ---- the picture

COLOURS = ("#3274d9", "#e0752d", "#37872d", "#c4162a", "#8f3bb8", "#b58900", "#0f8a8a", "#777")
# Of a panel and of what is drawn in it, in pixels.
WIDTH, HEIGHT, PLOT, LEFT, TOP = 340, 225, 130, 55, 30


def shown(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:.0f} MiB"
    if unit == "percentunit":
        return f"{value:.0%}"
    if unit == "s" and value < 1:
        return f"{value * 1000:.3g} ms"
    return f"{value:.3g}" + {"s": " s", "reqps": "/s"}.get(unit, "")


def drawn(panel: Panel, lines: list[Line], seconds: float) -> str:
    """One panel: title, scale, lines, legend."""
    top = max((value for line in lines for _, value in line.points), default=0) or 1
    wide = WIDTH - LEFT - 20
    parts = [f'<text x="10" y="18" font-weight="bold">{escape(panel.title)}</text>']
    for share in (0, 0.5, 1):
        y = TOP + PLOT * (1 - share)
        parts.append(f'<path d="M{LEFT} {y:.0f}h{wide}" stroke="#ddd"/>')
        label = shown(top * share, panel.unit)
        parts.append(f'<text x="{LEFT - 5}" y="{y + 4:.0f}" text-anchor="end">{label}</text>')
    x, y = LEFT + wide, TOP + PLOT + 14
    parts.append(f'<text x="{x}" y="{y}" text-anchor="end">{seconds:.0f} s</text>')
    for number, line in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(
            f"{LEFT + at / seconds * wide:.0f},{TOP + PLOT * (1 - value / top):.1f}"
            for at, value in line.points
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        x, y = 10 + number % 2 * 165, TOP + PLOT + 28 + number // 2 * 13
        parts.append(
            f'<text x="{x}" y="{y}" fill="{colour}" font-size="10">{escape(line.name)}</text>'
        )
    return "".join(parts)


def picture(measurements: list[list[Line]]) -> str:
    """The dashboard as SVG, three panels a row."""
    seconds = max(at for lines in measurements for line in lines for at, _ in line.points)
    rows = math.ceil(len(measurements) / 3)
    size = f'width="{3 * WIDTH}" height="{rows * HEIGHT}"'
    font = 'font-family="sans-serif" font-size="11"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} {font}>',
        '<rect width="100%" height="100%" fill="#fff"/>',
    ]
    for number, (panel, lines) in enumerate(zip(panels(), measurements, strict=True)):
        x, y = number % 3 * WIDTH, number // 3 * HEIGHT
        parts.append(f'<g transform="translate({x} {y})">{drawn(panel, lines, seconds)}</g>')
    return "\n".join([*parts, "</svg>\n"])


def main() -> None:
    prometheus = shutil.which("prometheus")
    if prometheus is None:
        sys.exit("prometheus is not installed: apt-get install prometheus")
    measurements = asyncio.run(measured(prometheus, SECONDS))
    drawing = picture(measurements)
    (ROOT / "deploy" / "dashboard.svg").write_text(drawing, encoding="utf-8")


if __name__ == "__main__":
    main()
