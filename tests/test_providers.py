"""Bytes from a provider to chunks of text, and what is sent to get them. Pure functions where there
is no I/O; everything else over real sockets, through the service."""

import asyncio
import gzip
import itertools
import json
import random
import socket
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from openai_stream import CompletionParser
from providers import (
    MAX_ERROR_BYTES,
    Call,
    Completion,
    MockProvider,
    Router,
    Target,
    complete,
    create_providers,
)
from settings import SettingsError, from_env
from tests.client import CANARY, Response
from tests.conftest import RunningService, StartService, StartUpstream, raises
from tests.upstream import (
    DONE,
    END,
    HEAD,
    Connection,
    Script,
    delta,
    http_chunk,
    response,
)

KEY = CANARY
BOM = b"\xef\xbb\xbf"
# One failure is to be one request: what a retry does is not tested here.
QUIET = {"RATE_LIMIT": "off", "MAX_RETRIES": "0"}


def openai(url: str, **more: str) -> dict[str, str]:
    """The settings of a service that has one provider, at `url`."""
    return {"OPENAI_API_KEY": KEY, "OPENAI_BASE_URL": url, **QUIET, **more}


def cut(stream: bytes, places: Sequence[int]) -> list[bytes]:
    """`stream` in chunks, cut at these places."""
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


# ---- Router


def sse(*events: bytes) -> bytes:
    """Return these JSON texts as server-sent events."""
    return b"".join(b"data: %b\n\n" % event for event in events)


GROQ = {"PROVIDERS": "groq", "GROQ_BASE_URL": "http://groq.invalid/v1"}
OPENAI = {"OPENAI_API_KEY": KEY}


def route(**env: str) -> Router:
    given = from_env(env)
    return Router(given, create_providers(given))


@pytest.mark.parametrize(
    ("env", "asked", "target"),
    [
        (OPENAI, None, "openai/gpt-4o-mini"),
        (OPENAI, "gpt-4o-mini", "openai/gpt-4o-mini"),
        (OPENAI, "openai/gpt-4o-mini", "openai/gpt-4o-mini"),
        ({**OPENAI, "DEFAULT_MODEL": "openai/o9"}, "o9", "openai/o9"),
        ({**OPENAI, "MODELS": "gpt-4o-mini,gpt-9*"}, "gpt-9-nano", "openai/gpt-9-nano"),
        ({**OPENAI, "MODELS": "gpt-4o-mini,gpt-9*"}, "openai/gpt-9", "openai/gpt-9"),
        ({**OPENAI, "MODELS": "*"}, "org/model", "openai/org/model"),
        ({**OPENAI, "MODELS": "gpt-4o-mini,mock/echo"}, "mock/echo", "mock/echo"),
        # Only the first slash divides, and only what a provider is called is a provider.
        ({**OPENAI, **GROQ, "MODELS": "*,groq/*"}, "groq/org/model", "groq/org/model"),
        ({**OPENAI, **GROQ, "MODELS": "*,groq/*"}, "org/groq/model", "openai/org/groq/model"),
        ({**OPENAI, **GROQ, "MODELS": "*,groq/*"}, "groq", "openai/groq"),
        ({**OPENAI, **GROQ, "MODELS": "*,groq/*"}, "Groq/model", "openai/Groq/model"),
        # Without OpenAI's key the first of PROVIDERS is the default, without any the mock.
        (GROQ, None, "groq/gpt-4o-mini"),
        ({**GROQ, "MODELS": "*"}, "openai/x", "groq/openai/x"),
        ({**OPENAI, **GROQ, "DEFAULT_PROVIDER": "groq"}, "gpt-4o-mini", "groq/gpt-4o-mini"),
        ({}, None, "mock/gpt-4o-mini"),
        ({}, "mock/lorem-7", "mock/lorem-7"),
        ({}, "lorem-7", "mock/lorem-7"),
        ({"DEFAULT_MODEL": "echo", "MODELS": "echo,slow"}, "slow", "mock/slow"),
    ],
)
def test_what_precedes_the_first_slash_answers_if_it_is_a_provider_else_the_default(
    env: dict[str, str], asked: str | None, target: str
) -> None:
    (found,) = route(**env).resolve(asked)
    assert found.name == target
    assert found.provider.name == target.partition("/")[0]
    assert found.model == target.partition("/")[2]


@pytest.mark.parametrize(
    ("env", "asked", "models"),
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
def test_a_model_that_is_not_allowed_is_refused_naming_those_that_are(
    env: dict[str, str], asked: str, models: str
) -> None:
    with raises("invalid_request") as refused:
        route(**env).resolve(asked)
    (problem,) = refused.value.fields
    assert problem.field == "model_id"
    assert problem.message == f"is not a model of this service; it has {models}"


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
                *("mock/empty", "mock/unicode"),
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
def test_the_models_that_may_be_asked_for_are_listed(
    env: dict[str, str], models: list[str]
) -> None:
    assert route(**env).models == models


@pytest.mark.parametrize(
    "env",
    [
        {"MODELS": "gpt-9"},
        {"MODELS": "mock/*", **OPENAI},
        {"MODELS": "gpt-4o-mini", "DEFAULT_MODEL": "groq/gpt-4o-mini", **OPENAI, **GROQ},
    ],
)
def test_a_default_model_that_nobody_may_ask_for_stops_the_start(env: dict[str, str]) -> None:
    with pytest.raises(SettingsError, match=r"^DEFAULT_MODEL=.*gpt-4o-mini. is not among MODELS: "):
        route(**env)


# ---- OpenAIProvider, over sockets


def sends(data: bytes, close: bool = False) -> Script:
    """A provider that answers every request with these bytes."""

    async def script(request: Connection) -> None:
        await request.send(data)
        if close:
            request.writer.close()

    return script


def stream(*events: bytes) -> bytes:
    """A response with these events, each a chunk of its own, as far as its end."""
    return HEAD + b"".join(http_chunk(data) for data in events)


def reset(request: Connection) -> None:
    """Close with a RST: what was sent and is not yet read may be lost with it."""
    request.writer.get_extra_info("socket").setsockopt(
        socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
    )
    request.reset()


def port_of(server: asyncio.Server) -> int:
    port: int = server.sockets[0].getsockname()[1]
    return port


async def failure(reply: Response) -> tuple[int, str, bool]:
    """Status, code and `retryable` of an answer that failed before its first chunk."""
    error = (await reply.json())["error"]
    return reply.status, error["code"], error["retryable"]


async def ending(reply: Response) -> tuple[str, str]:
    """The text of a stream and its end: `done`, or the code of the error."""
    assert reply.status == 200
    *chunks, last = await reply.events()
    text = "".join(chunk["chunk"] for chunk in chunks)
    return text, last["error"]["code"] if last["status"] == "error" else last["status"]


async def test_the_provider_gets_this_request_and_nothing_else(
    service: StartService, upstream: StartUpstream
) -> None:
    provider = await upstream(sends(stream(delta("Hi", finish_reason="stop"), DONE) + END))
    app = await service(**openai(provider.url, SYSTEM_PROMPT="Be kind."))
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
    for name in ("host", "content-length", "user-agent"):
        assert headers.get(name, "") != request.headers.pop(name)
    assert request.headers == {
        "content-type": "application/json",
        "accept": "text/event-stream",
        "accept-encoding": "identity",
        "authorization": f"Bearer {KEY}",
        "x-client-request-id": "mine-1",
        "traceparent": trace,
    }


async def test_without_a_trace_none_is_made_up(
    service: StartService, upstream: StartUpstream
) -> None:
    provider = await upstream(sends(stream(delta("Hi", finish_reason="stop"), DONE) + END))
    app = await service(**openai(provider.url))
    reply = await app.chat()
    await reply.events()
    assert "traceparent" not in provider.requests[0].headers
    assert provider.requests[0].headers["x-client-request-id"] == reply.headers["x-request-id"]


async def test_a_provider_without_a_key_gets_no_authorization(
    service: StartService, upstream: StartUpstream
) -> None:
    provider = await upstream(sends(stream(delta("Hi", finish_reason="stop"), DONE) + END))
    app = await service(**QUIET, PROVIDERS="local", LOCAL_BASE_URL=provider.url)
    assert await ending(await app.chat()) == ("Hi", "done")
    assert "authorization" not in provider.requests[0].headers


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
async def test_the_path_of_the_base_url_is_kept(
    service: StartService, upstream: StartUpstream, base: str, path: str
) -> None:
    provider = await upstream(sends(stream(DONE) + END))
    app = await service(**openai(provider.url.removesuffix("/v1") + base))
    assert await ending(await app.chat()) == ("", "done")
    assert provider.requests[0].path == path


async def test_the_output_limit_is_max_tokens_to_others_than_openai(
    service: StartService, upstream: StartUpstream
) -> None:
    provider = await upstream(sends(stream(DONE) + END))
    app = await service(**openai(provider.url, MAX_OUTPUT_TOKENS="5"))
    await (await app.chat()).events()
    assert provider.requests[0].body["max_tokens"] == 5
    assert "max_completion_tokens" not in provider.requests[0].body


async def test_the_output_limit_is_max_completion_tokens_to_openai_and_goes_by_the_proxy(
    service: StartService, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await upstream(sends(stream(DONE) + END))
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    app = await service(**openai("http://api.openai.com/v1", MAX_OUTPUT_TOKENS="5"))
    await (await app.chat()).events()
    assert proxy.requests[0].path == "http://api.openai.com/v1/chat/completions"
    assert proxy.requests[0].body["max_completion_tokens"] == 5
    assert "max_tokens" not in proxy.requests[0].body


async def test_a_provider_that_no_proxy_names_is_asked_directly(
    service: StartService, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    provider = await upstream(sends(stream(DONE) + END))
    proxy = await upstream(sends(stream(DONE) + END))
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    app = await service(**openai(provider.url))
    await (await app.chat()).events()
    assert (len(provider.requests), len(proxy.requests)) == (1, 0)


async def test_a_proxy_may_be_named_without_a_scheme(
    service: StartService, upstream: StartUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy = await upstream(sends(stream(DONE) + END))
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1").removeprefix("http://"))
    app = await service(**openai("http://provider.invalid/v1"))
    assert await ending(await app.chat()) == ("", "done")


@pytest.mark.parametrize(
    "proxy",
    ["ftp://127.0.0.1", "socks5://127.0.0.1", "http://127.0.0.1:65536", "http://[::1", "a b"],
)
def test_a_proxy_that_can_not_be_one_stops_the_start(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", proxy)
    with pytest.raises(SettingsError, match=r"^HTTP_PROXY is not an http:// address$"):
        create_providers(from_env(openai("http://provider.invalid/v1")))


@pytest.mark.parametrize(
    ("path", "reason"), [("/nowhere/ca.pem", "No such file"), (__file__, "no certificate or crl")]
)
def test_authorities_that_can_not_be_read_stop_the_start(
    path: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", path)
    with pytest.raises(SettingsError, match=rf"^SSL_CERT_FILE can't be used: .*{reason}.*PEM$"):
        create_providers(from_env(openai("https://provider.invalid/v1")))


async def test_an_answer_is_over_after_its_completion() -> None:
    target = Target(MockProvider(), "lorem-2")
    said = [{"role": "user", "content": "Hi"}]
    chunks = complete([target], said, Call("req_1"), from_env({}))
    *batches, last = [batch async for batch in chunks]
    assert (batches, last) == (
        [["lorem "], ["ipsum "]],
        Completion(
            "mock/lorem-2",
            "stop",
            {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        ),
    )


def test_a_bare_error_line_may_hold_plain_text() -> None:
    reader = CompletionParser()
    assert reader.feed(b"error: the server is overloaded\n\n") is None
    assert reader.error
    assert reader.error.code == "upstream_unavailable"


async def test_a_providers_cookie_never_goes_back(
    service: StartService, upstream: StartUpstream
) -> None:
    cookie = HEAD.replace(b"x-request-id: up_1", b"set-cookie: who=first-caller; Path=/")
    provider = await upstream(sends(cookie + http_chunk(DONE) + END))
    app = await service(**openai(provider.url))
    for _ in range(2):
        await (await app.chat()).events()
    assert len(provider.requests) == 2
    assert [request.headers.get("cookie") for request in provider.requests] == [None, None]


async def test_a_redirect_is_not_followed(service: StartService, upstream: StartUpstream) -> None:
    elsewhere = await upstream(sends(stream(DONE) + END))
    answer = response(307, b"", f"location: {elsewhere.url}/chat/completions")
    provider = await upstream(sends(answer))
    app = await service(**openai(provider.url))
    assert await failure(await app.chat()) == (502, "upstream_error", False)
    assert elsewhere.connections == 0


GZIPPED = gzip.compress(delta("Hi", finish_reason="stop") + DONE)

# What is answered instead of a stream; status, code and `retryable` of our own answer.
INSTEAD: dict[str, tuple[bytes, tuple[int, str, bool]]] = {
    "gzip": (
        response(200, GZIPPED, "content-type: text/event-stream", "content-encoding: gzip"),
        (502, "upstream_error", False),
    ),
    "gzip, its body still to come": (
        b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-encoding: gzip\r\n"
        b"content-length: 1000\r\n\r\n" + GZIPPED,
        (502, "upstream_error", False),
    ),
    "HTML with 200": (
        response(200, b"<html>Welcome</html>", "content-type: text/html; charset=utf-8"),
        (502, "upstream_error", False),
    ),
    "a JSON completion with 200": (
        response(200, b'{"choices":[{"index":0,"message":{"content":"Hi"}}]}'),
        (502, "upstream_error", False),
    ),
    "JSON with 200 that is no error, whatever its words": (
        response(200, b'{"message":"The context window is open."}'),
        (502, "upstream_error", False),
    ),
    "a JSON list with 200": (response(200, b"[1]"), (502, "upstream_error", False)),
    "JSON that is none with 200": (response(200, b"{"), (502, "upstream_error", False)),
    "a JSON error with 200": (
        response(200, b'{"error":{"code":429,"message":"x"}}'),
        (503, "upstream_unavailable", True),
    ),
    "a JSON error with 200, its type in capitals": (
        response(200, b'{"error":{"code":"content_filter"}}', "content-type: Application/JSON"),
        (422, "content_refused", False),
    ),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", (502, "upstream_error", False)),
    "an error without a type": (
        b'HTTP/1.1 400 Bad\r\ncontent-length: 19\r\n\r\n{"error":"too long"',
        (502, "upstream_error", False),
    ),
    "an error page without end": (
        b"HTTP/1.1 503 Busy\r\ncontent-type: text/html\r\ncontent-length: 9999999\r\n\r\n"
        + b"x" * (MAX_ERROR_BYTES + 1),
        (503, "upstream_unavailable", True),
    ),
    "not HTTP": (b"SSH-2.0-OpenSSH_9.9\r\n\r\n", (502, "upstream_error", True)),
    "a stream of nothing": (stream() + END, (502, "upstream_incomplete", True)),
    "a stream of nonsense": (stream(sse(b"oops")), (502, "upstream_error", False)),
    "a stream that begins with an error": (
        stream(sse(b'{"error":{"code":"context_length_exceeded"}}')),
        (422, "context_too_long", False),
    ),
}


@pytest.mark.parametrize(("answer", "expected"), INSTEAD.values(), ids=INSTEAD)
async def test_what_is_no_stream_gets_a_status_of_its_own(
    service: StartService,
    upstream: StartUpstream,
    answer: bytes,
    expected: tuple[int, str, bool],
) -> None:
    provider = await upstream(sends(answer))
    app = await service(**openai(provider.url))
    assert await failure(await app.chat()) == expected


async def test_how_long_a_busy_provider_wants_us_to_wait_is_passed_on(
    service: StartService, upstream: StartUpstream
) -> None:
    busy = response(429, b'{"error":{"message":"x"}}', "Retry-After: 9", "Retry-After-Ms: 6100")
    provider = await upstream(sends(busy))
    app = await service(**openai(provider.url))
    reply = await app.chat()
    assert reply.status == 503
    assert reply.headers["retry-after"] == "7"
    assert (await reply.json())["error"]["retry_after"] == 7


async def test_a_connection_that_is_refused_is_an_upstream_error(service: StartService) -> None:
    with socket.socket() as bound:  # holds its port, so that nobody else listens there
        bound.bind(("127.0.0.1", 0))
        app = await service(**openai(f"http://127.0.0.1:{bound.getsockname()[1]}/v1"))
        assert await failure(await app.chat()) == (502, "upstream_error", True)


async def test_a_name_that_is_not_found_is_an_upstream_error(service: StartService) -> None:
    app = await service(**openai("http://provider.invalid/v1"))
    assert await failure(await app.chat()) == (502, "upstream_error", True)


async def test_a_provider_that_does_not_accept_in_time_is_a_timeout(service: StartService) -> None:
    with socket.socket() as deaf, socket.socket() as first, socket.socket() as second:
        deaf.bind(("127.0.0.1", 0))
        # Room for one connection that is not accepted yet: what comes after that gets no answer.
        deaf.listen(0)
        for waiting in (first, second):
            waiting.setblocking(False)
            waiting.connect_ex(deaf.getsockname())
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1"
        app = await service(**openai(url, CONNECT_TIMEOUT_SECONDS="0.1"))
        assert await failure(await app.chat()) == (504, "upstream_timeout", True)


@asynccontextmanager
async def greeting(data: bytes) -> AsyncIterator[int]:
    """A port that says `data` before it is asked, and nothing more."""

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(data)
        await reader.read()
        writer.close()

    async with await asyncio.start_server(greet, "127.0.0.1", 0) as server:
        yield port_of(server)


@pytest.mark.parametrize(
    ("said", "seconds", "expected"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "20", (502, "upstream_error", True)),
        (b"", "0.1", (504, "upstream_timeout", True)),
    ],
)
async def test_tls_to_a_port_that_speaks_none_fails_as_a_connection_does(
    service: StartService, said: bytes, seconds: str, expected: tuple[int, str, bool]
) -> None:
    async with greeting(said) as port:
        url = f"https://127.0.0.1:{port}/v1"
        app = await service(**openai(url, CONNECT_TIMEOUT_SECONDS=seconds))
        assert await failure(await app.chat()) == expected


async def test_answers_one_after_another_use_one_connection(
    service: StartService, upstream: StartUpstream
) -> None:
    async def script(request: Connection) -> None:
        await request.complete("Hi")

    provider = await upstream(script)
    app = await service(**openai(provider.url))
    for _ in range(3):
        assert await ending(await app.chat()) == ("Hi", "done")
    assert provider.connections == 1


async def test_the_connection_is_kept_where_the_end_of_the_body_comes_after_done(
    service: StartService, upstream: StartUpstream
) -> None:
    provider = await upstream(sends(stream(delta("Hi"), DONE)))
    app = await service(**openai(provider.url))
    for number in range(2):
        reply = await app.chat()
        # [DONE] was in the same packet: it has been read.
        assert (await reply.event())["chunk"] == "Hi"
        await (await provider.wait_for_request(number)).send(END)
        assert await ending(reply) == ("", "done")
    assert provider.connections == 1


@pytest.mark.parametrize(
    ("first", "later"),
    [(delta("Hi") + DONE, []), (delta("Hi", finish_reason="stop"), [DONE])],
    ids=["[DONE]", "a finish_reason, [DONE]"],
)
async def test_a_body_that_does_not_end_after_done_is_not_waited_for(
    service: StartService, upstream: StartUpstream, first: bytes, later: list[bytes]
) -> None:
    provider = await upstream(sends(stream(first)))
    app = await service(**openai(provider.url, TOTAL_TIMEOUT_SECONDS="2"))
    for number in range(2):
        reply = await app.chat()
        assert (await reply.event())["chunk"] == "Hi"
        request = await provider.wait_for_request(number)
        await request.send_events(*later)
        assert await ending(reply) == ("", "done")
        await request.closed.wait()
    assert provider.connections == 2


@pytest.mark.parametrize("end", [DONE, b": no more\n\n"], ids=["[DONE]", "no [DONE]"])
async def test_usage_and_text_that_come_after_the_finish_reason_are_part_of_the_answer(
    service: StartService, upstream: StartUpstream, end: bytes
) -> None:
    provider = await upstream(sends(stream(delta("Hi", finish_reason="stop"))))
    app = await service(**openai(provider.url))
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "Hi"
    request = await provider.wait_for_request()
    await request.send_events(delta("!"), sse(b'{"choices":[],"usage":{"total_tokens":2}}'), end)
    await request.send(END)
    late, done = await reply.events()
    assert late["chunk"] == "!"
    assert done["usage"] == {"total_tokens": 2}
    assert done["finish_reason"] == "stop"


async def test_an_answer_that_goes_on_after_a_finish_reason_is_passed_on_as_it_comes(
    service: StartService, upstream: StartUpstream
) -> None:
    # Open WebUI ends its reasoning with "stop", and the answer is still to come.
    provider = await upstream(sends(stream(delta("a", finish_reason="stop"))))
    app = await service(**openai(provider.url))
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "a"
    request = await provider.wait_for_request()
    for text in ("b", "c"):
        await request.send_events(delta(text))
        assert (await reply.event()).get("chunk") == text
    await request.send_events(DONE)
    await request.send(END)
    assert await ending(reply) == ("", "done")


async def test_an_error_after_the_finish_reason_is_an_error(
    service: StartService, upstream: StartUpstream
) -> None:
    provider = await upstream(sends(stream(delta("Hi", finish_reason="length"))))
    # It is told at once: the time for what may follow is longer than this.
    app = await service(**openai(provider.url, TOTAL_TIMEOUT_SECONDS="2"))
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "Hi"
    request = await provider.wait_for_request()
    await request.send_events(delta("!"), sse(b'{"error":{"code":503,"message":"x"}}'), DONE)
    assert await ending(reply) == ("!", "upstream_unavailable")


@pytest.mark.parametrize(
    ("last", "end"),
    [
        (delta("Hi", finish_reason="stop"), "done"),
        (delta("Hi"), "upstream_incomplete"),
    ],
    ids=["with a finish_reason", "without"],
)
async def test_a_body_that_ends_without_done_is_an_answer_only_with_a_finish_reason(
    service: StartService, upstream: StartUpstream, last: bytes, end: str
) -> None:
    provider = await upstream(sends(stream(last) + END))
    app = await service(**openai(provider.url))
    assert await ending(await app.chat()) == ("Hi", end)


@pytest.mark.parametrize(
    ("last", "end"),
    [
        (delta("Hi", finish_reason="stop"), "done"),
        (delta("Hi") + DONE, "done"),
        (delta("Hi"), "upstream_error"),
    ],
    ids=["with a finish_reason", "with [DONE]", "with neither"],
)
async def test_a_connection_that_breaks_spoils_only_an_answer_that_is_not_whole(
    service: StartService, upstream: StartUpstream, last: bytes, end: str
) -> None:
    provider = await upstream(sends(stream(last)))
    app = await service(**openai(provider.url))
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "Hi"
    reset(await provider.wait_for_request())
    assert await ending(reply) == ("", end)


async def test_a_provider_that_goes_quiet_after_its_finish_reason_does_not_spoil_the_answer(
    service: StartService, upstream: StartUpstream
) -> None:
    provider = await upstream(sends(stream(delta("Hi", finish_reason="stop"))))
    app = await service(**openai(provider.url, IDLE_TIMEOUT_SECONDS="0.4", HEARTBEAT_SECONDS="0.1"))
    assert await ending(await app.chat()) == ("Hi", "done")


async def test_a_provider_that_hangs_up_before_its_answer_is_an_upstream_error(
    service: StartService, upstream: StartUpstream
) -> None:
    provider = await upstream(sends(b"", close=True))
    app = await service(**openai(provider.url))
    assert await failure(await app.chat()) == (502, "upstream_error", True)


async def test_pieces_in_the_same_read_as_an_error_reach_the_client_before_it(
    service: StartService, upstream: StartUpstream
) -> None:
    provider = await upstream(sends(stream(delta("a") + delta("b") + sse(b'{"error":"x"}'))))
    app = await service(**openai(provider.url))
    assert await ending(await app.chat()) == ("ab", "upstream_error")


async def test_the_model_is_the_one_that_the_provider_names_else_the_one_asked_for(
    service: StartService, upstream: StartUpstream
) -> None:
    named = await upstream(sends(stream(sse(b'{"model":"m-2024"}'), DONE) + END))
    unnamed = await upstream(sends(stream(DONE) + END))
    for provider, model in ((named, "m-2024"), (unnamed, "gpt-4o-mini")):
        app = await service(**openai(provider.url))
        assert (await (await app.chat()).event())["model"] == model


# Values that no provider should send, and what of them reaches the terminal event.
ODD: dict[str, bytes] = {
    "usage a list": b'{"usage":[1]}',
    "usage text": b'{"usage":"12 tokens"}',
    "usage of negative tokens": b'{"usage":{"prompt_tokens":-1}}',
    "usage of endless tokens": b'{"usage":{"prompt_tokens":1%b}}' % (400 * b"0"),
    "a model that is a number": b'{"model":5}',
    "a finish_reason that is an object": b'{"choices":[{"delta":{},"finish_reason":{"x":1}}]}',
    "a part whose text is a number": b'{"choices":[{"delta":{"content":[{"text":5}]}}]}',
}


@pytest.mark.parametrize("chunk", ODD.values(), ids=ODD)
async def test_an_answer_has_its_one_terminal_event_whatever_the_provider_says_of_it(
    service: StartService, upstream: StartUpstream, chunk: bytes
) -> None:
    provider = await upstream(sends(stream(delta("Hi"), sse(chunk), DONE) + END))
    app = await service(**openai(provider.url))
    reply = await app.chat()
    assert (await reply.event())["chunk"] == "Hi"
    body = (await reply.body()).decode()
    assert body.count('"status":') == 1
    assert reply.ended


async def test_a_text_cut_anywhere_arrives_whole(
    service: StartService, upstream: StartUpstream
) -> None:
    texts = ["Grüße ", "日本語 ", "👩‍👩‍👧 ", "a\u2028b", 'quote " and \\', "\n\n"]
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}}]} for text in texts]
    whole = sse(*(json.dumps(chunk, ensure_ascii=False).encode() for chunk in chunks)) + DONE
    places = random.Random(1).sample(range(len(whole)), 60)

    async def script(request: Connection) -> None:
        await request.send(HEAD)
        for part in cut(whole, places):
            await request.send_events(part)
            await asyncio.sleep(0)  # the service's turn, so that each part is a read of its own
        await request.send(END)

    provider = await upstream(script)
    app = await service(**openai(provider.url))
    *chunks, done = await (await app.chat()).events()
    assert [chunk["chunk"] for chunk in chunks] == texts
    assert done["status"] == "done"


# ---- MockProvider, through the service


async def mock(service: StartService, model: str, **env: str) -> tuple[RunningService, Response]:
    app = await service(**QUIET, **env)
    return app, await app.chat("Hello there", model_id=f"mock/{model}")


@pytest.mark.parametrize("model", ["echo", "anything", "gpt-4o-mini"])
async def test_the_mock_says_what_it_is_and_what_it_heard(
    service: StartService, model: str
) -> None:
    _, reply = await mock(service, model)
    *chunks, done = await reply.events()
    assert "".join(chunk["chunk"] for chunk in chunks) == (
        "This is a mock: no model is behind it. Set OPENAI_API_KEY to ask one."
        " You said: Hello there"
    )
    assert (done["status"], done["model"], done["finish_reason"]) == (
        "done",
        f"mock/{model}",
        "stop",
    )
    assert done["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": len(chunks),
        "total_tokens": len(chunks) + 2,
    }


@pytest.mark.parametrize("count", [1, 9, 10_000])
async def test_mock_lorem_n_has_n_pieces(service: StartService, count: int) -> None:
    _, reply = await mock(service, f"lorem-{count}")
    *chunks, done = await reply.events()
    assert len(chunks) == count
    assert chunks[0]["chunk"] == "lorem "
    assert done["usage"]["completion_tokens"] == count


@pytest.mark.parametrize("count", ["0", "10001", "99999", "x", "", "01", "-1", "+1", "1.5", "1٣"])
async def test_mock_lorem_takes_no_other_n_than_1_to_10000(
    service: StartService, count: str
) -> None:
    _, reply = await mock(service, f"lorem-{count}")
    assert reply.status == 422
    error = (await reply.json())["error"]
    assert error["code"] == "invalid_request"
    assert error["fields"] == [
        {"field": "model_id", "message": "mock/lorem-N takes an N from 1 to 10000"}
    ]


async def test_mock_empty_is_an_answer_without_text(service: StartService) -> None:
    _, reply = await mock(service, "empty")
    (done,) = await reply.events()
    assert done["status"] == "done"
    assert done["usage"] == {"prompt_tokens": 2, "completion_tokens": 0, "total_tokens": 2}


async def test_mock_unicode_arrives_intact(service: StartService) -> None:
    _, reply = await mock(service, "unicode")
    text, end = await ending(reply)
    assert text == "naïve 日本語 👩‍👩‍👧 नमस्ते سلام e\u0301 line\u2028separator"
    assert end == "done"


@pytest.mark.parametrize(
    ("model", "expected", "wait"),
    [
        ("error", (502, "upstream_error", True), None),
        ("rate-limited", (503, "upstream_unavailable", True), "2"),
    ],
)
async def test_the_mock_rehearses_failures_before_the_first_piece(
    service: StartService, model: str, expected: tuple[int, str, bool], wait: str | None
) -> None:
    _, reply = await mock(service, model)
    assert await failure(reply) == expected
    assert reply.headers.get("retry-after") == wait


@pytest.mark.parametrize(
    ("model", "end"),
    [("error-midstream", "upstream_error"), ("truncated", "upstream_incomplete")],
)
async def test_the_mock_rehearses_failures_after_some_text(
    service: StartService, model: str, end: str
) -> None:
    _, reply = await mock(service, model)
    assert await ending(reply) == (f"This is mock/{model}, not a model ", end)


async def test_mock_hang_ends_when_the_first_piece_is_overdue(service: StartService) -> None:
    _, reply = await mock(service, "hang", FIRST_TOKEN_TIMEOUT_SECONDS="0.1")
    assert await failure(reply) == (504, "upstream_timeout", True)


async def test_mock_slow_is_slow_enough_for_a_heartbeat_between_its_pieces(
    service: StartService,
) -> None:
    _, reply = await mock(service, "slow", HEARTBEAT_SECONDS="0.3")
    blocks = [await reply.block() for _ in range(4)]
    assert blocks[0] == blocks[2] == ": keep-alive"
    assert [json.loads((blocks[i] or "").removeprefix("data: "))["chunk"] for i in (1, 3)] == [
        "This ",
        "is ",
    ]
