"""Server-sent events: `EventStream` relays one completion to one client.

The status line is sent late, so that an early failure gets a status of its own. Heartbeats keep the
connection alive, deadlines limit provider and client, a client that disconnects is noticed, and
exactly one terminal event is sent. Nothing here knows callers, limits or sessions.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Literal

import anyio
from pydantic import BaseModel
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from chat import CompletionBody, DoneEvent, ErrorEvent, StoppedEvent
from errors import ServiceError, to_service_error
from openai_stream import Chunks, Reasoning
from providers import Completion, Sink
from server import CONNECTION, ClientConnection
from settings import Settings
from telemetry import StreamReport

NOT_STORED = "The response is complete, but it could not be saved to the session."
NOT_STOPPED = "The stream is stopped, but its turn may not be saved yet. Retry in 1 s."
# Ten times the longest response of today's models, as text and with the framing of its events.
MAX_TEXT_BYTES = 2**22
MAX_SENT_BYTES = 2**24
# nginx passes each event on at once if X-Accel-Buffering is `no`.
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
# Reads of the provider whose events are held until the status line is sent. Each has up to 256 KiB,
# and many can come in one turn of the event loop.
MAX_HELD_READS = 4
HEARTBEAT = b": keep-alive\n\n"
# Storing a turn takes milliseconds.
FINISH_SECONDS = 5.0

Disconnect = Literal["client_disconnected", "client_stalled"]


@dataclass(frozen=True)
class Stopped:
    """The end of a stream that its caller stopped."""


# How a stream ends: completed, failed, stopped, or without its client.
End = Completion | ServiceError | Stopped | Disconnect
# A time on the event loop's clock, and what to do then.
Deadline = tuple[float, Callable[[], None]]


class State(Enum):
    """How far the HTTP response is. An error can have a status of its own only while WAITING."""

    WAITING = "nothing is sent"
    OPENING = "the status line is being sent; events are held until it is out"
    OPEN = "events are written to the connection"


class ClientStream(ABC):
    """An ASGI response that sends events to one client.

    Events are written to the client's connection at once, also from within a callback of the event
    loop: no task wakes for them. A single timer checks all deadlines.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._headers = list(STREAM_HEADERS)
        self._state = State.WAITING
        self.end: End | None = None
        self._disconnect: Disconnect | None = None
        self._held: list[bytes] = []
        self._opening: asyncio.Task[None] | None = None
        self._task: asyncio.Task[Any] | None = None
        # Since when the client does not read, and for how long it did not before.
        self._paused_since: float | None = None
        self._paused_seconds = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the stream. Raise its error if nothing was sent yet."""
        self._send = send
        self._connection: ClientConnection = scope["extensions"][CONNECTION]
        self._connection.on_disconnect = partial(self.abort, "client_disconnected")
        self._connection.on_resume = self._on_resume
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._started_at = self._sent_at = self._now()
        self._timer: asyncio.Handle = self._loop.call_soon(self._check_deadlines)
        if self._connection.disconnected:
            self.abort("client_disconnected")
        # A cancel scope would do the same at a higher cost.
        self._task = asyncio.current_task()
        try:
            if self.end is None:
                await self._relay()
        except asyncio.CancelledError:
            # `abort` has cancelled this task. Any other cancellation goes on.
            if self._task is None or self.end is None or self._task.uncancel() > 0:
                raise
        finally:
            self._timer.cancel()
            self.end = await self._finish(self.end)
            if self._disconnect is None:
                await self._send_end(self.end)
            self._connection.on_disconnect = self._connection.on_resume = _ignore
        if isinstance(self.end, ServiceError) and self._state is State.WAITING:
            raise self.end
        if self._disconnect == "client_stalled":
            self._connection.abort()

    def abort(self, end: ServiceError | Stopped | Disconnect) -> None:
        """End the stream now. Only the first end counts, but a disconnect is always noted."""
        if isinstance(end, str):
            self._disconnect = self._disconnect or end
        if self.end is None:
            self.end = end
            if self._task is not None:
                self._task.cancel()

    @property
    def outcome(self) -> str:
        """How the stream ended for this client, as the log calls it."""
        if isinstance(self.end, ServiceError):
            return self._disconnect or self.end.code
        return self._disconnect or ("stopped" if isinstance(self.end, Stopped) else "done")

    @abstractmethod
    async def _relay(self) -> None:
        """Write events until the stream ends, and set `end`. Cancelled by `abort`."""

    @abstractmethod
    async def _finish(self, end: End | None) -> End:
        """Do what has to be done before the client is sent the end; return that end."""

    @abstractmethod
    def _terminal_event(self, end: Completion | ServiceError | Stopped) -> bytes:
        """Return the last event."""

    @abstractmethod
    def _resume(self) -> None:
        """Continue: the client reads again."""

    @abstractmethod
    def _deadlines(self) -> list[Deadline]:
        """Return the deadlines that apply besides heartbeats and the write timeout."""

    # Writing

    def _write(self, events: bytes) -> None:
        """Send events, or hold them until the status line is sent."""
        if self._state is State.OPEN:
            self._connection.write(events)
            return
        self._held.append(events)
        self._start_opening()

    def _start_opening(self) -> None:
        if self._state is State.WAITING:
            self._state = State.OPENING
            self._opening = self._loop.create_task(self._open())

    async def _open(self) -> None:
        """Send the status line through ASGI, so that middleware sees it, then what was held."""
        start = {"type": "http.response.start", "status": 200, "headers": self._headers}
        await self._send(start)
        self._state = State.OPEN
        if self._held:
            self._connection.write(b"".join(self._held))
            self._held.clear()
        if not self._connection.paused:
            self._on_resume()

    def _pause(self, now: float) -> None:
        """Note that the client does not read."""
        self._paused_since = self._paused_since or now

    def _on_resume(self) -> None:
        if self._paused_since is not None:
            self._end_pause(self._now())
            self._resume()

    def _end_pause(self, now: float) -> None:
        if self._paused_since is not None:
            self._paused_seconds += now - self._paused_since
            self._paused_since = None
            self._sent_at = now

    # Deadlines

    def _check_deadlines(self) -> None:
        """Act on the deadline that has passed, if any, and check again when the next may."""
        if self.end is not None:
            return
        now, limits = self._now(), self._settings
        deadlines = self._deadlines()
        if self._paused_since is not None:
            stalled = partial(self.abort, "client_stalled")
            deadlines.append((self._paused_since + limits.write_timeout_seconds, stalled))
        else:
            deadlines.append((self._sent_at + limits.heartbeat_seconds, self._send_heartbeat))
        deadline, act = min(deadlines, key=lambda pair: pair[0])
        if now >= deadline:
            act()
        # A wait that begins meanwhile has its deadline within the shortest of the limits.
        interval = min(
            limits.idle_timeout_seconds, limits.write_timeout_seconds, limits.heartbeat_seconds
        )
        self._timer = self._loop.call_at(min(deadline, now + interval), self._check_deadlines)

    def _send_heartbeat(self) -> None:
        self._sent_at = self._now()
        self._write(HEARTBEAT)
        if self._connection.paused:
            self._pause(self._sent_at)

    # The end

    async def _send_end(self, end: End) -> None:
        """Send the terminal event, unless the error gets an HTTP status of its own."""
        failed_early = isinstance(end, ServiceError) and self._state is State.WAITING
        if failed_early or isinstance(end, str):
            return
        body = self._terminal_event(end)
        # While the client reads, sending does not suspend and needs no deadline.
        if not self._connection.paused:
            await self._ensure_open()
        if not self._connection.paused:
            await self._send_last(body)
            return
        deadline = self._now() + self._settings.write_timeout_seconds
        with anyio.CancelScope(shield=True, deadline=deadline) as writing:
            await self._ensure_open()
            await self._send_last(body)
        if writing.cancelled_caught:
            self.abort("client_stalled")

    async def _ensure_open(self) -> None:
        if self._state is State.WAITING:
            await self._open()
        elif self._opening is not None:
            await self._opening

    async def _send_json(self, body: bytes) -> None:
        """Send a whole response instead of events."""
        headers = [*self._headers, (b"content-length", b"%d" % len(body))]
        headers[0] = (b"content-type", b"application/json")
        with anyio.move_on_after(self._settings.write_timeout_seconds, shield=True) as writing:
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
            await self._send_last(body)
        if writing.cancelled_caught:
            self.abort("client_stalled")

    async def _send_last(self, body: bytes) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": False})


class EventStream(ClientStream, Sink):
    """The stream of one completion to one client; the sink that its provider writes to.

    A provider writes its chunks from within the event loop's read callback. They are encoded and
    written to the client's connection there.

    `on_finish` is awaited once, with the text that was sent and how the stream ended, before the
    terminal event is sent. It may raise an error to be sent instead.
    """

    def __init__(
        self,
        run: Callable[[Sink], Awaitable[Completion]],
        on_finish: Callable[[str, End], Awaitable[None]],
        request_id: str,
        session_id: str,
        settings: Settings,
        *,
        include_reasoning: bool = False,
    ) -> None:
        super().__init__(settings)
        self._headers.append((b"x-session-id", session_id.encode()))
        self.report = StreamReport()
        self.started = False
        self.on_start: Callable[[], None] = _ignore
        self._run = run
        self._on_finish = on_finish
        # Any, because the events have fields of several types.
        self._ids: dict[str, Any] = {"id": request_id, "session_id": session_id}
        self._include_reasoning = include_reasoning
        self._before_chunk = b'data: {"chunk":'
        self._before_reasoning = b'data: {"reasoning":'
        self._after_chunk = b',"id":' + to_json(request_id) + b"}\n\n"
        self._chunks: list[str] = []
        self._reasoning: list[str] = []
        self._sent_bytes = self._text_bytes = 0
        self._finished = asyncio.Event()
        # Since when the provider has been silent.
        self._waiting_since = 0.0
        self._resume_provider: Callable[[], None] = _ignore
        self._finish_provider: Callable[[], bool] = _cannot_finish

    async def stop(self) -> None:
        """Stop the stream. Return when its turn is stored and its session is free.

        Raise state_unavailable if that takes too long or fails.
        """
        self.abort(Stopped())
        with anyio.move_on_after(FINISH_SECONDS):
            await self._finished.wait()
            if not isinstance(self.end, ServiceError) or self.end.code != "state_unavailable":
                return
        raise ServiceError("state_unavailable", NOT_STOPPED, retry_after=1)

    # The sink

    def attach(self, resume: Callable[[], None], finish: Callable[[], bool]) -> None:
        self._resume_provider, self._finish_provider = resume, finish

    def write(self, chunks: Chunks) -> bool:
        now, report = self._now(), self.report
        gap = now - self._waiting_since
        report.wait_seconds += gap
        if self.started:
            report.max_chunk_gap = max(report.max_chunk_gap, gap)
        else:
            self.started = True
            self.on_start()
        self._waiting_since = now
        if chunks:
            self._write_chunks(chunks, now)
        if self._connection.paused or len(self._held) > MAX_HELD_READS:
            self._pause(now)
            return False
        return True

    def _write_chunks(self, chunks: Chunks, now: float) -> None:
        """Send an event for each chunk, reasoning only if it was requested."""
        texts = chunks
        if Reasoning in map(type, chunks):
            texts = [chunk for chunk in chunks if type(chunk) is str]
            if self._include_reasoning:
                self._reasoning += [chunk for chunk in chunks if type(chunk) is Reasoning]
            else:
                chunks = texts
        if not chunks:
            return
        # An event is one line, since JSON escapes line ends.
        before, reasoning, after = self._before_chunk, self._before_reasoning, self._after_chunk
        events = b"".join(
            [
                (before if type(each) is str else reasoning) + to_json(each) + after
                for each in chunks
            ]
        )
        if not events.isascii():
            events = escape_line_separators(events)
        self._sent_bytes += len(events)
        self._text_bytes += len(events) - len(chunks) * (len(before) + len(after))
        if self._sent_bytes > MAX_SENT_BYTES or self._text_bytes > MAX_TEXT_BYTES:
            raise ServiceError("upstream_error", "The response is longer than 4 MiB.")
        if texts and self.report.first_chunk_at is None:
            self.report.first_chunk_at = now
        self._chunks += texts
        self.report.chunks += len(texts)
        self._sent_at = now
        self._write(events)

    def _resume(self) -> None:
        self._resume_provider()

    def _end_pause(self, now: float) -> None:
        if self._paused_since is not None:
            self.report.wait_seconds += now - self._paused_since
            self._waiting_since = now
        super()._end_pause(now)

    # The provider

    async def _relay(self) -> None:
        self._waiting_since = self._started_at
        try:
            completion = await self._run(self)
        except Exception as error:
            self.end = self.end or to_service_error(error)
        else:
            self.end = self.end or completion

    def _deadlines(self) -> list[Deadline]:
        """Return the deadlines of the provider.

        Time in which the client does not read does not count against it. It may extend a stream to
        twice TOTAL_TIMEOUT_SECONDS.
        """
        limits, paused_seconds = self._settings, self._paused_seconds
        deadlines: list[Deadline] = []
        if self._paused_since is not None:
            paused_seconds += self._now() - self._paused_since
        elif self.started:
            deadlines.append((self._waiting_since + limits.idle_timeout_seconds, self._on_idle))
        total = limits.total_timeout_seconds
        deadline = self._started_at + total + min(paused_seconds, total)
        problem = f"The response was not complete within {total:g} s. Retry."
        late = ServiceError("upstream_timeout", problem)
        reason: ServiceError | Disconnect = "client_stalled" if paused_seconds >= total else late
        return [*deadlines, (deadline, partial(self.abort, reason))]

    def _on_idle(self) -> None:
        """Abort, unless the provider has already sent what may count as the end."""
        self._waiting_since = self._now()
        if self._finish_provider():
            return
        idle = self._settings.idle_timeout_seconds
        problem = f"The provider sent nothing for {idle:g} s in the middle of its response. Retry."
        self.abort(ServiceError("upstream_timeout", problem))

    # The end

    async def _finish(self, end: End | None) -> End:
        """Store the turn.

        Shielded: a disconnect or a cancelled request must not lose the text so far.
        """
        if end is None:
            end = ServiceError("internal_error", "The request was cancelled.")
        now = self._now()
        if self._paused_since is None:
            self.report.wait_seconds += now - self._waiting_since
        self._end_pause(now)
        try:
            with anyio.CancelScope(shield=True, deadline=now + FINISH_SECONDS) as storing:
                await self._on_finish("".join(self._chunks), end)
        except Exception as error:
            end = to_service_error(error)
        if storing.cancelled_caught:
            end = ServiceError("state_unavailable", NOT_STORED)
        self.end = end
        self._finished.set()
        return end

    def _terminal_event(self, end: Completion | ServiceError | Stopped) -> bytes:
        if isinstance(end, Completion):
            return encode_event(DoneEvent(**self._ids, **vars(end)))
        if isinstance(end, Stopped):
            return encode_event(StoppedEvent(**self._ids))
        return encode_event(ErrorEvent(**self._ids, error=end.detail()))

    def encode_body(self) -> bytes:
        """Return the response as one JSON object, after the stream has ended."""
        end = self.end if isinstance(self.end, Completion) else Completion(None, None, None)
        body = CompletionBody(
            status="done" if end is self.end else "stopped",
            **self._ids,
            **vars(end),
            content="".join(self._chunks),
            reasoning="".join(self._reasoning) if self._include_reasoning else None,
        )
        return to_json(body)

    def fill_report(self) -> StreamReport:
        """Return the report, after the stream has ended."""
        report, end = self.report, self.end
        if isinstance(end, Completion):
            report.model, report.finish_reason = end.model, end.finish_reason
            report.usage, report.history_trimmed = end.usage, end.history_trimmed
        report.error = end if isinstance(end, ServiceError) else None
        report.outcome = self.outcome
        return report


def encode_event(event: BaseModel) -> bytes:
    """Return an event as one `data:` line and a blank line."""
    return escape_line_separators(b"data: " + to_json(event) + b"\n\n")


class CompletionResponse(EventStream):
    """The same completion as one JSON response, sent when it has ended."""

    def _write(self, events: bytes) -> None:
        """Send nothing before the end."""

    async def _send_end(self, end: End) -> None:
        """Send the whole response. An error is raised and gets an HTTP status of its own."""
        if isinstance(end, Completion | Stopped):
            await self._send_json(self.encode_body())


def escape_line_separators(events: bytes) -> bytes:
    """Escape U+0085, U+2028 and U+2029, where the line readers of common clients would split."""
    return (
        events.replace(b"\xc2\x85", b"\\u0085")
        .replace(b"\xe2\x80\xa8", b"\\u2028")
        .replace(b"\xe2\x80\xa9", b"\\u2029")
    )


def _ignore() -> None:
    pass


def _cannot_finish() -> bool:
    return False
