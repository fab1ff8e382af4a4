"""From a model id to a completion: the providers, the router, retries and failover.

A provider passes chunks to a `Sink` as they arrive and returns how the completion ended. Only
`OpenAIProvider` does network I/O; errors of HTTP and of the provider become ServiceErrors here.
"""

import asyncio
import random
import re
import ssl
import time
import urllib.request
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Any, NamedTuple, Protocol, TypeVar

import anyio
import httpx
from pydantic import HttpUrl
from pydantic_core import from_json, to_json

from errors import FieldProblem, ServiceError, invalid_request
from http_client import HTTPTransport, ResponseBody, bypasses_proxy
from openai_stream import Chunks, CompletionParser, Reasoning
from provider_errors import classify_error
from settings import ProviderSettings, Settings, SettingsError
from telemetry import Attempt

# An error's JSON has a few hundred bytes, a proxy's HTML page a few thousand.
MAX_ERROR_BYTES = 2**16
# After its finish_reason a provider still sends usage and [DONE], after [DONE] the end of the body,
# which frees the connection for the next request. Both usually come at once.
FINISH_SECONDS = 5.0
CLOSE_SECONDS = 0.1
# Callers choose the model ids, so the cache of resolved ones is bounded.
MAX_CACHED_MODELS = 1024
# Answers of mock/slow are this far apart.
MOCK_SLOW_SECONDS = 0.5

Message = dict[str, str]
T = TypeVar("T")


@dataclass(frozen=True)
class Completion:
    """How a completion ended. All values are the provider's own; `usage` is its last."""

    model: str | None
    finish_reason: str | None
    usage: dict[str, Any] | None
    history_trimmed: bool = False


@dataclass
class Call:
    """What a provider has to know of a request, and what was done for it so far.

    `dropped_turns` is the number of the oldest turns that were left out because the conversation
    was too long for the model.
    """

    request_id: str
    traceparent: str | None = None
    attempts: list[Attempt] = field(default_factory=list)
    dropped_turns: int = 0

    def headers(self) -> dict[str, str]:
        """Return the headers that identify the current attempt.

        OpenAI logs X-Client-Request-Id, so that even a request it never answered can be found.
        """
        number = len(self.attempts)
        request_id = self.request_id + (f"-{number}" if number > 1 else "")
        headers = {"X-Client-Request-Id": request_id}
        if self.traceparent is not None:
            headers["traceparent"] = self.traceparent
        return headers


class Sink(Protocol):
    """Takes the chunks of a completion.

    `started` is true once it has been written to. It calls `on_start` at the first write.
    """

    started: bool
    on_start: Callable[[], None]

    def attach(self, resume: Callable[[], None], finish: Callable[[], bool]) -> None:
        """Connect the provider that will write.

        The sink calls `resume` when it can take chunks again. It calls `finish` when the idle
        timeout has passed: the provider then ends the completion if what it has may count as
        complete, or returns False.
        """

    def write(self, chunks: Chunks) -> bool:
        """Take chunks, in order. An empty list shows that the model is working.

        Return False if no more are wanted until `resume`. May raise; the provider then stops.
        """


class LLMProvider(ABC):
    """Something that completes a conversation."""

    name: str

    @abstractmethod
    async def stream(
        self, model: str, messages: Sequence[Message], call: Call, sink: Sink
    ) -> Completion:
        """Write the completion's chunks to `sink` and return how it ended.

        Raise ServiceError if it fails, after the chunks that came before are written. Cancelling
        the call closes the connection. The result is noted in the last of `call.attempts`.
        """

    async def aclose(self) -> None:  # noqa: B027 - most providers have nothing to close
        """Close idle connections."""


class OpenAIProvider(LLMProvider):
    """OpenAI's REST API, or a compatible server, at `{base_url}/chat/completions`."""

    def __init__(self, provider: ProviderSettings, settings: Settings) -> None:
        self.name = provider.name
        self._url = httpx.URL(str(provider.base_url).rstrip("/") + "/chat/completions")
        self._api_key = provider.api_key.get_secret_value() if provider.api_key else None
        self._headers = httpx.Headers(
            {
                "Host": self._url.netloc.decode(),
                "Content-Type": "application/json",
                "User-Agent": "chat-sidecar",
                "Accept": "text/event-stream",
                # Unpacking could turn 50 KB into 50 MB.
                "Accept-Encoding": "identity",
            }
        )
        if self._api_key is not None:
            self._headers["Authorization"] = f"Bearer {self._api_key}"
        self._headers.update(provider.extra_headers)
        # Nothing that is not configured: reasoning models and small servers reject unknown fields.
        self._options: dict[str, object] = {
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if settings.max_output_tokens is not None:
            # OpenAI's reasoning models reject the old name; most other servers know no other.
            limit = "max_completion_tokens" if self.name == "openai" else "max_tokens"
            self._options[limit] = settings.max_output_tokens
        # What is configured wins, and null removes a field.
        options = {**self._options, **provider.extra_body}
        self._options = {name: value for name, value in options.items() if value is not None}
        # Timeouts other than connecting are the sink's and the router's.
        self._extensions = {"timeout": {"connect": settings.connect_timeout_seconds}}
        self._transport = create_transport(self._url)

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def stream(
        self, model: str, messages: Sequence[Message], call: Call, sink: Sink
    ) -> Completion:
        body = to_json({"model": model, "messages": messages, **self._options})
        headers = self._headers.copy()
        for name, value in call.headers().items():
            headers[name] = value
        headers["Content-Length"] = str(len(body))
        request = httpx.Request(
            "POST",
            self._url,
            headers=headers,
            stream=httpx.ByteStream(body),
            extensions=self._extensions,
        )
        parser = CompletionParser()
        with translate_http_errors():
            response = await self._transport.handle_async_request(request)
            try:
                attempt = call.attempts[-1]
                attempt.status = response.status_code
                attempt.provider_request_id = response.headers.get("x-request-id", "")[:128] or None
                await _check(response, model)
                await _read(response.extensions["body"], parser, sink)
            finally:
                await response.aclose()
        if parser.error:
            raise parser.error
        return Completion(
            self._without_key(parser.model or model),
            self._without_key(parser.finish_reason),
            self._without_key(parser.usage),
        )

    def _without_key(self, value: T) -> T | None:
        """Return None in place of a value in which the provider repeats our key."""
        return None if self._api_key and self._api_key in str(value) else value


async def _read(body: ResponseBody, parser: CompletionParser, sink: Sink) -> None:
    """Read a stream until its parser has all it needs, or fails, or the body ends.

    Chunks are written to `sink` inside the connection's read callback.
    """
    loop = asyncio.get_running_loop()
    # Ends a stream that is complete but goes on.
    timer: asyncio.TimerHandle | None = None

    def end_within(seconds: float | None) -> None:
        """Set the time of the end, unless it is already earlier. None cancels it."""
        nonlocal timer
        end = loop.time() + seconds if seconds is not None else None
        if timer is not None and (end is None or end < timer.when()):
            timer.cancel()
            timer = None
        if timer is None and end is not None:
            timer = loop.call_at(end, body.stop)

    def consume(data: bytes) -> None:
        chunks = parser.feed(data)
        if chunks is not None and not sink.write(chunks):
            body.pause()
        if parser.error:
            body.stop()
        elif parser.done:
            end_within(CLOSE_SECONDS)
        elif parser.finished:
            end_within(FINISH_SECONDS)
        elif timer is not None:
            # Text followed a finish_reason, which was not the end.
            end_within(None)

    def finish() -> bool:
        if parser.complete:
            body.stop()
        return parser.complete

    sink.attach(body.resume, finish)
    try:
        await body.push(consume)
    except httpx.HTTPError:
        # A connection that breaks after the completion does not spoil it.
        if not parser.complete:
            raise
    finally:
        if timer is not None:
            timer.cancel()
    last = parser.close()
    if last is not None:
        sink.write(last)


async def _check(response: httpx.Response, model: str) -> None:
    """Raise the error that a response reports, unless it is an event stream."""
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = response.headers.get("content-encoding", "").strip().lower()
    compressed = encoding not in ("", "none", "identity")
    if response.status_code == 200:
        if compressed:
            problem = "The provider sent a compressed stream, unrequested."
            raise ServiceError("upstream_error", problem)
        if media_type == "text/html":
            problem = "The provider answered with a web page. Its address is probably wrong."
            raise ServiceError("upstream_error", problem)
        return
    body, source = bytearray(), response.extensions["body"]

    def take(data: bytes) -> None:
        body.extend(data)
        if len(body) > MAX_ERROR_BYTES:
            source.stop()

    await source.push(take)
    data = _decompress(bytes(body)) if compressed else bytes(body)
    details: Any = None if media_type == "text/html" else data.decode(errors="replace")
    with suppress(ValueError):
        details = from_json(data)
    raise classify_error(response.status_code, details, response.headers, time.time(), model)


def _decompress(body: bytes) -> bytes:
    """Return up to MAX_ERROR_BYTES of a gzip or deflate body; nothing of any other."""
    with suppress(zlib.error):
        # 32: detect the header of gzip or zlib.
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 32).decompress(body, MAX_ERROR_BYTES)
    return b""


@contextmanager
def translate_http_errors() -> Iterator[None]:
    """Raise the HTTP client's errors as ServiceErrors."""
    try:
        yield
    except httpx.TimeoutException as error:
        problem = "The provider could not be reached in time. Retry."
        raise ServiceError("upstream_timeout", problem) from error
    except httpx.HTTPError as error:
        problem = "The connection to the provider failed. Retry."
        raise ServiceError("upstream_error", problem, retryable=True) from error


def create_transport(target: httpx.URL) -> HTTPTransport:
    """Return the transport for one provider, through the proxy that the environment names.

    Raise SettingsError if the proxy or the certificate authorities cannot be used.
    """
    proxies = urllib.request.getproxies()
    address = proxies.get(target.scheme) or proxies.get("all")
    proxy = None
    try:
        if address and not bypasses_proxy(target, proxies.get("no", "")):
            address = address if "://" in address else f"http://{address}"
            # HttpUrl rejects what would only fail at the first request, such as SOCKS.
            proxy = httpx.Proxy(str(HttpUrl(address)))
            if proxy.url.scheme != "http":
                raise ValueError
        # Loading the authorities takes 50 ms and megabytes, so only https does it.
        secure = target.scheme == "https"
        tls = httpx.create_ssl_context() if secure else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    except OSError as error:
        expected = "it must be a PEM file of certificate authorities"
        raise SettingsError(f"SSL_CERT_FILE cannot be read: {error.strerror}; {expected}") from None
    except ValueError:
        problem = "must be an http:// URL; other proxies are not supported"
        raise SettingsError(f"{target.scheme.upper()}_PROXY {problem}") from None
    return HTTPTransport(tls, proxy)


class MockProvider(LLMProvider):
    """No model: simulates every outcome of a real provider, for authors of clients."""

    name = "mock"
    # fmt: off
    models = ("echo", "lorem-100", "slow", "hang", "error", "error-midstream", "truncated",
              "rate-limited", "empty", "unicode", "reasoning")
    # fmt: on

    async def stream(
        self, model: str, messages: Sequence[Message], call: Call, sink: Sink
    ) -> Completion:
        if model == "hang":
            await anyio.sleep_forever()
        if model == "error":
            raise ServiceError("upstream_error", "mock/error always fails.", retryable=True)
        if model == "rate-limited":
            problem = "mock/rate-limited is always overloaded. Retry in 2 s."
            raise ServiceError("upstream_unavailable", problem, retry_after=2)
        resumed = asyncio.Event()
        sink.attach(resumed.set, lambda: False)
        chunks = _mock_chunks(model, messages[-1]["content"])
        for chunk in chunks:
            # Also without a delay other tasks get their turn.
            await anyio.sleep(MOCK_SLOW_SECONDS if model == "slow" else 0)
            resumed.clear()
            if not sink.write([chunk]):
                await resumed.wait()
        if model == "error-midstream":
            problem = "mock/error-midstream fails after some text."
            raise ServiceError("upstream_error", problem, retryable=True)
        if model == "truncated":
            raise ServiceError("upstream_incomplete", "mock/truncated ends before it is complete.")
        prompt_tokens = sum(len(message["content"].split()) for message in messages)
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(chunks)}
        return Completion(f"mock/{model}", "stop", {**usage, "total_tokens": sum(usage.values())})


NO_MODEL = "This is the mock provider. No model is connected; set OPENAI_API_KEY to use OpenAI."
LOREM = ("lorem", "ipsum", "dolor", "sit", "amet", "consectetur", "adipiscing", "elit")


def _mock_chunks(model: str, message: str) -> Chunks:
    if model == "empty":
        return []
    if model == "reasoning":
        thoughts: Chunks = [
            Reasoning(f"{word} ") for word in ["The", "user", "wants", "to", "see", "this."]
        ]
        return [*thoughts, "This ", "is ", "mock/reasoning."]
    if model == "unicode":
        return ["naïve ", "日本語 ", "👩‍👩‍👧 ", "नमस्ते ", "سلام ", "e\u0301 ", "line\u2028separator"]
    if model in ("slow", "error-midstream", "truncated"):
        return [f"{word} " for word in f"This is mock/{model}, not a model".split()]
    if model.startswith("lorem-"):
        count = model.removeprefix("lorem-")
        if not re.fullmatch("[1-9][0-9]{0,3}|10000", count):
            problem = "must be mock/lorem-N with N from 1 to 10000"
            raise invalid_request(FieldProblem(field="model_id", message=problem))
        return [f"{LOREM[i % len(LOREM)]} " for i in range(int(count))]
    return re.findall(r"\s*\S+", f"{NO_MODEL} You said: {message}")


class Target(NamedTuple):
    """A provider and its model."""

    provider: LLMProvider
    model: str

    @property
    def name(self) -> str:
        return f"{self.provider.name}/{self.model}"


class Router:
    """Chooses the provider by model id, and knows which models callers may request."""

    def __init__(self, settings: Settings, providers: Mapping[str, LLMProvider]) -> None:
        self._providers = providers
        self._default = providers[settings.default_provider_name]
        self.default_model = settings.default_model
        mock_models = ("mock/*",) if self._default.name == "mock" else ()
        allowed = settings.models or (settings.default_model, *mock_models)
        # From each pattern as it is configured to its full form with a provider.
        self._patterns = {pattern: self._target(pattern).name for pattern in allowed}
        self._fallbacks = [self._target(model) for model in settings.fallback_models]
        # Names that do not come from callers and may therefore be labels of metrics.
        mocks = [f"mock/{model}" for model in MockProvider.models]
        self.known = {*mocks, *self._patterns.values(), *(each.name for each in self._fallbacks)}
        self.resolve = lru_cache(maxsize=MAX_CACHED_MODELS)(self._resolve)
        if not self._allows(self._target(settings.default_model)):
            problem = "is not included in MODELS. Add it, or set another DEFAULT_MODEL"
            raise SettingsError(f"DEFAULT_MODEL={settings.default_model!r} {problem}")

    def _allows(self, target: Target) -> bool:
        return any(fnmatchcase(target.name, full) for full in self._patterns.values())

    def _target(self, model: str) -> Target:
        """Split off the provider before the first slash, if one has that name."""
        prefix, slash, rest = model.partition("/")
        if slash and prefix in self._providers:
            return Target(self._providers[prefix], rest)
        return Target(self._default, model)

    @property
    def models(self) -> list[str]:
        """What callers may request: globs as they are configured, mock models by name."""
        names = []
        for pattern, full in self._patterns.items():
            mocks = [f"mock/{m}" for m in MockProvider.models if fnmatchcase(f"mock/{m}", full)]
            names += mocks if "*" in pattern and mocks else [pattern]
        return list(dict.fromkeys(names))

    def _resolve(self, model_id: str | None) -> Sequence[Target]:
        """Return the model's target, followed by those to fail over to.

        Raise invalid_request, which lists the allowed models, if the model is not allowed.
        """
        target = self._target(self.default_model if model_id is None else model_id)
        if not self._allows(target):
            problem = f"is not available; choose one of {', '.join(self.models)}"
            raise invalid_request(FieldProblem(field="model_id", message=problem))
        # A simulated failure has to reach the client.
        fallbacks = [] if target.provider.name == "mock" else self._fallbacks
        return tuple(dict.fromkeys([target, *fallbacks]))


def create_providers(settings: Settings) -> dict[str, LLMProvider]:
    """Return every configured provider and the mock, by name."""
    configured = [OpenAIProvider(each, settings) for each in settings.providers]
    return {provider.name: provider for provider in (MockProvider(), *configured)}


async def complete(
    targets: Sequence[Target],
    messages: Sequence[Message],
    call: Call,
    sink: Sink,
    settings: Settings,
) -> Completion:
    """Stream the completion of the first target that writes a chunk in time.

    A target that fails before its first chunk is followed by the next at once. The last is retried
    up to MAX_RETRIES times if its error is retryable and the wait ends before the first-token
    deadline. With k targets left, an attempt gets 1/(k+1) of the remaining time. After the first
    chunk an error is final, because the client has read it.

    A conversation that is too long for a model is sent to it again without the older half of its
    turns, until it fits or only the message is left. That does not count as a retry.
    """
    now = asyncio.get_running_loop().time
    deadline = now() + settings.first_token_timeout_seconds
    number = 0
    while True:
        target = targets[min(number, len(targets) - 1)]
        targets_left = max(0, len(targets) - 1 - number)
        retries = max(0, number - len(targets) + 1)
        attempt = Attempt(target.name)
        call.attempts.append(attempt)
        try:
            seconds = (deadline - now()) / (targets_left + 1)
            completion = await _stream_within(seconds, target, messages, call, sink)
            trimmed = call.dropped_turns > 0
            return replace(completion, history_trimmed=True) if trimmed else completion
        except ServiceError as error:
            attempt.error, attempt.cause, attempt.reason = error.code, error.cause, error.reason
            if sink.started:
                raise
            failure = error
        if is_too_long(attempt) and (turns := count_turns(messages)):
            dropped = (turns + 1) // 2
            call.dropped_turns += dropped
            messages = drop_oldest_turns(messages, dropped)
            continue
        number += 1
        if targets_left:
            continue
        wait = backoff(retries) if failure.retry_after is None else failure.retry_after
        if retries == settings.max_retries or not failure.retryable or now() + wait >= deadline:
            raise failure
        await anyio.sleep(wait)


def is_too_long(attempt: Attempt) -> bool:
    """Return whether the provider surely rejected the conversation as too long for the model."""
    certain = attempt.reason == "context_length"
    return certain or (attempt.reason == "too_long" and attempt.status in (400, 413))


def count_turns(messages: Sequence[Message]) -> int:
    """Return the number of turns before the new message."""
    return sum(message["role"] == "assistant" for message in messages)


def drop_oldest_turns(messages: Sequence[Message], count: int) -> Sequence[Message]:
    """Return the messages without the oldest turns. The system prompt stays."""
    start = int(messages[0]["role"] == "system")
    return [*messages[:start], *messages[start + 2 * count :]]


async def _stream_within(
    seconds: float, target: Target, messages: Sequence[Message], call: Call, sink: Sink
) -> Completion:
    """Stream one attempt. Raise upstream_timeout if it writes nothing within `seconds`."""
    try:
        async with asyncio.timeout(seconds) as timeout:
            sink.on_start = partial(timeout.reschedule, None)
            return await target.provider.stream(target.model, messages, call, sink)
    except TimeoutError:
        problem = "The model did not start to respond in time. Retry."
        raise ServiceError("upstream_timeout", problem) from None


def backoff(retries: int) -> float:
    """Return the seconds to wait before the next retry.

    0.5 s, doubling up to 8 s, minus up to a quarter at random, so that callers that failed together
    do not retry together.
    """
    return min(0.5 * 2.0**retries, 8.0) * (1 - random.random() / 4)  # noqa: S311 - not a secret
