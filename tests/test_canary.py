"""Keys given in every place that takes one, and looked for in all that leaves the process.

Beside this, no answer and no log line of any test may hold the provider's key: tests/client.py and
tests/conftest.py look at every byte.
"""

import asyncio
import gc
import json
import signal
import sys
from asyncio.subprocess import PIPE
from pathlib import Path

import pytest

from server import Drain
from service import create_app
from settings import from_env
from tests.client import CANARY, JSON, Client
from tests.conftest import TIMEOUT_SECONDS, StartUpstream, create_log, run_lifespan
from tests.test_architecture import MODULES
from tests.upstream import Connection, delta, event, http_chunk, response

ROOT = Path(__file__).parent.parent
PROVIDER, LOCAL, PROXY, CALLER, WRONG, MESSAGE = (
    f"{kind}-canary-0123456789abcdef"
    for kind in ("openai", "local", "proxy", "caller", "wrong", "message")
)
KEYS = (CANARY, PROVIDER, LOCAL, PROXY, CALLER, WRONG)


async def echo(request: Connection) -> None:
    """Fails as the last word of the message says, with all that it was told in its words."""
    told = json.dumps([request.headers, request.body])
    error = {"error": {"message": told, "code": told[:40], "type": told}}
    match request.body["messages"][-1]["content"].split()[-1]:
        case "refuses":
            await request.send(response(401, json.dumps(error).encode(), f"x-told: {told}"))
        case "page":
            await request.send(response(502, told.encode(), "content-type: text/html"))
        case "phrase":
            await request.send(f"HTTP/1.1 500 {told}\r\ncontent-length: 0\r\n\r\n".encode())
        case "headers":
            await request.send(f"HTTP/1.1 200 OK\r\n{told}\r\n\r\n".encode())
        case "breaks":
            await request.stream(delta("Hel"), event(error))
        case "nonsense":
            await request.stream(delta("Hel"), b"data: " + told.encode() + b"\n\n")
        case "hangs":
            await request.stream(delta("Hel"))
            await request.send(http_chunk(delta("lo"))[:10])
            request.reset()
        case _:
            await request.complete("Hel", "lo")


FAULTS = ("refuses", "page", "phrase", "headers", "breaks", "nonsense", "hangs", "answers")


# Where a caller's key does not belong.
MISTAKES: list[tuple[str, str, dict[str, str]]] = [
    ("GET", f"/{CALLER}?key={CALLER}", {}),
    ("GET", f"/api/v1/sessions/{CALLER}", {}),
    ("GET", f"/metrics?{CALLER}", {"cookie": CALLER, "x-api-key": CALLER}),
    ("POST", f"/api/v1/chat?key={CALLER}", {"authorization": f"Basic {CALLER}", "referer": CALLER}),
]


def children(process: int) -> str:
    """The processes that its main thread has started."""
    return Path(f"/proc/{process}/task/{process}/children").read_text()


async def answers_to_all(url: str) -> bytes:
    """What the service at `url` answers to each model and fault, each mistake, and a scrape."""
    answers = b""
    for model in ("openai/m", "local/m"):
        for fault in FAULTS:
            for key in (CALLER, WRONG):
                client = await Client.connect(url)
                fields = {"message": f"{MESSAGE} {fault}", "model_id": model}
                headers = {**JSON, "authorization": f"Bearer {key}", "x-request-id": "mine"}
                reply = await client.request(
                    "POST", "/api/v1/chat", json.dumps(fields).encode(), headers
                )
                answers += repr(reply.headers).encode() + await reply.body()
                client.disconnect()
    for method, path, headers in MISTAKES:
        client = await Client.connect(url)
        body = json.dumps({"message": MESSAGE}).encode()
        reply = await client.request(method, path, body, {**JSON, **headers})
        answers += repr(reply.headers).encode() + await reply.body()
        client.disconnect()
    client = await Client.connect(url)
    refused = await client.chat(f"{MESSAGE} {'x' * 9000}", message2=MESSAGE)
    answers += await refused.body() + await (await client.request("GET", "/metrics")).body()
    client.disconnect()
    return answers


async def test_no_key_and_no_message_leaves_the_process(
    tmp_path: Path, upstream: StartUpstream
) -> None:
    provider = await upstream(echo)
    (tmp_path / "key").write_text(PROVIDER)
    (tmp_path / ".env").write_text(f"LOCAL_API_KEY={LOCAL}\nOPENAI_API_KY={PROVIDER}\n")
    given = {
        "OPENAI_API_KEY_FILE": str(tmp_path / "key"),
        "OPENAI_BASE_URL": provider.url,
        "PROVIDERS": "local",
        "LOCAL_BASE_URL": provider.url,
        "MODELS": "openai/*,local/*",
        "API_KEYS": f"app:{CALLER}",
        "HTTPS_PROXY": f"http://user:{PROXY}@127.0.0.1:9",
        "MAX_RETRIES": "0",
        "RATE_LIMIT": "off",
        "LOG_LEVEL": "debug",
        "PYTHONFAULTHANDLER": "1",
        "DEFAULT_MODEL": "local/m",
        "PORT": "0",
        "PYTHONPATH": str(ROOT),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "service", cwd=tmp_path, env=given, stdout=PIPE, stderr=PIPE
    )
    assert process.stdout is not None
    said = b""
    while b"Listening on " not in said:
        said += await process.stdout.readline()
    url = json.loads(said.splitlines()[-1])["event"].split()[2].rstrip(";")
    try:
        answers = await answers_to_all(url)
        assert children(process.pid) == ""
        process.send_signal(signal.SIGABRT)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            out, crash = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()
    assert len(provider.requests) == 2 * len(FAULTS) + 1
    assert b"Fatal Python error: Aborted" in crash
    assert said.count(b"is not a setting") == 1
    left = said + out + crash + answers
    assert [key for key in (*KEYS, MESSAGE) if key.encode() in left] == []


async def test_no_object_shows_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = from_env(
        {
            "OPENAI_API_KEY": PROVIDER,
            "PROVIDERS": "local",
            "LOCAL_BASE_URL": "https://127.0.0.1/v1",
            "LOCAL_API_KEY": LOCAL,
            "API_KEYS": f"app:{CALLER}",
            "STATE_URL": "memory://",
        }
    )
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:{PROXY}@127.0.0.1:9")
    app = create_app(settings, create_log()[1], Drain())
    ours = [thing for thing in gc.get_objects() if type(thing).__module__ in MODULES]
    assert {type(thing).__name__ for thing in ours} >= {"Service", "OpenAIProvider", "Upstream"}
    shown = "".join(f"{thing!r} {thing!s}" for thing in [*ours, app, settings])
    shown += repr(settings.model_dump())
    assert [key for key in KEYS if key in shown] == []
    await run_lifespan(app)
