"""`python -m service`: start, settings, errors at start, the probe, and the end."""

import asyncio
import json
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from service import VERSION
from tests.client import CANARY, Client
from tests.conftest import StartService

ROOT = Path(__file__).parents[1]
URL = re.compile(r"http://[^\s;,]+")


class ServiceProcess:
    """A running `python -m service` and the log lines read from it so far."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[dict[str, Any]] = []

    async def wait_for_line(self, event: str) -> dict[str, Any]:
        """Return the next log line whose event matches the pattern `event`."""
        assert self.process.stdout is not None
        while text := await self.process.stdout.readline():
            self.lines.append(json.loads(text))
            if re.search(event, self.lines[-1]["event"]):
                return self.lines[-1]
        raise AssertionError(self.lines)

    async def wait_for_url(self) -> str:
        """Return the URL that the service prints when it accepts connections."""
        found = URL.search((await self.wait_for_line(URL.pattern))["event"])
        assert found is not None
        return found[0]

    async def wait_for_exit(self) -> tuple[int, str]:
        """Return the exit status and all of stderr."""
        out, err = await self.process.communicate()
        self.lines += [json.loads(text) for text in out.splitlines()]
        assert self.process.returncode is not None
        return self.process.returncode, err.decode()


StartProcess = Callable[..., Awaitable[ServiceProcess]]


@asynccontextmanager
async def running_process(
    directory: Path, env: dict[str, str], *arguments: str, stdout: int = asyncio.subprocess.PIPE
) -> AsyncIterator[ServiceProcess]:
    """Run the service in `directory` with these settings and end it with SIGTERM."""
    # Of this process's environment, only what measures coverage is passed on.
    coverage = {name: value for name, value in os.environ.items() if name.startswith("COVERAGE")}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "service", *arguments),
        cwd=directory,
        env={"PYTHONPATH": str(ROOT), "PORT": "0", **coverage, **env},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=stdout,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield ServiceProcess(process)
    finally:
        if process.returncode is None:
            process.terminate()
            await process.communicate()


@pytest.fixture
def launch(tmp_path: Path, stack: AsyncExitStack) -> StartProcess:
    """Return a function that starts a process in `tmp_path`: `await launch(PORT="80")`."""

    async def start(
        *arguments: str, stdout: int = asyncio.subprocess.PIPE, **env: str
    ) -> ServiceProcess:
        return await stack.enter_async_context(
            running_process(tmp_path, env, *arguments, stdout=stdout)
        )

    return start


# ---- start and end


@pytest.mark.parametrize(
    ("host", "url"), [("127.0.0.1", r"http://127\.0\.0\.1:\d+"), ("::1", r"http://\[::1\]:\d+")]
)
async def test_start_line_has_version_url_and_the_main_settings(
    service: StartService, host: str, url: str
) -> None:
    app = await service(HOST=host, OPENAI_API_KEY=CANARY)
    line = app.log.entries[0]
    assert re.fullmatch(url, line["url"])
    expected = {
        "version": VERSION,
        "provider": "openai",
        "model": "gpt-4o-mini",
        "sessions": "memory://",
        "anonymous": "10/minute",
    }
    assert {name: line[name] for name in expected} == expected
    assert [
        value for value in [line["url"], *expected.values()] if value not in line["event"]
    ] == []


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGINT])
async def test_process_serves_until_a_signal_ends_it_with_status_0(
    launch: StartProcess, sign: signal.Signals
) -> None:
    process = await launch()
    client = await Client.connect(await process.wait_for_url())
    reply = await client.chat(model_id="mock/lorem-3")
    chunks = [event.get("chunk") for event in await reply.events()]
    assert chunks == ["lorem ", "ipsum ", "dolor ", None]
    assert (await process.wait_for_line("^request$"))["request_id"] == reply.headers["x-request-id"]
    client.disconnect()
    process.process.send_signal(sign)
    assert await process.wait_for_exit() == (0, "")


@pytest.mark.parametrize("key", ["", "sk-secret-4711"], ids=["mock", "openai"])
async def test_start_without_a_provider_gives_one_warning_and_with_one_none(
    launch: StartProcess, key: str
) -> None:
    process = await launch(OPENAI_API_KEY=key)
    await process.wait_for_url()
    process.process.terminate()
    await process.wait_for_exit()
    warnings = [line["event"] for line in process.lines if line["level"] != "info"]
    assert ["OPENAI_API_KEY" in warning for warning in warnings] == ([] if key else [True])
    assert "-4711" not in json.dumps(process.lines)


async def test_log_is_text_at_a_terminal(launch: StartProcess) -> None:
    shown, terminal = os.openpty()
    try:
        await launch(stdout=terminal, OPENAI_API_KEY=CANARY)
        output = b""
        while b"http://" not in output:
            output += await asyncio.to_thread(os.read, shown, 65536)
    finally:
        os.close(terminal)
        os.close(shown)
    assert re.match(rb"\d\d:\d\d:\d\d chat-sidecar .* on http://127", output)


# ---- errors at start


@pytest.mark.parametrize(
    ("env", "file", "named"),
    [
        ({"PORT": "many"}, b"", ["PORT", "'many'"]),
        ({"HOST": "a..b"}, b"", ["HOST", "'a..b'"]),
        ({"HOST": "host.invalid"}, b"", ["HOST", "'host.invalid'"]),
        ({"RATE_LIMIT": "10"}, b"", ["RATE_LIMIT", "'10'"]),
        ({"API_KEYS": "me:tooshort-4711"}, b"", ["API_KEYS"]),
        ({"MODELS": "gpt-9"}, b"", ["DEFAULT_MODEL", "'gpt-4o-mini'", "MODELS"]),
        ({}, b"SYSTEM_PROMPT=caf\xe9\n", [".env", "UTF-8"]),
    ],
)
async def test_invalid_setting_stops_the_start_with_one_line_that_names_it(
    launch: StartProcess, tmp_path: Path, env: dict[str, str], file: bytes, named: list[str]
) -> None:
    (tmp_path / ".env").write_bytes(file)
    process = await launch(**env)
    status, errors = await process.wait_for_exit()
    assert errors.count("\n") == 1
    assert [each for each in named if each not in errors] == []
    assert "-4711" not in errors
    assert (status, process.lines) == (2, [])


async def test_port_in_use_stops_the_start_with_one_line(launch: StartProcess) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        process = await launch(PORT=port)
        status, errors = await process.wait_for_exit()
    assert errors.count("\n") == 1
    assert port in errors
    assert "in use" in errors
    assert (status, process.lines) == (2, [])


async def test_host_that_is_not_of_this_machine_stops_the_start_with_one_line(
    launch: StartProcess,
) -> None:
    # 192.0.2.0/24 is reserved for documentation (RFC 5737).
    status, errors = await (await launch(HOST="192.0.2.7")).wait_for_exit()
    assert errors.count("\n") == 1
    assert "192.0.2.7" in errors
    assert "0.0.0.0" in errors
    assert status == 2


async def test_check_prints_the_settings_and_ends_with_status_0(launch: StartProcess) -> None:
    process = await launch("--check", DEFAULT_MODEL="mock/echo")
    out, _ = await process.process.communicate()
    assert "DEFAULT_MODEL=mock/echo\n" in out.decode()
    assert process.process.returncode == 0


async def test_version_is_printed(launch: StartProcess) -> None:
    process = await launch("--version")
    out, _ = await process.process.communicate()
    assert out.decode() == f"chat-sidecar {VERSION}\n"


async def test_unknown_argument_is_rejected(launch: StartProcess) -> None:
    status, errors = await (await launch("--port=80")).wait_for_exit()
    assert status == 2
    assert "unrecognized arguments: --port=80" in errors


async def test_env_file_is_read_below_the_environment_and_unknown_names_warn(
    launch: StartProcess, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(
        "DEFAULT_MODEL=from-file\nMODELS=from-file,from-env,other\nOPENAI_API_KY=sk-secret-4711\n"
    )
    for value, default in (("", "from-file"), ("from-env", "from-env")):
        process = await launch(DEFAULT_MODEL=value)
        client = await Client.connect(await process.wait_for_url())
        models = await (await client.request("GET", "/api/v1/models")).json()
        assert models == {"default": default, "models": ["from-file", "from-env", "other"]}
        client.disconnect()
        process.process.terminate()
        assert await process.wait_for_exit() == (0, "")
        warnings = [line["event"] for line in process.lines if line["level"] == "warning"]
        assert "OPENAI_API_KY " in warnings[0]
        assert "OPENAI_API_KEY" in warnings[0]
        assert "-4711" not in json.dumps(process.lines)


# ---- the probe


async def test_probe_checks_the_service_with_the_same_settings(
    launch: StartProcess, service: StartService
) -> None:
    app = await service(HOST="0.0.0.0", ALLOWED_HOSTS="*.example.com")
    port = app.url.rpartition(":")[2]

    async def probe(hosts: str, port: str) -> tuple[int, str]:
        process = await launch("--probe", HOST="0.0.0.0", PORT=port, ALLOWED_HOSTS=hosts)
        return await process.wait_for_exit()

    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent_port = str(silent.getsockname()[1])
        ready, rejected, refused = await asyncio.gather(
            probe("*.example.com", port), probe("other", port), probe("*", silent_port)
        )
    assert ready == (0, "")
    for (status, error), address in ((rejected, port), (refused, silent_port)):
        assert (status, error.count("\n")) == (1, 1)
        assert f"0.0.0.0:{address}" in error
    assert "400" in rejected[1]
