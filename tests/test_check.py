"""`--check`: its results, its exit status, and the settings it prints, against real servers."""

import asyncio
import json
import os
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from check import check, effective_settings
from errors import ServiceError
from service import create_state
from settings import Settings, SettingsError, from_env, startup_warnings
from tests.client import CANARY
from tests.conftest import StartUpstream
from tests.upstream import Connection, Script, response

ROOT = Path(__file__).parent.parent
CALLER_KEY = "caller-key-0123456789abcdef"
GATEWAY_KEY = "gateway-key-0123456789"
# Everything that must not be printed.
SECRETS = (CANARY, CALLER_KEY, GATEWAY_KEY, "redis-password")
OPENAI = {"OPENAI_API_KEY": CANARY, "STATE_URL": "memory://"}

Run = Callable[..., Awaitable[tuple[int, list[str]]]]


def models(*ids: str) -> bytes:
    """Return OpenAI's list of models with these ids."""
    entries = [{"id": model, "object": "model"} for model in ids]
    return json.dumps({"object": "list", "data": entries}).encode()


def responding(status: int, body: bytes) -> Script:
    async def script(connection: Connection) -> None:
        await connection.send(response(status, body))

    return script


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Check settings without proxies in the environment; return the status and the results."""
    for name in os.environ:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)

    async def run_check(**env: str) -> tuple[int, list[str]]:
        lines: list[str] = []
        status = await check(from_env({**OPENAI, **env}), [], create_state, lines.append)
        assert not [line for line in lines if any(secret in line for secret in SECRETS)]
        assert all(line.endswith("\n") and line.count("\n") == 1 for line in lines)
        results = [line[:-1] for line in lines if not line[0].isupper()]
        assert results.pop(0) == "ok: STATE_URL: memory:// can be used"
        return status, results

    return run_check


async def test_reachable_provider_with_the_configured_models_is_ok(
    upstream: StartUpstream, run: Run
) -> None:
    openai = await upstream(responding(200, models("gpt-4o-mini", "gpt-4o", "other")))
    local = await upstream(responding(200, models("llama3:latest", "models/gemini-3-flash")))
    status, results = await run(
        OPENAI_BASE_URL=f"{openai.url}/",
        OPENAI_EXTRA_HEADERS=json.dumps({"X-Gateway-Key": GATEWAY_KEY}),
        PROVIDERS="local",
        LOCAL_BASE_URL=local.url,
        MODELS="gpt-4o-mini,gpt-4*,local/*",
        FALLBACK_MODELS="openai/gpt-4o,local/llama3,local/gemini-3-flash,mock/echo",
    )
    assert (status, results) == (
        0,
        [
            f"ok: openai responds at {openai.url}/models",
            "ok: openai lists the model gpt-4o-mini of DEFAULT_MODEL",
            "ok: openai lists the model gpt-4o of FALLBACK_MODELS",
            f"ok: local responds at {local.url}/models",
            "ok: local lists the model llama3 of FALLBACK_MODELS",
            "ok: local lists the model gemini-3-flash of FALLBACK_MODELS",
        ],
    )
    (request,) = openai.requests
    assert request.path == "/v1/models"
    assert request.headers["authorization"] == f"Bearer {CANARY}"
    assert request.headers["x-gateway-key"] == GATEWAY_KEY
    assert "authorization" not in local.requests[0].headers


@pytest.mark.parametrize("status", [401, 403])
async def test_rejected_api_key_is_an_error(status: int, upstream: StartUpstream, run: Run) -> None:
    body = json.dumps({"error": {"message": f"Incorrect API key: {CANARY}"}}).encode()
    provider = await upstream(responding(status, body))
    assert await run(OPENAI_BASE_URL=provider.url) == (
        1,
        [f"error: openai rejected the API key ({status}); check OPENAI_API_KEY"],
    )


async def test_unreachable_provider_is_an_error(upstream: StartUpstream, run: Run) -> None:
    async def reset(connection: Connection) -> None:
        connection.reset()

    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    provider = await upstream(reset)
    status, results = await run(
        OPENAI_BASE_URL=provider.url,
        PROVIDERS="local-llm",
        LOCAL_LLM_BASE_URL=f"http://127.0.0.1:{port}/v1",
    )
    assert status == 1
    assert [result.partition(":")[0] for result in results] == ["error", "error"]
    assert results[0].startswith("error: openai is unreachable: ")
    assert results[1].endswith("; check LOCAL_LLM_BASE_URL")


@pytest.mark.parametrize(
    ("status", "body", "hint"),
    [
        (404, b"{}", "; does OPENAI_BASE_URL need /v1?"),
        (500, b"{}", ""),
        (302, b"{}", ""),
        (200, b"<html>", ""),
        (200, b"[]", ""),
        (200, b'{"data":null}', ""),
        (200, b'{"data":[{"name":"m"}]}', ""),
        (200, b'{"data":[]}', ""),
        (200, b"\xff", ""),
    ],
)
async def test_missing_list_of_models_is_a_warning(
    status: int, body: bytes, hint: str, upstream: StartUpstream, run: Run
) -> None:
    provider = await upstream(responding(status, body))
    problem = f"openai sent no list of models ({status} from {provider.url}/models){hint}"
    assert await run(OPENAI_BASE_URL=provider.url) == (0, [f"warning: {problem}"])


@pytest.mark.parametrize("variable", ["DEFAULT_MODEL", "MODELS", "FALLBACK_MODELS"])
async def test_missing_model_is_a_warning_that_names_the_variable(
    variable: str, upstream: StartUpstream, run: Run
) -> None:
    provider = await upstream(responding(200, models("gpt-4o-mini")))
    status, results = await run(OPENAI_BASE_URL=provider.url, **{variable: "gpt-9"})
    assert status == 0
    assert results[-1] == f"warning: openai does not list the model gpt-9; check {variable}"


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (models("gpt-5"), "openai does not list the model gpt-4o-mini; check DEFAULT_MODEL"),
        (b"", "openai sent no list of models (200 from http://api.openai.com/v1/models)"),
    ],
)
async def test_missing_model_or_list_at_openai_is_an_error(
    body: bytes,
    problem: str,
    upstream: StartUpstream,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The upstream is a proxy here, so that the host in the URL can be OpenAI's.
    proxy = await upstream(responding(200, body))
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
    status, results = await run(OPENAI_BASE_URL="http://api.openai.com/v1")
    assert (status, results[-1]) == (1, f"error: {problem}")
    assert proxy.requests[0].path.startswith("http://api.openai.com")


async def test_invalid_proxy_raises_settings_error(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"socks5://me:{GATEWAY_KEY}@localhost")
    with pytest.raises(SettingsError, match="HTTP_PROXY") as error:
        await run(OPENAI_BASE_URL="http://localhost:1/v1")
    assert GATEWAY_KEY not in str(error.value)


async def test_warnings_of_a_start_are_written_without_changing_the_status() -> None:
    settings = from_env({"STATE_URL": "memory://"})
    (no_provider,) = startup_warnings(settings, [])
    lines: list[str] = []
    assert (
        await check(settings, startup_warnings(settings, ["PROT"]), create_state, lines.append) == 0
    )
    assert [line for line in lines if not line[0].isupper()] == [
        "warning: PROT in .env is not a setting of this service; did you mean PORT?\n",
        f"warning: {no_provider}\n",
        "ok: STATE_URL: memory:// can be used\n",
    ]


async def test_command_prints_the_results_and_exits_with_their_status(
    upstream: StartUpstream, tmp_path: Path
) -> None:
    provider = await upstream(responding(401, b"{}"))
    env = {"PYTHONPATH": str(ROOT), "STATE_URL": "memory://", "OPENAI_API_KEY": CANARY}
    for url, status in ((provider.url, 1), ("", 2)):
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "service", "--check"),
            cwd=tmp_path,
            env={**env, "OPENAI_BASE_URL": url or "invalid"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, errors = (data.decode() for data in await process.communicate())
        assert process.returncode == status
        assert CANARY not in output + errors
        if url:
            assert "error: openai rejected the API key (401); check OPENAI_API_KEY\n" in output
            assert errors == ""
        else:
            assert errors.startswith("Invalid configuration: OPENAI_BASE_URL must be a URL")
            assert output == ""


# The session store


async def test_store_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    settings = from_env({"STATE_URL": f"sqlite:///{tmp_path}/missing/chat.db"})
    lines: list[str] = []
    assert await check(settings, [], create_state, lines.append) == 1
    assert [
        line for line in lines if line.startswith(f"error: {settings.state_url} cannot be used")
    ]


async def test_store_that_does_not_respond_is_an_error_and_is_closed() -> None:
    class Store:
        closed = False

        async def check(self) -> None:
            raise ServiceError("state_unavailable", "It does not respond.")

        async def aclose(self) -> None:
            self.closed = True

    store = Store()
    settings = from_env({"STATE_URL": "redis://me:redis-password@host:1/0"})
    lines: list[str] = []
    assert await check(settings, [], lambda settings: (None, store), lines.append) == 1
    assert "error: redis://host:1/0 cannot be used: It does not respond.\n" in lines
    assert store.closed


# Effective settings


def printed(settings: Settings) -> dict[str, str]:
    return dict(line.split("=", 1) for line in effective_settings(settings))


def test_effective_settings_are_variables_that_give_the_same_settings() -> None:
    env = {
        "OPENAI_API_KEY": CANARY,
        "OPENAI_EXTRA_BODY": '{"temperature": 0.3, "stream_options": null}',
        "PROVIDERS": "groq,local-llm",
        "GROQ_BASE_URL": "https://groq.example/v1",
        "LOCAL_LLM_BASE_URL": "http://localhost:1/v1",
        "FALLBACK_MODELS": "groq/a,local-llm/b",
        "FORWARDED_ALLOW_IPS": "127.0.0.1,10.0.0.0/8",
        "RATE_LIMIT": "off",
        "RATE_LIMIT_API_KEY": "5/hour",
        "RESUME_SECONDS": "0",
        "METRICS": "off",
    }
    settings = from_env(env)
    shown = printed(settings)
    assert shown["OPENAI_API_KEY"] == "(set)"
    assert from_env({**shown, "OPENAI_API_KEY": CANARY}) == settings
    assert "SYSTEM_PROMPT" not in shown


def test_effective_settings_show_no_secret_and_one_line_each() -> None:
    env = {
        **OPENAI,
        "OPENAI_EXTRA_HEADERS": json.dumps({"X-Gateway-Key": GATEWAY_KEY}),
        "API_KEYS": f"app:{CALLER_KEY}",
        "STATE_URL": "redis://me:redis-password@host:1/0",
        "SYSTEM_PROMPT": "Be brief.\nBe kind.",
    }
    shown: dict[str, Any] = printed(from_env(env))
    assert shown["OPENAI_EXTRA_HEADERS"] == shown["API_KEYS"] == "(set)"
    assert shown["STATE_URL"] == "redis://host:1/0"
    assert shown["SYSTEM_PROMPT"] == "Be brief.\\nBe kind."
    assert not [value for value in shown.values() if any(secret in value for secret in SECRETS)]
