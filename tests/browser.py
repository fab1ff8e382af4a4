"""The playground in a real Chromium, and a TCP proxy that a test can cut."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.async_api import Page, async_playwright

CHROMIUM = Path("/usr/bin/chromium")
# Chromium logs each response with an error status. The playground shows those itself.
ERROR_STATUS = "Failed to load resource: the server responded with a status of"


@dataclass
class Tab:
    """A browser tab with the playground, and what a user does with it."""

    page: Page
    url: str
    # Errors and warnings in the console, and requests to other hosts: there must be none.
    problems: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", self._on_request)

    def _on_console(self, message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(ERROR_STATUS):
            self.problems.append(message.text)

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:")):
            self.problems.append(request.url)

    async def send(self, message: str, model: str | None = None) -> None:
        if model is not None:
            await self.page.select_option("#model", model)
        await self.page.fill("#message", message)
        await self.page.press("#message", "Enter")

    async def ending(self, number: int = 1) -> str:
        """Wait until this response has ended. Return what the playground says about its end."""
        response = self.page.locator(".assistant").nth(number - 1)
        ending = response.locator("> footer > .note, > .problem")
        await ending.wait_for(state="attached")
        text: str = await ending.inner_text()
        return text

    async def response_text(self) -> str:
        """Return the text of the newest response."""
        text: str = await self.page.locator(".assistant .text").last.inner_text()
        return text

    async def reload(self) -> None:
        """Reload, and wait for the messages of the conversation."""
        await self.page.reload()
        await self.page.wait_for_selector("article")

    async def until(self, condition: str) -> None:
        """Wait until a JavaScript condition is true.

        The content security policy forbids Playwright's own wait_for_function.
        """
        await self.page.evaluate(
            f"""new Promise((resolve) => {{
                const look = () => {condition} ? resolve() : requestAnimationFrame(look);
                look();
            }})"""
        )

    async def session_id(self) -> str:
        found: str = await self.page.evaluate("sessionStorage.session")
        return found


@asynccontextmanager
async def open_tab(url: str, **context: Any) -> AsyncIterator[Tab]:
    """Open `url` in a new browser. Playwright's options for a page go to `context`."""
    async with (
        async_playwright() as playwright,
        # CI runs as root, where Chromium's sandbox does not work.
        await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else []
        ) as browser,
    ):
        page = await (await browser.new_context(**context)).new_page()
        tab = Tab(page, url)
        tab.watch()
        await page.goto(url)
        # The list of models has arrived.
        await page.wait_for_selector("#model option[value=other]", state="attached")
        yield tab
        assert await page.context.cookies() == []
        assert tab.problems == []


def require_chromium() -> None:
    """Skip the test if Chromium is missing. CI installs it."""
    if not CHROMIUM.exists() and not os.environ.get("CI"):
        pytest.skip("needs Debian's chromium")


class Proxy:
    """A TCP proxy in front of the service."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self._writers: list[asyncio.StreamWriter] = []
        self._port = 0

    async def listen(self) -> str:
        """Start to listen on a free port, and after a cut on the same one. Return the URL."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{self._port}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        service = await asyncio.open_connection(self._target.hostname, self._target.port)
        self._writers += [writer, service[1]]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_copy(reader, service[1]))
            tasks.create_task(_copy(service[0], writer))

    def cut(self) -> None:
        """Reset all connections and accept no new ones."""
        self._server.close()
        self.reset()

    def reset(self) -> None:
        """Reset all connections. New ones are accepted."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()
