"""Providers and the router: which model gets a request, what is sent to it, and the mock models.

test_faults.py has the failures of providers, test_retries.py retries and failover.
"""

import asyncio
import itertools
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from providers import Router, create_providers
from settings import SettingsError, from_env
from tests.client import CANARY, Response
from tests.conftest import (
    RunningService,
    StartRelay,
    StartService,
    StartUpstream,
    openai_env,
    raises,
)
from tests.faults import get_outcome, read_to_end
from tests.upstream import DONE, END, HEAD, Connection, Script, delta, event, http_chunk, response

# ---- the router

GROQ = {"PROVIDERS": "groq", "GROQ_BASE_URL": "http://groq.invalid/v1"}
OPENAI = {"OPENAI_API_KEY": CANARY}
ALL_GROQ = {**OPENAI, **GROQ, "MODELS": "*,groq/*"}


def create_router(**env: str) -> Router:
    settings = from_env(env)
    return Router(settings, create_providers(settings))


@pytest.mark.parametrize(
    ("env", "model_id", "target"),
    [
        (OPENAI, None, "openai/gpt-4o-mini"),
        (OPENAI, "gpt-4o-mini", "openai/gpt-4o-mini"),
        (OPENAI, "openai/gpt-4o-mini", "openai/gpt-4o-mini"),
        ({**OPENAI, "DEFAULT_MODEL": "openai/o9"}, "o9", "openai/o9"),
        ({**OPENAI, "MODELS": "gpt-4o-mini,gpt-9*"}, "gpt-9-nano", "openai/gpt-9-nano"),
        ({**OPENAI, "MODELS": "gpt-4o-mini,gpt-9*"}, "openai/gpt-9", "openai/gpt-9"),
        ({**OPENAI, "MODELS": "*"}, "org/model", "openai/org/model"),
        ({**OPENAI, "MODELS": "gpt-4o-mini,mock/echo"}, "mock/echo", "mock/echo"),
        # Only the first slash counts, and only if a configured provider precedes it.
        (ALL_GROQ, "groq/org/model", "groq/org/model"),
        (ALL_GROQ, "org/groq/model", "openai/org/groq/model"),
        (ALL_GROQ, "groq", "openai/groq"),
        (ALL_GROQ, "Groq/model", "openai/Groq/model"),
        # Without OpenAI's key the default is the first of PROVIDERS, without PROVIDERS the mock.
        (GROQ, None, "groq/gpt-4o-mini"),
        ({**GROQ, "MODELS": "*"}, "openai/x", "groq/openai/x"),
        ({**OPENAI, **GROQ, "DEFAULT_PROVIDER": "groq"}, "gpt-4o-mini", "groq/gpt-4o-mini"),
        ({}, None, "mock/gpt-4o-mini"),
        ({}, "mock/lorem-7", "mock/lorem-7"),
        ({}, "lorem-7", "mock/lorem-7"),
        ({"DEFAULT_MODEL": "echo", "MODELS": "echo,slow"}, "slow", "mock/slow"),
    ],
)
def test_model_id_selects_the_provider_before_its_first_slash_or_the_default(
    env: dict[str, str], model_id: str | None, target: str
) -> None:
    (found,) = create_router(**env).resolve(model_id)
    assert (found.name, found.provider.name, found.model) == (target, *target.split("/", 1))


@pytest.mark.parametrize(
    ("env", "model_id", "models"),
    [
        (OPENAI, "gpt-9", "gpt-4o-mini"),
        (OPENAI, "GPT-4O-MINI", "gpt-4o-mini"),
        (OPENAI, "mock/echo", "gpt-4o-mini"),
        (OPENAI, "", "gpt-4o-mini"),
        ({**OPENAI, "MODELS": "gpt-4o-mini, o9*"}, "org/o9", "gpt-4o-mini, o9*"),
        ({**OPENAI, **GROQ, "MODELS": "gpt-4o-mini,groq/a"}, "a", "gpt-4o-mini, groq/a"),
        ({**OPENAI, **GROQ, "MODELS": "*"}, "groq/a", "*"),
        ({"MODELS": "gpt-4o-mini,mock/echo"}, "mock/slow", "gpt-4o-mini, mock/echo"),
    ],
)
def test_model_that_is_not_allowed_is_rejected_with_a_list_of_those_that_are(
    env: dict[str, str], model_id: str, models: str
) -> None:
    with raises("invalid_request") as caught:
        create_router(**env).resolve(model_id)
    (problem,) = caught.value.fields
    assert problem.field == "model_id"
    assert problem.message.endswith(f" {models}")


@pytest.mark.parametrize(
    ("env", "models"),
    [
        (OPENAI, ["gpt-4o-mini"]),
        ({**OPENAI, "DEFAULT_MODEL": "o9"}, ["o9"]),
        ({**OPENAI, "MODELS": "o9,gpt-4o-mini,gpt-*,o9"}, ["o9", "gpt-4o-mini", "gpt-*"]),
        ({**OPENAI, "MODELS": "*"}, ["*"]),
        (
            {},
            [
                *("gpt-4o-mini", "mock/echo", "mock/lorem-100", "mock/slow", "mock/hang"),
                *("mock/error", "mock/error-midstream", "mock/truncated", "mock/rate-limited"),
                *("mock/empty", "mock/unicode", "mock/reasoning"),
            ],
        ),
        (
            {**OPENAI, "MODELS": "gpt-4o-mini,mock/e*"},
            ["gpt-4o-mini", "mock/echo", "mock/error", "mock/error-midstream", "mock/empty"],
        ),
        ({"MODELS": "gpt-4o-mini,mock/echo,mock/mine"}, ["gpt-4o-mini", "mock/echo", "mock/mine"]),
        ({"MODELS": "echo,slow", "DEFAULT_MODEL": "echo"}, ["echo", "slow"]),
    ],
)
def test_allowed_models_are_listed(env: dict[str, str], models: list[str]) -> None:
    assert create_router(**env).models == models


@pytest.mark.parametrize(
    "env",
    [
        {"MODELS": "gpt-9"},
        {"MODELS": "mock/*", **OPENAI},
        {"MODELS": "gpt-4o-mini", "DEFAULT_MODEL": "groq/gpt-4o-mini", **OPENAI, **GROQ},
    ],
)
def test_default_model_that_is_not_allowed_stops_the_start(env: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=r"^DEFAULT_MODEL=.*gpt-4o-mini'.* MODELS"):
        create_router(**env)


# ---- requests to a provider


def respond(*events: bytes) -> Script:
    """Return a script that sends these events in one stream and ends it."""

    async def script(request: Connection) -> None:
        await request.stream(*events)
        await request.send(END)

    return script


complete = respond(delta("Hi", finish_reason="stop"), DONE)


async def read_text(reply: Response) -> tuple[str, str]:
    """Return the text of a response and its outcome."""
    text, last = await read_to_end(reply)
    return text, get_outcome(last)


async def test_provider_gets_this_request_and_nothing_else(relay: StartRelay) -> None:
    app, provider = await relay(complete, SYSTEM_PROMPT="Be kind.")
    trace = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    headers = {
        "x-request-id": "mine-1",
        "traceparent": trace,
        "cookie": "session=secret",
        "user-agent": "a browser",
        "accept-encoding": "gzip, br",
        "x-other": "1",
    }
    await (await (await app.connect()).chat("Hello", headers)).events()
    request = provider.requests[0]
    assert request.path == "/v1/chat/completions"
    assert request.body == {
        "model": "gpt-4o-mini",
        "messages": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello"},
        ],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    # Some HTTP clients add a user agent of their own.
    assert request.headers.pop("user-agent", "") != headers["user-agent"]
    assert provider.url == f"http://{request.headers.pop('host')}/v1"
    assert int(request.headers.pop("content-length")) > 0
    assert request.headers == {
        "content-type": "application/json",
        "accept": "text/event-stream",
        "accept-encoding": "identity",
        "authorization": f"Bearer {CANARY}",
        "x-client-request-id": "mine-1",
        "traceparent": trace,
    }


async def test_provider_gets_no_trace_and_no_key_that_do_not_exist(
    service: StartService, upstream: StartUpstream
) -> None:
    provider = await upstream(complete)
    app = await service(PROVIDERS="local", LOCAL_BASE_URL=provider.url)
    reply = await app.chat()
    assert await read_text(reply) == ("Hi", "done")
    headers = provider.requests[0].headers
    assert not {"authorization", "traceparent"} & headers.keys()
    assert headers["x-client-request-id"] == reply.headers["x-request-id"]


async def test_extra_body_and_extra_headers_replace_what_the_service_sends(
    relay: StartRelay,
) -> None:
    app, provider = await relay(
        complete,
        MAX_OUTPUT_TOKENS="5",
        OPENAI_EXTRA_BODY='{"temperature":0.3,"max_completion_tokens":7,"stream_options":null}',
        OPENAI_EXTRA_HEADERS='{"Authorization":"Basic abc","HTTP-Referer":"https://a.example"}',
    )
    await (await app.chat()).events()
    body, headers = provider.requests[0].body, provider.requests[0].headers
    assert (body["temperature"], body["max_completion_tokens"]) == (0.3, 7)
    assert "stream_options" not in body
    assert (headers["authorization"], headers["http-referer"]) == ("Basic abc", "https://a.example")


@pytest.mark.parametrize(
    ("base", "path"),
    [
        ("", "/chat/completions"),
        ("/", "/chat/completions"),
        ("/v1", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/api/openai/v1//", "/api/openai/v1/chat/completions"),
    ],
)
async def test_path_of_the_base_url_is_kept(
    service: StartService, upstream: StartUpstream, base: str, path: str
) -> None:
    provider = await upstream(complete)
    app = await service(**openai_env(provider.url.removesuffix("/v1") + base))
    assert await read_text(await app.chat()) == ("Hi", "done")
    assert provider.requests[0].path == path


@pytest.mark.parametrize(
    ("name", "expected", "other"),
    [
        ("openai", "max_completion_tokens", "max_tokens"),
        ("local", "max_tokens", "max_completion_tokens"),
    ],
)
async def test_output_limit_has_the_name_that_the_provider_knows(
    relay: StartRelay, upstream: StartUpstream, name: str, expected: str, other: str
) -> None:
    local = await upstream(complete)
    app, openai = await relay(
        complete,
        MAX_OUTPUT_TOKENS="5",
        PROVIDERS="local",
        LOCAL_BASE_URL=local.url,
        DEFAULT_PROVIDER=name,
    )
    assert await read_text(await app.chat()) == ("Hi", "done")
    body = {"openai": openai, "local": local}[name].requests[0].body
    assert body[expected] == 5
    assert other not in body


@pytest.mark.parametrize("scheme", ["http://", ""])
async def test_request_goes_through_the_proxy(
    service: StartService, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    proxy = await upstream(complete)
    address = proxy.url.removesuffix("/v1").removeprefix("http://")
    monkeypatch.setenv("HTTP_PROXY", f"{scheme}{address}")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    app = await service(**openai_env("http://provider.invalid/v1"))
    assert await read_text(await app.chat()) == ("Hi", "done")
    assert proxy.requests[0].path == "http://provider.invalid/v1/chat/completions"


async def test_no_proxy_excludes_a_provider_from_the_proxy(
    relay: StartRelay, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await upstream(complete)
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    app, provider = await relay(complete)
    assert await read_text(await app.chat()) == ("Hi", "done")
    assert (len(provider.requests), len(proxy.requests)) == (1, 0)


@pytest.mark.parametrize(
    "proxy",
    [
        *("ftp://127.0.0.1", "socks5://127.0.0.1", "https://127.0.0.1"),
        *("http://127.0.0.1:65536", "http://[::1", "a b"),
    ],
)
def test_unsupported_proxy_stops_the_start(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(SettingsError, match=r"^HTTP_PROXY must be an http:// URL"):
        create_providers(from_env(openai_env("http://provider.invalid/v1")))


@pytest.mark.parametrize(
    ("path", "reason"), [("/nowhere/ca.pem", "No such file"), (__file__, "no certificate or crl")]
)
def test_unreadable_certificate_authorities_stop_the_start(
    path: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", path)
    with pytest.raises(SettingsError, match=rf"^SSL_CERT_FILE cannot be read: .*{reason}.*PEM"):
        create_providers(from_env(openai_env("https://provider.invalid/v1")))


async def test_cookie_of_a_provider_is_not_sent_back(relay: StartRelay) -> None:
    head = HEAD.replace(b"x-request-id: up_1", b"set-cookie: user=first-caller; Path=/")

    async def script(request: Connection) -> None:
        await request.send(head + http_chunk(delta("Hi", finish_reason="stop")) + END)

    app, provider = await relay(script)
    for _ in range(2):
        assert await read_text(await app.chat()) == ("Hi", "done")
    assert [request.headers.get("cookie") for request in provider.requests] == [None, None]


async def test_redirect_is_not_followed(relay: StartRelay, upstream: StartUpstream) -> None:
    elsewhere = await upstream(complete)

    async def script(request: Connection) -> None:
        await request.send(response(307, b"", f"location: {elsewhere.url}/chat/completions"))

    app, _ = await relay(script)
    assert await (await app.chat()).status_and_code() == (502, "upstream_error")
    assert elsewhere.connections == 0


@asynccontextmanager
async def greeting(data: bytes) -> AsyncIterator[int]:
    """Listen on a port. Send `data` to every client and nothing more."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        port: int = server.sockets[0].getsockname()[1]
        yield port


@pytest.mark.parametrize(
    ("data", "seconds", "expected"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "20", (502, "upstream_error")),
        (b"", "0.1", (504, "upstream_timeout")),
    ],
)
async def test_port_without_tls_is_an_upstream_error(
    service: StartService, data: bytes, seconds: str, expected: tuple[int, str]
) -> None:
    async with greeting(data) as port:
        env = openai_env(f"https://127.0.0.1:{port}/v1", CONNECT_TIMEOUT_SECONDS=seconds)
        reply = await (await service(**env)).chat()
        error = await reply.error()
        assert (reply.status, error["code"], error["retryable"]) == (*expected, True)


# ---- the end of a stream


async def test_connection_is_reused_if_the_body_ends_soon_after_done(relay: StartRelay) -> None:
    async def script(request: Connection) -> None:
        await request.stream(delta("Hi") + DONE)

    app, provider = await relay(script, RATE_LIMIT="off")
    # The service waits 0.1 s for the end. A slow machine may miss it a few times.
    for number in range(50):
        reply = await app.chat()
        # The service has also read [DONE], which was in the same packet.
        assert (await reply.event())["chunk"] == "Hi"
        await (await provider.wait_for_request(number)).send(END)
        assert await read_text(reply) == ("", "done")
        if provider.connections < len(provider.requests):
            return
    raise AssertionError("no connection was reused")


@pytest.mark.parametrize(
    ("first", "later"),
    [(delta("Hi") + DONE, []), (delta("Hi", finish_reason="stop"), [DONE])],
    ids=["done", "finish_then_done"],
)
async def test_body_that_does_not_end_after_done_is_closed(
    relay: StartRelay, first: bytes, later: list[bytes]
) -> None:
    async def script(request: Connection) -> None:
        await request.stream(first)

    # A stream that waited for a timeout would not end within the test.
    app, provider = await relay(script, IDLE_TIMEOUT_SECONDS="3600", TOTAL_TIMEOUT_SECONDS="3600")
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "Hi"
    request = await provider.wait_for_request()
    await request.send_events(*later)
    assert await read_text(reply) == ("", "done")
    await request.closed.wait()


@pytest.mark.parametrize("end", [DONE, b": no more\n\n"], ids=["done", "no_done"])
async def test_text_after_a_finish_reason_without_text_lifts_the_deadline(
    relay: StartRelay, end: bytes
) -> None:
    async def script(request: Connection) -> None:
        await request.stream(delta("a"))

    app, provider = await relay(script)
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "a"
    request = await provider.wait_for_request()
    await request.send_events(delta(finish_reason="stop"))
    await request.send_events(delta("b"))
    assert (await reply.event())["chunk"] == "b"
    await request.send_events(end)
    await request.send(END)
    (done,) = await reply.events()
    assert done["status"] == "done"


@pytest.mark.parametrize("end", [DONE, b": no more\n\n"], ids=["done", "no_done"])
async def test_text_and_usage_after_a_finish_reason_are_part_of_the_response(
    relay: StartRelay, end: bytes
) -> None:
    # Open WebUI ends its reasoning with "stop" before the text comes.
    async def script(request: Connection) -> None:
        await request.stream(delta("a", finish_reason="stop"))

    app, provider = await relay(script)
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "a"
    request = await provider.wait_for_request()
    for text in ("b", "c"):
        await request.send_events(delta(text))
        assert (await reply.event())["chunk"] == text
    await request.send_events(event({"choices": [], "usage": {"total_tokens": 2}}), end)
    await request.send(END)
    (done,) = await reply.events()
    assert (done["status"], done["finish_reason"]) == ("done", "stop")
    assert done["usage"] == {"total_tokens": 2}


async def test_provider_that_is_silent_after_text_with_a_finish_reason_is_done(
    relay: StartRelay,
) -> None:
    async def script(request: Connection) -> None:
        await request.stream(delta("Hi", finish_reason="stop"))

    app, _ = await relay(script, IDLE_TIMEOUT_SECONDS="0.3")
    assert await read_text(await app.chat()) == ("Hi", "done")


async def test_chunks_in_the_same_read_as_an_error_precede_it(relay: StartRelay) -> None:
    app, _ = await relay(respond(delta("a") + delta("b") + event({"error": "x"})))
    assert await read_text(await app.chat()) == ("ab", "upstream_error")


@pytest.mark.parametrize(
    ("fields", "model"), [({"model": "m-2024"}, "m-2024"), ({}, "gpt-4o-mini")]
)
async def test_done_event_has_the_providers_model_or_the_requested_one(
    relay: StartRelay, fields: dict[str, str], model: str
) -> None:
    finish = {"choices": [{"delta": {}, "finish_reason": "stop"}]}
    app, _ = await relay(respond(event({**fields, **finish}), DONE))
    assert (await (await app.chat()).event())["model"] == model


async def test_value_in_which_the_provider_repeats_the_api_key_is_null(relay: StartRelay) -> None:
    chunk = {
        "model": f"m-{CANARY}",
        "choices": [{"delta": {"content": "Hi"}, "finish_reason": CANARY}],
        "usage": {"total_tokens": 1, CANARY: 1},
    }
    app, _ = await relay(respond(event(chunk), DONE))
    _, done = await (await app.chat()).events()
    assert done["status"] == "done"
    assert (done["model"], done["finish_reason"], done["usage"]) == (None, None, None)


async def test_text_that_is_split_anywhere_arrives_unchanged(relay: StartRelay) -> None:
    texts = ["Grüße ", "日本語 ", "👩‍👩‍👧 ", "a\u2028b", 'quote " and \\', "\n\n"]
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    events = [b"data: %b\n\n" % json.dumps(c, ensure_ascii=False).encode() for c in chunks]
    data = b"".join([*events, DONE])
    offsets = [0, *sorted(random.Random(1).sample(range(len(data)), 60)), len(data)]

    async def script(request: Connection) -> None:
        await request.send(HEAD)
        for start, end in itertools.pairwise(offsets):
            await request.send_events(data[start:end])
            await asyncio.sleep(0)  # lets the service read one part at a time
        await request.send(END)

    app, _ = await relay(script)
    *received, done = await (await app.chat()).events()
    assert [chunk["chunk"] for chunk in received] == texts
    assert done["status"] == "done"


# ---- the mock


async def chat_with_mock(service: StartService, model: str, **env: str) -> Response:
    app: RunningService = await service(MAX_RETRIES="0", **env)
    return await app.chat("Hello there", model_id=f"mock/{model}")


@pytest.mark.parametrize("model", ["echo", "anything", "gpt-4o-mini"])
async def test_mock_says_that_it_is_one_and_echoes_the_message(
    service: StartService, model: str
) -> None:
    *chunks, done = await (await chat_with_mock(service, model)).events()
    text = "".join(chunk["chunk"] for chunk in chunks)
    assert "This is the mock provider." in text
    assert "OPENAI_API_KEY" in text
    assert text.endswith(" You said: Hello there")
    assert (done["status"], done["model"]) == ("done", f"mock/{model}")
    assert done["finish_reason"] == "stop"
    assert done["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": len(chunks),
        "total_tokens": len(chunks) + 2,
    }


@pytest.mark.parametrize("count", [1, 9, 10_000])
async def test_mock_lorem_n_sends_n_chunks(service: StartService, count: int) -> None:
    *chunks, done = await (await chat_with_mock(service, f"lorem-{count}")).events()
    assert len(chunks) == done["usage"]["completion_tokens"] == count
    assert chunks[0]["chunk"] == "lorem "


@pytest.mark.parametrize("count", ["0", "10001", "99999", "x", "", "01", "-1", "+1", "1.5", "1٣"])
async def test_mock_lorem_with_another_number_is_rejected(
    service: StartService, count: str
) -> None:
    error = await (await chat_with_mock(service, f"lorem-{count}")).error()
    assert error["code"] == "invalid_request"
    (problem,) = error["fields"]
    assert problem["field"] == "model_id"
    assert "1 to 10000" in problem["message"]


@pytest.mark.parametrize(
    ("model", "text", "outcome"),
    [
        ("empty", "", "done"),
        (
            "unicode",
            "naïve 日本語 👩‍👩‍👧 नमस्ते سلام e\u0301 line\u2028separator",
            "done",
        ),
        ("error-midstream", "This is mock/error-midstream, not a model ", "upstream_error"),
        ("truncated", "This is mock/truncated, not a model ", "upstream_incomplete"),
    ],
)
async def test_mock_simulates_an_outcome_after_the_status_line(
    service: StartService, model: str, text: str, outcome: str
) -> None:
    reply = await chat_with_mock(service, model)
    assert reply.status == 200
    assert await read_text(reply) == (text, outcome)


@pytest.mark.parametrize(
    ("model", "expected", "retry_after"),
    [
        ("error", (502, "upstream_error"), None),
        ("rate-limited", (503, "upstream_unavailable"), 2),
        ("hang", (504, "upstream_timeout"), None),
    ],
)
async def test_mock_simulates_a_failure_with_a_status(
    service: StartService, model: str, expected: tuple[int, str], retry_after: int | None
) -> None:
    # Only mock/hang waits for it.
    reply = await chat_with_mock(service, model, FIRST_TOKEN_TIMEOUT_SECONDS="0.3")
    error = await reply.error()
    assert (reply.status, error["code"], error["retryable"]) == (*expected, True)
    assert error["retry_after"] == retry_after


@pytest.mark.parametrize("included", [True, False])
async def test_mock_reasoning_precedes_its_text_if_it_is_requested(
    service: StartService, included: bool
) -> None:
    app = await service()
    reply = await app.chat(model_id="mock/reasoning", include_reasoning=included)
    *events, done = await reply.events()
    assert done["status"] == "done"
    names = [name for each in events for name in ("reasoning", "chunk") if name in each]
    assert names == sorted(names, reverse=True)
    assert set(names) == ({"reasoning", "chunk"} if included else {"chunk"})


async def test_mock_slow_allows_a_heartbeat_between_its_chunks(service: StartService) -> None:
    reply = await chat_with_mock(service, "slow", HEARTBEAT_SECONDS="0.3")
    blocks = [await reply.block() or "" for _ in range(4)]
    assert blocks[0] == blocks[2] == ": keep-alive"
    assert [json.loads(blocks[i].removeprefix("data: "))["chunk"] for i in (1, 3)] == [
        "This ",
        "is ",
    ]
