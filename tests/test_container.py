"""The image that deploy/Dockerfile builds, run in namespaces as Docker and Kubernetes would run it.

This needs root on Linux, debootstrap, bubblewrap, openssl and faketime.
"""

import asyncio
import faulthandler
import json
import os
import shutil
import ssl
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import pytest
import yaml

from tests.client import CANARY, Response
from tests.container import (
    CGROUP,
    DOCKERFILE,
    MIB,
    ROOT,
    SUITE,
    Container,
    Image,
    build,
    fail_to_start,
    make_base,
    running,
)
from tests.faults import get_outcome, provider_env, read_to_end
from tests.test_deploy import COMPOSE, compose_sidecar, pod_sidecar
from tests.upstream import DONE, END, Connection, delta, running_upstream

pytestmark = pytest.mark.slow

PROGRAMS = ("debootstrap", "bwrap", "nsenter", "unshare", "openssl", "faketime")
STREAMS = 200


def missing_requirement() -> str:
    """Return what this machine lacks for these tests."""
    programs = [program for program in PROGRAMS if shutil.which(program) is None]
    if sys.platform != "linux" or os.geteuid() != 0:
        return "they need root on Linux"
    if not os.access(CGROUP / "memory.limit_in_bytes", os.W_OK):
        return f"they need the memory controller at {CGROUP}"
    return f"they need {', '.join(programs)}" if programs else ""


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """Build the image once for all tests."""
    if reason := missing_requirement():
        assert os.environ.get("CI") != "true", reason
        pytest.skip(reason)
    # Installing Debian takes longer than a test may. Each build step has its own limit.
    faulthandler.cancel_dump_traceback_later()
    with TemporaryDirectory() as directory:
        base = Path(directory) / "base"
        make_base(base)
        yield build(DOCKERFILE.read_text(encoding="utf-8"), ROOT, base, Path(directory))


@pytest.fixture
def data(image: Image, tmp_path: Path) -> Path:
    """Create a volume as engines do: with the content and the owner of the image's directory."""
    target = tmp_path / "data"
    shutil.copytree(image.root / "data", target)
    owner = (image.root / "data").stat()
    os.chown(target, owner.st_uid, owner.st_gid)
    return target


@dataclass
class PausedProvider:
    """A provider that sends one chunk, and the rest after `resume` is set."""

    resume: asyncio.Event = field(default_factory=asyncio.Event)

    async def script(self, request: Connection) -> None:
        await request.stream(delta("Hel"))
        await self.resume.wait()
        await request.send_events(delta("lo"), delta(finish_reason="stop"), DONE)
        await request.send(END)


async def hello(request: Connection) -> None:
    await request.complete("Hel", "lo")


async def chat(container: Container, session_id: str = "demo") -> Response:
    return await (await container.connect()).chat("Hi", session_id=session_id)


async def chat_to_end(container: Container) -> tuple[str, str]:
    """Return the text and the outcome of a stream."""
    text, last = await read_to_end(await chat(container))
    return text, get_outcome(last)


async def get(container: Container, path: str) -> Response:
    return await (await container.connect()).request("GET", path)


# ---- contents and privileges


def test_image_has_no_compiler_and_no_installer(image: Image) -> None:
    base = image.labels["org.opencontainers.image.base.name"]
    python = (image.root / "usr" / "bin" / "python3").readlink()
    # The tests use the Debian and Python of the base image.
    assert base == f"python:{str(python).removeprefix('python')}-slim-{SUITE}"
    places = [image.root / place[1:] for place in image.env["PATH"].split(":")]
    programs = {path.name for place in places for path in place.iterdir()}
    assert not {"pip", "pip3", "cc", "gcc", "ld", "as", "make"} & programs
    libraries = [*image.root.glob("usr/**/python3.*/"), *image.root.glob("venv/**/python3.*/")]
    modules = {path.name for place in libraries for path in place.glob("**/*/")}
    assert "asyncio" in modules
    assert not {"pip", "ensurepip", "setuptools"} & modules
    assert {path.name for path in (image.root / "app").iterdir()} == {
        *("static", "__pycache__"),
        *(path.name for path in ROOT.glob("*.py")),
    }


async def test_service_has_no_privileges_and_can_write_only_to_its_volume(
    image: Image, data: Path
) -> None:
    async with running(image, data, {}) as container:
        status = process_status(container.pid)
        assert (status["Uid"], status["Gid"]) == (["65532"] * 4, ["65532"] * 4)
        assert status["Groups"] == []
        assert status["NSpid"][-1] == "1"
        assert status["NoNewPrivs"] == ["1"]
        capabilities = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")
        assert {int(status[name][0], 16) for name in capabilities} == {0}
        writable = (
            "import os, stat;"
            "print(*(path for path, _, _ in os.walk('/')"
            " if not path.startswith('/proc/') and os.access(path, os.W_OK)))"
        )
        assert await container.execute("python", "-c", writable) == (0, "/data\n")
        code, output = await container.execute(
            "python", "-c", "import tempfile; tempfile.mkstemp()"
        )
        assert (code, "No usable temporary directory" in output) == (1, True)
        assert (await chat_to_end(container))[1] == "done"


def process_status(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return {name: values.split() for name, _, values in (line.partition(":") for line in lines)}


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"OPENAI_API_KEY": "sk-1", "SSL_CERT_FILE": "/no/ca.pem"}, "SSL_CERT_FILE"),
        ({"OPENAI_API_KEY": "sk-1", "HTTPS_PROXY": "socks5://a"}, "HTTPS_PROXY"),
        ({"OPENAI_API_KEY_FILE": "/run/secrets/key"}, "OPENAI_API_KEY_FILE"),
        ({"DEFAULT_PROVIDER": "openai"}, "OPENAI_API_KEY"),
        ({"STATE_URL": "sqlite:////app/chat.db"}, "STATE_URL"),
        ({"OPENAI_API_KEY": "sk-1", "PORT": "80"}, "PORT=80"),
    ],
)
async def test_invalid_configuration_is_one_line_and_status_2(
    image: Image, data: Path, env: dict[str, str], name: str
) -> None:
    code, output = await fail_to_start(image, data, env)
    assert code == 2
    assert output.startswith("Invalid configuration: ")
    assert name in output
    assert output.count("\n") == 1


async def test_volume_of_another_user_stops_the_start(image: Image, data: Path) -> None:
    os.chown(data, 0, 0)
    code, output = await fail_to_start(image, data, {})
    assert code == 2
    assert output.startswith("Invalid configuration: STATE_URL")
    assert "/data/chat.db" in output
    assert output.count("\n") == 1


# ---- running


async def test_health_check_fails_during_shutdown(image: Image, data: Path) -> None:
    provider = PausedProvider()
    async with (
        running_upstream(provider.script) as upstream,
        running(image, data, provider_env(upstream.url)) as container,
    ):
        assert await container.execute(*image.healthcheck) == (0, "")
        response = await chat(container)
        container.stop()
        await container.wait_for_event("Shutting down")
        code, output = await container.execute(*image.healthcheck)
        assert code == 1
        assert output.startswith("Not ready")
        provider.resume.set()
        assert get_outcome((await read_to_end(response))[1]) == "done"
        assert await container.wait() == 0


async def test_200_streams_and_a_health_check_fit_into_128_mib(image: Image, data: Path) -> None:
    provider = PausedProvider()
    env = {"MAX_STREAMS_PER_CALLER": str(STREAMS)}
    async with (
        running_upstream(provider.script) as upstream,
        running(image, data, {**provider_env(upstream.url), **env}, memory=128 * MIB) as container,
    ):
        responses = [await chat(container, f"demo-{number}") for number in range(STREAMS)]
        assert [(await response.event())["chunk"] for response in responses] == ["Hel"] * STREAMS
        assert await container.execute(*image.healthcheck) == (0, "")
        provider.resume.set()
        assert {(await response.events())[-1]["status"] for response in responses} == {"done"}
        assert "oom_kill 0" in (container.group / "memory.oom_control").read_text().splitlines()


async def test_sigterm_ends_streams_with_shutting_down_and_the_process_with_0(
    image: Image, data: Path
) -> None:
    env = {"DRAIN_SECONDS": "0.1"}
    async with (
        running_upstream(PausedProvider().script) as upstream,
        running(image, data, {**provider_env(upstream.url), **env}) as container,
    ):
        response = await chat(container)
        assert (await response.event())["chunk"] == "Hel"
        container.stop()
        text, last = await read_to_end(response)
        assert (text, get_outcome(last)) == ("", "shutting_down")
        assert await container.wait() == 0
        assert container.log[-1]["event"] == "Shut down"


async def test_sessions_survive_a_restart_that_resets_the_monotonic_clock(
    image: Image, data: Path
) -> None:
    async with running_upstream(hello) as upstream:
        env = provider_env(upstream.url)
        years_of_uptime = ("--monotonic", "100000000", "--boottime", "100000000")
        async with running(image, data, env, clock=years_of_uptime) as container:
            assert await chat_to_end(container) == ("Hello", "done")
            container.stop()
            assert await container.wait() == 0
        async with running(image, data, env) as container:
            assert await chat_to_end(container) == ("Hello", "done")
        assert len(upstream.requests[1].body["messages"]) == 3


@dataclass
class Clock:
    """Changes the clock of a running process, by libfaketime."""

    directory: Path
    env: dict[str, str]

    def set(self, offset: str) -> None:
        new = self.directory / "new"
        new.write_text(offset, encoding="ascii")
        new.chmod(0o644)
        new.rename(self.directory / "offset")


@pytest.fixture
def clock(tmp_path: Path) -> Clock:
    directory = tmp_path / "clock"
    directory.mkdir()
    directory.chmod(0o755)
    (library,) = Path("/usr/lib").glob("*/faketime/libfaketime.so.1")
    shutil.copy(library, directory)
    env = {
        "LD_PRELOAD": "/mnt/libfaketime.so.1",
        "FAKETIME_TIMESTAMP_FILE": "/mnt/offset",
        "FAKETIME_NO_CACHE": "1",
    }
    clock = Clock(directory, env)
    clock.set("+0")
    return clock


async def test_wall_clock_jump_affects_only_the_expiry_of_sessions(
    image: Image, data: Path, clock: Clock
) -> None:
    provider = PausedProvider()
    env = {"RATE_LIMIT": "4/day", "FAKETIME_DONT_FAKE_MONOTONIC": "1", **clock.env}
    async with (
        running_upstream(provider.script) as upstream,
        running(
            image, data, {**provider_env(upstream.url), **env}, {"/mnt": clock.directory}
        ) as app,
    ):
        response = await chat(app)
        assert (await response.event())["chunk"] == "Hel"
        clock.set("+2d")
        provider.resume.set()
        assert (await read_to_end(response))[0] == "lo"
        # The turn was stored after the jump, so the session expires a day after that.
        assert (await get(app, "/api/v1/sessions/demo")).status == 200
        clock.set("+4d")
        assert (await get(app, "/api/v1/sessions/demo")).status == 404
        clock.set("-2d")
        assert await chat_to_end(app) == ("Hello", "done")
        # The rate limit uses the monotonic clock, so no token was added.
        assert (await chat(app)).status == 429


async def test_monotonic_clock_jump_times_out_streams_and_refills_the_rate_limit(
    image: Image, data: Path, clock: Clock
) -> None:
    provider = PausedProvider()
    env = {"RATE_LIMIT": "1/hour", **clock.env}
    async with (
        running_upstream(provider.script) as upstream,
        running(
            image, data, {**provider_env(upstream.url), **env}, {"/mnt": clock.directory}
        ) as app,
    ):
        response = await chat(app)
        assert (await response.event())["chunk"] == "Hel"
        assert (await chat(app)).status == 429
        clock.set("+2h")
        assert (await get(app, "/healthz")).status == 200
        assert get_outcome((await read_to_end(response))[1]) == "upstream_timeout"
        provider.resume.set()
        assert await chat_to_end(app) == ("Hello", "done")


# ---- proxies and certificates


@dataclass(frozen=True)
class Authority:
    """A private certificate authority, and a server context with a certificate that it signed."""

    certificate: Path
    tls: ssl.SSLContext


@pytest.fixture
async def authority(tmp_path: Path) -> Authority:
    names = ("ca.pem", "ca.key", "provider.pem", "provider.key")
    ca, ca_key, provider, key = (str(tmp_path / name) for name in names)
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    # Python 3.13 requires that an authority's certificate has a keyUsage (RFC 5280, 4.2.1.3).
    usage = ["-subj", "/CN=Private", "-addext", "keyUsage=critical,keyCertSign"]
    await anyio.run_process([*new, "-out", ca, "-keyout", ca_key, *usage])
    signed = ["-CA", ca, "-CAkey", ca_key, "-subj", "/CN=provider.test"]
    signed += [
        "-addext",
        "subjectAltName=DNS:provider.test",
        "-addext",
        "basicConstraints=CA:false",
    ]
    await anyio.run_process([*new, "-out", provider, "-keyout", key, *signed])
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(provider, key)
    return Authority(Path(ca), tls)


@asynccontextmanager
async def tunnel(port: int) -> AsyncIterator[tuple[str, list[str]]]:
    """Run a proxy for CONNECT that always connects to `port`.

    Yield its URL and the list of requested names.
    """
    names: list[str] = []

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, name, _ = head.decode().split(" ", 2)
        assert method == "CONNECT"
        names.append(name)
        there, back = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
        await asyncio.gather(forward(reader, back), forward(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", names
    server.close()


@pytest.mark.parametrize("trusted", [True, False], ids=["trusted_authority", "unknown_authority"])
async def test_provider_behind_proxy_and_private_authority_is_reached_only_if_trusted(
    image: Image, data: Path, authority: Authority, trusted: bool
) -> None:
    async with running_upstream(hello, authority.tls) as upstream:
        port = int(upstream.url.rpartition(":")[2].removesuffix("/v1"))
        async with tunnel(port) as (proxy, names):
            env = {**provider_env("https://provider.test/v1"), "HTTPS_PROXY": proxy}
            trust = {"SSL_CERT_FILE": "/etc/private-ca.pem"} if trusted else {}
            mounts = {"/etc/private-ca.pem": authority.certificate}
            async with running(image, data, {**env, **trust}, mounts) as container:
                assert (await chat_to_end(container)) == (
                    ("Hello", "done") if trusted else ("", "upstream_error")
                )
                container.stop()
                assert await container.wait() == 0
        assert names == ["provider.test:443"]
        keys = [request.headers["authorization"] for request in upstream.requests]
        assert keys == ([f"Bearer {CANARY}"] if trusted else [])
    line = next(line for line in container.log if line["event"] == "request")
    (attempt,) = line["attempts"]
    assert attempt["cause"] == (None if trusted else "SSLCertVerificationError")


# ---- as Compose and Kubernetes run it


@dataclass(frozen=True)
class Sidecar:
    """How a file in deploy/ runs the service."""

    env: dict[str, str]
    secret: str
    memory: int


def sidecar_of_compose() -> Sidecar:
    sidecar = compose_sidecar()
    (secret,) = sidecar["secrets"]
    memory = int(sidecar["mem_limit"].removesuffix("m")) * MIB
    return Sidecar(sidecar["environment"], f"/run/secrets/{secret}", memory)


def sidecar_of_kubernetes() -> Sidecar:
    sidecar = pod_sidecar()
    memory = int(sidecar["resources"]["limits"]["memory"].removesuffix("Mi")) * MIB
    return Sidecar(sidecar["env"], sidecar["env"]["OPENAI_API_KEY_FILE"], memory)


@pytest.mark.parametrize(
    "deployed", [sidecar_of_compose(), sidecar_of_kubernetes()], ids=["compose", "pod"]
)
async def test_example_application_gets_a_response(
    image: Image, data: Path, tmp_path: Path, deployed: Sidecar
) -> None:
    key = tmp_path / "key"
    key.write_text(f"{CANARY}\n", encoding="ascii")
    key.chmod(0o444)
    async with running_upstream(hello) as upstream:
        env = {**deployed.env, "OPENAI_BASE_URL": upstream.url}
        async with running(image, data, env, {deployed.secret: key}, deployed.memory) as container:
            probes = [
                pod_sidecar()[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")
            ]
            for probe in probes:
                assert (await get(container, probe["httpGet"]["path"])).status == 200
            command = yaml.safe_load(COMPOSE)["services"]["app"]["command"]
            at = container.url.removeprefix("http://")
            code, output = await container.execute(
                *(part.replace("chat:8000", at) for part in command)
            )
            events = [json.loads(line[6:]) for line in output.splitlines() if line]
            assert code == 0
            assert [event.get("chunk") for event in events] == ["Hel", "lo", None]
            assert events[-1]["status"] == "done"
        assert upstream.requests[0].headers["authorization"] == f"Bearer {CANARY}"
    key.write_text("\n", encoding="ascii")
    code, output = await fail_to_start(image, data, deployed.env, {deployed.secret: key})
    assert code == 2
    assert output.startswith("Invalid configuration: ")
    assert "OPENAI_API_KEY" in output
