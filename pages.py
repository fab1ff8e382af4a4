"""What is served as it lies in `static/`: the page at `/` and the OpenAPI document."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

STATIC = Path(__file__).with_name("static")
ELEMENT = rb"<(script|style)>(.*?)</\1>"


def openapi_route() -> Route:
    return _route("/openapi.json", "openapi.json", "application/json", {})


def page_route() -> Route:
    policy = content_security_policy((STATIC / "page.html").read_bytes())
    headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
    return _route("/", "page.html", "text/html; charset=utf-8", headers)


def content_security_policy(page: bytes) -> str:
    """Nothing may run or load but the page's own script and style, known by their hashes, so that
    nothing in a model's answer can (CSP 3, 6.7.3.3: hashes of inline blocks). Not even the page's
    own script may make HTML of text (Trusted Types)."""
    sources = {"script": "'none'", "style": "'none'"}
    for kind, text in re.findall(ELEMENT, page, re.DOTALL):
        digest = base64.b64encode(hashlib.sha256(text).digest()).decode()
        sources[kind.decode()] = f"'sha256-{digest}'"
    return (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']};"
        " connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _route(path: str, file: str, media_type: str, headers: dict[str, str]) -> Route:
    body = (STATIC / file).read_bytes()
    told = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache", **headers}

    async def show(request: Request) -> Response:
        return Response(body, headers=told, media_type=media_type)

    return Route(path, show)
