"""From a model's name to pieces of text: the event-stream decoder, the reading of a chunk, the
providers, and the router that picks one.

Only `OpenAIProvider` does network I/O; its failures, and those of the HTTP client below it, become
ours here and nowhere else. Nothing here knows callers, limits, sessions, or how an answer is sent.
"""

import math
import re
import urllib.request
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import aiohttp
import anyio
import httpx
from httpx_aiohttp import AiohttpTransport
from pydantic_core import from_json, to_json

from errors import (
    ContentRefused,
    ContextTooLong,
    FieldProblem,
    InvalidRequest,
    ServiceError,
    UpstreamError,
    UpstreamIncomplete,
    UpstreamTimeout,
    UpstreamUnavailable,
)
from settings import Settings, SettingsError, Upstream

# Real events reach 40 KB (a tool's result); what never ends a line must not fill the memory.
MAX_EVENT_BYTES = 2**20
# An error's JSON is a few hundred bytes, a proxy's HTML page a few thousand.
MAX_ERROR_BYTES = 2**16
# After its finish_reason a provider owes usage and [DONE], after [DONE] only the end of the body,
# which frees the connection for the next request. Both come at once, or are not waited for.
FINISH_SECONDS = 5.0
CLOSE_SECONDS = 0.1
# An idle connection saves the next request its TLS handshake; servers hang up after 5 to 400 s.
KEEP_ALIVE_SECONDS = 30.0

Message = dict[str, str]
# The pieces of text that arrived in one read; empty where there was only reasoning.
Batch = list[str]


@dataclass(frozen=True)
class Completion:
    """How an answer ended, in the provider's own words: its last `usage`, its `finish_reason`."""

    model: str
    finish_reason: str | None
    usage: dict[str, Any] | None


# ---- event stream


class SSEDecoder:
    """Bytes to events, as in WHATWG HTML 9.2.5 and 9.2.6, for the fields a chat stream uses.

    `feed` takes bytes cut anywhere and returns the events they complete, as (event name, data). One
    addition: llama-box reports failure in a bare line `error: {…}`, which the standard ignores and
    which is returned as an event of the name `error`.
    """

    def __init__(self, max_event_bytes: int = MAX_EVENT_BYTES) -> None:
        self.too_large = False
        self._max = max_event_bytes
        self._line = bytearray()
        self._name = b""
        self._data: list[bytes] = []
        self._size = 0
        self._started = False
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[tuple[bytes, bytes]]:
        # Lines end in LF, CR or CRLF and in nothing else: U+2028 is text. A CR at the end of a read
        # ends its line at once; the LF that may follow belongs to it.
        if self._after_cr and chunk:
            self._after_cr = False
            chunk = chunk.removeprefix(b"\n")
        if b"\r" in chunk:
            self._after_cr = chunk.endswith(b"\r")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        ended, newline, rest = chunk.rpartition(b"\n")
        events: list[tuple[bytes, bytes]] = []
        if newline:
            self._line += ended
            for line in bytes(self._line).split(b"\n"):
                self._take_line(line, events)
            self._line.clear()
        self._line += rest
        self.too_large = self._size + len(self._line) > self._max
        return events

    def _take_line(self, line: bytes, events: list[tuple[bytes, bytes]]) -> None:
        if not self._started:
            self._started = True
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line:
            if self._data:
                events.append((self._name, b"\n".join(self._data)))
            self._name, self._data, self._size = b"", [], 0
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
            self._size += len(value)
        elif field == b"event":
            self._name = value
        elif field == b"error":
            events.append((b"error", value))


class ChunkReader:
    """The events of a Chat Completions stream to pieces of text; what else they told is kept here.

    `feed` returns the pieces that some bytes completed, an empty list if they held reasoning alone,
    None if they held nothing that shows progress. `error` is set at the first event that reports a
    failure or makes no sense, `done` at [DONE]; what comes after either is not read.
    """

    def __init__(self) -> None:
        self.model = ""
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        self.done = False
        self.error: ServiceError | None = None
        self._decoder = SSEDecoder()

    def feed(self, data: bytes) -> Batch | None:
        pieces: Batch = []
        alive = False
        for name, event in self._decoder.feed(data):
            if self.done or self.error:
                break
            if event.startswith(b"[DONE]"):
                self.done = True
                break
            if not event:
                continue
            try:
                alive |= self._read(name, from_json(event, allow_inf_nan=False), pieces)
            except (ValueError, TypeError, AttributeError):
                # Not JSON, or JSON of another shape than a chunk's.
                self.error = UpstreamError(
                    "The model's provider sent an answer that makes no sense."
                )
        if self._decoder.too_large and not self.done:
            self.error = UpstreamError("The model's provider sent an event of more than 1 MiB.")
        return pieces if pieces or alive else None

    def _read(self, name: bytes, chunk: Any, pieces: Batch) -> bool:
        """Take what one chunk tells; true if it is a sign of life: text or reasoning.

        `chunk` is Any because it is a stranger's JSON; a shape that does not fit raises
        AttributeError or TypeError, which `feed` answers for.
        """
        if name == b"error" or chunk.get("error"):
            self.error = refusal(500, chunk)
            return False
        self.model = chunk.get("model") or self.model
        self.usage = chunk.get("usage") or (chunk.get("x_groq") or {}).get("usage") or self.usage
        alive = False
        for choice in chunk.get("choices") or ():
            # With n > 1 the others are not ours. The text that some repeat beside the delta
            # (`message`, `text`) is not looked at.
            if choice.get("index"):
                continue
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
            delta = choice.get("delta") or {}
            before = len(pieces)
            for content in (delta.get("content"), delta.get("refusal")):
                if isinstance(content, str):
                    if content:
                        pieces.append(content)
                elif content:  # Mistral's list of parts, {"type": "text" or "thinking"}
                    pieces += [part["text"] for part in content if part.get("text")]
                    alive = True
            alive |= len(pieces) > before
            alive |= bool(delta.get("reasoning_content") or delta.get("reasoning"))
        return alive


# ---- what providers' errors mean

# Only OpenAI has a code for a conversation that is too long; the others say it in words.
TOO_LONG = re.compile(
    "context.length|too long|too_many_prompt_tokens|context window", re.IGNORECASE
)
REFUSED = re.compile("content_filter|content_policy|content management policy", re.IGNORECASE)
# 429s that waiting does not cure: somebody has to pay.
QUOTA = re.compile(
    "insufficient_quota|credit_balance|billing|spend_limit|usage_limit", re.IGNORECASE
)
OVERLOADED = re.compile("overloaded|slow_down|rate_limit", re.IGNORECASE)


def refusal(status: int, body: Any, headers: Mapping[str, str] | None = None) -> ServiceError:
    """The error that a provider's error response (or an error inside its stream, as `status` 500)
    is to our caller. `body` is its JSON, or None. Its words are matched here and go no further."""
    reported = body.get("error", body) if isinstance(body, dict) else body
    told = reported if isinstance(reported, dict) else {"message": reported}
    code = str(told.get("code") or "")
    # Aggregators send the status of the provider behind them as the code.
    if status in (200, 500) and re.fullmatch("[45][0-9][0-9]", code):
        status = int(code)
    words = " ".join(str(told.get(key) or "") for key in ("code", "type", "message"))
    if status in (200, 400, 413, 422, 500) and TOO_LONG.search(words):
        return ContextTooLong(
            "The conversation is too long for this model. Start a new session, or send less."
        )
    if REFUSED.search(words):
        return ContentRefused(
            "The model's provider refuses this text by its policy. Change the message."
        )
    if status == 402 or QUOTA.search(words):
        return UpstreamUnavailable(
            "The service's quota at the model's provider is used up. Its operator has to act.",
            retryable=False,
        )
    wait = retry_after(headers or {})
    if status in (429, 503, 529) or OVERLOADED.search(words):
        return UpstreamUnavailable(
            "The model's provider is busy. Try again later.",
            retry_after=None if wait is None else math.ceil(wait),
        )
    if status in (408, 409) or status >= 500:
        return UpstreamError("The model's provider failed. Try again.", retryable=True)
    return UpstreamError(
        "The model's provider refused the request. It is the service's operator who can mend this."
    )


def retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds that a provider asks to wait: `retry-after-ms`, else `retry-after` in seconds."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        try:
            seconds = float(headers[name]) / unit
        except (KeyError, ValueError):
            continue
        if 0 < seconds <= 86400:
            return seconds
    return None


@contextmanager
def upstream_errors() -> Iterator[None]:
    """The HTTP client's errors as ours. httpx-aiohttp maps loosely (a server that hangs up is a
    ConnectTimeout) and lets some of aiohttp's own errors through, so only a cause that is a real
    timeout counts as one."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL, aiohttp.ClientError) as error:
        if isinstance(error.__cause__ or error, TimeoutError):
            raise UpstreamTimeout("The model's provider could not be reached in time.") from error
        raise UpstreamError(
            "The connection to the model's provider failed.", retryable=True
        ) from error


# ---- providers


@dataclass
class Attempt:
    """One request to one provider, and what the log is to say of it."""

    provider: str
    model: str
    # Sent as X-Client-Request-Id, by which OpenAI finds a request that it never answered.
    client_request_id: str
    traceparent: str | None = None
    status: int | None = None
    # The provider's own id for the request.
    request_id: str | None = None
    error: str | None = None


class LLMProvider(ABC):
    """Something that answers a conversation."""

    name: str

    @abstractmethod
    def stream(
        self, messages: Sequence[Message], attempt: Attempt
    ) -> AsyncGenerator[Batch | Completion, None]:
        """The answer of `attempt.model`: batches of pieces as they arrive, then one Completion.

        Ends with a Completion or raises a ServiceError, the pieces that came before it yielded.
        Closing the generator, or cancelling it, closes the connection behind it.
        """

    async def aclose(self) -> None:  # noqa: B027 - most providers hold nothing
        """Give back what the provider holds open."""


class OpenAIProvider(LLMProvider):
    """OpenAI's REST API, or a server that speaks it, at `{base_url}/chat/completions`."""

    def __init__(self, upstream: Upstream, settings: Settings) -> None:
        self.name = upstream.name
        base = str(upstream.base_url).rstrip("/")
        self._url = f"{base}/chat/completions"
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "text/event-stream",
            # A compressed answer would have to be unpacked, and 50 KB can unpack to 50 MB.
            "Accept-Encoding": "identity",
        }
        if upstream.api_key is not None:
            self._headers["Authorization"] = f"Bearer {upstream.api_key.get_secret_value()}"
        self._limit: dict[str, int] = {}
        if settings.max_output_tokens is not None:
            # OpenAI's reasoning models refuse the old name, most other servers know no other.
            openai = upstream.base_url.host == "api.openai.com"
            field = "max_completion_tokens" if openai else "max_tokens"
            self._limit = {field: settings.max_output_tokens}
        self._client = http_client(self._url, settings)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def stream(
        self, messages: Sequence[Message], attempt: Attempt
    ) -> AsyncGenerator[Batch | Completion, None]:
        with upstream_errors():
            response = await self._client.send(self._request(messages, attempt), stream=True)
        try:
            attempt.status = response.status_code
            attempt.request_id = response.headers.get("x-request-id")
            await _check(response)
            reader = ChunkReader()
            with upstream_errors():
                async with aclosing(_read_answer(response, reader)) as batches:
                    async for batch in batches:
                        yield batch
        finally:
            # Under cancellation every await is cancelled again; the socket is closed all the same.
            with anyio.CancelScope(shield=True):
                await response.aclose()
        if reader.error:
            raise reader.error
        if not (reader.done or reader.finish_reason):
            raise UpstreamIncomplete("The model's provider broke off its answer.")
        yield Completion(reader.model or attempt.model, reader.finish_reason, reader.usage)

    def _request(self, messages: Sequence[Message], attempt: Attempt) -> httpx.Request:
        headers = {**self._headers, "X-Client-Request-Id": attempt.client_request_id}
        if attempt.traceparent:
            headers["traceparent"] = attempt.traceparent
        # Nothing that is not configured: reasoning models and small servers refuse unknown fields.
        body = to_json(
            {
                "model": attempt.model,
                "messages": messages,
                "stream": True,
                "stream_options": {"include_usage": True},
                **self._limit,
            }
        )
        return self._client.build_request("POST", self._url, content=body, headers=headers)


async def _check(response: httpx.Response) -> None:
    """Raise what the provider answered, unless it is an event stream."""
    media_type = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    encoding = response.headers.get("content-encoding", "identity")
    if encoding != "identity":
        raise UpstreamError(
            "The model's provider sent a compressed answer, which was not asked for."
        )
    if response.status_code == 200 and media_type not in ("application/json", "text/html"):
        return
    body = bytearray()
    with upstream_errors():
        async for data in response.aiter_raw():
            body += data
            if len(body) > MAX_ERROR_BYTES:
                break
    try:
        told = from_json(bytes(body))
    except ValueError:
        told = None
    if response.status_code == 200 and not (isinstance(told, dict) and told.get("error")):
        raise UpstreamError("The model's provider answered with something other than a stream.")
    raise refusal(response.status_code, told, response.headers)


async def _read_answer(
    response: httpx.Response, reader: ChunkReader
) -> AsyncGenerator[Batch, None]:
    """The batches of a response, until the reader has all that matters or the body ends."""
    reads = response.aiter_raw()
    async for data in reads:
        batch = reader.feed(data)
        if batch is not None:
            yield batch
        if reader.error:
            return
        if reader.done or reader.finish_reason:
            break
    late: Batch = []
    # What is missing now is usage, [DONE] and the end of the body. The answer itself is whole,
    # so a connection that breaks or goes quiet here does not spoil it.
    try:
        with anyio.move_on_after(CLOSE_SECONDS if reader.done else FINISH_SECONDS) as waiting:
            async for data in reads:
                late += reader.feed(data) or ()
                if reader.error:
                    break
                if reader.done:
                    waiting.deadline = min(waiting.deadline, anyio.current_time() + CLOSE_SECONDS)
    except (httpx.HTTPError, aiohttp.ClientError):
        pass
    if late:
        yield late


def http_client(url: str, settings: Settings) -> httpx.AsyncClient:
    """A client for one provider: a connection for each stream, no cookies (one caller's would go
    out with the next caller's request), no redirects (they would carry the key elsewhere), and the
    proxy that HTTPS_PROXY and NO_PROXY name."""
    target = httpx.URL(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if urllib.request.proxy_bypass(target.host):
        proxy = None
    ssl_context = httpx.create_ssl_context()

    def session() -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(
            limit=settings.max_streams, ssl=ssl_context, keepalive_timeout=KEEP_ALIVE_SECONDS
        )
        return aiohttp.ClientSession(connector=connector, cookie_jar=aiohttp.DummyCookieJar())

    transport = AiohttpTransport(
        verify=ssl_context, client=session, proxy=httpx.Proxy(proxy) if proxy else None
    )
    # Every other limit in time is the caller's, and is kept by whoever waits for the pieces.
    timeout = httpx.Timeout(None, connect=settings.connect_timeout_seconds)
    return httpx.AsyncClient(transport=transport, timeout=timeout)


class MockProvider(LLMProvider):
    """No model: rehearses every ending that a real provider can have, and says what it is."""

    name = "mock"
    models = (
        "echo", "lorem-100", "slow", "hang", "error", "error-midstream", "truncated",
        "rate-limited", "empty", "unicode",
    )  # fmt: skip

    async def stream(
        self, messages: Sequence[Message], attempt: Attempt
    ) -> AsyncGenerator[Batch | Completion, None]:
        model = attempt.model
        if model == "hang":
            await anyio.sleep_forever()
        if model == "error":
            raise UpstreamError(
                "The mock provider failed, as mock/error always does.", retryable=True
            )
        if model == "rate-limited":
            raise UpstreamUnavailable(
                "The mock provider is busy, as mock/rate-limited always is.", retry_after=2
            )
        pieces = _mock_pieces(model, messages[-1]["content"])
        for piece in pieces:
            # Let others run: a provider that never waits would hold the whole process.
            await anyio.sleep(0.5 if model == "slow" else 0)
            yield [piece]
        if model == "error-midstream":
            raise UpstreamError(
                "The mock provider failed in the middle of its answer.", retryable=True
            )
        if model == "truncated":
            raise UpstreamIncomplete("The mock provider broke off its answer.")
        asked = sum(len(message["content"].split()) for message in messages)
        usage = {
            "prompt_tokens": asked,
            "completion_tokens": len(pieces),
            "total_tokens": asked + len(pieces),
        }
        yield Completion(f"mock/{model}", "stop", usage)


LOREM = ("lorem", "ipsum", "dolor", "sit", "amet", "consectetur", "adipiscing", "elit")


def _mock_pieces(model: str, message: str) -> Batch:
    if model == "empty":
        return []
    if model == "unicode":
        return ["naïve ", "日本語 ", "👩‍👩‍👧 ", "नमस्ते ", "سلام ", "e\u0301 ", "line\u2028separator"]
    if model.startswith("lorem-"):
        count = model.removeprefix("lorem-")
        if not re.fullmatch("[1-9][0-9]{0,4}", count) or int(count) > 10_000:
            problem = "mock/lorem-N takes an N from 1 to 10000"
            raise InvalidRequest([FieldProblem(field="model_id", message=problem)])
        return [f"{LOREM[i % len(LOREM)]} " for i in range(int(count))]
    if model in ("slow", "error-midstream", "truncated"):
        return [f"{word} " for word in f"This is mock/{model}, not a model".split()]
    said = (
        f"This is a mock: no model is behind it. Set OPENAI_API_KEY to ask one. You said: {message}"
    )
    return re.findall(r"\s*\S+", said)


# ---- router


@dataclass(frozen=True)
class Target:
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
        self._default = settings.default_provider_name
        self.default_model = settings.default_model
        allowed = settings.models or (settings.default_model,)
        if not settings.models and self._default == "mock":
            allowed = (*allowed, "mock/*")
        self._patterns = [(pattern, self._full_name(pattern)) for pattern in allowed]
        if not self._allows(self._full_name(settings.default_model)):
            raise SettingsError(f"DEFAULT_MODEL={settings.default_model!r} is not among MODELS")

    def _allows(self, full: str) -> bool:
        return any(fnmatchcase(full, pattern) for _, pattern in self._patterns)

    def _full_name(self, model: str) -> str:
        """`provider/model`: what precedes the first slash is a provider if one has that name."""
        prefix, slash, _ = model.partition("/")
        return model if slash and prefix in self._providers else f"{self._default}/{model}"

    @property
    def models(self) -> list[str]:
        """What callers may ask for. Globs stand as they are, the mock's models by their names."""
        names = []
        for pattern, full in self._patterns:
            mocks = [f"mock/{m}" for m in MockProvider.models if fnmatchcase(f"mock/{m}", full)]
            names += mocks if "*" in pattern and mocks else [pattern]
        return list(dict.fromkeys(names))

    def resolve(self, model_id: str | None) -> Target:
        """Raises InvalidRequest, with the models that are allowed, for one that is not."""
        full = self._full_name(self.default_model if model_id is None else model_id)
        if not self._allows(full):
            problem = f"is not a model of this service; it has {', '.join(self.models)}"
            raise InvalidRequest([FieldProblem(field="model_id", message=problem)])
        name, _, model = full.partition("/")
        return Target(self._providers[name], model)


def make_providers(settings: Settings) -> dict[str, LLMProvider]:
    """Every provider that the settings name, and the mock."""
    providers: dict[str, LLMProvider] = {"mock": MockProvider()}
    for upstream in settings.upstreams:
        providers[upstream.name] = OpenAIProvider(upstream, settings)
    return providers


async def answer(
    target: Target, messages: Sequence[Message], attempt: Attempt, first_piece_seconds: float
) -> AsyncGenerator[Batch | Completion, None]:
    """One provider's stream, its first piece waited for no longer than `first_piece_seconds`."""
    async with aclosing(target.provider.stream(messages, attempt)) as batches:
        with anyio.move_on_after(first_piece_seconds) as waiting:
            first = await anext(batches)
        if waiting.cancelled_caught:
            raise UpstreamTimeout("The model did not begin its answer in time. Try again.")
        yield first
        async for batch in batches:
            yield batch
