"""deploy/grafana.json asks for what the service counts, all of it and nothing else."""

import os
import re
import shutil
from xml.etree import ElementTree

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.client import CANARY
from tests.conftest import StartService, StartUpstream
from tests.upstream import Connection, response
from tools.dashboard import measured, panels, picture

EXPRESSIONS = [expression for panel in panels() for expression, _ in panel.asked]
LEGENDS = [(expression, legend) for panel in panels() for expression, legend in panel.asked]
# A Prometheus adds it to what it scrapes.
ADDED = {"instance"}


def names(expression: str) -> list[str]:
    return re.findall(r"\b(?:chat|process)_\w+", expression)


def labels(expression: str) -> set[str]:
    """Those that it selects by and those that it sums by."""
    sums = re.findall(r"by \(([^)]*)\)", expression)
    selectors = re.findall(r"\{([^}]*)\}", expression)
    selected = {name for text in selectors for name in re.findall(r"(\w+)\s*[=!]", text)}
    return selected | {name.strip() for text in sums for name in text.split(",")}


async def exposition(service: StartService, upstream: StartUpstream) -> str:
    """/metrics of a service in which everything that is counted has happened once."""

    async def script(request: Connection) -> None:
        if len(provider.requests) == 1:
            await request.send(response(500, b"{}"))
        else:
            await request.complete("Hel", "lo")

    provider = await upstream(script)
    app = await service(
        OPENAI_API_KEY=CANARY,
        OPENAI_BASE_URL=provider.url,
        FALLBACK_MODELS="other",
        RATE_LIMIT="1/day",
    )
    for _ in range(2):
        await (await app.chat()).body()
    await app.log.wait_for_request(1)
    return (await (await app.get("/metrics")).body()).decode()


async def exposed(service: StartService, upstream: StartUpstream) -> dict[str, set[str]]:
    """Every series, with its labels."""
    text = await exposition(service, upstream)
    samples = [sample for each in text_string_to_metric_families(text) for sample in each.samples]
    return {sample.name: set(sample.labels) for sample in samples}


async def test_every_expression_asks_for_series_and_labels_that_there_are(
    service: StartService, upstream: StartUpstream
) -> None:
    known = await exposed(service, upstream)
    for expression in EXPRESSIONS:
        (name,) = names(expression)
        assert labels(expression) <= known[name] | ADDED, expression


async def test_whatever_is_counted_is_shown(service: StartService, upstream: StartUpstream) -> None:
    shown = {name for expression in EXPRESSIONS for name in names(expression)}
    known = await exposed(service, upstream)
    left_out = re.compile(".*_(created|sum|count)|process_.*")
    assert {name for name in known if not left_out.fullmatch(name)} <= shown


@pytest.mark.parametrize(("expression", "legend"), LEGENDS)
def test_a_legend_names_labels_that_are_left(expression: str, legend: str) -> None:
    kept = re.findall(r"sum by \(([^)]*)\)", expression)
    summed = {name.strip() for text in kept for name in text.split(",")} or ADDED
    assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= summed


def found_or_skipped(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        assert os.environ.get("CI") != "true"
        pytest.skip(f"{program} is not installed")
    return path


@pytest.mark.slow
async def test_prometheus_has_nothing_to_say_about_names_and_units(
    service: StartService, upstream: StartUpstream
) -> None:
    promtool = found_or_skipped("promtool")
    text = await exposition(service, upstream)
    command = [promtool, "check", "metrics"]
    done = await anyio.run_process(command, input=text.encode(), check=False)
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 0)


@pytest.mark.slow
async def test_a_real_prometheus_finds_what_the_panels_show() -> None:
    found = await measured(found_or_skipped("prometheus"), 20)
    # Whether anybody is refused or anything tried again is left to chance.
    chance = ("Retries and failovers", "Refused by the limiter")
    empty = [panel.title for panel, lines in zip(panels(), found, strict=True) if not lines]
    assert set(empty) <= set(chance)
    assert len(ElementTree.fromstring(picture(found)).findall(".//{*}g")) == len(found)
