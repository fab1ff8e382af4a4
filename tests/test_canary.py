"""Keys are set in every place that takes one, then searched for in all that leaves the process.

Besides, tests/client.py and tests/conftest.py search every response and log line of every test for
the provider's key.
"""

import asyncio
import gc
import json
import signal
from pathlib import Path

import pytest

from server import Drain
from service import create_app
from settings import from_env
from tests.client import CANARY, JSON, Client
from tests.conftest import TIMEOUT_SECONDS, StartUpstream, create_log, run_lifespan
from tests.test_architecture import MODULES
from tests.test_process import running_process
from tests.upstream import Connection, delta, event, http_chunk, response

PROVIDER, LOCAL, PROXY, CALLER, WRONG, MESSAGE = (
    f"{kind}-canary-0123456789abcdef"
    for kind in ("openai", "local", "proxy", "caller", "wrong", "message")
)
KEYS = (CANARY, PROVIDER, LOCAL, PROXY, CALLER, WRONG)
FAULTS = ("401", "html", "reason", "headers", "event", "malformed", "reset", "none")


async def quote_request(request: Connection) -> None:
    """Fail as the last word of the message says, and quote the whole request in the error."""
    quote = json.dumps([request.headers, request.body])
    error = {"error": {"message": quote, "code": quote[:40], "type": quote}}
    match request.body["messages"][-1]["content"].split()[-1]:
        case "401":
            await request.send(response(401, json.dumps(error).encode(), f"x-quote: {quote}"))
        case "html":
            await request.send(response(502, quote.encode(), "content-type: text/html"))
        case "reason":
            await request.send(f"HTTP/1.1 500 {quote}\r\ncontent-length: 0\r\n\r\n".encode())
        case "headers":
            await request.send(f"HTTP/1.1 200 OK\r\n{quote}\r\n\r\n".encode())
        case "event":
            await request.stream(delta("Hel"), event(error))
        case "malformed":
            await request.stream(delta("Hel"), b"data: " + quote.encode() + b"\n\n")
        case "reset":
            await request.stream(delta("Hel"))
            await request.send(http_chunk(delta("lo"))[:10])
            request.reset()
        case _:
            await request.complete("Hel", "lo")


# Requests with the caller's key where it does not belong.
MISPLACED_KEYS: list[tuple[str, str, dict[str, str]]] = [
    ("GET", f"/{CALLER}?key={CALLER}", {}),
    ("GET", f"/api/v1/sessions/{CALLER}", {}),
    ("GET", f"/metrics?{CALLER}", {"cookie": CALLER, "x-api-key": CALLER}),
    ("POST", f"/api/v1/chat?key={CALLER}", {"authorization": f"Basic {CALLER}", "referer": CALLER}),
]


async def fetch(
    url: str, method: str, path: str, headers: dict[str, str], **fields: object
) -> bytes:
    """Send a request on a new connection and return the headers and body of its response."""
    client = await Client.connect(url)
    body = json.dumps(fields).encode()
    reply = await client.request(method, path, body, {**JSON, **headers})
    content = repr(reply.headers).encode() + await reply.body()
    client.disconnect()
    return content


async def collect_responses(url: str) -> bytes:
    """Return the responses to every model, fault, key and misplaced key, and the metrics."""
    responses = b""
    for model in ("openai/m", "local/m"):
        for fault in FAULTS:
            for key in (CALLER, WRONG):
                headers = {"authorization": f"Bearer {key}", "x-request-id": "mine"}
                message = f"{MESSAGE} {fault}"
                responses += await fetch(
                    url, "POST", "/api/v1/chat", headers, message=message, model_id=model
                )
    for method, path, headers in MISPLACED_KEYS:
        responses += await fetch(url, method, path, headers, message=MESSAGE)
    too_long = f"{MESSAGE} {'x' * 9000}"
    responses += await fetch(url, "POST", "/api/v1/chat", {}, message=too_long, message2=MESSAGE)
    return responses + await fetch(url, "GET", "/metrics", {})


def read_children(pid: int) -> str:
    """Return the ids of the processes that process `pid` has started."""
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


async def test_no_key_and_no_message_leaves_the_process(
    tmp_path: Path, upstream: StartUpstream
) -> None:
    provider = await upstream(quote_request)
    (tmp_path / "key").write_text(PROVIDER)
    (tmp_path / ".env").write_text(f"LOCAL_API_KEY={LOCAL}\nOPENAI_API_KY={PROVIDER}\n")
    env = {
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
    }
    async with running_process(tmp_path, env) as service:
        responses = await collect_responses(await service.wait_for_url())
        assert read_children(service.process.pid) == ""
        service.process.send_signal(signal.SIGABRT)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            _, crash = await service.wait_for_exit()
    # Each fault once per model with the right key, and the chat without a key.
    assert len(provider.requests) == 2 * len(FAULTS) + 1
    assert "Fatal Python error: Aborted" in crash
    warnings = [line["event"] for line in service.lines if line["level"] == "warning"]
    assert any("OPENAI_API_KY" in warning for warning in warnings)
    output = json.dumps(service.lines) + crash + responses.decode()
    assert [key for key in (*KEYS, MESSAGE) if key in output] == []


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
    objects = [each for each in gc.get_objects() if type(each).__module__ in MODULES]
    names = {type(each).__name__ for each in objects}
    assert names >= {"OpenAIProvider", "HTTPTransport", "ProviderSettings", "Settings"}
    shown = "".join(f"{each!r} {each!s}" for each in [*objects, app, settings])
    shown += repr(settings.model_dump())
    assert [key for key in KEYS if key in shown] == []
    await run_lifespan(app)
