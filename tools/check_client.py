"""Test a client of the service: run it against every outcome that a request can have.

`python -m tools.check_client COMMAND...`; `make test-client CLIENT='node examples/client.mjs'` runs
it. The command runs once for each outcome, with CHAT_URL, CHAT_MODEL, CHAT_MESSAGE and
CHAT_SILENCE_SECONDS in its environment. docs/clients.md lists what it has to do.
"""

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from signal import SIGCONT, SIGINT, SIGKILL, SIGSTOP
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import httpx

ROOT = Path(__file__).parent.parent
MESSAGE = "Hello, how are you?"
# The mock echoes a word in one chunk. This one is longer than the 64 KiB at which some line readers
# stop, and shorter than the 128 KiB that Linux allows in an environment variable.
LONG_WORD = "long" * 25_000
# The slowest outcome takes 5 s, and curl needs up to 5 s more to notice silence.
CLIENT_TIMEOUT_SECONDS = 15.0
# After this time, mock/slow has sent some chunks and is not done.
MID_STREAM_SECONDS = 2.0
# Short timeouts and no retries make every outcome quick.
ENV = {
    "PORT": "0",
    "STATE_URL": "memory://",
    "RATE_LIMIT": "off",
    "MODELS": "mock/*",
    "DEFAULT_MODEL": "mock/echo",
    "MAX_RETRIES": "0",
    "HEARTBEAT_SECONDS": "0.7",
    # Longer than SILENCE_SECONDS: a client that ignores heartbeats gives up too early.
    "FIRST_TOKEN_TIMEOUT_SECONDS": "5",
    "MAX_MESSAGE_CHARS": str(len(LONG_WORD)),
    "MAX_BODY_BYTES": str(2 * len(LONG_WORD)),
}
# docs/clients.md describes them.
MODELS = (
    "echo", "lorem-10000", "slow", "unicode", "reasoning", "empty", "lorem-0", "error",
    "rate-limited", "hang", "error-midstream", "truncated",
)  # fmt: skip
# Where a connection is lost: what the proxy does not forward any more.
LOSSES = {
    "before the first byte": b"HTTP/1.1",
    "in the middle": b'"chunk":"dolor ',
    "before the last event": b'"status":',
}
# An integer, because curl takes no fractions. Four heartbeats arrive in this time.
SILENCE_SECONDS = 3
# Requests of this tool have an id with this prefix, those of the client do not.
OWN_ID = "check-client-"


class Service:
    """The service in a process of its own, and its log lines about chat requests."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.url = ""
        self._log: list[dict[str, Any]] = []
        self._changed = asyncio.Event()

    async def read_log(self) -> None:
        """Read the log until the service exits."""
        async for line in _stdout(self.process):
            entry = json.loads(line)
            self.url = self.url or entry.get("url", "")
            self._log += [entry] if entry["event"] == "request" else []
            self._changed.set()

    async def wait_until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(CLIENT_TIMEOUT_SECONDS):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def take_requests(self) -> list[dict[str, Any]]:
        """Return the log lines of the client's requests since the last call."""
        # The log line of a new request follows those of all requests that have ended before.
        await send_own(self.url, "mock/empty", MESSAGE, "last")
        await self.wait_until(lambda: self._log and self._log[-1]["request_id"] == f"{OWN_ID}last")
        requests = [entry for entry in self._log if not entry["request_id"].startswith(OWN_ID)]
        self._log.clear()
        return requests

    async def wait_for_end(self) -> bool:
        """Wait for the end of the client's chat. Return whether it disconnected or stopped it."""
        ends = ("client_disconnected", "stopped")
        with suppress(TimeoutError):
            await self.wait_until(lambda: any(entry["outcome"] in ends for entry in self._log))
            return True
        return False


@asynccontextmanager
async def running_service() -> AsyncIterator[Service]:
    # Without this process's environment and .env: no real provider must be configured.
    env = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **ENV}
    with TemporaryDirectory() as directory:
        command = (sys.executable, "-m", "service")
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, cwd=directory, env=env, stdout=pipe
        )
        service = Service(process)
        reading = asyncio.create_task(service.read_log())
        try:
            await service.wait_until(lambda: service.url)
            yield service
        finally:
            # SIGKILL also ends a process that SIGSTOP has stopped.
            if process.returncode is None:
                process.kill()
            await reading
            await process.wait()


class Expected(NamedTuple):
    """The text and the error of a response."""

    text: str
    code: str | None = None
    retryable: bool = False
    retry_after: int | None = None


async def send_own(url: str, model: str, message: str, name: str = "reference") -> Expected:
    """Send the request that the client should send, and return its result."""
    async with httpx.AsyncClient(timeout=CLIENT_TIMEOUT_SECONDS) as client:
        body = {"message": message, "model_id": model}
        headers = {"X-Request-ID": f"{OWN_ID}{name}"}
        response = await client.post(f"{url}/api/v1/chat", json=body, headers=headers)
    if response.is_error:
        chunks, end = [], response.json()
    else:
        blocks = response.content.decode().split("\n\n")
        *chunks, end = (json.loads(block[6:]) for block in blocks if block.startswith("data: "))
    error = end.get("error", {"code": None, "retryable": False, "retry_after": None})
    text = "".join(event["chunk"] for event in chunks)
    return Expected(text, error["code"], error["retryable"], error["retry_after"])


class Run(NamedTuple):
    """A finished client: its exit status, or None if it had to be killed, and its output."""

    status: int | None
    first: str  # what it had printed when this tool first read its stdout
    stdout: str
    stderr: str


async def run(
    command: list[str],
    url: str,
    model: str,
    act: Callable[[int], object] | None = None,
    message: str = MESSAGE,
) -> Run:
    """Run the client. Call `act` with its process id once it has printed something, or should."""
    variables = {"CHAT_URL": url, "CHAT_MODEL": model, "CHAT_MESSAGE": message}
    client = await asyncio.create_subprocess_exec(
        *command,
        env={**os.environ, **variables, "CHAT_SILENCE_SECONDS": str(SILENCE_SECONDS)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        # A process group: a terminal's Ctrl-C also reaches the whole pipeline.
        start_new_session=True,
    )
    first = b""
    try:
        async with asyncio.timeout(CLIENT_TIMEOUT_SECONDS):
            with suppress(TimeoutError):
                async with asyncio.timeout(MID_STREAM_SECONDS if act else None):
                    first = await _stdout(client).read(2**16)
            if act:
                act(client.pid)
            rest, stderr = await client.communicate()
    except TimeoutError:
        os.killpg(client.pid, SIGKILL)
        await client.communicate()
        return Run(None, first.decode(errors="replace"), "", "")
    texts = (part.decode(errors="replace") for part in (first, first + rest, stderr))
    return Run(client.returncode, *texts)


def _stdout(process: asyncio.subprocess.Process) -> asyncio.StreamReader:
    return cast(asyncio.StreamReader, process.stdout)  # each process here is started with a pipe


def find_missed_failure(done: Run) -> list[str]:
    """Return what the client did wrong if the response was incomplete."""
    if done.status is None:
        return [f"did not exit within {CLIENT_TIMEOUT_SECONDS:g} s"]
    return [] if done.status else ["exited with 0, although the response is incomplete"]


def find_faults(expected: Expected, done: Run) -> list[str]:
    """Return what the client did wrong if it should have printed `expected`."""
    if expected.code:
        faults = find_missed_failure(done)
        if expected.code not in done.stderr:
            faults.append(f"did not name {expected.code} on stderr")
    else:
        faults = [f"exited with {done.status}, not 0: {done.stderr.strip()}"] if done.status else []
    if done.stdout.strip() != expected.text.strip():
        faults.append(f"printed {done.stdout[:60]!r}, not {expected.text[:60]!r}")
    return faults


def find_retry_faults(expected: Expected, requests: list[dict[str, Any]]) -> list[str]:
    """Return what was wrong with the client's retries. `requests` are log lines of the service."""
    if len(requests) > 1 and not expected.retryable:
        return ["retried, although the error is not retryable"]
    if len(requests) > 1 and expected.text:
        return ["retried after text: the session has a second turn"]
    for earlier, later in pairwise(requests):
        ended = datetime.fromisoformat(earlier["time"])
        duration = timedelta(milliseconds=later["duration_ms"])
        waited = (datetime.fromisoformat(later["time"]) - duration - ended).total_seconds()
        # The log has milliseconds, and sleeping programs round.
        if waited < (expected.retry_after or 0) - 0.1:
            return [f"retried after {waited:.1f} s, not after {expected.retry_after} s"]
    return []


@dataclass
class LossyProxy:
    """A proxy in front of the service. It loses the first connection at `mark` in the response."""

    url: str
    mark: bytes
    lost: bool = False
    # Whether the client sent an Idempotency-Key.
    keyed: bool = False

    @asynccontextmanager
    async def run(self) -> AsyncIterator[str]:
        """Run the proxy, and yield its URL."""
        async with await asyncio.start_server(self._accept, "127.0.0.1", 0) as server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        service = await asyncio.open_connection("127.0.0.1", httpx.URL(self.url).port)
        sending = asyncio.create_task(self._send_request(reader, service[1]))
        response = b""
        with suppress(OSError):
            while data := await service[0].read(2**16):
                response += data
                lost_now = not self.lost and self.mark in response
                writer.write(
                    data[: response.index(self.mark) - len(response)] if lost_now else data
                )
                if lost_now:
                    self.lost = True
                    break
                await writer.drain()
        sending.cancel()
        writer.close()
        service[1].transport.abort()

    async def _send_request(
        self, reader: asyncio.StreamReader, service: asyncio.StreamWriter
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(2**16):
                self.keyed |= b"idempotency-key:" in data.lower()
                service.write(data)
        service.transport.abort()


def find_resume_faults(
    keyed: bool, expected: Expected, done: Run, requests: list[dict[str, Any]]
) -> list[str]:
    """Return what the client did wrong if its connection was lost.

    A client that sends an Idempotency-Key has to get the whole text by repeating its request. Any
    other client may give up.
    """
    if not keyed and done.status:
        return []
    repeated = [request for request in requests if "original_request_id" in request]
    if keyed and len(repeated) != len(requests) - 1:
        return ["did not repeat its request with the same key"]
    return find_faults(expected, done)


def interrupt(pid: int) -> None:
    # The client may have exited already.
    with suppress(ProcessLookupError):
        os.killpg(pid, SIGINT)


async def check(command: list[str]) -> AsyncIterator[tuple[str, list[str]]]:
    """Yield the name of each test and what the client did wrong in it."""
    async with running_service() as service:
        cases = [(f"mock/{model}", f"mock/{model}", MESSAGE) for model in MODELS]
        for name, model, message in (*cases, ("a chunk of 100 kB", "mock/echo", LONG_WORD)):
            expected, done = await asyncio.gather(
                send_own(service.url, model, message),
                run(command, service.url, model, message=message),
            )
            faults = find_faults(expected, done)
            if model == "mock/slow" and done.first.strip() == expected.text.strip():
                faults.append("printed nothing before the response was complete")
            faults += find_retry_faults(expected, await service.take_requests())
            yield f"{name}: {expected.code or 'done'}", faults

        for where, mark in LOSSES.items():
            expected = await send_own(service.url, "mock/lorem-30", MESSAGE)
            proxy = LossyProxy(service.url, mark)
            async with proxy.run() as url:
                done = await run(command, url, "mock/lorem-30")
            faults = find_resume_faults(proxy.keyed, expected, done, await service.take_requests())
            yield f"the connection is lost {where}", faults

        done = await run(command, service.url, "mock/slow", interrupt)
        faults = find_missed_failure(done)
        if not await service.wait_for_end():
            faults.append("did not close the connection")
        yield "stopped by SIGINT", faults

        # The stopped process keeps its connections open and sends nothing.
        signal = service.process.send_signal
        done = await run(command, service.url, "mock/slow", lambda pid: signal(SIGSTOP))
        signal(SIGCONT)
        yield "the connection is silent", find_missed_failure(done)

        # Last, because it ends the service.
        done = await run(command, service.url, "mock/slow", lambda pid: service.process.kill())
        yield "the connection is reset", find_missed_failure(done)


async def report(command: list[str]) -> int:
    """Print the result of each test. Return the number of failed ones."""
    failed = 0
    async for name, faults in check(command):
        failed += bool(faults)
        sys.stdout.write(f"{'FAILED' if faults else 'ok':6} {name}\n")
        sys.stdout.writelines(f"       The client {fault}.\n" for fault in faults)
        sys.stdout.flush()
    return failed


def main() -> None:
    if not sys.argv[1:]:
        sys.exit("Name the client: make test-client CLIENT='node examples/client.mjs'")
    try:
        sys.exit(1 if asyncio.run(report(sys.argv[1:])) else 0)
    except OSError as error:
        sys.exit(f"Cannot run {sys.argv[1]}: {error.strerror}")


if __name__ == "__main__":
    main()
