"""The example of a web page, in a real Chromium, on an origin that is not the service's."""

import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

pytest.importorskip("playwright", reason="needs what `make test-all` installs")
from playwright.async_api import async_playwright

from tests.browser import Line
from tests.conftest import StartService
from tests.redis_server import find_program as program
from tests.test_examples import EXAMPLES

pytestmark = pytest.mark.slow

MOCK = "This is a mock: no model is behind it. Set OPENAI_API_KEY to ask one. You said: "


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *told: object) -> None:
        """Nothing on stderr."""


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where the page and its parser are, as examples/README.md has them served."""
    folder = tmp_path_factory.mktemp("served")
    for name in ("ask.html", "package.json", "package-lock.json"):
        (folder / name).write_bytes((EXAMPLES / name).read_bytes())
    installing = [program("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run(installing, cwd=folder, check=True, capture_output=True)
    handler = partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        serving = Thread(target=server.serve_forever)
        serving.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        serving.join()


@pytest.fixture
async def page() -> AsyncIterator[Any]:
    chromium = program("chromium")
    # As root, which CI is, Chromium does not start with its sandbox.
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    async with (
        async_playwright() as playwright,
        await playwright.chromium.launch(executable_path=chromium, args=args) as browser,
    ):
        yield await browser.new_page()


async def ask(page: Any, origin: str, url: str, model: str, silence: float = 60) -> None:
    await page.goto(f"{origin}/ask.html?url={url}&model={model}&silence={silence}")
    await page.fill("input", "<b>Hello</b>")
    await page.click("text=Ask")


async def ending(page: Any) -> tuple[str, str]:
    """The answer and what is said of its end, once it has ended."""
    await page.wait_for_function("end.textContent")
    return await page.text_content("#answer"), await page.text_content("#end")


@pytest.mark.parametrize(
    ("model", "text", "end"),
    [
        ("echo", f"{MOCK}<b>Hello</b>", "done"),
        ("unicode", "naïve 日本語 👩‍👩‍👧 नमस्ते سلام e\u0301 line\u2028separator", "done"),
        ("lorem-0", "", "invalid_request: "),
        ("error-midstream", "This is mock/error-midstream, not a model ", "upstream_error: "),
    ],
)
async def test_the_page_deals_with_every_ending(
    service: StartService, origin: str, page: Any, model: str, text: str, end: str
) -> None:
    app = await service(CORS_ORIGINS=origin)
    await ask(page, origin, app.url, f"mock/{model}")
    answer, told = await ending(page)
    assert (answer, told[: len(end)]) == (text, end)


async def test_stop_closes_the_connection(service: StartService, origin: str, page: Any) -> None:
    app = await service(CORS_ORIGINS=origin)
    await ask(page, origin, app.url, "mock/slow")
    await page.wait_for_function("answer.textContent")
    await page.click("text=Stop")
    assert (await ending(page))[1] == "stopped"
    # Before it the browser asked whether the page may ask.
    assert (await app.log.wait_for_request(1))["outcome"] == "client_disconnected"


async def test_a_cut_connection_is_not_taken_for_an_end(
    service: StartService, origin: str, page: Any
) -> None:
    app = await service(CORS_ORIGINS=origin)
    line = Line(app.url)
    await ask(page, origin, await line.listen(), "mock/slow")
    await page.wait_for_function("answer.textContent")
    line.cut()
    assert (await ending(page))[1].startswith("The answer was cut off: ")


async def test_a_silent_connection_is_given_up(
    service: StartService, origin: str, page: Any
) -> None:
    # Not even the status line comes before an error would.
    limits = {"HEARTBEAT_SECONDS": "60", "FIRST_TOKEN_TIMEOUT_SECONDS": "10"}
    app = await service(CORS_ORIGINS=origin, **limits)
    await ask(page, origin, app.url, "mock/hang", silence=0.2)
    assert await ending(page) == ("", "The answer was cut off: silence")
    assert (await app.log.wait_for_request(1))["outcome"] == "client_disconnected"


async def test_a_comment_is_a_sign_of_life(service: StartService, origin: str, page: Any) -> None:
    limits = {"HEARTBEAT_SECONDS": "0.1", "FIRST_TOKEN_TIMEOUT_SECONDS": "3"}
    app = await service(CORS_ORIGINS=origin, **limits)
    await ask(page, origin, app.url, "mock/hang", silence=2)
    assert (await ending(page))[1].startswith("upstream_timeout: ")
