"""EventStream: relays a provider's stream to a client as server-sent events."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import anyio
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from chat import DoneEvent, ErrorEvent
from errors import ServiceError, to_service_error
from providers import ChunkStream, Completion
from server import ABORT
from settings import Settings

NOT_STORED = "The response is complete, but it could not be saved to the session."
# Ten times the longest response of today's models.
MAX_RESPONSE_BYTES = 2**22
# X-Accel-Buffering: nginx passes each event on at once.
STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
)
# Closing the provider's connection and storing the turn are local operations.
FINISH_SECONDS_LIMIT = 5.0

# A client that closed its connection, and one that keeps it open but takes nothing.
Disconnect = Literal["client_disconnected", "client_stalled"]
End = Completion | ServiceError | Disconnect


@dataclass
class EventStream:
    """Relays `source` to the client as an event stream.

    The request's own task reads and writes, a second one listens for the client's leaving, a timer
    looks at the clocks and sends heartbeats. Nothing is opened, locked or scheduled for a chunk.
    However it ends, `on_finish` is awaited once, after the provider's connection is closed and before
    the terminal event goes out.

    A failure before the status is committed is raised, for the application to answer with a status
    of its own; a later one becomes the terminal event. Afterwards the other fields say how it went,
    times in seconds on the event loop's clock.
    """

    source: ChunkStream
    # Told the text that was sent and how it ended, before the client is; raises what to tell
    # instead.
    on_finish: Callable[[str, End], Awaitable[None]]
    request_id: str
    session_id: str
    settings: Settings
    end: End | None = None
    # What was sent, or was being sent when it ended; nobody's log is to show it.
    chunks: list[str] = field(default_factory=list, repr=False)
    first_chunk_at: float | None = None
    # How long the provider was waited for, how long the client, and at most between two chunks.
    waited: float = 0.0
    blocked: float = 0.0
    max_chunk_gap: float = 0.0

    def __post_init__(self) -> None:
        self._size = 0
        self._departed: Disconnect | None = None
        self._committed = self._headed = self._begun = False
        self._relaying = anyio.CancelScope()
        # The latest heartbeat: a chunk must not overtake the status line that it may have to send.
        self._heartbeat: asyncio.Task[None] | None = None
        self._writing_since: float | None = None

    @property
    def outcome(self) -> str:
        """`done` or the error's code, unless the client disconnected, whatever was left to tell it."""
        code = self.end.code if isinstance(self.end, ServiceError) else "done"
        return self._departed or code

    def abort(self, end: ServiceError | Disconnect) -> None:
        """Stop relaying now and end like this. The first ending counts; of a disconnect that comes
        after it, only that nobody is there any more."""
        if isinstance(end, str):
            self._departed = self._departed or end
        if self.end is None:
            self.end = end
            self._relaying.cancel()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._now = self._loop.time
        self._started = self._waiting_since = self._sent_at = self._now()
        # Two bare tasks and a timer: a task group costs 75 us, as much as a chunk.
        listening = self._loop.create_task(self._listen(receive))
        self._timer: asyncio.Handle = self._loop.call_soon(self._watch)
        try:
            with self._relaying:
                await self._relay()
        finally:
            await self._conclude()
            self._timer.cancel()
            listening.cancel()
            if self._heartbeat is not None:
                self._heartbeat.cancel()
        if isinstance(self.end, ServiceError) and not self._committed:
            raise self.end
        if self._departed == "client_stalled":
            # A polite close would wait for the client to read what is buffered.
            scope["extensions"][ABORT]()
            await receive()

    # The relay

    async def _relay(self) -> None:
        # An event is one `data:` line: JSON has no line ends of its own.
        head, tail = b'data: {"chunk":', b',"id":' + to_json(self.request_id) + b"}\n\n"
        try:
            async for batch in self.source:
                now = self._now()
                gap = now - self._waiting_since
                self.waited += gap
                if isinstance(batch, Completion):
                    self.end = self.end or batch
                    return
                if self._begun:
                    self.max_chunk_gap = max(self.max_chunk_gap, gap)
                self._begun = True
                if batch:
                    if self.first_chunk_at is None:
                        self.first_chunk_at = now
                    events = b"".join([head + to_json(chunk) + tail for chunk in batch])
                    self._size += len(events) - len(batch) * (len(head) + len(tail))
                    if self._size > MAX_RESPONSE_BYTES:
                        raise ServiceError(
                            "upstream_error", "The model's answer is longer than 4 MiB."
                        )
                    self.chunks += batch
                    await self._write(events)
                self._waiting_since = self._now()
        except Exception as error:
            self.end = self.end or to_service_error(error)

    async def _write(self, body: bytes, *, last: bool = False) -> None:
        if self._heartbeat is not None and not self._heartbeat.done():
            await asyncio.wait((self._heartbeat,))
        if self._departed is None:
            await self._transmit(body, last=last)

    async def _transmit(self, body: bytes, *, last: bool = False) -> None:
        before = self._writing_since = self._now()
        try:
            if not self._headed:
                self._committed = True
                headers = [*STREAM_HEADERS, (b"x-session-id", self.session_id.encode())]
                await self._send({"type": "http.response.start", "status": 200, "headers": headers})
                # Not before: an early end may have come while nothing was taken.
                self._headed = True
            await self._send({"type": "http.response.body", "body": body, "more_body": not last})
        except OSError:
            # ASGI's way, from its version 2.4 on, to say that nobody is there.
            self.abort("client_disconnected")
        self._writing_since = None
        self._sent_at = self._now()
        self.blocked += self._sent_at - before

    # The watchdog

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.abort("client_disconnected")

    def _watch(self) -> None:
        """Do what is due, if anything is, and look again, at once or when more may be: until the
        end, from which on `_conclude` keeps its own deadlines."""
        if self.end is not None:
            return
        due, end = self._next()
        now = self._now()
        if now >= due:
            if end is None:
                self._sent_at = now
                self._heartbeat = self._loop.create_task(self._transmit(b": keep-alive\n\n"))
            else:
                self.abort(end)
        limits = self.settings
        # What begins while nobody looks must not be seen later than it is due.
        nap = min(
            limits.idle_timeout_seconds, limits.write_timeout_seconds, limits.heartbeat_seconds
        )
        self._timer = self._loop.call_at(min(due, now + nap), self._watch)

    def _next(self) -> tuple[float, ServiceError | Disconnect | None]:
        """When something is due, and what: an early end, or a heartbeat (None). The time in which
        the client did not take what we sent is not the provider's; the client may make an answer
        last twice as long by it, no longer."""
        limits, blocked = self.settings, self.blocked
        due: list[tuple[float, ServiceError | Disconnect | None]] = []
        if self._writing_since is not None:
            blocked += self._now() - self._writing_since
            due.append((self._writing_since + limits.write_timeout_seconds, "client_stalled"))
        else:
            due.append((self._sent_at + limits.heartbeat_seconds, None))
            if self._begun:
                quiet = ServiceError(
                    "upstream_timeout", "The model stopped in the middle of its answer."
                )
                due.append((self._waiting_since + limits.idle_timeout_seconds, quiet))
        total = limits.total_timeout_seconds
        late = ServiceError("upstream_timeout", "The model took too long for its answer.")
        end = self._started + total + min(blocked, total)
        due.append((end, "client_stalled" if blocked >= total else late))
        return min(due, key=lambda pair: pair[0])

    # The ending

    async def _conclude(self) -> None:
        """Close the provider's connection, on_finish, tell the client; shielded, for a client's
        leaving or a cancelled request must not lose what was said."""
        self.end = self.end or ServiceError("internal_error", "The service was stopped.")
        if self._writing_since is not None:
            self.blocked += self._now() - self._writing_since
        elif not isinstance(self.end, Completion):
            self.waited += self._now() - self._waiting_since
        try:
            with anyio.move_on_after(FINISH_SECONDS_LIMIT, shield=True):
                await self.source.aclose()
        except Exception as error:
            self.end = to_service_error(error)
        try:
            with anyio.fail_after(FINISH_SECONDS_LIMIT, shield=True):
                await self.on_finish("".join(self.chunks), self.end)
        except TimeoutError:
            self.end = ServiceError("state_unavailable", NOT_STORED)
        except Exception as error:
            self.end = to_service_error(error)
        if self._departed is None:
            await self._tell()

    async def _tell(self) -> None:
        ids: dict[str, Any] = {"id": self.request_id, "session_id": self.session_id}
        if isinstance(self.end, Completion):
            event: DoneEvent | ErrorEvent = DoneEvent(**ids, **vars(self.end))
        elif isinstance(self.end, ServiceError) and self._committed:
            event = ErrorEvent(**ids, error=self.end.detail())
        else:
            # It is raised, and gets a status of its own.
            return
        with anyio.move_on_after(self.settings.write_timeout_seconds, shield=True) as writing:
            await self._write(b"data: " + to_json(event) + b"\n\n", last=True)
        if writing.cancelled_caught:
            self.abort("client_stalled")
