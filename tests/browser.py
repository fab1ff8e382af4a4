"""The page in a real Chromium, and a line to the service that can be cut."""

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
# Chromium's own line for each answer that is an error; the page shows such an answer itself.
REFUSED = "Failed to load resource: the server responded with a status of"


@dataclass
class Tab:
    """The page in a tab of a browser of its own, and what a person does with it."""

    page: Page
    url: str
    # What must not be: errors in the console, requests to anywhere else, dialogs nobody expects.
    troubles: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", self._said)
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("request", self._requested)

    def _said(self, message: Any) -> None:
        if message.type in ("error", "warning") and not message.text.startswith(REFUSED):
            self.troubles.append(message.text)

    def _requested(self, request: Any) -> None:
        if not request.url.startswith((self.url, "data:")):
            self.troubles.append(request.url)

    async def say(self, message: str, model: str | None = None) -> None:
        if model is not None:
            await self.page.select_option("#model", model)
        await self.page.fill("#message", message)
        await self.page.press("#message", "Enter")

    async def ended(self, count: int = 1) -> str:
        """What stands below the answer of that number once it has ended: a note or a problem."""
        answer = self.page.locator(".assistant").nth(count - 1)
        ending = answer.locator("> .note, > .problem")
        await ending.wait_for()
        text: str = await ending.inner_text()
        return text

    async def response_text(self) -> str:
        """The text of the newest answer."""
        text: str = await self.page.locator(".assistant .text").last.inner_text()
        return text

    async def reload(self) -> None:
        """With the conversation, as far as there is one."""
        await self.page.reload()
        await self.page.wait_for_selector("article")

    async def until(self, condition: str) -> None:
        """Playwright's own wait_for_function would need `unsafe-eval`."""
        await self.page.evaluate(
            f"""new Promise((resolve) => {{
                const look = () => {condition} ? resolve() : requestAnimationFrame(look);
                look();
            }})"""
        )

    async def session(self) -> str:
        found: str = await self.page.evaluate("sessionStorage.session")
        return found


@asynccontextmanager
async def open_tab(url: str, **context: Any) -> AsyncIterator[Tab]:
    """A tab that shows the page at `url`. `context` goes to Playwright: viewport, color_scheme."""
    async with (
        async_playwright() as playwright,
        # As root, which CI is, Chromium does not start with its sandbox.
        await playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"] if os.geteuid() == 0 else []
        ) as browser,
    ):
        page = await browser.new_page(**context)
        tab = Tab(page, url)
        tab.watch()
        await page.goto(url)
        # The models are there.
        await page.wait_for_selector("#model option[value=other]", state="attached")
        yield tab
        assert await page.context.cookies() == []
        assert tab.troubles == []


def need_chromium() -> None:
    """Skip where there is none, at home; CI installs it."""
    if not CHROMIUM.exists() and not os.environ.get("CI"):
        pytest.skip("needs Debian's chromium")


class Line:
    """Passes bytes on to the service, until it is cut."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self._writers: list[asyncio.StreamWriter] = []
        self._tasks: set[asyncio.Task[None]] = set()

    async def listen(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there = await asyncio.open_connection(self._target.hostname, self._target.port)
        self._writers += [writer, there[1]]
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_pass_on(reader, there[1]))
            tasks.create_task(_pass_on(there[0], writer))

    def cut(self) -> None:
        """Every connection is reset; new ones are not accepted."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()
