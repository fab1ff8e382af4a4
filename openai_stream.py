"""Parser for OpenAI-compatible streams: SSE decoder, Chat Completions chunks, error classification.

Bytes in, text and errors out. There is no I/O, no clock and no task here.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from pydantic_core import from_json

from errors import ServiceError

# Real events reach 40 KB (a tool's result). The limit bounds memory for a line that never ends.
MAX_EVENT_BYTES = 2**20

# A longer wait can only come from a wrong clock, and is ignored.
MAX_WAIT_SECONDS = 86400

# The text deltas of one read, in order. Empty if the read contained only reasoning.
Chunks = list[str]


class SSEDecoder:
    """A decoder from bytes to server-sent events (WHATWG HTML 9.2.5 and 9.2.6).

    `feed` takes bytes split anywhere and returns the events they complete, as (name, data) pairs.
    There is one extension: llama-box reports errors as a line `error: {...}`, which the standard
    ignores. It is returned as an event named `error`.
    """

    def __init__(self) -> None:
        self.too_large = False
        self._line = bytearray()
        self._name = b""
        self._data: list[bytes] = []
        self._size = 0
        self._started = False
        self._after_cr = False

    def feed(self, data: bytes) -> list[tuple[bytes, bytes]]:
        """Return the events that `data` completes."""
        # Only LF, CR and CRLF end a line: U+2028 is text. A CR at the end of a read ends its line
        # at once, and an LF at the start of the next read belongs to that CR.
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        complete, newline, rest = data.rpartition(b"\n")
        events: list[tuple[bytes, bytes]] = []
        if newline:
            self._line += complete
            lines = bytes(self._line).split(b"\n")
            if not self._started:
                self._started = True
                lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            for line in lines:
                self._read_line(line, events)
            self._line.clear()
        self._line += rest
        self.too_large = self._size + len(self._line) > MAX_EVENT_BYTES
        return events

    def _read_line(self, line: bytes, events: list[tuple[bytes, bytes]]) -> None:
        if not line:
            if self._data:
                events.append((self._name, b"\n".join(self._data)))
            self._name, self._data, self._size = b"", [], 0
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
            # The line end counts, or empty lines would cost memory without a limit.
            self._size += len(value) + 1
        elif field == b"event":
            self._name = value
        elif field == b"error":
            events.append((b"error", value))


class CompletionParser:
    """A parser from the bytes of a Chat Completions stream to chunks of text.

    `model`, `finish_reason` and `usage` are the last values that the provider sent. `error` is set
    at the first event that is malformed or reports a failure, `done` at [DONE]. Events after either
    are ignored.
    """

    def __init__(self) -> None:
        self.model = ""
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        self.done = False
        self.error: ServiceError | None = None
        self._decoder = SSEDecoder()

    def feed(self, data: bytes) -> Chunks | None:
        """Return the chunks that `data` completes.

        An empty list means reasoning without text. None means no progress.
        """
        chunks: Chunks = []
        active = False
        for name, payload in self._decoder.feed(data):
            if self.done or self.error:
                break
            self.done = payload.startswith(b"[DONE]")
            if not payload or self.done:
                continue
            try:
                active |= self._read_event(name, from_json(payload, allow_inf_nan=False), chunks)
            except (ValueError, TypeError, AttributeError):
                # Not JSON, or JSON of another shape. The data of an error event may be plain text.
                self.error = ServiceError("upstream_error", "The provider sent a malformed stream.")
                if name == b"error":
                    self.error = classify_error(500, payload.decode(errors="replace"))
        if self._decoder.too_large and not (self.done or self.error):
            self.error = ServiceError(
                "upstream_error", "The provider sent an event of more than 1 MiB."
            )
        return chunks if chunks or active else None

    def _read_event(self, name: bytes, event: Any, chunks: Chunks) -> bool:
        """Append the event's text to `chunks`. Return whether it contained text or reasoning.

        `event` is untrusted JSON. An unexpected shape raises AttributeError or TypeError.
        """
        if name == b"error" or event.get("error"):
            self.error = classify_error(500, event)
            return False
        self.model = _typed(event.get("model"), str) or self.model
        usage = event.get("usage") or (event.get("x_groq") or {}).get("usage")
        self.usage = _typed(usage, dict) or self.usage
        active = False
        for choice in event.get("choices") or ():
            # Only the first choice is read. Together and Perplexity repeat the text beside the
            # delta, as `text` or `message`: that is ignored.
            if choice.get("index"):
                continue
            self.finish_reason = _typed(choice.get("finish_reason"), str) or self.finish_reason
            delta = choice.get("delta") or {}
            for content in (delta.get("content"), delta.get("refusal")):
                if not content:
                    continue
                active = True
                if isinstance(content, str):
                    chunks.append(content)
                elif isinstance(content, list):
                    # Mistral's parts, {"type": "text" or "thinking", ...}.
                    chunks += [text for part in content if (text := _typed(part.get("text"), str))]
            active = active or bool(delta.get("reasoning_content") or delta.get("reasoning"))
        return active


T = TypeVar("T")


def _typed(value: object, kind: type[T]) -> T | None:
    """Return an untrusted value if it has the expected type, otherwise None."""
    return value if isinstance(value, kind) else None


# Only OpenAI has a code for a conversation that is too long. Others report it in the message.
TOO_LONG = re.compile(
    "context.(length|window)|too_many_prompt_tokens|(prompt|messages|input)( is| are)? too long",
    re.I,
)
REFUSED = re.compile("content_filter|content_policy|content management policy|invalid_prompt", re.I)
# The account is used up: waiting does not help, the operator has to pay.
QUOTA = re.compile("insufficient_quota|credit_balance|spend_limit|usage_limit|billing_", re.I)
OVERLOADED = re.compile("overloaded|slow_down|rate_limit", re.I)


def classify_error(
    status: int, body: Any, headers: Mapping[str, str] = {}, now: float = 0.0
) -> ServiceError:
    """Return the error for the caller that corresponds to a provider's error.

    `body` is the JSON of an error response, or None. An error inside a stream has `status` 500.
    `now` is in seconds since 1970 and is needed for dates in `headers`. The provider's error text
    is only matched and never passed on.
    """
    error = body.get("error", body) if isinstance(body, dict) else body
    details = error if isinstance(error, dict) else {"message": error}
    code = str(details.get("code") or "")
    # Aggregators send the status of the provider behind them as the code.
    if status == 500 and re.fullmatch("[45][0-9][0-9]", code):
        status = int(code)
    error_text = " ".join(str(details.get(key) or "") for key in ("code", "type", "message"))
    if status == 413 or (status in (400, 422, 500) and TOO_LONG.search(error_text)):
        return ServiceError("context_too_long", "The conversation is too long for this model.")
    if REFUSED.search(error_text):
        problem = "The provider's content policy rejects this request. Change the message."
        return ServiceError("content_refused", problem)
    if status == 402 or QUOTA.search(error_text):
        problem = "The service's quota at the provider is used up. Its operator has to act."
        return ServiceError("upstream_unavailable", problem, retryable=False)
    wait = retry_after(headers, now)
    busy = status in (429, 503, 529) or bool(OVERLOADED.search(error_text))
    retryable = busy or status in (408, 409) or status >= 500
    if headers.get("x-should-retry") in ("true", "false"):
        retryable = headers["x-should-retry"] == "true"
    if busy:
        problem = "The provider is busy. Try again later."
        return ServiceError("upstream_unavailable", problem, retryable=retryable, retry_after=wait)
    if retryable or status >= 500:
        problem = "The provider failed. Try again."
        return ServiceError("upstream_error", problem, retryable=retryable, retry_after=wait)
    problem = "The provider rejected the service's request. Its operator has to act."
    return ServiceError("upstream_error", problem)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that a provider requests to wait, or None.

    Reads `retry-after-ms`, then `retry-after` as seconds or as a date. Ignores more than a day.
    """
    for name, parse in (
        ("retry-after-ms", lambda text: float(text) / 1000),
        ("retry-after", float),
        ("retry-after", lambda text: parsedate_to_datetime(text).timestamp() - now),
    ):
        with suppress(ValueError, OverflowError):
            if 0 < (seconds := parse(headers.get(name, ""))) <= MAX_WAIT_SECONDS:
                return seconds
    return None
