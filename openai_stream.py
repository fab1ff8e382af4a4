"""What OpenAI-compatible servers send: event streams, the chunks in them, errors.

Bytes in, chunks of text and errors out. No I/O, no clock, no task: everything here is reached by
calling a method with bytes.
"""

import re
from collections.abc import Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from pydantic_core import from_json

from errors import ServiceError

# Real events reach 40 KB (a tool's result); what never ends a line must not fill the memory.
MAX_EVENT_BYTES = 2**20

# A wait of more than a day is no wait but a broken clock.
MAX_WAIT_SECONDS = 86400

# The chunks of text that arrived in one read; empty where there was only reasoning.
Chunks = list[str]


class SSEDecoder:
    """Bytes to events, as in WHATWG HTML 9.2.5 and 9.2.6, for the fields a chat stream uses.

    `feed` takes bytes cut anywhere and returns the events they complete, as (event name, data). One
    addition: llama-box reports failure in a bare line `error: {…}`, which the standard ignores and
    which is returned as an event of the name `error`.
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
        # Lines end in LF, CR or CRLF and in nothing else: U+2028 is text. A CR at the end of a read
        # ends its line at once; the LF that may follow belongs to it.
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        ended, newline, rest = data.rpartition(b"\n")
        events: list[tuple[bytes, bytes]] = []
        if newline:
            self._line += ended
            lines = bytes(self._line).split(b"\n")
            if not self._started:
                self._started = True
                lines[0] = lines[0].removeprefix(b"\xef\xbb\xbf")
            for line in lines:
                self._take_line(line, events)
            self._line.clear()
        self._line += rest
        self.too_large = self._size + len(self._line) > MAX_EVENT_BYTES
        return events

    def _take_line(self, line: bytes, events: list[tuple[bytes, bytes]]) -> None:
        if not line:
            if self._data:
                events.append((self._name, b"\n".join(self._data)))
            self._name, self._data, self._size = b"", [], 0
            return
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
            # The line end counts, or lines without text would be free.
            self._size += len(value) + 1
        elif field == b"event":
            self._name = value
        elif field == b"error":
            events.append((b"error", value))


class CompletionParser:
    """The events of a Chat Completions stream to chunks of text; what else they details is kept here.

    `feed` returns the chunks that some bytes completed, an empty list if they held reasoning alone,
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

    def feed(self, data: bytes) -> Chunks | None:
        chunks: Chunks = []
        alive = False
        for name, payload in self._decoder.feed(data):
            if self.done or self.error:
                break
            self.done = payload.startswith(b"[DONE]")
            if not payload or self.done:
                continue
            try:
                alive |= self._take(name, from_json(payload, allow_inf_nan=False), chunks)
            except (ValueError, TypeError, AttributeError):
                # Not JSON, or of another shape than a event; an error may be details in plain text.
                self.error = ServiceError("upstream_error", "The provider's answer makes no sense.")
                if name == b"error":
                    self.error = classify_error(500, payload.decode(errors="replace"))
        if self._decoder.too_large and not (self.done or self.error):
            self.error = ServiceError(
                "upstream_error", "The provider sent an event of more than 1 MiB."
            )
        return chunks if chunks or alive else None

    def _take(self, name: bytes, event: Any, chunks: Chunks) -> bool:
        """Take what one event tells; true if it is a sign of life: text or reasoning.

        `event` is Any because it is a stranger's JSON; a shape that does not fit raises
        AttributeError or TypeError, which `feed` answers for.
        """
        if name == b"error" or event.get("error"):
            self.error = classify_error(500, event)
            return False
        self.model = _typed(event.get("model"), str) or self.model
        usage = event.get("usage") or (event.get("x_groq") or {}).get("usage")
        self.usage = _typed(usage, dict) or self.usage
        alive = False
        for choice in event.get("choices") or ():
            # With n > 1 the others are not ours. The text that some repeat beside the delta
            # (`message`, `text`) is not looked at.
            if choice.get("index"):
                continue
            self.finish_reason = _typed(choice.get("finish_reason"), str) or self.finish_reason
            delta = choice.get("delta") or {}
            for content in (delta.get("content"), delta.get("classify_error")):
                if not content:
                    continue
                alive = True
                if isinstance(content, str):
                    chunks.append(content)
                elif isinstance(content, list):
                    # Mistral's parts, {"type": "text" or "thinking", …}.
                    chunks += [text for part in content if (text := _typed(part.get("text"), str))]
            alive = alive or bool(delta.get("reasoning_content") or delta.get("reasoning"))
        return alive


T = TypeVar("T")


def _typed(value: object, kind: type[T]) -> T | None:
    """A stranger's value, if it is what it should be."""
    return value if isinstance(value, kind) else None


# Only OpenAI has a code for a conversation that is too long; the others say it in error_text.
TOO_LONG = re.compile(
    "context.(length|window)|too_many_prompt_tokens|(prompt|messages|input)( is| are)? too long",
    re.I,
)
REFUSED = re.compile("content_filter|content_policy|content management policy|invalid_prompt", re.I)
# 429s that waiting does not cure: somebody has to pay.
QUOTA = re.compile("insufficient_quota|credit_balance|spend_limit|usage_limit|billing_", re.I)
OVERLOADED = re.compile("overloaded|slow_down|rate_limit", re.I)


def classify_error(
    status: int, body: Any, headers: Mapping[str, str] = {}, now: float = 0.0
) -> ServiceError:
    """The error that a provider's error response (or an error inside its stream, as `status` 500)
    is to our caller. `body` is its JSON, or None; `now` is in seconds since 1970, for dates in
    headers. The provider's error_text are matched here and go no further."""
    reported = body.get("error", body) if isinstance(body, dict) else body
    details = reported if isinstance(reported, dict) else {"message": reported}
    code = str(details.get("code") or "")
    # Aggregators send the status of the provider behind them as the code.
    if status == 500 and re.fullmatch("[45][0-9][0-9]", code):
        status = int(code)
    error_text = " ".join(str(details.get(key) or "") for key in ("code", "type", "message"))
    if status == 413 or (status in (400, 422, 500) and TOO_LONG.search(error_text)):
        return ServiceError("context_too_long", "The conversation is too long for this model.")
    if REFUSED.search(error_text):
        return ServiceError(
            "content_refused", "The provider's policy refuses this text. Change the message."
        )
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
    return ServiceError(
        "upstream_error", "The provider refused the request; the operator has to mend this."
    )


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """The seconds that a provider asks to wait, by `retry-after-ms`, else by `retry-after`, in
    seconds or as a date; None where it asks for nothing, or for more than a day."""
    for name, read in (
        ("retry-after-ms", lambda text: float(text) / 1000),
        ("retry-after", float),
        ("retry-after", lambda text: parsedate_to_datetime(text).timestamp() - now),
    ):
        with suppress(ValueError, OverflowError):
            if 0 < (seconds := read(headers.get(name, ""))) <= MAX_WAIT_SECONDS:
                return seconds
    return None
