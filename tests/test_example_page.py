"""The example web page, in a real Chromium, on another origin than the service."""

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

from providers import NO_MODEL
from tests.browser import Proxy
from tests.conftest import StartService
from tests.redis_server import find_program
from tests.test_examples import EXAMPLES

pytestmark = pytest.mark.slow


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Write nothing to stderr."""


@pytest.fixture(scope="module")
def origin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the page and its parser as examples/README.md describes. Return the origin."""
    folder = tmp_path_factory.mktemp("served")
    for name in ("client.html", "resume.html", "package.json", "package-lock.json"):
        (folder / name).write_bytes((EXAMPLES / name).read_bytes())
    install = [find_program("npm"), "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    subprocess.run(install, cwd=folder, check=True, capture_output=True)
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture
async def page() -> AsyncIterator[Any]:
    chromium = find_program("chromium")
    # CI runs as root, where Chromium's sandbox does not work.
    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    async with (
        async_playwright() as playwright,
        await playwright.chromium.launch(executable_path=chromium, args=args) as browser,
    ):
        yield await browser.new_page()


async def send(
    page: Any, origin: str, url: str, model: str, silence: float = 60, name: str = "client"
) -> None:
    await page.goto(f"{origin}/{name}.html?url={url}&model={model}&silence={silence}")
    await page.fill("input", "<b>Hello</b>")
    await page.click("text=Send")


async def ending(page: Any) -> tuple[str, str]:
    """Wait for the end. Return the text, and what the page says about the end."""
    await page.wait_for_function("end.textContent")
    return await page.text_content("#text"), await page.text_content("#end")


@pytest.mark.parametrize(
    ("model", "text", "end"),
    [
        ("echo", f"{NO_MODEL} You said: <b>Hello</b>", "done"),
        ("unicode", "naïve 日本語 👩‍👩‍👧 नमस्ते سلام e\u0301 line\u2028separator", "done"),
        ("lorem-0", "", "invalid_request: "),
        ("error-midstream", "This is mock/error-midstream, not a model ", "upstream_error: "),
    ],
)
async def test_page_shows_text_and_end_of_each_outcome(
    service: StartService, origin: str, page: Any, model: str, text: str, end: str
) -> None:
    app = await service(CORS_ORIGINS=origin)
    await send(page, origin, app.url, f"mock/{model}")
    shown, message = await ending(page)
    assert (shown, message[: len(end)]) == (text, end)


async def test_page_retries_after_the_time_in_the_error(
    service: StartService, origin: str, page: Any
) -> None:
    app = await service(CORS_ORIGINS=origin, RATE_LIMIT="1/second")
    await send(page, origin, app.url, "mock/empty")
    assert await ending(page) == ("", "done")
    await send(page, origin, app.url, "mock/rate-limited")
    assert (await ending(page))[1].startswith("upstream_unavailable: ")
    entries = [entry for entry in app.log.requests() if entry["route"] == "/api/v1/chat"]
    statuses = [entry["status"] for entry in entries if entry["method"] == "POST"]
    assert statuses.count(503) + statuses.count(429) == 3


async def test_stop_closes_the_connection(service: StartService, origin: str, page: Any) -> None:
    app = await service(CORS_ORIGINS=origin)
    await send(page, origin, app.url, "mock/slow")
    await page.wait_for_function("text.textContent")
    await page.click("text=Stop")
    assert (await ending(page))[1] == "Stopped"
    # The first request is the preflight request.
    assert (await app.log.wait_for_request(1))["outcome"] == "client_disconnected"


async def test_reset_connection_is_shown_as_lost(
    service: StartService, origin: str, page: Any
) -> None:
    app = await service(CORS_ORIGINS=origin)
    proxy = Proxy(app.url)
    await send(page, origin, await proxy.listen(), "mock/slow")
    await page.wait_for_function("text.textContent")
    proxy.cut()
    assert (await ending(page))[1].startswith("The connection was lost: ")


async def test_silent_connection_is_shown_as_lost(
    service: StartService, origin: str, page: Any
) -> None:
    # The service sends nothing before the error, not even the status line.
    limits = {"HEARTBEAT_SECONDS": "60", "FIRST_TOKEN_TIMEOUT_SECONDS": "10"}
    app = await service(CORS_ORIGINS=origin, **limits)
    await send(page, origin, app.url, "mock/hang", silence=0.2)
    assert await ending(page) == ("", "The connection was lost: silence")
    assert (await app.log.wait_for_request(1))["outcome"] == "client_disconnected"


async def test_heartbeats_keep_the_connection(
    service: StartService, origin: str, page: Any
) -> None:
    limits = {"HEARTBEAT_SECONDS": "0.1", "FIRST_TOKEN_TIMEOUT_SECONDS": "3"}
    app = await service(CORS_ORIGINS=origin, **limits)
    await send(page, origin, app.url, "mock/hang", silence=2)
    assert (await ending(page))[1].startswith("upstream_timeout: ")


@pytest.mark.parametrize("loss", ["reload", "cut"])
async def test_resuming_page_survives_a_reload_and_a_lost_connection(
    service: StartService, origin: str, page: Any, loss: str
) -> None:
    app = await service(CORS_ORIGINS=origin)
    proxy = Proxy(app.url)
    await send(page, origin, await proxy.listen(), "mock/slow", name="resume")
    await page.wait_for_function("text.textContent")
    if loss == "reload":
        await page.reload()
    else:
        proxy.reset()
    assert await ending(page) == ("This is mock/slow, not a model ", "done")
    proxy.cut()
    entries = [entry for entry in app.log.requests() if entry["method"] == "POST"]
    assert len(entries) == 2
    assert entries[1]["original_request_id"] == entries[0]["request_id"]


async def test_resuming_page_stops_the_stream(
    service: StartService, origin: str, page: Any
) -> None:
    app = await service(CORS_ORIGINS=origin)
    await send(page, origin, app.url, "mock/slow", name="resume")
    await page.wait_for_function("text.textContent")
    await page.click("text=Stop")
    assert (await ending(page))[1] == "stopped"
