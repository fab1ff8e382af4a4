"""Build and run deploy/Dockerfile as a container engine would, without one.

`build` executes the Dockerfile's instructions, stage by stage, in a Debian root that debootstrap
creates, of the same release and with the same Python as the base image. `running` starts the entry
point with a read-only root, the image's user, no capabilities, no new privileges, a PID namespace
and a memory limit. It shares the network of the test, as containers of a pod do.
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
# The Debian release of python:3.13-slim-trixie.
SUITE = "trixie"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
CGROUP = Path("/sys/fs/cgroup/memory")
MIB = 2**20
# The limit of each build step, including debootstrap.
BUILD_SECONDS = 600


@dataclass
class Image:
    """A root file system, and how the Dockerfile says to run it."""

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
    """Create a base like the official image: Debian, and a Python with pip in /usr/local."""
    include = "--include=python3-venv,ca-certificates"
    run("debootstrap", "--variant=minbase", include, SUITE, str(root))
    run_in(root, {"PATH": "/usr/bin:/bin"}, "/", ["python3", "-m", "venv", "/usr/local"])


def build(dockerfile: str, source: Path, base: Path, work: Path) -> Image:
    """Build all stages and return the image of the last one."""
    files = context(source, work / "context")
    arguments: dict[str, str] = {}
    stages: list[tuple[str, Image]] = []
    for name, rest in instructions(dockerfile):
        if name == "ARG" and "=" in rest:
            arguments |= pairs(rest, {})
            continue
        if name == "FROM":
            root = work / f"stage-{len(stages)}"
            # Hard links are enough, because build steps replace files instead of changing them.
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
    """Parse NAME=VALUE pairs of ARG, ENV and LABEL. `known` has the values of ${NAME}."""
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
            # COPY copies the contents of a directory.
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
    """Run a build step, with network access and this machine's settings for pip."""
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
    """Create a control group that limits the memory of its processes, page cache included."""
    group = CGROUP / f"chat-sidecar-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(size))
        yield group
    finally:
        group.rmdir()


@dataclass
class Container:
    """A running container."""

    image: Image
    group: Path
    process: Process
    url: str
    log: list[dict[str, Any]]
    # The PID outside of the container (inside it is 1), and the environment of the process.
    pid: int = 0
    env: list[str] = field(default_factory=list)
    clients: list[Client] = field(default_factory=list)

    async def connect(self) -> Client:
        self.clients.append(await Client.connect(self.url))
        return self.clients[-1]

    async def execute(self, *command: str) -> tuple[int | None, str]:
        """Run a command in the container, as probes do. Return its exit status and output."""
        enter = ["nsenter", f"--target={self.pid}", "--mount", "--pid", "--ipc", "--uts"]
        enter += [f"--root=/proc/{self.pid}/root", f"--wd=/proc/{self.pid}/cwd"]
        enter += ["env", "-i", *self.env, *as_user(self.image.user), *command]
        process = await asyncio.create_subprocess_exec(
            *limited(self.group, enter), stdout=PIPE, stderr=subprocess.STDOUT
        )
        output, _ = await process.communicate()
        return process.returncode, output.decode()

    async def wait_for_event(self, event: str) -> None:
        """Read the log until a line whose event begins with `event`."""
        assert self.process.stdout is not None
        while text := await self.process.stdout.readline():
            self.log.append(json.loads(text))
            if self.log[-1]["event"].startswith(event):
                return
        raise AssertionError(f"{event!r} is not in the log")

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGTERM)

    async def wait(self) -> int | None:
        """Read the rest of the log and return the exit status."""
        output, _ = await self.process.communicate()
        self.log += [json.loads(line) for line in output.splitlines()]
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
    """Return the command that runs the entry point in namespaces, with the mounts."""
    sandbox = ["bwrap", "--ro-bind", str(image.root), "/", "--bind", str(data), image.volume]
    for place, source in mounts.items():
        target = inside(image.root, place)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.mkdir(exist_ok=True) if source.is_dir() else target.touch()
        sandbox += ["--ro-bind", str(source), place]
    sandbox += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev"]
    sandbox += ["--unshare-pid", "--unshare-ipc", "--unshare-uts"]
    sandbox += ["--as-pid-1", "--die-with-parent", "--chdir", image.workdir]
    # setpriv needs these to become the image's user, and drops them.
    for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):
        sandbox += ["--cap-add", capability]
    sandbox += ["--clearenv"]
    for name, value in {**image.env, **env}.items():
        sandbox += ["--setenv", name, value]
    return [*sandbox, *as_user(image.user), *image.entrypoint]


def innermost(pid: int) -> int:
    """Return the last of a chain of processes, each the only child of the one before."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    return pid


def environment(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/environ").read_text().split("\0")[:-1]


def free_port() -> int:
    """Return a free port. The service and its health check need the same one."""
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
    """Run the service with `data` as its volume, and kill it at the end of the block.

    `clock` are options of unshare(1) that change its time.
    """
    port = free_port()
    command = start_command(image, data, {"PORT": str(port), **env}, mounts or {})
    if clock:
        command = ["unshare", "--fork", "--kill-child", "--time", *clock, *command]
    with memory_limit(memory) as group:
        process = await asyncio.create_subprocess_exec(*limited(group, command), stdout=PIPE)
        assert process.stdout is not None
        container = Container(image, group, process, f"http://127.0.0.1:{port}", [])
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                # The start line has the address.
                while f"http://0.0.0.0:{port}" not in str(container.log[-1:]):
                    container.log.append(json.loads(await process.stdout.readline()))
            container.pid = innermost(process.pid)
            container.env = environment(container.pid)
            yield container
        finally:
            for client in container.clients:
                client.disconnect()
            if process.returncode is None:
                os.kill(container.pid or process.pid, signal.SIGKILL)
            await process.wait()


async def fail_to_start(
    image: Image, data: Path, env: Mapping[str, str], mounts: Mapping[str, Path] | None = None
) -> tuple[int | None, str]:
    """Run a service that cannot start. Return its exit status and output."""
    process = await asyncio.create_subprocess_exec(
        *start_command(image, data, env, mounts or {}), stdout=PIPE, stderr=subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return process.returncode, output.decode()
