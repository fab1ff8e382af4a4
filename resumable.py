"""Resumable streams: a lost connection does not end a request that has an Idempotency-Key.

A *generation* is a completion that runs by itself: its provider's stream, its events, its turn.
*Readers* attach to it and leave. Events are numbered and retained, so that a reader can begin after
the last event it has. A request without a key never comes here.
"""

import asyncio
import hashlib
import re
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from pydantic_core import to_json
from starlette.types import Message

from chat import ChatRequest, ErrorEvent
from errors import FieldProblem, ServiceError, invalid_request
from providers import Completion
from settings import Settings
from stream import ClientStream, End, EventStream, Stopped

IDEMPOTENCY_KEY = re.compile("[!-~]{16,255}")
# A user with several tabs needs a few. Each reader costs a connection.
MAX_READERS = 8


@dataclass(eq=False)
class Generation:
    """A completion with its events and its readers.

    It stands in for the client of its EventStream, as a connection that always takes more. Event
    `number`, counted from 1, is `events[number - 1 - first]`. The terminal event follows the others.
    """

    key: tuple[str, str]
    request_hash: bytes
    request_id: str
    on_change: Callable[["Generation"], None]
    stream_id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    session: tuple[str, str] = ("", "")
    events: list[bytes] = field(default_factory=list)
    first: int = 0
    retained_bytes: int = 0
    # Whether events are kept for readers to come.
    retaining: bool = True
    terminal: bytes | None = None
    # The error of a request that failed before its first chunk.
    error: ServiceError | None = None
    readers: set["Reader"] = field(default_factory=set)
    stream: EventStream | None = None
    expiry: asyncio.TimerHandle | None = None
    # What ClientConnection has.
    on_resume: Callable[[], None] = lambda: None
    on_disconnect: Callable[[], None] = lambda: None
    disconnected = paused = False

    @property
    def last(self) -> int:
        """The number of the latest event before the terminal event."""
        return self.first + len(self.events)

    @property
    def ended(self) -> bool:
        return self.terminal is not None or self.error is not None

    def write(self, data: bytes) -> None:
        """Number and retain events, and let the readers send them."""
        for event in data.removesuffix(b"\n\n").split(b"\n\n"):
            self.events.append(self._number(event, self.last + 1))
            self.retained_bytes += len(self.events[-1])
        self._advance_readers()
        if not self.retaining:
            self.drop_events()

    async def send(self, message: Message) -> None:
        """Take the terminal event, which the stream sends through ASGI."""
        if message["type"] == "http.response.body":
            event = message["body"].removesuffix(b"\n\n")
            self.terminal = self._number(event, self.last + 1)
            self._advance_readers()

    def fail(self, error: ServiceError) -> None:
        """End with an error before the first chunk. Each reader responds with it by itself."""
        self.error = error
        self._advance_readers()

    def abort(self) -> None:
        """There is no connection to reset."""

    def drop_events(self) -> None:
        """Forget the events so far. A reader that has not sent them yet is disconnected."""
        self.first, self.events, self.retained_bytes = self.last, [], 0

    def parse_event_id(self, text: str) -> int:
        """Return the number of the event that a Last-Event-ID names, or 0 if it names none."""
        stream_id, _, number = text.rpartition(":")
        if stream_id != self.stream_id or not re.fullmatch("[1-9][0-9]{0,8}", number):
            return 0
        latest = self.last + (self.terminal is not None)
        return int(number) if int(number) <= latest else 0

    def _number(self, event: bytes, number: int) -> bytes:
        return b"id: %b:%d\n%b\n\n" % (self.stream_id.encode(), number, event)

    def _advance_readers(self) -> None:
        for reader in list(self.readers):
            reader.advance()
        self.on_change(self)


class Reader(ClientStream):
    """One client that reads a generation, from the event after number `position` on."""

    def __init__(
        self, generation: Generation, position: int, replayed: bool, settings: Settings
    ) -> None:
        super().__init__(generation.session[1], settings)
        if replayed:
            self._headers.append((b"idempotent-replayed", b"true"))
        self._generation = generation
        self._position = min(position, generation.last)
        self._done = asyncio.Event()
        generation.readers.add(self)

    def advance(self) -> None:
        """Send the events that the client has not got yet, unless it does not read."""
        generation = self._generation
        if self._position < generation.first:
            self.abort("client_stalled")
        elif self._connection.paused:
            self._pause(self._now())
        else:
            events = generation.events[self._position - generation.first :]
            self._position = generation.last
            if events:
                self._sent_at = self._now()
                self._write(b"".join(events))
            if generation.ended:
                self._done.set()

    def _resume(self) -> None:
        self.advance()

    async def _relay(self) -> None:
        self.advance()
        await self._done.wait()

    async def _finish(self, end: End | None) -> End:
        self._generation.readers.discard(self)
        self._generation.on_change(self._generation)
        error = self._generation.error
        stopped = ServiceError("internal_error", "The request was cancelled.")
        return end or error or (ENDED if self._done.is_set() else stopped)

    def _terminal_event(self, end: Completion | ServiceError | Stopped) -> bytes:
        generation = self._generation
        if generation.terminal is not None:
            return generation.terminal
        # A heartbeat had sent the status line before the request failed.
        assert isinstance(end, ServiceError)
        event = ErrorEvent(
            id=generation.request_id, session_id=generation.session[1], error=end.detail()
        )
        return b"data: " + to_json(event) + b"\n\n"


# The end of a reader that sent the generation's terminal event.
ENDED = Completion(None, None, None)


class ResumableStreams:
    """The generations of this process, by idempotency key and by session.

    A generation that has ended is dropped after RESUME_SECONDS; one without readers is stopped after
    that time. RESUME_MAX_BYTES bounds the retained events.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._by_key: dict[tuple[str, str], Generation] = {}
        self._by_session: dict[tuple[str, str], Generation] = {}

    def attach(self, owner: str, key: str, chat: ChatRequest, event_id: str) -> Reader | None:
        """Return a reader of the request with this key, or None if it is a new request.

        Raise invalid_request for a malformed key, idempotency_key_reused if the key belongs to
        another request, too_many_streams if it has too many readers.
        """
        if not IDEMPOTENCY_KEY.fullmatch(key):
            problem = "must be 16 to 255 visible ASCII characters, such as a UUID"
            raise invalid_request(FieldProblem(field="Idempotency-Key", message=problem))
        generation = self._by_key.get((owner, key))
        if generation is None:
            return None
        if generation.request_hash != hash_request(chat):
            problem = "This Idempotency-Key was used with another request. Use a new key."
            raise ServiceError("idempotency_key_reused", problem)
        return self.read(generation, event_id, replayed=True)

    def start(self, owner: str, key: str, chat: ChatRequest, request_id: str) -> Generation:
        """Claim the key for a new generation."""
        generation = Generation((owner, key), hash_request(chat), request_id, self._on_change)
        self._by_key[generation.key] = generation
        return generation

    def open(self, generation: Generation, session: tuple[str, str], stream: EventStream) -> None:
        """Note the session, by owner and id, and the stream of a generation that begins."""
        generation.session, generation.stream = session, stream
        self._by_session[session] = generation

    def latest(self, sessions: Iterable[tuple[str, str]]) -> Generation | None:
        """Return the latest generation of the first of these sessions that has one."""
        return next(filter(None, map(self._by_session.get, sessions)), None)

    def read(self, generation: Generation, event_id: str, *, replayed: bool) -> Reader:
        """Return a reader that begins after the event `event_id`. Raise too_many_streams."""
        if len(generation.readers) >= MAX_READERS:
            problem = f"This stream has {MAX_READERS} readers, which is the limit. Close one first."
            raise ServiceError("too_many_streams", problem, retry_after=1)
        return Reader(generation, generation.parse_event_id(event_id), replayed, self._settings)

    def drop(self, generation: Generation) -> None:
        """Forget a generation: its key is new again, and no reader can attach."""
        if self._by_key.get(generation.key) is generation:
            del self._by_key[generation.key]
        if self._by_session.get(generation.session) is generation:
            del self._by_session[generation.session]
        if generation.expiry is not None:
            generation.expiry.cancel()
        generation.retaining = False

    def drop_session(self, sessions: Iterable[tuple[str, str]]) -> None:
        """Forget all generations of a session that was deleted."""
        deleted = set(sessions)
        for generation in [each for each in self._by_key.values() if each.session in deleted]:
            self.drop(generation)

    def _on_change(self, generation: Generation) -> None:
        """Keep to the limits, after events were added or a reader came or left."""
        if generation.error is not None:
            self.drop(generation)
            return
        if generation.expiry is not None:
            generation.expiry.cancel()
            generation.expiry = None
        if generation.retaining and (generation.ended or not generation.readers):
            expire = self.drop if generation.ended else self._stop_unread
            loop = asyncio.get_running_loop()
            delay = self._settings.resume_seconds
            generation.expiry = loop.call_later(delay, expire, generation)
        self._enforce_max_bytes()

    def _stop_unread(self, generation: Generation) -> None:
        if generation.stream is not None:
            generation.stream.abort("client_disconnected")

    def _enforce_max_bytes(self) -> None:
        """Drop the oldest generation that has ended, else let the largest stop retaining."""
        retained = list(self._by_key.values())
        while sum(each.retained_bytes for each in retained) > self._settings.resume_max_bytes:
            ended = [each for each in retained if each.ended]
            excess = ended[0] if ended else max(retained, key=lambda each: each.retained_bytes)
            self.drop(excess)
            if not excess.ended:
                excess.drop_events()
            retained.remove(excess)


def hash_request(chat: ChatRequest) -> bytes:
    """Return what two requests with one key must have in common: all fields, defaults included."""
    return hashlib.sha256(chat.model_dump_json().encode()).digest()
