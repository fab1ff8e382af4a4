"""Runs a client against every ending that an answer can have, and says what it did wrong.

`python -m tools.rehearse COMMAND...`; `make rehearse CLIENT='node examples/ask.mjs'` runs it. The
command is run once for each ending, with CHAT_URL, CHAT_MODEL and CHAT_MESSAGE in its environment.
It has to print the text of the answer and nothing else to stdout, each chunk as it comes; to end
with 0 if the answer was whole and with anything else if not; to name an error's code on stderr; to
let go of the connection on SIGINT, and after CHAT_SILENCE_SECONDS without an event or a comment.
"""

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP
from tempfile import TemporaryDirectory
from typing import NamedTuple, cast

import httpx

ROOT = Path(__file__).parent.parent
HEAD = "| model | what you get | what a good client does |\n|---|---|---|\n"
MESSAGE = "Hello, is anybody there?"
# A word is one chunk of the echo, and this one makes a line of more than 64 KiB, where some readers
# of lines end. Linux takes no variable of 128 KiB.
WORD = "long" * 25_000
# The longest ending takes about 5 s, and curl up to 5 s more than it was told to see a silence; a
# client that takes so long waits for something.
PATIENCE_SECONDS = 20.0
# By now an answer of mock/slow has begun and is not over.
ACT_SECONDS = 2.0
# Endings that take a minute elsewhere come soon, and errors without a retry before them.
ENV = {
    "PORT": "0",
    "STATE_URL": "memory://",
    "RATE_LIMIT": "off",
    "MODELS": "mock/*",
    "DEFAULT_MODEL": "mock/echo",
    "MAX_RETRIES": "0",
    "HEARTBEAT_SECONDS": "0.7",
    # More than SILENCE_SECONDS, so that a client to which a comment is silence gives up too early.
    "FIRST_TOKEN_TIMEOUT_SECONDS": "5",
    "MAX_MESSAGE_CHARS": str(len(WORD)),
    "MAX_BODY_BYTES": str(2 * len(WORD)),
}
# A whole number, as curl takes it; four comments come in that time.
SILENCE_SECONDS = 3


class Ending(NamedTuple):
    """A model of the mock, what it answers, what to do then."""

    model: str
    answers: str
    advice: str


ENDINGS = (
    Ending(
        "mock/echo",
        "a notice that it is a mock, then your message, word by word; so does any name not here",
        "shows each chunk as it comes, as text and never as HTML",
    ),
    Ending("mock/lorem-10000", "N chunks of any `mock/lorem-N`, at most 10,000", "loses none"),
    Ending("mock/slow", "a chunk each half second", "does not wait for the end, and can stop"),
    Ending("mock/unicode", "several scripts, joined emoji, U+2028", "splits lines at LF alone"),
    Ending("mock/empty", "`done` without text", "says that there was no text"),
    Ending("mock/lorem-0", "422 `invalid_request`", "shows the message: the request must change"),
    Ending(
        "mock/error",
        "502 `upstream_error`, after two retries (1 to 2 s)",
        "offers another try where `retryable` is true",
    ),
    Ending(
        "mock/rate-limited",
        "503 `upstream_unavailable` with `Retry-After: 2`, after two retries (4 s)",
        "waits for `retry_after` seconds before another try",
    ),
    Ending(
        "mock/hang",
        "heartbeats, and `upstream_timeout` after `FIRST_TOKEN_TIMEOUT_SECONDS`",
        "passes over comments; expects an error as the first event too",
    ),
    Ending(
        "mock/error-midstream",
        "text, then `upstream_error` as the last event",
        "keeps the text, marked as incomplete; another try makes a second turn",
    ),
    Ending("mock/truncated", "text, then `upstream_incomplete`", "the same"),
)


def table() -> str:
    rows = (f"| `{model}` | {answers} | {advice} |\n" for model, answers, advice in ENDINGS)
    return HEAD + "".join(rows)


def output(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    return cast(asyncio.StreamReader, process.stdout)  # Each process here was asked for it.


class Service:
    """The service in a process of its own, and how the requests to it ended."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.url = ""
        self.outcomes: list[str] = []
        self._changed = asyncio.Event()

    async def listen(self) -> None:
        """Read the log to its end, which is the service's."""
        async for line in output(self.process):
            entry = json.loads(line)
            listening = re.match(r"Listening on (\S+);", entry["event"])
            self.url = listening[1] if listening else self.url
            self.outcomes += [entry["outcome"]] if entry["event"] == "request" else []
            self._changed.set()

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not condition():
                self._changed.clear()
                await self._changed.wait()


@asynccontextmanager
async def running_service() -> AsyncIterator[Service]:
    # Neither a key of the environment nor an .env may bring a real provider into this.
    env = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **ENV}
    with TemporaryDirectory() as directory:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service"),
            cwd=directory,
            env=env,
            stdout=asyncio.subprocess.PIPE,
        )
        service = Service(process)
        listening = asyncio.create_task(service.listen())
        try:
            await service.until(lambda: service.url)
            yield service
        finally:
            # Not asked to end: it may have been stopped, and nothing of it has to be kept.
            if process.returncode is None:
                process.kill()
            await listening
            await process.wait()


class Answer(NamedTuple):
    """What there was to show: the text, and the code of the error with which it ended."""

    text: str
    code: str | None


async def ask(url: str, model: str, message: str) -> Answer:
    async with httpx.AsyncClient(timeout=PATIENCE_SECONDS) as client:
        body = {"message": message, "model_id": model}
        reply = await client.post(f"{url}/api/v1/chat", json=body)
    if reply.is_error:
        return Answer("", reply.json()["error"]["code"])
    blocks = reply.content.decode().split("\n\n")
    *chunks, last = (
        json.loads(block.removeprefix("data: ")) for block in blocks if block.startswith("data: ")
    )
    return Answer("".join(each["chunk"] for each in chunks), last.get("error", {}).get("code"))


@dataclass
class Run:
    """What a client did: its exit status (None: it had to be killed), what it printed first, all
    that it printed to stdout and to stderr."""

    status: int | None
    first: str
    text: str
    told: str


Act = Callable[[int], object]


async def run(
    command: list[str], url: str, model: str, act: Act | None = None, message: str = MESSAGE
) -> Run:
    """Run the client; `act` is called with its process id when it has printed something, or should
    have."""
    asked = {"CHAT_URL": url, "CHAT_MODEL": model, "CHAT_MESSAGE": message}
    client = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **asked, "CHAT_SILENCE_SECONDS": str(SILENCE_SECONDS)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # A group of its own, as a terminal's Ctrl-C reaches all of a pipeline.
        start_new_session=True,
    )
    first = b""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            with suppress(TimeoutError):
                async with asyncio.timeout(ACT_SECONDS if act else None):
                    first = await output(client).read(2**16)
            if act:
                act(client.pid)
            rest, told = await client.communicate()
    except TimeoutError:
        os.killpg(client.pid, SIGKILL)
        await client.communicate()
        return Run(None, first.decode(errors="replace"), "", "")
    texts = (part.decode(errors="replace") for part in (first, first + rest, told))
    return Run(client.returncode, *texts)


def broken_off(done: Run) -> list[str]:
    """What the client did wrong, if the answer was not whole."""
    if done.status is None:
        return [f"did not end within {PATIENCE_SECONDS:g} s"]
    return [] if done.status else ["ended with 0, as if the answer were whole"]


def faults(expected: Answer, done: Run) -> list[str]:
    """What the client did wrong, if it should have shown `expected`."""
    if expected.code:
        found = broken_off(done)
        if expected.code not in done.told:
            found.append(f"did not name {expected.code} on stderr")
    else:
        found = [f"ended with {done.status}, not 0: {done.told.strip()}"] if done.status else []
    if done.text.strip() != expected.text.strip():
        found.append(f"printed {done.text[:60]!r}, not {expected.text[:60]!r}")
    return found


def interrupt(pid: int) -> None:
    # It may have ended by itself.
    with suppress(ProcessLookupError):
        os.killpg(pid, SIGINT)


async def rehearse(command: list[str]) -> AsyncIterator[tuple[str, list[str]]]:
    """Each ending, and what the client did wrong there."""
    async with running_service() as service:
        endings = [(ending.model, ending.model, MESSAGE) for ending in ENDINGS]
        for what, model, message in (*endings, ("a chunk of 100 kB", "mock/echo", WORD)):
            expected, done = await asyncio.gather(
                ask(service.url, model, message),
                run(command, service.url, model, message=message),
            )
            found = faults(expected, done)
            if model == "mock/slow" and done.first.strip() == expected.text.strip():
                found.append("showed nothing before the answer was whole")
            yield f"{what}: {expected.code or 'done'}", found

        before = len(service.outcomes)
        done = await run(command, service.url, "mock/slow", interrupt)
        with suppress(TimeoutError):
            await service.until(
                lambda: {"client_disconnected", "done"} & {*service.outcomes[before:]}
            )
        gone = "client_disconnected" in service.outcomes[before:]
        yield "stopped by SIGINT", broken_off(done) + ([] if gone else ["did not stop its answer"])

        # A service that stands still: its connections are open, and nothing comes from them.
        stop = service.process.send_signal
        done = await run(command, service.url, "mock/slow", lambda pid: stop(SIGSTOP))
        service.process.send_signal(SIGCONT)
        yield "the connection is silent", broken_off(done)

        # Last, for the service ends with it.
        done = await run(command, service.url, "mock/slow", lambda pid: service.process.kill())
        yield "the connection is cut", broken_off(done)


async def report(command: list[str]) -> int:
    """The number of endings with which the client does not deal."""
    wrong = 0
    async for what, found in rehearse(command):
        wrong += bool(found)
        sys.stdout.write(f"{'WRONG' if found else 'ok':6} {what}\n")
        sys.stdout.writelines(f"       it {fault}\n" for fault in found)
        sys.stdout.flush()
    return wrong


def main() -> None:
    if not sys.argv[1:]:
        sys.exit("Name your client: make rehearse CLIENT='node examples/ask.mjs'")
    try:
        sys.exit(1 if asyncio.run(report(sys.argv[1:])) else 0)
    except OSError as error:
        sys.exit(f"{sys.argv[1]} can't be run: {error.strerror}")


if __name__ == "__main__":
    main()
