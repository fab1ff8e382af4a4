"""The promises of the image: what deploy/Dockerfile builds is run as Docker, Compose and Kubernetes
would run it, in namespaces.

As root on Linux, with debootstrap, bubblewrap, openssl and faketime.
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
    make_base,
    refused,
    running,
)
from tests.faults import get_outcome, provider_env, read_to_end
from tests.test_deploy import COMPOSE, compose_sidecar, pod_sidecar
from tests.upstream import DONE, END, Connection, delta, running_upstream

pytestmark = pytest.mark.slow

PROGRAMS = ("debootstrap", "bwrap", "nsenter", "unshare", "openssl", "faketime")
STREAMS = 200


def missing() -> str:
    """What this machine lacks for these tests."""
    programs = [program for program in PROGRAMS if shutil.which(program) is None]
    if sys.platform != "linux" or os.geteuid() != 0:
        return "they need root on Linux"
    if not os.access(CGROUP / "memory.limit_in_bytes", os.W_OK):
        return f"they need the memory controller at {CGROUP}"
    return f"they need {', '.join(programs)}" if programs else ""


@pytest.fixture(scope="module")
def image() -> Iterator[Image]:
    """What the Dockerfile builds."""
    if lack := missing():
        assert os.environ.get("CI") != "true", lack
        pytest.skip(lack)
    # A test's minute is not enough for Debian; each step of the build has a limit of its own.
    faulthandler.cancel_dump_traceback_later()
    with TemporaryDirectory() as directory:
        base = Path(directory) / "base"
        make_base(base)
        yield build(DOCKERFILE.read_text(encoding="utf-8"), ROOT, base, Path(directory))


@pytest.fixture
def data(image: Image, tmp_path: Path) -> Path:
    """A new volume: engines copy what the image has in its place, and whose it is."""
    target = tmp_path / "data"
    shutil.copytree(image.root / "data", target)
    owner = (image.root / "data").stat()
    os.chown(target, owner.st_uid, owner.st_gid)
    return target


@dataclass
class Held:
    """A provider whose answers begin, and end when they are let go."""

    go: asyncio.Event = field(default_factory=asyncio.Event)

    async def script(self, request: Connection) -> None:
        await request.stream(delta("Hel"))
        await self.go.wait()
        await request.send_events(delta("lo"), delta(finish_reason="stop"), DONE)
        await request.send(END)


async def hello(request: Connection) -> None:
    await request.complete("Hel", "lo")


async def ask(container: Container, session_id: str = "demo") -> Response:
    return await (await container.connect()).chat("Hi", session_id=session_id)


async def asked(container: Container) -> tuple[str, str]:
    """The text of an answer, and how it ended."""
    text, last = await read_to_end(await ask(container))
    return text, get_outcome(last)


async def get(container: Container, path: str) -> Response:
    return await (await container.connect()).request("GET", path)


# ---- what is in it, and what it may do


def test_the_image_holds_nothing_to_build_or_install_with(image: Image) -> None:
    base = image.labels["org.opencontainers.image.base.name"]
    python = (image.root / "usr" / "bin" / "python3").readlink()
    # Tried on what it is meant for.
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


async def test_the_service_has_no_rights_and_no_place_to_write_but_its_volume(
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
        look = (
            "import os, stat;"
            "print(*(path for path, _, _ in os.walk('/')"
            " if not path.startswith('/proc/') and os.access(path, os.W_OK)))"
        )
        assert await container.execute("python", "-c", look) == (0, "/data\n")
        code, said = await container.execute("python", "-c", "import tempfile; tempfile.mkstemp()")
        assert (code, "No usable temporary directory" in said) == (1, True)
        assert (await asked(container))[1] == "done"


def process_status(pid: int) -> dict[str, list[str]]:
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return {name: values.split() for name, _, values in (line.partition(":") for line in lines)}


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"OPENAI_API_KEY": "sk-1", "SSL_CERT_FILE": "/no/ca.pem"}, "SSL_CERT_FILE can't be used"),
        ({"OPENAI_API_KEY": "sk-1", "HTTPS_PROXY": "socks5://a"}, "HTTPS_PROXY is not an http"),
        ({"OPENAI_API_KEY_FILE": "/run/secrets/key"}, "OPENAI_API_KEY_FILE='/run/secrets/key' can"),
        ({"DEFAULT_PROVIDER": "openai"}, "DEFAULT_PROVIDER=openai needs OPENAI_API_KEY"),
        ({"STATE_URL": "sqlite:////app/chat.db"}, "STATE_URL: /app/chat.db can't be used"),
        ({"OPENAI_API_KEY": "sk-1", "PORT": "80"}, "HOST='0.0.0.0', PORT=80: "),
    ],
)
async def test_what_keeps_it_from_starting_is_said_in_one_line(
    image: Image, data: Path, env: dict[str, str], reason: str
) -> None:
    code, said = await refused(image, data, env)
    assert code == 2
    assert said.startswith(f"chat-sidecar can't start: {reason}")
    assert said.count("\n") == 1


async def test_a_volume_that_is_not_its_own_keeps_it_from_starting(
    image: Image, data: Path
) -> None:
    os.chown(data, 0, 0)
    code, said = await refused(image, data, {})
    assert code == 2
    assert said.startswith("chat-sidecar can't start: STATE_URL: /data/chat.db can't be used")
    assert said.count("\n") == 1


# ---- how it is run


async def test_the_health_check_tells_whether_it_is_ready(image: Image, data: Path) -> None:
    held = Held()
    async with (
        running_upstream(held.script) as upstream,
        running(image, data, provider_env(upstream.url)) as container,
    ):
        assert await container.execute(*image.healthcheck) == (0, "")
        reply = await ask(container)
        container.stop()
        await container.line("Stopping")
        code, said = await container.execute(*image.healthcheck)
        assert code == 1
        assert said.startswith("Not ready")
        held.go.set()
        assert get_outcome((await read_to_end(reply))[1]) == "done"
        assert await container.ended() == 0


async def test_200_answers_at_once_and_a_health_check_fit_into_128_mib(
    image: Image, data: Path
) -> None:
    held = Held()
    env = {"MAX_STREAMS_PER_CALLER": str(STREAMS)}
    async with (
        running_upstream(held.script) as upstream,
        running(image, data, {**provider_env(upstream.url), **env}, memory=128 * MIB) as container,
    ):
        replies = [await ask(container, f"demo-{number}") for number in range(STREAMS)]
        assert [(await reply.event())["chunk"] for reply in replies] == ["Hel"] * STREAMS
        assert await container.execute(*image.healthcheck) == (0, "")
        held.go.set()
        assert {(await reply.events())[-1]["status"] for reply in replies} == {"done"}
        assert "oom_kill 0" in (container.group / "memory.oom_control").read_text().splitlines()


async def test_told_to_stop_it_ends_an_open_answer_with_a_word_and_itself_with_0(
    image: Image, data: Path
) -> None:
    env = {"DRAIN_SECONDS": "0.1"}
    async with (
        running_upstream(Held().script) as upstream,
        running(image, data, {**provider_env(upstream.url), **env}) as container,
    ):
        reply = await ask(container)
        assert (await reply.event())["chunk"] == "Hel"
        container.stop()
        text, last = await read_to_end(reply)
        assert (text, get_outcome(last)) == ("", "shutting_down")
        assert await container.ended() == 0
        assert container.log[-1]["event"] == "Stopped"


async def test_conversations_outlive_it_also_on_a_machine_that_has_just_been_switched_on(
    image: Image, data: Path
) -> None:
    async with running_upstream(hello) as upstream:
        env = provider_env(upstream.url)
        years = ("--monotonic", "100000000", "--boottime", "100000000")
        async with running(image, data, env, clock=years) as container:
            assert await asked(container) == ("Hello", "done")
            container.stop()
            assert await container.ended() == 0
        async with running(image, data, env) as container:
            assert await asked(container) == ("Hello", "done")
        assert len(upstream.requests[1].body["messages"]) == 3


@dataclass
class Clock:
    """A time that can be moved under a running process, by libfaketime."""

    directory: Path
    env: dict[str, str]

    def show(self, offset: str) -> None:
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
    clock.show("+0")
    return clock


async def test_a_wall_clock_that_jumps_ends_sessions_and_nothing_else(
    image: Image, data: Path, clock: Clock
) -> None:
    held = Held()
    env = {"RATE_LIMIT": "4/day", "FAKETIME_DONT_FAKE_MONOTONIC": "1", **clock.env}
    async with (
        running_upstream(held.script) as upstream,
        running(
            image, data, {**provider_env(upstream.url), **env}, {"/mnt": clock.directory}
        ) as app,
    ):
        reply = await ask(app)
        assert (await reply.event())["chunk"] == "Hel"
        clock.show("+2d")
        held.go.set()
        assert (await read_to_end(reply))[0] == "lo"
        # It was stored after the jump, so it lives on from there.
        assert (await get(app, "/api/v1/sessions/demo")).status == 200
        clock.show("+4d")
        assert (await get(app, "/api/v1/sessions/demo")).status == 404
        clock.show("-2d")
        assert await asked(app) == ("Hello", "done")
        # No token came back in those days.
        assert (await ask(app)).status == 429


async def test_a_monotonic_clock_that_jumps_ends_answers_truly_and_gives_tokens_back(
    image: Image, data: Path, clock: Clock
) -> None:
    held = Held()
    env = {"RATE_LIMIT": "1/hour", **clock.env}
    async with (
        running_upstream(held.script) as upstream,
        running(
            image, data, {**provider_env(upstream.url), **env}, {"/mnt": clock.directory}
        ) as app,
    ):
        reply = await ask(app)
        assert (await reply.event())["chunk"] == "Hel"
        assert (await ask(app)).status == 429
        clock.show("+2h")
        assert (await get(app, "/healthz")).status == 200
        assert get_outcome((await read_to_end(reply))[1]) == "upstream_timeout"
        held.go.set()
        assert await asked(app) == ("Hello", "done")


# ---- the way to the provider


@dataclass(frozen=True)
class Authority:
    """A private certificate authority, and the certificate of the provider that it signed."""

    certificate: Path
    tls: ssl.SSLContext


@pytest.fixture
async def authority(tmp_path: Path) -> Authority:
    names = ("ca.pem", "ca.key", "provider.pem", "provider.key")
    ca, ca_key, provider, key = (str(tmp_path / name) for name in names)
    new = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes"]
    # Python 3.13 asks of an authority that it says what its key is for (RFC 5280, 4.2.1.3).
    signs = ["-subj", "/CN=Private", "-addext", "keyUsage=critical,keyCertSign"]
    await anyio.run_process([*new, "-out", ca, "-keyout", ca_key, *signs])
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
    """A proxy that takes CONNECT, and leads to `port` whatever name it is asked for; its address,
    and those names."""
    names: list[str] = []

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
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
        await asyncio.gather(pass_on(reader, back), pass_on(there, writer))

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", names
    server.close()


@pytest.mark.parametrize("trusted", [True, False], ids=["its_authority", "another_authority"])
async def test_the_provider_is_asked_by_a_proxy_and_known_by_a_private_authority(
    image: Image, data: Path, authority: Authority, trusted: bool
) -> None:
    async with running_upstream(hello, authority.tls) as upstream:
        port = int(upstream.url.rpartition(":")[2].removesuffix("/v1"))
        async with tunnel(port) as (proxy, names):
            env = {**provider_env("https://provider.test/v1"), "HTTPS_PROXY": proxy}
            trust = {"SSL_CERT_FILE": "/etc/private-ca.pem"} if trusted else {}
            mounts = {"/etc/private-ca.pem": authority.certificate}
            async with running(image, data, {**env, **trust}, mounts) as container:
                assert (await asked(container)) == (
                    ("Hello", "done") if trusted else ("", "upstream_error")
                )
                container.stop()
                assert await container.ended() == 0
        assert names == ["provider.test:443"]
        keys = [request.headers["authorization"] for request in upstream.requests]
        assert keys == ([f"Bearer {CANARY}"] if trusted else [])
    line = next(line for line in container.log if line["event"] == "request")
    (attempt,) = line["attempts"]
    assert attempt["cause"] == (None if trusted else "SSLCertVerificationError")


# ---- as deploy/ tells Compose and Kubernetes to run it


@dataclass(frozen=True)
class Told:
    """What a file in deploy/ says of the sidecar."""

    env: dict[str, str]
    secret: str
    memory: int


def told_by_compose() -> Told:
    sidecar = compose_sidecar()
    (secret,) = sidecar["secrets"]
    memory = int(sidecar["mem_limit"].removesuffix("m")) * MIB
    return Told(sidecar["environment"], f"/run/secrets/{secret}", memory)


def told_by_kubernetes() -> Told:
    sidecar = pod_sidecar()
    memory = int(sidecar["resources"]["limits"]["memory"].removesuffix("Mi")) * MIB
    return Told(sidecar["env"], sidecar["env"]["OPENAI_API_KEY_FILE"], memory)


@pytest.mark.parametrize("told", [told_by_compose(), told_by_kubernetes()], ids=["compose", "pod"])
async def test_the_application_beside_it_is_answered(
    image: Image, data: Path, tmp_path: Path, told: Told
) -> None:
    key = tmp_path / "key"
    key.write_text(f"{CANARY}\n", encoding="ascii")
    key.chmod(0o444)
    async with running_upstream(hello) as upstream:
        env = {**told.env, "OPENAI_BASE_URL": upstream.url}
        async with running(image, data, env, {told.secret: key}, told.memory) as container:
            probes = [
                pod_sidecar()[f"{kind}Probe"] for kind in ("startup", "liveness", "readiness")
            ]
            for probe in probes:
                assert (await get(container, probe["httpGet"]["path"])).status == 200
            command = yaml.safe_load(COMPOSE)["services"]["app"]["command"]
            at = container.url.removeprefix("http://")
            code, printed = await container.execute(
                *(part.replace("chat:8000", at) for part in command)
            )
            events = [json.loads(line[6:]) for line in printed.splitlines() if line]
            assert code == 0
            assert [event.get("chunk") for event in events] == ["Hel", "lo", None]
            assert events[-1]["status"] == "done"
        assert upstream.requests[0].headers["authorization"] == f"Bearer {CANARY}"
    key.write_text("\n", encoding="ascii")
    code, printed = await refused(image, data, told.env, {told.secret: key})
    assert code == 2
    assert printed.endswith("DEFAULT_PROVIDER=openai needs OPENAI_API_KEY, which is not set\n")
