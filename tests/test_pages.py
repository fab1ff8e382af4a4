"""What is served as it lies in `static/`, and which of it a browser may run."""

import base64
import hashlib
import json
import re
from typing import get_args

from errors import Code
from service import STATIC
from tests.conftest import StartService


def source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def test_a_page_may_run_its_own_script_and_style_and_nothing_else() -> None:
    page = "<style>b{}</style><p>&lt;script&gt;</p><script>\n'é'\n</script>"
    policy = dict(
        directive.split(" ", 1) for directive in content_security_policy(page.encode()).split("; ")
    )
    assert policy["default-src"] == "'none'"
    assert policy["style-src"] == source("b{}")
    assert policy["script-src"] == source("\n'é'\n")
    assert policy["trusted-types"] == "'none'"
    assert "unsafe" not in str(policy)


def test_a_page_without_script_may_run_none() -> None:
    assert "script-src 'none'; style-src 'none'" in content_security_policy(b"<p>Hello")


async def test_the_page_is_served_with_its_policy(service: StartService) -> None:
    app = await service()
    reply = await app.get("/")
    page = (STATIC / "page.html").read_bytes()
    assert (reply.status, await reply.body()) == (200, page)
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    assert reply.headers["content-security-policy"] == content_security_policy(page)
    assert reply.headers["x-content-type-options"] == "nosniff"


async def test_the_page_can_be_switched_off(service: StartService) -> None:
    app = await service(PLAYGROUND="off")
    assert (await app.get("/")).status == 404
    assert (await app.get("/openapi.json")).status == 200


async def test_the_openapi_document_is_served(service: StartService) -> None:
    app = await service()
    reply = await app.get("/openapi.json")
    assert reply.headers["content-type"] == "application/json"
    assert (await reply.json())["openapi"] == "3.1.0"
    assert (
        json.loads((STATIC / "openapi.json").read_bytes())
        == await (await app.get("/openapi.json")).json()
    )


def test_the_page_has_a_sentence_for_every_error() -> None:
    script = (STATIC / "page.html").read_text(encoding="utf-8")
    sentences = script.partition("const SENTENCES = {")[2].partition("};")[0]
    found = set(re.findall(r"(\w+): (?:MISFIT|\")", sentences))
    # What the browser alone notices has a sentence too.
    assert found == {*get_args(Code), "cut", "unreachable"}
