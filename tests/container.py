"""What a container engine does with deploy/Dockerfile, done without one.

`build` reads the Dockerfile and carries out its instructions, stage by stage, in a Debian root that
debootstrap makes: of the same release and with the same Python as the base that the Dockerfile
names. `running` starts the entry point as an engine would: a root that can't be written, the
image's user, no capabilities, no new privileges, a pid namespace, a limit on memory. The network is
the caller's, as it is in a pod.
"""

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from tests.client import Client
from tests.conftest import TIMEOUT_SECONDS

ROOT = Path(__file__).parent.parent
DOCKERFILE = ROOT / "deploy" / "Dockerfile"
# Debian's counterpart of python:3.13-slim-trixie.
SUITE = "trixie"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
CGROUP = Path("/sys/fs/cgroup/memory")
MIB = 2**20
# For one step of a build, the making of Debian included.
BUILD_SECONDS = 600


@dataclass
class Image:
    """A root, and what the Dockerfile says of how to run it."""

    root: Path
    env: dict[str, str] = field(default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin"})
    labels: dict[str, str] = field(default_factory=dict)
    workdir: str = "/"
    user: str = "0:0"
    volume: str = ""
    entrypoint: tuple[str, ...] = ()
    healthcheck: tuple[str, ...] = ()


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        (name, rest)
        for name, _, rest in (line.partition(" ") for line in whole.split("\n"))
        if name
    ]


def context(source: Path, target: Path) -> Path:
    """Copy the files of `source` that .dockerignore does not exclude to `target`."""
    lines = (source / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        if path.is_file() and not excluded(PurePosixPath("/", name), patterns):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target / name)
    return target


def excluded(path: PurePosixPath, patterns: Sequence[str]) -> bool:
    """Return whether the last pattern that matches the path or a parent of it excludes it."""
    result = False
    for pattern in patterns:
        name = pattern.removeprefix("!")
        # A pattern is relative to the root of the context, unless it begins with `**/`.
        anchored = name.removeprefix("**/") if name.startswith("**/") else f"/{name}"
        if any(each.match(anchored) for each in (path, *path.parents)):
            result = not pattern.startswith("!")
    return result


def make_base(root: Path) -> None:
    """What the official image holds, as far as it matters here: Debian, and a Python with pip below
    /usr/local."""
    include = "--include=python3-venv,ca-certificates"
    run("debootstrap", "--variant=minbase", include, SUITE, str(root))
    run_in(root, {"PATH": "/usr/bin:/bin"}, "/", ["python3", "-m", "venv", "/usr/local"])


def build(dockerfile: str, source: Path, base: Path, work: Path) -> Image:
    """The image of the last stage."""
    files = context(source, work / "context")
    arguments: dict[str, str] = {}
    stages: list[tuple[str, Image]] = []
    for name, rest in instructions(dockerfile):
        if name == "ARG" and "=" in rest:
            arguments |= pairs(rest, {})
            continue
        if name == "FROM":
            root = work / f"stage-{len(stages)}"
            # Links, not copies: what the steps change, they write anew.
            run("cp", "-al", str(base), str(root))
            stages.append((rest.partition(" AS ")[2], Image(root)))
            continue
        carry_out(stages[-1][1], name, rest, arguments, dict(stages), files)
    return stages[-1][1]


def carry_out(
    image: Image,
    name: str,
    rest: str,
    arguments: Mapping[str, str],
    stages: Mapping[str, Image],
    files: Path,
) -> None:
    match name:
        case "ARG":
            pass
        case "WORKDIR":
            image.workdir = rest
            inside(image.root, rest).mkdir(parents=True, exist_ok=True)
        case "ENV":
            image.env |= pairs(rest, image.env)
        case "LABEL":
            image.labels |= pairs(rest, arguments)
        case "RUN":
            run_in(image.root, image.env, image.workdir, ["/bin/sh", "-c", rest])
        case "COPY":
            copy(image, shlex.split(rest), stages, files)
        case "USER":
            image.user = rest
        case "VOLUME":
            image.volume = rest
        case "ENTRYPOINT":
            image.entrypoint = tuple(json.loads(rest))
        case "HEALTHCHECK":
            image.healthcheck = tuple(json.loads(rest.partition(" CMD ")[2]))
        case "EXPOSE":
            pass
        case _:
            raise NotImplementedError(name)


def pairs(text: str, known: Mapping[str, str]) -> dict[str, str]:
    """NAME=VALUE of ARG, ENV and LABEL, with what is `known` put in for ${NAME}."""
    filled = re.sub(r"\$\{(\w+)\}", lambda match: known[match[1]], text)
    return dict(pair.split("=", 1) for pair in shlex.split(filled))


def inside(root: Path, path: str) -> Path:
    return root / path.lstrip("/")


def copy(image: Image, words: list[str], stages: Mapping[str, Image], files: Path) -> None:
    origin = stages[words.pop(0).removeprefix("--from=")].root if words[0][0] == "-" else files
    *sources, last = words
    target = inside(image.root, last if last[0] == "/" else f"{image.workdir}/{last}")
    found = [path for each in sources for path in sorted(origin.glob(each.lstrip("/")))]
    assert found, words
    for path in found:
        if path.is_dir():
            # Of a directory COPY takes what is in it.
            target.mkdir(parents=True, exist_ok=True)
            run("cp", "-a", f"{path}/.", str(target))
        else:
            run("cp", "-a", str(path), str(target))


def run(*command: str) -> None:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=BUILD_SECONDS
    )
    assert done.returncode == 0, (
        f"{shlex.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    )


def run_in(root: Path, env: Mapping[str, str], workdir: str, command: Sequence[str]) -> None:
    """Run a step of the build. It may use the network, and pip this machine's way to it."""
    pip = {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    sandbox = ["bwrap", "--bind", str(root), "/", "--dev", "/dev", "--proc", "/proc", "--clearenv"]
    sandbox += ["--cap-add", "ALL", "--chdir", workdir]
    for file in ("/etc/resolv.conf", CERTIFICATES):
        sandbox += ["--ro-bind", file, file]
    for name, value in {**pip, **env}.items():
        sandbox += ["--setenv", name, value]
    run(*sandbox, *command)


@contextmanager
def memory_limit(size: int) -> Iterator[Path]:
    """A control group whose processes may hold `size` bytes together, page cache included."""
    group = CGROUP / f"chat-sidecar-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(size))
        yield group
    finally:
        group.rmdir()


@dataclass
class Container:
    """A service that runs in its container."""

    image: Image
    group: Path
    process: Process
    url: str
    log: list[dict[str, Any]]
    # The process as this machine knows it (in there it is 1), and its environment.
    pid: int = 0
    env: list[str] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    async def connect(self) -> Client:
        self.clients.append(await Client.connect(self.url))
        return self.clients[-1]

    async def execute(self, *command: str) -> tuple[int | None, str]:
        """Run one more process in there, as probes are: its status and what it said."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--ipc", "--uts"]
        enter += [f"--root=/proc/{self.pid}/root", f"--wd=/proc/{self.pid}/cwd"]
        enter += ["env", "-i", *self.env, *as_user(self.image.user), *command]
        process = await asyncio.create_subprocess_exec(
            *limited(self.group, enter), stdout=PIPE, stderr=subprocess.STDOUT
        )
        said, _ = await process.communicate()
        return process.returncode, said.decode()

    async def line(self, event: str) -> None:
        """Returns when the log says this."""
        assert self.process.stdout is not None
        while text := await self.process.stdout.readline():
            self.log.append(json.loads(text))
            if self.log[-1]["event"] == event:
                return
        raise AssertionError(f"no line says {event!r}")

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    async def ended(self) -> int | None:
        """Its exit status; the rest of its log is read."""
        said, _ = await self.process.communicate()
        self.log += [json.loads(line) for line in said.splitlines()]
        return self.process.returncode


def as_user(user: str) -> list[str]:
    uid, _, gid = user.partition(":")
    drop = ["--clear-groups", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"]
    return ["setpriv", f"--reuid={uid}", f"--regid={gid}", *drop]


def limited(group: Path, command: Sequence[str]) -> list[str]:
    return ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", *command]


def start_command(
    image: Image, data: Path, env: Mapping[str, str], mounts: Mapping[str, Path]
) -> list[str]:
    """The entry point in namespaces. An engine makes the places on which it mounts."""
    sandbox = ["bwrap", "--ro-bind", str(image.root), "/", "--bind", str(data), image.volume]
    for place, source in mounts.items():
        target = inside(image.root, place)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir(exist_ok=True) if source.is_dir() else target.touch()
        sandbox += ["--ro-bind", str(source), place]
    sandbox += [
        "--proc",
        "/proc",
        "--dev",
        "/dev",
        "--remount-ro",
        "/dev",
        "--chdir",
        image.workdir,
    ]
    sandbox += [
        "--unshare-pid",
        "--unshare-ipc",
        "--unshare-uts",
        "--as-pid-1",
        "--die-with-parent",
    ]
    # Only to become the image's user, and lose them.
    for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
        sandbox += ["--cap-add", capability]
    sandbox += ["--clearenv"]
    for name, value in {**image.env, **env}.items():
        sandbox += ["--setenv", name, value]
    return [*sandbox, *as_user(image.user), *image.entrypoint]


def innermost(pid: int) -> int:
    """The last of a chain of processes, each the only child of the one before."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    return pid


def environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")[:-1]


def free_port() -> int:
    """A port for the service and, since both read the same setting, for its health check."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


@asynccontextmanager
async def running(
    image: Image,
    data: Path,
    env: Mapping[str, str],
    mounts: Mapping[str, Path] | None = None,
    memory: int = 128 * MIB,
    clock: Sequence[str] = (),
) -> AsyncIterator[Container]:
    """The service, listening, with `data` as its volume; `clock` are options of unshare(1) that
    give it another time. Killed at the end of the block if it still runs."""
    command = start_command(image, data, {"PORT": str(free_port()), **env}, mounts or {})
    if clock:
        command = ["unshare", "--fork", "--kill-child", "--time", *clock, *command]
    with memory_limit(memory) as group:
        process = await asyncio.create_subprocess_exec(*limited(group, command), stdout=PIPE)
        assert process.stdout is not None
        container = Container(image, group, process, "", [])
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                while not container.url:
                    container.log.append(json.loads(await process.stdout.readline()))
                    said = re.search(
                        r"Listening on http://0.0.0.0(:\d+);", container.log[-1]["event"]
                    )
                    container.url = f"http://127.0.0.1{said[1]}" if said else ""
            container.pid = innermost(process.pid)
            container.env = environment(container.pid)
            yield container
        finally:
            for client in container.clients:
                client.disconnect()
            if process.returncode is None:
                os.kill(container.pid or process.pid, signal.SIGKILL)
            await process.wait()


async def refused(
    image: Image, data: Path, env: Mapping[str, str], mounts: Mapping[str, Path] | None = None
) -> tuple[int | None, str]:
    """What a service that can't start ends with, and says."""
    process = await asyncio.create_subprocess_exec(
        *start_command(image, data, env, mounts or {}), stdout=PIPE, stderr=subprocess.STDOUT
    )
    said, _ = await process.communicate()
    return process.returncode, said.decode()
