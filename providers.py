"""From a model's name to chunks of text: the providers, the router among them, retries, failover.

Only `OpenAIProvider` does network I/O; its failures, and those of the HTTP client below it, become
ours here and nowhere else. Nothing here knows callers, limits, sessions, or how an answer is sent.
"""

import asyncio
import random
import re
import ssl
import time
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager, suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, cast

import aiohttp
import anyio
import httpx
from httpx_aiohttp import AiohttpTransport
from httpx_aiohttp.transport import AiohttpResponseStream
from pydantic import HttpUrl
from pydantic_core import from_json, to_json

import errors
from errors import FieldProblem, ServiceError
from openai_stream import Chunks, CompletionParser, classify_error
from settings import ProviderSettings, Settings, SettingsError

# An error's JSON is a few hundred bytes, a proxy's HTML page a few thousand.
MAX_ERROR_BYTES = 2**16
# After its finish_reason a provider owes usage and [DONE], after [DONE] only the end of the body,
# which frees the connection for the next request. Both come at once, or are not waited for.
FINISH_SECONDS = 5.0
CLOSE_SECONDS = 0.1
# An idle connection saves the next request its TLS handshake; servers hang up after 5 to 400 s.
KEEP_ALIVE_SECONDS = 30.0

# As much as aiohttp holds before it stops reading, so that what has come leaves at once; by the
# 16 KiB that httpx-aiohttp asks for, an event of a burst takes a fifth more time.
READ_BYTES = 2**16

Message = dict[str, str]


@dataclass(frozen=True)
class Completion:
    """How an answer ended, in the provider's own words: its last `usage`, its `finish_reason`."""

    model: str
    finish_reason: str | None
    usage: dict[str, Any] | None


ChunkStream = AsyncGenerator[Chunks | Completion, None]


@dataclass
class Attempt:
    """One request to one provider, and what came of it: the provider's status, its own id for the
    request, the code and the cause of our error."""

    model: str
    status: int | None = None
    provider_request_id: str | None = None
    error: str | None = None
    cause: str | None = None


@dataclass(frozen=True)
class Call:
    """What the providers are told of a request, and the attempts that were made for it."""

    request_id: str
    traceparent: str | None = None
    attempts: list[Attempt] = field(default_factory=list)

    def headers(self) -> dict[str, str]:
        """By its X-Client-Request-Id, OpenAI finds even a request that it never answered."""
        number = len(self.attempts)
        ids = {"X-Client-Request-Id": self.request_id + (f"-{number}" if number > 1 else "")}
        return ids if self.traceparent is None else {**ids, "traceparent": self.traceparent}


class LLMProvider(ABC):
    """Something that answers a conversation."""

    name: str

    @abstractmethod
    def stream(self, model: str, messages: Sequence[Message], call: Call) -> ChunkStream:
        """The answer: batches of chunks as they arrive, then one Completion.

        Ends with a Completion or raises a ServiceError, the chunks that came before it yielded.
        Closing the generator, or cancelling it, closes the connection behind it. What came of the
        request is noted in the last of `call.attempts`.
        """

    async def aclose(self) -> None:  # noqa: B027 - most providers hold nothing
        """Give back what the provider holds open."""


class OpenAIProvider(LLMProvider):
    """OpenAI's REST API, or a server that speaks it, at `{base_url}/chat/completions`."""

    def __init__(self, provider: ProviderSettings, settings: Settings) -> None:
        self.name = provider.name
        self._url = httpx.URL(str(provider.base_url).rstrip("/") + "/chat/completions")
        # A compressed answer would have to be unpacked, and 50 KB can unpack to 50 MB.
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            "Accept-Encoding": "identity",
        }
        if provider.api_key is not None:
            self._headers["Authorization"] = f"Bearer {provider.api_key.get_secret_value()}"
        # Nothing that is not configured: reasoning models and small servers refuse unknown fields.
        self._options: dict[str, object] = {
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if settings.max_output_tokens is not None:
            # OpenAI's reasoning models refuse the old name, most other servers know no other.
            openai = provider.base_url.host == "api.openai.com"
            limit = "max_completion_tokens" if openai else "max_tokens"
            self._options[limit] = settings.max_output_tokens
        # Before the gap between two chunks would count as too long.
        self._finish_seconds = min(FINISH_SECONDS, settings.idle_timeout_seconds / 2)
        # Every other limit in time is the caller's, and is kept by whoever waits for the chunks.
        self._extensions = {"timeout": {"connect": settings.connect_timeout_seconds}}
        self._transport = create_transport(self._url, settings)

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def stream(self, model: str, messages: Sequence[Message], call: Call) -> ChunkStream:
        body = to_json({"model": model, "messages": messages, **self._options})
        request = httpx.Request(
            "POST",
            self._url,
            # A fourth of the time that `content=body` takes: aiohttp sets the body's headers.
            stream=httpx.ByteStream(body),
            headers={**self._headers, **call.headers()},
            extensions=self._extensions,
        )
        request.read()
        reader = CompletionParser()
        with translate_http_errors():
            response = await self._transport.handle_async_request(request)
            try:
                attempt = call.attempts[-1]
                attempt.status = response.status_code
                attempt.provider_request_id = response.headers.get("x-request-id", "")[:128] or None
                await _check(response)
                async with aclosing(self._read(response, reader)) as batches:
                    async for batch in batches:
                        yield batch
            finally:
                # Under cancellation every await is cancelled again; the socket is closed all the
                # same.
                with anyio.CancelScope(shield=True):
                    await response.aclose()
        if reader.error:
            raise reader.error
        if not (reader.done or reader.finish_reason):
            raise ServiceError(
                "upstream_incomplete", "The provider broke off its answer. Try again."
            )
        yield Completion(reader.model or model, reader.finish_reason, reader.usage)

    async def _read(
        self, response: httpx.Response, reader: CompletionParser
    ) -> AsyncGenerator[Chunks, None]:
        """The batches of a response, until the reader has all that matters or the body ends."""
        reads = _reads(response)
        async for data in reads:
            batch = reader.feed(data)
            if batch is not None:
                yield batch
            if reader.error or reader.done or reader.finish_reason:
                break
        # What is missing now is usage, [DONE] and the end of the body. The answer itself is whole,
        # so a connection that breaks or goes quiet here does not spoil it.
        while not reader.error:
            last, more = reader.done, None
            seconds = CLOSE_SECONDS if last else self._finish_seconds
            with suppress(httpx.HTTPError, aiohttp.ClientError), anyio.move_on_after(seconds):
                more = await anext(reads, None)
            batch = reader.feed(more or b"")
            if batch:
                yield batch
            if last or not more:
                break


def _reads(response: httpx.Response) -> AsyncIterator[bytes]:
    """The body as it arrives: the transport's own iterator, without httpx's two around it."""
    stream = cast(AiohttpResponseStream, response.stream)
    stream.CHUNK_SIZE = READ_BYTES
    return aiter(stream)


async def _check(response: httpx.Response) -> None:
    """Raise what the provider answered, unless it is an event stream."""
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    answered = response.status_code == 200
    if answered and response.headers.get("content-encoding", "identity").lower() != "identity":
        raise ServiceError("upstream_error", "The provider sent a compressed answer, unasked.")
    if answered and media_type not in ("application/json", "text/html"):
        return
    body = bytearray()
    async for data in _reads(response):
        body += data
        if len(body) > MAX_ERROR_BYTES:
            break
    body_json = None
    with suppress(ValueError):
        body_json = from_json(bytes(body))
    if answered and not (isinstance(body_json, dict) and body_json.get("error")):
        raise ServiceError(
            "upstream_error", "The provider answered with something other than a stream."
        )
    status = 500 if answered else response.status_code
    raise classify_error(status, body_json, response.headers, time.time())


@contextmanager
def translate_http_errors() -> Iterator[None]:
    """The HTTP client's errors as ours. httpx-aiohttp maps loosely (a server that hangs up is a
    ConnectTimeout) and lets some of aiohttp's own errors through, so only a cause that is a real
    timeout counts as one."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, aiohttp.ClientError, UnicodeError) as error:
        if isinstance(error.__cause__ or error, TimeoutError):
            raise ServiceError(
                "upstream_timeout", "The provider could not be reached in time."
            ) from error
        problem = "The connection to the provider failed. Try again."
        raise ServiceError("upstream_error", problem, retryable=True) from error


class Response(aiohttp.ClientResponse):
    """One without a reason phrase: nobody reads it, and httpx-aiohttp fails, with the connection
    left open, at one that is not UTF-8."""

    async def start(self, connection: aiohttp.connector.Connection) -> aiohttp.ClientResponse:
        await super().start(connection)
        self.reason = None
        return self


def create_transport(target: httpx.URL, settings: Settings) -> httpx.AsyncBaseTransport:
    """The way to one provider: a connection for each stream, and the proxy that HTTPS_PROXY and
    NO_PROXY name.

    The transport is asked directly, without an httpx client around it. What a client would add is
    not wanted here: cookies (one caller's would go out with the next caller's request), redirects
    (they would carry the key elsewhere); and it took 14 % of a request's time.
    """
    proxies = urllib.request.getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    through = None
    try:
        if proxy and not urllib.request.proxy_bypass(target.host):
            # HttpUrl keeps out what only fails at the first request: SOCKS, a port above 65535.
            through = httpx.Proxy(str(HttpUrl(proxy if "://" in proxy else f"http://{proxy}")))
        # To load the authorities takes 50 ms and megabytes; over plain HTTP nobody needs trust.
        secure = target.scheme == "https" or (through is not None and through.url.scheme == "https")
        tls = httpx.create_ssl_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    except OSError as error:
        takes = "it takes a file of the authorities to trust, in PEM"
        raise SettingsError(f"SSL_CERT_FILE can't be used: {error.strerror}; {takes}") from None
    except ValueError:
        raise SettingsError(f"{target.scheme.upper()}_PROXY is not an http:// address") from None

    def session() -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=settings.max_streams, ssl=tls, keepalive_timeout=KEEP_ALIVE_SECONDS
        )
        return aiohttp.ClientSession(
            connector=connector, cookie_jar=aiohttp.DummyCookieJar(), response_class=Response
        )

    return AiohttpTransport(verify=tls, client=session, proxy=through)


class MockProvider(LLMProvider):
    """No model: rehearses every ending that a real provider can have, and says what it is."""

    name = "mock"
    # fmt: off
    models = ("echo", "lorem-100", "slow", "hang", "error", "error-midstream", "truncated",
              "rate-limited", "empty", "unicode")
    # fmt: on

    async def stream(self, model: str, messages: Sequence[Message], call: Call) -> ChunkStream:
        if model == "hang":
            await anyio.sleep_forever()
        if model == "error":
            raise ServiceError("upstream_error", "mock/error always fails.", retryable=True)
        if model == "rate-limited":
            raise ServiceError(
                "upstream_unavailable", "mock/rate-limited is always busy.", retry_after=2
            )
        chunks = _mock_chunks(model, messages[-1]["content"])
        for chunk in chunks:
            # Let others run: a provider that never waits would hold the whole process.
            await anyio.sleep(0.5 if model == "slow" else 0)
            yield [chunk]
        if model == "error-midstream":
            raise ServiceError("upstream_error", "mock/error-midstream fails here.", retryable=True)
        if model == "truncated":
            raise ServiceError("upstream_incomplete", "mock/truncated breaks off here.")
        prompt_tokens = sum(len(message["content"].split()) for message in messages)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(chunks)}
        yield Completion(f"mock/{model}", "stop", {**usage, "total_tokens": sum(usage.values())})


NO_MODEL = "This is a mock: no model is behind it. Set OPENAI_API_KEY to ask one."
LOREM = ("lorem", "ipsum", "dolor", "sit", "amet", "consectetur", "adipiscing", "elit")


def _mock_chunks(model: str, message: str) -> Chunks:
    if model == "empty":
        return []
    if model == "unicode":
        return ["naïve ", "日本語 ", "👩‍👩‍👧 ", "नमस्ते ", "سلام ", "e\u0301 ", "line\u2028separator"]
    if model in ("slow", "error-midstream", "truncated"):
        return [f"{word} " for word in f"This is mock/{model}, not a model".split()]
    if model.startswith("lorem-"):
        count = model.removeprefix("lorem-")
        if not re.fullmatch("[1-9][0-9]{0,3}|10000", count):
            problem = "mock/lorem-N takes an N from 1 to 10000"
            raise errors.invalid_request(FieldProblem(field="model_id", message=problem))
        return [f"{LOREM[i % len(LOREM)]} " for i in range(int(count))]
    return re.findall(r"\s*\S+", f"{NO_MODEL} You said: {message}")


class Target(NamedTuple):
    """A model and who answers for it."""

    provider: LLMProvider
    model: str

    @property
    def name(self) -> str:
        return f"{self.provider.name}/{self.model}"


class Router:
    """Which provider answers for a model, and which models callers may ask for."""

    def __init__(self, settings: Settings, providers: Mapping[str, LLMProvider]) -> None:
        self._providers = providers
        self._default = providers[settings.default_provider_name]
        self.default_model = settings.default_model
        mock_models = ("mock/*",) if self._default.name == "mock" else ()
        allowed = settings.models or (settings.default_model, *mock_models)
        # As they were set, and in full.
        self._patterns = {pattern: self._target(pattern).name for pattern in allowed}
        self._fallbacks = [self._target(model) for model in settings.fallback_models]
        # Names that are known before anybody asks, so that they may stand in metrics.
        mocks = [f"mock/{model}" for model in MockProvider.models]
        self.known = {*mocks, *self._patterns.values(), *(each.name for each in self._fallbacks)}
        if not self._allows(self._target(settings.default_model)):
            problem = "is not among MODELS: set it to one of them"
            raise SettingsError(f"DEFAULT_MODEL={settings.default_model!r} {problem}")

    def _allows(self, target: Target) -> bool:
        return any(fnmatchcase(target.name, full) for full in self._patterns.values())

    def _target(self, model: str) -> Target:
        """What precedes the first slash is a provider if one has that name."""
        prefix, slash, rest = model.partition("/")
        named = slash and prefix in self._providers
        return Target(self._providers[prefix], rest) if named else Target(self._default, model)

    @property
    def models(self) -> list[str]:
        """What callers may ask for. Globs stand as they are, the mock's models by their names."""
        names = []
        for pattern, full in self._patterns.items():
            mocks = [f"mock/{m}" for m in MockProvider.models if fnmatchcase(f"mock/{m}", full)]
            names += mocks if "*" in pattern and mocks else [pattern]
        return list(dict.fromkeys(names))

    def resolve(self, model_id: str | None) -> list[Target]:
        """The model's target, and those to try when it fails before its first chunk. Raises
        InvalidRequest, with the models that are allowed, for one that is not."""
        target = self._target(self.default_model if model_id is None else model_id)
        if not self._allows(target):
            problem = f"is not a model of this service; it has {', '.join(self.models)}"
            raise errors.invalid_request(FieldProblem(field="model_id", message=problem))
        # A mock's failure is a rehearsal: it has to be seen.
        fallbacks = [] if target.provider.name == "mock" else self._fallbacks
        return list(dict.fromkeys([target, *fallbacks]))


def create_providers(settings: Settings) -> dict[str, LLMProvider]:
    """Every provider that the settings name, and the mock."""
    real = [OpenAIProvider(each, settings) for each in settings.providers]
    return {provider.name: provider for provider in (MockProvider(), *real)}


async def complete(
    targets: Sequence[Target], messages: Sequence[Message], call: Call, settings: Settings
) -> ChunkStream:
    """The answer of the first target that begins one within `first_token_timeout_seconds`.

    A target that fails before its first chunk gives way to the next at once; the last is tried
    again up to `max_retries` times, if its failure may pass and its wait fits into the time. With k
    targets left behind it, an attempt gets 1/(k+1) of the time that remains. After the first chunk
    a failure is final: whoever reads has begun to read.
    """
    now = asyncio.get_running_loop().time
    deadline = now() + settings.first_token_timeout_seconds
    number = 0
    while True:
        target = targets[min(number, len(targets) - 1)]
        number += 1
        # Below 0 while other targets are left.
        retries = number - len(targets)
        attempt = Attempt(target.name)
        call.attempts.append(attempt)
        async with aclosing(target.provider.stream(target.model, messages, call)) as batches:
            try:
                left = deadline - now()
                with anyio.move_on_after(left / (1 + max(0, -retries))) as waiting:
                    first = await anext(batches)
                if waiting.cancelled_caught:
                    raise ServiceError(
                        "upstream_timeout", "The model did not begin in time. Try again."
                    )
            except ServiceError as error:
                failure = error
            else:
                yield first
                async for batch in batches:
                    yield batch
                return
        attempt.error, attempt.cause = failure.code, failure.cause
        if retries < 0:
            continue
        wait = backoff(retries) if failure.retry_after is None else failure.retry_after
        if retries == settings.max_retries or not failure.retryable or now() + wait >= deadline:
            raise failure
        await anyio.sleep(wait)


def backoff(retries: int) -> float:
    """Seconds before another try: half a second, doubling to 8, up to a quarter less at random, so
    that many callers who failed together do not come back together."""
    return min(0.5 * 2.0**retries, 8.0) * (1 - random.random() / 4)  # noqa: S311 - no secret
