"""The dashboard deploy/grafana.json shows every metric, and only metrics and labels that exist."""

import json
import os
import re
import shutil
from pathlib import Path

import anyio
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.client import CANARY
from tests.conftest import StartService, StartUpstream
from tests.upstream import Connection, response

ROOT = Path(__file__).parent.parent
TARGETS = [
    (target["expr"], target["legendFormat"])
    for panel in json.loads((ROOT / "deploy" / "grafana.json").read_text("utf-8"))["panels"]
    for target in panel["targets"]
]
# Prometheus adds it to every series that it scrapes.
ADDED = {"instance"}


def names(expression: str) -> list[str]:
    return re.findall(r"\b(?:chat|process)_\w+", expression)


def grouped(expression: str) -> set[str]:
    """Return the labels of the `sum by` clause."""
    clauses = re.findall(r"sum by \(([^)]*)\)", expression)
    return {name.strip() for clause in clauses for name in clause.split(",")}


def selected(expression: str) -> set[str]:
    """Return the labels of the selectors."""
    selectors = re.findall(r"\{([^}]*)\}", expression)
    return {name for text in selectors for name in re.findall(r"(\w+)\s*[=!]", text)}


async def exposition(service: StartService, upstream: StartUpstream) -> str:
    """Return /metrics after a failover, a completed and a rate-limited request."""

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
    """Return the name and the labels of every series."""
    text = await exposition(service, upstream)
    samples = [sample for each in text_string_to_metric_families(text) for sample in each.samples]
    return {sample.name: set(sample.labels) for sample in samples}


async def test_every_expression_uses_existing_metrics_and_labels(
    service: StartService, upstream: StartUpstream
) -> None:
    series = await exposed(service, upstream)
    for expression, _ in TARGETS:
        (name,) = names(expression)
        assert grouped(expression) | selected(expression) <= series[name] | ADDED, expression


async def test_dashboard_and_documentation_have_every_metric_and_no_other(
    service: StartService, upstream: StartUpstream
) -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    # The upgrade section has the names of older releases.
    documented = set(re.findall(r"\bchat_[a-z_]+", text.partition("\n## Upgrade")[0]))
    shown = {name for expression, _ in TARGETS for name in names(expression)}
    series = await exposed(service, upstream)
    for name in series:
        if not re.fullmatch(".*_(created|sum|count)|process_.*", name):
            assert name in shown
            assert name.removesuffix("_bucket") in documented
    assert documented <= series.keys() | {name.removesuffix("_bucket") for name in series}


@pytest.mark.parametrize(("expression", "legend"), TARGETS)
def test_legend_uses_labels_that_the_expression_keeps(expression: str, legend: str) -> None:
    assert set(re.findall(r"\{\{(\w+)\}\}", legend)) <= (grouped(expression) or ADDED)


@pytest.mark.slow
async def test_promtool_reports_no_problem_with_metrics(
    service: StartService, upstream: StartUpstream
) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        assert os.environ.get("CI") != "true"
        pytest.skip("promtool is not installed")
    text = await exposition(service, upstream)
    command = [promtool, "check", "metrics"]
    done = await anyio.run_process(command, input=text.encode(), check=False)
    assert (done.stdout, done.stderr, done.returncode) == (b"", b"", 0)
