"""Parser for OpenAI-compatible streams: the SSE decoder and the Chat Completions parser.

Bytes in, text and errors out. There is no I/O, no clock and no task here.
"""

import json
import math
import re
from typing import Any

from pydantic_core import from_json, to_json

from errors import ServiceError
from provider_errors import classify_error, is_error

# Real events reach 40 KB (a tool's result). The limit bounds memory for an event that never ends.
MAX_EVENT_BYTES = 2**20

# Bytes before the first text, reasoning or tool call: comments, blank lines, ignored fields, empty
# deltas. Real ones are a few kilobytes, OpenRouter's comments and Azure's filter results.
MAX_PREFIX_BYTES = 2**20

# The finish_reasons that report a failure, and those that mean none.
FAILURES = ("error", "network_error", "abort", "insufficient_system_resource")
NO_REASON = ("", "null", "none")

# Some providers repeat the reasoning in several fields. The first field with text is read.
# fmt: off
REASONING_FIELDS = (
    "reasoning_content", "reasoning", "reasoning_text", "reasoning_details", "thinking_blocks",
)
# fmt: on
PLAIN_FIELDS = {"role", "content"}

# Data that is not JSON and means nothing.
KEEP_ALIVE = re.compile(r"\W*(ping|pong|heart.?beat|keep.?alive)\W*", re.I)


class Reasoning(str):
    """A delta of the model's reasoning, not of its response."""

    __slots__ = ()


# The text deltas of one read, in order. Those of the reasoning are instances of Reasoning.
Chunks = list[str]


class SSEDecoder:
    """A decoder from bytes to server-sent events (WHATWG HTML 9.2.5 and 9.2.6).

    `feed` takes bytes split anywhere and returns the events they complete, as (name, data) pairs.
    It also reads what the standard ignores or garbles: a line `error: {...}` (llama-box) is an
    event named `error`, JSON without a field name is an event named `json`, and data lines that
    are each complete are one event each, as if there were blank lines between them.
    """

    def __init__(self) -> None:
        self.too_large = False
        self._buffer = bytearray()  # since the last blank line
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
        # A blank line may be split between two reads.
        if self._buffer.endswith(b"\n"):
            del self._buffer[-1:]
            data = b"\n" + data
        head, blank, rest = data.rpartition(b"\n\n")
        if not blank:
            self._buffer += data
            self.too_large = len(self._buffer) > MAX_EVENT_BYTES
            return []
        if self._buffer:
            head = bytes(self._buffer) + head
            self._buffer.clear()
        self._buffer += rest
        self.too_large = len(rest) > MAX_EVENT_BYTES
        if not self._started:
            self._started = True
            head = head.removeprefix(b"\xef\xbb\xbf")
        # Usually every event is one line `data: ...`, which the count of the line ends shows. Such
        # events are split at once, in a third of the time.
        payloads = head[6:].split(b"\n\ndata: ")
        if head.startswith(b"data: ") and head.count(b"\n") == 2 * len(payloads) - 2:
            return [(b"", payload) for payload in payloads]
        return [event for block in head.split(b"\n\n") if block for event in _read_block(block)]


def _read_block(block: bytes) -> list[tuple[bytes, bytes]]:
    """Return the events in lines without a blank line between them."""
    events: list[tuple[bytes, bytes]] = []
    name, data = b"", []
    lines = block.strip(b"\n").split(b"\n")
    if lines[0].startswith(b"{"):
        name, data, lines = b"json", lines, []
    for line in lines:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
        elif field == b"error":
            events.append((b"error", value))
        elif line.startswith(b"{"):
            events.append((b"json", line))
    if not all(line.startswith((b"{", b"[DONE]")) and line.endswith((b"}", b"]")) for line in data):
        data = [b"\n".join(data)]
    return [*events, *((name, line) for line in data)]


class CompletionParser:
    """A parser from the bytes of a Chat Completions stream to chunks of text.

    `model`, `finish_reason` and `usage` are the last values that the provider sent. `error` is set
    when the completion has failed, `done` when [DONE] was read. Bytes after either are ignored.

    `finished` is set by a finish_reason in an event without text or reasoning. Text that follows
    resets it, because some servers send a finish_reason early or in every event. While it is set,
    malformed events are ignored. Errors and usage still count.
    """

    def __init__(self) -> None:
        self.model = ""
        self.finish_reason: str | None = None
        self.usage: dict[str, Any] | None = None
        self.error: ServiceError | None = None
        self.done = False
        self.finished = False
        self._decoder = SSEDecoder()
        self._closed = False
        self._prefix_left: float = MAX_PREFIX_BYTES  # infinite after the first activity
        self._has_choice = False
        self._has_text = False
        self._has_messages = False  # the text comes in whole messages, not in deltas
        self._index: Any = None  # of the choice with the last text or finish_reason
        self._plain_index: object = self  # the same if text was last: more text needs no checks
        self._half: str | None = None  # of a surrogate pair; None if all JSON was strict

    @property
    def complete(self) -> bool:
        """Whether the completion is complete if nothing follows."""
        ended = self.finish_reason is not None and self._has_text
        return not self.error and (self.finished or ended or (self.done and self._has_choice))

    def feed(self, data: bytes) -> Chunks | None:
        """Return the chunks that `data` completes.

        An empty list means activity without text, such as a tool call. None means no activity.
        """
        if self.done or self.error:
            return None
        chunks: Chunks = []
        active = False
        for name, payload in self._decoder.feed(data):
            try:
                # The cache of strings would take as long as parsing.
                event = from_json(payload, allow_inf_nan=False, cache_strings="none")
            except ValueError:
                event = self._parse_leniently(payload)
            try:
                active |= self._read_event(name, event, chunks)
            except (TypeError, AttributeError, RecursionError):
                self._reject()
            if self.done or self.error:
                break
        if self._half is not None:
            chunks = self._join_surrogates(self._half, chunks)
        self._prefix_left = math.inf if active else self._prefix_left - len(data)
        if self._prefix_left < 0 or self._decoder.too_large:
            # What follows a complete response needs no error, but has to end.
            self.done |= self.finished
            if not (self.done or self.error):
                self.error = _upstream_error("The provider sent 1 MiB without a chunk of text.")
        return chunks if chunks or active else None

    def close(self) -> Chunks | None:
        """Return the chunks that the end of the body completes. Set `error` unless `complete`.

        The last event is read even if its blank line is missing, unlike in the standard.
        """
        self._closed = True
        chunks = self.feed(b"\n\n")
        if not (self.complete or self.error):
            self.error = _incomplete()
        return chunks

    def _reject(self) -> None:
        """Set the error for a malformed event, unless the completion does not need it.

        At the end of the body the event is truncated, and `close` sets the error.
        """
        if not (self.finished or self._closed):
            self.error = _upstream_error("The provider sent a malformed stream.")

    def _parse_leniently(self, payload: bytes) -> Any:
        """Parse an object that from_json rejects. Return other data as text.

        Bytes that are not UTF-8 become U+FFFD, NaN and Infinity null. Lone surrogates become "?"
        except in `choices`, where `_join_surrogates` replaces them.
        """
        text = payload.decode(errors="replace").strip()
        if not text.startswith("{"):
            return text
        try:
            event = json.loads(text, parse_constant=lambda _: None)
            clean = from_json(json.dumps(event, ensure_ascii=False).encode(errors="replace"))
        except (ValueError, RecursionError):
            return text
        self._half = self._half or ""
        return {**clean, "choices": event.get("choices")}

    def _join_surrogates(self, half: str, chunks: Chunks) -> Chunks:
        """Join surrogate pairs that are split between chunks. Replace lone halves by U+FFFD."""
        joined: Chunks = []
        for chunk in chunks:
            text = half + chunk
            half = text[-1] if "\ud800" <= text[-1] <= "\udbff" else ""
            if text := text.removesuffix(half):
                data = text.encode("utf-16-le", "surrogatepass")
                joined.append(type(chunk)(data.decode("utf-16-le", "replace")))
        if half and (self.done or self.finished or self.error or self._closed):
            joined.append("\ufffd")
            half = ""
        self._half = half
        return joined

    def _read_event(self, name: bytes, event: Any, chunks: Chunks) -> bool:
        """Append the event's text to `chunks`. Return whether the event shows activity.

        `event` is untrusted JSON. An unexpected shape raises AttributeError or TypeError.
        """
        if type(event) is not dict:
            self._read_other(name, event)
            return False
        choices = event.get("choices") or ()
        unwrapped = not (choices or self.finished) and is_error(event)
        if unwrapped or event.get("error") or (name and b"error" in name):
            self.error = classify_error(500, event)
            return False
        model = event.get("model")
        if model and isinstance(model, str):
            self.model = model
        usage = event.get("usage") or ("x_groq" in event and (event["x_groq"] or {}).get("usage"))
        if usage and isinstance(usage, dict):
            # 1e999 is valid JSON, but would be sent to the client as Infinity.
            self.usage = from_json(to_json(usage, inf_nan_mode="null"))
        active = False
        for choice in choices:
            active |= self._read_choice(choice, chunks)
        return active

    def _read_other(self, name: bytes, data: Any) -> None:
        """Read the data of an event that is not a JSON object."""
        text = data.strip(" \n\"'[]") if isinstance(data, str) else ""
        if text.upper() == "DONE":
            self.done = True
        elif b"error" in name or (isinstance(data, list) and any(map(is_error, data))):
            self.error = classify_error(500, data)
        elif not data or name not in (b"", b"message") or KEEP_ALIVE.fullmatch(text):
            return
        elif text.startswith("{") or not self.complete:
            # After a finish_reason with text, only what could have been a chunk matters.
            self._reject()

    def _read_choice(self, choice: Any, chunks: Chunks) -> bool:
        delta = choice.get("delta") or self._whole_message(choice)
        content = delta.get("content")
        reason = choice.get("finish_reason")
        error = choice.get("error")
        if (
            content
            and type(content) is str
            and choice.get("index") == self._plain_index
            and not (reason or error)
            and (len(delta) == 1 or not any(map(delta.get, delta.keys() - PLAIN_FIELDS)))
        ):
            # Nearly every event takes this short cut. The rest of the method does the same.
            chunks.append(content)
            return True
        self._has_choice = True
        reasoning, text, has_content = _read_delta(delta)
        word = reason.strip().lower() if isinstance(reason, str) else ""
        ends = word not in NO_REASON
        index = choice.get("index") or 0
        if (text or ends) and index != self._index:
            # TGI counts tokens in `index`. It is not one completion if the index goes back, or if
            # another index follows a finish_reason.
            ended = self.finish_reason if text else self.finished
            if self._index is not None and (ended or (text and index < self._index)):
                self.error = _upstream_error("The provider mixed several completions.")
                return False
            self._index = index
        chunks += reasoning + text
        if text:
            self._has_text = True
            self.finished = False
            self._plain_index = choice.get("index")
        if ends:
            self.finish_reason = reason.encode(errors="replace").decode()
            self.finished = not has_content
            self._plain_index = self
            if word in FAILURES:
                self.error = _incomplete()
        if error := error or delta.get("error"):
            self.error = classify_error(500, {"error": error})
        return has_content or bool(delta.get("tool_calls") or delta.get("function_call"))

    def _whole_message(self, choice: Any) -> Any:
        """Return the message or the text of a choice without a delta.

        After deltas with text it is ignored: some servers repeat the text at the end.
        """
        if self._has_text and not self._has_messages:
            return {}
        message = choice.get("message") or {"content": choice.get("text")}
        self._has_messages |= bool(message.get("content"))
        return message


def _read_delta(delta: Any) -> tuple[Chunks, Chunks, bool]:
    """Return a delta's reasoning, its text, and whether it has any of the two.

    Encrypted reasoning has no chunks, but counts.
    """
    reasoning = ""
    has_content = False
    for field in REASONING_FIELDS:
        if value := delta.get(field):
            has_content = True
            if reasoning := value if type(value) is str else _reasoning_text(value):
                break
    content, refusal = delta.get("content"), delta.get("refusal")
    texts: Chunks = [content] if content else []
    if content and not isinstance(content, str):
        # Mistral sends a list of parts, {"type": "text" or "thinking", ...}.
        parts = content if isinstance(content, list) else [content]
        thinking = [part for part in parts if part.get("type") in ("thinking", "reasoning")]
        texts = [part["text"] + "" for part in parts if part not in thinking and part.get("text")]
        reasoning = reasoning or _reasoning_text(thinking)
    if refusal:
        texts.append(refusal + "")
    chunks: Chunks = [Reasoning(reasoning)] if reasoning else []
    return chunks, texts, has_content or bool(content or refusal)


def _reasoning_text(value: Any) -> str:
    """Return the text of reasoning in any of the shapes that providers send."""
    if isinstance(value, list):
        return "".join(map(_reasoning_text, value))
    if isinstance(value, dict):
        fields = map(value.get, ("text", "thinking", "summary", "content"))
        return _reasoning_text(next(filter(None, fields), ""))
    return value if isinstance(value, str) else ""


def _incomplete() -> ServiceError:
    problem = "The provider ended the response before it was complete. Retry."
    return ServiceError("upstream_incomplete", problem)


def _upstream_error(problem: str) -> ServiceError:
    return ServiceError("upstream_error", problem)
