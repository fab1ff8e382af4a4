"""openapi.json: that it is what the code says, all of it, and that the service does as it says."""

import asyncio
import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from starlette.middleware.trustedhost import TrustedHostMiddleware

from errors import ServiceError
from server import Drain
from service import EXPOSED_HEADERS, create_app
from settings import from_env
from telemetry import RequestContext
from tests.conftest import StartService, run_lifespan
from tools.openapi import FILE, HEADERS, ROOT, WHEN, Models, SessionView, document, text

BIN = Path(sys.executable).parent
KEY = "key-of-0123456789abcdefghij"
# Each program ends by itself long before.
PATIENCE_SECONDS = 300.0


def operations() -> Iterator[tuple[str, str, Any]]:
    """Path, method and description of each operation."""
    for path, item in document()["paths"].items():
        for method in item.keys() - {"parameters"}:
            yield path, method.upper(), item[method]


def leaves(kind: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    """The errors that are raised."""
    for child in kind.__subclasses__():
        yield from leaves(child)
    if not kind.__subclasses__():
        yield kind


def test_the_file_is_what_the_models_say() -> None:
    assert FILE.read_text(encoding="utf-8") == text(), "run `make openapi`"


async def test_it_has_every_route_and_no_other() -> None:
    settings = from_env({"STATE_URL": "memory://"})
    app: Any = create_app(settings, logging.Logger("test"), Drain())
    await run_lifespan(app)
    while isinstance(app, RequestContext | TrustedHostMiddleware):
        app = app.app
    routes = {(route.path, method) for route in app.routes for method in route.methods - {"HEAD"}}
    assert {(path, method) for path, method, _ in operations()} == routes


def test_it_tells_of_every_error_under_its_status() -> None:
    answers = [each for *_, operation in operations() for each in operation["responses"].items()]
    others = document()["components"]["responses"].values()
    answers += zip(("404", "405"), others, strict=True)
    for kind in leaves():
        told = [answer for status, answer in answers if status == str(kind.status)]
        assert any(f"`{kind.code}`: {WHEN[kind.code]}" in answer["description"] for answer in told)
    assert len(WHEN) == len(list(leaves()))


def test_it_tells_of_every_header_that_a_page_may_read() -> None:
    assert set(EXPOSED_HEADERS) < set(HEADERS)


async def test_what_no_model_writes_is_as_it_says(service: StartService) -> None:
    app = await service()
    session_id = (await (await app.chat()).events())[-1]["session_id"]
    models: dict[str, type[BaseModel]] = {"models": Models, f"sessions/{session_id}": SessionView}
    for path, model in models.items():
        body = await (await app.get(f"/api/v1/{path}")).body()
        assert list(json.loads(body)) == list(model.model_fields)
        model.model_validate_json(body, strict=True, extra="forbid")


# ---- by the programs of others


async def run(cwd: Path, *command: str, **env: str) -> str:
    """What a program printed; it has to end with 0."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **env},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(PATIENCE_SECONDS):
        printed = (await process.communicate())[0].decode()
    assert process.returncode == 0, printed
    return printed


@pytest.mark.slow
async def test_it_is_openapi_3_1(tmp_path: Path) -> None:
    await run(tmp_path, "openapi-spec-validator", "--schema", "3.1", str(FILE))


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        {"RATE_LIMIT": "off"},
        {"ALLOW_ANONYMOUS": "false", "API_KEYS": f"tester:{KEY}", "RATE_LIMIT_API_KEY": "off"},
        {"RATE_LIMIT": "100/minute"},
    ],
    ids=["anonymous", "with_a_key", "limited"],
)
async def test_schemathesis_finds_nothing(
    service: StartService, tmp_path: Path, env: dict[str, str]
) -> None:
    app = await service(**env)
    # A session's name may be chosen again once it is deleted: it is used after it was freed.
    asked = ["st", "run", f"{app.url}/openapi.json", "--seed", "1", "--max-examples", "50"]
    asked += ["--checks", "all", "--exclude-checks", "use_after_free", "--continue-on-failure"]
    if "API_KEYS" in env:
        asked += ["-H", f"Authorization: Bearer {KEY}"]
    printed = await run(tmp_path, *asked, SCHEMATHESIS_HOOKS="tests.schemathesis_hooks")
    assert re.search(r"([1-9]\d{2,}) generated, \1 passed", printed), printed


USE = """
import sys
from client import Client
from client.api.default import chat, read_session
from client.models import ChatRequest, ErrorBody, SessionView

client = Client(sys.argv[1])
answer = chat.sync_detailed(client=client, body=ChatRequest(message="Hello"))
assert '"status":"done"' in answer.parsed, answer
view = read_session.sync(answer.headers["X-Session-ID"], client=client)
assert isinstance(view, SessionView) and view.messages[0].content == "Hello", view
refused = chat.sync(client=client, body=ChatRequest(message=" "))
assert isinstance(refused, ErrorBody) and refused.error.code == "invalid_request", refused
"""


@pytest.mark.slow
async def test_a_client_made_from_it_sends_a_message(service: StartService, tmp_path: Path) -> None:
    app = await service()
    made = ["openapi-python-client", "generate", "--path", str(FILE), "--fail-on-warning"]
    await run(tmp_path, *made, "--meta", "none", "--output-path", "client")
    await run(tmp_path, sys.executable, "-c", USE, app.url, PYTHONPATH=str(tmp_path))
