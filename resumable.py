"""Resumable streams: a request with an Idempotency-Key does not end when its connection is lost.

A *generation* is the completion of such a request: its provider's stream, its events and its turn.
It runs in a task of its own. *Readers* send its events to clients; they attach and detach at any
time. Events are numbered and retained, so that a reader can begin after the last event that its
client has. Requests without a key do not use this module.
"""

import asyncio
import hashlib
import math
import re
import secrets
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.types import Message, Receive, Scope, Send

from chat import ChatRequest, ErrorEvent, StoppedEvent
from errors import FieldProblem, ServiceError, invalid_request
from providers import Completion
from server import shutting_down
from settings import Settings
from stream import ClientStream, Deadline, End, EventStream, State, Stopped, encode_event

IDEMPOTENCY_KEY = re.compile("[!-~]{16,255}")
EVENT_NUMBER = re.compile("[1-9][0-9]{0,8}")
# A user with several tabs needs a few. Each reader costs a connection.
MAX_READERS = 8
# The owner and the id of a session.
SessionKey = tuple[str, str]


@dataclass(eq=False)
class Generation:
    """A completion with its events and its readers.

    It takes the place of the client's connection in its EventStream, and always accepts more data.
    The number of `events[0]` is `first + 1`. The terminal event follows the last one.
    """

    # The owner and the Idempotency-Key.
    key: tuple[str, str]
    request_hash: bytes
    request_id: str
    streams: "ResumableStreams"
    stream_id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    # Set when the session is open, or when that failed. Until then readers wait.
    opened: asyncio.Event = field(default_factory=asyncio.Event)
    session: SessionKey = ("", "")
    stream: EventStream | None = None
    events: list[bytes] = field(default_factory=list)
    first: int = 0
    retained_bytes: int = 0
    # Whether it has its key, and retains events for readers that attach later.
    retaining: bool = True
    terminal: bytes | None = None
    # For a request with `"stream": false`: its response.
    whole: bool = False
    body: bytes = b""
    end: End | None = None
    # Whether it failed before its first chunk. Each reader then responds with the error.
    failed_early: bool = False
    readers: set["Reader"] = field(default_factory=set)
    expiry: asyncio.TimerHandle | None = None

    def __post_init__(self) -> None:
        # The rest of the interface of ClientConnection.
        self.disconnected = self.paused = False
        self.on_resume = self.on_disconnect = self.abort

    @property
    def last(self) -> int:
        """The number of the latest event, without the terminal event."""
        return self.first + len(self.events)

    def open(self, session: SessionKey) -> None:
        """Note the session. Readers can send their response's headers now."""
        self.session = session
        self.streams.add_session(self)
        self.opened.set()

    def write(self, data: bytes) -> None:
        """Number and retain events, and let the readers send them."""
        size = self.retained_bytes
        for event in data.removesuffix(b"\n\n").split(b"\n\n"):
            self.events.append(self._number(event))
            self.retained_bytes += len(self.events[-1])
        self._advance_readers()
        self.streams.count(self.retained_bytes - size)
        self.trim()

    async def send(self, message: Message) -> None:
        """Take the terminal event. The stream sends it through ASGI."""
        if message["type"] == "http.response.body":
            self.terminal = self._number(message["body"].removesuffix(b"\n\n"))

    def abort(self) -> None:
        """Do nothing: there is no connection to reset."""

    def finish(self, error: ServiceError | None = None) -> None:
        """End the generation. `error` is the error with which it failed before its first chunk."""
        self.failed_early = error is not None
        self.end = error if self.stream is None else error or self.stream.end
        # Nothing to resume: a retry is a new request.
        forgotten = self.terminal is None and not self.last
        if self.terminal is None:
            ids: dict[str, Any] = {"id": self.request_id, "session_id": self.session[1]}
            if error is not None:
                event = encode_event(ErrorEvent(**ids, error=error.detail()))
            else:
                # It was cancelled because it had no reader.
                self.end, event = Stopped(), encode_event(StoppedEvent(**ids))
            self.terminal = self._number(event.removesuffix(b"\n\n"))
        if self.whole and self.stream is not None:
            self.body = self.stream.encode_body()
        # The stream has the text a second time.
        self.stream = None
        self.opened.set()
        self.streams.on_end(self, forgotten=forgotten)
        self._advance_readers()

    def trim(self) -> None:
        """Drop the events that no reader needs, unless they are retained."""
        if not self.retaining:
            self.drop_events(min((reader.position for reader in self.readers), default=self.last))

    def drop_events(self, last: int) -> None:
        """Drop the events up to number `last`. A reader that still needs them is disconnected."""
        count = last - self.first
        size = sum(map(len, self.events[:count]))
        del self.events[:count]
        self.first = last
        self.retained_bytes -= size
        self.streams.release(size)
        for reader in list(self.readers):
            if reader.position < last:
                reader.abort("client_stalled")

    def find_event(self, event_id: str) -> int:
        """Return the number of the event with this id, or 0 if there is none."""
        stream_id, _, number = event_id.rpartition(":")
        if stream_id != self.stream_id or not EVENT_NUMBER.fullmatch(number):
            return 0
        return int(number) if int(number) <= self.last + (self.end is not None) else 0

    def is_terminal(self, event_id: str) -> bool:
        """Return whether this is the id of the terminal event."""
        return self.find_event(event_id) > self.last

    def _number(self, event: bytes) -> bytes:
        return b"id: %b:%d\n%b\n\n" % (self.stream_id.encode(), self.last + 1, event)

    def _advance_readers(self) -> None:
        for reader in list(self.readers):
            reader.advance()


class Reader(ClientStream):
    """The response to one client that reads a generation, after event number `position`.

    It is one of the generation's readers from its creation until its call ends.
    """

    def __init__(self, generation: Generation, position: int, settings: Settings) -> None:
        super().__init__(settings)
        self.generation = generation
        # The terminal event is sent in any case.
        self.position = min(position, generation.last)
        self._caught_up = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the generation ends. Raise its error if nothing was sent yet."""
        try:
            await self.generation.opened.wait()
            if session_id := self.generation.session[1]:
                self._headers.append((b"x-session-id", session_id.encode()))
            await super().__call__(scope, receive, send)
        finally:
            self.generation.streams.detach(self)

    def advance(self) -> None:
        """Send the events that the client does not have yet, until it stops reading."""
        generation = self.generation
        if self._task is None or self.end is not None:
            return
        if self._state is State.OPEN:
            self._send_events()
        elif generation.last:
            # An error can no longer get a status of its own. Events wait in the generation, not in
            # this stream: there may be megabytes of them.
            self._start_opening()
        if self.position == generation.last and generation.end is not None:
            self._caught_up.set()

    def _send_events(self) -> None:
        generation = self.generation
        while self.position < generation.last and not self._connection.paused:
            self._connection.write(generation.events[self.position - generation.first])
            self.position += 1
            self._sent_at = self._now()
        if self._connection.paused:
            self._pause(self._now())

    async def _open(self) -> None:
        await super()._open()
        self.advance()

    def _resume(self) -> None:
        self.advance()
        self.generation.trim()

    def _deadlines(self) -> list[Deadline]:
        """Limit the time in which the client does not read to TOTAL_TIMEOUT_SECONDS in all."""
        if self._paused_since is None:
            return []
        left = self._settings.total_timeout_seconds - self._paused_seconds
        return [(self._paused_since + left, partial(self.abort, "client_stalled"))]

    async def _relay(self) -> None:
        self.advance()
        await self._caught_up.wait()
        if not self.generation.failed_early:
            await self._ensure_open()
        self.end = self.end or self.generation.end

    async def _finish(self, end: End | None) -> End:
        self.generation.streams.detach(self)
        return end or ServiceError("internal_error", "The request was cancelled.")

    def _terminal_event(self, end: End) -> bytes:
        # There is none if this request was cancelled.
        return self.generation.terminal or b""


class WholeReader(Reader):
    """The JSON response to one client, sent when the generation has ended."""

    def advance(self) -> None:
        # It needs no events.
        self.position = self.generation.last
        if self._task is not None and self.generation.end is not None:
            self._caught_up.set()

    async def _ensure_open(self) -> None:
        """Send nothing before the end."""

    async def _send_end(self, end: End) -> None:
        if isinstance(end, Completion | Stopped):
            await self._send_json(self.generation.body)


class ResumableStreams:
    """The generations of this process, by Idempotency-Key and by session.

    RESUME_SECONDS after the last reader has detached, a generation that has ended is dropped and
    one that is running is cancelled. RESUME_MAX_BYTES limits the size of the retained events.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        # Readers send the heartbeats.
        self.stream_settings = settings.model_copy(update={"heartbeat_seconds": math.inf})
        self._by_key: dict[tuple[str, str], Generation] = {}
        # In each session, the oldest is first.
        self._by_session: dict[SessionKey, list[Generation]] = {}
        self._running: set[Generation] = set()
        # In the order in which they ended.
        self._ended: dict[Generation, None] = {}
        self._retained_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, owner: str, key: str, chat: ChatRequest, event_id: str) -> Reader | None:
        """Return a reader for a retry of the request with this key, or None if the key is new.

        Raise invalid_request for a malformed key, idempotency_key_reused if the key was used with
        another request, or too_many_streams.
        """
        if not IDEMPOTENCY_KEY.fullmatch(key):
            problem = "must be 16 to 255 visible ASCII characters, for example a UUID"
            raise invalid_request(FieldProblem(field="Idempotency-Key", message=problem))
        generation = self._by_key.get((owner, key))
        if generation is None:
            return None
        if generation.request_hash != hash_request(chat):
            problem = "This Idempotency-Key was used with another request. Send a new key."
            raise ServiceError("idempotency_key_reused", problem)
        return self.read(generation, event_id, whole=not chat.stream)

    def start(self, owner: str, key: str, chat: ChatRequest, request_id: str) -> Generation:
        """Return a new generation, which has the key from now on."""
        generation = Generation((owner, key), hash_request(chat), request_id, self)
        generation.whole = not chat.stream
        self._by_key[generation.key] = generation
        self._running.add(generation)
        return generation

    def run(self, generate: Coroutine[Any, Any, None]) -> None:
        """Run a generation in a task. `aclose` waits for it."""
        task = asyncio.create_task(generate)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def latest(self, sessions: Iterable[SessionKey]) -> Generation | None:
        """Return the latest generation of the first of these sessions that has any."""
        found = (self._by_session.get(session) for session in sessions)
        return next((generations[-1] for generations in found if generations), None)

    def read(self, generation: Generation, event_id: str, *, whole: bool = False) -> Reader:
        """Return a reader that begins after the event with this id, or sends one JSON object.

        Raise too_many_streams.
        """
        if len(generation.readers) >= MAX_READERS:
            problem = f"This stream is at its limit of {MAX_READERS} readers. Close one and retry."
            raise ServiceError("too_many_streams", problem, retry_after=1)
        position = generation.find_event(event_id)
        reader: Reader
        if whole:
            reader = WholeReader(generation, position, self.stream_settings)
        else:
            reader = Reader(generation, position, self._settings)
        generation.readers.add(reader)
        self._update_expiry(generation)
        return reader

    def detach(self, reader: Reader) -> None:
        """Remove a reader from its generation."""
        generation = reader.generation
        if reader in generation.readers:
            generation.readers.discard(reader)
            generation.trim()
            self._update_expiry(generation)

    def drop_session(self, sessions: Iterable[SessionKey]) -> None:
        """Drop the generations of a session that was deleted."""
        for session in set(sessions):
            for generation in self._by_session.get(session, [])[:]:
                self._drop(generation)

    async def aclose(self) -> None:
        """End all generations. Return when their turns are stored."""
        for stream in [each.stream for each in self._running if each.stream is not None]:
            stream.abort(shutting_down())
        if self._tasks:
            await asyncio.wait(self._tasks)

    # Called by a generation

    def add_session(self, generation: Generation) -> None:
        self._by_session.setdefault(generation.session, []).append(generation)

    def on_end(self, generation: Generation, *, forgotten: bool) -> None:
        """Note that a generation has ended. Its events stay available, unless it is forgotten."""
        self._running.discard(generation)
        self._ended[generation] = None
        size = len(generation.terminal or b"") + len(generation.body)
        generation.retained_bytes += size
        self.count(size)
        if forgotten:
            self._drop(generation)
        self._update_expiry(generation)

    def count(self, added_bytes: int) -> None:
        """Add to the size of all retained events, and keep it within RESUME_MAX_BYTES.

        The oldest generation that has ended is dropped first. If none is left, the largest of the
        others stops retaining events, and at last its slowest readers are disconnected.
        """
        self._retained_bytes += added_bytes
        while self._retained_bytes > self._settings.resume_max_bytes:
            oldest = next(iter(self._ended), None)
            excess = oldest or max(self._running, key=lambda each: each.retained_bytes)
            if excess.retaining or excess is oldest:
                self._drop(excess)
            else:
                excess.drop_events(excess.last)

    def release(self, removed_bytes: int) -> None:
        """Subtract from the size of all retained events."""
        self._retained_bytes -= removed_bytes

    # Limits

    def _update_expiry(self, generation: Generation) -> None:
        """Start the timer if the last reader has left. Stop it if a reader is attached."""
        if generation.expiry is not None:
            generation.expiry.cancel()
            generation.expiry = None
        if not generation.readers and (generation in self._running or generation in self._ended):
            delay = self._settings.resume_seconds if generation.retaining else 0
            loop = asyncio.get_running_loop()
            generation.expiry = loop.call_later(delay, self._expire, generation)

    def _expire(self, generation: Generation) -> None:
        if generation.end is not None:
            self._drop(generation)
        elif generation.stream is not None:
            generation.stream.abort("client_disconnected")
        else:  # pragma: no cover - its session is being opened for that long
            self._update_expiry(generation)

    def _drop(self, generation: Generation) -> None:
        """Make the key of a generation new again, and drop the events that no reader needs.

        If it has ended, drop all its events. If it is running without readers, cancel it.
        """
        if generation.retaining:
            generation.retaining = False
            del self._by_key[generation.key]
            generations = self._by_session.get(generation.session, [])
            if generation in generations:
                generations.remove(generation)
            if not generations:
                self._by_session.pop(generation.session, None)
        if generation.end is not None:
            self._ended.pop(generation, None)
            generation.drop_events(generation.last)
            self.release(generation.retained_bytes)
            generation.retained_bytes = 0
        else:
            generation.trim()
        self._update_expiry(generation)


def hash_request(chat: ChatRequest) -> bytes:
    """Return a hash of all fields, which two requests with one key must have in common."""
    return hashlib.sha256(chat.model_dump_json().encode()).digest()
