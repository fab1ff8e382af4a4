"""What is served as it lies in `static/`: the page at `/` and the OpenAPI document."""

import base64
import hashlib
import re
from pathlib import Path

from starlette.responses import Response
from starlette.routing import Route

STATIC = Path(__file__).with_name("static")
ELEMENT = rb"<(script|style)>(.*?)</\1>"


def route(path: str, file: str, media_type: str) -> Route:
    """`file` at `path`, read now, with a policy that lets nothing but its own blocks run."""
    body = (STATIC / file).read_bytes()
    headers = {
        "Cache-Control": "no-cache",
        "Content-Security-Policy": content_security_policy(body),
        "Referrer-Policy": "no-referrer",
    }
    return Route(path, Response(body, headers=headers, media_type=media_type), methods=["GET"])


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
