"""static/openapi.json matches the code and the running service, and other tools can use it."""

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

from errors import KINDS, Code
from server import Drain
from service import EXPOSED_HEADERS, create_app
from settings import from_env
from telemetry import RequestContext
from tests.conftest import StartService, run_lifespan
from tools.openapi import FILE, HEADERS, MEANINGS, ROOT, Models, SessionView, document, text

BIN = Path(sys.executable).parent
KEY = "key-of-0123456789abcdefghij"
# Each program takes far less.
PATIENCE_SECONDS = 300.0


def operations() -> Iterator[tuple[str, str, Any]]:
    """Return path, method and description of each operation."""
    for path, item in document()["paths"].items():
        for method in item.keys() - {"parameters"}:
            yield path, method.upper(), item[method]


def test_file_is_up_to_date() -> None:
    assert FILE.read_text(encoding="utf-8") == text(), "run `make openapi`"


async def test_documented_routes_are_the_routes_of_the_app() -> None:
    settings = from_env({"STATE_URL": "memory://"})
    app: Any = create_app(settings, logging.Logger("test"), Drain())
    await run_lifespan(app)
    while isinstance(app, RequestContext | TrustedHostMiddleware):
        app = app.app
    routes = {(route.path, method) for route in app.routes for method in route.methods - {"HEAD"}}
    # The files of the playground are not part of the API.
    routes = {(path, method) for path, method in routes if not path.endswith((".css", ".js"))}
    assert {(path, method) for path, method, _ in operations()} == routes


# These two errors are for routes and methods that are not documented.
@pytest.mark.parametrize("code", sorted(KINDS.keys() - {"not_found", "method_not_allowed"}))
def test_every_error_code_is_documented_under_its_status(code: Code) -> None:
    responses = [each for *_, operation in operations() for each in operation["responses"].items()]
    status = str(KINDS[code].status)
    texts = [response["description"] for number, response in responses if number == status]
    assert any(f"`{code}`: {MEANINGS[code]}" in text for text in texts)


def test_every_header_that_cors_exposes_is_documented() -> None:
    assert set(EXPOSED_HEADERS) < set(HEADERS)


async def test_models_and_session_responses_match_their_schemas(service: StartService) -> None:
    app = await service()
    session_id = (await (await app.chat()).events())[-1]["session_id"]
    models: dict[str, type[BaseModel]] = {"models": Models, f"sessions/{session_id}": SessionView}
    for path, model in models.items():
        body = await (await app.get(f"/api/v1/{path}")).body()
        assert list(json.loads(body)) == list(model.model_fields)
        model.model_validate_json(body, strict=True, extra="forbid")


# ---- other tools


async def run(cwd: Path, *command: str, **env: str) -> str:
    """Return the output of a program. It must exit with status 0."""
    process = await asyncio.create_subprocess_exec(
        *command,
        cwd=cwd,
        env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), **env},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    async with asyncio.timeout(PATIENCE_SECONDS):
        output = (await process.communicate())[0].decode()
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
async def test_file_is_valid_openapi_3_1(tmp_path: Path) -> None:
    await run(tmp_path, "openapi-spec-validator", "--schema", "3.1", str(FILE))


@pytest.mark.slow
@pytest.mark.parametrize(
    "env",
    [
        {"RATE_LIMIT": "off"},
        {"ALLOW_ANONYMOUS": "false", "API_KEYS": f"tester:{KEY}", "RATE_LIMIT_API_KEY": "off"},
        {"RATE_LIMIT": "100/minute"},
    ],
    ids=["anonymous", "api_key", "rate_limited"],
)
async def test_schemathesis_finds_no_violation(
    service: StartService, tmp_path: Path, env: dict[str, str]
) -> None:
    app = await service(**env)
    # `use_after_free` expects 404 for a deleted session, but its id may be chosen again.
    command = ["st", "run", f"{app.url}/openapi.json", "--seed", "1", "--max-examples", "50"]
    command += ["--checks", "all", "--exclude-checks", "use_after_free", "--continue-on-failure"]
    if "API_KEYS" in env:
        command += ["-H", f"Authorization: Bearer {KEY}"]
    output = await run(tmp_path, *command, SCHEMATHESIS_HOOKS="tests.schemathesis_hooks")
    assert re.search(r"([1-9]\d{2,}) generated, \1 passed", output), output


USE = """
import sys
from client import Client
from client.api.default import chat, read_session
from client.models import ChatRequest, ErrorBody, SessionView

client = Client(sys.argv[1])
response = chat.sync_detailed(client=client, body=ChatRequest(message="Hello"))
assert '"status":"done"' in response.parsed, response
view = read_session.sync(response.headers["X-Session-ID"], client=client)
assert isinstance(view, SessionView) and view.messages[0].content == "Hello", view
error = chat.sync(client=client, body=ChatRequest(message=" "))
assert isinstance(error, ErrorBody) and error.error.code == "invalid_request", error
"""


@pytest.mark.slow
async def test_generated_client_sends_a_message(service: StartService, tmp_path: Path) -> None:
    app = await service()
    command = ["openapi-python-client", "generate", "--path", str(FILE), "--fail-on-warning"]
    await run(tmp_path, *command, "--meta", "none", "--output-path", "client")
    await run(tmp_path, sys.executable, "-c", USE, app.url, PYTHONPATH=str(tmp_path))
