"""The files in `static/` and the headers they are served with."""

import json
import re
from typing import get_args

import pytest

from errors import Code
from service import STATIC
from tests.conftest import StartService

SCRIPTS = {file.name for file in STATIC.glob("*.js")}
MEDIA_TYPES = {
    "/": "text/html; charset=utf-8",
    "/playground.css": "text/css; charset=utf-8",
    "/openapi.json": "application/json",
    **{f"/{script}": "text/javascript; charset=utf-8" for script in sorted(SCRIPTS)},
}


def policy(headers: dict[str, str]) -> dict[str, str]:
    """Return the directives of the Content-Security-Policy."""
    directives = headers["content-security-policy"].split("; ")
    return {name: value for name, _, value in (each.partition(" ") for each in directives)}


@pytest.mark.parametrize("path", MEDIA_TYPES)
async def test_static_file_is_served_with_policy_and_route_label(
    service: StartService, path: str
) -> None:
    app = await service()
    response = await app.get(path)
    file = STATIC / (path[1:] or "playground.html")
    assert (response.status, await response.body()) == (200, file.read_bytes())
    assert response.headers["content-type"] == MEDIA_TYPES[path]
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["referrer-policy"] == "no-referrer"
    assert policy(response.headers) == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
        "trusted-types": "'none'",
    }
    assert await app.metric(f'chat_request_duration_seconds_count{{route="{path}"}}') == 1


async def test_playground_can_be_turned_off(service: StartService) -> None:
    app = await service(PLAYGROUND="off")
    for path in MEDIA_TYPES.keys() - {"/openapi.json"}:
        assert (await app.get(path)).status == 404
    assert (await app.get("/openapi.json")).status == 200


def test_openapi_document_is_version_3_1() -> None:
    assert json.loads((STATIC / "openapi.json").read_bytes())["openapi"] == "3.1.0"


def test_every_script_is_imported() -> None:
    imported = {"playground.js"}
    for script in SCRIPTS:
        text = (STATIC / script).read_text(encoding="utf-8")
        imported.update(re.findall(r'from "\./(.+)";', text))
    assert imported == SCRIPTS


def test_playground_has_at_most_900_lines_of_code() -> None:
    text = "".join((STATIC / script).read_text(encoding="utf-8") for script in SCRIPTS)
    code = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
    lines = [line for line in code.splitlines() if not re.match(r"\s*(//.*)?$", line)]
    assert 500 < len(lines) <= 900


def test_playground_has_no_inline_code() -> None:
    page = (STATIC / "playground.html").read_text(encoding="utf-8")
    assert re.findall(r"<script([^>]*)>(.*?)</script>", page) == [
        (' type="module" src="playground.js"', "")
    ]
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:", page)


def test_playground_knows_only_error_codes_of_the_service() -> None:
    script = (STATIC / "client.js").read_text(encoding="utf-8")
    table = script.partition("const SENTENCES = {")[2].partition("};")[0]
    codes = set(re.findall(r"^  (\w+): ", table, re.MULTILINE))
    # The last two are errors that only the browser sees.
    assert codes - {*get_args(Code)} == {"connection_lost", "unreachable"}
